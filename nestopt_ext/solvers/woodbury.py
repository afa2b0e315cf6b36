"""The exact inverse of a diagonal matrix plus one of low rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _lists
from .._operator import LowRank
from .._types import TensorList
from ._arguments import check_damping
from ._dense import Direct, solved
from ._outcome import Outcome
from ._solution import Status
from ._system import System

#: Elements of the low-rank factor that are converted to float64 at once.
_AT_ONCE = 2**22


@dataclass(frozen=True)
class Woodbury:
    r"""Solve :math:`(D + R^\top C R) x = v` exactly, with :math:`D` = d + ``damping`` diagonal, for an operator that is
    diag(d) plus a matrix of low rank r.

    .. math:: x = D^{-1} \bigl(v - R^\top (I + C R D^{-1} R^\top)^{-1} C R D^{-1} v\bigr)

    No product is spent, and no memory but that of the rows R (r x P) and of pieces of them: sums and the r x r system
    are taken in float64. Operators that can be written so are the outer product of a gradient, the Gauss-Newton and
    Fisher matrices of fewer outputs than weights, and their sums with a diagonal.

    ``damping`` (units of curvature) is finite and >= 0, and d + damping must be > 0 everywhere, which is looked at once
    before anything else. A singular sum, possible with negative weights alone, gives NaN and ``non_finite``.

    Raises TypeError or ValueError for a bad ``damping``, for a matvec that offers no low rank, and for a D that is not
    positive.

    >>> import torch
    >>> from nestopt_ext.curvature import Diagonal
    >>> from nestopt_ext.solvers import solve
    >>> w = torch.ones(2)
    >>> solve(Diagonal(torch.tensor([1.0, 3.0]), w), torch.tensor([4.0, 4.0]), Woodbury(damping=1.0)).value
    tensor([2., 1.])
    """

    damping: float = 0.0

    def __post_init__(self) -> None:
        check_damping("Woodbury", self.damping)

    def run(self, system: System) -> Outcome:
        """The solution for the right-hand sides of ``system``."""
        found = system.product.low_rank()
        caller = system.product.caller
        if found is None:
            raise TypeError(
                f"{caller}: matvec must be an operator of low rank plus a diagonal for Woodbury; got one that offers"
                " none. Use Nystrom, Exact or ConjugateGradient."
            )
        _check_positive(caller, found.diagonal, self.damping, len(system.v))
        rows = system.rows()
        pieces = _Pieces(found, self.damping, rows)
        x, singular, size = pieces.solve()
        right = system.lengths(system.v)
        evidence = Direct(right, singular, Status.non_finite, Status.converged, self._explain)
        return Outcome(system.returned(x), evidence, system.scalars() + size.to(right))

    def _explain(self, status: Status) -> str:
        return (
            f"the result of Woodbury is not finite (damping={self.damping:.4g}); A + damping*I must be finite and not"
            " singular. Raise damping."
        )


class _Pieces:
    """The system in pieces of a few million elements, so that float64 costs no memory to speak of."""

    def __init__(self, low_rank: LowRank, damping: float, v: TensorList) -> None:
        self._low_rank = low_rank
        self._damping = damping
        self._v = v
        self._device = low_rank.weights.device
        self._dtype = _lists.scalar_dtype(self._device)
        self._rank = len(low_rank.weights)

    def solve(self) -> tuple[TensorList, Tensor, Tensor]:
        """x, [k, *shape] for each tensor; a number that is not zero if the sum is singular; a bound on its norm."""
        weights = self._low_rank.weights.detach().to(self._dtype)
        core = torch.eye(self._rank, dtype=self._dtype, device=self._device)
        count = len(self._v[0]) if self._v else 1
        inside = core.new_zeros((self._rank, count))
        lengths = core.new_zeros(self._rank)
        largest = core.new_zeros(())
        for i in range(len(self._v)):
            for v, d, rows in self._of(i):
                over = rows / d
                core += (weights.unsqueeze(1) * (over @ rows.T).to(self._device)).to(self._dtype)
                inside += (over @ v.T).to(self._device, self._dtype)
                lengths += rows.square().sum(1).to(self._device, self._dtype)
                largest = torch.maximum(largest, d.amax().to(self._device, self._dtype))
        y, singular = solved(core, weights.unsqueeze(1) * inside)
        x = []
        for i, t in enumerate(self._v):
            parts = [(v - y.T.to(v) @ rows) / d for v, d, rows in self._of(i)]
            x.append(torch.cat(parts, dim=1).reshape(t.shape) if parts else torch.zeros_like(t))
        return x, singular, largest + lengths @ weights.abs()

    def _of(self, i: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Of tensor ``i`` v [k, n], d [n] and R [r, n], some elements at a time, in float64."""
        v = _lists.rows(self._v[i])
        rows = _lists.rows(self._low_rank.rows[i].detach())
        diagonal = None if self._low_rank.diagonal is None else self._low_rank.diagonal[i].detach().reshape(-1)
        dtype = _lists.scalar_dtype(v.device)
        width = max(1, _AT_ONCE // max(self._rank, 1))
        for start in range(0, v.shape[1], width):
            part = slice(start, start + width)
            piece = v[:, part].to(dtype)
            d = piece.new_zeros(piece.shape[1]) if diagonal is None else diagonal[part].to(dtype)
            yield piece, d + self._damping, rows[:, part].to(dtype)


def _check_positive(caller: str, diagonal: TensorList | None, damping: float, count: int) -> None:
    """Looks at the smallest entry of the diagonal; NaN passes, and shows in the result."""
    remedy = "Raise damping, add a Diagonal, or use Exact or ConjugateGradient."
    if diagonal is None:
        if damping == 0 and count:
            raise ValueError(f"{caller}: damping must be > 0 for Woodbury without a diagonal; got 0. {remedy}")
        return
    smallest = [d.detach().amin() for d in diagonal if d.numel()]
    for (value,) in _lists.to_host(smallest):
        if value + damping <= 0:
            raise ValueError(
                f"{caller}: the diagonal plus damping must be > 0 everywhere for Woodbury; got {value:.4g} +"
                f" {damping:.4g}. {remedy}"
            )
