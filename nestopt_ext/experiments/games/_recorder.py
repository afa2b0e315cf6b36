"""What a game experiment tells while it runs: the log, the progress, and the question whether to go on."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from ..._json_log import JsonLog
from ..run_folder import LOG
from ..tune import Interrupted, Progress
from ._config import GameConfig


class Recorder:
    """Writes ``log.jsonl`` in the folder ``output``, where one is given, and tells ``progress`` of each piece of work.

    ``should_stop`` is asked after each piece; once it says yes, Interrupted is raised.
    """

    def __init__(
        self,
        config: GameConfig,
        output: Path | None,
        should_stop: Callable[[], bool],
        progress: Progress | None,
    ) -> None:
        config.check()
        self._log = JsonLog(output / LOG if output else None)
        self._should_stop = should_stop
        self._progress = progress
        self._log.write("config", experiment=config.experiment, **dataclasses.asdict(config))

    def write(self, event: str, **values: Any) -> None:
        """Appends one line to the log; a number that is not finite becomes null."""
        self._log.write(event, **values)

    def stage(self, label: str) -> None:
        """Names the work that follows."""
        if self._progress is not None:
            self._progress.stage(label)

    def advance(self, pieces: int = 1) -> None:
        """Counts pieces of work as done. Raises Interrupted when the run was asked to stop."""
        if self._progress is not None:
            self._progress.advance(pieces)
        self.tick()

    def tick(self) -> None:
        """Raises Interrupted when the run was asked to stop; for long pieces of work to call now and then."""
        if self._should_stop():
            raise Interrupted

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log.__exit__(kind, error, trace)
