"""The exact inverse of a diagonal matrix plus one of low rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from .. import _lists
from .._low_rank import LowRank
from .._types import TensorList
from ._arguments import check_damping
from ._dense import Direct, solved
from ._outcome import Outcome
from ._solution import Status
from ._system import System

#: The entries of a diagonal that belong to one tensor, or the number that all of them are.
_Entry: TypeAlias = float | Tensor


@dataclass(frozen=True)
class Woodbury:
    r"""Solve :math:`(D + R^\top C R) x = v` exactly, with :math:`D` = d + ``damping`` diagonal, for an operator that is
    diag(d) plus a matrix of low rank r.

    .. math:: x = D^{-1} \bigl(v - R^\top (I + C R D^{-1} R^\top)^{-1} C R D^{-1} v\bigr)

    No product is spent. The operator gives R D^-1 R' by the structure of its rows, which need not be formed: for the
    Gauss-Newton and Fisher matrices of fully connected layers, by products of two small Gram matrices wherever D is
    constant within a tensor. Sums, the r x r system and the result are taken in float64, one tensor at a time.
    Operators that can be written so are the outer product of a gradient, the Gauss-Newton and Fisher matrices of fewer
    outputs than weights, and their sums with a diagonal.

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
        weight = [d + self.damping for d in _diagonal(caller, found, self.damping)]
        x, singular, size = _solved(found, weight, system.rows())
        right = system.lengths(system.v)
        evidence = Direct(right, singular, Status.non_finite, Status.converged, self._explain)
        return Outcome(system.returned(x), evidence, system.scalars() + size.to(right))

    def _explain(self, status: Status) -> str:
        return (
            f"the result of Woodbury is not finite (damping={self.damping:.4g}); A + damping*I must be finite and not"
            " singular. Raise damping."
        )


def _solved(low_rank: LowRank, diagonal: list[_Entry], v: TensorList) -> tuple[TensorList, Tensor, Tensor]:
    """X, [k, *shape] for each tensor; a number that is not zero if the sum is singular; a bound on the norm of it."""
    home = low_rank.weights.device
    dtype = _lists.scalar_dtype(home)
    weights = low_rank.weights.detach().to(dtype)
    rank, count = len(weights), len(v[0]) if v else 1
    core = torch.zeros((rank, rank), dtype=dtype, device=home)
    inside = core.new_zeros((count, rank))
    lengths, largest = core.new_zeros(rank), core.new_zeros(())
    for block, d, t in zip(low_rank.blocks, diagonal, v, strict=True):
        # In float64, since a small D enlarges what rounding leaves.
        wide = t.to(_lists.scalar_dtype(t.device))
        part = torch.zeros_like(core, device=t.device, dtype=wide.dtype)
        block.add_gram(part, 1 / d)
        core += part.to(core)
        projected = torch.zeros_like(inside, device=t.device, dtype=wide.dtype)
        block.add_projected(wide / d, projected)
        inside += projected.to(core)
        most = d.amax() if isinstance(d, Tensor) and d.numel() else d if isinstance(d, float) else 0.0
        lengths += (most * part.diagonal()).to(core)
        largest = torch.maximum(largest, torch.as_tensor(most, dtype=dtype, device=home))
        del wide, part
    core = weights.unsqueeze(1) * core
    core.diagonal().add_(1)
    y, singular = solved(core, (weights * inside).T)
    x = []
    for block, d, t in zip(low_rank.blocks, diagonal, v, strict=True):
        wide = t.to(_lists.scalar_dtype(t.device), copy=True, memory_format=torch.contiguous_format)
        block.add_lifted(-y.T.to(wide), wide)
        x.append(wide.div_(d).to(t.dtype))
    return x, singular, largest + lengths @ weights.abs()


def _diagonal(caller: str, low_rank: LowRank, damping: float) -> list[_Entry]:
    """The diagonal: a number for each tensor in which it is constant, else its entries in float64.

    Looks at the extremes of each; NaN passes, and shows in the result.
    """
    remedy = "Raise damping, add a Diagonal, or use Exact or ConjugateGradient."
    if low_rank.diagonal is None:
        if damping == 0 and low_rank.blocks:
            raise ValueError(f"{caller}: damping must be > 0 for Woodbury without a diagonal; got 0. {remedy}")
        return [0.0] * len(low_rank.blocks)
    entries = [d.detach() for d in low_rank.diagonal]
    extremes = _lists.to_host([torch.stack(d.aminmax()) if d.numel() else d for d in entries])
    found: list[_Entry] = []
    for d, ends in zip(entries, extremes, strict=True):
        if ends and ends[0] + damping <= 0:
            raise ValueError(
                f"{caller}: the diagonal plus damping must be > 0 everywhere for Woodbury; got {ends[0]:.4g} +"
                f" {damping:.4g}. {remedy}"
            )
        constant = bool(ends) and ends[0] == ends[1]
        found.append(ends[0] if constant else d.to(_lists.scalar_dtype(d.device)))
    return found
