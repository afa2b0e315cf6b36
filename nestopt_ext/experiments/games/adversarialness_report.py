"""What a reader of the sweep is told."""

import math

from ._tables import outcome, short
from .adversarialness import SweepResult

_OURS = "complex momentum"
#: The rivals that step simultaneously, as plain complex momentum does.
_RIVALS = ("gradient descent", "real momentum", "optimistic", "extragradient")
#: At most so many levels are columns of the table.
_COLUMNS = 6


def tables(result: SweepResult) -> list[tuple[list[str], list[list[str]]]]:
    """A header and a row for each method, a column for some of the levels, the first and the last among them."""
    last = len(result.levels) - 1
    shown = sorted({round(k * last / (_COLUMNS - 1)) for k in range(_COLUMNS)})
    header = ["gradients at max G", *(f"{result.levels[k]:.2g}" for k in shown)]
    return [(header, [[name, *(outcome(entries[k]) for k in shown)] for name, entries in result.entries.items()])]


def findings(result: SweepResult) -> list[str]:
    """Where complex momentum is the one to take with simultaneous updates, and where it is not."""
    costs = {method: [entry.gradients for entry in entries] for method, entries in result.entries.items()}
    ours = costs[_OURS]
    lines = [
        f"Gradient evaluations until the distance is {short(result.config.tolerance)} of the first, with momentum and"
        " learning rate tuned at every level; extragradient takes two a step.",
    ]
    for rival in _RIVALS:
        better = [level for level, a, b in zip(result.levels, costs[rival], ours, strict=True) if a < b]
        failed = [level for level, cost in zip(result.levels, costs[rival], strict=True) if math.isinf(cost)]
        line = f"{rival}: better than simultaneous complex momentum at {_levels(better, len(ours))}"
        if not math.isinf(costs[rival][0]) and not math.isinf(ours[0]):
            line += f"; {costs[rival][0] / ours[0]:.1f} times its gradients on the cooperative end"
        lines.append(line + (f"; arrives nowhere at {_levels(failed, len(ours))}." if failed else "."))
    turns = [
        level for level, a, b in zip(result.levels, costs["complex momentum, alternating"], ours, strict=True) if a < b
    ]
    lines.append(
        "Where the players may take turns, complex momentum is faster than simultaneous at"
        f" {_levels(turns, len(ours))}."
    )
    return lines


def _levels(levels: list[float], count: int) -> str:
    if not levels:
        return "no level"
    if len(levels) == count:
        return "every level"
    return "max G " + ", ".join(f"{level:.2g}" for level in levels)
