"""How a solve ended."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Generic

from torch import Tensor

from .._types import SameTensors


class Status(enum.Enum):
    """How a solve ended, from best to worst; the value of each member is its message.

    >>> Status.max_terms.message
    'all that the options allow was used before the residual reached its tolerance'
    """

    converged = "the residual is at its tolerance, or at rounding level"
    max_terms = "all that the options allow was used before the residual reached its tolerance"
    breakdown = "the curvature is singular, or too close to it, along a direction that was needed; raise damping"
    negative_curvature = "the curvature is not positive definite; raise damping, or use a positive semi-definite one"
    diverged = "the terms of the series grow; lower alpha, raise damping, or use a positive semi-definite curvature"
    non_finite = "the result holds NaN or Inf; it is returned as it is"

    @property
    def message(self) -> str:
        return self.value


@dataclass(frozen=True)
class Solution(Generic[SameTensors]):
    """What :func:`solve` returns.

    ``value`` has the structure, shapes and dtypes of the right-hand side, new tensors without graph. ``residual_norm``
    is a 0-dim tensor, the Euclidean norm of v - (A + damping I) value; with ``batched`` a vector, one for each
    right-hand side. ``num_products`` counts every product with A. ``status`` is that of the worst right-hand side.
    """

    value: SameTensors
    residual_norm: Tensor
    num_products: int
    status: Status
