"""Curvatures of the form J' H J, with J the Jacobian of what a model computes from a batch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import _reference
from .._low_rank import LowRank, explicit
from .._types import TensorList
from . import _loop, _output_series
from ._criteria import Criterion, Targets, recognize, reduction_of
from ._evaluation import Evaluation, Replay
from ._model import Model, Params, batch_size, part_of
from ._operator import CurvatureOperator
from ._plan import Plan, Route
from ._recording import Jacobian, by_autograd, notice, recorded
from ._routes import Routes, check_route
from ._vjp import joined
from .loss_hessian import LossHessian, as_targets, check_criterion

_T = TypeVar("_T")

#: Rows that are worth forming one by one.
MAX_ROWS = 4096

#: A Jacobian, and the matrix between it and its transpose.
Piece = tuple[Jacobian, LossHessian]
#: What calls a closure, leaving nothing of it behind.
Call = Callable[[Callable[[], Any]], Evaluation]


class ModelCurvature(CurvatureOperator):
    """The sum of J' H J over the parts of a batch: one, whose graph is kept, or several, computed for each product."""

    def __init__(
        self,
        model: Callable[..., Tensor],
        criterion: Callable[..., Tensor],
        inputs: Any,
        targets: Any,
        params: Params,
        microbatch: int | None,
        route: Route,
    ) -> None:
        caller = type(self).__name__
        check_route(caller, route)
        self._model = Model(caller, model)
        check_criterion(caller, criterion)
        super().__init__(*self._model.choose(params))
        self._criterion = criterion
        self._inputs = inputs
        self._targets = as_targets(targets)
        self._replay = Replay()
        #: Why the model cannot be recorded; None as long as it can.
        self._unrecordable: str | None = None
        if microbatch is None:
            self._size = self._step = None
            self._total: Tensor | int | None = None
            self._whole: Piece | None = self._first(lambda call: self._piece(call, inputs, self._targets, None))
            notice(caller, self._whole[0])
            self._routes = Routes(caller, route, self._params, self._whole, self._unrecordable)
            return
        if isinstance(microbatch, bool) or not isinstance(microbatch, int):
            raise TypeError(f"{caller}: microbatch must be None or an int; got {microbatch!r}.")
        if microbatch < 1:
            raise ValueError(f"{caller}: microbatch must be at least 1; got {microbatch}.")
        self._model.check_microbatch()
        self._size = batch_size(caller, "inputs and targets", (inputs, self._targets))
        self._step = min(microbatch, max(1, self._size))
        self._whole = self._total = None
        self._routes = Routes(caller, route, self._params, "microbatch evaluates the model anew for each product")
        self._check_first_part(caller)

    def _first(self, evaluate: Callable[[Call], _T]) -> _T:
        """The first evaluation of the model: recorded, or by autograd if anything at all is in the way of that.

        What the model itself raises it raises again.
        """
        try:
            with self._replay.run() as call:
                return evaluate(call)
        except Exception as error:
            self._unrecordable = str(error) or type(error).__name__
        with self._replay.run() as call:
            return evaluate(call)

    def _check_first_part(self, caller: str) -> None:
        """Evaluates one part, for its faults, and finds what the whole batch is divided by."""
        first = part_of(self._inputs, 0, self._step or 0), part_of(self._targets, 0, self._step or 0)
        outputs, jacobian = self._first(lambda call: self._jacobian(call, first[0]))
        notice(caller, jacobian)
        del jacobian
        known = self._known(outputs, first[1])
        if known is None:
            return
        if known.spans_batch(outputs):
            raise ValueError(
                f"{caller}: microbatch must be None where the criterion has a weight for each example;"
                f" got {self._step}. Shape the weight without the batch dimension, or scale the loss another way."
            )
        self._total = known.denominator(outputs, self._targets)

    def _known(self, outputs: Tensor, targets: Targets) -> Criterion | None:
        known = recognize(self._criterion)
        return known if known is not None and known.accepts(outputs, targets) else None

    def _share(self, examples: int | None) -> float:
        """How much of a loss that is a mean over the batch a part of it makes up; None stands for the whole batch."""
        if self._size is None or examples is None or reduction_of(self._criterion) == "sum":
            return 1.0
        return examples / self._size

    @abstractmethod
    def _middle(self, call: Call, outputs: Tensor, targets: Targets, share: float) -> LossHessian:
        """The matrix between J' and J, for outputs without graph; ``call`` evaluates the criterion.

        ``share`` is what a mean over this part of the batch counts in the mean over all of it.
        """

    def _jacobian(self, call: Call, inputs: Any) -> tuple[Tensor, Jacobian]:
        """The model's outputs, without graph, and their Jacobian."""
        make = recorded if self._unrecordable is None else by_autograd
        return make(type(self).__name__, self._model, inputs, self._params, call)

    def _piece(self, call: Call, inputs: Any, targets: Targets, examples: int | None) -> Piece:
        outputs, jacobian = self._jacobian(call, inputs)
        return jacobian, self._middle(call, outputs, targets, self._share(examples))

    def _pieces(self) -> Generator[Piece, None, None]:
        """The parts of the batch, one alive at a time."""
        if self._whole is not None:
            yield self._whole
            return
        assert self._size is not None and self._step is not None
        with self._replay.run() as call:
            for start in range(0, self._size, self._step):
                stop = min(start + self._step, self._size)
                part = part_of(self._inputs, start, stop), part_of(self._targets, start, stop)
                yield self._piece(call, *part, stop - start)

    def flat_product(self, v: TensorList) -> TensorList:
        """J' H J v."""
        return self._sum(lambda jacobian, middle: jacobian.backward(middle.product(jacobian.forward(v))))

    def flat_products(self, v: TensorList) -> TensorList:
        """The same for k lists at once."""
        return self._sum(lambda jacobian, middle: jacobian.backwards(middle.products(jacobian.forwards(v))))

    def _sum(self, product: Callable[[Jacobian, LossHessian], TensorList]) -> TensorList:
        if self._whole is not None:
            return product(*self._whole)
        total: TensorList | None = None
        with closing(self._pieces()) as pieces:
            for piece in pieces:
                part = product(*piece)
                del piece  # before the next one is made
                if total is None:
                    total = [t.to(_reference.opmath(t.dtype)) for t in part]
                else:
                    torch._foreach_add_(total, [t.to(s.dtype) for s, t in zip(total, part, strict=True)])
        assert total is not None
        return [t.to(p.dtype) for t, p in zip(total, self._params, strict=True)]

    def plan(self, num_terms: int) -> Plan:
        """How a Neumann series of ``num_terms`` (int >= 0) products would be summed now, with the estimates behind it.

        Nothing is computed but the estimates. ``print(operator.plan(20))`` shows them; see :class:`Plan`.
        """
        if isinstance(num_terms, bool) or not isinstance(num_terms, int):
            raise TypeError(f"{type(self).__name__}.plan: num_terms must be an int; got {num_terms!r}.")
        if num_terms < 0:
            raise ValueError(f"{type(self).__name__}.plan: num_terms must be >= 0; got {num_terms}.")
        return self._routes.plan(num_terms)

    def flat_series(
        self, v: TensorList, num_terms: int, alpha: Tensor, damping: float
    ) -> tuple[TensorList, Tensor] | None:
        """In the span of the rows where the plan says so; None for products one by one."""
        space = self._routes.for_series(num_terms)
        return None if space is None else space.series(v, num_terms, alpha, damping)

    def flat_inverse(self, v: TensorList, damping: float) -> TensorList | None:
        """By a factorization in the span of the rows, where those are known by example; None without damping."""
        space = self._routes.for_inverse() if damping > 0 else None
        return None if space is None else space.inverse(v, damping)

    def largest_eigenvalue(self) -> Tensor | None:
        """Slightly from above, in the span of the rows; None where that costs more than a few products."""
        space = self._routes.for_eigenvalue()
        return None if space is None else space.largest_eigenvalue()

    def flat_loop(
        self, v: TensorList, num_terms: int, alpha: Tensor, damping: float, diagonal: TensorList | None = None
    ) -> tuple[TensorList, Tensor] | None:
        """Term by term, in the space of the outputs where the plan says so, else in place.

        None in 16 bits, which sums are not kept in, and with ``microbatch``.
        """
        plain = all(t.device == v[0].device and t.dtype in (torch.float32, torch.float64) for t in v)
        if self._whole is None or not plain:
            return None
        found = self._routes.for_outputs(num_terms) if diagonal is None else None
        if found is None:
            return _loop.neumann_sum(*self._whole, v, num_terms, alpha, damping, diagonal)
        return _output_series.neumann_sum(*found, self._whole[1], v, num_terms, alpha, damping)

    def flat_low_rank(self) -> LowRank | None:
        """The rows S J with H = S' diag(c) S, at most 4096 of them; None beyond.

        By layers, and never formed, where the examples can be told apart.
        """
        space = self._routes.for_rows(MAX_ROWS)
        return self._explicit_rows() if space is None else space.low_rank()

    def _explicit_rows(self) -> LowRank | None:
        rows: list[TensorList] = []
        weights: TensorList = []
        count = 0
        with closing(self._pieces()) as pieces:
            for jacobian, middle in pieces:
                count += middle.outputs.numel()
                factor = middle.factor() if count <= MAX_ROWS else None
                if factor is None:
                    return None
                rows.append(jacobian.backwards(factor[0]))
                weights.append(factor[1])
                del jacobian, middle, factor
        return explicit(joined(rows, list), torch.cat(weights).to(self._params[0].device))
