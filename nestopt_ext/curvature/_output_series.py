"""A Neumann series of J' H J in the space of the outputs, where a term costs no list like the params."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _lists, _ops
from .._types import TensorList
from ._recording import Recording
from ._series import multiply_
from ._tangent_kernel import TangentKernel
from .loss_hessian import LossHessian


def neumann_sum(
    recording: Recording,
    kernel: TangentKernel,
    middle: LossHessian,
    v: TensorList,
    num_terms: int,
    alpha: Tensor,
    damping: float,
) -> tuple[TensorList, Tensor]:
    r"""Alpha sum_j (I - alpha (J' H J + damping I))^j v over j = 0 .. num_terms, and the terms' squared norms.

    All of ``v``, and the outputs, are on one device and of one dtype, float32 or float64. With q = 1 - alpha damping
    and y_j the image J v_j of a term,

    .. math:: v_j = q^j v_0 + J^\top w_j, \quad w_{j+1} = q w_j - \alpha H y_j, \quad
              y_{j+1} = q y_j - \alpha J J^\top H y_j,

    so J is applied once, J' once, and J J' for each term. The squared norm of a term is q^2j |v_0|^2 + q^j <y_0, w_j> +
    <y_j, w_j>, by inner products in float64; what rounding leaves below 0 is 0.
    """
    with recording.reading():
        home = v[0].device
        step = alpha.detach().to(_lists.scalar_dtype(home))
        middle_product = middle.scaled(-step).for_products(num_terms)
        kept = None if damping == 0 else 1 - step * damping
        start = recording.tape.jvp(v)
        images = torch.stack([start.reshape(-1)] * 2)  # y_0 and y_j
        y = images[1].view(start.shape)
        w, total = torch.zeros_like(y), torch.zeros_like(y)
        dots = torch.zeros((num_terms + 1, 2), dtype=step.dtype, device=home)
        along = w.view(1, -1)
        for dot in dots.unbind()[1:]:
            u = middle_product(y)
            if kept is not None:
                torch._foreach_mul_((w, y), kept)
            w.add_(u)
            total.add_(w)
            y.add_(kernel.product(u))
            _ops.row_dot_(dot, images, along)
        q = torch.ones_like(step) if kept is None else kept
        powers = q ** torch.arange(num_terms + 1, dtype=step.dtype, device=home)
        sq_norms = powers.square() * _lists.norm(v).square() + powers * dots[:, 0] + dots[:, 1]
        result = [t.clone(memory_format=torch.contiguous_format) for t in v]
        multiply_(result, step * powers.sum())
        recording.tape.vjp(total.mul_(step), result)
        return result, sq_norms.clamp_(min=0)
