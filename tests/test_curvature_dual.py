"""GaussNewton and EmpiricalFisher in the span of the gradients of examples, against their own products."""

import functools
import math
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from cases import F64, flat, normal, relative_error
from series_cases import (
    BOTH,
    PROBLEMS,
    TERMS,
    TOLERANCE,
    Own,
    classes,
    largest,
    like,
    packed,
    plain_loop,
    problem,
    seeded,
)  # fmt: skip
from solver_cases import matrix_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nestopt_ext.curvature import Diagonal, EmpiricalFisher, GaussNewton, OverBatches, Plan, loss_hessian
from nestopt_ext.curvature._criteria import recognize
from nestopt_ext.curvature.loss_hessian import OuterProducts
from nestopt_ext.solvers import Exact, Neumann, Woodbury, neumann_ihvp, solve

# ---- series ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("kind", BOTH)
def test_the_series_equals_the_plain_loop(kind, name, dtype):
    made = problem(name, dtype)
    dual, loop = (kind(*made, route=route) for route in ("dual", "loop"))
    v = like(dual, 5)
    curvature = largest(loop)
    for damping in (0.0, 0.05 * curvature):
        alpha = 0.9 / (curvature + damping)
        sums, norms = plain_loop(loop, v, max(TERMS), alpha, damping)
        for num_terms in TERMS:
            found, sq_norms = dual.flat_series(v, num_terms, torch.tensor(alpha, dtype=F64), damping)
            assert all(t.dtype == dtype for t in found) and sq_norms.dtype == F64
            assert relative_error(found, sums[num_terms]) <= TOLERANCE[dtype]
            assert len(sq_norms) == num_terms + 1
            apart = sq_norms - torch.tensor(norms[: num_terms + 1], dtype=F64)
            assert float(apart.abs().max()) <= TOLERANCE[dtype] * norms[0]
    assert loop.flat_series(v, 5, torch.tensor(alpha, dtype=F64), 0.0) is None


@pytest.mark.parametrize("kind", BOTH)
def test_some_params_scaled_damped_rearranged_and_batched(kind):
    model, *rest = problem("masked", F64)
    for chosen in (["2.*"], ["0.bias", "4.weight"], [model[4].bias, model[0].weight]):
        dual = kind(model, *rest, chosen, route="dual")
        loop = kind(model, *rest, chosen, route="loop")
        v = like(dual, 3)
        alpha = 0.5 / largest(loop)
        changed = [(2.0 * operator).damped(0.1) for operator in (dual, loop)]
        solver = Neumann(20, 0.4 * alpha, damping=0.05)
        wanted = solve(changed[1], packed(dual, v), solver)
        found = solve(changed[0], packed(dual, v), solver)
        assert (wanted.num_products, found.num_products) == (21, 1)  # one for the residual
        assert relative_error(found.value, wanted.value) <= 1e-12
        assert found.status == wanted.status
        turned = dual.on(list(reversed(dual.flat_params)), loop_structure(dual))
        assert relative_error(
            neumann_ihvp(turned, v[::-1], num_terms=7, alpha=alpha)[::-1],
            neumann_ihvp(loop, packed(loop, v), num_terms=7, alpha=alpha),
        ) <= 1e-12  # fmt: skip
        rows = like(dual, 9, 4)
        batched = [solve(o, packed(dual, rows), Neumann(9, alpha), batched=True).value for o in (dual, loop)]
        assert relative_error(*batched) <= 1e-12


def loop_structure(operator):
    from nestopt_ext import _lists

    return _lists.flatten("test", "params", list(operator.flat_params))[1]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", BOTH)
def test_a_step_found_by_the_operator_is_a_little_below_the_largest(kind, dtype):
    for name in ("cross entropy", "squares at positions", "masked"):
        made = problem(name, dtype)
        dual, loop = (kind(*made, route=route) for route in ("dual", "loop"))
        exact = largest(loop)
        assert 1 - 1e-5 <= float(dual.largest_eigenvalue()) / exact <= 1.2
        assert loop.largest_eigenvalue() is None
        v = packed(dual, like(dual, 2))
        found = solve(dual, v, Neumann(10, damping=0.1 * exact))
        step = 0.9 / (float(dual.largest_eigenvalue()) + 0.1 * exact)
        wanted = solve(loop, v, Neumann(10, step, damping=0.1 * exact))
        assert found.num_products == 1  # for the residual
        assert relative_error(found.value, wanted.value) <= TOLERANCE[dtype]


def test_a_curvature_of_zero_multiplies_by_the_number_of_terms():
    model, criterion, x, _ = problem("cross entropy", F64)
    nothing = EmpiricalFisher(model, criterion, x, torch.full((7,), -100), route="dual")
    v = like(nothing, 1)
    assert float(nothing.largest_eigenvalue()) == 0
    found = neumann_ihvp(nothing, packed(nothing, v), num_terms=4, alpha="auto")
    assert relative_error(found, [5 * t for t in v]) <= 1e-15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_multiplied_in_single_precision(dtype):
    made = problem("cross entropy", dtype)
    dual = EmpiricalFisher(*made, route="dual")
    v = like(dual, 1)
    found, sq_norms = dual.flat_series(v, 20, torch.tensor(0.3), 0.01)
    assert all(t.dtype == dtype for t in found)
    matrix = matrix_of(dual.flat_low_rank())
    term = flat(v).double()
    total, norms = term.clone(), [float(term @ term)]
    for _ in range(20):
        term = term - 0.3 * (matrix @ term + 0.01 * term)
        total += term
        norms.append(float(term @ term))
    assert relative_error([t.double() for t in found], 0.3 * total) <= torch.finfo(dtype).eps
    torch.testing.assert_close(sq_norms, torch.tensor(norms, dtype=F64), rtol=1e-5, atol=1e-5 * norms[0])


def test_a_nan_is_not_hidden():
    dual = GaussNewton(*problem("cross entropy", F64), route="dual")
    v = like(dual, 1)
    v[2][0, 0] = float("nan")
    found, sq_norms = dual.flat_series(v, 3, torch.tensor(0.1), 0.1)
    assert all(t.isnan().all() for t in found) and sq_norms[1:].isnan().all()
    assert all(t.isnan().all() for t in dual.flat_inverse([t[None] for t in v], 0.1))


# ---- inverses -------------------------------------------------------------------------------------------------------


def dense_inverse(matrix, v, shift):
    """(A + diag(shift))^-1 v in float64 for a flat v or rows of it."""
    shifted = matrix.double() + torch.diag(torch.as_tensor(shift, dtype=F64).expand(len(matrix)))
    found = torch.linalg.solve(shifted, v.double().mT if v.dim() > 1 else v.double())
    return found.mT if v.dim() > 1 else found


def columns(v):
    return torch.cat([t.flatten(1) for t in v], dim=1)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("name", PROBLEMS)
def test_inverses_equal_those_of_the_dense_matrix(name, kind):
    operator = kind(*problem(name, F64))
    params = packed(operator, operator.flat_params)
    matrix = operator.dense()
    v = like(operator, 4, 3)
    per_tensor = [torch.full_like(p, 0.1 + i) for i, p in enumerate(operator.flat_params)]
    per_weight = [normal(30 + i, *p.shape).square() + 0.1 for i, p in enumerate(operator.flat_params)]
    for shift in (0.3, per_tensor, per_weight):
        whole, damping = operator, 0.3
        if isinstance(shift, list):
            whole, damping = operator + Diagonal(packed(operator, shift), params), 0.05
            shift = flat(shift) + 0.05
        wanted = dense_inverse(matrix, columns(v), shift)
        found = solve(whole, packed(operator, v), Woodbury(damping=damping), batched=True)
        assert found.num_products == 3  # for the residuals
        assert relative_error(columns(list(found.value.values())), wanted) <= 1e-12
        single = solve(whole, packed(operator, [t[1] for t in v]), Woodbury(damping=damping)).value
        assert relative_error(single, wanted[1]) <= 1e-12
    exact = solve(operator, packed(operator, v), Exact(damping=0.3), batched=True)
    rows = operator.plan(5).rows
    assert exact.num_products == 3 + (0 if rows <= len(matrix) else len(matrix))
    assert relative_error(columns(list(exact.value.values())), dense_inverse(matrix, columns(v), 0.3)) <= 1e-12
    again = solve(operator, packed(operator, v), Exact(damping=0.3), batched=True)
    assert relative_error(again.value, exact.value) <= 1e-15


@pytest.mark.parametrize("kind", BOTH)
def test_inverses_with_little_damping_keep_the_digits_of_single_precision(kind):
    model = seeded(lambda: nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3)), torch.float32)
    operator = kind(model, nn.CrossEntropyLoss(), normal(0, 6, 9).float(), classes(1, 6))
    matrix = matrix_of(operator.flat_low_rank())
    v = like(operator, 2)
    for solver in (Woodbury(damping=1e-5), Exact(damping=1e-5)):
        found = solve(operator, packed(operator, v), solver)
        assert found.num_products == 1
        assert relative_error(flat(found.value).double(), dense_inverse(matrix, flat(v), 1e-5)) <= 1e-6


def test_negative_and_vanishing_weights():
    """The Poisson loss of negative counts is concave, that of zero counts flat."""
    model, _, x, _ = problem("cross entropy", F64)
    criterion = nn.PoissonNLLLoss(log_input=False)
    counts = torch.tensor([-0.01, 0.0, 2.0], dtype=F64).expand(7, 3).contiguous()
    positive = nn.Sequential(model, nn.Softplus())
    operator = GaussNewton(positive, criterion, x, counts, route="dual")
    matrix = operator.dense()
    assert torch.linalg.eigvalsh(matrix)[0] < -1e-6
    v = like(operator, 3, 2)
    damping = 0.5
    found = operator.flat_inverse(v, damping)
    assert relative_error(columns(found), dense_inverse(matrix, columns(v), damping)) <= 1e-11
    assert largest(operator) <= float(operator.largest_eigenvalue()) <= 1.2 * largest(operator)
    flat_ones = GaussNewton(positive, criterion, x, counts.clamp(min=0), route="dual")
    wanted = dense_inverse(flat_ones.dense(), columns(v), damping)
    assert relative_error(columns(flat_ones.flat_inverse(v, damping)), wanted) <= 1e-11


@pytest.mark.parametrize("decay", [False, True])
def test_woodbury_of_sums_over_kinds_and_batches(decay):
    model, criterion, x, y = problem("cross entropy", F64)
    params = dict(model.named_parameters())
    fisher = EmpiricalFisher(model, criterion, x[:3], y[:3])
    backwards = [params[n] for n in reversed(params)]
    ggn = GaussNewton(model, criterion, x[3:], y[3:], backwards)
    batches = OverBatches([(x[:2], y[:2]), (x[2:], y[2:])], lambda b: GaussNewton(model, criterion, *b), params)
    total = 0.5 * fisher + ggn + 2.0 * batches
    if decay:
        total = total + Diagonal(
            {n: normal(i, *p.shape).square() + 0.2 for i, (n, p) in enumerate(params.items())}, params
        )
    v = like(total, 6)
    found = solve(total, packed(total, v), Woodbury(damping=0.1))
    assert relative_error(found.value, dense_inverse(total.dense(), flat(v), 0.1)) <= 1e-12


# ---- factors by example ---------------------------------------------------------------------------------------------


def dense_hessian(hessian):
    size = hessian.outputs.numel()
    units = torch.eye(size, dtype=F64).view(size, *hessian.outputs.shape)
    return hessian.products(units).reshape(size, size)


def hessians():
    """Every form, for outputs of 4 examples with several rows each: [8, 3], [4, 3, 2], [8, 3, 2]."""
    for shape in ((8, 3), (4, 3, 2), (8, 3, 2)):
        z = normal(0, *shape)
        y = classes(1, shape[0], *shape[2:])
        weight = torch.tensor([1.0, 0.2, 3.0], dtype=F64)
        yield loss_hessian(nn.CrossEntropyLoss(weight), z, y)
        yield loss_hessian(nn.BCEWithLogitsLoss(), z, normal(2, *shape).sigmoid())
        known = recognize(nn.CrossEntropyLoss())
        yield OuterProducts(z, normal(3, *shape), known.term_dims(z), torch.tensor(0.7, dtype=F64))
        yield OuterProducts(z, normal(3, *shape), tuple(range(1, z.dim())), torch.tensor(0.7, dtype=F64))


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_factors_by_example_are_those_of_the_hessian(batch):
    for hessian in hessians():
        rank = hessian.example_rank(batch)
        factor, weights = hessian.example_factor(batch)
        shape = hessian.outputs.shape
        assert factor.shape == (rank, *shape) and weights.shape == (rank, batch)
        rows = torch.zeros(rank, batch, batch, shape.numel() // batch, dtype=F64)
        for n in range(batch):  # each example's entry, with zeros for the others
            rows[:, n, n] = factor.reshape(rank, batch, -1)[:, n]
        rows = rows.view(rank * batch, -1)
        wanted = dense_hessian(hessian)
        torch.testing.assert_close((rows.T * weights.reshape(-1)) @ rows, wanted, rtol=1e-12, atol=1e-14)
    scalar = loss_hessian(nn.CrossEntropyLoss(), normal(0, 3), torch.tensor(1))
    assert scalar.example_rank(3) is None
    unknown = loss_hessian(lambda z, t: (z - t).pow(4).sum(), normal(0, 4, 3), normal(1, 4, 3))
    assert unknown.example_rank(4) is None


# ---- what cannot be taken apart -------------------------------------------------------------------------------------


class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = self.first(x)
        return self.last(h - h.mean(0))


class OverTheBatch(nn.Module):
    """Attention whose keys are the other examples."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = self.first(x)
        return self.last(torch.softmax(h @ h.T, -1) @ h)


class AlongTheBatch(nn.Module):
    """A layer whose features are the examples."""

    def __init__(self):
        super().__init__()
        self.mix, self.last = nn.Linear(7, 7), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(F.linear(x.T, self.mix.weight).T)


class Detour(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1


MIXED = {
    "batch normalization": lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).train(),
    "centred": Centred,
    "attention": OverTheBatch,
    "along": AlongTheBatch,
}


@pytest.mark.filterwarnings("ignore:.*no rule for")
@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("name", MIXED)
def test_a_model_that_mixes_examples_is_refused(name, kind):
    model, x, y = seeded(MIXED[name]), normal(0, 7, 4), classes(1, 7)
    with pytest.raises(ValueError, match=rf"^{kind.__name__}: route must not be 'dual' for a model whose examples"):
        kind(model, nn.CrossEntropyLoss(), x, y, route="dual")
    operator = kind(model, nn.CrossEntropyLoss(), x, y)
    plan = operator.plan(50)
    assert plan.route != "dual" and plan.rows is None and plan.reason in str(plan)
    v = like(operator, 3)
    assert operator.flat_series(v, 50, torch.tensor(0.1), 0.1) is None
    assert operator.flat_inverse([t[None] for t in v], 0.1) is None
    assert operator.largest_eigenvalue() is None
    found = solve(operator, packed(operator, v), Woodbury(damping=0.2)).value
    assert relative_error(found, dense_inverse(operator.dense(), flat(v), 0.2)) <= 1e-10


@pytest.mark.filterwarnings("ignore:.*no rule for")
def test_the_reason_is_named():
    model, criterion, x, y = problem("cross entropy", F64)
    params = list(model.parameters())

    def ggn(model, inputs, targets=y, criterion=criterion, params=params, **more):
        return functools.partial(GaussNewton, model, criterion, inputs, targets, params, **more)

    beside = "batch dimension in front"
    for made, reason in (
        (ggn(model, x, microbatch=3), "microbatch"),
        (ggn(lambda x: Detour.apply(model(x)), x), "recorded|rule"),
        (ggn(lambda: model(x), ()), "inputs hold no tensor"),
        (ggn(lambda x, s: model(x), (x, torch.ones(()))), beside),
        (ggn(lambda x, s: model(x), (x, torch.ones(3))), beside),
        (ggn(model, x, normal(1, 7, 3), Own()), "criterion"),
        (ggn(seeded(lambda: nn.Linear(7, 3)), x.T[0], torch.tensor(1), params=None), "examples"),
    ):
        with pytest.raises(ValueError, match=reason):
            made(route="dual")
        plan = made().plan(30)
        assert plan.route != "dual" and re.search(reason, plan.reason)
    EmpiricalFisher(model, Own(), x, normal(1, 7, 3), route="dual")  # called on one example at a time


def test_many_rows_are_refused():
    model = nn.Linear(1, 1)
    x = torch.zeros(17_000, 1)
    with pytest.raises(ValueError, match="1 to 16384 rows; got 17000"):
        EmpiricalFisher(model, nn.MSELoss(), x, x, route="dual")
    with pytest.raises(ValueError, match="batch is empty"):
        GaussNewton(model, nn.MSELoss(reduction="sum"), x[:0], x[:0], route="dual")


def test_bad_routes_and_plans_are_refused():
    made = problem("cross entropy", F64)
    for route in ("fast", None, 1):
        with pytest.raises(ValueError, match=r"GaussNewton: route must be 'auto', 'loop', 'outputs' or 'dual'; got"):
            GaussNewton(*made, route=route)
    operator = GaussNewton(*made)
    with pytest.raises(TypeError, match=r"GaussNewton.plan: num_terms must be an int; got 1.0"):
        operator.plan(1.0)
    with pytest.raises(ValueError, match=r"GaussNewton.plan: num_terms must be >= 0; got -1"):
        operator.plan(-1)


# ---- the choice -----------------------------------------------------------------------------------------------------


def test_the_plan_chooses_the_loop_below_break_even():
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    x, y = torch.zeros(64, 64), torch.zeros(64, dtype=torch.int64)
    for kind, rows in ((EmpiricalFisher, 64), (GaussNewton, 640)):
        operator = kind(model, nn.CrossEntropyLoss(), x, y)
        plan = operator.plan(1000)
        assert isinstance(plan, Plan) and plan.route == "dual" and plan.rows == rows
        assert operator.plan(0).route == "loop"
        assert plan.break_even >= 1
        assert operator.plan(plan.break_even).route != "loop"
        assert operator.plan(plan.break_even - 1).route == "loop"
        assert plan.dual_time < plan.loop_time
        assert "break-even" in str(plan) and f"{rows} rows" in str(plan)
        for route in ("loop", "outputs", "dual"):
            assert kind(model, nn.CrossEntropyLoss(), x, y, route=route).plan(5).route == route
        built = operator.plan(plan.break_even - 1)
        operator.flat_series(like(operator, 1), 1000, torch.tensor(0.1), 0.0)
        assert operator.plan(plan.break_even - 1).dual_time < built.dual_time


def test_too_many_rows_are_not_formed():
    model = nn.Linear(4, 30_000)
    operator = GaussNewton(model, nn.MSELoss(), torch.zeros(1, 1, 4), torch.zeros(1, 1, 30_000))
    plan = operator.plan(1000)
    assert plan.route != "dual" and "rows; got 30000" in plan.reason


# ---- what is left alone ---------------------------------------------------------------------------------------------


def test_a_change_of_params_is_noticed_and_nothing_is_modified():
    model, criterion, x, y = problem("cross entropy", F64)
    before = [p.detach().clone() for p in model.parameters()]
    inputs, rng = x.clone(), torch.get_rng_state()
    operator = EmpiricalFisher(model, criterion, x, y, route="dual")
    v = like(operator, 1)
    kept = [t.clone() for t in v]
    first = operator.flat_series(v, 5, torch.tensor(0.1), 0.0)[0]
    operator.flat_inverse([t[None] for t in v], 0.1)
    operator.largest_eigenvalue()
    again = operator.flat_series(v, 5, torch.tensor(0.1), 0.0)[0]
    assert all(map(torch.equal, first, again))
    assert all(map(torch.equal, v, kept)) and torch.equal(x, inputs) and torch.equal(torch.get_rng_state(), rng)
    assert all(map(torch.equal, before, model.parameters())) and all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        model[0].weight.add_(1)
    for ask in (
        lambda: operator.flat_series(v, 5, torch.tensor(0.1), 0.0),
        lambda: operator.flat_inverse([t[None] for t in v], 0.1),
        operator.largest_eigenvalue,
        operator.flat_low_rank,
    ):
        with pytest.raises(RuntimeError, match="EmpiricalFisher"):
            ask()


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that is made, and of all of them."""

    def __init__(self):
        super().__init__()
        self.most = self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else (result,):
            if isinstance(t, torch.Tensor):
                size = t.untyped_storage().nbytes() // t.element_size()
                self.most, self.total = max(self.most, size), self.total + size
        return result


@pytest.mark.parametrize("kind", BOTH)
def test_memory_does_not_hold_a_gradient_for_each_example_and_is_flat_in_the_number_of_terms(kind):
    model = seeded(lambda: nn.Sequential(nn.Linear(60, 80), nn.Tanh(), nn.Linear(80, 3)), torch.float32)
    x, y = normal(0, 32, 60).float(), classes(1, 32)
    totals = []
    for num_terms in (20, 100):
        operator = kind(model, nn.CrossEntropyLoss(), x, y, route="dual")
        v = like(operator, 1)
        layer = model[0].weight.numel()
        rows = operator.plan(1).rows
        with Largest() as seen:
            operator.flat_series(v, num_terms, torch.tensor(0.1), 0.0)
            operator.largest_eigenvalue()
        assert seen.most <= max(3 * layer, rows * rows, rows * 80)
        assert seen.most < 32 * layer / 8
        totals.append(seen.most)
    assert totals[0] == totals[1]
    assert math.isfinite(sum(totals))


def test_a_scale_for_each_weight_takes_pieces(monkeypatch):
    from nestopt_ext import _low_rank

    model = seeded(lambda: nn.Sequential(nn.Linear(60, 80), nn.Tanh(), nn.Linear(80, 3)))
    operator = EmpiricalFisher(model, nn.CrossEntropyLoss(), normal(0, 32, 60), classes(1, 32))
    params = dict(model.named_parameters())
    decay = Diagonal({n: normal(i, *p.shape).square() + 0.2 for i, (n, p) in enumerate(params.items())}, params)
    v = packed(operator, like(operator, 1))
    whole = solve(operator + decay, v, Woodbury()).value
    monkeypatch.setattr(_low_rank, "AT_ONCE", 32 * 130)
    with Largest() as seen:
        parts = solve(operator + decay, v, Woodbury()).value
    assert relative_error(parts, whole) <= 1e-13
    assert seen.most <= 60 * 80


def test_threads_with_dampings_of_their_own_share_an_operator():
    """Each one's factorization is its own, however they come to look for the examples."""
    model, criterion, x, y = problem("cross entropy", F64)
    wanted = EmpiricalFisher(model, criterion, x, y, route="dual")
    v = [t[None] for t in like(wanted, 1)]
    expected = {damping: wanted.flat_inverse(v, damping) for damping in (0.1, 0.5, 1.0, 2.0)}
    operator, start = EmpiricalFisher(model, criterion, x, y), threading.Barrier(4)

    def work(damping):
        start.wait()
        return max(relative_error(operator.flat_inverse(v, damping), expected[damping]) for _ in range(200))

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(work, expected)) <= 1e-12
