"""The inverse of a small curvature, written out."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from ._arguments import check_damping, check_rcond
from ._dense import Dense, Direct, guarded, solved
from ._outcome import Outcome
from ._solution import Status
from ._system import System

#: The elements of the largest list that is written out: 3 GiB in float64, and as much again to factorize it.
MOST_ELEMENTS = 20_000

#: Elements of the unit vectors that are multiplied at once.
_AT_ONCE = 2**24


@dataclass(frozen=True)
class Exact:
    r"""Solve :math:`(A + \delta I) x = v` by writing the matrix out and factorizing it.

    P products for P elements, or none where an operator has its inverse in closed form; A need not be symmetric. The
    P x P matrix is held in float64 on the CPU (8 P^2 bytes, and as much again for its factors), elsewhere in the
    working dtype of the tensors, all of it on the device of the first one; P may be at most 20 000. ``damping`` = delta
    (units of curvature) is finite and >= 0.

    A singular matrix gives NaN, never an exception, and the status ``non_finite``. With ``rcond`` in [0, 1) the
    pseudo-inverse is taken, by singular values, those up to ``rcond`` times the largest left out: the solution of least
    squares and of least norm.

    Raises TypeError or ValueError, naming the option, when one is out of range, and ValueError for more elements.

    >>> import torch
    >>> from nestopt_ext.solvers import solve
    >>> matrix = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    >>> solve(lambda v: matrix @ v, torch.tensor([3.0, 1.0]), Exact()).value
    tensor([1., 1.])
    >>> solve(lambda v: torch.tensor([4.0, 0.0]) * v, torch.ones(2), Exact(rcond=1e-6)).value
    tensor([0.2500, 0.0000])
    """

    damping: float = 0.0
    _: KW_ONLY
    rcond: float | None = None

    def __post_init__(self) -> None:
        check_damping("Exact", self.damping)
        check_rcond("Exact", self.rcond)

    def run(self, system: System) -> Outcome:
        """The solution for the right-hand sides of ``system``."""
        right = system.lengths(system.v)
        closed = system.product.inverse(system.rows(), self.damping) if self.rcond is None else None
        if closed is not None:
            evidence = Direct(right, right.new_zeros(()), Status.non_finite, Status.converged, self._explain)
            dense = Dense(system)
            return Outcome(system.returned(closed), evidence, system.scalars(), dense.eps**0.5)
        dense = Dense(system)
        matrix = _written_out(system, dense)
        matrix.diagonal().add_(self.damping)
        v = dense.matrix(system.rows()).T
        x, singular = solved(matrix, v) if self.rcond is None else _pseudo_solved(matrix, v, self.rcond)
        evidence = Direct(right, singular, Status.non_finite, Status.converged, self._explain)
        size = matrix.abs()
        bound = (size.sum(0).amax() * size.sum(1).amax()).sqrt() if dense.size else right.new_zeros(())
        return Outcome(system.returned(dense.rows(x.T)), evidence, system.scalars() + bound.to(right))

    def _explain(self, status: Status) -> str:
        return (
            f"the exact solution is not finite (damping={self.damping:.4g}); A + damping*I must be finite and not"
            " singular. Raise damping, or take the pseudo-inverse with Exact(rcond=1e-12)."
        )


def _written_out(system: System, dense: Dense) -> Tensor:
    """A as a matrix, by products with the unit vectors, as many at a time as fit."""
    size = dense.size
    if size > MOST_ELEMENTS:
        memory = size * size * dense.dtype.itemsize / 2**30
        raise ValueError(
            f"{system.product.caller}: v must have at most {MOST_ELEMENTS} elements for Exact; got {size}, whose matrix"
            f" takes {memory:.1f} GiB. Use ConjugateGradient or Nystrom, which need products alone."
        )
    columns = torch.empty((size, size), dtype=dense.dtype, device=dense.device)
    at_once = max(1, min(size, _AT_ONCE // max(size, 1)))
    for start in range(0, size, at_once):
        stop = min(start + at_once, size)
        units = torch.zeros((stop - start, size), dtype=dense.dtype, device=dense.device)
        units.diagonal(start).fill_(1)
        columns[start:stop] = dense.matrix(system.product.many(dense.rows(units)))
    return columns.T


def _pseudo_solved(matrix: Tensor, right: Tensor, rcond: float) -> tuple[Tensor, Tensor]:
    """The solution of least squares and least norm, NaN if the matrix is not finite, and a number that says so."""
    matrix, spoilt = guarded(matrix)
    left, values, right_vectors = torch.linalg.svd(matrix, full_matrices=False)
    kept = values > rcond * values[:1]
    inverse = torch.where(kept, 1 / values, torch.zeros_like(values))
    return right_vectors.T @ (inverse.unsqueeze(1) * (left.T @ right)) + spoilt, spoilt.isnan()
