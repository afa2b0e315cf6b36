"""The generalized Gauss-Newton matrix, of a model or on tensors at hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _lists
from .._types import SameTensors, Tensors
from ._criteria import Targets
from ._evaluation import check_scalar
from ._gradient import check_params
from ._linearization import Linearization
from ._model import Params
from ._model_curvature import Call, ModelCurvature
from ._plan import Route
from .loss_hessian import LossHessian, gradient_in_outputs, hessian_product, make_loss_hessian


class GaussNewton(ModelCurvature):
    r"""The generalized Gauss-Newton matrix :math:`J^\top H J` of ``criterion(model(inputs), targets)`` in ``params``.

    J is the Jacobian of the model's outputs in the params, H the Hessian of the criterion in the outputs, in the closed
    forms of :func:`loss_hessian`. It is positive semidefinite where H is, and equals the Hessian of the loss for a
    model that is linear in its params.

    ``model`` is an ``nn.Module`` or any callable that gives one tensor [B, ...]. ``torch.compile``d modules run
    eagerly, and of ``DistributedDataParallel`` and ``DataParallel`` the module inside is called, on the batch given
    here alone. ``criterion(outputs, targets)`` includes its reduction over the batch. It does not hold what depends on
    the params directly: add the curvature of a regularizer, ``+ Diagonal(...)`` or ``+ Hessian(...)``. ``inputs`` is a
    tensor, a tuple of arguments or a dict of keyword arguments; ``targets`` one argument of the criterion, or a tuple
    of several. ``params`` is None for all of the module's that require grad (then arguments and results are dicts by
    name), a Tensor, list, tuple or dict of tensors that require grad, or a list of names and shell patterns
    (``["0.weight", "encoder.*"]``), which gives the dict of those.

    The model is evaluated once, when the operator is made, with dropout masks and batch statistics as they fall then,
    and its graph is kept: an operator is of the params as they were, and refuses to work after they change. With
    ``microbatch`` = m, nothing is kept; each product evaluates the model again on m examples at a time, at the params
    as they are then, with the same random numbers each time, so that memory is bounded by m examples. The numbers
    are those of the whole batch, reweighted for a mean (any criterion not known in closed form is taken to be a mean
    over examples unless its ``reduction`` is "sum"). Models that normalize over the batch are refused there.

    Nothing is modified: of what the evaluation does, random state and every in-place write to an older tensor (running
    statistics) are undone bit for bit, after an exception too.

    A product costs about a forward and a backward pass; ``.dense()`` takes many at once. ``route`` says how a Neumann
    series is summed:

    - "loop": by one product after the other.
    - "outputs": in the space of the outputs. The images y = J v of the terms follow y <- q y - alpha J J' H y, with q =
      1 - alpha damping, so J and J' are applied once in 32 terms, J J' in each. That is never formed: a cotangent
      goes back, a tangent comes forward, and a fully connected layer of few rows (examples times positions) adds the
      product with the inner products of its inputs, in place of two products as large as its weight. For any criterion,
      and models whose examples mix. It counts as ``num_terms`` products. A diagonal, several right-hand sides, a series
      that may end early (``rtol``), and 16 bits go by products all the same.
    - "dual": in the span of gradients. For a criterion that is known in closed form and a model whose examples do not
      mix, the matrix is a sum over B C of them (C outputs for each example), whose inner products layers give without
      forming one. Any number of terms costs two passes through the layers and a recurrence of B C numbers.
    - "auto": by the estimates that :meth:`plan` shows.

    Exact inverses with damping, the largest eigenvalue and, for up to 4096 gradients,
    :class:`~nestopt_ext.solvers.Woodbury` go by the span of the gradients, too, unless ``route`` is "loop". The numbers
    are those of the loop to rounding, which adds up over 32 terms at a time in the space of the outputs. What a route
    keeps (inner products of inputs; B C times the outputs of all layers, and a matrix of (B C)^2) lives as long as the
    operator.

    Raises TypeError or ValueError for bad arguments, and RuntimeError, with the way out, where PyTorch has no second
    derivative (cuDNN RNN, a function marked once_differentiable). ``route="dual"`` raises ValueError, with the reason,
    for a model or criterion whose examples cannot be told apart; ``route="outputs"`` for a model that cannot be
    recorded, with ``microbatch``, and unless params and outputs are all float32, or all float64, on one device.

    Source: Schraudolph, Fast curvature matrix-vector products for second-order gradient descent (2002). What has no
    rule of its own is differentiated by reverse mode twice, so it needs no forward-mode rules. That a Gauss-Newton
    matrix can be handled in the span of its examples is in Ren and Goldfarb, Efficient subsampled Gauss-Newton and
    natural gradient methods for training neural networks (2019), for inverses; series, their norms, the double sum
    over positions and the series in the space of the outputs are ours. J J' is the neural tangent kernel of Jacot,
    Gabriel, Hongler (2018).

    >>> import torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> x, y = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.zeros(2, 1)
    >>> ggn = GaussNewton(model, torch.nn.MSELoss(), x, y)              # 2 X' X / 2
    >>> ggn.dense()
    tensor([[1., 2.],
            [2., 5.]])
    >>> ggn({"weight": torch.tensor([[1.0, 0.0]])})
    {'weight': tensor([[1., 2.]])}
    >>> GaussNewton(model, torch.nn.MSELoss(), x, y, route="dual").plan(20).rows
    2
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        criterion: Callable[..., Tensor],
        inputs: Any,
        targets: Any,
        params: Params = None,
        *,
        microbatch: int | None = None,
        route: Route = "auto",
    ) -> None:
        super().__init__(model, criterion, inputs, targets, params, microbatch, route)

    def _middle(self, call: Call, outputs: Tensor, targets: Targets, share: float) -> LossHessian:
        hessian = make_loss_hessian("GaussNewton", self._criterion, outputs, targets, self._total)
        known = hessian.name != "double_backward"  # and then divided by what the whole batch is divided by
        return hessian if known or share == 1.0 else hessian.scaled(share)


def ggnvp(loss: Tensor | LossHessian, outputs: Tensor, params: SameTensors, v: Tensors) -> SameTensors:
    r"""The generalized Gauss-Newton matrix times ``v``: :math:`J^\top H J v`, on tensors you already have.

    J is the Jacobian of ``outputs``, a tensor of any shape with a graph, in ``params`` (Tensor, list, tuple or dict of
    float32, float64, bfloat16 or float16 tensors that require grad). H is the Hessian in ``outputs`` of ``loss``, a
    scalar tensor that was computed from ``outputs``, by double backward; or a :class:`LossHessian` made for these
    outputs, in closed form. What ``loss`` holds besides (a penalty on the params) does not enter. ``v`` is like the
    params.

    Returns new tensors without graph in the structure of ``params``; both graphs stay alive, and nothing is modified.
    Params that ``outputs`` do not depend on give zeros. For many products make a :class:`GaussNewton`.

    Raises TypeError or ValueError for bad arguments, among them a loss that was not computed from ``outputs``, and
    RuntimeError, with the way out, where PyTorch has no second derivative.

    >>> import torch
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> outputs = w[0] * w[1:]                                       # J = [w1, w0]
    >>> ggnvp(outputs.square().sum(), outputs, w, torch.tensor([1.0, 0.0]))     # J' 2 J v
    tensor([8., 4.])
    """
    flat, structure = _lists.flatten("ggnvp", "params", params)
    check_params("ggnvp", "params", structure.labels("params"), flat)
    vector = structure.match("ggnvp", "v", v)
    _lists.check_like("ggnvp", structure.labels("v"), vector, flat)
    if not isinstance(outputs, Tensor):
        raise TypeError(f"ggnvp: outputs must be a Tensor; got {_lists.value_name(outputs)}.")
    _lists.check_floating("ggnvp", ["outputs"], [outputs])
    if not outputs.requires_grad:
        raise ValueError("ggnvp: outputs must have a graph; got a tensor that does not require grad.")
    if isinstance(loss, LossHessian):
        _lists.check_like("ggnvp", ["outputs"], [outputs], [loss.outputs])
        gradient = None
    elif isinstance(loss, Tensor):
        check_scalar("ggnvp", "loss", loss)
        gradient = gradient_in_outputs("ggnvp", "loss", loss, outputs)
    else:
        got = _lists.value_name(loss)
        raise TypeError(f"ggnvp: loss must be a scalar tensor or a LossHessian; got {got}.")
    jacobian = Linearization("ggnvp", "outputs", outputs, flat)
    with torch.no_grad():
        u = jacobian.forward([t.detach() for t in vector])
        if gradient is None:
            assert isinstance(loss, LossHessian)
            h = loss(u)
        else:
            h = hessian_product("ggnvp", "loss", gradient, outputs, u)
        result: SameTensors = structure.pack(jacobian.backward(h))
    return result
