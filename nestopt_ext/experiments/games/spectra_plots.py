"""The pictures of the spectra: games and steps in the complex plane, and the map of momenta that converge."""

import cmath
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...games import small_step_converges
from . import _style
from ._contest import RECOMMENDED
from ._tables import short
from .spectra import PHASES, PLANES, TOLERANCE, GameSpectrum, PhaseMap, SpectraResult, Step, momenta

_SLOWEST = 1e5  # colours end here: slower momenta look alike


def save_pictures(folder: Path, result: SpectraResult) -> None:
    """Draws `PLANES` and `PHASES` into ``folder``. Raises ImportError without Matplotlib."""
    _style.save(_planes(result), folder / PLANES)
    _style.save(_maps(result), folder / PHASES)


def _planes(result: SpectraResult) -> Any:
    rows = [*result.games, *([result.gan] if result.gan is not None else [])]
    columns = 1 + len(rows[0].steps)
    figure = _style.new_figure(
        3.3 * columns, 3.7 * len(rows) + 0.4, "Eigenvalues of a game's Jacobian, and of one step with momentum"
    )
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for row, game in zip(grid, rows, strict=True):
        _game(row[0], game)
        for axes, step in zip(row[1:], game.steps, strict=True):
            _step(axes, step)
    for axes in grid[-1]:
        axes.set_xlabel("real part")
    for axes in grid[:, 0]:
        axes.set_ylabel("imaginary part")
    return figure


def _maps(result: SpectraResult) -> Any:
    figure = _style.new_figure(
        13, 5.4, f"min max xy: steps until the distance is {short(TOLERANCE)} of the first, best learning rate"
    )
    panels = figure.subplots(1, 2, sharey=True)
    drawn: Any = None
    for axes, phases in zip(panels, result.maps, strict=True):
        drawn = _phases(axes, phases)
    panels[0].set_ylabel("modulus of the momentum")
    figure.colorbar(drawn, ax=list(panels), label="steps; white: no learning rate converges", extend="max")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    return figure


def _game(axes: Any, game: GameSpectrum) -> None:
    values = game.eigenvalues.numpy()
    axes.axvline(0, color="0.35", lw=1.0)
    axes.plot(values.real, values.imag, ls="none", marker="o", ms=4.5, color=_style.BLUE, markerfacecolor="none")
    reach = 1.15 * float(np.abs(values).max())
    axes.set(xlim=(-0.35 * reach, reach), ylim=(-reach, reach))
    axes.set_title(f"{game.name}:\nJacobian of the game")
    axes.set_aspect("equal")
    _style.tidy(axes)


def _step(axes: Any, step: Step) -> None:
    _style.unit_circle(axes, (-1.2, 1.2))
    values = step.eigenvalues.numpy()
    outside = np.abs(values) >= 1
    for chosen, colour, marker in ((~outside, _style.BLUE, "o"), (outside, _style.RED, "x")):
        axes.plot(values.real[chosen], values.imag[chosen], ls="none", marker=marker, ms=4.5, color=colour,
                  markerfacecolor="none")  # fmt: skip
    verdict = f"best lr {step.lr:.2g}" if step.rate < 1 else f"diverges; lr {step.lr:.2g}"
    axes.set_title(f"step with {step.momentum}, {verdict}:\nmodulus up to {step.rate:.4f}")
    _style.tidy(axes)


def _phases(axes: Any, phases: PhaseMap) -> Any:
    from matplotlib.colors import LogNorm

    angles, moduli = phases.angles.numpy() / math.pi, phases.moduli.numpy()
    steps = np.ma.masked_invalid(phases.steps.numpy())
    drawn = axes.pcolormesh(
        angles, moduli, steps, norm=LogNorm(20, _SLOWEST), cmap="viridis_r", shading="nearest",
        rasterized=True,
    )  # fmt: skip
    _boundary(axes, phases)
    axes.plot([], [], color=_style.RED, lw=1.8, label="inside: every small enough step converges")
    axes.plot(
        cmath.phase(RECOMMENDED) / math.pi, abs(RECOMMENDED), ls="none", marker="o", ms=8, color="white",
        markeredgecolor="black", label="0.9 exp(iπ/8)",
    )  # fmt: skip
    row, column = np.unravel_index(int(np.argmin(phases.steps.numpy())), phases.steps.shape)
    axes.plot(
        angles[column], moduli[row], ls="none", marker="*", ms=13, color="white", markeredgecolor="black",
        label="fastest",
    )  # fmt: skip
    _style.pi_ticks(axes.xaxis, 1.0)
    kind = "alternating" if phases.alternating else "simultaneous"
    fastest = f"{steps.min():.0f}" if steps.count() else "-"
    axes.set(xlabel="angle of the momentum", title=f"{kind} updates; fastest: {fastest} steps")
    axes.title.set_fontsize(10)
    return drawn


def _boundary(axes: Any, phases: PhaseMap) -> None:
    """The edge of the small-step test, which costs nothing, on a finer grid than that of the map."""
    moduli = torch.linspace(0, float(phases.moduli[-1]), 500, dtype=torch.float64)
    angles = torch.linspace(0, math.pi, 700, dtype=torch.float64)
    inside = small_step_converges(momenta(moduli, angles), alternating=phases.alternating)
    axes.contour(
        angles.numpy() / math.pi, moduli.numpy(), inside.numpy(), levels=[0.5], colors=_style.RED, linewidths=1.8
    )
