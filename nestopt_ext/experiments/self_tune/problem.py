"""The problem that all methods are given: data, network, hyperparameters, losses, and how a model is scored."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...response import HyperParameters, StnModel, WeightDecay, current_value, smoothed_cross_entropy
from .batches import Chunks, Shuffled
from .config import SelfTuneConfig
from .space import Dimension, extra, hyper_parameters

Batches = Shuffled | Chunks
Regularizer = Callable[[StnModel, Any], Tensor]
#: Of a model, a batch, and what the batch before left (None at first): outputs, targets, and what to leave.
Forward = Callable[[StnModel, Any, Any], tuple[Any, Tensor, Any]]


class SelfTuningProblem(ABC):
    """One problem, from which every method makes its model, its batches and its losses.

    All models of a problem start from the same weights. Every one is a `StnModel` over the same modules, so that a
    training at fixed values is a response model's own step on its general weights, without its response.
    """

    config: SelfTuneConfig
    device: torch.device
    space: Sequence[Dimension]
    augment: nn.Module | None = None
    #: Largest norm of a gradient of the weights, and the dimension of a batch that counts its examples.
    max_norm: float | None = None
    batch_dim: int = 0

    @abstractmethod
    def network(self, hparams: HyperParameters, *, centred: bool) -> StnModel:
        """The network with response layers, centred ones or not."""

    @abstractmethod
    def train_batches(self) -> Batches:
        """Batches of the training part, from the beginning."""

    @abstractmethod
    def valid_batches(self) -> Batches:
        """Batches of the validation part, from the beginning."""

    @abstractmethod
    def forward(self, model: Callable[..., Any], batch: Any, carry: Any) -> tuple[Any, Tensor, Any]:
        """What a model makes of a batch; see `Forward`."""

    @abstractmethod
    def scores(self, answer: Callable[..., Any]) -> dict[str, float]:
        """``valid_loss``, ``valid_accuracy``, ``test_loss`` and ``test_accuracy`` of a model in evaluation mode."""

    @abstractmethod
    def fingerprint(self) -> int:
        """A check sum of the data."""

    def differentiable(self) -> set[str]:
        """Names of those that the training loss is differentiable in, with Gaussian noise for dropouts."""
        return {d.name for d in self.space if "dropout" in d.name} | {d.name for d in self.extras()}

    def hyper_parameters(self) -> HyperParameters:
        """The hyperparameters at their start."""
        return hyper_parameters(self.space, self.config.scale, self.device)

    def model(self, *, centred: bool = True) -> StnModel:
        """A new model, equal for equal problems; the global random state is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            return self.network(self.hyper_parameters(), centred=centred).to(self.device)

    def criterion(self) -> Callable[[Any, Tensor], Tensor]:
        """The training loss, without penalties."""
        return _smoothed if "label-smoothing" in self.config.extra else nn.functional.cross_entropy

    def valid_criterion(self) -> Callable[[Any, Tensor], Tensor]:
        """The loss of the validation part."""
        return nn.functional.cross_entropy

    def penalties(self, model: StnModel) -> dict[str, Regularizer]:
        """What is added to the training loss, each by the name of the hyperparameter that it is proportional to."""
        return {"weight_decay": WeightDecay("weight_decay", model)} if "weight-decay" in self.config.extra else {}

    def optimizer(self, params: Iterable[Tensor]) -> torch.optim.Optimizer:
        """What trains the weights."""
        return torch.optim.SGD(params, lr=self.config.lr or 0.0, momentum=0.9)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """What cuts the rate of `optimizer` at the end of an epoch."""
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, list(self.config.lr_drops or ()), gamma=0.2)

    def hyper_optimizer(self) -> Callable[[Iterable[Tensor]], torch.optim.Optimizer]:
        """What moves hyperparameters: RMSprop, as for Delta-STN, for every method alike."""
        return lambda hparams: torch.optim.RMSprop(hparams, lr=self.config.hyper_lr or 0.0)

    def model_scores(self, model: StnModel) -> dict[str, float]:
        """`scores` of a response model at its current hyperparameters; its mode is left as it was."""
        training = model.training
        model.eval()
        with torch.no_grad(), model.at_centre():
            found = self.scores(model)
        model.train(training)
        return found

    def extras(self) -> list[Dimension]:
        """The hyperparameters that were asked for beside those of the network."""
        return [extra(name) for name in self.config.extra]


def _smoothed(logits: Tensor, targets: Tensor) -> Tensor:
    return smoothed_cross_entropy(logits, targets, current_value("label_smoothing", "the training loss"))
