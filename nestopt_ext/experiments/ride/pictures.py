"""The pictures of a ride: its portrait where the game has two numbers, its tree, and what else the game shows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..games import _style
from . import gan_pictures, portrait, shapes_pictures, tree
from .config import PORTRAIT, SOLUTIONS, TREE
from .looks import NOTHING, colours
from .results import RideResult

#: Games whose solutions are worth a picture of their own.
_SOLUTIONS: dict[str, Callable[[RideResult], Any]] = {
    "shapes": shapes_pictures.new_figure,
    "gan": gan_pictures.new_figure,
}


def save_pictures(folder: Path, result: RideResult) -> None:
    """Draws the pictures into ``folder``. Raises ImportError without Matplotlib."""
    if portrait.is_planar(result):
        figure = _style.new_figure(11.6, 6.2, result.study.title)
        left, right = figure.subplots(1, 2, width_ratios=(1.7, 1))
        portrait.draw(figure, left, result)
        _shares(right, result)
        handles = [*portrait.legend(), *_solutions(result)]
        figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=9, frameon=False)
        _style.save(figure, folder / PORTRAIT)
    if result.config.game in _SOLUTIONS:
        _style.save(_SOLUTIONS[result.config.game](result), folder / SOLUTIONS)
    figure = _style.new_figure(7.5, tree.height(result), f"{result.study.title}: tree of branches")
    tree.draw(figure.subplots(), result)
    figure.legend(handles=_solutions(result), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    _style.save(figure, folder / TREE)


def _shares(axes: Any, result: RideResult) -> None:
    """Which share of its branches, or descents, each method ended where."""
    names = [f"ride ({len(result.archive.branches)} branches)"]
    names += [f"{end.name} ({len(end.states)})" for end in result.ends]
    left = [0.0] * len(names)
    for row, colour in zip(result.rows, colours(result), strict=True):
        counts = (row.branches, *row.rivals)
        totals = (len(result.archive.branches), *(len(end.states) for end in result.ends))
        shares = [100 * count / max(1, total) for count, total in zip(counts, totals, strict=True)]
        axes.barh(range(len(names)), shares, left=left, height=0.6, color=colour, edgecolor="white", label=row.name)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.barh(range(len(names)), [100 - share for share in left], left=left, height=0.6, color=NOTHING)
    axes.set_yticks(range(len(names)), [""] * len(names))
    for number, name in enumerate(names):
        axes.text(0, number - 0.36, name, fontsize=9, va="bottom")
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="share, %", title="where they ended")
    _style.tidy(axes)
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _solutions(result: RideResult) -> list[Any]:
    from matplotlib.lines import Line2D

    pairs = zip(result.rows, colours(result), strict=True)
    return [Line2D([], [], color=colour, lw=1.6, marker="*", ms=11, label=row.name) for row, colour in pairs]
