"""Rules of a recording: what moves entries about."""

import pytest
import torch
import torch.nn.functional as F
from rules import Wrapped, check_example_gradients, check_mixes, check_rule

from nestopt_ext.curvature import linearize

F64 = torch.float64


def normal(*shape, seed=3):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def layer(f):
    """Of [6, 4, 5] to [6, 4, 8], with ``f`` after it, and something that is not linear, so that all entries differ."""
    return Wrapped(lambda x, w: torch.tanh(f(F.linear(x, w))), normal(8, 5))


#: Of a hidden [6, 4, 8], examples first, and staying first.
APART = {
    "flatten": lambda h: h.flatten(1),
    "flatten of examples and positions": lambda h: torch.flatten(h, 0, 1),
    "flatten all": lambda h: h.flatten(),
    "ravel": lambda h: h.ravel(),
    "unflatten": lambda h: h.unflatten(2, (2, 4)),
    "unflatten by function": lambda h: torch.unflatten(h, -1, (-1, 2)),
    "reshape": lambda h: h.reshape(6, 2, -1),
    "reshape by function": lambda h: torch.reshape(h, (6, 32)),
    "reshape by keyword": lambda h: torch.reshape(h, shape=(6, -1)),
    "reshape from a view that is not contiguous": lambda h: h.transpose(1, 2).reshape(6, -1),
    "view": lambda h: h.view(6, -1),
    "view of a size": lambda h: h.view(torch.Size((6, 32))),
    "view_as": lambda h: h.view_as(torch.empty(6, 32)),
    "squeeze": lambda h: h.view(6, 1, 32).squeeze(),
    "squeeze a dim": lambda h: h.view(6, 1, 32, 1).squeeze(1).squeeze(dim=-1),
    "squeeze dims": lambda h: torch.squeeze(h.view(6, 1, 32, 1), (1, 3)),
    "squeeze nothing": lambda h: h.squeeze(0),
    "unsqueeze": lambda h: h.unsqueeze(1),
    "unsqueeze before examples and back": lambda h: torch.unsqueeze(h, 0).squeeze(0),
    "transpose": lambda h: h.transpose(1, 2),
    "transpose of examples and back": lambda h: torch.transpose(h, 0, 1).tanh().transpose(1, 0),
    "swapaxes": lambda h: h.swapaxes(-1, 1),
    "permute": lambda h: h.permute(0, 2, 1),
    "permute by function": lambda h: torch.permute(h, (0, -1, 1)),
    "permute by keyword": lambda h: torch.permute(h, dims=(0, 2, 1)),
    "movedim": lambda h: h.movedim(1, -1),
    "movedim, several": lambda h: torch.movedim(h, (0, 1), (1, 0)).movedim((1, 0, 2), (0, 1, 2)),
    "t": lambda h: h.flatten(1).t().tanh().t(),
    "T": lambda h: h.flatten(1).T.T,
    "mT": lambda h: h.mT,
    "contiguous": lambda h: h.transpose(1, 2).contiguous(),
    "clone": lambda h: h.clone(),
    "clone, then in place": lambda h: h.clone().relu_(),
    "to a dtype": lambda h: h.to(torch.float64),
    "to a device": lambda h: h.to("cpu"),
    "to like": lambda h: h.to(h),
    "double": lambda h: h.double(),
    "type": lambda h: h.type(torch.float64),
    "type_as": lambda h: h.type_as(h),
    "expand": lambda h: h.unsqueeze(1).expand(-1, 3, -1, -1),
    "expand before examples": lambda h: h.expand(3, 6, 4, 8).movedim(1, 0),
    "expand_as": lambda h: h[:, :1].expand_as(torch.empty(6, 4, 8)),
    "broadcast_to": lambda h: torch.broadcast_to(h[:, :1], (6, 4, 8)),
    "repeat": lambda h: h.repeat(1, 2, 3),
    "repeat in a new dimension": lambda h: h.repeat(2, 1, 1, 1).movedim(1, 0),
    "tile": lambda h: torch.tile(h, (2, 1)),
    "repeat_interleave": lambda h: h.repeat_interleave(3, dim=1),
    "repeat_interleave of examples": lambda h: torch.repeat_interleave(h, 2, 0),
    "narrow": lambda h: h.narrow(1, 1, 2),
    "narrow from the end": lambda h: torch.narrow(h, 1, -2, 2),
    "select": lambda h: h.select(1, -1),
    "split": lambda h: sum_of(h.split(3, dim=2)[:2]),
    "split in sections": lambda h: torch.split(h, [1, 3], 1)[1],
    "chunk": lambda h: sum_of(h.chunk(2, -1)),
    "chunk by function": lambda h: torch.chunk(h, 4, 1)[2],
    "tensor_split": lambda h: h.tensor_split(3, 2)[1],
    "unbind": lambda h: sum_of(h.unbind(1)),
    "iteration": lambda h: sum_of(list(h.transpose(0, 1))),
    "index int": lambda h: h[:, 2],
    "index slice": lambda h: h[:, 1:3],
    "index step": lambda h: h[:, ::2, 1::3],
    "index ellipsis": lambda h: h[..., -1],
    "index none": lambda h: h[:, None, :, 1],
    "index none first": lambda h: h[None, :, 1].squeeze(0),
    "index list": lambda h: h[:, [0, 2, 2]],
    "index tensor": lambda h: h[:, torch.tensor([0, -1, 1, 1])],
    "index matrix": lambda h: h[:, torch.tensor([[0, -1], [1, 1]])],
    "index the last by a tensor": lambda h: h[..., torch.tensor([0, 7, 0])],
    "index two tensors": lambda h: h[:, torch.tensor([0, 1]), torch.tensor([2, 2])],
    "index two tensors apart": lambda h: h.unsqueeze(2)[:, torch.tensor([0, 1]), :, torch.tensor([2, 2])].movedim(1, 0),
    "index one position of each example": lambda h: h[torch.arange(6), torch.tensor([0, 1, 2, 3, 3, 0])],
    "index mask of positions": lambda h: h[:, torch.tensor([True, False, True, True])],
    "index tensor and slice": lambda h: h[:, torch.tensor([0, 1]), 1:],
    "index_select": lambda h: h.index_select(1, torch.tensor([2, 2, 0])),
    "gather": lambda h: h.gather(1, torch.tensor([0, 0, 3]).view(1, 3, 1).expand(6, 3, 8)),
    "cat": lambda h: torch.cat([h, h * h], 1),
    "cat with data": lambda h: torch.cat([h, torch.ones(6, 2, 8, dtype=F64)], dim=1),
    "concat": lambda h: torch.concat((h, h.tanh()), dim=-1),
    "stack": lambda h: torch.stack([h, h * h], 1),
    "stack before examples": lambda h: torch.stack([h, h * h]).movedim(1, 0),
    "roll": lambda h: h.roll(1, 1),
    "roll several": lambda h: torch.roll(h, shifts=(1, -2), dims=(1, 2)),
    "flip": lambda h: h.flip(1),
    "flip several": lambda h: torch.flip(h, dims=(1, 2)),
}

#: Where one result depends on several examples, or an example is in another place.
MIXED = {
    "transposed": lambda h: h.transpose(0, 1),
    "a reshape over examples": lambda h: h.transpose(0, 1).reshape(4, -1),
    "positions joined before examples": lambda h: h.transpose(0, 1).flatten(0, 1),
    "too few examples": lambda h: h.reshape(4, 48),
    "a slice of examples": lambda h: h[1:],
    "one example": lambda h: h[0],
    "examples permuted": lambda h: h[torch.tensor([1, 0, 2, 3, 4, 5])],
    "examples picked": lambda h: h.index_select(0, torch.tensor([1, 0, 2, 3, 4, 5])),
    "examples by a mask": lambda h: h[torch.tensor([True] * 5 + [False])],
    "gathered over examples": lambda h: h.gather(0, torch.zeros(6, 4, 8, dtype=torch.int64)),
    "cat of examples": lambda h: torch.cat([h, h * h]),
    "repeat of examples": lambda h: h.repeat(2, 1, 1),
    "roll of examples": lambda h: h.roll(1, 0),
    "flip of examples": lambda h: h.flip(0),
}


def sum_of(parts):
    total = parts[0]
    for k, part in enumerate(parts[1:]):
        total = total + (k + 2.0) * part
    return total


@pytest.mark.parametrize("name", APART)
def test_examples_apart(name):
    check_rule(layer(APART[name]), normal(6, 4, 5))
    check_example_gradients(layer(APART[name]), normal(6, 4, 5))


@pytest.mark.parametrize("name", MIXED)
def test_examples_mixed(name):
    check_rule(layer(MIXED[name]), normal(6, 4, 5))
    check_mixes(layer(MIXED[name]), normal(6, 4, 5))


#: What writes in place, which is for what depends on params.
OF_PARAMS = ("clone, then in place",)
WHOLE = (
    *("flatten", "transpose", "to a dtype", "expand", "repeat", "chunk", "index int", "index step", "index list"),
    *("index two tensors", "index one position of each example", "index_select", "gather", "cat", "stack", "roll"),
)


def with_data(name):
    """The same of data, before it meets params."""
    return Wrapped(lambda x, w: APART[name](x).double().unsqueeze(-1) * w, normal(2))


@pytest.mark.parametrize("name", [name for name in APART if name not in OF_PARAMS])
def test_data(name):
    check_example_gradients(with_data(name), normal(6, 4, 8))


@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers(name):
    check_rule(with_data(name), torch.arange(6 * 4 * 8).view(6, 4, 8))


def written(write):
    def f(x, w, p):
        h = F.linear(x, w)
        y = h * p
        write(h, x)
        return y

    return Wrapped(f, normal(8, 5), normal(8))


def without_grad(h, x):
    with torch.no_grad():
        h.view(-1).mul_(2)


@pytest.mark.parametrize(
    "write", [lambda h, x: h.detach().mul_(2), lambda h, x: h.detach()[0].copy_(x[0, :, :1]), without_grad]
)
def test_what_was_used_and_then_written_by_another_name_is_not_recorded(write):
    """As PyTorch refuses to go back through it, after the model."""
    with pytest.raises(RuntimeError, match="changed in place since"):
        linearize(written(write), normal(6, 4, 5)).vjp(normal(6, 4, 8))


@pytest.mark.parametrize("other", [lambda h: h.detach(), lambda h: h.data, lambda h: h.detach()[0]])
def test_what_is_written_while_a_constant_shares_its_memory_is_not_recorded(other):
    """The constant has the new value, too."""

    def f(x, w):
        h = F.linear(x, w)
        same = other(h)
        h.mul_(2)
        return h * same

    model, x, u = Wrapped(f, normal(8, 5)), normal(6, 4, 5), normal(6, 4, 8)
    jacobian = linearize(model, x)
    assert jacobian.reason == "mul_ writes in place to memory that another tensor shares"
    outputs = model(x)
    torch.testing.assert_close(jacobian.outputs, outputs.detach())
    (wanted,) = torch.autograd.grad(outputs, list(model.params), u)
    torch.testing.assert_close(jacobian.vjp(u)["params.0"], wanted)


def test_a_constant_that_data_is_written_to_is_one():
    def f(x, p):
        bias = torch.zeros_like(x)
        bias.masked_fill_(x > 0, 2.0)
        bias[:, 0] = x[:, 1]
        bias += x
        return bias.unsqueeze(-1) * p

    check_rule(Wrapped(f, normal(2)), normal(6, 4))
