"""What the networks on pictures look at: training pictures, and the weights of every solution of the ride."""

from typing import Any

import torch
from torch import Tensor

from ..games import _style
from .results import RideResult
from .shapes import network
from .shapes_data import FEATURES, SIDE, pictures

_EXAMPLES = 4
#: Alone, the other features drawn by chance, a channel classifies half of the pictures if it is not used.
_CHANCE = 50


def new_figure(result: RideResult, colours: list[str]) -> Any:
    """The figure: a row of pictures of each class, and a row for each solution."""
    solutions = result.archive.solutions
    figure = _style.new_figure(11.0, 3.6 + 1.45 * len(solutions), "three features, each of which tells the class")
    above, below = figure.subfigures(2, 1, height_ratios=(2.6, 1.45 * len(solutions) + 0.4))
    _examples(above, result)
    if solutions:
        _solutions(below, result, colours)
    return figure


def _examples(figure: Any, result: RideResult) -> None:
    """Some pictures of both classes, as colours and, for the first of them, channel by channel."""
    data = pictures(result.config.images or 0, result.config.seed)
    grid = figure.subplots(2, _EXAMPLES + len(FEATURES), squeeze=False)
    figure.suptitle(
        "training pictures, and the channels of the first: light on dark or dark on light by chance", fontsize=10
    )
    per_class = [data.x[data.y == label] for label in (0, 1)]
    for row, (axes, x) in enumerate(zip(grid, per_class, strict=True)):
        # Neighbours in the set have the same signs, so that examples come from all over it.
        chosen = x[torch.linspace(0, len(x) - 1, _EXAMPLES).long()]
        axes[0].set_ylabel(f"class {row}", fontsize=9)
        for place, picture in zip(axes, chosen, strict=False):
            _show(place, _coloured(picture))
        for number, place in enumerate(axes[_EXAMPLES:]):
            _show(place, _coloured(chosen[0], number))
            if row == 0:
                place.set_title(FEATURES[number], fontsize=9)


def _solutions(figure: Any, result: RideResult, colours: list[str]) -> None:
    width = result.config.width or 1
    of_key = {id(row.key): colour for row, colour in zip(result.rows, colours, strict=True)}
    own = [of_key[id(solution.key)] for solution in result.archive.solutions]
    shown = min(width, 6)
    solutions = result.archive.solutions
    grid = figure.subplots(len(solutions), shown + 1, squeeze=False, width_ratios=(*[1.0] * shown, 2.2))
    figure.suptitle(
        "solutions of the ride: weights of each hidden unit, and what a channel classifies alone", fontsize=10
    )
    for axes, solution, colour in zip(grid, solutions, own, strict=True):
        weights = network(width, solution.state).hidden.weight.detach()
        for place, weight in zip(axes, weights[:shown], strict=False):
            _show(place, _coloured(weight, most=float(weights.abs().max())))
        axes[0].set_ylabel(result.study.label(solution.key), fontsize=9, color=colour)
        _bars(axes[-1], 100 * solution.key, last=solution is solutions[-1])


def _bars(axes: Any, shares: Tensor, *, last: bool) -> None:
    axes.barh(range(len(FEATURES)), shares.tolist(), color=(_style.RED, _style.GREEN, _style.BLUE), height=0.7)
    axes.axvline(_CHANCE, color="0.4", lw=1.0, ls=(0, (3, 2)))
    axes.set_yticks(range(len(FEATURES)), FEATURES, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlim=(0, 100))
    if last:
        axes.set_xlabel("right, % (dashed: by chance)", fontsize=8)
    axes.tick_params(axis="x", labelsize=8, labelbottom=last)
    axes.spines[["top", "right"]].set_visible(False)


def _coloured(values: Tensor, channel: int | None = None, most: float | None = None) -> Any:
    """Values [192] as a colour picture around grey, or only one of its channels."""
    image = values.reshape(len(FEATURES), SIDE, SIDE)
    image = 0.5 + 0.5 * image / (most or float(image.abs().max()))
    if channel is not None:
        keep = torch.full_like(image, 0.5)
        keep[channel] = image[channel]
        image = keep
    return image.clamp(0, 1).permute(1, 2, 0).numpy()


def _show(axes: Any, image: Any) -> None:
    axes.imshow(image)
    axes.set_xticks([])
    axes.set_yticks([])
