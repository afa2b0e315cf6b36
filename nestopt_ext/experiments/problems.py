"""Inner problems: how hyperparameters enter the loss that trains the weights.

Every problem is ``mean over the batch of c_n * cross-entropy_n + sum over the weights of d_i * w_i ** 2``; they differ
in what of ``c`` and ``d`` is fixed and what is a hyperparameter.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from .config import LOG_DECAY_RANGE
from .data import Part


def cross_entropy(model: nn.Module, part: Part) -> Tensor:
    """Mean cross-entropy, a scalar with a graph."""
    return nn.functional.cross_entropy(model(part.x), part.y)


class Problem(ABC):
    """An inner loss and its hyperparameters, a list of leaf tensors; they are ``tuned``, or stay as they are."""

    hparams: list[Tensor]
    tuned: bool = True

    @abstractmethod
    def inner_loss(self, model: nn.Module, part: Part, index: Tensor | slice) -> Tensor:
        """The training loss on ``part``, whose examples have the places ``index`` in the training part."""

    @abstractmethod
    def project_(self) -> None:
        """Brings the hyperparameters back into their range, in place, after a step."""


class FixedDecay(Problem):
    """One decay for all weights, ``exp(log_decay)``, or none at all; it stays as it is."""

    tuned = False

    def __init__(self, log_decay: float | None, device: torch.device) -> None:
        decay = 0.0 if log_decay is None else math.exp(log_decay)
        self.hparams = [torch.tensor(decay, device=device, requires_grad=True)]
        self._decays = decay > 0

    def inner_loss(self, model: nn.Module, part: Part, index: Tensor | slice) -> Tensor:
        """The inner loss; see `Problem`."""
        loss = cross_entropy(model, part)
        return loss + self.hparams[0] * _squared_norm(model) if self._decays else loss

    def project_(self) -> None:
        """Does nothing: there is nothing to keep in range."""


class PerWeightDecay(Problem):
    """One hyperparameter for each weight and bias, the logarithm of its decay: ``sum_i exp(l_i) * w_i ** 2``."""

    def __init__(self, model: nn.Module, log_decay: float) -> None:
        self.hparams = [torch.full_like(p, log_decay).requires_grad_() for p in model.parameters()]

    def inner_loss(self, model: nn.Module, part: Part, index: Tensor | slice) -> Tensor:
        """The inner loss; see `Problem`."""
        penalties = [(h.exp() * p * p).sum() for h, p in zip(self.hparams, model.parameters(), strict=True)]
        return cross_entropy(model, part) + torch.stack(penalties).sum()

    def project_(self) -> None:
        """Keeps the hyperparameters in range; see `Problem`."""
        with torch.no_grad():
            for h in self.hparams:
                h.clamp_(*LOG_DECAY_RANGE)


class PerExampleWeight(Problem):
    """One hyperparameter for each training example; its weight is ``2 * sigmoid(h)``, 1 at the start.

    A small fixed decay ``exp(log_decay)`` keeps the inner Hessian away from singular.
    """

    #: Past this the sigmoid is flat and a weight could never come back.
    LIMIT = 6.0

    def __init__(self, examples: int, log_decay: float, device: torch.device) -> None:
        self.hparams = [torch.zeros(examples, device=device, requires_grad=True)]
        self._decay = math.exp(log_decay)

    def inner_loss(self, model: nn.Module, part: Part, index: Tensor | slice) -> Tensor:
        """The inner loss; see `Problem`."""
        losses = nn.functional.cross_entropy(model(part.x), part.y, reduction="none")  # [B]
        return (example_weights(self.hparams[0])[index] * losses).mean() + self._decay * _squared_norm(model)

    def project_(self) -> None:
        """Keeps the hyperparameters in range; see `Problem`."""
        with torch.no_grad():
            self.hparams[0].clamp_(-self.LIMIT, self.LIMIT)


def example_weights(hparam: Tensor) -> Tensor:
    """Weights in (0, 2) of the training examples from their hyperparameters, [N] to [N].

    >>> example_weights(torch.zeros(2)).tolist()
    [1.0, 1.0]
    """
    return 2 * torch.sigmoid(hparam)


def _squared_norm(model: nn.Module) -> Tensor:
    return torch.stack([p.square().sum() for p in model.parameters()]).sum()
