"""The folder of a game experiment: whose it is, and how a run takes possession of it."""

import contextlib
from pathlib import Path

from ..checkpoint import write_atomically
from ..config import ConfigError
from ..run_folder import CONFIG, FolderError, is_free
from ._config import GameConfig


def check_usable(folder: Path, config: GameConfig, *, overwrite: bool) -> None:
    """Raises FolderError unless ``folder`` is absent, empty or, with ``overwrite``, of a run of the same experiment.

    Changes nothing. A folder is that of a run when its configuration can be read; any other content belongs to
    somebody else.
    """
    if is_free(folder):
        return
    if not folder.is_dir():
        raise FolderError(f"--output {folder} is not a folder.")
    try:
        type(config).from_json((folder / CONFIG).read_text(encoding="utf-8"), folder / CONFIG)
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise FolderError(
            f"--output {folder} is not empty and holds no {CONFIG} of a run of games {config.experiment}, so its files"
            " are left alone. Give another folder."
        ) from error
    if not overwrite:
        raise FolderError(f"--output {folder} holds a run. Start anew in it: --overwrite; or give another folder.")
    for name in (CONFIG, *config.files):
        if (folder / name).is_dir():
            raise FolderError(f"--output {folder} has a folder called {name} where a run has a file. Move it away.")


def begin(folder: Path, config: GameConfig, *, overwrite: bool) -> None:
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
