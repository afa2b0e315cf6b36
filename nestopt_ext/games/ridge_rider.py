"""Ridge Rider: a tree of branches from a few starts that finds many solutions of a game or a loss, not one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from .. import _lists
from .._progress import ProgressBar
from ..optim._arguments import check_real
from ._eigen_rider import EigenRider, LossGame
from ._lyapunov_rider import LyapunovRider
from ._nearest import Nearest
from ._rides import STATUSES, Expansion, Ride, Rider, on_their_way
from ._sweep import check_flag
from .archive import Archive, Bifurcation, Branch, Solution
from .eigen_ridges import EigenRidges
from .lyapunov_branches import LyapunovBranches
from .maps import OptimizerMap
from .spectrum import _check_count

#: What tells solutions apart: their losses, their parameters, or what a function makes of states [N, S]: [N] or [N, K].
Key: TypeAlias = Literal["losses", "parameters"] | Callable[[Tensor], Tensor]


def ridge_rider(
    problem: Any,
    start: Any,
    method: EigenRidges | LyapunovBranches,
    *,
    losses: Callable[[Tensor], Any] | None = None,
    order: Literal["breadth", "depth"] = "breadth",
    batch_size: int | None = None,
    key: Key | None = None,
    distance: float = 0.05,
    bifurcation_distance: float = 1e-3,
    max_depth: int | None = None,
    max_branches: int | None = 1000,
    max_steps: int | None = None,
    divergence: float = 1e6,
    archive: Archive | None = None,
    on_batch: Callable[[Archive], Any] | None = None,
    should_stop: Callable[[], bool] | None = None,
    progress: bool = False,
) -> Archive:
    r"""Finds many solutions by branching where a small displacement decides which one is reached.

    Args:
        problem: what the method rides on. For :class:`EigenRidges` a loss, from parameters [B, P] to losses [B], or a
            :class:`Game`, of networks too. For :class:`LyapunovBranches` an :class:`OptimizerMap`, or any
            differentiable function from states [B, S] to states, row by row.
        start: states [B, S], B starts that are one tensor program; or (S,) for one. For a game or an optimizer map also
            parameters [B, P], players in the structure of the game's, or None for where these are.
        method: how to find bifurcations and to ride: :class:`EigenRidges` for Ridge Rider, :class:`LyapunovBranches`
            for its generalized form.
        losses: for a map that is not an optimizer's: from states [N, S] to losses [N] or [N, n].
        order: "breadth" rides branches in the order in which they were found, "depth" the last ones first.
        batch_size: branches ridden at once, as one tensor program. None is all that are known for "breadth", a whole
            generation, and one for "depth".
        key: what tells solutions apart, "losses", "parameters" or a function of states to [N] or [N, K]. None is by
            losses for :class:`LyapunovBranches`, whose solutions may lie at infinity, where the map has any: minima of
            equal loss are one then. Else by parameters.
        distance: solutions whose keys are at most this far apart are one, a Euclidean norm.
        bifurcation_distance: the same for the states of bifurcations.
        max_depth: the most branches one after the other from a start. None for no bound: as long as the search finds
            something new.
        max_branches: the most branches to ride, None for no bound.
        max_steps: the most steps to take, summed over branches; None for no bound.
        divergence: a branch has failed when an element of its state is larger than this in magnitude. NaN and Inf are
            always a failure, recorded as its status.
        archive: one to go on with, which is modified: it takes up where it was left, in the middle of a ride too, and
            comes to the same numbers as if it had not been interrupted. Raise a limit to ride more. None for a new one.
        on_batch: called with the archive after each batch of branches, for example to save it.
        should_stop: asked before every step of a ride, and of an ascent that leads to bifurcations; True ends it there.
            The archive is whole then and may be saved.
        progress: shows a bar where stderr is a terminal.

    Returns the :class:`Archive`; ``archive.complete`` says whether anything is left to be ridden. ``problem`` is not
    modified. What the problem or a callback raises, and KeyboardInterrupt, passes through; an archive that was given is
    whole then as well.

    Raises TypeError or ValueError for bad arguments, and where the archive comes from other ones.

    Source: Parker-Holder et al., Ridge Rider: finding diverse solutions by following eigenvectors of the Hessian
    (2020), and Lorraine et al., Lyapunov exponents for diversity in differentiable games (2022); that solutions are
    told apart by a key, and bifurcations by their place, is ours.

    All minima of a loss with a saddle at 0, and both solutions of a game from one start:

    >>> def loss(w):
    ...     return (w**4 / 4 - w**2 / 2).sum(dim=1)
    >>> method = EigenRidges(step=0.05, finish=0.3, repeated="all")
    >>> found = ridge_rider(loss, torch.zeros(2, dtype=torch.float64), method)
    >>> sorted([round(x) for x in solution.state.tolist()] for solution in found.solutions)
    [[-1, -1], [-1, 1], [1, -1], [1, 1]]

    >>> from nestopt_ext.games import sgd_map, small_ipd
    >>> step = sgd_map(small_ipd(), lr=5.0)
    >>> method = LyapunovBranches(max_steps=100, ascent_steps=20)
    >>> found = ridge_rider(step, torch.tensor([0.5, 0.5]), method, max_depth=1)
    >>> [[round(loss, 1) for loss in solution.losses] for solution in found.solutions]
    [[1.0, 1.0], [2.0, 2.0]]
    """
    caller = "ridge_rider"
    check_real(caller, "divergence", divergence)
    if divergence <= 0:
        raise ValueError(f"{caller}: divergence must be > 0; got {divergence}.")
    if archive is not None and not isinstance(archive, Archive):
        raise TypeError(f"{caller}: archive must be None or an Archive; got {_lists.value_name(archive)}.")
    archive = Archive() if archive is None else archive
    rider = _rider(caller, problem, archive.starts if start is None else start, method, losses, divergence)
    search = _Search(caller, rider, archive)
    search.set_order(order, batch_size)
    search.set_key(key, distance, bifurcation_distance)
    search.set_limits(max_depth, max_branches, max_steps)
    search.set_calls(on_batch, should_stop, progress)
    search.set_out(start, _settings(method))
    search.run()
    return archive


def _rider(caller: str, problem: Any, start: Any, method: Any, losses: Any, divergence: float) -> Rider:
    if losses is not None and not callable(losses):
        raise TypeError(f"{caller}: losses must be None or callable; got {_lists.value_name(losses)}.")
    if isinstance(method, LyapunovBranches):
        if losses is not None and isinstance(problem, OptimizerMap):
            raise ValueError(f"{caller}: losses must be None for an optimizer map, which has its own; got a function.")
        return LyapunovRider(caller, problem, method, losses, divergence)
    if isinstance(method, EigenRidges):
        if losses is not None:
            raise ValueError(f"{caller}: losses must be None with EigenRidges, whose problem has them; got a function.")
        if isinstance(problem, OptimizerMap):
            raise TypeError(f"{caller}: problem must be a loss or a game for EigenRidges; got a map. Pass its .game.")
        if not hasattr(problem, "players") and callable(problem):
            problem = LossGame(caller, problem, start)
        return EigenRider(caller, problem, method, divergence)
    raise TypeError(
        f"{caller}: method must be EigenRidges(...) or LyapunovBranches(...); got {_lists.value_name(method)}."
    )


def _moved(part: dict[str, Any] | None, device: torch.device) -> dict[str, Any] | None:
    if part is None:
        return None
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in part.items()}


def _settings(method: EigenRidges | LyapunovBranches) -> dict[str, Any]:
    """What of a method can be compared with that of an archive."""
    fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    plain = {name: "function" if callable(v) else tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
    return {"method": type(method).__name__, **plain}


def _equal(states: Tensor, others: Tensor) -> bool:
    if states.shape != others.shape or states.dtype != others.dtype:
        return False
    return torch.allclose(states, others, rtol=0, atol=0, equal_nan=True)


class _Search:
    """A tree that grows in an archive."""

    def __init__(self, caller: str, rider: Rider, archive: Archive) -> None:
        self._caller = caller
        self._rider = rider
        self.archive = archive

    # ---- arguments ----

    def set_order(self, order: str, batch_size: int | None) -> None:
        if order not in ("breadth", "depth"):
            raise ValueError(f"{self._caller}: order must be breadth or depth; got {order!r}.")
        if batch_size is not None:
            _check_count(self._caller, "batch_size", batch_size, 1)
        self._depth_first = order == "depth"
        self._batch_size = 1 if batch_size is None and self._depth_first else batch_size

    def set_key(self, key: Key | None, distance: float, bifurcation_distance: float) -> None:
        if key not in (None, "losses", "parameters") and not callable(key):
            raise ValueError(f"{self._caller}: key must be None, losses, parameters or a function; got {key!r:.80}.")
        check_real(self._caller, "distance", distance, minimum=0.0)
        check_real(self._caller, "bifurcation_distance", bifurcation_distance, minimum=0.0)
        if key == "losses" and not self._rider.has_losses:
            raise ValueError(f"{self._caller}: key must not be losses where there are none. Pass losses=...")
        self._key = self._rider.key if key is None else key
        self._distance, self._bifurcation_distance = distance, bifurcation_distance

    def set_limits(self, max_depth: int | None, max_branches: int | None, max_steps: int | None) -> None:
        limits = {"max_depth": max_depth, "max_branches": max_branches, "max_steps": max_steps}
        for name, limit in limits.items():
            if limit is not None:
                _check_count(self._caller, name, limit, 1)
        self._max_depth, self._max_branches, self._max_steps = (
            math.inf if limit is None else limit for limit in limits.values()
        )

    def set_calls(self, on_batch: Any, should_stop: Any, progress: bool) -> None:
        for name, call in (("on_batch", on_batch), ("should_stop", should_stop)):
            if call is not None and not callable(call):
                raise TypeError(f"{self._caller}: {name} must be None or callable; got {_lists.value_name(call)}.")
        self._on_batch, self._should_stop = on_batch, should_stop
        self._progress = check_flag(self._caller, "progress", progress)

    def set_out(self, start: Any, settings: dict[str, Any]) -> None:
        """Takes the starts, or checks that they are those of the archive."""
        archive = self.archive
        settings = {**settings, "key": self._key if isinstance(self._key, str) else "function"}
        if archive.starts is None:
            self._like = self._states(start)
            archive.starts, archive._settings = self._like.cpu(), settings
            return
        for name, value in settings.items():
            if archive._settings.get(name) != value:
                raise ValueError(
                    f"{self._caller}: {name} must be that of the archive, {archive._settings.get(name)!r};"
                    f" got {value!r}. Begin a new archive for another search."
                )
        states = self._states(archive.starts if start is None else start)
        if not _equal(states.cpu(), archive.starts):
            raise ValueError(f"{self._caller}: start must be that of the archive, or None; got other states.")
        self._like = states
        archive._ride, archive._search = (_moved(part, states.device) for part in (archive._ride, archive._search))

    def _states(self, start: Any) -> Tensor:
        """The states from where to set out, in memory of their own."""
        return self._rider.start(start).detach().clone()

    # ---- the search ----

    def run(self) -> None:
        archive = self.archive
        known = [b for b in archive.bifurcations if b.same_as is None and not b.status.failed]
        self._places = Nearest(self._bifurcation_distance, [b.state for b in known])
        self._at_place = [b.id for b in known]
        if not archive.bifurcations:
            assert archive.starts is not None
            found = self._searched(self._like, [])
            if found is None:
                return
            self._commit([(start, None, expansions) for start, expansions in enumerate(found)])
        while archive._ride is not None or self._launch():
            if not self._ride_to_the_end() or not self._arrive():
                return
            if self._on_batch is not None:
                self._on_batch(archive)

    def _searched(self, states: Tensor, ids: list[int]) -> list[list[Expansion]] | None:
        """The bifurcations found from each of the states, ends of the branches ``ids``; None where it was stopped."""
        archive, rider = self.archive, self._rider
        if archive._search is None or archive._search["ids"] != ids:  # limits may have been changed since
            archive._search = {**rider.search(states), "ids": ids}
        bar = ProgressBar(rider.num_search_steps, shown=self._progress)
        bar.stage(f"bifurcations from {len(states)} states")
        try:
            while not rider.searched(archive._search):
                if self._stopped():
                    return None
                archive._search = {**rider.search_on(archive._search), "ids": ids}
                bar.advance(1)
        finally:
            bar.close()
        return rider.found(archive._search)

    def _stopped(self) -> bool:
        return self._should_stop is not None and bool(self._should_stop())

    def _launch(self) -> bool:
        """Sends the next branches on their way; False where there are none, or no more may be."""
        archive, pending = self.archive, self.archive._pending
        allowed = self._max_branches - (len(archive.branches) - len(pending))
        count = int(min(len(pending), allowed, math.inf if self._batch_size is None else self._batch_size))
        if count <= 0:
            return False
        ids = pending[::-1][:count] if self._depth_first else pending[:count]
        branches = [archive.branches[i] for i in ids]
        origins = torch.stack([archive.bifurcations[b.bifurcation].state for b in branches]).to(self._like)
        ride = self._rider.launch(branches, origins)
        archive._ride, archive._pending = ride, pending[:-count] if self._depth_first else pending[count:]
        return True

    def _ride_to_the_end(self) -> bool:
        """Rides the branches on their way; False where it was stopped before the end."""
        archive = self.archive
        ride = archive._ride
        assert ride is not None
        ridden = sum(branch.steps for branch in archive.branches)
        bar = ProgressBar(self._rider.max_steps, shown=self._progress)
        bar.stage(f"{len(ride['ids'])} of {len(archive.pending)} branches, {len(archive.solutions)} solutions")
        try:
            while True:
                count = len(on_their_way(ride))
                if count == 0:
                    following = self._rider.next_stage(ride)
                    if following is None:
                        return True
                    archive._ride = ride = following
                    continue
                if ridden + int(ride["steps"].sum()) + count > self._max_steps:
                    return False
                if self._stopped():
                    return False
                archive._ride = ride = self._rider.advance(ride)
                bar.advance(1)
        finally:
            bar.close()

    def _arrive(self) -> bool:
        """Records the ends of a ride, and the bifurcations found from them; False where the search was stopped."""
        archive, rider = self.archive, self._rider
        ride = archive._ride
        assert ride is not None
        ended = self._ended(ride)
        solved = rider.solved(ride).tolist()
        found, solutions = self._told_apart(ride, ended, solved)
        new = {solution.branches[0] for solution in found[len(archive.solutions) :]}
        onward = [
            i
            for i, branch in enumerate(ended)
            if branch.depth < self._max_depth
            and not branch.status.failed
            and (branch.id in new if rider.from_solutions else not solved[i])
        ]
        states, ids = rider.returned(ride["state"][onward]), [ended[i].id for i in onward]
        expansions = self._searched(states, ids) if onward else []
        if expansions is None:
            return False
        for branch, solution in zip(ended, solutions, strict=True):
            archive.branches[branch.id] = dataclasses.replace(branch, solution=solution)
        archive.solutions = found
        archive._ride = None
        self._commit([(ended[i].start, ended[i].id, e) for i, e in zip(onward, expansions, strict=True)])
        return True

    def _ended(self, ride: Ride) -> list[Branch]:
        """The branches of a ride as they ended."""
        columns = [ride["state"].cpu(), self._rider.losses(ride["state"]).tolist()]
        columns += [ride[name].tolist() for name in ("steps", "moved", "status")]
        columns += [ride["curvature"].tolist() if "curvature" in ride else [None] * len(ride["ids"])]
        return [
            dataclasses.replace(
                self.archive.branches[i],
                end=end.clone(),
                losses=tuple(losses),
                steps=steps,
                moved=moved,
                status=STATUSES[code],
                curvature=None if bounds is None or math.isnan(bounds[1]) else tuple(bounds),
            )
            for i, end, losses, steps, moved, code, bounds in zip(ride["ids"], *columns, strict=True)
        ]

    def _told_apart(
        self, ride: Ride, ended: list[Branch], solved: list[bool]
    ) -> tuple[list[Solution], list[int | None]]:
        """All solutions with those of a ride, and which of them each branch ended at."""
        found = list(self.archive.solutions)
        known_keys = Nearest(self._distance, [solution.key for solution in found])
        assigned: list[int | None] = []
        keys = self._keys(ride["state"], ended) if any(solved) else None
        for i, branch in enumerate(ended):
            if not solved[i] or keys is None:
                assigned.append(None)
                continue
            if not bool(keys[i].isfinite().all()):
                name = "losses" if self._key == "losses" else "key"
                raise ValueError(
                    f"{self._caller}: {name} must be finite at a finite state; got {keys[i].tolist()!r:.80}."
                )
            same = known_keys.find(keys[i])
            if same is None:
                known_keys.add(keys[i])
                same = len(found)
                way = self.archive.fingerprint(branch.id)
                assert branch.end is not None
                found.append(Solution(same, branch.end, branch.losses, keys[i], branch.moved, way, (branch.id,)))
            else:
                known = found[same]
                found[same] = dataclasses.replace(known, branches=(*known.branches, branch.id))
            assigned.append(same)
        return found, assigned

    def _keys(self, states: Tensor, ended: list[Branch]) -> Tensor:
        if self._key == "losses":
            return torch.tensor([branch.losses for branch in ended], dtype=torch.float64)
        if self._key == "parameters":
            return self._rider.parameters(states).cpu()
        assert callable(self._key)
        with torch.no_grad():
            keys = self._key(states)
        got = _lists.shape_name(keys.shape) if isinstance(keys, Tensor) else _lists.value_name(keys)
        fits = isinstance(keys, Tensor) and keys.dim() in (1, 2) and keys.shape[0] == len(states) and keys.numel() > 0
        if not fits or keys.is_complex():
            raise ValueError(
                f"{self._caller}: key must return a tensor with {len(states)} rows of real numbers; got {got}."
            )
        keys = keys.detach().reshape(len(states), -1).to("cpu", torch.float64)
        if self.archive.solutions and keys.shape[1] != len(self.archive.solutions[0].key):
            wanted = len(self.archive.solutions[0].key)
            raise ValueError(f"{self._caller}: key must return {wanted} columns, as it did before; got {got}.")
        return keys

    def _commit(self, expansions: Any) -> None:
        """Adds bifurcations, and the branches that leave new ones."""
        archive = self.archive
        pending: list[list[int]] = []
        for start, parent, found in expansions:
            for expansion in found:
                here = self._bifurcation(start, parent, expansion)
                archive.bifurcations.append(here)
                if here.same_as is None:
                    branches = self._branches(here, expansion)
                    archive.branches += branches
                    pending.append([branch.id for branch in branches])
        if self._depth_first:  # the last is ridden first: the leading direction of the first bifurcation
            pending = [ids[::-1] for ids in pending[::-1]]
        archive._pending = archive._pending + [i for ids in pending for i in ids]
        archive._search = None

    def _bifurcation(self, start: int, parent: int | None, expansion: Expansion) -> Bifurcation:
        state = expansion.state.detach().cpu().clone()
        number, same = len(self.archive.bifurcations), None
        if not expansion.status.failed:
            place = self._places.find(state)
            if place is None:
                self._places.add(state)
                self._at_place.append(number)
            else:
                same = self._at_place[place]
        return Bifurcation(number, start, parent, state, expansion.values, same, expansion.status)

    def _branches(self, here: Bifurcation, expansion: Expansion) -> list[Branch]:
        depth = 1 if here.parent is None else self.archive.branches[here.parent].depth + 1
        first = len(self.archive.branches)
        branches: list[Branch] = []
        for direction in expansion.directions:
            vector = direction.vector.detach().cpu().clone()
            partner = None if direction.partner is None else direction.partner.detach().cpu().clone()
            for size in self._rider.sizes:
                for sign in (1, -1):
                    begin = here.state + sign * size * vector
                    place = (first + len(branches), here.id, here.start, depth)
                    branches.append(Branch(*place, direction.rank, sign, size, direction.value, vector, partner, begin))
        return branches
