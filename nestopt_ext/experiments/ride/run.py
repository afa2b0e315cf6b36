"""A run of `ride`: the ride, with a checkpoint, and then the descents that it is compared with."""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ..._checkpoint import CheckpointError
from ..._json_log import JsonLog
from ...games import Archive, ridge_rider
from ..resources import cpu_threads
from ..run_folder import CHECKPOINT, LOG
from ..tune import Interrupted, Progress
from .config import TOY_GAMES, RideConfig
from .gan import gan_study
from .polynomial import polynomial_study
from .report import findings
from .results import Ends, RideResult
from .rivals import descend
from .shapes import shapes_study
from .study import Rival, Study
from .toy import toy_study

#: Seconds of riding between checkpoints; an interrupt writes one at once.
_CHECKPOINT_SECONDS = 10.0


def ride(
    config: RideConfig,
    output: Path | None = None,
    *,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Progress | None = None,
) -> RideResult:
    """Rides the game of ``config``, and lets its rivals descend.

    With ``output``, a folder that exists, what was found is logged to ``log.jsonl`` there, and the archive of the ride
    is saved to ``checkpoint.pt`` (`nestopt_ext.games.Archive.load` reads it). With ``resume`` the ride continues from
    there to the numbers of an uninterrupted one, bit for bit on one machine; rivals that were not done start again.
    ``should_stop`` is asked after every step; once it says yes, the run is saved and Interrupted is raised.

    Raises ConfigError for a setting out of range, and CheckpointError when the checkpoint is damaged or that of another
    run, when ``output`` holds one and ``resume`` was not asked for, or when it is to be continued without ``output``.
    """
    config = config.resolved()
    with cpu_threads(1):  # so short are the steps that threads would only wait for each other
        return _Run(config, output, resume, should_stop, progress).run()


def make_study(config: RideConfig) -> Study:
    """The study of a configuration that is resolved."""
    if config.game in TOY_GAMES:
        return toy_study(config)
    return {"polynomial": polynomial_study, "shapes": shapes_study, "gan": gan_study}[config.game](config)


def num_pieces(config: RideConfig) -> int:
    """Pieces of work that `ride` tells its progress of: steps of the ascent, of the ride, and of each rival."""
    config = config.resolved()
    ascents = config.ascent_steps + 1 if config.ascent_steps else 0
    return ascents + (config.steps or 0) + sum(rival.num_steps for rival in make_study(config).rivals)


class _Run:
    """The state of one run: the archive, and when it was saved."""

    def __init__(
        self,
        config: RideConfig,
        output: Path | None,
        resume: bool,
        should_stop: Callable[[], bool],
        progress: Progress | None,
    ) -> None:
        self.config = config
        self.should_stop = should_stop
        self.progress = progress
        self.path = output / CHECKPOINT if output else None
        self.archive = self._load() if resume else self._empty()
        self.study = make_study(config)
        self.saved_at = time.monotonic()
        # What is in it follows from the archive and the configuration, so that it is written anew.
        self.log = JsonLog(output / LOG if output else None)

    def run(self) -> RideResult:
        with self.log:
            self.log.write("config", experiment="ride", **asdict(self.config))
            self._ride()
            for solution in self.archive.solutions:
                self.log.write(
                    "solution",
                    name=self.study.label(solution.key),
                    losses=solution.losses,
                    key=solution.key.tolist(),
                    fingerprint=solution.fingerprint,
                    branches=solution.branches,
                )
            result = RideResult(
                self.config, self.study, self.archive, tuple(self._descend(rival) for rival in self.study.rivals)
            )
            for row in result.rows:
                counts = {end.name: count for end, count in zip(result.ends, row.rivals, strict=True)}
                self.log.write("row", name=row.name, starts=row.starts, branches=row.branches, rivals=counts)
            for line in findings(result):
                self.log.write("finding", text=line)
            return result

    def _ride(self) -> None:
        study = self.study
        self._stage("ride")
        done = self.archive.num_steps
        try:
            ridge_rider(
                study.problem,
                study.starts,
                study.method,
                key=study.key,
                distance=study.distance,
                archive=self.archive,
                should_stop=self._asked,
                on_batch=self._save_now,
                **study.options,
            )
        except ValueError as error:
            if not done:
                raise
            raise CheckpointError(f"{self.path}: is not that of such a run: {error}") from error
        self._save_now(self.archive)
        if self.should_stop():
            raise Interrupted

    def _descend(self, rival: Rival) -> Ends:
        self._stage(rival.name)
        begin = rival.begin(self.archive)
        states = descend(rival.step, begin, rival.num_steps, tick=self._tick)
        found = Ends(rival.name, len(begin) * rival.num_steps, states, self._keys(states))
        self.log.write("rival", name=found.name, descents=len(begin), steps=rival.num_steps, keys=found.keys.tolist())
        return found

    def _keys(self, states: Tensor) -> Tensor:
        with torch.no_grad():
            return self.study.key(states).double()

    # What is asked and told on the way

    def _asked(self) -> bool:
        """Whether to stop the ride; asked once for each step of it."""
        self._advance()
        if time.monotonic() - self.saved_at > _CHECKPOINT_SECONDS:
            self._save_now(self.archive)
        return self.should_stop()

    def _tick(self) -> None:
        self._advance()
        if self.should_stop():
            raise Interrupted

    def _stage(self, label: str) -> None:
        if self.progress is not None:
            self.progress.stage(label)

    def _advance(self) -> None:
        if self.progress is not None:
            self.progress.advance(1)

    # The checkpoint

    def _save_now(self, archive: Archive) -> None:
        if self.path is not None:
            archive.save(self.path)
        self.saved_at = time.monotonic()

    def _load(self) -> Archive:
        if self.path is None:
            raise CheckpointError("ride: output must be given to resume; got None.")
        if not self.path.exists() and self.path.parent.is_dir():
            return Archive()  # stopped before anything was worth saving
        return Archive.load(self.path)

    def _empty(self) -> Archive:
        if self.path is not None and self.path.exists():
            raise CheckpointError(f"{self.path}: is there already. Continue with resume=True, or give another output.")
        return Archive()
