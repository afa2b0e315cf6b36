"""Evidence of a method whose steps all look alike: norms that should shrink."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .._types import TensorList
from ._arguments import check_alpha_value
from ._outcome import Finding, unfit_right_side
from ._solution import Status


@dataclass(frozen=True)
class History:
    """The squared norms of the terms of a series, [n] or [n, k], one tensor for each device.

    ``limit`` is the norm, [] or [k], at which a term is the residual of a converged sum; None where none is asked for.
    ``alpha`` is the step, looked at here where it is a tensor, which may be the caller's and on a device; None where
    there is none.
    ``used`` says what the options were, with ``{terms}`` and ``{alpha}`` to be filled in; ``describe`` makes a warning
    of the status, of that, and of the last growth factor that is a number.
    """

    sq_norms: TensorList
    columns: int | None
    used: str
    describe: Callable[[Status, str, str], str]
    alpha: Tensor | float | None = None
    limit: Tensor | None = None

    def tensors(self) -> TensorList:
        return [t for t in (self.alpha, self.limit) if isinstance(t, Tensor)] + self.sq_norms

    def read(self, caller: str, numbers: list[list[float]]) -> Finding:
        rest = list(numbers)
        alpha = math.nan if self.alpha is None or isinstance(self.alpha, Tensor) else self.alpha
        if isinstance(self.alpha, Tensor):
            (alpha,) = rest.pop(0)
            check_alpha_value(caller, alpha)
        k = 1 if self.columns is None else self.columns
        limits = [-1.0] * k if self.limit is None else rest.pop(0)
        totals = [math.sqrt(sum(parts)) for parts in zip(*rest, strict=True)]
        columns = [totals[i::k] for i in range(k)]
        statuses = [_status(norms, limit) for norms, limit in zip(columns, limits, strict=True)]
        # No entry of a sum is larger than the sum of the norms, before and after it is multiplied by alpha.
        most = max(map(sum, columns), default=0.0) * max(alpha, 1.0)

        def explain(status: Status) -> str:
            used = self.used.format(terms=len(totals) // max(k, 1) - 1, alpha=f"{alpha:.4g}")
            if any(norms and math.isnan(norms[0]) for norms in columns):
                return unfit_right_side(used)
            alike = [norms for norms, own in zip(columns, statuses, strict=True) if own is status]
            return self.describe(status, used, _growth((alike or columns or [[]])[0]))

        return Finding(statuses, explain, most)


def _status(norms: list[float], limit: float) -> Status:
    if any(map(math.isnan, norms)):
        return Status.non_finite
    if norms and norms[-1] <= limit:
        return Status.converged
    return Status.diverged if _grows(norms) else Status.max_terms


#: Growth at rounding level does not count.
_SLACK = 1 + 8 * torch.finfo(torch.float32).eps


def _grows(norms: list[float]) -> bool:
    """Whether the last term is above the first, or three in a row grew."""
    if norms and norms[-1] > norms[0] * _SLACK:
        return True
    return len(norms) > 3 and all(b > a * _SLACK for a, b in pairwise(norms[-4:]))


def _growth(norms: list[float]) -> str:
    """The last ratio of two norms that is a number."""
    ratios = [b / a for a, b in pairwise(norms) if a > 0 and math.isfinite(a) and math.isfinite(b)]
    return f"about {ratios[-1]:.3g}" if ratios else "no estimate (no two finite terms)"
