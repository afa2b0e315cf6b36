"""A function of params, linearized where it was evaluated: products with its Jacobian J and with J'."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .._types import TensorList
from ._evaluation import Evaluation
from ._gradient import _refuse_error_nodes, named_faults
from ._vjp import vjp, vjps


class Linearization:
    r"""The Jacobian J of ``outputs``, a tensor of any shape with a graph, in ``params``.

    J' u is a backward pass. It is linear in u, so J v is its derivative in u with the cotangent v: a backward pass
    through the graph of a backward pass, which is built once and kept.
    """

    def __init__(
        self, caller: str, name: str, outputs: Tensor, params: TensorList, evaluation: Evaluation | None = None
    ) -> None:
        self._caller = caller
        self._name = name
        self._params = params
        self._outputs = outputs
        self._evaluation = evaluation or Evaluation(outputs, [], [])
        with torch.enable_grad(), self._differentiating():
            # That the seed requires grad also makes every once_differentiable function leave its error node behind.
            self._seed = torch.zeros_like(outputs, requires_grad=True)
            grads = torch.autograd.grad(outputs, params, self._seed, create_graph=True, allow_unused=True)
            _refuse_error_nodes([g for g in grads if g is not None])
        if all(g is None for g in grads):
            raise ValueError(
                f"{caller}: {name} must depend on params; got a graph that none of the {len(params)} tensors is in."
            )
        self._live = [i for i, g in enumerate(grads) if g is not None and g.requires_grad]
        self._grads = [grads[i] for i in self._live]

    def forward(self, v: TensorList) -> Tensor:
        """J v, like the outputs."""
        with self._differentiating():
            return vjp(self._grads, [self._seed], [v[i] for i in self._live])[0]

    def forwards(self, v: TensorList) -> Tensor:
        """J v for k lists, [k, *shape] for each param; [k, *shape of the outputs]."""
        with self._differentiating():
            return vjps(self._grads, [self._seed], [v[i] for i in self._live])[0]

    def backward(self, u: Tensor) -> TensorList:
        """J' u, a list like the params."""
        with self._differentiating():
            return vjp([self._outputs], self._params, [u])

    def backwards(self, u: Tensor) -> TensorList:
        """J' u for k tensors, [k, *shape of the outputs]; [k, *shape] for each param."""
        with self._differentiating():
            return vjps([self._outputs], self._params, [u])

    def backward_into(self, u: Tensor, into: TensorList) -> None:
        """Adds J' u to ``into``, in place."""
        torch._foreach_add_(into, self.backward(u))

    @contextmanager
    def _differentiating(self) -> Iterator[None]:
        with self._evaluation.differentiating(), named_faults(self._caller, self._name):
            yield
