"""Where a warning points: to the line of the user's that led here."""

import sys


def caller_depth() -> int:
    """The stack level, counted from whoever asks, of the first frame that is neither of this package nor of torch."""
    packages = (__name__.partition(".")[0], "torch")
    frame = sys._getframe(1)
    depth = 1
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).partition(".")[0] in packages:
        frame = frame.f_back
        depth += 1
    return depth
