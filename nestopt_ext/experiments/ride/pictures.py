"""The pictures of a ride: its portrait where the game has two numbers, its tree, and what else the game shows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...games import plot_phase_portrait, plot_ride_tree
from ..games import _style
from . import gan_pictures, shapes_pictures
from .config import PLANAR_GAMES, PORTRAIT, SOLUTIONS, TREE
from .results import RideResult, Row

_COLOURS = (_style.BLUE, _style.RED, _style.GREEN, _style.PINK, _style.ORANGE, _style.SKY, _style.YELLOW)
#: Solutions that are called by a colour have it.
_NAMED = {"red": _style.RED, "green": _style.GREEN, "blue": _style.BLUE}
#: Of solutions beyond the palette, and of ends that are not finite.
_FURTHER, _NOTHING = "0.45", "0.85"
#: Cells along each side of a portrait, and the bounds of one that is not of probabilities.
_RESOLUTION, _BOUNDS = 81, (-1.35, 1.35)

#: Games whose solutions are worth a picture of their own.
_SOLUTIONS: dict[str, Callable[[RideResult, list[str]], Any]] = {
    "shapes": shapes_pictures.new_figure,
    "gan": gan_pictures.new_figure,
}


def save_pictures(folder: Path, result: RideResult) -> None:
    """Draws the pictures into ``folder``. Raises ImportError without Matplotlib."""
    title, colours = result.study.title, _colours(result)
    if result.study.step.num_parameters == 2:
        figure = _style.new_figure(11.6, 6.2, title)
        left, right = figure.subplots(1, 2, width_ratios=(1.7, 1))
        _portrait(left, result, colours)
        _shares(right, result, colours)
        _legend(figure, left, result, colours)
        _style.save(figure, folder / PORTRAIT)
    if result.config.game in _SOLUTIONS:
        _style.save(_SOLUTIONS[result.config.game](result, colours), folder / SOLUTIONS)
    plot_ride_tree(result.archive, folder / TREE, title=f"{title}: tree of branches", **_looks(result, colours))


def _colours(result: RideResult) -> list[str]:
    """A colour for each of the rows of ``result``."""
    names = [row.name for row in result.rows]
    free = (colour for colour in _COLOURS if colour not in [_NAMED.get(name) for name in names])
    return [_NAMED.get(name) or next(free, _FURTHER) for name in names]


def _looks(result: RideResult, colours: list[str]) -> dict[str, Any]:
    """The names and colours of the solutions of the archive."""
    of_key = {id(row.key): (row.name, colour) for row, colour in zip(result.rows, colours, strict=True)}
    looks = [of_key[id(solution.key)] for solution in result.archive.solutions]
    return {"labels": [name for name, _ in looks], "colors": [colour for _, colour in looks]}


def _portrait(axes: Any, result: RideResult, colours: list[str]) -> None:
    """Games of logits in the square of their probabilities, others as they are."""
    game, horizon = result.config.game, result.config.exponent_steps or 10
    logits = game in PLANAR_GAMES
    name = "sigmoid(w{})" if game == "random-subspace-ipd" else "p{}" if logits else "w{}"
    plot_phase_portrait(
        result.study.step,
        axes=axes,
        bounds=None if logits else (_BOUNDS, _BOUNDS),
        probabilities=logits,
        archive=result.archive,
        horizon=horizon,
        resolution=_RESOLUTION,
        names=(name.format("₁"), name.format("₂")),
        title="rides and steps, over how fast neighbours part",
        **_looks(result, colours),
    )
    axes.set_box_aspect(1)


def _shares(axes: Any, result: RideResult, colours: list[str]) -> None:
    """Which share of its branches, or descents, each method ended where."""
    names = [f"ride ({len(result.archive.branches)} branches)"]
    names += [f"{end.name} ({len(end.states)})" for end in result.ends]
    totals = (len(result.archive.branches), *(len(end.states) for end in result.ends))
    left = [0.0] * len(names)
    for row, colour in zip(result.rows, colours, strict=True):
        counts = (row.branches, *row.rivals)
        shares = [100 * count / max(1, total) for count, total in zip(counts, totals, strict=True)]
        axes.barh(range(len(names)), shares, left=left, height=0.6, color=colour, edgecolor="white")
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.barh(range(len(names)), [100 - share for share in left], left=left, height=0.6, color=_NOTHING)
    axes.set_yticks(range(len(names)), [""] * len(names))
    for number, name in enumerate(names):
        axes.text(0, number - 0.36, name, fontsize=9, va="bottom")
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="share, %", title="where they ended")
    _style.tidy(axes)
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _legend(figure: Any, axes: Any, result: RideResult, colours: list[str]) -> None:
    """What ``axes`` explain, and behind it the solutions that the ride does not have."""
    from matplotlib.lines import Line2D

    handles, labels = axes.get_legend_handles_labels()
    others: list[tuple[Row, str]] = [
        (row, colour) for row, colour in zip(result.rows, colours, strict=True) if not row.branches
    ]
    further = [row for row, colour in others if colour == _FURTHER]
    for row, colour in others:
        if colour != _FURTHER:
            handles.append(Line2D([], [], color=colour, lw=6))
            labels.append(row.name)
    if further:
        handles.append(Line2D([], [], color=_FURTHER, lw=6))
        labels.append(further[0].name if len(further) == 1 else f"{len(further)} further solutions")
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=9, frameon=False)
