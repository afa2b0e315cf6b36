from collections import OrderedDict, namedtuple

import pytest
import torch

from nestopt_ext import _lists

Pair = namedtuple("Pair", "first second")
A, B = torch.ones(2), torch.zeros(3, 1)


@pytest.mark.parametrize(
    "tensors",
    [A, [A, B], (A, B), Pair(A, B), {"a": A, "b": B}, OrderedDict(b=B, a=A), [], (), {}],
    ids=["tensor", "list", "tuple", "namedtuple", "dict", "ordered", "no-list", "no-tuple", "no-dict"],
)
def test_structure_round_trip(tensors):
    flat, structure = _lists.flatten("f", "v", tensors)
    packed = structure.pack(flat)
    assert type(packed) is type(tensors)
    if isinstance(tensors, dict):
        assert list(packed) == list(tensors)
        assert all(packed[key] is tensors[key] for key in tensors)
    elif isinstance(tensors, torch.Tensor):
        assert packed is tensors
    else:
        assert len(packed) == len(tensors) and all(x is y for x, y in zip(packed, tensors, strict=True))


def test_iterables_and_parameter_containers_are_read():
    linear = torch.nn.Linear(2, 1)
    assert [id(t) for t in _lists.flatten("f", "v", linear.parameters())[0]] == [id(t) for t in linear.parameters()]
    assert len(_lists.flatten("f", "v", torch.nn.ParameterList(linear.parameters()))[0]) == 2
    assert _lists.flatten("f", "v", torch.nn.ParameterDict({"w": linear.weight}))[1].labels("v") == ["v['w']"]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (None, "f: v must be a Tensor, or a list, tuple or dict of tensors; got None."),
        (3.0, "f: v must be a Tensor, or a list, tuple or dict of tensors; got float."),
        ("ab", "f: v must be a Tensor, or a list, tuple or dict of tensors; got str."),
        ([A, None], "f: v[1] must be a Tensor; got None."),
        ({"a": 1}, "f: v['a'] must be a Tensor; got int."),
        (
            torch.nn.Linear(1, 1),
            "f: v must be a Tensor, or a list, tuple or dict of tensors; got Linear."
            " Pass its parameters: dict(module.named_parameters()).",
        ),
    ],
)
def test_flatten_refuses_by_name(tensors, message):
    with pytest.raises(TypeError) as error:
        _lists.flatten("f", "v", tensors)
    assert str(error.value) == message


def test_match_takes_keys_in_any_order_and_any_sequence():
    structure = _lists.flatten("f", "v", {"a": A, "b": B})[1]
    first, second = structure.match("f", "w", {"b": B, "a": A})
    assert first is A and second is B
    first, second = _lists.flatten("f", "v", [A, B])[1].match("f", "w", (A, B))
    assert first is A and second is B


@pytest.mark.parametrize(
    ("like", "value", "kind", "message"),
    [
        (A, (A,), TypeError, "f: w must be a Tensor; got tuple. Pass its only element."),
        ([A], A, TypeError, "f: w must be a sequence or dict of tensors; got Tensor."),
        ([A, B], [A], ValueError, "f: w must have 2 tensors; got 1."),
        ([A], {"a": A}, TypeError, "f: w must be a list or tuple of tensors; got dict."),
        ({"a": A}, [A], TypeError, "f: w must be a dict of tensors; got list."),
        ({"a": A}, {"b": A}, ValueError, "f: w must have the keys ['a']; got ['b']."),
    ],
)
def test_match_refuses_by_name(like, value, kind, message):
    with pytest.raises(kind) as error:
        _lists.flatten("f", "v", like)[1].match("f", "w", value)
    assert str(error.value) == message


def test_match_tells_an_argument_from_a_result():
    with pytest.raises(TypeError) as error:
        _lists.flatten("f", "v", A)[1].match("f", "w", [A], returned=True)
    assert str(error.value) == "f: w must be a Tensor; got list. Return its only element."


def test_algebra():
    a = [torch.tensor([3.0, 0.0]), torch.tensor(4.0, dtype=torch.float64), torch.empty(0)]
    assert float(_lists.norm(a)) == 5.0
    assert float(_lists.dot(a, a)) == 25.0
    assert _lists.numel(a) == 3
    assert [float(t) for t in _lists.max_abs(a)] == [4.0]
    assert [t.dtype for t in _lists.zeros_like(a)] == [t.dtype for t in a]
    assert float(_lists.norm([])) == 0.0 and float(_lists.dot([], [])) == 0.0 and _lists.max_abs([]) == []


def test_the_norm_of_nothing_is_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        assert float(_lists.norm([])) == 0 == float(_lists.dot([], []))


def test_norm_does_not_overflow_where_the_squares_would():
    assert float(_lists.norm([torch.full((4,), 1e25)])) == pytest.approx(2e25, rel=1e-6)


def test_max_abs_keeps_nan():
    assert torch.isnan(_lists.max_abs([torch.tensor([1.0, float("nan"), 2.0]), torch.ones(3)])[0])


def test_unshare_clones_what_overlaps_and_nothing_else():
    base = torch.arange(6.0)
    own = torch.ones(2)
    view, kept = _lists.unshare([base[2:4], own], [base[:1]])
    base.zero_()
    assert view.tolist() == [2.0, 3.0]
    assert kept.data_ptr() == own.data_ptr()


def test_to_host_splits_what_it_joined():
    numbers = [torch.tensor(1.5), torch.tensor([2.0, 3.0], dtype=torch.float64), torch.empty(0)]
    assert _lists.to_host(numbers) == [[1.5], [2.0, 3.0], []]


def test_norms_are_of_each_list():
    batch = [torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([4.0, 0.0]), torch.empty(2, 0, dtype=torch.bfloat16)]
    assert _lists.norms(batch).tolist() == [5.0, 1.0]
    assert _lists.norms([torch.empty(0, 3)]).shape == (0,)
    assert float(_lists.norms([torch.full((1, 4), 1e25)])) == pytest.approx(2e25, rel=1e-6)


def test_all_like_is_check_like_without_words():
    assert _lists.all_like([A, B], [torch.zeros(2), torch.ones(3, 1)])
    for other in (torch.ones(3), torch.ones(2, dtype=torch.float64), torch.ones(2, device="meta"), A.to_sparse()):
        assert not _lists.all_like([other], [A])
