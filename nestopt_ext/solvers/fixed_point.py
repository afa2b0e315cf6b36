"""The inverse of I - T for any contraction T, by going round until nothing moves."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch

from ._arguments import CheckEvery, check_check_every, check_count, check_damping, check_rtol, looks
from ._history import History
from ._outcome import Outcome
from ._solution import Status
from ._space import Space
from ._system import System


@dataclass(frozen=True)
class FixedPoint:
    r"""Solve :math:`(A + \delta I) x = v` by :math:`x \leftarrow x + (v - (A + \delta I) x)` from zero.

    It converges where :math:`T = I - A - \delta I` is a contraction, for example the transposed derivative of any
    training step in its weights; A need not be symmetric. With :math:`T` a step of gradient descent of rate alpha it is
    the Neumann series: K iterations are those of ``Neumann(num_terms=K - 1, alpha=1)``. The residual is computed anew
    at every iterate, so rounding does not add up.

    ``max_iters`` (int >= 1) counts iterations; the first gives x = v and costs nothing, each other one a product.
    ``rtol`` in [0, 1) is the residual, relative to the norm of v, at which a right-hand side is done; its iterate is
    then frozen on the device, as it is at rounding level. ``damping`` = delta is finite and >= 0. ``check_every`` is
    that of :class:`ConjugateGradient`.

    Residuals that grow give the status ``diverged``. Besides the result the memory of v is used three times.

    Raises TypeError or ValueError, naming the option, when one is out of range.

    Source: Grazzi, Franceschi, Pontil, Salzo, On the iteration complexity of hypergradient computation (2020); here the
    iterate that met the tolerance is the one that is returned.

    >>> import torch
    >>> from nestopt_ext.solvers import solve
    >>> step = torch.tensor([[0.0, 0.5], [0.0, 0.0]])                  # (I - T)^-1 = I + T, since T^2 = 0
    >>> solve(lambda v: v - step @ v, torch.tensor([1.0, 1.0]), FixedPoint()).value
    tensor([1.5000, 1.0000])
    """

    max_iters: int = 100
    rtol: float = 1e-6
    damping: float = 0.0
    _: KW_ONLY
    check_every: CheckEvery = "auto"

    def __post_init__(self) -> None:
        check_count("FixedPoint", "max_iters", self.max_iters)
        check_rtol("FixedPoint", self.rtol)
        check_damping("FixedPoint", self.damping)
        check_check_every("FixedPoint", self.check_every)

    def run(self, system: System) -> Outcome:
        """The iterate for the right-hand sides of ``system``."""
        space = Space(system)
        v = space.gather([t.detach() for t in system.v])
        x = space.copied(system.v)
        views = space.views(x)
        asked = self.rtol * system.length()
        norms = [space.norm(v)]
        limit = torch.zeros_like(norms[0])
        active = ~(norms[0] <= 0)
        look = looks(self.check_every, system.v)
        for i in range(1, self.max_iters):
            if look and (i - 1) % look == 0 and not bool(active.any()):
                break
            residual = [b - a for a, b in zip(space.gather(system.apply(views)), v, strict=True)]
            if self.damping:
                residual = [r.sub_(t, alpha=self.damping) for r, t in zip(residual, x, strict=True)]
            norms.append(space.norm(residual))
            size = norms[0] + space.norm(x)
            # Tensors of a fine dtype go on when those of a coarse one are at rounding level.
            active = active & ~(norms[-1] <= torch.maximum(asked, space.least_noise * size))
            limit = torch.maximum(asked, space.most_noise * size)
            space.add_(x, residual, active.to(space.scalar))
        used = f"max_iters={self.max_iters}, damping={self.damping:.4g}"
        evidence = History([torch.stack(norms).square()], system.columns, used, _describe, limit=limit)
        return Outcome(space.returned(x, system.scalars(1.0)), evidence, system.scalars(1.0), self.rtol)


def _describe(status: Status, used: str, factor: str) -> str:
    end = "is not finite" if status is Status.non_finite else "diverges"
    return (
        f"the fixed-point iteration {end} ({used}); I - (A + damping*I) must be a contraction; got residuals that"
        f" change by a factor of {factor}. Scale the map to a smaller step, or use Exact (or, where the matrix is"
        " symmetric, ConjugateGradient). The values are returned as they are."
    )
