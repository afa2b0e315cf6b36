r"""Features of a network: each ridge of its saddle leads to a solution that looks at another one.

The network is :math:`f(x) = v \cdot \mathrm{softplus}(W x + b) + c` on `shapes_data`. At W = 0, b = 0, all
:math:`v_j = v` and c so that f = 0 all hidden units are alike and nothing tells the classes apart: the point that keeps
most symmetries. Its gradient vanishes, because the classes are equally frequent and have the same mean, and
the Hessian is positive but for the rows of W, where with h units it is

.. math:: -\tfrac{v}{16} \left( \mathbb{E}[x x^\top \mid 1] - \mathbb{E}[x x^\top \mid 0] \right) \otimes I_h
          + \tfrac{v^2}{16} \, \mathbb{E}[x x^\top] \otimes 1 1^\top

with no entries between channels. So its negative eigenvalues belong to the shape of class 1 in one channel each, h - 1
times, with units that differ, the steepest to the channel of most contrast. Descent from nearby falls into that one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.utils import vector_to_parameters

from ...games import Archive, EigenRidges, sgd_map
from .config import RideConfig
from .rivals import beside_bifurcations
from .shapes_data import FEATURES, SIDE, Pictures, pictures
from .study import Rival, Study

#: Weights of the hidden units at the saddle.
VALUE = 0.5
#: A feature is used where it alone classifies this share of pictures; three used alike classify 75 % each.
USED = 0.65
_HELD_OUT = 1024
#: The seeds of pictures that are held out, away from those to train on.
_HELD_OUT_SEED = 0x9E3779B9
_RIDGE_STEPS = 100
#: Curvature that is not ridden: what is left in the other channels where a ridge turns up is below, the saddle's above.
_LEAST_CURVATURE = 0.3
#: Products of a search for ridges, of a look whether an end is a minimum, about, and of a step along a ridge; each
#: counts as two gradients.
_SEARCH, _LOOK, _FOLLOW = 65, 25, 10


class ShapesNetwork(nn.Module):
    """One hidden layer of softplus units, in float64, at the saddle."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(len(FEATURES) * SIDE**2, width, dtype=torch.float64)
        self.output = nn.Linear(width, 1, dtype=torch.float64)
        with torch.no_grad():
            self.hidden.weight.zero_()
            self.hidden.bias.zero_()
            self.output.weight.fill_(VALUE)
            self.output.bias.fill_(-width * VALUE * math.log(2))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of class 1, (N,)."""
        logits: Tensor = self.output(nn.functional.softplus(self.hidden(x))).squeeze(-1)
        return logits


class ShapesGame:
    """Training the network, as a game of one player."""

    def __init__(self, width: int, data: Pictures) -> None:
        self.players = [ShapesNetwork(width)]
        self._data = data

    def losses(self, players: Sequence[nn.Module]) -> tuple[Tensor]:
        """The cross-entropy on all training pictures."""
        return (binary_cross_entropy_with_logits(players[0](self._data.x), self._data.y.double()),)


@dataclass(frozen=True)
class Use:
    """How a network classifies pictures that are held out, as shares of right answers.

    ``accuracy``: all features tell the class. For each feature, [3]: ``alone``, it alone tells and the others are drawn
    by chance; ``without``, it alone is drawn by chance.
    """

    accuracy: float
    alone: Tensor
    without: Tensor


class HeldOut:
    """Pictures that are held out, with the features ablated in all ways that `Use` has."""

    def __init__(self, seed: int) -> None:
        seed = (seed + _HELD_OUT_SEED) % 2**32
        self._all = pictures(_HELD_OUT, seed)
        self._alone = [pictures(_HELD_OUT, seed, telling=[f]) for f in FEATURES]
        self._without = [pictures(_HELD_OUT, seed, telling=[g for g in FEATURES if g != f]) for f in FEATURES]

    def use(self, network: nn.Module) -> Use:
        """What ``network`` makes of them."""
        alone, without = (
            torch.tensor([_accuracy(network, data) for data in sets], dtype=torch.float64)
            for sets in (self._alone, self._without)
        )
        return Use(_accuracy(network, self._all), alone, without)


def network(width: int, state: Tensor) -> ShapesNetwork:
    """The network whose parameters are ``state`` [P]."""
    found = ShapesNetwork(width)
    vector_to_parameters(state, found.parameters())
    return found


def random_weights(like: ShapesNetwork, seed: int) -> Tensor:
    """Parameters [P] as a new `torch.nn.Linear` has them, uniform within 1 / sqrt(inputs of the layer)."""
    random = torch.Generator().manual_seed(seed)
    parts = []
    for layer in (like.hidden, like.output):
        for parameter in (layer.weight, layer.bias):
            drawn = 2 * torch.rand(parameter.shape, dtype=torch.float64, generator=random) - 1
            parts.append(drawn.flatten() * layer.in_features**-0.5)
    return torch.cat(parts)


def name_of(used: Tensor) -> str:
    """The features used, by name, of a flag for each.

    >>> name_of(torch.tensor([True, False, True])), name_of(torch.zeros(3, dtype=torch.bool))
    ('red + blue', 'none')
    """
    return " + ".join(f for f, u in zip(FEATURES, used.tolist(), strict=True) if u) or "none"


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


def _accuracy(network: nn.Module, data: Pictures) -> float:
    with torch.no_grad():
        return float(((network(data.x) > 0) == (data.y == 1)).double().mean())
