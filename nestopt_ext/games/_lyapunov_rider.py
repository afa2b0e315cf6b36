"""Riding by Lyapunov directions: ascent on the largest exponent, branches to both sides, and a map to ride with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _lists
from ._linearized import Step, check_state, check_step, check_value
from ._rides import Direction, Expansion, Ride, Rider, Search, has, moved_on, new_ride, on_their_way
from ._sweep import Sweep, warn_of_directions
from .archive import Branch, BranchStatus
from .eigenspaces import eigenspace
from .lyapunov_branches import LyapunovBranches
from .lyapunov_start import Ascent
from .map_jacobian import leading_eigenpairs, map_jacobian
from .maps import OptimizerMap


class LyapunovRider(Rider):
    """The method on one map."""

    from_solutions = True

    def __init__(
        self, caller: str, step: Step, method: LyapunovBranches, losses: Callable[[Tensor], Any] | None, bound: float
    ) -> None:
        check_step(caller, step)
        self._caller = caller
        self._step = step
        self._method = method
        self._ride = step if method.ride is None else method.ride
        self._losses = losses
        self._divergence = bound
        self.sizes = tuple(map(float, method.sizes))
        self.max_steps = method.max_steps
        self.num_search_steps = method.ascent_steps + 1 if method.ascent_steps else 0
        self._residual = 0.0  # of the directions searched last
        self._ascent = Ascent(caller, step, method.horizon, method.ascent_lr, method.ascent_steps)
        self.has_losses = losses is not None or isinstance(self._ride, OptimizerMap)
        self.key = "losses" if self.has_losses else "parameters"
        if isinstance(step, OptimizerMap) and isinstance(self._ride, OptimizerMap):
            wanted, got = step.num_parameters, self._ride.num_parameters
            if got != wanted:
                raise ValueError(
                    f"{caller}: ride must be a map of {wanted} parameters, as the problem; got one of {got}."
                )

    def start(self, start: Any) -> Tensor:
        step = self._step
        if isinstance(step, OptimizerMap):
            if not isinstance(start, Tensor) or start.shape[-1] != step.state_size:
                return step.start(start)
            start = start.to(step.start()[:1])
        if not isinstance(start, Tensor):
            raise TypeError(f"{self._caller}: start must be a tensor of states; got {_lists.value_name(start)}.")
        states = start.unsqueeze(0) if start.dim() == 1 else start
        check_state(self._caller, "start", states)
        return states.detach()

    def search(self, states: Tensor) -> Search:
        return {"from": states, **self._ascent.begin(states)}

    def searched(self, search: Search) -> bool:
        return not self._method.ascent_steps or self._ascent.done(search)

    def search_on(self, search: Search) -> Search:
        return {"from": search["from"], **self._ascent.advance(search)}

    def found(self, search: Search) -> list[list[Expansion]]:
        places = [search["start"]]
        if self._method.from_start and self._method.ascent_steps:
            places.append(search["from"])
        found = self.expand(torch.cat(places))
        residual = max(self._residual, search["residual"])
        warn_of_directions(self._caller, residual, "Take a shorter horizon, or float64.")
        return [found[row :: len(search["start"])] for row in range(len(search["start"]))]

    def expand(self, states: Tensor) -> list[Expansion]:
        if self._method.directions == "eigenvectors":
            return self._along_eigenvectors(states)
        return self._along_exponents(states)

    def _along_exponents(self, states: Tensor) -> list[Expansion]:
        count = min(self._method.num_directions, states.shape[1])
        with torch.no_grad():
            sweep = Sweep(self._caller, self._step, states, self._method.horizon)
            vectors = sweep.leading_directions(count)
            values = sweep.along(vectors)
        self._residual = sweep.residual
        finite = vectors.isfinite().all(dim=2).all(dim=1) & ~values.isnan().any(dim=1)
        return [
            _expansion(state, bool(ok), [Direction(i, row[:, i], complex(value[i])) for i in range(count)])
            for state, ok, row, value in zip(states, finite, vectors, values.tolist(), strict=True)
        ]

    def _along_eigenvectors(self, states: Tensor) -> list[Expansion]:
        count = min(self._method.num_directions, states.shape[1])
        finite = states.isfinite().all(dim=1)
        jacobian = map_jacobian(self._step, torch.where(finite[:, None], states, 0.0))
        pairs = leading_eigenpairs(jacobian, count)
        finite &= pairs.values.isfinite().all(dim=1)
        found: list[list[Direction]] = [[] for _ in range(states.shape[0])]
        for i in range(count):
            space = eigenspace(pairs, i)
            for b, (dim, pair) in enumerate(zip(space.dim.tolist(), space.values.tolist(), strict=True)):
                if abs(pair[0]) > 1 and pair[0].imag >= 0:
                    found[b] += [Direction(i + j, space.basis[b, :, j], complex(pair[j])) for j in range(dim)]
        return [_expansion(*row) for row in zip(states, finite.tolist(), found, strict=True)]

    def launch(self, branches: Sequence[Branch], origins: Tensor) -> Ride:
        begin = torch.stack([branch.begin for branch in branches]).to(origins)
        return new_ride(branches, _handed(self._step, self._ride, begin))

    def advance(self, ride: Ride) -> Ride:
        rows = on_their_way(ride)
        before = ride["state"][rows]
        with torch.no_grad():
            state = self._ride(before)
        check_value(self._caller, "ride", state, before)
        state = state.detach()  # a map may take a gradient of its own, and keep its graph
        ended = {
            BranchStatus.converged: (state - before).norm(dim=1) <= self._method.tolerance,
            BranchStatus.completed: ride["steps"][rows] + 1 >= self._method.max_steps,
        }
        return moved_on(ride, rows, state, divergence=self._divergence, ended=ended)

    def solved(self, ride: Ride) -> Tensor:
        return has(ride, BranchStatus.completed, BranchStatus.converged)

    def losses(self, states: Tensor) -> Tensor:
        with torch.no_grad():
            if self._losses is not None:
                return called_losses(self._caller, self._losses, states)
            if isinstance(self._ride, OptimizerMap):
                return torch.stack(self._ride.losses(states), dim=1)
        return states.new_zeros(states.shape[0], 0)

    def parameters(self, states: Tensor) -> Tensor:
        return states[:, : self._ride.num_parameters] if isinstance(self._ride, OptimizerMap) else states

    def returned(self, states: Tensor) -> Tensor:
        return _handed(self._ride, self._step, states)


def called_losses(caller: str, losses: Callable[[Tensor], Any], states: Tensor) -> Tensor:
    """What a caller's function says of states [N, S]: a tensor [N] or [N, n], or n tensors [N]."""
    found = losses(states)
    if isinstance(found, tuple | list) and found and all(_is_column(loss, states) for loss in found):
        found = torch.stack(list(found), dim=-1)
    if not isinstance(found, Tensor) or found.dim() not in (1, 2) or found.shape[0] != states.shape[0]:
        got = _lists.shape_name(found.shape) if isinstance(found, Tensor) else _lists.value_name(found)
        raise ValueError(
            f"{caller}: losses must return a tensor of shape (B,) or (B, n), or n tensors of shape (B,), for"
            f" B={states.shape[0]} states; got {got}."
        )
    return found.detach().reshape(states.shape[0], -1)


def _is_column(loss: object, states: Tensor) -> bool:
    return isinstance(loss, Tensor) and loss.shape == states.shape[:1]


def _expansion(state: Tensor, finite: bool, directions: Sequence[Direction]) -> Expansion:
    if not finite:
        return Expansion(state, (), (), BranchStatus.non_finite)
    return Expansion(state, tuple(d.value for d in directions), directions)


def _handed(source: Step, target: Step, states: Tensor) -> Tensor:
    """States of one map as states of another."""
    if source is target or not (isinstance(source, OptimizerMap) and isinstance(target, OptimizerMap)):
        return states
    return target.start(states[:, : target.num_parameters])
