"""Atomic checkpoints that hold tensors, numbers, text, lists and dicts, and nothing else."""

import io
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or written; the message is one line with the path."""


def write_atomically(path: Path, content: bytes) -> None:
    """Writes ``content`` so that ``path`` holds either all of it or what it held before, even after a power cut.

    Raises OSError when the disk refuses; the file that was there is whole then, and nothing else is left behind.
    """
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def save(path: Path, state: dict[str, Any]) -> None:
    """Saves ``state`` atomically. Raises CheckpointError when the disk refuses; the earlier file is whole then."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    try:
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}.") from error


def load(path: Path, version: int) -> dict[str, Any]:
    """Loads what `save` wrote, with ``weights_only=True``, so a file cannot make it execute code.

    Raises CheckpointError when the file is missing, truncated, damaged, or of another ``version``.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load alone does not look at the check sums
            bad = archive.testzip()
        if bad is not None:
            raise zipfile.BadZipFile(f"check sum of {bad} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no such file.") from error
    except Exception as error:  # a file that was tampered with makes the unpickler raise whatever it likes
        cause = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{path}: is damaged or not a checkpoint: {cause[0][:120].rstrip('.')}.") from error
    found = state.get("version") if isinstance(state, dict) else type(state).__name__
    if not isinstance(state, dict) or type(found) is not int or found != version:
        got = " ".join(str(found).split())[:40]
        raise CheckpointError(f"{path}: must be a checkpoint of version {version}; got {got}.")
    return state


def _sync_folder(folder: Path) -> None:
    """Makes the new name durable where the system allows a folder to be opened."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
