"""row_dot_ against the sums in extended precision: all dtypes, layouts and sizes, and arguments that are refused."""

import numpy as np
import pytest
import torch
from helpers import (
    FLOATING,
    LAYOUTS,
    Memory,
    assert_refused,
    contiguous,
    exact,
    expanded,
    freed,
    name_of,
    of_inference_mode,
    opmath,
    same_bits,
)
from torch._dynamo.testing import CompileCounterWithBackend

from nestopt_ext import _ops

INF, NAN = float("inf"), float("nan")
#: dtypes of out and of the factors
PAIRS = [(torch.float32, d) for d in FLOATING if d != torch.float64] + [(torch.float64, d) for d in FLOATING]
PAIR_IDS = [f"{name_of(out)}-{name_of(x)}" for out, x in PAIRS]
#: One column, around the vectors, warps and pieces of the kernels, and several pieces.
COLUMNS = [1, 2, 7, 16, 31, 33, 100, 511, 513, 2049, 65_537, 140_001]


def factors(rows, divisor, columns, pair=PAIRS[0], device="cpu"):
    """out, x and y, where y has ``rows / divisor`` rows."""
    out, x, y = (
        torch.randn(shape, dtype=torch.float64) for shape in (rows, (rows, columns), (rows // divisor, columns))
    )
    return out.to(device, pair[0]), x.to(device, pair[1]), y.to(device, pair[1])


def rows_apart(t):
    """Rows inside longer rows, as the kernels walk them without a copy."""
    return torch.full((t.shape[0], t.shape[1] + 3), NAN, dtype=t.dtype, device=t.device)[:, 1 : 1 + t.shape[1]].copy_(t)


def check(out, x, y):
    """Judges a call: numbers, relative to the size of what is added up, and memory that was not to be touched."""
    start, xs = exact(out), exact(x)
    ys = np.tile(exact(y), (len(xs) // max(len(y), 1), 1))
    want, size = start + (xs * ys).sum(-1), np.abs(start) + np.abs(xs * ys).sum(-1)
    memory = Memory([out, x, y])
    _ops.row_dot_(out, x, y)
    assert memory.changed_only([out])
    worst = np.abs(exact(out) - want) / size
    # Sums of float32 add up some 16 numbers in a lane before they are widened; a plain loop would be off by thousands.
    eps = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    assert worst.max(initial=0) <= 4 * eps


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("pair", PAIRS, ids=PAIR_IDS)
def test_right_to_a_few_roundings(pair, columns, device):
    for divisor in (1, 3, 6) if columns < 3000 else (3,):
        check(*factors(6, divisor, columns, pair, device))


def test_many_rows(device):
    check(*factors(5000, 10, 7, device=device))


def test_known_numbers(device):
    out = torch.tensor([1.0, 2.0, 3.0, 4.0], device=device)
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]], device=device)
    _ops.row_dot_(out, x, torch.tensor([[1.0, 10.0], [100.0, -1.0]], device=device))
    assert out.tolist() == [22.0, 298.0, 68.0, 696.0]


def test_what_cancels_in_float32_is_there_in_float64(device):
    """Of 16-bit factors, whose products float32 holds exactly, float64 keeps the sum as well."""
    x = torch.ones(1, 3000, device=device)
    x[0, 0], x[0, -1] = 2.0**13, -(2.0**13)
    out = torch.zeros(1, dtype=torch.float64, device=device)
    _ops.row_dot_(out, x, torch.ones(1, 3000, device=device))
    assert out.item() == 2998.0


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(0, 0, 5), (0, 3, 5), (4, 2, 0), (0, 0, 0)])
def test_nothing(shape, layout, device):
    rows, divisor_rows, columns = shape
    out = torch.ones(rows, device=device)
    _ops.row_dot_(
        out, layout(torch.ones(rows, columns, device=device)), torch.ones(divisor_rows, columns, device=device)
    )
    assert (out == 1).all() and out.shape == (rows,)


@pytest.mark.parametrize("columns", [1, 40, 3000, 70_000])
@pytest.mark.parametrize("pair", PAIRS, ids=PAIR_IDS)
def test_what_is_not_finite_shows_and_stays_in_its_row(pair, columns, device):
    out, x, y = factors(8, 2, columns, pair, device)
    y[:, -1] = 1.0
    x[0, -1], x[1, -1], x[5, 0], out[3] = NAN, INF, -INF, NAN
    y[2, columns // 2] = 0.0
    x[6, columns // 2] = INF
    _ops.row_dot_(out, x, y)
    assert out[[0, 3, 6]].isnan().all() and out[1] == INF and out[5].isinf()
    assert out[[2, 4, 7]].isfinite().all()


@pytest.mark.parametrize("y_layout", [*LAYOUTS.values(), rows_apart, expanded], ids=lambda f: f.__name__)
@pytest.mark.parametrize("x_layout", [*LAYOUTS.values(), rows_apart, expanded], ids=lambda f: f.__name__)
def test_layouts(x_layout, y_layout, device):
    for pair in (PAIRS[0], PAIRS[1], PAIRS[3]):
        out, x, y = factors(6, 2, 37, pair, device)
        wide = torch.full((6, 2), NAN, dtype=out.dtype, device=device)
        wide[:, 1] = out
        for o in (out, wide[:, 1]):
            check(o, x_layout(x), y_layout(y))


@pytest.mark.parametrize("pair", PAIRS, ids=PAIR_IDS)
def test_strided_equals_contiguous_bit_for_bit(pair, device):
    out, x, y = factors(6, 3, 1003, pair, device)
    results = []
    for layout in (contiguous, rows_apart, LAYOUTS["offset"], LAYOUTS["every_other"], LAYOUTS["permuted"]):
        mine = out.clone()
        _ops.row_dot_(mine, layout(x), layout(y))
        results.append(mine)
    if _ops.is_native("row_dot_", device.type):
        assert all(same_bits(results[0], other) for other in results[1:])


def test_a_row_does_not_depend_on_its_neighbours(native):
    out, x, y = factors(70, 1, 333)
    alone = [out[r : r + 1].clone() for r in range(70)]
    for r in range(70):
        _ops.row_dot_(alone[r], x[r : r + 1], y[r : r + 1])
    _ops.row_dot_(out, x, y)
    assert same_bits(out, torch.cat(alone))


def test_the_same_bits_on_any_number_of_threads(native):
    results = []
    for threads in (1, 2, 5, 1):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        results.append([])
        for shape, pair in zip([(64, 2, 1000), (1, 1, 900_001), (1000, 1, 10), (6, 3, 70_000)], PAIRS, strict=False):
            out, x, y = factors(*shape, pair)
            _ops.row_dot_(out, x, y)
            results[-1].append(out)
    assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_no_memory_of_the_size_of_x(native):
    out, x, y = factors(300, 3, 1003)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        _ops.row_dot_(out, x, y)
    assert max((abs(e.self_cpu_memory_usage) for e in profile.events()), default=0) < 16_384


# ---- hostile arguments ----------------------------------------------------------------------------------------------


def _with(**changed):
    return tuple(
        changed.get(k, t) for k, t in {"out": torch.zeros(6), "x": torch.zeros(6, 4), "y": torch.zeros(3, 4)}.items()
    )


def _overlapping():
    base = torch.zeros(40)
    return base[10:16], base[:24].view(6, 4), torch.zeros(3, 4)


def _freed():
    return _with(x=freed(6, 4))


GRAD = "must not require grad while grad mode is on; got one that does. Call under torch.no_grad()."
HOSTILE = {
    "out of 16 bits": (
        lambda: _with(out=torch.zeros(6, dtype=torch.bfloat16)),
        TypeError,
        "out must be float32 or float64; got bfloat16.",
    ),
    "out of two dimensions": (
        lambda: _with(out=torch.zeros(6, 1)),
        ValueError,
        "out must have 1 dimension, the rows of x; got shape (6, 1).",
    ),
    "out expanded": (
        lambda: _with(out=torch.zeros(1).expand(6)),
        ValueError,
        "out must not overlap itself; got shape (6,) with strides (0,). Pass a clone.",
    ),
    "out that requires grad": (lambda: _with(out=torch.zeros(6, requires_grad=True)), ValueError, f"out {GRAD}"),
    "x that requires grad": (lambda: _with(x=torch.zeros(6, 4, requires_grad=True)), ValueError, f"x {GRAD}"),
    "y that requires grad": (lambda: _with(y=torch.zeros(3, 4, requires_grad=True)), ValueError, f"y {GRAD}"),
    "out of inference mode": (
        lambda: _with(out=of_inference_mode(6)),
        ValueError,
        "out must not be an inference tensor outside inference mode; got one. Pass a clone.",
    ),
    "x sparse": (
        lambda: _with(x=torch.zeros(6, 4).to_sparse()),
        TypeError,
        "x must be a strided (dense) tensor; got sparse_coo. Call .to_dense() on it.",
    ),
    "x wider than out": (
        lambda: _with(x=torch.zeros(6, 4, dtype=torch.float64)),
        TypeError,
        "x must be float32, bfloat16 or float16 beside out of float32; got float64.",
    ),
    "x of integers": (
        lambda: _with(out=torch.zeros(6, dtype=torch.float64), x=torch.zeros(6, 4, dtype=torch.int32)),
        TypeError,
        "x must be float32, float64, bfloat16 or float16 beside out of float64; got int32.",
    ),
    "x elsewhere": (
        lambda: _with(x=torch.zeros(6, 4, device="meta")),
        ValueError,
        "x must be on cpu, the device of out; got meta.",
    ),
    "x of three dimensions": (
        lambda: _with(x=torch.zeros(6, 2, 2)),
        ValueError,
        "x must have 2 dimensions, rows and columns; got shape (6, 2, 2).",
    ),
    "x of other rows": (
        lambda: _with(x=torch.zeros(5, 4)),
        ValueError,
        "x must have a row for each element of out, 6; got shape (5, 4).",
    ),
    "y of another dtype": (
        lambda: _with(y=torch.zeros(3, 4, dtype=torch.bfloat16)),
        TypeError,
        "y must be float32 beside x of float32; got bfloat16.",
    ),
    "y elsewhere": (
        lambda: _with(y=torch.zeros(3, 4, device="meta")),
        ValueError,
        "y must be on cpu, the device of x; got meta.",
    ),
    "y of one dimension": (
        lambda: _with(y=torch.zeros(4)),
        ValueError,
        "y must have 2 dimensions, rows and columns; got shape (4,).",
    ),
    "y of other columns": (
        lambda: _with(y=torch.zeros(3, 5)),
        ValueError,
        "y must have the columns of x, 4; got shape (3, 5).",
    ),
    "y of rows that do not divide": (
        lambda: _with(y=torch.zeros(4, 4)),
        ValueError,
        "y must have a number of rows that divides those of x, 6; got shape (4, 4).",
    ),
    "y of no rows": (
        lambda: _with(y=torch.zeros(0, 4)),
        ValueError,
        "y must have a number of rows that divides those of x, 6; got shape (0, 4).",
    ),
    "shared memory": (
        _overlapping,
        ValueError,
        "out must not share memory with x; got overlapping tensors. Pass a clone.",
    ),
    "freed memory": (
        _freed,
        ValueError,
        "x must have storage for its elements; got a storage of 8 bytes. It was resized or freed behind the tensor.",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("route", [_ops.row_dot_, torch.ops.nestopt_ext.row_dot_], ids=["typed", "op"])
def test_refused_by_name_and_nothing_is_modified(route, name):
    make, kind, message = HOSTILE[name]
    tensors = make()
    assert_refused(lambda: route(*tensors), tensors, kind, f"row_dot_: {message}")


@pytest.mark.parametrize("position", range(3))
def test_none_is_no_tensor(position):
    tensors = [*_with()]
    tensors[position] = None
    with pytest.raises((TypeError, NotImplementedError)):
        _ops.row_dot_(*tensors)


def test_a_tangent_is_refused():
    out, x, y = _with()
    with torch.autograd.forward_ad.dual_level():
        y = torch.autograd.forward_ad.make_dual(y, torch.ones_like(y))
        with pytest.raises(ValueError, match="row_dot_: y must not carry a forward-mode tangent; got one"):
            _ops.row_dot_(out, x, y)


# ---- the dispatcher -------------------------------------------------------------------------------------------------


def test_x_and_y_may_be_one(device):
    out, x, _ = factors(5, 1, 40, device=device)
    check(out, x, x)


def test_autograd_is_told_of_the_write(device):
    for layout in (contiguous, LAYOUTS["every_other"]):
        tensors = [layout(t) for t in factors(6, 2, 5, device=device)]
        before = [t._version for t in tensors]
        _ops.row_dot_(*tensors)
        assert tensors[0]._version > before[0] and [t._version for t in tensors[1:]] == before[1:]


def test_copy_on_write(native):
    base, x = torch.randn(4), torch.randn(4, 5)
    out = torch._lazy_clone(base)
    _ops.row_dot_(out, torch._lazy_clone(x), x)
    assert not torch.equal(base, out)


def test_in_inference_mode(device):
    with torch.inference_mode():
        check(*factors(6, 3, 7, device=device))


def test_no_grad_mode_takes_what_requires_grad(device):
    out, x, y = factors(6, 3, 7, device=device)
    with torch.no_grad():
        check(out, x.requires_grad_(), y.requires_grad_())


@pytest.mark.parametrize("pair", PAIRS, ids=PAIR_IDS)
def test_opcheck(pair, device):
    out, x, y = factors(4, 2, 6, pair, device)
    op = torch.ops.nestopt_ext.row_dot_.default
    for layout in (contiguous, LAYOUTS["permuted"]):
        torch.library.opcheck(op, (out.clone(), layout(x), layout(y)))
    torch.library.opcheck(op, (out[:0].clone(), x[:0], y[:0]))


def test_compiled_is_one_graph(device):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def dots(out, x, y):
        out = out * 2
        _ops.row_dot_(out, x, y)
        return out + 1

    compiled = torch.compile(dots, backend=counter, fullgraph=True)
    for _ in range(3):
        arguments = factors(6, 2, 9, device=device)
        assert same_bits(compiled(*arguments), dots(*arguments))
    assert counter.frame_count == 1


@pytest.mark.big_memory
def test_more_elements_than_32_bits_count(device):
    columns = 2**31 + 64
    x = torch.zeros(1, columns, dtype=torch.float16, device=device)
    x[0, 0], x[0, -1] = 2.0, 3.0
    out = torch.zeros(1, dtype=opmath(x.dtype), device=device)
    _ops.row_dot_(out, x, x)
    assert out.item() == 13.0
