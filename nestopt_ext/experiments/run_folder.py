"""The folder of a run: what is in it, whose it is, and how a run takes possession of it."""

import contextlib
from pathlib import Path
from typing import Any, ClassVar, Protocol

from .._checkpoint import write_atomically

CONFIG, LOG, CHECKPOINT, PICTURE = "config.json", "log.jsonl", "checkpoint.pt", "curves.png"


class FolderError(ValueError):
    """The folder is not one that this run may use; the message is one line."""


class RunConfig(Protocol):
    """The configuration of one kind of run; ``files`` are what a run leaves beside it."""

    files: ClassVar[tuple[str, ...]]
    resumable: ClassVar[bool]

    @property
    def kind(self) -> str:
        """What messages call such a run."""

    def to_json(self) -> str:
        """The text of ``config.json``."""

    @classmethod
    def from_json(cls, text: str, where: Path) -> Any:
        """Reads it back; raises a ValueError for any other text."""


def check_usable(folder: Path, config: RunConfig, *, overwrite: bool) -> None:
    """Raises FolderError unless ``folder`` is absent, empty or, with ``overwrite``, one of a run of the same kind.

    Changes nothing. A folder is that of a run when its configuration can be read. Any other content belongs to
    somebody else, even when it has the names that a run gives.
    """
    if is_free(folder):
        return
    if not folder.is_dir():
        raise FolderError(f"--output {folder} is not a folder.")
    try:
        type(config).from_json(_read(folder), folder / CONFIG)
    except ValueError as error:
        raise FolderError(
            f"--output {folder} is not empty and holds no {CONFIG} of a {config.kind}, so its files are left alone."
            " Give another folder."
        ) from error
    if not overwrite:
        resume = f"Continue it: --resume {folder}; start" if config.resumable else "Start"
        raise FolderError(f"--output {folder} holds a run. {resume} anew in it: --overwrite; or give another folder.")
    for name in (CONFIG, *config.files):
        if (folder / name).is_dir():
            raise FolderError(f"--output {folder} has a folder called {name} where a run has a file. Move it away.")


def is_free(folder: Path) -> bool:
    """Whether ``folder`` is absent or empty."""
    if folder.is_dir():
        return next(folder.iterdir(), None) is None
    return not (folder.exists() or folder.is_symlink())


def begin(folder: Path, config: RunConfig, *, overwrite: bool) -> None:
    """Makes ``folder`` that of a run of ``config``; of an earlier run there, only its own files are replaced.

    Raises FolderError as `check_usable` does, and OSError when the disk refuses; either leaves everything as it was.
    """
    check_usable(folder, config, overwrite=overwrite)
    created = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The write is what a full disk refuses, so it comes first: the earlier run is whole then.
        write_atomically(folder / CONFIG, config.to_json().encode())
    except BaseException:
        for place in created:
            with contextlib.suppress(OSError):
                place.rmdir()
        raise
    for name in config.files:
        (folder / name).unlink(missing_ok=True)


def stored_config(folder: Path, kind: type[RunConfig]) -> Any:
    """The configuration, of class ``kind``, of the run in ``folder``.

    Raises FolderError when there is none to read, and what ``kind.from_json`` raises when it is that of another kind.
    """
    return kind.from_json(_read(folder), folder / CONFIG)


def _read(folder: Path) -> str:
    try:
        return (folder / CONFIG).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FolderError(f"{folder}: {CONFIG} cannot be read.") from error
