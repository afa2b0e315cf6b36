"""The drawing of a plane of states: exponents, steps, and the rides through it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..optim._arguments import check_real
from ._linearized import Step
from ._ride_looks import NOWHERE, SolutionLooks, marked
from .archive import Archive
from .lyapunov import max_lyapunov_exponent
from .maps import OptimizerMap

#: Points of a way that are drawn, and so many of the first steps, which are long and where the curve bends.
_POINTS, _FIRST = 3000, 20
#: Widths of the picture that the ways in it may be long.
_LENGTH = 60.0
#: Arrows along each side.
_ARROWS = 16


class Plane:
    """What part of the plane is drawn, in which coordinates: parameters, or their probabilities sigmoid(w)."""

    def __init__(
        self, caller: str, step: Step, bounds: Any, *, probabilities: bool, dtype: torch.dtype | None = None
    ) -> None:
        if bounds is None:
            if not probabilities:
                raise ValueError(f"{caller}: bounds must be given unless in probabilities; got None.")
            bounds = ((0.0, 1.0), (0.0, 1.0))
        if not isinstance(bounds, tuple | list) or len(bounds) != 2 or any(len(pair) != 2 for pair in bounds):
            raise ValueError(f"{caller}: bounds must be two pairs, the least and the most of each; got {bounds!r:.80}.")
        for i, (least, most) in enumerate(bounds):
            for j, value in enumerate((least, most)):
                check_real(caller, f"bounds[{i}][{j}]", value)
                if probabilities and not 0 <= value <= 1:
                    raise ValueError(f"{caller}: bounds[{i}][{j}] must be a probability; got {value}.")
            if least >= most:
                raise ValueError(f"{caller}: bounds[{i}] must be a smaller and a larger number; got {bounds[i]!r}.")
        if isinstance(step, OptimizerMap) and step.num_parameters != 2:
            raise ValueError(f"{caller}: step must have 2 parameters; got {step.num_parameters}.")
        self.step = step
        self.bounds = tuple((float(least), float(most)) for least, most in bounds)
        self._probabilities = probabilities
        self._dtype = dtype or torch.float64

    def place(self, states: Tensor) -> Tensor:
        """Coordinates [..., 2] of states [..., S]."""
        parameters = states[..., :2]
        return torch.sigmoid(parameters) if self._probabilities else parameters

    def started(self, states: Tensor) -> Tensor:
        """States [N, S] as the step takes them, of states that another map may have made: parameters are kept."""
        if not isinstance(self.step, OptimizerMap):
            return states.to(self._dtype)
        if states.shape[1] != self.step.state_size:
            return self.step.start(states[:, :2])
        return states.to(self.step.start())  # the dtype and device of the players

    def middles(self, resolution: int) -> list[Tensor]:
        """The middles of so many cells along each axis."""
        share = (torch.arange(resolution, dtype=torch.float64) + 0.5) / resolution
        return [least + (most - least) * share for least, most in self.bounds]

    def grid(self, resolution: int) -> Tensor:
        """States in the middles of cells, the first coordinate running fastest."""
        second, first = torch.meshgrid(*reversed(self.middles(resolution)), indexing="ij")
        places = torch.stack([first, second], dim=-1).flatten(0, 1)
        return self.started(torch.logit(places) if self._probabilities else places)


def draw_exponents(axes: Any, plane: Plane, horizon: int, resolution: int) -> None:
    """The heat map, with a colour bar beside ``axes``."""
    with torch.no_grad():
        found = max_lyapunov_exponent(plane.step, plane.grid(resolution), num_steps=horizon).exponent
    image = found.detach().cpu().reshape(resolution, resolution)
    finite = image[image.isfinite()].abs()
    most = float(finite.max()) if len(finite) else 1.0
    (left, right), (low, high) = plane.bounds
    shown = axes.imshow(
        image.numpy(), origin="lower", extent=(left, right, low, high), cmap="PuOr_r", vmin=-most, vmax=most,
        interpolation="bilinear", alpha=0.65, aspect="auto",
    )  # fmt: skip
    bar = axes.figure.colorbar(shown, ax=axes, shrink=0.8, pad=0.02)
    bar.set_label(f"largest exponent over {horizon} steps; above 0 neighbours part", fontsize=9)
    bar.outline.set_visible(False)


def draw_steps(axes: Any, plane: Plane) -> None:
    """An arrow for the direction of the step at some places."""
    states = plane.grid(_ARROWS)
    with torch.no_grad():
        moves = (plane.place(plane.step(states).detach()) - plane.place(states)).cpu()
    spans = torch.tensor([most - least for least, most in plane.bounds], dtype=moves.dtype)
    moves = moves / spans
    moves = moves / moves.norm(dim=1, keepdim=True)  # NaN, of which nothing is drawn, where it stands still
    first, second = (middle.numpy() for middle in plane.middles(_ARROWS))
    along, up = (moves[:, i].reshape(_ARROWS, _ARROWS).numpy() for i in range(2))
    axes.quiver(first, second, along, up, color="0.35", alpha=0.5, scale=42, width=0.0025, headwidth=4, pivot="mid")


def draw_rides(axes: Any, plane: Plane, archive: Archive, looks: SolutionLooks, num_steps: int | None) -> None:
    """The way of each branch in the color of its solution, or grey, where there is room, and the star at its end."""
    if any(branch.solution is None for branch in archive.branches):
        marked(axes, "no solution", color=NOWHERE, lw=1.4)
    ways = [plane.place(path).cpu() for path in _paths(plane, archive, num_steps)]
    for i in _drawn(plane, archive, ways):
        (x, y), color = ways[i].T.numpy(), looks.color(archive.branches[i].solution)
        axes.plot(x, y, color="white", lw=2.6, alpha=0.7, zorder=3)
        axes.plot(x, y, color=color, lw=1.4, zorder=4)
    for branch in archive.branches:
        if branch.solution is not None and branch.end is not None:
            color = looks.color(branch.solution)
            _mark(axes, plane, branch.end, marker="*", ms=13, color=color, markeredgecolor="white", zorder=6)


def _drawn(plane: Plane, archive: Archive, ways: list[Tensor]) -> list[int]:
    """The branches whose ways are drawn: one for each solution, and others until one line hides the next."""
    extent = torch.tensor([most - least for least, most in plane.bounds], dtype=torch.float64)
    seen: set[int | None] = set()
    first: list[int] = []
    others: list[int] = []
    for i, branch in enumerate(archive.branches):
        (others if branch.solution in seen else first).append(i)
        seen.add(branch.solution)
    drawn, length = [], 0.0
    for i in (*first, *others):
        length += float((ways[i].diff(dim=0) / extent).norm(dim=1).sum())
        if i in first or length <= _LENGTH:
            drawn.append(i)
    return drawn


def draw_places(axes: Any, plane: Plane, archive: Archive) -> None:
    """Bifurcations, and the starts they were climbed to from."""
    assert archive.starts is not None
    marked(axes, "branching", ls="none", marker="D", ms=6.5, color="black", markeredgecolor="white")
    climbed = bare = False
    for place in archive.bifurcations:
        _mark(axes, plane, place.state, marker="D", ms=6.5, color="black", markeredgecolor="white", zorder=8)
        start = archive.starts[place.start]
        if place.parent is None and not torch.equal(start[:2], place.state[:2]):
            climbed = True
            line = plane.place(torch.stack([start[:2], place.state[:2]])).numpy()
            axes.plot(line[:, 0], line[:, 1], color="0.25", lw=0.9, ls=(0, (2, 2)), zorder=5)
            if not any(torch.equal(start[:2], other.state[:2]) for other in archive.bifurcations):
                bare = True  # a diamond would hide it
                _mark(axes, plane, start, marker="o", ms=6, color="white", markeredgecolor="black", zorder=7)
    if bare:
        marked(axes, "start", ls="none", marker="o", ms=6, color="white", markeredgecolor="black")
    if climbed:
        marked(axes, "climb (as the crow flies)", color="0.25", lw=0.9, ls=(0, (2, 2)))


def _mark(axes: Any, plane: Plane, state: Tensor, **look: Any) -> None:
    """A mark that is whole at the border of the picture, and not drawn beyond."""
    place = plane.place(state).tolist()
    if all(least <= value <= most for value, (least, most) in zip(place, plane.bounds, strict=True)):
        axes.plot(*place, ls="none", clip_on=False, **look)


def _paths(plane: Plane, archive: Archive, num_steps: int | None) -> list[Tensor]:
    """Parameters [points, 2] along every branch, from its bifurcation on."""
    branches = archive.branches
    if not branches:
        return []
    sources = [archive.bifurcations[branch.bifurcation].state[:2] for branch in branches]
    if archive.along_ridges:
        ends = [branch.begin if branch.end is None else branch.end for branch in branches]
        return [torch.stack([a, b[:2]]) for a, b in zip(sources, ends, strict=True)]
    state = plane.started(torch.stack([branch.begin for branch in branches]))
    steps = [branch.steps if num_steps is None else min(branch.steps, num_steps) for branch in branches]
    every = max(1, max(steps) // _POINTS)
    points, numbers = [torch.stack(sources), state[:, :2].cpu()], [0, 0]
    with torch.no_grad():
        for number in range(1, max(steps) + 1):
            state = plane.step(state).detach()
            if number % every == 0 or number < _FIRST or number in steps:
                points.append(state[:, :2].cpu())
                numbers.append(number)
    path = torch.stack(points, dim=1)
    return [own[: sum(number <= last for number in numbers)] for own, last in zip(path, steps, strict=True)]
