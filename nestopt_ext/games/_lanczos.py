"""The lowest eigenvalues of symmetric Jacobians, from products alone, in all starts at once.

A Krylov space that begins at a random vector holds one direction of each eigenspace, that of its part in it: of
repeated eigenvalues one copy is found, which is what a ridge of each group of equal ones asks for.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._ritz import Fresh, new_direction, rayleigh_ritz
from .map_jacobian import Eigenpairs, MapJacobian

#: How likely it is at most that a lower bound does not hold.
_FAILURE = 1e-3
#: Products between two looks at the bounds.
_LOOK_EVERY = 5


def lowest_eigenvalue(jacobian: MapJacobian, limit: float, max_products: int) -> Tensor:
    r"""Bounds [B, 2] of the lowest eigenvalue of each start, as tight as it takes to know on which side of ``limit`` it
    lies, or as ``max_products`` make them.

    The upper bound is the lowest Ritz value of Lanczos' method after k products, which holds but for rounding. The
    lower bound is below it by :math:`\epsilon / (1 - 2 \epsilon)` times the spread of the Ritz values, with
    :math:`\epsilon = (\ln(1.648 \sqrt{P} / \delta) / (2 k - 1))^2`. For a random start it fails with probability
    2 :math:`\delta` at most, :math:`\delta` = 0.001: each end of the spectrum is within :math:`\epsilon` times its
    width of the Ritz value (Kuczynski and Wozniakowski, Estimating the largest eigenvalue by the power and Lanczos
    algorithms with a random start, 1992, theorem 4.2). A start whose products are not finite has NaN.
    """
    vector = Fresh(jacobian)().expand(jacobian.shape)
    vector = vector / vector.norm(dim=1, keepdim=True)
    before, length = torch.zeros_like(vector), torch.zeros_like(vector[:, 0])
    closed = torch.zeros_like(length, dtype=torch.bool)
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    for count in range(1, max_products + 1):
        image = jacobian(vector) - length[:, None] * before
        quotient = (image * vector).sum(dim=1)
        # What follows an invariant space is none of it; a Rayleigh quotient leaves the ends of the spectrum alone.
        diagonal.append(torch.where(closed, diagonal[0] if diagonal else quotient, quotient))
        image = image - quotient[:, None] * vector
        length = torch.where(closed, 0.0, image.norm(dim=1))
        scale = torch.stack(diagonal).abs().amax(dim=0)
        closed = closed | (length <= 100 * torch.finfo(length.dtype).eps * scale)
        length = torch.where(closed, 0.0, length)
        before, vector = vector, image / torch.where(closed, 1.0, length)[:, None]
        if count % _LOOK_EVERY == 0 or count == max_products or bool(closed.all()):
            bounds = _bounds(diagonal, beside, closed, jacobian.shape[1])
            decided = (bounds[:, 0] >= limit) | (bounds[:, 1] < limit) | bounds.isnan().any(dim=1)
            if bool((decided | closed.to(decided.device)).all()):
                break
        beside.append(length)
    return bounds.to(jacobian.value)


def _bounds(diagonal: list[Tensor], beside: list[Tensor], closed: Tensor, size: int) -> Tensor:
    """Bounds [B, 2] from the tridiagonal projections."""
    count = len(diagonal)
    projected = torch.diag_embed(torch.stack(diagonal, dim=1).to("cpu", torch.float64))
    if beside:
        off = torch.stack(beside, dim=1).to(projected)
        projected = projected + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    finite = projected.isfinite().all(dim=2).all(dim=1)
    ritz = torch.linalg.eigvalsh(torch.where(finite[:, None, None], projected, 0.0))
    share = (math.log(1.648 * math.sqrt(size) / _FAILURE) / (2 * count - 1)) ** 2
    missed = (ritz[:, -1] - ritz[:, 0]) * (share / (1 - 2 * share) if share < 0.5 else math.inf)
    # A space that is invariant holds all eigenvalues.
    low = ritz[:, 0] - torch.where(closed.cpu(), 0.0, missed.nan_to_num(nan=math.inf))
    return torch.where(finite[:, None], torch.stack([low, ritz[:, 0]], dim=1), torch.nan)


def lowest_pairs(jacobian: MapJacobian, count: int, *, equal: float, rtol: float, max_products: int) -> Eigenpairs:
    """The lowest ``count`` distinct eigenvalues of each start, ascending, each with one eigenvector of its space.

    Eigenvalues are equal when they differ by no more than ``equal`` times the largest. They are found when all
    residuals are at most ``rtol`` times it; once ``max_products`` are spent the best are returned, whose values are
    Rayleigh quotients, never below the lowest eigenvalue. Rounding may leave copies, so that there may be more columns.

    Rayleigh-Ritz from Krylov spaces with thick restarts (Wu and Simon, Thick-restart Lanczos method, 2000).
    """
    fresh = Fresh(jacobian)
    capacity = min(2 * count + 20, jacobian.shape[1])
    basis = torch.zeros(*jacobian.shape, 0, dtype=jacobian.value.dtype, device=jacobian.value.device)
    images = basis
    following = fresh().expand(jacobian.shape)
    spent = 0
    while True:
        for _ in range(min(capacity - basis.shape[2], max_products - spent)):
            basis = torch.cat([basis, new_direction(basis, following, fresh)[:, :, None]], dim=2)
            following = jacobian(basis[:, :, -1])
            images = torch.cat([images, following[:, :, None]], dim=2)
            spent += 1
        values, coordinates = rayleigh_ritz(basis, images)
        vectors, images = basis @ coordinates, images @ coordinates
        residuals = images - values[:, None, :] * vectors
        largest = values.abs().amax(dim=1, keepdim=True)
        new = torch.diff(values, dim=1) > equal * largest
        wanted = torch.cat([torch.zeros_like(new[:, :1]), new], dim=1).cumsum(dim=1) < count
        open_ = wanted & (residuals.norm(dim=1) > rtol * largest)
        if spent >= max_products or basis.shape[2] == jacobian.shape[1] or not bool(open_.any()):
            columns = int(wanted.sum(dim=1).max())
            return Eigenpairs(_complex(values[:, :columns]), _complex(vectors[:, :, :columns]))
        kept = capacity // 2
        first = open_.long().argmax(dim=1)
        following = residuals.gather(2, first[:, None, None].expand(-1, residuals.shape[1], 1)).squeeze(2)
        basis, images = vectors[:, :, :kept], images[:, :, :kept]


def _complex(values: Tensor) -> Tensor:
    return torch.complex(values, torch.zeros_like(values))
