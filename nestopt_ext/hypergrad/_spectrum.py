"""The curvature as a solver sees it from one right-hand side: eigenvalues, and functions of it applied to that side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: Up to so many elements the matrix is written out.
DENSE_ELEMENTS = 2000

_LANCZOS_STEPS = 200
_LANCZOS_ELEMENTS = 2**27
_LOOK_EVERY = 10


@dataclass(frozen=True)
class Spectrum:
    """A symmetric matrix and a vector v: ``values`` [k], ``vectors`` [P, k], ``weights`` = vectors' v.

    All of the eigenpairs where the matrix is small, else the Ritz pairs of the Krylov space of v, from which every
    polynomial of degree below k in the matrix, applied to v, is exact.
    """

    values: Tensor
    vectors: Tensor
    weights: Tensor
    #: Where it was written out.
    matrix: Tensor | None = None

    @property
    def is_dense(self) -> bool:
        return self.matrix is not None

    def apply(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """``function`` of the matrix times v."""
        return self.vectors @ (function(self.values) * self.weights)

    def solve(self, damping: float, cutoff: float) -> Tensor:
        """(A + damping I)^-1 v, without the directions whose eigenvalue is at most ``cutoff`` of the largest."""
        return self.apply(lambda values: pseudo_inverse(values + damping, cutoff))

    @property
    def extremes(self) -> tuple[float, float]:
        return float(self.values.min()), float(self.values.max())


def pseudo_inverse(values: Tensor, cutoff: float) -> Tensor:
    kept = values.abs() > cutoff * values.abs().max()
    return torch.where(kept, 1 / torch.where(kept, values, torch.ones_like(values)), torch.zeros_like(values))


def dense_matrix(matvec: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """The matrix of ``matvec``, whose columns are its products with the unit vectors."""
    columns = []
    for i in range(like.numel()):
        unit = torch.zeros_like(like)
        unit[i] = 1
        columns.append(matvec(unit))
    return torch.stack(columns, dim=1)


def dense_spectrum(matrix: Tensor, v: Tensor) -> Spectrum:
    """From the symmetric part of ``matrix``; eigenvalues of NaN where it is not finite."""
    if not bool(matrix.isfinite().all()):
        return Spectrum(torch.full_like(v, float("nan")), matrix, v, matrix)
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return Spectrum(values, vectors, vectors.T @ v, matrix)


def lanczos(matvec: Callable[[Tensor], Tensor], v: Tensor, tolerance: float = 1e-12) -> Spectrum:
    """Lanczos' method from v, every new vector made orthogonal to all before it, twice; NaN as above.

    Ends where the space solves A x = v with a residual of ``tolerance`` times v, looked at now and then.
    """
    most = max(2, min(_LANCZOS_STEPS, v.numel(), _LANCZOS_ELEMENTS // v.numel()))
    length = v.norm()
    basis = v.new_zeros((v.numel(), most))
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    direction = v / length if length > 0 else torch.zeros_like(v)
    for j in range(most):
        basis[:, j] = direction
        product = matvec(direction)
        diagonal.append(direction @ product)
        known = basis[:, : j + 1]
        for _ in range(2):
            product = product - known @ (known.T @ product)
        size = product.norm()
        scale = torch.stack(diagonal).abs().max()
        if j + 1 == most or not size > 1e-14 * scale:  # the space is invariant, or something is not finite
            break
        if j % _LOOK_EVERY == _LOOK_EVERY - 1 and _residual(_tridiagonal(diagonal, beside), size) <= tolerance:
            break
        beside.append(size)
        direction = product / size
    matrix = _tridiagonal(diagonal, beside)
    if not bool(matrix.isfinite().all()):
        return Spectrum(torch.full_like(matrix[0], float("nan")), basis[:, : len(matrix)], matrix[0])
    values, rotation = torch.linalg.eigh(matrix)
    vectors = basis[:, : len(values)] @ rotation
    return Spectrum(values, vectors, rotation[0] * length)


def _tridiagonal(diagonal: list[Tensor], beside: list[Tensor]) -> Tensor:
    matrix = torch.diag(torch.stack(diagonal))
    if beside:
        off = torch.diag(torch.stack(beside), 1)
        matrix = matrix + off + off.T
    return matrix


def _residual(matrix: Tensor, size: Tensor) -> float:
    """Of the solution in the space, relative to v; infinite where there is none."""
    unit = torch.zeros_like(matrix[0])
    unit[0] = 1
    solution, singular = torch.linalg.solve_ex(matrix, unit)
    found = float(size * solution[-1].abs())
    return found if found == found and not int(singular) else float("inf")
