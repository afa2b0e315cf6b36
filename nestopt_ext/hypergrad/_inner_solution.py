"""Values of tensors moved for a while, and the inner problem solved again from where its params are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _lists
from .._types import Loss, TensorList
from ..curvature._evaluation import evaluate
from ..curvature._gradient import Gradient, named_faults
from ._spectrum import DENSE_ELEMENTS, dense_matrix, lanczos, pseudo_inverse

_MOST_STEPS = 60
_MOST_HALVINGS = 12

#: Of a Newton step, the error of which the next step corrects.
_LANCZOS_TOLERANCE = 1e-4


class Flat:
    """A list of tensors as one vector in the widest dtype of its device, and back."""

    def __init__(self, tensors: TensorList) -> None:
        self.tensors = tensors
        self.device = tensors[0].device
        self.dtype = _lists.scalar_dtype(self.device)
        self.eps = max(torch.finfo(t.dtype).eps for t in tensors)

    def pack(self, tensors: list[Tensor | None] | TensorList) -> Tensor:
        """The vector of tensors like these; None stands for zeros."""
        parts = [
            torch.zeros(t.numel(), dtype=self.dtype, device=self.device)
            if f is None
            else f.detach().reshape(-1).to(self.device, self.dtype)
            for f, t in zip(tensors, self.tensors, strict=True)
        ]
        return torch.cat(parts)

    def unpack(self, vector: Tensor) -> TensorList:
        """New tensors like these."""
        parts = torch.split(vector, [t.numel() for t in self.tensors])
        return [p.reshape(t.shape).to(t.device, t.dtype, copy=True) for p, t in zip(parts, self.tensors, strict=True)]

    def values(self) -> Tensor:
        return self.pack(self.tensors)

    def write(self, vector: Tensor) -> None:
        """Puts values into the tensors without a trace in their version counters."""
        for t, value in zip(self.tensors, self.unpack(vector), strict=True):
            t.data.copy_(value)


@contextmanager
def kept(tensors: TensorList) -> Iterator[None]:
    """Puts the bits of the tensors back at the end, however it comes."""
    regions = [t.data for t in tensors]
    before = [r.clone() for r in regions]
    try:
        yield
    finally:
        for region, value in zip(regions, before, strict=True):
            region.copy_(value)


@dataclass(frozen=True)
class InnerSolution:
    """Params that minimize the inner loss, and the length of the last Newton step, which is how far off they may be."""

    params: Tensor
    last_step: float
    found: bool


class InnerSolver:
    """Newton's method on the inner loss, at the hparams as they are.

    The Hessian is written out where it is small, and then kept from step to step and from solve to solve as long as it
    shortens the steps; else each step is solved for in the Krylov space of the gradient.
    """

    def __init__(self, caller: str, inner_loss: Loss, params: TensorList, cutoff: float) -> None:
        self._caller = caller
        self._loss = inner_loss
        self._flat = Flat(params)
        self._cutoff = cutoff
        self._eigen: tuple[Tensor, Tensor] | None = None

    def solve(self, start: Tensor) -> InnerSolution:
        """From ``start``; the params hold the last point tried afterwards."""
        eps = self._flat.eps
        exact = start.numel() > DENSE_ELEMENTS  # every step is found with the Hessian of its own point
        point = start
        loss, gradient = self._at(point)
        fresh = exact or self._eigen is None
        step = self._step(point, gradient)
        for _ in range(_MOST_STEPS):
            size, scale = float(step.norm()), 1 + float(point.norm())
            small = size <= eps**0.5 * scale
            if not math.isfinite(size) or size <= 4 * eps * scale:
                return InnerSolution(point, size, math.isfinite(size))
            moved = self._descend(point, loss, step, 16 * eps)
            if moved is None and fresh:
                return InnerSolution(point, size, small)
            if moved is not None:
                point, loss, gradient = moved
                step = self._step(point, gradient)
                slow = float(step.norm()) > 0.3 * size
                if slow and small and fresh:  # rounding: the steps get no shorter any more
                    return InnerSolution(point, float(step.norm()), True)
                fresh = exact
            if not exact and (moved is None or slow):
                self._eigen, fresh = None, True
                step = self._step(point, gradient)
        return InnerSolution(point, float(step.norm()), False)

    def _descend(self, point: Tensor, loss: float, step: Tensor, slack: float) -> tuple[Tensor, float, Tensor] | None:
        """The first of step, step / 2, ... that does not raise the loss beyond rounding."""
        for halvings in range(_MOST_HALVINGS):
            trial = point - step * 0.5**halvings
            value, gradient = self._at(trial)
            if value <= loss + slack * abs(loss):
                return trial, value, gradient
        return None

    def _at(self, point: Tensor) -> tuple[float, Tensor]:
        self._flat.write(point)
        evaluation = evaluate(self._caller, "inner_loss", self._loss)
        with evaluation.differentiating(), named_faults(self._caller, "inner_loss"):
            grads = torch.autograd.grad(evaluation.loss, self._flat.tensors, allow_unused=True)
        return float(evaluation.loss.detach()), self._flat.pack(list(grads))

    def _step(self, point: Tensor, gradient: Tensor) -> Tensor:
        """The Newton step, downhill along directions of negative curvature too."""
        if gradient.numel() > DENSE_ELEMENTS:
            spectrum = lanczos(self._product(point), gradient, _LANCZOS_TOLERANCE)
            return spectrum.apply(lambda values: pseudo_inverse(values.abs(), self._cutoff))
        if self._eigen is None:
            matrix = dense_matrix(self._product(point), gradient)
            if not bool(matrix.isfinite().all()):
                return torch.full_like(gradient, float("nan"))
            values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
            self._eigen = (values, vectors)
        values, vectors = self._eigen
        return vectors @ (pseudo_inverse(values.abs(), self._cutoff) * (vectors.T @ gradient))

    def _product(self, point: Tensor) -> Callable[[Tensor], Tensor]:
        self._flat.write(point)
        inner = Gradient(self._caller, "inner_loss", self._loss, self._flat.tensors)
        return lambda v: self._flat.pack(inner.product(self._flat.unpack(v)))
