"""Minimization of a loss until the norm of its gradient is small."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import _lists
from .._types import TensorList
from ..curvature._evaluation import check_scalar, preserved_rng
from ..curvature._gradient import named_faults

#: After so many evaluations that improve neither loss nor gradient, only rounding is left to fight.
_PATIENCE = 20

#: torch.optim.LBFGS learns no curvature from steps s with s'y < 1e-10. So it is started anew, with the loss scaled to
#: a gradient of norm 1, when the gradient has fallen by this factor.
_RESCALE = 1e-3


def minimize(
    caller: str,
    name: str,
    loss: Callable[[], Tensor],
    params: TensorList,
    goal: Callable[[float], float],
    max_evaluations: int,
) -> tuple[float, int]:
    """Moves ``params`` in place until the norm of the gradient is at most ``goal(norm at the start)``.

    The method is L-BFGS with a line search for the strong Wolfe conditions. Where it ends before the goal, params stand
    at the evaluated point with the smallest gradient. Returns the norm of the gradient and the number of evaluations.
    Each evaluation sees the same random numbers. ``.grad`` is written to.
    """
    search = _Search(caller, name, loss, params, goal, max_evaluations)
    while not search.is_over:
        search.rescale()
        optimizer = torch.optim.LBFGS(
            params,
            max_iter=max_evaluations,
            max_eval=max_evaluations,
            tolerance_grad=0,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )
        before = search.smallest
        try:
            optimizer.step(search.closure)  # type: ignore[no-untyped-call]
        except _Stop:
            continue
        if not search.smallest < before:
            break
    return search.finish(), search.evaluations


class _Stop(Exception):
    """Leaves L-BFGS where it stands: its own criteria know only the largest element of a gradient."""


class _Search:
    """Evaluates the loss for L-BFGS, and sees when to stop."""

    def __init__(
        self,
        caller: str,
        name: str,
        loss: Callable[[], Tensor],
        params: TensorList,
        goal: Callable[[float], float],
        max_evaluations: int,
    ) -> None:
        self._caller = caller
        self._name = name
        self._loss = loss
        self._params = params
        self._max_evaluations = max_evaluations
        self.evaluations = 0
        self.smallest = math.inf
        self._lowest = math.inf
        self._idle = 0
        self._best: TensorList = []
        self._scale = 1.0
        self._goal = -math.inf
        _, _, norm = self._evaluate()
        self._goal = goal(norm)
        self._next_scale = self.smallest

    @property
    def is_over(self) -> bool:
        return self.smallest <= self._goal or self.evaluations >= self._max_evaluations or self._idle >= _PATIENCE

    def rescale(self) -> None:
        """Starts from the best point, with a gradient of norm 1."""
        self._restore()
        self._scale = 1 / self.smallest
        self._next_scale = _RESCALE * self.smallest

    @torch.enable_grad()
    def closure(self) -> float:
        """The scaled loss, with its scaled gradient in ``.grad``."""
        value, grads, norm = self._evaluate()
        if self.is_over or norm <= self._next_scale:
            raise _Stop
        for param, grad in zip(self._params, grads, strict=True):
            param.grad = grad.mul(self._scale)
        return value * self._scale

    def finish(self) -> float:
        self._restore()
        return self.smallest

    def _restore(self) -> None:
        with torch.no_grad():
            for param, value in zip(self._params, self._best, strict=True):
                param.copy_(value)

    def _evaluate(self) -> tuple[float, TensorList, float]:
        with preserved_rng(), torch.enable_grad():
            loss = self._loss()
        check_scalar(self._caller, self._name, loss)
        with named_faults(self._caller, self._name):
            found = torch.autograd.grad(loss, self._params, allow_unused=True)
        if all(g is None for g in found):
            raise ValueError(
                f"{self._caller}: {self._name} must depend on params; got a graph that none of the"
                f" {len(self._params)} tensors is in."
            )
        grads = [torch.zeros_like(p) if g is None else g for p, g in zip(self._params, found, strict=True)]
        (value,), (norm,) = _lists.to_host([loss.detach(), _lists.norm(grads)])
        self.evaluations += 1
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise RuntimeError(
                f"{self._caller}: {self._name} and its gradient must be finite; got {value} with a gradient of norm"
                f" {norm} at evaluation {self.evaluations} of a solve. Bound the hparams, or start elsewhere."
            )
        self._idle = 0 if norm < self.smallest or value < self._lowest else self._idle + 1
        self._lowest = min(self._lowest, value)
        if norm < self.smallest:
            self.smallest = norm
            self._best = [p.detach().clone() for p in self._params]
        return value, grads, norm
