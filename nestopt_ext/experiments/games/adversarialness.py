"""How many gradients each method takes as a game turns from cooperative to adversarial.

The game is `nestopt_ext.games.mixed`: min over x, max over y of x' G A y + x' (I - G) B x - y' (I - G) B y with
diagonal G in [0, 1]. The largest entry of G, the level, goes from 0, where each player minimizes a quadratic of its
own, to 1, where some coordinates only rotate. Coordinates are all pairs of a share and a scale: G is level * share, A
the scale and B half of it, so the eigenvalues of the Jacobian are scale * (1 - g +- i g). The scales go from
1 / ``condition`` to 1: on the cooperative end momentum has something to speed up, on the adversarial end rotations are
slow and fast.

Every method has its momentum and learning rate tuned at every level, on the same grid.

Source: the sweep of Lorraine, Acuna, Vicol, Duvenaud, "Complex Momentum for Optimization in Games", 2022; the choice of
A, B and G is ours.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ...games import zoo
from ..run_folder import LOG
from ..tune import Progress
from ._config import GameConfig, between, whole
from ._contest import Entry, competitors, contest, learning_rates, unit_start
from ._race import LinearGame
from ._recorder import Recorder

PICTURE = "sweep.png"
SHARES = (0.0, 0.5, 1.0)
NUM_SCALES = 3


@dataclass(frozen=True)
class SweepConfig(GameConfig):
    """The settings of `sweep`.

    levels: of the largest entry of G, evenly from 0 to 1. lrs, angles: learning rates and angles that each method may
    choose from. condition: of the scales. tolerance: share of the first distance to the solution that ends a run.
    max_steps: after which it is given up. seed: of the start.
    """

    experiment: ClassVar[str] = "sweep"
    files: ClassVar[tuple[str, ...]] = (LOG, PICTURE)

    levels: int = 11
    lrs: int = 40
    angles: int = 17
    condition: float = 10.0
    tolerance: float = 1e-6
    max_steps: int = 50_000

    def check(self) -> None:
        """Raises ConfigError, a line that names the option, when a choice is out of range."""
        super().check()
        whole(self, "levels", least=2, most=1000)
        whole(self, "lrs", least=1, most=1000)
        whole(self, "angles", least=2, most=1000)
        whole(self, "max_steps", least=1, most=10**7)
        between(self, "condition", 1, 1e6)
        between(self, "tolerance", 0, 1)


@dataclass(frozen=True)
class SweepResult:
    """What `sweep` found: for each method its entries in the order of ``levels``."""

    config: SweepConfig
    levels: list[float]
    entries: dict[str, list[Entry]]


def sweep(
    config: SweepConfig,
    output: Path | None = None,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Progress | None = None,
) -> SweepResult:
    """Runs all levels; with ``output``, a folder that exists, the figures are logged to ``log.jsonl`` there.

    Raises ConfigError for a setting out of range, and Interrupted once ``should_stop`` says so.
    """
    with Recorder(config, output, should_stop, progress) as recorder:
        levels = [k / (config.levels - 1) for k in range(config.levels)]
        methods = competitors(config.angles)
        entries: dict[str, list[Entry]] = {method.name: [] for method in methods}
        for level in levels:
            game = LinearGame.of(mixed_game(level, config.condition))
            start = unit_start(len(game.jacobian), config.seed)
            recorder.stage(f"max G {level:g}")
            for method in methods:
                entry = contest(
                    game,
                    method,
                    start,
                    learning_rates(config.lrs),
                    tolerance=config.tolerance,
                    max_steps=config.max_steps,
                    tick=recorder.tick,
                )
                recorder.write("result", level=level, **entry.to_json())
                recorder.advance()
                entries[method.name].append(entry)
    return SweepResult(config, levels, entries)


def num_pieces(config: SweepConfig) -> int:
    """Pieces of work that `sweep` tells its progress of."""
    return config.levels * len(competitors(config.angles))


def mixed_game(level: float, condition: float, start: tuple[Tensor, Tensor] | None = None) -> zoo.Mixed:
    """The game at ``level``; its Jacobian's eigenvalues are scale * (1 - g +- i g) for every scale and g."""
    scales = torch.logspace(-math.log10(condition), 0, NUM_SCALES, dtype=torch.float64)
    shares = torch.tensor(SHARES, dtype=torch.float64)
    scale, share = scales.repeat(len(shares)), shares.repeat_interleave(len(scales))
    return zoo.mixed(level * share, coupling=scale, curvatures=(scale / 2, scale / 2), start=start)
