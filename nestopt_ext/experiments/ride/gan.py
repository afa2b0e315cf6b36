"""Branches of a small GAN: which modes of a ring of Gaussians it covers is decided where neighbours part fastest.

The GAN of `nestopt_ext.experiments.games.mixture_gan`, on one fixed batch, so that descent is a map: from one start it
has one end. Solutions are told apart by the set of modes that the generator covers. Almost any displacement changes
it: noise of the same length, and random starts, find as many sets as branches along the leading directions do.
"""

import math
from functools import partial

import torch
from torch import Tensor

from ...games import Archive, LyapunovBranches, OptimizerMap, sgd_map
from ..games.mixture_config import MixtureConfig
from ..games.mixture_gan import MixtureGame, Ring, Stream, generate, networks
from ..games.mixture_scores import coverage
from .config import RideConfig
from .rivals import beside_bifurcations, num_searches
from .study import Rival, Study

_BATCH = 256
_SAMPLES = 1000
#: Products with a Jacobian in the search for the leading directions, about; each counts as two gradients.
_PRODUCTS = 40


def gan_study(config: RideConfig) -> Study:
    """The ride on the GAN of one seed, and the descents that it competes with."""
    c = config
    assert c.lr and c.steps and c.exponent_steps and c.branch_sizes and c.directions and c.ascent_lr and c.modes
    assert c.ascent_steps is not None and c.width
    steps, lr, size, ascents = c.steps, c.lr, max(c.branch_sizes), c.ascent_steps + 1
    evaluation = 2 * c.exponent_steps * (1 + 2 * _PRODUCTS)
    mixture = mixture_config(c)
    noise, real = (batch[0] for batch in Stream(mixture, [c.seed]).next())
    step = sgd_map(MixtureGame(mixture.loss, networks(mixture, c.seed), noise, real), c.lr)
    method = LyapunovBranches(
        max_steps=c.steps,
        horizon=c.exponent_steps,
        sizes=c.branch_sizes,
        from_start=False,
        num_directions=c.directions,
        ascent_steps=c.ascent_steps,
        ascent_lr=c.ascent_lr,
    )

    def gradients(archive: Archive) -> int:
        return (num_searches(archive) * ascents + len(archive.bifurcations)) * evaluation + archive.num_steps

    def equal(archive: Archive) -> int:
        return max(1, gradients(archive) // steps)

    def begin(seed: int) -> Tensor:
        return sgd_map(MixtureGame(mixture.loss, networks(mixture, seed), noise, real), lr).start()

    start = step.start()
    return Study(
        title=f"GAN on {c.modes} Gaussians",
        problem=step,
        step=step,
        starts=start,
        method=method,
        options={"max_depth": 1},
        key=partial(covered, mixture, step),
        distance=0.5,
        label=name_of,
        header=("modes",),
        row=lambda key: [str(int(key.sum()))],
        gradients=gradients,
        rivals=(
            Rival("gradient descent, same start", step, c.steps, lambda _: start),
            Rival(
                "noise at the branching",
                step,
                c.steps,
                lambda archive: beside_bifurcations(
                    step, archive, size / math.sqrt(step.num_parameters), equal(archive), c.seed + 1
                ),
            ),
            Rival(
                "random starts",
                step,
                c.steps,
                lambda archive: torch.cat([begin(c.seed + 1 + i) for i in range(equal(archive))]),
            ),
        ),
    )


def mixture_config(config: RideConfig) -> MixtureConfig:
    """The GAN of a ride, as the experiment on mixtures describes it."""
    assert config.modes and config.width
    return MixtureConfig(modes=config.modes, width=config.width, noise_dim=2, batch_size=_BATCH, seed=config.seed)


def points(mixture: MixtureConfig, step: OptimizerMap, states: Tensor) -> Tensor:
    """Points of the generators of states [N, S], [N, samples, 2]."""
    generator, _ = networks(mixture, 0)
    names = [name for name, _ in generator.named_parameters()]
    weights = dict(zip(names, step.players(states)[0], strict=True))
    return generate(mixture, weights, _SAMPLES)


def covered(mixture: MixtureConfig, step: OptimizerMap, states: Tensor) -> Tensor:
    """Which modes the generators of states [N, S] cover, 0.0 or 1.0, [N, modes]; none where a point is not finite."""
    found, ring = points(mixture, step, states), Ring.of(mixture)
    alone = [Ring(mean[None], ring.std) for mean in ring.means]
    return torch.stack([coverage(found, mode, mixture.mode_share).modes.double() for mode in alone], 1)


def name_of(key: Tensor) -> str:
    """The modes covered, counted from the positive x axis against the clock.

    >>> name_of(torch.tensor([1.0, 0.0, 1.0])), name_of(torch.zeros(3))
    ('1 3', 'none')
    """
    return " ".join(str(mode + 1) for mode, c in enumerate(key.tolist()) if c) or "none"
