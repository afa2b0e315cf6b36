"""What a hypernetwork's training leaves behind, and when it ends."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor

from ..hypergrad import _loop_arguments as arguments
from ._hypertrain_steps import Point

Stopped: TypeAlias = Literal["steps", "patience", "callback"]


@dataclass(frozen=True)
class HypertrainRecord:
    """What the steps since the last record were like.

    ``step`` counts from 1, hypernetwork steps of phase 1 and hyperparameter steps of phase 2 on end for
    :func:`global_hypertrain`. The losses are means over the steps since the last record, before each step; None where
    none was taken. ``hparams`` are as they are now, on the CPU: a tensor [n], or a dict in natural units.
    """

    step: int
    train_loss: float | None
    valid_loss: float | None
    hparams: Tensor | dict[str, Tensor]


@dataclass(frozen=True)
class HypertrainResult:
    """The records, the hyperparameters at the end, and why it ended there.

    ``hparams`` is a tensor [n], or a dict in natural units. ``stopped`` is ``"steps"`` where all steps were taken,
    ``"patience"``, or ``"callback"``.
    """

    history: tuple[HypertrainRecord, ...]
    hparams: Tensor | dict[str, Tensor]
    stopped: Stopped


class Diary:
    """Keeps records, and knows when it is time to end."""

    def __init__(self, caller: str, point: Point, every: int, patience: int | None, callbacks: Any) -> None:
        arguments.check_count(caller, "record_every", every, 1)
        if patience is not None:
            arguments.check_count(caller, "patience", patience, 1)
        self._callbacks = arguments.check_callbacks(caller, callbacks)
        self._point, self._every, self._patience = point, every, patience
        self._records: list[HypertrainRecord] = []
        self._losses: dict[str, list[float]] = {"train_loss": [], "valid_loss": []}
        self._step = 0
        self._best, self._worse = math.inf, 0
        self._stopped: Stopped = "steps"

    def add(self, **losses: float) -> None:
        """Notes losses of the step in progress."""
        for name, value in losses.items():
            self._losses[name].append(value)

    def closes(self, *, last: bool) -> bool:
        """Ends a step; whether the run is to end with it. ``last``: a record is due in any case."""
        self._step += 1
        if not last and self._step % self._every:
            return False
        means = {name: math.fsum(values) / len(values) if values else None for name, values in self._losses.items()}
        self._losses = {name: [] for name in self._losses}
        record = HypertrainRecord(self._step, means["train_loss"], means["valid_loss"], self._point.now())
        self._records.append(record)
        asked = [callback(record) is True for callback in self._callbacks]
        if any(asked):
            self._stopped = "callback"
        elif self._no_better(record.valid_loss):
            self._stopped = "patience"
        return self._stopped != "steps"

    def result(self) -> HypertrainResult:
        """What was kept, and why it ended."""
        return HypertrainResult(tuple(self._records), self._point.now(), self._stopped)

    def _no_better(self, valid_loss: float | None) -> bool:
        if valid_loss is None or self._patience is None:
            return False
        self._worse = 0 if valid_loss < self._best else self._worse + 1
        self._best = min(self._best, valid_loss)
        return self._worse >= self._patience
