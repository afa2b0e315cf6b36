import warnings
from collections import namedtuple

import pytest
import torch
from cases import F64, flat, normal, relative_error, ridge, spd, values
from torch.utils._python_dispatch import TorchDispatchMode

import nestopt_ext
from nestopt_ext import _lists
from nestopt_ext._operator import LinearOperator
from nestopt_ext.solvers import Identity, Neumann, Solution, Status, neumann_ihvp, solve
from nestopt_ext.solvers._product import Product
from nestopt_ext.solvers._solve import invert

A = spd(1, 12, 20.0)
V = normal(2, 12)
ALPHA = 0.9 / float(torch.linalg.eigvalsh(A)[-1])
EXACT = torch.linalg.solve(A, V)
Pair = namedtuple("Pair", "w b")


def matvec(v):
    return A @ v


class Counted:
    """A matvec that counts its calls."""

    def __init__(self, function=matvec):
        self.function = function
        self.calls = 0

    def __call__(self, v):
        self.calls += 1
        return self.function(v)


# ---- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("num_terms", [0, 1, 5, 20])
def test_residual_identity(num_terms, damping):
    damped = A + damping * torch.eye(12, dtype=F64)
    counted = Counted()
    found = neumann_ihvp(counted, V, num_terms=num_terms, alpha=0.6, damping=damping)
    wanted = torch.linalg.matrix_power(torch.eye(12, dtype=F64) - 0.6 * damped, num_terms + 1) @ V
    assert float((V - damped @ found - wanted).norm() / V.norm()) < 1e-12
    assert counted.calls == num_terms


def test_the_sum_is_written_out():
    step = torch.eye(12, dtype=F64) - ALPHA * A
    wanted = ALPHA * sum(torch.linalg.matrix_power(step, j) @ V for j in range(4))
    assert relative_error(neumann_ihvp(matvec, V, num_terms=3, alpha=ALPHA), wanted) < 1e-14


def test_no_terms_give_alpha_times_v_bit_for_bit():
    assert torch.equal(neumann_ihvp(matvec, V, num_terms=0, alpha=0.3), 0.3 * V)
    assert torch.equal(solve(matvec, V, Identity(0.3)).value, 0.3 * V)


@pytest.mark.parametrize(
    ("step", "rate"), [("safe", 1 - 0.9 * 0.605 / 2.478), ("best", (2.478 - 0.605) / (2.478 + 0.605))]
)
@pytest.mark.parametrize("num_terms", [0, 1, 3, 5, 20])
def test_rate_on_a_spectrum_from_0_605_to_2_478(step, rate, num_terms):
    eigenvalues = torch.linspace(0.605, 2.478, 12, dtype=F64)
    alpha = 0.9 / 2.478 if step == "safe" else 2 / (0.605 + 2.478)
    v = torch.zeros(12, dtype=F64)
    v[0] = 1.0
    found = neumann_ihvp(lambda v: eigenvalues * v, v, num_terms=num_terms, alpha=alpha)
    assert relative_error(found, v / eigenvalues) == pytest.approx(rate ** (num_terms + 1), rel=1e-9)
    everywhere = torch.ones(12, dtype=F64)
    residual = everywhere - eigenvalues * neumann_ihvp(
        lambda v: eigenvalues * v, everywhere, num_terms=num_terms, alpha=alpha
    )
    assert residual.norm() <= rate ** (num_terms + 1) * everywhere.norm() * (1 + 1e-12)


def test_enough_terms_solve_and_twenty_do_not():
    errors = [
        relative_error(neumann_ihvp(matvec, V, num_terms=k, alpha=ALPHA), EXACT) for k in (0, 1, 5, 20, 400, 1000)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] > 1e-2
    assert errors[4] < 1e-7 and errors[5] < 1e-12


@pytest.mark.parametrize(
    "alpha", [ALPHA, torch.tensor(ALPHA, dtype=F64), torch.tensor(ALPHA, dtype=F64, requires_grad=True)]
)
def test_alpha_as_number_and_tensor_give_the_same_bits(alpha):
    found = neumann_ihvp(matvec, V, num_terms=7, alpha=alpha)
    assert torch.equal(found, neumann_ihvp(matvec, V, num_terms=7, alpha=ALPHA))
    assert not found.requires_grad


# ---- alpha="auto" ---------------------------------------------------------------------------------------------------


def auto_alpha_of(function, v, damping=0.0):
    """The alpha that was chosen, read off alpha * v."""
    return float(neumann_ihvp(function, v, num_terms=0, alpha="auto", damping=damping).flatten()[0] / v.flatten()[0])


@pytest.mark.parametrize("kappa", [1.0, 20.0, 1e4])
@pytest.mark.parametrize("damping", [0.0, 2.0])
def test_auto_alpha_is_near_its_definition_and_contracts(kappa, damping):
    matrix = 3 * spd(5, 50, kappa)
    v = normal(6, 50)
    wanted = 0.9 / (3 + damping)
    found = auto_alpha_of(lambda x: matrix @ x, v, damping)
    assert wanted * (1 - 1e-12) <= found <= 1.25 * wanted, (
        "power iteration finds at least 0.8 of the largest eigenvalue here"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        neumann_ihvp(lambda x: matrix @ x, v, num_terms=300, alpha="auto", damping=damping)


def test_auto_alpha_finds_a_direction_that_v_does_not_contain():
    diagonal = torch.full((40,), 0.1, dtype=F64)
    diagonal[7] = 5.0
    v = torch.ones(40, dtype=F64)
    v[7] = 0
    assert auto_alpha_of(lambda x: diagonal * x, v) == pytest.approx(0.9 / 5, rel=1e-3)


@pytest.mark.parametrize("scale", [0.0, 1e-100, 1e-30, 1e30, 1e100])
def test_auto_alpha_is_finite_for_any_scale(scale):
    found = auto_alpha_of(lambda x: scale * x, torch.ones(3, dtype=F64))
    assert found == pytest.approx(0.9 / scale if scale else 1.0, rel=1e-6, abs=0)


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1.0, 1e30])
def test_auto_alpha_does_not_depend_on_the_scale_of_v(scale):
    v = torch.full((6,), scale)
    found = neumann_ihvp(lambda x: 4 * x, v, num_terms=0, alpha="auto") / v
    torch.testing.assert_close(found, torch.full((6,), 0.225), rtol=1e-4, atol=0)


def test_auto_alpha_of_a_zero_right_hand_side():
    solution = solve(matvec, torch.zeros(12, dtype=F64), Neumann(3))
    assert solution.value.abs().max() == 0 and solution.status is Status.converged


def test_auto_alpha_spends_five_products_and_leaves_the_global_generator_alone():
    counted = Counted()
    state = torch.get_rng_state()
    first = neumann_ihvp(counted, V, num_terms=3, alpha="auto")
    assert counted.calls == 8
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, neumann_ihvp(matvec, V, num_terms=3, alpha="auto"))


# ---- structures, dtypes, memory -------------------------------------------------------------------------------------

PARTS = {"w": V[:6].reshape(2, 3), "b": V[6:11], "c": V[11].reshape(())}


def blocks(parts):
    product = A @ flat(parts)
    return [product[:6].reshape(2, 3), product[6:11], product[11]]


@pytest.mark.parametrize(
    ("pack", "unpack"),
    [
        (lambda p: [*p], lambda x: x),
        (lambda p: (*p,), lambda x: x),
        (lambda p: dict(zip("wbc", p, strict=True)), lambda x: list(x.values())),
    ],
    ids=["list", "tuple", "dict"],
)
def test_structure_comes_back_and_numbers_do_not_depend_on_it(pack, unpack):
    v = pack(list(PARTS.values()))
    kept = [t.clone() for t in PARTS.values()]

    def structured(x):
        assert type(x) is type(v)
        return pack(blocks(unpack(x)))

    found = neumann_ihvp(structured, v, num_terms=9, alpha=ALPHA)
    assert type(found) is type(v)
    assert relative_error(found, neumann_ihvp(matvec, V, num_terms=9, alpha=ALPHA)) < 1e-14
    assert all(torch.equal(t, k) for t, k in zip(PARTS.values(), kept, strict=True))


def test_a_namedtuple_comes_back_and_a_reordered_dict_is_understood():
    found = neumann_ihvp(lambda v: Pair(2 * v.w, v.b), Pair(V, V[:2]), num_terms=1, alpha=0.5)
    assert isinstance(found, Pair)
    torch.testing.assert_close(found.w, 0.5 * V)
    found = neumann_ihvp(lambda v: {"b": v["b"], "w": 2 * v["w"]}, {"w": V, "b": V}, num_terms=1, alpha=0.5)
    torch.testing.assert_close(found, {"w": 0.5 * V, "b": 0.75 * V})


@pytest.mark.parametrize("v", [[], (), {}, torch.empty(0, dtype=F64), [torch.empty(0, 3), torch.ones(2)]])
def test_empty_tensors_and_no_tensors(v):
    for alpha in (0.5, "auto"):
        solution = solve(lambda x: x, v, Neumann(4, alpha))
        assert type(solution.value) is type(v)
        assert solution.status in (Status.converged, Status.max_terms)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    """A 16-bit sum is kept in float32, so that its error is one rounding of the result and not of 400 additions."""
    bound = (2 if dtype.itemsize == 2 else 8) * torch.finfo(dtype).eps
    seen = set()
    diagonal = torch.tensor([1.0, 0.5, 0.25, 0.125], dtype=dtype)
    v = torch.tensor([1.0, -2.0, 3.0, 1.5], dtype=dtype)

    def product(x):
        seen.add(x.dtype)
        return diagonal * x

    found = neumann_ihvp(product, v, num_terms=400, alpha=0.9)
    assert seen == {dtype} and found.dtype == dtype
    assert relative_error(found.double(), v.double() / diagonal.double()) < bound
    found = neumann_ihvp(product, v, num_terms=400, alpha="auto")
    assert relative_error(found.double(), v.double() / diagonal.double()) < bound


def test_mixed_dtypes_in_one_list():
    v = [torch.ones(3, dtype=F64), torch.ones(2), torch.ones(2, dtype=torch.bfloat16)]
    found = neumann_ihvp(lambda x: [2 * t for t in x], v, num_terms=1, alpha=0.25)
    assert [t.dtype for t in found] == [t.dtype for t in v]
    assert all(torch.equal(t, torch.full_like(t, 0.375)) for t in found)


ALIASES = {
    "itself": lambda v: v,
    "view": lambda v: v.view(3, 4).view(12),
    "flipped rows": lambda v: v.view(3, 4).transpose(0, 1).reshape(12),
    "overlapping": lambda v: v[:1].expand(12),
    "detached": lambda v: v.detach(),
    "parameter": lambda v: torch.nn.Parameter(v.clone()),
    "with graph": lambda v: v * torch.ones(12, dtype=F64, requires_grad=True),
    "negative view": lambda v: torch._neg_view(v),
    "strided": lambda v: torch.stack([v, v], 1)[:, 0],
}


@pytest.mark.parametrize("name", ALIASES)
@pytest.mark.parametrize("alpha", [0.4, "auto"])
def test_products_that_alias_their_argument(name, alpha):
    function = ALIASES[name]
    matrix = torch.stack([function(e) for e in torch.eye(12, dtype=F64)], dim=1).detach()
    kept = V.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = neumann_ihvp(function, V, num_terms=5, alpha=alpha)
        wanted = neumann_ihvp(lambda v: matrix @ v, V, num_terms=5, alpha=alpha)
    assert relative_error(found, wanted) < 1e-12
    assert torch.equal(V, kept)
    assert not found.requires_grad


def test_a_product_buffer_may_be_used_again():
    buffer = torch.empty(12, dtype=F64)
    found = neumann_ihvp(lambda v: torch.mv(A, v, out=buffer), V, num_terms=6, alpha=ALPHA)
    assert torch.equal(found, neumann_ihvp(matvec, V, num_terms=6, alpha=ALPHA))


def test_strange_right_hand_sides():
    for v in (V[:1].expand(12), V.flip(0)[::1], torch.stack([V, V], 1)[:, 1], V.clone().requires_grad_()):
        found = neumann_ihvp(matvec, v, num_terms=4, alpha=ALPHA)
        assert (
            relative_error(found, neumann_ihvp(matvec, v.detach().contiguous().clone(), num_terms=4, alpha=ALPHA))
            < 1e-14
        )
        assert found.is_contiguous() and not found.requires_grad


def test_the_result_is_new_memory():
    for solver in (Neumann(0, 1.0), Identity(1.0), Neumann(2, 1.0)):
        found = solve(lambda v: v, V, solver).value
        assert found.data_ptr() != V.data_ptr()


# ---- honesty --------------------------------------------------------------------------------------------------------


def test_solution_counts_and_reports_the_true_residual():
    counted = Counted()
    solution = solve(counted, V, Neumann(6, ALPHA, damping=0.2))
    assert isinstance(solution, Solution)
    assert solution.num_products == counted.calls == 7
    true = (V - A @ solution.value - 0.2 * solution.value).norm()
    assert solution.residual_norm.shape == () and float(solution.residual_norm) == pytest.approx(float(true), rel=1e-12)
    assert solution.status is Status.max_terms
    assert solve(Counted(), V, Neumann(6, "auto")).num_products == 12
    assert solve(Counted(), V, Identity(0.1)).num_products == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kappa", [1.0, 10.0, 100.0])
def test_converged_means_rounding_level(dtype, kappa):
    matrix = spd(8, 30, kappa)
    v = normal(9, 30).to(dtype)

    def product(x):
        return (matrix @ x.double()).to(dtype)

    assert solve(product, v, Neumann(int(40 * kappa), 0.9)).status is Status.converged
    assert solve(product, v, Neumann(0, 0.3)).status is Status.max_terms


def test_two_x_is_three():
    solution = solve(lambda v: 2 * v, torch.tensor(3.0, dtype=F64), Neumann(200, 0.4))
    assert float(solution.value) == pytest.approx(1.5, rel=1e-15) and solution.status is Status.converged


INDEFINITE = torch.diag(torch.tensor([1.0, 0.5, -0.2], dtype=F64))
DIVERGENT = {
    "indefinite": (lambda v: INDEFINITE @ v, {"num_terms": 40, "alpha": 0.9}),
    "indefinite, auto": (lambda v: INDEFINITE @ v, {"num_terms": 40, "alpha": "auto"}),
    "indefinite, still small": (
        lambda v: torch.tensor([1.0, 1.0, -0.2], dtype=F64) * v,
        {"num_terms": 4, "alpha": 0.9},
    ),
    "alpha too large": (lambda v: 3 * v, {"num_terms": 2, "alpha": 0.9}),
}


@pytest.mark.parametrize("name", DIVERGENT)
def test_divergence_is_said_once(name):
    function, options = DIVERGENT[name]
    v = torch.tensor([0.1, 0.1, 1.0], dtype=F64)
    assert solve(function, v, Neumann(**options)).status is Status.diverged
    with pytest.warns(RuntimeWarning) as caught:
        neumann_ihvp(function, v, **options)
    assert len(caught) == 1 and caught[0].filename == __file__
    message = str(caught[0].message)
    assert message.startswith("neumann_ihvp: the Neumann sum diverges (num_terms=")
    assert all(
        word in message for word in ("spectral radius", "Lower alpha", "raise damping", "alpha='auto'", "Gauss-Newton")
    )


def test_three_growing_terms_are_divergence_even_below_the_first():
    diagonal = torch.tensor([1.0, -0.5], dtype=F64)
    v = torch.tensor([1.0, 1e-3], dtype=F64)
    assert solve(lambda x: diagonal * x, v, Neumann(8, 0.99)).status is Status.diverged
    assert solve(lambda x: diagonal * x, v, Neumann(2, 0.99)).status is Status.max_terms


def test_terms_that_grow_and_then_end_have_converged():
    nilpotent = torch.tensor([[0.0, -3.0], [0.0, 0.0]], dtype=F64)
    v = torch.tensor([0.0, 1.0], dtype=F64)
    solution = solve(lambda x: x + nilpotent @ x, v, Neumann(num_terms=1, alpha=1.0))
    assert solution.value.tolist() == [3.0, 1.0]
    assert float(solution.residual_norm) == 0
    assert solution.status is Status.converged


def test_the_warning_estimates_the_spectral_radius():
    with pytest.warns(RuntimeWarning, match=r"num_terms=10, alpha=2, damping=0.5\).* got about 4\."):
        neumann_ihvp(lambda v: 2 * v, V, num_terms=10, alpha=2.0, damping=0.5)


@pytest.mark.parametrize("spectrum", [[0.0], [0.0, 1.0], [1.0, 1e-30]])
def test_singular_curvature_is_not_called_divergence(spectrum):
    diagonal = torch.tensor(spectrum)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = neumann_ihvp(lambda v: diagonal * v, torch.ones(len(spectrum)), num_terms=50, alpha="auto")
    assert found.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("alpha", [0.5, "auto"])
def test_non_finite_products_are_kept_and_said(bad, alpha):
    def function(v):
        product = A @ v
        product[3] = bad
        return product

    assert solve(function, V, Neumann(5, alpha)).status is Status.non_finite
    with pytest.warns(RuntimeWarning, match="the Neumann sum is not finite") as caught:
        found = neumann_ihvp(function, V, num_terms=5, alpha=alpha)
    assert len(caught) == 1
    assert not found[3].isfinite()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("num_terms", [0, 3])
def test_a_non_finite_right_hand_side_is_kept_and_said(bad, num_terms):
    v = V.clone()
    v[5] = bad
    assert solve(lambda x: x, v, Neumann(num_terms, "auto")).status is Status.non_finite
    assert solve(lambda x: x, v, Identity()).status is Status.non_finite
    with pytest.warns(RuntimeWarning, match="NaN or Inf|not finite") as caught:
        found = neumann_ihvp(lambda x: 0.5 * x, v, num_terms=num_terms, alpha=0.5)
    assert len(caught) == 1 and not found[5].isfinite() and found[4].isfinite()


def test_a_nan_that_only_the_residual_sees():
    calls = Counted(lambda v: v * (float("nan") if calls.calls > 3 else 1.0))
    assert solve(calls, V, Neumann(3, 0.5)).status is Status.non_finite


def test_overflow_in_a_narrow_result_is_said():
    v = torch.full((3,), 6e4, dtype=torch.float16)
    assert solve(lambda x: 0 * x, v, Neumann(3, 1.0)).status is Status.non_finite


def test_large_finite_numbers_are_not_called_non_finite():
    assert solve(lambda x: x, torch.full((3,), 1e150, dtype=F64), Neumann(3, 0.5)).status is Status.max_terms


@pytest.mark.parametrize(
    ("value", "dtype", "num_terms", "alpha", "finite"),
    [
        (3e4, torch.float16, 3, 1.0, False),  # 1.2e5 is finite in float32, where the sum is kept
        (100.0, torch.float16, 20, 1.0, True),  # the norms add up to more than float16 holds, the entries do not
        (1e38, torch.float32, 5, 1.0, False),
        (1e38, torch.float32, 0, 10.0, False),
        (1e38, torch.float32, 5, 0.1, False),  # the sum before it is multiplied
        (1e36, torch.float32, 5, 1.0, True),
    ],
)
def test_a_sum_of_finite_terms_that_overflows(value, dtype, num_terms, alpha, finite):
    v = torch.full((10_000,), value, dtype=dtype)
    solution = solve(torch.zeros_like, v, Neumann(num_terms, alpha))
    assert bool(solution.value.isfinite().all()) is finite
    assert (solution.status is not Status.non_finite) is finite
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        neumann_ihvp(torch.zeros_like, v, num_terms=num_terms, alpha=alpha)
    assert bool(caught) is not finite


def test_what_bounds_a_correction_does_not_bound_the_solution():
    v, start = torch.zeros(3), torch.tensor([3.3e38, 0.0, 0.0])
    flat, structure = _lists.flatten("test", "v", [v])
    product = Product("test", lambda x: [-0.1 * x[0]], structure, flat)
    inverse = invert("test", product, flat, Neumann(0, 1.0), start=[start])
    assert inverse.value[0][0].isinf() and inverse.verdict.status is Status.non_finite


class ByAnotherWay(LinearOperator):
    """Its sum overflows on a way of its own, and its norms do not tell."""

    def flat_product(self, v):
        return [torch.zeros_like(t) for t in v]

    def flat_loop(self, v, num_terms, alpha, damping, diagonal=None):
        return [torch.full_like(t, float("inf")) for t in v], torch.ones(num_terms + 1, dtype=F64)


def test_norms_of_an_operator_are_no_bound_unless_it_says_so():
    v, structure = _lists.flatten("test", "v", [torch.ones(3)])
    with pytest.warns(RuntimeWarning, match="is not finite"):
        neumann_ihvp(ByAnotherWay(v, structure), v, num_terms=2, alpha=0.5)


def test_statuses_carry_their_message():
    names = {"converged", "max_terms", "breakdown", "negative_curvature", "diverged", "non_finite"}
    assert {s.name for s in Status} == names
    assert all(s.message for s in Status)


def test_one_wait_for_the_device_per_solve(monkeypatch):
    """Reading a tensor's value is the only way to wait; all of them happen in one place, once."""
    reads = []
    for name in ("item", "tolist", "__float__", "__bool__", "numpy", "cpu"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda t, *a, _o=original, _n=name, **k: (reads.append(_n), _o(t, *a, **k))[1]
        )
    alpha = torch.tensor(0.5, dtype=F64)
    solver = Neumann(5, "auto"), Neumann(5, 0.5)
    reads.clear()
    for s in solver:
        solve(matvec, V, s)
    assert [r for r in reads if r == "tolist"] == ["tolist"] * 2
    assert set(reads) - {"tolist"} <= {"item"}, "item() is the op's own check of a step on the CPU"
    assert float(alpha) == 0.5


@pytest.mark.parametrize("v", [V, V.bfloat16(), [V, torch.zeros(0)], []], ids=["one", "narrow", "empty", "none"])
@pytest.mark.parametrize("solver", [Neumann(3, 0.5), Neumann(3), Identity(0.5)], ids=["number", "auto", "identity"])
def test_the_default_device_does_not_matter(solver, v):
    wanted = solve(lambda x: x, v, solver)
    torch.set_default_device("meta")
    try:
        found = solve(lambda x: x, v, solver)
        if isinstance(solver, Neumann):
            neumann_ihvp(lambda x: x, v, num_terms=3, alpha=solver.alpha)
    finally:
        torch.set_default_device(None)
    assert all(torch.equal(a, b) for a, b in zip(values(found.value), values(wanted.value), strict=True))
    assert torch.equal(found.residual_norm, wanted.residual_norm)
    assert found.status is wanted.status


# ---- refusals -------------------------------------------------------------------------------------------------------

BAD_OPTIONS = [
    ({"num_terms": -1}, ValueError, "num_terms must be >= 0; got -1"),
    ({"num_terms": 10**14}, ValueError, "num_terms must be <= 10000000; got 100000000000000"),
    ({"num_terms": 2.0}, TypeError, "num_terms must be an int; got 2.0"),
    ({"num_terms": True}, TypeError, "num_terms must be an int; got True"),
    ({"num_terms": "3"}, TypeError, "num_terms must be an int; got '3'"),
    ({"num_terms": None}, TypeError, "num_terms must be an int; got None"),
    ({"alpha": float("nan")}, ValueError, "alpha must be finite and > 0; got nan"),
    ({"alpha": float("inf")}, ValueError, "alpha must be finite and > 0; got inf"),
    ({"alpha": 0.0}, ValueError, "alpha must be finite and > 0; got 0.0"),
    ({"alpha": -0.1}, ValueError, "alpha must be finite and > 0; got -0.1"),
    ({"alpha": "lr"}, ValueError, "alpha must be a number or \"auto\"; got 'lr'"),
    ({"alpha": True}, TypeError, "alpha must be a number; got True"),
    ({"alpha": None}, TypeError, "alpha must be a number; got None"),
    ({"alpha": 1j}, TypeError, "alpha must be a number; got 1j"),
    ({"alpha": torch.ones(1)}, TypeError, r"alpha must be a 0-dim floating tensor; got shape \(1,\)"),
    ({"alpha": torch.tensor(1)}, TypeError, "alpha must be a 0-dim floating tensor"),
    ({"alpha": torch.tensor(float("nan"))}, ValueError, "alpha must be finite and > 0; got nan"),
    ({"damping": -1e-3}, ValueError, "damping must be finite and >= 0; got -0.001"),
    ({"damping": float("nan")}, ValueError, "damping must be finite and >= 0; got nan"),
    ({"damping": float("inf")}, ValueError, "damping must be finite and >= 0; got inf"),
    ({"damping": True}, TypeError, "damping must be a number; got True"),
    ({"damping": "1"}, TypeError, "damping must be a number; got '1'"),
]


@pytest.mark.parametrize(("options", "kind", "message"), BAD_OPTIONS)
def test_bad_options_are_refused_by_name_before_any_product(options, kind, message):
    counted = Counted()
    with pytest.raises(kind, match=f"^neumann_ihvp: {message}"):
        neumann_ihvp(counted, V, **{"num_terms": 3, "alpha": 0.5, **options})
    with pytest.raises(kind, match=f"^Neumann: {message}"):
        Neumann(**options)
    assert counted.calls == 0


@pytest.mark.parametrize("alpha", ["auto", 0.0, float("nan"), -1, True, None, torch.ones(2)])
def test_identity_refuses_bad_alpha(alpha):
    with pytest.raises((TypeError, ValueError), match=r"^Identity: alpha must be"):
        Identity(alpha)


def test_numpy_numbers_are_numbers():
    import numpy as np

    assert torch.equal(
        neumann_ihvp(matvec, V, num_terms=np.int64(3), alpha=np.float64(0.5), damping=np.float32(0.0)),
        neumann_ihvp(matvec, V, num_terms=3, alpha=0.5),
    )


def test_solvers_are_frozen_values():
    assert Neumann(3, 0.5) == Neumann(3, 0.5) and hash(Identity(0.5)) == hash(Identity(0.5))
    with pytest.raises(AttributeError):
        Neumann().num_terms = 4


@pytest.mark.parametrize(
    ("v", "kind", "message"),
    [
        (torch.ones(3, dtype=torch.int64), TypeError, "v must be float32, float64, bfloat16 or float16; got int64"),
        (
            [torch.ones(3, dtype=torch.complex64)],
            TypeError,
            r"v\[0\] must be float32, float64, bfloat16 or float16; got complex64",
        ),
        (torch.ones(2, 2).to_sparse(), TypeError, r"v must be a strided \(dense\) tensor; got sparse_coo"),
        ([V, None], TypeError, r"v\[1\] must be a Tensor; got None"),
        (3.0, TypeError, "v must be a Tensor, or a list"),
    ],
)
def test_bad_right_hand_sides_are_refused_by_name(v, kind, message):
    with pytest.raises(kind, match=f"^neumann_ihvp: {message}"):
        neumann_ihvp(lambda x: x, v, num_terms=1, alpha=0.5)
    with pytest.raises(kind, match=f"^solve: {message}"):
        solve(lambda x: x, v, Neumann(1, 0.5))


TWO = [torch.ones(2, dtype=F64), torch.ones(3, dtype=F64)]
HOSTILE = {
    "None": (lambda v: None, TypeError, r"matvec\(v\) must be a Tensor, or a list, tuple or dict of tensors; got None"),
    "number": (
        lambda v: 1.0,
        TypeError,
        r"matvec\(v\) must be a Tensor, or a list, tuple or dict of tensors; got float",
    ),
    "a None": (lambda v: [v[0], None], TypeError, r"matvec\(v\)\[1\] must be a Tensor; got None"),
    "tensor": (lambda v: v[0], TypeError, r"matvec\(v\) must be a sequence or dict of tensors; got Tensor"),
    "dict": (lambda v: {"a": v[0], "b": v[1]}, TypeError, r"matvec\(v\) must be a list or tuple of tensors; got dict"),
    "too few": (lambda v: v[:1], ValueError, r"matvec\(v\) must have 2 tensors; got 1"),
    "too many": (lambda v: [*v, v[0]], ValueError, r"matvec\(v\) must have 2 tensors; got 3"),
    "shape": (lambda v: [v[0], torch.ones(4)], ValueError, r"matvec\(v\)\[1\] must have shape \(3,\); got \(4,\)"),
    "broadcast": (lambda v: [v[0], v[1][:1]], ValueError, r"matvec\(v\)\[1\] must have shape \(3,\); got \(1,\)"),
    "extra axis": (lambda v: [v[0][None], v[1]], ValueError, r"matvec\(v\)\[0\] must have shape \(2,\); got \(1, 2\)"),
    "dtype": (lambda v: [v[0], v[1].float()], TypeError, r"matvec\(v\)\[1\] must be float64; got float32"),
    "complex": (lambda v: [v[0], v[1] + 0j], TypeError, r"matvec\(v\)\[1\] must be float64; got complex128"),
    "integer": (lambda v: [v[0].long(), v[1]], TypeError, r"matvec\(v\)\[0\] must be float64; got int64"),
    "sparse": (
        lambda v: [v[0].to_sparse(), v[1]],
        TypeError,
        r"matvec\(v\)\[0\] must be a strided \(dense\) tensor; got sparse_coo",
    ),
    "device": (lambda v: [v[0].to("meta"), v[1]], ValueError, r"matvec\(v\)\[0\] must be on cpu; got meta"),
    "in place": (
        lambda v: [v[0].mul_(2), v[1]],
        ValueError,
        r"matvec must not modify its argument; got v\[0\] written in place",
    ),
    "in place, unsaid": (
        lambda v: (v[1].zero_(), [v[0].clone(), v[1].clone()])[1],
        ValueError,
        r"matvec must not modify its argument; got v\[1\] written in place",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("alpha", [0.5, "auto"])
def test_hostile_products_are_refused_by_name(name, alpha):
    function, kind, message = HOSTILE[name]
    kept = [t.clone() for t in TWO]
    with pytest.raises(kind, match=f"^neumann_ihvp: {message}"):
        neumann_ihvp(function, TWO, num_terms=2, alpha=alpha)
    with pytest.raises(kind, match=f"^solve: {message}"):
        solve(function, TWO, Identity())
    assert all(torch.equal(t, k) for t, k in zip(TWO, kept, strict=True))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_exception_in_the_product_passes_and_leaves_v_whole(error):
    def function(v):
        if counted.calls == 3:
            raise error
        return A @ v

    counted = Counted(function)
    kept = V.clone()
    with pytest.raises(error):
        neumann_ihvp(counted, V, num_terms=10, alpha=ALPHA)
    assert torch.equal(V, kept)


def test_what_is_not_a_matvec_or_a_solver_is_refused():
    with pytest.raises(TypeError, match=r"^neumann_ihvp: matvec must be callable; got Tensor. Pass lambda v: A @ v."):
        neumann_ihvp(A, V, num_terms=1, alpha=0.5)
    for wrong, got in ((None, "None"), ("neumann", "str"), (Neumann, "Neumann"), (3, "int")):
        with pytest.raises(TypeError, match=f"^solve: solver must be a solver such as .*; got {got}."):
            solve(matvec, V, wrong)


def test_the_argument_of_a_product_is_safe_from_metadata_changes():
    def function(v):
        v.requires_grad_()
        return A @ v.detach()

    assert torch.equal(
        neumann_ihvp(function, V, num_terms=3, alpha=ALPHA), neumann_ihvp(matvec, V, num_terms=3, alpha=ALPHA)
    )


def test_ridge_curvature_by_hand():
    problem = ridge()
    found = neumann_ihvp(lambda v: problem.hessian @ v, V, num_terms=400, alpha=problem.alpha)
    assert relative_error(found, torch.linalg.solve(problem.hessian, V)) < 1e-12


def test_peak_memory_is_two_buffers_and_a_product():
    """Counts the new tensors of the size of v; each product is dropped before the next one is made."""
    size = 1 << 20
    v = torch.ones(size)

    class Largest(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            old = {a.untyped_storage()._cdata for a in args if isinstance(a, torch.Tensor)}
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor) and t.numel() == size and t.untyped_storage()._cdata not in old:
                    self.made += 1
            return out

    if not nestopt_ext.build_info()["native"]:
        pytest.skip("the reference op makes temporaries of its own")
    with Largest() as largest:
        neumann_ihvp(lambda x: x * 0.5, v, num_terms=4, alpha=0.5)
    assert largest.made == 2 + 4, "term, total and one product a term"
