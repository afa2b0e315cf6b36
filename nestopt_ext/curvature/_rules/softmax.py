"""What is normalized along a dimension: probabilities, and their logarithms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._tape import MixesExamples, Node, Operand, accumulated, rule, value_of


class Softmax(Node):
    """Probabilities p along a dimension: their derivative diag(p) - p p' is its own transpose."""

    def __init__(self, x: Operand, value: Tensor, dim: int) -> None:
        super().__init__(x)
        self.value, self.dim = value, dim % max(value.dim(), 1)

    def jvp(self, tangents: Sequence[Tensor | None]) -> Tensor:
        assert tangents[0] is not None
        return self._times(tangents[0])

    def _times(self, t: Tensor) -> Tensor:
        return torch._softmax_backward_data(t, self.value, self.dim, self.value.dtype)

    def vjp(self, i: int, cotangent: Tensor, into: Tensor | None) -> Tensor:
        return accumulated(self._times(cotangent), into)

    def batch_dim(self, dims: Sequence[int | None], batch: int) -> int | None:
        if dims[0] == self.dim and batch != 1:
            raise MixesExamples("what is normalized are examples")
        return dims[0]


class LogSoftmax(Softmax):
    """The logarithms of probabilities, held as such: 1 - 1 p' and its transpose."""

    def jvp(self, tangents: Sequence[Tensor | None]) -> Tensor:
        assert tangents[0] is not None
        return tangents[0] - (tangents[0] * self.value.exp()).sum(self.dim, keepdim=True)

    def _times(self, t: Tensor) -> Tensor:
        return torch._log_softmax_backward_data(t, self.value, self.dim, self.value.dtype)


@rule(torch.softmax, Tensor.softmax)
def softmax(input: Operand, dim: int, dtype: torch.dtype | None = None) -> Any:
    return _normalized(input, dim, dtype, torch.softmax, Softmax)


@rule(torch._safe_softmax)
def safe_softmax(input: Operand, dim: int, dtype: torch.dtype | None = None) -> Any:
    """Zeros where all is masked."""
    return _normalized(input, dim, dtype, torch._safe_softmax, Softmax)


@rule(torch.log_softmax, Tensor.log_softmax)
def log_softmax(input: Operand, dim: int, dtype: torch.dtype | None = None) -> Any:
    return _normalized(input, dim, dtype, torch.log_softmax, LogSoftmax)


@rule(F.softmax)
def softmax_function(
    input: Operand, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Any:
    return NotImplemented if dim is None else softmax(input, dim, dtype)


@rule(F.log_softmax)
def log_softmax_function(
    input: Operand, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Any:
    return NotImplemented if dim is None else log_softmax(input, dim, dtype)


def _normalized(input: Operand, dim: int, dtype: torch.dtype | None, function: Any, node: type[Softmax]) -> Any:
    x = value_of(input)
    if not x.is_floating_point() or dtype not in (None, x.dtype):
        return NotImplemented
    value = function(x, dim)
    return node(input, value, dim), value
