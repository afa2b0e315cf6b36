r"""Corrected directions for games: what to step along in place of the simultaneous gradient.

With :math:`\xi` the simultaneous gradient, J its Jacobian, J_o the part of J off the diagonal blocks and :math:`\chi_i
= \sum_{j \ne i} (\partial^2 L_j / \partial w_i \partial w_j) \, \partial L_i / \partial w_j`:

=============  =========================================================================================
consensus      :math:`\xi + \gamma J^\top \xi`
sga            :math:`\xi + \lambda A^\top \xi`, with :math:`A = (J - J^\top) / 2`
lookahead      :math:`\xi - \text{lr} \, J_o \xi`
lola           :math:`\xi - \text{lr} \, J_o \xi - \text{lr} \, \chi`
sos            :math:`\xi - \text{lr} \, J_o \xi - p \, \text{lr} \, \chi`, p in [0, 1]
cgd            :math:`(I + \text{lr} \, J_o)^{-1} \xi`
=============  =========================================================================================

The update is ``w <- w - lr * direction``, for any number of players. All take ``losses`` and ``players`` as
:func:`~nestopt_ext.games.gradients` does, work by products of autograd and never form J, return new tensors without
graph in the structure of ``players``, write nothing to ``.grad``, and retain the graphs. For losses of shape (B,) every
start gets its own lambda, p and linear system. A player that was detached on its way into another's loss drops out of J
without a sign: compute the losses without ``.detach()``.

All raise TypeError or ValueError for bad arguments, and RuntimeError, with the way out, where PyTorch has no second
derivative.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .._lists import value_name
from .._stack import caller_depth
from .._types import TensorList
from ..optim._arguments import check_lr, check_real
from . import _normal_equations
from ._blocks import Blocks
from ._players import Player, dot, scaled

#: Balduzzi et al. add it to the inner products whose sign aligns the adjustment.
_ALIGNMENT_BIAS = 0.1


def consensus(losses: Sequence[Tensor], players: Sequence[Player], *, gamma: float = 1.0) -> Any:
    r"""Consensus optimization: :math:`\xi + \gamma J^\top \xi`, the gradient of :math:`\gamma |\xi|^2 / 2` added.

    Costs one backward pass through the gradients. Source: Mescheder, Nowozin, Geiger, The numerics of GANs (2017).

    >>> x = torch.tensor(2.0, requires_grad=True)
    >>> y = torch.tensor(3.0, requires_grad=True)
    >>> consensus([x * y, -x * y], [x, y])            # (y, -x) + (x, y)
    [tensor(5.), tensor(1.)]
    """
    check_real("consensus", "gamma", gamma)
    blocks = Blocks("consensus", losses, players)
    return blocks.players.pack(_plus(blocks.xi, gamma, blocks.transposed(blocks.xi)))


def sga(losses: Sequence[Tensor], players: Sequence[Player], *, lam: float | Literal["aligned"] = "aligned") -> Any:
    r"""Symplectic gradient adjustment: :math:`\xi + \lambda A^\top \xi`, where :math:`A^\top \xi = (J^\top \xi - J \xi)
    / 2`.

    ``lam`` is a number, or ``"aligned"``: the sign of :math:`\langle \xi, J^\top \xi \rangle \langle A^\top \xi, J^\top
    \xi \rangle / d + 0.1`, d being the number of elements, which pulls towards stable fixed points and pushes away from
    unstable ones. Costs one backward pass through the gradients for each player and one more. Source: Balduzzi et al.,
    The mechanics of n-player differentiable games (2018).

    >>> x = torch.tensor(2.0, requires_grad=True)
    >>> y = torch.tensor(3.0, requires_grad=True)
    >>> sga([x * y, -x * y], [x, y])                  # A = J: (y, -x) + (x, y)
    [tensor(5.), tensor(1.)]
    """
    if lam != "aligned":
        check_real("sga", "lam", lam)
    blocks = Blocks("sga", losses, players)
    ascent = blocks.transposed(blocks.xi)  # the gradient of |xi|^2 / 2
    adjustment = [(a - b) / 2 for a, b in zip(ascent, blocks.product(blocks.xi), strict=True)]
    if lam != "aligned":
        return blocks.players.pack(_plus(blocks.xi, lam, adjustment))
    size = sum(t.numel() for t in blocks.xi) // (blocks.batch or 1)
    aligned = dot(blocks.xi, ascent, blocks.batch) * dot(adjustment, ascent, blocks.batch) / size
    return blocks.players.pack(_plus(blocks.xi, torch.sign(aligned + _ALIGNMENT_BIAS), adjustment))


def lookahead(losses: Sequence[Tensor], players: Sequence[Player], *, lr: float | Tensor) -> Any:
    r"""LookAhead: each player's gradient where the others will be after a step, to first order in ``lr``.

    :math:`\xi_i - \text{lr} \, \nabla_{w_i} \sum_{j \ne i} \langle \nabla_{w_j} L_i, \, \overline{\nabla_{w_j} L_j}
    \rangle`, the bar holding the other's step fixed; that is :math:`\xi - \text{lr} \, J_o \xi`. ``lr`` is the step the
    others are taken to make, >= 0. Costs one backward pass through the gradients for each player. Source: Zhang,
    Lesser, Multi-agent learning with policy prediction (2010).

    >>> x = torch.tensor(2.0, requires_grad=True)
    >>> y = torch.tensor(3.0, requires_grad=True)
    >>> lookahead([x * y, -x * y], [x, y], lr=0.5)    # (y + x / 2, -x + y / 2)
    [tensor(4.), tensor(-0.5000)]
    """
    lr = _step_size("lookahead", lr)
    blocks = Blocks("lookahead", losses, players)
    return blocks.players.pack(_looking_ahead(blocks, lr))


def lola(losses: Sequence[Tensor], players: Sequence[Player], *, lr: float | Tensor) -> Any:
    r"""LOLA, learning with opponent-learning awareness: LookAhead whose players know that they shape the others' steps.

    :math:`\xi_i - \text{lr} \, \nabla_{w_i} \sum_{j \ne i} \langle \nabla_{w_j} L_i, \, \nabla_{w_j} L_j \rangle`, with
    the derivative taken through both factors; that is :math:`\xi - \text{lr} \, J_o \xi - \text{lr} \, \chi`. ``lr`` is
    the step the others are taken to make, >= 0. Costs two backward passes through the gradients for each player.
    Source: Foerster et al., Learning with opponent-learning awareness (2018), in the exact first-order form of Letcher
    et al. (2019), which differentiates both factors.

    >>> x = torch.tensor(2.0, requires_grad=True)
    >>> y = torch.tensor(3.0, requires_grad=True)
    >>> lola([x * y, -x * y], [x, y], lr=0.5)         # (y + x, -x + y)
    [tensor(5.), tensor(1.)]
    """
    lr = _step_size("lola", lr)
    blocks = Blocks("lola", losses, players)
    return blocks.players.pack(_minus(_looking_ahead(blocks, lr), lr, blocks.shaping()))


def sos(
    losses: Sequence[Tensor], players: Sequence[Player], *, lr: float | Tensor, a: float = 0.5, b: float = 0.1
) -> Any:
    r"""Stable opponent shaping: between LookAhead (p = 0), which finds stable fixed points, and LOLA (p = 1).

    With :math:`\xi_0 = \xi - \text{lr} \, J_o \xi` the direction is :math:`\xi_0 - p \, \text{lr} \, \chi`, :math:`p =
    \min(p_1, p_2)`:

    - :math:`p_1` is 1 where :math:`s = \langle -\text{lr} \, \chi, \xi_0 \rangle \ge 0`, else :math:`\min(1, -a
      |\xi_0|^2 / s)`: shaping never turns the direction more than that against LookAhead's;
    - :math:`p_2` is :math:`|\xi|^2` where :math:`|\xi| < b`, else 1: shaping fades out near a fixed point.

    ``a`` and ``b`` are in (0, 1). Costs as :func:`lola`. Source: Letcher et al., Stable opponent shaping in
    differentiable games (2019).

    >>> x = torch.tensor(2.0, requires_grad=True)
    >>> y = torch.tensor(3.0, requires_grad=True)
    >>> sos([x * y, -x * y], [x, y], lr=0.5)          # shaping agrees with LookAhead: p = 1, LOLA
    [tensor(5.), tensor(1.)]
    """
    lr = _step_size("sos", lr)
    for name, value in (("a", a), ("b", b)):
        check_real("sos", name, value)
        if not 0 < value < 1:
            raise ValueError(f"sos: {name} must be in (0, 1); got {value}.")
    blocks = Blocks("sos", losses, players)
    ahead, shaping = _looking_ahead(blocks, lr), blocks.shaping()
    agreement = -lr * dot(shaping, ahead, blocks.batch)
    bound = -a * dot(ahead, ahead, blocks.batch) / agreement
    square = dot(blocks.xi, blocks.xi, blocks.batch)
    p = torch.minimum(torch.where(agreement < 0, bound, 1.0), torch.where(square < b * b, square, 1.0))
    return blocks.players.pack(_minus(ahead, p * lr, shaping))


def cgd(
    losses: Sequence[Tensor],
    players: Sequence[Player],
    *,
    lr: float | Tensor,
    max_iters: int = 50,
    rtol: float = 1e-5,
) -> Any:
    r"""Competitive gradient descent: :math:`(I + \text{lr} \, J_o)^{-1} \xi`, the Nash equilibrium of the game that is
    bilinear in the players' steps.

    Solved by conjugate gradients on the normal equations from :math:`\xi`, each iteration two backward passes through
    the gradients for each player; with two players and opposite losses these are the systems :math:`I + \text{lr}^2
    J_{12} J_{12}^\top` and :math:`I + \text{lr}^2 J_{21} J_{21}^\top`, so nothing is lost there, and the method holds
    for any number of players and any losses. It ends when :math:`|\xi - (I + \text{lr} \, J_o) d| \le \text{rtol} \,
    |\xi|` in every start, or after ``max_iters``, with one RuntimeWarning if the residual is then above that, as it is
    where the matrix is singular or ``rtol`` is beyond the dtype.

    Source: Schaefer, Anandkumar, Competitive gradient descent (2019), whose two players are here any number.

    >>> x = torch.tensor(2.0, requires_grad=True)
    >>> y = torch.tensor(3.0, requires_grad=True)
    >>> [round(t.item(), 5) for t in cgd([x * y, -x * y], [x, y], lr=0.5)]      # (y + x / 2, -x + y / 2) / 1.25
    [3.2, -0.4]
    """
    lr = _step_size("cgd", lr)
    check_real("cgd", "rtol", rtol)
    if not 0 < rtol < 1:
        raise ValueError(f"cgd: rtol must be in (0, 1); got {rtol}.")
    if not isinstance(max_iters, int) or isinstance(max_iters, bool):
        raise TypeError(f"cgd: max_iters must be an int; got {value_name(max_iters)}.")
    if max_iters < 1:
        raise ValueError(f"cgd: max_iters must be at least 1; got {max_iters}.")
    blocks = Blocks("cgd", losses, players)
    found = _normal_equations.solve(
        lambda v: _plus(v, lr, blocks.off_diagonal(v)),
        lambda u: _plus(u, lr, blocks.off_diagonal_transposed(u)),
        blocks.xi,
        blocks.xi,
        batch=blocks.batch,
        max_iters=max_iters,
        rtol=rtol,
    )
    worst = float(found.relative_residual.max())
    if not worst <= 2 * rtol:  # rounding parts the residual of the recursion from the true one
        warnings.warn(
            f"cgd: the solve must reach a relative residual of rtol={rtol:g}; got {worst:.3g} after"
            f" {found.num_iterations} iterations. Raise max_iters or rtol, or lower lr. The direction is returned as"
            " it is.",
            RuntimeWarning,
            stacklevel=caller_depth(),
        )
    return blocks.players.pack(found.value)


def _looking_ahead(blocks: Blocks, lr: float | Tensor) -> TensorList:
    return _minus(blocks.xi, lr, blocks.off_diagonal(blocks.xi))


def _plus(tensors: TensorList, factor: float | Tensor, others: TensorList) -> TensorList:
    """The sum tensors + factor * others; a factor of shape (B,) is one number for each start."""
    products = scaled(factor, others) if isinstance(factor, Tensor) else [factor * t for t in others]
    return [t + p for t, p in zip(tensors, products, strict=True)]


def _minus(tensors: TensorList, factor: float | Tensor, others: TensorList) -> TensorList:
    return _plus(tensors, -factor, others)


def _step_size(caller: str, lr: float | Tensor) -> float | Tensor:
    """The checked step size; a tensor stays where it is, so that nothing waits for it."""
    check_lr(caller, lr)
    return lr.detach().reshape(()) if isinstance(lr, Tensor) else lr
