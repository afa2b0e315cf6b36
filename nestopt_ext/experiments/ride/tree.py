"""The tree of a ride: places where it branched, their branches, and the solution at the end of each."""

from typing import Any

from ...games import Archive, Bifurcation, Branch
from .looks import NOTHING, colours_of_solutions
from .results import RideResult

#: Inches of a leaf.
_ROW = 0.19
#: Beyond so many leaves they are no longer labelled.
_LABELLED = 100


class _Layout:
    """Heights of bifurcations and branches, in rows from the top; parents lie in the middle of their children."""

    def __init__(self, archive: Archive) -> None:
        self.rows = 0
        self.bifurcations: dict[int, float] = {}
        self.branches: dict[int, float] = {}
        self.depths: dict[int, int] = {}
        self._children = {b.id: [c for c in archive.branches if c.bifurcation == b.id] for b in archive.bifurcations}
        self._onward: dict[int | None, list[Bifurcation]] = {}
        for bifurcation in archive.bifurcations:
            self._onward.setdefault(bifurcation.parent, []).append(bifurcation)
        for root in self._onward.get(None, []):
            self._visit(root, 0)
            self.rows += 1  # a gap between starts

    def goes_on(self, branch: Branch) -> bool:
        """Whether there are branches at its end."""
        return branch.id in self._onward

    def _visit(self, place: Bifurcation, depth: int) -> float:
        self.depths[place.id] = depth
        below = [self._ride(branch, depth) for branch in self._children[place.id]]
        self.bifurcations[place.id] = sum(below) / len(below) if below else self._row()
        return self.bifurcations[place.id]

    def _ride(self, branch: Branch, depth: int) -> float:
        below = [self._visit(place, depth + 1) for place in self._onward.get(branch.id, [])]
        self.branches[branch.id] = sum(below) / len(below) if below else self._row()
        return self.branches[branch.id]

    def _row(self) -> float:
        self.rows += 1
        return -float(self.rows)


def height(result: RideResult) -> float:
    """Inches that the tree wants."""
    return min(16.0, 1.6 + _ROW * max(10, _Layout(result.archive).rows))


def draw(axes: Any, result: RideResult) -> None:
    """Draws the tree into ``axes``: starts to the left, branches by rank, side and size, solutions by their colour."""
    archive, layout = result.archive, _Layout(result.archive)
    colour_of = colours_of_solutions(result)
    for branch in archive.branches:
        depth, here = layout.depths[branch.bifurcation], layout.bifurcations[branch.bifurcation]
        y, colour = layout.branches[branch.id], NOTHING if branch.solution is None else colour_of[branch.solution]
        goes_on = layout.goes_on(branch)
        end = depth + 1 if goes_on else depth + 0.9
        axes.plot([depth, depth + 0.25, end], [here, y, y], color=colour, lw=1.3, zorder=2)
        if branch.solution is not None or not goes_on:
            marker = "x" if branch.solution is None else "*"
            axes.plot(depth + 0.9, y, marker=marker, ms=8, color=colour, ls="none", zorder=4)
        if layout.rows <= _LABELLED:
            axes.text(depth + 0.27, y, _label(branch), fontsize=6.5, color="0.3", va="bottom")
    for place in archive.bifurcations:
        depth, y = layout.depths[place.id], layout.bifurcations[place.id]
        known = place.same_as is not None
        axes.plot(depth, y, marker="D", ms=6, color="white" if known else "black", markeredgecolor="black", zorder=5)
        if known:
            axes.text(depth + 0.06, y, f"where start {_root(archive, place)} branched", fontsize=7, va="center")
        if place.parent is None:
            axes.text(depth - 0.06, y, f"start {place.start}", fontsize=8, va="center", ha="right")
    axes.set(xlim=(-0.45, max(layout.depths.values(), default=0) + 1.0), ylim=(-layout.rows - 0.5, 0.5))
    axes.set_axis_off()


def _label(branch: Branch) -> str:
    """Which direction of its place a branch took, to which side, and how far."""
    return f"{'+' if branch.sign > 0 else '-'}{branch.size:g} d{branch.rank + 1}"


def _root(archive: Archive, place: Bifurcation) -> int:
    assert place.same_as is not None
    return archive.bifurcations[place.same_as].start
