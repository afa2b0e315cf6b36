"""The run of a trainer over epochs: its files, its ends, and where it goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import _checkpoint
from .._checkpoint import CheckpointError
from .._json_log import JsonLog
from .._progress import ProgressBar
from ..hypergrad import _loop_arguments as arguments
from ..hypergrad._interrupt import DeferredInterrupt

if TYPE_CHECKING:
    from .trainer import EpochRecord, ResponseTrainer

_VERSION = 2


@dataclass(frozen=True)
class FitResult:
    """What :meth:`ResponseTrainer.fit` came to.

    ``history`` has the records of all epochs, those before this call too, ``best`` the one with the lowest validation
    loss, None where no epoch is over. ``stopped`` says why it ended: ``"epochs"``, ``"patience"`` or ``"asked"``.
    """

    history: list[EpochRecord]
    best: EpochRecord | None
    stopped: str


class Plan:
    """The checked arguments of one `fit`."""

    def __init__(
        self,
        trainer: str,
        epochs: int,
        output: str | PathLike[str] | None,
        resume: bool,
        patience: int | None,
        should_stop: Callable[[], bool] | None,
        on_epoch: Callable[[EpochRecord], Any] | None,
        checkpoint_every: int,
    ) -> None:
        caller = self.caller = f"{trainer}.fit"
        arguments.check_count(caller, "epochs", epochs, 0)
        arguments.check_count(caller, "checkpoint_every", checkpoint_every, 1)
        if patience is not None:
            arguments.check_count(caller, "patience", patience, 1)
        arguments.check_callable(caller, "should_stop", should_stop, optional=True)
        arguments.check_callable(caller, "on_epoch", on_epoch, optional=True)
        if resume and output is None:
            raise ValueError(f"{caller}: output must be given to resume; got None.")
        self.epochs, self.patience, self.checkpoint_every = epochs, patience, checkpoint_every
        self.output = None if output is None else Path(output)
        self.resume = resume
        self.should_stop, self.on_epoch = should_stop, on_epoch


class Files:
    """The folder of a run: its log, its checkpoint, its best model. Without a folder nothing is written."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self._log_bytes = 0
        self._log = JsonLog(None)

    def open(self, trainer: ResponseTrainer, plan: Plan) -> JsonLog:
        """Opens ``plan.output``, new or as a run left it, and takes over the state it holds."""
        if plan.output is None:
            self.folder, self._log = None, JsonLog(None)
            return self._log
        plan.output.mkdir(parents=True, exist_ok=True)
        checkpoint, log = plan.output / "checkpoint.pt", plan.output / "log.jsonl"
        if plan.output != self.folder:
            self._log_bytes = 0
            if plan.resume and checkpoint.exists():
                self._take_over(trainer, plan.caller, checkpoint, log)
            elif checkpoint.exists() or log.exists():
                raise RuntimeError(
                    f"{plan.caller}: output must be a folder without a run; {plan.output} holds"
                    f" {checkpoint.name if checkpoint.exists() else log.name}. Pass resume=True to go on with it, or"
                    " another folder."
                )
        self.folder = plan.output
        self._log = JsonLog(log, self._log_bytes)
        return self._log

    def note(self, trainer: ResponseTrainer, record: EpochRecord) -> None:
        """A line of the log, and the model where it is the best so far."""
        self._log.write("epoch", **asdict(record))
        self._log_bytes = self._log.position
        if self.folder is not None and trainer.best is record and trainer.best_state is not None:
            _checkpoint.save(self.folder / "best.pt", trainer.best_state)

    def save(self, trainer: ResponseTrainer) -> None:
        """The checkpoint."""
        if self.folder is not None:
            self._log.sync()
            state = {"version": _VERSION, "log_bytes": self._log_bytes, "trainer": trainer.state_dict()}
            _checkpoint.save(self.folder / "checkpoint.pt", state)

    def _take_over(self, trainer: ResponseTrainer, caller: str, checkpoint: Path, log: Path) -> None:
        if trainer.step_count:
            raise RuntimeError(
                f"{caller}: resume must come before the first step; got a trainer of {trainer.step_count} steps."
            )
        file = _checkpoint.load(checkpoint, _VERSION)
        try:
            arguments.check_keys("it", file, {"version", "log_bytes", "trainer"})
            arguments.check_saved_count("log_bytes", file["log_bytes"])
            JsonLog.require(log, file["log_bytes"])
            JsonLog.require_whole_lines(log, file["log_bytes"])
            trainer.load_state_dict(file["trainer"])
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            cause = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{checkpoint}: does not fit this trainer: {cause}") from error
        self._log_bytes = file["log_bytes"]


def run(trainer: ResponseTrainer, files: Files, plan: Plan, progress: bool) -> FitResult:
    """Goes on until the plan says stop; see `ResponseTrainer.fit`."""
    with DeferredInterrupt() as interrupt, files.open(trainer, plan):
        bar = ProgressBar(plan.epochs, shown=progress, unit="epoch")
        bar.advance(trainer.epoch)
        stopped = _exhausted(trainer, plan)
        try:
            while stopped is None:
                record = trainer.advance()
                if record is not None:
                    files.note(trainer, record)
                    stopped = _exhausted(trainer, plan)
                    if stopped is not None or record.epoch % plan.checkpoint_every == 0:
                        files.save(trainer)
                    bar.advance(1, f"validation loss {record.valid_loss:.4g}")
                    if plan.on_epoch is not None:
                        plan.on_epoch(record)
                elif plan.should_stop is not None and plan.should_stop():
                    stopped = "asked"
                    files.save(trainer)
                if interrupt.asked:
                    files.save(trainer)
                    raise KeyboardInterrupt
        finally:
            bar.close()
    return FitResult(trainer.history, trainer.best, stopped)


def _exhausted(trainer: ResponseTrainer, plan: Plan) -> str | None:
    """Why there is to be no further epoch, or None."""
    if trainer.epoch >= plan.epochs:
        return "epochs"
    if plan.patience is not None and trainer.best is not None and trainer.epoch - trainer.best.epoch >= plan.patience:
        return "patience"
    return None
