"""What the pictures of a ride share: the colors and names of solutions, entries for legends, figures, files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from .. import _lists
from .._checkpoint import write_atomically
from .archive import Archive

#: The palette of Okabe and Ito, which colour-blind readers can tell apart.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
#: Of solutions beyond the palette, and of ends at no solution.
FURTHER, NOWHERE = "0.45", "0.75"


class SolutionLooks:
    """A name and a color for each solution of an archive."""

    def __init__(
        self, caller: str, archive: Archive, labels: Sequence[str] | None, colors: Sequence[Any] | None
    ) -> None:
        solutions = archive.solutions
        for name, given in (("labels", labels), ("colors", colors)):
            if given is not None and (isinstance(given, str) or len(given) != len(solutions)):
                got = _lists.value_name(given) if isinstance(given, str) else len(given)
                raise ValueError(f"{caller}: {name} must be one for each of {len(solutions)} solutions; got {got}.")
        told = [", ".join(f"{loss:.3g}" for loss in solution.losses) for solution in solutions]
        numbered = [f"{number}: {losses}" if losses else str(number) for number, losses in enumerate(told)]
        self.labels = numbered if labels is None else list(labels)
        self.colors = [*PALETTE, *[FURTHER] * len(solutions)] if colors is None else list(colors)

    def color(self, solution: int | None) -> Any:
        """The color of a solution, or of none."""
        return NOWHERE if solution is None else self.colors[solution]

    def explain(self, axes: Any) -> None:
        """Entries for the legend of ``axes``; solutions of one color share theirs."""
        named: dict[Any, list[str]] = {}
        for label, color in zip(self.labels, self.colors, strict=False):
            named.setdefault(color, []).append(label)
        for color, labels in named.items():
            label = labels[0] if len(labels) == 1 else f"{len(labels)} further solutions"
            marked(axes, label, color=color, lw=1.6, marker="*", ms=11)


def marked(axes: Any, label: str, **look: Any) -> None:
    """An entry for the legend of ``axes``, of which nothing is drawn."""
    axes.plot([], [], label=label, **look)


def new_figure(caller: str, width: float, height: float, title: str) -> Any:
    """An empty figure of this size in inches."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{caller}: needs Matplotlib; there is none. Run `pip install matplotlib`.") from error
    figure = Figure(figsize=(width, height), dpi=130)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13)
    return figure


def save_with_legend(figure: Any, axes: Any, path: str | PathLike[str], columns: int) -> None:
    """Writes the PNG ``path``, with the legend of ``axes`` below; what was there stays whole until then."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(Path(path), buffer.getvalue())
