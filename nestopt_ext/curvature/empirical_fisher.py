"""The mean of the outer products of per-example gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._reference import opmath
from ._criteria import Targets, reduction_of
from ._evaluation import check_scalar
from ._gradient import named_faults
from ._model import Params, batch_size, part_of
from ._model_curvature import Call, ModelCurvature
from ._plan import Route
from .loss_hessian import LossHessian, OuterProducts


class EmpiricalFisher(ModelCurvature):
    r"""The empirical Fisher matrix :math:`c \sum_n g_n g_n^\top` of ``criterion(model(inputs), targets)``, where the
    loss is :math:`c \sum_n \ell_n` and :math:`g_n = d\ell_n / dw` in ``params`` w.

    c is what the reduction multiplies the sum of the terms with. For "mean" it is 1/B for B rows of a cross-entropy,
    where n runs over rows of classes, at any position ([N, C, d1] has N d1 of them). For losses that are a mean over
    elements (MSE, BCE-with-logits, Poisson and Gaussian NLL) l_n is the sum over the elements of example n, and c is 1
    over the number of elements. For "sum" c is 1. A cross-entropy with ``ignore_index`` or class weights divides by the
    total weight, so c is 1 over that, and l_n carries the weight of its class. With these, the matrix is in the units
    of the loss's Hessian and approaches it in expectation where the model is the true likelihood. Any other criterion
    is called on one example at a time and taken to be a mean over examples, c = 1/B, or, if its ``reduction`` is "sum",
    their sum.

    All arguments, what is kept, ``microbatch`` and what is left untouched are as in :class:`GaussNewton`. The matrix is
    positive semidefinite with rank at most the number of terms n. A product costs about a forward and a backward pass.
    ``route`` is as there; with one gradient for each term, in place of one for each output, the dual route pays from a
    few products on.

    Raises TypeError or ValueError for bad arguments, among them a ``route`` that the model does not allow, and
    RuntimeError, with the way out, where PyTorch has no second derivative of the model.

    Source: Martens, New insights and perspectives on the natural gradient method (2020), section 11, on how it differs
    from the Fisher matrix. The scale agrees with the EF operator of curvlinops where that has neither class weights nor
    ignored targets.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.zeros_(model.weight)
    >>> x, y = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0], [0.5]])
    >>> EmpiricalFisher(model, torch.nn.MSELoss(), x, y).dense()        # g = -2 y x: ([-2, -4], [0, -1])
    tensor([[2.0000, 4.0000],
            [4.0000, 8.5000]])
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        criterion: Callable[..., Tensor],
        inputs: Any,
        targets: Any,
        params: Params = None,
        *,
        microbatch: int | None = None,
        route: Route = "auto",
    ) -> None:
        super().__init__(model, criterion, inputs, targets, params, microbatch, route)

    def _middle(self, call: Call, outputs: Tensor, targets: Targets, share: float) -> LossHessian:
        known = self._known(outputs, targets)
        leaf = outputs.detach().requires_grad_()

        def gradients() -> Tensor:
            terms = self._terms(leaf, targets) if known is None else known.terms(leaf, targets)
            with named_faults("EmpiricalFisher", "criterion"):
                # Each output is in one term, so the gradient of the sum holds those of all terms side by side.
                (found,) = torch.autograd.grad(terms, leaf, torch.ones_like(terms), allow_unused=True)
            return torch.zeros_like(leaf) if found is None else found.detach()

        if known is None:
            gradient: Tensor = call(gradients).value
        else:  # nothing to put back
            found = known.gradient(outputs, targets)
            if found is None:
                with torch.enable_grad():
                    found = gradients()
            gradient = found
        if known is None:
            mean = reduction_of(self._criterion) == "mean"
            denominator: Tensor | float = len(gradient) / share if mean else 1.0
        else:
            denominator = known.denominator(outputs, targets) if self._total is None else self._total
        weight = torch.ones((), dtype=opmath(gradient.dtype), device=gradient.device) / denominator
        if isinstance(denominator, Tensor):  # 0 where all targets are ignored, and so are their gradients
            weight = torch.where(denominator == 0, 0.0, weight)
        dims = tuple(range(1, gradient.dim())) if known is None else known.term_dims(gradient)
        return OuterProducts(outputs, gradient, dims, weight)

    def _terms(self, outputs: Tensor, targets: Targets) -> Tensor:
        """An unknown criterion of one example at a time."""
        caller = "EmpiricalFisher"
        count = batch_size(caller, "outputs and targets", (outputs, targets))
        terms = []
        for n in range(count):
            with named_faults(caller, "criterion"):
                term = self._criterion(outputs[n : n + 1], *part_of(targets, n, n + 1))
            check_scalar(caller, "criterion", term)
            terms.append(term.reshape(()))
        return torch.stack(terms)
