"""Draws time against the number of products K: python -m bench.plot FILE.json OUT.png [FAMILY].

FAMILY is the part of the cases' names before the problem: hypergradient (the default), solve/gauss_newton or
solve/empirical_fisher. The ending of OUT says the format, such as .png or .svg.
"""

import json
import math
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from .registry import OURS, TRAINING_PASS, YARDSTICK
from .results import pass_seconds

_COLUMNS = 3  # as many panels in a row

Points = list[tuple[int, float, float, float]]


def main(source: str, target: str, family: str = "hypergradient") -> None:
    """One panel per problem, one line per contestant, the inner 80 % of the rounds around it; both axes logarithmic."""
    from matplotlib.figure import Figure

    results = json.loads(Path(source).read_text(encoding="utf-8"))["results"]
    panels = _panels(results, family)
    if not panels:
        raise SystemExit(f"bench.plot: {source} must hold figures of {family}/*; got none.")
    family_results = [result for result in results if result["case"].startswith(f"{family}/")]
    ours = {row["name"] for result in family_results for row in result["rows"] if row["role"] == OURS}
    columns = 2 if len(panels) == 4 else min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    beside = max(1, int(1.5 * columns))  # so many names fit below a row of panels
    height = 3.0 * rows + 0.22 * math.ceil(len(names) / beside) + 0.2
    figure = Figure(figsize=(3.4 * columns, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    looks = _looks(names, ours)
    handles: dict[str, Any] = {}
    for axis, (problem, lines) in zip(axes.flat, panels.items(), strict=False):
        for name, points in lines.items():
            terms, low, middle, high = zip(*sorted(points), strict=True)
            (handles[name],) = axis.plot(terms, middle, **looks[name])
            axis.fill_between(terms, low, high, color=looks[name]["color"], alpha=0.15, lw=0)
        axis.set(title=problem, xscale="log", yscale="log", xlabel="products K")
        ticks = sorted({point[0] for points in lines.values() for point in points})
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis in axes[:, 0]:
        axis.set_ylabel(_unit(results, family))
    figure.legend([handles[name] for name in names], names, loc="outside lower center", ncols=beside, frameon=False)
    figure.savefig(target, dpi=150)


def _looks(names: list[str], ours: set[str]) -> dict[str, dict[str, Any]]:
    """Ours thick and in one colour, with a line of its own for each of its routes; everyone else thin."""
    others = iter(range(1, len(names) + 1))
    dashes = {name: iter(["--", ":", "-."]) for name in ours}
    looks: dict[str, dict[str, Any]] = {}
    for name in names:
        whose = name.partition(",")[0]
        if name in ours:
            looks[name] = {"color": "C0", "lw": 2.5, "markersize": 5, "zorder": 4}
        elif whose in ours:
            looks[name] = {"color": "C0", "lw": 1.5, "ls": next(dashes[whose], "-"), "markersize": 3, "zorder": 3}
        else:
            looks[name] = {"color": f"C{next(others)}", "lw": 1, "markersize": 3, "zorder": 2}
        looks[name]["marker"] = "o"
    return looks


def _unit(results: list[dict[str, Any]], family: str) -> str:
    shown = [result for result in results if _shown(result, family)]
    in_passes = all(pass_seconds(result) is not None for result in shown)
    return f"time in {TRAINING_PASS} passes" if in_passes else "milliseconds per step"


def _shown(result: dict[str, Any], family: str) -> "re.Match[str] | None":
    return re.fullmatch(rf"{re.escape(family)}/(?P<problem>[^/]+)-K(?P<terms>\d+)", result["case"])


def _panels(results: list[dict[str, Any]], family: str = "hypergradient") -> dict[str, dict[str, Points]]:
    """For each problem and contestant K and the time at the low end, the median and the high end.

    The unit is a forward and backward pass of the same run, milliseconds where the cases have none; yardsticks are left
    out, and of several thread counts all but the fewest.
    """
    panels: dict[str, dict[str, Points]] = defaultdict(lambda: defaultdict(list))
    shown = [result for result in results if result["rows"] and _shown(result, family)]
    fewest = min((result["threads"] for result in shown), default=1)
    for result in shown:
        found = _shown(result, family)
        if found is None or result["threads"] != fewest:
            continue
        unit = pass_seconds(result) or 1e-3
        for row in result["rows"]:
            if row["role"] != YARDSTICK:
                spread = [row["seconds"][key] / unit for key in ("p10", "median", "p90")]
                panels[found["problem"]][row["name"]].append((int(found["terms"]), *spread))
    return panels


if __name__ == "__main__":
    main(*sys.argv[1:])
