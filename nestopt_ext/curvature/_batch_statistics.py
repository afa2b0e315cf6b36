"""The statistics of a batch, and batch normalization that takes them as constants."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._reference import opmath


def normalized(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x^, and the mean and inverse standard deviation of each channel, [C], in float32 at least."""
    found: tuple[Tensor, Tensor, Tensor] = torch.native_batch_norm(
        x.to(opmath(x.dtype)), None, None, None, None, True, 0.0, eps
    )
    return found


class FrozenBatchStatistics(TorchFunctionMode):
    """While active, batch normalization takes the statistics of its batch as constants.

    The values are the same, and running statistics are written as ever; derivatives do not see that the statistics
    depend on the batch, and examples stay apart.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return (_frozen if func is F.batch_norm else func)(*args, **kwargs)


def _frozen(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    with torch.no_grad():
        F.batch_norm(input, running_mean, running_var, None, None, True, momentum, eps)
        _, mean, rstd = normalized(input.detach(), eps)
        var = rstd.pow(-2)  # with eps in it
    if weight is not None:  # the function takes all of one dtype
        mean, var = mean.to(weight.dtype), var.to(weight.dtype)
    return F.batch_norm(input, mean, var, weight, bias, False, momentum, 0.0)
