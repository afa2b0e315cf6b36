"""Functions of several numbers, applied to each element of tensors that are broadcast: a factor for each operand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .._tape import (
    OUT_OF_PLACE,
    MixesExamples,
    Node,
    Operand,
    OuterProducts,
    Rows,
    Var,
    accumulated,
    rule,
    value_of,
)
from ._broadcast import Spread, common_dim

#: The derivative in an operand: a number, a tensor that is broadcast to the result, or None for one.
Factor = float | Tensor | None


class Elementwise(Node):
    """The sum of the operands' tangents, each times a fixed factor."""

    def __init__(self, operands: Sequence[Any], factors: Sequence[Factor], value: Tensor) -> None:
        super().__init__(*operands)
        shapes = [x.shape if isinstance(x, Tensor) else () for x in map(value_of, operands)]
        dtypes = [x.dtype if isinstance(x, Tensor) else value.dtype for x in map(value_of, operands)]
        #: Numbers that tensors hold keep their precision; what is as large as the result has its dtype.
        self.factors = tuple(
            f.to(value.dtype)
            if isinstance(f, Tensor) and (f.dim() or not f.is_floating_point())
            else (float(f) if isinstance(f, bool) else f)
            for f in (factors if self.wanted else ())
        )
        self.shapes, self.shape, self.dtype = shapes, value.shape, value.dtype
        self.spreads = {i: Spread(shapes[i], value.shape) for i in self.wanted}
        self.casts = {i: dtypes[i] for i in self.wanted if dtypes[i] != value.dtype}
        self.shares_memory = any(factors[i] is None or not self.spreads[i].trivial for i in self.wanted)

    def jvp(self, tangents: Sequence[Tensor | None]) -> Tensor:
        result: Tensor | None = None
        for i in self.wanted:
            tangent, factor = tangents[i], self.factors[i]
            if tangent is None:
                continue
            if i in self.casts:
                tangent = tangent.to(self.dtype)
            if result is None:
                result = tangent if factor is None else tangent * factor
            elif isinstance(factor, Tensor):
                result = result.addcmul(tangent, factor)
            else:
                result = result.add(tangent, alpha=1 if factor is None else factor)
        assert result is not None
        return result if result.shape == self.shape else result.expand(self.shape)

    def vjp(self, i: int, cotangent: Tensor, into: Tensor | None) -> Tensor:
        spread, factor = self.spreads[i], self.factors[i]
        if into is not None and spread.trivial and i not in self.casts:
            if isinstance(factor, Tensor):
                return into.addcmul_(cotangent, factor)
            return into.add_(cotangent, alpha=1 if factor is None else factor)
        return accumulated(spread.gathered(self._scaled(i, cotangent)), into)

    def _scaled(self, i: int, cotangent: Tensor) -> Tensor:
        factor = self.factors[i]
        result = cotangent if factor is None else cotangent * factor
        return result.to(self.casts[i]) if i in self.casts else result

    def batch_dim(self, dims: Sequence[int | None], batch: int) -> int | None:
        """The one that the operands agree on, counted from the last."""
        return common_dim(self.shapes, dims, len(self.shape), batch)

    def example_gradients(
        self, i: int, cotangent: Tensor, dims: Sequence[int | None], batch: int
    ) -> OuterProducts | Rows:
        dim = self.batch_dim(dims, batch)
        if dim is None:
            raise MixesExamples("a param is an operand where there are no examples")
        return Rows(self.spreads[i].rows(self._scaled(i, cotangent), dim, batch))


def is_active(*operands: Any) -> bool:
    """Whether one of the operands depends on the params."""
    return any(isinstance(x, Var) and x.active for x in operands)


def _elementwise(operands: Sequence[Any], factors: Sequence[Factor], value: Tensor) -> Any:
    if is_active(*operands) and not value.is_floating_point():
        return NotImplemented
    return Elementwise(operands, factors, value), value


def _scalable(x: Any) -> bool:
    """Whether something can be a factor: a tensor or a real number."""
    return isinstance(value_of(x), Tensor) or (isinstance(x, Real) and not isinstance(x, bool))


@rule(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def add(input: Operand, other: Any, *, alpha: float = 1) -> Any:
    a, b = value_of(input), value_of(other)
    return _elementwise((input, other), (None, None if alpha == 1 else alpha), torch.add(a, b, alpha=alpha))


@rule(torch.sub, Tensor.sub, Tensor.__sub__, torch.subtract, Tensor.subtract)
def sub(input: Operand, other: Any, *, alpha: float = 1) -> Any:
    value = torch.sub(value_of(input), value_of(other), alpha=alpha)
    return _elementwise((input, other), (None, -alpha), value)


@rule(torch.rsub, Tensor.__rsub__)
def rsub(input: Operand, other: Any, *, alpha: float = 1) -> Any:
    value = torch.rsub(value_of(input), value_of(other), alpha=alpha)
    return _elementwise((input, other), (-alpha, None), value)


@rule(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply)
def mul(input: Operand, other: Any) -> Any:
    a, b = value_of(input), value_of(other)
    return _elementwise((input, other), (b, a), torch.mul(a, b))


@rule(
    torch.div,
    Tensor.div,
    Tensor.__truediv__,
    torch.true_divide,
    Tensor.true_divide,
    torch.divide,
    Tensor.divide,
)
def div(input: Operand, other: Any, *, rounding_mode: str | None = None) -> Any:
    a, b = value_of(input), value_of(other)
    value = torch.div(a, b, rounding_mode=rounding_mode)
    if not is_active(input, other):
        return Elementwise((input, other), (None, None), value), value
    if rounding_mode is not None:
        return NotImplemented
    of_a = 1 / b
    return _elementwise((input, other), (of_a, -value * of_a if is_active(other) else None), value)


@rule(Tensor.__rtruediv__, Tensor.__rdiv__)
def rtruediv(input: Operand, other: Any) -> Any:
    return div(other, input) if isinstance(value_of(other), Tensor) else _over(other, input)


def _over(number: float, x: Operand) -> Any:
    value = number / value_of(x)
    return _elementwise((x,), (-value / value_of(x),), value)


@rule(torch.reciprocal, Tensor.reciprocal)
def reciprocal(input: Operand) -> Any:
    return _over(1, input)


@rule(torch.neg, Tensor.neg, Tensor.__neg__, torch.negative, Tensor.negative)
def neg(input: Operand) -> Any:
    return _elementwise((input,), (-1,), value_of(input).neg())


@rule(torch.positive, Tensor.positive, Tensor.__pos__)
def positive(input: Operand) -> Any:
    return _elementwise((input,), (None,), value_of(input))


@rule(torch.pow, Tensor.pow, Tensor.__pow__)
def power(input: Operand, exponent: Any) -> Any:
    x, n = value_of(input), value_of(exponent)
    if not is_active(input, exponent):
        value = torch.pow(x, n)
        return Elementwise((input, exponent), (None, None), value), value
    if isinstance(n, Tensor) or not _scalable(n):
        return _root(x, exponent) if not isinstance(x, Tensor) and isinstance(x, Real) else NotImplemented
    value = x.pow(n)
    factor = torch.zeros_like(value) if n == 0 else x.pow(n - 1).mul_(n)
    return _elementwise((input,), (factor,), value)


@rule(Tensor.__rpow__)
def rpow(input: Operand, other: Any) -> Any:
    if isinstance(value_of(other), Tensor) or not isinstance(other, Real) or other <= 0:
        return NotImplemented
    return _root(other, input)


def _root(base: Any, exponent: Operand) -> Any:
    """A positive number to the power of a tensor."""
    if base <= 0:
        return NotImplemented
    value = torch.pow(base, value_of(exponent))
    return _elementwise((exponent,), (value * math.log(base),), value)


@rule(torch.addcmul, Tensor.addcmul)
def addcmul(input: Operand, tensor1: Operand, tensor2: Operand, *, value: float = 1) -> Any:
    x, a, b = value_of(input), value_of(tensor1), value_of(tensor2)
    factors = (None, b if value == 1 else b * value, a if value == 1 else a * value)
    return _elementwise((input, tensor1, tensor2), factors, torch.addcmul(x, a, b, value=value))


@rule(torch.lerp, Tensor.lerp)
def lerp(input: Operand, end: Operand, weight: Any) -> Any:
    a, b, w = value_of(input), value_of(end), value_of(weight)
    return _elementwise((input, end, weight), (1 - w, w, b - a), torch.lerp(a, b, w))


@rule(torch.maximum, Tensor.maximum)
def maximum(input: Operand, other: Operand) -> Any:
    a, b = value_of(input), value_of(other)
    return _larger(input, other, torch.maximum(a, b), a > b)


@rule(torch.minimum, Tensor.minimum)
def minimum(input: Operand, other: Operand) -> Any:
    a, b = value_of(input), value_of(other)
    return _larger(input, other, torch.minimum(a, b), a < b)


def _larger(input: Operand, other: Operand, value: Tensor, first: Tensor) -> Any:
    """The larger of two, or the smaller; half of each where both are the same."""
    factor = torch.where(value_of(input) == value_of(other), 0.5, first.to(torch.float64)).to(value.dtype)
    return _elementwise((input, other), (factor, 1 - factor), value)


@rule(torch.where)
def where(condition: Operand, input: Any, other: Any) -> Any:
    return _chosen(value_of(condition), condition, input, other)


@rule(Tensor.where)
def where_method(self: Any, condition: Operand, other: Any) -> Any:
    return _chosen(value_of(condition), condition, self, other)


def _chosen(first: Tensor, condition: Operand, input: Any, other: Any) -> Any:
    value = torch.where(first, value_of(input), value_of(other))
    if not is_active(input, other):
        return Elementwise((condition, input, other), (None, None, None), value), value
    kept = first.to(value.dtype)
    return _elementwise((condition, input, other), (None, kept, 1 - kept if is_active(other) else None), value)


@rule(torch.masked_fill, Tensor.masked_fill)
def masked_fill(input: Operand, mask: Operand, value: Any) -> Any:
    if is_active(value):
        return NotImplemented
    x, chosen = value_of(input), value_of(mask)
    result = x.masked_fill(chosen, value_of(value))
    return _elementwise((input, mask), ((~chosen).to(result.dtype), None), result)


@rule(torch.tril, Tensor.tril)
def tril(input: Operand, diagonal: int = 0) -> Any:
    return _triangle(input, diagonal, torch.tril)


@rule(torch.triu, Tensor.triu)
def triu(input: Operand, diagonal: int = 0) -> Any:
    return _triangle(input, diagonal, torch.triu)


def _triangle(input: Operand, diagonal: int, function: Callable[[Tensor, int], Tensor]) -> Any:
    x = value_of(input)
    return _elementwise((input,), (function(torch.ones_like(x), diagonal),), function(x, diagonal))


@rule(torch.clamp, Tensor.clamp, torch.clip, Tensor.clip)
def clamp(input: Operand, min: Any = None, max: Any = None) -> Any:
    if is_active(min, max):
        return NotImplemented
    x, low, high = value_of(input), value_of(min), value_of(max)
    value = x.clamp(low, high)
    if not is_active(input):
        return Elementwise((input, min, max), (None, None, None), value), value
    inside = torch.ones_like(value, dtype=torch.bool)
    if low is not None:
        inside &= x >= low
    if high is not None:
        inside &= x <= high
    return _elementwise((input, min, max), (inside.to(value.dtype), None, None), value)


@rule(torch.clamp_min, Tensor.clamp_min)
def clamp_min(input: Operand, min: Any) -> Any:
    return clamp(input, min)


@rule(torch.clamp_max, Tensor.clamp_max)
def clamp_max(input: Operand, max: Any) -> Any:
    return clamp(input, None, max)


def _without_tangent(function: Any, *methods: Any) -> None:
    """A function of data alone whose entries belong where its operands' do; of active operands it is a constant."""

    @rule(function, *methods)
    def compare(*operands: Any) -> Any:
        if is_active(*operands):
            return NotImplemented
        value = function(*map(value_of, operands))
        return Elementwise(operands, (None,) * len(operands), value), value


for _name, _operators in {
    "eq": ("__eq__",),
    "ne": ("__ne__",),
    "lt": ("__lt__",),
    "le": ("__le__",),
    "gt": ("__gt__",),
    "ge": ("__ge__",),
    "logical_and": (),
    "logical_or": (),
    "logical_xor": (),
    "logical_not": (),
    "bitwise_and": ("__and__",),
    "bitwise_or": ("__or__",),
    "bitwise_xor": ("__xor__",),
    "bitwise_not": ("__invert__",),
    "isnan": (),
    "isinf": (),
    "isfinite": (),
    "floor_divide": ("__floordiv__",),
    "remainder": ("__mod__",),
    "floor": (),
    "ceil": (),
    "round": (),
    "sign": (),
}.items():
    _without_tangent(getattr(torch, _name), getattr(Tensor, _name), *(getattr(Tensor, o) for o in _operators))

OUT_OF_PLACE.update(
    {
        Tensor.add_: torch.add,
        Tensor.__iadd__: torch.add,
        Tensor.sub_: torch.sub,
        Tensor.__isub__: torch.sub,
        Tensor.mul_: torch.mul,
        Tensor.__imul__: torch.mul,
        Tensor.div_: torch.div,
        Tensor.__itruediv__: torch.div,
        Tensor.pow_: torch.pow,
        Tensor.__ipow__: torch.pow,
        Tensor.neg_: torch.neg,
        torch.neg_: torch.neg,
        Tensor.reciprocal_: torch.reciprocal,
        Tensor.addcmul_: torch.addcmul,
        Tensor.lerp_: torch.lerp,
        Tensor.masked_fill_: torch.masked_fill,
        Tensor.clamp_: torch.clamp,
        torch.clamp_: torch.clamp,
        Tensor.clamp_min_: torch.clamp_min,
        Tensor.clamp_max_: torch.clamp_max,
    }
)
