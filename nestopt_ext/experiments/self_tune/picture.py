"""The picture of a run: the lowest validation loss against time, and the path of every hyperparameter."""

import math
from pathlib import Path
from typing import Any

from ..games import _style
from .config import SEARCHES
from .report import LABELS
from .results import MethodResult
from .run import SelfTuneResult

_LOOK: dict[str, dict[str, Any]] = {
    "delta-stn": {"color": _style.RED, "ls": "-"},
    "centred": {"color": _style.ORANGE, "ls": "-"},
    "stn": {"color": _style.BLUE, "ls": "-"},
    "hypernet": {"color": _style.PINK, "ls": "-"},
    "ift": {"color": _style.GREEN, "ls": "-"},
    "fixed": {"color": "0.7", "ls": "-"},
    "random": {"color": "black", "ls": "--"},
    "tpe": {"color": "0.45", "ls": "--"},
    "gp": {"color": _style.SKY, "ls": "--"},
    "grid": {"color": "0.45", "ls": ":"},
}
_COLUMNS = 4


def save_picture(path: Path, result: SelfTuneResult) -> None:
    """Draws the run into the PNG ``path``. Raises ImportError without Matplotlib."""
    space, config = result.problem.space, result.config
    columns = min(_COLUMNS, len(space))
    rows = math.ceil(len(space) / columns)
    title = f"{config.data}, {config.model}: {len(space)} hyperparameters, tuned while training and searched for"
    figure = _style.new_figure(max(9.0, 3.0 * columns), 4.2 + 2.3 * rows, title)
    upper, lower = figure.subfigures(2, 1, height_ratios=(4.2, 2.3 * rows))
    left, right = upper.subplots(1, 2)
    _losses(left, result, "valid_loss", "lowest validation loss so far")
    _losses(right, result, "test_loss", "test loss there")
    left.legend(fontsize=8)
    grid = lower.subplots(rows, columns, squeeze=False).ravel()
    for axes, dimension in zip(grid, space, strict=False):
        _path(axes, result, dimension.name, log=dimension.log)
    for axes in grid[len(space) :]:
        axes.axis("off")
    for axes in grid[max(0, len(space) - columns) : len(space)]:
        axes.set_xlabel("training time, s", fontsize=8)
    _style.save(figure, path)


def _losses(axes: Any, result: SelfTuneResult, part: str, title: str) -> None:
    for method in _sound(result):
        seconds, best = _so_far(method)
        axes.step(
            seconds,
            [point[part] for point in best],
            where="post",
            lw=1.8,
            label=LABELS[method.method],
            **_LOOK[method.method],
        )
    axes.set(xlabel="training time, s", ylabel="cross-entropy", yscale="log", title=title)
    _style.tidy(axes)


def _path(axes: Any, result: SelfTuneResult, name: str, *, log: bool) -> None:
    """Where a hyperparameter is; for a search, where it was in the best training so far."""
    for method in _sound(result):
        if method.method in SEARCHES:
            seconds, points = _so_far(method)
        else:
            seconds, points = [point["seconds"] for point in method.points], method.points
        values = [point["values"][name] for point in points]
        searches = method.method in SEARCHES
        axes.plot(
            seconds,
            values,
            lw=1.1 if searches else 1.6,
            drawstyle="steps-post" if searches else "default",
            **_LOOK[method.method],
        )
    axes.set(title=name, **({"yscale": "log"} if log else {}))
    _style.tidy(axes)
    axes.tick_params(labelsize=8)


def _so_far(method: MethodResult) -> tuple[list[float], list[dict[str, Any]]]:
    """Seconds of all points, and for each the best one until then."""
    best: list[dict[str, Any]] = []
    for point in method.points:
        best.append(point if not best or point["valid_loss"] < best[-1]["valid_loss"] else best[-1])
    return [point["seconds"] for point in method.points], best


def _sound(result: SelfTuneResult) -> list[MethodResult]:
    return [method for method in result.methods if not method.skipped]
