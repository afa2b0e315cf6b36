"""A progress bar for long loops."""

import sys
from typing import Any


class ProgressBar:
    """A tqdm bar on a terminal; silent where stderr is no terminal, and says so where tqdm is not installed."""

    def __init__(self, total: int, *, shown: bool = True, unit: str = "step") -> None:
        self._bar: Any = None
        if not shown or not sys.stderr.isatty():
            return
        try:
            from tqdm import tqdm
        except ImportError:
            print("No progress bar: tqdm is not installed (pip install nestopt_ext[experiments]).", file=sys.stderr)
            return
        self._bar = tqdm(total=total, unit=unit, dynamic_ncols=True, leave=False)

    def stage(self, label: str) -> None:
        """Names what is being done."""
        if self._bar is not None:
            self._bar.set_description(label)

    def advance(self, steps: int, note: str = "") -> None:
        """Moves the bar."""
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(steps)

    def close(self) -> None:
        """Takes the bar off the screen."""
        if self._bar is not None:
            self._bar.close()
