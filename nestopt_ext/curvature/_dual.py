r"""Functions of a curvature :math:`G = R^\top W R` in the span of its rows, where each example has a few.

For a model that treats examples apart, J' H J is a sum over N = m B rows: m cotangents for each of B examples. All that
a series or an inverse needs to know of the rows are their inner products with each other and with v, which layers give
without forming one. So a sum of K terms costs two passes through the layers, whatever K is, and recurrences in R^N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _lists, _ops, _reference
from .._low_rank import LowRank
from .._types import TensorList
from ._example_rows import OuterRows, block_of
from ._examples import Examples, example_gradients
from ._recording import Recording
from .loss_hessian import LossHessian

#: Steps of the power iteration for the largest eigenvalue: each is a product with a matrix of N x N.
_POWER_STEPS = 32
_GOLDEN = (5**0.5 - 1) / 2


class DualSpace:
    """The rows of one batch, and what has been found of them; raises MixesExamples where a layer has none."""

    def __init__(self, recording: Recording, examples: Examples, middle: LossHessian) -> None:
        self._recording = recording
        tape, params = recording.tape, recording.params
        with recording.reading():
            cotangents, weights = middle.example_factor(examples.batch)
            found = example_gradients(tape, examples, cotangents)
            self._count = weights.numel()
            blocks = [block_of(uses, self._count, p) for uses, p in zip(found, params, strict=True)]
            home = params[0].device
            self._wide = _lists.scalar_dtype(home)
            self._low_rank = LowRank(blocks, weights.reshape(-1).to(home, self._wide))
        #: For each weight whose bias has the same left factors, the position of that bias.
        self._bias_of: dict[int, int] = {}
        for node in tape.nodes:
            if node.weight_and_bias is None:
                continue
            weight, bias = (node.slots[i] for i in node.weight_and_bias)
            both = 0 <= weight < tape.num_params and 0 <= bias < tape.num_params
            if both and len(found[weight]) == 1 and len(found[bias]) == 1:
                self._bias_of[weight] = bias
        self._grams: dict[torch.dtype, Tensor] = {}
        self._factor: tuple[float, Tensor] | None = None
        self._signed: bool | None = None

    def low_rank(self) -> LowRank:
        """The rows and their weights."""
        with self._recording.reading():
            return self._low_rank

    def series(self, v: TensorList, num_terms: int, alpha: Tensor, damping: float) -> tuple[TensorList, Tensor]:
        """As :meth:`~nestopt_ext._operator.LinearOperator.flat_series`.

        Matrix products are in the dtype of the params, the recurrence and all sums over layers in float64.
        """
        with self._recording.reading():
            dtype = _reference.opmath(v[0].dtype)
            gram = self._gram(dtype)
            alpha = alpha.detach().to(gram.device, self._wide).reshape(())
            rows = [t.unsqueeze(0).to(_reference.opmath(t.dtype)) for t in v]
            projections = self._low_rank.project(rows)[0]
            sq_norms = projections.new_zeros(num_terms + 1)
            sq_norms[0] = _square(rows, projections)
            c = torch.zeros_like(projections)
            _ops.dual_series_(c, sq_norms, gram, self._low_rank.weights, projections, alpha, damping=damping)
            q = 1 - alpha * damping
            powers = q ** torch.arange(num_terms + 1, dtype=self._wide, device=gram.device)
            along, c = alpha * powers.sum(), (alpha * c).unsqueeze(0)
            local: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
            result = []
            for block, row, t in zip(self._low_rank.blocks, rows, v, strict=True):
                key = row.device, row.dtype
                if key not in local:
                    local[key] = along.to(*key), c.to(*key)
                factor, coefficients = local[key]
                onto = torch.mul(row.contiguous(), factor)
                block.add_lifted(coefficients, onto)
                result.append(onto[0].to(t.dtype))
            return result, sq_norms

    def inverse(self, v: TensorList, damping: float) -> TensorList:
        r"""(G + damping I)^-1 v for k lists: :math:`(v - R^\top (\delta W^{-1} + R R^\top)^{-1} R v) / \delta`.

        In float64, one tensor at a time, since a small damping enlarges what rounding leaves.
        """
        with self._recording.reading():
            wide = [t.to(_lists.scalar_dtype(t.device)) for t in v]
            y = self._solved(self._low_rank.project(wide), damping)
            del wide
            result = []
            for block, t in zip(self._low_rank.blocks, v, strict=True):
                onto = t.to(_lists.scalar_dtype(t.device), copy=True, memory_format=torch.contiguous_format)
                block.add_lifted(-y.to(onto), onto)
                result.append(onto.div_(damping).to(t.dtype))
            return result

    def largest_eigenvalue(self) -> Tensor:
        """By power iteration in the span of the rows, plus the residual of that, at most the trace.

        Errs upwards, where a step that is made of it is safe: by the residual, and by rows of negative weight, which
        are left out. No random numbers are drawn, and nothing waits for the device.
        """
        with self._recording.reading():
            gram = next(iter(self._grams.values()), None)
            if gram is None:
                gram = self._gram(_reference.opmath(self._recording.params[0].dtype))
            weights = self._low_rank.weights.clamp(min=0)
            root = weights.sqrt().to(gram)
            # Numbers between 1 and 2 that repeat no pattern: what is alike in all rows is there, and the rest is.
            product = 1 + (torch.arange(1, self._count + 1, dtype=self._wide, device=gram.device) * _GOLDEN).frac().to(
                gram
            )
            x = product
            for _ in range(_POWER_STEPS):
                x = product / product.norm().clamp(min=torch.finfo(gram.dtype).tiny)
                product = root * (gram @ (root * x))
            value = x @ product
            bound = value + (product - value * x).norm()
            trace = (weights * gram.diagonal()).sum()
            return torch.minimum(bound.to(trace), trace)

    def _gram(self, dtype: torch.dtype) -> Tensor:
        """R R', kept."""
        if dtype not in self._grams:
            blocks, home = self._low_rank.blocks, self._low_rank.weights.device
            gram = torch.zeros((self._count, self._count), dtype=dtype, device=home)
            with_bias: dict[int, OuterRows] = {}
            for i in self._bias_of:
                weight = blocks[i]
                if isinstance(weight, OuterRows) and weight.gram_goes_by_products:
                    with_bias[i] = weight
            left_out = {self._bias_of[i] for i in with_bias}
            for i, block in enumerate(blocks):
                if i in left_out:
                    continue
                part = gram if block.device == home else torch.zeros_like(gram, device=block.device)
                if i in with_bias:
                    with_bias[i].add_gram_with_sum(part)
                else:
                    block.add_gram(part)
                if part is not gram:
                    gram += part.to(home)
            self._grams[dtype] = gram
        return self._grams[dtype]

    def _has_negative_weights(self) -> bool:
        """Looked at once."""
        if self._signed is None:
            self._signed = bool((self._low_rank.weights < 0).any())
        return self._signed

    def _solved(self, inside: Tensor, damping: float) -> Tensor:
        """(damping W^-1 + R R')^-1 times k vectors [k, N], with zeros in W allowed."""
        gram, weights = self._gram(self._wide), self._low_rank.weights
        if self._has_negative_weights():
            matrix = weights.unsqueeze(1) * gram
            matrix.diagonal().add_(damping)
            found, info = torch.linalg.solve_ex(matrix, (weights * inside).T)
            return torch.where(info != 0, float("nan"), found).T
        root = weights.sqrt()
        kept = self._factor  # once: another thread may put another damping there
        if kept is None or kept[0] != damping:
            matrix = root.unsqueeze(1) * gram * root
            matrix.diagonal().add_(damping)
            factor, info = torch.linalg.cholesky_ex(matrix)
            self._factor = kept = damping, torch.where(info != 0, float("nan"), factor)
        return root * torch.cholesky_solve((root * inside).T, kept[1]).T


def _square(v: TensorList, like: Tensor) -> Tensor:
    """The squared norm of a list, 0-dim, multiplied in its dtypes and summed in that of ``like``."""
    total = torch.zeros_like(like[:1])
    for t in v:
        row = t.reshape(1, -1)
        part = total if t.device == total.device else torch.zeros_like(total, device=t.device)
        _ops.row_dot_(part, row, row)
        if part is not total:
            total += part.to(total.device)
    return total[0]
