"""The trainers: each step equal to one written by hand, their schedule, and runs that go on bit for bit."""

import copy
import inspect
import json
import math
import signal
import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import F64
from helpers import all_same_bits, same_bits
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from nestopt_ext._checkpoint import CheckpointError
from nestopt_ext.response import (
    DeltaStnLinear,
    DeltaStnTrainer,
    EpochRecord,
    HyperParameters,
    StnLinear,
    StnModel,
    StnTrainer,
    TrainerDiverged,
    accuracy,
    current_sample,
    plot_history,
    plots,
)
from nestopt_ext.response._trainer_options import TrainerOptions

# ---- a network of two layers with two hyperparameters, and what it computes written out ------------------------------

LR = 0.1


def sgd(params):
    return torch.optim.SGD(params, lr=LR)


class Scale(nn.Module):
    """An augmentation: inputs times 1 + the hyperparameter ``a``, of each example."""

    def forward(self, x):
        return x * (1 + current_sample().values["a"].reshape(-1, 1))


def decay(model, outputs):
    """A regularizer: ``b`` times the mean square of outputs, per example."""
    return (current_sample().values["b"].reshape(-1, 1) * outputs.square()).mean()


def network(delta, *, dtype=F64):
    torch.manual_seed(3)
    hparams = HyperParameters(dtype=dtype).add("a", 0.3, low=0.0, high=1.0, scale=0.7).add("b", 0.4, low=0.0, scale=0.5)
    layer = DeltaStnLinear if delta else StnLinear
    module = nn.Sequential(layer(4, 5, num_hparams=2, dtype=dtype), nn.Tanh(), layer(5, 3, num_hparams=2, dtype=dtype))
    for linear in (module[0], module[2]):  # a response that is there, so that every gradient is
        nn.init.normal_(linear.gate_weight, std=0.5)
    return StnModel(module, hparams, centred=delta)


def data(count=6, seed=5, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator, dtype=F64).to(dtype)
    return x, torch.randint(0, 3, (count,), generator=generator)


def make(delta, model=None, **options):
    model = model or network(delta)
    options = {"optimizer": sgd, "hyper_optimizer": sgd, "generator": torch.Generator().manual_seed(9), **options}
    if delta:
        options.setdefault("response_optimizer", sgd)
    batches = [data(seed=s) for s in (5, 6, 7)]
    return (DeltaStnTrainer if delta else StnTrainer)(model, F.cross_entropy, batches, batches[:2], **options)


def perturbed(model, count, seed=9):
    """What the generator of `make` draws first: h' of each example."""
    noise = torch.empty(count, 2, dtype=F64).normal_(generator=torch.Generator().manual_seed(seed))
    return model.hparams.unconstrained + F.softplus(model.hparams.raw_scale) * noise


def natural(h):
    return h[:, :1].detach().sigmoid(), F.softplus(h[:, 1:].detach())


def moved(params, gate_input):
    """Effective weights of each example, by name in the module: W + diag(U_w h) V and b + (U_b h) c."""
    out = {}
    for layer in ("0", "2"):
        weight, bias = params[f"{layer}.weight"], params[f"{layer}.bias"]
        gates = gate_input @ params[f"{layer}.gate_weight"].T
        row, shift = gates[:, : len(weight)], gates[:, len(weight) :]
        out[f"{layer}.weight"] = weight + row.unsqueeze(-1) * params[f"{layer}.response_weight"]
        out[f"{layer}.bias"] = bias + shift * params[f"{layer}.response_bias"]
    return out


def written_out(weights, x):
    """The network with weights of its own for each example."""
    hidden = torch.tanh(torch.einsum("boi,bi->bo", weights["0.weight"], x) + weights["0.bias"])
    return torch.einsum("boi,bi->bo", weights["2.weight"], hidden) + weights["2.bias"]


def linearized(params, gate_input, x):
    """f(w0) + J_f(w0) (w(h') - w0), for each example."""
    at = moved(params, torch.zeros_like(gate_input))
    tangent = {name: w - at[name] for name, w in moved(params, gate_input).items()}
    primal, out = torch.func.jvp(lambda w: written_out(w, x), (at,), (tangent,))
    return primal + out


def training_loss(predict, x, y, h):
    a, b = natural(h)
    outputs = predict(x * (1 + a))
    return F.cross_entropy(outputs, y) + (b * outputs.square()).mean()


def copies(model):
    return {name: p.detach().clone().requires_grad_() for name, p in model.module.named_parameters()}


def is_response(name):
    return "response_" in name or "gate_weight" in name


def stepped(params, names, loss, lr=LR):
    """``params`` after a gradient step of ``loss`` in those of ``names``."""
    grads = dict(zip(names, torch.autograd.grad(loss, [params[n] for n in names]), strict=True))
    return {n: (p - lr * grads[n] if n in grads else p).detach().requires_grad_() for n, p in params.items()}


def assert_is(model, params):
    for name, p in model.module.named_parameters():
        torch.testing.assert_close(p, params[name], rtol=1e-12, atol=1e-13, msg=name)


def assert_nothing_left(model):
    for name, p in model.named_parameters():
        assert p.grad is None and p.requires_grad, name


# ---- training steps --------------------------------------------------------------------------------------------------


def test_stn_train_step_moves_all_weights_by_the_gradient_at_points_of_their_own():
    trainer = make(False, augment=Scale(), regularizers=[decay])
    model, (x, y) = trainer.model, data()
    before, hparams = copies(model), [p.clone() for p in model.hparams.parameters()]
    h = perturbed(model, len(x)).detach()
    loss = training_loss(lambda z: written_out(moved(before, h), z), x, y, h)
    found = trainer.train_step((x, y))
    assert found["train_loss"] == pytest.approx(loss.item(), rel=1e-12)
    assert_is(model, stepped(before, list(before), loss))
    assert all_same_bits(hparams, model.hparams.parameters())
    assert_nothing_left(model)


@pytest.mark.parametrize("linearize", [True, False])
def test_delta_train_step_moves_weights_at_the_centre_and_the_response_about_it(linearize):
    trainer = make(True, augment=Scale(), regularizers=decay, linearize=linearize)
    model, (x, y) = trainer.model, data()
    before, hparams = copies(model), [p.clone() for p in model.hparams.parameters()]
    general = [name for name in before if not is_response(name)]
    centre = model.hparams.unconstrained.detach().unsqueeze(0)
    plain = training_loss(lambda z: written_out(moved(before, torch.zeros(len(x), 2, dtype=F64)), z), x, y, centre)
    after = stepped(before, general, plain)
    h = perturbed(model, len(x)).detach()
    predict = linearized if linearize else (lambda params, eps, z: written_out(moved(params, eps), z))
    loss = training_loss(lambda z: predict(after, h - centre, z), x, y, h)
    found = trainer.train_step((x, y))
    assert found["train_loss"] == pytest.approx(plain.item(), rel=1e-12)
    assert found["response_loss"] == pytest.approx(loss.item(), rel=1e-12)
    assert_is(model, stepped(after, [name for name in after if is_response(name)], loss))
    assert all_same_bits(hparams, model.hparams.parameters())
    assert_nothing_left(model)


def test_the_response_objective_is_another_one_where_the_network_is_not_linearized():
    losses = [make(True, linearize=linearize).train_step(data())["response_loss"] for linearize in (True, False)]
    assert abs(losses[0] - losses[1]) > 1e-3


def test_the_steps_of_weights_are_clipped_each_by_itself():
    steps = {}
    for bound in (None, 1e-2):
        trainer = make(True, max_norm=bound)
        before = copies(trainer.model)
        trainer.train_step(data())
        for kind in (False, True):
            named = trainer.model.module.named_parameters()
            change = [(p - before[n]).flatten() for n, p in named if is_response(n) == kind]
            steps[bound, kind] = torch.cat(change).norm().item() / LR
    for kind in (False, True):
        assert steps[None, kind] > 2e-2
        assert steps[1e-2, kind] == pytest.approx(1e-2, rel=1e-4)


class Noisy(nn.Module):
    """Counts the calls in training mode and drops units by the global random numbers."""

    def __init__(self, units):
        super().__init__()
        self.masks = []
        self.norm = nn.BatchNorm1d(units, dtype=F64)

    def forward(self, x):
        if self.training:
            self.masks.append(torch.rand(len(x)) < 0.5)
        return self.norm(x)


def with_noise():
    model = network(True)
    model.module.insert(1, Noisy(5))
    return model


def test_statistics_move_in_the_step_of_the_general_weights_alone_and_masks_are_drawn_anew():
    trainer = make(True, with_noise())
    noisy = trainer.model.module[1]
    x, y = data()
    before = F.linear(x, trainer.model.module[0].weight, trainer.model.module[0].bias)
    trainer.train_step((x, y))
    torch.testing.assert_close(noisy.norm.running_mean, 0.1 * before.mean(0).detach())
    assert noisy.norm.num_batches_tracked == 1
    assert len(noisy.masks) == 2 and not torch.equal(*noisy.masks)


def test_after_an_exception_weights_require_grad_again_and_buffers_are_as_they_were():
    trainer = make(True, with_noise())
    frozen = trainer.model.module[3].bias.requires_grad_(False)
    calls = []

    def fails(outputs, targets):
        calls.append(trainer.model.module[0].weight.requires_grad)
        if len(calls) == 2:
            raise ArithmeticError("in the second pass")
        return F.cross_entropy(outputs, targets)

    trainer._criterion = fails
    with pytest.raises(ArithmeticError):
        trainer.train_step(data())
    assert calls == [True, False]
    assert [p for p in trainer.model.parameters() if not p.requires_grad] == [frozen]
    assert trainer.model.module[1].norm.num_batches_tracked == 1
    assert current_sample() is None


def test_weights_that_are_not_to_be_trained_stay():
    model = network(True)
    kept = model.module[0].weight.requires_grad_(False).clone()
    trainer = make(True, model)
    trainer.train_step(data())
    trainer.valid_step(data())
    assert torch.equal(model.module[0].weight, kept) and not model.module[0].weight.requires_grad


# ---- the validation step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tune_scales", [True, False])
@pytest.mark.parametrize("delta", [True, False])
def test_valid_step_tunes_hyperparameters_through_the_gates_alone(delta, tune_scales):
    def forbidden(*args):
        raise AssertionError("not in a validation step")

    trainer = make(
        delta, valid_criterion=lambda o, t: 2 * F.cross_entropy(o, t), augment=forbidden, regularizers=[forbidden],
        tune_scales=tune_scales, entropy_weight=0.3,
    )  # fmt: skip
    model, (x, y) = trainer.model, data()
    hparams = model.hparams
    before = copies(model)
    h = perturbed(model, len(x)) if tune_scales else hparams.unconstrained.expand(len(x), -1)
    gate_input = h - hparams.unconstrained.detach() if delta else h
    loss = 2 * F.cross_entropy(written_out(moved(before, gate_input), x), y)
    entropy = (F.softplus(hparams.raw_scale) * (2 * torch.pi * torch.e) ** 0.5).log().sum()
    tuned = [hparams.unconstrained, hparams.raw_scale] if tune_scales else [hparams.unconstrained]
    grads = torch.autograd.grad(loss - 0.3 * entropy if tune_scales else loss, tuned)
    expected = [p - LR * g for p, g in zip(tuned, grads, strict=True)]
    scales = hparams.raw_scale.clone()
    found = trainer.valid_step((x, y))
    assert found == pytest.approx({"hyper_loss": loss.item(), "entropy": entropy.item()}, rel=1e-12)
    torch.testing.assert_close(tuned, expected, rtol=1e-12, atol=1e-14)
    assert tune_scales or torch.equal(hparams.raw_scale, scales)
    assert all_same_bits([before[n] for n, _ in model.module.named_parameters()], model.module.parameters())
    assert_nothing_left(model)


def test_entropy_keeps_scales_from_vanishing():
    changes = []
    for weight in (0.0, 10.0):
        trainer = make(True, entropy_weight=weight)
        before = trainer.model.hparams.scale().detach()
        trainer.valid_step(data())
        changes.append(trainer.model.hparams.scale() - before)
    assert bool((changes[1] > changes[0] + 0.1).all())


def test_scales_may_have_an_optimizer_of_their_own():
    model = network(True)
    trainer = make(
        True, model, scale_optimizer=lambda p: torch.optim.SGD(p, lr=0.0), hyper_optimizer=lambda p: torch.optim.Adam(p)
    )
    before = [p.clone() for p in (model.hparams.unconstrained, model.hparams.raw_scale)]
    trainer.valid_step(data())
    torch.testing.assert_close((model.hparams.unconstrained - before[0]).abs(), torch.full((2,), 1e-3, dtype=F64))
    assert torch.equal(model.hparams.raw_scale, before[1])
    assert list(trainer.optimizers) == ["optimizer", "response_optimizer", "scale_optimizer", "hyper_optimizer"]


def test_validation_is_in_evaluation_mode_and_every_module_is_put_back_into_its_own():
    model = with_noise()
    trainer = make(True, model)
    model.train()
    model.module[1].norm.eval()
    trainer.valid_step(data())
    trainer.evaluate([data()])
    assert not model.module[1].masks
    assert model.training and model.module[0].training and not model.module[1].norm.training
    assert model.module[1].norm.num_batches_tracked == 0


def test_a_criterion_with_an_evaluation_mode_validates_in_it():
    class Criterion(nn.Module):
        def forward(self, outputs, targets):
            seen.append(self.training)
            return F.cross_entropy(outputs, targets)

    seen = []
    model = network(True)
    batches = [data()]
    trainer = DeltaStnTrainer(model, Criterion(), batches, batches, optimizer=sgd, response_optimizer=sgd)
    trainer.train_step(data())
    trainer.valid_step(data())
    trainer.evaluate(batches)
    trainer.train_step(data())
    assert seen == [True, True, False, False, True, True]


@pytest.mark.parametrize("tune_scales", [True, False])
def test_a_validation_loss_that_no_layer_responds_in_is_refused(tune_scales):
    class Bypasses(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = DeltaStnLinear(4, 3, num_hparams=2, dtype=F64)

        def forward(self, x):
            return F.linear(x, self.layer.weight)

    model = StnModel(Bypasses(), network(True).hparams, centred=True)
    before = [p.clone() for p in model.hparams.parameters()]
    with pytest.raises(ValueError, match="the validation loss must depend on the hyperparameters"):
        make(True, model, tune_scales=tune_scales).valid_step(data())
    assert all(torch.equal(a, b) for a, b in zip(before, model.hparams.parameters(), strict=True))


def test_a_run_that_ends_within_its_warmup_says_so():
    with pytest.warns(RuntimeWarning, match="epochs must be more than warmup_epochs=5"):
        make(True).fit(2)


@pytest.mark.parametrize("delta", [True, False])
def test_evaluation_is_at_the_centre_and_weighs_batches_by_their_targets(delta):
    trainer = make(delta, metrics={"accuracy": accuracy})
    model, (x, y) = trainer.model, data(7)
    params = copies(model)
    centre = torch.zeros(7, 2, dtype=F64) if delta else model.hparams.unconstrained.detach().expand(7, -1)
    outputs = written_out(moved(params, centre), x)
    state = torch.get_rng_state()
    found = trainer.evaluate(DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True))
    right = (outputs.argmax(1) == y).double().mean().item()
    assert found == pytest.approx({"loss": F.cross_entropy(outputs, y).item(), "accuracy": right}, rel=1e-12)
    assert torch.equal(torch.get_rng_state(), state)


# ---- the schedule ----------------------------------------------------------------------------------------------------


def recorded(trainer):
    """Every training and validation step, as the place of its batch."""
    calls = []
    batches = [x for x, _ in trainer._valid_batches]

    def note(kind, step):
        def call(batch):
            place = [i for i, (x, _) in enumerate(trainer._train._source) if torch.equal(x, batch[0])]
            if kind == "v":
                place = [i for i, x in enumerate(batches) if torch.equal(x, batch[0])]
            calls.append(f"{kind}{place[0]}")
            return step(batch)

        return call

    trainer.train_step, trainer.valid_step = note("t", trainer.train_step), note("v", trainer.valid_step)
    return calls


@pytest.mark.parametrize("delta", [True, False])
def test_after_warmup_validation_steps_follow_by_a_count_that_goes_on_over_epochs(delta):
    trainer = make(delta, warmup_epochs=1, train_steps=2, valid_steps=1)
    calls = recorded(trainer)
    start = trainer.model.hparams.unconstrained.clone()
    trainer.fit(1)
    assert calls == ["t0", "t1", "t2"]
    assert torch.equal(trainer.model.hparams.unconstrained, start)
    trainer.fit(3)
    assert calls[3:] == ["t0", "t1", "v0", "t2", "t0", "v1", "t1", "t2", "v0"]
    assert not torch.equal(trainer.model.hparams.unconstrained, start)


def test_defaults_are_those_of_the_papers():
    model = network(False)
    stn = StnTrainer(model, F.cross_entropy, [data()], [data()])
    delta = DeltaStnTrainer(network(True), F.cross_entropy, [data()], [data()])
    for trainer, ratio in ((stn, 2), (delta, 5)):
        assert (trainer._warmup_epochs, trainer._train_steps, trainer._valid_steps) == (5, ratio, 1)
        assert trainer._entropy_weight == 1e-3 and trainer._tune_scales and trainer._max_norm is None
        for name in trainer._params:
            optimizer = trainer.optimizers[name]
            assert type(optimizer) is torch.optim.SGD
            assert optimizer.defaults["lr"] == 0.01 and optimizer.defaults["momentum"] == 0.9
    assert type(stn.optimizers["hyper_optimizer"]) is torch.optim.Adam
    assert stn.optimizers["hyper_optimizer"].defaults["lr"] == 3e-3
    assert type(delta.optimizers["hyper_optimizer"]) is torch.optim.RMSprop
    assert delta.optimizers["hyper_optimizer"].defaults["lr"] == 0.01


def test_a_record_holds_means_of_the_epoch_and_values_in_natural_units():
    trainer = make(True, warmup_epochs=0, train_steps=1, test_batches=[data(5, seed=8)])
    losses = []
    step = trainer.train_step
    trainer.train_step = lambda batch: losses.append(step(batch)) or losses[-1]
    (record,) = trainer.fit(1).history
    assert (record.epoch, record.step) == (1, 3)
    assert record.losses["train_loss"] == pytest.approx(sum(found["train_loss"] for found in losses) / 3)
    assert set(record.losses) == {"train_loss", "response_loss", "hyper_loss", "entropy"}
    assert record.valid == trainer.evaluate(trainer._valid_batches)
    assert record.test == trainer.evaluate([data(5, seed=8)])
    h, s = trainer.model.hparams.unconstrained, trainer.model.hparams.scale()
    assert record.values == pytest.approx({"a": h[0].sigmoid().item(), "b": F.softplus(h[1]).item()})
    assert record.scales == pytest.approx({"a": s[0].item(), "b": s[1].item()})


def test_schedulers_step_once_an_epoch():
    trainer = make(
        True,
        scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5),
        hyper_scheduler=lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=1e9),
    )
    trainer.fit(3)
    rates = [o.param_groups[0]["lr"] for o in trainer.optimizers.values()]
    assert rates == pytest.approx([LR / 8, LR / 8, LR / 1000])


def test_schedulers_step_in_silence_where_the_warm_up_or_a_resumed_run_took_no_step(tmp_path):
    def step_lr(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    parts = make(True, hyper_scheduler=step_lr, scheduler=step_lr, warmup_epochs=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of torch
        parts.fit(1, output=tmp_path, should_stop=After(3))  # all batches, and not the end of the epoch
        parts = make(True, hyper_scheduler=step_lr, scheduler=step_lr, warmup_epochs=2)
        parts.fit(1, output=tmp_path, resume=True)
    rates = [o.param_groups[0]["lr"] for o in parts.optimizers.values()]
    assert rates == pytest.approx([LR / 2, LR / 2, LR / 2]) and parts.step_count == 3


# ---- all of it together ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0.1, 5.0])
@pytest.mark.parametrize(("method", "tolerance"), [("linearized", 1e-3), ("centred", 1e-3), ("stn", 0.1)])
def test_a_decay_is_tuned_to_the_optimum_of_the_closed_form(method, start, tolerance):
    """w minimizes (w - 1)^2 + decay w^2, so w = 1 / (1 + decay), and (w - 1/2)^2 is least where the decay is 1."""
    delta = method != "stn"
    hparams = HyperParameters(dtype=F64).add("decay", start, low=0.0, scale=0.2, transform="exp")
    layer = (DeltaStnLinear if delta else StnLinear)(1, 1, bias=False, num_hparams=1, dtype=F64)
    x = torch.ones(32, 1, dtype=F64)

    def decay(model, outputs):
        return (current_sample().values["decay"] * outputs[:, 0].square()).mean()

    options = {"response_optimizer": sgd, "linearize": method == "linearized"} if delta else {}
    trainer = (DeltaStnTrainer if delta else StnTrainer)(
        StnModel(layer, hparams, centred=delta), F.mse_loss, [(x, x)] * 25, [(x, 0.5 * x)], regularizers=[decay],
        optimizer=sgd, hyper_optimizer=lambda p: torch.optim.RMSprop(p, lr=0.05), warmup_epochs=1, train_steps=2,
        tune_scales=False, **options,
    )  # fmt: skip
    history = trainer.fit(5 if delta else 14).history
    assert history[0].values["decay"] == pytest.approx(start)
    assert history[-1].values["decay"] == pytest.approx(1.0, abs=tolerance)


# ---- what is carried from batch to batch -----------------------------------------------------------------------------


class Recurrent(nn.Module):
    """A state for each sequence, time first: tanh of an affine map of input and state."""

    def __init__(self, layer):
        super().__init__()
        self.cell = layer(4 + 3, 3, num_hparams=1, batch_dim=0, dtype=F64)

    def forward(self, x, state):
        outputs = []
        for step in x:
            state = torch.tanh(self.cell(torch.cat([step, state], 1)))
            outputs.append(state)
        return torch.stack(outputs), state


@pytest.mark.parametrize("delta", [True, False])
def test_a_state_is_carried_detached_from_the_pass_of_the_general_weights(delta):
    torch.manual_seed(1)
    module = Recurrent(DeltaStnLinear if delta else StnLinear)
    nn.init.normal_(module.cell.gate_weight)
    model = StnModel(module, HyperParameters(dtype=F64).add("a", 0.5), centred=delta)
    chunks = [torch.randn(2, 5, 4, dtype=F64) for _ in range(3)]
    seen = []

    def forward(model, batch, carry):
        state = torch.zeros(5, 3, dtype=F64) if carry is None else carry["state"]
        sample = current_sample()
        kind = "valid" if not model.training else "response" if sample.linearized else "train"
        outputs, new = model(batch, state)
        seen.append((kind, state, new))
        return outputs, batch[..., :3], {"state": new}

    make_trainer = DeltaStnTrainer if delta else StnTrainer
    trainer = make_trainer(
        model, F.mse_loss, chunks, chunks[:2], forward=forward, warmup_epochs=0, train_steps=1, batch_dim=1
    )
    trainer.advance(), trainer.advance(), trainer.advance()
    kinds = ["train", "response", "valid"] if delta else ["train", "valid"]
    assert [kind for kind, _, _ in seen] == kinds * 3
    states = {kind: [(old, new) for found, old, new in seen if found == kind] for kind in kinds}
    assert not any(old.requires_grad for _, old, _ in seen)
    for kind in kinds:
        assert torch.count_nonzero(states[kind][0][0]) == 0
        source = states["valid" if kind == "valid" else "train"]
        assert torch.equal(states[kind][1][0], source[0][1])
    assert torch.equal(states["train"][2][0], states["train"][1][1])
    assert torch.count_nonzero(states["valid"][2][0]) == 0  # its two chunks begin anew
    seen.clear()
    trainer.fit(1)  # evaluation begins with none
    trainer.advance()
    assert torch.count_nonzero(next(old for kind, old, _ in seen if kind == "train")) == 0


# ---- runs that go on -------------------------------------------------------------------------------------------------


class Dropout(nn.Module):
    """Drops inputs at the rate ``a`` of each example, by torch's global random numbers."""

    def forward(self, x):
        if not self.training:
            return x
        rate = current_sample().values["a"].reshape(-1, 1)
        return x * (torch.rand_like(x) >= rate) / (1 - rate)


def run(delta, *, own_generators=False, **options):
    """A trainer with all that moves: dropout, batch statistics, shuffling, momentum, schedulers."""
    model = network(delta, dtype=torch.float32)
    model.module.insert(1, nn.BatchNorm1d(5))
    model.module.insert(0, Dropout())
    x, y = data(22, dtype=torch.float32)
    generators = [torch.Generator().manual_seed(s) if own_generators else None for s in (1, 2)]
    train, valid = (
        DataLoader(TensorDataset(x[half], y[half]), batch_size=4, shuffle=True, generator=g)
        for half, g in zip((slice(14), slice(14, 22)), generators, strict=True)
    )
    options = {"warmup_epochs": 1, "scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 2), **options}
    return (DeltaStnTrainer if delta else StnTrainer)(model, F.cross_entropy, train, valid, train_steps=2, **options)


def lines(folder):
    text = (folder / "log.jsonl").read_text()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in text.splitlines()]


def assert_same_state(state, other):
    assert list(state) == list(other)
    for name, value in state.items():
        assert same_bits(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name], name


def assert_same_run(whole, parts, folder=None, other=None):
    assert_same_state(whole.model.state_dict(), parts.model.state_dict())
    assert_same_state(whole.best_state, parts.best_state)
    untimed = [[{**vars(r), "seconds": 0} for r in t.history] for t in (whole, parts)]
    assert untimed[0] == untimed[1]
    assert whole.best.epoch == parts.best.epoch
    if folder is not None:
        assert lines(folder) == lines(other)


class After:
    """True the nth time it is asked."""

    def __init__(self, count):
        self.left = count

    def __call__(self):
        self.left -= 1
        return self.left == 0


@pytest.mark.parametrize(("delta", "own_generators"), [(True, False), (False, True)])
def test_a_run_in_parts_is_the_uninterrupted_run_bit_for_bit(tmp_path, delta, own_generators):
    whole = run(delta, own_generators=own_generators)
    result = whole.fit(4, output=tmp_path / "whole")
    assert result.stopped == "epochs" and [r.epoch for r in result.history] == [1, 2, 3, 4]
    for stop in (1, 2, 5):  # within the warm-up, on a step with a validation step behind it, and one epoch further
        torch.manual_seed(stop)
        parts = run(delta, own_generators=own_generators)
        assert parts.fit(4, output=tmp_path / "parts", resume=True, should_stop=After(stop)).stopped == "asked"
    torch.manual_seed(77)
    parts = run(delta, own_generators=own_generators)
    parts.fit(4, output=tmp_path / "parts", resume=True)
    assert_same_run(whole, parts, tmp_path / "whole", tmp_path / "parts")


def test_lines_after_the_checkpoint_are_cut_off(tmp_path):
    whole, parts = run(True), run(True)
    whole.fit(3, output=tmp_path / "whole")
    torch.manual_seed(0)

    def crashes(record):
        if record.epoch == 3:
            raise OSError("power")

    parts = run(True)
    with pytest.raises(OSError, match="power"):
        parts.fit(4, output=tmp_path / "parts", on_epoch=crashes, checkpoint_every=2)
    assert len(lines(tmp_path / "parts")) == 3
    parts = run(True)
    result = parts.fit(3, output=tmp_path / "parts", resume=True)
    assert [r.epoch for r in result.history] == [1, 2, 3]
    assert_same_run(whole, parts, tmp_path / "whole", tmp_path / "parts")


def test_ctrl_c_ends_the_run_after_the_step_saved(tmp_path):
    whole = run(True)
    whole.fit(3, output=tmp_path / "whole")
    torch.manual_seed(0)
    parts = run(True)
    calls = []

    def interrupted(outputs, targets):
        calls.append(1)
        if len(calls) == 11:
            signal.raise_signal(signal.SIGINT)
        return F.cross_entropy(outputs, targets)

    parts._criterion = interrupted
    with pytest.raises(KeyboardInterrupt):
        parts.fit(3, output=tmp_path / "parts")
    assert parts.step_count == 6 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    parts = run(True)
    parts.fit(3, output=tmp_path / "parts", resume=True)
    assert_same_run(whole, parts, tmp_path / "whole", tmp_path / "parts")


def test_a_run_in_memory_goes_on_where_it_was():
    whole, parts = run(True), None
    whole.fit(3)
    torch.manual_seed(0)
    parts = run(True)
    parts.fit(1)
    assert parts.fit(1).stopped == "epochs" and parts.epoch == 1
    parts.fit(3)
    assert_same_run(whole, parts)


def test_a_carried_state_is_saved(tmp_path):
    def forward(model, batch, carry):
        carry = torch.zeros(3) if carry is None else carry
        outputs = model(batch[0]) + carry
        return outputs, batch[1], outputs.mean(0)

    whole = run(True, forward=forward)
    whole.fit(2)
    torch.manual_seed(0)
    run(True, forward=forward).fit(2, output=tmp_path, should_stop=After(6))
    parts = run(True, forward=forward)
    parts.fit(2, output=tmp_path, resume=True)
    assert_same_run(whole, parts)


def test_a_folder_that_holds_a_run_is_not_written_over(tmp_path):
    run(True).fit(1, output=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"best.pt", "checkpoint.pt", "log.jsonl"}
    with pytest.raises(
        RuntimeError, match=r"DeltaStnTrainer.fit: output must be a folder without a run; .* resume=True"
    ):
        run(True).fit(1, output=tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path):
    run(True).fit(1, output=tmp_path)
    other = make(True)
    before = [p.clone() for p in other.model.parameters()]
    with pytest.raises(CheckpointError, match=r"does not fit this trainer: .*model must be a dict with the keys"):
        other.fit(1, output=tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="does not fit this trainer"):
        run(False).fit(1, output=tmp_path, resume=True)
    assert all_same_bits(before, other.model.parameters()) and other.step_count == 0
    (tmp_path / "checkpoint.pt").write_bytes(b"PK no")
    with pytest.raises(CheckpointError, match="damaged"):
        run(True).fit(1, output=tmp_path, resume=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [("warmup_epochs", 2), ("train_steps", 3), ("valid_steps", 2), ("max_norm", 1.0), ("tune_scales", False),
     ("entropy_weight", 0.0), ("linearize", False)],
)  # fmt: skip
def test_a_run_goes_on_with_the_options_it_was_made_with(tmp_path, name, value):
    kept = {"warmup_epochs": 1, "train_steps": 2}
    trainer = make(True, **kept)
    trainer.advance()
    saved = trainer.state_dict()
    other = make(True, **{**kept, name: value})
    before = [p.clone() for p in other.model.parameters()]
    with pytest.raises(ValueError, match=rf"was made with {name} .*, and this trainer has {value}. Resume with {name}"):
        other.load_state_dict(saved)
    assert all_same_bits(before, other.model.parameters()) and other.step_count == 0
    make(True, **kept).load_state_dict(saved)


def test_best_pt_is_the_state_of_the_model_at_its_lowest_validation_loss(tmp_path):
    trainer = run(True)
    trainer.fit(3, output=tmp_path)
    model = run(True).model
    model.load_state_dict(torch.load(tmp_path / "best.pt", weights_only=True))
    trainer.load_best()
    assert_same_state(model.state_dict(), trainer.model.state_dict())
    assert trainer.evaluate(trainer._valid_batches) == pytest.approx(trainer.best.valid, rel=1e-6)


def test_early_stopping_keeps_the_best_model():
    trainer = make(True)
    losses = iter([3.0, 2.0, 2.5, 2.0, 2.1, 1.0])
    states = []

    def evaluate(batches):
        states.append([p.clone() for p in trainer.model.parameters()])
        return {"loss": next(losses)}

    trainer.evaluate = evaluate
    result = trainer.fit(10, patience=3)
    assert result.stopped == "patience" and [r.valid_loss for r in result.history] == [3.0, 2.0, 2.5, 2.0, 2.1]
    assert result.best.epoch == 2
    trainer.load_best()
    assert all_same_bits(states[1], trainer.model.parameters())


# ---- harm ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("delta", [True, False])
def test_a_loss_that_is_not_finite_is_not_stepped_along(delta, bad):
    trainer = make(delta)
    trainer._criterion = trainer._valid_criterion = lambda o, t: F.cross_entropy(o, t) + bad
    before = [p.clone() for p in trainer.model.parameters()]
    with pytest.raises(TrainerDiverged, match=r"StnTrainer: the training loss must be finite; got (nan|inf)\. .*Lower"):
        trainer.train_step(data())
    with pytest.raises(TrainerDiverged, match="the validation loss must be finite"):
        trainer.valid_step(data())
    assert all_same_bits(before, trainer.model.parameters())
    assert_nothing_left(trainer.model)


@pytest.mark.parametrize("delta", [True, False])
def test_a_refused_step_moves_no_running_statistics(delta):
    """The pass moved them before its loss was known: they are put back, in the very tensors that others may hold."""
    model = network(delta, dtype=torch.float32)
    model.module.insert(1, nn.BatchNorm1d(5))
    norm = model.module[1]
    trainer = make(delta, model)
    buffers, before = list(norm.buffers()), [b.clone() for b in norm.buffers()]
    x, y = data(dtype=torch.float32)
    for batch, error in (((x * torch.nan, y), TrainerDiverged), ((x, "no targets"), TypeError)):
        with pytest.raises(error):
            trainer.train_step(batch)
        assert all(a is b for a, b in zip(buffers, norm.buffers(), strict=True)) and all_same_bits(before, buffers)
    trainer.train_step((x, y))
    assert norm.num_batches_tracked == 1


class Recomputed(nn.Module):
    """Keeps no activations: each layer is computed again during the backward pass."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return checkpoint(self.module, x, use_reentrant=False)


@pytest.mark.parametrize("delta", [True, False])
def test_a_checkpointed_region_is_computed_again_at_the_same_sample(delta):
    trainers = []
    for wrapped in (False, True):
        model = network(delta)
        if wrapped:
            model.module[0] = Recomputed(model.module[0])
        trainers.append(make(delta, model, **({"linearize": False} if delta else {})))
        trainers[-1].train_step(data())
        trainers[-1].valid_step(data())
    found, wanted = (list(trainer.model.parameters()) for trainer in trainers)
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w, rtol=1e-12, atol=1e-14)


def test_a_gradient_that_is_not_finite_is_not_stepped_along():
    trainer = make(True)
    trainer._criterion = lambda o, t: (o * 0).abs().sqrt().mean()
    before = [p.clone() for p in trainer.model.parameters()]
    with pytest.raises(TrainerDiverged, match="the gradient of the training loss must be finite; got nan"):
        trainer.train_step(data())
    assert all_same_bits(before, trainer.model.parameters())


def test_a_validation_loss_that_is_not_finite_ends_the_run_and_leaves_the_last_checkpoint(tmp_path):
    trainer = run(True)
    trainer.fit(1, output=tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    trainer.evaluate = lambda batches: {"loss": float("nan")}
    with pytest.raises(TrainerDiverged, match="validation loss after epoch 2 must be finite; got nan"):
        trainer.fit(3, output=tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


ITERATOR = iter([data()])
BAD = {
    "no model": ({"model": nn.Linear(2, 2)}, TypeError, "model must be a StnModel; got Linear. .* to_delta_stn"),
    "not centred": ({"model": network(False)}, ValueError, "model must be centred; got centred=False. .* to_delta_stn"),
    "criterion": ({"criterion": 3}, TypeError, "criterion must be callable; got int"),
    "augment": ({"augment": 3}, TypeError, "augment must be callable; got int"),
    "regularizer": ({"regularizers": [3]}, TypeError, r"regularizers\[0\] must be callable; got int"),
    "batches": ({"train_batches": 3}, TypeError, "train_batches must be a DataLoader or another iterable"),
    "iterator": ({"valid_batches": ITERATOR}, ValueError, "valid_batches must be an iterable that can begin again"),
    "test": ({"test_batches": ITERATOR}, TypeError, "test_batches must be an iterable that can begin again"),
    "instance": (
        {"optimizer": torch.optim.SGD([torch.zeros(1)], lr=1.0)}, TypeError,
        "optimizer must be a function of the parameters; got SGD. Pass `lambda params",
    ),
    "other": (
        {"response_optimizer": lambda p: torch.optim.SGD([torch.zeros(1)], lr=1.0)}, ValueError,
        "response_optimizer must hold all of the parameters",
    ),
    "closure": ({"optimizer": torch.optim.LBFGS}, ValueError, "optimizer must step without a closure; got LBFGS"),
    "scales": (
        {"tune_scales": False, "scale_optimizer": sgd}, ValueError,
        "scale_optimizer must be None where scales are not tuned; got one. Pass tune_scales=True",
    ),
    "warmup": ({"warmup_epochs": -1}, ValueError, "warmup_epochs must be >= 0; got -1"),
    "steps": ({"train_steps": 0}, ValueError, "train_steps must be >= 1; got 0"),
    "entropy": ({"entropy_weight": float("nan")}, ValueError, "entropy_weight must be finite and >= 0; got nan"),
    "norm": ({"max_norm": 0.0}, ValueError, "max_norm must be finite and > 0; got 0.0"),
    "metrics": ({"metrics": {"loss": accuracy}}, ValueError, "metrics must have names besides 'loss'"),
    "generator": ({"generator": 3}, TypeError, r"generators\[0\] must be a torch.Generator; got int"),
    "scheduler": ({"scheduler": lambda o: 3}, TypeError, "scheduler must make a torch scheduler of"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    options, error, message = BAD[case]
    good = {"model": network(True), "criterion": F.cross_entropy, "train_batches": [data()], "valid_batches": [data()]}
    with pytest.raises(error, match=f"DeltaStnTrainer: {message}"):
        DeltaStnTrainer(**{**good, **options})


def test_bad_batches_and_losses():
    x, y = data()
    with pytest.raises(TypeError, match=r"a batch must be a pair \(x, y\); got 3 parts. Say in forward"):
        make(True).train_step((x, y, y))
    with pytest.raises(ValueError, match="a batch must hold a tensor with a dimension 0, that of its examples"):
        make(True, forward=lambda model, batch, carry: (model(x), y, None)).valid_step([1, 2])
    trainer = make(True)
    trainer._criterion = lambda o, t: F.cross_entropy(o, t, reduction="none")
    with pytest.raises(TypeError, match=r"criterion must return a scalar Tensor, a mean loss; got shape \(6,\)"):
        trainer.train_step((x, y))
    with pytest.raises(TypeError, match=r"metrics\['share'\] must return a scalar Tensor, .* got float"):
        make(True, metrics={"share": lambda o, t: 0.5}).evaluate([(x, y)])
    trainer._criterion = lambda o, t: o.detach().mean()
    with pytest.raises(ValueError, match="the training loss must depend on what it trains"):
        trainer.train_step((x, y))


@pytest.mark.parametrize("delta", [True, False])
def test_a_batch_without_examples_is_refused(delta):
    trainer = make(delta)
    before = [p.clone() for p in trainer.model.parameters()]
    empty = torch.zeros(0, 4, dtype=F64), torch.zeros(0, dtype=torch.int64)
    for step in (trainer.train_step, trainer.valid_step, lambda batch: trainer.evaluate([data(), batch])):
        with pytest.raises(
            ValueError, match=r"Trainer: a batch must hold at least one example; got an empty one\. Leave"
        ):
            step(empty)
    assert all_same_bits(before, trainer.model.parameters())


def test_loaders_that_keep_their_workers(tmp_path):
    """They may feed a run that is not saved; validation goes over its batches twice at a time."""
    loader = DataLoader(TensorDataset(*data()), batch_size=2, num_workers=1, persistent_workers=True)
    options = {"criterion": F.cross_entropy, "warmup_epochs": 0}
    trainer = DeltaStnTrainer(network(True), train_batches=loader, valid_batches=[data()], **options)
    for save in (trainer.state_dict, lambda: trainer.fit(1, output=tmp_path / "run")):
        with pytest.raises(
            ValueError, match="train_batches must start its workers anew for each epoch, where there is a"
        ):
            save()
    assert not list(tmp_path.iterdir())
    assert trainer.fit(2).best is not None and trainer.step_count == 6
    with pytest.raises(ValueError, match=r"valid_batches must allow two passes at a time; .*persistent_workers=False"):
        DeltaStnTrainer(network(True), train_batches=[data()], valid_batches=loader, **options)


def test_a_trainer_is_copied_unless_a_loader_is_in_the_middle_of_a_pass():
    whole = run(True, own_generators=True, warmup_epochs=5)
    whole.fit(1)
    part = copy.deepcopy(whole)
    random = torch.get_rng_state()
    whole.fit(2)
    torch.set_rng_state(random)
    part.fit(2)
    assert_same_run(whole, part)
    whole.advance()
    with pytest.raises(
        TypeError, match="train_batches must not be in the middle of a pass to be copied or pickled; got"
    ):
        copy.deepcopy(whole)
    other = run(True, own_generators=True, warmup_epochs=5)
    other.load_state_dict(whole.state_dict())
    assert other.step_count == whole.step_count


def test_trainers_show_all_of_their_options():
    """One list of options serves both; what is shown is the whole of it."""
    shared, delta = (inspect.signature(kind).parameters for kind in (StnTrainer, DeltaStnTrainer))
    assert set(delta) - set(shared) == {"response_optimizer", "linearize"} and set(shared) < set(delta)
    assert all(p.kind is not p.VAR_KEYWORD for p in delta.values())
    positional = {"model", "criterion", "train_batches", "valid_batches"}
    assert set(TrainerOptions.__annotations__) == set(shared) - positional - {"train_steps"}
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        make(True, colour=1)


def test_bad_arguments_of_fit(tmp_path):
    trainer = make(True)
    for options, error, message in (
        ({"epochs": -1}, ValueError, "epochs must be >= 0; got -1"),
        ({"epochs": 1, "patience": 0}, ValueError, "patience must be >= 1; got 0"),
        ({"epochs": 1, "resume": True}, ValueError, "output must be given to resume; got None"),
        ({"epochs": 1, "should_stop": 3}, TypeError, "should_stop must be callable; got int"),
    ):
        with pytest.raises(error, match=f"DeltaStnTrainer.fit: {message}"):
            trainer.fit(**options)
    with pytest.raises(RuntimeError, match="load_best: must come after an epoch; got none"):
        trainer.load_best()
    run(True).fit(1, output=tmp_path)
    trainer = run(True)
    trainer.train_step(data(dtype=torch.float32))
    trainer.fit(1)
    with pytest.raises(RuntimeError, match="resume must come before the first step; got a trainer of"):
        trainer.fit(2, output=tmp_path, resume=True)


# ---- the picture -----------------------------------------------------------------------------------------------------


def test_the_picture_of_a_run(tmp_path):
    pytest.importorskip("matplotlib")
    history = make(True).fit(2).history
    plot_history(history, tmp_path / "run.png", title="a run")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["run.png"]
    with pytest.raises(ValueError, match="plot_history: history must hold at least one epoch; got none"):
        plot_history([], tmp_path / "none.png")


@pytest.mark.parametrize(
    ("shape", "labels"),
    [((), None), ((3,), ["0", "1", "2"]), ((2, 2), ["0,0", "0,1", "1,0", "1,1"]), ((11,), ["range", "median of 11"])],
)
def test_the_lines_of_a_picture_are_told_apart(shape, labels):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    values = torch.arange(float(math.prod(shape))).reshape(shape).tolist()
    history = [EpochRecord(e, e, {}, {"loss": 1.0}, {}, {"a": values}, {}, 0.0) for e in (1, 2)]
    axes = Figure().add_subplot()
    plots._path(axes, history, "a")
    legend = axes.get_legend()
    assert labels == (None if legend is None else [text.get_text() for text in legend.get_texts()])
    lines = axes.get_lines()
    assert len({line.get_color() for line in lines}) == len(lines) == (len(labels) if labels and shape != (11,) else 1)


def test_a_picture_without_matplotlib_says_what_is_missing(tmp_path, monkeypatch):
    history = make(True).fit(1).history
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="plot_history: needs Matplotlib"):
        plot_history(history, tmp_path / "run.png")
