"""Checks of hyperparameters, shared by the optimizers; each message names optimizer, argument, rule and value."""

import math
from collections.abc import Iterable, Mapping
from numbers import Complex, Real
from typing import Any

import torch
from torch import Tensor


def plain_numbers(group: dict[str, Any], names: Iterable[str]) -> None:
    """Makes numbers of NumPy and others, alone or in a pair, Python's own, which checkpoints can hold."""
    for name in names:
        if name in group:
            value = group[name]
            group[name] = tuple(map(_plain, value)) if isinstance(value, tuple | list) else _plain(value)


def _plain(value: Any) -> Any:
    if not isinstance(value, Complex) or isinstance(value, bool | int):
        return value
    return float(value) if isinstance(value, Real) else complex(value)


def _is_number(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def check_lr(owner: str, lr: object) -> None:
    """A finite number >= 0, or a float32/float64 tensor of one element."""
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or lr.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{owner}: lr must be a float32 or float64 tensor of one element;"
                f" got shape {tuple(lr.shape)} of {str(lr.dtype).removeprefix('torch.')}."
            )
        if lr.device.type != "cpu" or torch.compiler.is_compiling():
            return  # reading its value would wait for the device
        value: object = lr.item()
    else:
        value = lr
    if not _is_number(value, Real):
        raise TypeError(f"{owner}: lr must be a number or a tensor; got {value!r}.")
    if not (math.isfinite(value) and value >= 0):  # type: ignore[arg-type, operator]
        raise ValueError(f"{owner}: lr must be finite and >= 0; got {value}.")


def check_momentum(owner: str, name: str, value: object) -> None:
    """A real or complex number of modulus below 1."""
    if not _is_number(value, Complex):
        raise TypeError(f"{owner}: {name} must be a real or complex number; got {value!r}.")
    if not abs(value) < 1:  # type: ignore[arg-type]  # also catches NaN
        raise ValueError(f"{owner}: {name} must have modulus below 1; got {value} of modulus {abs(value):g}.")  # type: ignore[arg-type]


def check_real(owner: str, name: str, value: object, *, minimum: float = -math.inf) -> None:
    """A finite number, not below ``minimum``."""
    if not _is_number(value, Real):
        raise TypeError(f"{owner}: {name} must be a number; got {value!r}.")
    if not (math.isfinite(value) and value >= minimum):  # type: ignore[arg-type, operator]
        bound = "" if minimum == -math.inf else f" and >= {minimum:g}"
        raise ValueError(f"{owner}: {name} must be finite{bound}; got {value}.")


def check_betas(owner: str, betas: object) -> None:
    """A momentum, and the decay of the second moment in [0, 1)."""
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise TypeError(f"{owner}: betas must be a pair of numbers; got {betas!r:.80}.")
    check_momentum(owner, "betas[0]", betas[0])
    check_real(owner, "betas[1]", betas[1], minimum=0.0)
    if betas[1] >= 1:
        raise ValueError(f"{owner}: betas[1] must be below 1; got {betas[1]}.")


def check_flags(owner: str, group: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """True or False, where a truthy text would pass for True."""
    for name in names:
        if not isinstance(group.get(name, False), bool):
            raise TypeError(f"{owner}: {name} must be True or False; got {group[name]!r}.")


def check_implementation(owner: str, group: Mapping[str, Any]) -> None:
    """At most one of ``foreach``, ``fused`` and ``differentiable`` may be asked for."""
    for name in ("foreach", "fused"):
        if group[name] is not None and not isinstance(group[name], bool):
            raise TypeError(f"{owner}: {name} must be True, False or None; got {group[name]!r}.")
    asked = [name for name in ("foreach", "fused", "differentiable") if group[name]]
    if len(asked) > 1:
        raise ValueError(
            f"{owner}: at most one of foreach, fused and differentiable must be True; got {' and '.join(asked)}."
        )
