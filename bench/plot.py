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
    ours = {row["name"] for result in results for row in result["rows"] if row["role"] == OURS}
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.4 * columns, 3.0 * rows + 0.8), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    handles: dict[str, Any] = {}
    names = dict.fromkeys(name for lines in panels.values() for name in lines)
    colours = {name: f"C{i}" for i, name in enumerate(names)}
    for axis, (problem, lines) in zip(axes.flat, panels.items(), strict=False):
        for name, points in lines.items():
            terms, low, middle, high = zip(*sorted(points), strict=True)
            first = name in ours
            (handles[name],) = axis.plot(
                terms,
                middle,
                color=colours[name],
                marker="o",
                markersize=5 if first else 3,
                lw=2.5 if first else 1,
                zorder=3 if first else 2,
            )
            axis.fill_between(terms, low, high, color=colours[name], alpha=0.2, lw=0)
        axis.set(title=problem, xscale="log", yscale="log", xlabel="products K")
        ticks = sorted({point[0] for points in lines.values() for point in points})
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis in axes[:, 0]:
        axis.set_ylabel(_unit(results, family))
    ordered = [name for name in names if name in handles]
    figure.legend([handles[name] for name in ordered], ordered, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(target, dpi=150)


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
