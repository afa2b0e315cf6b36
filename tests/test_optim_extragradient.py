"""ExtraSGD and ExtraAdam: their numbers, and what may and may not happen between the two half steps."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from helpers import Memory, all_same_bits, product, same_bits
from optimizers import assert_all_close, make_params, set_grads, state_tensors
from torch.nn import Parameter
from torch.optim import SGD, Adam

from nestopt_ext import ExtraAdam, ExtraSGD

SHAPES = [(), (3,), (4, 5), (0,)]
CLASSES = {
    "ExtraSGD": lambda params, **o: ExtraSGD(params, **{"lr": 0.1, **o}),
    "ExtraAdam": lambda params, **o: ExtraAdam(params, **{"lr": 0.1, **o}),
}
classes = pytest.mark.parametrize("make", CLASSES.values(), ids=CLASSES)
implementations = pytest.mark.parametrize("foreach", [True, False], ids=["foreach", "loop"])


def take(optimizer, params, steps=1, first=0):
    """Whole steps with gradients that depend on the half step alone."""
    for i in range(first, first + steps):
        set_grads(params, 2 * i)
        optimizer.extrapolate()
        set_grads(params, 2 * i + 1)
        optimizer.step()
    return [p.detach().clone() for p in params]


def values(params):
    return [p.detach().clone() for p in params]


def gradient_of(index, seed):
    params = make_params([(3,)] * 4)
    set_grads(params, seed)
    return params[index].grad


def saved(optimizer):
    """The state as it comes back from a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---- numbers --------------------------------------------------------------------------------------------------------


@implementations
def test_sgd_on_a_linear_field_is_a_matrix(foreach):
    """One step is I - lr J + lr^2 J^2, for any J, across two players."""
    lr, field = 0.3, torch.randn(5, 5, dtype=torch.float64)
    x, y = make_params([(2,), (3,)])
    optimizer = ExtraSGD([{"params": [x]}, {"params": [y]}], lr=lr, foreach=foreach)
    step = torch.eye(5, dtype=torch.float64) - lr * field + lr**2 * field @ field
    wanted = torch.cat([x, y]).detach()

    def write_gradients():
        x.grad, y.grad = (field @ torch.cat([x, y]).detach()).split([2, 3])

    for _ in range(6):
        write_gradients()
        optimizer.extrapolate()
        write_gradients()
        optimizer.step()
        wanted = step @ wanted
        torch.testing.assert_close(torch.cat([x, y]).detach(), wanted, rtol=1e-13, atol=1e-13)


def play(lr, steps):
    """min_x max_y xy with one closure; the distance from the equilibrium after every step."""
    x, y = (Parameter(torch.tensor(v, dtype=torch.float64)) for v in (0.6, 0.8))
    optimizer = ExtraSGD([{"params": [x]}, {"params": [y], "maximize": True}], lr=lr)

    def closure():
        optimizer.zero_grad()
        loss = x * y
        loss.backward()
        return loss

    distances = [1.0]
    for _ in range(steps):
        optimizer.step(closure)
        distances.append(math.hypot(x.item(), y.item()))
    return np.array(distances)


@pytest.mark.parametrize("lr", [0.1, 0.5, math.sqrt(0.5), 0.9])
def test_rate_in_the_bilinear_game(lr):
    """The eigenvalues 1 -+ lr i - lr^2 are conjugate, so every step shrinks by exactly their modulus."""
    found = play(lr, 100)
    np.testing.assert_allclose(found[1:] / found[:-1], abs(1 - lr * 1j - lr**2), rtol=1e-14)


def test_best_rate_in_the_bilinear_game():
    rates = {lr: play(lr, 1)[1] for lr in (0.6, 0.7, math.sqrt(0.5), 0.72, 0.8)}
    assert min(rates, key=rates.get) == math.sqrt(0.5)
    assert rates[math.sqrt(0.5)] == pytest.approx(math.sqrt(3) / 2, rel=1e-15)


OPTIONS = product(weight_decay=[0, 0.1], maximize=[False, True])


def decayed(params, before, weight_decay, sign):
    """Gradients with the decay of the point where they were taken written into them."""
    for p, w in zip(params, before, strict=True):
        p.grad = (sign * p.grad).add(w, alpha=weight_decay) if weight_decay else sign * p.grad


@implementations
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_sgd_is_torch_sgd_twice_from_one_point_bit_for_bit(options, dtype, foreach):
    ours, theirs = make_params(SHAPES, dtype), make_params(SHAPES, dtype)
    optimizer = ExtraSGD(ours, lr=0.1, foreach=foreach, **options)
    plain = SGD(theirs, lr=0.1, foreach=False)
    sign = -1 if options["maximize"] else 1
    for i in range(4):
        take(optimizer, ours, 1, i)
        start = values(theirs)
        for half in (0, 1):
            set_grads(theirs, 2 * i + half)
            decayed(theirs, values(theirs), options["weight_decay"], sign)
            if half:
                for p, w in zip(theirs, start, strict=True):
                    p.data.copy_(w)
            plain.step()
        assert all_same_bits(ours, theirs)


@implementations
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{**o, "amsgrad": a} for o in OPTIONS for a in (False, True)], ids=str)
def test_adam_is_torch_adam_twice_from_one_point_bit_for_bit(options, dtype, foreach):
    ours, theirs = make_params(SHAPES, dtype), make_params(SHAPES, dtype)
    numbers = {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3, "amsgrad": options["amsgrad"]}
    optimizer = ExtraAdam(
        ours, foreach=foreach, **numbers, weight_decay=options["weight_decay"], maximize=options["maximize"]
    )
    plain = Adam(theirs, foreach=False, **numbers)
    sign = -1 if options["maximize"] else 1
    for i in range(4):
        take(optimizer, ours, 1, i)
        start = values(theirs)
        for half in (0, 1):
            set_grads(theirs, 2 * i + half)
            decayed(theirs, values(theirs), options["weight_decay"], sign)
            if half:
                for p, w in zip(theirs, start, strict=True):
                    p.data.copy_(w)
            plain.step()
        assert all_same_bits(ours, theirs)
    for p, q in zip(ours, theirs, strict=True):
        assert optimizer.state[p].keys() == plain.state[q].keys()
        assert all(same_bits(optimizer.state[p][name], plain.state[q][name]) for name in plain.state[q])


@implementations
@pytest.mark.parametrize("amsgrad", [False, True])
def test_adam_on_a_field_is_its_recurrence(amsgrad, foreach):
    """The definition, in NumPy, on a field that depends on the point: algorithm 4 without averaging."""
    lr, beta1, beta2, eps, decay = 0.05, 0.6, 0.8, 1e-4, 0.1
    matrix = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).numpy()
    field = lambda w: np.sin(matrix @ w)  # noqa: E731
    p = Parameter(torch.randn(4, dtype=torch.float64))
    optimizer = ExtraAdam([p], lr, (beta1, beta2), eps, decay, amsgrad, foreach=foreach)
    w = p.detach().numpy().copy()
    m, v, largest = np.zeros(4), np.zeros(4), np.zeros(4)
    for i in range(12):
        p.grad = torch.from_numpy(field(p.detach().numpy()))
        optimizer.extrapolate()
        p.grad = torch.from_numpy(field(p.detach().numpy()))
        optimizer.step()
        point = w
        for half in (1, 2):
            g = field(point) + decay * point
            t = 2 * i + half
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
            largest = np.maximum(largest, v)
            square = (largest if amsgrad else v) / (1 - beta2**t)
            point = w - lr * m / (1 - beta1**t) / (np.sqrt(square) + eps)
        w = point
        np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-12, atol=1e-13)
    assert optimizer.state[p]["step"].item() == 24


def test_amsgrad_may_begin_in_the_middle_of_a_run():
    """The largest average known so far is the one there is."""
    params = make_params([(3,)])
    optimizer = ExtraAdam(params, lr=0.1)
    take(optimizer, params, 2)
    before = optimizer.state[params[0]]["exp_avg_sq"].clone()
    optimizer.param_groups[0]["amsgrad"] = True
    set_grads(params, 100)
    params[0].grad.zero_()
    optimizer.extrapolate()
    assert torch.equal(optimizer.state[params[0]]["max_exp_avg_sq"], before)


@classes
def test_a_step_of_two_players_is_that_of_one_optimizer_with_two_groups(make):
    """All players extrapolate before any takes its second gradient."""
    matrix = torch.randn(3, 2, dtype=torch.float64)
    together, apart = make_params([(3,), (2,)]), make_params([(3,), (2,)])
    one = make([{"params": [together[0]]}, {"params": [together[1]], "maximize": True}])
    two = [make([apart[0]]), make([apart[1]], maximize=True)]

    def closure(params):
        for p in params:
            p.grad = None
        loss = params[0] @ matrix @ params[1] + params[0].square().sum()
        loss.backward()
        return loss

    for _ in range(5):
        one.step(lambda: closure(together))
        closure(apart)
        for optimizer in two:
            optimizer.extrapolate()
        closure(apart)
        for optimizer in two:
            optimizer.step()
        assert all_same_bits(together, apart)


# ---- closures -------------------------------------------------------------------------------------------------------


@classes
def test_closure_makes_both_half_steps_and_returns_the_loss_before_them(make):
    p, twin = Parameter(torch.tensor([2.0])), Parameter(torch.tensor([2.0]))
    optimizer, other = make([p]), make([twin])
    points = []

    def closure(optimizer=optimizer, p=p):
        assert torch.is_grad_enabled()
        points.append(p.item())
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert float(optimizer.step(closure)) == 4.0
        assert not torch.is_grad_enabled()
    ahead = points[1]
    closure(other, twin)
    other.extrapolate()
    assert points[0] == 2.0 and twin.item() == ahead != 2.0
    closure(other, twin)
    assert other.step() is None
    assert same_bits(p, twin)


@classes
def test_a_closure_that_fails_leaves_the_parameters_where_they_were(make):
    params = make_params(SHAPES)
    optimizer = make(params)
    for failing in (1, 2):
        before, calls = values(params), []

        def closure(calls=calls, failing=failing):
            calls.append(None)
            set_grads(params, len(calls))
            if len(calls) == failing:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            optimizer.step(closure)
        assert len(calls) == failing
        assert all_same_bits(before, params)
        assert not any("extrapolated_from" in s for s in optimizer.state.values())
    take(optimizer, params)


@classes
def test_a_second_gradient_that_is_refused_leaves_the_parameters_where_they_were(make):
    p = Parameter(torch.ones(3))
    optimizer = make([p])
    grads = [torch.ones(3), torch.ones(3).to_sparse()]

    def closure():
        p.grad = None
        p.grad = grads.pop(0)

    with pytest.raises(TypeError, match=r"the gradient of params\[0\] must be dense"):
        optimizer.step(closure)
    assert torch.equal(p.detach(), torch.ones(3))


# ---- order ----------------------------------------------------------------------------------------------------------


@classes
def test_half_steps_out_of_order_are_refused_by_name(make):
    params = make_params(SHAPES)
    optimizer = make(params)
    name = type(optimizer).__name__
    set_grads(params, 0)
    before = Memory(params)
    called = []
    for call, method in ((optimizer.step, "step"), (optimizer.restore, "restore")):
        with pytest.raises(RuntimeError, match=rf"^{name}\.{method}: the parameters must be extrapolated; got no call"):
            call()
    assert before.unchanged() and not optimizer.state
    optimizer.extrapolate()
    before = Memory([*params, *state_tensors(optimizer)])
    with pytest.raises(RuntimeError, match=rf"^{name}\.extrapolate: the parameters must not be extrapolated yet"):
        optimizer.extrapolate()
    with pytest.raises(RuntimeError, match=rf"^{name}\.step\(closure\): the parameters must not be extrapolated yet"):
        optimizer.step(lambda: called.append(None))
    assert before.unchanged() and not called
    optimizer.step()
    with pytest.raises(RuntimeError, match=rf"^{name}\.step: the parameters must be extrapolated"):
        optimizer.step()


@classes
def test_restore_gives_a_half_step_up(make):
    params = make_params(SHAPES)
    optimizer = make(params)
    before = values(params)
    set_grads(params, 0)
    optimizer.extrapolate()
    assert not torch.equal(params[1].detach(), before[1])
    optimizer.restore()
    assert all_same_bits(before, params)
    if isinstance(optimizer, ExtraSGD):
        assert not optimizer.state
        assert all_same_bits(take(optimizer, params), take(make(twin := make_params(SHAPES)), twin))
    else:
        assert {s["step"].item() for s in optimizer.state.values()} == {1}
        take(optimizer, params)
        assert {s["step"].item() for s in optimizer.state.values()} == {3}


@classes
def test_no_gradients_at_all(make):
    params = make_params(SHAPES)
    optimizer = make(params)
    before = Memory(params)
    optimizer.extrapolate()
    assert optimizer.step() is None
    assert before.unchanged() and not optimizer.state


@classes
@implementations
def test_gradients_of_one_half_alone(foreach, make):
    """First alone: back to the saved point. Second alone: a plain step. Beside parameters that have both."""
    params = make_params([(3,)] * 4)
    optimizer = make(params, foreach=foreach)
    take(optimizer, params)
    before = values(params)
    set_grads(params, 2)
    params[1].grad = params[3].grad = None
    optimizer.extrapolate()
    assert [same_bits(p, b) for p, b in zip(params, before, strict=True)] == [False, True, False, True]
    set_grads(params, 3)
    params[0].grad = params[3].grad = None
    optimizer.step()
    assert [same_bits(p, b) for p, b in zip(params, before, strict=True)] == [True, False, False, True]
    alone = Parameter(before[1].clone())
    plain = (SGD if isinstance(optimizer, ExtraSGD) else Adam)([alone], lr=0.1, foreach=False)
    for i in (0, 1):  # the whole step before, for Adam's state
        alone.grad = gradient_of(1, i)
        plain.step()
    alone.data.copy_(before[1])
    alone.grad = gradient_of(1, 3)
    plain.step()
    assert same_bits(alone, params[1])


@classes
@implementations
def test_a_parameter_named_twice_comes_back(foreach, make):
    p = Parameter(torch.ones(2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = make([p, p], foreach=foreach)
    p.grad = torch.ones(2)
    optimizer.extrapolate()
    optimizer.restore()
    assert torch.equal(p.detach(), torch.ones(2)) and "extrapolated_from" not in optimizer.state[p]


@classes
def test_changes_between_the_halves_are_lost(make):
    """As the documentation says: only what had no first gradient keeps what was written."""
    params, twin = make_params([(3,), (3,)]), make_params([(3,), (3,)])
    found = []
    for group, disturb in ((params, True), (twin, False)):
        optimizer = make(group)
        set_grads(group, 0)
        optimizer.extrapolate()
        if disturb:
            group[0].data.add_(7.0)
        set_grads(group, 1)
        optimizer.step()
        found.append(values(group))
    assert all_same_bits(*found)


@classes
def test_data_changed_between_the_halves_is_refused(make):
    p = Parameter(torch.ones(3))
    optimizer = make([p])
    p.grad = torch.ones(3)
    optimizer.extrapolate()
    p.data = torch.ones(4)
    p.grad = torch.ones(4)
    with pytest.raises(
        ValueError, match=r"params\[0\] must be as it was when it was extrapolated|exp_avg of params\[0\]"
    ):
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(4))


@classes
def test_a_group_added_between_the_halves_takes_a_plain_step(make):
    params = make_params([(3,), (3,)])
    optimizer = make(params[:1])
    before = values(params)
    set_grads(params, 0)
    optimizer.extrapolate()
    optimizer.add_param_group({"params": params[1:]})
    assert [group["extrapolated"] for group in optimizer.param_groups] == [True, True]
    optimizer.step()
    for p, w in zip(params, before, strict=True):
        direction = p.grad if isinstance(optimizer, ExtraSGD) else p.grad.sign()
        torch.testing.assert_close(p.detach(), w - 0.1 * direction, rtol=1e-6, atol=1e-6)
    assert [group["extrapolated"] for group in optimizer.param_groups] == [False, False]


# ---- checkpoints between the halves ---------------------------------------------------------------------------------


@classes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex128])
def test_resume_between_the_halves_is_exact(dtype, make):
    params = make_params(SHAPES, dtype)
    optimizer = make(params, weight_decay=0.1)
    take(optimizer, params, 2)
    set_grads(params, 4)
    params[1].grad = None
    optimizer.extrapolate()
    checkpoint, kept = saved(optimizer), values(params)
    set_grads(params, 5)
    optimizer.step()
    straight = take(optimizer, params, 2, first=3)
    again = [Parameter(p) for p in kept]
    restored = make(again, lr=0.9)
    restored.load_state_dict(checkpoint)
    with pytest.raises(RuntimeError, match="must not be extrapolated yet"):
        restored.extrapolate()
    set_grads(again, 5)
    restored.step()
    as_real = torch.view_as_real if dtype.is_complex else lambda t: t
    assert all_same_bits(map(as_real, straight), map(as_real, take(restored, again, 2, first=3)))


@classes
def test_copies_made_between_the_halves_go_on(make):
    model = torch.nn.Linear(3, 2).double()
    params = list(model.parameters())
    optimizer = make(params)
    take(optimizer, params)
    set_grads(params, 2)
    optimizer.extrapolate()
    copies = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    set_grads(params, 3)
    optimizer.step()
    for other_model, other in copies:
        others = list(other_model.parameters())
        set_grads(others, 3)
        other.step()
        assert all_same_bits(params, others)


@classes
def test_loading_another_checkpoint_ends_the_half_step(make):
    params, twin = make_params(SHAPES), make_params(SHAPES)
    optimizer, other = make(params), make(twin)
    take(other, twin, 2)
    set_grads(params, 0)
    optimizer.extrapolate()
    optimizer.load_state_dict(other.state_dict())
    for p, q in zip(params, twin, strict=True):
        p.data.copy_(q)
    assert not any("extrapolated_from" in s for s in optimizer.state.values())
    assert all_same_bits(take(optimizer, params, 2, first=2), take(other, twin, 2, first=2))


def between(make):
    params = make_params(SHAPES)
    optimizer = make(params[:2])
    optimizer.add_param_group({"params": params[2:]})
    set_grads(params, 0)
    optimizer.extrapolate()
    return params, optimizer


def edit_group(number, **entries):
    return lambda checkpoint: checkpoint["param_groups"][number].update(entries)


def edit_state(value):
    return lambda checkpoint: checkpoint["state"][1].update(extrapolated_from=value)


HOSTILE = {
    "one-group": (edit_group(1, extrapolated=False), ValueError, "extrapolated must be the same in all param_groups"),
    "text": (edit_group(0, extrapolated="yes"), TypeError, "extrapolated must be True or False; got 'yes'"),
    "shape": (edit_state(torch.ones(2)), ValueError, r"state\[1\]\['extrapolated_from'\] must have the shape"),
    "number": (edit_state(1.0), TypeError, r"state\[1\]\['extrapolated_from'\] must be a tensor; got 1.0"),
    "stray": (
        lambda c: [group.update(extrapolated=False) for group in c["param_groups"]],
        ValueError,
        r"state\[0\] must hold extrapolated_from only while the groups are extrapolated",
    ),
}


@classes
@pytest.mark.parametrize("fault", HOSTILE)
def test_hostile_checkpoints_are_refused_and_nothing_changes(fault, make):
    spoil, kind, message = HOSTILE[fault]
    params, optimizer = between(make)
    checkpoint = saved(optimizer)
    spoil(checkpoint)
    before = Memory([*params, *state_tensors(optimizer)])
    with pytest.raises(kind, match=f"^{type(optimizer).__name__}.load_state_dict: {message}"):
        optimizer.load_state_dict(checkpoint)
    assert before.unchanged()
    set_grads(params, 1)
    optimizer.step()


def test_checkpoints_of_torch_load():
    params = make_params(SHAPES)
    adam = Adam(params, lr=0.03, betas=(0.5, 0.9), amsgrad=True)
    for i in range(3):
        set_grads(params, i)
        adam.step()
    ours = [Parameter(p.detach().clone()) for p in params]
    optimizer = ExtraAdam(ours)
    optimizer.load_state_dict(saved(adam))
    start = values(params)
    for half in (0, 1):
        set_grads(params, 10 + half)
        if half:
            for p, w in zip(params, start, strict=True):
                p.data.copy_(w)
        adam.step()
    assert_all_close(take(optimizer, ours, 1, first=5), params, rtol=1e-13, atol=1e-14)
    plain = SGD(params, lr=0.03, weight_decay=0.5)
    other = ExtraSGD(ours)
    other.load_state_dict(saved(plain))
    assert other.param_groups[0]["lr"] == 0.03 and other.param_groups[0]["weight_decay"] == 0.5
    take(other, ours)


# ---- mixed precision ------------------------------------------------------------------------------------------------


@classes
@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale"])
def test_grad_scaler_brings_the_saved_point_back_where_the_second_gradient_overflows(unscale, make):
    params, twin = make_params([(3,), (4, 5)], torch.float32), make_params([(3,), (4, 5)], torch.float32)
    optimizer, plain = make(params), make(twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)

    def scaled_grads(params, seed):
        scaler.scale(torch.zeros(()))  # makes the scale
        set_grads(params, seed)
        for p in params:
            p.grad *= scaler.get_scale()

    for i in range(4):
        scaled_grads(params, 2 * i)
        scaler.unscale_(optimizer)
        before = values(params)
        optimizer.extrapolate()
        scaler.update()
        scaled_grads(params, 2 * i + 1)
        if i == 2:
            params[1].grad[0, 0] = float("inf")
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        set_grads(twin, 2 * i)
        plain.extrapolate()
        if i == 2:
            plain.restore()
            assert all_same_bits(before, params)
        else:
            set_grads(twin, 2 * i + 1)
            plain.step()
        assert_all_close(params, twin)  # a power of two scales without rounding, but for underflow
    assert scaler.get_scale() == 512.0
    assert not hasattr(optimizer, "found_inf") and not hasattr(optimizer, "grad_scale")


@classes
@implementations
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters_are_rounded_once_per_half_step(dtype, foreach, make):
    """All arithmetic is float32, the state too; the point ahead is the rounded one, where the gradients are taken."""
    p = Parameter(torch.randn(50).to(dtype))
    twin = Parameter(p.detach().float())
    optimizer, wide = make([p], weight_decay=0.1, foreach=foreach), make([twin], weight_decay=0.1, foreach=foreach)
    for i in range(4):
        start = p.detach().clone()
        for half in ("extrapolate", "step"):
            set_grads([p], 2 * i + (half == "step"))
            twin.grad = p.grad.float()
            getattr(optimizer, half)()
            getattr(wide, half)()
            assert same_bits(p.detach(), twin.detach().to(dtype))
            twin.data.copy_(p.detach().float())
            if half == "extrapolate":
                assert same_bits(optimizer.state[p]["extrapolated_from"], start)
    assert all(t.dtype == torch.float32 for t in state_tensors(optimizer))
