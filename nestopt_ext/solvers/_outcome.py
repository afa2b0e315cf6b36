"""What a solver leaves on the device, and the one look the host takes at it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .. import _lists
from .._stack import caller_depth
from .._types import TensorList
from ._solution import Status
from ._system import System

_WORST_LAST = list(Status)

#: A bound this far below the end of a dtype holds whatever rounding adds in 10^7 terms.
_MARGIN = 0.25


class Solver(Protocol):
    """A method for (A + damping I) x = v, given as a value: a frozen dataclass of its options."""

    def run(self, system: System) -> Outcome:
        """Solves without waiting for the device, unless its options say so; the right-hand sides are only read."""
        ...


@dataclass(frozen=True)
class Finding:
    """What a method says of itself: a status for each right-hand side, and the warning that goes with one.

    ``most`` bounds the magnitude of every number that its arithmetic made, as far as the method knows one.
    """

    statuses: list[Status]
    explain: Callable[[Status], str]
    most: float = math.inf


class Evidence(Protocol):
    """What a method saw on its way, small tensors on the device."""

    def tensors(self) -> TensorList: ...

    def read(self, caller: str, numbers: list[list[float]]) -> Finding:
        """The finding, from the values of the tensors."""
        ...


@dataclass(frozen=True)
class Outcome:
    """The result of a solver, all of it still on the device.

    ``curvature`` is the norm of A + damping I as far as the method knows it, [] or [k]: it says what residual rounding
    alone may leave, at most ``most_rounding`` of v. ``rtol`` is the residual, relative to v, that the options ask for.
    ``is_bounded`` says that what the evidence bounds are the numbers of the value, and all that it was made of.
    """

    value: TensorList
    evidence: Evidence
    curvature: Tensor
    rtol: float = 0.0
    most_rounding: float = 0.1
    is_bounded: bool = False


@dataclass(frozen=True)
class Verdict:
    """What the host learned about an outcome."""

    status: Status
    explain: Callable[[Status], str]

    @property
    def explanation(self) -> str:
        """The text of a warning."""
        return self.explain(self.status)

    @property
    def is_trouble(self) -> bool:
        return self.status not in (Status.converged, Status.max_terms)


class Testimony:
    """All that the host has to read of an outcome: small tensors on the device, which may be read later, and again.

    ``residuals`` are the norms of the residuals and what they are once converged, or nothing where they are not known.
    The largest magnitudes of the value are looked for only where the evidence does not bound them, and until then the
    value is needed.
    """

    def __init__(self, outcome: Outcome, residuals: TensorList) -> None:
        self._evidence = outcome.evidence
        self._residuals = residuals
        self._value = outcome.value
        self._peaks: TensorList | None = None
        if not outcome.is_bounded:
            self._look()

    def tensors(self) -> TensorList:
        """What :meth:`verdict` is to be given the values of, if they are read elsewhere; the value may go then."""
        return [*self._residuals, *self._evidence.tensors(), *self._look()]

    def verdict(self, caller: str, numbers: list[list[float]] | None = None) -> Verdict:
        """How the solve ended, from the values of :meth:`tensors`, read here unless given.

        That is one wait for each device, and a second one where what the evidence bounds might have overflowed.
        """
        if numbers is None:
            numbers = _lists.to_host([*self._residuals, *self._evidence.tensors(), *(self._peaks or ())])
        known = len(self._residuals)
        middle = known + len(self._evidence.tensors())
        finding = self._evidence.read(caller, numbers[known:middle])
        statuses = finding.statuses
        if known:
            statuses = [_weighed(*facts) for facts in zip(statuses, numbers[0], numbers[1], strict=True)]
        if not self._is_finite(finding.most, numbers[middle:]):
            statuses = [*statuses, Status.non_finite]
        status = max(statuses, key=_WORST_LAST.index, default=Status.converged)
        return Verdict(status, finding.explain)

    def _is_finite(self, most: float, peaks: list[list[float]]) -> bool:
        if self._peaks is None:
            dtypes = {t.dtype for t in self._value}
            if all(most < _MARGIN * torch.finfo(dtype).max for dtype in dtypes):
                return True
            peaks = _lists.to_host(self._look())
        return all(math.isfinite(peak) for (peak,) in peaks)

    def _look(self) -> TensorList:
        if self._peaks is None:
            self._peaks, self._value = _lists.max_abs(self._value), []
        return self._peaks


def testify(outcome: Outcome, residual: Tensor | None = None, tolerance: Tensor | None = None) -> Testimony:
    """What there is to know of an outcome; nothing is waited for.

    ``residual`` holds the norms of the residuals where they are known, ``tolerance`` what they are once converged.
    """
    return Testimony(outcome, [] if residual is None or tolerance is None else [residual, tolerance])


def judge(caller: str, outcome: Outcome, residual: Tensor | None = None, tolerance: Tensor | None = None) -> Verdict:
    """Reads the evidence and, where it must, the magnitude of the value, and says how the solve ended.

    The arguments are those of :func:`testify`.
    """
    return testify(outcome, residual, tolerance).verdict(caller)


def _weighed(status: Status, residual: float, tolerance: float) -> Status:
    """The residual has the last word: a series may grow and then end, and a recurrence may drift from the truth."""
    if status is Status.non_finite or not math.isfinite(residual):
        return Status.non_finite
    if residual <= tolerance:
        return Status.converged
    return Status.max_terms if status is Status.converged else status


def warn(caller: str, verdict: Verdict) -> None:
    """One RuntimeWarning, at the line outside the package that asked, if the result cannot be trusted."""
    if verdict.is_trouble:
        warnings.warn(f"{caller}: {verdict.explanation}", RuntimeWarning, stacklevel=caller_depth())


def unfit_right_side(used: str) -> str:
    return f"v must be finite; got NaN or Inf, which the result keeps ({used}). Look for it in the outer gradient."
