"""The same entries in memory of another layout, device or dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._tape import (
    Node,
    Operand,
    Var,
    accumulated,
    rule,
    value_of,
)


class Same(Node):
    """The same entries, in memory of another layout, device or dtype."""

    shares_memory = True

    def __init__(self, x: Operand, value: Tensor) -> None:
        super().__init__(x)
        self.source, self.target = value_of(x).new_empty(0), value.new_empty(0)
        self.casts = self.source.dtype != self.target.dtype or self.source.device != self.target.device

    def jvp(self, tangents: Sequence[Tensor | None]) -> Tensor:
        assert tangents[0] is not None
        return tangents[0].to(self.target) if self.casts else tangents[0]

    def vjp(self, i: int, cotangent: Tensor, into: Tensor | None) -> Tensor:
        return accumulated(cotangent.to(self.source) if self.casts else cotangent, into)

    def batch_dim(self, dims: Sequence[int | None], batch: int) -> int | None:
        return dims[0]


def _same(input: Operand, value: Tensor) -> Any:
    if isinstance(input, Var) and value is input.value:
        return input
    if isinstance(input, Var) and input.active and not value.is_floating_point():
        return NotImplemented
    return Same(input, value), value


@rule(Tensor.contiguous)
def contiguous(input: Operand, *, memory_format: Any = torch.contiguous_format) -> Any:
    return _same(input, value_of(input).contiguous(memory_format=memory_format))


@rule(torch.clone, Tensor.clone)
def clone(input: Operand, *, memory_format: Any = torch.preserve_format) -> Any:
    return _same(input, value_of(input).clone(memory_format=memory_format))


@rule(Tensor.to)
def to(input: Operand, *args: Any, **kwargs: Any) -> Any:
    given = {name: value_of(x) for name, x in kwargs.items()}
    return _same(input, value_of(input).to(*map(value_of, args), **given))


@rule(Tensor.type)
def type(input: Operand, *args: Any, **kwargs: Any) -> Any:
    value = value_of(input).type(*args, **kwargs)
    return _same(input, value) if isinstance(value, Tensor) else NotImplemented


@rule(Tensor.type_as)
def type_as(input: Operand, other: Operand) -> Any:
    return _same(input, value_of(input).type_as(value_of(other)))


def _cast(method: Callable[[Tensor], Tensor]) -> None:
    @rule(method)
    def cast(input: Operand) -> Any:
        return _same(input, method(value_of(input)))


for _method in ("float", "double", "half", "bfloat16", "bool", "byte", "char", "short", "int", "long", "cpu"):
    _cast(getattr(Tensor, _method))
