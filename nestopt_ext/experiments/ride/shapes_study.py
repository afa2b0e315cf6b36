"""The network on constructed pictures as a study: ridges from its most symmetric saddle, beside descents by chance."""

import torch
from torch import Tensor

from ...games import Archive, EigenRidges, sgd_map
from .config import RideConfig
from .rivals import beside_bifurcations
from .shapes import USED, HeldOut, ShapesGame, name_of, network, random_weights
from .shapes_data import FEATURES, pictures
from .study import Rival, Study

_RIDGE_STEPS = 100
#: Curvature that is not ridden: what is left in the other channels where a ridge turns up is below, the saddle's above.
_LEAST_CURVATURE = 0.3
#: Products of a search for ridges, of a look whether an end is a minimum, about, and of a step along a ridge; each
#: counts as two gradients.
_SEARCH, _LOOK, _FOLLOW = 65, 25, 10


def shapes_study(config: RideConfig) -> Study:
    """The ride on the network, and the descents that it competes with."""
    c = config
    assert c.images and c.width and c.directions and c.lr and c.steps and c.step_size and c.noise
    width, steps, noise = c.width, c.steps, c.noise
    game = ShapesGame(c.width, pictures(c.images, c.seed))
    step = sgd_map(game, c.lr)
    held_out = HeldOut(c.seed)
    method = EigenRidges(
        step=c.step_size,
        max_steps=_RIDGE_STEPS,
        num_directions=c.directions,
        min_curvature=_LEAST_CURVATURE,
        finish=c.lr,
        finish_steps=c.steps,
    )

    def gradients(archive: Archive) -> int:
        found = _SEARCH * len(archive.bifurcations) + 2 * _LOOK * len(archive.branches)
        along = archive.num_steps - sum(min(branch.steps, steps) for branch in archive.branches)
        return archive.num_steps + 2 * (found + _FOLLOW * along)

    def equal(archive: Archive) -> int:
        return max(1, gradients(archive) // steps)

    def drawn(archive: Archive) -> Tensor:
        return torch.stack([random_weights(game.players[0], c.seed + 1 + i) for i in range(equal(archive))])

    def key(states: Tensor) -> Tensor:
        return torch.stack([held_out.use(network(width, state)).alone for state in states])

    return Study(
        title="network on pictures with three features",
        problem=game,
        step=step,
        starts=step.start(),
        method=method,
        # Units share a ridge, so that it may turn for one of them before the others; then it is branched at again.
        options={"max_depth": 3},
        key=key,
        distance=0.25,
        label=lambda key: name_of(key >= USED),
        header=tuple(f"{feature} alone" for feature in FEATURES),
        row=lambda key: [f"{100 * accuracy:.0f} %" for accuracy in key.tolist()],
        gradients=gradients,
        rivals=(
            Rival(
                "noise at the saddle",
                step,
                c.steps,
                lambda archive: beside_bifurcations(step, archive, noise, equal(archive), c.seed + 1),
            ),
            Rival("random starts", step, c.steps, drawn),
        ),
    )
