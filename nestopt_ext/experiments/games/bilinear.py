"""How many gradients min over x, max over y of x' M y takes, against the angle of the momentum.

Two games: every singular value of M is 1, and singular values from 1 / ``condition`` to 1. On each of them complex
momentum is run at every angle from 0 (heavy ball) to pi (negative momentum) with simultaneous and with alternating
updates, at each angle with the best of the same learning rates, and beside it gradient descent, real and negative
momentum, optimistic and extragradient steps, tuned in the same way. The winners are played again with the optimizers of
the package. The lines of the picture are what the linear analysis (`nestopt_ext.games.convergence_rate`) predicts.

Source: the first experiment of Lorraine, Acuna, Vicol, Duvenaud, "Complex Momentum for Optimization in Games", 2022.
"""

import cmath
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...games import convergence_rate, zoo
from ..run_folder import LOG
from ..tune import Progress
from ._config import GameConfig, between, whole
from ._contest import Entry, competitors, contest, grid, learning_rates, replay, steps_at, unit_start
from ._race import LinearGame, race
from ._recorder import Recorder

PICTURE = "bilinear.png"
MODULI = (0.3, 0.5, 0.7, 0.8, 0.9)
RULES = ("simultaneous", "alternating")
#: Longer runs are not walked again with the optimizers, step by step.
_REPLAY_AT_MOST = 10_000


@dataclass(frozen=True)
class BilinearConfig(GameConfig):
    """The settings of `bilinear`.

    angles: of the momentum, evenly from 0 to pi. lrs: learning rates that each angle and method may choose from.
    size: singular values of the second game, evenly in the logarithm from 1 / condition to 1. tolerance: share of the
    first distance to the solution that ends a run. max_steps: after which it is given up. seed: of the start.
    """

    experiment: ClassVar[str] = "bilinear"
    files: ClassVar[tuple[str, ...]] = (LOG, PICTURE)

    angles: int = 33
    lrs: int = 60
    size: int = 5
    condition: float = 10.0
    tolerance: float = 1e-6
    max_steps: int = 50_000

    def check(self) -> None:
        """Raises ConfigError, a line that names the option, when a choice is out of range."""
        super().check()
        whole(self, "angles", least=2, most=1000)
        whole(self, "lrs", least=1, most=1000)
        whole(self, "size", least=1, most=1000)
        whole(self, "max_steps", least=1, most=10**7)
        between(self, "condition", 1, 1e6)
        between(self, "tolerance", 0, 1)


@dataclass(frozen=True)
class Curve:
    """Gradient evaluations against the angle (units of pi), measured and predicted, each with its best learning rate.

    A number is infinite where no learning rate arrives; ``lrs`` is NaN there.
    """

    rule: str
    modulus: float
    angles: list[float]
    measured: list[float]
    predicted: list[float]
    lrs: list[float]


@dataclass(frozen=True)
class BilinearGame:
    """The results on one game: the singular values, the curves of complex momentum, and every method at its best."""

    name: str
    singular_values: list[float]
    curves: list[Curve]
    entries: list[Entry]


@dataclass(frozen=True)
class BilinearResult:
    """What `bilinear` found."""

    config: BilinearConfig
    games: list[BilinearGame]


def bilinear(
    config: BilinearConfig,
    output: Path | None = None,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Progress | None = None,
) -> BilinearResult:
    """Runs both games; with ``output``, a folder that exists, the figures are logged to ``log.jsonl`` there.

    Raises ConfigError for a setting out of range, and Interrupted once ``should_stop`` says so.
    """
    slow = torch.logspace(-math.log10(config.condition), 0, config.size, dtype=torch.float64)
    problems = {"one singular value": torch.ones(1, dtype=torch.float64), f"condition {config.condition:g}": slow}
    with Recorder(config, output, should_stop, progress) as recorder:
        games = [_play(config, name, singular, recorder) for name, singular in problems.items()]
    return BilinearResult(config, games)


def num_pieces(config: BilinearConfig) -> int:
    """Pieces of work that `bilinear` tells its progress of."""
    return 2 * (len(RULES) + len(competitors(config.angles)))


def _play(config: BilinearConfig, name: str, singular: Tensor, recorder: Recorder) -> BilinearGame:
    start = unit_start(2 * len(singular), config.seed)
    game = LinearGame.of(zoo.bilinear(singular))
    curves, entries = [], []
    for rule in RULES:
        recorder.stage(f"{name}: {rule}")
        curves += _curves(config, game, singular, rule, start, recorder.tick)
        recorder.advance()
    for curve in curves:
        recorder.write("curve", game=name, **asdict(curve))
    lrs = learning_rates(config.lrs)
    for method in competitors(config.angles):
        recorder.stage(f"{name}: {method.name}")
        entry = contest(game, method, start, lrs, tick=recorder.tick, **_limits(config))
        if entry.steps <= _REPLAY_AT_MOST:
            played = zoo.bilinear(singular, start=(start[: len(singular)], start[len(singular) :]))
            path = replay(
                played, method.rule, entry.lr, entry.beta, tolerance=config.tolerance, max_steps=2 * int(entry.steps)
            )
            entry = replace(entry, replayed=path.num_gradients)
        entries.append(entry)
        recorder.write("result", game=name, **entry.to_json())
        recorder.advance()
    return BilinearGame(name, singular.tolist(), curves, entries)


def _curves(
    config: BilinearConfig, game: LinearGame, singular: Tensor, rule: str, start: Tensor, tick: Callable[[], None]
) -> list[Curve]:
    lrs = learning_rates(config.lrs)
    angles = [k / (config.angles - 1) for k in range(config.angles)]
    momenta = [cmath.rect(modulus, math.pi * angle) for modulus in MODULI for angle in angles]
    lr, beta = grid(lrs, momenta)
    group = torch.arange(len(momenta)).repeat_interleave(len(lrs))
    finishes = race(game, rule, start, lr, beta, group, tick=tick, **_limits(config))
    # The eigenvalues are +- i times the singular values; those with a minus have the conjugate roots.
    rates = convergence_rate(1j * singular, lr[:, None], beta[:, None], alternating=rule == "alternating")
    best = rates.reshape(len(momenta), len(lrs)).amin(1).tolist()
    curves = []
    for k, modulus in enumerate(MODULI):
        own = slice(k * len(angles), (k + 1) * len(angles))
        measured = [finish.steps for finish in finishes[own]]
        predicted = [steps_at(rate, config.tolerance) for rate in best[own]]
        chosen = [float(lr[finish.setting]) if finish.setting >= 0 else math.nan for finish in finishes[own]]
        curves.append(Curve(rule, modulus, angles, measured, predicted, chosen))
    return curves


def _limits(config: BilinearConfig) -> dict[str, Any]:
    return {"tolerance": config.tolerance, "max_steps": config.max_steps}
