"""Leading eigenpairs of a real linear map that is known by its products alone: restarted Arnoldi in real arithmetic.

Krylov-Schur restarts (Stewart 2002): the projection onto a Krylov space is cut back to the invariant subspace of its
leading eigenvalues, for which real orthonormal bases are used throughout, so that conjugate pairs stay together and a
product never meets a complex vector.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_SEED = 0

#: From eigenvalues (n,) to keys (n,), of which the largest lead; equal for conjugates.
Key = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Pairs:
    """Eigenvalues (k,) complex128 on the CPU, unit eigenvectors in the columns of (P, k), and how they were found."""

    values: Tensor
    vectors: Tensor
    num_products: int
    converged: bool


class Basis:
    """A Krylov decomposition A V = V H + v b', with V = rows 0 .. size-1 of ``rows``, v the next row, orthonormal.

    Rows live with the map; H and under it b' are in ``projected`` (size + 1, size), float64 on the CPU.
    """

    def __init__(self, product: Callable[[Tensor], Tensor], like: Tensor, capacity: int) -> None:
        self._product = product
        self._generator = torch.Generator(like.device).manual_seed(_SEED)
        self._rows = like.new_zeros(capacity + 1, like.numel())
        self._eps = torch.finfo(like.dtype).eps
        self.projected = torch.zeros(capacity + 1, capacity, dtype=torch.float64)
        self.size = 0
        self.num_products = 0
        self._largest = 0.0
        self._rows[0] = self._fresh(0)

    def grow(self, size: int) -> None:
        """Arnoldi steps, one product each, until there are ``size`` rows."""
        while self.size < size:
            j = self.size
            image = self._product(self._rows[j])
            self.num_products += 1
            self._largest = max(self._largest, torch.linalg.vector_norm(image).item())
            image, overlap = self._orthogonalized(image, j + 1)
            length = torch.linalg.vector_norm(image).item()
            self.projected[: j + 1, j] = overlap
            # An invariant subspace: what is left of the image is rounding, and another direction has to start.
            closed = length <= 10 * self._eps * self._largest
            self.projected[j + 1, j] = 0.0 if closed else length
            self._rows[j + 1] = self._fresh(j + 1) if closed else image / length
            self.size = j + 1

    def restrict(self, basis: Tensor, *, renew: bool = False) -> None:
        """Keeps the subspace with orthonormal coordinates ``basis`` (size, p), invariant under the projection.

        With ``renew`` the decomposition goes on from a random direction and the coupling, then negligible, is dropped.
        """
        size, kept = basis.shape
        inner = basis.T @ self.projected[:size, :size] @ basis
        coupling = self.coupling(basis)
        following = self._rows[size].clone()
        self._rows[:kept] = basis.T.to(self._rows) @ self._rows[:size]
        self.projected.zero_()
        self.projected[:kept, :kept] = inner
        self.size = kept
        if renew:
            self._rows[kept] = self._fresh(kept)
        else:
            self._rows[kept] = following
            self.projected[kept, :kept] = coupling

    def coupling(self, basis: Tensor) -> Tensor:
        """The row b' in those coordinates: its norm is by how much their span fails to be invariant."""
        return self.projected[self.size, : self.size] @ basis

    def square(self) -> Tensor:
        """The projection H."""
        return self.projected[: self.size, : self.size]

    def lift(self, coordinates: Tensor) -> Tensor:
        """Complex coordinates (size, k) as vectors in the columns of (P, k)."""
        rows = self._rows[: self.size]
        real, imaginary = (part.T.to(rows) @ rows for part in (coordinates.real, coordinates.imag))
        lifted: Tensor = torch.complex(real.T, imaginary.T)
        return lifted

    def _fresh(self, count: int) -> Tensor:
        """A random unit vector orthogonal to the first ``count`` rows."""
        rows = self._rows
        vector = torch.randn(rows.shape[1], dtype=rows.dtype, device=rows.device, generator=self._generator)
        vector, _ = self._orthogonalized(vector, count)
        unit: Tensor = vector / torch.linalg.vector_norm(vector)
        return unit

    def _orthogonalized(self, vector: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The vector less its part along the first ``count`` rows, and the coefficients of that part.

        Gram-Schmidt twice, which leaves the rows orthogonal to rounding (Giraud et al. 2005).
        """
        rows = self._rows[:count]
        total = torch.zeros(count, dtype=torch.float64)
        for _ in range(2):
            overlap = rows @ vector
            vector = vector - overlap @ rows
            total += overlap.to(total)
        return vector, total


def leading_pairs(
    product: Callable[[Tensor], Tensor],
    like: Tensor,
    k: int,
    key: Key,
    *,
    capacity: int,
    rtol: float,
    max_products: int,
) -> Pairs:
    """The ``k`` leading eigenpairs, one more where the last would leave its conjugate; k + 3 <= capacity < P.

    They have converged once the coupling of the subspace they span is at most ``rtol`` times the norm of the
    projection, and a cycle from a new random direction, orthogonal to them, finds none that leads them: a Krylov space
    alone holds one copy of a multiple eigenvalue.
    """
    basis = Basis(product, like, capacity)
    confirmed: Tensor | None = None
    while True:
        basis.grow(capacity)
        projection = basis.square()
        values, vectors = torch.linalg.eig(projection)
        order = leading(values, key, k)
        wanted = invariant_basis(projection, values[order], vectors[:, order])
        scale = torch.linalg.matrix_norm(projection, 2).item()
        converged = torch.linalg.vector_norm(basis.coupling(wanted)).item() <= rtol * scale
        found = _power_sums(wanted.T @ projection @ wanted)
        slack = max(rtol, 1e-12) ** 0.5 * torch.tensor([0.0, scale, scale**2])
        same = confirmed is not None and bool(((found - confirmed).abs() <= slack).all())
        spent = basis.num_products + capacity - len(order) > max_products
        if (converged and same) or spent:
            basis.restrict(wanted)
            values, vectors = torch.linalg.eig(basis.square())
            order = leading(values, key, k)
            return Pairs(values[order], basis.lift(vectors[:, order]), basis.num_products, converged and same)
        if converged:
            confirmed = found
            basis.restrict(wanted, renew=True)
            continue
        residuals = (basis.coupling(torch.eye(basis.size, dtype=torch.float64)).to(vectors) @ vectors).abs()
        arrived = int((residuals[order] <= rtol * scale).sum())
        kept = leading(values, key, len(order) + min(arrived, (capacity - len(order)) // 2))
        more = invariant_basis(projection, values[kept], vectors[:, kept]) if len(kept) < capacity else wanted
        basis.restrict(more)


def leading(values: Tensor, key: Key, k: int) -> Tensor:
    """The indices of the ``k`` leading eigenvalues of a real matrix, largest key first, conjugates next to each other.

    ``values`` as LAPACK returns them, a pair as neighbours with the positive imaginary part first, and so they stay.
    One more than ``k`` where the last would be parted from its conjugate.
    """
    keys = key(values).tolist()
    upper = [i for i, imaginary in enumerate(values.imag.tolist()) if imaginary >= 0]
    chosen: list[int] = []
    for i in sorted(upper, key=lambda i: -keys[i]):
        if len(chosen) >= k:
            break
        chosen += [i] if values[i].imag == 0 else [i, i + 1]
    return torch.tensor(chosen)


def invariant_basis(matrix: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
    """A real orthonormal basis (n, p) of a real matrix's invariant subspace to p eigenvalues, whole pairs among them.

    Their eigenvectors, the columns of ``vectors``, span it, but only roughly where the matrix is nearly defective.
    There one eigenvector after the other is deflated by unitary maps, stable however close the eigenvectors are.
    """
    basis = _real_basis(vectors)
    image = matrix @ basis
    defect = torch.linalg.matrix_norm(image - basis @ (basis.T @ image))
    if defect <= 100 * torch.finfo(matrix.dtype).eps * torch.linalg.matrix_norm(matrix):
        return basis
    rest = matrix.to(torch.complex128)
    columns = torch.eye(len(matrix), dtype=torch.complex128)
    for i, value in enumerate(values):
        found, others = torch.linalg.eig(rest)
        turn, _ = torch.linalg.qr(others[:, [int((found - value).abs().argmin())]], mode="complete")
        rest = (turn.mH @ rest @ turn)[1:, 1:]
        columns = torch.cat([columns[:, :i], columns[:, i:] @ turn], dim=1)
    return _real_basis(columns[:, : len(values)])


def _real_basis(columns: Tensor) -> Tensor:
    """A real orthonormal basis (n, p) of the span of p complex columns, which is closed under conjugation.

    For orthonormal columns Q the matrix [Re Q, Im Q] has p singular values 1 and the others 0: Q Q* is real.
    """
    left: Tensor = torch.linalg.svd(torch.cat([columns.real, columns.imag], dim=1), full_matrices=False)[0]
    return left[:, : columns.shape[1]]


def _power_sums(matrix: Tensor) -> Tensor:
    """The number, the sum and the sum of squares of the eigenvalues: by these a set of them is known again.

    Also a nearly multiple one, whose members move by far more than their sum.
    """
    return torch.stack([matrix.new_tensor(len(matrix)), matrix.trace(), (matrix @ matrix).trace()])
