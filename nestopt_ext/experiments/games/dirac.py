"""The smallest GAN as a phase portrait: which methods spiral out, and which spiral in.

The Dirac GAN (`nestopt_ext.games.dirac_gan`) has one generated point theta, one true point at 0 and a discriminator of
slope psi. At its solution the eigenvalues of the Jacobian are +- i/2, a rotation with nothing that pulls inwards: real
positive momentum spirals out, complex momentum in. Farther out the game is not linear; the portrait shows that too.

Source: Mescheder, Geiger, Nowozin, "Which Training Methods for GANs do actually Converge?", 2018, for the game.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ... import games
from ..run_folder import LOG
from ..tune import Progress
from ._config import GameConfig, between, whole
from ._contest import RECOMMENDED, optimizers, unit_start
from ._recorder import Recorder

PICTURE = "dirac.png"
#: Half of the range in which the vector field is drawn, and where a path that spirals out is left.
EXTENT = 3.0
_FIELD_SIDE = 17


@dataclass(frozen=True)
class Walk:
    """How a method is walked: its rule (see `nestopt_ext.experiments.games._race.race`), learning rate and momentum."""

    method: str
    rule: str
    lr: float
    beta: complex = 0

    @property
    def alternating(self) -> bool:
        """Whether the players take turns."""
        return self.rule == "alternating"


#: Learning rates near the best for a rotation of speed 1/2; where none is good, one that shows the spiral.
WALKS = (
    Walk("gradient descent", "simultaneous", 0.12),
    Walk("real momentum", "simultaneous", 0.02, 0.9),
    Walk("complex momentum", "simultaneous", 0.12, RECOMMENDED),
    Walk("complex momentum, alternating", "alternating", 0.12, RECOMMENDED),
    Walk("optimistic", "optimistic", 0.7),
    Walk("extragradient", "extragradient", 1.4),
)


@dataclass(frozen=True)
class DiracConfig(GameConfig):
    """The settings of `dirac`. steps: of every method. radius: of the start. seed: of its direction."""

    experiment: ClassVar[str] = "dirac"
    files: ClassVar[tuple[str, ...]] = (LOG, PICTURE)

    steps: int = 600
    radius: float = 1.5

    def check(self) -> None:
        """Raises ConfigError, a line that names the option, when a choice is out of range."""
        super().check()
        whole(self, "steps", least=10, most=10**6)
        between(self, "radius", 0, EXTENT)


@dataclass(frozen=True, eq=False)
class Path2d:
    """The path of one method.

    ``points`` [steps + 1, 2] are (theta, psi), up to where a path that runs away is left; ``gradients`` the evaluations
    taken by the end. ``eigenvalues`` are those of one step near the solution, complex128; ``rate`` is the
    largest modulus, ``measured_rate`` the factor per step by which the distance shrank over the second half of the part
    of the path within distance 0.1, NaN where there is too little of it.
    """

    walk: Walk
    points: Tensor
    gradients: int
    status: games.PlayStatus
    eigenvalues: Tensor
    rate: float
    measured_rate: float

    @property
    def distances(self) -> Tensor:
        """To the solution, [steps + 1]."""
        norms: Tensor = self.points.norm(dim=1)
        return norms

    @property
    def inwards(self) -> bool:
        """Whether the path ended nearer to the solution than it began."""
        distances = self.distances
        return bool(distances[-1] < distances[0])


@dataclass(frozen=True, eq=False)
class DiracResult:
    """What `dirac` found: paths, and the field: ``grid`` [m] along both axes, ``field`` [m, m, 2] is -xi(theta, psi).

    The first index of ``field`` is that of psi. ``jacobian`` holds the eigenvalues of the game at the solution.
    """

    config: DiracConfig
    paths: list[Path2d]
    grid: Tensor
    field: Tensor
    jacobian: Tensor


def dirac(
    config: DiracConfig,
    output: Path | None = None,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Progress | None = None,
) -> DiracResult:
    """Walks all methods; with ``output``, a folder that exists, the figures are logged to ``log.jsonl`` there.

    Raises ConfigError for a setting out of range, and Interrupted once ``should_stop`` says so.
    """
    with Recorder(config, output, should_stop, progress) as recorder:
        jacobian = _at_solution()
        eigenvalues = torch.linalg.eigvals(jacobian)
        recorder.write("jacobian", eigenvalues=[[z.real, z.imag] for z in eigenvalues.tolist()])
        paths = []
        for walk in WALKS:
            recorder.stage(walk.method)
            paths.append(_walk(config, walk, jacobian))
            recorder.write("result", **_figures(paths[-1]))
            recorder.advance()
        return DiracResult(config, paths, *_field(), eigenvalues)


def num_pieces(config: DiracConfig) -> int:
    """Pieces of work that `dirac` tells its progress of."""
    return len(WALKS)


def _walk(config: DiracConfig, walk: Walk, jacobian: Tensor) -> Path2d:
    start = config.radius * unit_start(2, config.seed)
    game = games.dirac_gan(start=(start[0], start[1]))
    loop = games.alternating if walk.alternating else games.simultaneous
    played = loop(game, optimizers(walk.rule, walk.lr, walk.beta), config.steps, divergence=10 * EXTENT)
    points = torch.stack(list(played.recorded), dim=1)
    eigenvalues = step_eigenvalues(jacobian, walk)
    return Path2d(
        walk,
        points,
        played.num_gradients,
        played.status,
        eigenvalues,
        float(eigenvalues.abs().max()),
        _measured_rate(points.norm(dim=1)),
    )


def step_eigenvalues(jacobian: Tensor, walk: Walk) -> Tensor:
    """The eigenvalues of one step of the method on a linear game of two numbers, complex128."""
    values: Tensor = torch.linalg.eigvals(_step_matrix(jacobian, walk))
    return values


def _step_matrix(jacobian: Tensor, walk: Walk) -> Tensor:
    if walk.rule in ("simultaneous", "alternating"):
        return games.momentum_matrix(jacobian, walk.lr, walk.beta, players=[1, 1], alternating=walk.alternating)
    identity, zero = torch.eye(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    step = walk.lr * jacobian
    if walk.rule == "extragradient":
        return identity - step + step @ step
    return torch.cat([torch.cat([identity - 2 * step, step], 1), torch.cat([identity, zero], 1)])


def _at_solution() -> Tensor:
    zero = torch.zeros((), dtype=torch.float64)
    game = games.dirac_gan(start=(zero, zero))
    return games.game_jacobian(game.losses(game.players), game.players).dense()


def _field() -> tuple[Tensor, Tensor]:
    grid = torch.linspace(-EXTENT, EXTENT, _FIELD_SIDE, dtype=torch.float64)
    psi, theta = torch.meshgrid(grid, grid, indexing="ij")
    game = games.dirac_gan(start=(theta.flatten(), psi.flatten()))
    descent = [-part for part in games.gradients(game.losses(game.players), game.players)]
    return grid, torch.stack(descent, dim=-1).reshape(_FIELD_SIDE, _FIELD_SIDE, 2)


def _measured_rate(distances: Tensor) -> float:
    near = distances[(distances < 0.1) & (distances > 1e-12)]
    if len(near) < 20:
        return math.nan
    half = near[len(near) // 2 :]
    steps = torch.arange(len(half), dtype=torch.float64)
    centred = steps - steps.mean()
    slope = float((centred * half.log()).sum() / centred.square().sum())
    return math.exp(slope)


def _figures(path: Path2d) -> dict[str, Any]:
    walk = path.walk
    return {
        "method": walk.method,
        "lr": walk.lr,
        "beta": [walk.beta.real, walk.beta.imag],
        "steps": len(path.points) - 1,
        "gradients": path.gradients,
        "status": path.status.name,
        "first_distance": float(path.distances[0]),
        "last_distance": float(path.distances[-1]),
        "rate": path.rate,
        "measured_rate": path.measured_rate,
        "eigenvalues": [[z.real, z.imag] for z in path.eigenvalues.tolist()],
    }
