"""What a solver leaves on the device, and the one look the host takes at it."""

from __future__ import annotations

import math
import sys
import warnings
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from .. import _lists
from .._types import TensorList
from ._arguments import check_alpha_value
from ._product import Product
from ._solution import Status


class Solver(Protocol):
    """A method for (A + damping I) x = v, given as a value: a frozen dataclass of its options."""

    def run(self, product: Product, v: TensorList) -> Outcome:
        """Solves without waiting for the device; ``v`` is only read."""
        ...


@dataclass(frozen=True)
class Outcome:
    """The result of a solver, all of it still on the device.

    ``sq_norms`` holds, for each device, the squared norms of the terms 0 .. num_terms, a vector.
    """

    value: TensorList
    alpha: Tensor
    damping: float
    sq_norms: dict[torch.device, Tensor]


@dataclass(frozen=True)
class Verdict:
    """What the host learned about an outcome."""

    status: Status
    norms: list[float]
    alpha: float
    damping: float


def judge(
    caller: str, outcome: Outcome, residual: Tensor | None = None, rounding_residual: Tensor | None = None
) -> Verdict:
    """Reads norms, alpha and the magnitude of the value, in one wait per device, and says how the solve ended.

    ``residual`` is the norm of the residual where it is known, ``rounding_residual`` what it is once converged.
    """
    peaks = _lists.max_abs(outcome.value)
    known = [] if residual is None or rounding_residual is None else [residual, rounding_residual]
    histories = list(outcome.sq_norms.values())
    (alpha,), *read = _lists.to_host([outcome.alpha, *known, *peaks, *histories])
    check_alpha_value(caller, alpha)
    scalars = [value for (value,) in read[: len(known) + len(peaks)]]
    norms = [math.sqrt(sum(parts)) for parts in zip(*read[len(scalars) :], strict=True)]
    return Verdict(_status(scalars[: len(known)], scalars[len(known) :], norms), norms, alpha, outcome.damping)


def _status(residuals: list[float], peaks: list[float], norms: list[float]) -> Status:
    if not all(map(math.isfinite, [*residuals[:1], *peaks])) or any(map(math.isnan, norms)):
        return Status.non_finite
    if residuals and residuals[0] <= residuals[1]:  # before growth: the terms of a nilpotent I - alpha A grow, then end
        return Status.converged
    return Status.diverged if _grows(norms) else Status.max_terms


def _grows(norms: list[float]) -> bool:
    """Whether the last term is above the first, or three in a row grew; growth at rounding level does not count."""
    slack = 1 + 8 * torch.finfo(torch.float32).eps
    growth = [b > a * slack for a, b in pairwise(norms)]
    return norms != [] and (norms[-1] > norms[0] * slack or (len(growth) >= 3 and all(growth[-3:])))


def warn(caller: str, verdict: Verdict) -> None:
    """One RuntimeWarning, at the line outside the package that asked, if the result cannot be trusted."""
    if verdict.status not in (Status.diverged, Status.non_finite):
        return
    terms = len(verdict.norms) - 1
    used = f"num_terms={terms}, alpha={verdict.alpha:.4g}, damping={verdict.damping:.4g}"
    if verdict.norms and math.isnan(verdict.norms[0]):
        message = (
            f"{caller}: v must be finite; got NaN or Inf, which the result keeps ({used})."
            " Look for it in the outer gradient."
        )
    else:
        end = "is not finite" if verdict.status is Status.non_finite else "diverges"
        message = (
            f"{caller}: the Neumann sum {end} ({used}); the spectral radius of I - alpha*(A + damping*I) must be"
            f" below 1; got {_spectral_radius(verdict.norms)}. Lower alpha, raise damping, use alpha='auto', or use a"
            " positive semi-definite curvature (Gauss-Newton). The values are returned as they are."
        )
    warnings.warn(message, RuntimeWarning, stacklevel=_caller_depth())


def _spectral_radius(norms: list[float]) -> str:
    """The last ratio of two norms that is a number."""
    ratios = [b / a for a, b in pairwise(norms) if a > 0 and math.isfinite(a) and math.isfinite(b)]
    return f"about {ratios[-1]:.3g}" if ratios else "no estimate (no two finite terms)"


def _caller_depth() -> int:
    """The stack level, counted from :func:`warn`, of the first frame that is neither of this package nor of torch."""
    packages = (__name__.partition(".")[0], "torch")
    frame = sys._getframe(1)
    depth = 1
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).partition(".")[0] in packages:
        frame = frame.f_back
        depth += 1
    return depth
