"""neumann_step_ against the recurrence in extended precision, in every layout and dtype; the norm, to the last bit."""

import gc

import numpy as np
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
    contiguous,
    exact,
    expanded,
    name_of,
    opmath,
    product,
    random_lists,
    same_bits,
)
from torch._dynamo.testing import CompileCounterWithBackend

from nestopt_ext import _ops, _reference

#: dtypes of v (and p), and of the product
PAIRS = [(d, d) for d in FLOATING] + [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)]
PAIR_IDS = [f"{name_of(v)}-{name_of(a)}" for v, a in PAIRS]


def make(shapes, pairs, device="cpu", layouts=(contiguous,) * 3):
    """Lists v, p and av of random values, each in its layout."""
    return random_lists(shapes, [(v, v, av) for v, av in pairs], layouts, device)


def step(lists, alpha=0.1, function=None, **kwargs):
    (function or _ops.neumann_step_)(*lists, as_number(alpha), **kwargs)


def squared_norm(tensors):
    return sum(float((exact(t) ** 2).sum()) for t in tensors)


def check(lists, alpha=0.1, damping=0.0, norm_dtype=torch.float64):
    """Takes a step on ``lists`` and judges it: numbers, norm, and memory that was not to be touched."""
    device = lists[0][0].device
    twin = [[contiguous(t) for t in list_] for list_ in lists]
    v, p, av = ([exact(t) for t in list_] for list_ in lists)
    v = [x - np.longdouble(alpha) * (y + np.longdouble(damping) * x) for x, y in zip(v, av, strict=True)]
    p = [x + y for x, y in zip(p, v, strict=True)]
    memory = Memory(t for list_ in lists for t in list_)
    norm = None if norm_dtype is None else torch.full((3,), 7.0, dtype=norm_dtype, device=device)
    step(lists, alpha, damping=damping, sq_norm=None if norm is None else norm[1:2])
    step(twin, alpha, damping=damping, function=_reference.neumann_step_)
    assert_as_good_as(lists[0], twin[0], v)
    assert_as_good_as(lists[1], twin[1], p)
    assert memory.changed_only([*lists[0], *lists[1]])
    if norm is not None:
        truth = squared_norm(lists[0])  # of v as it was stored
        rounding = 1e-13 if norm_dtype == torch.float64 else torch.finfo(torch.float32).eps / 2 * 1.0001
        assert abs(norm[1].item() - truth) <= rounding * truth
        assert norm[0].item() == norm[2].item() == 7.0


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("norm_dtype", [None, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids=PAIR_IDS)
def test_equals_the_recurrence(pair, norm_dtype, damping, device):
    lists = make(SHAPES, [pair], device)
    check(lists, damping=damping, norm_dtype=norm_dtype)
    lists[2] = make(SHAPES, [pair], device)[2]
    check(lists, 0.37, damping=damping, norm_dtype=norm_dtype)


def test_mixed_dtypes_in_one_list(device):
    check(make(SHAPES * 3, [*PAIRS, PAIRS[0]], device), damping=0.1)


@pytest.mark.parametrize("pair", PAIRS, ids=PAIR_IDS)
def test_a_step_of_known_numbers(pair, device):
    """v = 8 - 0.5 (4 + 0.25 * 8) = 5; p = 1 + 5; |v|^2 over two tensors = 25 + 9."""
    v = [torch.tensor([x], dtype=pair[0], device=device) for x in (8.0, 3.0)]
    p = [torch.tensor([x], dtype=pair[0], device=device) for x in (1.0, 2.0)]
    av = [torch.tensor([x], dtype=pair[1], device=device) for x in (4.0, -0.75)]
    norm = torch.zeros((), device=device)
    step([v, p, av], 0.5, damping=0.25, sq_norm=norm)
    assert [t.item() for t in v] == [5.0, 3.0]
    assert [t.item() for t in p] == [6.0, 5.0]
    assert norm.item() == 34.0


def test_p_and_the_norm_see_v_as_it_is_stored(device):
    """In 16 bits v is rounded; a sum of what was not stored would drift from it."""
    for dtype in (torch.bfloat16, torch.float16):
        v, p, av = make([(4097,)], [(dtype, dtype)], device)
        norm = torch.zeros((), dtype=torch.float64, device=device)
        p[0].zero_()
        step([v, p, av], 0.123, sq_norm=norm)
        assert same_bits(v[0], p[0])
        assert norm.item() == pytest.approx(squared_norm(v), rel=1e-13)


@pytest.mark.parametrize("norm_dtype", [None, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layouts", [(contiguous, contiguous), *((f, contiguous) for f in LAYOUTS.values())])
def test_a_term_that_was_stepped_already_is_added(layouts, norm_dtype, device):
    v, p = random_lists(SHAPES * 2 + [(4, 6, 5, 3)], [(d, d) for d in FLOATING], layouts, device)
    want = [exact(y) + exact(x) for x, y in zip(v, p, strict=True)]
    rounded = [(y.to(opmath(y.dtype)) + x.to(opmath(x.dtype))).to(y.dtype) for x, y in zip(v, p, strict=True)]
    memory = Memory([*v, *p])
    norm = None if norm_dtype is None else torch.full((3,), 7.0, dtype=norm_dtype, device=device)
    step([v, p, []], 0.3, damping=0.7, sq_norm=None if norm is None else norm[1:2])
    assert memory.changed_only(p)
    assert_as_good_as(p, rounded, want)
    assert all_same_bits(p, rounded)
    if norm is not None:
        truth = squared_norm(v)
        rounding = 1e-13 if norm_dtype == torch.float64 else torch.finfo(torch.float32).eps / 2 * 1.0001
        assert abs(norm[1].item() - truth) <= rounding * truth
        assert norm[0].item() == norm[2].item() == 7.0


def test_a_product_of_zero_is_the_same_as_none(device):
    v, p, av = make(SHAPES, PAIRS, device)
    for t in av:
        t.zero_()
    norms = torch.full((2,), -1.0, dtype=torch.float64, device=device)
    twin = [[t.clone() for t in list_] for list_ in (v, p)]
    step([v, p, av], sq_norm=norms[0])
    step([*twin, []], sq_norm=norms[1])
    assert all_same_bits(v + p, twin[0] + twin[1])
    if _ops.is_native("neumann_step_", device.type):
        assert norms[0] == norms[1]


def test_adding_shows_what_is_not_finite(device):
    for value in (float("inf"), float("nan")):
        v, p = random_lists([(3,), (70000,)], [(torch.float32,) * 2], (contiguous,) * 2, device)
        v[1][69999] = value
        norm = torch.zeros((), device=device)
        step([v, p, []], sq_norm=norm)
        assert not norm.isfinite() and not p[1][69999].isfinite() and p[1][:69999].isfinite().all()


def test_adding_gives_the_same_bits_on_any_number_of_threads(native):
    results = []
    for threads in (1, 2, 5, 1):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        v, p, _ = make([*SHAPES, (300001,), (1,), (300, 301)], PAIRS)
        norm = torch.zeros((), dtype=torch.float64)
        step([v, p, []], sq_norm=norm)
        results.append([*p, norm])
    assert all(all_same_bits(results[0], other) for other in results[1:])


def test_adding_is_checked_too(device):
    v, p, _ = make([(3,), (2, 2)], [PAIRS[0]], device)
    with pytest.raises(ValueError, match="neumann_step_: alpha must be finite; got nan"):
        step([v, p, []], float("nan"))
    with pytest.raises(ValueError, match=r"neumann_step_: p must have the length of v, 2; got 1"):
        step([v, p[:1], []])
    with pytest.raises(ValueError, match=r"neumann_step_: v\[1\] must not share memory with p\[1\]"):
        step([v, [p[0], v[1]], []])
    torch.library.opcheck(torch.ops.nestopt_ext.neumann_step_.default, (v, p, [], torch.tensor(0.1)))


@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[2], PAIRS[4]], ids=lambda p: f"{name_of(p[0])}-{name_of(p[1])}")
@pytest.mark.parametrize("av_layout", [*LAYOUTS.values(), expanded], ids=lambda f: f.__name__)
@pytest.mark.parametrize("v_layout", LAYOUTS.values(), ids=lambda f: f.__name__)
def test_layouts(v_layout, av_layout, pair, device):
    shapes = [(4, 6, 5, 3), (3, 33, 17, 13), (5, 2), (7,), (), (0, 3)]
    for p_layout in (v_layout, contiguous, LAYOUTS["permuted"]):
        check(make(shapes, [pair], device, (v_layout, p_layout, av_layout)), damping=0.2)


@pytest.mark.parametrize("dims", [9, 11])
def test_more_dimensions_than_a_kernel_walks(dims, device):
    def scattered(values):
        return values.new_full((3,) * dims, 7.0)[(slice(0, 2),) * dims].copy_(values)

    def reversed_(values):
        return scattered(values.permute(*reversed(range(dims)))).permute(*reversed(range(dims)))

    check(make([(2,) * dims], [PAIRS[0]], device, (scattered, reversed_, contiguous)))


def test_strided_equals_contiguous_bit_for_bit(native):
    lists = make([(3, 33, 17, 13), (9, 5, 2, 2)] * 6, PAIRS)
    strided = [[LAYOUTS["every_other"](t) for t in list_] for list_ in lists]
    for list_ in (lists, strided):
        step(list_, 0.3, damping=0.1)
    assert all(all_same_bits(a, b) for a, b in zip(lists, strided, strict=True))


def test_interleaved_views_of_one_storage(device):
    base = torch.randn(4001, 6, device=device)
    check([[base[:, 0], base[:, 3]], [base[:, 1], base[:, 4]], [base[:, 2], base[:, 5]]], damping=0.1)
    words = torch.randn(4001, 4, device=device)
    halves = words.view(torch.bfloat16)  # eight columns; two of them lie beside a float32
    halves[:, 4:] = 1.0
    check([[words[:, 0]], [words[:, 1]], [halves[:, 5]]], damping=0.1)


def test_views_that_touch_in_one_flat_buffer(device):
    sizes = [5, 16384, 3, 0, 1, 20001]
    check([list(torch.randn(sum(sizes) + 1, device=device)[1:].split(sizes)) for _ in range(3)], damping=0.1)
    check([[t] for t in torch.randn(3 * 1001, device=device).split(1001)])


def test_thousands_of_tensors(device):
    shapes = [((), (1,), (2, 2), (0,), (9,))[i % 5] for i in range(4500)]
    check(make(shapes, PAIRS, device), damping=0.1, norm_dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_alpha_of_any_shape_of_one_element(dtype, device):
    results = []
    for alpha in (
        torch.tensor(0.1, dtype=dtype),
        torch.tensor([0.1], dtype=dtype),
        torch.tensor([[0.1]], dtype=dtype, device=device),
    ):
        torch.manual_seed(0)
        lists = make(SHAPES, PAIRS, device)
        step(lists, alpha)
        results.append(lists[0] + lists[1])
    assert all_same_bits(results[0], results[1])
    assert all_same_bits(results[0], results[2])


def test_a_series_sums_to_the_inverse(device):
    """alpha * p tends to the solution of (A + damping I) x = b, at the rate of theory."""
    torch.manual_seed(3)
    eigenvalues = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, device=device)
    b = torch.randn(3, dtype=torch.float64, device=device)
    alpha, damping, terms = 0.4, 0.25, 25
    v, p = b.clone(), b.clone()
    for _ in range(terms):
        step([[v], [p], [eigenvalues * v]], alpha, damping=damping)
    shrink = 1 - alpha * (eigenvalues + damping)
    torch.testing.assert_close(v, shrink**terms * b, rtol=1e-12, atol=0)
    torch.testing.assert_close(alpha * p, b / (eigenvalues + damping) * (1 - shrink ** (terms + 1)), rtol=1e-13, atol=0)


def test_sq_norm_of_nothing_is_zero(device):
    for lists in ([[], [], []], make([(0,), (3, 0)], PAIRS, device)):
        for call in (_ops.neumann_step_, torch.ops.nestopt_ext.neumann_step_):
            norm = torch.full((), 5.0, device=device)
            call(*lists, torch.tensor(0.1), sq_norm=norm)
            assert norm.item() == 0.0


def test_sq_norm_shows_what_is_not_finite(device):
    for value in (float("inf"), float("nan")):
        lists = make([(3,), (70000,)], [PAIRS[0]], device)
        lists[2][1][69999] = value
        norm = torch.zeros((), device=device)
        step(lists, sq_norm=norm)
        assert not norm.isfinite()


def test_sq_norm_does_not_overflow_where_float32_squares_would(device):
    v, p, av = ([torch.full((5,), x, device=device)] for x in (1e25, 0.0, 0.0))
    norm = torch.zeros((), dtype=torch.float64, device=device)
    step([v, p, av], sq_norm=norm)
    assert norm.item() == pytest.approx(5e50, rel=1e-6)


def test_the_same_bits_on_any_number_of_threads():
    results = []
    for threads in (1, 2, 5, 1):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        lists = make([*SHAPES, (300001,), (1,), (300, 301)], PAIRS)
        lists[0][5] = LAYOUTS["every_other"](lists[0][5])
        norm = torch.zeros((), dtype=torch.float64)
        step(lists, 0.3, damping=0.1, sq_norm=norm)
        results.append([*lists[0], *lists[1], norm])
    for other in results[1:]:
        assert all_same_bits(results[0][:-1], other[:-1])


def test_sq_norm_is_the_same_on_any_number_of_threads(native):
    lists = make([*SHAPES, (300001,), (1,), (300, 301)], PAIRS)
    norms = set()
    for threads in (1, 2, 3, 5, 8):
        torch.set_num_threads(threads)
        twin = [[t.clone() for t in list_] for list_ in lists]
        norm = torch.zeros((), dtype=torch.float64)
        step(twin, 0.3, damping=0.1, sq_norm=norm)
        norms.add(norm.item())
    assert len(norms) == 1


def test_autograd_is_told_of_every_write(device):
    lists = make([(3,), (0,), (2, 2)], [PAIRS[0]], device)
    norm = torch.zeros((), device=device)
    tensors = [*lists[0], *lists[1], norm]
    before, products = [t._version for t in tensors], [t._version for t in lists[2]]
    step(lists, sq_norm=norm)
    assert all(t._version > version for t, version in zip(tensors, before, strict=True))
    assert [t._version for t in lists[2]] == products


def test_a_stale_graph_is_refused(device):
    v = torch.ones(3, device=device, requires_grad=True)
    loss = v.square().sum()
    with torch.no_grad():
        step([[v], [torch.ones_like(v)], [torch.ones_like(v)]])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_products_with_a_graph_leave_no_graph_on_the_series(device):
    v, p = torch.ones(3, device=device), torch.zeros(3, device=device)
    with torch.no_grad():
        step([[v], [p], [torch.full((3,), 2.0, device=device, requires_grad=True)]], 0.25)
    assert not v.requires_grad and not p.requires_grad
    assert v.tolist() == p.tolist() == [0.5] * 3


def test_in_inference_mode(device):
    with torch.inference_mode():
        check(make([(5,), (2, 3)], PAIRS, device), damping=0.1)


def test_copy_on_write_products():
    base = torch.ones(100)
    v, p, av = torch._lazy_clone(base), torch._lazy_clone(base), torch._lazy_clone(base)
    step([[v], [p], [av]], 0.5)
    assert [float(t.sum()) for t in (base, v, p, av)] == [100.0, 50.0, 150.0, 100.0]


def test_no_memory_beside_the_series(native):
    lists = make([(1000, 1000), (300, 301)], PAIRS)
    alpha, norm = torch.tensor(0.1), torch.zeros(())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(lists, alpha, damping=0.1, sq_norm=norm)
    assert max((abs(e.self_cpu_memory_usage) for e in profile.events()), default=0) < 1024


def test_no_growth_and_nothing_kept():
    lists = make([(10,)] * 20, [PAIRS[0]])
    for _ in range(3):
        step(lists)
    gc.collect()
    tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    for _ in range(50):
        step(lists)
    gc.collect()
    assert sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()) <= tensors


@pytest.mark.parametrize("sample", product(pair=PAIRS, norm=[None, torch.float32, torch.float64]), ids=str)
def test_opcheck(sample, device):
    lists = make([(3, 2), (), (0,), (5,)], [sample["pair"]], device, (LAYOUTS["permuted"], contiguous, contiguous))
    kwargs = {"damping": 0.1}
    if sample["norm"]:
        kwargs["sq_norm"] = torch.zeros((), dtype=sample["norm"], device=device)
    torch.library.opcheck(torch.ops.nestopt_ext.neumann_step_.default, (*lists, torch.tensor(0.1)), kwargs)


def test_fake_and_meta_tensors_are_checked_and_left_alone():
    step([[t.to("meta") for t in list_] for list_ in make([(3,), (2, 2)], PAIRS)])
    with torch._subclasses.FakeTensorMode():
        step(make([(3,), (2, 2)], PAIRS), sq_norm=torch.zeros(()))
        lists = make([(3,), (2, 2)], [PAIRS[0]])
        lists[2][1] = torch.zeros(3)
        with pytest.raises(
            ValueError, match=r"neumann_step_: av\[1\] must have the shape of v\[1\] \(2, 2\); got \(3,\)"
        ):
            step(lists)


def term(params, v, p, x, alpha, norm):
    """One term of a Neumann series with a Hessian-vector product."""

    def loss(params):
        return (torch.tanh(x @ params[0] + params[1]) @ params[2]).square().mean()

    _, product = torch.func.jvp(torch.func.grad(loss), (params,), (v,))
    _ops.neumann_step_(v, p, product, alpha, damping=0.1, sq_norm=norm)
    return norm.sqrt()


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiled_term_is_one_graph(backend, device):
    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(term, backend=counter, fullgraph=True)
    shapes = [(3, 8), (8,), (8, 2)]
    params, v, p = ([torch.randn(s, device=device) for s in shapes] for _ in range(3))
    norm = torch.zeros((), device=device)
    twin = [[t.clone() for t in list_] for list_ in (params, v, p)]
    for i in range(5):
        x, alpha = torch.randn(6, 3, device=device), torch.tensor(0.1 / (i + 1))
        found = compiled(params, v, p, x, alpha, norm)
        torch.testing.assert_close(found, term(*twin, x, alpha, torch.zeros((), device=device)))
    for a, b in zip(v + p, twin[1] + twin[2], strict=True):
        torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


def test_fuzz():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    layouts = st.sampled_from([*LAYOUTS.values()])
    shapes = st.lists(st.sampled_from([0, 1, 2, 3, 5, 17, 40]), max_size=4).map(tuple)
    tensors = st.lists(
        st.tuples(shapes, st.sampled_from(PAIRS), st.tuples(layouts, layouts, layouts | st.just(expanded))),
        min_size=1,
        max_size=5,
    )

    @hypothesis.settings(max_examples=80, deadline=None, derandomize=True, database=None)
    @hypothesis.given(tensors, st.sampled_from([0.0, 0.2]), st.sampled_from([None, torch.float32, torch.float64]))
    def run(tensors, damping, norm_dtype):
        lists = [[], [], []]
        for shape, pair, layout in tensors:
            for list_, new in zip(lists, make([shape], [pair], "cpu", layout), strict=True):
                list_ += new
        check(lists, damping=damping, norm_dtype=norm_dtype)

    run()


@pytest.mark.big_memory
def test_more_elements_than_32_bits_count(device):
    n = 2**31 + 64
    v = torch.zeros(n, dtype=torch.float16, device=device)
    p = torch.zeros(n, dtype=torch.float16, device=device)
    av = torch.zeros(n, dtype=torch.float16, device=device)
    av[-1], av[0], av[n // 2] = -2.0, -4.0, -6.0
    norm = torch.zeros((), dtype=torch.float64, device=device)
    step([[v], [p], [av]], 0.5, sq_norm=norm)
    assert [t.item() for t in (v[0], v[n // 2], v[-1], v[-2])] == [2.0, 3.0, 1.0, 0.0]
    assert [t.item() for t in (p[0], p[n // 2], p[-1], p[-2])] == [2.0, 3.0, 1.0, 0.0]
    assert norm.item() == 14.0
    step([[v[::2], v[1::2]], [p[::2], p[1::2]], [av[:1].expand(n // 2), av[-1:].expand(n // 2)]], 0.25)
    assert v[-2:].tolist() == [1.0, 1.5] and v[:2].tolist() == [3.0, 0.5]
