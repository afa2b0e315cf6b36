"""The gradient of an outer loss in hyperparameters, by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._types import Loss, MatVec, TensorList, Tensors
from ..curvature._evaluation import evaluate, preserved_rng
from ..curvature._gradient import named_faults
from ..curvature._vjp import backward
from ..solvers import Neumann, Solver
from ..solvers._outcome import warn
from ..solvers._solve import Inverse
from ._problem import InnerProblem, Variables
from .fixed_point import FixedPointMap

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def hypergradient(
    outer_loss: Loss,
    inner_loss: Loss | FixedPointMap,
    params: Tensors,
    hparams: Tensors,
    *,
    solver: Solver = Neumann(),  # noqa: B008  a frozen value
    curvature: MatVec | None = None,
    process_group: ProcessGroup | None = None,
) -> tuple[Tensor, ...]:
    r"""The gradient of ``outer_loss`` in ``hparams``, where ``params`` minimize ``inner_loss`` and so depend on
    ``hparams``.

    .. math:: \frac{dL_V}{d\lambda} = \frac{\partial L_V}{\partial\lambda}
              - \frac{\partial L_V}{\partial w} \, A^{-1} \, \frac{\partial^2 L_T}{\partial w \, \partial\lambda^\top}

    with w = ``params``, lambda = ``hparams``, L_T = ``inner_loss``, L_V = ``outer_loss`` and A the ``curvature``. It is
    exact where w minimizes L_T, A is the Hessian of L_T, and ``solver`` inverts it.

    Losses are scalar tensors with a graph, computed from the params as they are now, whose graphs stay alive, or
    zero-argument closures that return one, each called once; both give the same numbers. ``params`` and ``hparams`` are
    a Tensor, list, tuple or dict of float32, float64, bfloat16 or float16 tensors that require grad; ``hparams`` may be
    of any number and size and need not be leaves. ``solver`` is one of ``nestopt_ext.solvers`` with its options.
    ``curvature`` is None for the Hessian of ``inner_loss``, a curvature operator on the same params in any order, or
    any callable that returns A times tensors like ``params``.

    In place of ``inner_loss`` a :class:`FixedPointMap` may stand, where the params solve w = Phi(w, lambda) instead of
    minimizing a loss.

    Returns a tuple, one new tensor without graph for each of ``hparams`` in order; zeros for one that no loss uses.
    Nothing is modified: not the params, not any ``.grad``, and of what a closure does, random state on CPU and CUDA and
    every in-place write to an older tensor (running statistics, counters) is undone bit for bit, after an exception
    too.

    With a ``process_group`` (``torch.distributed.group.WORLD``) each loss is the mean, over its ranks, of what the rank
    computes from examples of its own, as many on each: the outer gradient, every product with the curvature (one
    all-reduce) and the result are averaged, so that all ranks return the same bits. All must call it at the same point.

    A series that diverges or meets NaN or Inf gives one RuntimeWarning, and the numbers as they are. Raises TypeError
    or ValueError for bad arguments (a loss without a graph, a param that does not require grad, hparams that neither
    loss uses), and RuntimeError, with the way out, where PyTorch has no second derivative, a graph was freed, or what
    it uses was changed in place since.

    Source: Lorraine, Vicol, Duvenaud, Optimizing millions of hyperparameters by implicit differentiation (2020). Here
    the inverse carries its factor alpha, and the implicit part is subtracted from the direct one.

    >>> import torch
    >>> w = torch.tensor(1.5, requires_grad=True)            # minimizes w^2 - 3 h w, so w = 1.5 h
    >>> h = torch.tensor(1.0, requires_grad=True)
    >>> outer, inner = 0.5 * w**2, w**2 - 3 * h * w
    >>> hypergradient(outer, inner, w, h, solver=Neumann(num_terms=60, alpha=0.4))      # w dw/dh = 1.5 * 1.5
    (tensor(2.2500),)
    """
    caller = "hypergradient"
    variables = Variables(caller, params, hparams, all_hparams=True)
    found = implicit_gradient(variables, outer_loss, inner_loss, solver, lambda: curvature, process_group=process_group)
    if found.solve is not None:
        warn(caller, found.solve.verdict)
    return found.grads


@dataclass(frozen=True)
class ImplicitGradient:
    """A hypergradient, the outer loss it is of, and the solve behind it, None where no param is in the outer loss."""

    grads: tuple[Tensor, ...]
    outer_loss: Tensor
    solve: Inverse | None


def implicit_gradient(
    variables: Variables,
    outer_loss: Loss,
    inner_loss: Loss | FixedPointMap,
    solver: Solver,
    curvature: Callable[[], MatVec | None],
    *,
    start: TensorList | None = None,
    process_group: ProcessGroup | None = None,
) -> ImplicitGradient:
    """The hypergradient with what there is to know of its solve, which begins at ``start``; never warns.

    ``curvature`` is asked for the operator between the evaluation of the outer loss and that of the inner one.
    """
    caller = variables.caller
    hparams = variables.hparams
    with preserved_rng():
        loss, in_params, in_hparams = outer_gradients(caller, outer_loss, variables)
        inner = InnerProblem(variables, inner_loss, solver, curvature(), process_group)
        solve = inner.solve(in_params, start)
        response = [None] * len(hparams) if solve is None else inner.carry(solve.value, hparams)
        direct = inner.mean(in_hparams, hparams)
        if all(t is None for t in (*direct, *response)) and not inner.uses(hparams):
            raise ValueError(
                f"{caller}: hparams must be used by outer_loss or inner_loss; got {len(direct)} in neither graph."
                " Compute the losses from these very tensors, not from copies or .data."
            )
    return ImplicitGradient(differences(direct, response, hparams), loss, solve)


def outer_gradients(
    caller: str, outer_loss: Loss, variables: Variables
) -> tuple[Tensor, Sequence[Tensor | None], Sequence[Tensor | None]]:
    """The outer loss, and its gradients in params and in hparams, None where it uses none."""
    outer = evaluate(caller, "outer_loss", outer_loss)
    inputs = [*variables.params, *variables.hparams]
    with outer.differentiating(), named_faults(caller, "outer_loss"):
        grads = backward([outer.loss], inputs, [torch.ones_like(outer.loss)])
    if all(g is None for g in grads):
        raise ValueError(f"{caller}: outer_loss must depend on params or hparams; got a graph that none of them is in.")
    size = len(variables.params)
    return outer.loss.detach(), grads[:size], grads[size:]


def differences(
    direct: Sequence[Tensor | None], response: Sequence[Tensor | None], like: TensorList
) -> tuple[Tensor, ...]:
    """The direct part less the response, in memory of its own; None stands for zero."""
    known = [t.detach() for t in response if t is not None]
    if len(known) == len(like) and all(t is None for t in direct):
        return tuple(torch._foreach_neg(known))
    return tuple(map(_difference, direct, response, like))


def _difference(direct: Tensor | None, response: Tensor | None, like: Tensor) -> Tensor:
    if response is not None:
        return response.detach().neg() if direct is None else direct.detach() - response.detach()
    return torch.zeros_like(like) if direct is None else direct.detach().clone(memory_format=torch.contiguous_format)
