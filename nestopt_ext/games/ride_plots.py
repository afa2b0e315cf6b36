"""Pictures of a ride: the tree of its branches, and a plane with exponents as a heat map and the ways through it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _lists
from .._checkpoint import write_atomically
from ..optim._arguments import check_real
from ._linearized import Step, check_step
from .archive import Archive, BranchStatus
from .lyapunov import max_lyapunov_exponent
from .maps import OptimizerMap
from .spectrum import _check_count

_PALETTE = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive")
_NOWHERE = "0.65"

_Place = tuple[int, float]


def plot_ride_tree(archive: Archive, path: str | PathLike[str], *, title: str = "") -> None:
    """Draws the tree of an archive into the PNG ``path``, which is replaced atomically.

    From left to right: starts, bifurcations (dots) and the branches that leave them, in the color of the solution where
    they end, which stands beside its last branch; grey ends at no solution, dotted where it failed, dashed where it is
    pending. A dot that is open is the same as another one, whose branches are drawn there.

    Raises TypeError for what is no archive, ValueError for an empty one, and ImportError without Matplotlib.
    """
    caller = "plot_ride_tree"
    _check_archive(caller, archive)
    bifurcations, rows = _layout(archive)
    figure = _figure(caller, 8, min(30.0, max(3.0, 0.22 * len(rows))), title)
    axes = figure.add_subplot()
    for branch in archive.branches:
        depth, height = bifurcations[branch.bifurcation]
        end = (depth + 1, rows[branch.id])
        line = "--" if branch.status is BranchStatus.pending else ":" if branch.status.failed else "-"
        axes.plot([depth, end[0]], [height, end[1]], line, color=_color(branch.solution), lw=1.2, zorder=1)
        sign = "+" if branch.sign > 0 else "\N{MINUS SIGN}"
        if len(rows) <= 200:
            axes.annotate(f"{branch.rank}{sign}", ((depth + end[0]) / 2, (height + end[1]) / 2), fontsize=6)
        if branch.solution is not None:
            losses = ", ".join(f"{loss:.3g}" for loss in archive.solutions[branch.solution].losses)
            axes.plot(*end, "s", color=_color(branch.solution), ms=4)
            axes.annotate(f"  {branch.solution}: {losses}", end, fontsize=7, va="center")
    for bifurcation in archive.bifurcations:
        face = "white" if bifurcation.same_as is not None else "black"
        axes.plot(*bifurcations[bifurcation.id], "o", color="black", mfc=face, ms=5, zorder=2)
    deepest = max([depth for depth, _ in bifurcations.values()]) + 1
    axes.set_xticks(range(deepest + 1), ["start", *map(str, range(1, deepest + 1))])
    axes.set_xlabel("branches from the start")
    axes.set_xlim(-0.2, deepest + 0.6)
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)
    _save(figure, path)


def plot_phase_portrait(
    step: Step,
    path: str | PathLike[str],
    *,
    bounds: Sequence[tuple[float, float]],
    archive: Archive | None = None,
    horizon: int = 10,
    resolution: int = 41,
    num_steps: int = 200,
    names: tuple[str, str] = ("$w_1$", "$w_2$"),
    title: str = "",
) -> None:
    """Draws a map of the plane into the PNG ``path``: its largest exponents as a heat map and its steps as arrows.

    Args:
        step: an :class:`OptimizerMap` of two parameters, whose buffers are zero in the picture, or a differentiable
            function from [B, 2] to [B, 2].
        path: the file, replaced atomically.
        bounds: the smallest and the largest value drawn of each of the two.
        archive: its bifurcations (stars), the ways that ``step`` takes from the first step of each branch, in the color
            of the solution that the ride found, and the solutions (squares), as far as they are within the bounds.
        horizon: the steps over which exponents are taken, as for :func:`max_lyapunov_exponent`.
        resolution: points along each side, all of which are one tensor program.
        num_steps: steps drawn of each way.
        names: what the axes are called.
        title: what stands above.

    Raises TypeError or ValueError for bad arguments, and ImportError without Matplotlib.
    """
    caller = "plot_phase_portrait"
    check_step(caller, step)
    if archive is not None:
        _check_archive(caller, archive)
    for name, value, least in (("horizon", horizon, 1), ("resolution", resolution, 2), ("num_steps", num_steps, 1)):
        _check_count(caller, name, value, least)
    plane = _Plane(caller, step, bounds, resolution)
    figure = _figure(caller, 7, 5.6, title)
    axes = figure.add_subplot()
    exponents = max_lyapunov_exponent(step, plane.states, num_steps=horizon).exponent.detach().cpu()
    limit = float(exponents[exponents.isfinite()].abs().max()) if bool(exponents.isfinite().any()) else 1.0
    heat = axes.pcolormesh(
        *plane.edges, plane.square(exponents), cmap="RdBu_r", vmin=-limit, vmax=limit, shading="auto"
    )
    figure.colorbar(heat, ax=axes, label=f"largest exponent over {horizon} steps")
    _arrows(axes, step, plane)
    if archive is not None:
        _ways(axes, step, plane, archive, num_steps)
    axes.set_xlim(*bounds[0])
    axes.set_ylim(*bounds[1])
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])
    _save(figure, path)


# ---- the tree -------------------------------------------------------------------------------------------------------


def _layout(archive: Archive) -> tuple[dict[int, _Place], dict[int, float]]:
    """Where each bifurcation is, and the height at which each branch ends; none of two branches ends at one height."""
    leaving: dict[int, list[int]] = {}
    for branch in archive.branches:
        leaving.setdefault(branch.bifurcation, []).append(branch.id)
    ends: dict[int | None, list[int]] = {}
    for bifurcation in archive.bifurcations:
        ends.setdefault(bifurcation.parent, []).append(bifurcation.id)
    heights: dict[int, float] = {}
    rows: dict[int, float] = {}
    free = 0
    # children first, by a stack, since a tree may be deeper than calls may
    open_: list[tuple[str, int]] = [("place", number) for number in reversed(ends.get(None, []))]
    while open_:
        what, number = open_.pop()
        if what == "place":
            branches = leaving.get(number, [])
            open_.append(("placed", number))
            for branch_id in reversed(branches):
                open_.append(("end", branch_id))
                open_ += [("place", child) for child in reversed(ends.get(branch_id, []))]
        elif what == "end":
            below = [heights[child] for child in ends.get(number, [])]
            rows[number] = below[0] if below else float(-free)
            free += 0 if below else 1
        else:
            below = [rows[branch_id] for branch_id in leaving.get(number, [])]
            heights[number] = sum(below) / len(below) if below else float(-free)
            free += 0 if below else 1
    depths = {b.id: 0 if b.parent is None else archive.branches[b.parent].depth for b in archive.bifurcations}
    return {number: (depths[number], height) for number, height in heights.items()}, rows


def _color(solution: int | None) -> str:
    return _NOWHERE if solution is None else _PALETTE[solution % len(_PALETTE)]


# ---- the plane ------------------------------------------------------------------------------------------------------


class _Plane:
    """A grid of states."""

    def __init__(self, caller: str, step: Step, bounds: Any, resolution: int) -> None:
        if not isinstance(bounds, tuple | list) or len(bounds) != 2 or any(len(pair) != 2 for pair in bounds):
            raise ValueError(f"{caller}: bounds must be two pairs, the least and the most of each; got {bounds!r:.80}.")
        for i, (least, most) in enumerate(bounds):
            check_real(caller, f"bounds[{i}][0]", least)
            check_real(caller, f"bounds[{i}][1]", most)
            if least >= most:
                raise ValueError(f"{caller}: bounds[{i}] must be a smaller and a larger number; got {bounds[i]!r}.")
        if isinstance(step, OptimizerMap) and step.num_parameters != 2:
            raise ValueError(f"{caller}: step must have 2 parameters; got {step.num_parameters}.")
        self.resolution = resolution
        self.edges = [torch.linspace(least, most, resolution, dtype=torch.float64) for least, most in bounds]
        self.states = _started(step, torch.cartesian_prod(*self.edges))

    def square(self, values: Tensor) -> Any:
        """Values of the states as rows of the picture."""
        return values.reshape(self.resolution, self.resolution).T.numpy()


def _started(step: Step, parameters: Tensor) -> Tensor:
    """States with the given parameters [N, 2]."""
    return step.start(parameters) if isinstance(step, OptimizerMap) else parameters


def _arrows(axes: Any, step: Step, plane: _Plane) -> None:
    every = max(1, plane.resolution // 16)
    with torch.no_grad():
        moves = (step(plane.states) - plane.states)[:, :2].cpu()
    moves = moves / moves.norm(dim=1, keepdim=True)
    x, y = (edge[::every].numpy() for edge in plane.edges)
    along, up = (plane.square(moves[:, i])[::every, ::every] for i in range(2))
    axes.quiver(x, y, along, up, color="0.25", alpha=0.6, scale=40, width=0.003)


def _ways(axes: Any, step: Step, plane: _Plane, archive: Archive, num_steps: int) -> None:
    if archive.branches:
        begins = torch.stack([branch.begin for branch in archive.branches])[:, :2]
        state = _started(step, begins)
        ways = [state]
        with torch.no_grad():
            for _ in range(num_steps):
                state = step(state)
                ways.append(state)
        paths = torch.stack(ways)[:, :, :2].cpu().numpy()
        for i, branch in enumerate(archive.branches):
            axes.plot(paths[:, i, 0], paths[:, i, 1], color=_color(branch.solution), lw=1.2)
    for bifurcation in archive.bifurcations:
        axes.plot(*bifurcation.state[:2].tolist(), "*", color="gold", mec="black", ms=12)
    for solution in archive.solutions:
        axes.plot(*solution.state[:2].tolist(), "s", color=_color(solution.id), mec="black", ms=8)


# ---- figures --------------------------------------------------------------------------------------------------------


def _check_archive(caller: str, archive: object) -> None:
    if not isinstance(archive, Archive):
        raise TypeError(f"{caller}: archive must be an Archive; got {_lists.value_name(archive)}.")
    if not archive.bifurcations:
        raise ValueError(f"{caller}: archive must hold at least one bifurcation; got none. Call ridge_rider first.")


def _figure(caller: str, width: float, height: float, title: str) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{caller}: needs Matplotlib; there is none. Run `pip install matplotlib`.") from error
    figure = Figure(figsize=(width, height), dpi=120)
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    return figure


def _save(figure: Any, path: str | PathLike[str]) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(Path(path), buffer.getvalue())
