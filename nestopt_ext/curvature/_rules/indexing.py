"""Some of a tensor's entries: slices, parts, and what tensors of numbers pick."""

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
    Var,
    accumulated,
    by_example,
    rule,
    value_of,
)
from ._arguments import at


class Sliced(Node):
    """Entries that integers and slices pick: a view."""

    shares_memory = True
    makes_cotangent = True

    def __init__(self, x: Operand, index: tuple[Any, ...]) -> None:
        super().__init__(x)
        self.shape = value_of(x).shape
        self.index = index

    def jvp(self, tangents: Sequence[Tensor | None]) -> Tensor:
        assert tangents[0] is not None
        return tangents[0][self.index]

    def vjp(self, i: int, cotangent: Tensor, into: Tensor | None) -> Tensor:
        if into is None:
            into = cotangent.new_zeros(self.shape)
            into[self.index] = cotangent
        else:
            into[self.index].add_(cotangent)
        return into

    def batch_dim(self, dims: Sequence[int | None], batch: int) -> int | None:
        if dims[0] is None:
            return None
        operand = result = 0
        for part in self.index:
            if part is None:
                result += 1
                continue
            whole = isinstance(part, slice) and part.indices(self.shape[operand])[:3] == (0, self.shape[operand], 1)
            if operand == dims[0]:
                if not whole:
                    raise MixesExamples("an index picks some of the examples")
                return result
            operand += 1
            result += isinstance(part, slice)
        return dims[0] - operand + result


def _full(index: Any, rank: int) -> tuple[Any, ...]:
    """An index as a tuple without an Ellipsis."""
    parts = index if isinstance(index, tuple) else (index,)
    taken = sum(_reach(p) for p in parts if p is not None and p is not Ellipsis)
    for k, part in enumerate(parts):
        if part is Ellipsis:
            return (*parts[:k], *([slice(None)] * (rank - taken)), *parts[k + 1 :])
    return parts


def _reach(part: Any) -> int:
    """How many dimensions of the operand a part of an index stands for."""
    value = value_of(part)
    return value.dim() if isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8) else 1


def _sliced(input: Operand, *index: Any) -> Any:
    return Sliced(input, index), value_of(input)[index]


class Indexed(Node):
    """Entries that tensors pick, with what else an index may hold.

    ``places`` are where the entries come from in the operand, as one number each.
    """

    def __init__(self, x: Operand, index: tuple[Any, ...], start: int) -> None:
        found = [part for part in index if isinstance(part, Var)]
        super().__init__(x, *found)
        self.shape = value_of(x).shape
        self.index = tuple(value_of(part) for part in index)
        self.ranks = [part.value.dim() for part in found]
        self.rank = max(value_of(p).dim() for p in index if isinstance(value_of(p), Tensor))
        self.start = start
        device = value_of(x).device
        self.places = torch.arange(self.shape.numel(), device=device).view(self.shape)[self.index]

    def jvp(self, tangents: Sequence[Tensor | None]) -> Tensor:
        assert tangents[0] is not None
        return tangents[0][self.index]

    def vjp(self, i: int, cotangent: Tensor, into: Tensor | None) -> Tensor:
        if into is not None and into.is_contiguous():
            into.view(-1).index_add_(0, self.places.reshape(-1), cotangent.reshape(-1))
            return into
        result = cotangent.new_zeros(self.shape.numel())
        result = result.index_add(0, self.places.reshape(-1), cotangent.reshape(-1)).view(self.shape)
        return accumulated(result, into)

    def batch_dim(self, dims: Sequence[int | None], batch: int) -> int | None:
        """The dimension along which entries come from one example after the other; of a param, that of the index."""
        of_index = [self.start + self.rank - r + d for r, d in zip(self.ranks, dims[1:], strict=True) if d is not None]
        if dims[0] is None:
            return of_index[0] if of_index else None
        size, inner = self.shape[dims[0]], self.shape[dims[0] + 1 :].numel()
        example = self.places // inner % size // (size // max(batch, 1))
        for d, length in enumerate(self.places.shape):
            if batch and length and length % batch == 0:
                wanted = torch.arange(batch, device=example.device).repeat_interleave(length // batch)
                if bool((example.movedim(d, -1) == wanted).all()):
                    return d
        raise MixesExamples("an index picks from several examples")

    def example_gradients(
        self, i: int, cotangent: Tensor, dims: Sequence[int | None], batch: int
    ) -> OuterProducts | Rows:
        dim = self.batch_dim(dims, batch)
        if dims[0] is not None or dim is None:
            raise MixesExamples("an index of a param is the same for all examples")
        places = by_example(self.places, dim, batch).reshape(batch, -1)
        rows = cotangent.new_zeros(batch, self.shape.numel())
        rows.scatter_add_(1, places, by_example(cotangent, dim, batch).reshape(batch, -1))
        return Rows(rows.view(batch, *self.shape))


class Picked(Indexed):
    """Whole slices along one dimension that a tensor of numbers picks."""

    def __init__(self, x: Operand, dim: int, index: Operand) -> None:
        Node.__init__(self, x, *([index] if isinstance(index, Var) else []))
        picked = value_of(index)
        self.shape = value_of(x).shape
        self.index = at(dim, picked)
        self.ranks = [picked.dim()] * (len(self.slots) - 1)
        self.rank, self.start = picked.dim(), dim
        self.numbers = torch.where(picked < 0, picked + self.shape[dim], picked).reshape(-1)

    @property
    def places(self) -> Tensor:  # type: ignore[override]
        """Made where it is asked for: products do without."""
        places = torch.arange(self.shape.numel(), device=self.numbers.device).view(self.shape)
        return places[self.index]

    def vjp(self, i: int, cotangent: Tensor, into: Tensor | None) -> Tensor:
        source = cotangent.flatten(self.start, self.start + self.rank - 1)
        if into is None:
            return cotangent.new_zeros(self.shape).index_add(self.start, self.numbers, source)
        return into.index_add_(self.start, self.numbers, source)


@rule(Tensor.__getitem__)
def getitem(input: Operand, index: Any) -> Any:
    x = value_of(input)
    parts = _full(index, x.dim())
    if any(isinstance(part, bool) for part in parts) or isinstance(index, list):
        return NotImplemented
    if all(part is None or isinstance(part, int | slice) for part in parts):
        return _sliced(input, *parts)
    parts = tuple(torch.tensor(p, device=x.device) if isinstance(p, list) else p for p in parts)
    if not all(part is None or isinstance(part, int | slice | Tensor | Var) for part in parts):
        return NotImplemented
    tensors = [k for k, part in enumerate(parts) if isinstance(part, Tensor | Var)]
    before = parts[: tensors[0]]
    alone = len(tensors) == 1 and len(parts) == len(before) + 1 and all(part == slice(None) for part in before)
    if alone and _is_numbers(parts[-1]):
        return Picked(input, len(before), parts[-1]), x[at(len(before), value_of(parts[-1]))]
    # Integers count as tensors here; results of an index that is torn apart come first.
    spread = [k for k, part in enumerate(parts) if isinstance(part, Tensor | Var | int)]
    together = spread == list(range(spread[0], spread[-1] + 1))
    start = sum(1 for part in parts[: spread[0]] if not isinstance(part, int)) if together else 0
    node = Indexed(input, parts, start)
    return node, x[node.index]


def _is_numbers(index: Operand) -> bool:
    value: Tensor = value_of(index)
    return value.dim() > 0 and value.dtype in (torch.int64, torch.int32)


@rule(torch.index_select, Tensor.index_select)
def index_select(input: Operand, dim: int, index: Operand) -> Any:
    x = value_of(input)
    if x.dim() == 0 or value_of(index).dim() == 0:
        return NotImplemented
    return Picked(input, dim % x.dim(), index), x.index_select(dim, value_of(index))


@rule(torch.narrow, Tensor.narrow)
def narrow(input: Operand, dim: int, start: Any, length: int) -> Any:
    x = value_of(input)
    x.narrow(dim, value_of(start), length)  # its own checks
    dim %= x.dim()
    start = int(value_of(start)) % x.shape[dim] if x.shape[dim] and value_of(start) < 0 else int(value_of(start))
    return _sliced(input, *at(dim, slice(start, start + length)))


@rule(torch.select, Tensor.select)
def select(input: Operand, dim: int, index: int) -> Any:
    return _sliced(input, *at(dim % value_of(input).dim(), index))


@rule(torch.unbind, Tensor.unbind)
def unbind(input: Operand, dim: int = 0) -> Any:
    x = value_of(input)
    dim %= x.dim()
    return [_sliced(input, *at(dim, n)) for n in range(x.shape[dim])]


def _parts(input: Operand, dim: int, parts: Sequence[Tensor]) -> Any:
    """Neighbours along a dimension, as large as ``parts``."""
    dim %= value_of(input).dim()
    result, start = [], 0
    for part in parts:
        stop = start + part.shape[dim]
        result.append(_sliced(input, *at(dim, slice(start, stop))))
        start = stop
    return result


@rule(torch.split, Tensor.split)
def split(tensor: Operand, split_size_or_sections: Any, dim: int = 0) -> Any:
    return _parts(tensor, dim, value_of(tensor).split(split_size_or_sections, dim))


@rule(Tensor.split)
def split_method(self: Operand, split_size: Any, dim: int = 0) -> Any:
    return split(self, split_size, dim)


@rule(torch.split_with_sizes, Tensor.split_with_sizes)
def split_with_sizes(input: Operand, split_sizes: Any, dim: int = 0) -> Any:
    return split(input, split_sizes, dim)


@rule(torch.chunk, Tensor.chunk)
def chunk(input: Operand, chunks: int, dim: int = 0) -> Any:
    return _parts(input, dim, value_of(input).chunk(chunks, dim))


@rule(torch.tensor_split, Tensor.tensor_split)
def tensor_split(input: Operand, indices_or_sections: Any, dim: int = 0) -> Any:
    return _parts(input, dim, value_of(input).tensor_split(indices_or_sections, dim))


class Gathered(Node):
    """Entries along one dimension that a tensor of numbers picks, one by one."""

    def __init__(self, x: Operand, dim: int, index: Operand) -> None:
        super().__init__(x, index)
        self.shape, self.dim, self.index = value_of(x).shape, dim, value_of(index)

    def jvp(self, tangents: Sequence[Tensor | None]) -> Tensor:
        assert tangents[0] is not None
        return tangents[0].gather(self.dim, self.index)

    def vjp(self, i: int, cotangent: Tensor, into: Tensor | None) -> Tensor:
        if into is not None:
            return into.scatter_add_(self.dim, self.index, cotangent)
        return cotangent.new_zeros(self.shape).scatter_add(self.dim, self.index, cotangent)

    def batch_dim(self, dims: Sequence[int | None], batch: int) -> int | None:
        if dims[0] is None:
            return dims[1]
        if dims[0] == self.dim or self.index.shape[dims[0]] != self.shape[dims[0]]:
            raise MixesExamples("gather picks from several examples")
        return dims[0]


@rule(torch.gather, Tensor.gather)
def gather(input: Operand, dim: int, index: Operand, *, sparse_grad: bool = False) -> Any:
    x = value_of(input)
    if x.dim() == 0:
        return NotImplemented
    return Gathered(input, dim % x.dim(), index), x.gather(dim, value_of(index))
