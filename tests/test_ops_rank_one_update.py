"""rank_one_update_ against the sum in extended precision, in every layout and dtype."""

import pytest
import torch
from helpers import (
    FLOATING,
    LAYOUTS,
    SHAPES,
    Memory,
    all_same_bits,
    as_number,
    assert_as_good_as,
    assert_refused,
    contiguous,
    exact,
    expanded,
    name_of,
    random_lists,
)
from torch._dynamo.testing import CompileCounterWithBackend

from nestopt_ext import _ops, _reference

INF, NAN = float("inf"), float("nan")
#: dtypes of v and of g
PAIRS = [(d, d) for d in FLOATING] + [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)]
PAIR_IDS = [f"{name_of(v)}-{name_of(g)}" for v, g in PAIRS]


def make(shapes, pairs, device="cpu", layouts=(contiguous,) * 2):
    return random_lists(shapes, pairs, layouts, device)


def check(v, g, a=0.7, b=-1.3):
    """Judges a call on lists: numbers, and memory that was not to be touched."""
    twin = [contiguous(t) for t in v]
    want = [float(a) * exact(x) + float(b) * exact(y) for x, y in zip(v, g, strict=True)]
    memory = Memory([*v, *g])
    _ops.rank_one_update_(v, g, as_number(a), as_number(b))
    _reference.rank_one_update_(twin, g, as_number(a), as_number(b))
    assert memory.changed_only(v)
    assert_as_good_as(v, twin, want)


@pytest.mark.parametrize("a, b", [(0.7, -1.3), (0.0, 2.5), (1.0, 0.0), (-3.0, 1e-3)])
@pytest.mark.parametrize("pair", PAIRS, ids=PAIR_IDS)
def test_equals_the_sum(pair, a, b, device):
    check(*make(SHAPES, [pair], device), a, b)


def test_mixed_dtypes_in_one_list(device):
    check(*make(SHAPES * 3, [*PAIRS, PAIRS[0]], device))


@pytest.mark.parametrize("pair", PAIRS, ids=PAIR_IDS)
def test_known_numbers(pair, device):
    """0.5 * 8 - 0.25 * 4 = 3, and 0.5 * (-2) - 0.25 * 8 = -3."""
    v = [torch.tensor([x], dtype=pair[0], device=device) for x in (8.0, -2.0)]
    g = [torch.tensor([x], dtype=pair[1], device=device) for x in (4.0, 8.0)]
    _ops.rank_one_update_(v, g, torch.tensor(0.5), torch.tensor(-0.25))
    assert [t.item() for t in v] == [3.0, -3.0] and [t.item() for t in g] == [4.0, 8.0]


@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[2], PAIRS[4]], ids=lambda p: f"{name_of(p[0])}-{name_of(p[1])}")
@pytest.mark.parametrize("g_layout", [*LAYOUTS.values(), expanded], ids=lambda f: f.__name__)
@pytest.mark.parametrize("v_layout", LAYOUTS.values(), ids=lambda f: f.__name__)
def test_layouts(v_layout, g_layout, pair, device):
    check(*make([(4, 6, 5, 3), (3, 33, 17, 13), (5, 2), (7,), (), (0, 3)], [pair], device, (v_layout, g_layout)))


def test_strided_equals_contiguous_bit_for_bit(native):
    v, g = make([(3, 33, 17, 13), (9, 5, 2, 2)] * 6, PAIRS)
    strided = [LAYOUTS["every_other"](t) for t in v]
    for list_ in (v, strided):
        _ops.rank_one_update_(list_, g, torch.tensor(0.7), torch.tensor(0.3))
    assert all_same_bits(v, strided)


def test_interleaved_views_of_one_storage(device):
    base = torch.randn(4001, 4, device=device)
    check([base[:, 0], base[:, 2]], [base[:, 1], base[:, 3]])


def test_thousands_of_tensors(device):
    check(*make([((), (1,), (2, 2), (0,), (9,))[i % 5] for i in range(4500)], PAIRS, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_numbers_of_any_shape_of_one_element(dtype, device):
    results = []
    for shape, where in (((), "cpu"), ((1,), "cpu"), ((1, 1), device)):
        torch.manual_seed(0)
        v, g = make(SHAPES, PAIRS, device)
        a, b = (torch.full(shape, x, dtype=dtype, device=where) for x in (0.1, 0.3))
        _ops.rank_one_update_(v, g, a, b)
        results.append(v)
    assert all_same_bits(results[0], results[1]) and all_same_bits(results[0], results[2])


def test_nothing(device):
    for call in (_ops.rank_one_update_, torch.ops.nestopt_ext.rank_one_update_):
        call([], [], torch.tensor(1.0), torch.tensor(1.0))
        call(*make([(0,), (3, 0)], PAIRS, device), torch.tensor(NAN), torch.tensor(1.0))


@pytest.mark.parametrize("pair", PAIRS, ids=PAIR_IDS)
@pytest.mark.parametrize("value", [NAN, INF])
def test_what_is_not_finite_shows_wherever_it_comes_from(value, pair, device):
    for place in ("v", "g", "a", "b"):
        v, g = make([(3,), (20000,)], [pair], device)
        g[0].fill_(1.0), v[0].fill_(1.0)
        numbers = {"a": 0.5, "b": 0.5}
        if place in numbers:
            numbers[place] = value
        else:
            {"v": v, "g": g}[place][1][19999] = value
        _ops.rank_one_update_(v, g, *(as_number(numbers[k]) for k in "ab"))
        assert not v[1][19999].isfinite()
        assert v[0].isfinite().all() == (place in "vg") and v[1][:19999].isfinite().any() == (place in "vg")


def test_zero_times_what_is_not_finite_is_not_a_number(device):
    v, g = [torch.full((5,), INF, device=device)], [torch.ones(5, device=device)]
    _ops.rank_one_update_(v, g, torch.tensor(0.0), torch.tensor(1.0))
    assert v[0].isnan().all()


def test_the_same_bits_on_any_number_of_threads():
    results = []
    for threads in (1, 2, 5, 1):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        v, g = make([*SHAPES, (300001,), (1,), (300, 301)], PAIRS)
        v[5] = LAYOUTS["every_other"](v[5])
        _ops.rank_one_update_(v, g, torch.tensor(0.7), torch.tensor(0.3))
        results.append(v)
    assert all(all_same_bits(results[0], other) for other in results[1:])


def test_no_memory_beside_the_list(native):
    v, g = make([(1000, 1000), (300, 301)], PAIRS)
    a, b = torch.tensor(0.1), torch.tensor(0.2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        _ops.rank_one_update_(v, g, a, b)
    assert max((abs(e.self_cpu_memory_usage) for e in profile.events()), default=0) < 1024


# ---- hostile arguments ----------------------------------------------------------------------------------------------


def _ok():
    return {"v": [torch.ones(3, 4)], "g": [torch.ones(3, 4)], "a": torch.tensor(0.5), "b": torch.tensor(0.5)}


def _with(**changed):
    return {**_ok(), **changed}


def _shared():
    flat = torch.zeros(30)
    return _with(v=[flat[:12].view(3, 4)], g=[flat[4:16].view(3, 4)])


def _number_inside():
    v = torch.ones(3, 4)
    return _with(v=[v], b=v[1, 1])


HOSTILE = {
    "v of integers": (
        lambda: _with(v=[torch.ones(3, 4).long()]),
        TypeError,
        "v[0] must be float32, float64, bfloat16 or float16; got int64.",
    ),
    "v expanded": (
        lambda: _with(v=[torch.ones(1, 4).expand(3, 4)]),
        ValueError,
        "v[0] must not overlap itself; got shape (3, 4) with strides (0, 1). Pass a clone.",
    ),
    "v that requires grad": (
        lambda: _with(v=[torch.ones(3, 4, requires_grad=True)]),
        ValueError,
        "v[0] must not require grad while grad mode is on; got one that does. Call under torch.no_grad().",
    ),
    "g that requires grad": (
        lambda: _with(g=[torch.ones(3, 4, requires_grad=True)]),
        ValueError,
        "g[0] must not require grad while grad mode is on; got one that does. Call under torch.no_grad().",
    ),
    "b that requires grad": (
        lambda: _with(b=torch.ones((), requires_grad=True)),
        ValueError,
        "b must not require grad while grad mode is on; got one that does. Call under torch.no_grad().",
    ),
    "too few g": (lambda: _with(g=[]), ValueError, "g must have the length of v, 1; got 0."),
    "g of another shape": (
        lambda: _with(g=[torch.ones(4, 3)]),
        ValueError,
        "g[0] must have the shape of v[0] (3, 4); got (4, 3).",
    ),
    "g of another dtype": (
        lambda: _with(g=[torch.ones(3, 4).double()]),
        TypeError,
        "g[0] must be float32, bfloat16 or float16 beside v[0] of float32; got float64.",
    ),
    "g elsewhere": (
        lambda: _with(g=[torch.ones(3, 4, device="meta")]),
        ValueError,
        "g[0] must be on cpu, the device of v[0]; got meta.",
    ),
    "a of two elements": (lambda: _with(a=torch.ones(2)), ValueError, "a must have one element; got shape (2,)."),
    "a of 16 bits": (
        lambda: _with(a=torch.ones(()).half()),
        TypeError,
        "a must be float32 or float64; got float16.",
    ),
    "b elsewhere": (lambda: _with(b=torch.ones((), device="meta")), ValueError, "b must be on cpu; got meta."),
    "shared memory": (
        _shared,
        ValueError,
        "v[0] must not share memory with g[0]; got overlapping tensors. Pass a clone.",
    ),
    "b inside v": (
        _number_inside,
        ValueError,
        "v[0] must not share memory with b; got overlapping tensors. Pass a clone.",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("route", [_ops.rank_one_update_, torch.ops.nestopt_ext.rank_one_update_], ids=["typed", "op"])
def test_refused_by_name_and_nothing_is_modified(route, name):
    make_arguments, kind, message = HOSTILE[name]
    arguments = make_arguments()
    tensors = [t for value in arguments.values() for t in (value if isinstance(value, list) else [value])]
    assert_refused(lambda: route(**arguments), tensors, kind, f"rank_one_update_: {message}")


def test_a_tangent_is_refused():
    arguments = _ok()
    with torch.autograd.forward_ad.dual_level():
        arguments["a"] = torch.autograd.forward_ad.make_dual(arguments["a"], torch.ones(()))
        with pytest.raises(ValueError, match="rank_one_update_: a must not carry a forward-mode tangent"):
            _ops.rank_one_update_(**arguments)


# ---- the dispatcher -------------------------------------------------------------------------------------------------


def test_autograd_is_told_of_every_write(device):
    v, g = make([(3,), (0,), (2, 2)], [PAIRS[0]], device)
    before = [t._version for t in (*v, *g)]
    _ops.rank_one_update_(v, g, torch.tensor(0.5), torch.tensor(0.5))
    assert all(t._version > b for t, b in zip(v, before, strict=False))
    assert [t._version for t in g] == before[3:]


def test_copy_on_write():
    base = torch.ones(100)
    v, g = torch._lazy_clone(base), torch._lazy_clone(base)
    _ops.rank_one_update_([v], [g], torch.tensor(0.5), torch.tensor(1.0))
    assert [float(t.sum()) for t in (base, v, g)] == [100.0, 150.0, 100.0]


def test_in_inference_mode(device):
    with torch.inference_mode():
        check(*make([(5,), (2, 3)], PAIRS, device))


@pytest.mark.parametrize("pair", PAIRS, ids=PAIR_IDS)
def test_opcheck(pair, device):
    v, g = make([(3, 2), (), (0,), (5,)], [pair], device, (LAYOUTS["permuted"], contiguous))
    op = torch.ops.nestopt_ext.rank_one_update_.default
    torch.library.opcheck(op, (v, g, torch.tensor(0.1), torch.tensor([0.2], dtype=torch.float64)))


def test_compiled_is_one_graph(device):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def update(v, g, a):
        v = [t * 2 for t in v]
        _ops.rank_one_update_(v, g, a, (g[0] * v[0]).sum())
        return v

    compiled = torch.compile(update, backend=counter, fullgraph=True)
    for i in range(3):
        v, g = make([(3, 8), (5,)], [PAIRS[0]], device)
        a = torch.tensor(0.1 / (i + 1))
        assert all_same_bits(compiled(v, g, a), update(v, g, a))
    assert counter.frame_count == 1


@pytest.mark.big_memory
def test_more_elements_than_32_bits_count(device):
    n = 2**31 + 64
    v, g = (torch.zeros(n, dtype=torch.float16, device=device) for _ in range(2))
    v[-1], g[0], g[-1] = 2.0, 4.0, 6.0
    _ops.rank_one_update_([v], [g], torch.tensor(0.5), torch.tensor(0.25))
    assert [v[i].item() for i in (0, 1, -1)] == [1.0, 0.0, 2.5]
