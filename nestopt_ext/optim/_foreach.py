"""The steps of ``_reference.py`` in ``torch._foreach_*`` kernels, over whole lists.

There are no such kernels that mix dtypes, so the reference itself serves 16-bit parameters with float32 buffers.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _reference
from .._lists import scalar_dtype


def _by_dtype(params: list[Tensor], *others: list[Tensor]) -> Iterator[tuple[torch.dtype, list[list[Tensor]]]]:
    """Splits aligned lists, of which any but the first may be empty, by the dtype of the parameters."""
    groups: dict[torch.dtype, list[int]] = {}
    for i, param in enumerate(params):
        groups.setdefault(param.dtype, []).append(i)
    for dtype, indices in groups.items():
        yield dtype, [[list_[i] for i in indices] if list_ else [] for list_ in (params, *others)]


def complex_sgd_step_(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    buffers_imag: list[Tensor],
    lr: float | Tensor,
    *,
    momentum: float,
    momentum_imag: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    """See :func:`nestopt_ext._reference.complex_sgd_step_`."""
    scalars = {
        "momentum": momentum,
        "momentum_imag": momentum_imag,
        "dampening": dampening,
        "weight_decay": weight_decay,
        "nesterov": nesterov,
        "maximize": maximize,
    }
    for dtype, (p, g, b, c) in _by_dtype(params, grads, buffers, buffers_imag):
        if _reference.opmath(dtype) != dtype:
            _reference.complex_sgd_step_(p, g, b, c, lr, **scalars)  # type: ignore[arg-type]
            continue
        if maximize:
            g = list(torch._foreach_neg(g))
        if weight_decay != 0:
            g = list(torch._foreach_add(g, p, alpha=weight_decay))
        step = g
        if b:
            rotated = torch._foreach_mul(b, momentum_imag) if c else ()
            torch._foreach_mul_(b, momentum)
            if c:
                torch._foreach_add_(b, c, alpha=-momentum_imag)
            torch._foreach_add_(b, g, alpha=1 - dampening)
            if c:
                torch._foreach_mul_(c, momentum)
                torch._foreach_add_(c, list(rotated))
            step = b
            if nesterov:
                step = list(torch._foreach_add(g, b, alpha=momentum))
                if c:
                    torch._foreach_add_(step, c, alpha=-momentum_imag)
        if isinstance(lr, Tensor):
            torch._foreach_add_(p, list(torch._foreach_mul(step, -lr)))
        else:
            torch._foreach_add_(p, step, alpha=-lr)


def complex_adam_step_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avgs_imag: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    lr: float | Tensor,
    *,
    beta1: float,
    beta1_imag: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: bool,
    bias_correction: bool,
    maximize: bool,
) -> None:
    """See :func:`nestopt_ext._reference.complex_adam_step_`. Steps that lie on a device are not read by the host."""
    scalars = {
        "beta1": beta1,
        "beta1_imag": beta1_imag,
        "beta2": beta2,
        "eps": eps,
        "weight_decay": weight_decay,
        "decoupled_weight_decay": decoupled_weight_decay,
        "bias_correction": bias_correction,
        "maximize": maximize,
    }
    lists = (params, grads, exp_avgs, exp_avgs_imag, exp_avg_sqs, max_exp_avg_sqs, steps)
    for dtype, (p, g, m, m_imag, v, v_max, t) in _by_dtype(*lists):
        if _reference.opmath(dtype) != dtype:
            _reference.complex_adam_step_(p, g, m, m_imag, v, v_max, t, lr, **scalars)  # type: ignore[arg-type]
            continue
        if maximize:
            g = list(torch._foreach_neg(g))
        if weight_decay != 0 and decoupled_weight_decay:
            torch._foreach_mul_(p, 1 - lr * weight_decay)
        elif weight_decay != 0:
            g = list(torch._foreach_add(g, p, alpha=weight_decay))
        rotated = torch._foreach_mul(m, beta1_imag) if m_imag else ()
        torch._foreach_mul_(m, beta1)
        if m_imag:
            torch._foreach_add_(m, m_imag, alpha=-beta1_imag)
            torch._foreach_mul_(m_imag, beta1)
            torch._foreach_add_(m_imag, list(rotated))
        torch._foreach_add_(m, g, alpha=1 - beta1 if bias_correction else 1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, g, g, 1 - beta2)
        if v_max:
            torch._foreach_maximum_(v_max, v)
        rates, roots = _corrections(t, lr, beta1 if bias_correction else 0.0, beta2, p[0])
        denominators = torch._foreach_sqrt(v_max or v)
        torch._foreach_div_(denominators, roots)
        torch._foreach_add_(denominators, eps)
        if isinstance(rates[0], Tensor):
            torch._foreach_addcdiv_(p, torch._foreach_mul(m, rates), denominators, -1)
        else:
            torch._foreach_addcdiv_(p, m, denominators, [-rate for rate in rates])


def _corrections(
    steps: list[Tensor], lr: float | Tensor, beta1: float, beta2: float, like: Tensor
) -> tuple[list[Any], list[Any]]:
    """Counts the steps up; returns lr / (1 - beta1^t) and sqrt(1 - beta2^t), as numbers where all is on the host."""
    if steps[0].device.type == "cpu" and not isinstance(lr, Tensor) and not torch.compiler.is_compiling():
        torch._foreach_add_(steps, torch.ones((), device="cpu"))  # a number would be made a tensor for each of them
        counts = [step.item() for step in steps]
        return [lr / (1 - beta1**t) for t in counts], [math.sqrt(1 - beta2**t) for t in counts]
    torch._foreach_add_(steps, 1)
    t = torch.stack([step.reshape(()) for step in steps]).to(like.device, scalar_dtype(like.device))
    rate = (lr.to(t) if isinstance(lr, Tensor) else lr) / (1 - beta1**t)
    return list(rate.to(like.dtype).unbind()), list((1 - beta2**t).sqrt().to(like.dtype).unbind())
