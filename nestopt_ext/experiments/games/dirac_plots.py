"""The picture of the Dirac GAN: a phase portrait of every method, distances, and the eigenvalues of one step."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from . import _style
from .dirac import EXTENT, PICTURE, DiracResult, Path2d


def save_pictures(folder: Path, result: DiracResult) -> None:
    """Draws `PICTURE` into ``folder``. Raises ImportError without Matplotlib."""
    figure = _style.new_figure(
        15.5, 8.2, "Dirac GAN: generated point θ (true point 0) against a discriminator of slope ψ"
    )
    left, right = figure.subfigures(1, 2, width_ratios=(2.05, 1), wspace=0.03)
    portraits = left.subplots(2, 3, sharex=True, sharey=True)
    for axes, walked in zip(portraits.flat, result.paths, strict=True):
        _portrait(axes, result, walked)
    for axes in portraits[1]:
        axes.set_xlabel("θ")
    for axes in portraits[:, 0]:
        axes.set_ylabel("ψ")
    distances, eigenvalues = right.subplots(2, 1, height_ratios=(1, 1.15))
    _distances(distances, result)
    _eigenvalues(eigenvalues, result)
    right.legend(
        *eigenvalues.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8, frameon=False,
        title="largest modulus: below 1 it converges", title_fontsize=9, columnspacing=1.0, handletextpad=0.3,
    )  # fmt: skip
    _style.save(figure, folder / PICTURE)


def _portrait(axes: Any, result: DiracResult, walked: Path2d) -> None:
    grid, field = result.grid.numpy(), result.field.numpy()
    size = np.linalg.norm(field, axis=-1, keepdims=True)
    arrows = field / np.maximum(size, 1e-12) * np.sqrt(size / size.max())  # long ones would hide the slow middle
    axes.quiver(grid, grid, arrows[..., 0], arrows[..., 1], color="0.72", pivot="mid", scale=15, width=0.005)
    walk, points = walked.walk, walked.points.numpy()
    colour = _style.METHODS[walk.method]["color"]
    axes.plot(points[:, 0], points[:, 1], color=colour, lw=1.1, alpha=0.9)
    axes.plot(points[:, 0], points[:, 1], color=colour, ls="none", marker=".", ms=3.5)
    axes.plot(*points[0], marker="o", ms=8, color="white", markeredgecolor="black", zorder=4)
    axes.plot(0, 0, marker="*", ms=11, color="black", zorder=4)
    axes.set_aspect("equal")
    axes.set(xlim=(-EXTENT, EXTENT), ylim=(-EXTENT, EXTENT))
    beta = f", β = {_polar(walk.beta)}" if walk.beta else ""
    verdict = "spirals in" if walked.inwards else "spirals out"
    axes.set_title(f"{walk.method}: {verdict}\nlr {walk.lr:g}{beta}, {walked.gradients:,} gradients", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def _distances(axes: Any, result: DiracResult) -> None:
    for walked in result.paths:
        distances = walked.distances.numpy()
        style = _style.METHODS[walked.walk.method]
        gradients = np.arange(len(distances)) * (walked.gradients / (len(distances) - 1))
        axes.plot(gradients, distances, color=style["color"], ls=style["ls"], lw=1.6, label=walked.walk.method)
    axes.set(
        yscale="log",
        xlim=(0, result.config.steps),
        xlabel="gradient evaluations",
        ylabel="distance to the solution",
        title="distance to the solution",
    )
    axes.set_ylim(1e-8, 1e2)
    _style.tidy(axes)


def _eigenvalues(axes: Any, result: DiracResult) -> None:
    _style.unit_circle(axes)
    for walked in result.paths:
        style = _style.METHODS[walked.walk.method]
        values = walked.eigenvalues.numpy()
        axes.plot(
            values.real, values.imag, ls="none", marker=style["marker"], ms=6, color=style["color"],
            markerfacecolor="none" if style["marker"] not in "x." else style["color"],
            label=f"{walked.walk.method}: {walked.rate:.3f}",
        )  # fmt: skip
    axes.set(
        xlim=(-1.2, 1.3), ylim=(-1.2, 1.2), xlabel="real part", ylabel="imaginary part",
        title="eigenvalues of one step near the solution",
    )  # fmt: skip
    _style.tidy(axes)


def _polar(beta: complex) -> str:
    if not beta.imag:
        return f"{beta.real:g}"
    return f"{abs(beta):g} exp(iπ/{math.pi / math.atan2(beta.imag, beta.real):g})"
