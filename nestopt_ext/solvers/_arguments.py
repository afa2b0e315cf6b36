"""Checks of the numbers that solvers are made of."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from .. import _lists

#: Above this a number of terms is a slip: the squared norm of every term is kept, and each costs a product.
MOST_TERMS = 10**7

#: How often the host looks whether it may stop: every so many iterations, never (None), or each on the CPU alone.
CheckEvery: TypeAlias = int | Literal["auto"] | None


def check_num_terms(caller: str, num_terms: Any) -> None:
    if type(num_terms) is not int and (isinstance(num_terms, bool) or not isinstance(num_terms, Integral)):
        raise TypeError(f"{caller}: num_terms must be an int; got {num_terms!r}.")
    if num_terms < 0:
        raise ValueError(f"{caller}: num_terms must be >= 0; got {num_terms}. It counts products; 0 gives alpha * v.")
    if int(num_terms) > MOST_TERMS:
        raise ValueError(
            f"{caller}: num_terms must be <= {MOST_TERMS}; got {num_terms}."
            " It counts products; a series that needs as many needs damping."
        )


def check_count(caller: str, name: str, count: Any) -> None:
    """A number of products that a method may spend."""
    if isinstance(count, bool) or not isinstance(count, Integral):
        raise TypeError(f"{caller}: {name} must be an int; got {count!r}.")
    if not 1 <= int(count) <= MOST_TERMS:
        raise ValueError(f"{caller}: {name} must be in 1 .. {MOST_TERMS}; got {count}. It counts products.")


def check_seed(caller: str, seed: Any) -> None:
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"{caller}: seed must be an int; got {seed!r}.")
    if not 0 <= int(seed) < 2**63:
        raise ValueError(f"{caller}: seed must be in 0 .. 2**63 - 1; got {seed}.")


def check_damping(caller: str, damping: Any, *, positive: bool = False) -> None:
    _check_number(caller, "damping", damping)
    if not math.isfinite(damping) or damping < 0 or (positive and damping == 0):
        raise ValueError(f"{caller}: damping must be finite and {'>' if positive else '>='} 0; got {damping}.")


def check_rtol(caller: str, rtol: Any) -> None:
    _check_number(caller, "rtol", rtol)
    if not 0 <= rtol < 1:
        raise ValueError(f"{caller}: rtol must be in [0, 1); got {rtol}. It is relative to the norm of v.")


def check_rcond(caller: str, rcond: Any) -> None:
    if rcond is None:
        return
    _check_number(caller, "rcond", rcond)
    if not 0 <= rcond < 1:
        raise ValueError(f"{caller}: rcond must be None or in [0, 1); got {rcond}.")


def check_check_every(caller: str, check_every: Any) -> None:
    if check_every is None or (isinstance(check_every, str) and check_every == "auto"):
        return
    if isinstance(check_every, bool) or not isinstance(check_every, Integral):
        raise TypeError(f"{caller}: check_every must be an int, None or 'auto'; got {check_every!r}.")
    if check_every < 1:
        raise ValueError(f"{caller}: check_every must be >= 1; got {check_every}. None never looks.")


def check_preconditioner(caller: str, preconditioner: Any) -> None:
    if preconditioner is not None and not callable(preconditioner):
        remedy = " Pass lambda v: M @ v." if isinstance(preconditioner, Tensor) else ""
        got = _lists.value_name(preconditioner)
        raise TypeError(f"{caller}: preconditioner must be None or a callable on tensors like v; got {got}.{remedy}")


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
        return torch.scalar_tensor(float(alpha), dtype=torch.float64, device="cpu")
    return alpha.detach().to(torch.promote_types(alpha.dtype, torch.float32))


def looks(check_every: CheckEvery, tensors: Sequence[Tensor]) -> int:
    """After how many iterations the host looks at the device; 0 is never.

    Where the tensors are on the CPU a look costs nothing, anywhere else it stops the queue of work.
    """
    if check_every == "auto":
        return int(all(t.device.type == "cpu" for t in tensors))
    return 0 if check_every is None else int(check_every)


def _check_number(caller: str, name: str, value: Any) -> None:
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, Real)):
        raise TypeError(f"{caller}: {name} must be a number; got {value!r}.")
