"""Params that solve a fixed-point equation, in place of minimizing a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _lists
from .._types import TensorList, Tensors
from ..curvature._evaluation import Evaluation, observe
from ..curvature._gradient import _refuse_error_nodes, named_faults

_NAME = "FixedPointMap.step"


@dataclass(frozen=True)
class FixedPointMap:
    r"""The map :math:`\Phi` of an inner problem :math:`w = \Phi(w, \lambda)`, in place of ``inner_loss``.

    ``step`` is a zero-argument closure that applies the map once, to the params as they are, and returns tensors like
    them; or those tensors, already computed, with their graph. :func:`hypergradient` and :func:`best_response` take the
    map where they take a loss. With A = I - dPhi/dw,

    .. math:: \frac{dw}{d\lambda} = A^{-1} \, \frac{\partial\Phi}{\partial\lambda}, \qquad
              \frac{dL_V}{d\lambda} = \frac{\partial L_V}{\partial\lambda}
              + \frac{\partial L_V}{\partial w} \, A^{-1} \, \frac{\partial\Phi}{\partial\lambda} .

    A is not symmetric unless dPhi/dw is; the solver is given products with its transpose, u - (dPhi/dw)' u, one
    backward pass through a single step each. So use a solver that asks for no symmetry: ``FixedPoint()`` takes steps
    u <- (dPhi/dw)' u + g from u = 0, with g = dL_V/dw, until they converge, which they do where Phi is a contraction;
    ``Neumann(num_terms=K, alpha=1.0)`` takes K + 1 of them. Solvers that need symmetry are refused. There is no
    ``curvature`` to choose. For Phi = w - a dL/dw, with the graph of the gradient, the result is that of the loss L
    with ``Neumann(num_terms=K, alpha=a)``.

    The closure is called once, and what it does to random state and to older tensors is undone. Params should be at the
    fixed point: the distance that is left goes into the result.

    Raises TypeError or ValueError, in the functions that take it, where the tensors do not match the params, have no
    graph, or use none of the params.

    Source: implicit differentiation of fixed points as in Grazzi et al., On the iteration complexity of hypergradient
    computation (2020). Here the map is applied once, not at every product.

    >>> import torch
    >>> from nestopt_ext.hypergrad import hypergradient
    >>> from nestopt_ext.solvers import Neumann
    >>> w = torch.tensor(2.0, requires_grad=True)            # w = 0.5 w + h, so w = 2 h
    >>> h = torch.tensor(1.0, requires_grad=True)
    >>> phi = FixedPointMap(lambda: 0.5 * w + h)
    >>> hypergradient(0.5 * w**2, phi, w, h, solver=Neumann(num_terms=40, alpha=1.0))        # w dw/dh
    (tensor(4.),)
    """

    step: Tensors | Callable[[], Tensors]


class FixedPointEquation:
    """params - Phi(params, hparams) = 0, with the graph of one application of the map."""

    def __init__(
        self, caller: str, fixed_point: FixedPointMap, params: TensorList, structure: _lists.Structure
    ) -> None:
        self._caller = caller
        self._params = params
        step = fixed_point.step
        self._evaluation = observe(step) if callable(step) else Evaluation(step, [], [])
        flat = structure.match(caller, _NAME, self._evaluation.value, returned=callable(step))
        _lists.check_like(caller, structure.labels(_NAME), flat, params)
        self._live = [i for i, t in enumerate(flat) if t.requires_grad]
        self._outputs = [flat[i] for i in self._live]
        if not self._live:
            raise ValueError(
                f"{caller}: {_NAME} must have a graph; got tensors that do not require grad."
                " Compute them with grad mode on, from the params, without .detach()."
            )
        with self._differentiating():
            _refuse_error_nodes(self._outputs)
        if not self.uses(params):
            raise ValueError(f"{caller}: {_NAME} must depend on params; got a graph that none of them is in.")

    def product(self, v: TensorList) -> TensorList:
        """``v`` - ``v`` dPhi/dparams, in new memory."""
        return [t.clone() if d is None else t - d for t, d in zip(v, self._vjp(self._params, v), strict=True)]

    def mixed(self, hparams: TensorList, v: TensorList) -> list[Tensor | None]:
        """- ``v`` dPhi/dhparams; None where the map does not depend on one."""
        return [None if d is None else -d for d in self._vjp(hparams, v)]

    def uses(self, tensors: TensorList) -> bool:
        """Whether the map depends on any of ``tensors``."""
        return any(d is not None for d in self._vjp(tensors, self._params))

    def _vjp(self, inputs: TensorList, v: TensorList) -> list[Tensor | None]:
        cotangents = [v[i].detach() for i in self._live]
        with self._differentiating():
            return list(torch.autograd.grad(self._outputs, inputs, cotangents, retain_graph=True, allow_unused=True))

    @contextmanager
    def _differentiating(self) -> Iterator[None]:
        with self._evaluation.differentiating(), named_faults(self._caller, _NAME):
            yield
