"""Leading singular triples of many linear maps that are known by their products alone: restarted bidiagonalization.

Golub and Kahan's process with full orthogonalization, restarted from the leading triples as by Baglama and Reichel
(Augmented implicitly restarted Lanczos bidiagonalization methods, 2005). With V and U orthonormal, A V = U R and
A' U = V R' + r e', and the norm of r times the last entries of a left singular vector of R is the residual of a triple.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_SEED = 0

#: A linear map of every row, [B, S] to [B, S].
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Triples:
    """Singular values (B, k), left and right vectors in columns (B, S, k), residuals (B, k), and the products spent."""

    values: Tensor
    left: Tensor
    right: Tensor
    residuals: Tensor
    num_products: int
    converged: bool


def leading_triples(
    product: Product, transposed: Product, like: Tensor, k: int, *, capacity: int, rtol: float, max_products: int
) -> Triples:
    """The ``k`` leading triples of each of the B maps on rows like ``like`` [B, S]; k < capacity <= S.

    They have converged once all residuals are at most ``rtol`` times the largest singular value. The first direction is
    the same in every row.
    """
    process = _Process(product, transposed, like)
    while True:
        process.grow(capacity)
        left, values, right = torch.linalg.svd(process.projection)
        residuals = process.remainder.norm(dim=1)[:, None] * left[:, -1, :].abs()
        arrived = bool((residuals[:, :k] <= rtol * values[:, :1]).all())
        if arrived or process.num_products + 2 * (capacity - k) > max_products:
            chosen = left[:, :, :k], right.mT[:, :, :k]
            lifted = process.left @ chosen[0], process.right @ chosen[1]
            return Triples(values[:, :k], *lifted, residuals[:, :k], process.num_products, arrived)
        process.restart(left, values, right.mT, min(k + 3, capacity - 1))


class _Process:
    """A V = U R and A' U = V R' + r e' with V, U [B, S, n] and R [B, n, n], grown by a column at a time."""

    def __init__(self, product: Product, transposed: Product, like: Tensor) -> None:
        self._product = product
        self._transposed = transposed
        self._eps = torch.finfo(like.dtype).eps
        self._scale = like.new_zeros(like.shape[0])  # the largest norm seen of a product
        self.num_products = 0
        self.left = like.new_empty(*like.shape, 0)
        self.right = like.new_empty(*like.shape, 0)
        self.projection = like.new_empty(like.shape[0], 0, 0)
        self.remainder = self._random(like.shape[1]).expand_as(like)

    def grow(self, size: int) -> None:
        while self.right.shape[2] < size:
            v, _ = self._unit(self.remainder, self.right)
            self.right = torch.cat([self.right, v[:, :, None]], dim=2)
            image = self._apply(self._product, v)
            image, overlap = _orthogonalized(image, self.left)
            u, length = self._unit(image, self.left)
            self.left = torch.cat([self.left, u[:, :, None]], dim=2)
            column = torch.cat([overlap, length[:, None]], dim=1)
            grown = torch.nn.functional.pad(self.projection, (0, 0, 0, 1))
            self.projection = torch.cat([grown, column[:, :, None]], dim=2)
            self.remainder, _ = _orthogonalized(self._apply(self._transposed, u), self.right)

    def restart(self, left: Tensor, values: Tensor, right: Tensor, size: int) -> None:
        """Keeps the ``size`` leading triples, with coordinates in the columns of ``left`` and ``right``.

        Their remainders all lie along r, which goes on as the next direction; its image has their coupling in it.
        """
        self.left = self.left @ left[:, :, :size]
        self.right = self.right @ right[:, :, :size]
        self.projection = torch.diag_embed(values[:, :size])

    def _apply(self, product: Product, vectors: Tensor) -> Tensor:
        self.num_products += 1
        image = product(vectors)
        self._scale = torch.maximum(self._scale, image.norm(dim=1))
        return image

    def _unit(self, vectors: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        """The vectors normalized, and their lengths; where only rounding is left, another direction and 0."""
        length = vectors.norm(dim=1)
        closed = length <= 10 * self._eps * self._scale
        if not bool(closed.any()):
            return vectors / length[:, None], length
        other, _ = _orthogonalized(self._random(vectors.shape[1]).expand_as(vectors), basis)
        other = other / other.norm(dim=1, keepdim=True)
        length = torch.where(closed, 0.0, length)
        return torch.where(closed[:, None], other, vectors / torch.where(closed, 1.0, length)[:, None]), length

    def _random(self, size: int) -> Tensor:
        """A direction that depends on how far the process is, and not on what happened in other rows."""
        generator = torch.Generator().manual_seed(_SEED + self.num_products)
        return torch.randn(size, dtype=torch.float64, device="cpu", generator=generator).to(self._scale)


def _orthogonalized(vectors: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The vectors [B, S] less their parts in an orthonormal basis [B, S, n], taken twice, and the coefficients."""
    total = vectors.new_zeros(vectors.shape[0], basis.shape[2])
    for _ in range(2):
        overlap = (vectors[:, None, :] @ basis).squeeze(1)
        vectors = vectors - (basis @ overlap[:, :, None]).squeeze(2)
        total = total + overlap
    return vectors, total
