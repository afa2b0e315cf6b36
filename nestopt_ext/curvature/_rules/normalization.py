"""What normalizations share.

x^ = (x - m) r, with mean m and inverse standard deviation r over a set of elements, has the derivative
P t = r (t - mean(t) - x^ mean(t x^)) where both come from x itself. P is its own transpose, so one fused kernel serves
both directions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._tape import MixesExamples, Node, Operand, Rows, accumulated, by_example, value_of


class Normalization(Node):
    """x^ w + b; what subclasses share."""

    name = ""

    def __init__(self, x: Operand, weight: Operand | None, bias: Operand | None) -> None:
        super().__init__(x, weight, bias)
        self.dtype = value_of(x).dtype
        self.shape = value_of(x).shape

    def vjp(self, i: int, cotangent: Tensor, into: Tensor | None) -> Tensor:
        return accumulated(self._gradients(cotangent, (i,))[0], into)

    def vjps(self, cotangent: Tensor, operands: Sequence[int]) -> list[Tensor]:
        """All from one call."""
        return self._gradients(cotangent, operands)

    def _gradients(self, cotangent: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        raise NotImplementedError

    def check_affine(self, dims: Sequence[int | None]) -> None:
        if dims[1] is not None or dims[2] is not None:
            raise MixesExamples(f"{self.name} has examples in its weight")

    def example_gradients(self, i: int, cotangent: Tensor, dims: Sequence[int | None], batch: int) -> Rows:
        """Sums over what belongs to one example, of the cotangent or of its product with x^."""
        if dims[0] is None:
            raise MixesExamples(f"{self.name} has the same input for all examples")
        terms = cotangent if i == 2 else cotangent * self._normalized()
        return Rows(self._summed(by_example(terms, dims[0], batch), dims[0]))

    def _normalized(self) -> Tensor:
        """x^, of the shape of x."""
        raise NotImplementedError

    def _summed(self, terms: Tensor, dim: int) -> Tensor:
        """[B, r, ...], which was taken apart at ``dim``, summed to [B, *shape of the weight]."""
        raise NotImplementedError


def sum_but(terms: Tensor, *kept: int) -> Tensor:
    """The sum over all dimensions but those."""
    over = [d for d in range(terms.dim()) if d not in kept]
    return terms.sum(over) if over else terms


def sum_leading(terms: Tensor, last: int) -> Tensor:
    """The sum over all dimensions but the last ones."""
    over = list(range(terms.dim() - last))
    return terms.sum(over) if over else terms


def plus_product(sum: Tensor | None, x: Tensor, factor: Tensor) -> Tensor:
    """``sum``, where there is one, plus x times factor."""
    return x * factor if sum is None else torch.addcmul(sum, x, factor)
