"""Vectors in one piece: a list of tensors as one buffer, so that a recurrence is a handful of operations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _lists, _reference
from .._types import TensorList
from ._system import System


@dataclass(frozen=True)
class _Group:
    """The tensors of one device and working dtype."""

    device: torch.device
    dtype: torch.dtype
    positions: list[int]
    sizes: list[int]


class Space:
    """The lists like the right-hand sides of ``system``, each held as buffers: [n], or [k, n] for k right-hand sides.

    There is one buffer for each device and dtype, the dtype being float32 for 16-bit tensors. A product comes back as
    separate tensors and is copied together once, which costs two of some fifteen passes over memory that an iteration
    makes, and saves an operation per tensor in every inner product and update.
    """

    def __init__(self, system: System) -> None:
        self._system = system
        self._batched = system.columns is not None
        like = system.product.like
        groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i, t in enumerate(like):
            groups.setdefault((t.device, _reference.opmath(t.dtype)), []).append(i)
        self._groups = [_Group(*key, where, [like[i].numel() for i in where]) for key, where in groups.items()]
        self._shapes = [t.shape for t in system.v]
        self._zero = system.scalars()
        #: Where numbers such as inner products are kept.
        self.device, self.scalar = self._zero.device, self._zero.dtype
        #: The elements of one vector.
        self.size = _lists.numel(like)
        #: The coarsest rounding among the buffers.
        self.eps = max((torch.finfo(g.dtype).eps for g in self._groups), default=0.0)
        levels = [torch.finfo(t.dtype).eps * (1 if t.dtype.itemsize == 2 else 4) for t in like]
        #: What rounding of the products alone leaves in a residual, relative to the numbers it is the difference of: in
        #: the finest dtype, and in the coarsest.
        self.least_noise, self.most_noise = min(levels, default=0.0), max(levels, default=0.0)

    def gather(self, tensors: TensorList) -> TensorList:
        """The buffers of a list without graph, in new memory unless it is a single tensor of the working dtype."""
        found = []
        for group in self._groups:
            flat = [self._row(tensors[i]).to(group.dtype) for i in group.positions]
            found.append(flat[0] if len(flat) == 1 else torch.cat(flat, dim=-1))
        return found

    def copied(self, tensors: TensorList) -> TensorList:
        """The buffers of a list, in new memory."""
        return [
            buffer.clone(memory_format=torch.contiguous_format) if len(group.positions) == 1 else buffer
            for group, buffer in zip(self._groups, self.gather([t.detach() for t in tensors]), strict=True)
        ]

    def views(self, buffers: TensorList) -> TensorList:
        """The list that lives in the memory of ``buffers``."""
        found: TensorList = [self._zero] * len(self._shapes)
        for group, buffer in zip(self._groups, buffers, strict=True):
            for i, part in zip(group.positions, buffer.split_with_sizes(group.sizes, dim=-1), strict=True):
                found[i] = part.view(self._shapes[i])
        return found

    def returned(self, buffers: TensorList, factor: Tensor) -> TensorList:
        """``factor`` times the list in ``buffers``, in new memory of its own and the dtypes of the product."""
        views = self.views([buffer * self._spread(factor, buffer) for buffer in buffers])
        return [
            (t if t.dtype != like.dtype else t.clone()).to(like.dtype)
            for t, like in zip(views, self._system.product.like, strict=True)
        ]

    def dot(self, a: TensorList, b: TensorList) -> Tensor:
        """The inner products, [] or [k]."""
        parts = [torch.linalg.vecdot(x, y) if self._batched else torch.dot(x, y) for x, y in zip(a, b, strict=True)]
        return self._total(parts)

    def norm(self, a: TensorList) -> Tensor:
        """The Euclidean norms, [] or [k]; those of float32 do not overflow where a square would."""
        if len(a) == 1:
            norm: Tensor = torch.linalg.vector_norm(a[0], dim=-1, dtype=self.scalar)
            return norm
        return self._total([torch.linalg.vector_norm(x, dim=-1, dtype=self.scalar).square() for x in a]).sqrt()

    def add_(self, a: TensorList, b: TensorList, factor: Tensor, *, sign: int = 1) -> None:
        """``a += sign * factor * b``, with a factor for each right-hand side."""
        for x, y in zip(a, b, strict=True):
            x.addcmul_(y, self._spread(factor, y), value=sign)

    def scale_(self, a: TensorList, factor: Tensor) -> None:
        for x in a:
            x.mul_(self._spread(factor, x))

    def unit(self, length: Tensor) -> Tensor:
        """The power of two nearest to the root mean square of vectors of that norm; 1 where there is none.

        Dividing by it is exact, and keeps squares away from the ends of a dtype whatever the scale of a vector.
        """
        root = length / max(self.size, 1) ** 0.5
        tiny = max((torch.finfo(g.dtype).tiny for g in self._groups), default=1.0)
        usable = (root > 4 * tiny) & (root < 1 / (4 * tiny))
        return torch.where(usable, root, torch.ones_like(root)).log2().round().exp2()

    def _total(self, parts: TensorList) -> Tensor:
        total = parts[0].to(self._zero) if parts else self._zero
        for part in parts[1:]:
            total = total + part.to(self._zero)
        return total

    def _row(self, tensor: Tensor) -> Tensor:
        return _lists.rows(tensor) if self._batched else tensor.reshape(-1)

    def _spread(self, factor: Tensor, like: Tensor) -> Tensor:
        factor = factor.to(like.device, like.dtype)
        return factor.unsqueeze(-1) if self._batched else factor
