"""The curvature of a whole data set, one batch at a time."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .. import _lists, _reference
from .._low_rank import LowRank, stacked_low_rank
from .._types import TensorList, Tensors
from ._evaluation import Replay, seeded_from_cpu
from ._gradient import check_params
from ._model import batch_length
from ._model_curvature import MAX_ROWS
from ._operator import CurvatureOperator

#: How much a batch counts.
Weights: TypeAlias = Literal["examples", "sum"] | Callable[[Any], float | Tensor]


class OverBatches(CurvatureOperator):
    r"""The curvature of a loss over all ``batches``: :math:`\sum_b n_b A_b / \sum_b n_b`, or :math:`\sum_b A_b`.

    ``make(batch)`` gives the operator A_b of one batch on ``params``: a :class:`Hessian`, :class:`GaussNewton`,
    :class:`EmpiricalFisher`, or a sum of these. ``batches`` is what can be iterated again and again (a DataLoader, a
    list of batches); an iterator, which ends after the first product, is refused. ``params`` (Tensor, list, tuple or
    dict of tensors that require grad) are those of the operators, in any order.

    ``weights`` is "examples" for losses that are a mean over the examples of a batch: n_b is their number, the first
    dimension of the first tensor found in the batch. "sum" is for losses that are a sum, and divides by nothing. Where
    a loss is a mean over something else, give a function of the batch that counts it, such as ``lambda batch:
    (batch[1] != -100).sum()`` for targets that are not ignored.

    Each product goes through all batches, at the params as they are then, with one batch and its graph alive at a time.
    Each pass starts from the random state of the first, that of PyTorch, ``random`` and ``numpy``, and puts back what
    it finds, so shuffling and augmentation in the loader and dropout in the model repeat themselves, and every product
    is with the same matrix. (What a loader keeps in worker processes that persist, or in generators hidden inside of
    data sets, is beyond that.) Many products cost one pass with :meth:`flat_products` and :meth:`dense`.

    Raises TypeError or ValueError for bad arguments, for no batches, and for an operator on other params.

    >>> import torch
    >>> from nestopt_ext.curvature import Hessian
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> data = [torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0]])]
    >>> whole = OverBatches(data, lambda x: Hessian((x @ w).square().mean(), w), w)
    >>> whole(torch.ones(2))                                # 2 X' X / 3
    tensor([3.3333, 0.6667])
    """

    def __init__(
        self,
        batches: Iterable[Any],
        make: Callable[[Any], CurvatureOperator],
        params: Tensors,
        *,
        weights: Weights = "examples",
    ) -> None:
        caller = "OverBatches"
        flat, structure = _lists.flatten(caller, "params", params)
        check_params(caller, "params", structure.labels("params"), flat)
        super().__init__(flat, structure)
        if isinstance(batches, Iterator):
            raise TypeError(
                f"{caller}: batches must be iterable again and again; got an iterator ({type(batches).__name__}),"
                " which one product would use up. Pass the DataLoader, or a list of the batches."
            )
        if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
            got = _lists.value_name(batches)
            raise TypeError(f"{caller}: batches must be an iterable of batches; got {got}.")
        if not callable(make):
            got = _lists.value_name(make)
            raise TypeError(f"{caller}: make must be a callable that gives a curvature operator; got {got}.")
        if weights not in ("examples", "sum") and not callable(weights):
            raise ValueError(f"{caller}: weights must be 'examples', 'sum' or a function of a batch; got {weights!r}.")
        self._batches = batches
        self._make = make
        self._weights = weights
        self._replay = Replay()
        self._python = random.getstate(), _numpy_state()

    def _operators(self) -> Generator[tuple[CurvatureOperator, float], None, None]:
        """The operator of each batch and how much it counts, one alive at a time."""
        found = False
        with self._python_replayed(), self._replay.run(undo=False) as call:
            iterator = call(lambda: iter(self._batches)).value
            while True:
                batch = call(lambda: next(iterator, _END)).value
                if batch is _END:
                    break
                found = True
                weight = self._weight(batch)
                with seeded_from_cpu():  # so that dropout differs between batches, whatever the loader draws
                    operator = self._operator(batch)
                del batch
                yield operator, weight
                del operator
        if not found:
            raise ValueError("OverBatches: batches must hold at least one batch; got none.")

    def _weight(self, batch: Any) -> float:
        if callable(self._weights):
            return float(self._weights(batch))
        return batch_length("OverBatches", batch) if self._weights == "examples" else 1

    def _scale(self, total_weight: float) -> float:
        if self._weights == "sum":
            return 1.0
        if not total_weight > 0:
            raise ValueError(f"OverBatches: weights must add up to more than 0; got {total_weight}.")
        return 1 / total_weight

    def _operator(self, batch: Any) -> CurvatureOperator:
        operator = self._make(batch)
        if not isinstance(operator, CurvatureOperator):
            got = _lists.value_name(operator)
            raise TypeError(f"OverBatches: make must give a curvature operator; got {got}.")
        return operator.on(self._params, self._structure)

    @contextmanager
    def _python_replayed(self) -> Iterator[None]:
        present = random.getstate(), _numpy_state()
        try:
            _set_python_states(*self._python)
            yield
        finally:
            _set_python_states(*present)

    def flat_product(self, v: TensorList) -> TensorList:
        """The weighted sum of the products of all batches."""
        return self._sum(lambda operator: operator.flat_product(v))

    def flat_products(self, v: TensorList) -> TensorList:
        """The same for k lists, in one pass through the batches."""
        return self._sum(lambda operator: operator.flat_products(v))

    def _sum(self, product: Callable[[CurvatureOperator], TensorList]) -> TensorList:
        total: TensorList = []
        examples = 0.0
        with closing(self._operators()) as operators:
            for operator, weight in operators:
                part = product(operator)
                del operator  # before the next one is made
                if not total:
                    total = [torch.zeros_like(t, dtype=_reference.opmath(t.dtype)) for t in part]
                torch._foreach_add_(total, [t.to(s.dtype) for s, t in zip(total, part, strict=True)], alpha=weight)
                examples += weight
        scale = self._scale(examples)
        return [(t * scale).to(p.dtype) for t, p in zip(total, self._params, strict=True)]

    def flat_low_rank(self) -> LowRank | None:
        """The rows of all batches, at most 4096 of them; None beyond, or where one batch has none."""
        parts: list[LowRank] = []
        counts: list[float] = []
        with closing(self._operators()) as operators:
            for operator, weight in operators:
                found = operator.flat_low_rank()
                del operator
                if found is None or sum(len(p.weights) for p in parts) + len(found.weights) > MAX_ROWS:
                    return None
                parts.append(found)
                counts.append(weight)
        scale = self._scale(sum(counts))
        return stacked_low_rank(parts, [scale * n for n in counts])


_END = object()


def _numpy_state() -> Any:
    return np.random.get_state()  # noqa: NPY002  what other code draws from


def _set_python_states(python: Any, numpy: Any) -> None:
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002
