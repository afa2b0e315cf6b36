"""What the checkpoint of a tuning run must hold: anyone may have changed the file, so it is checked before it is used.

Every function raises ValueError with one line that names the place and the rule.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor

from .results import Scores

_SCORES = {field.name for field in fields(Scores)}


def check_state(state: dict[str, Any], methods: Sequence[str], trials: int) -> None:
    """Checks everything that can be checked without a model; ``methods`` are the rows of the run in their order."""
    _require_keys("it", state, {"version", "config", "data", "log_bytes", "finished", "trials", "tuned", "pending"})
    _require("config", state["config"], _is_dict, "be a dict")
    _require("data", state["data"], _is_count, "be a check sum")
    _require("log_bytes", state["log_bytes"], _is_count, "be a whole number >= 0")
    _require("finished", state["finished"], _is_list, "be a list")
    for index, result in enumerate(state["finished"]):
        _check_result(f"finished[{index}]", result)
    names = [result["method"] for result in state["finished"]]
    if names != list(methods[: len(names)]):
        raise ValueError(f"finished must be {', '.join(methods)} in this order; got {', '.join(names)}")
    _check_trials(state["trials"], trials)
    _check_tuned(state["tuned"], complete=len(names) == len(methods))
    _check_pending(state["pending"])


def check_like(place: str, found: Any, expected: Any) -> None:
    """Requires that ``found`` is built as ``expected`` is: the same types, keys, lengths, shapes and dtypes."""
    _require(place, found, lambda value: type(value) is type(expected), f"be a {type(expected).__name__}")
    if isinstance(expected, Tensor):
        if (found.shape, found.dtype) != (expected.shape, expected.dtype):
            raise ValueError(f"{place} must be {_kind(expected)}; got {_kind(found)}")
    elif isinstance(expected, dict):
        _require_keys(place, found, set(expected))
        for key, value in expected.items():
            check_like(f"{place}[{key!r}]", found[key], value)
    elif isinstance(expected, (list, tuple)):
        if len(found) != len(expected):
            raise ValueError(f"{place} must have {len(expected)} entries; got {len(found)}")
        for index, value in enumerate(expected):
            check_like(f"{place}[{index}]", found[index], value)


def check_points(place: str, points: Any) -> None:
    """Checks a learning curve: a list of dicts of `Scores` and ``step``."""
    _require(place, points, _is_list, "be a list")
    for index, point in enumerate(points):
        where = f"{place}[{index}]"
        _require_keys(where, point, {"step", *_SCORES})
        for name, value in point.items():
            _require(f"{where}[{name!r}]", value, _is_number, "be a number")


def _check_result(place: str, result: Any) -> None:
    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "method": (_is_text, "be text"),
        "num_hparams": (_is_count, "be a whole number >= 0"),
        "points": (_is_list, "be a list"),
        "seconds": (_is_number, "be a number"),
        "peak_mib": (_is_number, "be a number"),
        "log_decay": (_or_none(_is_number), "be a number or None"),
        "auc": (_or_none(_is_number), "be a number or None"),
        "diverged_solves": (_is_count, "be a whole number >= 0"),
        "skipped": (_or_none(_is_text), "be text or None"),
    }
    _require_all(place, result, rules)
    check_points(f"{place}['points']", result["points"])
    if not result["points"] and not result["skipped"]:
        raise ValueError(f"{place}['points'] must not be empty where nothing was skipped; got []")


def _check_trials(trials: Any, most: int) -> None:
    _require("trials", trials, _is_list, "be a list")
    if len(trials) > most:
        raise ValueError(f"trials must have at most {most} entries; got {len(trials)}")
    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "number": (_is_count, "be a whole number >= 0"),
        "log_decay": (_is_number, "be a number"),
        "valid_loss": (_or_none(_is_number), "be a number or None"),
        "seconds": (_is_number, "be a number"),
        "peak_mib": (_is_number, "be a number"),
        "points": (_is_list, "be a list"),
    }
    for index, trial in enumerate(trials):
        place = f"trials[{index}]"
        _require_all(place, trial, rules)
        check_points(f"{place}['points']", trial["points"])
        if not trial["points"] and trial["valid_loss"] is not None:
            raise ValueError(f"{place}['points'] must not be empty where there is a loss; got []")


def _check_tuned(tuned: Any, *, complete: bool) -> None:
    """The tuned model is there once the run is complete, and not before."""
    _require_keys("tuned", tuned, {"model", "hparams"} if complete else set())
    if complete:
        _require("tuned['model']", tuned["model"], _is_dict, "be a dict")
        _require("tuned['hparams']", tuned["hparams"], _is_list, "be a list")


def _check_pending(pending: Any) -> None:
    _require("pending", pending, _is_dict, "be a dict")
    if pending:
        _require_all("pending", pending, {"key": (_is_text, "be text"), "state": (_is_dict, "be a dict")})


def _require_all(place: str, found: Any, rules: dict[str, tuple[Callable[[Any], bool], str]]) -> None:
    _require_keys(place, found, set(rules))
    for name, (holds, rule) in rules.items():
        _require(f"{place}[{name!r}]", found[name], holds, rule)


def _require_keys(place: str, found: Any, keys: set[Any]) -> None:
    _require(place, found, _is_dict, "be a dict")
    if set(found) != keys:
        wrong = sorted(str(key) for key in set(found) ^ keys)
        raise ValueError(f"{place} must have the keys {_listed(keys)}; {wrong[0]} is missing or too many")


def _require(place: str, value: Any, holds: Callable[[Any], bool], rule: str) -> None:
    if not holds(value):
        raise ValueError(f"{place} must {rule}; got {_kind(value)}")


def _kind(value: Any) -> str:
    """A few words about a value of any size."""
    if isinstance(value, Tensor):
        return f"a tensor {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return " ".join(repr(value).split())[:40] if isinstance(value, (int, float, str)) else f"a {type(value).__name__}"


def _listed(keys: set[Any]) -> str:
    return ", ".join(sorted(str(key) for key in keys))[:120] or "of an empty dict"


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _or_none(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or holds(value)
