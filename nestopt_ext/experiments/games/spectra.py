"""Eigenvalues in the complex plane: what a game is, and what momentum makes of it; and which momenta can converge.

Three things are computed.

1. The spectra of two games with random couplings, one half cooperative and one purely adversarial, and, for several
   momenta with their best learning rates, the spectra of one step, which must lie in the unit circle.
2. For every momentum on a grid of modulus and angle: whether it converges on rotations with every small enough step
   (`nestopt_ext.games.small_step_converges`), and how many steps it takes on min max xy with its best learning rate,
   for simultaneous and for alternating updates.
3. With ``mixture``, the folder of a finished run of that experiment, the leading eigenvalues of the GAN of the momentum
   that did best there.

Source: Lorraine, Acuna, Vicol, Duvenaud, "Complex Momentum for Optimization in Games", 2022, section 3 and the spectra
of its GANs.
"""

import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ..._checkpoint import CheckpointError
from ...games import (
    convergence_rate,
    game_jacobian,
    momentum_spectrum,
    small_step_converges,
    spectrum,
    zoo,
)
from ..config import ConfigError
from ..run_folder import CHECKPOINT, LOG, FolderError, stored_config
from ..tune import Interrupted, Progress
from ._config import GameConfig, between, whole
from ._contest import RECOMMENDED, steps_at
from ._recorder import Recorder
from .mixture import mixture
from .mixture_config import MixtureConfig
from .mixture_results import MixtureResult

PLANES, PHASES = "spectra.png", "phases.png"
#: The momenta whose steps are drawn.
MOMENTA = {"no momentum": 0.0, "real momentum 0.9": 0.9, "0.9 exp(iπ/8)": RECOMMENDED, "0.7 exp(iπ/2)": 0.7j}
#: The largest entry of G of the two games, see `nestopt_ext.games.mixed`.
LEVELS = {"half cooperative": 0.5, "adversarial": 1.0}
TOLERANCE = 1e-6
_LEADING = 60
#: Learning rates for eigenvalues of modulus up to 1; momenta of modulus near 1 need the smallest.
_LRS = torch.logspace(-4, math.log10(3.4), 60, dtype=torch.float64)
#: More of them around the best.
_REFINEMENT = 21
#: Rates that are 1 are found a little off it.
_ROUNDING = 1e-9
#: Where the eigenvalues of a momentum are drawn for which no learning rate is good.
_DIVERGING_LR = 0.1


@dataclass(frozen=True)
class SpectraConfig(GameConfig):
    """The settings of `spectra`.

    size: parameters of each player. condition: of couplings and curvatures. points: angles of the map, and half as many
    moduli. mixture: folder of a finished run of that experiment, or None. seed: of the couplings.
    """

    experiment: ClassVar[str] = "spectra"
    files: ClassVar[tuple[str, ...]] = (LOG, PLANES, PHASES)

    size: int = 12
    condition: float = 4.0
    points: int = 120
    mixture: str | None = None

    def check(self) -> None:
        """Raises ConfigError, a line that names the option, when a choice is out of range."""
        super().check()
        whole(self, "size", least=1, most=300)
        whole(self, "points", least=4, most=1000)
        between(self, "condition", 1, 1e6)
        if self.mixture is not None and not isinstance(self.mixture, str):
            raise ConfigError(f"--mixture must be a path; got {self.mixture!r}.")


@dataclass(frozen=True, eq=False)
class Step:
    """One step with a momentum: its eigenvalues [3 n] and the largest modulus.

    The learning rate is the best of a grid; where none converges, one at which that can be seen.
    """

    momentum: str
    beta: complex
    lr: float
    eigenvalues: Tensor
    rate: float


@dataclass(frozen=True, eq=False)
class GameSpectrum:
    """A game's eigenvalues, complex128 [n], and the steps that the momenta make of it."""

    name: str
    eigenvalues: Tensor
    steps: list[Step]


@dataclass(frozen=True, eq=False)
class PhaseMap:
    """Which momenta converge: ``moduli`` [m], ``angles`` [a] in radians.

    ``small_steps`` [m, a] says whether every small enough step converges on rotations; ``steps`` [m, a] is how many
    steps to a distance of 1e-6 the linear analysis gives on min max xy with the best learning rate, inf for none.
    """

    alternating: bool
    moduli: Tensor
    angles: Tensor
    small_steps: Tensor
    steps: Tensor


@dataclass(frozen=True, eq=False)
class SpectraResult:
    """What `spectra` found; ``gan`` is None without a finished mixture run."""

    config: SpectraConfig
    games: list[GameSpectrum]
    maps: list[PhaseMap]
    gan: GameSpectrum | None


def spectra(
    config: SpectraConfig,
    output: Path | None = None,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Progress | None = None,
) -> SpectraResult:
    """Computes everything; with ``output``, a folder that exists, the figures are logged to ``log.jsonl`` there.

    Raises ConfigError for a setting out of range or a ``mixture`` that is no finished run, and Interrupted once
    ``should_stop`` says so.
    """
    with Recorder(config, output, should_stop, progress) as recorder:
        gan = None
        if config.mixture is not None:
            recorder.stage("mixture")
            gan = _trained_gan(Path(config.mixture))
            _log(recorder, gan)
        found = []
        for name, level in LEVELS.items():
            recorder.stage(name)
            found.append(_spectrum(name, random_game(config, level)))
            _log(recorder, found[-1])
            recorder.advance()
        maps = []
        for alternating in (False, True):
            recorder.stage("alternating" if alternating else "simultaneous")
            maps.append(phase_map(config.points // 2, config.points, alternating=alternating))
            converging = maps[-1].small_steps.double().mean()
            recorder.write("map", alternating=alternating, small_steps_converge=float(converging))
            recorder.advance()
    return SpectraResult(config, found, maps, gan)


def check_inputs(config: SpectraConfig) -> None:
    """Raises ConfigError when ``mixture`` is no finished run, before anything is computed."""
    if config.mixture is not None:
        finished_mixture(Path(config.mixture))


def num_pieces(config: SpectraConfig) -> int:
    """Pieces of work that `spectra` tells its progress of."""
    return len(LEVELS) + 2


def random_game(config: SpectraConfig, level: float) -> zoo.Mixed:
    """Min max x' G A y + x' (I - G) B_1 x - y' (I - G) B_2 y with G = ``level``, random A and random positive B_i."""
    generator = torch.Generator().manual_seed(config.seed)
    values = torch.logspace(-math.log10(config.condition), 0, config.size, dtype=torch.float64)

    def rotation() -> Tensor:
        drawn = torch.randn(config.size, config.size, dtype=torch.float64, generator=generator)
        orthogonal: Tensor = torch.linalg.qr(drawn).Q
        return orthogonal

    coupling = rotation() @ torch.diag(values) @ rotation().T
    turns = rotation(), rotation()
    first, second = (turn @ torch.diag(values / 2) @ turn.T for turn in turns)
    return zoo.mixed(level, size=config.size, coupling=coupling, curvatures=(first, second), generator=generator)


def momenta(moduli: Tensor, angles: Tensor) -> Tensor:
    """The momenta of all moduli [m] at all angles [a] in radians, complex [m, a]."""
    return torch.polar(moduli[:, None].expand(-1, len(angles)), angles.expand(len(moduli), -1))


def phase_map(num_moduli: int, num_angles: int, *, alternating: bool) -> PhaseMap:
    """The map of momenta with moduli from 0 to almost 1 and angles from 0 to pi, both ends included."""
    moduli = torch.linspace(0, 0.98, num_moduli, dtype=torch.float64)
    angles = torch.linspace(0, math.pi, num_angles, dtype=torch.float64)
    beta = momenta(moduli, angles)
    best, at = torch.full(beta.shape, math.inf, dtype=torch.float64), torch.zeros(beta.shape, dtype=torch.float64)

    def look(lr: Tensor) -> None:
        rates = convergence_rate([1j], lr[..., None], beta[..., None], alternating=alternating)  # -i: conjugate roots
        at.copy_(torch.where(rates < best, lr, at))
        best.copy_(torch.minimum(rates, best))

    for lr in _LRS:
        look(lr.expand(beta.shape))
    spacing, centre = float(_LRS[1] / _LRS[0]), at.clone()
    for part in torch.linspace(-1, 1, _REFINEMENT, dtype=torch.float64):
        look(centre * spacing**part)
    steps = torch.where(best < 1 - _ROUNDING, math.log(TOLERANCE) / best.log(), math.inf)
    return PhaseMap(alternating, moduli, angles, small_step_converges(beta, alternating=alternating), steps)


def _spectrum(name: str, game: zoo.Mixed) -> GameSpectrum:
    eigenvalues = torch.linalg.eigvals(game.jacobian())
    return GameSpectrum(name, eigenvalues, _steps(eigenvalues, scale=1.0))


def _steps(eigenvalues: Tensor, *, scale: float) -> list[Step]:
    """The steps of all momenta on a game whose eigenvalues are not much larger than ``scale``."""
    steps = []
    lrs = _LRS / scale
    for label, beta in MOMENTA.items():
        best = lrs[convergence_rate(eigenvalues, lrs[:, None], beta).argmin()]
        if convergence_rate(eigenvalues, best, beta) >= 1 - _ROUNDING:
            best = torch.tensor(_DIVERGING_LR / scale, dtype=torch.float64)
        roots = momentum_spectrum(eigenvalues, best, beta).flatten()
        steps.append(Step(label, complex(beta), float(best), roots, float(roots.abs().max())))
    return steps


def finished_mixture(folder: Path) -> MixtureResult:
    """The result of the finished run in ``folder``, which is only read. Raises ConfigError when there is none."""
    try:
        config = stored_config(folder, MixtureConfig)
        with tempfile.TemporaryDirectory() as copy:
            for name in (CHECKPOINT, LOG):
                shutil.copyfile(folder / name, Path(copy) / name)
            # Nothing is trained: a run that is not finished stops at its first look.
            return mixture(config, Path(copy), resume=True, should_stop=lambda: True)
    except (OSError, FolderError, CheckpointError, Interrupted) as error:
        raise ConfigError(f"--mixture must be the folder of a finished run of games mixture; got {folder}.") from error


def _trained_gan(folder: Path) -> GameSpectrum:
    result = finished_mixture(folder)
    best = result.best(lambda cell: not cell.is_real) or result.cells[0]
    run = max(best.test, key=lambda outcome: (outcome.modes, outcome.quality))
    game = result.game(best.cell, run.seed)
    jacobian = game_jacobian(game.losses(game.players), game.players)
    count = min(_LEADING, sum(jacobian.sizes))
    eigenvalues = spectrum(jacobian, k=count).eigenvalues
    steps = _steps(eigenvalues, scale=float(eigenvalues.abs().max()))
    return GameSpectrum(f"GAN trained with {best.cell}", eigenvalues, steps)


def _log(recorder: Recorder, found: GameSpectrum) -> None:
    recorder.write("game", game=found.name, eigenvalues=[[z.real, z.imag] for z in found.eigenvalues.tolist()])
    for step in found.steps:
        recorder.write(
            "result",
            game=found.name,
            momentum=step.momentum,
            beta=[step.beta.real, step.beta.imag],
            lr=step.lr,
            rate=step.rate,
            steps=steps_at(step.rate, TOLERANCE),
            eigenvalues=[[z.real, z.imag] for z in step.eigenvalues.tolist()],
        )
