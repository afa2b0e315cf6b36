"""Hypergradients and solves over two processes.

Every task runs in both processes of a group over gloo, each with half of the examples, and is compared there with the
same call in one process on all of them.
"""

import pytest
import torch
from cases import F64, normal, relative_error
from helpers import same_bits
from processes import Processes

import nestopt_ext as nx
from nestopt_ext.curvature import all_reduced
from nestopt_ext.solvers import ConjugateGradient, Exact, FixedPoint, Identity, Neumann, Nystrom, solve

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="needs a PyTorch built with torch.distributed and gloo",
)

ROWS, COLUMNS = 12, 5
X, Y, X_OUT, Y_OUT = normal(1, ROWS, COLUMNS), normal(2, ROWS), normal(3, ROWS, COLUMNS), normal(4, ROWS)

SOLVERS = {
    "neumann": Neumann(num_terms=6),
    "fixed alpha": Neumann(num_terms=6, alpha=0.2, damping=0.1),
    "identity": Identity(alpha=0.3),
    "conjugate gradients": ConjugateGradient(max_iters=5, damping=1.0),
    "exact": Exact(damping=1.0),
    "nystrom": Nystrom(rank=4, damping=2.0),
}


@pytest.fixture(scope="module")
def processes():
    group = Processes(2)
    yield group
    group.close()


def world():
    return torch.distributed.group.WORLD


def share(tensor, rank, shares=(6, 6)):
    return tensor.split(list(shares))[rank]


def same_on_all_ranks(tensors):
    """Whether every rank holds the same bits."""
    for tensor in tensors:
        tensor = tensor.reshape(-1)
        gathered = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(gathered, tensor)
        if not all(same_bits(g, tensor) for g in gathered):
            return False
    return True


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(COLUMNS, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()


def losses(model, log_decay, x, y, x_out, y_out):
    """Closures; one decay per tensor inside, and a direct part outside."""

    def inner():
        decay = sum(h.exp() * p.square().sum() for h, p in zip(log_decay, model.parameters(), strict=True))
        return (model(x).squeeze(1) - y).square().mean() + 0.1 * decay

    return lambda: (model(x_out).squeeze(1) - y_out).square().mean() + log_decay.square().sum(), inner


def both(rank, solver, form):
    """The hypergradient of two ranks, and that of one process; an unused hyperparameter is among them."""
    model = network()
    found = []
    for group in (world(), None):
        log_decay = torch.full((4,), -1.0, dtype=F64, requires_grad=True)
        unused = torch.ones(2, dtype=F64, requires_grad=True)
        data = (X, Y, X_OUT, Y_OUT) if group is None else [share(t, rank) for t in (X, Y, X_OUT, Y_OUT)]
        outer, inner = losses(model, log_decay, *data)
        params, hparams = list(model.parameters()), [log_decay, unused]
        if form == "tensors":
            outer, inner = outer(), inner()
        if form != "best_response":
            found.append(nx.hypergradient(outer, inner, params, hparams, solver=solver, process_group=group))
            continue
        best = nx.best_response(inner, params, hparams, solver=solver, process_group=group)
        weights = dict(zip(dict(model.named_parameters()), best, strict=True))
        outputs = torch.func.functional_call(model, weights, (data[2],))
        ((outputs.squeeze(1) - data[3]).square().mean() + log_decay.square().sum()).backward()
        found.append([log_decay.grad, torch.zeros_like(unused) if unused.grad is None else unused.grad])
    return found


def ranks_agree_and_equal_one_process(rank, solver, form):
    ours, alone = both(rank, SOLVERS[solver], form)
    assert same_on_all_ranks(ours)
    assert relative_error(ours, alone) < 1e-12
    assert ours[1].abs().max() == 0


@pytest.mark.parametrize("form", ["closures", "tensors", "best_response"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_ranks_agree_and_equal_one_process(processes, solver, form):
    processes.call(ranks_agree_and_equal_one_process, solver=solver, form=form)


CURVATURES = {
    "gauss-newton": lambda model, x, y, group: nx.GaussNewton(model, torch.nn.MSELoss(), x, y[:, None]),
    "empirical fisher": lambda model, x, y, group: nx.EmpiricalFisher(model, torch.nn.MSELoss(), x, y[:, None]),
    "sum": lambda model, x, y, group: (
        2 * nx.GaussNewton(model, torch.nn.MSELoss(), x, y[:, None], list(model.parameters()))
        + nx.Diagonal([torch.ones_like(p) for p in model.parameters()], model.parameters())
    ).damped(0.1),
    "rank one": lambda model, x, y, group: nx.RankOne(
        torch.nn.functional.mse_loss(model(x), y[:, None]), model.parameters(), process_group=group
    ),
    "callable": lambda model, x, y, group: lambda v: [x.square().mean() * t for t in v],
}


def curvatures_are_averaged(rank, name):
    model = network()
    params = list(model.parameters())
    found = []
    for group in (world(), None):
        log_decay = torch.full((4,), -1.0, dtype=F64, requires_grad=True)
        data = (X, Y, X_OUT, Y_OUT) if group is None else [share(t, rank) for t in (X, Y, X_OUT, Y_OUT)]
        curvature = CURVATURES[name](model, *data[:2], group)
        arguments = (*losses(model, log_decay, *data), params, [log_decay])
        solver = Neumann(num_terms=4, alpha=0.1, damping=0.5)
        found.append(nx.hypergradient(*arguments, solver=solver, curvature=curvature, process_group=group))
    assert same_on_all_ranks(found[0])
    assert relative_error(*found) < 1e-12


@pytest.mark.parametrize("name", CURVATURES)
def test_curvatures_are_averaged(processes, name):
    processes.call(curvatures_are_averaged, name=name)


def what_is_no_mean_over_examples_is_refused(rank):
    model = network()
    params = list(model.parameters())
    rank_one = nx.RankOne(model(X).square().mean(), params)
    kfac = nx.KFAC(model, torch.nn.MSELoss(), X, Y[:, None])
    for operator in (rank_one, kfac, 2 * rank_one, kfac.damped(0.1)):
        with pytest.raises(ValueError, match="all_reduced: matvec must be a mean over examples"):
            all_reduced(operator, world())


def test_what_is_no_mean_over_examples_is_refused(processes):
    processes.call(what_is_no_mean_over_examples_is_refused)


def fixed_points(rank):
    """w = tanh(w M + x b): an equilibrium whose map is a mean over examples."""
    found = []
    for group in (world(), None):
        x = X if group is None else share(X, rank)
        w = torch.zeros(COLUMNS, dtype=F64, requires_grad=True)
        b = torch.full((COLUMNS,), 0.3, dtype=F64, requires_grad=True)
        matrix = 0.3 * normal(9, COLUMNS, COLUMNS) / COLUMNS

        def step(x=x, w=w, b=b, matrix=matrix):
            return torch.tanh(w @ matrix + x * b).mean(0)

        outer = (w - 1).square().sum()
        found.append(nx.hypergradient(outer, nx.FixedPointMap(step), w, b, solver=FixedPoint(), process_group=group))
    assert same_on_all_ranks(found[0])
    assert relative_error(*found) < 1e-10


def test_fixed_point_maps(processes):
    processes.call(fixed_points)


def outer_loss_may_use_no_params_on_one_rank(rank):
    w = torch.ones(3, dtype=F64, requires_grad=True)
    h = torch.ones(3, dtype=F64, requires_grad=True)
    inner = 0.5 * (w - h).square().sum()
    outer = (w**2).sum() if rank else (3 * h).sum()
    (found,) = nx.hypergradient(outer, inner, w, h, solver=Identity(1.0), process_group=world())
    assert found.tolist() == [2.5] * 3  # the mean of 3 and 2 w


def test_outer_loss_may_use_no_params_on_one_rank(processes):
    processes.call(outer_loss_may_use_no_params_on_one_rank)


def unequal_shares(rank):
    shares = (3, 9)
    scale = 2 * shares[rank] / ROWS
    model = network()
    log_decay = torch.full((4,), -1.0, dtype=F64, requires_grad=True)
    params = list(model.parameters())
    data = [share(t, rank, shares) for t in (X, Y, X_OUT, Y_OUT)]
    outer, inner = losses(model, log_decay, *data)
    ours = nx.hypergradient(
        lambda: scale * outer(), lambda: scale * inner(), params, [log_decay], process_group=world()
    )
    alone = nx.hypergradient(*losses(model, log_decay, X, Y, X_OUT, Y_OUT), params, [log_decay])
    assert same_on_all_ranks(ours)
    assert relative_error(ours, alone) < 1e-12


def test_losses_of_unequal_shares_are_scaled(processes):
    processes.call(unequal_shares)


def solves(rank, solver):
    model = network()
    params = list(model.parameters())
    v = [normal(10 + i, *p.shape) for i, p in enumerate(params)]
    log_decay = torch.zeros(4, dtype=F64)
    _, inner = losses(model, log_decay, *[share(t, rank) for t in (X, Y, X_OUT, Y_OUT)])
    _, whole = losses(model, log_decay, X, Y, X_OUT, Y_OUT)
    operator = nx.Hessian(inner, params)
    alone = solve(nx.Hessian(whole, params), v, SOLVERS[solver])
    for matvec in (all_reduced(operator, world()), all_reduced(lambda u: operator(u), world())):
        ours = solve(matvec, v, SOLVERS[solver])
        assert same_on_all_ranks([*ours.value, ours.residual_norm])
        assert relative_error(ours.value, alone.value) < 1e-10
        assert (ours.status, ours.num_products) == (alone.status, alone.num_products)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_runs_on_averaged_products(processes, solver):
    processes.call(solves, solver=solver)


def ddp(rank):
    """Hypergradients between training steps, through the wrapper and past it; training goes on as without them."""
    ends = []
    for asked in (False, True):
        model = network()
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = nx.ComplexSGD(wrapped.parameters(), lr=0.05)
        log_decay = torch.full((4,), -1.0, dtype=F64, requires_grad=True)
        params = list(model.parameters())
        data = [share(t, rank) for t in (X, Y, X_OUT, Y_OUT)]
        for _ in range(3):
            optimizer.zero_grad()
            (wrapped(data[0]).squeeze(1) - data[1]).square().mean().backward()
            optimizer.step()
            for network_ in (wrapped, model) if asked else ():
                outer, inner = losses(model, log_decay, *data)
                through, _ = losses(network_, log_decay, *data)
                ours = nx.hypergradient(through, inner, params, [log_decay], process_group=world())
                alone = nx.hypergradient(*losses(model, log_decay, X, Y, X_OUT, Y_OUT), params, [log_decay])
                assert same_on_all_ranks(ours)
                assert relative_error(ours, alone) < 1e-12
                del outer
        ends.append([p.detach().clone() for p in params])
    assert all(map(torch.equal, *ends))


def test_models_trained_by_ddp(processes):
    processes.call(ddp)


def sharded_params_are_refused(rank):
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(network(), mesh=torch.distributed.init_device_mesh("cpu", (2,)))
    h = torch.zeros((), dtype=F64, requires_grad=True)
    params = list(model.parameters())
    before = [p.to_local().clone() for p in params]

    def inner():
        return model(X).square().mean() + h.exp()

    calls = [
        lambda: nx.hypergradient(inner, inner, params, h, process_group=world()),
        lambda: nx.best_response(inner, params, h),
        lambda: nx.Hessian(inner, params),
        lambda: nx.hvp(inner, params, params, mode="forward-over-reverse"),
        lambda: nx.GaussNewton(model, torch.nn.MSELoss(), X, Y[:, None]),
        lambda: nx.KFAC(model, torch.nn.MSELoss(), X, Y[:, None]),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"params\[.*\] must be .*DTensor"):
            call()
    assert all(map(torch.equal, before, [p.to_local() for p in params]))


def test_sharded_params_are_refused_with_the_reason(processes):
    processes.call(sharded_params_are_refused)


def test_a_group_needs_torch_distributed():
    w, h = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    loss = (w * h).square().sum()
    for function in (nx.hypergradient, nx.best_response):
        arguments = (loss, loss, w, h) if function is nx.hypergradient else (loss, w, h)
        with pytest.raises(RuntimeError, match=r"process_group must belong to an initialized torch\.distributed"):
            function(*arguments, process_group=object())
    with pytest.raises(TypeError, match="all_reduced: process_group must be a process group; got None"):
        all_reduced(lambda v: v, None)


def wrong_groups(rank):
    w, h = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    loss = (w * h).square().sum()
    with pytest.raises(TypeError, match="process_group must be None or a process group; got 'world'"):
        nx.hypergradient(loss, loss, w, h, process_group="world")
    with pytest.raises(TypeError, match="all_reduced: matvec must be callable; got int"):
        all_reduced(3, world())


def test_wrong_groups_are_refused_by_name(processes):
    processes.call(wrong_groups)
