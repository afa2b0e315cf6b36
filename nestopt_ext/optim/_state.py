"""The state of one parameter: buffers like it, and a count of steps; made, checked and taken from checkpoints."""

import math
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .._checks import REAL, holds_its_elements
from .._reference import opmath

STEP = "step"


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor as a real one of pairs."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


# ---- made -----------------------------------------------------------------------------------------------------------


def new_buffer(param: Tensor) -> Tensor:
    """Zeros of the shape and layout of ``param``, float32 beside 16-bit ones."""
    return torch.zeros_like(param, dtype=opmath(param.dtype), requires_grad=False, memory_format=torch.preserve_format)


def new_step(device: torch.device) -> Tensor:
    return torch.zeros((), dtype=torch.float32, device=device)


# ---- checked before a step ------------------------------------------------------------------------------------------


def check_gradient(owner: str, label: str, param: Tensor, grad: Tensor) -> None:
    """The gradient is dense and like the parameter, and the parameter can be written to."""
    if grad.layout != torch.strided:
        raise TypeError(
            f"{owner}: the gradient of {label} must be dense; got {grad.layout}."
            " Use sparse=False in the embedding, or call .to_dense() on the gradient."
        )
    if (grad.shape, grad.dtype) != (param.shape, param.dtype):
        raise ValueError(
            f"{owner}: the gradient of {label} must have its shape {tuple(param.shape)} and dtype"
            f" {param.dtype}; got {tuple(grad.shape)} and {grad.dtype}. Set .grad anew after changing .data."
        )
    if not torch.compiler.is_compiling() and torch._debug_has_internal_overlap(param) == 1:
        raise ValueError(
            f"{owner}: {label} must not overlap itself; got shape {tuple(param.shape)} with strides"
            f" {param.stride()}. Pass a clone."
        )


def check_state(owner: str, name: str, label: str, value: object, param: Tensor) -> None:
    """A state tensor is what this file made, unless someone has changed it or the parameter."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{owner}: {name} of {label} must be a tensor; got {value!r:.80}.")
    if name == STEP:
        if value.numel() != 1 or value.dtype not in REAL:
            raise ValueError(
                f"{owner}: {name} of {label} must be a float32 or float64 tensor of one element; got {value!r:.80}."
            )
        return
    wanted = (param.shape, opmath(param.dtype), param.device)
    if (value.shape, value.dtype, value.device) != wanted:
        raise ValueError(
            f"{owner}: {name} of {label} must be {wanted[1]} of shape {tuple(wanted[0])} on {wanted[2]};"
            f" got {value.dtype} of shape {tuple(value.shape)} on {value.device}."
            " Make a new optimizer after changing .data."
        )


# ---- taken from a checkpoint, which may come from anywhere: nothing is taken to be what it should be ----------------


def check_state_dict(owner: str, state_dict: object) -> None:
    """The outer structure is that of a ``state_dict`` of an optimizer."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"{owner}: state_dict must be a dict; got {type(state_dict).__name__}.")
    state, groups = state_dict.get("state"), state_dict.get("param_groups")
    if not isinstance(state, Mapping):
        raise TypeError(f"{owner}: state_dict['state'] must be a dict; got {type(state).__name__}.")
    for key, value in state.items():
        if not isinstance(value, Mapping):
            raise TypeError(f"{owner}: state[{key!r}] must be a dict; got {type(value).__name__}.")
    if not isinstance(groups, list):
        raise TypeError(f"{owner}: state_dict['param_groups'] must be a list; got {type(groups).__name__}.")
    for i, group in enumerate(groups):
        ids = group.get("params") if isinstance(group, Mapping) else None
        if not isinstance(ids, list) or not all(isinstance(key, int | str) for key in ids):
            raise TypeError(
                f"{owner}: param_groups[{i}] must be a dict with a list 'params' of ids; got {group!r:.80}."
            )


def saved_states(
    groups: Sequence[dict[str, Any]], state_dict: Mapping[str, Any]
) -> Iterator[tuple[Tensor, Any, Mapping[str, Any]]]:
    """Each parameter with its saved id and its saved state, where it has one."""
    for group, saved in zip(groups, state_dict["param_groups"], strict=False):
        for param, key in zip(group["params"], saved["params"], strict=False):
            if key in state_dict["state"]:
                yield param, key, state_dict["state"][key]


def check_saved(owner: str, key: Any, name: str, value: object, param: Tensor) -> None:
    label = f"{owner}: state[{key!r}][{name!r}]"
    if name == STEP and isinstance(value, Real):
        _check_count(label, float(value))
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{label} must be a tensor; got {value!r:.80}.")
    if value.layout != torch.strided or value.device.type == "meta":
        raise TypeError(f"{label} must be a dense tensor with data; got {value.layout} on {value.device}.")
    if not holds_its_elements(value):
        raise ValueError(f"{label} must have storage for its elements; got a storage that was resized or freed.")
    if name == STEP:
        if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool:
            raise ValueError(f"{label} must be a number or a real tensor of one element; got {value!r:.80}.")
        _check_count(label, value.item())
        return
    if not (value.is_floating_point() or (param.is_complex() and value.is_complex())):
        raise TypeError(f"{label} must be of floating dtype; got {value.dtype}.")
    if value.shape != param.shape:
        raise ValueError(
            f"{label} must have the shape of its parameter {tuple(param.shape)}; got {tuple(value.shape)}."
        )


def _check_count(label: str, count: float) -> None:
    if not (math.isfinite(count) and count >= 0):
        raise ValueError(f"{label} must be a count of steps, finite and >= 0; got {count}.")


def restored(name: str, value: Any, param: Tensor, step_device: torch.device) -> Tensor:
    """A copy of a saved value, as :func:`new_buffer` or :func:`new_step` would have made it."""
    if name == STEP:
        return new_step(step_device).copy_(torch.as_tensor(value).detach().reshape(()))
    return new_buffer(param).copy_(value.detach())
