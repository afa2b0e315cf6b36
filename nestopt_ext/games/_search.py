"""Global minimum of a function of a few bounded variables, many points at once: a grid, then differential evolution."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_SEED = 0
_PLACES = 4  # the grid minima that are followed at first
_HALVE = (40, 80)  # the generations after which only the better half of them are
_MEMBERS = 12  # of each population, for each variable
_GENERATIONS = 300
_CROSSOVER = 0.9
_SPREAD = 1e-8  # of the values of a population that has arrived, relative to their distance from 1


def minimize(function: Callable[[Tensor], Tensor], points: Sequence[int]) -> tuple[Tensor, float]:
    """The best point found in the unit cube, shape (d,), and its value, a rate; the same for the same function.

    ``function`` takes (m, d) points to (m,) values, where any point may be a kink: the largest of several moduli has
    its minima in narrow valleys where two of them meet, along which no gradient leads. The differences of a population
    take on the shape of the valley (Storn and Price 1997; here with a random factor for each step). ``points`` gives
    the size of the grid in each variable; the best few of its local minima are followed, side by side.
    """
    axes = [torch.linspace(0, 1, count, dtype=torch.float64) for count in points]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    values = function(grid.flatten(0, -2)).view(*points)
    centres = grid[_local_minima(values)]  # (places, d)
    cell = torch.tensor([1 / (count - 1) for count in points], dtype=torch.float64)

    generator = torch.Generator().manual_seed(_SEED)
    dim = len(points)
    members = _MEMBERS * dim

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=generator)

    def evaluate(candidates: Tensor) -> Tensor:
        return function(candidates.flatten(0, 1)).view(candidates.shape[:2])

    spread = (2 * random(len(centres), members, dim) - 1) * cell
    spread[:, 0] = 0
    population = (centres[:, None] + spread).clamp(0, 1)
    scores = evaluate(population)
    for generation in range(_GENERATIONS):
        if generation in _HALVE:
            kept = scores.amin(1).argsort()[: (len(scores) + 1) // 2]
            population, scores = population[kept], scores[kept]
        places = len(population)
        order = random(places, members, members).argsort(dim=-1)[..., :3]
        a, b, c = (population.gather(1, order[..., i : i + 1].expand(-1, -1, dim)) for i in range(3))
        trial = a + (0.4 + 0.6 * random(places, members, 1)) * (b - c)
        trial = torch.where(random(places, members, dim) < _CROSSOVER, trial, population).clamp(0, 1)
        found = evaluate(trial)
        better = found <= scores
        population = torch.where(better[..., None], trial, population)
        scores = torch.where(better, found, scores)
        if bool((scores.amax(1) - scores.amin(1) <= _SPREAD * (1 - scores.amin(1)).abs()).all()):
            break
    best = scores.argmin()
    return population.flatten(0, 1)[best], scores.flatten()[best].item()


def _local_minima(values: Tensor) -> tuple[Tensor, ...]:
    """The indices of the lowest few points that are no higher than any neighbour along an axis, as for indexing."""
    lowest = torch.ones_like(values, dtype=torch.bool)
    for axis, count in enumerate(values.shape):
        inner = values.narrow(axis, 0, count - 1) <= values.narrow(axis, 1, count - 1)
        lowest.narrow(axis, 0, count - 1).logical_and_(inner)
        lowest.narrow(axis, 1, count - 1).logical_and_(
            values.narrow(axis, 1, count - 1) <= values.narrow(axis, 0, count - 1)
        )
    ranked = torch.where(lowest, values, torch.inf).flatten().argsort(stable=True)[:_PLACES]
    ranked = ranked[: max(1, int(lowest.sum()))]
    return torch.unravel_index(ranked, values.shape)
