"""The methods that the game experiments compare, and a contest of one of them on a linear game."""

import cmath
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ... import games
from ...games import convergence_rate, momentum_matrix, zoo
from ...optim import ComplexSGD, ExtraSGD, OptimisticSGD
from ._race import LinearGame, race

RECOMMENDED = cmath.rect(0.9, math.pi / 8)
#: From slow to as fast as any method here can go where the largest curvature is 1.
LR_RANGE = (0.01, 2.5)
#: Moduli of the momenta that the methods choose from.
_MODULI = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
#: A rate that is 1 is found a little off it.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Method:
    """A competitor: its name, its rule (see `race`), the momenta it may choose from, and gradients per step.

    A gradient evaluation is one of xi: of all players' gradients, whether at one point or, for players that take turns,
    at two.
    """

    name: str
    rule: str
    momenta: tuple[complex, ...] = (0,)

    @property
    def gradients_per_step(self) -> int:
        """Two for extragradient, one for every other."""
        return 2 if self.rule == "extragradient" else 1


def competitors(num_angles: int) -> list[Method]:
    """The methods; those with complex momentum choose among ``num_angles`` angles from 0 to pi."""
    angles = [math.pi * k / (num_angles - 1) for k in range(num_angles)]
    turned = tuple(cmath.rect(modulus, angle) for modulus in _MODULI for angle in angles)
    return [
        Method("gradient descent", "simultaneous"),
        Method("real momentum", "simultaneous", _MODULI),
        Method("complex momentum 0.9, pi/8", "simultaneous", (RECOMMENDED,)),
        Method("complex momentum", "simultaneous", turned),
        Method("optimistic", "optimistic"),
        Method("extragradient", "extragradient"),
        Method("negative momentum, alternating", "alternating", tuple(-modulus for modulus in _MODULI)),
        Method("complex momentum, alternating", "alternating", turned),
    ]


@dataclass(frozen=True)
class Entry:
    """How a method did with its best setting.

    ``steps`` and ``gradients`` are infinite where no setting reached the tolerance, ``diverged`` says that none would
    with more steps, by the linear analysis. ``rate`` is the spectral radius that this gives for the setting,
    ``predicted`` the gradient evaluations that follow from it, ``replayed`` those that the optimizers of the package
    took, where they were asked; NaN where there is nothing to tell.
    """

    method: str
    lr: float
    beta: complex
    steps: float
    gradients: float
    diverged: bool
    rate: float
    predicted: float
    replayed: float = math.nan

    def to_json(self) -> dict[str, Any]:
        """For the log: the momentum in polar form, the angle in units of pi."""
        beta = {"modulus": abs(self.beta), "angle": cmath.phase(self.beta) / math.pi}
        return {**asdict(self), "beta": beta}


def contest(
    game: LinearGame,
    method: Method,
    start: Tensor,
    lrs: Tensor,
    *,
    tolerance: float,
    max_steps: int,
    tick: Callable[[], None] = lambda: None,
) -> Entry:
    """The fastest of all settings, ``lrs`` [learning rates] times the momenta of the method, from ``start`` [n]."""
    lr, beta = grid(lrs, method.momenta)
    nobody = torch.zeros(len(lr), dtype=torch.long)
    finish = race(game, method.rule, start, lr, beta, nobody, tolerance=tolerance, max_steps=max_steps, tick=tick)[0]
    if finish.setting < 0:
        settings = zip(lr.tolist(), beta.tolist(), strict=True)
        slow = any(rate(game, method.rule, *setting) < 1 - _ROUNDING for setting in settings)
        return Entry(method.name, math.nan, 0, math.inf, math.inf, not slow, math.nan, math.nan)
    best_lr, best_beta = float(lr[finish.setting]), complex(beta[finish.setting])
    shrinking = rate(game, method.rule, best_lr, best_beta)
    per_step = method.gradients_per_step
    return Entry(
        method.name,
        best_lr,
        best_beta,
        finish.steps,
        per_step * finish.steps,
        False,
        shrinking,
        per_step * steps_at(shrinking, tolerance),
    )


def grid(lrs: Tensor, momenta: Sequence[complex]) -> tuple[Tensor, Tensor]:
    """All pairs as two vectors, the learning rates of the first momentum first."""
    beta = torch.tensor(momenta, dtype=torch.complex128)
    return lrs.repeat(len(beta)), beta.repeat_interleave(len(lrs))


def learning_rates(count: int) -> Tensor:
    """``count`` learning rates over `LR_RANGE`, evenly in the logarithm."""
    low, high = (math.log10(end) for end in LR_RANGE)
    return torch.logspace(low, high, count, dtype=torch.float64)


def rate(game: LinearGame, rule: str, lr: float, beta: complex) -> float:
    """The spectral radius of one step of the rule."""
    if rule == "alternating":
        players = [game.num_first, len(game.jacobian) - game.num_first]
        matrix = momentum_matrix(game.jacobian, lr, beta, players=players, alternating=True)
        return float(torch.linalg.eigvals(matrix).abs().max())
    eigenvalues = torch.linalg.eigvals(game.jacobian)
    if rule == "simultaneous":
        return float(convergence_rate(eigenvalues, lr, beta))
    return float(convergence_rate(eigenvalues, lr, method="optimistic" if rule == "optimistic" else "extragradient"))


def optimizers(rule: str, lr: float, beta: complex) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    """What makes the optimizer of a player under the rule, for `nestopt_ext.games.simultaneous` or ``alternating``."""
    if rule == "optimistic":
        return lambda params: OptimisticSGD(params, lr=lr)
    if rule == "extragradient":
        return lambda params: ExtraSGD(params, lr=lr)
    return lambda params: ComplexSGD(params, lr=lr, momentum=beta if beta.imag else beta.real)


def replay(
    game: zoo.ZooGame, rule: str, lr: float, beta: complex, *, tolerance: float, max_steps: int
) -> games.Trajectory:
    """Plays ``game`` from where its players stand with the optimizers, until the distance is ``tolerance``."""
    loop = games.alternating if rule == "alternating" else games.simultaneous
    made = optimizers(rule, lr, beta)
    return loop(game, made, max_steps, record_every=None, tolerance=tolerance, divergence=None)


def steps_at(rate: float, tolerance: float) -> float:
    """Steps in which a distance that shrinks by ``rate`` per step comes down to ``tolerance`` of itself.

    >>> steps_at(0.5, 0.125)
    3.0
    >>> steps_at(1.0, 0.125)
    inf
    """
    return math.log(tolerance) / math.log(rate) if rate < 1 else math.inf


def unit_start(size: int, seed: int) -> Tensor:
    """A random point at distance 1 from the solution, float64 [size]."""
    point = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    unit: Tensor = point / point.norm()
    return unit
