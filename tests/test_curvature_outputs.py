"""GaussNewton and EmpiricalFisher summed in the space of the outputs, against their own products."""

import warnings

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
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nestopt_ext.curvature import Diagonal, EmpiricalFisher, GaussNewton, Plan
from nestopt_ext.hypergrad import CapturedHypergradient, hypergradient
from nestopt_ext.solvers import Neumann, neumann_ihvp, solve


def both_routes(kind, *made):
    return (kind(*made, route=route) for route in ("outputs", "loop"))


def check_series(kind, made, dtype, terms=TERMS, params=None):
    outputs, loop = both_routes(kind, *made, params)
    v = like(outputs, 5)
    before = [t.clone() for t in v]
    curvature = largest(loop)
    for damping in (0.0, 0.05 * curvature):
        alpha = 0.9 / (curvature + damping)
        sums, norms = plain_loop(loop, v, max(terms), alpha, damping)
        for num_terms in terms:
            found, sq_norms = outputs.flat_loop(v, num_terms, torch.tensor(alpha, dtype=F64), damping)
            assert all(t.dtype == dtype for t in found) and sq_norms.dtype == F64
            assert relative_error(found, sums[num_terms]) <= TOLERANCE[dtype]
            assert len(sq_norms) == num_terms + 1
            apart = sq_norms - torch.tensor(norms[: num_terms + 1], dtype=F64)
            assert float(apart.abs().max()) <= TOLERANCE[dtype] * norms[0]
    assert all(map(torch.equal, v, before))
    return outputs


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", [*PROBLEMS, "own criterion"])
@pytest.mark.parametrize("kind", BOTH)
def test_the_series_equals_the_plain_loop(kind, name, dtype):
    made = problem("squares" if name == "own criterion" else name, dtype)
    check_series(kind, (made[0], Own(), *made[2:]) if name == "own criterion" else made, dtype)


class OwnTable(nn.Module):
    """A weight that is computed from params, one that its layer shares with another's bias, and a param alone."""

    def __init__(self):
        super().__init__()
        self.scale, self.weight = nn.Parameter(torch.rand(5, 1) + 0.5), nn.Parameter(torch.randn(5, 4))
        self.shift, self.last = nn.Parameter(torch.randn(5)), nn.Linear(5, 3)

    def forward(self, x):
        hidden = F.linear(x, self.scale * self.weight / self.weight.norm(dim=1, keepdim=True), self.shift)
        return self.last(torch.tanh(hidden) * self.shift)


MIXED = {
    "batch statistics": lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).train(),
    "shared among places": OwnTable,
    "wide": lambda: nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3)),
    "no bias": lambda: nn.Sequential(nn.Linear(4, 9, bias=False), nn.Tanh(), nn.Linear(9, 3, bias=False)),
}


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("kind", BOTH)
def test_examples_may_mix_and_params_may_be_shared(kind, name):
    made = seeded(MIXED[name]), nn.CrossEntropyLoss(), normal(0, 7, 4), classes(1, 7)
    check_series(kind, made, F64, terms=(0, 1, 20))


@pytest.mark.parametrize("chosen", [["0.weight"], ["0.bias", "4.weight"], ["2.*"], ["4.bias"]])
def test_only_params_that_are_chosen_count(chosen):
    check_series(GaussNewton, problem("masked", F64), F64, terms=(1, 20), params=chosen)


@pytest.mark.filterwarnings("ignore:.*no rule for")
def test_a_function_without_a_rule_goes_by_autograd():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.w, self.last = nn.Linear(4, 5), nn.Parameter(torch.randn(5)), nn.Linear(5, 3)

        def forward(self, x):
            return self.last(torch.special.xlog1py(self.w, self.first(x).square()))

    made = seeded(Model), nn.CrossEntropyLoss(), normal(0, 7, 4), classes(1, 7)
    check_series(GaussNewton, made, F64, terms=(1, 20))


def test_an_output_that_is_a_param_and_data_of_other_strides():
    w = normal(3, 6, 3).requires_grad_()
    made = lambda x: w, nn.CrossEntropyLoss(), normal(0, 6, 4), classes(1, 6)
    check_series(GaussNewton, made, F64, terms=(1, 5), params=[w])
    model, criterion, x, y = problem("cross entropy", F64)
    outputs, loop = both_routes(GaussNewton, model, criterion, x.T.contiguous().T, y)
    v = [t.mT.contiguous().mT if t.dim() == 2 else t for t in like(outputs, 3)]
    alpha = torch.tensor(0.1)
    found, wanted = (op.flat_loop(v, 20, alpha, 0.1) for op in (outputs, loop))
    assert relative_error(found[0], wanted[0]) <= 1e-12
    assert all(t.is_contiguous() for t in found[0])


def test_solvers_take_it_and_count_its_products():
    made = problem("cross entropy", F64)
    outputs, loop = both_routes(GaussNewton, *made)
    v = packed(outputs, like(outputs, 3))
    alpha = 0.5 / largest(loop)
    options = {"num_terms": 20, "alpha": 0.4 * alpha, "damping": 0.05}
    for changed in (lambda o: o, lambda o: (2.0 * o).damped(0.1), lambda o: o.on(o.flat_params, o.structure)):
        found, wanted = (solve(changed(o), v, Neumann(**options)) for o in (outputs, loop))
        assert found.num_products == wanted.num_products == 21 and found.status is wanted.status
        assert relative_error(found.value, wanted.value) <= 1e-12
        torch.testing.assert_close(found.residual_norm, wanted.residual_norm, rtol=1e-9, atol=1e-14)
    decay = Diagonal(
        {n: torch.full_like(p, 0.3) for n, p in made[0].named_parameters()}, dict(made[0].named_parameters())
    )
    found, wanted = (solve(o + decay, v, Neumann(**options)) for o in (outputs, loop))
    assert relative_error(found.value, wanted.value) <= 1e-12
    early, late = (solve(o.damped(1.0), v, Neumann(500, 0.5, rtol=1e-3)) for o in (outputs, loop))
    assert early.num_products == late.num_products < 100
    with pytest.warns(RuntimeWarning, match="diverges"):
        neumann_ihvp(outputs, v, num_terms=40, alpha=20 * alpha)


@pytest.mark.parametrize("place", ["v", "x"])
def test_a_nan_is_not_hidden(place):
    model, criterion, x, y = problem("cross entropy", F64)
    if place == "x":
        x = x.clone()
        x[0, 0] = float("nan")
    operator = GaussNewton(model, criterion, x, y, route="outputs")
    v = like(operator, 3)
    if place == "v":
        v[0][0, 0] = float("nan")
    found = solve(operator, packed(operator, v), Neumann(num_terms=3, alpha=0.1))
    assert found.status.name == "non_finite" and not flat(found.value).isfinite().all()
    if place == "v":
        assert solve(operator, packed(operator, v), Neumann(num_terms=0, alpha=0.1)).status.name == "non_finite"


def test_what_cannot_be_summed_there_is_refused_with_the_reason():
    model, criterion, x, y = problem("cross entropy", F64)
    narrow = seeded(lambda: nn.Linear(4, 3), torch.bfloat16)

    class Rounded(nn.Module):
        def forward(self, x):
            return model(x).float()

    for made, reason in (
        (lambda: GaussNewton(model, criterion, x, y, microbatch=3, route="outputs"), "microbatch evaluates"),
        (lambda: GaussNewton(narrow, criterion, x.bfloat16(), y, route="outputs"), "bfloat16"),
        (
            lambda: GaussNewton(lambda x: Rounded()(x), criterion, x, y, list(model.parameters()), route="outputs"),
            "dtype",
        ),
    ):
        with pytest.raises(ValueError, match=rf"^GaussNewton: route must not be 'outputs' here: .*{reason}"):
            made()
    with warnings.catch_warnings(), torch.autocast("cpu"):
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="goes by autograd"):
            GaussNewton(seeded(lambda: nn.Linear(4, 3), torch.float32), criterion, x.float(), y, route="outputs")


def test_a_change_of_params_is_noticed():
    operator = GaussNewton(*problem("cross entropy", F64), route="outputs")
    v = like(operator, 1)
    first = operator.flat_loop(v, 5, torch.tensor(0.1), 0.0)[0]
    assert all(map(torch.equal, first, operator.flat_loop(v, 5, torch.tensor(0.1), 0.0)[0]))
    with torch.no_grad():
        operator.flat_params[0].add_(1)
    with pytest.raises(RuntimeError, match="GaussNewton"):
        operator.flat_loop(v, 5, torch.tensor(0.1), 0.0)


class Large(TorchDispatchMode):
    """How many tensors of at least so many elements are made or written."""

    def __init__(self, least):
        super().__init__()
        self.least, self.count = least, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.count += result.numel() >= self.least
        return result


@pytest.mark.parametrize("kind", BOTH)
def test_a_term_makes_no_tensor_like_the_params(kind):
    model = seeded(lambda: nn.Sequential(nn.Linear(60, 80), nn.Tanh(), nn.Linear(80, 80), nn.Tanh(), nn.Linear(80, 3)))
    operator = kind(model, nn.CrossEntropyLoss(), normal(0, 16, 60), classes(1, 16), route="outputs")
    v, counts = like(operator, 1), []
    for num_terms in (30, 20, 32):
        with Large(60 * 80) as large:
            operator.flat_loop(v, num_terms, torch.tensor(0.1), 0.2)
        counts.append(large.count)
    assert 0 < counts[0] == counts[1] == counts[2]


# ---- rounding -------------------------------------------------------------------------------------------------------


def more_outputs_than_params(dtype=torch.float32, **options):
    """A vector lies in the range of J' as a whole, so that what J sees of it has to go to zero."""
    model = seeded(lambda: nn.Linear(8, 10)).to(dtype)
    x, t = normal(0, 128, 8).to(dtype), normal(1, 128, 10).to(dtype)
    return GaussNewton(model, F.mse_loss, x, t, **options)


def test_rounding_does_not_add_up_over_many_terms():
    operator, exact = more_outputs_than_params(route="outputs"), more_outputs_than_params(F64, route="loop")
    alpha, v = torch.tensor(1.8 / largest(exact)), like(operator, 3)
    found, _ = operator.flat_loop(v, 1000, alpha, 0.0)
    wanted, _ = exact.flat_loop([t.double() for t in v], 1000, alpha, 0.0)
    assert relative_error(found, wanted) <= 1e-5  # 7e-6 after 32 terms, and no more after 1000


def test_noise_of_norms_is_not_growth():
    operator = more_outputs_than_params(route="outputs")
    alpha = 1.0 / largest(operator)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(20):
            neumann_ihvp(operator, packed(operator, like(operator, seed)), num_terms=200, alpha=alpha)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e25])
@pytest.mark.parametrize("route", ["outputs", "loop"])
def test_what_became_of_a_sum_does_not_depend_on_the_scale(route, scale):
    operator = more_outputs_than_params(route=route)
    v = packed(operator, [scale * t for t in like(operator, 3)])
    bounded, diverging = (
        solve(operator, v, Neumann(num_terms=6, alpha=factor / largest(operator))).status.name for factor in (1.0, 8.0)
    )
    assert bounded == "max_terms" and diverging == "diverged"


def test_autocast_later_changes_nothing():
    operator = more_outputs_than_params(route="outputs")
    v = like(operator, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, _ = operator.flat_loop(v, 5, torch.tensor(0.1), 0.0)
    outside, _ = operator.flat_loop(v, 5, torch.tensor(0.1), 0.0)
    assert all(map(torch.equal, inside, outside))


def test_no_examples_leave_the_damping():
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)))
    batch = torch.zeros(0, 3, 6), torch.zeros(0, 3, 4)
    operator = GaussNewton(model.float(), nn.MSELoss(reduction="sum"), *batch, route="outputs")
    v = like(operator, 3)
    found, _ = operator.flat_loop(v, 4, torch.tensor(0.5), 0.0)
    assert relative_error(found, [2.5 * t for t in v]) <= 1e-6


# ---- the choice -----------------------------------------------------------------------------------------------------


def test_the_plan_has_three_ways():
    model = nn.Sequential(nn.Linear(784, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 10))
    operator = GaussNewton(model, nn.CrossEntropyLoss(), torch.zeros(256, 784), torch.zeros(256, dtype=torch.int64))
    plan = operator.plan(20)
    assert (
        isinstance(plan, Plan) and plan.route == "outputs" and plan.outputs_time < min(plan.loop_time, plan.dual_time)
    )
    assert "  outputs: time" in str(plan) and plan.outputs_memory > 0
    assert operator.plan(1).route == "loop" and operator.plan(plan.break_even - 1).route == "loop"
    assert operator.plan(plan.break_even).route == "outputs"
    for same in (2.0 * operator, operator.damped(0.1)):
        assert same.plan(20).route == "outputs"
    params = dict(model.named_parameters())
    decay = Diagonal({name: torch.ones_like(p) for name, p in params.items()}, params)
    assert (operator + decay).plan(20).route == "loop"


# ---- hypergradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["eager", "cuda-graph"])
def test_a_captured_hypergradient_is_that_of_the_loop(mode, monkeypatch):
    from test_hypergrad_captured import StandIn

    from nestopt_ext.hypergrad import _choice

    monkeypatch.setitem(_choice.GRAPHS, "cpu", StandIn)
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))
    params, decay = list(model.parameters()), torch.tensor(-2.0, dtype=F64, requires_grad=True)

    def inner(x, y):
        return F.cross_entropy(model(x), y) + decay.exp() * sum(p.square().sum() for p in params)

    def outer(x, y):
        return F.cross_entropy(model(x), y)

    def curvature(route):
        return lambda x, y: GaussNewton(model, nn.CrossEntropyLoss(), x, y, params, route=route).damped(0.2)

    solver = Neumann(num_terms=20, alpha=0.5)
    captured = CapturedHypergradient(
        outer, inner, params, [decay], solver=solver, curvature=curvature("outputs"), mode=mode
    )
    for seed in range(3):
        data = (normal(seed, 7, 4), classes(seed, 7)), (normal(seed + 9, 7, 4), classes(seed + 9, 7))
        found = captured.step(*data)
        wanted = hypergradient(
            outer(*data[1]), inner(*data[0]), params, [decay], solver=solver, curvature=curvature("loop")(*data[0])
        )
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-14)
    assert captured.mode == mode


def test_fisher_chooses_among_three():
    model, criterion, x, y = problem("cross entropy", torch.float32)
    operator = EmpiricalFisher(model, criterion, x, y)
    v = packed(operator, like(operator, 3))
    found, wanted = (neumann_ihvp(f, v, num_terms=9, alpha=0.1) for f in (operator, lambda w: operator(w)))
    assert relative_error(found, wanted) <= 1e-6
