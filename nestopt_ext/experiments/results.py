"""What a training and a method reached."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Scores:
    """Cross-entropy without any weight or decay, and the share of right answers, on the three parts."""

    train_loss: float
    train_accuracy: float
    valid_loss: float
    valid_accuracy: float
    test_loss: float
    test_accuracy: float


@dataclass(frozen=True)
class MethodResult:
    """One row of the closing table.

    ``points`` is the learning curve, one dict of `Scores` and ``step`` each; the last is the model as it ended.
    ``auc`` says how well the learned weights separate clean from flipped labels, ``diverged_solves`` in how many
    hypergradients the Neumann sum grew because the inner loss was not convex there. ``skipped`` is the reason why there
    is nothing else.
    """

    method: str
    num_hparams: int
    points: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    peak_mib: float = 0.0
    log_decay: float | None = None
    auc: float | None = None
    diverged_solves: int = 0
    skipped: str | None = None

    @property
    def final(self) -> Scores:
        """Scores after the last step."""
        return Scores(**{name: value for name, value in self.points[-1].items() if name != "step"})

    @property
    def stopped_early(self) -> Scores:
        """Scores at the point of lowest validation loss."""
        best = min(self.points, key=lambda point: point["valid_loss"])
        return Scores(**{name: value for name, value in best.items() if name != "step"})
