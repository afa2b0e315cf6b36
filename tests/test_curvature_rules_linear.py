"""Rules of a recording: fully connected layers and activations."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from rules import Wrapped, check_example_gradients, check_rule
from torch import nn

from nestopt_ext.curvature import GaussNewton, linearize

F64 = torch.float64


def seeded(make):
    torch.manual_seed(0)
    return make()


def normal(*shape):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(3))


def mlp(activation):
    return nn.Sequential(nn.Linear(4, 6), activation, nn.Linear(6, 3)).double()


ACTIVATIONS = {
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "leaky relu": lambda: nn.LeakyReLU(0.1),
    "leaky relu in place": lambda: nn.LeakyReLU(0.1, inplace=True),
    "elu": lambda: nn.ELU(0.7),
    "elu in place": lambda: nn.ELU(0.7, inplace=True),
    "celu": lambda: nn.CELU(0.5),  # torch rounds 1 / alpha to float32 in its derivative
    "selu": nn.SELU,
    "hardtanh": lambda: nn.Hardtanh(-0.3, 0.5),
    "hardtanh in place": lambda: nn.Hardtanh(-0.3, 0.5, inplace=True),
    "relu6": nn.ReLU6,
    "hardswish": nn.Hardswish,
    "mish": nn.Mish,
    "logsigmoid": nn.LogSigmoid,
    "softsign": nn.Softsign,
    "gelu": nn.GELU,
    "gelu by tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "silu in place": lambda: nn.SiLU(inplace=True),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "softplus, beta and threshold": lambda: nn.Softplus(2.0, 0.5),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    model = seeded(lambda: mlp(ACTIVATIONS[name]()))
    check_rule(model, normal(5, 4))
    check_example_gradients(model, normal(5, 4))


FUNCTIONS = {
    "exp": torch.exp,
    "log": lambda h: torch.log(torch.exp(h)),
    "sqrt": lambda h: torch.exp(h).sqrt(),
    "rsqrt": lambda h: torch.exp(h).rsqrt(),
    "square": torch.square,
    "sin": torch.sin,
    "cos": torch.cos,
    "abs": torch.abs,
    "erf": torch.erf,
    "tanh in place": lambda h: h.tanh_(),
    "sigmoid in place": lambda h: torch.sigmoid_(h),
    "relu of a relu in place": lambda h: F.relu(torch.relu_(h) * 1.0 if False else h.relu_()),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    model = Wrapped(lambda x, w: FUNCTIONS[name](F.linear(x, w)), normal(3, 4))
    check_rule(model, normal(5, 4))
    check_example_gradients(model, normal(5, 4))


@pytest.mark.parametrize("shape", [(4,), (5, 4), (5, 2, 4), (5, 2, 3, 4), (0, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_on_any_number_of_dimensions(shape, bias):
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 6, bias=bias), nn.Tanh(), nn.Linear(6, 3, bias=bias)).double())
    if 0 in shape:
        jacobian = linearize(model, normal(*shape))
        assert jacobian.reason is None
        zeros = jacobian.vjp(normal(0, 3))
        assert all(not t.any() for t in zeros.values())
        return
    check_rule(model, normal(*shape))
    if len(shape) > 1:
        check_example_gradients(model, normal(*shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    model = seeded(lambda: mlp(nn.Tanh()).to(dtype))
    check_rule(model, normal(5, 4).to(dtype), rtol=64 * torch.finfo(dtype).eps)


def test_a_weight_used_twice_and_a_frozen_one():
    model = Wrapped(lambda x, w, b: F.linear(torch.tanh(F.linear(x, w, b)), w, b), normal(4, 4), normal(4))
    check_rule(model, normal(5, 4))
    check_example_gradients(model, normal(5, 4))
    frozen = seeded(lambda: mlp(nn.Tanh()))
    frozen[0].requires_grad_(False)
    jacobian = linearize(frozen, normal(5, 4))
    assert jacobian.reason is None and not jacobian.opaque
    v = {"2.weight": torch.ones(3, 6, dtype=F64), "2.bias": torch.zeros(3, dtype=F64)}
    hidden = torch.tanh(frozen[0](normal(5, 4)))
    torch.testing.assert_close(jacobian.jvp(v), hidden.detach() @ v["2.weight"].T)


def test_a_frozen_weight_that_changes_is_noticed():
    model = seeded(lambda: mlp(nn.Tanh()))
    jacobian = linearize(model, normal(5, 4), ["0.weight"])
    before = jacobian.vjp(normal(5, 3))
    with torch.no_grad():
        model[2].weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"^linearize: model must be computed from the params as they are"):
        jacobian.vjp(normal(5, 3))
    assert before["0.weight"].isfinite().all()


def test_autocast_within_the_model_is_left_to_autograd():
    model = mlp(nn.Tanh()).float()

    def inside(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float()

    x, u = normal(5, 4).float(), normal(5, 3).float()
    params = dict(model.named_parameters())
    jacobian = linearize(inside, x, params)
    assert jacobian.reason == "autocast is on"
    wanted = torch.autograd.grad(inside(x), list(params.values()), u)
    for t, w in zip(jacobian.vjp(u).values(), wanted, strict=True):
        torch.testing.assert_close(t, w, rtol=0.02, atol=0.02)
    operator = GaussNewton(inside, nn.MSELoss(), x, u, params)
    assert all(t.isfinite().all() for t in operator(jacobian.vjp(u)).values())


def test_outputs_that_are_written_to_are_noticed():
    """The last layer may have kept them."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1)).double()
    jacobian = linearize(model, normal(5, 4))
    jacobian.outputs.zero_()
    with pytest.raises(RuntimeError, match="changed in place since"):
        jacobian.vjp(normal(5, 3))


@pytest.mark.parametrize("alpha", [torch.ones(1), torch.ones(3)])
def test_a_step_has_no_dimensions(alpha):
    model = mlp(nn.Tanh())
    jacobian = linearize(model, normal(5, 4))
    into = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"alpha must be a number or a 0-dim tensor; got one of shape"):
        jacobian.add_vjp_(normal(5, 3), into, alpha)


def test_what_only_a_constant_needs_is_not_counted_as_opaque():
    """Numbers that are rounded, with the derivative of those that are not."""

    def f(x, w):
        h = F.linear(x, w)
        return h + (h.round() - h).detach()

    model = Wrapped(f, normal(3, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert linearize(model, normal(5, 4)).opaque == ()
    operator = GaussNewton(model, nn.MSELoss(), normal(5, 4), normal(5, 3), route="dual")
    plain = GaussNewton(Wrapped(F.linear, normal(3, 4)), nn.MSELoss(), normal(5, 4), normal(5, 3))
    torch.testing.assert_close(operator.dense(), plain.dense())


@pytest.mark.parametrize("of", ["result", "param"])
def test_hooks_on_gradients_are_left_to_autograd(of):
    def f(x, w, p):
        h = F.linear(x, w)
        if of == "result":
            h.register_hook(lambda g: 3 * g)
        return torch.tanh(h * p)

    model, x, u = Wrapped(f, normal(3, 4), normal(3)), normal(5, 4), normal(5, 3)
    if of == "param":
        model.params[0].register_hook(lambda g: 3 * g)
    jacobian = linearize(model, x)
    assert jacobian.reason == f"a {'tensor' if of == 'result' else of} has a hook that sees its gradient"
    wanted = torch.autograd.grad(model(x), list(model.params), u)
    for t, w in zip(jacobian.vjp(u).values(), wanted, strict=True):
        torch.testing.assert_close(t, w)


@pytest.mark.parametrize("asks", [lambda h: h.grad_fn is None, lambda h: h.is_leaf])
def test_a_model_that_asks_for_a_graph_is_left_to_autograd(asks):
    model = Wrapped(lambda x, w: F.linear(x, w) * (2 if asks(F.linear(x, w)) else 3), normal(3, 4))
    jacobian = linearize(model, normal(5, 4))
    assert jacobian.reason is not None and jacobian.reason.endswith("asks for a graph")
    torch.testing.assert_close(jacobian.outputs, 3 * F.linear(normal(5, 4), normal(3, 4)))
