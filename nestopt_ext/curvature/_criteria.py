"""The losses whose second derivative in the model's outputs is known in closed form.

Each is recognized as the module or the function of PyTorch itself, and written as a sum of terms over a denominator,
which is 1 for reduction "sum". All that is computed here is differentiable in the outputs.
"""

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Targets: TypeAlias = tuple[Any, ...]


@dataclass(frozen=True)
class Criterion(ABC):
    """A loss by name, with its options."""

    reduction: str

    name: ClassVar[str]

    @abstractmethod
    def accepts(self, outputs: Tensor, targets: Targets) -> bool:
        """Whether the closed form covers tensors of these shapes and dtypes."""

    @abstractmethod
    def terms(self, outputs: Tensor, targets: Targets) -> Tensor:
        """The loss of each example, before the division: [rows]."""

    def gradient(self, outputs: Tensor, targets: Targets) -> Tensor | None:
        """The gradients of all terms in the outputs, side by side and without graph; None to go by autograd."""
        return None

    @abstractmethod
    def total_weight(self, outputs: Tensor, targets: Targets) -> Tensor | int:
        """What reduction "mean" divides by; of ``outputs`` only the number of dimensions is asked."""

    @abstractmethod
    def term_dims(self, outputs: Tensor) -> tuple[int, ...]:
        """The dimensions of the outputs over which one term of the loss reaches."""

    def spans_batch(self, outputs: Tensor) -> bool:
        """Whether an option holds a value for each example, so that a part of the batch would need a part of it."""
        return False

    def denominator(self, outputs: Tensor, targets: Targets) -> Tensor | int:
        """What the sum of the terms is divided by."""
        return self.total_weight(outputs, targets) if self.reduction == "mean" else 1


@dataclass(frozen=True)
class CrossEntropy(Criterion):
    """Of classes or class probabilities; an example is a row of classes, at any position."""

    weight: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0

    name: ClassVar[str] = "cross_entropy"

    def accepts(self, outputs: Tensor, targets: Targets) -> bool:
        if len(targets) != 1 or not isinstance(targets[0], Tensor) or outputs.dim() == 0:
            return False
        target: Tensor = targets[0]
        if target.is_floating_point():
            return target.shape == outputs.shape
        return target.shape == outputs.shape[: self._dim(outputs)] + outputs.shape[self._dim(outputs) + 1 :]

    def terms(self, outputs: Tensor, targets: Targets) -> Tensor:
        return F.cross_entropy(
            outputs,
            targets[0],
            self.weight,
            ignore_index=self.ignore_index,
            reduction="none",
            label_smoothing=self.label_smoothing,
        ).reshape(-1)

    def gradient(self, outputs: Tensor, targets: Targets) -> Tensor | None:
        """On the CPU, for rows of classes and labels without further options: p, less 1 at the label."""
        target: Tensor = targets[0]
        wide = outputs.device.type == "cpu" and outputs.dtype in (torch.float32, torch.float64)
        plain = wide and outputs.dim() == 2 and target.dtype == torch.int64
        if not plain or self.weight is not None or self.label_smoothing:
            return None
        ignored = target.unsqueeze(1) == self.ignore_index
        gradient = outputs.detach().softmax(1)
        counted = target.unsqueeze(1).masked_fill(ignored, 0)
        try:
            gradient.scatter_add_(1, counted, ignored.to(gradient.dtype).sub_(1))
        except RuntimeError as error:
            classes = outputs.shape[1]
            wrong = counted[(counted < 0) | (counted >= classes)].tolist()
            raise IndexError(
                f"targets must be classes from 0 to {classes - 1}, or ignore_index={self.ignore_index};"
                f" got {wrong[0] if wrong else target.shape}, which is out of bounds."
            ) from error
        return gradient.masked_fill_(ignored, 0)

    def total_weight(self, outputs: Tensor, targets: Targets) -> Tensor | int:
        target: Tensor = targets[0]
        if target.is_floating_point():
            return target.numel() // max(1, target.shape[self._dim(outputs)])
        kept = target != self.ignore_index
        if self.weight is None:
            return kept.sum()
        return torch.where(kept, self.weight[torch.where(kept, target, 0)], 0).sum()

    def term_dims(self, outputs: Tensor) -> tuple[int, ...]:
        """The classes."""
        return (self._dim(outputs),)

    def rows(self, outputs: Tensor) -> Tensor:
        """The logits with the classes last: [..., C]."""
        return outputs.movedim(self._dim(outputs), -1)

    def row_weight(self, outputs: Tensor, targets: Targets, denominator: Tensor | int) -> Tensor:
        """How much each row of logits counts, [...]: the sum over classes of class weight times target probability."""
        target: Tensor = targets[0]
        dtype = torch.float64 if outputs.dtype == torch.float64 else torch.float32
        classes = outputs.shape[self._dim(outputs)]
        weight = None if self.weight is None else self.weight.to(dtype)
        smooth = self.label_smoothing
        everywhere = 1.0 if weight is None else weight.sum() / classes
        if target.is_floating_point():
            q = target.movedim(self._dim(outputs), -1).to(dtype)
            inside = q.sum(-1) if weight is None else q @ weight
            return ((1 - smooth) * inside + smooth * everywhere) / denominator
        kept = target != self.ignore_index
        if weight is None:
            each = torch.ones((), dtype=dtype, device=target.device)
        else:
            each = (1 - smooth) * weight[torch.where(kept, target, 0)] + smooth * everywhere
        # Where nothing is kept the denominator is 0, and the rows stay zero like the gradient that PyTorch gives.
        return torch.where(kept, each / denominator, 0.0)

    @staticmethod
    def _dim(outputs: Tensor) -> int:
        return 0 if outputs.dim() == 1 else 1


@dataclass(frozen=True)
class Elementwise(Criterion):
    """A sum over elements, of which each depends on one output; an example is an entry of the first dimension."""

    @abstractmethod
    def elements(self, outputs: Tensor, targets: Targets) -> Tensor:
        """The loss of each element, like the outputs."""

    @abstractmethod
    def second(self, outputs: Tensor, targets: Targets) -> Tensor:
        """The second derivative of each element, like the outputs."""

    def accepts(self, outputs: Tensor, targets: Targets) -> bool:
        return len(targets) == 1 and isinstance(targets[0], Tensor) and targets[0].shape == outputs.shape

    def terms(self, outputs: Tensor, targets: Targets) -> Tensor:
        elements = self.elements(outputs, targets)
        return elements.reshape(1, 1) if elements.dim() == 0 else elements.reshape(len(elements), -1).sum(1)

    def term_dims(self, outputs: Tensor) -> tuple[int, ...]:
        """All but the first."""
        return tuple(range(1, outputs.dim()))

    def total_weight(self, outputs: Tensor, targets: Targets) -> Tensor | int:
        numel: int = targets[0].numel()
        return numel


@dataclass(frozen=True)
class MSE(Elementwise):
    """(z - t)^2."""

    name: ClassVar[str] = "mse"

    def elements(self, outputs: Tensor, targets: Targets) -> Tensor:
        return F.mse_loss(outputs, targets[0], reduction="none")

    def second(self, outputs: Tensor, targets: Targets) -> Tensor:
        return torch.full_like(outputs, 2.0, requires_grad=False)


@dataclass(frozen=True)
class BCEWithLogits(Elementwise):
    """w ((1 - t) z + (1 + (q - 1) t) softplus(-z)) with t in [0, 1] and q = pos_weight."""

    weight: Tensor | None = None
    pos_weight: Tensor | None = None

    name: ClassVar[str] = "bce_with_logits"

    def elements(self, outputs: Tensor, targets: Targets) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            outputs, targets[0], self.weight, pos_weight=self.pos_weight, reduction="none"
        )

    def spans_batch(self, outputs: Tensor) -> bool:
        options = [t for t in (self.weight, self.pos_weight) if t is not None]
        return any(t.dim() == outputs.dim() and t.shape[:1] != (1,) for t in options)

    def second(self, outputs: Tensor, targets: Targets) -> Tensor:
        found = outputs.sigmoid() * (-outputs).sigmoid()  # 1 - sigmoid would lose the tail on the right
        if self.pos_weight is not None:
            found = found * (1 + (self.pos_weight - 1) * targets[0])
        return found if self.weight is None else found * self.weight


@dataclass(frozen=True)
class PoissonNLL(Elementwise):
    """exp(z) - t z, or z - t log(z + eps) where the outputs are not logarithms; Stirling's term has no z in it."""

    log_input: bool = True
    full: bool = False
    eps: float = 1e-8

    name: ClassVar[str] = "poisson_nll"

    def elements(self, outputs: Tensor, targets: Targets) -> Tensor:
        return F.poisson_nll_loss(
            outputs, targets[0], log_input=self.log_input, full=self.full, eps=self.eps, reduction="none"
        )

    def second(self, outputs: Tensor, targets: Targets) -> Tensor:
        return outputs.exp() if self.log_input else targets[0] / (outputs + self.eps).square()


@dataclass(frozen=True)
class GaussianNLL(Elementwise):
    """(log s + (z - t)^2 / s) / 2 with s = max(var, eps); the targets are (t, var)."""

    full: bool = False
    eps: float = 1e-6

    name: ClassVar[str] = "gaussian_nll"

    def accepts(self, outputs: Tensor, targets: Targets) -> bool:
        if len(targets) != 2 or not all(isinstance(t, Tensor) for t in targets):
            return False
        target: Tensor = targets[0]
        var: Tensor = targets[1]
        return target.shape == outputs.shape and var.shape in (outputs.shape, (*outputs.shape[:-1], 1))

    def elements(self, outputs: Tensor, targets: Targets) -> Tensor:
        return F.gaussian_nll_loss(outputs, targets[0], targets[1], full=self.full, eps=self.eps, reduction="none")

    def second(self, outputs: Tensor, targets: Targets) -> Tensor:
        var: Tensor = targets[1]
        return (1 / var.clamp(min=self.eps)).expand_as(outputs)


def recognize(criterion: Callable[..., Any]) -> Criterion | None:
    """The criterion by name, or None for one that is not known: of another type, or with options not known here."""
    make = _MODULES.get(type(criterion))
    if make is not None:
        return make(**{name: getattr(criterion, name) for name in _options(make)})
    keywords: dict[str, Any] = {}
    if isinstance(criterion, functools.partial):
        if criterion.args:
            return None
        keywords = criterion.keywords
    called = criterion.func if isinstance(criterion, functools.partial) else criterion
    for function, made in _FUNCTIONS.items():
        if called is function:
            defaults, known = _defaults(function), _options(made)
            if set(keywords) - set(known):
                return None
            return made(**{name: keywords.get(name, defaults[name]) for name in known})
    return None


def reduction_of(criterion: Callable[..., Any]) -> str:
    """How a criterion reduces its terms: as it says itself, in a ``functools.partial`` too, and else "mean"."""
    known = recognize(criterion)
    if known is not None:
        return known.reduction
    if isinstance(criterion, functools.partial) and "reduction" in criterion.keywords:
        return str(criterion.keywords["reduction"])
    return str(getattr(criterion, "reduction", "mean"))


@functools.cache
def _options(made: type[Criterion]) -> tuple[str, ...]:
    return tuple(field.name for field in fields(made))


@functools.cache
def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


_MODULES: dict[type, type[Criterion]] = {
    nn.CrossEntropyLoss: CrossEntropy,
    nn.MSELoss: MSE,
    nn.BCEWithLogitsLoss: BCEWithLogits,
    nn.PoissonNLLLoss: PoissonNLL,
    nn.GaussianNLLLoss: GaussianNLL,
}
_FUNCTIONS: dict[Callable[..., Any], type[Criterion]] = {
    F.cross_entropy: CrossEntropy,
    F.mse_loss: MSE,
    F.binary_cross_entropy_with_logits: BCEWithLogits,
    F.poisson_nll_loss: PoissonNLL,
    F.gaussian_nll_loss: GaussianNLL,
}
