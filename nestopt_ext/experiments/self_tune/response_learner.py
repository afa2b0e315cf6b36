"""Response models: `StnTrainer`, `DeltaStnTrainer`, and the latter without its linearization."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.autograd.forward_ad as forward_ad

from ...response import DeltaStnTrainer, HyperParameters, ResponseTrainer, StnTrainer
from .learner import Learner
from .problem import SelfTuningProblem


class ResponseLearner(Learner):
    """Tunes while it trains, by a response model; ``method`` is delta-stn, centred or stn."""

    def __init__(self, problem: SelfTuningProblem, method: str) -> None:
        super().__init__(problem)
        config = problem.config
        model = problem.model(centred=method != "stn")
        hyper_optimizer = problem.hyper_optimizer()
        self.trainer = _kind(method, problem)(
            model,
            problem.criterion(),
            problem.train_batches(),
            problem.valid_batches(),
            valid_criterion=problem.valid_criterion(),
            augment=problem.augment,
            regularizers=list(problem.penalties(model).values()),
            forward=problem.forward,
            optimizer=problem.optimizer,
            hyper_optimizer=hyper_optimizer,
            scale_optimizer=hyper_optimizer,
            scheduler=problem.scheduler if config.lr_drops else None,
            warmup_epochs=config.warmup,
            train_steps=config.train_steps or 1,
            valid_steps=config.valid_steps,
            entropy_weight=config.entropy_weight,
            max_norm=problem.max_norm,
            batch_dim=problem.batch_dim,
        )
        with forward_ad.dual_level():  # the first one of a process loads modules for a second, which is no training
            pass

    @property
    def hparams(self) -> HyperParameters:
        """See `Learner`."""
        return self.trainer.model.hparams

    @property
    def batches(self) -> int:
        """See `Learner`."""
        return self.trainer.step_count

    def step(self) -> float:
        """See `Learner`."""
        started = time.perf_counter()
        if self.trainer.advance() is not None:  # an epoch ended with a look at the validation part, which nobody pays
            started = time.perf_counter()
            self.trainer.advance()
        return time.perf_counter() - started

    def scores(self) -> dict[str, float]:
        """See `Learner`."""
        return self.problem.model_scores(self.trainer.model)

    def state_dict(self) -> dict[str, Any]:
        """See `Learner`."""
        return self.trainer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Learner`."""
        self.trainer.load_state_dict(state)


def _kind(method: str, problem: SelfTuningProblem) -> Callable[..., ResponseTrainer]:
    if method == "stn":
        return StnTrainer
    return partial(DeltaStnTrainer, response_optimizer=problem.optimizer, linearize=method == "delta-stn")
