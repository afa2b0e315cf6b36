"""Entries repeated, by broadcasting or in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._tape import (
    MixesExamples,
    Node,
    Operand,
    OuterProducts,
    Rows,
    accumulated,
    rule,
    value_of,
)
from ._arguments import sizes
from ._broadcast import Spread, reshaped_dim


class Tiled(Node):
    """Entries repeated: a reshape, a broadcast, and a reshape.

    Where it starts from params alone, the first new dimension that is as large as the batch is taken for it: should it
    be another, what uses it as another refuses to take examples apart.
    """

    shares_memory = True

    def __init__(self, x: Operand, inner: Sequence[int], outer: Sequence[int], after: Sequence[int]) -> None:
        super().__init__(x)
        self.before, self.after = tuple(value_of(x).shape), tuple(after)
        self.spread = Spread(inner, outer)

    def jvp(self, tangents: Sequence[Tensor | None]) -> Tensor:
        assert tangents[0] is not None
        result = tangents[0]
        if self.spread.shape != self.before:
            result = result.reshape(self.spread.shape)
        result = result.expand(self.spread.result)
        return result if self.spread.result == self.after else result.reshape(self.after)

    def vjp(self, i: int, cotangent: Tensor, into: Tensor | None) -> Tensor:
        result = self.spread.gathered(cotangent.reshape(self.spread.result))
        return accumulated(result.reshape(self.before), into)

    def batch_dim(self, dims: Sequence[int | None], batch: int) -> int | None:
        outer = self._outer_dim(dims[0], batch)
        return None if outer is None else reshaped_dim(self.spread.result, outer, self.after, batch)

    def _outer_dim(self, dim: int | None, batch: int) -> int | None:
        """Where examples are after the broadcast."""
        inner, outer = self.spread.shape, self.spread.result
        new = len(outer) - len(inner)
        if dim is not None:
            return new + reshaped_dim(self.before, dim, inner, batch)
        sizes = zip((1,) * new + inner, outer, strict=True)
        return next((d for d, (s, t) in enumerate(sizes) if s == 1 and t == batch), None)

    def example_gradients(
        self, i: int, cotangent: Tensor, dims: Sequence[int | None], batch: int
    ) -> OuterProducts | Rows:
        dim = self._outer_dim(None, batch)
        if dims[0] is not None or dim is None:
            raise MixesExamples("a repetition of a param is not over examples")
        rows = self.spread.rows(cotangent.reshape(self.spread.result), dim, batch)
        return Rows(rows.reshape(batch, *self.before))


@rule(Tensor.expand)
def expand(input: Operand, *sizes: Any) -> Any:
    value = value_of(input).expand(*sizes)
    return Tiled(input, value_of(input).shape, value.shape, value.shape), value


@rule(torch.broadcast_to, Tensor.broadcast_to)
def broadcast_to(input: Operand, *size: Any) -> Any:
    return expand(input, *size)


@rule(Tensor.expand_as)
def expand_as(input: Operand, other: Operand) -> Any:
    return expand(input, value_of(other).shape)


@rule(Tensor.repeat, torch.tile, Tensor.tile)
def repeat(input: Operand, *repeats: Any) -> Any:
    x, times = value_of(input), sizes(repeats)
    times = (1,) * (x.dim() - len(times)) + times
    shape = (1,) * (len(times) - x.dim()) + tuple(x.shape)
    inner = [n for size in shape for n in (1, size)]
    outer = [n for pair in zip(times, shape, strict=True) for n in pair]
    value = x.repeat(times)
    return Tiled(input, inner, outer, value.shape), value


@rule(torch.repeat_interleave, Tensor.repeat_interleave)
def repeat_interleave(input: Operand, repeats: Any, dim: int | None = None) -> Any:
    x = value_of(input)
    if not isinstance(repeats, int) or (dim is None and x.dim() != 1) or x.dim() == 0:
        return NotImplemented
    shape = list(x.shape)
    after = (dim or 0) % x.dim() + 1
    value = x.repeat_interleave(repeats, dim or 0)
    inner, outer = ([*shape[:after], n, *shape[after:]] for n in (1, repeats))
    return Tiled(input, inner, outer, value.shape), value
