"""A Neumann series of J' H J term by term, each step taken inside the product."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _lists, _ops
from .._types import TensorList
from ._recording import Jacobian
from ._series import multiply_
from .loss_hessian import LossHessian


def neumann_sum(
    jacobian: Jacobian,
    middle: LossHessian,
    v: TensorList,
    num_terms: int,
    alpha: Tensor,
    damping: float,
    diagonal: TensorList | None,
) -> tuple[TensorList, Tensor]:
    """Alpha sum_j (I - alpha (J' H J + diag(d) + damping I))^j v over j = 0 .. num_terms, and the terms' squared norms.

    All of ``v`` is on one device, in float32 or float64. A term v becomes the next one in place: J v is taken, v is
    multiplied by what damping leaves of it, and J' (-alpha H) J v is added where it arises. So a step writes v, and
    besides v the memory of the sum is all that is used.
    """
    home = v[0].device
    step = alpha.detach().to(_lists.scalar_dtype(home))
    middle_product = middle.scaled(-step).for_products(num_terms)
    kept = _kept(step, damping, diagonal)
    term = [t.clone(memory_format=torch.contiguous_format) for t in v]
    total = [t.clone() for t in term]
    sq_norms = torch.zeros(num_terms + 1, dtype=step.dtype, device=home)
    sq_norms[0] = _lists.norm(term).square()
    for j in range(1, num_terms + 1):
        u = middle_product(jacobian.forward(term))
        if isinstance(kept, list) or kept is not None:
            torch._foreach_mul_(term, kept)
        jacobian.backward_into(u, term)
        _ops.neumann_step_(term, total, [], step, sq_norm=sq_norms[j])
    multiply_(total, step)
    return total, sq_norms


def _kept(step: Tensor, damping: float, diagonal: TensorList | None) -> TensorList | Tensor | None:
    """1 - alpha (d + damping): a list, a number for all, or None for 1."""
    if diagonal is not None:
        return [(1 - step.to(d.dtype) * (d + damping)).contiguous() for d in diagonal]
    if damping == 0:
        return None
    return 1 - step * damping
