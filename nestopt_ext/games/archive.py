"""What a ride finds: bifurcations, the branches that leave them, and the solutions where these end."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import _checkpoint

_VERSION = 2
_Record = TypeVar("_Record")

#: The rank of a direction at its bifurcation, 0 for the leading one, and the side, +1 or -1; from the start on.
Fingerprint = tuple[tuple[int, int], ...]


class BranchStatus(enum.Enum):
    """How a branch ended, or a bifurcation was found; the value of each member is its message.

    >>> BranchStatus.lost.message
    'the ridge turned too far in one step to be followed; take shorter steps'
    """

    pending = "it has not been ridden to its end yet"
    completed = "all steps were taken"
    converged = "the steps became shorter than the tolerance"
    turned = "the curvature along the ridge is no longer negative"
    lost = "the ridge turned too far in one step to be followed; take shorter steps"
    diverged = "it left the bounds; take shorter steps"
    non_finite = "its states hold NaN or Inf"

    @property
    def message(self) -> str:
        """The same in words."""
        return self.value

    @property
    def failed(self) -> bool:
        """Whether there is no end to go on from."""
        return self in (BranchStatus.diverged, BranchStatus.non_finite)


@dataclass(frozen=True, eq=False)
class Bifurcation:
    """A point that branches leave: ``state`` [S], reached from row ``start`` of the starts.

    ``parent`` is the branch at whose end it was found, None for a start. ``values`` are the eigenvalues, or the
    exponents, of its directions in the order of their ranks. ``same_as`` is the bifurcation found before at the same
    place, whose branches are not ridden again; None for a new one. ``status`` says whether it is finite.
    """

    id: int
    start: int
    parent: int | None
    state: Tensor
    values: tuple[complex, ...]
    same_as: int | None
    status: BranchStatus


@dataclass(frozen=True, eq=False)
class Branch:
    """One way from ``bifurcation`` (its id): along ``sign`` times ``direction`` [S], a unit vector.

    ``rank`` is that of the direction, 0 leading; a complex pair has two, for both directions of its plane, and
    ``partner`` is the other one, None where there is none. ``value`` is
    the eigenvalue, or the exponent, of the direction and ``size`` the length of the first step. ``begin`` [S] is the
    state after it. Once ridden: ``end`` [S], the ``losses`` there, the number of ``steps`` and the length of the last
    one, ``moved``. ``solution`` is the id of the solution at its end, None where there is none. ``curvature`` holds
    bounds of the lowest eigenvalue there, where that tells it from a saddle: the same number twice where it is known.
    """

    id: int
    bifurcation: int
    start: int
    depth: int
    rank: int
    sign: int
    size: float
    value: complex
    direction: Tensor
    partner: Tensor | None
    begin: Tensor
    end: Tensor | None = None
    losses: tuple[float, ...] = ()
    steps: int = 0
    moved: float = 0.0
    status: BranchStatus = BranchStatus.pending
    solution: int | None = None
    curvature: tuple[float, float] | None = None


@dataclass(frozen=True, eq=False)
class Solution:
    """An end point unlike those found before: ``state`` [S] and its ``losses``.

    ``branches`` are the ids of all branches that ended there, the first of which gave the state. ``key`` [K] is what
    told it from others, ``fingerprint`` the way of the first branch, ``moved`` the length of its last step.
    """

    id: int
    state: Tensor
    losses: tuple[float, ...]
    key: Tensor
    moved: float
    fingerprint: Fingerprint
    branches: tuple[int, ...]


class Archive:
    """All that a :func:`~nestopt_ext.games.ridge_rider` has found, and where it is; it goes on from an archive.

    ``starts`` [B, S] are the states from where it set out, ``bifurcations``, ``branches`` and ``solutions`` lists of
    :class:`Bifurcation`, :class:`Branch` and :class:`Solution` in the order in which they were found, each record at
    the place of its id. Tensors are on the CPU. :func:`plot_ride_tree` draws it.

    An archive is whole after every step of a ride, so that it can be saved at any time.
    """

    def __init__(self) -> None:
        self.starts: Tensor | None = None
        self.bifurcations: list[Bifurcation] = []
        self.branches: list[Branch] = []
        self.solutions: list[Solution] = []
        self._pending: list[int] = []
        self._settings: dict[str, Any] = {}
        self._ride: dict[str, Any] | None = None  # the branches on their way, see _rides.Ride
        self._search: dict[str, Any] | None = None  # for bifurcations, see _rides.Search

    def __repr__(self) -> str:
        return (
            f"Archive({len(self.solutions)} solutions, {len(self.bifurcations)} bifurcations,"
            f" {len(self.branches)} branches of which {len(self.pending)} pending, {self.num_steps} steps)"
        )

    @property
    def pending(self) -> tuple[int, ...]:
        """The ids of branches not ridden to their end yet; none once the ride is complete."""
        riding = [] if self._ride is None else self._ride["ids"]
        return (*riding, *self._pending)

    @property
    def num_steps(self) -> int:
        """The steps taken, summed over branches, those on their way included."""
        riding = 0 if self._ride is None else int(self._ride["steps"].sum())
        return riding + sum(branch.steps for branch in self.branches)

    @property
    def complete(self) -> bool:
        """Whether there was a ride and nothing is left to be ridden."""
        return self.starts is not None and bool(self.bifurcations) and not self.pending

    @property
    def along_ridges(self) -> bool:
        """Whether branches were ridden along ridges, as :class:`EigenRidges` does, not by steps of a map."""
        return self._settings.get("method") == "EigenRidges"

    def path(self, branch: int) -> list[Branch]:
        """The branches from a start to the given one, which is the last."""
        way: list[Branch] = []
        found: int | None = branch
        while found is not None:
            way.append(self.branches[found])
            found = self.bifurcations[way[-1].bifurcation].parent
        return way[::-1]

    def fingerprint(self, branch: int) -> Fingerprint:
        """The rank and sign of each branch on the way to the given one, its own last."""
        return tuple((step.rank, step.sign) for step in self.path(branch))

    def children(self, bifurcation: int) -> list[Branch]:
        """The branches of a bifurcation, or of the one it is the same as."""
        same = self.bifurcations[bifurcation].same_as
        return [b for b in self.branches if b.bifurcation == (bifurcation if same is None else same)]

    def found_from(self, start: int) -> list[Solution]:
        """The solutions that one start leads to, through bifurcations that other starts share with it as well."""
        branches: dict[int, list[Branch]] = {}
        for branch in self.branches:
            branches.setdefault(branch.bifurcation, []).append(branch)
        ends: dict[int | None, list[Bifurcation]] = {}
        for bifurcation in self.bifurcations:
            ends.setdefault(bifurcation.parent, []).append(bifurcation)
        open_ = [b for b in ends.get(None, []) if b.start == start]
        seen: set[int] = set()
        solutions: set[int] = set()
        while open_:
            here = open_.pop()
            number = here.id if here.same_as is None else here.same_as
            if number in seen:
                continue
            seen.add(number)
            for branch in branches.get(number, []):
                if branch.solution is not None:
                    solutions.add(branch.solution)
                open_ += ends.get(branch.id, [])
        return [self.solutions[i] for i in sorted(solutions)]

    def table(self) -> str:
        """The solutions as text, with the number of branches that ended at each.

        The last step is the length of it, of the first of these branches, the curvature the lowest eigenvalue at its
        end, or bounds of it, if the method looks, and the fingerprint its way: rank and sign of each branch. Lines
        below count the branches that came to no solution and were not branched from, and say why.
        """
        rows = [["solution", "losses", "last step", "curvature", "branches", "fingerprint"]]
        for found in self.solutions:
            losses = " ".join(f"{loss:.4g}" for loss in found.losses)
            way = " ".join(f"{rank}{'+' if sign > 0 else '-'}" for rank, sign in found.fingerprint)
            curvature = _interval(self.branches[found.branches[0]].curvature)
            rows.append([str(found.id), losses, f"{found.moved:.1e}", curvature, str(len(found.branches)), way])
        if all(row[3] == "" for row in rows[1:]):
            rows = [[*row[:3], *row[4:]] for row in rows]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, *self._without_solution()])

    def _without_solution(self) -> list[str]:
        """Why there is no branch, or what became of those with neither a solution nor branches at their end."""
        if not self.branches:
            least = self._settings.get("min_curvature")
            what = "direction to branch along" if least is None else f"curvature below -{least:g}, so no ridge"
            return [f"no branches: no start has a {what}"] if self.bifurcations else ["nothing has been ridden yet"]
        branched = {bifurcation.parent for bifurcation in self.bifurcations}
        rest = [branch for branch in self.branches if branch.solution is None and branch.id not in branched]
        still = [b.curvature[1] for b in rest if b.curvature is not None]
        saddle = f"a saddle, curvature down to {min(still, default=math.nan):.2g}; raise max_depth or min_curvature"
        unsaid = (BranchStatus.pending, BranchStatus.lost)
        reasons = [b.status.message if b.status.failed or b.status in unsaid else saddle for b in rest]
        total = len(self.branches)
        return [
            f"{count} of {total} branches without a solution: {reason}" for reason, count in Counter(reasons).items()
        ]

    def save(self, path: str | PathLike[str]) -> None:
        """Writes everything to the file ``path`` at once: what was there stays whole until then.

        The file holds tensors and plain data only. Raises CheckpointError, a RuntimeError, where the disk refuses.
        """
        state = {
            "version": _VERSION,
            "starts": self.starts,
            "bifurcations": _columns(self.bifurcations),
            "branches": _columns(self.branches),
            "solutions": _columns(self.solutions),
            "pending": list(self._pending),
            "settings": dict(self._settings),
            "ride": self._ride,
            "search": self._search,
        }
        _checkpoint.save(Path(path), state)

    def _check(self) -> None:
        """Raises an error of any kind where the parts do not go together, as in a file that was tampered with."""
        for records in (self.bifurcations, self.branches, self.solutions):
            _require([record.id for record in records] == list(range(len(records))))
        places, ways, ends = (len(records) for records in (self.bifurcations, self.branches, self.solutions))
        states: list[Any] = [place.state for place in self.bifurcations]
        for place in self.bifurcations:
            _require(isinstance(place.status, BranchStatus) and _within(place.parent, ways))
            _require(_within(place.same_as, places))
        for branch in self.branches:
            _require(isinstance(branch.status, BranchStatus) and branch.bifurcation in range(places))
            _require(_within(branch.solution, ends) and isinstance(branch.depth + branch.steps, int))
            states += [branch.direction, branch.begin]
        for solution in self.solutions:
            _require(all(i in range(ways) for i in solution.branches) and isinstance(solution.key, Tensor))
            states.append(solution.state)
        _require(all(isinstance(state, Tensor) and state.dim() == 1 for state in states))
        _require(self.starts is None or self.starts.dim() == 2)
        _require(isinstance(self._pending, list) and isinstance(self._settings, dict))
        _require(self._search is None or isinstance(self._search["ids"], list))
        if self._ride is not None:
            rows = {name: value for name, value in self._ride.items() if name not in ("ids", "stage")}
            _require(rows.keys() >= {"state", "steps", "moved", "status"} and isinstance(self._ride["stage"], int))
            _require(all(isinstance(v, Tensor) and len(v) == len(self._ride["ids"]) for v in rows.values()))
        _require(all(i in range(ways) for i in self.pending))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Archive:
        """What :meth:`save` wrote; nothing in the file is executed.

        Raises CheckpointError, a RuntimeError, where it is missing, damaged or of another kind.
        """
        state = _checkpoint.load(Path(path), _VERSION)
        archive = cls()
        try:
            archive.starts = state["starts"]
            archive.bifurcations = [*_records(Bifurcation, state["bifurcations"])]
            archive.branches = [*_records(Branch, state["branches"])]
            archive.solutions = [*_records(Solution, state["solutions"])]
            archive._pending = state["pending"]
            archive._settings = state["settings"]
            archive._ride = state["ride"]
            archive._search = state["search"]
            archive._check()
        except Exception as error:  # a file that was tampered with may hold anything anywhere
            raise _checkpoint.CheckpointError(f"{path}: is not an archive of a ride: {error!r:.120}.") from error
        return archive


def _require(holds: bool) -> None:
    if not holds:
        raise ValueError("its parts do not go together")


def _within(number: int | None, count: int) -> bool:
    return number is None or number in range(count)


def _interval(bounds: tuple[float, float] | None) -> str:
    if bounds is None:
        return ""
    return f"{bounds[0]:.3g}" if bounds[0] == bounds[1] else f"{bounds[0]:.3g} to {bounds[1]:.3g}"


# ---- records as columns ---------------------------------------------------------------------------------------------


def _columns(records: Sequence[Any]) -> dict[str, Any]:
    """Records field by field, the tensors of one field as one; a file of thousands of small tensors is slow."""
    if not records:
        return {}
    return {f.name: _packed([getattr(r, f.name) for r in records]) for f in dataclasses.fields(records[0])}


def _packed(values: list[Any]) -> Any:
    rows = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
    if rows:
        return {"rows": rows, "values": torch.stack([values[i] for i in rows])}
    return [_plain(value) for value in values]


def _plain(value: Any) -> Any:
    if isinstance(value, BranchStatus):
        return {"status": value.name}
    if isinstance(value, complex):
        return {"complex": (value.real, value.imag)}
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


def _records(kind: type[_Record], columns: dict[str, Any]) -> Iterator[_Record]:
    if columns:
        names, count = list(columns), len(columns["id"])
        for values in zip(*[_unpacked(columns[name], count) for name in names], strict=True):
            yield kind(**dict(zip(names, values, strict=True)))


def _unpacked(column: Any, count: int) -> list[Any]:
    if isinstance(column, dict):
        values: list[Any] = [None] * count
        for i, value in zip(column["rows"], column["values"], strict=True):
            values[i] = value
        return values
    return [_rich(value) for value in column]


def _rich(value: Any) -> Any:
    if isinstance(value, dict):
        return BranchStatus[value["status"]] if "status" in value else complex(*value["complex"])
    return tuple(map(_rich, value)) if isinstance(value, tuple) else value
