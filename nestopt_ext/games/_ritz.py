"""Eigenpairs near a known eigenspace, from products alone: Rayleigh-Ritz in the Krylov space that begins there."""

from __future__ import annotations

import torch
from torch import Tensor

from .eigenspaces import Eigenspace
from .map_jacobian import Eigenpairs, MapJacobian, leading_eigenpairs


def ritz_pairs(jacobian: MapJacobian, space: Eigenspace, num_products: int, *, symmetric: bool) -> Eigenpairs:
    """The Ritz pairs of each start from ``num_products`` vectors, most negative first.

    The space begins with that of ``space``; of a symmetric Jacobian with its line. Where a direction is exhausted a
    random one, the same in every run, takes its place, and begins the second direction of a line.
    """
    columns = 1 if symmetric else 2
    fresh = Fresh(jacobian)
    basis = torch.zeros(*jacobian.shape, 0, dtype=jacobian.value.dtype, device=jacobian.value.device)
    images = basis
    block = space.basis[:, :, :columns]
    while images.shape[2] < num_products:
        joined: list[Tensor] = []
        for j in range(min(columns, num_products - images.shape[2])):
            vector = new_direction(basis, block[:, :, j], fresh)
            basis = torch.cat([basis, vector[:, :, None]], dim=2)
            joined.append(vector)
        block = jacobian(torch.stack(joined, dim=2))
        images = torch.cat([images, block], dim=2)
    if symmetric:
        values, vectors = rayleigh_ritz(basis, images)
        pairs = Eigenpairs(
            torch.complex(values, torch.zeros_like(values)), torch.complex(vectors, torch.zeros_like(vectors))
        )
    else:
        pairs = leading_eigenpairs(basis.mT @ images, which="smallest_real")
    return Eigenpairs(pairs.values, basis.to(pairs.vectors) @ pairs.vectors)


def rayleigh_ritz(basis: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Ritz values [N, m] of symmetric matrices, ascending, and vectors [N, m, m] in the coordinates of an orthonormal
    basis [N, S, m]; NaN where its ``images`` are not finite.
    """
    small = basis.mT @ images
    finite = small.isfinite().all(dim=2).all(dim=1)
    values, vectors = torch.linalg.eigh(torch.where(finite[:, None, None], (small + small.mT) / 2, 0.0))
    return torch.where(finite[:, None], values, torch.nan), torch.where(finite[:, None, None], vectors, torch.nan)


class Fresh:
    """Random vectors [S], the same sequence in every run."""

    def __init__(self, jacobian: MapJacobian) -> None:
        self._like = jacobian.value
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self) -> Tensor:
        vector = torch.randn(self._like.shape[1], generator=self._generator, dtype=torch.float64, device="cpu")
        return vector.to(device=self._like.device, dtype=self._like.dtype)


def new_direction(basis: Tensor, vector: Tensor, fresh: Fresh) -> Tensor:
    """A unit vector [N, S] orthogonal to the columns of the basis, along ``vector`` where that has anything beside."""
    length = vector.norm(dim=1, keepdim=True)
    rest = _beside(basis, vector / torch.where(length > 0, length, 1.0))
    exhausted = rest.norm(dim=1, keepdim=True) <= 100 * torch.finfo(vector.dtype).eps
    rest = torch.where(exhausted, _beside(basis, fresh().expand_as(vector)), rest)
    unit: Tensor = rest / rest.norm(dim=1, keepdim=True)
    return unit


def _beside(basis: Tensor, vector: Tensor) -> Tensor:
    for _ in range(2):
        vector = vector - (basis @ (basis.mT @ vector[:, :, None])).squeeze(2)
    return vector
