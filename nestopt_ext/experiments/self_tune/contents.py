"""What the checkpoint of a run of self-tune must hold: anyone may have changed the file, so it is checked first.

Raises ValueError with one line that names the place and the rule.
"""

from collections.abc import Callable, Sequence
from typing import Any

from ..contents import check_like
from .results import POINT

_NUMBERS = tuple(name for name in POINT if name != "values")


def check_state(state: dict[str, Any], methods: Sequence[str], names: Sequence[str]) -> None:
    """Checks all but the state of a training under way, which checks itself when it is taken over."""
    expected = {
        "version": 0,
        "config": state.get("config"),
        "data": 0,
        "log_bytes": 0,
        "finished": state.get("finished"),
        "trials": state.get("trials"),
        "pending": state.get("pending"),
    }
    check_like("it", state, expected)
    for name, kind in (("config", dict), ("finished", list), ("trials", list), ("pending", dict)):
        _require(name, isinstance(state[name], kind), f"be a {kind.__name__}")
    _require("log_bytes", state["log_bytes"] >= 0, "be >= 0")
    for index, result in enumerate(state["finished"]):
        _check_result(f"finished[{index}]", result, names)
    found = [result["method"] for result in state["finished"]]
    _require("finished", found == list(methods[: len(found)]), f"be {', '.join(methods)} in this order")
    for index, trial in enumerate(state["trials"]):
        _check_trial(f"trials[{index}]", trial, index, names)
    if state["pending"]:
        _require("pending", set(state["pending"]) == {"key", "state"}, "have key and state")
        _require("pending['key']", isinstance(state["pending"]["key"], str), "be text")
        _require("pending['state']", isinstance(state["pending"]["state"], dict), "be a dict")


def _check_result(place: str, result: Any, names: Sequence[str]) -> None:
    rules: dict[str, Callable[[Any], bool]] = {
        "method": lambda value: isinstance(value, str),
        "points": lambda value: isinstance(value, list),
        "seconds": _is_number,
        "epochs": _is_number,
        "trainings": lambda value: type(value) is int,
        "fixed": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
        "skipped": lambda value: value is None or isinstance(value, str),
    }
    _require_all(place, result, rules)
    _check_points(f"{place}['points']", result["points"], names)
    _require(f"{place}['points']", bool(result["points"]) or bool(result["skipped"]), "not be empty")


def _check_trial(place: str, trial: Any, number: int, names: Sequence[str]) -> None:
    rules: dict[str, Callable[[Any], bool]] = {
        "number": lambda value: value == number and type(value) is int,
        "values": lambda value: _is_values(value, names),
        "valid_loss": lambda value: value is None or _is_number(value),
        "seconds": _is_number,
        "epochs": _is_number,
        "points": lambda value: isinstance(value, list),
    }
    _require_all(place, trial, rules)
    _check_points(f"{place}['points']", trial["points"], names)


def _check_points(place: str, points: list[Any], names: Sequence[str]) -> None:
    rules = {**dict.fromkeys(_NUMBERS, _is_number), "values": lambda value: _is_values(value, names)}
    for index, point in enumerate(points):
        _require_all(f"{place}[{index}]", point, rules)


def _require_all(place: str, found: Any, rules: dict[str, Callable[[Any], bool]]) -> None:
    keys = ", ".join(sorted(rules))
    _require(place, isinstance(found, dict) and set(found) == set(rules), f"have the keys {keys}")
    for name, holds in rules.items():
        _require(f"{place}[{name!r}]", holds(found[name]), "be of its kind")


def _require(place: str, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"{place} must {rule}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_values(value: Any, names: Sequence[str]) -> bool:
    return isinstance(value, dict) and set(value) == set(names) and all(_is_number(v) for v in value.values())
