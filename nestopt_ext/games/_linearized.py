"""One step of a map with its graph, and products with its Jacobian; differentiable where asked to.

Rows are independent starts: the derivative of the sum over rows is that of each row, so that no product costs more for
being one of many, and a Jacobian takes as many backward passes as a state is long, made as one by ``torch.vmap``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from .. import _lists

#: A map of states, [B, S] to [B, S], row by row: an :class:`~nestopt_ext.games.OptimizerMap`, or any function.
Step: TypeAlias = Callable[[Tensor], Tensor]


def check_step(caller: str, step: Step) -> None:
    """Something to call."""
    if not callable(step):
        got = _lists.value_name(step)
        raise TypeError(f"{caller}: step must be a map from state to state, such as sgd_map(game, lr); got {got}.")


def check_state(caller: str, name: str, state: Tensor) -> None:
    """A tensor [B, S] with at least one element, float32 or float64."""
    if not isinstance(state, Tensor):
        raise TypeError(f"{caller}: {name} must be a tensor of shape (B, S); got {_lists.value_name(state)}.")
    if state.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{caller}: {name} must be float32 or float64; got {_lists.dtype_name(state.dtype)}.")
    if state.dim() != 2 or state.numel() == 0:
        raise ValueError(
            f"{caller}: {name} must have shape (B, S), a row for each start; got {_lists.shape_name(state.shape)}."
        )


class Linearized:
    """A step from ``state``: ``value`` is where it leads, with its graph; products are taken of the same graph.

    With ``create_graph`` everything is differentiable in ``state``, which must require grad; else all is detached.
    """

    def __init__(self, caller: str, step: Step, state: Tensor, *, create_graph: bool = False) -> None:
        self._state = state if create_graph else state.detach().requires_grad_()
        self._create_graph = create_graph
        self._pushing: tuple[Tensor, Tensor] | None = None
        with torch.enable_grad():
            self._value = step(self._state)
        check_value(caller, "step", self._value, state)
        if not self._value.requires_grad:
            raise ValueError(
                f"{caller}: step must be differentiable in the state; got a value without graph. Compute it without"
                " .detach(), and gradients inside it with create_graph=True."
            )
        self.value = self._value if create_graph else self._value.detach()

    def dense(self) -> Tensor:
        """The Jacobians [B, S, S]."""
        size = self._value.shape[1]
        identity = torch.eye(size, dtype=self._value.dtype, device=self._value.device)
        return self.pull(identity.expand(self._value.shape[0], size, size)).mT

    def push(self, v: Tensor) -> Tensor:
        """J v for the columns of v [B, S, m]."""
        if self._pushing is None:
            with torch.enable_grad():
                u = torch.zeros_like(self._value).requires_grad_()
                (pulled,) = torch.autograd.grad(
                    self._value, self._state, u, retain_graph=True, create_graph=True, materialize_grads=True
                )
            self._pushing = u, pulled  # linear in u: its derivative is J, whatever u is
        u, pulled = self._pushing
        if not pulled.requires_grad:
            return torch.zeros_like(v)
        return self._grads(pulled, u, v)

    def pull(self, u: Tensor) -> Tensor:
        """J' u for the columns of u [B, S, m]."""
        return self._grads(self._value, self._state, u)

    def _grads(self, output: Tensor, argument: Tensor, cotangents: Tensor) -> Tensor:
        columns = cotangents.movedim(2, 0)

        def products(seed: Tensor, batched: bool) -> Tensor:
            (found,) = torch.autograd.grad(
                output,
                argument,
                seed,
                retain_graph=True,
                create_graph=self._create_graph,
                is_grads_batched=batched,
                materialize_grads=True,
            )
            return found

        with torch.set_grad_enabled(self._create_graph):
            if len(columns) > 1:
                try:
                    return products(columns, True).movedim(0, 2)
                except RuntimeError:  # an operation that vmap cannot take: one by one, where a true fault comes again
                    pass
            return torch.stack([products(column, False) for column in columns], dim=2)


def check_value(caller: str, name: str, value: object, state: Tensor) -> None:
    """What the map ``name`` returned is a tensor like the state."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{caller}: {name} must return a tensor like the state; got {_lists.value_name(value)}.")
    if value.shape != state.shape or value.dtype != state.dtype or value.device != state.device:
        raise ValueError(
            f"{caller}: {name} must return a tensor like the state, {_lists.shape_name(state.shape)} of"
            f" {_lists.dtype_name(state.dtype)} on {state.device}; got {_lists.shape_name(value.shape)} of"
            f" {_lists.dtype_name(value.dtype)} on {value.device}."
        )
