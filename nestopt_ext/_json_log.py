"""A log of JSON lines that a checkpoint can count on."""

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Any


class JsonLog:
    """A file of JSON objects, one a line, that can be cut back to where a checkpoint saw it end.

    Every line has ``event``, which says what it tells of. A number that is not finite is null.
    """

    def __init__(self, path: Path | None, keep_bytes: int = 0) -> None:
        self.position = 0
        self._file: IO[bytes] | None = None
        if path is None:
            return
        self.require(path, keep_bytes)
        self._file = path.open("r+b" if path.exists() else "w+b")
        self._file.seek(keep_bytes)
        self._file.truncate()
        self.position = keep_bytes

    @staticmethod
    def require(path: Path, size: int) -> None:
        """Raises OSError unless the log holds as many bytes as a checkpoint counts; changes nothing."""
        held = path.stat().st_size if path.exists() else 0
        if held < size:
            raise OSError(f"{path}: must hold the {size} bytes that the checkpoint counts; got {held}")

    @staticmethod
    def require_whole_lines(path: Path, size: int) -> None:
        """Raises OSError where a cut to ``size`` bytes would be within a line; changes nothing."""
        if not size:
            return
        with path.open("rb") as file:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                raise OSError(f"{path}: must have a line that ends at byte {size}, by the checkpoint; it was edited")

    def write(self, event: str, **values: Any) -> None:
        """Appends one line."""
        line = json.dumps({"event": event, **_finite(values)}, allow_nan=False).encode() + b"\n"
        if self._file is not None:
            self._file.write(line)
            self._file.flush()
            self.position += len(line)

    def sync(self) -> None:
        """Makes what was written durable, so that a checkpoint never counts lines that the disk does not hold."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Lets go of the file."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> "JsonLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
