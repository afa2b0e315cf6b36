"""softmax_hessian_ against the product in extended precision: all dtypes, layouts, sizes, and rows that are hard."""

import numpy as np
import pytest
import torch
from helpers import (
    FLOATING,
    LAYOUTS,
    Memory,
    all_same_bits,
    assert_refused,
    contiguous,
    exact,
    expanded,
    freed,
    name_of,
    of_inference_mode,
    same_bits,
)
from torch._dynamo.testing import CompileCounterWithBackend

from nestopt_ext import _ops, _reference

INF, NAN = float("inf"), float("nan")
#: dtypes of u and of the logits
PAIRS = [(d, d) for d in FLOATING] + [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)]
PAIR_IDS = [f"{name_of(u)}-{name_of(z)}" for u, z in PAIRS]
#: One class, around the vectors, warps and pieces of the kernels, and vocabularies.
CLASSES = [1, 2, 7, 16, 31, 33, 100, 1025, 2049, 50257]


def rows(kind, num_rows, classes, pair=PAIRS[0], device="cpu", weight_dtype=torch.float32):
    """u, logits and row_weight of one kind of difficulty."""
    u, z = (torch.randn(num_rows, classes, dtype=torch.float64) for _ in range(2))
    if kind == "near one-hot":
        z[torch.arange(num_rows), torch.randint(classes, (num_rows,))] = 25.0
    elif kind == "left out":
        z[:, 1:][torch.rand(num_rows, classes - 1) < 0.7] = -INF
    elif kind == "wide":
        z *= 20
    weight = torch.rand(num_rows, dtype=weight_dtype)
    weight[num_rows // 2 : num_rows // 2 + 1] = 0.0
    return u.to(device, pair[0]), z.to(device, pair[1]), weight.to(device)


KINDS = ["plain", "near one-hot", "left out", "wide"]


def truth(u, logits, row_weight):
    u, z, w = exact(u), exact(logits), exact(row_weight)[:, None]
    e = np.exp(z - z.max(-1, keepdims=True))
    p = e / e.sum(-1, keepdims=True)
    x = u - np.take_along_axis(u, z.argmax(-1)[:, None], -1)  # a constant makes no difference
    return w * p * (x - (p * x).sum(-1, keepdims=True))


def eager(u, logits, row_weight):
    """What one would write, in the dtype that PyTorch computes in."""
    math = _reference.opmath(u.dtype)
    p, x = logits.to(math).softmax(-1), u.to(math)
    return (row_weight.to(math)[:, None] * p * (x - (p * x).sum(-1, keepdim=True))).to(u.dtype)


def row_errors(found, want):
    """Of each row, relative to its largest value."""
    return np.abs(exact(found) - want).max(-1) / np.maximum(np.abs(want).max(-1), 1e-300)


def check(u, logits, row_weight):
    """Judges a call: numbers, rows without weight, and memory that was not to be touched."""
    want, theirs = truth(u, logits, row_weight), eager(u, logits, row_weight)
    memory = Memory([u, logits, row_weight])
    _ops.softmax_hessian_(u, logits, row_weight)
    assert memory.changed_only([u])
    assert (u[row_weight == 0] == 0).all()
    least = torch.finfo(u.dtype).eps / 2
    assert row_errors(u, want).max() <= 2 * max(row_errors(theirs, want).max(), least)


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pair", PAIRS, ids=PAIR_IDS)
def test_as_good_as_eager(pair, kind, classes, device):
    check(*rows(kind, 3 if classes > 2000 else 17, classes, pair, device))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float64], ids=name_of)
def test_a_vocabulary_of_130_000(weight_dtype, device):
    check(*rows("plain", 3, 130_000, device=device, weight_dtype=weight_dtype))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_nothing(shape, layout, device):
    u = layout(torch.zeros(shape, device=device))
    _ops.softmax_hessian_(u, torch.zeros(shape, device=device), torch.ones(shape[0], device=device))
    assert u.shape == shape


def test_known_numbers(device):
    """p = (1/2, 1/4, 1/4), u = (4, 0, 8): the mean is 4, and p (u - 4) = (0, -1, 1)."""
    z = torch.tensor([[2.0, 1.0, 1.0]], device=device).log().expand(2, 3)
    u = torch.tensor([[4.0, 0.0, 8.0]] * 2, device=device)
    _ops.softmax_hessian_(u, z, torch.tensor([1.0, -3.0], device=device))
    torch.testing.assert_close(u.cpu(), torch.tensor([[0.0, -1.0, 1.0], [0.0, 3.0, -3.0]]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("classes", [2, 7, 1000, 3000])
def test_near_one_hot_rows_keep_every_digit(classes, dtype, device):
    """Where eager loses the mean in the rounding of p: a class of p = 1 - 1e-10 has a result of the size of 1e-10."""
    u, z, weight = (t.to(dtype) for t in rows("plain", 9, classes, (torch.float64, torch.float64), device))
    z[:, classes // 2] = 25.0 if dtype == torch.float32 else 40.0
    want, theirs = truth(u, z, weight), eager(u, z, weight)
    _ops.softmax_hessian_(u, z, weight)
    live = exact(weight) > 0
    eps = torch.finfo(dtype).eps
    # The rounding of z - z_max is an error in p of up to |z - z_max| / 2 eps.
    assert row_errors(u, want)[live].max() <= 32 * eps
    assert row_errors(theirs, want)[live].max() > 1e3 * eps


@pytest.mark.parametrize("classes", [2, 7, 1000, 3000])
def test_a_common_offset_of_u_costs_nothing(classes, device):
    """(diag(p) - p p') 1 = 0: beside an offset of 1e4, eager has lost four digits."""
    u, z, weight = rows("plain", 9, classes, device=device)
    u = u + 10_000.0
    want, theirs = truth(u, z, weight), eager(u, z, weight)
    _ops.softmax_hessian_(u, z, weight)
    live = exact(weight) > 0
    assert row_errors(u, want)[live].max() <= 8 * torch.finfo(torch.float32).eps
    assert row_errors(theirs, want)[live].max() > 1e2 * torch.finfo(torch.float32).eps


def test_a_constant_gives_zero(device):
    u, z, weight = rows("plain", 5, 1000, device=device)
    u.fill_(3.0)
    _ops.softmax_hessian_(u, z, weight)
    assert u.abs().max() <= 1e-15


@pytest.mark.parametrize("pair", PAIRS, ids=PAIR_IDS)
def test_rows_of_no_weight_are_zero_whatever_they_hold(pair, device):
    u, z, weight = rows("plain", 8, 40, pair, device)
    u[0], z[1], u[2, 3], z[3, 3], z[4] = NAN, NAN, INF, INF, -INF
    weight[:6] = torch.tensor([0.0, 0.0, -0.0, 0.0, 0.0, 0.0])
    _ops.softmax_hessian_(u, z, weight)
    assert (u[:6] == 0).all() and (u[6:] != 0).all()
    weight.zero_()
    u.fill_(NAN)
    _ops.softmax_hessian_(u, z, weight)
    assert (u == 0).all()


@pytest.mark.parametrize("classes", [1, 5, 40, 3000])
@pytest.mark.parametrize("pair", PAIRS, ids=PAIR_IDS)
def test_what_is_not_finite_shows_and_stays_in_its_row(pair, classes, device):
    u, z, weight = rows("plain", 8, classes, pair, device)
    weight.fill_(1.0)
    last = classes - 1
    z[0, last], z[1, last], z[2], u[3, last], weight[4] = NAN, INF, -INF, NAN, NAN
    z[5], z[5, 0], u[5, last] = -INF, 0.0, NAN  # in a class of p = 0
    clean = u.clone()
    _ops.softmax_hessian_(u, z, weight)
    assert u[:3].isnan().all() and u[4].isnan().all()
    assert u[3].isnan().all() and u[5, [0, last]].isnan().all()
    assert u[6:].isfinite().all()
    _ops.softmax_hessian_(clean[6:], z[6:], weight[6:])
    assert same_bits(clean[6:], u[6:])


@pytest.mark.parametrize("pair", PAIRS, ids=PAIR_IDS)
def test_classes_left_out_are_zero_beside_huge_u(pair, device):
    u, z, weight = rows("plain", 4, 50, pair, device)
    huge = torch.finfo(pair[0]).max
    z[:, 10:45] = -INF
    u[:, 10:30], u[:, 30:45] = huge, -huge
    kept = [*range(10), *range(45, 50)]
    part = u[:, kept].clone()
    _ops.softmax_hessian_(u, z, weight)
    _ops.softmax_hessian_(part, z[:, kept].clone(), weight)
    assert (u[:, 10:45] == 0).all()
    torch.testing.assert_close(u[:, kept], part, rtol=4 * torch.finfo(pair[0]).eps, atol=1e-8)


def test_one_class_left_is_zero(device):
    u, z, weight = rows("plain", 4, 50, device=device)
    z[:, 1:] = -INF
    _ops.softmax_hessian_(u, z, weight)
    assert (u == 0).all()


def rows_apart(t):
    """Rows inside longer rows, as the kernels walk them without a copy."""
    return torch.full((t.shape[0], t.shape[1] + 3), NAN, dtype=t.dtype, device=t.device)[:, 1 : 1 + t.shape[1]].copy_(t)


@pytest.mark.parametrize("z_layout", [*LAYOUTS.values(), rows_apart, expanded], ids=lambda f: f.__name__)
@pytest.mark.parametrize("u_layout", [*LAYOUTS.values(), rows_apart], ids=lambda f: f.__name__)
@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[2], PAIRS[4]], ids=lambda p: f"{name_of(p[0])}-{name_of(p[1])}")
def test_layouts(pair, u_layout, z_layout, device):
    for shape in [(5, 37), (1, 6), (6, 1)]:
        u, z, weight = rows("plain", *shape, pair, device)
        wide = torch.full((shape[0], 2), NAN, device=device)
        wide[:, 1] = weight
        for w in (weight, wide[:, 1]):
            check(u_layout(u), z_layout(z), w)


@pytest.mark.parametrize("pair", PAIRS, ids=PAIR_IDS)
def test_strided_equals_contiguous_bit_for_bit(pair, device):
    u, z, weight = rows("plain", 6, 1003, pair, device)
    results = []
    for layout in (contiguous, rows_apart, LAYOUTS["offset"], LAYOUTS["every_other"], LAYOUTS["permuted"]):
        mine = layout(u)
        _ops.softmax_hessian_(mine, layout(z), weight)
        results.append(mine)
    assert all(same_bits(results[0], other) for other in results[1:])


def test_a_row_does_not_depend_on_its_neighbours(device):
    u, z, weight = rows("wide", 70, 333, device=device)
    alone = [u[r : r + 1].clone() for r in range(70)]
    for r in range(70):
        _ops.softmax_hessian_(alone[r], z[r : r + 1], weight[r : r + 1])
    _ops.softmax_hessian_(u, z, weight)
    assert same_bits(u, torch.cat(alone))


def test_the_same_bits_on_any_number_of_threads(native):
    results = []
    for threads in (1, 2, 5, 1):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        results.append([])
        for shape, pair in zip([(64, 1000), (7, 20001), (1000, 10)], PAIRS, strict=False):
            u, z, weight = rows("plain", *shape, pair)
            _ops.softmax_hessian_(u, z, weight)
            results[-1].append(u)
    assert all(all_same_bits(results[0], other) for other in results[1:])


def test_no_memory_beside_u(native):
    u, z, weight = rows("plain", 300, 1003)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        _ops.softmax_hessian_(u, z, weight)
    assert max((abs(e.self_cpu_memory_usage) for e in profile.events()), default=0) < 1024


# ---- hostile arguments ----------------------------------------------------------------------------------------------


def _overlapping():
    base = torch.zeros(40)
    return base[:12].view(3, 4), base[4:16].view(3, 4), torch.ones(3)


def _freed():
    return freed(3, 4), torch.zeros(3, 4), torch.ones(3)


def _ok():
    return torch.zeros(3, 4), torch.zeros(3, 4), torch.ones(3)


def _with(**changed):
    u, z, w = _ok()
    return changed.get("u", u), changed.get("z", z), changed.get("w", w)


HOSTILE = {
    "u of integers": (
        lambda: _with(u=torch.zeros(3, 4, dtype=torch.int64)),
        TypeError,
        "u must be float32, float64, bfloat16 or float16; got int64.",
    ),
    "u of one dimension": (
        lambda: _with(u=torch.zeros(12)),
        ValueError,
        "u must have 2 dimensions, rows and classes; got shape (12,).",
    ),
    "u sparse": (
        lambda: _with(u=torch.zeros(3, 4).to_sparse()),
        TypeError,
        "u must be a strided (dense) tensor; got sparse_coo. Call .to_dense() on it.",
    ),
    "u expanded": (
        lambda: _with(u=torch.zeros(1, 4).expand(3, 4)),
        ValueError,
        "u must not overlap itself; got shape (3, 4) with strides (0, 1). Pass a clone.",
    ),
    "u that requires grad": (
        lambda: _with(u=torch.zeros(3, 4, requires_grad=True)),
        ValueError,
        "u must not require grad while grad mode is on; got one that does. Call under torch.no_grad().",
    ),
    "logits that require grad": (
        lambda: _with(z=torch.zeros(3, 4, requires_grad=True)),
        ValueError,
        "logits must not require grad while grad mode is on; got one that does. Call under torch.no_grad().",
    ),
    "logits of another shape": (
        lambda: _with(z=torch.zeros(4, 3)),
        ValueError,
        "logits must have the shape of u (3, 4); got (4, 3).",
    ),
    "logits of another dtype": (
        lambda: _with(z=torch.zeros(3, 4, dtype=torch.float64)),
        TypeError,
        "logits must be float32, bfloat16 or float16 beside u of float32; got float64.",
    ),
    "logits wider than u": (
        lambda: _with(u=torch.zeros(3, 4, dtype=torch.float16)),
        TypeError,
        "logits must be float16 beside u of float16; got float32.",
    ),
    "logits elsewhere": (
        lambda: _with(z=torch.zeros(3, 4, device="meta")),
        ValueError,
        "logits must be on cpu, the device of u; got meta.",
    ),
    "weights of another number": (
        lambda: _with(w=torch.ones(4)),
        ValueError,
        "row_weight must have a number for each row of u, shape (3,); got (4,).",
    ),
    "weights of two dimensions": (
        lambda: _with(w=torch.ones(3, 1)),
        ValueError,
        "row_weight must have a number for each row of u, shape (3,); got (3, 1).",
    ),
    "weights of 16 bits": (
        lambda: _with(w=torch.ones(3, dtype=torch.bfloat16)),
        TypeError,
        "row_weight must be float32 or float64; got bfloat16.",
    ),
    "weights elsewhere": (
        lambda: _with(w=torch.ones(3, device="meta")),
        ValueError,
        "row_weight must be on cpu, the device of u; got meta.",
    ),
    "shared memory": (
        _overlapping,
        ValueError,
        "u must not share memory with logits; got overlapping tensors. Pass a clone.",
    ),
    "freed memory": (
        _freed,
        ValueError,
        "u must have storage for its elements; got a storage of 8 bytes. It was resized or freed behind the tensor.",
    ),
    "u of inference mode": (
        lambda: _with(u=of_inference_mode(3, 4)),
        ValueError,
        "u must not be an inference tensor outside inference mode; got one. Pass a clone.",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("route", [_ops.softmax_hessian_, torch.ops.nestopt_ext.softmax_hessian_], ids=["typed", "op"])
def test_refused_by_name_and_nothing_is_modified(route, name):
    make, kind, message = HOSTILE[name]
    tensors = make()
    assert_refused(lambda: route(*tensors), tensors, kind, f"softmax_hessian_: {message}")


@pytest.mark.parametrize("position", range(3))
def test_none_is_no_tensor(position):
    tensors = [*_ok()]
    tensors[position] = None
    with pytest.raises((TypeError, NotImplementedError)):
        _ops.softmax_hessian_(*tensors)


def test_a_tangent_is_refused():
    u, z, w = _ok()
    with torch.autograd.forward_ad.dual_level():
        z = torch.autograd.forward_ad.make_dual(z, torch.ones_like(z))
        with pytest.raises(ValueError, match="softmax_hessian_: logits must not carry a forward-mode tangent"):
            _ops.softmax_hessian_(u, z, w)


# ---- the dispatcher -------------------------------------------------------------------------------------------------


def test_autograd_is_told_of_the_write(device):
    for layout in (contiguous, LAYOUTS["every_other"]):
        u, z, weight = rows("plain", 3, 5, device=device)
        u = layout(u)
        before = [t._version for t in (u, z, weight)]
        _ops.softmax_hessian_(u, z, weight)
        assert u._version > before[0] and [z._version, weight._version] == before[1:]


def test_copy_on_write(native):
    base = torch.randn(3, 5)
    u, z = torch._lazy_clone(base), torch._lazy_clone(base)
    _ops.softmax_hessian_(u, z, torch.ones(3))
    assert same_bits(base, z) and not torch.equal(base, u)


def test_in_inference_mode(device):
    with torch.inference_mode():
        check(*rows("plain", 5, 7, device=device))


@pytest.mark.parametrize("pair", PAIRS, ids=PAIR_IDS)
def test_opcheck(pair, device):
    u, z, weight = rows("plain", 4, 6, pair, device)
    op = torch.ops.nestopt_ext.softmax_hessian_.default
    for layout in (contiguous, LAYOUTS["permuted"]):
        torch.library.opcheck(op, (layout(u), z, weight))
    torch.library.opcheck(op, (u[:0].clone(), z[:0], weight[:0]))


def test_compiled_is_one_graph(device):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def product(u, z, weight):
        u = u * 2
        _ops.softmax_hessian_(u, z, weight)
        return u + 1

    compiled = torch.compile(product, backend=counter, fullgraph=True)
    for _ in range(3):
        arguments = rows("plain", 6, 9, device=device)
        assert same_bits(compiled(*arguments), product(*arguments))
    assert counter.frame_count == 1


def test_fuzz():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    layouts = st.sampled_from([*LAYOUTS.values(), rows_apart])

    @hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @hypothesis.given(
        st.integers(1, 9), st.integers(1, 70), st.sampled_from(KINDS), st.sampled_from(PAIRS), layouts, layouts
    )
    def run(num_rows, classes, kind, pair, u_layout, z_layout):
        u, z, weight = rows(kind, num_rows, classes, pair)
        check(u_layout(u), z_layout(z), weight)

    run()


@pytest.mark.big_memory
def test_more_elements_than_32_bits_count(device):
    classes = 2**31 + 64
    u = torch.zeros(1, classes, dtype=torch.float16, device=device)
    z = torch.full((1, classes), -INF, dtype=torch.float16, device=device)
    z[0, 0] = z[0, -1] = 0.0
    u[0, -1] = 4.0
    _ops.softmax_hessian_(u, z, torch.ones(1, device=device))
    assert [u[0, 0].item(), u[0, 1].item(), u[0, -1].item()] == [-1.0, 0.0, 1.0]
    u = torch.zeros(2**16 + 1, 2**15, dtype=torch.float16, device=device)
    u[-1, 1::2] = 4.0
    _ops.softmax_hessian_(u, torch.zeros_like(u[:1]).expand_as(u), torch.full((len(u),), 2.0**15, device=device))
    assert u[-1, :2].tolist() == [-2.0, 2.0] and (u[:-1] == 0).all()
