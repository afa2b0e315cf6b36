"""Optimistic descent: the last direction is taken to come again, and what was wrong with that is made up for."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ._arguments import check_flags, check_real
from ._list_optimizer import ADAM_STATE, Batch, ListOptimizer, check_adam
from ._state import STEP
from ._updates import copy_, move_

_PREVIOUS = "previous_direction"


class _Optimistic(ListOptimizer):
    """``w <- w - lr * ((1 + optimism) * d - optimism * previous d)`` by a direction that a subclass knows."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step.

        Args:
            closure: evaluates the loss again, with gradients, and returns it.

        Returns:
            What ``closure`` returned, else None.

        Raises:
            ValueError, TypeError: for a hyperparameter that was spoiled, a sparse gradient, or a gradient or state that
                does not fit its parameter, before anything is modified.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for batch in self._batches():
                grads, weights, lr, optimism = batch.gradients(), batch.weights(), batch.lr, batch.group["optimism"]
                if not batch.moved and batch.group["plain_first_step"]:
                    optimism = 0
                self._move(batch, weights, grads, optimism * lr if batch.moved else None, -(1 + optimism) * lr)
                batch.write(weights)
        return loss

    def _move(
        self,
        batch: Batch,
        weights: list[Tensor],
        grads: list[Tensor],
        back: float | Tensor | None,
        ahead: float | Tensor,
    ) -> None:
        """``weights += back * previous direction + ahead * direction``; ``back`` is None where there is no previous."""
        raise NotImplementedError

    def _check_group(self, group: Mapping[str, Any], owner: str) -> None:
        super()._check_group(group, owner)
        check_real(owner, "optimism", group["optimism"], minimum=0.0)
        check_flags(owner, group, ("plain_first_step",))


class OptimisticSGD(_Optimistic):
    r"""Optimistic gradient descent: one gradient per step, yet it converges where players turn around each other.

    .. math::
        g_t &= \nabla f(w_t) + \text{weight\_decay} \cdot w_t \\
        w_{t+1} &= w_t - \text{lr} \cdot \big((1 + c)\, g_t - c\, g_{t-1}\big), \qquad c = \text{optimism}

    With :math:`c = 1` this is :math:`2 g_t - g_{t-1}`; with 0 it is :class:`torch.optim.SGD`. On a bilinear game whose
    matrix has singular value 1 the best rate is :math:`1/\sqrt 2` per step, at lr 0.5.

    **The first step** of each parameter has no previous gradient. By default that counts as zero, so the first step is
    :math:`1 + c` plain ones, as in the source; with ``plain_first_step`` it counts as equal to the first gradient, and
    the first step is a plain one. The lr is that of the current step for both gradients. A parameter whose gradient was
    missing for a while goes on with the last one it had.

    Args:
        params: tensors, named tensors or groups, as every torch optimizer takes them. Complex parameters count as pairs
            of real ones.
        lr: step size, >= 0; a tensor of one element may be changed in place without recompiling a compiled step.
        weight_decay: added to the gradient times the parameter, >= 0.
        optimism: weight :math:`c` of the difference from the previous gradient, >= 0.
        plain_first_step: begin with a plain step.
        maximize: ascend.
        foreach: ``torch._foreach_*`` kernels over whole lists (None and True), or one tensor after the other, which
            needs temporaries of one tensor only (False). The numbers are the same.

    Modifies: the parameters and, per parameter, the state ``previous_direction``, which is :math:`g_{t-1}` (its
    negative with ``maximize``), float32 beside 16-bit parameters. Gradients are only read.

    Raises:
        ValueError, TypeError: for a bad hyperparameter, before anything is modified; see :meth:`step` for those of a
            step.

    Source: Daskalakis, Ilyas, Syrgkanis, Zeng, "Training GANs with Optimism", 2018; Gidel and others, "A
    Variational Inequality Perspective on Generative Adversarial Networks", 2019, for the first step.

    >>> import torch, nestopt_ext as nx
    >>> w = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    >>> optimizer = nx.OptimisticSGD([w], lr=0.25)
    >>> for _ in range(2):      # gradient 1: twice lr, then lr
    ...     w.grad = torch.ones_like(w)
    ...     optimizer.step()
    ...     w.item()
    0.5
    0.25
    """

    _STATE = (_PREVIOUS,)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        weight_decay: float = 0,
        optimism: float = 1.0,
        plain_first_step: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "optimism": optimism,
            "plain_first_step": plain_first_step,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def _was_moved(self, state: dict[str, Any]) -> bool:
        return _PREVIOUS in state

    def _move(
        self,
        batch: Batch,
        weights: list[Tensor],
        grads: list[Tensor],
        back: float | Tensor | None,
        ahead: float | Tensor,
    ) -> None:
        previous = batch.buffers(_PREVIOUS)
        if back is not None:
            move_(weights, previous, back)
        move_(weights, grads, ahead)
        copy_(previous, grads)


class OptimisticAdam(_Optimistic):
    r"""Optimistic descent along Adam's direction.

    .. math::
        w_{t+1} = w_t - \text{lr} \cdot \big((1 + c)\, d_t - c\, d_{t-1}\big), \qquad c = \text{optimism}

    where :math:`d_t` is :class:`torch.optim.Adam`'s direction with bias correction; with :math:`c = 0` this is Adam.
    The previous direction is a function of Adam's state before the step and is computed from it again, so nothing is
    kept beyond that state; a change of ``betas``, ``eps`` or ``amsgrad`` between two steps therefore counts for both
    directions, as does one of the lr. The first step of each parameter is as in :class:`OptimisticSGD`.

    Args:
        params: tensors, named tensors or groups, as every torch optimizer takes them. Complex parameters count as pairs
            of real ones.
        lr: step size, >= 0; a tensor of one element may be changed in place without recompiling a compiled step.
        betas: how much of the average of the gradient, and of its square, is kept at each step; in [0, 1).
        eps: added to the denominator, >= 0.
        weight_decay: added to the gradient times the parameter, >= 0.
        amsgrad: divide by the largest average of the square so far.
        optimism: weight :math:`c` of the difference from the previous direction, >= 0.
        plain_first_step: begin with a plain step.
        maximize: ascend.
        foreach: ``torch._foreach_*`` kernels over whole lists (None and True), or one tensor after the other, which
            needs temporaries of one tensor only (False). The numbers are the same.

    Modifies: the parameters and, per parameter, the state of :class:`torch.optim.Adam`: ``step``, ``exp_avg``,
    ``exp_avg_sq`` and with amsgrad ``max_exp_avg_sq``, float32 beside 16-bit parameters. Gradients are only read. A
    checkpoint of Adam loads as it is and goes on with its last direction as the previous one.

    Raises:
        ValueError, TypeError: for a bad hyperparameter, before anything is modified; see :meth:`step` for those of a
            step.

    Source: Daskalakis, Ilyas, Syrgkanis, Zeng, "Training GANs with Optimism", 2018, algorithm 1.

    >>> import torch, nestopt_ext as nx
    >>> w = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    >>> optimizer = nx.OptimisticAdam([w], lr=0.25, eps=0.0)
    >>> for _ in range(2):      # every direction is 1: twice lr, then lr
    ...     w.grad = torch.full_like(w, 3.0)
    ...     optimizer.step()
    ...     round(w.item(), 12)
    0.5
    0.25
    """

    _STATE = ADAM_STATE
    _TOGETHER = ADAM_STATE[:3]

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        optimism: float = 1.0,
        plain_first_step: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "optimism": optimism,
            "plain_first_step": plain_first_step,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: Mapping[str, Any], owner: str) -> None:
        super()._check_group(group, owner)
        check_adam(owner, group)

    def _was_moved(self, state: dict[str, Any]) -> bool:
        # A count of zero is a state that was made but has no direction yet; a compiled step never meets one.
        return STEP in state and (torch.compiler.is_compiling() or state[STEP].item() > 0)

    def _move(
        self,
        batch: Batch,
        weights: list[Tensor],
        grads: list[Tensor],
        back: float | Tensor | None,
        ahead: float | Tensor,
    ) -> None:
        moments = batch.moments()
        if back is not None:
            moments.move_(weights, back)  # the previous direction, before the state takes the new gradient in
        moments.update_(grads)
        moments.move_(weights, ahead)
