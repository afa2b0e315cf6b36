"""Searches for values: on a grid, and by Optuna at random, by a tree of Parzen estimators, by a Gaussian process."""

import math
import random
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Protocol

from .space import Dimension


class Unavailable(RuntimeError):
    """A search cannot be made; the message is the reason."""


class Search(Protocol):
    """Asks for trainings, one after the other, and is told what they reached."""

    @property
    def exhausted(self) -> bool:
        """Whether there is nothing left to try."""

    def ask(self) -> dict[str, float]:
        """The next values to train at."""

    def tell(self, loss: float | None) -> None:
        """What the values asked for last were worth; None where their training diverged."""


def make_search(method: str, space: Sequence[Dimension], trials: int | None, seed: int) -> Search:
    """The search ``method``, for ``trials`` trainings where their number is known.

    Raises Unavailable where a package is missing.
    """
    return GridSearch(space, trials, seed) if method == "grid" else OptunaSearch(method, space, seed)


class GridSearch:
    """Three values along each dimension, or as many as ``trials`` allow, all combinations in random order.

    >>> search = GridSearch([Dimension("p", 0.1, 0, 1, (0, 1))], 3, seed=0)
    >>> sorted(search.ask()["p"] for _ in range(3)), search.exhausted
    ([0.0, 0.5, 1.0], True)
    """

    def __init__(self, space: Sequence[Dimension], trials: int | None, seed: int) -> None:
        count = 3
        while count < 10 and (count + 1) ** len(space) <= (trials or 0):
            count += 1
        self._axes = {d.name: d.grid(count) for d in space}
        self._size = math.prod(len(axis) for axis in self._axes.values())
        self._random = random.Random(seed)
        self._asked: set[int] = set()

    @property
    def exhausted(self) -> bool:
        """See `Search`."""
        return len(self._asked) == self._size

    def ask(self) -> dict[str, float]:
        """See `Search`."""
        place = self._random.randrange(self._size)
        while place in self._asked:
            place = self._random.randrange(self._size)
        self._asked.add(place)
        values = {}
        for name, axis in self._axes.items():
            place, index = divmod(place, len(axis))
            values[name] = axis[index]
        return values

    def tell(self, loss: float | None) -> None:
        """See `Search`."""


class OptunaSearch:
    """A sampler of Optuna: ``random``, ``tpe`` or ``gp``."""

    exhausted = False

    def __init__(self, method: str, space: Sequence[Dimension], seed: int) -> None:
        try:
            import optuna
        except ImportError as error:
            raise Unavailable("Optuna is not installed: pip install nestopt_ext[experiments]") from error
        if method == "gp" and find_spec("scipy") is None:  # Optuna would say so only when it is asked for values
            raise Unavailable("Optuna's Gaussian process needs SciPy: pip install nestopt_ext[experiments]")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        samplers = {
            "random": optuna.samplers.RandomSampler,
            "tpe": optuna.samplers.TPESampler,
            "gp": optuna.samplers.GPSampler,
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = samplers[method](seed=seed)
        self._failed = optuna.trial.TrialState.FAIL
        self._study = optuna.create_study(sampler=sampler)
        self._space = space
        self._trial: Any = None

    def ask(self) -> dict[str, float]:
        """See `Search`."""
        self._trial = self._study.ask()
        return {d.name: self._suggest(d) for d in self._space}

    def tell(self, loss: float | None) -> None:
        """See `Search`."""
        if loss is None:
            self._study.tell(self._trial, state=self._failed)
        else:
            self._study.tell(self._trial, loss)

    def _suggest(self, d: Dimension) -> float:
        low, high = d.search
        if d.discrete:
            return float(self._trial.suggest_int(d.name, int(low), int(high)))
        return float(self._trial.suggest_float(d.name, low, high, log=d.log))
