"""Rules of a recording: rows of a table."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from rules import Wrapped, check_example_gradients, check_rule
from torch import nn

from nestopt_ext.curvature import linearize

F64 = torch.float64
TOKENS = torch.tensor([[1, 2, 0, 1], [3, 3, 3, 0], [6, 5, 4, 1], [0, 0, 0, 0], [1, 6, 2, 5]])


def seeded(make):
    torch.manual_seed(0)
    return make().double()


class Tokens(nn.Module):
    """Tokens and their positions, [B, T]."""

    def __init__(self, **options):
        super().__init__()
        self.embed = nn.Embedding(7, 3, **options)
        self.positions = nn.Embedding(4, 3)
        self.first = nn.Parameter(torch.randn(1, 1, 3))

    def forward(self, tokens):
        h = self.embed(tokens) + self.positions(torch.arange(tokens.shape[1]))
        h = torch.cat([self.first.expand(len(tokens), -1, -1), h], dim=1)
        return torch.tanh(h)


def test_tokens_and_positions():
    check_rule(seeded(Tokens), TOKENS)
    check_example_gradients(seeded(Tokens), TOKENS)


def test_a_table_that_is_the_last_layer_too():
    model = Wrapped(lambda x, w: F.linear(torch.tanh(F.embedding(x, w)), w), torch.randn(7, 3, dtype=F64))
    check_rule(model, TOKENS)
    check_example_gradients(model, TOKENS)


def test_positions_from_a_slice_of_a_param():
    model = seeded(lambda: nn.ParameterDict({"w": torch.randn(7, 3), "p": torch.randn(9, 3)}))
    f = Wrapped(lambda x, w, p: (F.embedding(x, w) + p[: x.shape[1]]) ** 2, *[p.data for p in model.values()])
    check_rule(f, TOKENS)
    check_example_gradients(f, TOKENS)


@pytest.mark.parametrize("index", [(slice(None), 0), (..., slice(0, 2)), slice(None)])
def test_a_param_at_an_index_from_data(index):
    f = Wrapped(lambda x, p: torch.tanh(p[x[index]]), torch.randn(7, 2, 3, dtype=F64))
    check_rule(f, TOKENS)
    check_example_gradients(f, TOKENS)


def test_a_param_at_two_indices_from_data():
    f = Wrapped(lambda x, p: torch.tanh(p[x[:, 0], x[:, 1] % 2]), torch.randn(7, 2, 3, dtype=F64))
    check_rule(f, TOKENS)
    check_example_gradients(f, TOKENS)


@pytest.mark.parametrize("padding", [0, -1])
def test_padding_is_constant_for_products_with_the_jacobian_and_its_transpose(padding):
    model = seeded(lambda: Tokens(padding_idx=padding))
    params = list(model.parameters())
    jacobian = linearize(model, TOKENS)
    assert jacobian.reason is None and not jacobian.opaque
    u = torch.randn(jacobian.outputs.shape, dtype=F64).requires_grad_()
    pulled = torch.autograd.grad(model(TOKENS), params, u, create_graph=True)
    names = [n for n, _ in model.named_parameters()]
    found = jacobian.vjp(u.detach())
    for n, t in zip(names, pulled, strict=True):
        torch.testing.assert_close(found[n], t.detach())
    assert not found["embed.weight"][padding].any()
    v = [torch.randn_like(p) for p in params]
    (pushed,) = torch.autograd.grad(pulled, u, v)
    torch.testing.assert_close(jacobian.jvp(dict(zip(names, v, strict=True))), pushed)
    into = {n: t.clone() for n, t in zip(names, v, strict=True)}
    jacobian.add_vjp_(u.detach(), into)
    for n, t, before in zip(names, pulled, v, strict=True):
        torch.testing.assert_close(into[n], before + t.detach())


def test_frequencies_have_no_rule_and_go_by_autograd():
    model = seeded(lambda: nn.Embedding(7, 3, scale_grad_by_freq=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jacobian = linearize(model, TOKENS)
    assert jacobian.opaque == ("embedding",)
    model(TOKENS).sum().backward()
    found = jacobian.vjp(torch.ones_like(jacobian.outputs))
    torch.testing.assert_close(found["weight"], model.weight.grad)


@pytest.mark.parametrize("classes", [-1, 9])
def test_one_hot(classes):
    def f(x, w):
        return torch.tanh(F.one_hot(x, classes).double() @ w[: int(x.max()) + 1 if classes < 0 else classes])

    check_rule(Wrapped(f, torch.randn(9, 2, dtype=F64)), TOKENS)
    check_example_gradients(Wrapped(f, torch.randn(9, 2, dtype=F64)), TOKENS)
    turned = Wrapped(lambda x, w: (F.one_hot(x.T, 7).double() @ w).transpose(0, 1), torch.randn(7, 2, dtype=F64))
    check_example_gradients(turned, TOKENS)


def test_bfloat16():
    model = seeded(Tokens).to(torch.bfloat16)
    check_rule(model, TOKENS, rtol=16 * torch.finfo(torch.bfloat16).eps)
