"""The solution of an inner problem as a differentiable function of its hyperparameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .._types import Loss, MatVec, SameTensors, Tensors
from ..curvature._evaluation import preserved_rng
from ..solvers import Neumann, Solver
from ._problem import InnerProblem, Variables
from .fixed_point import FixedPointMap

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_CALLER = "best_response"


def best_response(
    inner_loss: Loss | FixedPointMap,
    params: SameTensors,
    hparams: Tensors,
    *,
    solver: Solver = Neumann(),  # noqa: B008  a frozen value
    curvature: MatVec | None = None,
    process_group: ProcessGroup | None = None,
) -> SameTensors:
    r"""The params as the minimizer of ``inner_loss``, whose backward pass sends the implicit gradient to ``hparams``.

    The value is that of ``params``; the derivative is :math:`dw/d\lambda = -A^{-1} \, \partial^2 L_T / \partial w \,
    \partial\lambda^\top`. So ``outer_loss(best_response(...), hparams).backward()`` fills the ``.grad`` of the hparams
    with what :func:`hypergradient` returns, the direct part included, and leaves that of the params alone.

    ``inner_loss`` is a scalar tensor with a graph, or a zero-argument closure that returns one; it is called once,
    here, and what it does to random state and to older tensors is undone. ``params`` are a Tensor, list, tuple or dict
    of tensors that require grad; of ``hparams`` at least one must, and they need not be leaves. ``solver`` and
    ``curvature`` are as in :func:`hypergradient`, and so is a :class:`FixedPointMap` in place of ``inner_loss``.

    With a ``process_group`` the backward pass averages over its ranks as :func:`hypergradient` does, except for the
    direct part, which is the rank's own: average the ``.grad`` of the hparams afterwards, as for any data-parallel
    training. Every rank must run the backward pass.

    Returns new tensors in the structure of ``params``. The result has a first derivative only: differentiating twice,
    or in forward mode, raises an error. Errors and warnings are those of :func:`hypergradient`; the solve runs in the
    backward pass.

    >>> import torch
    >>> w = torch.tensor(1.5, requires_grad=True)            # minimizes w^2 - 3 h w, so w = 1.5 h
    >>> h = torch.tensor(1.0, requires_grad=True)
    >>> best = best_response(w**2 - 3 * h * w, w, h, solver=Neumann(num_terms=60, alpha=0.4))
    >>> (0.5 * best**2 + h).backward()
    >>> h.grad, w.grad                                       # w dw/dh + 1
    (tensor(3.2500), None)
    """
    variables = Variables(_CALLER, params, hparams, all_hparams=False)
    inner = InnerProblem(variables, inner_loss, solver, curvature, process_group)
    best = _Response.apply(inner, len(variables.params), *variables.params, *variables.hparams)  # type: ignore[no-untyped-call]
    result: SameTensors = variables.structure.pack(list(best))
    return result


class _Response(torch.autograd.Function):
    """Copies of the params forward, the implicit gradient backward."""

    @staticmethod
    def forward(ctx: Any, inner: InnerProblem, num_params: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.inner = inner
        ctx.params = list(tensors[:num_params])
        ctx.hparams = list(tensors[num_params:])
        return tuple(p.detach().clone() for p in ctx.params)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = [i for i, h in enumerate(ctx.hparams) if ctx.needs_input_grad[2 + len(ctx.params) + i]]
        found: list[Tensor | None] = [None] * len(ctx.hparams)
        if wanted:
            with preserved_rng():
                response = ctx.inner.response(grads, [ctx.hparams[i] for i in wanted])
            for i, part in zip(wanted, response, strict=True):
                found[i] = None if part is None else part.detach().neg()
        if torch.is_grad_enabled():
            given = [g for g in grads if g is not None]
            refuse: Any = _NoSecondDerivative.apply
            found = [None if f is None else refuse(f, *ctx.hparams, *given) for f in found]
        return (None, None, *[None] * len(ctx.params), *found)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            f"{_CALLER}: the result must be differentiated in reverse mode; got forward mode."
            " Use .backward() or torch.autograd.grad."
        )


class _NoSecondDerivative(torch.autograd.Function):
    """Passes its first argument on, and refuses to be differentiated in place of giving a wrong zero."""

    @staticmethod
    def forward(ctx: FunctionCtx, value: Tensor, *_: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> Any:
        raise RuntimeError(
            f"{_CALLER}: the result must be differentiated once; got a second differentiation."
            " Drop create_graph=True, or unroll the inner problem."
        )
