"""A matrix of low rank, without its rows as one matrix: what can be asked of the rows, one tensor at a time.

The rows of R, one entry for each element of all tensors, are split by tensor. A :class:`RowBlock` stands for the part
that belongs to one of them; sums over tensors are left to who asks. Products are taken in the dtype of what is handed
in, so whoever needs more digits asks in a wider one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from . import _lists
from ._types import TensorList

#: Elements of rows that are formed, or converted, at once.
AT_ONCE = 2**22

#: What stands between R and R' in a Gram matrix: a number for all elements of a tensor, or one for each.
Scale: TypeAlias = float | Tensor | None


class RowBlock(ABC):
    """The part of r rows that belongs to one tensor: [r, *shape], of which only columns need ever exist."""

    #: Elements that are formed together.
    unit: int = 1

    def __init__(self, count: int, shape: torch.Size, device: torch.device) -> None:
        self.count = count
        self.shape = shape
        self.device = device
        self.numel = shape.numel()

    @abstractmethod
    def columns(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """The rows in the elements from ``start`` to ``stop`` of the flattened tensor, [r, stop - start]; only read."""

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Ranges of elements whose columns fit into memory at once, cut where forming them is cheapest."""
        width = max(1, AT_ONCE // max(1, self.count))
        width = max(1, width // self.unit) * self.unit
        for start in range(0, self.numel, width):
            yield start, min(start + width, self.numel)

    def add_gram(self, gram: Tensor, scale: Scale = None) -> None:
        """Adds R diag(scale) R' to ``gram``, [r, r], in place and in its dtype."""
        for start, stop in self.pieces():
            rows = self.columns(start, stop, gram.dtype)
            gram.addmm_(_scaled(rows, scale, start, stop), rows.T)

    def add_projected(self, v: Tensor, onto: Tensor) -> None:
        """Adds R v to ``onto`` [k, r], contiguous, for k tensors [k, *shape], multiplied in their dtype."""
        flat = v.reshape(len(v), self.numel)
        for start, stop in self.pieces():
            onto += flat[:, start:stop] @ self.columns(start, stop, v.dtype).T

    def add_lifted(self, c: Tensor, onto: Tensor) -> None:
        """Adds R' c to ``onto`` [k, *shape], contiguous, in place and in its dtype; ``c`` is [k, r]."""
        flat = onto.view(len(onto), self.numel)
        c = c.to(onto.dtype)
        for start, stop in self.pieces():
            flat[:, start:stop].addmm_(c, self.columns(start, stop, onto.dtype))


class ExplicitRows(RowBlock):
    """Rows as they are, [r, *shape]."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__(len(rows), rows.shape[1:], rows.device)
        self._rows = rows.reshape(len(rows), self.numel)

    def columns(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """A view where the dtype is that of the rows."""
        return self._rows[:, start:stop].to(dtype)


class ZeroRows(RowBlock):
    """Rows of zeros, of a tensor that nothing depends on."""

    def columns(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Zeros, in no memory of their own."""
        return torch.zeros((), dtype=dtype, device=self.device).expand(self.count, stop - start)

    def pieces(self) -> Iterator[tuple[int, int]]:
        """None that matters."""
        return iter(())


class StackedRows(RowBlock):
    """The rows of several blocks of one tensor, one below the other."""

    def __init__(self, blocks: Sequence[RowBlock]) -> None:
        super().__init__(sum(b.count for b in blocks), blocks[0].shape, blocks[0].device)
        self.unit = max(b.unit for b in blocks)
        self._blocks = blocks
        self._ends = torch.tensor([b.count for b in blocks]).cumsum(0).tolist()

    def _parts(self) -> Iterator[tuple[slice, RowBlock]]:
        for end, block in zip(self._ends, self._blocks, strict=True):
            yield slice(end - block.count, end), block

    def columns(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """One below the other."""
        return torch.cat([block.columns(start, stop, dtype) for block in self._blocks])

    def add_gram(self, gram: Tensor, scale: Scale = None) -> None:
        """Within each block in its own way, and between blocks by columns."""
        parts = list(self._parts())
        for place, block in parts:
            block.add_gram(gram[place, place], scale)
        for start, stop in self.pieces():
            rows = [block.columns(start, stop, gram.dtype) for _, block in parts]
            for j, (right, _) in enumerate(parts):
                scaled = _scaled(rows[j], scale, start, stop).T
                for i, (left, _) in enumerate(parts[:j]):
                    product = rows[i] @ scaled
                    gram[left, right] += product
                    gram[right, left] += product.T

    def add_projected(self, v: Tensor, onto: Tensor) -> None:
        """Side by side."""
        for place, block in self._parts():
            part = torch.zeros_like(onto[:, place], memory_format=torch.contiguous_format)
            block.add_projected(v, part)
            onto[:, place] += part

    def add_lifted(self, c: Tensor, onto: Tensor) -> None:
        """One after the other."""
        for place, block in self._parts():
            block.add_lifted(c[:, place], onto)


@dataclass(frozen=True)
class LowRank:
    """A symmetric matrix written as diag(d) + R' diag(c) R.

    ``blocks`` are the r rows of R, split by tensor; ``weights`` is c, [r]; ``diagonal`` is d, a list like the tensors,
    or None for zeros.
    """

    blocks: list[RowBlock]
    weights: Tensor
    diagonal: TensorList | None = None

    def gram(self, scale: Sequence[Scale] | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """R diag(scale) R', [r, r], with products and sums in ``dtype`` (the widest there is).

        ``scale`` has a number or a tensor of the shape of each tensor; None stands for ones.
        """
        rank, device = len(self.weights), self.weights.device
        total = torch.zeros((rank, rank), dtype=dtype or _lists.scalar_dtype(device), device=device)
        for block, s in zip(self.blocks, scale or [None] * len(self.blocks), strict=True):
            part = total if block.device == device else torch.zeros_like(total, device=block.device)
            block.add_gram(part, s)
            if part is not total:
                total += part.to(device)
        return total

    def project(self, v: TensorList) -> Tensor:
        """R v, [k, r], in the widest dtype, for k lists, [k, *shape] for each tensor, multiplied in their dtypes."""
        device = self.weights.device
        total = torch.zeros(
            (len(v[0]) if v else 1, len(self.weights)), dtype=_lists.scalar_dtype(device), device=device
        )
        for block, t in zip(self.blocks, v, strict=True):
            part = total if block.device == device else torch.zeros_like(total, device=block.device)
            block.add_projected(t, part)
            if part is not total:
                total += part.to(device)
        return total

    def lift(self, c: Tensor) -> TensorList:
        """R'c for k rows of coefficients [k, r]: [k, *shape] for each tensor, in the dtype of c."""
        result = []
        for block in self.blocks:
            onto = torch.zeros((len(c), *block.shape), dtype=c.dtype, device=block.device)
            block.add_lifted(c.to(block.device), onto)
            result.append(onto)
        return result


def explicit(rows: TensorList, weights: Tensor, diagonal: TensorList | None = None) -> LowRank:
    """The matrix whose rows are given, [r, *shape] for each tensor."""
    return LowRank([ExplicitRows(r) for r in rows], weights, diagonal)


def stacked_low_rank(parts: Sequence[LowRank], factors: Sequence[float]) -> LowRank:
    """The sum of ``parts``, each times its factor."""
    filled = [p for p in parts if len(p.weights)] or list(parts[:1])
    if len(filled) == 1:
        blocks = filled[0].blocks
    else:
        blocks = [StackedRows(column) for column in zip(*(p.blocks for p in filled), strict=True)]
    wide = [_lists.scalar_dtype(p.weights.device) for p in filled]
    scaled = [f * p.weights.to(filled[0].weights.device, wide[0]) for p, f in zip(parts, factors, strict=True)]
    diagonal: TensorList | None = None
    for p, f in zip(parts, factors, strict=True):
        if p.diagonal is not None:
            part = [f * d for d in p.diagonal]
            diagonal = part if diagonal is None else [a + b for a, b in zip(diagonal, part, strict=True)]
    return LowRank(blocks, torch.cat(scaled), diagonal)


def _scaled(rows: Tensor, scale: Scale, start: int, stop: int) -> Tensor:
    if scale is None:
        return rows
    if isinstance(scale, Tensor) and scale.dim():
        scale = scale.reshape(-1)[start:stop]
    return rows * scale
