"""The plain-PyTorch twin of every op: its definition, its fallback and its test oracle.

Each function has the signature of the op of the same name in ``_ops.py``. It assumes checked input.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def opmath(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which arithmetic on ``dtype`` is done: float32 for the 16-bit types, else itself."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


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
            grad = grad * grad_scale.double().reciprocal().to(math)
        if maximize:
            grad = -grad
        if weight_decay != 0:
            grad = grad.add(weight, alpha=weight_decay)
        step = grad
        if momentum_buffers:
            buf = momentum_buffers[i]
            if momentum_buffers_imag:
                imag = momentum_buffers_imag[i]
                previous = buf.clone()
                buf.mul_(momentum).add_(imag, alpha=-momentum_imag).add_(grad, alpha=1 - dampening)
                imag.mul_(momentum).add_(previous, alpha=momentum_imag)
                step = grad.add(buf, alpha=momentum).add(imag, alpha=-momentum_imag) if nesterov else buf
            else:
                buf.mul_(momentum).add_(grad, alpha=1 - dampening)
                step = grad.add(buf, alpha=momentum) if nesterov else buf
        if isinstance(lr, Tensor):
            if lr.requires_grad:  # keeps what the gradient of lr needs: the next step overwrites the buffer
                step = step.clone()
            descend = weight.addcmul if weight is not param else weight.addcmul_
            weight = descend(step, lr.to(device=weight.device, dtype=math).reshape(()), value=-1)
        elif weight is param:
            param.add_(step, alpha=-lr)
        else:
            weight = weight.add(step, alpha=-lr)
        if weight is not param:
            param.copy_(weight)


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

    ``sq_norm``, when given, receives the squared Euclidean norm of the new ``v`` over the whole list.
    """
    total: Tensor | float = 0.0
    for v_i, p_i, av_i in zip(v, p, av, strict=True):
        math = opmath(v_i.dtype)
        term = v_i.to(math)
        step = av_i.to(math)
        if damping != 0:
            step = step.add(term, alpha=damping)
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
