"""What the run needs to know of a game: how it is ridden, what tells its solutions apart, and who competes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...games import Archive, OptimizerMap


@dataclass(frozen=True)
class Rival:
    """Descents without branches: ``num_steps`` of ``step`` from the states [N, S] that ``begin`` makes once the ride is
    known.
    """

    name: str
    step: OptimizerMap
    num_steps: int
    begin: Callable[[Archive], Tensor]


@dataclass(frozen=True)
class Study:
    """One problem, ready to be ridden by ``nestopt_ext.games.ridge_rider(problem, starts, method, **options)``.

    ``problem`` is the map ``step`` itself, or the game that has ridges, from whose ends ``step`` descends. ``starts``
    are [B, P]. ``key`` maps states [N, S] to what tells solutions apart, [N, K], which are the same within
    ``distance``, and ``label`` gives a key a name.
    ``header`` names what ``row`` tells of a key in the table. ``gradients`` counts the gradient evaluations of a ride.
    """

    title: str
    problem: Any
    step: OptimizerMap
    starts: Tensor
    method: Any
    options: Mapping[str, Any]
    key: Callable[[Tensor], Tensor]
    distance: float
    label: Callable[[Tensor], str]
    header: tuple[str, ...]
    row: Callable[[Tensor], list[str]]
    gradients: Callable[[Archive], int]
    rivals: tuple[Rival, ...]
