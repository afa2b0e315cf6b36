"""The optimizers inside what surrounds one: schedulers, averages, mixed precision, compilation, checkpoints."""

import cmath
import copy
import pickle

import numpy as np
import pytest
import torch
from optimizers import (
    CONFIGURATIONS,
    IMPLEMENTATIONS,
    TURNING,
    assert_all_close,
    from_file,
    make_params,
    set_grads,
    state_tensors,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim import SGD, Adam, AdamW, lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from nestopt_ext import ComplexAdam, ComplexSGD, _ops
from nestopt_ext.optim import _base

configurations = pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=repr)
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
SHAPES = [(3,), (4, 5), (), (0,)]
EXACT = {"rtol": 1e-12, "atol": 1e-13}


def run(optimizer, params, steps, first=0, after=lambda: None):
    for i in range(first, first + steps):
        set_grads(params, i)
        optimizer.step()
        after()


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).to(dtype)


def data(dtype=torch.float32, rows=32, seed=0):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=gen, dtype=torch.float64)
    return x.to(dtype), torch.sin(x.sum(1, keepdim=True)).to(dtype)


def loss_of(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


# ---- schedulers -----------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda i: 1 / (1 + i)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda i: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.25, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.25, 1.0, 5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.8)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.8)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12, cycle_momentum=False),
    "SWALR": lambda o: SWALR(o, 0.001, 4),
}


def turn(scheduler):
    scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))


@configurations
@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name, tensor, configuration):
    """The lr of every step is that of torch.optim.SGD, and it is what the step is made with."""
    theirs, ours, alone = (make_params(SHAPES) for _ in range(3))
    lr = 0.05
    first = torch.tensor(lr, dtype=torch.float64) if tensor else lr
    sgd, optimizer = SGD(theirs, lr=lr), configuration(ours, lr=first)
    by_hand = configuration(alone, lr=lr)
    schedulers = [SCHEDULERS[name](o) for o in (sgd, optimizer)]
    lrs = []
    for i in range(8):
        lrs.append(sgd.param_groups[0]["lr"])
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(lrs[-1], rel=1e-12)
        by_hand.param_groups[0]["lr"] = float(optimizer.param_groups[0]["lr"])
        for o, params in ((sgd, theirs), (optimizer, ours), (by_hand, alone)):
            run(o, params, 1, i)
        for scheduler in schedulers:
            turn(scheduler)
    assert len(set(lrs)) > 1
    if tensor and name != "CyclicLR":
        assert optimizer.param_groups[0]["lr"] is first
    assert_all_close(ours, alone, **EXACT)


@configurations
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_resume(name, configuration):
    """Optimizer and scheduler saved in the middle and loaded into new ones go on bit for bit."""
    params = make_params(SHAPES)
    optimizer = configuration(params)
    scheduler = SCHEDULERS[name](optimizer)
    run(optimizer, params, 3, after=lambda: turn(scheduler))
    again = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = configuration(again)
    other_scheduler = SCHEDULERS[name](other)
    other.load_state_dict(from_file(optimizer.state_dict()))
    other_scheduler.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    run(optimizer, params, 4, first=3, after=lambda: turn(scheduler))
    run(other, again, 4, first=3, after=lambda: turn(other_scheduler))
    assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"]
    assert all(map(torch.equal, params, again))


CYCLES = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12, base_momentum=0.5, max_momentum=0.9),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3, base_momentum=0.5, max_momentum=0.9),
}
MOMENTA = {
    "ComplexSGD": (lambda p, m: ComplexSGD(p, lr=0.05, momentum=m), lambda group: group["momentum"]),
    "ComplexAdam": (lambda p, m: ComplexAdam(p, lr=0.05, betas=(m, 0.99)), lambda group: group["betas"][0]),
}


@pytest.mark.parametrize("resumed", [False, True], ids=["straight", "resumed"])
@pytest.mark.parametrize("angle", [0.7, 0.0, -2.0])
@pytest.mark.parametrize("name", MOMENTA)
@pytest.mark.parametrize("cycle", CYCLES)
def test_a_cycled_momentum_keeps_its_angle(cycle, name, angle, resumed):
    """Schedulers that cycle the momentum set the modulus of every step; the numbers are those of doing so by hand."""
    make, momentum_of = MOMENTA[name]
    turned = complex(torch.polar(torch.tensor(1.0).double(), torch.tensor(angle).double())) if angle else 1.0
    theirs, ours, alone = (make_params(SHAPES) for _ in range(3))
    sgd = SGD(theirs, lr=0.05, momentum=0.8)
    optimizer, by_hand = make(ours, 0.8 * turned), make(alone, 0.8 * turned)
    schedulers = [CYCLES[cycle](o) for o in (sgd, optimizer)]
    moduli = []
    for i in range(8):
        if resumed and i == 4:
            ours = [torch.nn.Parameter(p.detach().clone()) for p in ours]
            saved = from_file(optimizer.state_dict()), copy.deepcopy(schedulers[1].state_dict())
            optimizer = make(ours, 0.8 * turned)
            schedulers[1] = CYCLES[cycle](optimizer)
            optimizer.load_state_dict(saved[0])
            schedulers[1].load_state_dict(saved[1])
        moduli.append(sgd.param_groups[0]["momentum"])
        by_hand.param_groups[0]["lr"] = sgd.param_groups[0]["lr"]
        group = by_hand.param_groups[0]
        wanted = moduli[-1] * turned
        group.update({"momentum": wanted} if name == "ComplexSGD" else {"betas": (wanted, 0.99)})
        for o, params in ((sgd, theirs), (optimizer, ours), (by_hand, alone)):
            run(o, params, 1, i)
        assert momentum_of(optimizer.param_groups[0]) == pytest.approx(wanted, rel=1e-12)
        for scheduler in schedulers:
            scheduler.step()
    assert max(moduli) - min(moduli) > 0.2
    assert_all_close(ours, alone, **EXACT)


@pytest.mark.parametrize("name", MOMENTA)
def test_a_cycled_momentum_keeps_its_angle_when_another_group_is_taken_away(name):
    make, momentum_of = MOMENTA[name]
    params = make_params([(3,), (3,), (3,)])
    optimizer = make(params[:1], 0.8)
    for p, angle in zip(params[1:], (0.7, -2.0), strict=True):
        turned = cmath.rect(0.8, angle)
        optimizer.add_param_group(
            {"params": [p], **({"momentum": turned} if name == "ComplexSGD" else {"betas": (turned, 0.99)})}
        )
    scheduler = CYCLES["OneCycleLR"](optimizer)
    run(optimizer, params, 1)
    scheduler.step()
    del optimizer.param_groups[0]
    run(optimizer, params, 1)
    for group, angle in zip(optimizer.param_groups, (0.7, -2.0), strict=True):
        assert cmath.phase(momentum_of(group)) == pytest.approx(angle)


# ---- averages -------------------------------------------------------------------------------------------------------


@configurations
def test_stochastic_weight_averaging(configuration):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
    optimizer = configuration(model.parameters())
    mean = AveragedModel(model)
    moving = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    scheduler = SWALR(optimizer, 0.01, 3)
    seen, wanted = [], None
    for i in range(5):
        optimizer.zero_grad()
        loss_of(model, data(seed=i)).backward()
        optimizer.step()
        scheduler.step()
        mean.update_parameters(model)
        moving.update_parameters(model)
        weight = model[0].weight.detach().clone()
        seen.append(weight)
        wanted = weight if wanted is None else 0.5 * wanted + 0.5 * weight
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    torch.testing.assert_close(mean.module[0].weight.detach(), torch.stack(seen).mean(0))
    torch.testing.assert_close(moving.module[0].weight.detach(), wanted)
    update_bn([data(seed=9)[0]], mean)
    x = data(seed=9)[0]
    torch.testing.assert_close(mean.module[1].running_mean, mean.module[0](x).mean(0).detach())


# ---- mixed precision ------------------------------------------------------------------------------------------------


@configurations
@implementations
def test_grad_scaler(implementation, configuration):
    """Grows, skips overflowing steps as if they had not been, and else is training without a scale."""
    model, twin = network(), network()
    optimizer, plain = (configuration(m.parameters(), **implementation) for m in (model, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
    scales = []
    for i, overflow in enumerate([True, False, False, True, False, False, False]):
        optimizer.zero_grad()
        factor = float("inf") if overflow else 1.0
        scaler.scale(loss_of(model, data(seed=i)) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        if not overflow:
            plain.zero_grad()
            loss_of(twin, data(seed=i)).backward()
            plain.step()
    assert scales == [128.0, 128.0, 256.0, 128.0, 128.0, 256.0, 256.0]
    assert_all_close(model.parameters(), twin.parameters())
    assert_all_close(state_tensors(optimizer), state_tensors(plain))


@configurations
def test_one_grad_scaler_for_two_optimizers(configuration):
    """Each optimizer is skipped for its own gradients only."""
    params = [make_params([(3,)], dtype=torch.float32, seed=i) for i in range(2)]
    optimizers = [configuration(p) for p in params]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    for i, p in enumerate(params):
        p[0].grad = torch.full((3,), float("nan") if i else 1.0)
    before = [p[0].detach().clone() for p in params]
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(params[0][0], before[0])
    assert torch.equal(params[1][0], before[1])
    assert scaler.get_scale() == 2.0


@configurations
@implementations
def test_autocast(implementation, configuration):
    """float32 parameters trained under bfloat16 autocast: float32 state, and the loss falls."""
    model = network()
    optimizer = configuration(model.parameters(), **implementation)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, data())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert {t.dtype for t in state_tensors(optimizer)} == {torch.float32}


@configurations
@implementations
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_parameters(dtype, implementation, configuration):
    """Float32 state beside them; each step rounds a float32 step once."""
    params = make_params([(50,)], dtype=dtype)
    optimizer = configuration(params, **implementation)
    for i in range(4):
        exact = [torch.nn.Parameter(p.detach().float()) for p in params]
        other = configuration(exact)
        if i:
            saved = copy.deepcopy(optimizer.state_dict())
            other.load_state_dict(saved)
            other.param_groups[0].update(foreach=None, fused=None)
        set_grads(params, i)
        exact[0].grad = params[0].grad.float()
        optimizer.step()
        other.step()
        torch.testing.assert_close(params[0].detach(), exact[0].detach().to(dtype), rtol=torch.finfo(dtype).eps, atol=0)
        assert_all_close(state_tensors(optimizer), state_tensors(other), rtol=1e-5, atol=1e-6)


# ---- compiled -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("configuration", CONFIGURATIONS[::2], ids=repr)
@pytest.mark.parametrize("implementation", [{"foreach": True}, {"fused": True}], ids=["foreach", "fused"])
def test_a_compiled_step_under_a_scheduler_is_not_compiled_again(implementation, configuration):
    """The scheduler changes the lr tensor in place; from the third step on nothing is traced anew."""
    torch.compiler.reset()
    params, twin = make_params([(3,), (4, 5)]), make_params([(3,), (4, 5)])
    lr = torch.tensor(0.05, dtype=torch.float64)
    optimizer, other = configuration(params, lr=lr, **implementation), configuration(twin, lr=0.05, **implementation)
    schedulers = [lr_scheduler.ExponentialLR(o, 0.7) for o in (optimizer, other)]
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda: optimizer.step(), backend=counter)
    frames = []
    for i in range(6):
        set_grads(params, i)
        step()
        run(other, twin, 1, i)
        frames.append(counter.frame_count)
        for scheduler in schedulers:
            scheduler.step()
    assert frames[0] > 0 and frames[-1] == frames[1]
    assert_all_close(params, twin, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("configuration", CONFIGURATIONS[::2], ids=repr)
def test_a_compiled_step_sees_a_changed_number(configuration):
    """An lr that is a number is part of the graph: setting another one must not go on with the old."""
    torch.compiler.reset()
    params, twin = make_params([(3,)]), make_params([(3,)])
    optimizer, other = configuration(params), configuration(twin)
    step = torch.compile(optimizer.step, backend="eager")
    for i, lr in enumerate([0.05, 0.05, 0.02, 0.01]):
        for o in (optimizer, other):
            o.param_groups[0]["lr"] = lr
        set_grads(params, i)
        step()
        run(other, twin, 1, i)
        assert_all_close(params, twin, rtol=1e-9, atol=1e-10)


# ---- gradients, however they come -----------------------------------------------------------------------------------


@configurations
def test_accumulated_and_clipped_gradients(configuration):
    model, twin = network(torch.float64), network(torch.float64)
    optimizer, whole = (configuration(m.parameters()) for m in (model, twin))
    for i in range(3):
        x, y = data(torch.float64, seed=i)
        optimizer.zero_grad(set_to_none=i % 2 == 0)
        for rows in torch.arange(len(x)).chunk(4):
            (loss_of(model, (x[rows], y[rows])) / 4).backward()
        whole.zero_grad()
        loss_of(twin, (x, y)).backward()
        norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), 0.01) for m in (model, twin)]
        torch.testing.assert_close(*norms)
        assert norms[0] > 0.01
        optimizer.step()
        whole.step()
    assert_all_close(model.parameters(), twin.parameters(), rtol=1e-9, atol=1e-10)


@configurations
def test_gradients_of_torch_func(configuration):
    model, twin = network(torch.float64), network(torch.float64)
    optimizer, plain = (configuration(m.parameters()) for m in (model, twin))
    for i in range(3):
        batch = data(torch.float64, seed=i)
        values = {name: p.detach() for name, p in model.named_parameters()}

        def loss(values, batch=batch):
            return (torch.func.functional_call(model, values, batch[0]) - batch[1]).square().mean()

        for name, grad in torch.func.grad(loss)(values).items():
            model.get_parameter(name).grad = grad
        plain.zero_grad()
        loss_of(twin, batch).backward()
        optimizer.step()
        plain.step()
    assert_all_close(model.parameters(), twin.parameters(), **EXACT)


@configurations
def test_parametrized_modules(configuration):
    """What is trained is what stands behind the parametrization, which holds after every step."""
    torch.manual_seed(0)
    layer = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(4, 4).double())
    norm = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 1).double())
    model = torch.nn.Sequential(layer, norm)
    optimizer = configuration(model.parameters())
    before = layer.weight.detach().clone()
    x = torch.randn(8, 4, dtype=torch.float64)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    weight = layer.weight.detach()
    assert (weight - before).abs().max() > 1e-3
    torch.testing.assert_close(weight @ weight.T, torch.eye(4, dtype=torch.float64))
    g, v = norm.parametrizations.weight.original0, norm.parametrizations.weight.original1
    torch.testing.assert_close(norm.weight, g * v / v.norm(dim=1, keepdim=True))


@configurations
@implementations
def test_optimizer_steps_in_the_backward_pass(implementation, configuration):
    """One optimizer per parameter, run by a hook as soon as its gradient is there, which is freed at once."""
    model, twin = network(torch.float64), network(torch.float64)
    owners = {p: configuration([p], **implementation) for p in model.parameters()}

    def step(p):
        owners[p].step()
        owners[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    plain = configuration(twin.parameters(), **implementation)
    for i in range(3):
        loss_of(model, data(torch.float64, seed=i)).backward()
        assert all(p.grad is None for p in model.parameters())
        plain.zero_grad()
        loss_of(twin, data(torch.float64, seed=i)).backward()
        plain.step()
    assert_all_close(model.parameters(), twin.parameters(), **EXACT)


@configurations
def test_checkpointed_activations(configuration):
    from torch.utils.checkpoint import checkpoint

    model, twin = network(torch.float64), network(torch.float64)
    optimizer, plain = (configuration(m.parameters()) for m in (model, twin))
    for i in range(3):
        x, y = data(torch.float64, seed=i)
        optimizer.zero_grad()
        (checkpoint(model, x, use_reentrant=False) - y).square().mean().backward()
        plain.zero_grad()
        loss_of(twin, (x, y)).backward()
        optimizer.step()
        plain.step()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


# ---- checkpoints of other optimizers and of older versions ----------------------------------------------------------

INTERCHANGE = {
    "SGD": (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}, ComplexSGD),
    "SGD nesterov": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, ComplexSGD),
    "SGD dampening": (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "maximize": True}, ComplexSGD),
    "SGD plain": (SGD, {"lr": 0.1}, ComplexSGD),
    "Adam": (Adam, {"lr": 0.1, "betas": (0.8, 0.99), "weight_decay": 0.1}, ComplexAdam),
    "Adam amsgrad": (Adam, {"lr": 0.1, "amsgrad": True, "maximize": True}, ComplexAdam),
    "AdamW": (AdamW, {"lr": 0.1, "betas": (0.8, 0.99), "weight_decay": 0.1}, ComplexAdam),
}
interchange = pytest.mark.parametrize(("theirs", "options", "ours"), INTERCHANGE.values(), ids=INTERCHANGE)


@implementations
@interchange
def test_goes_on_from_a_checkpoint_of_torch(theirs, options, ours, implementation):
    """As if the run had never changed its optimizer; one parameter has had no gradient by then."""
    straight, params = make_params(SHAPES), make_params(SHAPES)

    def grads(params, i):
        set_grads(params, i)
        params[1].grad = None if i < 4 else params[1].grad

    optimizer = theirs(straight, **options)
    for i in range(3):
        grads(straight, i)
        optimizer.step()
    for p, q in zip(params, straight, strict=True):
        p.data.copy_(q.data)
    other = ours(params)
    other.load_state_dict(from_file(optimizer.state_dict()))
    other.param_groups[0].update({"foreach": None, "fused": None, **implementation})
    for i in range(3, 7):
        for o, ps in ((optimizer, straight), (other, params)):
            grads(ps, i)
            o.step()
    assert_all_close(params, straight, **EXACT)


@interchange
def test_torch_goes_on_from_a_checkpoint_of_ours(theirs, options, ours):
    straight, params = make_params(SHAPES), make_params(SHAPES)
    kwargs = {"momentum": 0.0} if ours is ComplexSGD else {"betas": (0.9, 0.999), "bias_correction": True}
    kwargs.update({"decoupled_weight_decay": True} if theirs is AdamW else {})
    optimizer = ours(straight, **{**kwargs, **options})
    run(optimizer, straight, 3)
    for p, q in zip(params, straight, strict=True):
        p.data.copy_(q.data)
    other = theirs(params, lr=0.7)
    other.load_state_dict(from_file(optimizer.state_dict()))
    run(optimizer, straight, 3, first=3)
    run(other, params, 3, first=3)
    assert_all_close(params, straight, **EXACT)


def test_a_checkpoint_of_the_first_version():
    """What ``state_dict`` of ComplexSGD returned before later arguments were added, letter for letter."""
    checkpoint = {
        "state": {
            0: {
                "momentum_buffer": torch.tensor([1.0, -2.0], dtype=torch.float64),
                "momentum_buffer_imag": torch.tensor([0.5, 0.25], dtype=torch.float64),
            }
        },
        "param_groups": [
            {
                "lr": 0.5,
                "momentum": 0.5j,
                "dampening": 0,
                "weight_decay": 0,
                "nesterov": False,
                "maximize": False,
                "foreach": None,
                "differentiable": False,
                "fused": None,
                "params": [0],
            }
        ],
    }
    p = torch.nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    optimizer = ComplexSGD([p], lr=0.1, momentum=TURNING)
    optimizer.load_state_dict(from_file(checkpoint))
    p.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    optimizer.step()
    # b = 0.5i (1 + 0.5i, -2 + 0.25i) + (3, 4) = (2.75 + 0.5i, 3.875 - i)
    assert p.tolist() == [1 - 0.5 * 2.75, 1 - 0.5 * 3.875]
    assert optimizer.state[p]["momentum_buffer_imag"].tolist() == [0.5, -1.0]
    assert set(optimizer.param_groups[0]) == {*optimizer.defaults, "params"}


def test_a_pickle_of_the_first_version():
    """Neither the defaults nor the groups in it know of later arguments; groups are still added to it."""
    params = make_params([(3,), (2,)])
    optimizer = ComplexSGD(params[:1], lr=0.1, momentum=TURNING)
    run(optimizer, params[:1], 2)
    state = copy.deepcopy(optimizer.__getstate__())
    for known in (state["defaults"], *state["param_groups"]):
        del known["rescale_lr"]
    older = ComplexSGD.__new__(ComplexSGD)
    older.__setstate__(state)
    older.add_param_group({"params": params[1:]})
    copies = [p for group in older.param_groups for p in group["params"]]
    run(older, copies, 2)
    assert [group["rescale_lr"] for group in older.param_groups] == [False, False]
    assert pickle.loads(pickle.dumps(older)).defaults == optimizer.defaults


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("name", MOMENTA)
def test_numbers_of_numpy_that_were_set_later_survive_a_safe_checkpoint(name, stepped):
    """As a schedule written by hand sets them."""
    make, momentum_of = MOMENTA[name]
    params = make_params(SHAPES)
    optimizer = make(params, 0.5)
    beta = np.complex128(0.25 + 0.5j)
    later = {"momentum": beta} if name == "ComplexSGD" else {"betas": [beta, np.float64(0.75)]}
    optimizer.param_groups[0].update(lr=np.interp(1, [0, 2], [0.0, 0.5]), **later)
    run(optimizer, params, int(stepped))
    group = from_file(optimizer.state_dict())["param_groups"][0]
    assert group["lr"] == 0.25 and momentum_of(group) == (0.25, 0.5)


# ---- the host -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["real", "complex", "complex, then real", "one frozen"])
@pytest.mark.parametrize("name", MOMENTA)
def test_a_usual_step_takes_no_parameter_by_itself(name, case, monkeypatch):
    """What Python does for each of many small parameters would take longer than the step."""
    if not _ops.is_native(MOMENTA[name][0](make_params([(1,)]), 0.5)._OP, "cpu"):
        pytest.skip("needs the native kernel")
    make, _ = MOMENTA[name]
    params = make_params([(3,)] * 4)
    optimizer = make(params, 0.9 if case == "real" else TURNING)
    run(optimizer, params, 1)
    if case == "complex, then real":
        optimizer.param_groups[0].update({"momentum": 0.9} if name == "ComplexSGD" else {"betas": (0.9, 0.99)})
    set_grads(params, 1)
    if case == "one frozen":
        params[1].grad = None
    before = [p.detach().clone() for p in params]

    def refuse(*args):
        raise AssertionError("a parameter was looked at")

    monkeypatch.setattr(_base, "check_gradient", refuse)
    optimizer.step()
    moved = [not torch.equal(p, b) for p, b in zip(params, before, strict=True)]
    assert moved == [True, case != "one frozen", True, True]
