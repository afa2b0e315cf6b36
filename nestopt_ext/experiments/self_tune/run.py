"""The run: one method after the other on the same problem, each within the same budget."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ... import _checkpoint as checkpoint
from ..._json_log import JsonLog
from ..identity import conflict, identity
from ..resources import cpu_threads, fitting, usable_device
from ..run_folder import CHECKPOINT, LOG
from ..tune import Interrupted, Progress
from . import contents
from .config import RESPONSE_METHODS, SEARCHES, Budget, SelfTuneConfig
from .course import Course, TrainingDiverged
from .hypernet_learner import HypernetLearner, too_large
from .language import LanguageProblem
from .learner import Learner
from .loop_learner import LoopLearner
from .pictures import PictureProblem
from .problem import SelfTuningProblem
from .response_learner import ResponseLearner
from .results import MethodResult, lowest
from .search import Unavailable, make_search
from .space import inside

CHECKPOINT_VERSION = 2
#: Seconds of training between checkpoints; an interrupt writes one at once.
_CHECKPOINT_SECONDS = 30.0
#: Units of progress for each method.
PIECES = 100


class SelfTuneError(RuntimeError):
    """The run cannot go on; the message is one line with what to do."""


@dataclass(frozen=True)
class SelfTuneResult:
    """What a run found: a row for each method, in the order they were asked for."""

    config: SelfTuneConfig
    methods: list[MethodResult]
    problem: SelfTuningProblem

    def method(self, name: str) -> MethodResult:
        """The row of ``name``. Raises KeyError when there is none."""
        for result in self.methods:
            if result.method == name:
                return result
        raise KeyError(name)


def make_problem(config: SelfTuneConfig) -> SelfTuningProblem:
    """Reads the data of ``config`` and makes the problem; leaves nothing on the disk.

    Raises ConfigError, DataError and FormatError for what the caller can mend.
    """
    config = config.resolved()
    with cpu_threads(config.threads):
        device = usable_device(config.device)
        kind = LanguageProblem if config.data == "ptb" else PictureProblem
        with fitting(device, config.width):
            problem: SelfTuningProblem = kind(config, device)
            problem.model()
    return problem


def self_tune(
    config: SelfTuneConfig,
    output: Path | None = None,
    *,
    problem: SelfTuningProblem | None = None,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Progress | None = None,
) -> SelfTuneResult:
    """Runs every method of ``config`` and returns what they reached.

    With ``output``, a folder that exists, the run is logged to ``log.jsonl`` and saved to ``checkpoint.pt`` there. The
    lines of the log are of the events ``config`` (first), ``point`` of a curve, ``trial`` of a search and ``result`` of
    a method. With ``resume`` the run continues from that checkpoint; where budgets are in epochs, to the numbers of an
    uninterrupted run but for ``seconds``, bit for bit on one machine. ``problem`` is the one that `make_problem` gave
    for ``config``, where the caller has it already. ``should_stop`` is asked after every step; once it says yes, the
    run is saved and Interrupted is raised.

    Raises ConfigError, DataError and FormatError for what the caller can mend, CheckpointError when the checkpoint is
    damaged, and SelfTuneError when every method fails, when the checkpoint is that of another run, or when ``output``
    holds a run and ``resume`` was not asked for.
    """
    config = config.resolved()
    if resume and output is None:
        raise ValueError("self_tune: output must be given to resume; got None.")
    if output is not None and not resume:
        for name in (LOG, CHECKPOINT):
            if (output / name).exists():
                raise SelfTuneError(
                    f"{output / name}: is there already. Continue with resume=True, or give another output."
                )
    problem = problem or make_problem(config)
    with cpu_threads(config.threads), _random_state(problem.device):
        return _Run(config, problem, output, resume, should_stop, progress).run()


@contextlib.contextmanager
def _random_state(device: torch.device) -> Iterator[None]:
    """The global random numbers come back afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


class _Run:
    """The state of one run: what is finished, what is being trained, and where the log ends."""

    def __init__(
        self,
        config: SelfTuneConfig,
        problem: SelfTuningProblem,
        output: Path | None,
        resume: bool,
        should_stop: Callable[[], bool],
        progress: Progress | None,
    ) -> None:
        self.config = config
        self.problem = problem
        self.should_stop = should_stop
        self.progress = progress
        self.finished: list[MethodResult] = []
        #: The trainings of the search under way, and the state of the training under way.
        self.trials: list[dict[str, Any]] = []
        self.pending: dict[str, Any] = {}
        self.told = 0
        self.path = output / CHECKPOINT if output else None
        log_bytes = self._load() if resume else 0
        self.log = JsonLog(output / LOG if output else None, log_bytes)
        self.saved_at = 0.0

    def run(self) -> SelfTuneResult:
        with self.log:
            if not self.log.position:
                start = {d.name: d.start for d in self.problem.space}
                self.log.write("config", **identity(self.config), start=start)
            for number, method in enumerate(self.config.method):
                if number >= len(self.finished):
                    self._finish(method)
                self._tell(number + 1, 0.0)
        if all(result.skipped for result in self.finished):
            reasons = "; ".join(f"{result.method}: {result.skipped}" for result in self.finished)
            raise SelfTuneError(f"no method came to an end. {reasons}")
        return SelfTuneResult(self.config, self.finished, self.problem)

    # Methods

    def _finish(self, method: str) -> None:
        if self.progress is not None:
            self.progress.stage(method)
        result = self._search(method) if method in SEARCHES else self._single(method)
        self.finished.append(result)
        self.trials = []
        row = {name: value for name, value in asdict(result).items() if name != "points"}
        best = None if result.skipped else result.best
        self.log.write("result", **row, best=best, final=None if result.skipped else result.final)
        self._save({})

    def _single(self, method: str) -> MethodResult:
        """A method that trains once, and tunes meanwhile unless it is ``fixed``."""
        reason = too_large(self.problem) if method == "hypernet" else None
        if reason is not None:
            return MethodResult(method, trainings=0, skipped=reason)
        allowance = self.config.limit or Budget(epochs=float(self.config.epochs or 0))
        torch.manual_seed(self.config.seed)
        course = Course(self._learner(method), allowance, Budget(0.0, 0.0))
        fixed = [d.name for d in self.problem.space if d.name not in self.problem.differentiable()]
        try:
            self._train(method, method, course, allowance)
        except TrainingDiverged as error:
            reason = f"the training diverged after {course.learner.epochs:.1f} epochs: {error}"
            return MethodResult(method, trainings=0, seconds=course.seconds, skipped=reason)
        return MethodResult(
            method, course.points, course.seconds, course.learner.epochs, 1, fixed if method == "ift" else []
        )

    def _learner(self, method: str) -> Learner:
        if method in RESPONSE_METHODS:
            return ResponseLearner(self.problem, method)
        return (
            HypernetLearner(self.problem) if method == "hypernet" else LoopLearner(self.problem, tuned=method == "ift")
        )

    def _search(self, method: str) -> MethodResult:
        """Trainings at fixed values, each of so many epochs, until the budget is spent; the last one may be shorter."""
        limit, epochs = self.config.limit, float(self.config.epochs or 0)
        whole = limit or Budget(epochs=epochs * self.config.trials)
        try:
            search = make_search(method, self.problem.space, None if limit else self.config.trials, self.config.seed)
        except Unavailable as error:
            return MethodResult(method, trainings=0, skipped=str(error))
        number = 0
        while not search.exhausted:
            spent = self._spent()
            known = number < len(self.trials)
            if not known and (spent.seconds >= whole.seconds or spent.epochs >= whole.epochs):
                break
            # Trainings that a checkpoint holds are asked for again, so that the sampler's state is the same too.
            values = inside(self.problem.space, search.ask())
            if not known:
                left = Budget(whole.seconds - spent.seconds, min(epochs, whole.epochs - spent.epochs))
                self._trial(method, number, values, left, whole)
            search.tell(self.trials[number]["valid_loss"])
            number += 1
        points = [point for trial in self.trials for point in trial["points"]]
        spent = self._spent()
        if not points:
            reason = "every training diverged; lower --lr"
            return MethodResult(method, seconds=spent.seconds, trainings=len(self.trials), skipped=reason)
        return MethodResult(method, points, spent.seconds, spent.epochs, len(self.trials))

    def _trial(self, method: str, number: int, values: dict[str, float], allowance: Budget, whole: Budget) -> None:
        torch.manual_seed(self.config.seed)
        before = self._spent()
        course = Course(LoopLearner(self.problem, values), allowance, before)
        loss: float | None = None
        try:
            self._train(f"{method}/{number}", method, course, whole)
            loss = float(lowest(course.points)["valid_loss"])
        except TrainingDiverged:
            pass
        trial = {
            "number": number,
            "values": values,
            "valid_loss": loss,
            "seconds": course.seconds,
            "epochs": course.learner.epochs,
        }
        self.log.write("trial", method=method, **trial)
        self.trials.append({**trial, "points": [] if loss is None else course.points})
        self._save({})

    def _spent(self) -> Budget:
        """What the trainings of the search under way took."""
        return Budget(*(sum(float(trial[name]) for trial in self.trials) for name in ("seconds", "epochs")))

    def _train(self, key: str, method: str, course: Course, whole: Budget) -> None:
        """Trains to the end of the allowance, from the checkpoint where that is of this training."""
        if self.pending.get("key") == key:
            try:
                course.load_state_dict(self.pending["state"])
            except (ValueError, RuntimeError, KeyError, TypeError) as error:
                cause = " ".join(str(error).split())[:160]
                raise checkpoint.CheckpointError(
                    f"{self.path}: does not fit its own configuration: {cause}."
                ) from error
        self.pending = {}
        self.saved_at = course.seconds
        while not course.done:
            point = course.step()
            if point is not None:
                self.log.write("point", method=method, **point)
            spent = max(
                (course.before.seconds + course.seconds) / whole.seconds,
                (course.before.epochs + course.learner.epochs) / whole.epochs,
            )
            self._tell(len(self.finished), spent, f"validation loss {point['valid_loss']:.3f}" if point else "")
            if self.should_stop():
                self._save({"key": key, "state": course.state_dict()})
                raise Interrupted
            if course.seconds - self.saved_at > _CHECKPOINT_SECONDS:
                self._save({"key": key, "state": course.state_dict()})
                self.saved_at = course.seconds

    def _tell(self, finished: int, share: float, note: str = "") -> None:
        if self.progress is None:
            return
        reached = int(PIECES * (finished + min(share, 1.0)))
        if reached > self.told or note:
            self.progress.advance(max(0, reached - self.told), note)
            self.told = max(reached, self.told)

    # The checkpoint

    def _save(self, pending: dict[str, Any]) -> None:
        if self.path is None:
            return
        self.log.sync()
        checkpoint.save(
            self.path,
            {
                "version": CHECKPOINT_VERSION,
                "config": identity(self.config),
                "data": self.problem.fingerprint(),
                "log_bytes": self.log.position,
                "finished": [asdict(result) for result in self.finished],
                "trials": self.trials,
                "pending": pending,
            },
        )

    def _load(self) -> int:
        """Takes over the checkpoint and returns where the log ended when it was written."""
        assert self.path is not None
        if not self.path.exists() and self.path.parent.is_dir():
            return 0  # stopped before anything was worth saving
        state = checkpoint.load(self.path, CHECKPOINT_VERSION)
        try:
            different = conflict(state.get("config"), identity(self.config))
            if different:
                raise SelfTuneError(f"{self.path}: {different}")
            contents.check_state(state, self.config.method, [d.name for d in self.problem.space])
        except ValueError as error:
            raise checkpoint.CheckpointError(f"{self.path}: is damaged: {error}.") from error
        if state["data"] != self.problem.fingerprint():
            raise SelfTuneError(f"{self.path}: was made with other data than --data and --data-dir give now.")
        self.finished = [MethodResult(**result) for result in state["finished"]]
        self.trials, self.pending = state["trials"], state["pending"]
        return int(state["log_bytes"])
