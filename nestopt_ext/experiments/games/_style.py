"""The look of the pictures: colours that colour-blind readers can tell apart, axes in units of pi, saving."""

import io
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

from ..._checkpoint import write_atomically

#: The palette of Okabe and Ito.
ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK = (
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
#: Colour, line and marker of every method, the same in all pictures.
METHODS: dict[str, dict[str, Any]] = {
    "gradient descent": {"color": "0.55", "ls": ":", "marker": "."},
    "real momentum": {"color": "black", "ls": "--", "marker": "x"},
    "complex momentum 0.9, pi/8": {"color": SKY, "ls": "-.", "marker": "^"},
    "complex momentum": {"color": BLUE, "ls": "-", "marker": "o"},
    "optimistic": {"color": ORANGE, "ls": "-", "marker": "s"},
    "extragradient": {"color": RED, "ls": "-", "marker": "D"},
    "negative momentum, alternating": {"color": PINK, "ls": "--", "marker": "v"},
    "complex momentum, alternating": {"color": GREEN, "ls": "-", "marker": "P"},
}


def label(method: str) -> str:
    """A method's name for readers of a picture."""
    return method.replace("0.9, pi/8", "0.9 exp(iπ/8)")


def new_figure(width: float, height: float, title: str) -> Any:
    """An empty figure of this size in inches. Raises ImportError without Matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13)
    return figure


def save(figure: Any, path: Path) -> None:
    """Writes the figure as the PNG ``path``; what was there stays whole until then."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())


def tidy(axes: Any) -> None:
    """Small titles, a faint grid, no box."""
    axes.title.set_fontsize(10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, lw=0.6)
    axes.set_axisbelow(True)


def pi_ticks(axis: Any, unit: float, parts: int = 8) -> None:
    """Ticks at multiples of pi / ``parts`` from 0 to pi, where pi has the coordinate ``unit``."""
    axis.set_ticks([unit * k / parts for k in range(parts + 1)], [_pi(Fraction(k, parts)) for k in range(parts + 1)])


def unit_circle(axes: Any, limits: Iterable[float] | None = None) -> None:
    """Draws the unit circle, with both axes on one scale."""
    from matplotlib.patches import Circle

    axes.add_patch(Circle((0, 0), 1, fill=False, color="0.35", lw=1.0))
    axes.set_aspect("equal")
    if limits is not None:
        low, high = limits
        axes.set(xlim=(low, high), ylim=(low, high))


def _pi(part: Fraction) -> str:
    if part == 0:
        return "0"
    top = "π" if part.numerator == 1 else f"{part.numerator}π"
    return top if part.denominator == 1 else f"{top}/{part.denominator}"
