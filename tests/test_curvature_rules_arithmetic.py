"""Rules of a recording: functions of each element of tensors that are broadcast, and sums over elements."""

import pytest
import torch
import torch.nn.functional as F
from rules import Wrapped, check_example_gradients, check_mixes, check_rule
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from nestopt_ext.curvature import linearize

F64 = torch.float64


def normal(*shape, seed=3):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def in_place(f):
    """Of a new tensor, that nothing else shares."""
    return lambda h, p: f(h.clone(), p)


def iadd(h, p):
    h += p
    return h


def isub(h, p):
    h -= p
    return h


def imul(h, p):
    h *= p
    return h


def idiv(h, p):
    h /= p.exp()
    return h


def ipow(h, p):
    h **= 2
    return h * p


def data(*shape):
    return normal(*shape, seed=7)


#: Of a hidden h [6, 4, 5] and a param of a shape that is broadcast to it.
BINARY = {
    "add": lambda h, p: h + p,
    "add to param": lambda h, p: p + h,
    "add with alpha": lambda h, p: torch.add(h, p, alpha=-0.5),
    "add a number": lambda h, p: (h + 1) * p,
    "number and": lambda h, p: 1 + h * p,
    "add in place": in_place(iadd),
    "add_ with alpha": in_place(lambda h, p: h.add_(p, alpha=2)),
    "sub": lambda h, p: h - p,
    "sub from param": lambda h, p: p - h,
    "sub with alpha": lambda h, p: h.sub(p, alpha=3),
    "sub in place": in_place(isub),
    "rsub": lambda h, p: 1 - h * p,
    "rsub by function": lambda h, p: torch.rsub(h, p, alpha=2),
    "mul": lambda h, p: h * p,
    "mul param": lambda h, p: torch.mul(p, h),
    "mul by a number": lambda h, p: 2 * h * 3 * p,
    "mul in place": in_place(imul),
    "div": lambda h, p: h / p.exp(),
    "div a param": lambda h, p: p / h.exp(),
    "div by a number": lambda h, p: (h / 2) * p,
    "div in place": in_place(idiv),
    "true_divide": lambda h, p: torch.true_divide(h, p.exp()),
    "number over": lambda h, p: 2 / (h.exp() + p.exp()),
    "reciprocal": lambda h, p: (h.exp() * p).reciprocal(),
    "neg": lambda h, p: -h * torch.neg(p),
    "positive": lambda h, p: +h * p,
    "pow": lambda h, p: h**3 * p**2,
    "pow 0 and 1": lambda h, p: h**0 + h.pow(1) * p,
    "pow of a root": lambda h, p: torch.pow(h.exp(), 0.3) * p,
    "pow in place": in_place(ipow),
    "number to the power": lambda h, p: 2**h * p,
    "pow by function of a number": lambda h, p: torch.pow(0.5, h * p),
    "addcmul": lambda h, p: torch.addcmul(p, h, h),
    "addcmul with value": lambda h, p: torch.addcmul(h, h, p, value=-2),
    "lerp": lambda h, p: h.lerp(p, 0.3),
    "lerp by a tensor": lambda h, p: torch.lerp(h, h * h, p),
    "maximum": lambda h, p: torch.maximum(h, p),
    "minimum": lambda h, p: h.minimum(p),
    "where": lambda h, p: torch.where(data(6, 4, 5) > 0, h, p),
    "where and a number": lambda h, p: torch.where(data(4, 5) > 0, h * p, 2.0),
    "where method": lambda h, p: h.where(data(6, 1, 1) > 0, p),
    "masked_fill": lambda h, p: (h * p).masked_fill(data(4, 1) > 0, 3.0),
    "masked_fill in place": in_place(lambda h, p: h.masked_fill_(data(6, 4, 5) > 0, 3.0) * p),
    "clamp": lambda h, p: h.clamp(-0.5, 0.5) * p,
    "clamp min": lambda h, p: torch.clamp(h * p, min=-0.5),
    "clamp max": lambda h, p: (h * p).clip(max=0.1),
    "clamp_min": lambda h, p: h.clamp_min(0.0) * p,
    "clamp_max in place": in_place(lambda h, p: h.clamp_max_(0.0) * p),
    "clamp by tensors": lambda h, p: torch.clamp(h, -data(4, 5).abs(), data(5).abs()) * p,
    "same operand twice": lambda h, p: h * h * p * p,
    "same operand added": lambda h, p: (h + h) * (p + p),
    "data as operand": lambda h, p: h * data(6, 4, 5) + data(4, 5) * p,
    "of params alone": lambda h, p: h * (p.exp() * 2 + p),
    "tril": lambda h, p: (h * p).tril(),
    "triu": lambda h, p: torch.triu(h * p, diagonal=1),
    "compared": lambda h, p: h * (h > 0) * p,
}


SHAPES = [(name, (4, 1)) for name in BINARY] + [
    (name, shape)
    for name in ("add", "sub with alpha", "mul", "div", "lerp by a tensor", "maximum", "where", "same operand twice")
    for shape in ((5,), (1, 4, 5), (4, 5), (1, 1, 1))
]


@pytest.mark.parametrize(("name", "shape"), SHAPES)
def test_operands_that_are_broadcast(name, shape):
    model = Wrapped(lambda x, w, p: BINARY[name](F.linear(x, w), p).tanh(), normal(5, 3), normal(*shape, seed=4))
    check_rule(model, normal(6, 4, 3))
    check_example_gradients(model, normal(6, 4, 3))


def test_a_scale_without_dimensions_and_one_for_each_of_one_example():
    model = Wrapped(lambda x, w, p: F.linear(x, w) * p + p, normal(5, 3), normal())
    check_rule(model, normal(6, 3))
    check_example_gradients(model, normal(6, 3))
    model = Wrapped(lambda x, w, p: F.linear(x, w) * p, normal(5, 3), normal(1, 5))
    check_example_gradients(model, normal(1, 3))


@pytest.mark.parametrize("flag", [True, False])
def test_a_factor_that_is_true_or_false(flag):
    check_rule(Wrapped(lambda x, w, p: F.linear(x, w) * flag + flag * p * p, normal(5, 3), normal(5)), normal(6, 3))


def test_an_operand_with_an_entry_for_each_example():
    model = Wrapped(lambda x, w, p: F.linear(x, w) * p, normal(5, 3), normal(6, 1))
    check_rule(model, normal(6, 3))
    with pytest.raises(Exception, match="without examples has entries for them"):
        check_example_gradients(model, normal(6, 3))


def test_the_larger_of_equals_counts_half():
    model = Wrapped(lambda x, p: torch.maximum(p, p.clone()) + torch.minimum(p, x), normal(4, 5))
    check_rule(model, torch.zeros(6, 4, 5, dtype=F64))
    tied = Wrapped(lambda x, p: torch.maximum(x * p, 2 * p), torch.ones(3, dtype=F64))
    check_rule(tied, torch.full((6, 3), 2.0, dtype=F64))


def test_dtypes_are_promoted_and_casts_are_taken_back():
    model = Wrapped(lambda x, p, q: (x * p + q).float() * q, normal(4).float(), normal(3, 4))
    check_rule(model, normal(6, 3, 4).float(), rtol=1e-6)
    model = Wrapped(
        lambda x, p: torch.tensor(0.3, dtype=F64) * p * torch.arange(4) * torch.tensor(2) * (x > 0) + x,
        normal(4).float(),
    )
    check_rule(model, normal(6, 4).float(), rtol=1e-6)
    half = Wrapped(lambda x, p: x * torch.tensor(0.3) * p + p, normal(6, 4).bfloat16())
    check_rule(half, normal(6, 4).bfloat16(), rtol=0.03)
    whole = Wrapped(lambda x, p: x * p + 1, normal(4))
    check_rule(whole, torch.arange(24).view(6, 4))
    check_example_gradients(whole, torch.arange(24).view(6, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    model = Wrapped(lambda x, w, p: F.linear(x, w) * p + p, normal(5, 3).to(dtype), normal(5).to(dtype))
    check_rule(model, normal(6, 3).to(dtype), rtol=16 * torch.finfo(dtype).eps)


#: Of data alone: what the tokens are.
OF_DATA = {
    "comparison": lambda x: x > 2,
    "equality": lambda x: torch.eq(x, 2),
    "logic": lambda x: (x > 2) & ~(x == 4) | torch.logical_not(x < 3),
    "mask of positions": lambda x: (x != 0).unsqueeze(1) & (x != 0).unsqueeze(2),
    "floor division": lambda x: x // 2 % 3,
    "power": lambda x: x**2 / 7,
    "quotient": lambda x: torch.div(x, 2, rounding_mode="floor"),
    "unknown": lambda x: torch.cumsum(x, 1),
    "mean over examples": lambda x: x - x.double().mean(0),
}


@pytest.mark.parametrize("name", OF_DATA)
def test_data_keeps_its_examples(name):
    model = Wrapped(lambda x, p: OF_DATA[name](x).double().unsqueeze(-1) * p, normal(3))
    check_rule(model, torch.arange(24).view(6, 4) % 5)
    check_example_gradients(model, torch.arange(24).view(6, 4) % 5)


def test_examples_in_different_dimensions():
    model = Wrapped(lambda x, w: F.linear(x, w).unsqueeze(0) * F.linear(x, w).unsqueeze(1), normal(5, 3))
    check_rule(model, normal(6, 3))
    check_mixes(model, normal(6, 3))


#: Of a hidden [6, 4, 5].
SUMS = {
    "sum": lambda h: h.sum(-1),
    "sum keepdim": lambda h: torch.sum(h, 1, keepdim=True),
    "sum of dims": lambda h: h.sum((1, 2)),
    "sum by keyword": lambda h: h.sum(dim=[1], keepdim=True) * h,
    "mean": lambda h: h.mean(1),
    "mean of dims": lambda h: h.mean(dim=(-1, 1), keepdim=True),
    "mean by function": lambda h: torch.mean(h, 2),
    "amax": lambda h: h.amax(1),
    "amax of several": lambda h: h.amax((1, 2)),
    "amin": lambda h: torch.amin(h, -1, keepdim=True),
    "max": lambda h: h.max(1)[0],
    "max keepdim": lambda h: torch.max(h, dim=1, keepdim=True).values,
    "max of two": lambda h: torch.max(h, h * h),
    "min": lambda h: torch.min(h, 2).values,
    "logsumexp": lambda h: h.logsumexp(1),
    "logsumexp of several": lambda h: torch.logsumexp(h, (1, 2), keepdim=True),
    "var": lambda h: h.var(1),
    "var of dims, biased": lambda h: torch.var(h, dim=(1, 2), unbiased=False, keepdim=True),
    "var with correction": lambda h: h.var(-1, correction=0),
    "std": lambda h: h.std(-1),
    "norm": lambda h: h.norm(dim=-1),
    "normalize": lambda h: F.normalize(h, dim=-1),
    "norm of all but examples": lambda h: torch.norm(h.flatten(1), 2, 1),
    "mean beside a use before it": lambda h: h * h + h.mean(1, keepdim=True),
    "sum beside a use before it": lambda h: h * h + h.sum(1, keepdim=True),
    "norm keepdim": lambda h: h / torch.linalg.vector_norm(h, dim=-1, keepdim=True),
    "softmax": lambda h: F.softmax(h, dim=-1),
    "softmax method": lambda h: h.softmax(1),
    "softmax function": lambda h: torch.softmax(h, -2),
    "log_softmax": lambda h: F.log_softmax(h, 2),
    "log_softmax method": lambda h: h.log_softmax(1),
    "softmax of nothing seen": lambda h: torch._safe_softmax(h.masked_fill(data(6, 4, 1) > 0, -torch.inf), -1),
}
MIXED_SUMS = {
    "sum": lambda h: h.sum(0),
    "sum of all": lambda h: h.sum().view(1),
    "mean keepdim": lambda h: h - h.mean(0, keepdim=True),
    "mean of all": lambda h: h.mean() * h,
    "max": lambda h: h.max(0).values,
    "max of all": lambda h: h.max() * h,
    "softmax": lambda h: h.softmax(0),
    "log_softmax": lambda h: h.log_softmax(dim=0),
}


@pytest.mark.parametrize("name", SUMS)
def test_sums(name):
    model = Wrapped(lambda x, w: SUMS[name](F.linear(x, w)) * 2, normal(5, 3))
    check_rule(model, normal(6, 4, 3))
    check_example_gradients(model, normal(6, 4, 3))


@pytest.mark.parametrize("name", MIXED_SUMS)
def test_sums_over_examples(name):
    model = Wrapped(lambda x, w: MIXED_SUMS[name](F.linear(x, w)) * 2, normal(5, 3))
    check_rule(model, normal(6, 4, 3))
    check_mixes(model, normal(6, 4, 3))


def test_a_sum_that_is_all_there_is():
    check_rule(Wrapped(lambda x, p: (x + p).sum(1), normal(4)), normal(6, 4))
    check_rule(Wrapped(lambda x, p: p.sum(), normal(4)), normal(6, 4))
    check_rule(Wrapped(lambda x, p: p.mean(), normal()), normal(6, 4))


def test_the_largest_of_equals_share_what_goes_back():
    check_rule(Wrapped(lambda x, p: (x * p).amax(1), torch.ones(4, dtype=F64)), torch.ones(6, 4, dtype=F64))
    jacobian = linearize(Wrapped(lambda x, p: (x * p).max(1).values, torch.ones(2)), torch.ones(1, 2))
    assert jacobian.vjp(torch.ones(1))["params.0"].tolist() == [1.0, 0.0]  # the one whose index is given


def test_norm_of_nothing():
    jacobian_of = Wrapped(lambda x, p: (x * p).norm(dim=1), torch.zeros(3, dtype=F64))
    check_rule(jacobian_of, normal(6, 3))


@pytest.mark.parametrize("dim", [0, 1, None])
def test_weights_with_a_norm_of_their_own(dim):
    torch.manual_seed(0)
    model = nn.Sequential(weight_norm(nn.Linear(3, 5), dim=dim), nn.Tanh(), weight_norm(nn.Linear(5, 2), dim=dim))
    x, named = normal(6, 3), dict(model.double().named_parameters())
    jacobian = linearize(model, x)
    assert jacobian.reason is None and not jacobian.opaque
    outputs, u = model(x), normal(6, 2, seed=5)
    torch.testing.assert_close(jacobian.outputs, outputs.detach())
    found = jacobian.vjp(u)
    for t, wanted in zip(found.values(), torch.autograd.grad(outputs, list(named.values()), u), strict=True):
        torch.testing.assert_close(t, wanted)
    v = {n: normal(*p.shape, seed=6) for n, p in named.items()}
    torch.testing.assert_close((jacobian.jvp(v) * u).sum(), sum((t * v[n]).sum() for n, t in found.items()))
    check_example_gradients(model, x)
