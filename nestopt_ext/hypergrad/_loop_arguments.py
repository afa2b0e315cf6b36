"""What a loop requires of its arguments, and of a state that it is to take over."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import _lists

#: The types, besides containers, that a file read with ``weights_only=True`` may hold.
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def check_optimizer(caller: str, name: str, optimizer: Any, owned: tuple[str, Sequence[Tensor]]) -> None:
    """An optimizer of the tensors ``owned``, named for messages, and of no other that requires grad."""
    if not isinstance(optimizer, Optimizer):
        remedy = " Make it first: Adam(params)." if isinstance(optimizer, type) else ""
        got = optimizer.__name__ if isinstance(optimizer, type) else _lists.value_name(optimizer)
        raise TypeError(f"{caller}: {name} must be a torch.optim.Optimizer; got {got}.{remedy}")
    label, tensors = owned
    wanted = {id(t) for t in tensors}
    held = [t for group in optimizer.param_groups for t in group["params"]]
    missing = wanted - {id(t) for t in held}
    if missing:
        raise ValueError(
            f"{caller}: {name} must hold all of {label}; got one without {len(missing)} of the {len(wanted)}."
            " Make it from the tensors that are passed here."
        )
    foreign = [t for t in held if id(t) not in wanted and t.requires_grad]
    if foreign:
        raise ValueError(
            f"{caller}: {name} must hold no tensors but {label}; got {len(foreign)} others that require grad, of shape"
            f" {_lists.shape_name(foreign[0].shape)} the first. Pass them in {label}, or leave them out of {name}."
        )


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether ``step()`` without arguments would fail, as that of LBFGS does."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def check_leaves(caller: str, labels: Sequence[str], tensors: Sequence[Tensor]) -> None:
    for label, tensor in zip(labels, tensors, strict=True):
        if not tensor.is_leaf:
            raise ValueError(
                f"{caller}: {label} must be a leaf tensor, which an optimizer can step; got the result of an operation."
                " Pass the tensor it was computed from."
            )


def check_callable(caller: str, name: str, value: Any, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if not callable(value):
        remedy = " Pass a function that computes it." if isinstance(value, Tensor) else ""
        raise TypeError(f"{caller}: {name} must be callable; got {_lists.value_name(value)}.{remedy}")


def check_count(caller: str, name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{caller}: {name} must be an int; got {value!r}.")
    if value < least:
        raise ValueError(f"{caller}: {name} must be >= {least}; got {value}.")


def check_clip(caller: str, name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{caller}: {name} must be None or a number; got {value!r}.")
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{caller}: {name} must be finite and > 0; got {value}. It is the largest norm of a gradient.")


def check_callbacks(caller: str, callbacks: Any) -> list[Callable[..., Any]]:
    found = list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]
    for i, callback in enumerate(found):
        check_callable(caller, f"callbacks[{i}]", callback)
    return found


def check_stateful(caller: str, stateful: Any) -> list[Any]:
    found = list(stateful) if isinstance(stateful, list | tuple) else [stateful]
    for i, item in enumerate(found):
        for method in ("state_dict", "load_state_dict"):
            if isinstance(item, type) or not callable(getattr(item, method, None)):
                raise TypeError(f"{caller}: stateful[{i}] must have {method}(); got {_lists.value_name(item)}.")
    return found


def check_generators(caller: str, generators: Any) -> list[torch.Generator]:
    found = list(generators) if isinstance(generators, list | tuple) else [generators]
    for i, generator in enumerate(found):
        if not isinstance(generator, torch.Generator):
            got = _lists.value_name(generator)
            raise TypeError(f"{caller}: generators[{i}] must be a torch.Generator; got {got}.")
    return found


def check_plain(caller: str, place: str, value: Any) -> None:
    """Only what can be read back without executing code."""
    if isinstance(value, Tensor) or type(value) in _PLAIN:
        return
    if isinstance(value, dict):
        for key, item in value.items():
            check_plain(caller, f"{place} key", key)
            check_plain(caller, f"{place}[{key!r}]", item)
    elif type(value) in (list, tuple, set):
        for i, item in enumerate(value):
            check_plain(caller, f"{place}[{i}]", item)
    else:
        raise TypeError(
            f"{caller}: {place} must be made of tensors, numbers, text, lists and dicts, to be saved; got"
            f" {type(value).__module__}.{type(value).__qualname__}."
        )


# ---- states: each raises ValueError, with the place and the rule, before anything is changed -------------------------


def check_keys(name: str, state: Any, keys: set[str]) -> None:
    if not isinstance(state, dict) or set(state) != keys:
        raise ValueError(f"{name} must be a dict with the keys {', '.join(sorted(keys))}")


def check_saved_count(name: str, value: Any) -> None:
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} must be a whole number >= 0; got {value!r}"[:120])


def check_saved_tensors(name: str, saved: Any, like: Sequence[Tensor]) -> None:
    if not isinstance(saved, list) or len(saved) != len(like):
        raise ValueError(f"{name} must be a list of {len(like)} tensors")
    for i, (tensor, other) in enumerate(zip(saved, like, strict=True)):
        if not isinstance(tensor, Tensor) or tensor.shape != other.shape or tensor.dtype != other.dtype:
            wanted = f"{_lists.dtype_name(other.dtype)} of shape {_lists.shape_name(other.shape)}"
            raise ValueError(f"{name}[{i}] must be {wanted}")


def check_saved_optimizer(name: str, saved: Any, optimizer: Optimizer) -> None:
    """The groups of ``saved`` hold as many tensors as those of ``optimizer``."""
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    groups = saved.get("param_groups") if isinstance(saved, dict) else None
    if not isinstance(groups, list) or not isinstance(saved.get("state"), dict):
        raise ValueError(f"{name} must be the state of an optimizer")
    found = [
        len(group["params"]) if isinstance(group, dict) and isinstance(group.get("params"), list) else None
        for group in groups
    ]
    if found != sizes:
        raise ValueError(f"{name} must have groups of {sizes} tensors; got {found}"[:200])
    for group, own in zip(groups, optimizer.param_groups, strict=True):
        missing = sorted(set(own) - set(group), key=str)
        if missing:
            raise ValueError(
                f"{name} must be the state of a {type(optimizer).__name__}; got one without {missing}"[:200]
            )
