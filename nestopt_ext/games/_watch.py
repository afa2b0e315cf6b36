"""Looks after a game that is being played, and says when it has converged, diverged or turned to NaN."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _lists
from .._types import TensorList
from ._players import widest

#: Where a look at the device costs a wait, the host looks once in so many steps.
_LOOK_EVERY = 10

_NEVER = -1


class PlayStatus(enum.Enum):
    """How a play ended; the value of each member is its message.

    >>> PlayStatus.completed.message
    'all steps were played'
    """

    completed = "all steps were played"
    converged = "every start came within the tolerance"
    diverged = "a start left the bounds; lower lr, or use a method that converges on rotations"
    non_finite = "the players or losses of a start hold NaN or Inf"

    @property
    def message(self) -> str:
        return self.value


class Watch:
    """Keeps, for every start, the first step at which something happened, on the device of the first player.

    ``converged_at`` and ``failed_at`` hold step numbers, -1 for never. A start fails where it is non-finite or larger
    than ``divergence``; one that has failed cannot converge any more. The play stops when every start has converged or
    failed.
    """

    def __init__(
        self,
        tensors: TensorList,
        batch: int | None,
        *,
        solution: TensorList | None,
        tolerance: float | None,
        divergence: float | None,
    ) -> None:
        self._tensors = tensors
        self._batch = batch
        self._solution = solution
        self._tolerance = -math.inf if tolerance is None else tolerance
        self._divergence = math.inf if divergence is None else divergence
        self._device = tensors[0].device
        self._look_every = 1 if all(t.device.type == "cpu" for t in tensors) else _LOOK_EVERY
        shape = () if batch is None else (batch,)
        self.converged_at = torch.full(shape, _NEVER, dtype=torch.int64, device=self._device)
        self.failed_at = self.converged_at.clone()
        self._non_finite = torch.zeros(shape, dtype=torch.bool, device=self._device)

    def see(self, step: int, losses: Sequence[Tensor]) -> None:
        """The players and their losses before step number ``step`` is taken."""
        size = self._peak([*self._tensors, *losses])
        finite = torch.isfinite(size)
        failed = (~finite | (size > self._divergence)) & (self.failed_at < 0)
        self.failed_at.masked_fill_(failed, step)
        self._non_finite |= failed & ~finite
        if self._solution is not None:
            pairs = zip(self._tensors, self._solution, strict=True)
            self._converge(step, self._norm([t.detach() - s for t, s in pairs]))

    def see_directions(self, step: int, directions: Sequence[Tensor]) -> None:
        """What the players stepped along in step number ``step``; counts where the solution is not known."""
        if self._solution is None and self._tolerance >= 0:
            self._converge(step, self._norm(directions))

    def stops(self, step: int) -> bool:
        """Whether there is nothing left to play for; looks at the device now and then only."""
        if step % self._look_every:
            return False
        return bool(((self.converged_at >= 0) | (self.failed_at >= 0)).all())

    def verdict(self) -> PlayStatus:
        """How the play ended."""
        if bool(self._non_finite.any()):
            return PlayStatus.non_finite
        if bool((self.failed_at >= 0).any()):
            return PlayStatus.diverged
        return PlayStatus.converged if bool((self.converged_at >= 0).all()) else PlayStatus.completed

    def _converge(self, step: int, distance: Tensor) -> None:
        near = (distance <= self._tolerance) & (self.converged_at < 0) & (self.failed_at < 0)
        self.converged_at.masked_fill_(near, step)

    def _peak(self, tensors: Sequence[Tensor]) -> Tensor:
        """The largest magnitude in each start, NaN where there is one."""
        if self._batch is None:
            peaks = [p.to(self._device, _lists.scalar_dtype(self._device)) for p in _lists.max_abs(tensors)]
        else:
            rows = [t.detach().reshape(self._batch, -1) for t in tensors if t.numel()]
            peaks = [
                torch.linalg.vector_norm(r, float("inf"), dim=1).to(self._device, _lists.scalar_dtype(self._device))
                for r in rows
            ]
        return torch.stack(peaks).amax(0)

    def _norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """The Euclidean norm in each start."""
        if self._batch is None:
            return _lists.norm(tensors).to(self._device)
        dtype = widest(tensors)
        rows = [t.detach().reshape(self._batch, -1) for t in tensors]
        norms = [torch.linalg.vector_norm(r, dim=1, dtype=dtype).to(self._device) for r in rows]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms), dim=0)
        return norm
