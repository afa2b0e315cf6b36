"""One descent step, and what is put aside while it is computed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import _lists


class TrainerDiverged(RuntimeError):
    """A loss or gradient of a trainer is not finite; the step that would have used it was not taken."""


def descend(
    caller: str,
    name: str,
    loss: Tensor,
    params: Sequence[Tensor],
    optimizers: Sequence[Optimizer],
    max_norm: float | None = None,
) -> float:
    """Steps ``optimizers`` along the gradient of ``loss`` in ``params`` and nothing else; returns the loss.

    Of ``params`` those move that require grad now. No ``.grad`` is left, neither here nor elsewhere. Raises
    TrainerDiverged before the step that would use a value which is not finite, and ValueError where the loss does not
    depend on ``params``.
    """
    params = [p for p in params if p.requires_grad]
    grads = torch.autograd.grad(loss, params, allow_unused=True) if params and loss.requires_grad else ()
    given = [g for g in grads if g is not None]
    if not given:
        raise ValueError(f"{caller}: {name} must depend on what it trains; got a graph that none of it is in.")
    norm = _lists.norm(given)
    value: float
    value, length = torch.stack([loss.detach().to(norm), norm]).tolist()  # one wait for the device
    if not math.isfinite(value) or not math.isfinite(length):
        what, found = (f"the gradient of {name}", length) if math.isfinite(value) else (name, value)
        raise TrainerDiverged(
            f"{caller}: {what} must be finite; got {found}. The step was not taken. Lower the learning rates, or set"
            " max_norm."
        )
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    try:
        if max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm)
        for optimizer in optimizers:
            optimizer.step()
    finally:
        for p in params:
            p.grad = None
    return value


@contextlib.contextmanager
def frozen(params: Iterable[nn.Parameter]) -> Iterator[None]:
    """Parameters that get no gradient and no graph while open."""
    trained = [p for p in params if p.requires_grad]
    try:
        for p in trained:
            p.requires_grad_(False)
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


@contextlib.contextmanager
def buffers_restored(modules: Iterable[nn.Module], *, on_failure_only: bool) -> Iterator[None]:
    """Buffers, as running statistics, are what they were when the block is left, or when an exception leaves it."""
    held = [(m._buffers, name, b, b.clone()) for m in modules for name, b in m._buffers.items() if b is not None]
    restores = True
    try:
        yield
        restores = not on_failure_only
    finally:
        if restores and held:
            with torch.no_grad():
                for buffers, name, buffer, before in held:
                    buffers[name] = buffer.copy_(before)


@contextlib.contextmanager
def evaluating(*parts: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards for every module the mode it was in."""
    modes = [(m, m.training) for part in parts for m in part.modules()]
    for part in parts:
        part.eval()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode
