"""Matrix products of two operands, one of which, or both, may depend on the params."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._tape import REWRITES, MixesExamples, Node, Operand, OuterProducts, Rows, accumulated, by_example, rule, value_of
from ._broadcast import Spread


class Product(Node):
    """a b over the last two dimensions, with what is before them broadcast."""

    def __init__(self, a: Operand, b: Operand, value: Tensor) -> None:
        super().__init__(a, b)
        left, right = value_of(a), value_of(b)
        self.shapes = left.shape, right.shape
        self.left = left.unsqueeze(0) if left.dim() == 1 else left
        self.right = right.unsqueeze(1) if right.dim() == 1 else right
        self.vectors = left.dim() == 1, right.dim() == 1
        self.macs = self.left.numel() * self.right.shape[-1]
        if self.right.dim() > 2:
            self.macs = max(self.macs, self.right.numel() * self.left.shape[-2])
        self.value_shape = value.shape
        outer = value.shape[: value.dim() - 2 + sum(self.vectors)]
        self.shape = torch.Size((*outer, self.left.shape[-2], self.right.shape[-1]))
        self.spreads = tuple(Spread(m.shape, (*outer, *m.shape[-2:])) for m in (self.left, self.right))
        #: Whether all but the last dimension of the first operand are rows of one matrix product.
        self.folds = self.right.dim() == 2

    def jvp(self, tangents: Sequence[Tensor | None]) -> Tensor:
        of_left, of_right = tangents
        if of_left is not None and self.vectors[0]:
            of_left = of_left.unsqueeze(0)
        if of_right is not None and self.vectors[1]:
            of_right = of_right.unsqueeze(1)
        if of_left is None:
            assert of_right is not None
            result = torch.matmul(self.left, of_right)
        elif of_right is None:
            result = torch.matmul(of_left, self.right)
        else:
            result = self._plus(self.left @ of_right, of_left, self.right)
        return result if self.shape == self.value_shape else result.reshape(self.value_shape)

    @staticmethod
    def _plus(result: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """The result and one more product, in one pass where there is one for these shapes."""
        if result.dim() == 2:
            return result.addmm(left, right)
        if result.dim() == left.dim() == right.dim() == 3 and left.shape[0] == right.shape[0]:
            return result.baddbmm(left, right)
        return result + left @ right

    def vjp(self, i: int, cotangent: Tensor, into: Tensor | None) -> Tensor:
        if self.shape != self.value_shape:
            cotangent = cotangent.reshape(self.shape)
        if i == 1 and self.folds:
            left = self.left.reshape(-1, self.left.shape[-1]).t()
            right = cotangent.reshape(-1, cotangent.shape[-1])
        elif i == 1:
            left, right = self.left.mT, cotangent
        else:
            left, right = cotangent, self.right.mT
        if into is not None and into.shape == self.spreads[i].result:
            if into.dim() == 2 and left.dim() == right.dim() == 2:
                return into.addmm_(left, right)
            if into.dim() == 3 and left.dim() == right.dim() == 3:
                return into.baddbmm_(left, right)
        result = left @ right
        if not (i == 1 and self.folds):
            result = self.spreads[i].gathered(result)
        return accumulated(result.reshape(self.shapes[i]), into)

    def _ends(self, dims: Sequence[int | None]) -> tuple[int | None, int | None]:
        """The operands' dimensions that run over examples, counted from the last of a matrix."""
        of_left, of_right = (None if d is None else d - len(shape) for d, shape in zip(dims, self.shapes, strict=True))
        return of_left, of_right if of_right is None else of_right - self.vectors[1]

    def batch_dim(self, dims: Sequence[int | None], batch: int) -> int | None:
        """The one that the operands agree on, unless it is the one that is summed over."""
        of_left, of_right = self._ends(dims)
        if batch != 1 and (of_left == -1 or of_right == -2):
            raise MixesExamples("a matrix product sums over examples")
        found = {d for d in (of_left, of_right) if d is not None}
        if batch != 1 and len(found) > 1:
            raise MixesExamples("the operands of a matrix product have their examples in different dimensions")
        if not found:
            return None
        d = min(found)
        return len(self.shape) + d - (self.vectors[0] and d == -1)

    def example_gradients(
        self, i: int, cotangent: Tensor, dims: Sequence[int | None], batch: int
    ) -> OuterProducts | Rows:
        """Of an operand b: a' times the cotangent, for each example; of a, the same of the transposed product."""
        end = self._ends(dims)[1 - i]
        if end is None or dims[i] is not None:
            raise MixesExamples("a matrix product of params is the same for all examples")
        cotangent = cotangent.reshape(self.shape)
        if i == 1:
            rows = _right_rows(self.left, cotangent, end, self.right.shape, batch)
        else:
            end = {-1: -2, -2: -1}.get(end, end)
            rows = _right_rows(self.right.mT, cotangent.mT, end, self.left.mT.shape, batch).mT
        return Rows(rows.reshape(batch, *self.shapes[i]))


def _right_rows(left: Tensor, cotangent: Tensor, end: int, shape: Sequence[int], batch: int) -> Tensor:
    """What goes back to the second operand, of this shape, from each example: [B, *shape].

    ``end`` is the dimension of the first operand that runs over examples, counted from its last.
    """
    if len(shape) == 2:
        left = by_example(left, left.dim() + end, batch).reshape(batch, -1, left.shape[-1])
        right = by_example(cotangent, cotangent.dim() + end, batch).reshape(batch, -1, cotangent.shape[-1])
        return left.mT @ right
    if end == -2:
        left, cotangent = (by_example(t, t.dim() - 2, batch).movedim(1, -2) for t in (left, cotangent))
        left = left.reshape(batch, *(1,) * (cotangent.dim() - left.dim()), *left.shape[1:])
        end = -cotangent.dim()
    product = left.mT @ cotangent
    return Spread(shape, product.shape).rows(product, product.dim() + end, batch)


def _product(input: Operand, other: Operand) -> Any:
    a, b = value_of(input), value_of(other)
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.dim() == 0 or b.dim() == 0:
        return NotImplemented
    value = torch.matmul(a, b)
    return Product(input, other, value), value


@rule(torch.matmul, Tensor.matmul, Tensor.__matmul__)
def matmul(input: Operand, other: Operand) -> Any:
    return _product(input, other)


@rule(torch.mm, Tensor.mm, torch.bmm, Tensor.bmm)
def mm(input: Operand, mat2: Operand) -> Any:
    return _product(input, mat2)


@rule(torch.mv, Tensor.mv)
def mv(input: Operand, vec: Operand) -> Any:
    return _product(input, vec)


@rule(torch.dot, Tensor.dot, torch.inner, Tensor.inner)
def dot(input: Operand, other: Operand) -> Any:
    if value_of(input).dim() != 1 or value_of(other).dim() != 1:
        return NotImplemented
    return _product(input, other)


@rule(Tensor.__rmatmul__)
def rmatmul(input: Operand, other: Operand) -> Any:
    return _product(other, input)


def _plus_product(input: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    product = a @ b
    if alpha != 1:
        product = product * alpha
    if beta == 0:  # NaN in what is not added must not show
        return product
    return torch.add(product, input, alpha=beta)


for _name in ("addmm", "baddbmm", "addmv"):
    REWRITES[getattr(torch, _name)] = _plus_product
    REWRITES[getattr(Tensor, _name)] = _plus_product
