"""Ops as differentiable functions, closed under differentiation.

Backward and forward-mode derivatives of each are written with the same function, so that every order of derivative
exists and none is silently zero.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _ops, _reference


def softmax_hessian(logits: Tensor, u: Tensor, row_weight: Tensor) -> Tensor:
    r"""The Hessian of weighted cross-entropies in the logits, times ``u``: :math:`w\,(\mathrm{diag}(p) - p p^\top)\,u`
    for each row, with :math:`p = \mathrm{softmax}(z)`.

    This is :math:`\partial^2 / \partial z^2` of :math:`w \cdot \mathrm{CE}(z, t)` whatever the target t: class indices,
    probabilities and label smoothing drop out, class weights and ``ignore_index`` only enter w.

    ``logits`` (z) and ``u`` are [..., C] of one shape, float32, float64, bfloat16 or float16; ``u`` has the dtype of
    ``logits``, or float32 beside 16 bits. ``row_weight`` (w) is [...], float32 or float64. Returns a new tensor like
    ``u``; nothing is modified. Differentiable to any order in all three, in reverse and forward mode, and under
    ``torch.vmap``.

    Sums are taken in float64, and classes that hold nearly all of p keep their relative accuracy. A logit of -inf is a
    class left out; a row whose largest logit is infinite gives NaN. A row of weight 0 gives zeros even if it holds NaN,
    and then zeros for its derivatives in ``logits`` and ``u``.

    Raises TypeError or ValueError for bad arguments. ``torch.compile`` breaks its graph here, since it takes no
    functions with a forward-mode derivative of their own.

    >>> import torch
    >>> softmax_hessian(torch.zeros(2), torch.tensor([1.0, 0.0]), torch.tensor(8.0))   # p = (1/2, 1/2)
    tensor([ 2., -2.])
    """
    _check(logits, u, row_weight)
    result: Tensor = _SoftmaxHessian.apply(logits, u, row_weight)  # type: ignore[no-untyped-call]
    return result


def _check(logits: Tensor, u: Tensor, row_weight: Tensor) -> None:
    if logits.dim() == 0:
        raise ValueError("softmax_hessian: logits must have a last dimension, the classes; got shape ().")
    for name, found, wanted, rule in (
        ("u", u.shape, logits.shape, "the shape of logits"),
        ("row_weight", row_weight.shape, logits.shape[:-1], "a number for each row of logits, shape"),
    ):
        if found != wanted:
            raise ValueError(f"softmax_hessian: {name} must have {rule} {tuple(wanted)}; got {tuple(found)}.")


def softmax_hessian_(u: Tensor, logits: Tensor, row_weight: Tensor) -> None:
    """The op on any leading dimensions, in place and without graph; ``u`` is contiguous."""
    if u.dim() == 2:
        _ops.softmax_hessian_(u, logits, row_weight)
        return
    if logits.dim() > 2 and logits.stride(0) == 0 and logits.shape[0] > 1:  # the same logits again: no copies of them
        for i in range(logits.shape[0]):
            softmax_hessian_(u[i], logits[i], row_weight[i])
        return
    rows = row_weight.numel()
    matrix = (rows, logits.shape[-1])
    _ops.softmax_hessian_(u.view(matrix), logits.reshape(matrix), row_weight.reshape(rows))


def _centred(p: Tensor, x: Tensor) -> Tensor:
    """The deviation of x from its mean under p."""
    return x - (p * x).sum(-1, keepdim=True)


def _third(logits: Tensor, x: Tensor, y: Tensor, row_weight: Tensor) -> Tensor:
    r"""The third derivative of :math:`w\,\mathrm{logsumexp}` applied to x and y, symmetric in them.

    It is sum_c p_c (x_c - m_x)(y_c - m_y)(s_c - m_s) in the third direction s, and so the Hessian applied to the
    product of the first two factors.
    """
    math = _reference.opmath(logits.dtype)
    z, x, y = (t.to(math) for t in (logits, x, y))
    finite = z.logsumexp(-1).isfinite() & x.isfinite().all(-1) & y.isfinite().all(-1)
    # A NaN in a row of no weight must not come back through derivatives: 0 * NaN is NaN.
    wanted = (finite | (row_weight != 0)).unsqueeze(-1)
    z, x, y = (torch.where(wanted, t, 0.0) for t in (z, x, y))
    p = z.softmax(-1)
    return softmax_hessian(logits, _centred(p, x) * _centred(p, y), row_weight)


def _unweighted(logits: Tensor, u: Tensor, row_weight: Tensor) -> Tensor:
    return softmax_hessian(logits, u, torch.ones_like(row_weight))


class _SoftmaxHessian(torch.autograd.Function):
    @staticmethod
    def forward(logits: Tensor, u: Tensor, row_weight: Tensor) -> Tensor:
        if any(map(torch._C._functorch.is_legacy_batchedtensor, (logits, u, row_weight))):
            return _reference.softmax_hessian(logits, u, row_weight)  # is_grads_batched, which has no rules for ops
        result = u.clone(memory_format=torch.contiguous_format)
        softmax_hessian_(result, logits, row_weight)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)  # a tangent of zeros would meet the NaN of a row of no weight
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if grad is None:
            return None, None, None
        logits, u, row_weight = ctx.saved_tensors
        of_logits = of_u = of_weight = None
        if ctx.needs_input_grad[0]:
            of_logits = _third(logits, u, grad, row_weight).to(logits.dtype)
        if ctx.needs_input_grad[1]:
            of_u = softmax_hessian(logits, grad, row_weight)
        if ctx.needs_input_grad[2]:
            product = _unweighted(logits, u, row_weight)
            math = _reference.opmath(u.dtype)
            of_weight = (grad.to(math) * product.to(math)).sum(-1).to(row_weight.dtype)
        return of_logits, of_u, of_weight

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        logits, u, row_weight = ctx.saved_tensors
        along_logits, along_u, along_weight = tangents
        terms = []
        if along_logits is not None:
            terms.append(_third(logits, u, along_logits, row_weight).to(u.dtype))
        if along_u is not None:
            terms.append(softmax_hessian(logits, along_u, row_weight))
        if along_weight is not None:
            product = _unweighted(logits, u, row_weight)
            terms.append((along_weight.unsqueeze(-1) * product).to(u.dtype))
        return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *tensors: Tensor) -> tuple[Tensor, int]:
        batched = [
            t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip(tensors, in_dims, strict=True)
        ]
        return _SoftmaxHessian.apply(*batched), 0  # type: ignore[no-untyped-call]


def stn_gate(
    plain: Tensor,
    response: Tensor | None,
    gates: Tensor,
    bias: Tensor | None = None,
    response_bias: Tensor | None = None,
    *,
    batch_dim: int = 0,
    channel_dim: int = -1,
) -> Tensor:
    r"""Sums plain + bias + gates_w * response + gates_b * response_bias, gates of its own for each example."""
    if response is None:
        plain, response = plain.chunk(2, channel_dim)
    channels = response.shape[channel_dim]
    shape = [1] * response.dim()
    shape[channel_dim] = channels

    def over_channels(t: Tensor) -> Tensor:
        return t.reshape(shape)

    def over_examples(t: Tensor) -> Tensor:
        per_example = list(shape)
        per_example[batch_dim] = len(t)
        return t.reshape(per_example)

    out = plain + over_examples(gates[:, :channels]) * response
    if bias is not None:
        out = out + over_channels(bias)
    if response_bias is not None:
        out = out + over_examples(gates[:, channels:] * response_bias)
    return out
