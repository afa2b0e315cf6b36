"""Overfits the validation part: with one decay per weight, both parts can be learned by heart.

50 training and 50 validation digits, one hyperparameter for each weight, the logarithm of its decay, and no inverse at
all (K = 0, T1-T2): Adam trains the weights, RMSprop moves the decays along the hypergradient, until 99.9 % of both
parts are right. It is a check that any number of hyperparameters can be moved, and a warning of what they can do.

What to expect (default settings; "peak" is the highest test accuracy on the way):

======  ====  ===================  ==========  ==========  =====================
model   seed  learned by heart at  train       validation  test (peak)
======  ====  ===================  ==========  ==========  =====================
mlp     0     step 895             100 %       100 %       80.3 % (84.6 %)
mlp     1     step 252             100 %       100 %       87.2 % (88.0 %)
mlp     2     step 91              100 %       100 %       89.6 % (89.6 %)
mlp     3     step 85              100 %       100 %       85.9 % (85.9 %)
linear  0     not in 6000 steps    100 %       96 to 98 %  73.2 % (84.1 %)
linear  1     step 742             100 %       100 %       88.6 % (89.0 %)
linear  2     step 466             100 %       100 %       88.7 % (88.9 %)
linear  3     step 283             100 %       100 %       85.2 % (85.2 %)
======  ====  ===================  ==========  ==========  =====================

So the decays learn the validation part; the 650 of the linear model on seed 0 all but one or two of its examples, which
of them changes from step to step. With decays that stay at their start, the mlp gets 70 to 86 % of it right after as
many steps, and 73 to 83 % of the test part: so strong a decay for all weights alike is no good either.
Whether the test part pays depends on how long it takes: where a few hundred steps do, the run ends before it does; on
seed 0 it loses 4 and 11 points.

Source: the first experiment of Lorraine, Vicol, Duvenaud, Optimizing millions of hyperparameters by implicit
differentiation (2020), there on MNIST and CIFAR-10 with networks up to AlexNet; data, sizes and figures here are ours.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._checkpoint import CheckpointError
from ..hypergrad import BilevelLoop, LoopDiverged, LoopRecord
from ..solvers import Identity
from . import contents, data
from .config import LOG_DECAY_RANGE, ConfigError, check_number, check_one_of, check_whole
from .data import Part, Split
from .identity import conflict, identity
from .models import build_model
from .problems import PerWeightDecay, cross_entropy
from .resources import cpu_threads
from .results import Scores
from .run_folder import CHECKPOINT, LOG, PICTURE
from .training import evaluate, score
from .tune import Interrupted, Progress

MODELS = ("mlp", "linear")
#: Both parts are learned by heart when this share of their examples is right.
GOAL = 0.999
_STEPS = {"mlp": 3000, "linear": 6000}
#: Outer steps from point to point of the curve: the test part is looked at there alone.
_POINT_EVERY = 20
_CHECKPOINT_EVERY = 500


class OverfitError(RuntimeError):
    """The run cannot go on; the message is one line with what to do."""


@dataclass(frozen=True)
class OverfitConfig:
    """One run of `overfit`. None stands for a default that `resolved` fills in.

    model: ``mlp`` (one hidden layer of ``width``) or ``linear``. train_size, valid_size: digits; all others are the
    test part. steps: outer steps at the most. inner_steps: steps of Adam, at rate ``inner_lr``, for each of them.
    hyper_lr: RMSprop's rate on the decays, whose logarithms start at ``log_decay``.
    """

    files: ClassVar[tuple[str, ...]] = (LOG, CHECKPOINT, PICTURE)
    resumable: ClassVar[bool] = True
    kind: ClassVar[str] = "run of overfit"

    model: str = "mlp"
    width: int = 64
    train_size: int = 50
    valid_size: int = 50
    steps: int | None = None
    inner_steps: int = 5
    inner_lr: float = 1e-3
    hyper_lr: float = 1e-2
    log_decay: float = -4.0
    seed: int = 0

    def resolved(self) -> "OverfitConfig":
        """The same run with every default written out. Raises ConfigError when a choice is out of range."""
        check_one_of("model", self.model, MODELS)
        config = replace(self, steps=_STEPS[self.model]) if self.steps is None else self
        for name in ("width", "train_size", "valid_size", "steps", "inner_steps"):
            check_whole(name, getattr(config, name), 1)
        check_whole("seed", config.seed, 0)
        if config.seed >= 2**32:
            raise ConfigError(f"--seed must be below 2**32; got {config.seed}.")
        for name in ("inner_lr", "hyper_lr"):
            if check_number(name, getattr(config, name)) <= 0:
                raise ConfigError(f"--{name.replace('_', '-')} must be > 0; got {getattr(config, name)}.")
        low, high = LOG_DECAY_RANGE
        if not low <= check_number("log_decay", config.log_decay) <= high:
            raise ConfigError(f"--log-decay must be in [{low:g}, {high:g}]; got {config.log_decay}.")
        return config

    def to_json(self) -> str:
        """The configuration as indented JSON."""
        return json.dumps({"experiment": "overfit", **asdict(self)}, indent=2) + "\n"

    @staticmethod
    def from_json(text: str, where: Path) -> "OverfitConfig":
        """Reads what `to_json` wrote; ``where`` is named in the ConfigError that any other text raises."""
        try:
            values = json.loads(text)
            known = {"experiment", *(field.name for field in fields(OverfitConfig))}
            if not isinstance(values, dict) or set(values) != known or values.pop("experiment") != "overfit":
                raise ValueError("its keys are not those of such a run")
            return OverfitConfig(**values).resolved()
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise ConfigError(f"{where} is not the configuration of a run of overfit: {error}") from error


@dataclass(frozen=True)
class OverfitResult:
    """What a run reached: its curve, a dict of `Scores` and ``step`` for each point, and the tuned logarithms.

    ``learned_at`` is the step at which both parts were learned by heart, None where they were not.
    """

    config: OverfitConfig
    points: list[dict[str, float]]
    learned_at: int | None
    hparams: list[Tensor]
    model: nn.Module

    @property
    def final(self) -> Scores:
        """Scores after the last step."""
        return Scores(**{name: value for name, value in self.points[-1].items() if name != "step"})

    @property
    def best_test(self) -> dict[str, float]:
        """The first point of highest test accuracy."""
        return max(self.points, key=lambda point: point["test_accuracy"])


def load_split(config: OverfitConfig) -> Split:
    """The digits of a run, pixels from 0 to 1. Raises ConfigError and DataError for what the caller can mend."""
    config = config.resolved()
    digits = data.load("digits")
    split = data.make_split(digits, config.train_size, config.valid_size, 0.0, config.seed)
    train, valid, test = (
        Part((part.x * split.scale + split.shift) / digits.peak, part.y)
        for part in (split.train, split.valid, split.test)
    )
    return replace(split, train=train, valid=valid, test=test, shift=0.0, scale=float(digits.peak))


def overfit(
    config: OverfitConfig,
    output: Path | None = None,
    *,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Progress | None = None,
) -> OverfitResult:
    """Trains and tunes until both parts are learned by heart, or the steps are used up.

    With ``output``, a folder that exists, every step and every point of the curve is logged to ``log.jsonl`` there (the
    events ``step``, see `nestopt_ext.hypergrad.LoopRecord`, and ``point``) and the run is saved to ``checkpoint.pt``;
    with ``resume`` it continues from there to the numbers of an uninterrupted run, bit for bit on one machine.
    ``should_stop`` is asked after every outer step; once it says yes, the run is saved and Interrupted is raised.

    Raises ConfigError and DataError for what the caller can mend, CheckpointError when the checkpoint is damaged or
    that of another run, RuntimeError when ``output`` holds a run and ``resume`` was not asked for, and OverfitError
    when the training diverges.
    """
    config = config.resolved()
    if resume and output is None:
        raise ValueError("overfit: output must be given to resume; got None.")
    with cpu_threads(1):
        return _Run(config, output, progress, should_stop).run(resume=resume)


class _Run:
    """A loop, and a callback that watches it."""

    def __init__(
        self, config: OverfitConfig, output: Path | None, progress: Progress | None, should_stop: Callable[[], bool]
    ) -> None:
        self.config = config
        self.split = load_split(config)
        self.model = build_model(
            config.model, (1, *self.split.train.x.shape[2:]), len(self.split.classes), config.width, config.seed
        )
        self.problem = PerWeightDecay(self.model, config.log_decay)
        self.path = output / CHECKPOINT if output else None
        self.progress = progress
        self.should_stop = should_stop
        self.points: list[dict[str, float]] = []
        self.learned_at: int | None = None
        params, hparams = list(self.model.parameters()), self.problem.hparams
        self.loop = BilevelLoop(
            lambda: cross_entropy(self.model, self.split.valid),
            lambda: self.problem.inner_loss(self.model, self.split.train, slice(None)),
            params,
            hparams,
            torch.optim.Adam(params, lr=config.inner_lr),
            torch.optim.RMSprop(hparams, lr=config.hyper_lr),
            inner_steps=config.inner_steps,
            solver=Identity(),
            callbacks=self._watch,
            stateful=self,
            log=output / LOG if output else None,
            checkpoint=self.path,
            checkpoint_every=_CHECKPOINT_EVERY,
            progress=False,
        )

    def run(self, *, resume: bool) -> OverfitResult:
        steps = self.config.steps or 0
        if resume and self.loop.resume():
            self._require_whole(steps)
        self._tell(self.loop.step_count)
        if self.learned_at is None:
            self._run_loop(steps - self.loop.step_count)
        hparams = [h.detach().clone() for h in self.problem.hparams]
        return OverfitResult(self.config, self.points, self.learned_at, hparams, self.model)

    def _require_whole(self, steps: int) -> None:
        """Requires that a checkpoint holds no more steps than the run has, and the curve of a run that is over."""
        over = self.loop.step_count == steps or self.learned_at is not None
        if self.loop.step_count > steps or (over and not self.points):
            raise CheckpointError(f"{self.path}: is damaged: its steps or its curve are not those of such a run.")

    def _run_loop(self, steps: int) -> None:
        try:
            self.loop.run(steps)
        except LoopDiverged as error:
            raise OverfitError(f"the training diverged: {error}") from error

    def _watch(self, loop: BilevelLoop, record: LoopRecord) -> bool:
        parts = (self.split.train, self.split.valid)
        learned = all(score(self.model, part)[1] >= GOAL for part in parts)
        if learned or record.step == self.config.steps or record.step % _POINT_EVERY == 0:
            point = {"step": record.step, **asdict(evaluate(self.model, self.split))}
            self.points.append(point)
            loop.log_event("point", **point)
        if learned:
            self.learned_at = record.step
        self._tell(1, f"validation loss {record.outer_loss:.3f}")
        if not learned and self.should_stop():
            raise Interrupted
        return learned

    def _tell(self, steps: int, note: str = "") -> None:
        if self.progress is not None:
            self.progress.advance(steps, note)

    # What the loop saves beside its own state

    def state_dict(self) -> dict[str, Any]:
        """The curve, and whose it is."""
        return {"config": identity(self.config), "points": self.points, "learned_at": self.learned_at or 0}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the curve. Raises ValueError, and changes nothing, where it is that of another run."""
        different = conflict(state.get("config"), identity(self.config))
        if different:
            raise ValueError(different)
        contents.check_like("it", state, {"config": state["config"], "points": state.get("points"), "learned_at": 0})
        contents.check_points("points", state["points"])
        self.points = [dict(point) for point in state["points"]]
        self.learned_at = state["learned_at"] or None
