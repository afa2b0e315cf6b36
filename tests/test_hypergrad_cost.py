import pytest
import torch
from cases import F64, leaf, ridge, scalar
from helpers import all_same_bits
from torch import nn
from torch.profiler import ProfilerActivity, profile

import nestopt_ext as nx
from nestopt_ext.curvature import Hessian, RankOne
from nestopt_ext.hypergrad import estimate_cost, hypergradient
from nestopt_ext.solvers import ConjugateGradient, Exact, FixedPoint, Identity, Neumann, Nystrom, Woodbury, solve

SOLVERS = [
    Neumann(7),
    Neumann(7, alpha=0.1),
    Identity(0.1),
    ConjugateGradient(6, 0.0),
    FixedPoint(5, 0.0),
    Exact(),
    Nystrom(4),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_the_products_estimated_are_those_counted(solver):
    problem = ridge()
    cost = estimate_cost(*problem.closures(), problem.params, problem.hparams, solver=solver)
    count = solve(Hessian(problem.losses()[1], problem.params), torch.ones(12, dtype=F64), solver).num_products - 1
    assert cost.num_products == count
    assert cost.gradient_evaluations == 2 + 2 * count + 2
    assert cost.solver == type(solver).__name__


def test_a_known_largest_eigenvalue_costs_no_products():
    problem = ridge()
    curvature = RankOne(problem.closures()[1], problem.params)
    arguments = (*problem.closures(), problem.params, problem.hparams)
    assert curvature.largest_eigenvalue() is not None
    by_products = Neumann(7, preconditioner=lambda v: v)
    assert estimate_cost(*arguments, solver=by_products, curvature=curvature).num_products == 7
    assert estimate_cost(*arguments, solver=Neumann(7), curvature=curvature).num_products == 0, "a closed form"
    assert estimate_cost(*arguments, solver=Woodbury(0.1), curvature=curvature).num_products == 0


def test_the_graph_is_what_autograd_saves():
    """exp saves its result, once for both orders; the gradient multiplies it by the seed."""
    w = torch.ones(1000, dtype=F64).requires_grad_()
    h = leaf(torch.tensor(1.0, dtype=F64))
    data = torch.ones(1000, dtype=F64)
    linear = estimate_cost(lambda: w.sum() * h, lambda: (data * w).sum() * h, w, h)
    assert linear.graph_bytes < 100 and linear.outer_graph_bytes < 100
    one = estimate_cost(lambda: w.exp().sum() * h, lambda: w.exp().sum() * h, w, h)
    assert 8000 <= one.outer_graph_bytes < 8100
    assert 8000 <= one.graph_bytes < 16100
    two = estimate_cost(lambda: w.sum() * h, lambda: (w.exp() + (2 * w).exp()).sum() * h, w, h)
    assert two.graph_bytes == pytest.approx(2 * one.graph_bytes, rel=0.01)


def measured_peak(function):
    """The most that PyTorch's allocator held at once beside what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    now = most = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def mlp(batch):
    net = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 1))
    return net, torch.randn(batch, 64)


def cnn(batch):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(1152, 1))
    return net, torch.randn(batch, 3, 16, 16)


@pytest.mark.parametrize("solver", [Neumann(5), ConjugateGradient(5)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(("model", "batch"), [(mlp, 16), (mlp, 2048), (cnn, 64)])
def test_the_peak_is_that_of_the_allocator(model, batch, solver):
    net, x = model(batch)
    params = list(net.parameters())
    decay = leaf(torch.tensor(0.1))

    def inner():
        return net(x).square().mean() + decay.exp() * sum(p.square().sum() for p in params)

    def outer():
        return (net(x) - 1).square().mean()

    cost = estimate_cost(outer, inner, params, decay, solver=solver)
    peak = measured_peak(lambda: hypergradient(outer, inner, params, decay, solver=solver))
    assert 2 / 3 < cost.peak_bytes / peak < 1.5
    assert cost.unrolled_bytes == cost.num_products * (cost.graph_bytes + 4 * cost.num_params)


def test_vectors_are_those_of_the_working_dtype():
    w, h = torch.ones(100, dtype=torch.bfloat16).requires_grad_(), leaf(torch.tensor(1.0))
    cost = estimate_cost(lambda: w.sum().float() * h, lambda: w.square().sum().float() * h, w, h, solver=Neumann(3))
    assert cost.vector_bytes == 4 * 100 * 4
    assert estimate_cost(lambda: w.sum() * h, lambda: w.square().sum() * h, w, h, solver=Exact()).vector_bytes > 160000


def test_an_unknown_solver_is_said_to_be_one():
    class Own:
        def run(self, system):
            raise AssertionError

    problem = scalar()
    cost = estimate_cost(*problem.closures(), problem.params, problem.hparams, solver=Own())
    assert (cost.num_products, cost.peak_bytes, cost.vector_bytes, cost.gradient_evaluations) == (None,) * 4
    assert cost.graph_bytes > 0
    assert "products                     unknown" in str(cost)


def test_it_can_be_read():
    problem = ridge()
    text = str(estimate_cost(*problem.closures(), problem.params, problem.hparams, solver=ConjugateGradient(9)))
    assert "at most 9" in text and "22 gradient evaluations = 2 + 2 * 9 + 2" in text
    assert len(text.splitlines()) == 8


def test_nothing_is_left_behind():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)).train()
    h = leaf(torch.tensor(0.1))
    x = torch.randn(8, 3)
    params = list(net.parameters())
    rng, before = torch.get_rng_state(), [t.clone() for t in net.state_dict().values()]
    estimate_cost(lambda: net(x).sum() * h, lambda: net(x).square().sum() * h, params, h)
    assert torch.equal(rng, torch.get_rng_state())
    assert all_same_bits(before, net.state_dict().values())
    assert all(p.grad is None for p in params)


P = scalar()
OUTER, INNER = P.closures()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((P.losses()[0], INNER), {}, "outer_loss must be a zero-argument closure, .* got Tensor. Wrap"),
        ((OUTER, None), {}, "inner_loss must be a zero-argument closure, .* got None"),
        ((OUTER, INNER), {"solver": Neumann}, "solver must be a solver"),
        ((OUTER, INNER), {"curvature": 3}, "curvature must be None or a callable on tensors like params; got int"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, options, message):
    with pytest.raises(TypeError, match="^estimate_cost: " + message):
        estimate_cost(*arguments, P.params, P.hparams, **options)


def test_a_series_in_the_span_of_the_examples_takes_no_products():
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    params = list(model.parameters())
    h = torch.tensor(1.0, requires_grad=True)
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    criterion = torch.nn.CrossEntropyLoss()

    def cost_of(curvature, **options):
        return nx.estimate_cost(
            lambda: criterion(model(x), y),
            lambda: criterion(model(x), y) * h,
            params,
            h,
            solver=nx.Neumann(50, alpha=0.1, **options),
            curvature=curvature,
        )

    loop, outputs, dual = (
        nx.EmpiricalFisher(model, criterion, x, y, params, route=r) for r in ("loop", "outputs", "dual")
    )
    assert cost_of(loop).num_products == 50
    assert cost_of(dual).num_products == 0
    assert cost_of(dual, preconditioner=lambda v: v).num_products == 50

    size = sum(p.numel() for p in params) * 4
    found = cost_of(outputs)
    assert found.num_products == 50
    assert found.vector_bytes == 2 * size + outputs.plan(50).outputs_memory
