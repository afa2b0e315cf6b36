"""Hyperparameters by hypernetworks: the response is learned, and the validation loss is minimized through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._progress import ProgressBar
from ..hypergrad import _loop_arguments as arguments
from ._hypertrain_records import Diary, HypertrainRecord, HypertrainResult
from ._hypertrain_steps import BatchSource, OptimizerArgument, Point, level, neighbours, sampler, train, tune
from .hyper_parameters import HyperParameters
from .hypernetwork import Hypernetwork


def global_hypertrain(
    hypernet: Hypernetwork,
    train_loss: Callable[..., Tensor],
    valid_loss: Callable[..., Tensor],
    hparams: Tensor | HyperParameters,
    *,
    num_train_steps: int,
    num_hyper_steps: int,
    sample: Callable[[int], Tensor] | None = None,
    num_samples: int = 10,
    train_batches: BatchSource | None = None,
    valid_batches: BatchSource | None = None,
    optimizer: OptimizerArgument = None,
    hyper_optimizer: OptimizerArgument = None,
    vectorize: bool = True,
    record_every: int = 100,
    patience: int | None = None,
    callbacks: Sequence[Callable[[HypertrainRecord], Any]] | Callable[[HypertrainRecord], Any] = (),
    progress: bool = True,
) -> HypertrainResult:
    r"""Learn the response everywhere, then minimize the validation loss along it.

    .. math:: \text{phase 1:}\quad \phi \leftarrow \phi - \alpha \, \partial_\phi \,
              \tfrac1M \textstyle\sum_{m} L_T(w_\phi(\lambda_m), \lambda_m, x), \qquad \lambda_m \sim p(\lambda)

              \text{phase 2:}\quad \lambda \leftarrow \lambda
              - \beta \, \partial_\lambda L_V(w_\phi(\lambda), \lambda, x)

    Args:
        hypernet: :math:`w_\phi`, **trained in place**.
        train_loss: L_T, a function of (params, h), or (params, h, batch) where there are ``train_batches``, that
            returns a scalar. ``params`` is a dict for ``torch.func.functional_call``. ``h`` is a tensor [n], or, where
            ``hparams`` is a :class:`HyperParameters`, a dict in natural units; it is then also the sample that tunable
            dropouts and augmentations read. Regularizers belong here.
        valid_loss: L_V, likewise, with ``valid_batches``. A direct dependence on h counts.
        hparams: where phase 2 begins, **moved in place**: a leaf tensor [n] that requires grad, or a
            :class:`HyperParameters`, whose unconstrained vector is moved.
        num_train_steps: steps of phase 1; 0 leaves it out.
        num_hyper_steps: steps of phase 2; 0 leaves it out.
        sample: p(h), a function of a number M that returns M points, [M, n], unconstrained. None, for
            :class:`HyperParameters`: ``hparams.perturbed``, whose scales say how wide. The range is the problem's: for
            log decays the paper draws from N(0, 1.5), the authors' code from N(1, 3^2) clipped to [-100, 4].
        num_samples: M, points in each step of phase 1. Paper 2, code 10.
        train_batches: a DataLoader, a list, or another iterable that begins anew when it ends; or a function that
            returns the next batch. Each step takes one.
        valid_batches: likewise, for phase 2.
        optimizer: of the hypernetwork's weights: an optimizer, which goes on from its state, or a function that makes
            one: ``lambda p: torch.optim.SGD(p, 0.1)``. None: Adam 1e-4 (paper and code).
        hyper_optimizer: of the hyperparameters, likewise.
        vectorize: the points of a step go through the loss at once, by ``torch.func.vmap``. False: one by one, for
            losses that vmap cannot see through, such as batch normalization that updates its statistics.
        record_every: steps between records.
        patience: phase 2 ends after so many records without a lower validation loss; None for never.
        callbacks: functions of a :class:`HypertrainRecord`, called for each; one that returns True ends the run.
        progress: shows a bar where stderr is a terminal.

    The device is waited for once in each step, to look at loss and gradient before they are used.

    To go on later, save ``state_dict()`` of the hypernetwork, of the optimizers, passed as objects, and of
    ``HyperParameters`` (or the tensor), load them, and call again with the steps that are left. The same numbers as
    without a break come from saving torch's random state as well, and from data that need no position.

    Returns a :class:`HypertrainResult`. Raises TypeError or ValueError for bad arguments, before anything is modified;
    ``LoopDiverged``, a RuntimeError, where a loss or gradient is not finite, before the step that would use it.

    Source: Lorraine, Duvenaud, Stochastic hyperparameter optimization through hypernetworks (2018), algorithm 2. There
    L_V depends on h by the weights alone.

    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)            # one weight w; L_T = (w - 2 h)^2, so w = 2 h
    >>> hypernet, h = Hypernetwork(model, 1), torch.zeros(1, requires_grad=True)
    >>> result = global_hypertrain(
    ...     hypernet, lambda params, h: ((params["weight"] - 2 * h) ** 2).sum(),
    ...     lambda params, h: ((params["weight"] - 3) ** 2).sum(), h,
    ...     num_train_steps=200, num_hyper_steps=200, sample=lambda count: torch.randn(count, 1),
    ...     optimizer=lambda p: torch.optim.SGD(p, 0.1), hyper_optimizer=lambda p: torch.optim.SGD(p, 0.05))
    >>> round(h.item(), 3), result.stopped, len(result.history)
    (1.5, 'steps', 4)
    """
    caller = "global_hypertrain"
    arguments.check_count(caller, "num_train_steps", num_train_steps, 0)
    arguments.check_count(caller, "num_hyper_steps", num_hyper_steps, 0)
    arguments.check_count(caller, "num_samples", num_samples, 1)
    point = Point(caller, hypernet, hparams)
    draw = sampler(caller, point, sample)
    diary = Diary(caller, point, record_every, patience, callbacks)
    weights = ("the parameters of hypernet", [p for p in hypernet.parameters() if p.requires_grad])
    lower = level(caller, "train", train_loss, train_batches, weights, optimizer, _adam)
    upper = level(caller, "valid", valid_loss, valid_batches, ("hparams", [point.vector]), hyper_optimizer, _adam)
    with closing(ProgressBar(num_train_steps + num_hyper_steps, shown=progress)) as bar:
        bar.stage("hypernetwork")
        for step in range(num_train_steps):
            diary.add(train_loss=train(lower, hypernet, point, draw(num_samples), vectorize=vectorize))
            bar.advance(1)
            if diary.closes(last=step + 1 == num_train_steps):
                return diary.result()
        bar.stage("hyperparameters")
        for step in range(num_hyper_steps):
            diary.add(valid_loss=tune(upper, hypernet, point))
            bar.advance(1)
            if diary.closes(last=step + 1 == num_hyper_steps):
                break
    return diary.result()


def local_hypertrain(
    hypernet: Hypernetwork,
    train_loss: Callable[..., Tensor],
    valid_loss: Callable[..., Tensor],
    hparams: Tensor | HyperParameters,
    *,
    num_steps: int,
    sigma: float | Tensor | None = None,
    num_samples: int = 1,
    train_steps: int = 1,
    warmup: int = 0,
    train_batches: BatchSource | None = None,
    valid_batches: BatchSource | None = None,
    optimizer: OptimizerArgument = None,
    hyper_optimizer: OptimizerArgument = None,
    vectorize: bool = True,
    record_every: int = 100,
    patience: int | None = None,
    callbacks: Sequence[Callable[[HypertrainRecord], Any]] | Callable[[HypertrainRecord], Any] = (),
    progress: bool = True,
) -> HypertrainResult:
    r"""Learn the response about the current hyperparameters while these move along it.

    .. math:: \phi \leftarrow \phi - \alpha \, \partial_\phi L_T(w_\phi(\lambda'), \lambda', x), \quad
              \lambda' = \lambda + \sigma \epsilon, \; \epsilon \sim N(0, I); \qquad
              \lambda \leftarrow \lambda - \beta \, \partial_\lambda L_V(w_\phi(\lambda), \lambda, x)

    Args are those of :func:`global_hypertrain`, and:

        num_steps: iterations, each of ``train_steps`` steps on the hypernetwork and one on the hyperparameters.
        sigma: the standard deviation of the points, in unconstrained units, a number or a tensor [n]. None: for
            :class:`HyperParameters` their scales, else 0.3. 0 is the simplified algorithm: the slope of the response,
            and so the gradient, is then learned from how h moves alone, and nothing promises that it is.
        num_samples: points in each step.
        train_steps: steps on the hypernetwork in each iteration. The paper's large problem takes 10.
        warmup: iterations at the beginning in which the hyperparameters stay. They are drawn about with ``sigma``.
        optimizer, hyper_optimizer: None: SGD 1e-4 and Adam 1e-2, as in the authors' code; the paper says Adam 1e-4,
            both. These suit its problem, 1 step : 1 step for 100 000 iterations.

    ``record.step`` counts iterations, and a record has both losses; ``patience`` begins after the warm-up.

    Source: Lorraine, Duvenaud (2018), algorithm 3, and 4 where sigma is 0. The paper draws from N(h, 1e-5), the
    authors' code has 0. Here a step may average over several points.

    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)            # one weight w; L_T = (w - 2 h)^2, so w = 2 h
    >>> hypernet, h = Hypernetwork(model, 1), torch.zeros(1, requires_grad=True)
    >>> result = local_hypertrain(
    ...     hypernet, lambda params, h: ((params["weight"] - 2 * h) ** 2).sum(),
    ...     lambda params, h: ((params["weight"] - 3) ** 2).sum(), h, num_steps=400, sigma=1.0, num_samples=4,
    ...     optimizer=lambda p: torch.optim.SGD(p, 0.1), hyper_optimizer=lambda p: torch.optim.SGD(p, 0.02))
    >>> round(h.item(), 3), [record.step for record in result.history]
    (1.5, [100, 200, 300, 400])
    """
    caller = "local_hypertrain"
    arguments.check_count(caller, "num_steps", num_steps, 0)
    arguments.check_count(caller, "num_samples", num_samples, 1)
    arguments.check_count(caller, "train_steps", train_steps, 1)
    arguments.check_count(caller, "warmup", warmup, 0)
    point = Point(caller, hypernet, hparams)
    near = neighbours(caller, point, sigma)
    diary = Diary(caller, point, record_every, patience, callbacks)
    weights = ("the parameters of hypernet", [p for p in hypernet.parameters() if p.requires_grad])
    lower = level(caller, "train", train_loss, train_batches, weights, optimizer, _slow_sgd)
    upper = level(caller, "valid", valid_loss, valid_batches, ("hparams", [point.vector]), hyper_optimizer, _fast_adam)
    with closing(ProgressBar(num_steps, shown=progress)) as bar:
        for step in range(num_steps):
            for _ in range(train_steps):
                diary.add(train_loss=train(lower, hypernet, point, near(num_samples), vectorize=vectorize))
            if step >= warmup:
                diary.add(valid_loss=tune(upper, hypernet, point))
            bar.advance(1)
            if diary.closes(last=step + 1 == num_steps):
                break
    return diary.result()


def _adam(tensors: list[Tensor]) -> Optimizer:
    return torch.optim.Adam(tensors, lr=1e-4)


def _slow_sgd(tensors: list[Tensor]) -> Optimizer:
    return torch.optim.SGD(tensors, lr=1e-4)


def _fast_adam(tensors: list[Tensor]) -> Optimizer:
    return torch.optim.Adam(tensors, lr=1e-2)
