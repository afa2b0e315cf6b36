"""Pictures of a ride: the tree of its branches, and a plane with exponents as a heat map and the ways through it."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

from .. import _lists
from ._linearized import Step, check_step
from ._phase_portrait import Plane, draw_exponents, draw_places, draw_rides, draw_steps
from ._ride_looks import SolutionLooks, new_figure, save_with_legend
from ._ride_tree import draw_tree, tree_height
from .archive import Archive
from .spectrum import _check_count


def plot_ride_tree(
    archive: Archive,
    path: str | PathLike[str] | None = None,
    *,
    axes: Any = None,
    labels: Sequence[str] | None = None,
    colors: Sequence[Any] | None = None,
    title: str = "",
) -> None:
    """Draws the tree of an archive, into the PNG ``path``, which is replaced atomically, or into ``axes``.

    From left to right: starts, bifurcations (diamonds) and the branches that leave them, called by side, length of the
    first step and rank of the direction (``+0.5 d0``), in the color of the solution (star) where they end. Grey ends at
    no solution, dotted where it failed, dashed where it is pending. An open diamond is the same place as another one,
    whose branches are drawn there. Beyond 100 rows nothing is named but in the legend.

    Args:
        archive: of a :func:`ridge_rider`.
        path: the file; None for ``axes``.
        axes: Matplotlib axes to draw into, in place of a file; ``axes.legend()`` has the entries.
        labels: what each solution is called; None for its number and losses.
        colors: the color of each solution, any that Matplotlib knows; None for a palette of seven, and grey.
        title: what stands above.

    Raises TypeError for what is no archive, ValueError for an empty one and other bad arguments, and ImportError
    without Matplotlib.
    """
    caller = "plot_ride_tree"
    _check_archive(caller, archive)
    _check_target(caller, path, axes)
    looks = SolutionLooks(caller, archive, labels, colors)
    if path is None:
        draw_tree(axes, archive, looks)
        axes.set_title(title)
        return
    figure = new_figure(caller, 7.5, tree_height(archive), title)
    drawn = figure.subplots()
    draw_tree(drawn, archive, looks)
    save_with_legend(figure, drawn, path, 5)


def plot_phase_portrait(
    step: Step,
    path: str | PathLike[str] | None = None,
    *,
    axes: Any = None,
    bounds: Sequence[tuple[float, float]] | None = None,
    probabilities: bool = False,
    archive: Archive | None = None,
    horizon: int = 10,
    resolution: int = 41,
    num_steps: int | None = None,
    names: tuple[str, str] | None = None,
    labels: Sequence[str] | None = None,
    colors: Sequence[Any] | None = None,
    title: str = "",
) -> None:
    """Draws a map of the plane, into the PNG ``path``, which is replaced atomically, or into ``axes``: its largest
    exponents as a heat map and the directions of its steps as arrows.

    Args:
        step: an :class:`OptimizerMap` of two parameters, whose buffers are zero in the picture, or a differentiable
            function from [B, 2] to [B, 2], which is called on the CPU, in the dtype of the archive or in float64.
        path: the file; None for ``axes``.
        axes: Matplotlib axes to draw into, in place of a file; ``axes.legend()`` has the entries.
        bounds: the smallest and the largest value drawn of each of the two. None is (0, 1) for probabilities.
        probabilities: draws sigmoid(w) in place of w, for games of two logits.
        archive: its bifurcations (diamonds) and the starts they were found from, the ways that ``step`` takes from the
            first step of each branch in the color of the solution that the ride found, or grey, and the solutions
            (stars). Where there are more ways than can be told apart, one to each solution is drawn and others as there
            is room. Rides along ridges are no steps of a map, and are drawn straight from begin to end.
        horizon: the steps over which exponents are taken, as for :func:`max_lyapunov_exponent`.
        resolution: cells along each side, all of which are one tensor program.
        num_steps: the most steps drawn of each way; None for all that the ride took.
        names: what the axes are called.
        labels: what each solution is called; None for its number and losses.
        colors: the color of each solution, any that Matplotlib knows; None for a palette of seven, and grey.
        title: what stands above.

    Raises TypeError or ValueError for bad arguments, and ImportError without Matplotlib.
    """
    caller = "plot_phase_portrait"
    check_step(caller, step)
    _check_target(caller, path, axes)
    for name, value, least in (("horizon", horizon, 1), ("resolution", resolution, 2)):
        _check_count(caller, name, value, least)
    if num_steps is not None:
        _check_count(caller, "num_steps", num_steps, 1)
    looks, dtype = None, None
    if archive is not None:
        _check_archive(caller, archive)
        dtype = archive.bifurcations[0].state.dtype
        looks = SolutionLooks(caller, archive, labels, colors)
    plane = Plane(caller, step, bounds, probabilities=probabilities, dtype=dtype)
    figure = None if path is None else new_figure(caller, 7.5, 6.4, title)
    drawn = axes if figure is None else figure.subplots()
    draw_exponents(drawn, plane, horizon, resolution)
    draw_steps(drawn, plane)
    if archive is not None and looks is not None:
        draw_places(drawn, plane, archive)
        draw_rides(drawn, plane, archive, looks, num_steps)
        looks.explain(drawn)
    first, second = names or (("$p_1$", "$p_2$") if probabilities else ("$w_1$", "$w_2$"))
    drawn.set(xlim=plane.bounds[0], ylim=plane.bounds[1], xlabel=first, ylabel=second)
    if figure is None or path is None:
        drawn.set_title(title, fontsize=10)
    else:
        save_with_legend(figure, drawn, path, 4)


def _check_archive(caller: str, archive: object) -> None:
    if not isinstance(archive, Archive):
        raise TypeError(f"{caller}: archive must be an Archive; got {_lists.value_name(archive)}.")
    if not archive.bifurcations:
        raise ValueError(f"{caller}: archive must hold at least one bifurcation; got none. Call ridge_rider first.")


def _check_target(caller: str, path: object, axes: object) -> None:
    if (path is None) == (axes is None):
        got = "neither" if axes is None else "both"
        raise ValueError(f"{caller}: path must be given, or axes to draw into; got {got}.")
