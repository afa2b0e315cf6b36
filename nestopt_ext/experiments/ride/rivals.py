"""What a ride is compared with: descents from its starts, from where it branched, and from anywhere."""

import torch
from torch import Tensor

from ...games import Archive, OptimizerMap


def num_searches(archive: Archive) -> int:
    """Searches for bifurcations, one from each start and each end that a ride went on from; each may find several."""
    return len({(b.start, b.parent) for b in archive.bifurcations})


def beside_bifurcations(step: OptimizerMap, archive: Archive, std: float, count: int, seed: int) -> Tensor:
    """``count`` states near the first bifurcations of a ride in turn, displaced by N(0, std^2) in every parameter."""
    roots = torch.stack([b.state for b in archive.bifurcations if b.parent is None and not b.status.failed])
    roots = roots[torch.arange(count) % len(roots), : step.num_parameters]
    return step.start(roots + std * _normal(count, step.num_parameters, seed).to(roots))


def anywhere(step: OptimizerMap, std: float, count: int, seed: int) -> Tensor:
    """``count`` states with parameters from N(0, std^2)."""
    return step.start(std * _normal(count, step.num_parameters, seed))


def descend(step: OptimizerMap, states: Tensor, num_steps: int, *, tick: object = None) -> Tensor:
    """States [N, S] after ``num_steps`` steps; ``tick`` is called after every step."""
    with torch.no_grad():
        for _ in range(num_steps):
            states = step(states)
            if callable(tick):
                tick()
    return states


def _normal(count: int, size: int, seed: int) -> Tensor:
    return torch.randn(count, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
