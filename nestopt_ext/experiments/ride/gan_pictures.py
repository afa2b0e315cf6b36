"""Where the generators end that branches of a GAN lead to, and those of its rivals."""

import math
from typing import Any

import torch
from torch import Tensor

from ..games import _style
from ..games.mixture_config import MixtureConfig
from ..games.mixture_gan import Ring
from .gan import mixture_config, points
from .results import RideResult

_COLUMNS = 6
_MOST = 24
_EXTENT = 1.7
#: Of a generator whose points are not finite.
_NOTHING = "0.8"


def new_figure(result: RideResult, colours: list[str]) -> Any:
    """The figure: points of the generator at the end of each branch, then from plain descent and from its rivals."""
    mixture = mixture_config(result.config)
    step = result.study.step
    ends = [branch.end for branch in result.archive.branches if branch.end is not None]
    titles = [
        _title(branch.rank, branch.sign, branch.size) for branch in result.archive.branches if branch.end is not None
    ]
    states = [torch.stack(ends)] if ends else []
    for end in result.ends:
        states.append(end.states)
        titles += [end.name] * len(end.states)
    every = torch.cat(states)[:_MOST]
    rows = math.ceil(len(every) / _COLUMNS)
    title = f"{result.study.title}: points of the generators, and the modes they cover"
    if len(titles) > _MOST:
        title += f" (the first {_MOST} of {len(titles)})"
    figure = _style.new_figure(2.0 * _COLUMNS, 2.4 * rows + 0.9, title)
    grid = figure.subplots(rows, _COLUMNS, squeeze=False)
    generated, keys = points(mixture, step, every), result.study.key(every)
    for number, axes in enumerate(grid.flat):
        if number >= len(every):
            axes.set_axis_off()
            continue
        _cloud(axes, mixture, generated[number], _colour(result, colours, keys[number]))
        axes.set_title(f"{titles[number]}\n{result.study.label(keys[number])}", fontsize=8)
    return figure


def _cloud(axes: Any, mixture: MixtureConfig, cloud: Tensor, colour: str) -> None:
    from matplotlib.patches import Circle

    ring = Ring.of(mixture)
    for number, mean in enumerate(ring.means.tolist()):
        axes.add_patch(Circle(mean, 3 * ring.std, fill=False, color="0.35", lw=0.9))
        axes.text(1.45 * mean[0], 1.45 * mean[1], str(number + 1), fontsize=8, ha="center", va="center", zorder=5)
    axes.plot(cloud[:, 0], cloud[:, 1], ls="none", marker=".", ms=2.0, color=colour, alpha=0.6, rasterized=True)
    axes.set(xlim=(-_EXTENT, _EXTENT), ylim=(-_EXTENT, _EXTENT), xticks=[], yticks=[])
    axes.set_aspect("equal")


def _colour(result: RideResult, colours: list[str], key: Tensor) -> str:
    for row, colour in zip(result.rows, colours, strict=True):
        if torch.equal(row.key, key.to(row.key)):
            return colour
    return _NOTHING


def _title(rank: int, sign: int, size: float) -> str:
    return f"ride {'+' if sign > 0 else '-'}{size:g} d{rank}"
