"""Hessian products by forward mode over reverse mode: the derivative of a gradient along a vector."""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from .. import _lists
from .._types import Loss, TensorList
from ._evaluation import Replay, check_scalar
from ._gradient import _refuse_error_nodes, named_faults
from ._vjp import owned

#: All wrappers that ``once_differentiable`` makes run this code.
_ONCE = once_differentiable(lambda ctx: None).__code__


class ForwardOverReverse:
    """A scalar loss that is evaluated again for each product, with a tangent on its params.

    The gradient of a loss of dual numbers has the Hessian product as its tangent. No graph of a gradient is built, so a
    product takes the memory of about two gradients and none is kept.
    """

    def __init__(self, caller: str, name: str, loss: Loss, params: TensorList, labels: list[str]) -> None:
        self._caller = caller
        self._name = name
        self._params = params
        if isinstance(loss, Tensor) or not callable(loss):
            raise TypeError(
                f"{caller}: {name} must be a zero-argument closure with mode 'forward-over-reverse';"
                f" got {_lists.value_name(loss)}. Wrap its computation in a function."
            )
        for label, param in zip(labels, params, strict=True):
            if not param.is_leaf:
                raise ValueError(
                    f"{caller}: {label} must be a leaf with mode 'forward-over-reverse'; got one computed from others."
                    " Use mode='double-backward'."
                )
        self._closure = loss
        self._replay = Replay()

    def check(self) -> None:
        """Finds the faults of the loss before the first product: one evaluation and its gradient."""
        self._gradient()

    def _gradient(self) -> list[Tensor | None]:
        with self._replay.run() as call, named_faults(self._caller, self._name):
            evaluation = call(self._closure)
        loss = evaluation.value
        check_scalar(self._caller, self._name, loss)
        with evaluation.differentiating(), named_faults(self._caller, self._name):
            _refuse_once_differentiable(loss)
            _refuse_error_nodes([loss])
            grads = torch.autograd.grad(loss, self._params, allow_unused=True)
        if all(g is None for g in grads):
            raise ValueError(
                f"{self._caller}: {self._name} must depend on params;"
                f" got a graph that none of the {len(self._params)} tensors is in."
            )
        return list(grads)

    def product(self, v: TensorList) -> TensorList:
        """The Hessian times ``v``, a list like the params."""
        params = self._params
        with forward_ad.dual_level():
            # A tangent is put on a leaf by writing to it, here the values that it has, so its bits never change.
            with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tuple(params)):  # type: ignore[attr-defined]
                for param, tangent in zip(params, v, strict=True):
                    param.copy_(forward_ad.make_dual(param.detach().clone(), tangent))  # type: ignore[no-untyped-call]
            tangents = [None if g is None else _tangent(g) for g in self._gradient()]
        return owned(
            [torch.zeros_like(p) if t is None else t.detach() for p, t in zip(params, tangents, strict=True)], v
        )


def _tangent(dual: Tensor) -> Tensor | None:
    tangent: Tensor | None = forward_ad.unpack_dual(dual).tangent  # type: ignore[no-untyped-call]
    return tangent


def _refuse_once_differentiable(loss: Tensor) -> None:
    """Their backward runs outside of autograd, and may lose tangents in silence."""
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        function = getattr(type(node), "_forward_cls", None)
        if getattr(getattr(function, "backward", None), "__code__", None) is _ONCE:
            raise RuntimeError(f"{getattr(function, '__name__', '')} is marked with @once_differentiable")
        seen.add(node)
        waiting.extend(following for following, _ in node.next_functions)
