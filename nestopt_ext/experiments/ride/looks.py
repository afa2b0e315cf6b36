"""The colours of solutions, the same in all pictures of a run."""

from ..games import _style
from .results import RideResult

_COLOURS = (_style.BLUE, _style.RED, _style.GREEN, _style.PINK, _style.ORANGE, _style.SKY, _style.YELLOW)
#: Solutions that are called by a colour have it.
_NAMED = {"red": _style.RED, "green": _style.GREEN, "blue": _style.BLUE}
#: Of ends that belong to no solution: NaN, or beyond the bounds; and of solutions beyond the palette.
NOTHING, FURTHER = "0.8", "0.45"


def colours(result: RideResult) -> list[str]:
    """A colour for each of the rows of ``result``."""
    names = [row.name for row in result.rows]
    free = (colour for colour in _COLOURS if colour not in [_NAMED.get(name) for name in names])
    return [_NAMED.get(name) or next(free, FURTHER) for name in names]


def colours_of_solutions(result: RideResult) -> list[str]:
    """A colour for each solution of the archive, by its id."""
    by_row = dict(zip((id(row.key) for row in result.rows), colours(result), strict=True))
    return [by_row[id(solution.key)] for solution in result.archive.solutions]
