"""The polynomial as a study: ridges from its saddle, beside descents that leave it by chance."""

from functools import partial

from torch import Tensor

from ...games import Archive, EigenRidges, sgd_map
from .config import RideConfig
from .polynomial import Polynomial
from .rivals import anywhere, beside_bifurcations
from .study import Rival, Study

_RIDGE_STEPS = 200
#: Of random starts; from farther out descent at this learning rate overflows.
_SPREAD = 0.3
#: How far apart minima are at least, 2 for those of depth 1/4, is more than twice this.
_DISTANCE = 0.05


def polynomial_study(config: RideConfig) -> Study:
    """The ride on the polynomial, and the descents that it competes with."""
    c = config
    assert c.dim and c.lr and c.steps and c.step_size and c.noise
    dim, steps, noise = c.dim, c.steps, c.noise
    game = Polynomial(c.dim, c.seed)
    step = sgd_map(game, c.lr)
    method = EigenRidges(step=c.step_size, max_steps=_RIDGE_STEPS, finish=c.lr, finish_steps=c.steps)

    def gradients(archive: Archive) -> int:
        """A Hessian for every step, as many products as variables, though descent at the end needs none."""
        return archive.num_steps * (1 + 2 * dim)

    def equal(archive: Archive) -> int:
        return max(1, gradients(archive) // steps)

    return Study(
        title=f"polynomial of {c.dim} variables, {2 * c.dim} minima",
        problem=game,
        step=step,
        starts=step.start(),
        method=method,
        options={"order": c.order},
        key=lambda states: states,
        distance=_DISTANCE,
        label=partial(_name, game.minima()),
        header=("loss",),
        row=lambda key: [f"{game.losses([key[None]])[0].item():.3f}"],
        gradients=gradients,
        rivals=(
            Rival(
                "noise at the saddle",
                step,
                c.steps,
                lambda archive: beside_bifurcations(step, archive, noise, equal(archive), c.seed + 1),
            ),
            Rival("random starts", step, c.steps, lambda archive: anywhere(step, _SPREAD, equal(archive), c.seed + 2)),
        ),
    )


def _name(minima: Tensor, key: Tensor) -> str:
    """Which valley, the steepest being 1, and on which side."""
    apart = (minima - key).norm(dim=1)
    if float(apart.min()) > _DISTANCE:
        return "saddle" if float(key.norm()) <= _DISTANCE else "none"
    valley, side = int(apart.argmin()) % (len(minima) // 2), int(apart.argmin()) // (len(minima) // 2)
    return f"valley {valley + 1}{'+-'[side]}"
