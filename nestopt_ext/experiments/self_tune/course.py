"""A training within its allowance, with a learning curve."""

import math
from typing import Any

from ...hypergrad import LoopDiverged
from ...response import TrainerDiverged
from .config import Budget
from .learner import Learner

#: Where seconds are given, a curve has at least so many points, however long an epoch takes.
_LOOKS = 20


class TrainingDiverged(RuntimeError):
    """A loss is not finite; the message is one line."""


class Course:
    """Steps of ``learner`` until ``allowance`` is spent, with a look at the end of each epoch.

    Looks cost no time. ``spent_before`` is what the method spent on earlier trainings, which its curve goes on from.
    """

    def __init__(self, learner: Learner, allowance: Budget, spent_before: Budget) -> None:
        self.learner = learner
        self.allowance = allowance
        self.before = spent_before
        self.seconds = 0.0
        self.looked_at = 0.0
        self.points: list[dict[str, Any]] = []

    @property
    def done(self) -> bool:
        """Whether the allowance is spent."""
        return self.seconds >= self.allowance.seconds or self.learner.epochs >= self.allowance.epochs

    @property
    def share(self) -> float:
        """How much of the allowance is spent, up to 1."""
        return min(1.0, max(self.seconds / self.allowance.seconds, self.learner.epochs / self.allowance.epochs))

    def step(self) -> dict[str, Any] | None:
        """Takes one step; returns a new point of the curve where one is due. Raises TrainingDiverged."""
        epoch = math.floor(self.learner.epochs)
        try:
            self.seconds += self.learner.step()
        except (TrainerDiverged, LoopDiverged) as error:
            raise TrainingDiverged(" ".join(str(error).split())) from error
        overdue = self.seconds - self.looked_at > self.allowance.seconds / _LOOKS
        if not (self.done or overdue or math.floor(self.learner.epochs) > epoch):
            return None
        self.looked_at = self.seconds
        point: dict[str, Any] = {
            "seconds": self.before.seconds + self.seconds,
            "epochs": self.before.epochs + self.learner.epochs,
            **self.learner.scores(),
            "values": self.learner.values(),
        }
        if not math.isfinite(point["valid_loss"]):
            raise TrainingDiverged("the validation loss is not finite")
        self.points.append(point)
        return point

    def state_dict(self) -> dict[str, Any]:
        """Everything that later steps depend on."""
        return {
            "learner": self.learner.state_dict(),
            "seconds": self.seconds,
            "looked_at": self.looked_at,
            "points": self.points,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave. Raises ValueError or RuntimeError where it does not fit."""
        if set(state) != {"learner", "seconds", "looked_at", "points"}:
            raise ValueError("it must be the state of a training")
        self.learner.load_state_dict(state["learner"])
        self.seconds, self.looked_at = float(state["seconds"]), float(state["looked_at"])
        self.points = [dict(point) for point in state["points"]]
