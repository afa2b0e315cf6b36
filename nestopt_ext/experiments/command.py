"""What the commands share: the parser, faults told in one line with an exit code, the stop by a signal."""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from .config import ConfigError
from .data import DataError
from .formats import FormatError
from .report import plain_table
from .run_folder import FolderError, is_free

PROGRAM = "python -m nestopt_ext"


class UsageError(ValueError):
    """The arguments do not go together; the message is one line."""


#: What the caller can mend: exit code 2.
_BAD_INPUT = (ConfigError, UsageError, FolderError, DataError, FormatError)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is what --help is for."""

    def error(self, message: str) -> Any:
        """Ends the program with the line and code 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


class Call:
    """One call of ``command``, whose faults become a line on stderr and an exit code.

    ``failures`` are the errors, besides those of the system, by which a run of this command ends without a result.
    ``begun`` is the folder of the run from the moment on that the run has touched it. ``resumable`` tells whether
    what an interrupt leaves there can be continued.
    """

    def __init__(self, command: str, failures: tuple[type[Exception], ...] = (), *, resumable: bool) -> None:
        self.command = command
        self.failures = failures
        self.resumable = resumable
        self.begun: Path | None = None

    def exit_code(self, work: Callable[["Call"], int]) -> int:
        """Does ``work`` and returns its code: 0 done, 1 run failed, 2 bad arguments or data, 128 + n by signal n."""
        try:
            return work(self)
        except _BAD_INPUT as error:
            return self._fail(error, 2)
        except self.failures as error:
            return self._fail(error, 1)
        except BrokenPipeError:  # of whoever reads what is printed, not of the run
            raise
        except OSError as error:
            place = error.filename or self.begun
            return self._fail(f"{place}: {error.strerror or error}" if place else error, 1)
        except KeyboardInterrupt:
            return self.interrupted(signal.SIGINT)

    def interrupted(self, number: int) -> int:
        """Says what an interrupt by signal ``number`` left, and returns the exit code."""
        if self.begun is None:
            print("Interrupted before the run began.", file=sys.stderr)
        elif self.resumable:
            print(f"Interrupted. Continue with: {PROGRAM} {self.command} --resume {self.begun}", file=sys.stderr)
        else:
            print(f"Interrupted. The log so far is in {self.begun}", file=sys.stderr)
        return 128 + number

    def _fail(self, error: object, code: int) -> int:
        print(f"{PROGRAM} {self.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return code


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a request to stop after the step; the second one acts as usual."""

    def __init__(self) -> None:
        self.number = 0
        self._earlier: dict[int, Any] = {}

    def asked(self) -> bool:
        """Whether a signal came."""
        return self.number != 0

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._earlier[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self._earlier = {}


def free_folder(plain: Path) -> Path:
    """The folder ``plain``, with a number behind its name when something is there."""
    folder, number = plain, 1
    while not is_free(folder):
        number += 1
        folder = plain.with_name(f"{plain.name}-run{number}")
    return folder


@contextlib.contextmanager
def reader_may_leave() -> Iterator[None]:
    """While open, a reader of stdout that goes away, as `head` does, ends the program quietly: code 128 + SIGPIPE."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at its end, and would tell of what it cannot write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None


def print_tables(tables: Sequence[tuple[Sequence[str], Sequence[Sequence[str]]]], lines: Sequence[str]) -> None:
    """Prints tables, each a header and rows, and what there is to say about them."""
    for header, rows in tables:
        print(plain_table(header, rows), end="\n\n")
    for line in lines:
        print(line)


def draw(save_pictures: Callable[[], None]) -> None:
    """Draws what a run leaves, or names the extra that is missing; before tables, whose reader may have gone."""
    try:
        save_pictures()
    except ImportError:
        print(
            "No picture: Matplotlib is not installed. Install it: pip install nestopt_ext[experiments]", file=sys.stderr
        )
