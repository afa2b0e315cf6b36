"""What the trainings of the mixture experiment came to, and the heat map that they make."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .mixture_config import Cell, MixtureConfig
from .mixture_gan import PLAYERS, MixtureGame, Stream, generate, networks

TUNING, TEST = "tuning", "test"
#: Batches whose mean stands for the loss of the whole distribution in `MixtureResult.game`.
_GAME_BATCHES = 16


@dataclass(frozen=True)
class Outcome:
    """What a training came to.

    stage: ``tuning`` or ``test``. modulus, angle: of the momentum, the angle in units of pi. lr: that of the optimizer,
    whose effect is ``effective_lr``. diverged: its weights overflowed; it has no mode then. modes, quality, js: of
    `mixture_scores.Coverage`, means over the later half of the looks. curve: modes at every look.
    """

    stage: str
    modulus: float
    angle: float
    effective_lr: float
    lr: float
    seed: int
    diverged: bool
    modes: float
    quality: float
    js: float
    curve: list[int]

    @property
    def cell(self) -> Cell:
        """Its place in the heat map."""
        return Cell(self.modulus, self.angle)


@dataclass(frozen=True)
class CellResult:
    """A place of the heat map: its trainings on the test seeds, with the learning rate chosen on the tuning seeds."""

    cell: Cell
    effective_lr: float
    tuning: list[Outcome]
    test: list[Outcome]

    @property
    def modes(self) -> float:
        """Modes covered, mean over the test seeds."""
        return _mean(self.test, "modes")

    @property
    def spread(self) -> float:
        """Standard deviation of the modes over the test seeds; 0 for a single one."""
        return statistics.stdev(run.modes for run in self.test) if len(self.test) > 1 else 0.0

    @property
    def quality(self) -> float:
        """Share of the points within 3 std of a mode, mean over the test seeds."""
        return _mean(self.test, "quality")

    @property
    def js(self) -> float:
        """Jensen-Shannon divergence in bits, mean over the test seeds."""
        return _mean(self.test, "js")

    @property
    def diverged(self) -> int:
        """Test seeds whose training overflowed."""
        return sum(run.diverged for run in self.test)

    @property
    def merit(self) -> tuple[float, float]:
        """What cells are ranked by: the modes, and among equals the quality."""
        return self.modes, self.quality

    @property
    def tuning_merit(self) -> tuple[float, float]:
        """The same on the tuning seeds, at the chosen learning rate."""
        return merit([run for run in self.tuning if run.effective_lr == self.effective_lr])


@dataclass(frozen=True)
class MixtureResult:
    """What `mixture` found: every training, and the weights of both players where those of the test seeds ended.

    outcomes: the trainings on the tuning seeds, then those on the test seeds, cell by cell. weights: by player and
    name, [trainings on the test seeds, ...].
    """

    config: MixtureConfig
    outcomes: list[Outcome]
    weights: dict[str, dict[str, Tensor]]

    @cached_property
    def cells(self) -> list[CellResult]:
        """The heat map, in the order of `MixtureConfig.cells`."""
        return [
            CellResult(cell, test[0].effective_lr, self._of(TUNING, cell), test)
            for cell in self.config.cells()
            if (test := self._of(TEST, cell))
        ]

    def best(self, holds: Callable[[Cell], bool], *, on: str = TEST) -> CellResult | None:
        """The cell of most merit for which ``holds``, by the test or the tuning seeds; None without one."""
        among = [result for result in self.cells if holds(result.cell)]
        return max(among, key=lambda r: r.merit if on == TEST else r.tuning_merit, default=None)

    def points(self, result: CellResult) -> Tensor:
        """Points of the generators of a cell, [test seeds, samples, 2]."""
        rows = [row for row, _ in self._tests(result.cell)]
        weights = {name: w[rows] for name, w in self.weights["generator"].items()}
        return generate(self.config, weights, self.config.samples)

    def game(self, cell: Cell, seed: int, dtype: torch.dtype = torch.float64) -> MixtureGame:
        """The GAN where the training of ``cell`` with the test seed ``seed`` ended, for its spectrum and the like.

        Its losses are means over 16 batches of that seed. Raises KeyError when there was no such training.
        """
        rows = [row for row, run in self._tests(cell) if run.seed == seed]
        if not rows:
            raise KeyError(f"no training of {cell} with test seed {seed}")
        players = networks(self.config, seed)
        for name, player in zip(PLAYERS, players, strict=True):
            player.to(dtype).load_state_dict({key: w[rows[0]] for key, w in self.weights[name].items()})
        stream = Stream(self.config, [seed], dtype)
        batches = zip(*(stream.next() for _ in range(_GAME_BATCHES)), strict=True)
        noise, real = (torch.cat(batch, 1)[0] for batch in batches)
        return MixtureGame(self.config.loss, players, noise, real)

    def _of(self, stage: str, cell: Cell) -> list[Outcome]:
        return [run for run in self.outcomes if run.stage == stage and run.cell == cell]

    def _tests(self, cell: Cell) -> list[tuple[int, Outcome]]:
        """The trainings of a cell on the test seeds, and which rows of the weights are theirs."""
        tests = [run for run in self.outcomes if run.stage == TEST]
        return [(row, run) for row, run in enumerate(tests) if run.cell == cell]


def merit(runs: Sequence[Outcome]) -> tuple[float, float]:
    """What learning rates and cells are ranked by: mean modes, and among equals the mean quality."""
    return _mean(runs, "modes"), _mean(runs, "quality")


def _mean(runs: Sequence[Outcome], name: str) -> float:
    return statistics.fmean(getattr(run, name) for run in runs)
