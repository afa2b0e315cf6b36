"""The pictures of the mixture experiment: the heat maps, and what the best generators make."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from . import _style
from .mixture_config import HEAT_MAP, SAMPLES, Cell, angle_label
from .mixture_gan import Ring
from .mixture_report import REAL_FROM, equal_lr
from .mixture_results import CellResult, MixtureResult


def save_pictures(folder: Path, result: MixtureResult) -> None:
    """Draws `HEAT_MAP` and `SAMPLES` into ``folder``. Raises ImportError without Matplotlib."""
    _style.save(_heat_maps(result), folder / HEAT_MAP)
    _style.save(_samples(result), folder / SAMPLES)


# Heat maps


def _heat_maps(result: MixtureResult) -> Any:
    config = result.config
    title = f"GAN on a ring of {config.modes} Gaussians, simultaneous {config.optimizer}: modes covered with momentum β"
    figure = _style.new_figure(12.5, 10, title)
    rates = config.learning_rates
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.45, 1), hspace=0.02)
    axes = top.subplots()
    _map(axes, result, {r.cell: r.modes for r in result.cells}, {r.cell: _test_note(r) for r in result.cells}, 8)
    axes.set_title(
        f"each momentum at its best effective learning rate: mean over {config.test_seeds} test seeds"
        " (± standard deviation, effective lr)",
        fontsize=10,
    )
    top.colorbar(axes.images[0], ax=axes, label="modes covered")
    for i, (axes, lr) in enumerate(zip(bottom.subplots(1, len(rates), squeeze=False)[0], rates, strict=True)):
        values = {cell: modes for cell, (modes, _) in equal_lr(result, lr).items()}
        notes = {cell: f"{value:.1f}" for cell, value in values.items()}
        _map(axes, result, values, notes, 6)
        axes.tick_params(labelsize=7)
        axes.set_title(f"effective lr {lr:g} for all", fontsize=9)
        if i:
            axes.set(ylabel="", yticklabels=[])
    bottom.suptitle(f"at equal effective learning rates: mean over {config.tuning_seeds} tuning seeds", fontsize=10)
    return figure


def _test_note(result: CellResult) -> str:
    failed = f"\n{result.diverged} of {len(result.test)} diverged" if result.diverged else ""
    return f"{result.modes:.1f}\n±{result.spread:.1f}, {result.effective_lr:g}{failed}"


def _map(axes: Any, result: MixtureResult, values: dict[Cell, float], notes: dict[Cell, str], size: int) -> None:
    """Moduli upwards, angles to the right. Modulus 0 has no angle, so its one value fills the row."""
    config = result.config
    moduli, angles = sorted(config.moduli), sorted(config.angles)
    board = np.array([[values[Cell(m, a if m else 0.0)] for a in angles] for m in moduli])
    axes.imshow(board, origin="lower", cmap="viridis", vmin=0, vmax=config.modes, aspect="auto")
    diverged = {r.cell for r in result.cells if r.diverged}
    for cell, note in notes.items():
        row = moduli.index(cell.modulus)
        column = angles.index(cell.angle) if cell.modulus else (len(angles) - 1) / 2
        dark = values[cell] < 0.6 * config.modes
        axes.text(column, row, note, ha="center", va="center", fontsize=size, color="white" if dark else "black")
        if cell in diverged and "diverged" in note:
            _hatch(axes, column, row)
    axes.set_xticks(range(len(angles)), [angle_label(angle) for angle in angles])
    axes.set_yticks(range(len(moduli)), [f"{modulus:g}" for modulus in moduli])
    axes.set(xlabel="arg β", ylabel="|β|")


def _hatch(axes: Any, column: float, row: int) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, hatch="///", edgecolor="tab:red", lw=0))


# Points


def _samples(result: MixtureResult) -> Any:
    config, ring = result.config, Ring.of(result.config)
    kinds: list[tuple[str, Callable[[Cell], bool]]] = [
        ("best complex", lambda cell: not cell.is_real),
        ("best real", lambda cell: cell.is_real),
        (f"best real from {REAL_FROM:g} on", lambda cell: cell.is_real and cell.momentum.real >= REAL_FROM),
    ]
    shown = [(name, best) for name, holds in kinds if (best := result.best(holds)) is not None]
    title = f"{config.samples} generated points after {config.steps} steps; circles: 3 standard deviations"
    figure = _style.new_figure(2.2 * max(3, config.test_seeds) + 1.2, 2.6 * len(shown) + 0.4, title)
    grid = figure.subplots(len(shown), config.test_seeds, squeeze=False)
    for row, (name, best) in zip(grid, shown, strict=True):
        clouds = result.points(best).numpy()
        for axes, points, run in zip(row, clouds, best.test, strict=True):
            _cloud(axes, points, ring, config.radius)
            end = "diverged" if run.diverged else f"{run.curve[-1]} modes"
            axes.set_title(f"seed {run.seed}: {end}", fontsize=9)
        row[0].set_ylabel(f"{name}\nβ = {best.cell}\neffective lr {best.effective_lr:g}", fontsize=9)
    return figure


def _cloud(axes: Any, points: Any, ring: Ring, radius: float) -> None:
    from matplotlib.patches import Circle

    for mean in ring.means.tolist():
        axes.add_patch(Circle(mean, 3 * ring.std, fill=False, color="tab:red", lw=0.8))
    reach = 1.4 * radius + 3 * ring.std
    axes.scatter(points[:, 0], points[:, 1], s=2, alpha=0.35, linewidths=0, color="tab:blue")
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[])
