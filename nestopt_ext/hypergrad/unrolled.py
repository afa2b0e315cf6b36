"""Differentiation through the steps of an iteration."""

import inspect
from collections.abc import Callable
from numbers import Integral
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import _lists
from .._types import TensorList, Tensors
from . import _state
from ._recompute import run_recomputing

_CALLER = "unrolled"

#: A Tensor, or lists, tuples and dicts of tensors in any nesting; what comes back has the structure that went in.
State = TypeVar("State")


def unrolled(
    step_fn: Callable[..., State],
    params: State,
    hparams: Tensors,
    *,
    num_steps: int,
    truncate: int | None = None,
    recompute: bool = False,
) -> State:
    r"""The params after ``num_steps`` of ``params = step_fn(params, hparams)``, differentiable as the steps are.

    With :math:`w_{t+1} = \Phi(w_t, \lambda)` from :math:`w_0` = ``params``, the derivative of the result is

    .. math:: \frac{dw_T}{d\lambda} = \sum_{t=0}^{T-1} \Bigl[ \prod_{s=t+1}^{T-1} \frac{\partial\Phi}{\partial w}(w_s)
              \Bigr] \frac{\partial\Phi}{\partial\lambda}(w_t), \qquad
              \frac{dw_T}{dw_0} = \prod_{t=0}^{T-1} \frac{\partial\Phi}{\partial w}(w_t) .

    ``step_fn(params, hparams)`` returns new tensors like ``params``; if it has an argument named ``step``, it also gets
    the number of the step, ``step=0, 1, ...``, by which it may choose a batch or a learning rate. The params it is
    handed always require grad, so it may differentiate a loss in them (``create_graph=True``);
    :func:`gradient_step` makes such a function. ``params`` are a Tensor, or lists, tuples and dicts of tensors in any
    nesting, for example ``{"weights": {...}, "momentum": {...}}``; whatever a rule remembers from step to step belongs
    there, integer counters too. ``hparams`` are a Tensor, list, tuple or dict of tensors, handed on as they are.

    Returns new tensors in the structure of ``params``, a function of ``hparams``, of the initial ``params``, and of
    whatever else ``step_fn`` reads, with derivatives of every order. Neither is modified. Under ``torch.no_grad()`` the
    value is the same and has no graph. Random numbers are drawn as the steps draw them.

    The tensors that autograd saves grow with ``num_steps``. Two options bound them:

    - ``truncate=k`` (int >= 1) differentiates through the last k steps only, and runs those before without graph. The
      derivative in the initial params is then none. Near a minimum that is strongly convex with constant mu, the error
      falls like (1 - lr mu)^k, and at the minimum the derivative is that of ``Neumann(num_terms=k - 1, alpha=lr)``.
    - ``recompute=True`` keeps about sqrt(num_steps) states, and runs each stretch of steps once more in the backward
      pass, with the random numbers it had. The value is the same bit for bit; memory is that of about 2 sqrt(num_steps)
      steps, and time grows by one run of the steps, and one step for each stretch. A derivative of the derivative runs
      them again, and keeps what the plain graph keeps. ``step_fn`` must compute the same each time: what it takes from
      ``next(...)`` is refused when it is seen, and ``torch.func.grad`` inside is refused by PyTorch. ``hparams`` may
      not be changed in place before the backward pass, which waits for the device once for each stretch.

    Raises TypeError or ValueError for bad arguments, or where ``step_fn`` returns another structure, shape, dtype or
    device, or writes to its params; RuntimeError in the backward pass where a recomputed stretch differs.

    Sources: Domke, Generic methods for optimization-based modeling (2012), for the unroll; Shaban et al., Truncated
    back-propagation for bilevel optimization (2019), for the truncation. The steps here are of any kind, and exact
    reversal of momentum (Maclaurin et al., 2015) is left out in favour of recomputation.

    >>> import torch
    >>> w = torch.tensor(2.0, requires_grad=True)
    >>> h = torch.tensor(0.5, requires_grad=True)
    >>> last = unrolled(lambda w, h: h * w, w, h, num_steps=3)
    >>> last, *torch.autograd.grad(last, (w, h))             # w h^3, h^3, 3 w h^2
    (tensor(0.2500, grad_fn=<MulBackward0>), tensor(0.1250), tensor(1.5000))
    >>> torch.autograd.grad(unrolled(lambda w, h: h * w, w, h, num_steps=3, truncate=1), h)     # the last w alone
    (tensor(0.5000),)
    """
    _check_options(step_fn, num_steps, truncate, recompute)
    flat, nest = _state.flatten(_CALLER, "params", params)
    if not flat:
        raise ValueError(f"{_CALLER}: params must hold at least one tensor; got none.")
    given, structure = _lists.flatten(_CALLER, "hparams", hparams)
    step = _Step(step_fn, nest, structure.pack(given))
    with_graph = min(num_steps if truncate is None else truncate, num_steps) if torch.is_grad_enabled() else 0
    first = num_steps - with_graph
    state = [t.clone() for t in flat]
    for number in range(first):
        state = [t.detach() for t in step([t.detach() for t in state], number)]
    if recompute:
        state = run_recomputing(_CALLER, step, state, range(first, num_steps), given)
    else:
        for number in range(first, num_steps):
            state = step(state, number)
    result: State = nest.pack(state)
    return result


def accepts_step(function: Callable[..., Any]) -> bool:
    """Whether a function has an argument named ``step``."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a callable of C without a signature
        return False
    return "step" in parameters and parameters["step"].kind is not inspect.Parameter.POSITIONAL_ONLY


class _Step:
    """A caller's step as a map on flat lists, checked; it gets params that require grad, and grad mode on."""

    def __init__(self, step_fn: Callable[..., Any], nest: _state.Nest, hparams: Any) -> None:
        self._step_fn = step_fn
        self._nest = nest
        self._hparams = hparams
        self._numbered = accepts_step(step_fn)

    def __call__(self, state: TensorList, number: int) -> TensorList:
        handed = [_differentiable(t) for t in state]
        versions = [t._version for t in handed]
        options = {"step": number} if self._numbered else {}
        with torch.enable_grad():
            returned = self._step_fn(self._nest.pack(handed), self._hparams, **options)
        name = "step_fn(params, hparams)"
        flat = self._nest.match(_CALLER, name, returned)
        _lists.check_like(_CALLER, self._nest.labels(name), flat, state)
        for label, tensor, version in zip(self._nest.labels("params"), handed, versions, strict=True):
            if tensor._version != version:
                raise ValueError(
                    f"{_CALLER}: step_fn must not modify its params; got {label} written in place. Return new tensors."
                )
        return flat


def _differentiable(tensor: Tensor) -> Tensor:
    """The tensor itself where it requires grad or cannot, else a leaf with its values."""
    if tensor.requires_grad or not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    return tensor.detach().requires_grad_()


def _check_options(step_fn: Any, num_steps: Any, truncate: Any, recompute: Any) -> None:
    if not callable(step_fn):
        got = _lists.value_name(step_fn)
        raise TypeError(f"{_CALLER}: step_fn must be a function of params and hparams; got {got}.")
    _check_count("num_steps", num_steps, least=0)
    if truncate is not None:
        _check_count("truncate", truncate, least=1, remedy=" It counts the steps to differentiate through.")
    if not isinstance(recompute, bool):
        raise TypeError(f"{_CALLER}: recompute must be a bool; got {recompute!r}.")


def _check_count(name: str, value: Any, *, least: int, remedy: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{_CALLER}: {name} must be an int; got {value!r}.")
    if value < least:
        raise ValueError(f"{_CALLER}: {name} must be >= {least}; got {value}.{remedy}")
