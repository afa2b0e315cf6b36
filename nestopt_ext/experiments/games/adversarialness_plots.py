"""The picture of the sweep: gradient evaluations, and the momentum that was best, against the adversarialness."""

import math
from pathlib import Path
from typing import Any

from . import _style
from ._tables import short
from .adversarialness import PICTURE, SweepResult


def save_pictures(folder: Path, result: SweepResult) -> None:
    """Draws `PICTURE` into ``folder``. Raises ImportError without Matplotlib."""
    config = result.config
    figure = _style.new_figure(
        12.5, 5.8, f"From cooperative to adversarial: scales from {1 / config.condition:.3g} to 1, every method tuned"
    )
    left, right = figure.subfigures(1, 2, width_ratios=(1.35, 1), wspace=0.02)
    costs, best = left.subplots(), right.subplots()
    _costs(costs, result)
    _best_momenta(right, best, result)
    for axes in (costs, best):
        _style.tidy(axes)
    right.legend(*costs.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    _style.save(figure, folder / PICTURE)


def _costs(axes: Any, result: SweepResult) -> None:
    for method, entries in result.entries.items():
        style = _style.METHODS[method]
        costs = [entry.gradients if math.isfinite(entry.gradients) else math.nan for entry in entries]
        axes.plot(result.levels, costs, lw=1.5, ms=5, label=_style.label(method), **style)
    if any(math.isinf(entry.gradients) for entries in result.entries.values() for entry in entries):
        axes.text(
            0.02, 0.98, f"no marker: diverged, or not there after {result.config.max_steps:,} steps",
            transform=axes.transAxes, va="top", fontsize=9, color="0.35",
        )  # fmt: skip
    axes.set(
        yscale="log",
        xlabel="largest adversarialness (0: cooperative, 1: some coordinates only rotate)",
        ylabel="gradient evaluations",
        title=f"until the distance to the solution is {short(result.config.tolerance)} of the first",
    )


def _best_momenta(figure: Any, axes: Any, result: SweepResult) -> None:
    """Where tuning puts the momentum, in the upper half of the unit disc."""
    turn = [math.pi * k / 200 for k in range(201)]
    axes.plot([math.cos(angle) for angle in turn], [math.sin(angle) for angle in turn], color="0.35", lw=1.0)
    axes.axhline(0, color="0.35", lw=0.8)
    points: Any = None
    for method, size in (("complex momentum", 55), ("complex momentum, alternating", 75)):
        style = _style.METHODS[method]
        found = [(b.real, b.imag, k) for k, b in zip(result.levels, _momenta(result, method), strict=True) if b]
        x, y, levels = zip(*found, strict=True) if found else ((), (), ())
        axes.plot(x, y, color=style["color"], lw=1.0, alpha=0.7, zorder=1)
        points = axes.scatter(
            x, y, c=levels, s=size, marker=style["marker"], cmap="cividis", vmin=0, vmax=1, zorder=2,
            edgecolors=style["color"], linewidths=1.2,
        )  # fmt: skip
    figure.colorbar(points, ax=axes, label="largest adversarialness", orientation="horizontal", shrink=0.7)
    axes.set_aspect("equal")
    axes.set(
        xlim=(-1.05, 1.05),
        ylim=(-0.06, 1.05),
        xlabel="real part of the momentum",
        ylabel="imaginary part",
        title="the complex momentum that was best",
    )


def _momenta(result: SweepResult, method: str) -> list[complex]:
    return [entry.beta if math.isfinite(entry.steps) else 0 for entry in result.entries[method]]
