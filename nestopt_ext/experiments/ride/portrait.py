"""The phase portrait of a game of two numbers: the largest exponent as heat map, and the rides over it."""

from typing import Any

import torch
from torch import Tensor

from ...games import max_lyapunov_exponent
from .config import PLANAR_GAMES
from .looks import NOTHING, colours_of_solutions
from .results import RideResult

_SIDE = 81
#: Points of a ride that are drawn.
_POINTS = 400


def is_planar(result: RideResult) -> bool:
    """Whether the game has two numbers, so that there is a portrait."""
    return result.study.step.num_parameters == 2


def draw(figure: Any, axes: Any, result: RideResult) -> None:
    """Draws the portrait into ``axes``."""
    frame = _Frame(result)
    _heat_map(figure, axes, result, frame)
    _rides(axes, result, frame)
    _bifurcations(axes, result, frame)
    low, high = frame.limits
    axes.set(xlim=(low, high), ylim=(low, high), xlabel=frame.label(1), ylabel=frame.label(2))
    axes.set_aspect("equal")
    axes.set_title(f"largest exponent over {frame.horizon} steps, and rides", fontsize=10)


class _Frame:
    """Where states are drawn: games of logits in the square of their probabilities, others as they are."""

    def __init__(self, result: RideResult) -> None:
        self.bounded = result.config.game in PLANAR_GAMES
        self.name = "sigmoid(w{})" if result.config.game == "random-subspace-ipd" else "p{}" if self.bounded else "w{}"
        self.horizon = result.config.exponent_steps or 10
        self.limits = (0.0, 1.0) if self.bounded else (-1.35, 1.35)

    def label(self, player: int) -> str:
        """The name of an axis."""
        return self.name.format("₁₂"[player - 1])

    def place(self, states: Tensor) -> Tensor:
        """Coordinates [..., 2] of states [..., 2]."""
        return torch.sigmoid(states) if self.bounded else states

    def states(self, places: Tensor) -> Tensor:
        """States of coordinates, not nearer to the border than can be told apart."""
        return torch.logit(places) if self.bounded else places


def _heat_map(figure: Any, axes: Any, result: RideResult, frame: _Frame) -> None:
    low, high = frame.limits
    middles = low + (high - low) * (torch.arange(_SIDE, dtype=torch.float64) + 0.5) / _SIDE
    second, first = torch.meshgrid(middles, middles, indexing="ij")
    states = result.study.step.start(frame.states(torch.stack([first, second], -1)).flatten(0, 1))
    with torch.no_grad():
        exponents = max_lyapunov_exponent(result.study.step, states, num_steps=frame.horizon).exponent
    image = exponents.reshape(_SIDE, _SIDE)
    most = float(image[image.isfinite()].abs().max())
    shown = axes.imshow(
        image.numpy(), origin="lower", extent=(low, high, low, high), cmap="PuOr_r", vmin=-most, vmax=most,
        interpolation="bilinear", alpha=0.65,
    )  # fmt: skip
    bar = figure.colorbar(shown, ax=axes, shrink=0.8, pad=0.02)
    bar.set_label("exponent: above 0 neighbours part, below they meet", fontsize=9)
    bar.outline.set_visible(False)


def _rides(axes: Any, result: RideResult, frame: _Frame) -> None:
    colour_of = colours_of_solutions(result)
    for branch, path in zip(result.archive.branches, _paths(result), strict=True):
        places = frame.place(path)
        colour = NOTHING if branch.solution is None else colour_of[branch.solution]
        axes.plot(places[:, 0], places[:, 1], color="white", lw=2.6, alpha=0.7, zorder=3)
        axes.plot(places[:, 0], places[:, 1], color=colour, lw=1.4, zorder=4)
        axes.plot(*places[-1], marker="*", ms=13, color=colour, markeredgecolor="white", zorder=6, clip_on=False)


def _paths(result: RideResult) -> list[Tensor]:
    """The points of every ride, from its bifurcation on, [points, 2]; of a ridge its ends, which are not a map's."""
    archive, step = result.archive, result.study.step
    states = torch.stack([branch.begin for branch in archive.branches])
    points = [torch.stack([archive.bifurcations[b.bifurcation].state for b in archive.branches]), states]
    if result.study.problem is not step:
        ends = [branch.begin if branch.end is None else branch.end for branch in archive.branches]
        return [*torch.stack([*points, torch.stack(ends)], 1)[:, :, :2]]
    steps = max(branch.steps for branch in archive.branches)
    every = max(1, steps // _POINTS)
    with torch.no_grad():
        for number in range(1, steps + 1):
            states = step(states)
            # The first steps are long ones, and the curve bends there.
            if number % every == 0 or number < 20:
                points.append(states)
    return [*torch.stack(points, 1)[:, :, :2]]


def _bifurcations(axes: Any, result: RideResult, frame: _Frame) -> None:
    for place in result.archive.bifurcations:
        if place.parent is not None:
            continue
        start = frame.place(result.study.starts[place.start])
        end = frame.place(place.state[:2])
        climb = torch.stack([start, end])
        axes.plot(climb[:, 0], climb[:, 1], color="0.25", lw=0.9, ls=(0, (2, 2)), zorder=5)
        axes.plot(*start, marker="o", ms=6, color="white", markeredgecolor="black", zorder=7)
        axes.plot(*end, marker="D", ms=6.5, color="black", markeredgecolor="white", zorder=8)


def legend() -> list[Any]:
    """Handles that explain the marks."""
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], ls="none", marker="o", ms=6, color="white", markeredgecolor="black", label="start"),
        Line2D([], [], ls="none", marker="D", ms=6.5, color="black", markeredgecolor="white", label="branching"),
        Line2D([], [], color="0.25", lw=0.9, ls=(0, (2, 2)), label="climb (as the crow flies)"),
    ]
