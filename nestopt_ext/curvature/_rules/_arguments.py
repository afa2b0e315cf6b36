"""What functions on shapes are given, in one form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def sizes(values: Sequence[Any]) -> tuple[int, ...]:
    """Numbers that are given one by one, or as one sequence."""
    return tuple(values[0]) if len(values) == 1 and isinstance(values[0], list | tuple) else tuple(values)


def at(dim: int, part: Any) -> tuple[Any, ...]:
    """The index that is ``part`` in dimension ``dim``, and whole in all others."""
    return (*([slice(None)] * dim), part)
