"""A linear hypernetwork for all general weights, trained about the current hyperparameters."""

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...hypergrad._batches import Batches
from ...hypergrad._random import RandomStates
from ...response import Hypernetwork, HyperParameters, StnModel, local_hypertrain
from .learner import Learner
from .problem import SelfTuningProblem

#: Numbers that a hypernetwork may have: more are too many for this method, and for the memory of many a machine.
MOST_WEIGHTS = 50_000_000
#: Adam's rate on the hypernetwork. The paper's 1e-4 is for hundreds of thousands of steps.
_LR = 1e-3


def too_large(problem: SelfTuningProblem) -> str | None:
    """Why the problem is too large for a hypernetwork; None where it is not."""
    model = problem.model()
    count = sum(p.numel() for p in model.general_parameters()) * (1 + len(model.hparams))
    if count <= MOST_WEIGHTS:
        return None
    return f"its hypernetwork would have {count:,} weights, and at most {MOST_WEIGHTS:,} are offered; lower --width"


class HypernetLearner(Learner):
    """`local_hypertrain`, one iteration a step."""

    def __init__(self, problem: SelfTuningProblem) -> None:
        super().__init__(problem)
        config = problem.config
        self.model = problem.model()
        for p in self.model.response_parameters():
            p.requires_grad_(False)
        self.hypernet = Hypernetwork(self.model.module, len(self.model.hparams))
        self.optimizer = torch.optim.Adam(self.hypernet.parameters(), lr=_LR)
        self.hyper_optimizer = problem.hyper_optimizer()([self.model.hparams.unconstrained])
        self.train, self.valid = (
            Batches("self_tune", name, source, resumable=True)
            for name, source in (("train", problem.train_batches()), ("valid", problem.valid_batches()))
        )
        self.random = RandomStates([*self.train.generators, *self.valid.generators])
        self.objective = _Objective(problem, self.model)
        self.train_steps = config.train_steps or 1
        self.warmup = config.warmup * self.batches_per_epoch
        self.num_batches = 0
        self.model.train()

    @property
    def hparams(self) -> HyperParameters:
        """See `Learner`."""
        return self.model.hparams

    @property
    def batches(self) -> int:
        """See `Learner`."""
        return self.num_batches

    def step(self) -> float:
        """See `Learner`."""
        started = time.perf_counter()
        local_hypertrain(
            self.hypernet,
            self._train_loss,
            self._valid_loss,
            self.model.hparams,
            num_steps=1,
            train_steps=self.train_steps,
            warmup=1 if self.num_batches < self.warmup else 0,
            train_batches=self.train.draw,
            valid_batches=self.valid.draw,
            optimizer=self.optimizer,
            hyper_optimizer=self.hyper_optimizer,
            progress=False,
        )
        self.num_batches += self.train_steps
        return time.perf_counter() - started

    def scores(self) -> dict[str, float]:
        """See `Learner`."""
        self.model.eval()
        with torch.no_grad():
            weights = _named("module", self.hypernet(self.model.hparams.unconstrained))
            found = self.problem.scores(lambda *args: functional_call(self.model, weights, args))
        self.model.train()
        return found

    def state_dict(self) -> dict[str, Any]:
        """See `Learner`."""
        return {
            "batches": self.num_batches,
            "hypernet": dict(self.hypernet.state_dict()),
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "hyper_optimizer": self.hyper_optimizer.state_dict(),
            "train": self.train.state_dict(),
            "valid": self.valid.state_dict(),
            "random": self.random.get(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Learner`."""
        if set(state) != set(self.state_dict()):
            raise ValueError("it must be the state of a hypernetwork's training")
        self.train.check(state["train"])
        self.valid.check(state["valid"])
        self.random.check("random", state["random"])
        self.hypernet.load_state_dict(state["hypernet"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.hyper_optimizer.load_state_dict(state["hyper_optimizer"])
        self.train.load_state_dict(state["train"])
        self.valid.load_state_dict(state["valid"])
        self.random.set(state["random"])
        self.num_batches = int(state["batches"])

    def _train_loss(self, weights: dict[str, Tensor], values: Any, batch: Any) -> Tensor:
        return self._loss(weights, batch)

    def _valid_loss(self, weights: dict[str, Tensor], values: Any, batch: Any) -> Tensor:
        self.objective.eval()
        try:
            return self._loss(weights, batch)
        finally:
            self.objective.train()

    def _loss(self, weights: dict[str, Tensor], batch: Any) -> Tensor:
        loss: Tensor = functional_call(self.objective, _named("model.module", weights), (batch,))
        return loss


class _Objective(nn.Module):
    """The training loss in training mode, the validation loss in evaluation mode: with all weights in one module."""

    def __init__(self, problem: SelfTuningProblem, model: StnModel) -> None:
        super().__init__()
        self.model = model
        self.problem = problem
        self.criterion, self.valid_criterion = problem.criterion(), problem.valid_criterion()
        self.penalties = problem.penalties(model)

    def forward(self, batch: Any) -> Tensor:
        problem = self.problem
        if not self.training:
            outputs, targets, _ = problem.forward(self.model, batch, None)
            return self.valid_criterion(outputs, targets)
        if problem.augment is not None:
            batch = (problem.augment(batch[0]), *batch[1:])
        outputs, targets, _ = problem.forward(self.model, batch, None)
        penalties = [penalty(self.model, outputs) for penalty in self.penalties.values()]
        return self.criterion(outputs, targets) + sum(penalties)


def _named(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": weight for name, weight in weights.items()}
