"""Weight decay, label smoothing and activation regularization: equal to their definitions, example by example."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nestopt_ext.response import (
    ActivationRegularization,
    Cutout,
    DeltaStnConv2d,
    DeltaStnLinear,
    DeltaStnTrainer,
    HyperParameters,
    LabelSmoothing,
    StnConv2d,
    StnDropout,
    StnEmbedding,
    StnLinear,
    StnLSTM,
    StnModel,
    WeightDecay,
)
from nestopt_ext.response._layer import StnLayer
from nestopt_ext.response.label_smoothing import smoothed_cross_entropy

DOUBLE = {"dtype": torch.float64}


def network(linear=StnLinear, n=2):
    net = nn.Sequential(linear(4, 5, num_hparams=n, **DOUBLE), nn.Linear(5, 3, **DOUBLE), nn.BatchNorm1d(3, **DOUBLE))
    nn.init.normal_(net[0].gate_weight)
    return net


def model_of(module, *, centred=False, shape=()):
    hparams = HyperParameters(**DOUBLE).add("decay", 0.1, low=0, transform="exp", shape=shape)
    return StnModel(module, hparams.add("other", 0.5), centred=centred)


def by_definition(model, h, decay, bias):
    """1/2 sum decay * w^2 with weights of its own for each example, averaged; decay [B, weights]."""
    centred = model.hparams.unconstrained.detach() if model.centred else 0
    penalties = []
    for row, coefficients in zip(h - centred, decay, strict=True):
        parts = []
        for module in model.module.modules():
            responses = {}
            if isinstance(module, StnLayer):
                responses = {r.name: r.at(row) for r in module.responses()}
            for name, parameter in module.named_parameters(recurse=False):
                if not name.startswith(("response_", "gate_")) and (bias or parameter.dim() > 1):
                    parts.append(responses.get(name, parameter).reshape(-1))
        penalties.append(0.5 * (coefficients * torch.cat(parts).square()).sum())
    return torch.stack(penalties).mean()


def per_weight(decay, bias, layers):
    """The coefficient of each weight, [B, weights], of decay [B, *shape]."""
    kept = [
        [p for n, p in layer.named_parameters() if not n.startswith(("response_", "gate_")) and (bias or p.dim() > 1)]
        for layer in layers
    ]
    counts = [sum(p.numel() for p in parameters) for parameters in kept]
    if decay.dim() == 1:
        return decay.unsqueeze(1).expand(-1, sum(counts))
    return decay if decay.shape[1] == sum(counts) else decay.repeat_interleave(torch.tensor(counts), 1)


# ---- weight decay ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["global", "layers", "weights"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("centred", [False, True])
def test_weight_decay_is_its_definition_with_weights_of_their_own_for_each_example(kind, bias, centred):
    weights = 20 + 15 + (5 + 3 + 3 + 3 if bias else 0)
    shape = {"global": (), "layers": (3 if bias else 2,), "weights": (weights,)}[kind]
    n = len(model_of(nn.Identity(), shape=shape).hparams)
    model = model_of(network(DeltaStnLinear if centred else StnLinear, n), centred=centred, shape=shape)
    h = model.hparams.perturbed(6).detach().requires_grad_()
    with model.at(h) as sample:
        found = WeightDecay("decay", bias=bias)(model, None)
    layers = list(model.module)[: 3 if bias else 2]
    expected = by_definition(model, h, per_weight(sample.values["decay"], bias, layers), bias)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    inputs = [p for p in model.module.parameters() if bias or p.dim() > 1] + [h]
    for mine, true in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-11, atol=1e-13)


LAYERS = {
    "convolution": (lambda: StnConv2d(3, 4, 3, num_hparams=2, **DOUBLE), 112),
    "embedding": (lambda: StnEmbedding(7, 4, num_hparams=2, **DOUBLE), 28),
    "lstm": (lambda: StnLSTM(3, 2, 2, bidirectional=True, num_hparams=2, **DOUBLE), 2 * (8 * 3 + 8 * 4 + 2 * 16) + 64),
}


@pytest.mark.parametrize(("layer", "weights"), LAYERS.values(), ids=LAYERS)
def test_every_response_layer_decays_with_its_gates(layer, weights):
    model = model_of(layer())
    for name, parameter in model.module.named_parameters():
        if name.startswith("gate_weight"):
            nn.init.normal_(parameter)
    h = model.hparams.perturbed(5).detach()
    with model.at(h) as sample:
        found = WeightDecay("decay", bias=True)(model)
    decay = sample.values["decay"].unsqueeze(1).expand(-1, weights)
    torch.testing.assert_close(found, by_definition(model, h, decay, True), rtol=1e-12, atol=0)


def test_strength_zero_and_the_centre():
    model = model_of(network(DeltaStnLinear), centred=True)
    with model.at_centre():
        found = WeightDecay("decay")(model)
    expected = 0.05 * (model.module[0].weight.square().sum() + model.module[1].weight.square().sum())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    off = StnModel(model.module, HyperParameters(**DOUBLE).add("decay", 0.0).add("other", 0.0), centred=True)
    with off.at_centre():
        assert WeightDecay("decay")(off).item() == 0


def test_the_layers_to_decay_may_be_chosen_and_count_once():
    model = model_of(network())
    tied = nn.Linear(5, 3, **DOUBLE)
    tied.weight = model.module[1].weight
    model.module.append(tied)
    with model.at_centre():
        every = WeightDecay("decay")(model)
        first, second = (WeightDecay("decay", model.module[i])(model) for i in (0, 1))
        again = WeightDecay("decay", model.module[1], tied, model.module[1])(model)
    torch.testing.assert_close(first + second, every, rtol=1e-12, atol=0)
    assert again.item() == second.item()


def test_no_graph_leads_to_the_coefficient_and_one_leads_to_the_gates():
    model = model_of(network())
    h = model.hparams.perturbed(3)
    with model.at(h):
        penalty = WeightDecay("decay")(model)
    of_h = torch.autograd.grad(penalty, h, retain_graph=True)[0]
    model.module[0].gate_weight.requires_grad_(False).zero_()
    with model.at(h):  # without gates nothing depends on the hyperparameters, though the coefficient does
        assert torch.autograd.grad(WeightDecay("decay")(model), h)[0].abs().sum() == 0
    assert of_h.abs().sum() > 0


def test_weight_decay_is_differentiable_twice_and_forward():
    layer = StnLinear(2, 3, num_hparams=2, **DOUBLE)
    model = model_of(layer)
    names = ("weight", "response_weight", "gate_weight")
    h = model.hparams.perturbed(4).detach()

    def penalty(*tensors):
        stand_in = copy.copy(layer)
        stand_in._parameters = {**layer._parameters, **dict(zip(names, tensors, strict=True))}
        with model.at(h):
            return WeightDecay("decay", stand_in)(model)

    point = tuple(torch.randn_like(getattr(layer, name)).requires_grad_() for name in names)
    assert torch.autograd.gradcheck(penalty, point, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(penalty, point, check_fwd_over_rev=True)


def test_weight_decay_of_half_precision_is_summed_in_float32(device):
    layer = nn.Linear(300, 300, device=device, dtype=torch.float16)
    nn.init.constant_(layer.weight, 2.0)
    model = StnModel(layer, HyperParameters(device=device).add("decay", 1.0), centred=True)
    with model.at_centre():
        assert WeightDecay("decay")(model).item() == 180_000  # more than float16 has


def test_weight_decay_refuses_what_it_cannot_decay():
    model = model_of(network())
    with pytest.raises(RuntimeError, match="WeightDecay: must be called with a sample"):
        WeightDecay("decay")(model)
    with model.at_centre(), pytest.raises(ValueError, match="modules must have weights to decay; got none"):
        WeightDecay("decay", nn.ReLU(), model.module[2])(model)
    model = model_of(network(n=4), shape=(3,))
    with model.at_centre(), pytest.raises(ValueError, match=r"must have shape \(\), \(2,\) for layers or \(35,\) for"):
        WeightDecay("decay")(model)


# ---- label smoothing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [(), (3,), (2, 2)])
@pytest.mark.parametrize("kind", ["indices", "ignored", "probabilities"])
def test_label_smoothing_is_torchs_for_each_example(extra, kind, device):
    logits = torch.randn(4, 5, *extra, device=device, **DOUBLE, requires_grad=True)
    smoothing = torch.tensor([0.0, 0.1, 0.5, 1.0], device=device, **DOUBLE)
    targets = torch.randint(5, (4, *extra), device=device)
    if kind == "ignored":
        targets[1] = -100
    if kind == "probabilities":
        targets = torch.randn_like(logits).softmax(1)
    found = smoothed_cross_entropy(logits, targets, smoothing)
    rows = [
        F.cross_entropy(logits[i : i + 1], targets[i : i + 1], label_smoothing=smoothing[i].item())
        for i in range(4)
        if kind != "ignored" or i != 1
    ]
    expected = torch.stack(rows).mean()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    found_grad, true_grad = (torch.autograd.grad(loss, logits)[0] for loss in (found, expected))
    torch.testing.assert_close(found_grad, true_grad, rtol=1e-11, atol=1e-13)


def test_label_smoothing_is_differentiable_twice_and_forward():
    logits, smoothing = torch.randn(3, 4, **DOUBLE, requires_grad=True), torch.rand(3, **DOUBLE, requires_grad=True)
    targets = torch.tensor([0, 3, -100])

    def loss(z, e):
        return smoothed_cross_entropy(z, targets, e)

    assert torch.autograd.gradcheck(loss, (logits, smoothing), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, (logits, smoothing), check_fwd_over_rev=True)


def test_the_criterion_reads_the_sample_and_in_eval_mode_nothing():
    hparams = HyperParameters().add("smoothing", 0.25, low=0, high=1)
    model = StnModel(nn.Identity(), hparams, centred=True)
    logits, targets = torch.randn(6, 3), torch.randint(3, (6,))
    criterion = LabelSmoothing("smoothing")
    h = hparams.perturbed(6)
    with model.at(h) as sample:
        loss = criterion(logits.requires_grad_(), targets)
    torch.testing.assert_close(loss, smoothed_cross_entropy(logits, targets, sample.values["smoothing"]))
    assert torch.autograd.grad(loss, h, allow_unused=True) == (None,)
    with pytest.raises(RuntimeError, match="LabelSmoothing: must be called with a sample"):
        criterion(logits, targets)
    assert torch.allclose(criterion.eval()(logits, targets), F.cross_entropy(logits, targets))


def test_label_smoothing_says_what_does_not_fit():
    with pytest.raises(ValueError, match=r"smoothing must have one number for each of 6 examples.*got shape \(4,\)"):
        smoothed_cross_entropy(torch.randn(6, 3), torch.zeros(6).long(), torch.zeros(4))
    nothing = smoothed_cross_entropy(torch.randn(2, 3), torch.tensor([-100, -100]), torch.zeros(1))
    assert nothing.isnan()


# ---- activation regularization --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [False, True])
def test_activation_regularization_is_its_definition(batch_first):
    hparams = HyperParameters(**DOUBLE).add("alpha", 2.0, low=0).add("beta", 1.0, low=0)
    model = StnModel(nn.Identity(), hparams, centred=True)
    raw, dropped = (torch.randn(5, 4, 3, **DOUBLE, requires_grad=True) for _ in range(2))  # [T, B, units]
    h = hparams.perturbed(4)
    dims = {"batch_dim": 0, "time_dim": 1} if batch_first else {}
    shown = [t.transpose(0, 1) if batch_first else t for t in (dropped, raw)]
    with model.at(h) as sample:
        found = ActivationRegularization("alpha", "beta", select=lambda o: (o["d"], o["r"]), **dims)(
            model, {"d": shown[0], "r": shown[1]}
        )
        ar = ActivationRegularization("alpha", **dims)(model, shown[0])
        tar = ActivationRegularization(None, "beta", **dims)(model, shown[1])
    alpha, beta = sample.values["alpha"], sample.values["beta"]
    expected_ar = sum(alpha[b] * dropped[:, b].square().mean() for b in range(4)) / 4
    expected_tar = sum(beta[b] * (raw[1:, b] - raw[:-1, b]).square().mean() for b in range(4)) / 4
    torch.testing.assert_close(ar, expected_ar, rtol=1e-12, atol=0)
    torch.testing.assert_close(tar, expected_tar, rtol=1e-12, atol=0)
    torch.testing.assert_close(found, expected_ar + expected_tar, rtol=1e-12, atol=0)
    assert torch.autograd.grad(found, h, allow_unused=True) == (None,)


def test_one_time_step_has_no_changes():
    hparams = HyperParameters().add("beta", 1.0, low=0)
    model = StnModel(nn.Identity(), hparams, centred=True)
    with model.at_centre():
        assert ActivationRegularization(None, "beta")(model, torch.randn(1, 2, 3)).item() == 0


def test_activation_regularization_says_what_does_not_fit():
    model = StnModel(nn.Identity(), HyperParameters().add("alpha", 1.0, shape=(2,)), centred=True)
    with model.at_centre():
        for error, outputs, message in (
            (TypeError, (torch.ones(2), [1]), "Give select"),
            (ValueError, torch.ones(3), r"must have dimensions 0 \(time\) and 1 \(examples\); got shape \(3,\)"),
            (ValueError, torch.ones(3, 4, 5), r"alpha must be one number for each of 4 examples; got shape \(1, 2\)"),
        ):
            regularizer = ActivationRegularization("alpha", select=lambda o: o[1] if isinstance(o, tuple) else o)
            with pytest.raises(error, match=message):
                regularizer(model, outputs)
    with pytest.raises(ValueError, match="alpha or beta must name a hyperparameter; got None for both"):
        ActivationRegularization(None)
    with pytest.raises(ValueError, match="time_dim must differ from batch_dim; got 0 for both"):
        ActivationRegularization("alpha", batch_dim=0)


# ---- together -------------------------------------------------------------------------------------------------------


def test_a_discrete_hyperparameter_learns_through_gates_only():
    layer = DeltaStnLinear(4, 1, bias=False, num_hparams=2, **DOUBLE)
    nn.init.normal_(layer.gate_weight)
    hparams = HyperParameters(**DOUBLE).add("holes", 1, low=0, high=5, discrete=True)
    hparams.add("rate", 0.5, low=0, high=0.9)
    model = StnModel(nn.Sequential(StnDropout("rate"), layer), hparams, centred=True)
    x = torch.randn(6, 4, **DOUBLE)
    torch.manual_seed(1)
    found = torch.autograd.grad(model(x).sum(), hparams.unconstrained)[0]
    torch.manual_seed(1)
    with model.at_centre():
        dropped = model.module[0](x)
    response = F.linear(dropped, layer.response_weight).sum(0)  # d y / d gate
    torch.testing.assert_close(found, response @ layer.gate_weight, rtol=1e-12, atol=0)
    assert found.abs().min() > 0


def test_a_trainer_takes_all_of_them():
    hparams = HyperParameters().add("rate", 0.2, low=0, high=0.9).add("decay", 1e-3, low=0, transform="exp")
    hparams.add("smoothing", 0.1, low=0, high=1).add("length", 3, low=1, high=6, discrete=True)
    n = len(hparams)
    net = nn.Sequential(
        DeltaStnConv2d(1, 3, 3, num_hparams=n),
        nn.ReLU(),
        nn.Flatten(),
        StnDropout("rate"),
        DeltaStnLinear(48, 4, num_hparams=n),
    )
    model = StnModel(net, hparams, centred=True)
    batches = [(torch.randn(8, 1, 6, 6), torch.randint(4, (8,))) for _ in range(3)]
    trainer = DeltaStnTrainer(
        model,
        LabelSmoothing("smoothing"),
        batches,
        batches,
        valid_criterion=F.cross_entropy,
        augment=Cutout("length"),
        regularizers=[WeightDecay("decay")],
        warmup_epochs=1,
        train_steps=1,
    )
    before, started = hparams.unconstrained.detach().clone(), hparams.values()
    weights = [p.detach().clone() for p in net.parameters()]
    result = trainer.fit(3)
    assert len(result.history) == 3
    assert all(not torch.equal(a, p) for a, p in zip(weights, net.parameters(), strict=True) if p.numel() > 1)
    assert (before != hparams.unconstrained).all()
    assert all(value.isfinite().all() for value in hparams.values().values())
    assert hparams.history["step"] == sorted(hparams.history["step"])
    assert hparams.values()["rate"] != started["rate"]
