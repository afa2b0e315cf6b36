"""Tunes one weight decay per weight, or one weight per training example, against two baselines on the same split.

Four models are trained, all from the same start, for the same number of inner steps, with the same optimizer:

1. without decay (for per-example weights: with uniform weights and no decay);
2. with one decay for all weights, the best on the validation part of ``trials`` drawn by Optuna's random search,
   log-uniform over `SEARCH_RANGE`; each trial is trained in full, so the search may spend ``trials`` times the inner
   steps of the tuned model;
3. a reference for the reader: with that decay again, on training and validation parts together, which is what the
   validation examples are worth as training examples;
4. the tuned one: as many hyperparameters as weights, or as training examples, moved by implicit differentiation.

What to expect, and what not, is told with figures in the documentation of `nestopt_ext.experiments`.
"""

import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import _checkpoint as checkpoint
from .._json_log import JsonLog
from . import contents, data
from .config import TuneConfig
from .data import Part, Split
from .identity import conflict, identity
from .models import build_model
from .problems import FixedDecay, PerExampleWeight, PerWeightDecay, Problem
from .resources import cpu_threads, fitting, usable_device
from .results import MethodResult
from .run_folder import CHECKPOINT, LOG
from .training import Training, TrainingDiverged

#: Logarithms of the global decays that random search draws from.
SEARCH_RANGE = (-12.0, -1.0)
CHECKPOINT_VERSION = 3
#: Seconds of training between checkpoints; an interrupt writes one at once.
_CHECKPOINT_SECONDS = 10.0

NO_DECAY, GLOBAL_DECAY, REFIT = "no-decay", "global-decay", "global-decay-refit"


class TuneError(RuntimeError):
    """The run cannot go on; the message is one line with what to do."""


class Interrupted(RuntimeError):
    """The run was asked to stop; everything done is in the checkpoint."""


class Progress(Protocol):
    """Who is told how far the run is."""

    def stage(self, label: str) -> None:
        """A new model is being trained."""

    def advance(self, steps: int, note: str = "") -> None:
        """Outer steps were taken, or were found done."""


class _Silent:
    def stage(self, label: str) -> None:
        pass

    def advance(self, steps: int, note: str = "") -> None:
        pass


@dataclass(frozen=True)
class TuneResult:
    """What a run found: a row for each method, the tuned hyperparameters on the CPU, the tuned model and the split."""

    config: TuneConfig
    methods: list[MethodResult]
    hparams: list[Tensor]
    model: nn.Module
    split: Split

    def method(self, name: str) -> MethodResult:
        """The row of ``name``. Raises KeyError when there is none."""
        for result in self.methods:
            if result.method == name:
                return result
        raise KeyError(name)


@dataclass(frozen=True)
class Inputs:
    """What a run needs of the machine: the device, and the split on it."""

    device: torch.device
    split: Split


def load_inputs(config: TuneConfig) -> Inputs:
    """Checks device, data, split and network of ``config``, and leaves nothing on the disk.

    Raises ConfigError, DataError and FormatError for what the caller can mend.
    """
    config = config.resolved()
    with cpu_threads(config.threads):  # the sums that standardize the pixels may depend on it
        device = usable_device(config.device)
        dataset = data.load(config.data, Path(config.data_dir) if config.data_dir else None)
        train_size, valid_size = config.train_size or 0, config.valid_size or 0
        split = data.make_split(dataset, train_size, valid_size, config.label_noise, config.seed)
        with fitting(device, config.width):
            inputs = Inputs(device, split.to(device))
            _model(config, inputs)
    return inputs


def tune(
    config: TuneConfig,
    output: Path | None = None,
    *,
    inputs: Inputs | None = None,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Progress | None = None,
) -> TuneResult:
    """Runs all four trainings of the module's list and returns what they reached.

    With ``output``, a folder that exists, the run is logged to ``log.jsonl`` and saved to ``checkpoint.pt`` there. The
    lines of the log are of the events ``config`` (first), ``point`` of a learning curve, ``trial`` of the search and
    ``result`` of a method; only ``seconds`` and ``peak_mib`` differ between equal runs. With ``resume`` the run
    continues from that checkpoint to the numbers of an uninterrupted run, bit for bit on one machine. ``inputs`` are
    those that `load_inputs` gave for ``config``, where the caller has them already. ``should_stop`` is asked after
    every outer step; once it says yes, the run is saved and Interrupted is raised.

    Raises ConfigError, DataError and FormatError for what the caller can mend, CheckpointError when the checkpoint is
    damaged, TuneError when a training diverges, when the checkpoint is that of another run, or when ``output`` holds
    one of the two files and ``resume`` was not asked for.
    """
    config = config.resolved()
    if output is not None and not resume:
        _require_room(output)
    inputs = inputs or load_inputs(config)
    with cpu_threads(config.threads):
        return _Run(config, inputs, output, resume, should_stop, progress or _Silent()).run()


def auc(scores: Tensor, positive: Tensor) -> float | None:
    """Chance that a positive example has a higher score than a negative one, ties counted half; both tensors [N].

    None where one of the two kinds is absent.

    >>> auc(torch.tensor([0.1, 0.4, 0.9]), torch.tensor([False, True, True]))
    1.0
    """
    positives, negatives = scores[positive].double(), scores[~positive].double().sort().values
    if not len(positives) or not len(negatives):
        return None
    below = torch.searchsorted(negatives, positives, side="left")
    not_above = torch.searchsorted(negatives, positives, side="right")
    return float((below + not_above).double().mean() / (2 * len(negatives)))


def _require_room(output: Path) -> None:
    """Requires that a new run in ``output`` replaces nothing."""
    for name in (LOG, CHECKPOINT):
        if (output / name).exists():
            raise TuneError(f"{output / name}: is there already. Continue with resume=True, or give another output.")


def _model(config: TuneConfig, inputs: Inputs) -> nn.Module:
    channels, rows, columns = inputs.split.train.x.shape[1:]
    name, width = config.model or "", config.width or 0
    model = build_model(name, (channels, rows, columns), len(inputs.split.classes), width, config.seed)
    return model.to(inputs.device)


class _Run:
    """The state of one run: what is finished, what is being trained, and where the log ends."""

    def __init__(
        self,
        config: TuneConfig,
        inputs: Inputs,
        output: Path | None,
        resume: bool,
        should_stop: Callable[[], bool],
        progress: Progress,
    ) -> None:
        self.config = config
        self.inputs = inputs
        self.split = inputs.split
        self.should_stop = should_stop
        self.progress = progress
        self.finished: list[MethodResult] = []
        self.trials: list[dict[str, Any]] = []
        self.tuned: dict[str, Any] = {}
        self.pending: dict[str, Any] = {}
        self.path = output / CHECKPOINT if output else None
        log_bytes = self._load() if resume else 0
        self.log = JsonLog(output / LOG if output else None, log_bytes)
        self.saved_at = 0.0

    def run(self) -> TuneResult:
        with self.log:
            if not self.log.position:
                sizes = {"train": len(self.split.train), "valid": len(self.split.valid), "test": len(self.split.test)}
                self.log.write("config", **identity(self.config), examples=sizes)
            stages = (self._no_decay, self._search, self._refit, self._implicit)
            for method, stage in zip(self._methods(), stages, strict=True):
                self._finish(method, stage)
        model = self._model()
        model.load_state_dict(self.tuned["model"])
        return TuneResult(self.config, self.finished, list(self.tuned["hparams"]), model, self.split)

    # Stages

    def _methods(self) -> list[str]:
        return [NO_DECAY, GLOBAL_DECAY, REFIT, self.config.hparams]

    def _finish(self, method: str, stage: Callable[[], MethodResult]) -> None:
        if any(result.method == method for result in self.finished):
            self.progress.advance(self.config.steps * (self.config.trials if method == GLOBAL_DECAY else 1))
            return
        self.progress.stage(method)
        result = stage()
        self.finished.append(result)
        final = None if result.skipped else asdict(result.final)
        self.log.write(
            "result",
            method=method,
            num_hparams=result.num_hparams,
            log_decay=result.log_decay,
            auc=result.auc,
            diverged_solves=result.diverged_solves,
            final=final,
            skipped=result.skipped,
            seconds=result.seconds,
            peak_mib=result.peak_mib,
        )
        self._save(None)

    def _no_decay(self) -> MethodResult:
        training = self._training(FixedDecay(None, self.inputs.device))
        self._train(NO_DECAY, training, NO_DECAY)
        return _result(NO_DECAY, 0, training)

    def _search(self) -> MethodResult:
        try:
            import optuna
        except ImportError:
            reason = "Optuna is not installed: pip install nestopt_ext[experiments]"
            self.progress.advance(self.config.steps * self.config.trials)
            return MethodResult(GLOBAL_DECAY, 1, skipped=reason)
        if self.config.trials == 0:
            return MethodResult(GLOBAL_DECAY, 1, skipped="no trials were asked for (--trials 0)")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=self.config.seed))
        for number in range(self.config.trials):
            # Trials that a checkpoint holds are asked for again, so that the sampler's state is the same too.
            trial = study.ask()
            log_decay = trial.suggest_float("log_decay", *SEARCH_RANGE)
            if number < len(self.trials):
                self.progress.advance(self.config.steps)
            else:
                self.progress.stage(f"{GLOBAL_DECAY} {number + 1}/{self.config.trials}")
                self._trial(number, log_decay)
            loss = self.trials[number]["valid_loss"]
            if loss is None:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(trial, loss)
        return self._best_trial()

    def _trial(self, number: int, log_decay: float) -> None:
        training = self._training(FixedDecay(log_decay, self.inputs.device))
        loss: float | None = None
        try:
            self._train(f"{GLOBAL_DECAY}/{number}", training, None)
            loss = training.points[-1]["valid_loss"]
        except TrainingDiverged:
            self.progress.advance(self.config.steps - training.step_count)
        trial: dict[str, Any] = {
            "number": number,
            "log_decay": log_decay,
            "valid_loss": loss,
            "seconds": training.seconds,
        }
        self.log.write("trial", method=GLOBAL_DECAY, **trial)
        self.trials.append({**trial, "points": training.points, "peak_mib": training.peak_mib})
        self._save(None)

    def _best_trial(self) -> MethodResult:
        sound = [trial for trial in self.trials if trial["valid_loss"] is not None]
        if not sound:
            raise TuneError("every trial of the global decay diverged. Lower --inner-lr.")
        best = min(sound, key=lambda trial: float(trial["valid_loss"]))
        for point in best["points"]:
            self.log.write("point", method=GLOBAL_DECAY, **point)
        return MethodResult(
            GLOBAL_DECAY,
            1,
            points=best["points"],
            seconds=sum(trial["seconds"] for trial in self.trials),
            peak_mib=max(trial["peak_mib"] for trial in self.trials),
            log_decay=best["log_decay"],
        )

    def _refit(self) -> MethodResult:
        found = next(result for result in self.finished if result.method == GLOBAL_DECAY)
        if found.skipped:
            self.progress.advance(self.config.steps)
            return MethodResult(REFIT, 1, skipped="there is no global decay to train with")
        train, valid = self.split.train, self.split.valid
        both = Part(torch.cat([train.x, valid.x]), torch.cat([train.y, valid.y]))
        training = self._training(FixedDecay(found.log_decay, self.inputs.device), inner_part=both)
        self._train(REFIT, training, REFIT)
        return _result(REFIT, 1, training, log_decay=found.log_decay)

    def _implicit(self) -> MethodResult:
        config = self.config
        model = self._model()
        problem = self._problem(model)
        training = Training(config, self.split, model, problem)
        self._train(config.hparams, training, config.hparams)
        hparams = [h.detach().cpu() for h in problem.hparams]
        self.tuned = {"model": model.state_dict(), "hparams": hparams}
        separation = auc(hparams[0], ~self.split.flipped) if config.hparams == "per-example-weight" else None
        return _result(config.hparams, sum(h.numel() for h in hparams), training, auc=separation)

    # One training

    def _model(self) -> nn.Module:
        return _model(self.config, self.inputs)

    def _problem(self, model: nn.Module) -> Problem:
        """The problem whose hyperparameters are tuned, as it starts."""
        start = self.config.log_decay if self.config.log_decay is not None else 0.0
        if self.config.hparams == "per-weight-decay":
            return PerWeightDecay(model, start)
        return PerExampleWeight(len(self.split.train), start, self.inputs.device)

    def _training(self, problem: Problem, inner_part: Part | None = None) -> Training:
        return Training(self.config, self.split, self._model(), problem, inner_part=inner_part)

    def _train(self, key: str, training: Training, log_as: str | None) -> None:
        """Trains to the end, from where the checkpoint left ``key`` if it did; logs the points under ``log_as``."""
        if self.pending.get("key") == key:
            try:
                training.load_state_dict(self.pending["state"])
            except (ValueError, RuntimeError) as error:
                cause = " ".join(str(error).split())[:120]
                raise checkpoint.CheckpointError(
                    f"{self.path}: does not fit its own configuration: {cause}."
                ) from error
            self.progress.advance(training.step_count)
        self.pending = {}
        while not training.done:
            point = training.step() if log_as is None else self._explained(key, training)
            if point is not None and log_as is not None:
                self.log.write("point", method=log_as, **point)
            self.progress.advance(1, f"validation loss {point['valid_loss']:.3f}" if point else "")
            if self.should_stop():
                self._save({"key": key, "state": training.state_dict()})
                raise Interrupted
            if training.seconds - self.saved_at > _CHECKPOINT_SECONDS:
                self._save({"key": key, "state": training.state_dict()})
                self.saved_at = training.seconds
        self.saved_at = 0.0

    def _explained(self, key: str, training: Training) -> dict[str, float] | None:
        try:
            return training.step()
        except TrainingDiverged as error:
            raise TuneError(f"{key}: {error}. Lower --inner-lr or --hyper-lr, or raise --inner-steps.") from error

    # The checkpoint

    def _save(self, pending: dict[str, Any] | None) -> None:
        if self.path is None:
            return
        self.log.sync()
        checkpoint.save(
            self.path,
            {
                "version": CHECKPOINT_VERSION,
                "config": identity(self.config),
                "data": _fingerprint(self.split),
                "log_bytes": self.log.position,
                "finished": [asdict(result) for result in self.finished],
                "trials": self.trials,
                "tuned": self.tuned,
                "pending": pending or {},
            },
        )

    def _load(self) -> int:
        """Takes over the checkpoint and returns where the log ended when it was written."""
        if self.path is None:
            raise ValueError("tune: output must be given to resume; got None.")
        if not self.path.exists() and self.path.parent.is_dir():
            return 0  # stopped before anything was worth saving
        state = checkpoint.load(self.path, CHECKPOINT_VERSION)
        try:
            different = conflict(state.get("config"), identity(self.config))
            if different:
                raise TuneError(f"{self.path}: {different}")
            contents.check_state(state, self._methods(), self.config.trials)
            self._check_tuned(state["tuned"])
        except ValueError as error:
            raise checkpoint.CheckpointError(f"{self.path}: is damaged: {error}.") from error
        if state["data"] != _fingerprint(self.split):
            raise TuneError(f"{self.path}: was made with other data than --data and --data-dir give now.")
        self.finished = [MethodResult(**result) for result in state["finished"]]
        self.trials, self.tuned, self.pending = state["trials"], state["tuned"], state["pending"]
        return int(state["log_bytes"])

    def _check_tuned(self, tuned: dict[str, Any]) -> None:
        """Requires that the tuned model, where there is one, has the tensors that the configuration gives it."""
        if tuned:
            model = self._model()
            contents.check_like("tuned['model']", tuned["model"], model.state_dict())
            expected = [h.detach() for h in self._problem(model).hparams]
            contents.check_like("tuned['hparams']", tuned["hparams"], expected)


def _result(
    method: str,
    num_hparams: int,
    training: Training,
    *,
    log_decay: float | None = None,
    auc: float | None = None,
) -> MethodResult:
    return MethodResult(
        method,
        num_hparams,
        training.points,
        training.seconds,
        training.peak_mib,
        log_decay=log_decay,
        auc=auc,
        diverged_solves=training.diverged_solves,
    )


def _fingerprint(split: Split) -> int:
    """A check sum of the split, to notice that a run is continued on other data."""
    total = 0
    for part in (split.train, split.valid, split.test):
        for tensor in (part.x, part.y):
            total = zlib.crc32(tensor.cpu().numpy().tobytes(), total)
    return total
