"""A Neumann series of J' H J in the space of the outputs, where a term costs no list like the params."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _lists, _ops
from .._types import TensorList
from ._recording import Recording
from ._series import multiply_
from ._tangent_kernel import TangentKernel
from .loss_hessian import LossHessian

#: Steps after which a term is made anew: J v and v drift apart by rounding, and the error of the sum grows like their
#: square.
MOST_STEPS = 32
#: Squared norms below this many eps of the largest are noise, which is not to look like growth.
_NOISE = 64


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

    so J is applied once, J' once, and J J' for each term; after :data:`MOST_STEPS` of them v_0 is the term reached, at
    the price of J' and J. The squared norm of a term is q^2j |v_0|^2 + q^j <y_0, w_j> + <y_j, w_j>, by inner products
    in float64, and at least what rounding makes of it.
    """
    with recording.reading():
        step = alpha.detach().to(_lists.scalar_dtype(v[0].device))
        product = middle.scaled(-step).for_products(num_terms)
        kept = None if damping == 0 else 1 - step * damping
        term, result, total, norms = list(v), [], None, []
        for first in range(0, max(1, num_terms), MOST_STEPS):
            count = min(MOST_STEPS, num_terms - first)
            is_last = first + count == num_terms
            chunk = _Chunk(recording, kernel, product, kept, term, count)
            norms.append(chunk.sq_norms[: count + is_last])
            along, around = chunk.sum_of_terms(count + is_last)
            own = _multiplied(term, step * along)
            if total is None:
                result, total = own, around
            else:
                torch._foreach_add_(result, own)
                total += around
            if not is_last:
                term = chunk.reached()
        assert total is not None
        recording.tape.vjp(total.mul_(step), result)
        return result, torch.cat(norms)


class _Chunk:
    """``count`` steps from a term v_0: sums w of images, and squared norms."""

    def __init__(
        self,
        recording: Recording,
        kernel: TangentKernel,
        product: Callable[[Tensor], Tensor],
        kept: Tensor | None,
        term: TensorList,
        count: int,
    ) -> None:
        self._tape = recording.tape
        self._term = term
        start = self._tape.jvp(term)
        images = torch.stack([start.reshape(-1)] * 2)  # y_0 and y_j
        y = images[1].view(start.shape)
        #: w_count, and the sum of those before it.
        self._w, self._before = torch.zeros_like(y), torch.zeros_like(y)
        sq_norm = _lists.norm(term).square()
        dots = sq_norm.new_zeros((count + 1, 2))
        along = self._w.view(1, -1)
        for dot in dots.unbind()[1:]:
            self._before.add_(self._w)
            u = product(y)
            if kept is not None:
                torch._foreach_mul_((self._w, y), kept)
            self._w.add_(u)
            y.add_(kernel.product(u))
            _ops.row_dot_(dot, images.double(), along.double())
        q = torch.ones_like(sq_norm) if kept is None else kept
        self._powers = q ** torch.arange(count + 1, dtype=sq_norm.dtype, device=sq_norm.device)
        found = self._powers.square() * sq_norm + self._powers * dots[:, 0] + dots[:, 1]
        self.sq_norms = torch.maximum(found, _NOISE * torch.finfo(start.dtype).eps * sq_norm)

    def sum_of_terms(self, count: int) -> tuple[Tensor, Tensor]:
        """What the first ``count`` terms, all or all but the last, have of v_0, and what J' is to be applied to."""
        total = self._before.add_(self._w) if count == len(self._powers) else self._before
        return self._powers[:count].sum(), total

    def reached(self) -> TensorList:
        """The last term."""
        result = _multiplied(self._term, self._powers[-1])
        self._tape.vjp(self._w, result)
        return result


def _multiplied(tensors: TensorList, number: Tensor) -> TensorList:
    """A new list, contiguous."""
    result = [t.clone(memory_format=torch.contiguous_format) for t in tensors]
    multiply_(result, number)
    return result
