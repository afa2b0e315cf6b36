"""Draws the time of a hypergradient step against the number of products: python -m bench.plot FILE.json OUT.png."""

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

_NAME = re.compile(r"hypergradient/(?P<problem>.+)-K(?P<terms>\d+)")


def main(source: str, target: str) -> None:
    """One panel per problem, one line per contestant, the inner 80 % of the rounds around it; both axes logarithmic."""
    from matplotlib.figure import Figure

    results = json.loads(Path(source).read_text(encoding="utf-8"))["results"]
    panels = _panels(results)
    if not panels:
        raise SystemExit(f"bench.plot: {source} must hold figures of hypergradient/*; got none.")
    figure = Figure(figsize=(3.2 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (problem, lines) in zip(axes, panels.items(), strict=True):
        for name, points in lines.items():
            terms, low, middle, high = zip(*sorted(points), strict=True)
            (line,) = axis.plot(
                terms, middle, marker="o", markersize=3, label=name, lw=2 if name == "hypergradient" else 1
            )
            axis.fill_between(terms, low, high, color=line.get_color(), alpha=0.2, lw=0)
        axis.set(title=problem, xscale="log", yscale="log", xlabel="products K")
        ticks = sorted({point[0] for points in lines.values() for point in points})
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("milliseconds per step")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(target, dpi=150)


def _panels(results: list[dict[str, Any]]) -> dict[str, dict[str, list[tuple[int, float, float, float]]]]:
    """For each problem and contestant K and the milliseconds of the low end, the median and the high end."""
    panels: dict[str, dict[str, list[tuple[int, float, float, float]]]] = defaultdict(lambda: defaultdict(list))
    fewest = min((result["threads"] for result in results), default=1)
    for result in results:
        found = _NAME.fullmatch(result["case"])
        if found and result["threads"] == fewest:
            for row in result["rows"]:
                spread = [1e3 * row["seconds"][key] for key in ("p10", "median", "p90")]
                panels[found["problem"]][row["name"]].append((int(found["terms"]), *spread))
    return panels


if __name__ == "__main__":
    main(*sys.argv[1:])
