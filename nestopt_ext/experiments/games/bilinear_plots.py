"""The picture of the bilinear experiment: gradient evaluations against the angle of the momentum."""

import math
from pathlib import Path
from typing import Any

from . import _style
from ._tables import short
from .bilinear import PICTURE, RULES, BilinearGame, BilinearResult

#: From small to large modulus, of the colour map viridis; the lightest is left out.
_COLOURS = ("#440154", "#3b528b", "#21918c", "#5ec962", "#b5a300")
_MARKERS = ("v", "s", "D", "^", "o")
#: Methods without an angle, drawn as levels beside the curves of each rule.
_LEVELS = {
    "simultaneous": ("optimistic", "extragradient"),
    "alternating": ("negative momentum, alternating", "optimistic", "extragradient"),
}
_DASHES: dict[str, Any] = {
    "optimistic": (0, (6, 2)),
    "extragradient": (0, (1.5, 1.2)),
    "negative momentum, alternating": (0, (5, 1.5, 1, 1.5)),
}


def save_pictures(folder: Path, result: BilinearResult) -> None:
    """Draws `PICTURE` into ``folder``. Raises ImportError without Matplotlib."""
    config = result.config
    figure = _style.new_figure(
        12.5,
        8.6,
        "min max x' M y: gradient evaluations until the distance to the solution is"
        f" {short(config.tolerance)} of the first",
    )
    grid = figure.subplots(2, 2, sharex=True, sharey="row")
    for row, game in zip(grid, result.games, strict=True):
        for axes, rule in zip(row, RULES, strict=True):
            _draw(axes, game, rule)
            axes.set_title(f"{game.name}, {rule} updates")
            _style.tidy(axes)
        row[0].set_ylabel("gradient evaluations")
    for axes in grid[1]:
        _style.pi_ticks(axes.xaxis, 1.0)
        axes.set_xlim(-0.02, 1.02)
        axes.set_xlabel("angle of the momentum (0: heavy ball, π: negative momentum)")
    figure.legend(handles=_handles(grid), loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    _style.save(figure, folder / PICTURE)


def _draw(axes: Any, game: BilinearGame, rule: str) -> None:
    curves = [curve for curve in game.curves if curve.rule == rule]
    missing = []
    for curve, colour, marker in zip(curves, _COLOURS, _MARKERS, strict=True):
        if all(math.isinf(steps) for steps in curve.predicted):
            missing.append(f"{curve.modulus:g}")
            continue
        axes.plot(curve.angles, curve.predicted, color=colour, lw=1.3, zorder=2)
        axes.plot(
            curve.angles, curve.measured, color=colour, ls="none", marker=marker, ms=4.5, zorder=3,
            label=f"complex momentum, modulus {curve.modulus:g}",
        )  # fmt: skip
    for entry in game.entries:
        if entry.method in _LEVELS[rule] and math.isfinite(entry.gradients):
            style = _style.METHODS[entry.method]
            axes.axhline(
                entry.gradients, color=style["color"], ls=_DASHES[entry.method], lw=1.7, zorder=1, label=entry.method
            )
    axes.set_yscale("log")
    if missing:
        axes.text(
            0.99, 0.03, f"modulus {' and '.join(missing)}: no angle converges", transform=axes.transAxes,
            ha="right", va="bottom", fontsize=9, color="0.35",
        )  # fmt: skip


def _handles(grid: Any) -> list[Any]:
    """One legend entry of each name, and what lines and markers are."""
    from matplotlib.lines import Line2D

    found: dict[str, Any] = {}
    for axes in grid.flat:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    named = [found[name] for name in sorted(found, key=lambda name: (not name.startswith("complex"), name))]
    return [
        *named,
        Line2D([], [], color="0.3", lw=1.3, label="lines: predicted"),
        Line2D([], [], color="0.3", ls="none", marker="o", ms=4.5, label="markers: measured"),
    ]
