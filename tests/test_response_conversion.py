"""Ordinary models become response models, and ordinary again."""

import copy
import pickle
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, prune

from nestopt_ext.response import DeltaStnLinear, HyperParameters, StnDropout, StnLinear, to_delta_stn, to_stn
from nestopt_ext.response._layer import StnLayer

CONVERSIONS = [to_stn, to_delta_stn]


def hyper_parameters():
    return HyperParameters(dtype=torch.float64).add("decay", 0.3, low=0.0).add("strength", 0.2, low=0.0, high=1.0)


class Mlp(nn.Module):
    """Control flow, a list of layers, a dict of layers, a layer called twice, and one under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.middle = nn.ModuleList([nn.Linear(8, 8, bias=False), nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2))])
        self.heads = nn.ModuleDict({"small": nn.Linear(8, 3), "big": nn.Linear(8, 3)})
        self.alias = self.first
        self.held = [self.middle[0]]

    def forward(self, x, big=False):
        y = torch.tanh(self.alias(x))
        for layer in self.middle:
            y = y + torch.tanh(layer(y))
        y = torch.tanh(self.held[0](y))
        return self.heads["big" if big else "small"](y)


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=2)
        self.norm2 = nn.BatchNorm2d(channels)
        self.drop = nn.Dropout2d(0.1)

    def forward(self, x):
        y = self.drop(F.relu(self.norm1(self.conv1(x))))
        return F.relu(x + self.norm2(self.conv2(y)))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding_mode="reflect", padding=1), nn.BatchNorm2d(4))
        self.blocks = nn.Sequential(Block(4), nn.MaxPool2d(2), Block(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class LanguageModel(nn.Module):
    """Time first, states passed along, the decoder tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Embedding(7, 5)
        self.rnn = nn.LSTM(5, 5, num_layers=2)
        self.drop = nn.Dropout(0.3)
        self.decoder = nn.Linear(5, 7)
        self.decoder.weight = self.encoder.weight

    def forward(self, tokens, state=None):
        y, state = self.rnn(self.drop(self.encoder(tokens)), state)
        return self.decoder(self.drop(y)), state


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=6, dropout=0.1, batch_first=True)
        self.embed = nn.Linear(6, 8)
        self.place = nn.Parameter(torch.randn(3, 8))
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x) + self.place))


def mlp():
    return Mlp().double(), torch.randn(4, 6, dtype=torch.float64), {}


def resnet():
    model = ResNet().double()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return model, torch.randn(4, 2, 8, 8, dtype=torch.float64), {}


def language_model():
    return LanguageModel().double(), torch.randint(7, (3, 4)), {"batch_dim": 1}


def transformer():
    return Transformer().double(), torch.randn(4, 3, 6, dtype=torch.float64), {}


MODELS = [mlp, resnet, language_model, transformer]


def tensor(out):
    return out[0] if isinstance(out, tuple) else out


def randomized(model):
    with torch.no_grad():
        for parameter in model.response_parameters():
            parameter.normal_(std=0.4)
    return model


def responded(model, gate_input):
    """The weights of the plain model at one gate input."""
    return {
        f"{name}.{response.name}": response.at(gate_input).detach()
        for name, layer in model.module.named_modules()
        if isinstance(layer, StnLayer)
        for response in layer.responses()
    }


def example(x, i, batch_dim):
    return x.narrow(batch_dim, i, 1)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("convert", CONVERSIONS)
def test_each_example_is_answered_by_the_plain_model_with_its_weights(make, convert):
    plain, x, options = make()
    plain.eval()
    model = randomized(convert(plain, hyper_parameters(), **options))
    h0 = model.hparams.unconstrained.detach()
    h = model.hparams.perturbed(4).detach()
    batch_dim = options.get("batch_dim", 0)
    with model.at(h):
        out = tensor(model(x))
    for i in range(4):
        weights = responded(model, h[i] - h0 if convert is to_delta_stn else h[i])
        row = torch.func.functional_call(plain, weights, (example(x, i, batch_dim),), tie_weights=False)
        torch.testing.assert_close(example(out, i, batch_dim), tensor(row), rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", MODELS)
def test_the_linearized_answer_is_that_of_forward_mode_through_the_plain_model(make):
    plain, x, options = make()
    plain.eval()
    model = randomized(to_delta_stn(plain, hyper_parameters(), **options))
    h0 = model.hparams.unconstrained.detach()
    h = model.hparams.perturbed(4).detach()
    batch_dim = options.get("batch_dim", 0)
    with model.at(h, linearized=True):
        out = tensor(model(x))
    for grad_mode in (torch.no_grad(), torch.enable_grad()):
        with grad_mode, model.at(h, linearized=True):
            torch.testing.assert_close(tensor(model(x)), out, rtol=0, atol=1e-13)
    weights = responded(model, torch.zeros_like(h0))
    for i in range(4):
        row = example(x, i, batch_dim)
        tangents = {name: w - weights[name] for name, w in responded(model, h[i] - h0).items()}

        def answer(weights, row=row):
            return tensor(torch.func.functional_call(plain, weights, (row,), tie_weights=False))

        with sdpa_kernel(SDPBackend.MATH):
            primal, tangent = torch.func.jvp(answer, (weights,), (tangents,))
        assert tangent.abs().max() > 1e-3
        torch.testing.assert_close(example(out, i, batch_dim), primal + tangent, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("convert", CONVERSIONS)
def test_export_answers_as_the_model_and_loads_into_the_original(make, convert):
    plain, x, options = make()
    model = randomized(convert(plain, hyper_parameters(), **options))
    rng = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error" if convert is to_delta_stn or make is not language_model else "ignore")
        exported = model.export()
    assert torch.equal(torch.get_rng_state(), rng)
    assert [type(part) for part in exported.modules()] == [
        type(part) for part in plain.modules()
    ] or make is transformer
    assert not any(type(part).__module__.startswith("nestopt_ext") for part in exported.modules())
    assert [part.training for part in exported.modules()] == [part.training for part in plain.modules()]
    model.eval()
    wanted = tensor(model(x))
    torch.testing.assert_close(tensor(exported.eval()(x)), wanted, rtol=0, atol=1e-13)
    if not (convert is to_stn and make is language_model):  # there the tie cannot hold
        plain.load_state_dict(exported.state_dict(), strict=True)
        torch.testing.assert_close(tensor(plain.eval()(x)), wanted, rtol=0, atol=1e-13)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert own.isdisjoint(parameter.data_ptr() for parameter in exported.parameters())


@pytest.mark.parametrize("make", MODELS)
def test_the_given_model_is_copied(make):
    plain, x, options = make()
    plain.eval()
    before = copy.deepcopy(plain)
    model = to_delta_stn(plain, hyper_parameters(), **options)
    torch.testing.assert_close(tensor(model(x)), tensor(plain(x)), rtol=0, atol=1e-13)
    pointers = {t.data_ptr() for t in (*plain.parameters(), *plain.buffers())}
    assert pointers.isdisjoint(t.data_ptr() for t in (*model.parameters(), *model.buffers()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert [type(part) for part in plain.modules()] == [type(part) for part in before.modules()]
    for name, value in before.state_dict().items():
        assert torch.equal(plain.state_dict()[name], value)


@pytest.mark.parametrize("make", MODELS)
def test_general_and_response_parameters_are_all_there_are(make):
    plain, x, options = make()
    model = to_delta_stn(plain, hyper_parameters(), **options)
    general, response = list(model.general_parameters()), list(model.response_parameters())
    assert {id(p) for p in (*general, *response)} == {id(p) for p in model.module.parameters()}
    assert len({id(p) for p in (*general, *response)}) == len(general) + len(response)
    assert sorted(p.shape for p in general) == sorted(p.shape for p in plain.parameters())
    randomized(model)
    for parameter in general:
        parameter.requires_grad_(False)
    with model.at(model.hparams.perturbed(4), linearized=True):
        tensor(model(x)).square().sum().backward()
    unused = set(model.module.heads.big.parameters()) if make is mlp else set()
    assert all((p.grad is None) == (p in unused) for p in response)
    assert model.hparams.unconstrained.grad.abs().max() > 0


def test_report_of_a_network_with_control_flow():
    plain, *_ = mlp()
    model = to_stn(plain, hyper_parameters())
    assert list(model.report.converted) == ["first", "middle.0", "middle.1.0", "heads.small", "heads.big"]
    assert set(model.report.converted.values()) == {"Linear -> StnLinear"}
    assert model.report.dropouts == {"middle.1.1": "middle.1.1"} and not model.report.left
    assert model.module.alias is model.module.first and model.module.held[0] is model.module.middle[0]
    assert isinstance(model.module.alias, StnLinear)
    assert not isinstance(model.module.alias, DeltaStnLinear)
    other = pickle.loads(pickle.dumps(to_stn(nn.Linear(3, 2), hyper_parameters())))
    assert str(other.report) == "responds    (the model): Linear -> StnLinear"


def test_report_of_a_residual_network():
    plain, *_ = resnet()
    report = to_delta_stn(plain, hyper_parameters()).report
    assert report.converted["blocks.0.conv2"] == "Conv2d -> DeltaStnConv2d"
    assert report.dropouts == {"blocks.0.drop": "blocks.0.drop", "blocks.2.drop": "blocks.2.drop"}
    assert set(report.left.values()) == {"normalization has no response form"}
    assert list(report.left) == ["stem.1", *(f"blocks.{i}.norm{j}" for i in (0, 2) for j in (1, 2))]


def test_a_decoder_is_tied_to_the_plain_part_of_its_embedding():
    plain, _tokens, options = language_model()
    model = to_stn(plain, hyper_parameters(), **options)
    assert set(model.report.converted) == {"encoder", "rnn"}
    assert model.report.left == {
        "decoder": "it shares parameters with 'encoder', which responds; it uses the plain part of them"
    }
    assert model.module.decoder.weight is model.module.encoder.weight
    randomized(model)
    with pytest.warns(UserWarning, match="weight of encoder responds and is not shared any more"):
        exported = model.export()
    assert not torch.equal(exported.encoder.weight, exported.decoder.weight)
    delta = to_delta_stn(plain, hyper_parameters(), **options).export()
    assert delta.encoder.weight is delta.decoder.weight


def test_attention_is_left_alone_and_fast_paths_are_not_taken():
    plain, x, _ = transformer()
    model = randomized(to_delta_stn(plain, hyper_parameters()))
    left = model.report.left
    assert left["encoder.layers.0.self_attn.out_proj"].startswith("nn.MultiheadAttention reads the weights")
    assert left[""] == "Transformer has no response form"
    assert "encoder.layers.1.linear2" in model.report.converted
    model.eval()
    with model.at(model.hparams.perturbed(4).detach()):
        alive = model(x)
        with torch.no_grad():
            torch.testing.assert_close(model(x), alive, rtol=0, atol=1e-13)
    assert torch.backends.mha.get_fastpath_enabled()


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Marked(nn.Linear):
    mark = 3


class Started(nn.Linear):
    def __init__(self, size):
        super().__init__(size, size)
        nn.init.eye_(self.weight)


def left_alone(layer):
    model = to_stn(nn.Sequential(nn.Linear(4, 4), layer), hyper_parameters())
    assert type(model.module[1]) is type(layer)
    return model.report.left["1"]


def replaced_forward():
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x
    return layer


@pytest.mark.parametrize(
    "layer, reason",
    [
        (lambda: Scaled(4, 4), "Scaled is a Linear with methods or attributes of its own"),
        (lambda: Marked(4, 4), "Marked is a Linear with methods or attributes of its own"),
        (replaced_forward, "its forward was replaced"),
        (lambda: nn.LazyLinear(4), "it is lazy. Call the model with a batch first"),
        (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), "its weight is computed by a parametrization"),
        (lambda: prune.random_unstructured(nn.Linear(4, 4), "weight", 0.5), "its parameters are bias, weight_orig"),
        (lambda: nn.Linear(4, 4).requires_grad_(False), "its parameters are frozen"),
        (lambda: nn.Linear(4, 4, dtype=torch.complex64), "its parameters are not real"),
        (lambda: nn.GRU(4, 4), "GRU has no response form"),
        (lambda: nn.LSTM(4, 4, proj_size=2), "it has projections"),
        (lambda: nn.LayerNorm(4), "normalization has no response form"),
        (lambda: nn.AlphaDropout(0.5), "AlphaDropout has no response form"),
        (lambda: nn.Dropout(0.97), r"its rate 0.97 is outside of the range \(0, 0.95\)"),
        (lambda: StnLinear(4, 4, num_hparams=2), "it is a response layer already"),
    ],
)
def test_what_is_left_alone_and_why(layer, reason):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = layer()
    assert re.match(reason, left_alone(layer))


def test_a_subclass_that_only_starts_otherwise_is_converted():
    model = to_stn(nn.Sequential(Started(3)), hyper_parameters())
    assert torch.equal(model.module[0].weight, torch.eye(3)) and isinstance(model.module[0], StnLinear)
    assert type(model.export()[0]) is nn.Linear


def test_adaptive_softmax_is_left_alone():
    plain = nn.ModuleDict({"body": nn.Linear(4, 4), "loss": nn.AdaptiveLogSoftmaxWithLoss(4, 9, [3])})
    report = to_stn(plain, hyper_parameters()).report
    assert list(report.converted) == ["body"]
    assert report.left["loss.head"].startswith("nn.AdaptiveLogSoftmaxWithLoss calls its layers with some")


def test_what_a_call_left_on_a_module_is_copied_without_its_graph():
    plain = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    plain[0].last = plain.last = plain[0](torch.ones(2, 3))
    model = to_delta_stn(plain, hyper_parameters())
    assert model.module.last is model.module[0].last
    assert torch.equal(model.module.last, plain.last) and not model.module.last.requires_grad


def test_a_traced_model_is_converted():
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    traced = torch.fx.symbolic_trace(plain)
    model = randomized(to_delta_stn(traced, hyper_parameters()))
    assert list(model.report.converted) == ["0", "2"] and not model.report.left
    x, h = torch.randn(4, 3, dtype=torch.float64), model.hparams.perturbed(4)
    same = randomized(to_delta_stn(plain, hyper_parameters()))
    same.load_state_dict(model.state_dict())
    with model.at(h), same.at(h):
        assert torch.equal(model.module(x), same.module(x))


def test_two_linear_layers_that_share_a_weight():
    plain = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    plain[2].weight = plain[0].weight
    model = to_delta_stn(plain, hyper_parameters())
    assert list(model.report.converted) == ["0", "1"]
    assert model.module[2].weight is model.module[0].weight


def test_what_stands_on_modules_is_kept():
    plain = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2, dtype=torch.float64))
    calls = []
    plain[0].register_forward_hook(lambda module, args, out: calls.append(type(module).__name__))
    plain[0].note, plain[1].note = {"kept": 1}, "drop"
    plain[0].bias.requires_grad_(False)
    plain[1].eval()
    plain.training = False
    model = to_delta_stn(plain, hyper_parameters())
    first, drop, last = model.module
    assert not model.training and not model.module.training and first.training and not drop.training
    assert first.note == {"kept": 1} and first.note is not plain[0].note and drop.note == "drop"
    assert first.weight.requires_grad and not first.bias.requires_grad
    assert {p.dtype for p in first.parameters()} == {torch.float32}
    assert {p.dtype for p in last.parameters()} == {torch.float64}
    first(torch.ones(2, 3))
    assert calls == ["DeltaStnLinear"]
    back = model.export()
    assert back[0].note == {"kept": 1} and back[1].note == "drop" and not hasattr(back[0], "num_hparams")
    assert not back[0].bias.requires_grad and back[0].training and not back[1].training
    back[0](torch.ones(2, 3))
    assert calls == ["DeltaStnLinear", "Linear"]


def test_a_frozen_parameter_does_not_respond():
    plain = nn.Linear(3, 2).double()
    plain.weight.requires_grad_(False)
    model = to_stn(plain, hyper_parameters())
    with torch.no_grad():
        model.module.gate_weight.normal_()
    with model.at(model.hparams.perturbed(4)):
        moved = [model(x) - plain(x) for x in torch.randn(2, 4, 3, dtype=torch.float64)]
    assert moved[0].abs().min() > 0
    torch.testing.assert_close(moved[0], moved[1], rtol=0, atol=1e-12)  # a bias does not see the input
    assert not model.module.response_weight.requires_grad and model.module.response_bias.requires_grad


def test_devices_are_kept(device):
    plain = Mlp().to(device)
    hparams = HyperParameters().add("decay", 0.3, low=0.0)
    model = to_delta_stn(plain, hparams)
    assert {p.device.type for p in model.parameters()} == {device.type}
    with model.at(model.hparams.perturbed(2), linearized=True):
        model(torch.ones(2, 6, device=device)).sum().backward()


def test_meta_models_are_converted():
    with torch.device("meta"):
        model = to_stn(Mlp(), HyperParameters().add("decay", 0.3, low=0.0))
    assert {p.device.type for p in model.module.parameters()} == {"meta"}


class TestDropouts:
    plain = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Dropout1d(0.0), nn.Linear(4, 2))

    def test_each_has_a_hyperparameter(self):
        hparams = hyper_parameters()
        model = to_stn(self.plain, hparams)
        assert list(hparams.entries) == ["decay", "strength", "1", "2"]
        assert hparams.values()["1"].item() == pytest.approx(0.5)
        assert hparams.values()["2"].item() == pytest.approx(0.05)
        assert hparams.entries["1"].low == 0 and hparams.entries["1"].high == 0.95
        assert model.module[0].gate_weight.shape == (8, 4)
        hparams.assign({"1": 0.25, "2": 0.125})
        drops = model.export()[1:3]
        assert [(type(drop), pytest.approx(drop.p)) for drop in drops] == [(nn.Dropout, 0.25), (nn.Dropout1d, 0.125)]

    def test_one_hyperparameter_for_all(self):
        hparams = hyper_parameters()
        model = to_stn(self.plain, hparams, dropout="rate")
        assert list(hparams.entries) == ["decay", "strength", "rate"]
        assert hparams.values()["rate"].item() == pytest.approx(0.5)
        assert model.report.dropouts == {"1": "rate", "2": "rate"}

    def test_those_that_are_named(self):
        hparams = hyper_parameters().add("rate", 0.2, low=0.0, high=1.0)
        model = to_stn(self.plain, hparams, dropout={"1": "rate"})
        assert len(hparams) == 3 and isinstance(model.module[1], StnDropout)
        assert model.report.left == {"2": "`dropout` gives it no hyperparameter"}
        assert type(model.module[2]) is nn.Dropout1d

    def test_none_at_all(self):
        assert not to_stn(self.plain, hyper_parameters(), dropout={}).report.dropouts

    def test_rates_of_units(self):
        hparams = HyperParameters().add("rates", 0.5, low=0.0, high=1.0, shape=(4,))
        model = to_stn(self.plain, hparams, dropout={"1": "rates"})
        hparams.assign({"rates": torch.tensor([0.2, 0.4, 0.6, 0.8])})
        assert model(torch.ones(5, 3)).shape == (5, 2)
        with pytest.warns(UserWarning, match="1 has a rate for each of 4 units: the plain one has their mean, 0.5"):
            assert model.export()[1].p == pytest.approx(0.5)

    def test_a_model_of_tuned_dropouts_alone_trains(self):
        model = to_delta_stn(self.plain, HyperParameters())
        assert list(model.hparams.entries) == ["1", "2"]
        with model.at(model.hparams.perturbed(6), linearized=True):
            assert model(torch.ones(6, 3)).shape == (6, 2)


def test_options_go_to_what_they_name():
    plain, tokens, options = language_model()
    hparams = hyper_parameters().add("words", 0.1, low=0.0, high=1.0).add("connections", 0.4, low=0.0, high=1.0)
    given = {"encoder": {"word_dropout": "words"}, "rnn": {"weight_dropout": "connections"}, "drop": {"unit_dim": None}}
    model = to_delta_stn(plain, hparams, options=given, **options)
    assert model.module.encoder.word_dropout == "words" and model.module.rnn.weight_dropout == "connections"
    with model.at(model.hparams.perturbed(4), linearized=True):
        assert model(tokens)[0].shape == (3, 4, 7)
    with pytest.warns(UserWarning, match="word_dropout of encoder has no plain form.*weight_dropout of rnn") as caught:
        model.export()
    assert caught[0].filename == __file__


def test_excluded_modules_are_left_with_all_inside():
    plain, *_ = mlp()
    model = to_stn(plain, hyper_parameters(), exclude=["middle"])
    assert list(model.report.converted) == ["first", "heads.small", "heads.big"]
    assert model.report.left == dict.fromkeys(["middle.0", "middle.1.0", "middle.1.1"], "it is excluded")


@pytest.mark.parametrize("convert", CONVERSIONS)
@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"model": torch.tanh}, TypeError, r"model must be a torch.nn.Module; got"),
        ({"hparams": {"decay": 1.0}}, TypeError, "hparams must be a HyperParameters; got dict"),
        ({"exclude": "0"}, TypeError, "exclude must be a collection of names; got the string '0'"),
        ({"exclude": ["head"]}, ValueError, "exclude must name modules of the model; got 'head'"),
        ({"dropout": {"0": "rate"}}, ValueError, "dropout must name dropouts of the model; got '0'"),
        ({"options": {"2": {}}}, ValueError, "options must name layers.*; got '2'. It is left alone: normalization"),
        ({"model": nn.Sequential(nn.GRU(3, 3))}, ValueError, "layer that can respond; got none.\nleft alone  0: GRU"),
        ({"model": nn.Linear(3, 3), "hparams": HyperParameters()}, ValueError, "at least one entry; got none, and no"),
        (
            {"options": {"0": {"colour": 1}}},
            TypeError,
            r"options\['0'\] must be among batch_dim, which.*; got 'colour'",
        ),
        ({"options": {"0": {"in_features": 3}}}, TypeError, r"options\['0'\] must be among .*; got 'in_features'"),
        ({"options": {"1": {"p": 1}}}, TypeError, r"options\['1'\] must be among batch_dim, unit_dim, which a Stn"),
        ({"options": {"0": "bias"}}, TypeError, r"options\['0'\] must be a dict; got str"),
        ({"options": "bias"}, TypeError, "options must be a dict by modules; got str"),
        (
            {"model": to_stn(nn.Linear(3, 3), HyperParameters().add("a", 0.0))},
            TypeError,
            r"got a StnModel. .* export\(\)",
        ),
        (
            {"model": nn.Sequential(to_delta_stn(nn.Linear(3, 3), HyperParameters().add("a", 0.0)))},
            TypeError,
            "model must be of ordinary layers; got a StnModel in '0'",
        ),
        ({"model": nn.Sequential(nn.Linear(3, 3), nn.Dropout(), hyper_parameters())}, ValueError, "of its own"),
        ({"model": nn.Sequential(nn.Linear(3, 3), StnLinear(3, 3, num_hparams=9))}, ValueError, "num_hparams=9"),
    ],
)
def test_arguments_of_other_kinds_are_refused(convert, arguments, error, message):
    hparams = hyper_parameters()
    plain = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.BatchNorm1d(3))
    with pytest.raises(error, match=message):
        convert(**{"model": plain, "hparams": hparams, **arguments})
    assert list(hparams.entries) == ["decay", "strength"] and not hparams.frozen


def test_new_entries_need_open_hyperparameters():
    hparams = hyper_parameters()
    to_stn(nn.Linear(3, 3), hparams)
    with pytest.raises(RuntimeError, match="must be added before"):
        to_stn(nn.Sequential(nn.Linear(3, 3), nn.Dropout()), hparams)
    assert to_stn(nn.Linear(3, 3), hparams).hparams is hparams  # two models may share them
