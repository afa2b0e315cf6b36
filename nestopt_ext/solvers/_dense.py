"""Lists as the rows of one matrix, for methods that factorize."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _lists, _reference
from .._types import TensorList
from ._outcome import Finding, unfit_right_side
from ._solution import Status
from ._system import System


class Dense:
    """Right-hand sides as the rows of a matrix on one device: that of the first tensor.

    The dtype is float64 on the CPU, where that is cheap, and the widest working dtype of the tensors elsewhere.
    """

    def __init__(self, system: System) -> None:
        self.like = system.product.like
        self.size = _lists.numel(self.like)
        self.device = self.like[0].device if self.like else torch.device("cpu")
        self.dtype = torch.float64
        if self.device.type != "cpu":
            working = {_reference.opmath(t.dtype) for t in self.like}
            self.dtype = torch.float32 if working == {torch.float32} else torch.float64
        #: The coarsest rounding among the products.
        self.eps = max((torch.finfo(t.dtype).eps for t in self.like), default=0.0)

    def matrix(self, rows: TensorList) -> Tensor:
        """[k, *shape] for each tensor as [k, P]."""
        if not rows:
            return torch.zeros((1, 0), dtype=self.dtype, device=self.device)
        return torch.cat([_lists.rows(t.detach()).to(self.device, self.dtype) for t in rows], dim=1)

    def rows(self, matrix: Tensor) -> TensorList:
        """[k, P] as [k, *shape] for each tensor, in the dtypes and on the devices of the products."""
        parts = matrix.split_with_sizes([t.numel() for t in self.like], dim=1)
        return [
            part.to(like.device, like.dtype).reshape(len(matrix), *like.shape)
            for part, like in zip(parts, self.like, strict=True)
        ]


@dataclass(frozen=True)
class Direct:
    """Evidence of a method without iterations: whether the one thing that may go wrong did.

    ``right`` is the norm of v; ``fault`` is a 0-dim tensor, not zero if ``status`` is to be said; ``otherwise`` is said
    else.
    """

    right: Tensor
    fault: Tensor
    status: Status
    otherwise: Status
    explain: Callable[[Status], str]

    def tensors(self) -> TensorList:
        return [self.right, self.fault]

    def read(self, caller: str, numbers: list[list[float]]) -> Finding:
        right, (fault,) = numbers

        def explain(status: Status) -> str:
            if not all(map(math.isfinite, right)):
                return unfit_right_side("a direct solve")
            return self.explain(status)

        return Finding([self.status if fault else self.otherwise] * len(right), explain)


def guarded(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix, or zeros if it holds NaN or Inf, for a factorization that would raise; and 0, or NaN to be added."""
    fine = matrix.isfinite().all()
    zero = torch.zeros_like(matrix)
    return torch.where(fine, matrix, zero), torch.where(fine, zero.new_zeros(()), zero.new_full((), float("nan")))


def solved(matrix: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The solution of a square system, NaN if it is singular, and a number that is not zero then; never raises."""
    found, info = torch.linalg.solve_ex(matrix, right)
    return torch.where(info != 0, torch.full_like(found, float("nan")), found), info
