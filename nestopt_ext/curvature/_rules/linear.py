"""Matrix products: fully connected layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._tape import (
    MixesExamples,
    Node,
    Operand,
    OuterProducts,
    Rows,
    ThroughParams,
    accumulated,
    by_example,
    rule,
    value_of,
)

#: Multiplications in the time of the calls that a gradient takes beyond those of a product with a matrix.
_MORE_CALLS = 2**18


class Linear(Node):
    """x W' + b over the last dimension of x."""

    weight_and_bias = (1, 2)

    def __init__(self, x: Operand, weight: Operand, bias: Operand | None) -> None:
        super().__init__(x, weight, bias)
        self.x, self.weight = value_of(x), value_of(weight)
        self.macs = self.x.numel() * self.weight.shape[0]
        self._rows = self.x if self.x.dim() == 2 else self.x.reshape(-1, self.x.shape[-1])

    def jvp(self, tangents: Sequence[Tensor | None]) -> Tensor:
        of_x, of_weight, of_bias = tangents
        if of_weight is None:
            if of_x is not None:
                return F.linear(of_x, self.weight, of_bias)
            assert of_bias is not None
            return of_bias.expand(*self.x.shape[:-1], -1).clone()
        result = F.linear(self.x, of_weight, of_bias)
        if of_x is None:
            return result
        if result.dim() == 2:
            return result.addmm(of_x, self.weight.t())
        return result + F.linear(of_x, self.weight)

    def vjp(self, i: int, cotangent: Tensor, into: Tensor | None) -> Tensor:
        rows = cotangent if cotangent.dim() == 2 else cotangent.reshape(-1, cotangent.shape[-1])
        if i == 2:
            return accumulated(rows.sum(0), into)
        left, right = (rows, self.weight) if i == 0 else (rows.t(), self._rows)
        if into is None:
            product = torch.mm(left, right)
            return product if i == 1 or self.x.dim() == 2 else product.view(self.x.shape)
        if into.dim() == 2:
            return into.addmm_(left, right)
        if into.is_contiguous():
            into.view(left.shape[0], right.shape[1]).addmm_(left, right)
            return into
        return accumulated(torch.mm(left, right).view(into.shape), into)

    def through_params(self, own: Sequence[int], num_uses: int) -> ThroughParams:
        """By the inner products of the rows of x, plus 1 for a bias, where that is less than the gradient itself."""
        whole = all(i in own for i in self.wanted if i > 0)
        if 1 not in own or not whole or not self._goes_by_rows(num_uses):
            return super().through_params(own, num_uses)
        gram = torch.mm(self._rows, self._rows.t())
        if 2 in own:
            gram += 1
        turned, shape = self.weight.t(), self._rows.shape

        def of_rows(of_x: Tensor | None, cotangent: Tensor) -> Tensor:
            return torch.mm(gram, cotangent) if of_x is None else torch.mm(of_x, turned).addmm_(gram, cotangent)

        def pushed(tangents: list[Tensor | None], cotangent: Tensor) -> Tensor:
            of_x = tangents[0]
            if cotangent.dim() == 2:
                return of_rows(of_x, cotangent)
            of_x = None if of_x is None else of_x.reshape(shape)
            return of_rows(of_x, cotangent.reshape(shape[0], turned.shape[1])).view(cotangent.shape)

        return pushed

    def _macs_by_rows(self, num_uses: int) -> int:
        rows, width = self._rows.shape
        found: int = rows * rows * (width + num_uses * self.weight.shape[0])
        return found

    def _goes_by_rows(self, num_uses: int) -> bool:
        return self._macs_by_rows(num_uses) < num_uses * (2 * self.macs + _MORE_CALLS)

    def macs_through_params(self, num_uses: int) -> tuple[int, bool]:
        """Of the way that is chosen."""
        if self._goes_by_rows(num_uses):
            return self._macs_by_rows(num_uses), False
        return super().macs_through_params(num_uses)

    def batch_dim(self, dims: Sequence[int | None], batch: int) -> int | None:
        """That of x, unless it is the one that is summed over."""
        of_x, of_weight, of_bias = dims
        if of_weight is not None or of_bias is not None or (of_x is not None and of_x == self.x.dim() - 1):
            raise MixesExamples("a linear layer has examples in its weight, or sums over them")
        return of_x

    def example_gradients(
        self, i: int, cotangent: Tensor, dims: Sequence[int | None], batch: int
    ) -> OuterProducts | Rows:
        if dims[0] is None:
            raise MixesExamples("a linear layer has the same input for all examples")
        left = by_example(cotangent, dims[0], batch).reshape(batch, -1, cotangent.shape[-1])
        if i == 2:
            return Rows(left[:, 0] if left.shape[1] == 1 else left.sum(1))
        right = by_example(self.x, dims[0], batch).reshape(batch, -1, self.x.shape[-1])
        return OuterProducts(left.unsqueeze(2), right.unsqueeze(2))


@rule(F.linear)
def linear(input: Operand, weight: Operand, bias: Operand | None = None) -> Any:
    x, w = value_of(input), value_of(weight)
    if w.dim() != 2 or x.dim() == 0 or x.is_nested:
        return NotImplemented
    return Linear(input, weight, bias), F.linear(x, w, value_of(bias))
