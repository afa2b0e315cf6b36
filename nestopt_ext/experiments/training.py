"""One training run: inner steps of an optimizer, and after every few of them one step on the hyperparameters.

The hypergradient is that of the implicit function theorem at the weights as they are. They have taken a few inner steps
since the hyperparameters last moved and are not at the inner optimum, so it is approximate in two ways: the theorem's
gradient condition holds only nearly, and the Neumann series is cut. Both errors shrink with more ``inner_steps``, a
lower ``hyper_lr`` and more ``num_terms``.
"""

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..hypergrad import hypergradient
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
    """A model, its problem, its optimizers and its curve; can be stopped between any two steps and continued exactly.

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
        self.optimizer = _inner_optimizer(config, self.params)
        self.hyper_optimizer = _hyper_optimizer(config, problem.hparams) if problem.hparams else None
        self.solver = _solver(config)
        self.inner_part = inner_part or split.train
        self.generator = torch.Generator().manual_seed(config.seed)
        self.step_count = 0
        self.points: list[dict[str, float]] = []
        self.seconds = 0.0
        self.peak_mib = 0.0
        #: Hypergradients whose Neumann sum grew instead of shrinking: the inner loss was not convex there.
        self.diverged_solves = 0
        resources.reset_peak(self.device)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.params[0].device

    @property
    def done(self) -> bool:
        """Whether every outer step was taken."""
        return self.step_count >= self.config.steps

    def step(self) -> dict[str, float] | None:
        """Takes one outer step; returns a new point of the curve where one is due.

        Raises TrainingDiverged when the validation loss or the hypergradient is not finite.
        """
        start = time.perf_counter()
        for _ in range(self.config.inner_steps):
            self._inner_step()
        if self.hyper_optimizer is not None and self.step_count >= _known(self.config.warmup):
            self._hyper_step(self.hyper_optimizer)
        self.step_count += 1
        point = None
        if self.done or self.step_count % max(1, self.config.steps // _CURVE_POINTS) == 0:
            point = {"step": self.step_count, **asdict(self.evaluate())}
            self.points.append(point)
            if not math.isfinite(point["valid_loss"]):
                raise TrainingDiverged(f"the training diverged before step {self.step_count}")
        self.seconds += time.perf_counter() - start
        self.peak_mib = max(self.peak_mib, resources.peak_mib(self.device))
        return point

    def evaluate(self) -> Scores:
        """Scores of the weights as they are, on all three parts."""
        train, valid, test = (
            _score(self.model, part) for part in (self.split.train, self.split.valid, self.split.test)
        )
        return Scores(*train, *valid, *test)

    def state_dict(self) -> dict[str, Any]:
        """Everything that later steps depend on; holds tensors, numbers, lists and dicts alone."""
        return {
            "step_count": self.step_count,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "hparams": [h.detach() for h in self.problem.hparams],
            "hyper_optimizer": self.hyper_optimizer.state_dict() if self.hyper_optimizer else None,
            "generator": self.generator.get_state(),
            "global_rng": torch.get_rng_state(),
            "points": self.points,
            "seconds": self.seconds,
            "peak_mib": self.peak_mib,
            "diverged_solves": self.diverged_solves,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave. Raises ValueError or RuntimeError, and changes nothing, if it is unfit."""
        self._check(state)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for h, value in zip(self.problem.hparams, state["hparams"], strict=True):
                h.copy_(value)
        if self.hyper_optimizer is not None:
            self.hyper_optimizer.load_state_dict(state["hyper_optimizer"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["global_rng"])
        self.step_count = int(state["step_count"])
        self.points = [dict(point) for point in state["points"]]
        self.seconds = float(state["seconds"])
        self.peak_mib = float(state["peak_mib"])
        self.diverged_solves = int(state["diverged_solves"])

    def _check(self, state: dict[str, Any]) -> None:
        """Requires of ``state`` the structure that a training of these choices has after its first step."""
        expected = self.state_dict()
        expected["optimizer"] = _stepped(_inner_optimizer(self.config, _zeros(self.params)))
        if self.hyper_optimizer is not None and self._moved(state):
            expected["hyper_optimizer"] = _stepped(_hyper_optimizer(self.config, _zeros(self.problem.hparams)))
        curve = state.get("points")
        contents.check_points("points", curve)
        contents.check_like("state", state, {**expected, "points": curve})
        if not 1 <= state["step_count"] <= self.config.steps:
            raise ValueError(f"step_count must be in [1, {self.config.steps}]; got {state['step_count']}")
        for name in ("optimizer", "hyper_optimizer"):
            # The options of an optimizer follow from the configuration; another value would train something else.
            if expected[name] and state[name]["param_groups"] != expected[name]["param_groups"]:
                raise ValueError(f"{name}['param_groups'] must be those of the configuration")
        for name in ("generator", "global_rng"):
            torch.Generator().set_state(state[name])

    def _moved(self, state: dict[str, Any]) -> bool:
        """Whether the hyperparameters of ``state`` have taken a step, so that their optimizer has a state."""
        count = state.get("step_count")
        return isinstance(count, int) and count > _known(self.config.warmup)

    def _inner_step(self) -> None:
        part, index = self._draw(self.inner_part)
        self.optimizer.zero_grad()
        hparams = [h.detach() for h in self.problem.hparams]
        self.problem.inner_loss(self.model, part, index, hparams).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def _hyper_step(self, optimizer: torch.optim.Optimizer) -> None:
        valid, _ = self._draw(self.split.valid)
        train, index = self._draw(self.inner_part)
        hparams = self.problem.hparams
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            grads = hypergradient(
                cross_entropy(self.model, valid),
                self.problem.inner_loss(self.model, train, index, hparams),
                self.params,
                hparams,
                solver=self.solver,
            )
        self._count_diverged(caught)
        if not all(bool(torch.isfinite(g).all()) for g in grads):
            raise TrainingDiverged(f"the hypergradient of step {self.step_count + 1} is not finite")
        for h, g in zip(hparams, grads, strict=True):
            h.grad = g
        optimizer.step()
        self.problem.project_()

    def _count_diverged(self, caught: Sequence[warnings.WarningMessage]) -> None:
        """Counts what a run would otherwise say hundreds of times; other warnings go on to the caller."""
        for warning in caught:
            if issubclass(warning.category, RuntimeWarning) and "diverge" in str(warning.message):
                self.diverged_solves += 1
            else:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)

    def _draw(self, part: Part) -> tuple[Part, Tensor | slice]:
        """A batch drawn without repetition, and the places of its examples in ``part``."""
        size = _known(self.config.batch_size)
        if not 0 < size < len(part):
            return part, slice(None)
        index = torch.randperm(len(part), generator=self.generator)[:size].to(self.device)
        return Part(part.x[index], part.y[index]), index


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
def _score(model: nn.Module, part: Part) -> tuple[float, float]:
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
