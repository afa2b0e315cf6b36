"""Ops as differentiable functions, closed under differentiation.

Backward and forward-mode derivatives of each are written with the same function, so that every order of derivative
exists and none is silently zero.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad

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
    plain: Tensor | None,
    response: Tensor | None,
    gates: Tensor,
    bias: Tensor | None = None,
    response_bias: Tensor | None = None,
    *,
    batch_dim: int = 0,
    channel_dim: int = -1,
) -> Tensor:
    r"""The output of a layer whose weights respond to hyperparameters, from its two products, with gates of its own for
    each example: :math:`y = (Wx + b) + s_w \odot (Vx) + s_b \odot c`.

    ``plain`` (W x) and ``response`` (V x) are of one shape [..., B, ..., D, ...], in which ``batch_dim`` has the B
    examples and ``channel_dim``, after it, the D channels: [B, ..., D] of a linear layer, [B, D, ...] of a convolution.
    With ``response=None``, ``plain`` is both, stacked along the channels, [..., B, ..., 2 D, ...]: the result of one
    product with W and V stacked. With ``plain=None`` it is zero. ``gates`` (s = [s_w, s_b]) is [B, 2 D], or [1, 2 D]
    for all examples alike; the second half is of no effect and may be left out without ``response_bias`` (c) [D].
    ``bias`` (b) is [D].

    Products are float32, float64, bfloat16 or float16; gates and biases have their dtype, or float32 beside 16 bits;
    arithmetic on 16 bits is in float32. Returns a new tensor like ``response``; nothing is modified. Differentiable to
    any order in all five, in reverse and forward mode, and under ``torch.func``. Saves the response, the gates and
    ``response_bias`` for that, and no product of them.

    This is the layer of Self-Tuning Networks (MacKay et al., 2019, section 3.1), where it is two layers and products
    of their outputs. Raises TypeError or ValueError for bad arguments. Under ``torch.compile``, which takes no
    functions with a forward-mode derivative of their own, these are PyTorch's operations, for it to fuse.

    >>> import torch
    >>> x = torch.tensor([[1.0, 10.0], [1.0, 10.0]])     # one channel: W x = 1, V x = 10
    >>> gates = torch.tensor([[0.5, 0.0], [2.0, 3.0]])
    >>> stn_gate(x, None, gates, torch.tensor([100.0]), torch.tensor([1000.0]))
    tensor([[ 106.],
            [3121.]])
    """
    dims = _check_stn_gate(plain, response, gates, bias, response_bias, batch_dim, channel_dim)
    if torch.compiler.is_compiling():
        return _reference.stn_gate(*_halves(plain, response, dims[1]), gates, bias, response_bias, *dims)
    return _stn_gate(plain, response, gates, bias, response_bias, *dims)


def _check_stn_gate(
    plain: Tensor | None,
    response: Tensor | None,
    gates: Tensor,
    bias: Tensor | None,
    response_bias: Tensor | None,
    batch_dim: int,
    channel_dim: int,
) -> tuple[int, int]:
    """Returns the two dimensions counted from 0."""

    def refuse(name: str, rule: str, found: object) -> None:
        raise ValueError(f"stn_gate: {name} must {rule}; got {found}.")

    lead = plain if response is None else response
    if lead is None:
        raise TypeError("stn_gate: plain must be a tensor without response; got None.")
    shape = lead.shape
    batch = batch_dim + len(shape) if batch_dim < 0 else batch_dim
    channel = channel_dim + len(shape) if channel_dim < 0 else channel_dim
    if not 0 <= batch < len(shape):
        refuse("batch_dim", f"be a dimension of {len(shape)}", batch_dim)
    if not batch < channel < len(shape):
        refuse("channel_dim", f"be a dimension of {len(shape)} after batch_dim", channel_dim)
    channels = shape[channel]
    if response is None:
        if channels % 2:
            refuse("plain", "have an even number of channels without response, both stacked", f"shape {tuple(shape)}")
        channels //= 2
    elif plain is not None and plain.shape != shape:
        refuse("plain", f"have the shape of response {tuple(shape)}", tuple(plain.shape))
    widths = (channels, 2 * channels) if response_bias is None else (2 * channels,)
    if gates.dim() != 2 or gates.shape[0] not in (1, shape[batch]) or gates.shape[1] not in widths:
        columns = " or ".join(map(str, widths))
        refuse("gates", f"have 1 or {shape[batch]} rows and {columns} columns", f"shape {tuple(gates.shape)}")
    for name, t in (("bias", bias), ("response_bias", response_bias)):
        if t is not None and t.shape != (channels,):
            refuse(name, f"have a number for each channel, shape {(channels,)}", tuple(t.shape))
    return batch, channel


def _halves(plain: Tensor | None, response: Tensor | None, channel_dim: int) -> tuple[Tensor | None, Tensor]:
    if response is not None:
        return plain, response
    assert plain is not None
    first, second = plain.chunk(2, channel_dim)
    return first, second


def _apply(function: Any, *arguments: Any) -> Tensor:
    """``function.apply``, which binds its arguments to a signature that it looks up, without that: it takes three times
    as long as all else. A transform of ``torch.func`` must have the whole of it.
    """
    if torch._C._are_functorch_transforms_active():
        result: Tensor = function.apply(*arguments)
    else:
        result = super(torch.autograd.Function, function).apply(*unwrap_dead_wrappers(arguments))
    return result


def _stn_gate(*arguments: Any) -> Tensor:
    return _apply(_StnGate, *arguments)


def _stn_gate_sums(*arguments: Any) -> Tensor:
    return _apply(_StnGateSums, *arguments)


def _is_watched(grad: Tensor) -> bool:
    """Whether what is done to ``grad`` now may be differentiated or batched, so that an op will not do."""
    return (
        torch.is_grad_enabled()
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._functorch.is_legacy_batchedtensor(grad)
    )


def _any_legacy_batched(*tensors: Tensor | None) -> bool:
    """For is_grads_batched, which has no rules for ops."""
    return any(t is not None and torch._C._functorch.is_legacy_batchedtensor(t) for t in tensors)


class _StnGate(torch.autograd.Function):
    """Bilinear in (response, response_bias) and gates and linear in the rest: its derivatives are itself and sums."""

    @staticmethod
    def forward(
        plain: Tensor | None,
        response: Tensor | None,
        gates: Tensor,
        bias: Tensor | None,
        response_bias: Tensor | None,
        batch_dim: int,
        channel_dim: int,
    ) -> Tensor:
        plain, response = _halves(plain, response, channel_dim)
        if _any_legacy_batched(plain, response, gates, bias, response_bias):
            return _reference.stn_gate(plain, response, gates, bias, response_bias, batch_dim, channel_dim)
        out = torch.empty_like(response)
        if len(gates) != out.shape[batch_dim]:
            gates = gates.expand(out.shape[batch_dim], -1)
        _ops.stn_gate_(out, plain, response, gates, bias, response_bias, batch_dim=batch_dim, channel_dim=channel_dim)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        plain, response, gates, bias, response_bias, *dims = inputs
        ctx.set_materialize_grads(False)
        ctx.dims = dims
        ctx.is_stacked = response is None
        ctx.bias_dtype = None if bias is None else bias.dtype
        saved = (plain if response is None else response, gates, response_bias)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if grad is None:
            return (None,) * 7
        plain, response, *coefficients = ctx.needs_input_grad[:5]
        scaled = plain if ctx.is_stacked else response
        gradients = _composed if _is_watched(grad) else _fused
        of_data, *of_coefficients = gradients(ctx, grad, scaled, any(coefficients))
        if ctx.is_stacked:
            return of_data, None, *of_coefficients, None, None
        return grad if plain else None, of_data, *of_coefficients, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        data, gates, response_bias = ctx.saved_tensors
        along_plain, along_response, along_gates, along_bias, along_response_bias = tangents[:5]
        response = data
        if ctx.is_stacked:
            response = data.chunk(2, ctx.dims[1])[1]
            if along_plain is not None:
                along_plain, along_response = along_plain.chunk(2, ctx.dims[1])
        out = along_plain
        if along_gates is not None:
            out = _stn_gate(out, response, along_gates, along_bias, response_bias, *ctx.dims)
            along_bias = None
        if along_response is not None or along_bias is not None or along_response_bias is not None:
            if along_response is None:
                along_response = torch.zeros_like(response)
            out = _stn_gate(out, along_response, gates, along_bias, along_response_bias, *ctx.dims)
        result: Tensor = out.clone() if out is along_plain else out
        return result

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> tuple[Tensor, int]:
        *tensors, batch_dim, channel_dim = arguments
        dims = (batch_dim, channel_dim)
        if any(dim is not None for dim in in_dims[2:5]):

            def one(plain: Any, response: Any, gates: Any, bias: Any, response_bias: Any) -> Tensor:
                halves = _halves(plain, response, channel_dim)
                return _reference.stn_gate(*halves, gates, bias, response_bias, *dims)

            return torch.vmap(one, tuple(in_dims[:5]))(*tensors), 0
        # The same gates for all: another dimension of positions.
        data = [
            None if t is None else t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip(tensors[:2], in_dims[:2], strict=True)
        ]
        return _stn_gate(*data, *tensors[2:], batch_dim + 1, channel_dim + 1), 0


#: Gradients of the response, or of both halves stacked, of gates, bias and response bias.
_Gradients = tuple[Tensor | None, ...]


def _composed(ctx: Any, grad: Tensor, scaled: bool, summed: bool) -> _Gradients:
    """By operations that can be differentiated."""
    data, gates, response_bias = ctx.saved_tensors
    channels = grad.shape[ctx.dims[1]]
    of_data = of_gates = of_bias = of_response_bias = None
    if scaled:
        of_data = _stn_gate(None, grad, gates.narrow(1, 0, channels), None, None, *ctx.dims)
        if ctx.is_stacked:
            of_data = torch.cat([grad, of_data], ctx.dims[1])
    if summed:
        response = data.chunk(2, ctx.dims[1])[1] if ctx.is_stacked else data
        of_gates, of_shift = _stn_gate_sums(grad, response, *ctx.dims).chunk(2, 1)
        of_bias = of_shift.sum(0)
        if response_bias is not None:
            of_response_bias = (gates.narrow(1, channels, channels) * of_shift).sum(0)
            of_gates = torch.cat([of_gates, of_shift * response_bias], 1)
        elif gates.shape[1] != channels:
            of_gates = torch.cat([of_gates, torch.zeros_like(of_shift)], 1)
    return of_data, *_as_asked(ctx, gates, response_bias, of_gates, of_bias, of_response_bias)


def _fused(ctx: Any, grad: Tensor, scaled: bool, summed: bool) -> _Gradients:
    """In one pass over the data."""
    data, gates, response_bias = ctx.saved_tensors
    batch_dim, channel_dim = ctx.dims
    examples, channels = grad.shape[batch_dim], grad.shape[channel_dim]
    if not summed and not ctx.is_stacked:
        of_data = _stn_gate(None, grad, gates.narrow(1, 0, channels), None, None, *ctx.dims) if scaled else None
        return of_data, None, None, None
    response = data.chunk(2, channel_dim)[1] if ctx.is_stacked else data
    of_data = torch.empty_like(data) if scaled else None
    sums = torch.empty(examples, 2 * channels, dtype=_reference.opmath(grad.dtype), device=grad.device)
    shared = sums.new_empty(2, channels)
    all_gates = gates if len(gates) == examples else gates.expand(examples, -1)
    tensors = (sums, of_data, shared, grad, response, all_gates, response_bias)
    _ops.stn_gate_backward_(*tensors, batch_dim=batch_dim, channel_dim=channel_dim)
    if gates.shape[1] == channels:
        sums = sums.narrow(1, 0, channels)
    elif response_bias is None:
        sums.narrow(1, channels, channels).zero_()
    return of_data, *_as_asked(ctx, gates, response_bias, sums, *shared.unbind())


def _as_asked(
    ctx: Any, gates: Tensor, response_bias: Tensor | None, of_gates: Tensor | None, *of_biases: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Those that are needed, like what they are gradients of, which checkpointed regions hand out only once."""
    dtypes = (gates.dtype, ctx.bias_dtype, None if response_bias is None else response_bias.dtype)
    if of_gates is not None and len(gates) != len(of_gates):
        of_gates = of_gates.sum(0, keepdim=True)
    return tuple(
        t.to(dtype) if needed and t is not None else None
        for t, dtype, needed in zip((of_gates, *of_biases), dtypes, ctx.needs_input_grad[2:5], strict=True)
    )


class _StnGateSums(torch.autograd.Function):
    """The sums of grad * response and of grad over the positions of each example; bilinear."""

    @staticmethod
    def forward(grad: Tensor, response: Tensor, batch_dim: int, channel_dim: int) -> Tensor:
        if _any_legacy_batched(grad, response):
            return _reference.stn_gate_sums(grad, response, batch_dim, channel_dim)
        shape = (grad.shape[batch_dim], 2 * grad.shape[channel_dim])
        sums = torch.empty(shape, dtype=_reference.opmath(grad.dtype), device=grad.device)
        tensors = (sums, None, None, grad, response, None, None)
        _ops.stn_gate_backward_(*tensors, batch_dim=batch_dim, channel_dim=channel_dim)
        return sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad, response, *ctx.dims = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, response)
        ctx.save_for_forward(grad, response)

    @staticmethod
    def backward(ctx: Any, along: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if along is None:
            return (None,) * 4
        grad, response = ctx.saved_tensors
        of_products, of_grads = along.chunk(2, 1)
        of_grad = of_response = None
        if ctx.needs_input_grad[0]:
            ones = torch.ones_like(of_grads[0]) if len(of_grads) else of_grads.new_ones(of_grads.shape[1])
            of_grad = _stn_gate(None, response, along, None, ones, *ctx.dims)
        if ctx.needs_input_grad[1]:
            of_response = _stn_gate(None, grad, of_products, None, None, *ctx.dims)
        return of_grad, of_response, None, None

    @staticmethod
    def jvp(ctx: Any, along_grad: Tensor | None, along_response: Tensor | None, *_: None) -> Tensor:
        grad, response = ctx.saved_tensors
        if along_response is None:
            return _stn_gate_sums(along_grad, response, *ctx.dims)
        products, zeros = _stn_gate_sums(grad, along_response, *ctx.dims).chunk(2, 1)
        if along_grad is None:
            return torch.cat([products, torch.zeros_like(zeros)], 1)
        others, grads = _stn_gate_sums(along_grad, response, *ctx.dims).chunk(2, 1)
        return torch.cat([products + others, grads], 1)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> tuple[Tensor, int]:
        grad, response, *dims = arguments
        return torch.vmap(lambda g, r: _reference.stn_gate_sums(g, r, *dims), tuple(in_dims[:2]))(grad, response), 0
