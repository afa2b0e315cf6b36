"""A Neumann series term by term, for operators whose products need no look at them in between."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _lists, _ops
from .._types import TensorList


def sum_by_products(
    term: TensorList, product: Callable[[], TensorList], num_terms: int, alpha: Tensor, damping: float
) -> tuple[TensorList, Tensor]:
    """Alpha sum_j (I - alpha (A + damping I))^j v over j = 0 .. num_terms, and the squared norms of the terms.

    ``product`` gives A times what ``term`` holds. For no-grad mode.

    All of ``term`` is on one device, in float32 or float64; it begins with v and is written to. What ``product``
    returns shares no memory with it, and is only read.
    """
    home = term[0].device
    step = alpha.detach() if alpha.device.type == "cpu" else alpha.detach().to(home)
    total = [torch.zeros_like(t) for t in term]
    sq_norms = torch.zeros(num_terms + 1, dtype=_lists.scalar_dtype(home), device=home)
    first, *others = sq_norms.unbind()
    _ops.neumann_step_(term, total, [], step, sq_norm=first)
    for sq_norm in others:
        _ops.neumann_step_(term, total, product(), step, damping=damping, sq_norm=sq_norm)
    multiply_(total, step)
    return total, sq_norms


def multiply_(tensors: TensorList, number: Tensor) -> None:
    """Scales a list in place; a number on the host is read there, which waits for no device."""
    torch._foreach_mul_(tensors, number if number.device == tensors[0].device else float(number))
