"""One training, step by step, whatever the method: what a run needs of it."""

from abc import ABC, abstractmethod
from typing import Any

from ...response import HyperParameters
from .problem import SelfTuningProblem


class Learner(ABC):
    """A model that is trained, and the hyperparameters it is trained at. Random numbers are the global ones."""

    def __init__(self, problem: SelfTuningProblem) -> None:
        self.problem = problem
        self.batches_per_epoch = len(problem.train_batches())

    @property
    @abstractmethod
    def hparams(self) -> HyperParameters:
        """The hyperparameters as they are now."""

    @property
    @abstractmethod
    def batches(self) -> int:
        """Training batches taken so far."""

    @abstractmethod
    def step(self) -> float:
        """Takes one step and returns its seconds. Raises TrainerDiverged or LoopDiverged."""

    @abstractmethod
    def scores(self) -> dict[str, float]:
        """See `SelfTuningProblem.scores`."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that later steps depend on, random numbers included."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave. Raises ValueError or RuntimeError where it does not fit."""

    @property
    def epochs(self) -> float:
        """Passes over the training part so far."""
        return self.batches / self.batches_per_epoch

    def values(self) -> dict[str, float]:
        """The hyperparameters in natural units."""
        return {name: float(value) for name, value in self.hparams.values().items()}
