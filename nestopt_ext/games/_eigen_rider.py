"""Riding along eigenvectors: the ridges of points, found and followed in a batch, and descent from where they end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _lists
from ._linearized import check_state
from ._rides import Direction, Expansion, Ride, Rider, has, moved_on, new_ride, on_their_way, sent_on
from ._ritz import ritz_pairs
from .archive import Branch, BranchStatus
from .eigen_ridges import EigenRidges
from .eigenspaces import Eigenspace, eigenspace, track
from .map_jacobian import DENSE_SIZE, Eigenpairs, MapJacobian, leading_eigenpairs
from .maps import OptimizerMap

#: Eigenvalues that differ by no more than this part of the largest are equal.
_EQUAL = {torch.float64: 1e-6, torch.float32: 1e-5}

_ALONG, _FINISHING, _FINISHED = range(3)


class LossGame:
    """A loss of independent starts as the game of its only player."""

    def __init__(self, caller: str, loss: Callable[[Tensor], Tensor], start: Any) -> None:
        if not isinstance(start, Tensor):
            raise TypeError(f"{caller}: start must be a tensor of parameters; got {_lists.value_name(start)}.")
        rows = start.detach().unsqueeze(0) if start.dim() == 1 else start.detach()
        check_state(caller, "start", rows)
        self._caller = caller
        self._loss = loss
        self.players = [rows.clone().requires_grad_()]

    def losses(self, players: Sequence[Tensor]) -> list[Tensor]:
        """The loss of each start."""
        loss = self._loss(players[0])
        if not isinstance(loss, Tensor) or loss.shape != players[0].shape[:1]:
            got = _lists.shape_name(loss.shape) if isinstance(loss, Tensor) else _lists.value_name(loss)
            raise ValueError(
                f"{self._caller}: problem must return a loss for each start, of shape ({players[0].shape[0]},);"
                f" got {got}."
            )
        return [loss]


class EigenRider(Rider):
    """The method on one game, of one player where there is a loss."""

    from_solutions = False
    key = "parameters"

    def __init__(self, caller: str, game: Any, method: EigenRidges, bound: float) -> None:
        def gradient(flat: Any, parameters: Tensor, buffers: Tensor, create_graph: bool) -> list[Tensor]:
            return [flat.gradients(parameters, create_graph=create_graph)]

        self._caller = caller
        self._gradient = OptimizerMap(caller, game, gradient)
        self._size = self._gradient.num_parameters
        self._symmetric = len(game.players) == 1
        self._method = method
        self._divergence = bound
        self.sizes = (float(method.step),)
        self.max_steps = method.max_steps + (0 if method.finish is None else method.finish_steps)
        if self._size > DENSE_SIZE and method.num_directions is None:
            raise ValueError(
                f"{caller}: num_directions must be given for more than {DENSE_SIZE} parameters; got None for"
                f" {self._size}. Ask for the leading ridges: EigenRidges(num_directions=2)."
            )

    def start(self, start: Any) -> Tensor:
        return self._gradient.start(start)

    def losses(self, states: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.stack(self._gradient.losses(states), dim=1)

    def parameters(self, states: Tensor) -> Tensor:
        return states

    def returned(self, states: Tensor) -> Tensor:
        return states

    # ---- ridges ----

    def expand(self, states: Tensor) -> list[Expansion]:
        pairs = self._pairs(states, None)
        finite = (states.isfinite().all(dim=1) & ~pairs.values.isnan().any(dim=1)).tolist()
        return [self._expansion(states[b], pairs, b) if ok else _unknown(states[b]) for b, ok in enumerate(finite)]

    def _expansion(self, state: Tensor, pairs: Eigenpairs, b: int) -> Expansion:
        own = Eigenpairs(pairs.values[b : b + 1], pairs.vectors[b : b + 1])
        values = own.values[0].tolist()
        margin = _EQUAL[state.dtype] * max(map(abs, values))
        limit = self._method.num_directions or self._size
        found: list[Direction] = []
        groups: list[complex] = []
        for i, value in enumerate(values):
            if value.real >= -self._method.min_curvature or value.imag < 0 or len(found) >= limit:
                continue
            if self._method.repeated == "one" and any(abs(value - other) <= margin for other in groups):
                continue
            groups.append(value)
            space = eigenspace(own, i)
            u, q = space.basis[0, :, 0], space.basis[0, :, 1]
            plane = space.dim.item() == 2
            found.append(Direction(len(found), u, value, q if plane else None))
            if plane:
                found.append(Direction(len(found), q, value.conjugate(), u))
        return Expansion(state, tuple(values), found[:limit])

    def _pairs(self, states: Tensor, space: Eigenspace | None) -> Eigenpairs:
        """Eigenpairs at each state, most negative first; beyond the dense size those near ``space``, if given."""
        finite = states.isfinite().all(dim=1)
        jacobian = MapJacobian(self._gradient, torch.where(finite[:, None], states, 0.0))
        if self._size <= DENSE_SIZE:
            pairs = _decomposed(jacobian.dense(), self._symmetric)
        elif space is None:
            pairs = leading_eigenpairs(jacobian, self._method.num_directions, which="smallest_real")
            if self._symmetric:  # rounding makes pairs of repeated ones
                real = pairs.vectors.real / pairs.vectors.real.norm(dim=1, keepdim=True)
                pairs = _as_complex(pairs.values.real, real)
        else:
            pairs = ritz_pairs(jacobian, space, self._method.num_products, symmetric=self._symmetric)
        kind = torch.complex64 if states.dtype == torch.float32 else torch.complex128
        return Eigenpairs(
            torch.where(finite[:, None], pairs.values.to(kind), torch.nan),
            torch.where(finite[:, None, None], pairs.vectors.to(kind), torch.nan),
        )

    # ---- rides ----

    def launch(self, branches: Sequence[Branch], origins: Tensor) -> Ride:
        first = torch.stack([b.sign * b.direction for b in branches]).to(origins)
        partners = [torch.zeros_like(b.direction) if b.partner is None else b.partner for b in branches]
        basis = torch.stack([first, torch.stack(partners).to(origins)], dim=2)
        dim = torch.tensor([1 if b.partner is None else 2 for b in branches], device=origins.device)
        solved = torch.zeros(len(branches), dtype=torch.bool, device=origins.device)
        return new_ride(branches, origins, basis=basis, dim=dim, solved=solved, ridden=torch.zeros_like(dim))

    def advance(self, ride: Ride) -> Ride:
        return self._follow(ride) if ride["stage"] == _ALONG else self._descend(ride)

    def _follow(self, ride: Ride) -> Ride:
        method, rows = self._method, on_their_way(ride)
        basis, dim = ride["basis"][rows], ride["dim"][rows]
        state = ride["state"][rows] + method.step * basis[:, :, 0]
        unknown = torch.complex(torch.zeros_like(state[:, :2]), torch.zeros_like(state[:, :2]))
        before = Eigenspace(basis, dim, unknown, torch.ones_like(state[:, 0]))
        pairs = self._pairs(state, before)
        space = _followed(pairs, before) if self._symmetric else track(pairs, before)
        curvature = torch.fmin(space.values[:, 0].real, space.values[:, 1].real)
        ended = {
            BranchStatus.turned: curvature >= 0,
            BranchStatus.lost: ~(space.overlap >= method.min_overlap),
            BranchStatus.completed: ride["steps"][rows] + 1 >= method.max_steps,
        }
        known = ~pairs.values.isnan().any(dim=1)
        return moved_on(
            ride, rows, state, finite=known, divergence=self._divergence, ended=ended, basis=space.basis, dim=space.dim
        )

    def _descend(self, ride: Ride) -> Ride:
        method, rows = self._method, on_their_way(ride)
        before = ride["state"][rows]
        with torch.no_grad():
            if callable(method.finish):
                state = method.finish(before)
            else:
                assert method.finish is not None
                state = before - method.finish * self._gradient(before)
        ended = {
            BranchStatus.converged: (state - before).norm(dim=1) <= method.tolerance,
            BranchStatus.completed: ride["steps"][rows] + 1 - ride["ridden"][rows] >= method.finish_steps,
        }
        return moved_on(ride, rows, state, divergence=self._divergence, ended=ended)

    def next_stage(self, ride: Ride) -> Ride | None:
        if ride["stage"] == _FINISHED:
            return None
        failed = has(ride, BranchStatus.non_finite, BranchStatus.diverged)
        looked_at = ~failed & (ride["solved"] if ride["stage"] == _FINISHING else torch.ones_like(failed))
        rows = looked_at.nonzero().squeeze(1)
        solved = torch.zeros_like(looked_at)
        if len(rows):
            lowest = self._pairs(ride["state"][rows], None).values.real.amin(dim=1)
            solved[rows] = lowest >= -self._method.min_curvature
        if ride["stage"] == _FINISHING or self._method.finish is None:
            return {**ride, "stage": _FINISHED, "solved": solved}
        return sent_on({**ride, "stage": _FINISHING, "solved": solved, "ridden": ride["steps"]}, solved)

    def solved(self, ride: Ride) -> Tensor:
        solved: Tensor = ride["solved"]
        return solved


def _unknown(state: Tensor) -> Expansion:
    return Expansion(state, (), (), BranchStatus.non_finite)


def _as_complex(values: Tensor, vectors: Tensor) -> Eigenpairs:
    """Real eigenpairs, the element of largest magnitude of each vector positive."""
    sign = torch.sign(vectors.gather(1, vectors.abs().argmax(1, keepdim=True)))
    wide = vectors * sign
    return Eigenpairs(torch.complex(values, torch.zeros_like(values)), torch.complex(wide, torch.zeros_like(wide)))


def _decomposed(matrices: Tensor, symmetric: bool) -> Eigenpairs:
    """All eigenpairs of matrices [N, P, P], most negative first."""
    if not symmetric:
        return leading_eigenpairs(matrices, which="smallest_real")
    finite = matrices.isfinite().all(dim=2).all(dim=1)
    values, vectors = torch.linalg.eigh(torch.where(finite[:, None, None], (matrices + matrices.mT) / 2, 0.0))
    return _as_complex(
        torch.where(finite[:, None], values, torch.nan), torch.where(finite[:, None, None], vectors, torch.nan)
    )


def _followed(pairs: Eigenpairs, space: Eigenspace) -> Eigenspace:
    """The line in the space of equal eigenvalues nearest to the one before, where eigenvectors are orthonormal."""
    values, vectors = pairs.values.real, pairs.vectors.real
    along = (space.basis[:, None, :, 0] @ vectors).squeeze(1)  # [N, k]
    margin = _EQUAL[values.dtype] * values.abs().amax(dim=1)[:, None, None]
    equal = (values[:, :, None] - values[:, None, :]).abs() <= margin
    overlap, best = (equal * along.square()[:, None, :]).sum(dim=2).max(dim=1)
    members = equal.gather(1, best[:, None, None].expand(-1, 1, equal.shape[2])).squeeze(1)
    line = (vectors @ (members * along)[:, :, None]).squeeze(2)
    line = line / line.norm(dim=1, keepdim=True)
    found = torch.cat([values.gather(1, best[:, None]), torch.full_like(values[:, :1], torch.nan)], dim=1)
    return Eigenspace(
        torch.stack([line, torch.zeros_like(line)], dim=2),
        space.dim,
        torch.complex(found, torch.zeros_like(found)),
        overlap.sqrt().clamp(max=1.0),
    )
