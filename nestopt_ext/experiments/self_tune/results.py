"""What a method reached, and what it spent."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

#: What every point of a curve has: spent seconds and epochs, losses, shares of right answers, and the values there.
POINT = ("seconds", "epochs", "valid_loss", "valid_accuracy", "test_loss", "test_accuracy", "values")


@dataclass(frozen=True)
class MethodResult:
    """One row of the closing table.

    ``points`` are the looks at the model in their order, each a dict of `POINT`; for a search those of all trainings,
    one behind the other. ``seconds`` and ``epochs`` are spent on training, looks not counted. ``fixed`` are the
    hyperparameters that the method cannot move. ``skipped`` is the reason why there is nothing else.
    """

    method: str
    points: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    epochs: float = 0.0
    trainings: int = 1
    fixed: list[str] = field(default_factory=list)
    skipped: str | None = None

    @property
    def best(self) -> dict[str, Any]:
        """The point of lowest validation loss: training is stopped early, by the same rule for every method."""
        return lowest(self.points)

    @property
    def final(self) -> dict[str, Any]:
        """The last point."""
        return self.points[-1]


def lowest(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first point of lowest validation loss."""
    return min(points, key=lambda point: float(point["valid_loss"]))
