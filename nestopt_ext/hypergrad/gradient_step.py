"""Gradient descent as a step to unroll."""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import _lists
from .._types import TensorList
from ..curvature._evaluation import check_scalar
from ..curvature._gradient import _refuse_error_nodes, named_faults, refuse_wrong_nodes
from . import _state
from .unrolled import accepts_step

_CALLER = "gradient_step"

#: A number, a 0-dim tensor, or a function of the hparams that returns one.
Rate: TypeAlias = float | Tensor | Callable[[Any], Any]


def gradient_step(inner_loss: Callable[..., Tensor], lr: Rate, *, momentum: Rate | None = None) -> Callable[..., Any]:
    r"""A step of gradient descent, to be handed to :func:`unrolled`.

    The function that is returned, ``step_fn(params, hparams)``, gives

    .. math:: w - \eta \, \frac{\partial L_T}{\partial w}(w, \lambda), \qquad \eta = \mathtt{lr},

    with the graph of the gradient. ``inner_loss(params, hparams)`` returns a scalar; if it has an argument named
    ``step`` it also gets the number of the step. ``lr`` (units params^2 / loss) is a finite number, a 0-dim tensor, or
    a function of the hparams that returns one; a tensor that requires grad gets its derivative, so that a learning rate
    may be learned.

    With ``momentum`` (of the same kinds as ``lr``) the state is a pair ``(params, buffers)`` of the same structure, and
    a step returns ``(w - lr b, b)`` with b = momentum * buffer + gradient; start from zero buffers for the numbers of
    ``torch.optim.SGD``.

    ``params`` are a Tensor, or lists, tuples and dicts of floating tensors in any nesting. Those that the loss does not
    use have gradient zero. A step only reads its arguments. The first one differentiates the loss once more, to see
    that PyTorch has its second derivative.

    Raises TypeError or ValueError for a bad ``lr``, ``momentum`` or state, for a loss that is not a scalar with a
    graph, or that depends on none of the params; RuntimeError, with the way out, where PyTorch has no second
    derivative.

    >>> import torch
    >>> from nestopt_ext.hypergrad import unrolled
    >>> step = gradient_step(lambda w, h: 0.5 * h * w**2, lr=0.5)          # w -> (1 - 0.5 h) w
    >>> w, h = torch.tensor(2.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    >>> last = unrolled(step, w, h, num_steps=2)
    >>> last.item(), *torch.autograd.grad(last, (w, h))                     # derivatives (1 - h/2)^2, -w (1 - h/2)
    (0.5, tensor(0.2500), tensor(-1.))
    """
    if not callable(inner_loss):
        got = _lists.value_name(inner_loss)
        raise TypeError(f"{_CALLER}: inner_loss must be a function of params and hparams; got {got}.")
    _check_rate("lr", lr)
    if momentum is not None:
        _check_rate("momentum", momentum)
    numbered = accepts_step(inner_loss)
    seen_once = False

    def gradient(params: Any, hparams: Any, step: int | None) -> tuple[TensorList, TensorList, _state.Nest]:
        nonlocal seen_once
        flat, nest = _state.flatten(_CALLER, "params", params)
        _lists.check_floating(_CALLER, nest.labels("params"), flat)
        with torch.enable_grad():
            loss = inner_loss(params, hparams, step=step) if numbered else inner_loss(params, hparams)
        check_scalar(_CALLER, "inner_loss", loss)
        with named_faults(_CALLER, "inner_loss"):
            if not seen_once:
                _refuse_hidden_ends(loss, flat)
                seen_once = True
            found = torch.autograd.grad(loss, flat, create_graph=True, allow_unused=True)
        if all(g is None for g in found):
            raise ValueError(f"{_CALLER}: inner_loss must depend on params; got a graph that none of them is in.")
        return flat, [torch.zeros_like(w) if g is None else g for w, g in zip(flat, found, strict=True)], nest

    def plain(params: Any, hparams: Any, *, step: int | None = None) -> Any:
        weights, grads, nest = gradient(params, hparams, step)
        return nest.pack(_descend(weights, grads, _value("lr", lr, hparams)))

    def heavy_ball(state: Any, hparams: Any, *, step: int | None = None) -> Any:
        if not isinstance(state, list | tuple) or len(state) != 2:
            raise TypeError(f"{_CALLER}: params must be a pair (params, buffers); got {_lists.value_name(state)}.")
        weights, grads, nest = gradient(state[0], hparams, step)
        buffers = nest.match(_CALLER, "buffers", state[1])
        _lists.check_like(_CALLER, nest.labels("buffers"), buffers, weights)
        rate = _value("momentum", momentum, hparams)
        buffers = [rate * b + g for b, g in zip(buffers, grads, strict=True)]
        return nest.pack(_descend(weights, buffers, _value("lr", lr, hparams))), nest.pack(buffers)

    return plain if momentum is None else heavy_ball


def _refuse_hidden_ends(loss: Tensor, params: TensorList) -> None:
    """Raises where the gradient of a loss would lose part of its own derivative in silence, or have a wrong one.

    A seed that requires grad makes every once_differentiable function leave its error node in the graph, which is
    dropped afterwards; the hooks keep it from whoever records what is saved.
    """
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        seed = torch.ones_like(loss, requires_grad=True)
        grads = torch.autograd.grad(loss, params, seed, create_graph=True, allow_unused=True)
    _refuse_error_nodes([g for g in grads if g is not None])
    refuse_wrong_nodes(loss, params)


def _descend(weights: TensorList, directions: TensorList, lr: float | Tensor) -> TensorList:
    if isinstance(lr, Tensor):
        return [w - lr.to(w.dtype) * d for w, d in zip(weights, directions, strict=True)]
    return [torch.sub(w, d, alpha=lr) for w, d in zip(weights, directions, strict=True)]


def _value(name: str, rate: Any, hparams: Any) -> float | Tensor:
    if isinstance(rate, Tensor) or not callable(rate):
        value: float | Tensor = rate
        return value
    value = rate(hparams)
    _check_rate(f"{name}(hparams)", value)
    return value


def _check_rate(name: str, rate: Any) -> None:
    if isinstance(rate, Tensor):
        if rate.dim() != 0 or not rate.is_floating_point():
            got = f"shape {_lists.shape_name(rate.shape)} of {_lists.dtype_name(rate.dtype)}"
            raise TypeError(f"{_CALLER}: {name} must be a 0-dim floating tensor; got {got}.")
    elif isinstance(rate, Real) and not isinstance(rate, bool):
        if not math.isfinite(rate):
            raise ValueError(f"{_CALLER}: {name} must be finite; got {rate}.")
    elif not callable(rate) or name.endswith(")"):
        raise TypeError(f"{_CALLER}: {name} must be a number or a 0-dim tensor; got {rate!r}.")
