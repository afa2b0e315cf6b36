"""The picture of a run: losses, and the paths of hyperparameters."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from .._checkpoint import write_atomically
from .trainer import EpochRecord

_COLUMNS = 4
#: Of a hyperparameter with more numbers than that, the range and the median are drawn instead of each path.
_MOST_LINES = 10
#: From dark to light, each to be told from its neighbours and from white.
_SHADES = (
    "#440154", "#482878", "#3e4a89", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6dcd59", "#b4de2c", "#dcc318",
)  # fmt: skip
_LOSSES = {
    "training": ("tab:blue", "-"),
    "response": ("tab:cyan", "--"),
    "validation": ("tab:red", "-"),
    "test": ("0.4", "-"),
}


def plot_history(history: Sequence[EpochRecord], path: str | PathLike[str], *, title: str = "") -> None:
    """Draws losses and the path of every hyperparameter over the epochs of ``history`` into the PNG ``path``.

    Losses are means over the steps of an epoch (training, response) and evaluations at its end (validation, test), the
    lowest validation loss marked. Hyperparameters are in natural units, one panel each; one of up to
    10 numbers has a line for each, from dark to light in their order, and their indices below the panel; one of more is
    drawn as its median and its range. The file is replaced atomically.

    Raises ImportError without Matplotlib, ValueError for an empty history.
    """
    if not history:
        raise ValueError("plot_history: history must hold at least one epoch; got none. Call fit first.")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_history: needs Matplotlib; there is none. Run `pip install matplotlib`.") from error
    names = list(history[0].values)
    rows = math.ceil(len(names) / _COLUMNS)
    figure = Figure(figsize=(10, 3.2 + 1.9 * rows), dpi=120)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.06)
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    grid = figure.add_gridspec(rows + 1, min(_COLUMNS, len(names)), height_ratios=[1.6] + [1.0] * rows)
    _losses(figure.add_subplot(grid[0, :]), history)
    for i, name in enumerate(names):
        _path(figure.add_subplot(grid[1 + i // _COLUMNS, i % _COLUMNS]), history, name)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(Path(path), buffer.getvalue())


def _losses(axes: Any, history: Sequence[EpochRecord]) -> None:
    epochs = [record.epoch for record in history]
    curves: dict[str, list[float | None]] = {
        "training": [r.losses.get("train_loss") for r in history],
        "response": [r.losses.get("response_loss") for r in history],
        "validation": [r.valid_loss for r in history],
        "test": [r.test.get("loss") for r in history],
    }
    for label, curve in curves.items():
        if any(value is not None for value in curve):
            colour, style = _LOSSES[label]
            axes.plot(epochs, curve, style, color=colour, lw=1.5, label=label, marker=_marker(history))
    best = min(history, key=lambda record: record.valid_loss)
    axes.plot([best.epoch], [best.valid_loss], "o", color="tab:red", ms=6, mfc="none")
    note = f"{best.valid_loss:.4g} in epoch {best.epoch}"
    axes.set(xlabel="epoch", ylabel="loss", title=f"lowest validation loss {note}")
    if all(value > 0 for curve in curves.values() for value in curve if value is not None):
        axes.set_yscale("log")
    axes.legend(frameon=False, ncols=4, fontsize=8)
    _tidy(axes)


def _path(axes: Any, history: Sequence[EpochRecord], name: str) -> None:
    epochs = [record.epoch for record in history]
    values = np.array([np.ravel(record.values[name]) for record in history])
    count = values.shape[1]
    if count > _MOST_LINES:
        axes.fill_between(epochs, values.min(1), values.max(1), color="tab:blue", alpha=0.2, lw=0, label="range")
        lines = [(f"median of {count}", "tab:blue", np.median(values, axis=1))]
    else:
        indices = np.ndindex(np.shape(history[0].values[name]))
        labels = [",".join(map(str, index)) for index in indices]
        colours = [_SHADES[i * len(_SHADES) // count] if count > 1 else "tab:blue" for i in range(count)]
        lines = list(zip(labels, colours, values.T, strict=True))
    for label, colour, path in lines:
        axes.plot(epochs, path, lw=1.5, color=colour, label=label, marker=_marker(history))
    axes.set_title(name, fontsize=9)
    axes.tick_params(labelsize=7)
    _tidy(axes)
    if count > 1:
        style = {"frameon": False, "fontsize": 7, "handlelength": 1.0, "columnspacing": 0.9, "handletextpad": 0.4}
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=5, borderaxespad=0.0, **style)


def _marker(history: Sequence[EpochRecord]) -> str:
    """A line through one point is none."""
    return "." if len(history) == 1 else ""


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
