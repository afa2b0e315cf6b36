"""What a solver leaves on the device, and the one look the host takes at it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .. import _lists, _ops
from .._stack import caller_depth
from .._types import TensorList
from ._solution import Status
from ._system import System

_WORST_LAST = list(Status)


class Solver(Protocol):
    """A method for (A + damping I) x = v, given as a value: a frozen dataclass of its options."""

    def run(self, system: System) -> Outcome:
        """Solves without waiting for the device, unless its options say so; the right-hand sides are only read."""
        ...


@dataclass(frozen=True)
class Finding:
    """What a method says of itself: a status for each right-hand side, and the warning that goes with one."""

    statuses: list[Status]
    explain: Callable[[Status], str]


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
    """

    value: TensorList
    evidence: Evidence
    curvature: Tensor
    rtol: float = 0.0
    most_rounding: float = 0.1


@dataclass(frozen=True)
class Verdict:
    """What the host learned about an outcome."""

    status: Status
    explanation: str

    @property
    def is_trouble(self) -> bool:
        return self.status not in (Status.converged, Status.max_terms)


@dataclass(frozen=True)
class Testimony:
    """All that the host has to read of an outcome: small tensors on the device, which may be read later, and again.

    ``sizes`` are finite if all of the value is, and only then; ``residuals`` are the norms of the residuals and what
    they are once converged, or nothing where they are not known.
    """

    evidence: Evidence
    sizes: TensorList
    residuals: TensorList

    def tensors(self) -> TensorList:
        return [*self.residuals, *self.sizes, *self.evidence.tensors()]

    def verdict(self, caller: str, numbers: list[list[float]] | None = None) -> Verdict:
        """How the solve ended, from the values of :meth:`tensors`, read here in one wait per device unless given."""
        numbers = _lists.to_host(self.tensors()) if numbers is None else numbers
        known = len(self.residuals)
        sizes = [value for (value,) in numbers[known : known + len(self.sizes)]]
        finding = self.evidence.read(caller, numbers[known + len(self.sizes) :])
        statuses = finding.statuses
        if known:
            statuses = [_weighed(*facts) for facts in zip(statuses, numbers[0], numbers[1], strict=True)]
        if not all(map(math.isfinite, sizes)):
            statuses = [*statuses, Status.non_finite]
        status = max(statuses, key=_WORST_LAST.index, default=Status.converged)
        return Verdict(status, finding.explain(status))


def testify(outcome: Outcome, residual: Tensor | None = None, tolerance: Tensor | None = None) -> Testimony:
    """What there is to know of an outcome; nothing is waited for, and the value is not needed any more.

    ``residual`` holds the norms of the residuals where they are known, ``tolerance`` what they are once converged.
    """
    known = [] if residual is None or tolerance is None else [residual, tolerance]
    return Testimony(outcome.evidence, _sizes(outcome.value), known)


def _sizes(value: TensorList) -> TensorList:
    """Numbers that are finite if and only if the value is.

    A sum of squares, in double precision, has no more than that to say of single precision, and is the fastest of all
    reductions on a CPU; elsewhere, and of what is double itself, the largest magnitudes.
    """
    narrow = [t for t in value if t.device.type == "cpu" and t.dtype == torch.float32]
    if not narrow:
        return _lists.max_abs(value)
    total = torch.zeros(1, dtype=torch.float64, device="cpu")
    for t in narrow:
        row = t.detach().reshape(1, -1)
        _ops.row_dot_(total, row, row)
    return [total, *_lists.max_abs([t for t in value if t.device.type != "cpu" or t.dtype != torch.float32])]


def judge(caller: str, outcome: Outcome, residual: Tensor | None = None, tolerance: Tensor | None = None) -> Verdict:
    """Reads the evidence and the magnitude of the value, in one wait per device, and says how the solve ended.

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
