"""The toy games as studies: exponents find a border between basins, and branches go to both sides of it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...games import Archive, Game, LyapunovBranches, OptimizerMap, extragradient_map, lola_map, sgd_map, zoo
from .config import RideConfig
from .rivals import anywhere, beside_bifurcations, num_searches
from .study import Rival, Study

_MAPS: dict[str, Callable[[Game, float], OptimizerMap]] = {
    "sgd": sgd_map,
    "extragradient": extragradient_map,
    "lola": lola_map,
}
_NAMES = {"sgd": "gradient descent", "extragradient": "extragradient", "lola": "LOLA"}
#: Gradients of all players that one step costs; a product with second derivatives counts as two.
_COSTS = {"sgd": 1, "extragradient": 2, "lola": 5}
#: Discounted sums over rounds are told as means of a round.
_DISCOUNT = 0.96


@dataclass(frozen=True)
class Known:
    """A solution with a name; ``losses`` are those of both players."""

    name: str
    losses: tuple[float, float]


@dataclass(frozen=True)
class Toy:
    """A game: how to make it with B starts, the factor that its losses are told with, and what is known of it.

    ``distance`` is how far apart the losses of different solutions are.
    """

    title: str
    make: Callable[[], zoo.ZooGame]
    scale: float = 1.0
    distance: float = 0.1
    known: tuple[Known, ...] = ()


def toy(config: RideConfig) -> Toy:
    """The game of ``config``."""
    if config.game == "mix":
        assert config.tau is not None
        known = (Known("far corner", (1.0, 0.5)), *((Known("spiral", (1.403, 1.373)),) if config.tau == 0.25 else ()))
        title = f"matching pennies {config.tau:g}, prisoner's dilemma {1 - config.tau:g}"
        return Toy(title, partial(zoo.mix, config.tau, batch=1), known=known)
    dilemma = (Known("tit-for-tat", (1.0, 1.0)), Known("defection", (1.96, 1.96)))
    return {
        "small-ipd": Toy("small prisoner's dilemma", partial(zoo.small_ipd, batch=1), known=dilemma),
        "random-subspace-ipd": Toy(
            "prisoner's dilemma on a random plane",
            partial(zoo.random_subspace_ipd, seed=config.seed, batch=1),
            1 - _DISCOUNT,
        ),
        "matching-pennies": Toy(
            "matching pennies", partial(zoo.matching_pennies, batch=1), known=(Known("even odds", (0.0, 0.0)),)
        ),
        "ipd": Toy(
            "iterated prisoner's dilemma",
            partial(zoo.ipd, _DISCOUNT, batch=1),
            1 - _DISCOUNT,
            0.25,
            (Known("cooperation", (1.0, 1.0)), Known("defection", (2.0, 2.0))),
        ),
    }[config.game]


def toy_study(config: RideConfig) -> Study:
    """The ride on a game of the zoo, and the descents that it competes with."""
    c = config
    assert c.optimizer and c.lr and c.starts and c.spread and c.steps and c.exponent_steps and c.branch_sizes
    assert c.directions and c.ascent_lr and c.ascent_steps is not None
    cost, steps, spread, ascents = _COSTS[c.optimizer], c.steps, c.spread, c.ascent_steps + 1
    game = toy(config)
    players = game.make()
    step, plain = _MAPS[c.optimizer](players, c.lr), sgd_map(players, c.lr)
    random = torch.Generator().manual_seed(c.seed)
    starts = c.spread * torch.randn(c.starts, step.num_parameters, dtype=torch.float64, generator=random)
    method = LyapunovBranches(
        max_steps=c.steps,
        horizon=c.exponent_steps,
        sizes=c.branch_sizes,
        num_directions=min(c.directions, step.num_parameters),
        ascent_steps=c.ascent_steps,
        ascent_lr=c.ascent_lr,
    )

    def gradients(archive: Archive) -> int:
        looks = num_searches(archive) * ascents + len(archive.bifurcations)
        return cost * (looks * exponent_gradients(c, step.num_parameters) + archive.num_steps)

    def equal(archive: Archive) -> int:
        """As many descents as cost what the ride did."""
        return max(1, gradients(archive) // (cost * steps))

    own = (Rival(f"{_NAMES[c.optimizer]}, same starts", step, c.steps, lambda _: step.start(starts)),)
    std = max(c.branch_sizes) / math.sqrt(step.num_parameters)
    return Study(
        title=game.title,
        problem=step,
        step=step,
        starts=starts,
        method=method,
        options={"max_depth": 1},
        key=lambda states: game.scale * torch.stack(step.losses(states), dim=1),
        distance=game.distance,
        label=partial(_name, game.known, game.distance),
        header=("losses",),
        row=lambda key: [_told(key)],
        gradients=gradients,
        rivals=(
            Rival(f"{_NAMES['sgd']}, same starts", plain, c.steps, lambda _: plain.start(starts)),
            *(own if c.optimizer != "sgd" else ()),
            Rival(
                "noise at the branchings",
                step,
                c.steps,
                lambda archive: beside_bifurcations(step, archive, std, equal(archive), c.seed + 1),
            ),
            Rival(
                "random starts",
                step,
                c.steps,
                lambda archive: anywhere(step, spread, equal(archive), c.seed + 2),
            ),
        ),
    )


def exponent_gradients(config: RideConfig, size: int) -> int:
    """Gradient evaluations of an ascent: k steps, a product for each row of each Jacobian, and as much again back."""
    return 2 * (config.exponent_steps or 0) * (1 + 2 * size)


def _name(known: Sequence[Known], distance: float, key: Tensor) -> str:
    for solution in known:
        if float((key - torch.tensor(solution.losses, dtype=key.dtype)).norm()) <= distance:
            return solution.name
    return f"({_told(key)})"


def _told(losses: Tensor) -> str:
    """Losses to two digits; adding 0 takes the sign from a zero."""
    return ", ".join(f"{round(loss, 2) + 0:.2f}" for loss in losses.tolist())
