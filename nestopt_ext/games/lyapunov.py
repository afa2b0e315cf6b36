r"""Lyapunov exponents of a map of states: how fast neighbours part along its trajectories.

With :math:`x_{t+1} = F(x_t)`, :math:`J_t = dF/dx` at :math:`x_t` and the product :math:`P = J_{k-1} \cdots J_0`, a
displacement d of the start is P d after k steps. Exponents are of *squared* lengths per step, twice the usual ones:

.. math:: \lambda(d) = \tfrac{1}{k} \log |P d|^2 = \tfrac{2}{k} \log |P d|, \quad |d| = 1, \qquad
          \lambda_i = \tfrac{2}{k} \log \sigma_i(P).

Source: Lorraine et al., Lyapunov exponents for diversity in differentiable games (2022).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _lists
from ._linearized import Step
from ._sweep import MAX_PRODUCTS, Sweep, check_flag, leading, warn_of_directions
from .map_jacobian import DENSE_SIZE
from .spectrum import _check_count

_REMEDY = "Raise max_products, or take float64."


class MaxLyapunovExponent(NamedTuple):
    """``exponent`` [B], and ``direction`` [B, S], the unit displacement of the start that grows by it, without graph.

    The element of largest magnitude of a direction is positive.
    """

    exponent: Tensor
    direction: Tensor


def max_lyapunov_exponent(
    step: Step,
    start: Tensor,
    *,
    num_steps: int,
    per_step: bool = False,
    recompute: bool = False,
    max_products: int = MAX_PRODUCTS,
) -> MaxLyapunovExponent:
    r"""The largest exponent over ``num_steps`` steps, :math:`\tfrac{2}{k} \log \sigma_{\max}(J_{k-1} \cdots J_0)`.

    Args:
        step: an :class:`OptimizerMap`, or any differentiable function from [B, S] to [B, S], row by row; see
            :func:`map_jacobian`.
        start: states [B, S], float32 or float64; exponents are differentiable in them.
        num_steps: k >= 1.
        per_step: stretch each step on its own: :math:`\tfrac{1}{k} \sum_t \log \sigma_{\max}(J_t)^2`, an upper bound,
            whose direction is that of the first step.
        recompute: keep about sqrt(k) states in place of the graphs of all steps, and run the steps once more in the
            backward pass, as :func:`~nestopt_ext.unrolled` does. Values and derivatives are the same.
        max_products: beyond S = 64, products with all k Jacobians or their transposes before the search for the
            direction is given up, with one RuntimeWarning and the best direction found.

    Up to S = 64 the Jacobians are formed, one batched backward pass for each step, and their product is scaled as it
    grows, so that it can neither overflow nor vanish; derivatives of every order exist where the largest singular value
    is simple. Beyond, the direction is found from products alone (Golub and Kahan's bidiagonalization, to a relative
    residual of eps^(2/3)), and the exponent is that of :func:`lyapunov_exponents` along it: first derivatives are
    exact, because the direction is stationary, and second ones are refused.

    Returns exponent and direction; an exponent is NaN where the states or Jacobians of its start cease to be finite,
    and -inf where a Jacobian product is zero. Nothing is modified. Raises TypeError or ValueError for bad arguments.

    >>> stretch = torch.tensor([[2.0, 0.0], [0.0, 0.5]], dtype=torch.float64)
    >>> found = max_lyapunov_exponent(lambda x: x @ stretch.T, torch.ones(1, 2, dtype=torch.float64), num_steps=50)
    >>> found.exponent, found.direction                                    # 2 log 2
    (tensor([1.3863], dtype=torch.float64), tensor([[1., 0.]], dtype=torch.float64))
    """
    sweep = Sweep("max_lyapunov_exponent", step, start, num_steps, recompute, max_products)
    found = largest(sweep, per_step=check_flag(sweep.caller, "per_step", per_step))
    warn_of_directions(sweep.caller, sweep.residual, _REMEDY)
    return found


def largest(sweep: Sweep, *, per_step: bool = False) -> MaxLyapunovExponent:
    """What :func:`max_lyapunov_exponent` returns, without a warning."""
    if sweep.state_size <= DENSE_SIZE:
        if per_step:
            exponent, direction = sweep.step_by_step()
            return MaxLyapunovExponent(exponent, direction)
        product, log_scale = sweep.product()
        values, right = leading(product, 1)
        return MaxLyapunovExponent((values[:, 0].log() + log_scale) * (2 / sweep.num_steps), right[:, :, 0])
    if per_step:
        raise ValueError(
            f"{sweep.caller}: per_step must be False for states of more than {DENSE_SIZE} numbers;"
            f" got {sweep.state_size}."
        )
    right = sweep.leading_directions(1)
    return MaxLyapunovExponent(_first_order(sweep.along(right))[:, 0], right[:, :, 0])


def lyapunov_exponents(
    step: Step,
    start: Tensor,
    *,
    num_steps: int,
    num_exponents: int = 1,
    direction: Tensor | None = None,
    recompute: bool = False,
    max_products: int = MAX_PRODUCTS,
) -> Tensor:
    r"""Several exponents over ``num_steps`` steps, or those of given directions, [B, m].

    m directions are carried along and made orthonormal again after every step, :math:`J_t Q_t = Q_{t+1} R_t`; exponent
    i is :math:`\tfrac{2}{k} \sum_t \log |(R_t)_{ii}|`. This never forms a product of Jacobians, whose smaller singular
    values drown in rounding.

    Args:
        step: as in :func:`max_lyapunov_exponent`, as are ``start``, ``num_steps`` and ``recompute``.
        start: states [B, S].
        num_steps: k >= 1.
        num_exponents: m, 1 <= m <= S; where ``direction`` is given, it says how many.
        direction: [B, S], or (S,) for all starts: the exponent of this displacement, [B, 1]. Or [B, S, m]: exponent i
            is that of column i with the columns before it projected out, so that the sum of the first i belongs to the
            volume that they span. They need not be of length 1. None: the m leading right singular vectors of the
            product, for which exponent i is :math:`\tfrac{2}{k} \log \sigma_i`, largest first, as far as
            :math:`\sigma_i / \sigma_1` exceeds rounding; beyond, the vectors are generic ones and the exponents tend to
            the asymptotic ones like 1/k (Benettin et al. 1980).
        recompute: bounds the memory of derivatives.
        max_products: bounds the search for directions; see :func:`max_lyapunov_exponent`.

    Derivatives in ``start`` hold the directions fixed: of every order where they are given; where not, first
    derivatives, which are those of the singular values, and second ones are refused. Up to S = 64 Jacobians are formed;
    beyond, m products are taken.

    Returns [B, m]; NaN where the states or Jacobians of a start cease to be finite, -inf where nothing is left of a
    direction. Nothing is modified. Raises TypeError or ValueError for bad arguments.

    >>> stretch = torch.tensor([[2.0, 0.0], [0.0, 0.5]], dtype=torch.float64)
    >>> start = torch.ones(1, 2, dtype=torch.float64)
    >>> lyapunov_exponents(lambda x: x @ stretch.T, start, num_steps=50, num_exponents=2)     # 2 log 2, 2 log 1/2
    tensor([[ 1.3863, -1.3863]], dtype=torch.float64)
    >>> lyapunov_exponents(lambda x: x @ stretch.T, start, num_steps=50, direction=torch.tensor([0.0, 1.0]))
    tensor([[-1.3863]], dtype=torch.float64)
    """
    sweep = Sweep("lyapunov_exponents", step, start, num_steps, recompute, max_products)
    count = _check_count(sweep.caller, "num_exponents", num_exponents, 1, start.shape[1])
    if direction is not None:
        return sweep.along(_frame(sweep.caller, direction, start))
    directions = sweep.leading_directions(count)
    warn_of_directions(sweep.caller, sweep.residual, _REMEDY)
    return _first_order(sweep.along(directions))


class _FirstOrder(torch.autograd.Function):
    """The value itself; its gradient may be differentiated in ``value``, which is refused."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (value,) = ctx.saved_tensors
        found: Tensor = _Refusal.apply(gradient, value)  # type: ignore[no-untyped-call]
        return found


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, value: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError(
            "lyapunov_exponents: a second derivative must not be taken of exponents whose directions were searched; it"
            " would miss how these turn with the start. Pass direction, or use max_lyapunov_exponent on a state of up"
            f" to {DENSE_SIZE} numbers."
        )


def _first_order(value: Tensor) -> Tensor:
    """The value, whose second derivative is refused."""
    result: Tensor = _FirstOrder.apply(value)  # type: ignore[no-untyped-call]
    return result


def _frame(caller: str, direction: Tensor, start: Tensor) -> Tensor:
    """Directions as columns [B, S, m]."""
    if not isinstance(direction, Tensor):
        raise TypeError(f"{caller}: direction must be a tensor; got {_lists.value_name(direction)}.")
    batch, size = start.shape
    shape = tuple(direction.shape)
    if shape == (size,):
        columns = direction.expand(batch, size)[:, :, None]
    elif shape == (batch, size):
        columns = direction[:, :, None]
    elif direction.dim() == 3 and shape[:2] == (batch, size) and 1 <= shape[2] <= size:
        columns = direction
    else:
        raise ValueError(
            f"{caller}: direction must have shape ({size},), ({batch}, {size}) or ({batch}, {size}, m), m <= {size};"
            f" got {_lists.shape_name(shape)}."
        )
    if columns.is_complex():
        raise TypeError(f"{caller}: direction must be real; got {_lists.dtype_name(columns.dtype)}.")
    columns = columns.to(start)
    peak = columns.detach().abs().amax(dim=1)
    if not bool(((peak > 0) & peak.isfinite()).all()):
        raise ValueError(f"{caller}: direction must be finite and not zero; got one that is zero, or has NaN or Inf.")
    return columns
