"""What a run of the mixture experiment is made of: the grid of momenta, the learning rates, the GAN, and the seeds."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from ...optim.effective_lr import effective_lr
from ..config import ConfigError, check_number, check_one_of
from ..run_folder import CHECKPOINT, LOG
from ._config import GameConfig, between, whole

LOSSES = ("non-saturating", "minimax")
OPTIMIZERS = ("complex-sgd", "complex-adam")
HEAT_MAP, SAMPLES = "heatmap.png", "samples.png"

#: What makes a look at the whole path of a few seconds, not a result.
QUICK = {
    "moduli": (0.0, 0.8),
    "angles": (0.0, 1 / 8, 1.0),
    "lrs": (0.02, 0.04),
    "tuning_seeds": 1,
    "test_seeds": 2,
    "steps": 300,
    "samples": 200,
}


@dataclass(frozen=True)
class Cell:
    """A place of the heat map: the momentum ``modulus * exp(i * pi * angle)``.

    >>> Cell(0.9, 1.0).momentum, Cell(0.8, 0.5).momentum
    ((-0.9+0j), 0.8j)
    >>> print(Cell(0.8, 1 / 8), Cell(0.9, 1.0), Cell(0.5, 0.0))
    0.8 exp(iπ/8) -0.9 0.5
    """

    modulus: float
    angle: float

    @property
    def momentum(self) -> complex:
        """The coefficient; exactly real at angles 0 and 1, and imaginary at 1/2."""
        cosine = 0.0 if self.angle == 0.5 else math.cos(math.pi * self.angle)
        sine = 0.0 if self.is_real else math.sin(math.pi * self.angle)
        return complex(self.modulus * cosine, self.modulus * sine)

    @property
    def is_real(self) -> bool:
        """Whether the momentum is plain SGD, the heavy ball or negative momentum."""
        return self.modulus == 0 or self.angle in (0, 1)

    def lr(self, effective: float) -> float:
        """The learning rate at which this momentum moves like plain gradient descent with ``effective``."""
        return effective / effective_lr(1.0, self.momentum)

    def __str__(self) -> str:
        if self.is_real:
            return f"{self.momentum.real:g}"
        return f"{self.modulus:g} exp(i{angle_label(self.angle)})"


def angle_label(angle: float) -> str:
    """An angle given in units of pi.

    >>> angle_label(0.0), angle_label(1 / 32), angle_label(0.75), angle_label(1.0)
    ('0', 'π/32', '3π/4', 'π')
    """
    part = Fraction(angle).limit_denominator(128)
    top = "π" if part.numerator == 1 else f"{part.numerator}π"
    if part == 0:
        return "0"
    return top if part.denominator == 1 else f"{top}/{part.denominator}"


@dataclass(frozen=True)
class MixtureConfig(GameConfig):
    """The settings of `nestopt_ext.experiments.games.mixture`.

    moduli, angles: the grid of momenta, 0 <= modulus < 1, the angle in units of pi from 0 to 1. lrs: effective
    learning rates that every momentum chooses from; None for those of the optimizer. optimizer: ``complex-sgd`` moves
    both players with the momentum; ``complex-adam`` moves the discriminator with ComplexAdam, betas (momentum, 0.999),
    and the generator with betas (0, 0.999). loss: of the generator. tuning_seeds, test_seeds: trainings of each
    momentum at each learning rate, and those of each momentum at its best one. seed: the first of these seeds.
    steps: of both players. batch_size: examples, and as many generated, per gradient. width: units in each of the two
    hidden layers of either network. noise_dim: inputs of the generator. modes, radius, std: Gaussians of this standard
    deviation, evenly on a circle of this radius. evaluations: how often a training is looked at; the later half counts.
    samples: points generated for each look. mode_share: share of them that must lie within 3 std of a mode for it to
    count as covered. batch_runs: trainings in a batch. threads: batches at the same time.
    """

    experiment: ClassVar[str] = "mixture"
    files: ClassVar[tuple[str, ...]] = (LOG, CHECKPOINT, HEAT_MAP, SAMPLES)
    resumable: ClassVar[bool] = True

    moduli: tuple[float, ...] = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95)
    angles: tuple[float, ...] = (0.0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    lrs: tuple[float, ...] | None = None
    optimizer: str = "complex-sgd"
    loss: str = "non-saturating"
    tuning_seeds: int = 4
    test_seeds: int = 8
    steps: int = 4000
    batch_size: int = 64
    width: int = 32
    noise_dim: int = 4
    modes: int = 8
    radius: float = 1.0
    std: float = 0.1
    evaluations: int = 10
    samples: int = 1000
    mode_share: float = 0.025
    batch_runs: int = 96
    threads: int = 2

    #: From slow to where most momenta fail, for each optimizer.
    _LRS: ClassVar[dict[str, tuple[float, ...]]] = {
        "complex-sgd": (0.005, 0.01, 0.02, 0.04),
        "complex-adam": (0.0003, 0.001, 0.003, 0.01),
    }

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """The effective learning rates that every momentum chooses from."""
        return self._LRS[self.optimizer] if self.lrs is None else self.lrs

    @property
    def tuning(self) -> range:
        """The seeds that choose the learning rates."""
        return range(self.seed, self.seed + self.tuning_seeds)

    @property
    def test(self) -> range:
        """The seeds of the results; no learning rate was chosen on them."""
        return range(self.tuning.stop, self.tuning.stop + self.test_seeds)

    def cells(self) -> list[Cell]:
        """The momenta; modulus 0 is one of them, whatever its angle."""
        return list(self._cells())

    def _cells(self) -> Iterator[Cell]:
        for modulus in self.moduli:
            for angle in self.angles if modulus else (0.0,):
                yield Cell(modulus, angle)

    def check(self) -> None:
        """Raises ConfigError, a line that names the option, when a choice is out of range."""
        super().check()
        check_one_of("optimizer", self.optimizer, OPTIMIZERS)
        check_one_of("loss", self.loss, LOSSES)
        _several("moduli", self.moduli, lambda value: 0 <= value < 1, ">= 0 and < 1")
        _several("angles", self.angles, lambda value: 0 <= value <= 1, "from 0 to 1, in units of pi")
        if self.lrs is not None:
            _several("lrs", self.lrs, lambda value: value > 0, "> 0")
        for name in ("tuning_seeds", "test_seeds"):
            whole(self, name, least=1, most=1000)
        for name in ("batch_size", "width", "noise_dim", "samples", "batch_runs", "threads"):
            whole(self, name, least=1, most=4096)
        whole(self, "modes", least=1, most=1000)
        whole(self, "evaluations", least=1, most=1000)
        whole(self, "steps", least=self.evaluations, most=10**7)
        between(self, "radius", 0, 1e6)
        between(self, "std", 0, 1e6)
        between(self, "mode_share", 0, 1)


def _several(name: str, values: object, holds: Callable[[float], bool], rule: str) -> None:
    """Requires a tuple of different numbers, each of which holds to the rule."""
    option = "--" + name
    if not isinstance(values, tuple) or not values:
        raise ConfigError(f"{option} must be one or more numbers; got {values!r}.")
    for value in values:
        if not holds(check_number(name, value)):
            raise ConfigError(f"{option} must be {rule}; got {value}.")
    if len(set(values)) != len(values):
        raise ConfigError(f"{option} must name every number once; got {', '.join(map(str, values))}.")
