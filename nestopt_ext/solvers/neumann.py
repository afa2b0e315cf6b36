r"""The inverse of a curvature as a Neumann series.

For a symmetric matrix :math:`A` (damping included) whose eigenvalues lie in :math:`(0, 2/\alpha)`,

.. math:: A^{-1} v = \alpha \sum_{j \ge 0} (I - \alpha A)^j v .

The sum cut after :math:`K` = ``num_terms`` products leaves the residual :math:`(I - \alpha A)^{K+1} v`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .. import _lists, _ops, _reference
from .._types import MatVec, SameTensors, TensorList
from ._arguments import alpha_tensor, check_alpha, check_damping, check_num_terms
from ._outcome import Outcome, judge, warn
from ._power import auto_alpha
from ._product import Product


@dataclass(frozen=True)
class Neumann:
    r"""Solve by the series :math:`\alpha \sum_{j=0}^{K} (I - \alpha (A + \delta I))^j v`, K = ``num_terms``.

    ``num_terms`` (int >= 0) counts products with A; 0 gives alpha * v. ``alpha`` (units 1/curvature) is a number, a
    0-dim tensor, or ``"auto"``: 0.9 / lambda_max(A + damping I), at the price of five more products. The series
    contracts for 0 < alpha < 2 / lambda_max and a positive definite A + damping I. ``damping`` (units of curvature) is
    finite and >= 0.

    Raises TypeError or ValueError, naming the option, when one is out of range.

    >>> Neumann(num_terms=20, damping=1e-3)
    Neumann(num_terms=20, alpha='auto', damping=0.001)
    """

    num_terms: int = 3
    alpha: float | Tensor | Literal["auto"] = "auto"
    damping: float = 0.0

    def __post_init__(self) -> None:
        _check("Neumann", self.num_terms, self.alpha, self.damping)

    def run(self, product: Product, v: TensorList) -> Outcome:
        """The series for a flat list ``v``, which is only read."""
        return series(product, v, num_terms=self.num_terms, alpha=self.alpha, damping=self.damping)


def neumann_ihvp(
    matvec: MatVec,
    v: SameTensors,
    *,
    num_terms: int,
    alpha: float | Tensor | Literal["auto"],
    damping: float = 0.0,
) -> SameTensors:
    r"""An inverse curvature product by a Neumann series: :math:`\alpha \sum_{j=0}^{K} (I - \alpha (A + \delta I))^j v`.

    ``matvec`` is any callable that returns A times the tensors it is given, in the same structure; the tensors it is
    given may be read only, and only during the call. ``v`` (Tensor, list, tuple or dict of float32, float64, bfloat16
    or float16 tensors of any shape) is not modified. ``num_terms`` = K is the number of products; 0 gives alpha * v.
    ``alpha`` (units 1/curvature) is a number, a 0-dim tensor, or ``"auto"``: 0.9 / lambda_max(A + damping I) by five
    more products. ``damping`` = delta (units of curvature) is >= 0. 16-bit ``v`` is accumulated in float32.

    Returns new tensors like ``v``, without graph. Besides them the memory of one more ``v`` and of one product is used,
    and the device is waited for once, at the end. A series that diverges or meets NaN or Inf is returned as it is, with
    one RuntimeWarning. Raises TypeError or ValueError when an argument, or what ``matvec`` returns, breaks these rules.

    Source: Lorraine, Vicol, Duvenaud, Optimizing millions of hyperparameters by implicit differentiation (2020),
    algorithm 3. Here the sum carries its factor alpha in front, all its terms have a plus sign, and ``num_terms``
    counts products, so that the sum has ``num_terms`` + 1 terms.

    >>> import torch
    >>> curvature = torch.tensor([1.0, 2.0])
    >>> neumann_ihvp(lambda v: curvature * v, torch.tensor([1.0, 1.0]), num_terms=1, alpha=0.5)   # 0.5 * (2 - 0.5 * c)
    tensor([0.7500, 0.5000])
    >>> neumann_ihvp(lambda v: curvature * v, torch.tensor([1.0, 1.0]), num_terms=40, alpha=0.5)  # 1 / c
    tensor([1.0000, 0.5000])
    """
    caller = "neumann_ihvp"
    _check(caller, num_terms, alpha, damping)
    flat, structure = _lists.flatten(caller, "v", v)
    _lists.check_floating(caller, structure.labels("v"), flat)
    product = Product(caller, matvec, structure, flat)
    outcome = series(product, flat, num_terms=num_terms, alpha=alpha, damping=damping)
    warn(caller, judge(caller, outcome))
    result: SameTensors = structure.pack(outcome.value)
    return result


def series(
    product: Product, v: TensorList, *, num_terms: int, alpha: float | Tensor | Literal["auto"], damping: float
) -> Outcome:
    """The series in two buffers: ``term`` holds (I - alpha A)^j v and ``total`` its sum, both updated in place."""
    term = _working_copy(v)
    if isinstance(alpha, str):
        step = auto_alpha(product, term, damping)
        for t, start in zip(term, v, strict=True):
            t.copy_(start.detach())
    else:
        step = alpha_tensor(alpha)
    total = [t.clone() for t in term]
    groups = _lists.by_device(term)
    steps = {device: step if step.device.type == "cpu" else step.to(device) for device in groups}
    sq_norms = {device: _sq_norm_history(term, positions, num_terms) for device, positions in groups.items()}
    for j in range(1, num_terms + 1):
        av = product(term)
        for device, positions in groups.items():
            _ops.neumann_step_(
                [term[i] for i in positions],
                [total[i] for i in positions],
                [av[i] for i in positions],
                steps[device],
                damping=damping,
                sq_norm=sq_norms[device][j],
            )
        del av
    for device, positions in groups.items():
        for i in positions:
            total[i].mul_(steps[device])
    value = [t.to(start.dtype) for t, start in zip(total, v, strict=True)]
    return Outcome(value, step, float(damping), sq_norms)


def _working_copy(v: TensorList) -> TensorList:
    """A copy to be updated in place, in the dtype the series is accumulated in."""
    return [t.detach().to(_reference.opmath(t.dtype), copy=True) for t in v]


def _sq_norm_history(term: TensorList, positions: list[int], num_terms: int) -> Tensor:
    """A vector for the squared norm of each term on one device, with the first one filled in."""
    norm = _lists.norm([term[i] for i in positions])
    history = torch.zeros(num_terms + 1, dtype=norm.dtype, device=norm.device)
    history[0] = norm.square()
    return history


def _check(caller: str, num_terms: object, alpha: object, damping: object) -> None:
    check_num_terms(caller, num_terms)
    check_alpha(caller, alpha, auto=True)
    check_damping(caller, damping)
