"""What moves entries about and computes nothing: reshapes, permutations, broadcasts, indexing, joining, casts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from ._broadcast import Spread, reshaped_dim


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


def _sizes(values: Sequence[Any]) -> tuple[int, ...]:
    """Numbers that are given one by one, or as one sequence."""
    return tuple(values[0]) if len(values) == 1 and isinstance(values[0], list | tuple) else tuple(values)


@rule(torch.permute, Tensor.permute)
def permute(input: Operand, *order: Any, dims: Any = None) -> Any:
    return _permuted(input, [d % value_of(input).dim() for d in _sizes(order if dims is None else dims)])


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
    sources = [d % rank for d in _sizes([source])]
    places = dict(zip([d % rank for d in _sizes([destination])], sources, strict=True))
    others = (d for d in range(rank) if d not in sources)
    return _permuted(input, [places[d] if d in places else next(others) for d in range(rank)])


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
    x, times = value_of(input), _sizes(repeats)
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


def _at(dim: int, part: Any) -> tuple[Any, ...]:
    return (*([slice(None)] * dim), part)


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
        self.index = _at(dim, picked)
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
        return Picked(input, len(before), parts[-1]), x[_at(len(before), value_of(parts[-1]))]
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
    return _sliced(input, *_at(dim, slice(start, start + length)))


@rule(torch.select, Tensor.select)
def select(input: Operand, dim: int, index: int) -> Any:
    return _sliced(input, *_at(dim % value_of(input).dim(), index))


@rule(torch.unbind, Tensor.unbind)
def unbind(input: Operand, dim: int = 0) -> Any:
    x = value_of(input)
    dim %= x.dim()
    return [_sliced(input, *_at(dim, n)) for n in range(x.shape[dim])]


def _parts(input: Operand, dim: int, parts: Sequence[Tensor]) -> Any:
    """Neighbours along a dimension, as large as ``parts``."""
    dim %= value_of(input).dim()
    result, start = [], 0
    for part in parts:
        stop = start + part.shape[dim]
        result.append(_sliced(input, *_at(dim, slice(start, stop))))
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
            self.places.append(_at(dim, start if new else slice(start, start + size)))
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
    by, over = _sizes([shifts]), _sizes([dims])
    back = tuple(-n for n in by)
    return (
        Shuffled(input, lambda x: x.roll(by, over), lambda x: x.roll(back, over), over),
        value_of(input).roll(by, over),
    )


@rule(torch.flip, Tensor.flip)
def flip(input: Operand, *over: Any, dims: Any = None) -> Any:
    over = _sizes(over) if dims is None else _sizes([dims])
    return Shuffled(input, lambda x: x.flip(over), lambda x: x.flip(over), over), value_of(input).flip(over)
