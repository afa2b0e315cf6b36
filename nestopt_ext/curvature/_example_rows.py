"""The rows of a low-rank matrix that are gradients of examples, held as what a layer makes them of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import _low_rank, _ops
from .._low_rank import ExplicitRows, RowBlock, Scale, ZeroRows
from ._examples import Gradients, Use
from ._tape import OuterProducts, Picked, Rows


class OuterRows(RowBlock):
    """Rows that are sums over T positions of outer products: m B of them, for m cotangents of B examples.

    The left factors are [m B, T, G, O], with row j B + b of cotangent j and example b; the right ones [B, T, G, I], the
    same for all cotangents. The tensor has G O I elements in that order.

    Where there is one group, the rows of a bias, which are the left factors summed over positions, may go along: those
    of a weight with one more feature, which is 1.
    """

    def __init__(self, gradients: OuterProducts, shape: torch.Size) -> None:
        left, right = gradients.left, gradients.right
        super().__init__(len(left), shape, left.device)
        self._batch, self._positions, self._groups, self._in = right.shape
        self.unit = max(1, self._in)
        self._out = left.shape[3]
        self._copies = len(left) // max(1, self._batch)
        # Of each group, with a row for each position: views, unless a batch does not come first in memory.
        self._left = left.flatten(0, 1).unbind(1)
        self._right = right.flatten(0, 1).unbind(1)

    def columns(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Formed for the output units that the range touches."""
        width = self.unit
        first, last = start // width, -(-stop // width)
        parts = []
        for g in range(first // self._out, -(-last // self._out)):
            a, b = max(first - g * self._out, 0), min(last - g * self._out, self._out)
            left = _in_dtype(self._left[g][:, a:b], dtype)
            left = left.reshape(self._copies, self._batch, self._positions, b - a)
            right = _in_dtype(self._right[g], dtype).view(self._batch, self._positions, self._in)
            rows = left.transpose(2, 3) @ right if self._positions > 1 else left.transpose(2, 3) * right
            parts.append(rows.reshape(self.count, -1))
        rows = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return rows[:, start - first * width : stop - first * width]

    def add_gram(self, gram: Tensor, scale: Scale = None) -> None:
        """By the products of the two Gram matrices of each group of units, or by the gradients, formed a piece at a
        time: whichever is cheaper; the gradients where each element has a scale of its own.
        """
        if (isinstance(scale, Tensor) and scale.dim()) or not self.gram_goes_by_products:
            super().add_gram(gram, scale)
            return
        for g in range(self._groups):
            self._add_products(gram, g, scale)

    def add_gram_with_bias(self, gram: Tensor) -> None:
        """The same of a weight and its bias, by products."""
        self._add_products(gram, 0, None, ones=True)

    @property
    def takes_bias(self) -> bool:
        """Whether the rows of a bias may go along."""
        return self._groups == 1

    @property
    def gram_goes_by_products(self) -> bool:
        """Whether the products of two Gram matrices are cheaper than gradients."""
        return products_are_cheaper(self.count, self._batch, self._positions, self._out, self._in)

    def _add_products(self, gram: Tensor, g: int, scale: Scale, ones: bool = False) -> None:
        x, y = self._left[g], self._right[g]
        if gram.dtype == torch.float64:  # the op itself widens 16 bits
            x, y = _in_dtype(x, gram.dtype), _in_dtype(y, gram.dtype)
        if scale is None:
            _ops.hadamard_gram_(gram, x, y, positions=self._positions, ones=ones)
            return
        part = torch.zeros_like(gram)
        _ops.hadamard_gram_(part, x, y, positions=self._positions)
        gram.add_(part.mul_(scale))

    def add_projected(self, v: Tensor, onto: Tensor, bias: Tensor | None = None) -> None:
        """By one matrix product of the features with v, and the inner products of that with the left factors.

        With ``bias``, [k, O], for a weight and its bias.
        """
        k, dtype = len(v), v.dtype
        for g in range(self._groups):
            features = _in_dtype(self._right[g], dtype)
            left = _in_dtype(self._left[g], dtype).reshape(self.count, -1)
            part = v if self._groups == 1 else v.reshape(k, self._groups, -1)[:, g]
            part = part.reshape(k * self._out, self._in).T
            z = torch.mm(features, part) if bias is None else torch.addmm(bias.reshape(-1), features, part)
            if k == 1:
                _ops.row_dot_(onto[0], left, z.view(self._batch, -1))
                continue
            z = z.view(self._batch, self._positions, k, self._out).transpose(1, 2).reshape(self._batch, k, -1)
            left = left.reshape(self._copies, self._batch, -1).permute(1, 2, 0)
            onto += (z @ left).permute(1, 2, 0).reshape(k, self.count)

    def add_lifted(self, c: Tensor, onto: Tensor, bias: Tensor | None = None) -> None:
        """By the sum of the left factors over cotangents first, then one matrix product with the features.

        With ``bias``, [k, O], contiguous, for a weight and its bias.
        """
        k, dtype = len(c), onto.dtype
        c = _in_dtype(c, dtype).view(k, self._copies, self._batch)
        for g in range(self._groups):
            left = _in_dtype(self._left[g], dtype).reshape(self._copies, self._batch, -1)
            combined = _combined(c, left).reshape(k, self._batch * self._positions, self._out)
            features = _in_dtype(self._right[g], dtype)
            if self._groups == 1:
                flat = combined.transpose(1, 2).reshape(k * self._out, -1) if k > 1 else combined[0].T
                onto.view(k * self._out, self._in).addmm_(flat, features)
            else:
                onto.view(k, self._groups, self._out, self._in)[:, g] += combined.transpose(1, 2) @ features
            if bias is not None:
                bias += combined.sum(1)


class PickedRows(RowBlock):
    """Rows that are zero but in the rows of a table [V, D] that T positions pick, m B of them as in :class:`OuterRows`.

    ``left`` is [m B, T, D] and ``index`` [B, T].
    """

    def __init__(self, gradients: Picked, shape: torch.Size) -> None:
        left = gradients.left
        super().__init__(len(left), shape, left.device)
        self._left, self._index = left.contiguous(), gradients.index  # a batch may not come first in memory
        self._batch, self._positions = self._index.shape
        self._copies = len(left) // max(1, self._batch)
        self.unit = max(1, left.shape[2])

    def columns(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Formed for the rows of the table that the range touches."""
        first, last = start // self.unit, -(-stop // self.unit)
        inside = (self._index >= first) & (self._index < last)
        place = torch.where(inside, self._index - first, 0).repeat(self._copies, 1)
        place = place + (last - first) * torch.arange(self.count, device=self.device).unsqueeze(1)
        values = self._left.to(dtype) * inside.repeat(self._copies, 1).unsqueeze(2)
        found = values.new_zeros(self.count * (last - first), self.unit)
        found.index_add_(0, place.flatten(), values.flatten(0, 1))
        return found.view(self.count, -1)[:, start - first * self.unit : stop - first * self.unit]

    def add_gram(self, gram: Tensor, scale: Scale = None) -> None:
        """By the inner products at positions that pick the same row, or by columns where that is cheaper."""
        positions = self._positions
        if positions**2 > self.shape[0]:
            super().add_gram(gram, scale)
            return
        index = self._index.repeat(self._copies, 1)
        left = self._left.to(gram.dtype)
        scaled = left
        if scale is not None:
            scaled = left * (scale[index].to(gram.dtype) if isinstance(scale, Tensor) and scale.dim() else scale)
        step = max(1, math.isqrt(_low_rank.AT_ONCE) // positions)
        parts = [slice(first, min(first + step, self.count)) for first in range(0, self.count, step)]
        for i in parts:
            for j in parts:
                products = scaled[i].flatten(0, 1) @ left[j].flatten(0, 1).T
                products *= index[i].flatten().unsqueeze(1) == index[j].flatten()
                shape = (i.stop - i.start, positions, j.stop - j.start, positions)
                gram[i, j] += products.view(shape).sum((1, 3))

    def add_projected(self, v: Tensor, onto: Tensor) -> None:
        """By the inner products of the left factors with the rows of v that are picked."""
        left = self._left.to(v.dtype).view(self.count, -1)
        for row, total in zip(v, onto, strict=True):
            _ops.row_dot_(total, left, row[self._index].reshape(self._batch, -1))

    def add_lifted(self, c: Tensor, onto: Tensor) -> None:
        """By the sum of the left factors over cotangents, added to the rows that are picked."""
        left = self._left.to(onto.dtype).view(self._copies, self._batch, -1)
        combined = _combined(c.to(onto.dtype).view(len(c), self._copies, self._batch), left)
        for rows, total in zip(combined, onto, strict=True):
            total.index_add_(0, self._index.flatten(), rows.reshape(-1, self.unit))


class SummedRows(RowBlock):
    """Rows that are sums of the rows of several blocks: of a param that is used in several places."""

    def __init__(self, blocks: Sequence[RowBlock]) -> None:
        super().__init__(blocks[0].count, blocks[0].shape, blocks[0].device)
        self._blocks = blocks
        self.unit = max(block.unit for block in blocks)

    def columns(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Their sum."""
        first, *others = (block.columns(start, stop, dtype) for block in self._blocks)
        for rows in others:
            first = first + rows
        return first

    def add_projected(self, v: Tensor, onto: Tensor) -> None:
        """One after the other."""
        for block in self._blocks:
            block.add_projected(v, onto)

    def add_lifted(self, c: Tensor, onto: Tensor) -> None:
        """One after the other."""
        for block in self._blocks:
            block.add_lifted(c, onto)


class RemadeRows(RowBlock):
    """Rows of gradients that a layer makes anew each time they are asked for, one layer at a time."""

    def __init__(self, make: Callable[[], Gradients], count: int, like: Tensor) -> None:
        super().__init__(count, like.shape, like.device)
        self._make = make
        self._like = like
        self.unit = max(1, self.numel // len(like)) if like.dim() else 1

    def _made(self) -> RowBlock:
        return _kept(self._make(), self.count, self._like)

    def columns(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Of what is made."""
        return self._made().columns(start, stop, dtype)

    def add_gram(self, gram: Tensor, scale: Scale = None) -> None:
        """By what is made."""
        self._made().add_gram(gram, scale)

    def add_projected(self, v: Tensor, onto: Tensor) -> None:
        """By what is made."""
        self._made().add_projected(v, onto)

    def add_lifted(self, c: Tensor, onto: Tensor) -> None:
        """By what is made."""
        self._made().add_lifted(c, onto)


def block_of(uses: Sequence[Use], count: int, like: Tensor) -> RowBlock:
    """The ``count`` rows of the param ``like``, from the gradients of each use of it."""
    outer = [u for u in uses if isinstance(u, OuterProducts)]
    if len(outer) == len(uses) > 1 and len({_sizes(u) for u in outer}) == 1:  # the uses are more positions
        uses = [OuterProducts(torch.cat([u.left for u in outer], 1), torch.cat([u.right for u in outer], 1))]
    blocks = [RemadeRows(u, count, like) if callable(u) else _kept(u, count, like) for u in uses]
    if not blocks:
        return ZeroRows(count, like.shape, like.device)
    return blocks[0] if len(blocks) == 1 else SummedRows(blocks)


def _kept(gradients: Gradients, count: int, like: Tensor) -> RowBlock:
    if isinstance(gradients, Rows):
        return ExplicitRows(gradients.rows.reshape(count, *like.shape))
    if isinstance(gradients, Picked):
        return PickedRows(gradients, like.shape)
    return OuterRows(gradients, like.shape)


def _sizes(use: OuterProducts) -> tuple[int, ...]:
    """What must be equal for uses to be positions of one another."""
    return use.left.shape[2], use.left.shape[3], use.right.shape[3]


def products_are_cheaper(rows: int, batch: int, positions: int, out: int, features: int) -> bool:
    """Whether a Gram matrix of sums of outer products takes less by two Gram matrices than by the sums themselves."""
    return gram_macs(rows, batch, positions, out, features)[0] <= gram_macs(rows, batch, positions, out, features)[1]


def gram_macs(rows: int, batch: int, positions: int, out: int, features: int) -> tuple[float, float]:
    """Multiplications of the Gram matrix of one group by products of two Gram matrices, and by gradients.

    Of the former half are left out, as they are symmetric; writing, multiplying and adding an element counts like a
    hundred multiplications in a matrix product.
    """
    at_positions = float(rows * positions) ** 2
    products = 0.5 * (at_positions * (out + 100) + float(batch * positions) ** 2 * features)
    formed = float(rows) * positions * out * features + float(rows) ** 2 * out * features
    return products, formed


def _in_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor itself where that is its dtype: small models spend their time on calls."""
    return t if t.dtype == dtype else t.to(dtype)


def _combined(c: Tensor, left: Tensor) -> Tensor:
    """The sums over j of c[k, j, b] left[j, b, d]: [k, b, d]."""
    if left.shape[0] == 1:
        return c.transpose(1, 2) * left
    return (c.permute(2, 0, 1) @ left.transpose(0, 1)).transpose(0, 1)
