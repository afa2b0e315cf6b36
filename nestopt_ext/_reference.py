"""The plain-PyTorch twin of every op: its definition, its fallback and its test oracle.

Each function has the signature of the op of the same name in ``_ops.py``. It assumes checked input.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def opmath(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which arithmetic on ``dtype`` is done: float32 for the 16-bit types, else itself."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def plus(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """``a + factor * b``; Inductor (torch 2.13) drops the ``alpha`` of an ``add`` where a or b is a matrix product."""
    return a + factor * b if torch.compiler.is_compiling() else a.add(b, alpha=factor)


def _plus_(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """``a += factor * b``, likewise."""
    return a.add_(factor * b) if torch.compiler.is_compiling() else a.add_(b, alpha=factor)


def _number(t: Tensor, device: torch.device) -> Tensor:
    """A tensor of one element as a number of full precision on ``device``."""
    return t.to(device=device, dtype=torch.float32 if device.type == "mps" else torch.float64).reshape(())


def complex_adam_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avgs_imag: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: Tensor | float,
    *,
    beta1: float,
    beta1_imag: float = 0.0,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    bias_correction: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    r"""One step of Adam with complex momentum.

    With :math:`\beta_1` = ``beta1`` + i ``beta1_imag``, :math:`m` = exp_avg + i exp_avg_imag, :math:`v` = exp_avg_sq
    and :math:`t` = step, counted up first::

        g <- (-1 if maximize) * grad * (1 / grad_scale)
        g <- g + weight_decay * p                   (p <- p - lr * weight_decay * p with decoupled_weight_decay)
        m <- beta_1 * m + g                         (g times 1 - beta_1 with bias_correction)
        v <- beta_2 * v + (1 - beta_2) * g**2
        p <- p - lr * Re(m) / (sqrt(v / (1 - beta_2**t)) + eps)

    With ``bias_correction`` the last line has :math:`m / (1 - \beta_1^t)` for :math:`m`, which is
    :class:`torch.optim.Adam`; that is for a real :math:`\beta_1` only. Where there are ``max_exp_avg_sqs``, each
    becomes the maximum of itself and :math:`v`, and stands for :math:`v` in the last line. ``exp_avgs_imag`` may be
    empty (then the imaginary part is zero and stays so). Nothing is written, ``steps`` neither, when ``found_inf`` is
    not zero.
    """
    if found_inf is not None and bool(found_inf != 0):
        return

    def keep(t: Tensor) -> Tensor:  # for the backward pass: the next step overwrites t
        return t.clone() if torch.is_grad_enabled() else t

    for i, param in enumerate(params):
        math = opmath(param.dtype)
        weight, grad, avg, avg_sq = keep(param).to(math), grads[i].to(math), exp_avgs[i], exp_avg_sqs[i]
        rate = _number(lr, param.device) if isinstance(lr, Tensor) else lr
        if grad_scale is not None:
            grad = grad * _number(grad_scale, param.device).reciprocal().to(math)
        if maximize:
            grad = -grad
        if weight_decay != 0 and decoupled_weight_decay:
            decay = rate * weight_decay
            weight = weight - (decay.to(math) if isinstance(decay, Tensor) else decay) * weight
        elif weight_decay != 0:
            grad = plus(grad, weight, weight_decay)
        new = (1 - beta1) * grad if bias_correction else grad
        if exp_avgs_imag:
            previous = avg.clone()
            _plus_(avg.mul_(beta1), exp_avgs_imag[i], -beta1_imag).add_(new)
            _plus_(exp_avgs_imag[i].mul_(beta1), previous, beta1_imag)
        else:
            avg.mul_(beta1).add_(new)
        avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        if max_exp_avg_sqs:
            avg_sq = max_exp_avg_sqs[i].copy_(torch.maximum(keep(max_exp_avg_sqs[i]), keep(avg_sq)))
        t = _number(steps[i].add_(1), param.device)
        if bias_correction:
            rate = rate / (1 - beta1**t)
        denom = (avg_sq.sqrt() / (1 - beta2**t).sqrt().to(math)).add_(eps)
        step = keep(avg) / denom
        if isinstance(rate, Tensor):
            param.copy_(weight.addcmul(step, rate.to(math), value=-1))
        else:
            param.copy_(plus(weight, step, -rate))


def complex_sgd_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    momentum_buffers_imag: Sequence[Tensor],
    lr: Tensor | float,
    *,
    momentum: float,
    momentum_imag: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    r"""One step of SGD with complex momentum.

    With :math:`\beta` = ``momentum`` + i ``momentum_imag`` and :math:`b` = buffer + i buffer_imag::

        g <- (-1 if maximize) * grad * (1 / grad_scale) + weight_decay * p
        b <- beta * b + (1 - dampening) * g
        p <- p - lr * (Re(b), or g + Re(beta * b) with nesterov)

    Nothing is written when ``found_inf`` is not zero. ``momentum_buffers`` may be empty (no momentum at all), and
    ``momentum_buffers_imag`` may be empty (then the imaginary part is zero and stays so).
    """
    if found_inf is not None and bool(found_inf != 0):
        return
    for i, param in enumerate(params):
        math = opmath(param.dtype)
        grad = grads[i] if grads[i].dtype == math else grads[i].to(math)
        weight = param if param.dtype == math else param.to(math)
        if grad_scale is not None:
            grad = grad * _number(grad_scale, param.device).reciprocal().to(math)
        if maximize:
            grad = -grad
        if weight_decay != 0:
            grad = plus(grad, weight, weight_decay)
        step = grad
        if momentum_buffers:
            buf = momentum_buffers[i]
            if momentum_buffers_imag:
                imag = momentum_buffers_imag[i]
                previous = buf.clone()
                _plus_(_plus_(buf.mul_(momentum), imag, -momentum_imag), grad, 1 - dampening)
                _plus_(imag.mul_(momentum), previous, momentum_imag)
                step = plus(plus(grad, buf, momentum), imag, -momentum_imag) if nesterov else buf
            else:
                _plus_(buf.mul_(momentum), grad, 1 - dampening)
                step = plus(grad, buf, momentum) if nesterov else buf
        if isinstance(lr, Tensor):
            if lr.requires_grad:  # keeps what the gradient of lr needs: the next step overwrites the buffer
                step = step.clone()
            descend = weight.addcmul if weight is not param else weight.addcmul_
            weight = descend(step, lr.to(device=weight.device, dtype=math).reshape(()), value=-1)
        elif weight is param:
            _plus_(param, step, -lr)
        else:
            weight = plus(weight, step, -lr)
        if weight is not param:
            param.copy_(weight)


def dual_series_(
    coefficients: Tensor,
    sq_norms: Tensor,
    gram: Tensor,
    weights: Tensor,
    projections: Tensor,
    alpha: Tensor,
    *,
    damping: float = 0.0,
) -> None:
    r"""The K terms of a Neumann series of :math:`G = R^\top W R`, in the span of the rows of R.

    With ``gram`` = :math:`R R^\top`, ``weights`` the diagonal of W, ``projections`` = :math:`R v`, ``sq_norms[0]`` =
    :math:`|v|^2`, K = len(sq_norms) - 1 and :math:`q = 1 - \alpha \cdot` ``damping``, term j of the series is
    :math:`v_j = (I - \alpha (G + \text{damping}\, I))^j v = q^j v + R^\top c_j` with::

        c_0 = 0, d_0 = projections;  for j = 0 .. K - 1:
            e = weights * d_j
            f = gram @ e
            sq_norms[j + 1] = max(0, q**2 * sq_norms[j] - 2 * q * alpha * (d_j . e) + alpha**2 * (e . f))
            c_{j+1} = q * c_j - alpha * e
            d_{j+1} = q * d_j - alpha * f            (= R v_{j+1})
        coefficients = c_0 + ... + c_K

    All in float64. A NaN stays one, in the maximum too.
    """
    wide = torch.float32 if gram.device.type == "mps" else torch.float64
    matrix, weight, d = gram.to(wide), weights.to(wide), projections.to(wide)
    step = _number(alpha, gram.device)
    q = 1 - step * damping
    c, total = torch.zeros_like(d), torch.zeros_like(d)
    norms = [sq_norms[0].to(wide, copy=True)]
    for _ in range(len(sq_norms) - 1):
        e = weight * d
        f = matrix @ e
        norms.append((q * q * norms[-1] - 2 * q * step * (d @ e) + step * step * (e @ f)).clamp(min=0))
        c = q * c - step * e
        d = q * d - step * f
        total = total + c
    coefficients.copy_(total)
    sq_norms[1:].copy_(torch.stack(norms)[1:])


def hadamard_gram_(gram: Tensor, x: Tensor, y: Tensor, *, positions: int = 1, ones: bool = False) -> None:
    r"""``gram[n, m] <- gram[n, m] + sum_{s, t < T} (x[nT+s] . x[mT+t]) (y[n'T+s] . y[m'T+t])``, T = ``positions``.

    n' and m' are n and m modulo the number of examples in ``y``. With the matrices A_n = sum_t x[nT+t] y[n'T+t]', what
    is added is the inner product of A_n and A_m. With ``ones``, y has one more feature, which is 1. It goes by tiles of
    a few examples, of a few million numbers each.
    """
    if gram.numel() == 0:
        return
    math = opmath(x.dtype)
    examples = y.shape[0] // positions
    copies = gram.shape[0] // examples
    grams = gram.view(copies, examples, copies, examples)
    xs = x.to(math).view(copies, examples, positions, x.shape[1])
    ys = y.to(math).view(examples, positions, y.shape[1])
    step = max(1, 1024 // (copies * positions))
    tiles = [slice(first, first + step) for first in range(0, examples, step)]
    for i in tiles:
        for j in tiles:
            x_dots = torch.tensordot(xs[:, i], xs[:, j], dims=([3], [3])).to(gram.dtype)
            y_dots = torch.tensordot(ys[i], ys[j], dims=([2], [2])).to(gram.dtype) + ones
            grams[:, i, :, j] += (x_dots * y_dots.unsqueeze(2)).sum((2, 5))


def neumann_step_(
    v: Sequence[Tensor],
    p: Sequence[Tensor],
    av: Sequence[Tensor],
    alpha: Tensor | float,
    *,
    damping: float = 0.0,
    sq_norm: Tensor | None = None,
) -> None:
    r"""One term of a Neumann series: ``v <- v - alpha * (av + damping * v)``, then ``p <- p + v``.

    With an empty ``av`` the first half has been done already: ``v`` is only read, ``alpha`` and ``damping`` are not
    used. ``sq_norm``, when given, receives the squared Euclidean norm of the new ``v`` over the whole list.
    """
    total: Tensor | float = 0.0
    for i, (v_i, p_i) in enumerate(zip(v, p, strict=True)):
        math = opmath(v_i.dtype)
        if av:
            term = v_i.to(math)
            step = av[i].to(math)
            if damping != 0:
                step = plus(step, term, damping)
            if isinstance(alpha, Tensor):
                term = term - alpha.to(device=term.device, dtype=math).reshape(()) * step
            else:
                term = term - alpha * step
            v_i.copy_(term)
        p_i.copy_(p_i.to(math) + v_i.to(math))
        if sq_norm is not None:
            total = total + v_i.to(torch.float64 if v_i.device.type != "mps" else math).square().sum()
    if sq_norm is not None:
        sq_norm.copy_(torch.as_tensor(total, dtype=sq_norm.dtype, device=sq_norm.device))


def rank_one_update_(v: Sequence[Tensor], g: Sequence[Tensor], a: Tensor, b: Tensor) -> None:
    """``v <- a * v + b * g`` for a whole list."""
    for v_i, g_i in zip(v, g, strict=True):
        math = opmath(v_i.dtype)
        scale, along = (_number(t, v_i.device).to(math) for t in (a, b))
        v_i.copy_(scale * v_i.to(math) + along * g_i.to(math))


def row_dot_(out: Tensor, x: Tensor, y: Tensor) -> None:
    r"""``out[i] <- out[i] + sum_d x[i, d] * y[i mod M, d]``, where M is the number of rows of ``y``."""
    if x.numel() == 0:
        return
    math = opmath(x.dtype)
    products = x.to(math).view(-1, *y.shape) * y.to(math)
    out += products.sum(-1, dtype=out.dtype).flatten()


def softmax_hessian_(u: Tensor, logits: Tensor, row_weight: Tensor) -> None:
    """In place; see :func:`softmax_hessian`."""
    if u.numel() > 0:
        u.copy_(softmax_hessian(logits, u, row_weight))


def softmax_hessian(logits: Tensor, u: Tensor, row_weight: Tensor) -> Tensor:
    r"""For each row: ``row_weight * (diag(p) - p p') u`` with ``p = softmax(logits)``.

    ``logits`` and ``u`` are [..., classes], not empty; ``row_weight`` is [...]. A row of weight 0 gives zeros, whatever
    is in it. A class of logit -inf has p = 0 and gives 0 unless its u is not finite; a row whose largest logit is
    infinite gives NaN.

    Written out this is p_c (u_c - m) with m = p . u, which at a class of p_c near 1 is lost in the rounding of m. So
    the largest class is kept apart: with S and U the sums of e_j = exp(z_j - z_max) and of e_j u_j over the *other*
    classes, and a the u of the largest, a - m = (a S - U) / (1 + S) has its relative accuracy however small S is. The
    mean then is a sum of two numbers, ``high + low``.
    """
    math = opmath(u.dtype)
    wide = math if u.device.type == "mps" else torch.float64
    z, x = logits.to(math), u.to(math)
    largest, index = z.max(dim=-1, keepdim=True)
    e = (z - largest).exp()
    others = e.scatter(-1, index, 0.0).to(wide)
    head = x.gather(-1, index).to(wide)
    others_sum = others.sum(-1, keepdim=True)
    total = (largest - largest + 1) + others_sum  # NaN where the largest is infinite
    gap = (head * others_sum - (others * x).sum(-1, keepdim=True)) / total
    high = (head - gap).to(math)
    low = ((head - high) - gap).to(math)
    deviation = torch.where(e > 0, (x - high) - low, x)  # the difference may overflow beside a class of p = 0
    weight = row_weight.unsqueeze(-1)
    return torch.where(weight == 0, 0.0, e * (weight / total).to(math) * deviation).to(u.dtype)


def stn_gate_(
    out: Tensor,
    plain: Tensor | None,
    response: Tensor,
    gates: Tensor,
    bias: Tensor | None,
    response_bias: Tensor | None,
    *,
    batch_dim: int,
    channel_dim: int,
) -> None:
    """``out`` receives what :func:`stn_gate` returns."""
    if out.numel() > 0:
        out.copy_(stn_gate(plain, response, gates, bias, response_bias, batch_dim, channel_dim))


def stn_gate(
    plain: Tensor | None,
    response: Tensor,
    gates: Tensor,
    bias: Tensor | None,
    response_bias: Tensor | None,
    batch_dim: int,
    channel_dim: int,
) -> Tensor:
    """``plain + gates[:, :D] * response + (bias + gates[:, D:] * response_bias)``, the gates of an example at each of
    its positions; D is the number of channels. Without ``plain`` it is zero, and so are biases that are None.
    """
    math, channels = opmath(response.dtype), response.shape[channel_dim]

    def at_each_position(rows: Tensor) -> Tensor:
        shape = [1] * response.dim()
        shape[batch_dim], shape[channel_dim] = rows.shape
        return rows.reshape(shape)

    wide = gates.to(math)
    out = at_each_position(wide.narrow(1, 0, channels)) * response.to(math)
    if plain is not None:
        out = plain.to(math) + out
    if response_bias is not None:
        shift = wide.narrow(1, channels, channels) * response_bias.to(math)
        out = out + at_each_position(shift if bias is None else bias.to(math) + shift)
    elif bias is not None:
        out = out + at_each_position(bias.to(math).unsqueeze(0))
    return out.to(response.dtype)


def stn_gate_backward_(
    sums: Tensor,
    grads: Tensor | None,
    shared: Tensor | None,
    grad: Tensor,
    response: Tensor,
    gates: Tensor | None,
    response_bias: Tensor | None,
    *,
    batch_dim: int,
    channel_dim: int,
) -> None:
    """What the gradients of :func:`stn_gate` are made of.

    ``sums`` receives what :func:`stn_gate_sums` returns; ``grads`` the product of ``gates[:, :D]`` and ``grad``, or, if
    it has twice the channels, ``grad`` and that product. Then, where there is ``shared``::

        shared[0], shared[1] = sum_n sums[n, D:], sum_n gates[n, D:] * sums[n, D:]
        sums[:, D:] *= response_bias

    with zeros for ``shared[1]``, and without the last line, where there is no ``response_bias``.
    """
    math, channels = opmath(grad.dtype), grad.shape[channel_dim]
    sums.copy_(stn_gate_sums(grad, response, batch_dim, channel_dim))
    if grads is not None and gates is not None and grads.numel() > 0:
        scaled = stn_gate(None, grad, gates, None, None, batch_dim, channel_dim)
        grads.copy_(scaled if grads.shape == grad.shape else torch.cat([grad, scaled], channel_dim))
    if shared is None:
        return
    of_shift = sums[:, channels:]
    shared[0] = of_shift.sum(0)
    shared[1] = 0.0
    if response_bias is not None and gates is not None:
        shared[1] = (gates[:, channels:].to(math) * of_shift).sum(0)
        of_shift *= response_bias.to(math)


def stn_gate_sums(grad: Tensor, response: Tensor, batch_dim: int, channel_dim: int) -> Tensor:
    """[B, 2 D]: for each example and channel the sum of ``grad * response`` over the positions, and that of ``grad``;
    in float32 for 16-bit tensors.
    """
    math = opmath(grad.dtype)
    g = grad.to(math)
    positions = [d for d in range(grad.dim()) if d not in (batch_dim, channel_dim)]
    both = (g * response.to(math), g)
    return torch.cat([t.sum(positions) if positions else t for t in both], 1)
