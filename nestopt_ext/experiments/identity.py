"""The choices that make a run what it is, and in what two runs differ."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

#: Where the data of a run lie may change between its beginning and its end.
_MOVABLE = ("data_dir",)


def identity(config: Any) -> dict[str, Any]:
    """The fields of a configuration, a dataclass, as a checkpoint keeps them: lists in place of tuples."""
    values = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in _MOVABLE}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def conflict(saved: object, current: Mapping[str, Any]) -> str | None:
    """The first choice in which the saved identity is not the ``current`` one, in words; None where it is.

    Raises ValueError where ``saved`` is not the identity of such a run.

    >>> conflict({"seed": 1}, {"seed": 0})
    'was made with seed 1, but the configuration to resume has 0. Resume with seed 1.'
    """
    if not isinstance(saved, dict) or set(saved) != set(current):
        raise ValueError("its configuration is not that of such a run")
    for name, value in current.items():
        # The repr tells 1 from True and from a tensor, and is there for whatever a damaged file holds.
        if repr(saved[name]) != repr(value):
            got = " ".join(repr(saved[name]).split())[:40]
            return (
                f"was made with {name} {got}, but the configuration to resume has {value!r}. Resume with {name} {got}."
            )
    return None
