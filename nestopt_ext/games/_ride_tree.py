"""The drawing of a tree of branches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ._ride_looks import NOWHERE, SolutionLooks, marked
from .archive import Archive, Bifurcation, Branch, BranchStatus

#: Beyond so many rows, branches and solutions are no longer named.
_NAMED = 100
#: Inches of a row with names and without, and of what is above and below them.
_ROW, _BARE_ROW, _REST = 0.19, 0.08, 1.6
_HIGHEST = 30.0
#: Where between two depths a branch comes to its row, and where it ends.
_BEND, _END = 0.25, 0.9


class _Layout:
    """Rows of bifurcations and branches, from the top; what leads to several lies in the middle of them."""

    def __init__(self, archive: Archive) -> None:
        self.num_rows = 0
        self.bifurcations: dict[int, float] = {}
        self.branches: dict[int, float] = {}
        self._leaving: dict[int, list[Branch]] = {}
        self._reached: dict[int | None, list[Bifurcation]] = {}
        for branch in archive.branches:
            self._leaving.setdefault(branch.bifurcation, []).append(branch)
        for place in archive.bifurcations:
            self._reached.setdefault(place.parent, []).append(place)
        order = self._in_order()
        for node in order:
            if isinstance(node, Bifurcation) and node.parent is None and self.num_rows:
                self.num_rows += 1  # a gap between starts
            if not self._behind(node):
                self.num_rows += 1
                self._rows_like(node)[node.id] = -float(self.num_rows)
        for node in reversed(order):
            if behind := self._behind(node):
                rows = [self._rows_like(child)[child.id] for child in behind]
                self._rows_like(node)[node.id] = sum(rows) / len(rows)

    def goes_on(self, branch: Branch) -> bool:
        """Whether there is a bifurcation at its end."""
        return branch.id in self._reached

    def _in_order(self) -> list[Bifurcation | Branch]:
        """Everything before what is behind it, by a stack, since a tree may be deeper than calls may."""
        order: list[Bifurcation | Branch] = []
        open_: list[Bifurcation | Branch] = [*reversed(self._reached.get(None, []))]
        while open_:
            order.append(open_.pop())
            open_ += reversed(self._behind(order[-1]))
        return order

    def _behind(self, node: Bifurcation | Branch) -> Sequence[Bifurcation | Branch]:
        if isinstance(node, Branch):
            return self._reached.get(node.id, [])
        return self._leaving.get(node.id, [])

    def _rows_like(self, node: Bifurcation | Branch) -> dict[int, float]:
        return self.branches if isinstance(node, Branch) else self.bifurcations


def tree_height(archive: Archive) -> float:
    """Inches that the tree wants."""
    rows = _Layout(archive).num_rows
    return min(_HIGHEST, _REST + (_ROW if rows <= _NAMED else _BARE_ROW) * max(8, rows))


def draw_tree(axes: Any, archive: Archive, looks: SolutionLooks) -> None:
    """Starts to the left, branches by rank, side and size, solutions by color and name."""
    layout = _Layout(archive)
    named = layout.num_rows <= _NAMED
    depths = {b.id: 0 if b.parent is None else archive.branches[b.parent].depth for b in archive.bifurcations}
    for branch in archive.branches:
        depth, here = depths[branch.bifurcation], layout.bifurcations[branch.bifurcation]
        row, color = layout.branches[branch.id], looks.color(branch.solution)
        goes_on = layout.goes_on(branch)
        line = "--" if branch.status is BranchStatus.pending else ":" if branch.status.failed else "-"
        end = depth + (1 if goes_on else _END)
        axes.plot([depth, depth + _BEND, end], [here, row, row], line, color=color, lw=1.3, zorder=2)
        if branch.solution is not None:
            axes.plot(depth + _END, row, marker="*", ms=8, color=color, ls="none", zorder=4)
        elif not goes_on and branch.status is not BranchStatus.pending:
            axes.plot(depth + _END, row, marker="x", ms=6, color=NOWHERE, ls="none", zorder=4)
        if named:
            axes.text(depth + _BEND + 0.02, row, _step(branch), fontsize=6.5, color="0.3", va="bottom")
        if named and branch.solution is not None and not goes_on:
            axes.text(depth + _END + 0.03, row, looks.labels[branch.solution], fontsize=7, va="center", color="0.25")
    for place in archive.bifurcations:
        _place(axes, archive, place, depths[place.id], layout.bifurcations[place.id])
    axes.set(xlim=(-0.3, max(depths.values()) + 1.25), ylim=(-layout.num_rows - 0.7, -0.3))
    axes.set_axis_off()
    _explain(axes, archive, layout)
    looks.explain(axes)


def _step(branch: Branch) -> str:
    """Which direction of its place a branch took, to which side, and how far."""
    side = "+" if branch.sign > 0 else "\N{MINUS SIGN}"
    return f"{side}{branch.size:g} d{branch.rank}"


def _place(axes: Any, archive: Archive, place: Bifurcation, depth: int, row: float) -> None:
    face = "black" if place.same_as is None else "white"
    marker = "x" if place.status.failed else "D"
    axes.plot(depth, row, marker=marker, ms=6, color=face, markeredgecolor="black", ls="none", zorder=5)
    if place.status.failed or place.same_as is not None:
        note = "failed" if place.same_as is None else f"as {_way(archive, archive.bifurcations[place.same_as])}"
        axes.text(depth + 0.05, row, note, fontsize=7, va="center")
    if place.parent is None:
        axes.text(depth - 0.05, row, _root(archive, place), fontsize=8, va="center", ha="right")


def _way(archive: Archive, place: Bifurcation) -> str:
    """From which start, and along which directions, a bifurcation was reached."""
    if place.parent is None:
        return _root(archive, place)
    steps = archive.path(place.parent)
    return ", ".join([_root(archive, archive.bifurcations[steps[0].bifurcation]), *map(_step, steps)])


def _root(archive: Archive, place: Bifurcation) -> str:
    """A start, or where the climb from there ended."""
    assert archive.starts is not None
    stayed = torch.equal(place.state, archive.starts[place.start])
    return f"start {place.start}" if stayed else f"climb from {place.start}"


def _explain(axes: Any, archive: Archive, layout: _Layout) -> None:
    """What of the marks is drawn."""
    ends = [b for b in archive.branches if b.solution is None and not layout.goes_on(b)]
    pending = any(b.status is BranchStatus.pending for b in ends)
    marked(axes, "branching", ls="none", marker="D", ms=6, color="black")
    if any(place.same_as is not None for place in archive.bifurcations):
        marked(axes, "branched at before", ls="none", marker="D", ms=6, color="white", markeredgecolor="black")
    if pending:
        marked(axes, "not ridden yet", color=NOWHERE, lw=1.3, ls="--")
    if any(b.status.failed for b in ends):
        marked(axes, "failed", color=NOWHERE, lw=1.3, ls=":", marker="x", ms=6)
    if any(b.status is not BranchStatus.pending and not b.status.failed for b in ends):
        marked(axes, "no solution", color=NOWHERE, lw=1.3, marker="x", ms=6)
