"""A model that answers at points of hyperparameter space."""

import copy
import io
import pickle
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nestopt_ext.response import DeltaStnLinear, HyperParameters, StnLinear, StnModel, current_sample


def hyper_parameters(dtype=torch.float64):
    return HyperParameters(dtype=dtype).add("decay", 0.3, low=0.0).add("strength", 0.2, low=0.0, high=1.0)


def randomized(model):
    """Gates that are not zero, so that hyperparameters matter."""
    with torch.no_grad():
        for parameter in model.response_parameters():
            parameter.normal_(std=0.5)
    return model


def network(*, centred=True, middle=None):
    linear = DeltaStnLinear if centred else StnLinear
    layers = [linear(3, 5, num_hparams=2), nn.Tanh() if middle is None else middle, linear(5, 2, num_hparams=2)]
    return randomized(StnModel(nn.Sequential(*layers).double(), hyper_parameters(), centred=centred))


X = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def plain_call(model, h, x):
    """By functional_call of plain weights at one point."""
    weights = {}
    for prefix, layer in model.module.named_children():
        if isinstance(layer, StnLinear):
            weights |= {f"{prefix}.{r.name}": r.at(h) for r in layer.responses()}
    plain = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    return torch.func.functional_call(plain, weights, x)


@pytest.mark.parametrize("centred", [True, False])
def test_each_example_is_answered_at_its_point(centred):
    model = network(centred=centred)
    h0 = model.hparams.unconstrained.detach()
    h = model.hparams.perturbed(4).detach()
    with model.at(h):
        out = model(X)
    rows = [plain_call(model, row - h0 if centred else row, x) for row, x in zip(h, X, strict=True)]
    torch.testing.assert_close(out, torch.stack(rows), rtol=0, atol=1e-12)


@pytest.mark.parametrize("centred", [True, False])
def test_a_call_answers_at_the_current_point_with_a_graph_to_it(centred):
    model = network(centred=centred)
    h0 = model.hparams.unconstrained
    out = model(X)
    torch.testing.assert_close(out, plain_call(model, torch.zeros_like(h0) if centred else h0, X), rtol=0, atol=1e-12)
    (grad,) = torch.autograd.grad(out.square().sum(), h0)
    with torch.no_grad():
        base = h0.clone()

    def loss(h):
        with model.at(h):
            return model(X).square().sum()

    torch.testing.assert_close(torch.autograd.functional.jacobian(loss, base), grad)
    assert grad.abs().min() > 0
    with torch.no_grad():
        assert torch.equal(model(X), out) if centred else torch.allclose(model(X), out, rtol=0, atol=1e-14)


def test_the_centre_has_no_graph_to_the_hyperparameters():
    for centred in (True, False):
        model = network(centred=centred)
        with model.at_centre() as sample:
            out = model(X)
        assert (sample.gate_input is None) == centred
        assert torch.autograd.grad(out.sum(), model.hparams.unconstrained, allow_unused=True) == (None,)
        torch.testing.assert_close(out, model(X), rtol=0, atol=1e-14)


def test_one_point_serves_all_examples():
    model = network()
    h = model.hparams.perturbed(1).detach()
    outs = []
    for points in (h, h[0], h.expand(4, 2)):
        with model.at(points):
            outs.append(model(X))
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=0)
    torch.testing.assert_close(outs[0], outs[2], rtol=0, atol=1e-13)


def test_moving_the_current_point_of_a_centred_model_leaves_its_answers():
    model = network()
    before = model(X)
    model.hparams.assign({"decay": 2.0})
    assert torch.equal(model(X), before)


def along(model, h, x, call):
    """Primal plus tangent by torch.func.jvp along gate inputs of single examples."""

    def answer(gate_input, row):
        with model.at(model.hparams.unconstrained.detach() + gate_input):
            return call(row)

    h0 = model.hparams.unconstrained.detach()
    rows = []
    for point, row in zip(h, x, strict=True):
        zero = torch.zeros_like(h0)
        rows.append(sum(torch.func.jvp(lambda g, r=row: answer(g, r[None])[0], (zero,), (point - h0,))))
    return torch.stack(rows)


def test_a_linearized_answer_is_primal_plus_tangent():
    model = network()
    h = model.hparams.perturbed(4).detach()
    with model.at(h, linearized=True):
        out = model(X)
    torch.testing.assert_close(out, along(model, h, X, model), rtol=0, atol=1e-12)


def test_the_gradient_of_a_linearized_answer_is_that_of_its_parts():
    model = network()
    h = model.hparams.perturbed(4).detach()
    parameters = list(model.response_parameters())
    with model.at(h, linearized=True):
        grads = torch.autograd.grad(model(X).square().sum(), parameters)
    expected = torch.autograd.grad(along(model, h, X, model).square().sum(), parameters)
    for grad, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=0, atol=1e-11)


class Pair(NamedTuple):
    first: torch.Tensor
    rest: dict


class Structured(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = DeltaStnLinear(3, 2, num_hparams=2).double()

    def forward(self, x, *, scale=1.0):
        y = self.layer(x)
        return Pair(y, {"scaled": [scale * y], "classes": y.argmax(1), "count": len(y), "nothing": None, "x": x})


def test_every_tensor_of_a_linearized_answer_is_summed():
    model = randomized(StnModel(Structured(), hyper_parameters(), centred=True))
    with model.at(model.hparams.perturbed(4).detach(), linearized=True):
        out = model(X, scale=3.0)
    assert isinstance(out, Pair)
    torch.testing.assert_close(out.rest["scaled"][0], 3 * out.first)
    assert out.rest["classes"].dtype == torch.int64 and out.rest["count"] == 4 and out.rest["nothing"] is None
    assert torch.equal(out.rest["x"], X)
    with torch.autograd.forward_ad.dual_level():
        assert torch.autograd.forward_ad.unpack_dual(out.first).tangent is None


@dataclass
class Answer:
    logits: torch.Tensor


class Wrapped(nn.Module):
    def forward(self, x):
        return Answer(x)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def linearized(model, x=X):
    with model.at(model.hparams.perturbed(len(x)).detach(), linearized=True):
        return model(x)


def test_an_answer_that_might_hide_tensors_is_refused():
    module = nn.Sequential(DeltaStnLinear(3, 2, num_hparams=2).double(), Wrapped())
    with pytest.raises(TypeError, match="got Answer, whose tensors would lose their tangents"):
        linearized(StnModel(module, hyper_parameters(), centred=True))


@pytest.mark.parametrize(
    "function, name",
    [
        (lambda y: torch.cdist(y, y) @ y, "_cdist_forward"),
        (Doubled.apply, "an autograd.Function without a jvp"),
    ],
)
def test_an_operation_without_a_forward_derivative_is_named(function, name):
    model = network(middle=Applied(function))
    with pytest.raises(RuntimeError, match=f"operations with a forward-mode derivative; got {name}.*linearize=False"):
        linearized(model)


@torch.library.custom_op("nestopt_ext_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


twice.register_autograd(lambda ctx, grad: 2 * grad)


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("training", [True, False])
def test_an_operator_that_loses_tangents_is_named(grad_mode, training):
    model = network(middle=Applied(twice)).train(training)
    with grad_mode(), pytest.raises(RuntimeError, match=r"got (nestopt_ext_tests.twice|an autograd.Function)"):
        linearized(model)


def test_operations_are_watched_once_in_each_mode():
    seen = []
    model = network(middle=Applied(lambda y: seen.append(len(torch.overrides._get_current_function_mode_stack())) or y))
    for training in (True, True, False, False):
        linearized(model.train(training))
    assert [n > seen[1] for n in seen] == [True, False, True, False]


@pytest.mark.parametrize("part", ["all", "inside"])
def test_compiled_code_runs_as_it_was_written_where_it_is_linearized(part):
    model = network(middle=torch.compile(nn.Tanh(), backend="eager") if part == "inside" else None)
    plain = network()
    plain.load_state_dict(model.state_dict())
    call = torch.compile(model, backend="eager") if part == "all" else model
    h = model.hparams.perturbed(4).detach()
    with model.at(h, linearized=True):
        out = call(X)
    with plain.at(h, linearized=True):
        torch.testing.assert_close(out, plain(X), rtol=0, atol=1e-13)
    with model.at(h):
        out = call(X)
    with plain.at(h):
        torch.testing.assert_close(out, plain(X), rtol=0, atol=1e-13)


def test_what_pytorch_would_lose_in_silence_is_refused():
    model = network()
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"outside of torch.inference_mode.*torch.no_grad"):
        linearized(model)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="inside of forward-mode"):
        linearized(model)
    with pytest.raises(RuntimeError, match="inside of forward-mode"):
        torch.func.jvp(lambda x: linearized(model, x), (X,), (X,))
    with model.at(model.hparams.unconstrained, linearized=True), pytest.raises(RuntimeError, match="a part of it"):
        model.module(X)


def test_other_errors_pass_as_they_are():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linearized(network(), torch.ones(4, 7, dtype=torch.float64))


def test_fused_attention_is_linearized_by_its_parts():
    class Attention(nn.Module):
        def forward(self, y):
            q = y[None, None]
            return F.scaled_dot_product_attention(q, q, q)[0, 0]

    model = network(middle=Attention())
    h = model.hparams.perturbed(1).detach()
    with model.at(h, linearized=True):
        out = model(X)

    def answer(g):
        with (
            model.at(model.hparams.unconstrained.detach() + g),
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            return model(X)

    h0 = model.hparams.unconstrained.detach()
    expected = sum(torch.func.jvp(answer, (torch.zeros_like(h0),), (h[0] - h0,)))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def batch_norm_network():
    model = network(middle=nn.Sequential(nn.BatchNorm1d(5), nn.Tanh()).double())
    return model, model.module[1][0]


def test_batch_normalization_in_training_is_differentiated_through_its_statistics():
    model, norm = batch_norm_network()
    norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    h = model.hparams.perturbed(1).detach()
    with model.at(h, linearized=True):
        out = model(X)
    h0 = model.hparams.unconstrained.detach()

    def answer(g):
        with model.at(h0 + g):
            return model(X)

    expected = sum(torch.func.jvp(answer, (torch.zeros_like(h0),), (h[0] - h0,)))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_running_statistics_are_those_of_primals_and_stay_where_buffers_are_fixed():
    model, norm = batch_norm_network()
    reference = copy.deepcopy(model)
    with reference.at_centre():
        reference(X)
    linearized(model)
    wanted = reference.module[1][0]
    torch.testing.assert_close(norm.running_mean, wanted.running_mean, rtol=0, atol=1e-14)
    torch.testing.assert_close(norm.running_var, wanted.running_var, rtol=0, atol=1e-14)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    held = dict(model.named_buffers())
    with model.fixed_buffers():
        loss = linearized(model).square().sum()
        assert not torch.equal(norm.running_mean, before["module.1.0.running_mean"])
    loss.backward()
    assert dict(model.named_buffers()).keys() == held.keys()
    for name, buffer in model.named_buffers():
        assert buffer is held[name] and torch.equal(buffer, before[name])


def test_buffers_are_back_after_an_exception():
    model, norm = batch_norm_network()
    held = norm.running_mean
    with pytest.raises(ZeroDivisionError), model.fixed_buffers():
        raise ZeroDivisionError
    assert norm.running_mean is held


def test_samples_of_other_hyperparameters_are_not_taken():
    outer, inner = network(), network()
    alone = inner(X)
    with outer.at(outer.hparams.perturbed(4).detach()):
        assert torch.equal(inner(X), alone)
        with inner.at(inner.hparams.perturbed(4).detach()):
            assert not torch.equal(inner(X), alone)
        assert current_sample().hparams is outer.hparams
    assert current_sample() is None


@pytest.mark.parametrize(
    "points, error, message",
    [
        ([[0.0, 0.0]], TypeError, "must be a tensor; got list"),
        (torch.zeros(4, 3), ValueError, r"of shape \(examples or 1, 2\).*got shape \(4, 3\)"),
        (torch.zeros(2, 2, 2), ValueError, r"got shape \(2, 2, 2\)"),
        (torch.zeros(()), ValueError, r"got shape \(\)"),
        (torch.zeros(4, 2, dtype=torch.int64), ValueError, "torch.int64"),
    ],
)
def test_points_of_another_kind_are_refused(points, error, message):
    with pytest.raises(error, match=message), network().at(points):
        pass
    assert current_sample() is None


def test_only_a_centred_model_is_linearized():
    model = network(centred=False)
    with (
        pytest.raises(ValueError, match=r"linearized must be False.*to_delta_stn"),
        model.at(model.hparams.unconstrained, linearized=True),
    ):
        pass


def test_parameters_are_general_or_of_the_response_or_hyperparameters():
    model = network()
    model.module.append(model.module[0])  # called twice: its parameters are still there once
    parts = [list(model.general_parameters()), list(model.response_parameters()), list(model.hparams.parameters())]
    ids = [id(p) for part in parts for p in part]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters()}
    assert [len(part) for part in parts] == [4, 6, 2]


@pytest.mark.parametrize(
    "module, hparams, error, message",
    [
        (torch.tanh, hyper_parameters(), TypeError, "module must be a torch.nn.Module"),
        (nn.Tanh(), {}, TypeError, "hparams must be a HyperParameters; got dict"),
        (nn.Tanh(), HyperParameters(), ValueError, "at least one entry"),
        (
            nn.Sequential(StnLinear(3, 2, num_hparams=3)),
            hyper_parameters(),
            ValueError,
            "0 must be made for 2.*hparams=3",
        ),
        (nn.Sequential(hyper_parameters()), hyper_parameters(), ValueError, "no hyperparameters of its own"),
    ],
)
def test_parts_that_do_not_fit_are_refused(module, hparams, error, message):
    with pytest.raises(error, match=message):
        StnModel(module, hparams, centred=True)


def test_a_model_is_copied_pickled_and_restored():
    model = network()
    h = model.hparams.perturbed(4).detach()
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    fresh = network()
    fresh.load_state_dict(torch.load(stream, weights_only=True))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
        with model.at(h):
            out = model(X)
        with other.at(h):
            assert torch.equal(other(X), out)
        with other.at(h, linearized=True):
            assert torch.isfinite(other(X)).all()


def test_hyperparameters_may_be_of_another_dtype_than_layers():
    model = network()
    model.module.float()
    x = X.float()
    with model.at(model.hparams.perturbed(4).detach()):
        assert model(x).dtype == torch.float32
    model.float()
    assert model(x).dtype == torch.float32 and model.hparams.unconstrained.dtype == torch.float32


def test_a_model_moves_and_answers(device):
    model = network().to(device)
    h = model.hparams.perturbed(4).detach()
    assert h.device.type == device.type
    with model.at(h, linearized=True):
        assert model(X.to(device)).device.type == device.type


@pytest.mark.parametrize("norm", [nn.LayerNorm(2), nn.BatchNorm1d(2)], ids=["layer", "batch"])
def test_normalization_warns_of_wrong_gradients_to_general_weights_and_those_to_the_response_are_right(norm):
    module = nn.Sequential(DeltaStnLinear(3, 2, num_hparams=2), norm, nn.Softplus()).double()
    model = randomized(StnModel(module, hyper_parameters(), centred=True))
    h0, h = model.hparams.unconstrained.detach(), model.hparams.perturbed(4).detach()
    response = list(model.response_parameters())

    def loss(answer):
        return (answer * torch.linspace(1, 2, 8, dtype=answer.dtype).reshape(4, 2)).sum()

    def nonlinear(t):
        with model.at(h0 + t * (h - h0)):
            return model(X)

    one = torch.ones((), dtype=torch.float64)
    primal, tangent = torch.autograd.functional.jvp(nonlinear, 0 * one, one, create_graph=True)
    wanted = torch.autograd.grad(loss(primal + tangent), response)
    with pytest.warns(UserWarning, match="right for response weights and wrong for general ones"):
        found = torch.autograd.grad(loss(linearized_at(model, h)), response)
    torch.testing.assert_close(found, wanted)
    for parameter in model.general_parameters():
        parameter.requires_grad_(False)
    model._linearized_in.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(torch.autograd.grad(loss(linearized_at(model, h)), response), wanted)


def linearized_at(model, h):
    with model.at(h, linearized=True):
        return model(X)
