"""A model linearized where it stands: products with its Jacobian, and with the transpose, without autograd."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any

from torch import Tensor

from .. import _lists
from .._types import TensorList, Tensors
from ._batch_statistics import FrozenBatchStatistics
from ._evaluation import Replay
from ._model import Model, Params
from ._recording import Jacobian, Recording, by_autograd, notice, recorded


class Linearized:
    """The Jacobian J of a model's outputs in its params, on one batch. Made by :func:`linearize`.

    ``outputs`` are those of the model, without graph. ``opaque`` names the functions that have no rule of their own and
    go by autograd; ``reason`` says why all of the model does, and is None where it was recorded.
    """

    def __init__(
        self, outputs: Tensor, jacobian: Jacobian, params: TensorList, structure: _lists.Structure, reason: str | None
    ) -> None:
        self.outputs = outputs
        self.reason = reason
        self.opaque: tuple[str, ...] = jacobian.tape.opaque if isinstance(jacobian, Recording) else ()
        self._jacobian = jacobian
        self._params = params
        self._structure = structure

    def jvp(self, v: Tensors) -> Tensor:
        """J v, for ``v`` like the params; a new tensor like the outputs, without graph.

        Raises TypeError or ValueError unless ``v`` is like the params, and RuntimeError if params changed since.
        """
        return self._jacobian.forward(self._flat("jvp", "v", v))

    def vjp(self, u: Tensor) -> Tensors:
        """J' u, for ``u`` like the outputs; new tensors in the structure of the params, without graph.

        Raises TypeError or ValueError unless ``u`` is like the outputs, and RuntimeError if params changed since.
        """
        result: Tensors = self._structure.pack(self._jacobian.backward(self._like_outputs("vjp", u)))
        return result

    def add_vjp_(self, u: Tensor, into: Tensors, alpha: float | Tensor = 1.0) -> None:
        """Adds alpha J' u to ``into``, tensors like the params, in place and without memory for the product.

        A fully connected layer adds within its matrix product, so the step v - alpha G v of a series writes v alone.
        ``u`` is only read; ``alpha`` is a number or a 0-dim tensor.
        """
        u = self._like_outputs("add_vjp_", u)
        flat = self._flat("add_vjp_", "into", into)
        if isinstance(alpha, bool) or not isinstance(alpha, Real | Tensor):
            raise TypeError(f"linearize.add_vjp_: alpha must be a number or a 0-dim tensor; got {alpha!r}.")
        if isinstance(alpha, Tensor) and alpha.dim():
            got = _lists.shape_name(alpha.shape)
            raise ValueError(f"linearize.add_vjp_: alpha must be a number or a 0-dim tensor; got one of shape {got}.")
        self._jacobian.backward_into(u * alpha, flat)

    def _flat(self, method: str, name: str, tensors: Tensors) -> TensorList:
        caller = f"linearize.{method}"
        flat = self._structure.match(caller, name, tensors)
        _lists.check_like(caller, self._structure.labels(name), flat, self._params)
        return [t.detach() for t in flat]

    def _like_outputs(self, method: str, u: Tensor) -> Tensor:
        caller = f"linearize.{method}"
        if not isinstance(u, Tensor):
            raise TypeError(f"{caller}: u must be a Tensor; got {_lists.value_name(u)}.")
        _lists.check_like(caller, ["u"], [u], [self.outputs])
        return u.detach()


def linearize(
    model: Callable[..., Tensor], inputs: Any, params: Params = None, *, freeze_batch_norm: bool = False
) -> Linearized:
    r"""The Jacobian :math:`J = \partial z / \partial w` of the outputs z of ``model(inputs)`` in ``params`` w, ready
    for many products.

    The model runs once. Each torch function that depends on the params is recorded with what its derivative needs, and
    products with J and :math:`J^\top` are then a sequence of matrix products and convolutions: no autograd, no second
    forward pass. Functions without a rule of their own fall back to autograd, for that part alone; one notice names
    them, and ``.opaque`` lists them. A model that cannot be recorded at all (``.reason`` says why: a tensor written in
    place that another shares, a reentrant checkpoint, autocast) goes by autograd as a whole. The numbers are the same.

    ``model``, ``inputs`` and ``params`` are as for :class:`GaussNewton`: a module or any callable that gives one
    tensor; a tensor, tuple or dict of arguments; None for all params that require grad, tensors, or names and patterns.
    Dropout masks and batch statistics are as they fall in this one call; nothing is modified, and random state is put
    back. A recording is of the params as they were, and refuses to work after they change.

    In training mode, batch normalization is differentiated through the mean and variance of the batch, as autograd
    does. With ``freeze_batch_norm`` they are taken for constants, at the values they have here, so that batch
    normalization no longer makes one example's outputs depend on another. The outputs are the same, and J is that of
    the model with its statistics held; layers in eval mode have constant statistics anyway.

    Raises TypeError or ValueError for bad arguments, and RuntimeError, with the way out, where a fallback needs a
    second derivative that PyTorch does not have.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> jacobian = linearize(model, torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    >>> jacobian.jvp({"weight": torch.tensor([[3.0, 1.0]])})                # X v
    tensor([[5.],
            [1.]])
    >>> jacobian.vjp(torch.tensor([[1.0], [1.0]]))                          # X' u
    {'weight': tensor([[1., 3.]])}
    """
    caller = "linearize"
    if not isinstance(freeze_batch_norm, bool):
        raise TypeError(f"{caller}: freeze_batch_norm must be a bool; got {freeze_batch_norm!r}.")
    wrapped = Model(caller, model, FrozenBatchStatistics if freeze_batch_norm else None)
    flat, structure = wrapped.choose(params)
    replay = Replay()
    try:
        with replay.run() as call:
            outputs, jacobian = recorded(caller, wrapped, inputs, flat, call)
    except Exception as error:  # what the model itself raises it raises again
        reason = str(error) or type(error).__name__
    else:
        notice(caller, jacobian)
        return Linearized(outputs, jacobian, flat, structure, None)
    with replay.run() as call:
        return Linearized(*by_autograd(caller, wrapped, inputs, flat, call), flat, structure, reason)
