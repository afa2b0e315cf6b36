"""Branches on their way, a batch of them as one tensor program, and what a method of riding has to offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .archive import Branch, BranchStatus

#: Plain data, so that it can be saved as it is: ``ids`` of the branches, ``stage``, and tensors with a row for each.
#: ``state`` [N, S], ``steps`` [N], ``moved`` [N], ``status`` [N] (a place in :data:`STATUSES`), and the method's own,
#: among them ``curvature`` [N, 2] where ends are told from saddles by that.
#: A step makes a new one and leaves the old as it was.
Ride: TypeAlias = dict[str, Any]

#: The search for bifurcations from some states, plain data too, and the method's own; see :meth:`Rider.search`.
Search: TypeAlias = dict[str, Any]

STATUSES = tuple(BranchStatus)
_CODES = {status: i for i, status in enumerate(STATUSES)}


@dataclass(frozen=True, eq=False)
class Direction:
    """A unit vector [S] to branch along, on both sides, its rank, and its eigenvalue or exponent.

    ``partner`` is the other direction of the plane of a complex pair.
    """

    rank: int
    vector: Tensor
    value: complex
    partner: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Expansion:
    """A bifurcation as a method found it: where, and which directions leave it."""

    state: Tensor
    values: tuple[complex, ...]
    directions: Sequence[Direction]
    status: BranchStatus = BranchStatus.completed


class Rider(ABC):
    """A method of riding on one problem; methods never modify what they are given."""

    #: Lengths of the first step of a branch.
    sizes: tuple[float, ...]
    #: Whether the search goes on from new solutions, or from ends that are none.
    from_solutions: bool
    #: By what solutions are told apart if the caller does not say.
    key: str
    #: Whether the ends of rides have losses.
    has_losses: bool = True
    #: Steps of one ride at most, for a progress bar.
    max_steps: int

    @abstractmethod
    def start(self, start: Any) -> Tensor:
        """The states [B, S] from where to set out."""

    @abstractmethod
    def expand(self, states: Tensor) -> list[Expansion]:
        """The bifurcation at each of the states [N, S]."""

    # A method that has to search for bifurcations does so step by step, so that it can be stopped.

    #: Steps of one search at most, for a progress bar.
    num_search_steps: int = 0

    def search(self, states: Tensor) -> Search:
        """The search from the states [N, S], not begun yet."""
        return {"states": states}

    def searched(self, search: Search) -> bool:
        """Whether the search has come to its end."""
        return True

    def search_on(self, search: Search) -> Search:
        """The search one step on."""
        return search

    def found(self, search: Search) -> list[list[Expansion]]:
        """The bifurcations that the search has found from each of its states."""
        return [[expansion] for expansion in self.expand(search["states"])]

    @abstractmethod
    def launch(self, branches: Sequence[Branch], origins: Tensor) -> Ride:
        """Branches ready to be ridden, from the states [N, S] of their bifurcations."""

    @abstractmethod
    def advance(self, ride: Ride) -> Ride:
        """All branches that are on their way one step on."""

    def next_stage(self, ride: Ride) -> Ride | None:
        """What remains to be done when no branch is on its way any more; None for nothing."""
        return None

    @abstractmethod
    def solved(self, ride: Ride) -> Tensor:
        """Which branches have ended at a solution, [N]."""

    @abstractmethod
    def losses(self, states: Tensor) -> Tensor:
        """The losses of all players [N, n] at states in which rides end; n = 0 where they are not known."""

    @abstractmethod
    def parameters(self, states: Tensor) -> Tensor:
        """States in which rides end, [N, P], without what is no parameter."""

    @abstractmethod
    def returned(self, states: Tensor) -> Tensor:
        """States in which rides end as states to expand."""


def new_ride(branches: Sequence[Branch], state: Tensor, **own: Tensor) -> Ride:
    """Branches that have not made a step."""
    count = len(branches)
    return {
        "ids": [branch.id for branch in branches],
        "stage": 0,
        "state": state,
        "steps": torch.zeros(count, dtype=torch.int64, device=state.device),
        "moved": state.new_zeros(count),
        "status": torch.zeros(count, dtype=torch.int64, device=state.device),
        **own,
    }


def on_their_way(ride: Ride) -> Tensor:
    """The rows of branches that have not ended, [n]."""
    status: Tensor = ride["status"]
    return (status == _CODES[BranchStatus.pending]).nonzero().squeeze(1)


def has(ride: Ride, *statuses: BranchStatus) -> Tensor:
    """Which branches have one of the statuses, [N]."""
    codes = torch.tensor([_CODES[status] for status in statuses], device=ride["status"].device)
    return torch.isin(ride["status"], codes)


def sent_on(ride: Ride, rows: Tensor) -> Ride:
    """The ride with some of its branches, a mask [N], on their way again."""
    return {**ride, "status": torch.where(rows, _CODES[BranchStatus.pending], ride["status"])}


def moved_on(
    ride: Ride,
    rows: Tensor,
    state: Tensor,
    *,
    divergence: float,
    ended: dict[BranchStatus, Tensor],
    finite: Tensor | None = None,
    **own: Tensor,
) -> Ride:
    """The ride after a step that took ``rows`` to ``state`` [n, S].

    ``ended`` says which of the rows [n] have ended and how, the first to be true counts; rows that are not finite, or
    not ``finite`` in what else was computed, or have left the bounds, have ended before all of these. ``own`` are the
    method's own tensors for the rows.
    """
    peak = state.abs().amax(dim=1)
    whole = state.isfinite().all(dim=1)
    whole = whole if finite is None else whole & finite
    ended = {BranchStatus.non_finite: ~whole, BranchStatus.diverged: peak > divergence, **ended}
    code = torch.zeros_like(ride["status"][rows])
    for status, mask in reversed(ended.items()):
        code = torch.where(mask, _CODES[status], code)
    moved = (state - ride["state"][rows]).norm(dim=1)
    parts = {"state": state, "steps": ride["steps"][rows] + 1, "moved": moved, "status": code, **own}
    return {**ride, **{name: ride[name].index_copy(0, rows, part) for name, part in parts.items()}}
