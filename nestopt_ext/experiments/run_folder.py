"""The folder of a run: what is in it, whose it is, and how a run takes possession of it."""

import contextlib
from pathlib import Path

from .checkpoint import write_atomically
from .config import ConfigError, TuneConfig

CONFIG, LOG, CHECKPOINT, PICTURE = "config.json", "log.jsonl", "checkpoint.pt", "curves.png"


class FolderError(ValueError):
    """The folder is not one that this run may use; the message is one line."""


def check_usable(folder: Path, *, overwrite: bool) -> None:
    """Raises FolderError unless ``folder`` is absent, empty or, with ``overwrite``, one of a run; changes nothing.

    A folder is that of a run when its configuration can be read. Any other content belongs to somebody else, even when
    it has the names that a run gives.
    """
    if is_free(folder):
        return
    if not folder.is_dir():
        raise FolderError(f"--output {folder} is not a folder.")
    try:
        stored_config(folder)
    except (FolderError, ConfigError) as error:
        raise FolderError(
            f"--output {folder} is not empty and holds no {CONFIG} of a tuning run, so its files are left alone."
            " Give another folder."
        ) from error
    if not overwrite:
        raise FolderError(
            f"--output {folder} holds a run. Continue it: --resume {folder}; start anew in it: --overwrite."
        )
    for name in (CONFIG, LOG, CHECKPOINT, PICTURE):
        if (folder / name).is_dir():
            raise FolderError(f"--output {folder} has a folder called {name} where a run has a file. Move it away.")


def is_free(folder: Path) -> bool:
    """Whether ``folder`` is absent or empty."""
    if folder.is_dir():
        return next(folder.iterdir(), None) is None
    return not (folder.exists() or folder.is_symlink())


def begin(folder: Path, config: TuneConfig, *, overwrite: bool) -> None:
    """Makes ``folder`` that of a run of ``config``; of an earlier run there, only its own four files are replaced.

    Raises FolderError as `check_usable` does, and OSError when the disk refuses; either leaves everything as it was.
    """
    check_usable(folder, overwrite=overwrite)
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
    for name in (CHECKPOINT, LOG, PICTURE):
        (folder / name).unlink(missing_ok=True)


def stored_config(folder: Path) -> TuneConfig:
    """The configuration of the run in ``folder``.

    Raises FolderError when there is none to read, and ConfigError when it is not that of a tuning run.
    """
    path = folder / CONFIG
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FolderError(f"{folder}: {CONFIG} cannot be read.") from error
    return TuneConfig.from_json(text, path)
