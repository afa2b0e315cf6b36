"""The same entries in another shape or order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from ._arguments import sizes
from ._broadcast import reshaped_dim


class Reshaped(Node):
    """The same entries in the same order, in another shape."""

    shares_memory = True

    def __init__(self, x: Operand, after: Sequence[int]) -> None:
        super().__init__(x)
        self.before = value_of(x).shape
        self.after = tuple(after)

    def jvp(self, tangents: Sequence[Tensor | None]) -> Tensor:
        assert tangents[0] is not None
        return tangents[0].reshape(self.after)

    def vjp(self, i: int, cotangent: Tensor, into: Tensor | None) -> Tensor:
        return accumulated(cotangent.reshape(self.before), into)

    def batch_dim(self, dims: Sequence[int | None], batch: int) -> int | None:
        return None if dims[0] is None else reshaped_dim(self.before, dims[0], self.after, batch)


def _reshaped(input: Operand, value: Tensor) -> Any:
    return Reshaped(input, value.shape), value


@rule(torch.reshape, Tensor.reshape)
def reshape(input: Operand, *sizes: Any, shape: Any = None) -> Any:
    return _reshaped(input, value_of(input).reshape(*sizes) if shape is None else value_of(input).reshape(shape))


@rule(Tensor.view)
def view(input: Operand, *sizes: Any) -> Any:
    if sizes and isinstance(sizes[0], torch.dtype):
        return NotImplemented
    return _reshaped(input, value_of(input).view(*sizes))


@rule(Tensor.view_as, Tensor.reshape_as)
def view_as(input: Operand, other: Operand) -> Any:
    return _reshaped(input, value_of(input).reshape(value_of(other).shape))


@rule(torch.flatten, Tensor.flatten)
def flatten(input: Operand, start_dim: int = 0, end_dim: int = -1) -> Any:
    return _reshaped(input, value_of(input).flatten(start_dim, end_dim))


@rule(torch.ravel, Tensor.ravel)
def ravel(input: Operand) -> Any:
    return _reshaped(input, value_of(input).ravel())


@rule(torch.unflatten, Tensor.unflatten)
def unflatten(input: Operand, dim: int, sizes: Any) -> Any:
    return _reshaped(input, value_of(input).unflatten(dim, sizes))


@rule(torch.squeeze, Tensor.squeeze)
def squeeze(input: Operand, dim: Any = ()) -> Any:
    x = value_of(input)
    return _reshaped(input, x.squeeze() if dim == () else x.squeeze(dim))


@rule(torch.unsqueeze, Tensor.unsqueeze)
def unsqueeze(input: Operand, dim: int) -> Any:
    return _reshaped(input, value_of(input).unsqueeze(dim))


class Permuted(Node):
    """Dimensions in another order."""

    shares_memory = True

    def __init__(self, x: Operand, order: Sequence[int]) -> None:
        super().__init__(x)
        self.order = tuple(order)
        self.back = tuple(sorted(range(len(order)), key=order.__getitem__))

    def jvp(self, tangents: Sequence[Tensor | None]) -> Tensor:
        assert tangents[0] is not None
        return tangents[0].permute(self.order)

    def vjp(self, i: int, cotangent: Tensor, into: Tensor | None) -> Tensor:
        return accumulated(cotangent.permute(self.back), into)

    def batch_dim(self, dims: Sequence[int | None], batch: int) -> int | None:
        return None if dims[0] is None else self.back[dims[0]]


def _permuted(input: Operand, order: Sequence[int]) -> Any:
    return Permuted(input, order), value_of(input).permute(*order)


@rule(torch.permute, Tensor.permute)
def permute(input: Operand, *order: Any, dims: Any = None) -> Any:
    return _permuted(input, [d % value_of(input).dim() for d in sizes(order if dims is None else dims)])


@rule(torch.transpose, Tensor.transpose, torch.swapaxes, Tensor.swapaxes, torch.swapdims, Tensor.swapdims)
def transpose(input: Operand, dim0: int, dim1: int) -> Any:
    rank = value_of(input).dim()
    order = list(range(rank))
    if rank:
        order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permuted(input, order)


@rule(torch.t, Tensor.t)
def t(input: Operand) -> Any:
    return _permuted(input, range(value_of(input).dim())[::-1])


@rule(torch.movedim, Tensor.movedim, torch.moveaxis, Tensor.moveaxis)
def movedim(input: Operand, source: Any, destination: Any) -> Any:
    rank = value_of(input).dim()
    sources = [d % rank for d in sizes([source])]
    places = dict(zip([d % rank for d in sizes([destination])], sources, strict=True))
    others = (d for d in range(rank) if d not in sources)
    return _permuted(input, [places[d] if d in places else next(others) for d in range(rank)])


class Shuffled(Node):
    """Entries in another order along some dimensions."""

    def __init__(
        self, x: Operand, forth: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor], dims: Sequence[int]
    ) -> None:
        super().__init__(x)
        self.forth, self.back = forth, back
        self.dims = [d % value_of(x).dim() for d in dims]

    def jvp(self, tangents: Sequence[Tensor | None]) -> Tensor:
        assert tangents[0] is not None
        return self.forth(tangents[0])

    def vjp(self, i: int, cotangent: Tensor, into: Tensor | None) -> Tensor:
        return accumulated(self.back(cotangent), into)

    def batch_dim(self, dims: Sequence[int | None], batch: int) -> int | None:
        if dims[0] in self.dims and batch != 1:
            raise MixesExamples("examples are moved to the places of others")
        return dims[0]


@rule(torch.roll, Tensor.roll)
def roll(input: Operand, shifts: Any, dims: Any = None) -> Any:
    if dims is None or dims == ():
        return NotImplemented
    by, over = sizes([shifts]), sizes([dims])
    back = tuple(-n for n in by)
    return (
        Shuffled(input, lambda x: x.roll(by, over), lambda x: x.roll(back, over), over),
        value_of(input).roll(by, over),
    )


@rule(torch.flip, Tensor.flip)
def flip(input: Operand, *over: Any, dims: Any = None) -> Any:
    over = sizes(over) if dims is None else sizes([dims])
    return Shuffled(input, lambda x: x.flip(over), lambda x: x.flip(over), over), value_of(input).flip(over)
