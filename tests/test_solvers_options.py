"""What solvers refuse and warn of, and the routes that an operator offers them."""

import warnings

import pytest
import torch
from cases import F64, flat, named_ridge, normal, relative_error, spd, values
from solver_cases import Counted, DenseOperator, as_low_rank, on_structure, right_side

from nestopt_ext import _lists
from nestopt_ext.curvature import Diagonal
from nestopt_ext.solvers import (
    ConjugateGradient,
    Exact,
    FixedPoint,
    Identity,
    Neumann,
    Nystrom,
    Status,
    Woodbury,
    cg_ihvp,
    neumann_ihvp,
    solve,
)
from nestopt_ext.solvers._outcome import warn
from nestopt_ext.solvers._product import Product
from nestopt_ext.solvers._solve import invert

A = spd(1, 12, 20.0)
V = normal(2, 12)
PARAM = torch.empty(12, dtype=F64)


def matvec(v):
    return A @ v


# ---- refusals -------------------------------------------------------------------------------------------------------

COUNTS = [
    (0, ValueError, "must be in 1 .. 10000000; got 0"),
    (-1, ValueError, "must be in 1 .. 10000000; got -1"),
    (10**8, ValueError, "must be in 1 .. 10000000; got 100000000"),
    (2.0, TypeError, "must be an int; got 2.0"),
    (True, TypeError, "must be an int; got True"),
    (None, TypeError, "must be an int; got None"),
]
RTOLS = [
    (-1e-3, ValueError, r"must be in \[0, 1\); got -0.001"),
    (1.0, ValueError, r"must be in \[0, 1\); got 1.0"),
    (float("nan"), ValueError, r"must be in \[0, 1\); got nan"),
    ("1e-3", TypeError, "must be a number; got '1e-3'"),
]
DAMPINGS = [
    (-1e-3, ValueError, "must be finite and >= 0; got -0.001"),
    (float("nan"), ValueError, "must be finite and >= 0; got nan"),
    (True, TypeError, "must be a number; got True"),
]
CHECKS = [
    (0, ValueError, "must be >= 1; got 0"),
    (True, TypeError, "must be an int, None or 'auto'; got True"),
    ("never", TypeError, "must be an int, None or 'auto'; got 'never'"),
]
PRECONDITIONERS = [
    (A, TypeError, "must be None or a callable on tensors like v; got Tensor. Pass lambda v: M @ v"),
    (3, TypeError, "must be None or a callable on tensors like v; got int"),
]
BAD = [
    (kind, name, *case)
    for kind, options in (
        (ConjugateGradient, {"max_iters": COUNTS, "rtol": RTOLS, "damping": DAMPINGS, "check_every": CHECKS}),
        (FixedPoint, {"max_iters": COUNTS, "rtol": RTOLS, "damping": DAMPINGS, "check_every": CHECKS}),
        (Neumann, {"rtol": RTOLS, "check_every": CHECKS, "preconditioner": PRECONDITIONERS}),
        (ConjugateGradient, {"preconditioner": PRECONDITIONERS}),
        (Exact, {"damping": DAMPINGS}),
        (
            Exact,
            {"rcond": [(1.0, ValueError, r"must be None or in \[0, 1\); got 1.0"), ("a", TypeError, "must be a n")]},
        ),
        (Woodbury, {"damping": DAMPINGS}),
        (Nystrom, {"rank": COUNTS}),
        (Nystrom, {"damping": [(0.0, ValueError, "must be finite and > 0; got 0.0"), ("a", TypeError, "must be a n")]}),
        (
            Nystrom,
            {"seed": [(-1, ValueError, r"must be in 0 .. 2\*\*63 - 1; got -1"), (1.5, TypeError, "must be an in")]},
        ),
    )
    for name, cases in options.items()
    for case in cases
]


@pytest.mark.parametrize(("kind", "name", "value", "error", "message"), BAD)
def test_bad_options_are_refused_by_name(kind, name, value, error, message):
    with pytest.raises(error, match=f"^{kind.__name__}: {name} {message}"):
        kind(**{name: value})


@pytest.mark.parametrize(("name", "cases"), [("max_iters", COUNTS), ("rtol", RTOLS), ("damping", DAMPINGS)])
def test_cg_ihvp_refuses_by_its_own_name_before_any_product(name, cases):
    counted = Counted(matvec)
    for value, error, message in cases:
        with pytest.raises(error, match=f"^cg_ihvp: {name} {message}"):
            cg_ihvp(counted, V, **{"max_iters": 3, "rtol": 1e-3, name: value})
    assert counted.calls == 0


def test_options_are_values():
    for solver in (ConjugateGradient(), FixedPoint(), Exact(), Nystrom(), Woodbury(), Neumann()):
        assert solver == type(solver)() and hash(solver) == hash(type(solver)())
        with pytest.raises(AttributeError):
            solver.damping = 1.0


@pytest.mark.parametrize(
    ("v", "message"),
    [
        (torch.tensor(1.0), r"v must be \[k, \*shape\] with batched=True; got a 0-dim tensor. Stack the right-hand"),
        ([torch.ones(2, 3), torch.tensor(1.0)], r"v\[1\] must be \[k, \*shape\] with batched=True; got a 0-dim tensor"),
        ([torch.ones(2, 3), torch.ones(3)], r"v\[1\] must hold 2 right-hand sides, as v\[0\] does; got 3"),
    ],
)
def test_right_sides_that_are_no_batch_are_refused(v, message):
    with pytest.raises(ValueError, match=f"^solve: {message}"):
        solve(lambda x: x, v, Exact(), batched=True)


@pytest.mark.parametrize(
    ("start", "error", "message"),
    [
        (torch.ones(11, dtype=F64), ValueError, r"start must have shape \(12,\); got \(11,\)"),
        (torch.ones(12), TypeError, "start must be float64; got float32"),
        ([V], TypeError, "start must be a Tensor; got list. Pass its only element"),
    ],
)
def test_a_start_unlike_v_is_refused(start, error, message):
    counted = Counted(matvec)
    with pytest.raises(error, match=f"^solve: {message}"):
        solve(counted, V, ConjugateGradient(), start=start)
    assert counted.calls == 0


def test_a_preconditioner_is_checked_like_a_matvec():
    with pytest.raises(ValueError, match=r"^solve: preconditioner\(v\) must have shape \(12,\); got \(3,\)"):
        solve(matvec, V, ConjugateGradient(preconditioner=lambda v: v[:3]))
    with pytest.raises(ValueError, match=r"^solve: preconditioner must not modify its argument; got v written"):
        solve(matvec, V, Neumann(preconditioner=lambda v: v.mul_(2)))


def test_exact_refuses_what_would_not_fit():
    counted = Counted(lambda v: v)
    with pytest.raises(
        ValueError, match=r"^solve: v must have at most 20000 elements for Exact; got 20001, .* 3.0 GiB"
    ):
        solve(counted, torch.ones(20_001), Exact())
    assert counted.calls == 0
    huge = torch.ones(20_001)
    diagonal = Diagonal(2 * huge, huge)
    assert solve(diagonal, huge, Exact()).value.unique().item() == 0.5, "a closed form has no such limit"


def test_woodbury_refuses_what_has_no_low_rank():
    for function in (matvec, DenseOperator(A, PARAM)):
        with pytest.raises(
            TypeError, match=r"^solve: matvec must be an operator of low rank plus a diagonal .* Nystrom"
        ):
            solve(function, V, Woodbury(damping=1.0))


@pytest.mark.parametrize(
    ("diagonal", "damping", "message"),
    [
        (None, 0.0, "damping must be > 0 for Woodbury without a diagonal; got 0. Raise damping"),
        (0.0, 0.0, r"the diagonal plus damping must be > 0 everywhere for Woodbury; got 0 \+ 0"),
        (-1.0, 0.5, r"the diagonal plus damping must be > 0 everywhere for Woodbury; got -1 \+ 0.5"),
    ],
)
def test_woodbury_refuses_a_diagonal_that_is_not_positive(diagonal, damping, message):
    entries = None if diagonal is None else torch.cat([torch.tensor([diagonal], dtype=F64), torch.ones(11, dtype=F64)])
    operator = DenseOperator(A, PARAM, low_rank=(torch.ones(1, 12, dtype=F64), torch.ones(1, dtype=F64), entries))
    with pytest.raises(ValueError, match=f"^solve: {message}"):
        solve(operator, V, Woodbury(damping=damping))


# ---- warnings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda v: -v,
            r"cg_ihvp: A \+ damping\*I must be positive definite .* negative curvature .* iteration 1\)\. Raise",
        ),
        (lambda v: 0 * v, r"cg_ihvp: A \+ damping\*I, and a preconditioner, must be positive .* no curvature .* Raise"),
        (lambda v: v * float("nan"), "cg_ihvp: the result of conjugate gradients is not finite .* what matvec"),
    ],
)
def test_cg_ihvp_warns_once_with_a_remedy(function, message):
    with pytest.warns(RuntimeWarning, match=f"^{message}") as caught:
        cg_ihvp(function, V, max_iters=5, rtol=1e-6)
    assert len(caught) == 1 and caught[0].filename == __file__


def test_cg_ihvp_is_quiet_where_it_ends_well_or_early():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert relative_error(cg_ihvp(matvec, V, max_iters=50, rtol=1e-12), torch.linalg.solve(A, V)) < 1e-11
        early = cg_ihvp(matvec, V, max_iters=2, rtol=1e-12, damping=0.1)
    assert torch.equal(early, solve(matvec, V, ConjugateGradient(2, 1e-12, 0.1)).value)


SINGULAR = torch.diag(torch.tensor([1.0, 0.0], dtype=F64))


@pytest.mark.parametrize(
    ("solver", "function", "message"),
    [
        (FixedPoint(9), lambda v: 3 * v, r"the fixed-point iteration diverges .* a factor of about 2\. Scale the map"),
        (Exact(), lambda v: SINGULAR @ v, r"the exact solution is not finite .* Raise damping, or take the pseudo"),
        (Nystrom(), lambda v: -v, r"A must be positive semi-definite for Nystrom; got negative curvature"),
        (Nystrom(), lambda v: v * float("inf"), "the result of Nystrom is not finite"),
    ],
    ids=["fixed point", "exact", "nystrom", "nystrom, inf"],
)
def test_the_internal_entry_has_a_warning_for_every_method(solver, function, message):
    v, structure = _lists.flatten("room", "v", torch.ones(2, dtype=F64))
    found = invert("room", Product("room", function, structure, v), v, solver)
    with pytest.warns(RuntimeWarning, match=f"^room: {message}") as caught:
        warn("room", found.verdict)
    assert len(caught) == 1


@pytest.mark.parametrize("solver", [ConjugateGradient(), FixedPoint(), Exact(), Nystrom()])
def test_a_bad_right_side_is_named_in_the_warning(solver):
    v, structure = _lists.flatten("room", "v", torch.tensor([1.0, float("nan")]))
    found = invert("room", Product("room", lambda x: 0.5 * x, structure, v), v, solver)
    with pytest.warns(RuntimeWarning, match=r"^room: v must be finite; got NaN or Inf, which the result keeps"):
        warn("room", found.verdict)
    assert found.verdict.status is Status.non_finite and not found.value[0].isfinite().all()


def test_the_internal_entry_counts_and_starts_without_paying_for_a_residual():
    v, structure = _lists.flatten("room", "v", V)
    for solver, products in ((ConjugateGradient(7, 0.0), 7), (Neumann(3, 0.5), 3), (Exact(), 12), (Identity(), 0)):
        counted = Counted(matvec)
        found = invert("room", Product("room", counted, structure, v), v, solver)
        assert found.num_products == counted.calls == products
        assert torch.equal(found.value[0], solve(matvec, V, solver).value)
        again = invert("room", Product("room", counted, structure, v), v, solver, start=found.value)
        assert again.num_products == products + 1
    found = invert("room", Product("room", matvec, structure, v), v, ConjugateGradient(50, 1e-10))
    assert found.verdict.status is Status.converged
    again = invert("room", Product("room", matvec, structure, v), v, ConjugateGradient(50, 1e-9), start=found.value)
    assert (
        again.num_products == 1
        and torch.equal(again.value[0], found.value[0])
        and again.verdict.status is Status.converged
    )


# ---- what an operator offers ----------------------------------------------------------------------------------------


def test_the_closed_form_of_a_series_is_taken_and_costs_nothing():
    operator = DenseOperator(A, PARAM, series=True, eigenvalue=True)
    plain = DenseOperator(A, PARAM)
    for options in ({"alpha": 0.5}, {"alpha": 0.5, "damping": 0.3}, {"alpha": torch.tensor(0.5)}):
        found = neumann_ihvp(operator, V, num_terms=9, **options)
        assert operator.products == 0
        assert relative_error(found, neumann_ihvp(plain, V, num_terms=9, **options)) < 1e-13
    solution = solve(operator, torch.stack([V, 2 * V]), Neumann(500, "auto"), batched=True)
    assert solution.num_products == operator.products == 2, "those of the residuals"
    assert relative_error(solution.value[1], torch.linalg.solve(A, 2 * V)) < 1e-6
    alpha = 0.9 / (float(torch.linalg.eigvalsh(A)[-1]) + 0.3)
    found = solve(operator, V, Neumann(4, "auto", 0.3)).value
    assert relative_error(found, neumann_ihvp(plain, V, num_terms=4, alpha=alpha, damping=0.3)) < 1e-13


def test_divergence_is_seen_in_the_closed_form():
    operator = DenseOperator(A, PARAM, series=True)
    with pytest.warns(RuntimeWarning, match="the Neumann sum diverges"):
        neumann_ihvp(operator, V, num_terms=9, alpha=5.0)


def test_a_known_eigenvalue_saves_the_power_iteration():
    operator = DenseOperator(A, PARAM, eigenvalue=True)
    found = neumann_ihvp(operator, V, num_terms=3, alpha="auto", damping=0.2)
    assert operator.products == 3
    alpha = 0.9 / (float(torch.linalg.eigvalsh(A)[-1]) + 0.2)
    assert relative_error(found, neumann_ihvp(matvec, V, num_terms=3, alpha=alpha, damping=0.2)) < 1e-14
    nothing = DenseOperator(0 * A, PARAM, eigenvalue=True)
    assert torch.equal(neumann_ihvp(nothing, V, num_terms=0, alpha="auto"), V)


def test_a_closed_inverse_is_taken_unless_a_pseudo_inverse_is_asked_for():
    operator = DenseOperator(A, PARAM, inverse=True)
    solution = solve(operator, V, Exact(damping=0.1))
    assert solution.num_products == 1 and solution.status is Status.converged
    assert relative_error(solution.value, torch.linalg.solve(operator.damped(0.1), V)) < 1e-13
    assert solve(operator, V, Exact(damping=0.1, rcond=1e-12)).num_products == 13
    wrong = DenseOperator(A, PARAM, inverse=True)
    wrong.damped = lambda damping: torch.eye(12, dtype=F64)
    assert solve(wrong, V, Exact()).status is Status.max_terms, "the residual has the last word"


@pytest.mark.parametrize(
    "solver", [Neumann(30, 0.5), ConjugateGradient(), Exact(), Nystrom(12), Woodbury(), FixedPoint()]
)
@pytest.mark.parametrize("batched", [False, True])
def test_a_dict_in_another_order_is_understood(solver, batched):
    problem = named_ridge()
    matrix = 0.2 * problem.hessian
    operator = DenseOperator(matrix, problem.params, low_rank=as_low_rank(matrix), series=True)
    v = right_side(problem)
    turned = {key: v[key] for key in reversed(v)}
    if batched:
        v, turned = ({key: t[None] for key, t in d.items()} for d in (v, turned))
    wanted, found = solve(operator, v, solver, batched=batched), solve(operator, turned, solver, batched=batched)
    assert list(found.value) == list(turned)
    assert all(relative_error(found.value[key], wanted.value[key]) < 1e-10 for key in v)
    preconditioned = ConjugateGradient(preconditioner=on_structure(torch.eye(6, dtype=F64), problem.params))
    solve(operator, turned, preconditioned, batched=batched)


def test_an_operator_refuses_right_sides_unlike_its_params():
    operator = DenseOperator(A, PARAM)
    for v, error, message in (
        (torch.ones(11, dtype=F64), ValueError, r"v must have shape \(12,\); got \(11,\)"),
        (torch.ones(12), TypeError, "v must be float64; got float32"),
        ([V], TypeError, "v must be a Tensor; got list"),
    ):
        with pytest.raises(error, match=f"^DenseOperator: {message}"):
            solve(operator, v, ConjugateGradient())
    assert operator.products == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [[2.0, 0.5, 1.0], [2.0, 0.0, -0.01]])
def test_woodbury_with_any_weights_and_dtype(dtype, weights):
    rows, weights = normal(1, 3, 20).to(dtype), torch.tensor(weights, dtype=dtype)
    diagonal = normal(2, 20).square().add(0.1).to(dtype)
    exact = rows.double().T @ torch.diag(weights.double()) @ rows.double() + torch.diag(diagonal.double())
    operator = DenseOperator(exact, [torch.empty(4, 3, dtype=dtype), torch.empty(8, dtype=dtype)])
    operator._low_rank = (rows, weights, diagonal)
    operator.flat_product = lambda v: [t[0] for t in operator._lists((exact @ flat(v).double())[None])]
    v = [normal(3, 4, 3).to(dtype), normal(4, 8).to(dtype)]
    solution = solve(operator, v, Woodbury(damping=0.05))
    wanted = torch.linalg.solve(exact + 0.05 * torch.eye(20, dtype=F64), flat(v).double())
    assert relative_error([t.double() for t in solution.value], wanted) < max(2 * torch.finfo(dtype).eps, 1e-12)
    assert solution.status is Status.converged


def test_woodbury_of_a_small_damping_keeps_its_digits_in_single_precision():
    """1 / damping enlarges what rounding leaves, which is why the sums are taken in float64."""
    rows = normal(1, 5, 300).float()
    operator = DenseOperator(rows.double().T @ rows.double(), torch.empty(300))
    operator._low_rank = (rows, torch.ones(5), None)
    operator.flat_product = lambda v: [(operator.matrix @ v[0].double()).float()]
    v = normal(2, 300).float()
    solution = solve(operator, v, Woodbury(damping=1e-5))
    wanted = torch.linalg.solve(operator.damped(1e-5), v.double())
    assert relative_error(solution.value.double(), wanted) < 1e-6
    assert solution.status is Status.converged


def test_woodbury_in_pieces(monkeypatch):
    from nestopt_ext import _low_rank

    operator = DenseOperator(A, PARAM, low_rank=as_low_rank(A))
    whole = solve(operator, V, Woodbury()).value
    monkeypatch.setattr(_low_rank, "AT_ONCE", 60)  # five columns of twelve rows
    assert relative_error(solve(operator, V, Woodbury()).value, whole) < 1e-13


def test_exact_in_pieces(monkeypatch):
    from nestopt_ext.solvers import exact

    operator = DenseOperator(A + torch.triu(A, 1), PARAM)
    whole = solve(operator, V, Exact()).value
    assert operator.batches == 1
    monkeypatch.setattr(exact, "_AT_ONCE", 60)
    assert torch.equal(solve(operator, V, Exact()).value, whole)
    assert operator.batches == 1 + 3


# ---- devices --------------------------------------------------------------------------------------------------------

EVERY = [
    Neumann(3, 0.5),
    Neumann(3, rtol=1e-3, preconditioner=lambda v: 0.5 * v),
    ConjugateGradient(),
    ConjugateGradient(preconditioner=lambda v: 0.5 * v, check_every=None),
    FixedPoint(5),
    Exact(),
    Exact(rcond=1e-6),
    Nystrom(4),
    Identity(),
]


@pytest.mark.parametrize("solver", EVERY, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("batched", [False, True])
def test_the_default_device_does_not_matter(solver, batched):
    v = V[None] if batched else V
    wanted = solve(lambda x: 0.5 * x, v, solver, start=v, batched=batched)
    torch.set_default_device("meta")
    try:
        found = solve(lambda x: 0.5 * x, v, solver, start=v, batched=batched)
    finally:
        torch.set_default_device(None)
    assert torch.equal(found.value, wanted.value) and torch.equal(found.residual_norm, wanted.residual_norm)
    assert found.status is wanted.status


@pytest.mark.parametrize("solver", EVERY, ids=lambda s: type(s).__name__)
def test_every_method_where_the_tensors_are(solver, device):
    matrix, v = A.to(device), V.to(device)
    found = solve(lambda x: matrix @ x, v, solver)
    wanted = solve(matvec, V, solver)
    assert found.value.device.type == found.residual_norm.device.type == device.type
    assert found.status is wanted.status
    assert all(
        relative_error(a.cpu(), b) < 1e-6 for a, b in zip(values(found.value), values(wanted.value), strict=True)
    ) or isinstance(solver, Nystrom), "test vectors differ between devices"


def test_the_default_looks_on_the_cpu_alone():
    from nestopt_ext.solvers._arguments import looks

    elsewhere = torch.empty(3, device="meta")
    assert looks("auto", [V]) == 1 and looks("auto", [V, elsewhere]) == 0
    assert looks(None, [V]) == 0 and looks(7, [elsewhere]) == 7


def test_a_step_far_too_small_is_not_taken_for_convergence():
    solution = solve(lambda v: v, torch.ones(3), Neumann(30000, alpha=1e-4))
    assert solution.residual_norm / 3**0.5 > 0.04 and solution.status is Status.max_terms
