"""Delta-STN: Self-Tuning Networks about a centre, the response trained on the network's linearization."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from ._trainer_options import TrainerOptions, with_options_of
from ._trainer_step import buffers_restored, frozen
from .model import StnModel
from .trainer import Criterion, OptimizerFactory, ResponseTrainer, sgd

if TYPE_CHECKING:
    from typing_extensions import Unpack


class DeltaStnTrainer(ResponseTrainer):
    r"""Trains a Delta-STN: the general weights at the hyperparameters as they are, the response on the linearized
    network about them, and the hyperparameters on the validation loss through the response.

    .. math:: w_0 \leftarrow w_0 - \alpha \, \partial_{w_0} L_T(h, f(x; w_0)), \qquad
              \Theta \leftarrow \Theta - \alpha \, \partial_\Theta
              \tfrac1B \sum_b L_T(h_b', f(x_b; w_0) + J_f(x_b; w_0) \Theta (h_b' - h))

    with :math:`h_b' = h + \text{softplus}(r) \, \epsilon_b`, another one for each example; ``train_steps`` times both,
    one after the other on one batch, then ``valid_steps`` times :meth:`valid_step`; and again. During the first
    ``warmup_epochs`` epochs h is perturbed as later, but stays. Both steps of a batch augment it and drop units anew,
    the first by h, the second by :math:`h_b'`. The second moves no general weight and no running statistics. In the
    first one LSTMs are torch's kernels, which on a GPU can be differentiated only once: for a regularizer that
    differentiates itself, as a gradient penalty, convert them with ``fused=False``.

    Args:
        model: made by ``to_delta_stn``, on its device; batches are moved there.
        criterion, train_batches, valid_batches, valid_criterion, test_batches, metrics, augment, regularizers,
            scheduler, hyper_scheduler, tune_scales, max_norm, batch_dim, generator: as those of :class:`StnTrainer`.
        forward: likewise; what is carried on is what the first step of a batch came to.
        optimizer: from a list of the general weights to a ``torch.optim.Optimizer``; None: SGD, lr 0.01, momentum 0.9
            (0.03 for the paper's AlexNet and VGG16).
        response_optimizer: from a list of the response's weights; None: as ``optimizer`` is by default.
        hyper_optimizer: of the unconstrained hyperparameters, and of the scales of perturbations where these are tuned
            and have no ``scale_optimizer``; None: RMSprop, lr 0.01.
        warmup_epochs: 5 in the paper.
        train_steps, valid_steps: how many of either in turns; 5 : 1 in the paper.
        entropy_weight: of the perturbations' entropy; 1e-3 in the paper, 1e-4 for VGG16.
        linearize: False trains the response on the network itself, at weights that move by
            :math:`\Theta (h_b' - h)`: the paper's "centred STN".

    After each step no tensor has a ``.grad``. Attributes and errors are those of :class:`StnTrainer`.

    Source: Bae, Grosse, Delta-STN: Efficient bilevel optimization for neural networks using structured response
    Jacobians (NeurIPS 2020), algorithm 1, and the authors' code for schedule and defaults. There the tangent is taken by
    two backward passes; here it goes along in the forward pass.

    >>> from nestopt_ext.response import DeltaStnLinear, HyperParameters
    >>> layer = DeltaStnLinear(1, 1, bias=False, num_hparams=1)
    >>> _ = torch.nn.init.ones_(layer.weight)
    >>> model = StnModel(layer, HyperParameters().add("a", 0.0), centred=True)
    >>> batch = torch.ones(4, 1), torch.full((4, 1), 3.0)
    >>> trainer = DeltaStnTrainer(model, torch.nn.functional.mse_loss, [batch], [batch],
    ...                           optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    >>> {name: round(loss, 4) for name, loss in trainer.train_step(batch).items()}      # (w - 3)^2 before either step
    {'train_loss': 4.0, 'response_loss': 2.56}
    >>> round(layer.weight.item(), 4)                                                   # 1 - 0.1 * 2 (1 - 3)
    1.4
    """  # noqa: E501

    _centred = True

    @with_options_of(ResponseTrainer.__init__)
    def __init__(
        self,
        model: StnModel,
        criterion: Criterion,
        train_batches: Iterable[Any],
        valid_batches: Iterable[Any],
        *,
        response_optimizer: OptimizerFactory | None = None,
        train_steps: int = 5,
        linearize: bool = True,
        **options: Unpack[TrainerOptions],
    ) -> None:
        self._response_optimizer = response_optimizer
        self._linearize = linearize
        super().__init__(model, criterion, train_batches, valid_batches, train_steps=train_steps, **options)

    def _weights(self, optimizer: OptimizerFactory) -> dict[str, tuple[Iterable[nn.Parameter], OptimizerFactory]]:
        self._general = list(self.model.general_parameters())
        return {
            "optimizer": (self._general, optimizer),
            "response_optimizer": (self.model.response_parameters(), self._response_optimizer or sgd),
        }

    def _default_hyper_optimizer(self, params: list[nn.Parameter]) -> Optimizer:
        return torch.optim.RMSprop(params, lr=0.01)

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "linearize": self._linearize}

    def train_step(self, batch: Any) -> dict[str, float]:
        """A step of the general weights and one of the response; returns ``train_loss`` and ``response_loss``.

        Each is the loss before its step; the second one is taken after the first step.
        """
        batch = self._on_device(batch)
        self._batch_size(batch)
        train_loss, carry = self._weights_step(batch, self.model.at_centre(first_order=True))
        response_loss = self._response_step(batch)
        self._carry = carry
        return {"train_loss": train_loss, "response_loss": response_loss}

    def _response_step(self, batch: Any) -> float:
        sample = self.model.at(self._perturbed(batch), linearized=self._linearize)
        with frozen(self._general), buffers_restored(self._modules, on_failure_only=False), sample:
            loss, _ = self._fitting_loss(batch, self._carry)
            return self._descend("the loss of the response", "response_optimizer", loss)
