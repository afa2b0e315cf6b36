"""Tensors put together as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._tape import (
    MixesExamples,
    Node,
    Operand,
    accumulated,
    rule,
    value_of,
)
from ._arguments import at


class Joined(Node):
    """Tensors one after the other along a dimension: one that they have, or a new one."""

    shares_memory = True

    def __init__(self, tensors: Sequence[Operand], value: Tensor, dim: int, new: bool) -> None:
        super().__init__(*tensors)
        values = [value_of(x) for x in tensors]
        self.dim, self.new, self.dtype = dim, new, value.dtype
        self.zeros = [x.new_zeros(()).expand(x.shape) for x in values]
        self.places: list[Any] = []
        start = 0
        for x in values:
            size = 1 if new else x.shape[dim] if x.dim() > dim else 0
            self.places.append(at(dim, start if new else slice(start, start + size)))
            start += size

    def jvp(self, tangents: Sequence[Tensor | None]) -> Tensor:
        parts = [z if t is None else t for t, z in zip(tangents, self.zeros, strict=True)]
        return torch.stack(parts, self.dim) if self.new else torch.cat(parts, self.dim)

    def vjp(self, i: int, cotangent: Tensor, into: Tensor | None) -> Tensor:
        part = cotangent[self.places[i]]
        zeros = self.zeros[i]
        if part.dtype != zeros.dtype or part.shape != zeros.shape:
            part = part.to(zeros.dtype).reshape(zeros.shape)
        return accumulated(part, into)

    def batch_dim(self, dims: Sequence[int | None], batch: int) -> int | None:
        found = {d for d in dims if d is not None}
        if not found:
            return None
        dim = min(found)
        if batch != 1 and (len(found) > 1 or (dim == self.dim and not self.new)):
            raise MixesExamples("tensors are joined along their examples")
        return dim + 1 if self.new and self.dim <= dim else dim


@rule(torch.cat, torch.concat, torch.concatenate)
def cat(tensors: Sequence[Operand], dim: int = 0, axis: int | None = None) -> Any:
    dim = dim if axis is None else axis
    value = torch.cat([value_of(x) for x in tensors], dim)
    return Joined(tensors, value, dim % value.dim(), new=False), value


@rule(torch.stack)
def stack(tensors: Sequence[Operand], dim: int = 0) -> Any:
    value = torch.stack([value_of(x) for x in tensors], dim)
    return Joined(tensors, value, dim % value.dim(), new=True), value
