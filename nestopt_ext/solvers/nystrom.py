"""The inverse of a damped curvature from a randomized sketch of low rank."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from ._arguments import check_count, check_damping, check_seed
from ._dense import Dense, Direct, guarded
from ._outcome import Outcome
from ._solution import Status
from ._system import System


@dataclass(frozen=True)
class Nystrom:
    r"""Solve :math:`(\hat A + \delta I) x = v` with a positive semi-definite :math:`\hat A` of rank ``rank`` near A.

    :math:`\hat A = (A \Omega)(\Omega^\top A \Omega)^{-1}(A \Omega)^\top = U \Lambda U^\top` for orthonormal Gaussian
    test vectors :math:`\Omega`, and by Woodbury :math:`x = U (\Lambda + \delta)^{-1} U^\top v + (v - U U^\top v) /
    \delta`. A of rank up to ``rank``, and any A once ``rank`` is the number P of elements, is inverted exactly; else
    the error is that of the eigenvalues left out, beside ``damping``.

    ``rank`` (int >= 1, P where that is less) counts products, an operator's all at once; several right-hand sides share
    them. ``damping`` = delta (units of curvature) is finite and > 0. ``seed`` makes the test vectors, by a generator of
    their own. About four matrices rank x P are held at a time, in float64 on the CPU.

    A must be positive semi-definite; directions of negative curvature in the sketch are taken for zero, with the status
    ``negative_curvature``.

    Raises TypeError or ValueError, naming the option, when one is out of range.

    Source: Frangella, Tropp, Udell, Randomized Nystrom preconditioning (2021), algorithm 2.1, with its stabilizing
    shift. Here the core is factorized by its eigenvalues in place of Cholesky's method, which indefinite ones would
    stop.

    >>> import torch
    >>> from nestopt_ext.solvers import solve
    >>> solve(lambda v: torch.tensor([3.0, 1.0]) * v, torch.tensor([4.0, 2.0]), Nystrom(rank=2, damping=1.0)).value
    tensor([1.0000, 1.0000])
    """

    rank: int = 10
    damping: float = 1e-2
    _: KW_ONLY
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("Nystrom", "rank", self.rank)
        check_damping("Nystrom", self.damping, positive=True)
        check_seed("Nystrom", self.seed)

    def run(self, system: System) -> Outcome:
        """The solution for the right-hand sides of ``system``."""
        dense = Dense(system)
        vectors, values, negative, spoilt = self._sketch(system, dense)
        v = dense.matrix(system.rows()).T
        inside = vectors.T @ v
        outside = v - vectors @ inside
        outside = outside - vectors @ (
            vectors.T @ outside
        )  # what rounding left of the inside, 1 / damping would enlarge
        x = vectors @ (inside / (values + self.damping).unsqueeze(1)) + outside / self.damping + spoilt
        right = system.lengths(system.v)
        evidence = Direct(right, negative, Status.negative_curvature, Status.max_terms, self._explain)
        largest = values.amax() if len(values) else values.new_zeros(())
        size = system.scalars(self.damping) + largest.to(right)
        return Outcome(system.returned(dense.rows(x.T)), evidence, size)

    def _sketch(self, system: System, dense: Dense) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Eigenvectors [P, r] and eigenvalues [r] of the sketch; whether A has negative ones; 0, or NaN for a NaN."""
        rank = min(self.rank, dense.size)
        generator = torch.Generator(dense.device).manual_seed(self.seed)
        normal = torch.randn((dense.size, rank), dtype=dense.dtype, device=dense.device, generator=generator)
        test, _ = torch.linalg.qr(normal)
        handed = dense.rows(test.T)
        test = dense.matrix(handed).T if rank else test  # as rounded for the products
        sketch = dense.matrix(system.product.many(handed)).T if rank else test
        sketch, spoilt = guarded(sketch)
        shift = dense.eps * torch.linalg.vector_norm(sketch)
        sketch = sketch + shift * test
        core = test.T @ sketch
        weights, basis = torch.linalg.eigh((core + core.T) / 2)
        scale = weights.abs().amax() if rank else shift
        negative = (weights < shift - 64 * dense.eps * scale).any()
        kept = weights > rank * torch.finfo(dense.dtype).eps * scale
        roots = torch.where(kept, weights.clamp_min(0).rsqrt(), torch.zeros_like(weights))
        vectors, singular, _ = torch.linalg.svd((sketch @ basis) * roots, full_matrices=False)
        return vectors, (singular.square() - shift).clamp_min(0), negative, spoilt

    def _explain(self, status: Status) -> str:
        used = f"rank={self.rank}, damping={self.damping:.4g}"
        if status is Status.negative_curvature:
            return (
                f"A must be positive semi-definite for Nystrom; got negative curvature in the sketch ({used}), which is"
                " taken for zero. Use a positive semi-definite curvature (Gauss-Newton)."
            )
        return f"the result of Nystrom is not finite ({used}). Look for NaN or Inf in what matvec returns."
