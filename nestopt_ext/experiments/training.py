"""One training run: a `BilevelLoop` with a learning curve.

The hypergradient is that of the implicit function theorem at the weights as they are. They have taken a few inner steps
since the hyperparameters last moved and are not at the inner optimum, so it is approximate in two ways: the theorem's
gradient condition holds only nearly, and the Neumann series is cut. Both errors shrink with more ``inner_steps``, a
lower ``hyper_lr`` and more ``num_terms``.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..hypergrad import BilevelLoop, LoopDiverged
from ..optim import ComplexSGD
from ..solvers import Identity, Neumann
from . import contents, resources
from .config import TuneConfig
from .data import Part, Split
from .problems import Problem, cross_entropy
from .results import Scores

_T = TypeVar("_T")
#: Points of a learning curve.
_CURVE_POINTS = 30
#: Examples per forward pass where no gradient is asked for.
_EVALUATION_BATCH = 4096


class TrainingDiverged(RuntimeError):
    """A loss or a hypergradient stopped being finite."""


class Training:
    """A model, its problem, and the loop that trains and tunes; stops between any two steps and continues exactly.

    The model has no buffers: what a checkpoint holds of it are its parameters.
    ``inner_part`` is what the weights are trained on, the training part unless said otherwise.
    """

    def __init__(
        self,
        config: TuneConfig,
        split: Split,
        model: nn.Module,
        problem: Problem,
        *,
        inner_part: Part | None = None,
    ) -> None:
        self.config = config
        self.split = split
        self.model = model
        self.problem = problem
        self.params = list(model.parameters())
        self.inner_part = inner_part or split.train
        self.generator = torch.Generator().manual_seed(config.seed)
        #: Outer steps before the hyperparameters move; those of a problem that is not tuned never do.
        self.warmup = _known(config.warmup) if problem.tuned else config.steps
        self.loop = BilevelLoop(
            self._outer_loss,
            self._inner_loss,
            self.params,
            problem.hparams,
            _inner_optimizer(config, self.params),
            _hyper_optimizer(config, problem.hparams),
            inner_steps=config.inner_steps,
            solver=_solver(config),
            warmup=self.warmup,
            project=problem.project_,
            generators=self.generator,
        )
        self.points: list[dict[str, float]] = []
        self.seconds = 0.0
        self.peak_mib = 0.0
        resources.reset_peak(self.device)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.params[0].device

    @property
    def step_count(self) -> int:
        """Outer steps taken."""
        return self.loop.step_count

    @property
    def diverged_solves(self) -> int:
        """Hypergradients whose Neumann sum grew instead of shrinking: the inner loss was not convex there."""
        return self.loop.num_failed_solves

    @property
    def done(self) -> bool:
        """Whether every outer step was taken."""
        return self.step_count >= self.config.steps

    def step(self) -> dict[str, float] | None:
        """Takes one outer step; returns a new point of the curve where one is due.

        Raises TrainingDiverged when a loss or a gradient is not finite.
        """
        start = time.perf_counter()
        try:
            self.loop.step()
        except LoopDiverged as error:
            raise TrainingDiverged(f"the training diverged in step {self.step_count + 1}") from error
        point = None
        if self.done or self.step_count % max(1, self.config.steps // _CURVE_POINTS) == 0:
            point = {"step": self.step_count, **asdict(evaluate(self.model, self.split))}
            self.points.append(point)
            if not math.isfinite(point["valid_loss"]):
                raise TrainingDiverged(f"the training diverged before step {self.step_count}")
        self.seconds += time.perf_counter() - start
        self.peak_mib = max(self.peak_mib, resources.peak_mib(self.device))
        return point

    def state_dict(self) -> dict[str, Any]:
        """Everything that later steps depend on; holds tensors, numbers, lists and dicts alone."""
        return {
            "loop": self.loop.state_dict(),
            "points": self.points,
            "seconds": self.seconds,
            "peak_mib": self.peak_mib,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave. Raises ValueError or RuntimeError, and changes nothing, if it is unfit."""
        self._check(state)
        self.loop.load_state_dict(state["loop"])
        self.points = [dict(point) for point in state["points"]]
        self.seconds = float(state["seconds"])
        self.peak_mib = float(state["peak_mib"])

    def _check(self, state: dict[str, Any]) -> None:
        """Requires of ``state`` the structure that a training of these choices has after its first step."""
        expected = self.state_dict()
        loop = expected["loop"]
        loop["inner_optimizer"] = _stepped(_inner_optimizer(self.config, _zeros(self.params)))
        if self._moved(state):
            loop["outer_optimizer"] = _stepped(_hyper_optimizer(self.config, _zeros(self.problem.hparams)))
        curve = state.get("points")
        contents.check_points("points", curve)
        contents.check_like("state", state, {**expected, "points": curve})
        found = state["loop"]
        if not 1 <= found["step_count"] <= self.config.steps:
            raise ValueError(f"step_count must be in [1, {self.config.steps}]; got {found['step_count']}")
        for name in ("inner_optimizer", "outer_optimizer"):
            # The options of an optimizer follow from the configuration; another value would train something else.
            if found[name]["param_groups"] != loop[name]["param_groups"]:
                raise ValueError(f"{name}['param_groups'] must be those of the configuration")

    def _moved(self, state: dict[str, Any]) -> bool:
        """Whether the hyperparameters of ``state`` have taken a step, so that their optimizer has a state."""
        loop = state.get("loop")
        count = loop.get("step_count") if isinstance(loop, dict) else None
        return isinstance(count, int) and count > self.warmup

    def _outer_loss(self) -> Tensor:
        part, _ = self._draw(self.split.valid)
        return cross_entropy(self.model, part)

    def _inner_loss(self) -> Tensor:
        return self.problem.inner_loss(self.model, *self._draw(self.inner_part))

    def _draw(self, part: Part) -> tuple[Part, Tensor | slice]:
        """A batch drawn without repetition, and the places of its examples in ``part``."""
        size = _known(self.config.batch_size)
        if not 0 < size < len(part):
            return part, slice(None)
        index = torch.randperm(len(part), generator=self.generator)[:size].to(self.device)
        return Part(part.x[index], part.y[index]), index


def evaluate(model: nn.Module, split: Split) -> Scores:
    """Scores of a model as it is, on all three parts."""
    train, valid, test = (score(model, part) for part in (split.train, split.valid, split.test))
    return Scores(*train, *valid, *test)


def _inner_optimizer(config: TuneConfig, params: Sequence[Tensor]) -> torch.optim.Optimizer:
    lr = _known(config.inner_lr)
    if config.inner_optimizer == "adam":
        return torch.optim.Adam(params, lr=lr)
    if config.inner_optimizer == "complex-sgd":
        optimizer: torch.optim.Optimizer = ComplexSGD(params, lr=lr)
        return optimizer
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


def _hyper_optimizer(config: TuneConfig, hparams: Sequence[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(hparams, lr=_known(config.hyper_lr))


def _zeros(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors as given with a gradient, all of them zero."""
    zeros = [torch.zeros_like(t, requires_grad=True) for t in tensors]
    for zero in zeros:
        zero.grad = torch.zeros_like(zero)
    return zeros


def _stepped(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of ``optimizer`` after a step."""
    optimizer.step()
    return optimizer.state_dict()


def _solver(config: TuneConfig) -> Neumann | Identity:
    if config.solver == "identity":
        return Identity(alpha=1.0 if config.alpha is None else config.alpha)
    return Neumann(num_terms=config.num_terms, alpha="auto" if config.alpha is None else config.alpha)


@torch.no_grad()
def score(model: nn.Module, part: Part) -> tuple[float, float]:
    """Mean loss and accuracy over a part."""
    loss, right = 0.0, 0
    for start in range(0, len(part), _EVALUATION_BATCH):
        y = part.y[start : start + _EVALUATION_BATCH]
        outputs = model(part.x[start : start + _EVALUATION_BATCH])
        loss += float(nn.functional.cross_entropy(outputs, y, reduction="sum"))
        right += int((outputs.argmax(1) == y).sum())
    return loss / len(part), right / len(part)


def _known(value: _T | None) -> _T:
    """A choice that `TuneConfig.resolved` filled in."""
    if value is None:
        raise ValueError("Training: config must be resolved; call config.resolved() first.")
    return value
