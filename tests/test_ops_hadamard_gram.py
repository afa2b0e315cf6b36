"""hadamard_gram_ against the Gram matrix of the matrices themselves: dtypes, layouts, copies, positions, refusals."""

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
    same_bits,
)
from torch._dynamo.testing import CompileCounterWithBackend

from nestopt_ext import _ops

INF, NAN = float("inf"), float("nan")
#: dtypes of gram and of the factors
PAIRS = [(torch.float32, d) for d in FLOATING if d != torch.float64] + [(torch.float64, d) for d in FLOATING]
PAIR_IDS = [f"{name_of(gram)}-{name_of(x)}" for gram, x in PAIRS]
#: Examples, those of y, positions, features of x and of y: alone, around the strips and blocks of the kernels, copies
#: of y, more positions than are taken at once.
SIZES = [
    (1, 1, 1, 1, 1),
    (2, 1, 1, 3, 1),
    (7, 7, 1, 3, 5),
    (31, 31, 1, 4, 64),
    (33, 33, 1, 17, 2),
    (100, 100, 1, 5, 300),
    (300, 300, 1, 13, 9),
    (70, 7, 1, 5, 30),
    (330, 110, 1, 13, 9),
    (5, 5, 3, 4, 6),
    (40, 40, 9, 3, 7),
    (24, 6, 4, 5, 3),
    (90, 45, 2, 3, 3),
    (3, 3, 1100, 2, 3),
    (4, 2, 600, 2, 2),
    (4, 2, 1500, 2, 2),
    (400, 200, 6, 2, 3),
]


def factors(sizes, pair=PAIRS[0], device="cpu"):
    """gram, x and y; gram is not symmetric, and as large as what is added to it."""
    examples, distinct, positions, x_features, y_features = sizes
    scale = positions * (x_features * y_features) ** 0.5
    gram = torch.randn(examples, examples, dtype=torch.float64) * scale
    x = torch.randn(examples * positions, x_features, dtype=torch.float64)
    y = torch.randn(distinct * positions, y_features, dtype=torch.float64)
    return gram.to(device, pair[0]), x.to(device, pair[1]), y.to(device, pair[1])


def rows_apart(t):
    """Rows inside longer rows."""
    return torch.full((t.shape[0], t.shape[1] + 3), NAN, dtype=t.dtype, device=t.device)[:, 1 : 1 + t.shape[1]].copy_(t)


def truth(gram, x, y, positions):
    """By the matrices, one for each example; and the sizes that errors are relative to."""
    examples = len(gram)
    xs = exact(x).reshape(examples, positions, -1)
    ys = np.tile(exact(y).reshape(-1, positions, y.shape[1]), (examples * positions // len(y), 1, 1))
    matrices = (xs.swapaxes(1, 2) @ ys).reshape(examples, -1)
    norms = (np.sqrt((xs**2).sum(-1)) * np.sqrt((ys**2).sum(-1))).sum(-1)
    start = exact(gram)
    return start + matrices @ matrices.T, np.abs(start) + np.outer(norms, norms)


def check(gram, x, y, positions=1, ones=False):
    """Judges a call: numbers and memory that was not to be touched."""
    want, size = truth(gram, x, torch.cat([y, torch.ones_like(y[:, :1])], 1) if ones else y, positions)
    memory = Memory([gram, x, y])
    _ops.hadamard_gram_(gram, x, y, positions=positions, ones=ones)
    assert memory.changed_only([gram])
    # Relative to the product of the norms, as for any order of a sum; its roundings add up like a random walk.
    eps = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    assert (np.abs(exact(gram) - want) / size).max() <= (4 + (x.shape[1] + y.shape[1]) ** 0.5) * eps


@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "-".join(map(str, s)))
@pytest.mark.parametrize("pair", PAIRS, ids=PAIR_IDS)
def test_the_gram_matrix_of_the_matrices(pair, sizes, device):
    check(*factors(sizes, pair, device), positions=sizes[2])


@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "-".join(map(str, s)))
def test_ones_are_one_more_feature(sizes, device):
    for pair in (PAIRS[0], PAIRS[1], PAIRS[4], PAIRS[3]):
        check(*factors(sizes, pair, device), positions=sizes[2], ones=True)


def test_long_rows_of_16_bits(device):
    """They are not converted all at once."""
    check(*factors((8, 8, 1, 270_000, 2), PAIRS[1], device))
    check(*factors((8, 4, 1, 2, 530_000), PAIRS[1], device))


def test_known_numbers(device):
    gram = torch.tensor([[0.0, 1.0], [2.0, 3.0]], device=device)
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=device)  # Gram 5 11 / 11 25
    _ops.hadamard_gram_(gram, x, torch.tensor([[2.0], [10.0]], device=device))  # Gram 4 20 / 20 100
    assert gram.tolist() == [[20.0, 221.0], [222.0, 2503.0]]
    gram.zero_()
    _ops.hadamard_gram_(gram, x, torch.tensor([[2.0]], device=device))
    assert gram.tolist() == [[20.0, 44.0], [44.0, 100.0]]
    gram = torch.ones(1, 1, device=device)
    _ops.hadamard_gram_(gram, x, torch.tensor([[2.0], [10.0]], device=device), positions=2)
    assert gram.item() == 1 + 5 * 4 + 2 * 11 * 20 + 25 * 100


@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "-".join(map(str, s)))
def test_what_is_added_is_symmetric(sizes, native):
    gram, x, y = factors(sizes)
    gram.zero_()
    _ops.hadamard_gram_(gram, x, y, positions=sizes[2])
    torch.testing.assert_close(gram, gram.T, rtol=0, atol=1e-5 * gram.abs().max().item())
    assert same_bits(gram[256:, 0], gram[0, 256:])  # far from the diagonal only one half is made


def test_each_layer_adds_to_one_gram(device):
    """Three layers of a network: the Gram matrix of whole gradients."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4), torch.nn.Linear(4, 1))
    model.to(device, torch.float64)
    inputs = torch.randn(9, 6, dtype=torch.float64, device=device)
    gram = torch.zeros(9, 9, dtype=torch.float64, device=device)
    kept, outputs = [], inputs
    for layer in model:
        before, outputs = outputs, layer(outputs)
        if isinstance(layer, torch.nn.Linear):
            kept.append((before.detach(), outputs))
    deltas = torch.autograd.grad(outputs.sum(), [out for _, out in kept], retain_graph=True)
    for (before, _), delta in zip(kept, deltas, strict=True):
        _ops.hadamard_gram_(gram, delta, before, ones=True)
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(out, [*model.parameters()], retain_graph=True)])
        for out in outputs[:, 0]
    ]
    jacobian = torch.stack(rows)
    torch.testing.assert_close(gram, jacobian @ jacobian.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda f: f.__name__)
def test_nothing(layout, device):
    for positions in (1, 3):
        gram = layout(torch.ones(0, 0, device=device))
        for rows in (0, 2 * positions):
            _ops.hadamard_gram_(
                gram, torch.ones(0, 5, device=device), torch.ones(rows, 2, device=device), positions=positions
            )
        assert gram.shape == (0, 0)
        for features in ((0, 5), (5, 0), (0, 0)):
            gram = layout(torch.ones(4, 4, device=device))
            x, y = (torch.ones(n * positions, f, device=device) for n, f in zip((4, 2), features, strict=True))
            _ops.hadamard_gram_(gram, x, y, positions=positions)
            assert (gram == 1).all()
        gram = layout(torch.ones(4, 4, device=device))
        x, y = torch.ones(4 * positions, 5, device=device), torch.ones(2 * positions, 0, device=device)
        _ops.hadamard_gram_(gram, x, y, positions=positions, ones=True)  # a bias alone
        assert (gram == 1 + 5 * positions**2).all()


@pytest.mark.parametrize("sizes", [(70, 70, 1, 5, 4), (70, 35, 1, 5, 4), (12, 6, 9, 5, 4)], ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids=PAIR_IDS)
def test_what_is_not_finite_shows_in_its_row_and_column_only(pair, sizes, device):
    for operand in (0, 1):
        gram, x, y = factors(sizes, pair, device)
        examples, distinct, positions = sizes[:3]
        if operand == 0:
            x[(examples - 3) * positions + positions // 2, 2] = NAN
            poisoned = [examples - 3]
        else:
            y[2 * positions, 1] = INF  # infinities of both signs meet in a sum, or a zero: seen either way
            poisoned = [*range(2, examples, distinct)]
        gram[0, 1] = NAN
        _ops.hadamard_gram_(gram, x, y, positions=positions)
        clean = torch.ones(examples, examples, dtype=torch.bool, device=device)
        clean[poisoned], clean[:, poisoned], clean[0, 1] = False, False, False
        assert gram[clean].isfinite().all() and not gram[~clean].isfinite().any()


GRAM_LAYOUTS = [*LAYOUTS.values(), rows_apart]


@pytest.mark.parametrize("sizes", [(40, 20, 1, 5, 9), (12, 6, 3, 5, 9)], ids=str)
@pytest.mark.parametrize("layout", GRAM_LAYOUTS, ids=lambda f: f.__name__)
def test_layouts_of_gram(layout, sizes, device):
    for pair in (PAIRS[0], PAIRS[3], PAIRS[4]):
        gram, x, y = factors(sizes, pair, device)
        check(layout(gram), x, y, sizes[2])


@pytest.mark.parametrize("y_layout", [*LAYOUTS.values(), rows_apart, expanded], ids=lambda f: f.__name__)
@pytest.mark.parametrize("x_layout", [*LAYOUTS.values(), rows_apart, expanded], ids=lambda f: f.__name__)
def test_layouts_of_factors(x_layout, y_layout, device):
    for pair in (PAIRS[0], PAIRS[1], PAIRS[4]):
        for sizes in ((40, 20, 1, 5, 9), (12, 6, 3, 5, 1)):
            gram, x, y = factors(sizes, pair, device)
            check(gram, x_layout(x), y_layout(y), sizes[2])


def test_the_same_bits_on_any_number_of_threads(native):
    """Where torch's own products are not: it splits long sums between threads."""
    torch.manual_seed(1)
    cases = [
        (factors(sizes, pair), sizes[2])
        for sizes, pair in [
            ((64, 64, 1, 3000, 784), PAIRS[0]),
            ((128, 128, 1, 64, 1500), PAIRS[0]),
            ((1, 1, 1, 100_000, 70), PAIRS[0]),
            ((40, 10, 1, 3000, 3000), PAIRS[1]),
            ((300, 100, 3, 900, 50), PAIRS[3]),
            ((90, 90, 20, 64, 50), PAIRS[4]),
        ]
    ]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append([])
        for (gram, x, y), positions in cases:
            gram = gram.clone()
            _ops.hadamard_gram_(gram, x, y, positions=positions)
            results[-1].append(gram)
    assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    "sizes", [(1200, 1200, 1, 3, 2), (1200, 300, 1, 3, 2), (30, 30, 100, 3, 2), (2, 2, 3000, 2, 2)], ids=str
)
def test_memory_does_not_grow_with_the_number_of_rows(sizes, native):
    gram, x, y = factors(sizes)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        _ops.hadamard_gram_(gram, x, y, positions=sizes[2])
    assert max((abs(e.self_cpu_memory_usage) for e in profile.events()), default=0) <= 8 << 20


# ---- hostile arguments ----------------------------------------------------------------------------------------------


def _with(positions=1, **changed):
    good = {"gram": torch.zeros(6, 6), "x": torch.zeros(6 * positions, 4), "y": torch.zeros(3 * positions, 5)}
    return (*(changed.get(k, t) for k, t in good.items()), positions)


def _overlapping():
    base = torch.zeros(70)
    return base[20:56].view(6, 6), base[:24].view(6, 4), torch.zeros(3, 5), 1


def _freed():
    return _with(x=freed(6, 4))


GRAD = "must not require grad while grad mode is on; got one that does. Call under torch.no_grad()."
HOSTILE = {
    "no positions": (lambda: (*_with()[:3], 0), ValueError, "positions must be positive; got 0."),
    "negative positions": (lambda: (*_with()[:3], -2), ValueError, "positions must be positive; got -2."),
    "gram of 16 bits": (
        lambda: _with(gram=torch.zeros(6, 6, dtype=torch.float16)),
        TypeError,
        "gram must be float32 or float64; got float16.",
    ),
    "gram of one dimension": (
        lambda: _with(gram=torch.zeros(6)),
        ValueError,
        "gram must have 2 dimensions, both of examples; got shape (6,).",
    ),
    "gram not square": (
        lambda: _with(gram=torch.zeros(6, 5)),
        ValueError,
        "gram must be square; got shape (6, 5).",
    ),
    "gram expanded": (
        lambda: _with(gram=torch.zeros(6, 1).expand(6, 6)),
        ValueError,
        "gram must not overlap itself; got shape (6, 6) with strides (1, 0). Pass a clone.",
    ),
    "gram that requires grad": (lambda: _with(gram=torch.zeros(6, 6, requires_grad=True)), ValueError, f"gram {GRAD}"),
    "x that requires grad": (lambda: _with(x=torch.zeros(6, 4, requires_grad=True)), ValueError, f"x {GRAD}"),
    "y that requires grad": (lambda: _with(y=torch.zeros(3, 5, requires_grad=True)), ValueError, f"y {GRAD}"),
    "gram of inference mode": (
        lambda: _with(gram=of_inference_mode(6, 6)),
        ValueError,
        "gram must not be an inference tensor outside inference mode; got one. Pass a clone.",
    ),
    "x sparse": (
        lambda: _with(x=torch.zeros(6, 4).to_sparse()),
        TypeError,
        "x must be a strided (dense) tensor; got sparse_coo. Call .to_dense() on it.",
    ),
    "x wider than gram": (
        lambda: _with(x=torch.zeros(6, 4, dtype=torch.float64)),
        TypeError,
        "x must be float32, bfloat16 or float16 beside gram of float32; got float64.",
    ),
    "x elsewhere": (
        lambda: _with(x=torch.zeros(6, 4, device="meta")),
        ValueError,
        "x must be on cpu, the device of gram; got meta.",
    ),
    "x of one dimension": (
        lambda: _with(x=torch.zeros(6)),
        ValueError,
        "x must have 2 dimensions, rows and features; got shape (6,).",
    ),
    "x of other rows": (
        lambda: _with(x=torch.zeros(5, 4)),
        ValueError,
        "x must have positions = 1 rows for each of the 6 of gram; got shape (5, 4).",
    ),
    "x of fewer positions": (
        lambda: _with(2, x=torch.zeros(6, 4)),
        ValueError,
        "x must have positions = 2 rows for each of the 6 of gram; got shape (6, 4).",
    ),
    "y of another dtype": (
        lambda: _with(y=torch.zeros(3, 5, dtype=torch.bfloat16)),
        TypeError,
        "y must be float32 beside x of float32; got bfloat16.",
    ),
    "y elsewhere": (
        lambda: _with(y=torch.zeros(3, 5, device="meta")),
        ValueError,
        "y must be on cpu, the device of x; got meta.",
    ),
    "y of one dimension": (
        lambda: _with(y=torch.zeros(3)),
        ValueError,
        "y must have 2 dimensions, rows and features; got shape (3,).",
    ),
    "y of rows that do not divide": (
        lambda: _with(y=torch.zeros(4, 5)),
        ValueError,
        "y must have positions = 1 rows for each of a divisor of 6 examples; got shape (4, 5).",
    ),
    "y that is no multiple of positions": (
        lambda: _with(4, y=torch.zeros(6, 5)),
        ValueError,
        "y must have positions = 4 rows for each of a divisor of 6 examples; got shape (6, 5).",
    ),
    "y of no rows": (
        lambda: _with(y=torch.zeros(0, 5)),
        ValueError,
        "y must have positions = 1 rows for each of a divisor of 6 examples; got shape (0, 5).",
    ),
    "shared memory": (
        _overlapping,
        ValueError,
        "gram must not share memory with x; got overlapping tensors. Pass a clone.",
    ),
    "freed memory": (
        _freed,
        ValueError,
        "x must have storage for its elements; got a storage of 8 bytes. It was resized or freed behind the tensor.",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("route", [_ops.hadamard_gram_, torch.ops.nestopt_ext.hadamard_gram_], ids=["typed", "op"])
def test_refused_by_name_and_nothing_is_modified(route, name):
    make, kind, message = HOSTILE[name]
    *tensors, positions = make()
    assert_refused(lambda: route(*tensors, positions=positions), tensors, kind, f"hadamard_gram_: {message}")


@pytest.mark.parametrize("position", range(3))
def test_none_is_no_tensor(position):
    tensors = [*_with()[:3]]
    tensors[position] = None
    with pytest.raises((TypeError, NotImplementedError)):
        _ops.hadamard_gram_(*tensors)


def test_a_tangent_is_refused():
    gram, x, y, _ = _with()
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(ValueError, match="hadamard_gram_: x must not carry a forward-mode tangent; got one"):
            _ops.hadamard_gram_(gram, x, y)


# ---- the dispatcher -------------------------------------------------------------------------------------------------


def test_x_and_y_may_be_one(device):
    gram, x, _ = factors((20, 20, 1, 6, 6), device=device)
    check(gram, x, x)


def test_autograd_is_told_of_the_write(device):
    for layout in (contiguous, LAYOUTS["every_other"], LAYOUTS["permuted"]):
        tensors = [layout(t) for t in factors((6, 2, 1, 5, 4), device=device)]
        before = [t._version for t in tensors]
        _ops.hadamard_gram_(*tensors)
        assert tensors[0]._version > before[0] and [t._version for t in tensors[1:]] == before[1:]


def test_copy_on_write(native):
    base, x = torch.randn(4, 4), torch.randn(4, 5)
    gram = torch._lazy_clone(base)
    before = base.clone()
    _ops.hadamard_gram_(gram, torch._lazy_clone(x), x)
    assert same_bits(base, before) and not torch.equal(base, gram)


def test_in_inference_mode(device):
    with torch.inference_mode():
        check(*factors((70, 35, 1, 5, 4), device=device))


def test_no_grad_mode_takes_what_requires_grad(device):
    gram, x, y = factors((70, 35, 1, 5, 4), device=device)
    with torch.no_grad():
        check(gram, x.requires_grad_(), y.requires_grad_())


@pytest.mark.parametrize("pair", PAIRS, ids=PAIR_IDS)
def test_opcheck(pair, device):
    op = torch.ops.nestopt_ext.hadamard_gram_.default
    for positions, layout in ((1, contiguous), (2, LAYOUTS["permuted"])):
        gram, x, y = factors((4, 2, positions, 6, 5), pair, device)
        torch.library.opcheck(op, (layout(gram), layout(x), layout(y)), {"positions": positions})
    torch.library.opcheck(op, (gram[:0, :0].clone(), x[:0], y[:0]))


def test_compiled_is_one_graph(device):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def product(gram, x, y):
        gram = gram * 2
        _ops.hadamard_gram_(gram, x, y, positions=2)
        return gram + 1

    compiled = torch.compile(product, backend=counter, fullgraph=True)
    for _ in range(3):
        arguments = factors((6, 3, 2, 4, 5), device=device)
        assert same_bits(compiled(*arguments), product(*arguments))
    assert counter.frame_count == 1


def test_fuzz():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    small = st.integers(1, 5)
    layouts = st.sampled_from(GRAM_LAYOUTS)

    @hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @hypothesis.given(small, st.integers(1, 40), small, small, small, st.sampled_from(PAIRS), layouts, layouts, layouts)
    def run(copies, distinct, positions, x_features, y_features, pair, gram_layout, x_layout, y_layout):
        tensors = factors((copies * distinct, distinct, positions, x_features, y_features), pair)
        layouts = (gram_layout, x_layout, y_layout)
        check(*(layout(t) for layout, t in zip(layouts, tensors, strict=True)), positions)

    run()
