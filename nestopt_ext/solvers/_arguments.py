"""Checks of the numbers that solvers are made of."""

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

#: Above this a number of terms is a slip: the squared norm of every term is kept, and each costs a product.
MOST_TERMS = 10**7


def check_num_terms(caller: str, num_terms: Any) -> None:
    if isinstance(num_terms, bool) or not isinstance(num_terms, Integral):
        raise TypeError(f"{caller}: num_terms must be an int; got {num_terms!r}.")
    if num_terms < 0:
        raise ValueError(f"{caller}: num_terms must be >= 0; got {num_terms}. It counts products; 0 gives alpha * v.")
    if int(num_terms) > MOST_TERMS:
        raise ValueError(
            f"{caller}: num_terms must be <= {MOST_TERMS}; got {num_terms}."
            " It counts products; a series that needs as many needs damping."
        )


def check_damping(caller: str, damping: Any) -> None:
    _check_number(caller, "damping", damping)
    if not math.isfinite(damping) or damping < 0:
        raise ValueError(f"{caller}: damping must be finite and >= 0; got {damping}.")


def check_alpha(caller: str, alpha: Any, *, auto: bool) -> None:
    """A number or a 0-dim tensor, finite and positive, or ``"auto"`` where that is allowed.

    A tensor on another device than the CPU is not read here, which would wait for the device: :func:`check_alpha_value`
    looks at it when the solve reads its results.
    """
    if isinstance(alpha, Tensor):
        if alpha.dim() != 0 or not alpha.is_floating_point():
            raise TypeError(
                f"{caller}: alpha must be a 0-dim floating tensor; got shape {tuple(alpha.shape)} of {alpha.dtype}."
            )
        if alpha.device.type == "cpu":
            check_alpha_value(caller, float(alpha.detach()))
    elif isinstance(alpha, str):
        if not auto or alpha != "auto":
            also = ' or "auto"' if auto else ""
            raise ValueError(f"{caller}: alpha must be a number{also}; got {alpha!r}.")
    else:
        _check_number(caller, "alpha", alpha)
        check_alpha_value(caller, float(alpha))


def check_alpha_value(caller: str, alpha: float) -> None:
    if not math.isfinite(alpha) or alpha <= 0:
        raise ValueError(f"{caller}: alpha must be finite and > 0; got {alpha}. It is a step in units of 1/curvature.")


def alpha_tensor(alpha: Any) -> Tensor:
    """A checked number or 0-dim tensor, as a 0-dim tensor that the fused op takes; a number becomes one on the CPU."""
    if not isinstance(alpha, Tensor):
        return torch.tensor(float(alpha), dtype=torch.float64, device="cpu")
    return alpha.detach().to(torch.promote_types(alpha.dtype, torch.float32))


def _check_number(caller: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{caller}: {name} must be a number; got {value!r}.")
