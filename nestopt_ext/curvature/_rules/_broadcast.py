"""What broadcasting spreads, and how a cotangent is gathered again: for all examples, or for each."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .._tape import MixesExamples


class Spread:
    """From an operand's shape to the shape of the result that it is broadcast to."""

    def __init__(self, shape: Sequence[int], result: Sequence[int]) -> None:
        self.shape = tuple(shape)
        self.result = tuple(result)
        self._new = len(result) - len(shape)
        self._summed = [
            d for d, size in enumerate(result) if d < self._new or (size != 1 and shape[d - self._new] == 1)
        ]

    @property
    def trivial(self) -> bool:
        """Whether both shapes are the same."""
        return self.shape == self.result

    def gathered(self, cotangent: Tensor) -> Tensor:
        """The sum over what was spread, of the operand's shape; the cotangent itself where nothing was."""
        if self._summed:
            cotangent = cotangent.sum(self._summed)
        return cotangent if cotangent.shape == self.shape else cotangent.reshape(self.shape)

    def rows(self, cotangent: Tensor, dim: int, batch: int) -> Tensor:
        """The same for each example apart: [B, *shape]; ``dim`` of the result runs over examples."""
        if batch != 1 and dim not in self._summed:
            raise MixesExamples("an operand without examples has entries for them")
        shape = cotangent.shape
        parts = cotangent.reshape(*shape[:dim], batch, shape[dim] // batch, *shape[dim + 1 :])
        parts = parts.movedim(dim, 0)  # [B, *result], r for B r
        if self._summed:
            parts = parts.sum([d + 1 for d in self._summed])
        return parts.reshape(batch, *self.shape)


def common_dim(operands: Sequence[Sequence[int]], dims: Sequence[int | None], rank: int, batch: int) -> int | None:
    """The dimension of a broadcast result that runs over examples, from those of operands of these shapes."""
    found = {d - len(shape) for shape, d in zip(operands, dims, strict=True) if d is not None}
    if len(found) > 1 and batch != 1:
        raise MixesExamples("operands are broadcast whose examples lie in different dimensions")
    return rank + min(found) if found else None


def reshaped_dim(before: Sequence[int], dim: int, after: Sequence[int], batch: int) -> int:
    """Where examples that run over ``dim`` of shape ``before`` are after a reshape.

    Row-major, an example is a block of memory within each index of what is left of ``dim``. A dimension of the new
    shape with as much to its left, and a size that the number of examples divides, is cut by them in the same way.
    """
    outer = 1
    for size in before[:dim]:
        outer *= size
    left = 1
    for d, size in enumerate(after):
        if left == outer and size % max(batch, 1) == 0:
            return d
        left *= size
    raise MixesExamples(f"a reshape from {list(before)} to {list(after)} joins examples with what is left of them")
