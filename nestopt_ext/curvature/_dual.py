r"""Functions of a curvature :math:`G = R^\top W R` in the span of its rows, where each example has a few.

For a model that treats examples apart, J' H J is a sum over N = m B rows: m cotangents for each of B examples. All that
a series or an inverse needs to know of the rows are their inner products with each other and with v, which layers give
without forming one. So a sum of K terms costs two passes through the layers, whatever K is, and recurrences in R^N.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import _lists, _ops, _reference
from .._low_rank import LowRank, RowBlock
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
            block = blocks[weight] if both and len(found[weight]) == len(found[bias]) == 1 else None
            if isinstance(block, OuterRows) and block.takes_bias:
                self._bias_of[weight] = bias
        self._along = set(self._bias_of.values())
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
            projections = self._projected(rows)[0]
            sq_norms = projections.new_zeros(num_terms + 1)
            sq_norms[0] = _square(rows, projections)
            c = torch.zeros_like(projections)
            _ops.dual_series_(c, sq_norms, gram, self._low_rank.weights, projections, alpha, damping=damping)
            along = alpha * self._sum_of_powers(1 - alpha * damping, num_terms) if damping else alpha * (num_terms + 1)
            c = (alpha * c).unsqueeze(0)
            local: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
            result = list(v)
            for block, places in self._parts():
                key = rows[places[0]].device, rows[places[0]].dtype
                if key not in local:
                    local[key] = along.to(*key), c.to(*key)
                factor, coefficients = local[key]
                onto = [torch.mul(rows[i].contiguous(), factor) for i in places]
                block.add_lifted(coefficients, *onto)
                for i, row in zip(places, onto, strict=True):
                    result[i] = row[0].to(v[i].dtype)
            return result, sq_norms

    def inverse(self, v: TensorList, damping: float) -> TensorList:
        r"""(G + damping I)^-1 v for k lists: :math:`(v - R^\top (\delta W^{-1} + R R^\top)^{-1} R v) / \delta`.

        In float64, one tensor at a time, since a small damping enlarges what rounding leaves.
        """
        with self._recording.reading():
            wide = [t.to(_lists.scalar_dtype(t.device)) for t in v]
            y = self._solved(self._projected(wide), damping)
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

    def _sum_of_powers(self, q: Tensor, last: int) -> Tensor:
        """1 + q + ... + q^last."""
        return (q ** torch.arange(last + 1, dtype=self._wide, device=q.device)).sum()

    def _parts(self) -> Iterator[tuple[RowBlock, list[int]]]:
        """The rows of each param, and its position; a bias goes along with its weight, behind which its position is."""
        for i, block in enumerate(self._low_rank.blocks):
            if i not in self._along:
                yield block, [i, self._bias_of[i]] if i in self._bias_of else [i]

    def _gram(self, dtype: torch.dtype) -> Tensor:
        """R R', kept."""
        if dtype not in self._grams:
            shape = self._count, self._count
            self._grams[dtype] = self._summed(shape, dtype, self._add_gram)
        return self._grams[dtype]

    def _add_gram(self, block: RowBlock, places: list[int], gram: Tensor) -> None:
        if len(places) > 1 and isinstance(block, OuterRows) and block.gram_goes_by_products:
            block.add_gram_with_bias(gram)
            return
        for i in places:
            self._low_rank.blocks[i].add_gram(gram)

    def _projected(self, v: TensorList) -> Tensor:
        """R v for k lists, [k, N], as :meth:`~nestopt_ext._low_rank.LowRank.project`."""
        shape = len(v[0]), self._count
        return self._summed(
            shape,
            self._wide,
            lambda block, places, part: block.add_projected(v[places[0]], part, *[v[i] for i in places[1:]]),
        )

    def _summed(
        self, shape: tuple[int, int], dtype: torch.dtype, add: Callable[[RowBlock, list[int], Tensor], None]
    ) -> Tensor:
        """The sum over all params of what ``add`` adds, each where the param lives."""
        home = self._low_rank.weights.device
        total = torch.zeros(shape, dtype=dtype, device=home)
        for block, places in self._parts():
            part = total if block.device == home else torch.zeros_like(total, device=block.device)
            add(block, places, part)
            if part is not total:
                total += part.to(home)
        return total

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
