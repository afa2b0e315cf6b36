"""Trainings by a `BilevelLoop`: at values that stay, or moved by implicit differentiation.

Implicit differentiation needs a training loss that is differentiable in the values. Weight decay, label smoothing and
activation regularization are. A dropout mask is not, so ``ift`` trains with Gaussian noise in its place, x (1 + s eps)
with s^2 = p / (1 - p), which has the mean and the variance of dropout at rate p (Srivastava et al., 2014, section 10).
What is left, augmentation for instance, stays at its start.
"""

import contextlib
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...hypergrad import BilevelLoop
from ...response import (
    HyperParameters,
    Sample,
    StnDropout,
    StnModel,
    StnVariationalDropout,
    current_value,
    using_sample,
)
from ...solvers import Neumann
from .learner import Learner
from .problem import SelfTuningProblem

#: Hessian products of the Neumann series.
_NUM_TERMS = 3


class GaussianDropout(nn.Module):
    """Multiplies by 1 + s eps with s^2 = p / (1 - p), p being the hyperparameter ``hparam``, with a graph to it.

    ``batch_dim`` counts examples; ``shared_dims`` are those along which eps is the same. Identity in evaluation mode.
    """

    def __init__(self, hparam: str, *, batch_dim: int = 0, shared_dims: Sequence[int] = ()) -> None:
        super().__init__()
        self.hparam = hparam
        self.batch_dim = batch_dim
        self.shared_dims = tuple(shared_dims)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` of any shape to the same shape."""
        if not self.training:
            return x
        p = current_value(self.hparam, "GaussianDropout")  # [B or 1]
        shape = [1] * x.dim()
        shape[self.batch_dim] = len(p)
        sizes = [1 if dim in self.shared_dims else size for dim, size in enumerate(x.shape)]
        noise = torch.randn(sizes, device=x.device, dtype=x.dtype)
        return x * (1 + (p / (1 - p)).sqrt().reshape(shape) * noise)


class LoopLearner(Learner):
    """Trains the general weights of a response model at values that stay: ``values``, or the start.

    With ``tuned`` the values move by implicit differentiation instead.
    """

    def __init__(
        self, problem: SelfTuningProblem, values: Mapping[str, float] | None = None, *, tuned: bool = False
    ) -> None:
        super().__init__(problem)
        config = problem.config
        self.model = problem.model()
        if values is not None:
            self.model.hparams.assign(values)
        self.tuned = tuned
        if tuned:
            _make_gaussian(self.model)
        self.inner_steps = (config.train_steps or 1) if tuned else 1
        self.warmup = math.ceil(config.warmup * self.batches_per_epoch / self.inner_steps) if tuned else sys.maxsize
        self.criterion, self.valid_criterion = problem.criterion(), problem.valid_criterion()
        self.penalties = problem.penalties(self.model)
        self.carry: Any = None
        self.drawn = 0
        params, hparams = list(self.model.general_parameters()), [self.model.hparams.unconstrained]
        optimizer = problem.optimizer(params)
        self.scheduler = problem.scheduler(optimizer)
        self.loop = BilevelLoop(
            self._valid_loss,
            self._train_loss,
            params,
            hparams,
            optimizer,
            problem.hyper_optimizer()(hparams),
            inner_steps=self.inner_steps,
            solver=Neumann(num_terms=_NUM_TERMS, alpha="auto"),
            inner_batches=problem.train_batches(),
            outer_batches=problem.valid_batches(),
            warmup=self.warmup,
            clip_inner=problem.max_norm,
            stateful=_Rest(self),
            progress=False,
        )
        self.model.train()

    @property
    def hparams(self) -> HyperParameters:
        """See `Learner`."""
        return self.model.hparams

    @property
    def batches(self) -> int:
        """See `Learner`; a hypergradient takes one too."""
        return self.drawn

    def step(self) -> float:
        """See `Learner`."""
        started = time.perf_counter()
        self.loop.step()
        while self.scheduler.last_epoch < self.drawn // self.batches_per_epoch:
            self.scheduler.step()
        return time.perf_counter() - started

    def scores(self) -> dict[str, float]:
        """See `Learner`."""
        return self.problem.model_scores(self.model)

    def state_dict(self) -> dict[str, Any]:
        """See `Learner`."""
        return self.loop.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Learner`."""
        self.loop.load_state_dict(state)

    def _train_loss(self, batch: Any) -> Tensor:
        problem = self.problem
        if self.drawn % self.batches_per_epoch == 0:
            self.carry = None
        with self._sample() as sample:
            if problem.augment is not None:
                batch = (problem.augment(batch[0]), *batch[1:])
            outputs, targets, carry = problem.forward(self.model, batch, self.carry)
            loss = self.criterion(outputs, targets)
            for name, penalty in self.penalties.items():
                value = sample.values[name]  # a penalty does not differentiate it, and is proportional to it
                loss = loss + penalty(self.model, outputs) * (value / value.detach()).mean()
        self.carry = pytree.tree_map_only(Tensor, Tensor.detach, carry)
        self.drawn += 1
        return loss

    def _valid_loss(self, batch: Any) -> Tensor:
        self.model.eval()
        try:
            with self.model.at_centre():
                outputs, targets, _ = self.problem.forward(self.model, batch, None)
                return self.valid_criterion(outputs, targets)
        finally:
            self.model.train()

    def _sample(self) -> contextlib.AbstractContextManager[Sample]:
        hparams = self.model.hparams
        if not self.tuned:
            return self.model.at_centre()
        return using_sample(Sample(None, hparams.natural(hparams.unconstrained.unsqueeze(0))))


class _Rest:
    """What changes beside weights and values: buffers, the carry, batches drawn, and the schedule."""

    def __init__(self, learner: LoopLearner) -> None:
        self._learner = learner

    def state_dict(self) -> dict[str, Any]:
        learner = self._learner
        buffers = {name: buffer.clone() for name, buffer in learner.model.named_buffers()}
        return {
            "drawn": learner.drawn,
            "carry": learner.carry,
            "buffers": buffers,
            "scheduler": learner.scheduler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        learner = self._learner
        own = dict(learner.model.named_buffers())
        if set(state) != set(self.state_dict()) or set(state["buffers"]) != set(own):
            raise ValueError("what is beside the loop must be drawn, carry, scheduler, and the buffers of the model")
        for name, buffer in own.items():
            buffer.copy_(state["buffers"][name])
        learner.drawn = int(state["drawn"])
        learner.scheduler.load_state_dict(state["scheduler"])
        learner.carry = pytree.tree_map_only(Tensor, lambda t: t.to(learner.problem.device, copy=True), state["carry"])


def _make_gaussian(model: StnModel) -> None:
    """Puts Gaussian noise in the place of dropouts."""
    for name, module in list(model.module.named_modules()):
        if isinstance(module, StnDropout):
            noise = GaussianDropout(module.hparam, batch_dim=module.batch_dim)
        elif isinstance(module, StnVariationalDropout):
            noise = GaussianDropout(module.hparam, batch_dim=module.batch_dim, shared_dims=[module.time_dim])
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.module.get_submodule(parent), child, noise)
