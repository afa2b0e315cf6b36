"""The first gradient of a loss, kept with its graph: Hessian products and mixed products are its derivatives."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .. import _lists
from .._types import Loss, TensorList
from ._evaluation import evaluate
from ._replay import Replay

#: What PyTorch says where it has no second derivative, what to call it, and the way out.
_NO_SECOND_DERIVATIVE = (
    (
        "scaled_dot_product",
        "a fused scaled-dot-product attention",
        "Run the forward pass under torch.nn.attention.sdpa_kernel(SDPBackend.MATH).",
    ),
    (
        "aot_autograd",
        "a module compiled by torch.compile",
        "Pass the module before compilation, or run it under torch.compiler.set_stance('force_eager').",
    ),
    (
        "cudnn_rnn",
        "a cuDNN RNN",
        "Run the forward pass under torch.backends.cudnn.flags(enabled=False).",
    ),
    (
        "once_differentiable",
        "an autograd.Function marked once_differentiable",
        "Write its backward with differentiable operations.",
    ),
    (
        "is not implemented",
        "an operation without one",
        "Write that operation with elementary ones, or use a curvature that needs first derivatives only.",
    ),
)


@contextmanager
def named_faults(caller: str, name: str) -> Iterator[None]:
    """Says whose loss it was, and what to do, when PyTorch cannot differentiate it."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        text = str(error)
        cause = text.partition("\n")[0]
        if "backward through the graph a second time" in text:
            raise RuntimeError(
                f"{caller}: {name} must still have its graph; got one that was freed by an earlier backward pass."
                " Keep it with retain_graph=True, or pass a closure."
            ) from error
        if "modified by an inplace operation" in text:
            raise RuntimeError(
                f"{caller}: {name} must be computed from the params as they are; got params, or another tensor it uses,"
                f" changed in place since. Compute it and call {caller} after such a change (an optimizer step is one),"
                " or pass a closure."
            ) from error
        for sign, operation, remedy in _NO_SECOND_DERIVATIVE:
            if sign in text:
                raise RuntimeError(
                    f"{caller}: {name} must be twice differentiable; got {operation} (PyTorch: {cause}). {remedy}"
                ) from error
        raise


def check_params(caller: str, name: str, labels: Sequence[str], tensors: Sequence[Tensor]) -> None:
    """Tensors that can be differentiated with respect to: at least one, floating, requiring grad, none twice."""
    if not tensors:
        raise ValueError(f"{caller}: {name} must hold at least one tensor; got none.")
    _lists.check_floating(caller, labels, tensors)
    first: dict[int, str] = {}
    for label, tensor in zip(labels, tensors, strict=True):
        if not tensor.requires_grad:
            raise ValueError(
                f"{caller}: {label} must require grad; got one that does not. Call .requires_grad_() on it."
            )
        if id(tensor) in first:
            raise ValueError(
                f"{caller}: {label} must be a tensor of its own; got the same as {first[id(tensor)]}. Pass it once."
            )
        first[id(tensor)] = label


def _refuse_error_nodes(grads: Sequence[Tensor]) -> None:
    """Raises what the error nodes in the graph of ``grads`` stand for.

    Such a node has no edge to the params, so autograd would not visit it, and would leave out its part of the product
    in silence.
    """
    if any(node.name() == "torch::autograd::Error" for node in _nodes(grads)):
        raise RuntimeError("trying to differentiate twice a function that was marked with @once_differentiable")


def _nodes(tensors: Sequence[Tensor]) -> set[Node]:
    """The nodes of the graphs of ``tensors``."""
    waiting = [t.grad_fn for t in tensors]
    seen: set[Any] = {None}
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]  # type: ignore[union-attr]
    seen.remove(None)
    return seen


class Gradient:
    """The gradient of a scalar loss in ``params``, ready to be differentiated again and again."""

    def __init__(self, caller: str, name: str, loss: Loss, params: TensorList) -> None:
        self._caller = caller
        self._name = name
        self._params = params
        self._evaluation = evaluate(caller, name, loss)
        value = self._evaluation.loss
        with torch.enable_grad(), self._differentiating():
            # A seed that requires grad makes every once_differentiable function leave its error node in the graph. Only
            # functions written in Python are so marked, and without them the seed would only make the graph larger.
            in_python = any(isinstance(n, torch.autograd.function.BackwardCFunction) for n in _nodes([value]))
            seed = torch.ones_like(value, requires_grad=True) if in_python else None
            grads = torch.autograd.grad(value, params, seed, create_graph=True, allow_unused=True)
            if in_python:
                _refuse_error_nodes([g for g in grads if g is not None])
        if all(g is None for g in grads):
            raise ValueError(
                f"{caller}: {name} must depend on params; got a graph that none of the {len(params)} tensors is in."
            )
        self._live = [i for i, g in enumerate(grads) if g is not None and g.requires_grad]
        self._grads = [grads[i] for i in self._live]
        # Without self, a cycle through which would keep the graph alive.
        self._products = Replay(functools.partial(_product, self._grads, self._live, params), params)

    def expect(self, num_products: int) -> None:
        """Says that so many products are about to come, which may be worth a preparation."""
        self._products.expect(num_products)

    def product(self, v: TensorList) -> TensorList:
        """The Hessian times ``v``, a list like the params; shares no memory with ``v``."""
        with self._differentiating():
            return self._products(v)

    def mixed(self, hparams: TensorList, v: TensorList) -> list[Tensor | None]:
        """``v`` times the derivative of the gradient in ``hparams``; None where the gradient does not depend on one."""
        with self._differentiating():
            return _vjp(self._grads, self._live, hparams, v)

    def loss_uses(self, hparams: TensorList) -> bool:
        """Whether any of ``hparams`` is in the graph of the loss itself."""
        with self._differentiating():
            grads = torch.autograd.grad(self._evaluation.loss, hparams, retain_graph=True, allow_unused=True)
        return any(g is not None for g in grads)

    @contextmanager
    def _differentiating(self) -> Iterator[None]:
        with self._evaluation.differentiating(), named_faults(self._caller, self._name):
            yield


def _product(grads: TensorList, live: list[int], params: TensorList, v: TensorList) -> TensorList:
    """The product by autograd."""
    found = _vjp(grads, live, params, v)
    return _lists.unshare([torch.zeros_like(p) if h is None else h for p, h in zip(params, found, strict=True)], v)


def _vjp(grads: TensorList, live: list[int], inputs: TensorList, v: TensorList) -> list[Tensor | None]:
    """``v`` times the derivative in ``inputs`` of those gradients that have one."""
    if not live:
        return [None] * len(inputs)
    cotangents = [v[i] for i in live]
    return list(torch.autograd.grad(grads, inputs, cotangents, retain_graph=True, allow_unused=True))
