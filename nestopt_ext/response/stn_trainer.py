"""Self-Tuning Networks: weights and hyperparameters trained in turns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .trainer import OptimizerFactory, ResponseTrainer


class StnTrainer(ResponseTrainer):
    r"""Trains a Self-Tuning Network: all weights, general and response, on the training loss about the hyperparameters,
    and the hyperparameters on the validation loss through the response.

    .. math:: \phi \leftarrow \phi - \alpha \, \partial_\phi \tfrac1B \sum_b L_T(h_b', w_\phi(h_b')),
              \qquad h_b' = h + \text{softplus}(r) \, \epsilon_b, \quad \epsilon_b \sim N(0, I)

    with another :math:`h_b'` for each example, ``train_steps`` times; then ``valid_steps`` times :meth:`valid_step`;
    and again. During the first ``warmup_epochs`` epochs h is perturbed as later, but stays.

    Args:
        model: made by ``to_stn``, on its device; batches are moved there.
        criterion: training loss, a scalar mean from outputs and targets.
        train_batches, valid_batches: DataLoaders, lists, or other iterables of batches ``(x, y)`` that begin anew when
            they end. A training pass over ``train_batches`` is an epoch; ``valid_batches`` are cycled through by
            the validation steps, and evaluated after each epoch.
        valid_criterion: that of the validation part; None for ``criterion``, which then must not have hyperparameters.
        test_batches: evaluated after each epoch, for the record alone.
        metrics: more to record of evaluations, by name: scalar means from outputs and targets, as :func:`accuracy`.
        augment: from the inputs of a training batch to inputs, by the sample's hyperparameters.
        regularizers: added to the training loss, each a function of model and outputs.
        forward: what to do with a batch, where it is not a pair or a state is carried from one to the next:
            ``forward(model, batch, carry) -> (outputs, targets, carry)``. The carry is None at the beginning of an
            epoch, and reaches the next batch detached; validation batches have one of their own.
        optimizer: from a list of all weights to a ``torch.optim.Optimizer``; None: SGD, lr 0.01, momentum 0.9.
        hyper_optimizer: likewise, of the unconstrained hyperparameters, and of the scales of perturbations where these
            are tuned and have no ``scale_optimizer``; None: Adam, lr 0.003.
        scheduler, hyper_scheduler: from an optimizer, of weights or of hyperparameters, to a scheduler that steps once
            an epoch; ``ReduceLROnPlateau`` is given the validation loss.
        warmup_epochs: 5, of the paper's CNNs; 1 of its LSTM.
        train_steps, valid_steps: how many of either in turns; 2 : 1 in the paper.
        entropy_weight: of the perturbations' entropy, which keeps scales that are tuned from vanishing; 1e-3 of the
            authors' command line, 1e-5 of their code.
        tune_scales: whether to tune them.
        max_norm: largest Euclidean norm of a gradient of weights, 0.25 in the paper's LSTM; a longer one is scaled
            down. None for no bound.
        batch_dim: the dimension of tensors in a batch that counts examples; None for that of the response layers.
        generator: what perturbations are drawn from; None for one of its own, which ``torch.manual_seed`` decides.

    Training steps put the whole model into training mode; validation steps and evaluations leave every module in the
    mode it was in. The numbers of torch's global generators, for dropout, go on as in any training. After each step no
    tensor has a ``.grad``. Attributes: ``optimizers`` by name, ``schedulers``, ``history``, ``best``, ``best_state``,
    ``epoch``, ``step_count``. A loss that is not finite raises TrainerDiverged before the step that would use it.

    Raises TypeError or ValueError for bad arguments.

    Source: MacKay, Vicol, Lorraine, Duvenaud, Grosse, Self-Tuning Networks (ICLR 2019), algorithm 1, and the authors'
    code for schedule and defaults. Here hyperparameters that cannot differ within a batch are those of its first row.

    >>> from nestopt_ext.response import HyperParameters, StnLinear, StnModel
    >>> layer = StnLinear(1, 1, bias=False, num_hparams=1)
    >>> _ = torch.nn.init.ones_(layer.weight), torch.nn.init.zeros_(layer.gate_weight)
    >>> model = StnModel(layer, HyperParameters().add("a", 0.0), centred=False)
    >>> batch = torch.ones(4, 1), torch.full((4, 1), 3.0)
    >>> trainer = StnTrainer(model, torch.nn.functional.mse_loss, [batch], [batch],
    ...                      optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    >>> trainer.train_step(batch)                                   # (w - 3)^2, before the step
    {'train_loss': 4.0}
    >>> round(layer.weight.item(), 4)                               # 1 - 0.1 * 2 (1 - 3)
    1.4
    """

    _centred = False

    def _weights(self, optimizer: OptimizerFactory) -> dict[str, tuple[Iterable[nn.Parameter], OptimizerFactory]]:
        return {"optimizer": (self.model.module.parameters(), optimizer)}

    def _default_hyper_optimizer(self, params: list[nn.Parameter]) -> Optimizer:
        return torch.optim.Adam(params, lr=3e-3)

    def train_step(self, batch: Any) -> dict[str, float]:
        """One step of all weights, at a point of its own for each example; returns ``train_loss`` before it."""
        batch = self._on_device(batch)
        loss, self._carry = self._weights_step(batch, self.model.at(self._perturbed(batch)))
        return {"train_loss": loss}
