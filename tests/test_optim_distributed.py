"""The optimizers over two processes: DDP, ZeRO, FSDP2, DTensor parameters and distributed checkpoints.

Every task runs in both processes of a group over gloo and is compared there with the same training in one process, on
the whole batch and with whole tensors.
"""

import copy

import pytest
import torch
from optimizers import (
    CONFIGURATIONS,
    IMPLEMENTATIONS,
    assert_all_close,
    from_file,
    make_params,
    set_grads,
    state_tensors,
)
from processes import Processes

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="needs a PyTorch built with torch.distributed and gloo",
)
configurations = pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=repr)
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
EXACT = {"rtol": 1e-12, "atol": 1e-14}


@pytest.fixture(scope="module")
def processes():
    group = Processes(2)
    yield group
    group.close()


def network():
    """Its second layer has one row: with two processes, one of them holds an empty shard."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).double()


def sharded_network(mesh):
    from torch.distributed.fsdp import fully_shard

    model = network()
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def cpu_mesh():
    return torch.distributed.init_device_mesh("cpu", (2,))


def train(model, optimizer, steps, rank=None, first=0):
    """Steps on a batch of eight rows, or on the half of them that belongs to ``rank``; then the losses."""
    for i in range(first, first + steps):
        x = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        (model(x) if rank is None else model(x[4 * rank : 4 * rank + 4])).square().mean().backward()
        optimizer.step()


def whole(tensors):
    """The full values of distributed tensors."""
    return [t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors]


def assert_same_training(model, optimizer, other_model, other_optimizer):
    assert_all_close(whole(model.parameters()), whole(other_model.parameters()), **EXACT)
    assert_all_close(whole(state_tensors(optimizer)), whole(state_tensors(other_optimizer)), **EXACT)


# ---- DDP, ZeRO ------------------------------------------------------------------------------------------------------


def train_with_ddp(rank, configuration, implementation, options):
    from torch.nn.parallel import DistributedDataParallel

    alone, model = network(), DistributedDataParallel(network(), **options)
    optimizers = [configuration(m.parameters(), **implementation) for m in (alone, model)]
    train(alone, optimizers[0], 4)
    train(model, optimizers[1], 4, rank)
    assert_same_training(model, optimizers[1], alone, optimizers[0])


@configurations
@implementations
def test_ddp_is_training_on_the_whole_batch(configuration, implementation, processes):
    processes.call(
        train_with_ddp, configuration=configuration, implementation=implementation, options={"bucket_cap_mb": 1e-4}
    )


@configurations
def test_ddp_with_gradients_that_are_views_of_buckets(configuration, processes):
    options = {"gradient_as_bucket_view": True, "static_graph": True}
    processes.call(train_with_ddp, configuration=configuration, implementation={}, options=options)


def train_with_zero(rank, configuration, buckets):
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    alone, model = network(), DistributedDataParallel(network())
    optimizer = configuration(alone.parameters())

    def zero(model):
        return ZeroRedundancyOptimizer(
            model.parameters(),
            optimizer_class=configuration.optimizer,
            parameters_as_bucket_view=buckets,
            **configuration.hyperparameters,
        )

    sharded = zero(model)
    train(alone, optimizer, 3)
    train(model, sharded, 3, rank)
    assert_all_close(model.parameters(), alone.parameters(), **EXACT)
    assert len(sharded.optim.state) < len(optimizer.state)
    for p in sharded.optim.state:
        position = next(i for i, q in enumerate(model.parameters()) if q is p)
        expected = optimizer.state[list(alone.parameters())[position]]
        assert sharded.optim.state[p].keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(sharded.optim.state[p][key], value, **EXACT)

    for to in (0, 1):
        sharded.consolidate_state_dict(to=to)
        states = [copy.deepcopy(sharded.state_dict()) if rank == to else None]  # ZeRO shares what it loads
        torch.distributed.broadcast_object_list(states, src=to)
        again = DistributedDataParallel(copy.deepcopy(model.module))
        restored = zero(again)
        restored.load_state_dict(states[0])
        train(again, restored, 2, rank, first=3)
    train(alone, optimizer, 2, first=3)
    assert_all_close(again.parameters(), alone.parameters(), **EXACT)


@configurations
@pytest.mark.parametrize("buckets", [False, True], ids=["", "bucket-view"])
def test_zero_redundancy_optimizer(configuration, buckets, processes):
    processes.call(train_with_zero, configuration=configuration, buckets=buckets)


# ---- FSDP2 ----------------------------------------------------------------------------------------------------------


def train_with_fsdp(rank, configuration, implementation):
    alone, model = network(), sharded_network(cpu_mesh())
    optimizers = [configuration(m.parameters(), **implementation) for m in (alone, model)]
    train(alone, optimizers[0], 4)
    train(model, optimizers[1], 4, rank)
    assert_same_training(model, optimizers[1], alone, optimizers[0])
    shaped = [s for s in state_tensors(optimizers[1]) if s.dim()]
    assert shaped and all(hasattr(s, "placements") for s in shaped)  # sharded like its parameter


@configurations
@implementations
def test_fsdp_is_training_on_the_whole_batch(configuration, implementation, processes):
    processes.call(train_with_fsdp, configuration=configuration, implementation=implementation)


def clip_and_scale_with_fsdp(rank, configuration, implementation):
    """The gradients overflow on one process only; both must skip that step, the first one too."""
    alone, model = network(), sharded_network(cpu_mesh())
    optimizers = [configuration(m.parameters(), **implementation) for m in (alone, model)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for i, bad in enumerate([True, False, True, False]):
        x = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        if not bad:
            optimizers[0].zero_grad()
            alone(x).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.01)
            optimizers[0].step()
        optimizers[1].zero_grad()
        scaler.scale(model(x[4 * rank : 4 * rank + 4]).square().mean()).backward()
        if bad and rank == 1:
            next(p for p in model.parameters() if p.grad.to_local().numel()).grad.to_local().view(-1)[0] = float("inf")
        scaler.unscale_(optimizers[1])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        scaler.step(optimizers[1])
        scaler.update()
    assert scaler.get_scale() == 256.0
    # The scale is 1024 on one process and what it has become on the other only if the verdict was not shared.
    assert_same_training(model, optimizers[1], alone, optimizers[0])


@configurations
@pytest.mark.parametrize(
    "implementation", [IMPLEMENTATIONS["default"], IMPLEMENTATIONS["loop"]], ids=["default", "loop"]
)
def test_fsdp_with_a_grad_scaler_and_clipping(configuration, implementation, processes):
    processes.call(clip_and_scale_with_fsdp, configuration=configuration, implementation=implementation)


# ---- DTensor parameters ---------------------------------------------------------------------------------------------

SHAPES = [(5, 3), (4,), (1, 2), (2, 2, 2), (3,)]


def distributed(tensors, places, mesh):
    from torch.distributed.tensor import distribute_tensor

    return [
        t if place is None else distribute_tensor(t.detach(), mesh, [place])
        for t, place in zip(tensors, places, strict=True)
    ]


def step_on_dtensors(rank, configuration, implementation):
    """Sharded, unevenly sharded, replicated and plain parameters in one group; some gradients come late, or not."""
    from torch.distributed.tensor import Replicate, Shard

    mesh = cpu_mesh()
    places = [Shard(0), Replicate(), Shard(0), Shard(2), None]
    plain = make_params(SHAPES)
    mixed = [torch.nn.Parameter(t) for t in distributed(make_params(SHAPES), places, mesh)]
    lr = torch.tensor(0.02)
    optimizers = [configuration(params, **implementation, lr=lr.clone()) for params in (plain, mixed)]
    for i in range(5):
        set_grads(plain, i)
        for k, (p, grad) in enumerate(zip(mixed, distributed([p.grad for p in plain], places, mesh), strict=True)):
            p.grad = grad
            if (k, i) in ((1, 0), (0, 1), (0, 2), (3, 3)):
                p.grad = plain[k].grad = None
        for optimizer in optimizers:
            optimizer.step()
            optimizer.param_groups[0]["lr"].mul_(0.9)
    assert_all_close(whole(mixed), plain, **EXACT)
    assert_all_close(whole(state_tensors(optimizers[1])), state_tensors(optimizers[0]), **EXACT)


@configurations
@implementations
def test_dtensor_parameters(configuration, implementation, processes):
    processes.call(step_on_dtensors, configuration=configuration, implementation=implementation)


def step_with_gradients_spread_otherwise(rank, configuration, implementation):
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh = cpu_mesh()
    shapes = [(5, 3)] * 3
    plain = make_params(shapes)
    params = [torch.nn.Parameter(t) for t in distributed(make_params(shapes), [Shard(0), Shard(1), Replicate()], mesh)]
    optimizers = [configuration(ps, **implementation) for ps in (plain, params)]
    for i in range(3):
        set_grads(plain, i)
        wanted = [p.grad for p in plain]
        params[0].grad = distributed([wanted[0]], [Replicate()], mesh)[0]
        half = wanted[1] * (0.25 if rank else 0.75)
        params[1].grad = DTensor.from_local(half, mesh, [Partial()])
        params[2].grad = distributed([wanted[2]], [Shard(0)], mesh)[0]
        for optimizer in optimizers:
            optimizer.step()
    assert_all_close(whole(params), plain, **EXACT)


@configurations
@implementations
def test_gradients_that_are_spread_otherwise_than_their_parameters(configuration, implementation, processes):
    processes.call(step_with_gradients_spread_otherwise, configuration=configuration, implementation=implementation)


def break_a_graph(rank, configuration, implementation):
    from torch.distributed.tensor import Shard

    (p,) = (torch.nn.Parameter(t) for t in distributed(make_params([(4,)]), [Shard(0)], cpu_mesh()))
    optimizer = configuration([p], **implementation)
    for _ in range(2):
        p.grad = torch.ones_like(p)
        loss = p.square().sum()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@configurations
@implementations
def test_autograd_sees_that_a_dtensor_was_written(configuration, implementation, processes):
    processes.call(break_a_graph, configuration=configuration, implementation=implementation)


def refuse_pending_sums(rank, configuration):
    from torch.distributed.tensor import DTensor, Partial

    local = torch.ones(4, dtype=torch.float64)
    p = torch.nn.Parameter(DTensor.from_local(local.clone(), cpu_mesh(), [Partial()]))
    p.grad = DTensor.from_local(local.clone(), p.device_mesh, [Partial()])
    optimizer = configuration([p], fused=True)
    with pytest.raises(ValueError, match=r"params\[0\] must be sharded or replicated; got placements"):
        optimizer.step()
    assert torch.equal(p.detach().to_local(), local)


@configurations
def test_parameters_that_are_pending_sums_are_refused(configuration, processes):
    processes.call(refuse_pending_sums, configuration=configuration)


def compile_steps(rank, configuration):
    """One graph for the first step, which makes the state, and one for all others."""
    from torch._dynamo.testing import CompileCounterWithBackend
    from torch.distributed.tensor import Shard

    mesh, shapes = cpu_mesh(), [(5, 3), (4,)]
    plain = make_params(shapes)
    params = [torch.nn.Parameter(t) for t in distributed(make_params(shapes), [Shard(0)] * 2, mesh)]
    optimizers = [configuration(ps, lr=torch.tensor(0.02), fused=True) for ps in (plain, params)]
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(optimizers[1].step, backend=counter, fullgraph=True)
    for i in range(4):
        set_grads(plain, i)
        for p, grad in zip(params, distributed([p.grad for p in plain], [Shard(0)] * 2, mesh), strict=True):
            p.grad = grad
        optimizers[0].step()
        step()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"].mul_(0.9)
    assert counter.frame_count == 2
    assert_all_close(whole(params), plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("configuration", CONFIGURATIONS[::2], ids=repr)
def test_a_compiled_step_on_dtensors(configuration, processes):
    processes.call(compile_steps, configuration=configuration)


# ---- distributed checkpoints ----------------------------------------------------------------------------------------


def assert_hyperparameters(optimizer, configuration):
    for name, wanted in configuration.hyperparameters.items():
        found = optimizer.param_groups[0][name]
        if isinstance(wanted, tuple):  # which comes back as a list from some ways through torch
            assert list(found) == list(wanted)
        else:
            assert found == wanted and type(found) is type(wanted)


def optimizer_options(**options):
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(**options)


def save_and_resume(rank, configuration, folder, options):
    """Saves after three steps; then loads into another model and goes on exactly as the first one does."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    mesh, options = cpu_mesh(), optimizer_options(**options)
    model = sharded_network(mesh)
    optimizer = configuration(model.parameters())
    train(model, optimizer, 3, rank)
    saved = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True))
    dcp.save(saved, checkpoint_id=folder)
    train(model, optimizer, 2, rank, first=3)

    other = sharded_network(mesh)
    restored = configuration(other.parameters(), lr=0.7)
    loaded = dict(zip(("model", "optimizer"), get_state_dict(other, restored, options=options), strict=True))
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(
        other, restored, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"], options=options
    )
    assert_hyperparameters(restored, configuration)
    train(other, restored, 2, rank, first=3)
    assert all(map(torch.equal, whole(other.parameters()), whole(model.parameters())))
    assert all(map(torch.equal, whole(state_tensors(restored)), whole(state_tensors(optimizer))))


@configurations
@pytest.mark.parametrize("flat", [False, True], ids=["", "flat"])
def test_distributed_checkpoint(configuration, flat, processes, tmp_path):
    """Saved by two processes; goes on in two processes bit for bit, and in one, which holds whole tensors."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    options = {"flatten_optimizer_state_dict": flat}
    processes.call(save_and_resume, configuration=configuration, folder=str(tmp_path), options=options)

    options = optimizer_options(**options)
    model = network()
    optimizer = configuration(model.parameters(), lr=0.7)
    loaded = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True))
    dcp.load(loaded, checkpoint_id=str(tmp_path), no_dist=True)
    set_state_dict(
        model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"], options=options
    )
    train(model, optimizer, 2, first=3)
    straight = network()
    other = configuration(straight.parameters())
    train(straight, other, 5)
    assert_same_training(model, optimizer, straight, other)


def gather_and_spread(rank, configuration, offload):
    """The whole state in one process, also as a file would hold it, and back from it into sharded tensors."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    mesh = cpu_mesh()
    model = sharded_network(mesh)
    optimizer = configuration(model.parameters())
    train(model, optimizer, 3, rank)
    options = optimizer_options(full_state_dict=True, cpu_offload=offload)
    saved = [get_state_dict(model, optimizer, options=options)]
    assert not any(hasattr(t, "placements") for state in saved[0][1].get("state", {}).values() for t in state.values())
    if offload:  # the first process alone has it then
        torch.distributed.broadcast_object_list(saved)
    loaded = from_file(saved[0])
    train(model, optimizer, 2, rank, first=3)

    other = sharded_network(mesh)
    restored = configuration(other.parameters(), lr=0.7)
    options = optimizer_options(full_state_dict=True)
    set_state_dict(other, restored, model_state_dict=loaded[0], optim_state_dict=loaded[1], options=options)
    assert_hyperparameters(restored, configuration)
    train(other, restored, 2, rank, first=3)
    assert_same_training(other, restored, model, optimizer)


@configurations
@pytest.mark.parametrize("offload", [False, True], ids=["", "offload"])
def test_full_state_dict_of_a_sharded_model(configuration, offload, processes):
    processes.call(gather_and_spread, configuration=configuration, offload=offload)
