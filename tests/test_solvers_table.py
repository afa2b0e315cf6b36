"""Every method on every problem, and every method on what is known to break one."""

import warnings
from dataclasses import replace

import pytest
import torch
from cases import F64, PROBLEMS, flat, normal, relative_error, spd, values
from solver_cases import Counted, DenseOperator, as_low_rank, on_structure, right_side
from torch.utils._python_dispatch import TorchDispatchMode

from nestopt_ext.curvature import Hessian
from nestopt_ext.solvers import (
    ConjugateGradient,
    Exact,
    FixedPoint,
    Identity,
    Neumann,
    Nystrom,
    Solution,
    Status,
    Woodbury,
    solve,
)

# ---- the table: every method reaches the dense solve on every problem -----------------------------------------------


def jacobi(problem):
    """The inverse of the diagonal, as a preconditioner."""
    return on_structure(torch.diag(1 / problem.hessian.diagonal()), problem.params)


ITERATIVE = {
    "neumann": lambda p: Neumann(20_000, rtol=1e-13),
    "neumann, damped": lambda p: Neumann(20_000, damping=0.1, rtol=1e-13),
    "neumann, preconditioned": lambda p: Neumann(20_000, rtol=1e-13, preconditioner=jacobi(p)),
    "cg": lambda p: ConjugateGradient(200, 1e-12),
    "cg, damped": lambda p: ConjugateGradient(200, 1e-12, damping=0.1),
    "cg, preconditioned": lambda p: ConjugateGradient(200, 1e-12, damping=0.1, preconditioner=jacobi(p)),
    "fixed point": lambda p: FixedPoint(20_000, 1e-13),
    "fixed point, damped": lambda p: FixedPoint(20_000, 1e-13, damping=0.05),
}
DIRECT = {
    "exact": lambda p: Exact(),
    "exact, damped": lambda p: Exact(damping=0.1),
    "exact, pseudo-inverse": lambda p: Exact(rcond=1e-14),
    "nystrom": lambda p: Nystrom(rank=100, damping=0.1),
}
METHODS = {**ITERATIVE, **DIRECT}


def system(problem, method):
    """The matrix that a method is shown: a fixed point needs a contraction."""
    return 0.9 * problem.alpha * problem.hessian if method.startswith("fixed point") else problem.hessian


def dense_solution(matrix, solver, v):
    damping = getattr(solver, "damping", 0.0)
    return torch.linalg.solve(matrix + damping * torch.eye(len(matrix), dtype=F64), flat(v)), damping


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["callable", "operator"])
def test_every_method_solves_every_problem(name, method, kind):
    problem = PROBLEMS[name]()
    solver, v, matrix = METHODS[method](problem), right_side(problem), system(problem, method)
    counted = Counted(on_structure(matrix, problem.params))
    operator = DenseOperator(matrix, problem.params)
    solution = solve(counted if kind == "callable" else operator, v, solver)
    wanted, damping = dense_solution(matrix, solver, v)
    assert isinstance(solution, Solution) and type(solution.value) is type(v)
    assert relative_error(solution.value, wanted) < 1e-10
    assert solution.status is Status.converged
    true = (flat(v) - matrix @ flat(solution.value) - damping * flat(solution.value)).norm()
    assert float(solution.residual_norm) == pytest.approx(float(true), rel=1e-6, abs=1e-14 * float(flat(v).norm()))
    assert solution.num_products == (counted.calls if kind == "callable" else operator.products)
    if method in DIRECT:
        assert solution.num_products == len(matrix) + 1, "P products, and one for the residual"


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("method", METHODS)
def test_several_right_sides_are_each_solved_alone(name, method):
    problem = PROBLEMS[name]()
    solver, matrix = METHODS[method](problem), system(problem, method)
    sides = [right_side(problem, seed) for seed in (1, 2, 3)]
    stacked = pack_rows(problem.params, sides)
    solution = solve(on_structure(matrix, problem.params), stacked, solver, batched=True)
    operator = DenseOperator(matrix, problem.params)
    together = solve(operator, stacked, solver, batched=True)
    assert operator.batches > 0 and together.num_products == operator.products
    assert solution.status is together.status is Status.converged
    assert solution.residual_norm.shape == (3,)
    for i, v in enumerate(sides):
        wanted, damping = dense_solution(matrix, solver, v)
        for found in (solution, together):
            alone = flat([t[i] for t in values(found.value)])
            assert relative_error(alone, wanted) < 1e-10
            true = (flat(v) - matrix @ alone - damping * alone).norm()
            level = 1e-14 * float(flat(v).norm())
            assert float(found.residual_norm[i]) == pytest.approx(float(true), rel=1e-6, abs=level)


def pack_rows(like, sides):
    rows = [torch.stack(column) for column in zip(*[values(s) for s in sides], strict=True)]
    return dict(zip(like, rows, strict=True)) if isinstance(like, dict) else rows[0] if torch.is_tensor(like) else rows


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("batched", [False, True])
def test_woodbury_solves_every_problem_without_a_product(name, batched):
    problem = PROBLEMS[name]()
    operator = DenseOperator(problem.hessian, problem.params, low_rank=as_low_rank(problem.hessian))
    v = right_side(problem)
    given = pack_rows(problem.params, [v, v]) if batched else v
    for solver in (Woodbury(), Woodbury(damping=0.3)):
        operator.products = 0
        solution = solve(operator, given, solver, batched=batched)
        wanted, _ = dense_solution(problem.hessian, solver, v)
        found = [t[-1] for t in values(solution.value)] if batched else solution.value
        assert relative_error(found, wanted) < 1e-11
        assert solution.status is Status.converged
        assert solution.num_products == operator.products == (2 if batched else 1), "those of the residual"


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_hessian_itself_is_inverted(name):
    problem = PROBLEMS[name]()
    v = right_side(problem)
    for solver in (ConjugateGradient(200, 1e-12), Exact(), Neumann(20_000, rtol=1e-13)):
        found = solve(Hessian(problem.losses()[1], problem.params), v, solver)
        assert relative_error(found.value, torch.linalg.solve(problem.hessian, flat(v))) < 1e-10
        assert found.status is Status.converged


def test_the_identity_solves_where_it_is_the_inverse():
    solution = solve(lambda v: 4 * v, normal(1, 5), Identity(0.25))
    assert solution.status is Status.converged and solution.num_products == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_start_changes_where_to_begin_and_not_where_to_end(method):
    problem = PROBLEMS["named_ridge"]()
    solver, v, matrix = METHODS[method](problem), right_side(problem), system(problem, method)
    wanted, _ = dense_solution(matrix, solver, v)
    counted = Counted(on_structure(matrix, problem.params))
    cold = solve(counted, v, solver)
    for start, closer in ((right_side(problem, 8), False), (cold.value, True)):
        kept = {key: t.clone() for key, t in start.items()}
        counted.calls = 0
        warm = solve(counted, v, solver, start=start)
        assert relative_error(warm.value, wanted) < 1e-10 and warm.status is Status.converged
        assert warm.num_products == counted.calls
        assert all(torch.equal(start[key], kept[key]) for key in kept), "the start is only read"
        if closer and method in ITERATIVE and "auto" not in repr(solver):
            assert warm.num_products <= 3 + 1, "the start has converged: one product says so"
    batch = pack_rows(problem.params, [v, v, v])
    starts = pack_rows(problem.params, [right_side(problem, 8), cold.value, v])
    warm = solve(counted, batch, solver, start=starts, batched=True)
    assert all(relative_error([t[i] for t in values(warm.value)], wanted) < 1e-10 for i in range(3))


# ---- the second table: what is known to break solvers ---------------------------------------------------------------


def third(v):
    """A preconditioner for any structure."""
    if torch.is_tensor(v):
        return 0.3 * v
    return {key: 0.3 * t for key, t in v.items()} if isinstance(v, dict) else [0.3 * t for t in v]


def rounding(solver, dtype, smallest):
    """The relative error that one rounding of the result, or of a residual of it, leaves."""
    eps = torch.finfo(dtype).eps
    return 4 * eps * (1 + 1 / smallest) if isinstance(solver, FixedPoint) else 8 * eps


ANY = {
    "neumann": Neumann(400, rtol=1e-13),
    "cg": ConjugateGradient(50, 1e-13),
    "cg, never looks": ConjugateGradient(50, 1e-13, check_every=None),
    "cg, to the end": ConjugateGradient(50, 0.0, check_every=None),
    "cg, preconditioned": ConjugateGradient(50, 1e-13, check_every=None, preconditioner=third),
    "neumann, preconditioned": Neumann(400, rtol=1e-13, preconditioner=third),
    "neumann, never looks": Neumann(400, rtol=1e-13, check_every=None),
    "fixed point": FixedPoint(400, 1e-13),
    "fixed point, never looks": FixedPoint(400, 1e-13, check_every=None),
    "exact": Exact(),
    "exact, pseudo-inverse": Exact(rcond=1e-13),
    "nystrom": Nystrom(rank=10, damping=1e-9),
}
every_method = pytest.mark.parametrize("solver", ANY.values(), ids=ANY)


@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_zero_right_side_gives_zero(solver, dtype):
    matrix = spd(3, 4, 5.0).to(dtype)
    solution = solve(lambda v: matrix @ v, torch.zeros(4, dtype=dtype), solver)
    assert torch.equal(solution.value, torch.zeros(4, dtype=dtype))
    assert solution.status is Status.converged and float(solution.residual_norm) == 0


@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_systems_of_one_element(solver, dtype, shape):
    """0.8 x = 0.6; also 2 x = 3 for the methods that do not need a contraction."""
    for factor, right in ((0.8, 0.6), (2.0, 3.0)):
        if factor > 1.9 and isinstance(solver, FixedPoint):
            continue
        v = torch.full(shape, right, dtype=dtype)
        solution = solve(lambda v, factor=factor: factor * v, v, solver)
        eps = torch.finfo(dtype).eps
        assert float(solution.value) == pytest.approx(right / factor, rel=4 * eps + 1e-8 * isinstance(solver, Nystrom))
        assert solution.status is Status.converged


@every_method
@pytest.mark.parametrize("diagonal", [[1.0, 0.5], [1.0, 1.0], [0.3, 0.7]])
def test_two_variables_in_single_precision(solver, diagonal):
    """Conjugate gradients converge after two products, and must not divide by what is left."""
    matrix = torch.tensor(diagonal)
    v = torch.tensor([0.3, -1.7])
    solution = solve(lambda x: matrix * x, v, solver)
    assert relative_error(solution.value, v / matrix) < rounding(solver, torch.float32, min(diagonal))
    assert solution.status is Status.converged


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 0.1, 3.0, 1e12, 1e30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("solver", [ConjugateGradient(7, 0.0), Exact(), Neumann(30)], ids=["cg", "exact", "neumann"])
def test_a_scaled_operator_gives_a_scaled_solution(solver, scale, dtype):
    """Seven iterations have not converged, so a step length that is scaled twice or not at all would show."""
    matrix, v = spd(3, 30, 50.0), normal(2, 30).to(dtype)

    def times(scale):
        return lambda x: (scale * (matrix @ x.double())).to(dtype)

    plain, scaled = solve(times(1.0), v, solver), solve(times(scale), v, solver)
    bound = 1e-3 if dtype == torch.float32 else 1e-9
    assert relative_error(scaled.value.double() * scale, plain.value.double()) < bound
    assert scaled.status is plain.status
    by_v = solve(times(1.0), v * 2.0**70, solver)
    assert relative_error(by_v.value.double() / 2.0**70, plain.value.double()) < bound


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@every_method
def test_a_right_side_that_is_not_finite_stays_so(solver, bad):
    matrix = spd(3, 4, 5.0)
    v = normal(2, 4)
    v[1] = bad
    solution = solve(lambda x: matrix @ x, v, solver)
    assert solution.status is Status.non_finite
    assert not solution.value.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@every_method
def test_products_that_are_not_finite_show(solver, bad):
    matrix = spd(3, 4, 5.0)

    def spoilt(x):
        product = matrix @ x
        product[2] = bad
        return product

    solution = solve(spoilt, normal(2, 4), solver)
    assert solution.status is Status.non_finite
    assert not solution.value.isfinite().all()


@every_method
def test_one_bad_right_side_does_not_spoil_its_neighbours(solver):
    matrix, v = spd(3, 4, 5.0), normal(2, 3, 4)
    wanted = torch.linalg.solve(matrix, v.T).T
    v[1, 2] = float("nan")
    solution = solve(lambda x: matrix @ x, v, solver, batched=True)
    assert solution.status is Status.non_finite
    assert not solution.value[1].isfinite().all()
    assert relative_error(solution.value[[0, 2]], wanted[[0, 2]]) < 1e-6
    assert solution.residual_norm.isfinite().tolist() == [True, False, True]


SINGULAR = torch.diag(torch.tensor([1.0, 0.5, 0.0], dtype=F64))


@pytest.mark.parametrize(
    ("solver", "status", "value"),
    [
        (ConjugateGradient(50, 1e-10), Status.breakdown, None),
        (ConjugateGradient(50, 1e-10, check_every=None), Status.breakdown, None),
        (Exact(), Status.non_finite, None),
        (Exact(rcond=1e-10), Status.max_terms, [1.0, 2.0, 0.0]),
        (Neumann(50, 0.9), Status.max_terms, None),
        (FixedPoint(50), Status.max_terms, None),
        (Nystrom(3, 1e-3), Status.converged, [1 / 1.001, 1 / 0.501, 1000.0]),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, (ConjugateGradient, Exact, Neumann, FixedPoint, Nystrom)) else "",
)
def test_a_singular_curvature(solver, status, value):
    solution = solve(lambda v: SINGULAR @ v, torch.ones(3, dtype=F64), solver)
    assert solution.status is status
    if value is not None:
        torch.testing.assert_close(solution.value, torch.tensor(value, dtype=F64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [2, 3, 12, 40])
@pytest.mark.parametrize("seed", range(3))
def test_conjugate_gradients_see_a_singular_curvature_behind_rounding(size, dtype, seed):
    """In no basis of its own the zero eigenvalue is one of rounding size, and of either sign."""
    basis, _ = torch.linalg.qr(normal(seed, size, size))
    eigenvalues = torch.logspace(0, -1, size, dtype=F64)
    eigenvalues[0] = 0
    matrix = ((basis * eigenvalues) @ basis.T).to(dtype)
    found = solve(lambda x: matrix @ x, normal(seed + 9, size).to(dtype), ConjugateGradient(60, 1e-10))
    assert found.status is Status.breakdown
    inside = matrix @ normal(seed + 5, size).to(dtype)
    found = solve(lambda x: matrix @ x, inside, ConjugateGradient(60, 1e-4 if dtype == torch.float32 else 1e-10))
    assert found.status is Status.converged, "a right-hand side in the range has a solution"


def test_no_curvature_at_all():
    for solver in (ConjugateGradient(), ConjugateGradient(check_every=None)):
        solution = solve(lambda v: 0 * v, torch.ones(3), solver)
        assert solution.status is Status.breakdown and torch.equal(solution.value, torch.zeros(3))


@pytest.mark.parametrize("check_every", ["auto", None, 3])
def test_negative_curvature_keeps_the_iterate_before_it(check_every):
    diagonal = torch.tensor([2.0, 1.0, -0.1], dtype=F64)
    v = torch.tensor([1.0, 1.0, 0.1], dtype=F64)
    one = solve(lambda x: diagonal * x, v, ConjugateGradient(1, 0.0)).value
    two = solve(lambda x: diagonal * x, v, ConjugateGradient(2, 0.0)).value
    found = solve(lambda x: diagonal * x, v, ConjugateGradient(20, 0.0, check_every=check_every))
    assert found.status is Status.negative_curvature
    assert any(torch.equal(found.value, kept) for kept in (one, two)), "the iterate before it, bit for bit"


def test_negative_curvature_in_the_first_direction_gives_that_direction_in_units_of_one_over_curvature():
    v = torch.tensor([1.0, 2.0], dtype=F64)
    for factor in (1.0, 10.0):
        found = solve(lambda x, c=factor: -c * x, v, ConjugateGradient(20))
        assert found.status is Status.negative_curvature
        torch.testing.assert_close(found.value, v / factor)


def test_negative_curvature_in_a_sketch_is_said():
    diagonal = torch.tensor([2.0, 1.0, -1.0], dtype=F64)
    found = solve(lambda x: diagonal * x, torch.ones(3, dtype=F64), Nystrom(3, 0.1))
    assert found.status is Status.negative_curvature
    low = solve(lambda x: diagonal.clamp_min(0) * x, torch.ones(3, dtype=F64), Nystrom(3, 0.1))
    assert low.status is Status.converged


@pytest.mark.parametrize(
    "solver",
    [Exact(), Exact(rcond=1e-13), FixedPoint(2000, 1e-13), Neumann(2000, 1.0, rtol=1e-13)],
    ids=["exact", "pseudo-inverse", "fixed point", "neumann"],
)
@pytest.mark.parametrize("batched", [False, True])
def test_a_curvature_that_is_not_symmetric(solver, batched):
    rotation = normal(4, 10, 10)
    matrix = torch.eye(10, dtype=F64) - 0.9 * rotation / float(torch.linalg.matrix_norm(rotation, 2))
    v = normal(5, 3, 10) if batched else normal(5, 10)
    solution = solve(lambda x: matrix @ x, v, solver, batched=batched)
    wanted = torch.linalg.solve(matrix, v.T).T if batched else torch.linalg.solve(matrix, v)
    assert relative_error(solution.value, wanted) < 1e-10
    assert solution.status is Status.converged


@every_method
@pytest.mark.parametrize("v", [[], (), {}, torch.empty(0, dtype=F64), [torch.empty(0, 3), torch.ones(2)]])
def test_empty_tensors_and_no_tensors(solver, v):
    solution = solve(lambda x: x, v, solver)
    assert type(solution.value) is type(v)
    assert solution.status is Status.converged
    assert all(a.shape == b.shape for a, b in zip(values(solution.value), values(v), strict=True))


@every_method
def test_no_right_sides(solver):
    solution = solve(lambda x: x, torch.empty(0, 3), solver, batched=True)
    assert solution.value.shape == (0, 3) and solution.residual_norm.shape == (0,)
    assert solution.status is Status.converged


MIXED = [
    torch.tensor([1.0, 2.0], dtype=F64),
    torch.tensor([[0.5, -1.0]]),
    torch.tensor(2.0, dtype=torch.bfloat16),
    torch.tensor([1.0, 0.25], dtype=torch.float16),
]


@every_method
def test_mixed_dtypes(solver):
    seen = set()

    def product(x):
        seen.add(tuple(t.dtype for t in x))
        return [0.5 * x[0], 0.75 * x[1], x[2] / 2, x[3]]

    if isinstance(solver, Nystrom):
        solver = Nystrom(10, 1.0)  # a sketch of the whole is as coarse as its coarsest product
    solution = solve(product, MIXED, solver)
    assert seen == {tuple(t.dtype for t in MIXED)}
    assert [t.dtype for t in solution.value] == [t.dtype for t in MIXED]
    damping = getattr(solver, "damping", 0.0)
    wanted = [t / (d + damping) for t, d in zip(MIXED, (0.5, 0.75, 0.5, 1.0), strict=True)]
    for found, right, like in zip(solution.value, wanted, MIXED, strict=True):
        assert relative_error(found.double(), right.double()) < max(8 * torch.finfo(like.dtype).eps, 1e-3)
    assert solution.status in (Status.converged, Status.max_terms)


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_solved_to_their_rounding(solver, dtype):
    matrix = torch.diag(torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=F64))
    v = torch.tensor([1.0, -2.0, 3.0, 1.5], dtype=dtype)
    solution = solve(lambda x: (matrix @ x.double()).to(dtype), v, solver)
    assert solution.value.dtype == dtype
    wanted = torch.linalg.solve(matrix, v.double())
    assert relative_error(solution.value.double(), wanted) < rounding(solver, dtype, 0.25)


@every_method
def test_structures_come_back(solver):
    matrix = spd(3, 6, 5.0)
    v = normal(2, 6)
    wanted = solve(lambda x: matrix @ x, v, solver)
    parts = [v[:4].reshape(2, 2), v[4], v[5:]]
    for packed in (parts, tuple(parts), dict(zip("abc", parts, strict=True))):
        found = solve(on_structure(matrix, packed), packed, solver)
        assert type(found.value) is type(packed)
        assert relative_error(found.value, wanted.value) < 1e-9
        assert all(a.shape == b.shape for a, b in zip(values(found.value), parts, strict=True))
        assert all(t.untyped_storage().nbytes() >= 8 * t.numel() and not t.requires_grad for t in values(found.value))


@every_method
def test_strange_right_sides_and_products_that_alias(solver):
    v = normal(2, 6)
    kept = v.clone()
    for given in (v[:1].expand(6), torch.stack([v, v], 1)[:, 1], v.clone().requires_grad_(), torch._neg_view(v)):
        wanted = given.detach().clone()
        found = solve(lambda x: x, given, solver)
        assert relative_error(found.value, wanted) < 1e-8 and not found.value.requires_grad
        assert found.value.data_ptr() != given.data_ptr()
    assert torch.equal(v, kept)


@every_method
def test_product_buffers_may_be_used_again(solver):
    matrix, v = spd(3, 4, 5.0), normal(2, 3, 4)
    buffer, other = torch.empty(4, dtype=F64), torch.empty(4, dtype=F64)
    reused = solver
    if getattr(solver, "preconditioner", None) is not None:
        reused = replace(solver, preconditioner=lambda x: torch.mul(x, 0.3, out=other))
    for right, batched in ((v[0], False), (v, True)):
        wanted = solve(lambda x: matrix @ x, right, solver, batched=batched)
        found = solve(lambda x: torch.mv(matrix, x, out=buffer), right, reused, batched=batched)
        assert torch.equal(found.value, wanted.value) and found.num_products == wanted.num_products


@every_method
def test_nothing_is_written_and_no_random_number_drawn(solver):
    matrix, v = spd(3, 4, 5.0), normal(2, 4)
    kept, state = v.clone(), torch.get_rng_state()
    first = solve(lambda x: matrix @ x, v, solver).value
    assert torch.equal(v, kept) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, solve(lambda x: matrix @ x, v, solver).value)
    with torch.inference_mode():
        assert torch.equal(first, solve(lambda x: matrix @ x, v, solver).value)


@every_method
def test_a_matvec_may_not_write_to_its_argument(solver):
    for write, label in ((lambda x: (x[0].mul_(2), x)[1], "v"), (lambda x: (x[1].mul_(2), x)[1], "v")):
        with pytest.raises(ValueError, match=rf"^solve: matvec must not modify its argument; got {label}"):
            solve(write, [torch.ones(2), torch.ones(3)], solver)


# ---- the host looks only where it is asked to -----------------------------------------------------------------------

WAITS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "_to_cpu")


class NoWaiting(TorchDispatchMode):
    """Refuses the operations that would stop a device's queue of work, once it is told to."""

    refuses = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not (self.refuses and name in WAITS), f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


NEVER = {
    "neumann": Neumann(6, 0.5),
    "neumann, auto": Neumann(6, rtol=1e-3, check_every=None),
    "neumann, preconditioned": Neumann(6, rtol=1e-3, check_every=None, preconditioner=lambda v: [0.5 * t for t in v]),
    "cg": ConjugateGradient(6, check_every=None),
    "cg, preconditioned": ConjugateGradient(6, check_every=None, preconditioner=lambda v: [0.5 * t for t in v]),
    "fixed point": FixedPoint(6, check_every=None),
    "exact": Exact(damping=0.1),
    "nystrom": Nystrom(6),
}


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("name", NEVER)
def test_the_host_waits_for_nothing_between_the_products(name, batched):
    solver = NEVER[name]
    waiting = NoWaiting()
    shapes = [(2, 3), (4,)]
    v = [normal(i, *((2, *s) if batched else s)) for i, s in enumerate(shapes)]
    total = solve(lambda x: [0.7 * t for t in x], v, solver, batched=batched).num_products
    calls = 0

    def product(x):
        nonlocal calls
        calls += 1
        waiting.refuses = calls < total
        return [0.7 * t for t in x]

    with waiting:
        solution = solve(product, v, solver, batched=batched)
    assert solution.num_products == calls == total and total > 5


def test_the_test_of_waiting_can_fail():
    waiting = NoWaiting()
    waiting.refuses = True
    with waiting, pytest.raises(AssertionError, match="waits for the device"):
        solve(lambda v: v, torch.ones(3), ConjugateGradient(5))


@pytest.mark.parametrize("solver", [ConjugateGradient(40, 1e-9), FixedPoint(400, 1e-9), Neumann(400, 0.9, rtol=1e-9)])
def test_looking_saves_products_and_changes_no_bit(solver):
    matrix = spd(3, 12, 3.0)
    v = normal(2, 3, 12)
    v[1] = matrix @ v[1] * 1e-3
    v[2] = 0
    found = {
        every: solve(lambda x: matrix @ x, v, replace(solver, check_every=every), batched=True)
        for every in ("auto", 1, 4, None)
    }
    for solution in found.values():
        assert torch.equal(solution.value, found[None].value)
        assert solution.status is Status.converged
    products = {every: solution.num_products for every, solution in found.items()}
    assert products["auto"] == products[1] <= products[4] <= products[1] + 4 * 3
    assert products[4] < products[None]


def test_conjugate_gradients_end_at_the_iterate_that_met_the_tolerance():
    matrix, v = spd(3, 30, 50.0), normal(2, 30)
    for rtol in (1e-1, 1e-3, 1e-6):
        counted = Counted(lambda x: matrix @ x)
        solution = solve(counted, v, ConjugateGradient(100, rtol))
        assert solution.status is Status.converged
        assert float(solution.residual_norm) <= rtol * float(v.norm())
        before = solve(lambda x: matrix @ x, v, ConjugateGradient(counted.calls - 2, rtol))
        assert before.status is Status.max_terms and float(before.residual_norm) > rtol * float(v.norm())


def test_conjugate_gradients_minimize_over_the_krylov_space():
    matrix, v = spd(3, 20, 30.0), normal(2, 20)
    for k in (1, 2, 5):
        powers = [v]
        for _ in range(k - 1):
            powers.append(matrix @ powers[-1])
        basis, _ = torch.linalg.qr(torch.stack(powers, 1))
        wanted = basis @ torch.linalg.solve(basis.T @ matrix @ basis, basis.T @ v)
        assert relative_error(solve(lambda x: matrix @ x, v, ConjugateGradient(k, 0.0)).value, wanted) < 1e-12


def test_a_perfect_preconditioner_needs_one_product():
    matrix, v = spd(3, 20, 1e4), normal(2, 20)
    inverse = torch.linalg.inv(matrix)
    for solver in (
        ConjugateGradient(50, 1e-8, preconditioner=lambda x: inverse @ x),
        Neumann(1, 1.0, preconditioner=lambda x: inverse @ x),
    ):
        solution = solve(lambda x: matrix @ x, v, solver)
        assert solution.num_products == 2
        assert relative_error(solution.value, torch.linalg.solve(matrix, v)) < 1e-9


def test_a_preconditioner_saves_products():
    scales = torch.logspace(0, 4, 40, dtype=F64)
    matrix = scales.sqrt()[:, None] * spd(3, 40, 3.0) * scales.sqrt()
    diagonal = matrix.diagonal()
    plain = solve(lambda x: matrix @ x, normal(2, 40), ConjugateGradient(500, 1e-8))
    helped = solve(
        lambda x: matrix @ x, normal(2, 40), ConjugateGradient(500, 1e-8, preconditioner=lambda x: x / diagonal)
    )
    assert plain.status is helped.status is Status.converged
    assert helped.num_products < plain.num_products / 2


def test_the_preconditioned_neumann_sum_is_written_out():
    matrix, v = spd(3, 8, 9.0), normal(2, 8)
    m = torch.diag(1 / matrix.diagonal())
    damped = matrix + 0.2 * torch.eye(8, dtype=F64)
    step = torch.eye(8, dtype=F64) - 0.7 * m @ damped
    wanted = 0.7 * sum(torch.linalg.matrix_power(step, j) @ m @ v for j in range(5))
    found = solve(lambda x: matrix @ x, v, Neumann(4, 0.7, damping=0.2, preconditioner=lambda x: m @ x))
    assert relative_error(found.value, wanted) < 1e-13


def test_a_preconditioner_that_is_not_positive_definite_breaks_down():
    found = solve(lambda x: 2 * x, torch.ones(3), ConjugateGradient(preconditioner=lambda x: -x))
    assert found.status is Status.breakdown


@pytest.mark.parametrize("iterations", [1, 2, 6, 20])
def test_fixed_point_iterations_are_neumann_terms(iterations):
    matrix, v = torch.eye(5, dtype=F64) - 0.4 * spd(1, 5, 3.0), normal(2, 5)
    fixed = solve(lambda x: matrix @ x, v, FixedPoint(iterations, 0.0))
    series = solve(lambda x: matrix @ x, v, Neumann(iterations - 1, 1.0))
    assert relative_error(fixed.value, series.value) < 1e-14
    assert fixed.num_products == series.num_products == iterations


def test_a_fixed_point_that_runs_away_is_said():
    for solver in (FixedPoint(30), FixedPoint(30, check_every=None)):
        solution = solve(lambda x: 3 * x, torch.ones(3), solver)
        assert solution.status is Status.diverged


def test_a_fixed_point_reaches_rounding_and_stays():
    matrix = spd(3, 12, 50.0).float()
    counted = Counted(lambda x: matrix @ x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = solve(counted, normal(2, 12).float(), FixedPoint(100_000, 0.0))
    assert solution.status is Status.converged and counted.calls < 3000


def test_nystrom_of_an_operator_of_low_rank_is_exact_and_shares_its_products():
    rows = normal(1, 4, 30)
    matrix = rows.T @ rows
    v = normal(2, 5, 30)
    operator = DenseOperator(matrix, torch.empty(30, dtype=F64))
    solution = solve(operator, v, Nystrom(rank=6, damping=0.5), batched=True)
    assert relative_error(solution.value, torch.linalg.solve(operator.damped(0.5), v.T).T) < 1e-12
    assert solution.status is Status.converged
    assert solution.num_products == operator.products == 6 + 5 and operator.batches == 2


def test_nystrom_does_not_reach_what_its_rank_leaves_out():
    matrix, v = spd(3, 40, 100.0), normal(2, 40)
    errors = []
    for rank in (2, 8, 20, 40):
        solution = solve(lambda x: matrix @ x, v, Nystrom(rank, 0.01))
        wanted = torch.linalg.solve(matrix + 0.01 * torch.eye(40, dtype=F64), v)
        errors.append(relative_error(solution.value, wanted))
        assert solution.status is (Status.converged if rank == 40 else Status.max_terms)
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-9
    other = solve(lambda x: matrix @ x, v, Nystrom(8, 0.01, seed=1)).value
    assert not torch.equal(other, solve(lambda x: matrix @ x, v, Nystrom(8, 0.01)).value)
