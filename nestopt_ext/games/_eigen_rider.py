"""Riding along eigenvectors: the ridges of points, found and followed in a batch, and descent from where they end."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _lists
from ._lanczos import lowest_eigenvalue, lowest_pairs
from ._linearized import check_state, check_value
from ._rides import Direction, Expansion, Ride, Rider, has, moved_on, new_ride, on_their_way, sent_on
from ._ritz import rayleigh_ritz, ritz_pairs
from .archive import Branch, BranchStatus
from .eigen_ridges import EigenRidges
from .eigenspaces import Eigenspace, eigenspace, track
from .map_jacobian import DENSE_SIZE, Eigenpairs, MapJacobian, leading_eigenpairs
from .maps import OptimizerMap
from .spectrum import spectrum

#: Eigenvalues that differ by no more than this part of the largest are equal.
_EQUAL = {torch.float64: 1e-6, torch.float32: 1e-5}

#: Residuals of ridges that were found, relative to the largest eigenvalue known.
_PRECISE = 1e-3

#: Directions that a search for one eigenvalue keeps.
_ARNOLDI_BASIS = 30

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
        finite = states.isfinite().all(dim=1)
        pairs = self._lowest_pairs(torch.where(finite[:, None], states, 0.0))
        known = (finite & ~pairs.values.isnan().any(dim=1)).tolist()
        return [self._expansion(states[b], pairs, b) if ok else _unknown(states[b]) for b, ok in enumerate(known)]

    def _expansion(self, state: Tensor, pairs: Eigenpairs, b: int) -> Expansion:
        own = Eigenpairs(pairs.values[b : b + 1], pairs.vectors[b : b + 1])
        limit = self._method.num_directions or self._size
        found: list[Direction] = []
        for i in self._ridges(own.values[0])[:limit]:
            space = eigenspace(own, i)
            value = complex(own.values[0, i].item())
            u, q = space.basis[0, :, 0], space.basis[0, :, 1]
            plane = space.dim.item() == 2
            found.append(Direction(len(found), u, value, q if plane else None))
            if plane:
                found.append(Direction(len(found), q, value.conjugate(), u))
        return Expansion(state, tuple(direction.value for direction in found[:limit]), found[:limit])

    def _ridges(self, values: Tensor) -> list[int]:
        """Which of the eigenvalues [k] of a state are ridden, one of each pair, and of each group if so asked."""
        ridges: list[int] = []
        groups: list[complex] = []
        margin = _EQUAL[values.real.dtype] * float(values.abs().max())
        for i, value in enumerate(values.tolist()):
            if value.real >= -self._method.min_curvature or value.imag < 0:
                continue
            if self._method.repeated == "one" and any(abs(value - other) <= margin for other in groups):
                continue
            groups.append(value)
            ridges.append(i)
        return ridges

    def _lowest_pairs(self, states: Tensor) -> Eigenpairs:
        """The eigenpairs among which the ridges of each state are, most negative first; NaN where one overflows."""
        jacobian, method = MapJacobian(self._gradient, states), self._method
        if self._size <= DENSE_SIZE:
            return _decomposed(jacobian.dense(), self._symmetric)
        assert method.num_directions is not None
        if not self._symmetric or method.repeated == "all":
            return self._searched(jacobian, min(method.num_directions, self._size))
        return lowest_pairs(
            jacobian,
            min(method.num_directions, self._size),
            equal=_EQUAL[states.dtype],
            rtol=torch.finfo(states.dtype).eps ** (2 / 3),
            max_products=method.search_products,
        )

    def _searched(self, jacobian: MapJacobian, wanted: int) -> Eigenpairs:
        """The same by Arnoldi's method, start by start; as many as have ``wanted`` ridges among them."""
        count = wanted
        while True:
            with warnings.catch_warnings():
                # What is too little for all of them may be enough for the ridges.
                warnings.filterwarnings("ignore", "spectrum: .* must converge", RuntimeWarning)
                pairs = leading_eigenpairs(jacobian, count, which="smallest_real")
            ridges = [self._ridges(values) for values in pairs.values]
            negative = (pairs.values.real < -self._method.min_curvature).all(dim=1).tolist()
            if count == self._size or all(len(r) >= wanted or not n for r, n in zip(ridges, negative, strict=True)):
                break
            count = min(2 * count, self._size)
        if self._symmetric:  # rounding makes pairs of repeated ones, and leaves them askew
            basis = torch.where(pairs.values[:, None, :].imag < 0, pairs.vectors.imag, pairs.vectors.real)
            basis = torch.linalg.qr(basis.to(jacobian.value))[0]
            values, coordinates = rayleigh_ritz(basis, jacobian(basis))
            return _as_complex(values, basis @ coordinates)
        self._check_precise(jacobian, pairs, ridges)
        kind = torch.complex64 if jacobian.value.dtype == torch.float32 else torch.complex128
        return Eigenpairs(pairs.values.to(kind), pairs.vectors.to(kind))

    def _check_precise(self, jacobian: MapJacobian, pairs: Eigenpairs, ridges: list[list[int]]) -> None:
        """Warns of ridges that are none: of a matrix that is not symmetric a rough value may have the wrong sign."""
        vectors = pairs.vectors.to(pairs.values)
        images = torch.complex(jacobian(vectors.real), jacobian(vectors.imag))
        rough = (images.to(vectors) - pairs.values[:, None, :] * vectors).norm(dim=1)
        rough = rough / pairs.values.abs().amax(dim=1, keepdim=True)
        worst = max([float(rough[b, i]) for b, own in enumerate(ridges) for i in own], default=0.0)
        if worst > _PRECISE:
            warnings.warn(
                f"{self._caller}: ridges must be eigenvectors; got some with residuals up to {worst:.2g} of the largest"
                " eigenvalue. Lower num_directions, or raise min_curvature, so that the search is for few.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _near(self, states: Tensor, space: Eigenspace) -> Eigenpairs:
        """Eigenpairs at each state, all, or beyond the dense size those near ``space``."""
        finite = states.isfinite().all(dim=1)
        jacobian = MapJacobian(self._gradient, torch.where(finite[:, None], states, 0.0))
        if self._size <= DENSE_SIZE:
            pairs = _decomposed(jacobian.dense(), self._symmetric)
        else:
            pairs = ritz_pairs(jacobian, space, self._method.num_products, symmetric=self._symmetric)
        return Eigenpairs(
            torch.where(finite[:, None], pairs.values, torch.nan),
            torch.where(finite[:, None, None], pairs.vectors, torch.nan),
        )

    def _lowest_curvature(self, states: Tensor) -> Tensor:
        """Bounds [N, 2] of the lowest eigenvalue, or real part of one; equal where it is known."""
        jacobian, method = MapJacobian(self._gradient, states), self._method
        if self._size <= max(DENSE_SIZE, method.search_products):
            lowest = _decomposed(jacobian.dense(), self._symmetric).values.real[:, 0]
            return torch.stack([lowest, lowest], dim=1)
        if self._symmetric:
            return lowest_eigenvalue(jacobian, -method.min_curvature, method.search_products)
        return torch.stack([self._lowest_real_part(state) for state in states])

    def _lowest_real_part(self, state: Tensor) -> Tensor:
        """The same [2] for a Jacobian that is not symmetric, by Arnoldi's method, which has no bounds."""
        jacobian = MapJacobian(self._gradient, state[None])
        budget = max(_ARNOLDI_BASIS, self._method.search_products)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "spectrum: .* must converge", RuntimeWarning)
            found = spectrum(
                lambda v: jacobian(v[None])[0], 1, which="smallest_real", like=state, basis_size=_ARNOLDI_BASIS,
                max_products=budget,
            )  # fmt: skip
        lowest = found.eigenvalues[0].real.to(state)
        return torch.stack([lowest if found.converged else torch.full_like(lowest, -torch.inf), lowest])

    # ---- rides ----

    def launch(self, branches: Sequence[Branch], origins: Tensor) -> Ride:
        first = torch.stack([b.sign * b.direction for b in branches]).to(origins)
        partners = [torch.zeros_like(b.direction) if b.partner is None else b.partner for b in branches]
        basis = torch.stack([first, torch.stack(partners).to(origins)], dim=2)
        dim = torch.tensor([1 if b.partner is None else 2 for b in branches], device=origins.device)
        solved = torch.zeros(len(branches), dtype=torch.bool, device=origins.device)
        unseen = torch.full((len(branches), 2), torch.nan, dtype=origins.dtype, device=origins.device)
        return new_ride(
            branches, origins, basis=basis, dim=dim, solved=solved, ridden=torch.zeros_like(dim), curvature=unseen
        )

    def advance(self, ride: Ride) -> Ride:
        return self._follow(ride) if ride["stage"] == _ALONG else self._descend(ride)

    def _follow(self, ride: Ride) -> Ride:
        method, rows = self._method, on_their_way(ride)
        basis, dim = ride["basis"][rows], ride["dim"][rows]
        state = ride["state"][rows] + method.step * basis[:, :, 0]
        unknown = torch.zeros(state.shape[0], 2, dtype=state.dtype.to_complex(), device=state.device)
        before = Eigenspace(basis, dim, unknown, torch.ones_like(state[:, 0]))
        pairs = self._near(state, before)
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
                check_value(self._caller, "finish", state, before)
                state = state.detach()
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
        bounds = torch.where(failed[:, None], torch.nan, ride["curvature"])
        if bool(looked_at.any()):
            bounds[looked_at] = self._lowest_curvature(ride["state"][looked_at])
        solved = looked_at & (bounds[:, 1] >= -self._method.min_curvature)
        seen = {"solved": solved, "curvature": bounds}
        if ride["stage"] == _FINISHING or self._method.finish is None:
            return {**ride, "stage": _FINISHED, **seen}
        return sent_on({**ride, "stage": _FINISHING, "ridden": ride["steps"], **seen}, solved)

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
