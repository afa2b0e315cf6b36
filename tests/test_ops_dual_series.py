"""dual_series_ against the recurrence in extended precision and against the series it stands for, in the full space."""

import numpy as np
import pytest
import torch
from helpers import (
    LAYOUTS,
    Memory,
    all_same_bits,
    assert_refused,
    contiguous,
    exact,
    freed,
    name_of,
    of_inference_mode,
    same_bits,
)
from torch._dynamo.testing import CompileCounterWithBackend

from nestopt_ext import _ops, _reference

INF, NAN = float("inf"), float("nan")
F32, F64 = torch.float32, torch.float64
#: dtypes of the gram and of the vectors
PAIRS = [(F32, F32), (F32, F64), (F64, F64), (F64, F32)]
PAIR_IDS = [f"{name_of(g)}-{name_of(v)}" for g, v in PAIRS]
#: None, one, around the blocks and lanes of the kernels, and enough for several threads.
SIZES = [0, 1, 2, 7, 8, 9, 15, 33, 64, 100, 257, 600]


def problem(size, num_terms, pair=PAIRS[2], device="cpu", weights="mean"):
    """coefficients and sq_norms (poisoned, but for |v|^2), gram, weights, projections, alpha; a convergent series."""
    rows = torch.randn(size, 40, dtype=F64)
    v = torch.randn(40, dtype=F64)
    w = {
        "mean": lambda: torch.rand(size, dtype=F64) / max(size, 1),
        "zero": lambda: torch.zeros(size, dtype=F64),
        "some": lambda: torch.where(torch.rand(size) < 0.5, torch.rand(size, dtype=F64), 0.0),
        "negative": lambda: torch.randn(size, dtype=F64) / 10,
    }[weights]()
    gram = (rows @ rows.T).to(device, pair[0])
    gram = (gram + gram.T) / 2
    bound = float((gram.to(F64).cpu().abs().sum(0) * w.abs()).max()) if size else 1.0
    norms = torch.full((num_terms + 1,), NAN, dtype=F64)
    norms[0] = v.square().sum()
    vectors = [torch.full((size,), NAN, dtype=F64), norms, w, rows @ v]
    coefficients, norms, w, projections = (t.to(device, pair[1]) for t in vectors)
    return coefficients, norms, gram, w, projections, torch.tensor(0.9 / max(bound, 1.0), dtype=F64)


def truth(coefficients, sq_norms, gram, weights, projections, alpha, damping):
    """The recurrence, in extended precision: coefficients, sq_norms."""
    g, w, d = exact(gram), exact(weights), exact(projections)
    step = np.longdouble(float(alpha))
    q = 1 - step * np.longdouble(damping)
    c, total, norms = np.zeros_like(d), np.zeros_like(d), [exact(sq_norms)[0]]
    for _ in range(len(sq_norms) - 1):
        e = w * d
        f = g @ e
        norms.append(np.maximum(0, q * q * norms[-1] - 2 * q * step * (d @ e) + step * step * (e @ f)))
        c, d = q * c - step * e, q * d - step * f
        total = total + c
    return total, np.array(norms)


def check(arguments, damping=0.0, function=_ops.dual_series_):
    """Judges a call: numbers, to the rounding of the result, and memory that was not to be touched."""
    coefficients, sq_norms = arguments[:2]
    first = sq_norms[0].clone()
    want, norms = truth(*arguments, damping)
    memory = Memory(arguments)
    function(*arguments, damping=damping)
    assert memory.changed_only([coefficients, sq_norms[1:]])
    assert same_bits(first, sq_norms[0])
    tolerance = 1e-12 if coefficients.dtype == F64 else 6e-8
    if len(want):
        scale = float(np.abs(want).max())
        assert float(np.abs(exact(coefficients) - want).max()) <= tolerance * scale
    # A difference of numbers of the size of |v|^2: it has the accuracy of those.
    assert float(np.abs(exact(sq_norms) - norms).max()) <= tolerance * float(np.abs(norms).max())


@pytest.mark.parametrize("num_terms", [0, 1, 2, 5, 20, 100])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pair", PAIRS, ids=PAIR_IDS)
def test_equals_the_recurrence(pair, size, num_terms, device):
    check(problem(size, num_terms, pair, device))


@pytest.mark.parametrize("damping", [0.0, 1e-3, 0.5])
@pytest.mark.parametrize("weights", ["mean", "zero", "some", "negative"])
def test_weights_and_damping(weights, damping, device):
    for pair in PAIRS:
        check(problem(37, 12, pair, device, weights), damping)
        check(problem(37, 12, pair, device, weights), damping, _reference.dual_series_)


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("weights", ["mean", "some", "negative"])
@pytest.mark.parametrize("num_terms", [0, 1, 2, 5, 20, 100])
def test_is_the_series_of_the_full_matrix(num_terms, weights, damping, device):
    rows, v = torch.randn(12, 30, dtype=F64, device=device), torch.randn(30, dtype=F64, device=device)
    w = {
        "mean": lambda: torch.full((12,), 1 / 12, dtype=F64),
        "some": lambda: torch.arange(12, dtype=F64) % 2,
        "negative": lambda: torch.linspace(-0.05, 1, 12, dtype=F64),
    }[weights]().to(device)
    matrix = rows.T * w @ rows + damping * torch.eye(30, dtype=F64, device=device)
    alpha = 0.8 / float(torch.linalg.matrix_norm(matrix, 2))
    term, total, wanted = v, v, [v.square().sum()]
    for _ in range(num_terms):
        term = term - alpha * (matrix @ term)
        total = total + term
        wanted.append(term.square().sum())
    coefficients, norms = (
        torch.empty(12, dtype=F64, device=device),
        torch.empty(num_terms + 1, dtype=F64, device=device),
    )
    norms[0] = wanted[0]
    number = torch.tensor(alpha, dtype=F64)
    _ops.dual_series_(coefficients, norms, rows @ rows.T, w, rows @ v, number, damping=damping)
    q = (1 - alpha * damping) ** np.arange(num_terms + 1)
    found = float(q.sum()) * v + rows.T @ coefficients
    assert float((found - total).norm()) <= 1e-12 * float(total.norm())
    torch.testing.assert_close(norms, torch.stack(wanted), rtol=1e-12, atol=1e-13 * float(wanted[0]))


def test_known_numbers(device):
    """One row, R R' = 4, weight 1/2, R v = 8, |v|^2 = 16, alpha = 1/4, damping 1: q = 3/4, and d, c go on by hand."""
    arguments = [torch.tensor(x, dtype=F64, device=device) for x in ([NAN], [16.0, NAN, NAN], [[4.0]], [0.5], [8.0])]
    _ops.dual_series_(*arguments, torch.tensor(0.25), damping=1.0)
    # e = 4, f = 16: |v_1|^2 = 9 - 12 + 4; c = -1; d = 6 - 4 = 2
    # e = 1, f = 4: |v_2|^2 = 9/16 - 3/4 + 1/4; c = -3/4 - 1/4
    assert arguments[0].tolist() == [-2.0]
    assert arguments[1].tolist() == [16.0, 1.0, 0.0625]


def test_no_rows_and_no_terms(device):
    norms = torch.tensor([2.0, NAN, NAN], device=device)
    nothing = torch.zeros(0, device=device)
    _ops.dual_series_(nothing, norms, nothing.view(0, 0), nothing, nothing, torch.tensor(0.5), damping=1.0)
    assert norms.tolist() == [2.0, 0.5, 0.125]
    arguments = problem(5, 0, device=device)
    _ops.dual_series_(*arguments)
    assert (arguments[0] == 0).all()


def test_squared_norms_are_never_negative(device):
    """v is a row, and alpha is the inverse of the one eigenvalue: the next term is a zero of rounding errors."""
    for seed in range(20):
        torch.manual_seed(seed)
        row = torch.randn(1, 50, dtype=F64, device=device)
        norms = torch.full((4,), NAN, dtype=F64, device=device)
        norms[0] = row.square().sum()
        gram = row @ row.T
        one = torch.ones(1, dtype=F64, device=device)
        _ops.dual_series_(one.clone(), norms, gram, one, gram[0], 1 / gram)
        assert (norms >= 0).all() and norms[1] <= 1e-12 * norms[0]


@pytest.mark.parametrize("place", ["gram", "weights", "projections", "sq_norms"])
@pytest.mark.parametrize("size", [1, 9, 300])
def test_what_is_not_a_number_shows(size, place, device):
    """Also through the maximum with zero."""
    for pair in PAIRS:
        arguments = problem(size, 5, pair, device)
        coefficients, norms, gram, weights, projections, _ = arguments
        spoiled = {"gram": gram[-1:], "weights": weights, "projections": projections, "sq_norms": norms}[place]
        spoiled.view(-1)[0 if place == "sq_norms" else -1] = NAN
        _ops.dual_series_(*arguments)
        assert norms[1:].isnan().all()
        if place == "sq_norms":
            assert coefficients.isfinite().all()
        else:
            assert coefficients.isnan().any() and (place == "gram" or coefficients.isnan().all())


def test_a_divergent_series_overflows_in_sight(device):
    arguments = list(problem(9, 400, (F32, F32), device))
    arguments[5] = arguments[5] * 1e3
    _ops.dual_series_(*arguments)
    assert not arguments[1][-1].isfinite() and not arguments[0].isfinite().all()
    assert arguments[1][5] > arguments[1][0]


def rows_apart(t):
    """Rows inside longer rows, as the kernels walk them without a copy."""
    return torch.full((t.shape[0], t.shape[1] + 3), NAN, dtype=t.dtype, device=t.device)[:, 1 : 1 + t.shape[1]].copy_(t)


@pytest.mark.parametrize("gram_layout", [*LAYOUTS.values(), rows_apart], ids=lambda f: f.__name__)
@pytest.mark.parametrize("vector_layout", [contiguous, *(LAYOUTS[n] for n in ("offset", "every_other", "padded"))])
def test_layouts(vector_layout, gram_layout, device):
    for pair in (PAIRS[0], PAIRS[2]):
        for size in (1, 13, 70):
            plain = problem(size, 6, pair, device)
            arguments = [vector_layout(t) for t in plain[:5]]
            arguments[2] = gram_layout(plain[2])
            twin = [contiguous(t) for t in plain]
            check([*arguments, plain[5]], 0.1)
            _ops.dual_series_(*twin, damping=0.1)
            assert all_same_bits(arguments[:2], twin[:2]) or _ops.is_native("dual_series_", device.type) is False


def test_expanded_weights(device):
    coefficients, norms, gram, _, projections, alpha = problem(20, 6, device=device)
    check((coefficients, norms, gram, torch.full((1,), 0.05, dtype=F64, device=device).expand(20), projections, alpha))


@pytest.mark.parametrize("dtype", [F32, F64], ids=name_of)
def test_alpha_of_any_shape_of_one_element(dtype, device):
    results = []
    for alpha in (
        torch.tensor(0.01, dtype=dtype),
        torch.tensor([0.01], dtype=dtype),
        torch.tensor([[0.01]], dtype=dtype, device=device),
    ):
        torch.manual_seed(0)
        arguments = problem(21, 7, device=device)[:5]
        _ops.dual_series_(*arguments, alpha)
        results.append(arguments[:2])
    assert all_same_bits(results[0], results[1]) and all_same_bits(results[0], results[2])


@pytest.mark.parametrize("size", [7, 256, 513, 1100])
def test_the_same_bits_on_any_number_of_threads(size, native):
    results = []
    for threads in (1, 2, 5, 1):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        for pair in PAIRS:
            arguments = problem(size, 5, pair)
            _ops.dual_series_(*arguments)
            results.append(arguments[:2])
    for i, other in enumerate(results):
        assert all_same_bits(results[i % len(PAIRS)], other)


def test_no_copy_of_the_gram(native):
    arguments = problem(500, 3, (F32, F64))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        _ops.dual_series_(*arguments)
    assert max((abs(e.self_cpu_memory_usage) for e in profile.events()), default=0) < 1024


# ---- hostile arguments ----------------------------------------------------------------------------------------------

NAMES = ("coefficients", "sq_norms", "gram", "weights", "projections", "alpha")


def _ok():
    vectors = [torch.zeros(3), torch.zeros(5), torch.eye(3), torch.ones(3), torch.ones(3), torch.tensor(0.1)]
    return dict(zip(NAMES, vectors, strict=True))


def _with(**changed):
    return {**_ok(), **changed}


def _overlapping():
    base = torch.zeros(20)
    return _with(coefficients=base[:3], sq_norms=base[2:7])


def _in_the_gram():
    gram = torch.eye(3)
    return _with(gram=gram, coefficients=gram[1])


HOSTILE = {
    "coefficients of 16 bits": (
        lambda: _with(coefficients=torch.zeros(3).half()),
        TypeError,
        "coefficients must be float32 or float64; got float16.",
    ),
    "coefficients of two dimensions": (
        lambda: _with(coefficients=torch.zeros(3, 1)),
        ValueError,
        "coefficients must have 1 dimension, the rows; got shape (3, 1).",
    ),
    "coefficients expanded": (
        lambda: _with(coefficients=torch.zeros(1).expand(3)),
        ValueError,
        "coefficients must not overlap itself; got shape (3,) with strides (0,). Pass a clone.",
    ),
    "coefficients that require grad": (
        lambda: _with(coefficients=torch.zeros(3, requires_grad=True)),
        ValueError,
        "coefficients must not require grad while grad mode is on; got one that does. Call under torch.no_grad().",
    ),
    "coefficients of inference mode": (
        lambda: _with(coefficients=of_inference_mode(3)),
        ValueError,
        "coefficients must not be an inference tensor outside inference mode; got one. Pass a clone.",
    ),
    "sq_norms of another dtype": (
        lambda: _with(sq_norms=torch.zeros(5).double()),
        TypeError,
        "sq_norms must be float32 beside coefficients of float32; got float64.",
    ),
    "sq_norms of nothing": (
        lambda: _with(sq_norms=torch.zeros(0)),
        ValueError,
        "sq_norms must have one dimension and an element at least, that of v; got shape (0,).",
    ),
    "sq_norms of no dimension": (
        lambda: _with(sq_norms=torch.zeros(())),
        ValueError,
        "sq_norms must have one dimension and an element at least, that of v; got shape ().",
    ),
    "sq_norms elsewhere": (
        lambda: _with(sq_norms=torch.zeros(5, device="meta")),
        ValueError,
        "sq_norms must be on cpu, the device of coefficients; got meta.",
    ),
    "sq_norms freed": (
        lambda: _with(sq_norms=freed(5)),
        ValueError,
        "sq_norms must have storage for its elements; got a storage of 8 bytes. It was resized or freed behind the"
        " tensor.",
    ),
    "gram of integers": (
        lambda: _with(gram=torch.zeros(3, 3, dtype=torch.int64)),
        TypeError,
        "gram must be float32 or float64; got int64.",
    ),
    "gram of 16 bits": (
        lambda: _with(gram=torch.zeros(3, 3, dtype=torch.bfloat16)),
        TypeError,
        "gram must be float32 or float64; got bfloat16.",
    ),
    "gram of another shape": (
        lambda: _with(gram=torch.zeros(3, 4)),
        ValueError,
        "gram must have a row and a column for each of coefficients, shape (3, 3); got (3, 4).",
    ),
    "gram sparse": (
        lambda: _with(gram=torch.eye(3).to_sparse()),
        TypeError,
        "gram must be a strided (dense) tensor; got sparse_coo. Call .to_dense() on it.",
    ),
    "gram elsewhere": (
        lambda: _with(gram=torch.eye(3, device="meta")),
        ValueError,
        "gram must be on cpu, the device of coefficients; got meta.",
    ),
    "gram that requires grad": (
        lambda: _with(gram=torch.eye(3, requires_grad=True)),
        ValueError,
        "gram must not require grad while grad mode is on; got one that does. Call under torch.no_grad().",
    ),
    "weights of another dtype": (
        lambda: _with(weights=torch.ones(3).double()),
        TypeError,
        "weights must be float32 beside coefficients of float32; got float64.",
    ),
    "weights of another number": (
        lambda: _with(weights=torch.ones(4)),
        ValueError,
        "weights must have the shape of coefficients (3,); got (4,).",
    ),
    "projections of another number": (
        lambda: _with(projections=torch.ones(1)),
        ValueError,
        "projections must have the shape of coefficients (3,); got (1,).",
    ),
    "alpha of two elements": (
        lambda: _with(alpha=torch.ones(2)),
        ValueError,
        "alpha must have one element; got shape (2,).",
    ),
    "alpha not finite": (
        lambda: _with(alpha=torch.tensor(NAN)),
        ValueError,
        "alpha must be finite; got nan.",
    ),
    "damping not finite": (
        lambda: _with(damping=INF),
        ValueError,
        "damping must be finite; got inf.",
    ),
    "shared memory": (
        _overlapping,
        ValueError,
        "coefficients must not share memory with sq_norms; got overlapping tensors. Pass a clone.",
    ),
    "coefficients in the gram": (
        _in_the_gram,
        ValueError,
        "coefficients must not share memory with gram; got overlapping tensors. Pass a clone.",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("route", [_ops.dual_series_, torch.ops.nestopt_ext.dual_series_], ids=["typed", "op"])
def test_refused_by_name_and_nothing_is_modified(route, name):
    make, kind, message = HOSTILE[name]
    arguments = make()
    tensors = [t for t in arguments.values() if isinstance(t, torch.Tensor)]
    assert_refused(lambda: route(**arguments), tensors, kind, f"dual_series_: {message}")


@pytest.mark.parametrize("name", NAMES)
def test_none_is_no_tensor(name):
    with pytest.raises((TypeError, NotImplementedError)):
        _ops.dual_series_(**_with(**{name: None}))


def test_a_tangent_is_refused():
    arguments = _ok()
    with torch.autograd.forward_ad.dual_level():
        arguments["gram"] = torch.autograd.forward_ad.make_dual(arguments["gram"], torch.ones(3, 3))
        with pytest.raises(ValueError, match="dual_series_: gram must not carry a forward-mode tangent"):
            _ops.dual_series_(**arguments)


# ---- the dispatcher -------------------------------------------------------------------------------------------------


def test_autograd_is_told_of_the_writes(device):
    arguments = problem(5, 3, device=device)
    before = [t._version for t in arguments]
    _ops.dual_series_(*arguments)
    assert all(t._version > b for t, b in zip(arguments[:2], before[:2], strict=True))
    assert [t._version for t in arguments[2:]] == before[2:]


def test_copy_on_write(native):
    base = torch.ones(3)
    coefficients, weights = torch._lazy_clone(base), torch._lazy_clone(base)
    _ops.dual_series_(**_with(coefficients=coefficients, weights=weights))
    assert base.tolist() == weights.tolist() == [1.0] * 3 and coefficients.tolist() != [1.0] * 3


def test_in_inference_mode(device):
    with torch.inference_mode():
        check(problem(5, 7, device=device))


@pytest.mark.parametrize("pair", PAIRS, ids=PAIR_IDS)
def test_opcheck(pair, device):
    op = torch.ops.nestopt_ext.dual_series_.default
    for size, num_terms in ((4, 3), (4, 0), (0, 3)):
        arguments = problem(size, num_terms, pair, device)
        torch.library.opcheck(op, tuple(t.nan_to_num(1.0) for t in arguments), {"damping": 0.1})


def test_compiled_is_one_graph(device):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def series(coefficients, norms, *rest):
        coefficients, norms = coefficients + 0, norms + 0
        _ops.dual_series_(coefficients, norms, *rest)
        return coefficients, norms

    compiled = torch.compile(series, backend=counter, fullgraph=True)
    for _ in range(3):
        *arguments, alpha = problem(6, 4, device=device)
        arguments.append(alpha.float())  # Dynamo compiles twice for a 0-dim float64 of the CPU
        assert all_same_bits(compiled(*arguments), series(*arguments))
    assert counter.frame_count == 1


def test_fuzz():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    layouts = st.sampled_from([contiguous, *(LAYOUTS[n] for n in ("offset", "every_other", "permuted", "padded"))])

    @hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @hypothesis.given(
        st.integers(0, 70),
        st.integers(0, 12),
        st.sampled_from(PAIRS),
        st.sampled_from(["mean", "zero", "some", "negative"]),
        st.sampled_from([0.0, 0.2]),
        layouts,
        layouts,
    )
    def run(size, num_terms, pair, weights, damping, vector_layout, gram_layout):
        plain = problem(size, num_terms, pair, weights=weights)
        vectors = [vector_layout(t) for t in plain[:5]]
        vectors[2] = gram_layout(plain[2])
        check([*vectors, plain[5]], damping)

    run()
