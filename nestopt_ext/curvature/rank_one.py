"""The outer product of a gradient with itself, in closed form."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _lists, _ops, _reference
from .._distributed import average_, check_group
from .._low_rank import LowRank, explicit
from .._types import Loss, TensorList, Tensors
from ._evaluation import evaluate
from ._gradient import check_params, named_faults
from ._operator import CurvatureOperator
from ._plan import Plan

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class RankOne(CurvatureOperator):
    r"""The matrix :math:`g g^\top` with g the gradient of a mean loss in ``params``.

    Some code for hypergradients calls this the Gauss-Newton matrix. It is not: it knows one direction only, and without
    damping it has no inverse, so a Neumann series multiplies everything orthogonal to g by (K + 1) alpha. For the
    matrix of that name see :class:`GaussNewton`; for the mean of outer products, :class:`EmpiricalFisher`.

    ``loss`` is a scalar tensor with a graph, which stays alive, or a zero-argument closure that returns one, called
    once; ``params`` (Tensor, list, tuple or dict of float32, float64, bfloat16 or float16 tensors that require grad)
    are only read. One gradient is taken when the operator is made, and no graph is kept. Solvers find everything in
    closed form here: a Neumann series of any length, and the damped inverse, cost one inner product. With a
    ``process_group`` g is the mean of the gradients of its ranks.

    Raises TypeError or ValueError for a bad ``loss`` or ``params``.

    Source: Lorraine, Vicol, Duvenaud, Optimizing millions of hyperparameters by implicit differentiation (2020), whose
    code has it as a cheap curvature; the closed forms, and damping, are ours.

    >>> import torch
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> RankOne(w[0] * w[1], w).dense()                  # g = [w1, w0]
    tensor([[4., 2.],
            [2., 1.]])
    """

    def __init__(self, loss: Loss, params: Tensors, *, process_group: ProcessGroup | None = None) -> None:
        check_group("RankOne", process_group)
        flat, structure = _lists.flatten("RankOne", "params", params)
        check_params("RankOne", "params", structure.labels("params"), flat)
        super().__init__(flat, structure)
        evaluation = evaluate("RankOne", "loss", loss)
        with evaluation.differentiating(), named_faults("RankOne", "loss"):
            grads = torch.autograd.grad(evaluation.loss, flat, retain_graph=True, allow_unused=True)
        if all(g is None for g in grads):
            raise ValueError(
                f"RankOne: loss must depend on params; got a graph that none of the {len(flat)} tensors is in."
            )
        self._g = [torch.zeros_like(p) if g is None else g.detach() for p, g in zip(flat, grads, strict=True)]
        if process_group is not None:
            self._g = [g.clone() for g in self._g]
            average_(self._g, process_group)
        self._group = process_group
        self._square = self._dots([g.unsqueeze(0) for g in self._g])[0]

    @property
    def is_mean_over_examples(self) -> bool:
        """False, since the square of a mean is not the mean of squares; True where g is the mean over the ranks."""
        return self._group is not None

    def _dots(self, v: TensorList) -> Tensor:
        """The inner products of g with k lists, [k], in the widest dtype."""
        home = self._g[0].device
        wide = _lists.scalar_dtype(home)
        total = torch.zeros(v[0].shape[0], dtype=wide, device=home)
        for g, t in zip(self._g, v, strict=True):
            math = _reference.opmath(t.dtype)
            total += (t.reshape(len(t), g.numel()).to(math) @ g.reshape(-1).to(math)).to(total)
        return total

    def _combined(self, a: Tensor, v: TensorList, b: Tensor) -> TensorList:
        """A v + b g for k lists; ``a`` is 0-dim and ``b`` is [k]."""
        widest = [torch.promote_types(t.dtype, g.dtype) for t, g in zip(v, self._g, strict=True)]
        result = [t.to(dtype, copy=True) for t, dtype in zip(v, widest, strict=True)]
        g = [
            g if _reference.opmath(g.dtype) == _reference.opmath(dtype) else g.to(dtype)
            for g, dtype in zip(self._g, widest, strict=True)
        ]
        for positions in _lists.by_device(result).values():
            home = result[positions[0]].device
            scale, along = a.to(home), b.to(home)
            for k in range(len(b)):
                _ops.rank_one_update_([result[i][k] for i in positions], [g[i] for i in positions], scale, along[k])
        return [r.to(t.dtype) for r, t in zip(result, v, strict=True)]

    def flat_product(self, v: TensorList) -> TensorList:
        """G (g'v)."""
        return [t[0] for t in self.flat_products([t.unsqueeze(0) for t in v])]

    def flat_products(self, v: TensorList) -> TensorList:
        """G (g'v) for k lists at once."""
        dots = self._dots(v)
        return [
            (dots.to(device=g.device, dtype=math).view(-1, *[1] * g.dim()) * g.to(math)).to(g.dtype)
            for g, math in ((g, _reference.opmath(g.dtype)) for g in self._g)
        ]

    def flat_inverse(self, v: TensorList, damping: float) -> TensorList | None:
        """(v - g (g'v) / (damping + g'g)) / damping, the formula of Sherman and Morrison; None without damping."""
        if damping <= 0:
            return None
        weight = -self._dots(v) / (damping * (damping + self._square))
        return self._combined(torch.full_like(self._square, 1 / damping), v, weight)

    def flat_low_rank(self) -> LowRank:
        """One row, g, of weight 1."""
        return explicit([g.unsqueeze(0) for g in self._g], self._g[0].new_ones(1))

    def flat_series(self, v: TensorList, num_terms: int, alpha: Tensor, damping: float) -> tuple[TensorList, Tensor]:
        """The series, in which the part of v along g shrinks by r = 1 - alpha (damping + g'g) with each term, and the
        rest by q = 1 - alpha damping.
        """
        square = self._square
        step = alpha.detach().to(square)
        rows = [t.unsqueeze(0) for t in v]
        dot = self._dots(rows)[0]
        powers = torch.arange(num_terms + 1, dtype=square.dtype, device=square.device)
        q = 1 - step * damping
        q_powers, r_powers = q**powers, (q - step * square) ** powers
        along = -step * _divided_differences(q, step * square, q_powers, r_powers, powers).sum()
        along = torch.where(square > 0, along, 0.0)
        total = self._combined(step * q_powers.sum(), rows, (step * along * dot).view(1))
        norm = _lists.norm(v).to(square).square()
        parallel = torch.where(square > 0, dot.square() / square, 0.0)
        parallel = torch.minimum(parallel, norm)
        sq_norms = (norm - parallel) * q_powers.square() + parallel * r_powers.square()
        return [t[0] for t in total], sq_norms

    def plan(self, num_terms: int) -> Plan:
        """In closed form."""
        return Plan("dual", "its sums are known in closed form", num_terms, rows=1)

    def largest_eigenvalue(self) -> Tensor:
        """G'g."""
        return self._square


def _divided_differences(q: Tensor, x: Tensor, q_powers: Tensor, r_powers: Tensor, powers: Tensor) -> Tensor:
    """(q^j - r^j) / (q - r) for r = q - x and each j in ``powers``, to full accuracy however small x > 0 is."""
    apart = (q_powers - r_powers) / x
    ratio = x / q
    close = -q_powers * torch.expm1(powers * torch.log1p(-ratio)) / x
    return torch.where(ratio.abs() < 0.1, close, apart)
