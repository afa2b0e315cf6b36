"""Batch normalization, with statistics that are differentiated through or constant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._reference import opmath
from .._batch_statistics import normalized
from .._tape import MixesExamples, Operand, Var, rule, value_of
from .normalization import Normalization, plus_product, sum_but


class BatchNorm(Normalization):
    """Normalization of each channel, dimension 1 of x, by ``mean`` and ``var`` [C]; by those of the batch if None."""

    name = "batch normalization"

    def __init__(
        self,
        x: Operand,
        weight: Operand | None,
        bias: Operand | None,
        mean: Tensor | None,
        var: Tensor | None,
        eps: float,
    ) -> None:
        super().__init__(x, weight, bias)
        t, w, b = value_of(x), value_of(weight), value_of(bias)
        dtype = opmath(self.dtype)
        self.differentiated = mean is None
        self.xhat: Tensor | None = None
        if self.differentiated:
            xhat, _, rstd = normalized(t, eps)
            self.xhat = xhat.to(self.dtype)
        else:
            assert mean is not None and var is not None
            mean, var = mean.to(dtype), var.to(dtype)
            rstd = (var + eps).rsqrt()
            if 1 in self.wanted:
                self.xhat = F.batch_norm(t.to(dtype), mean, var, eps=eps).to(self.dtype)
        self.channels = [-1] + [1] * (t.dim() - 2)
        self.weight_dtype = self.dtype if bias is None else b.dtype
        if w is not None:
            self.weight_dtype = w.dtype
        self.scale = rstd if w is None else rstd * w
        self.factor = self.scale.to(self.dtype).view(self.channels)
        self.zeros, self.ones = torch.zeros_like(rstd), torch.ones_like(rstd)

    def jvp(self, tangents: Sequence[Tensor | None]) -> Tensor:
        of_x, of_weight, of_bias = tangents
        result = None if of_bias is None else of_bias.view(self.channels)
        if of_weight is not None:
            assert self.xhat is not None
            result = plus_product(result, self.xhat, of_weight.view(self.channels))
        if of_x is not None and self.differentiated:
            moved = self._kernel(of_x, (0,))[0]
            result = moved if result is None else moved.add_(result)
        elif of_x is not None:
            result = plus_product(result, of_x, self.factor)
        assert result is not None
        if of_x is None and of_weight is None:
            return result.to(self.dtype).expand(self.shape).clone()
        return result.to(self.dtype)

    def _gradients(self, cotangent: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        fused = self.xhat is not None and (len(wanted) > 1 or (self.differentiated and wanted[0] == 0))
        if fused:
            return self._kernel(cotangent, wanted)
        return [self._gradient(cotangent, i) for i in wanted]

    def _gradient(self, cotangent: Tensor, i: int) -> Tensor:
        if i == 0:
            return cotangent * self.factor
        terms = cotangent if i == 2 else cotangent * self._normalized()
        return sum_but(terms, 1).to(self.weight_dtype)

    def _kernel(self, u: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        """What x^ makes of u: it has mean 0 and variance 1 already, so that r is part of the weight."""
        found = torch.ops.aten.native_batch_norm_backward(
            u,
            self.xhat,
            self.scale,
            self.zeros,
            self.ones,
            self.zeros,
            self.ones,
            self.differentiated,
            0.0,
            [i in wanted for i in range(3)],
        )
        return [found[i] if i == 0 else found[i].to(self.weight_dtype) for i in wanted]

    def batch_dim(self, dims: Sequence[int | None], batch: int) -> int | None:
        """That of x, unless its channels are the examples."""
        self.check_affine(dims)
        if dims[0] is not None and self.differentiated:
            raise MixesExamples(f"{self.name} takes its statistics from the batch")
        if dims[0] == 1:
            raise MixesExamples(f"{self.name} has examples in its channels")
        return dims[0]

    def _normalized(self) -> Tensor:
        assert self.xhat is not None
        return self.xhat

    def _summed(self, terms: Tensor, dim: int) -> Tensor:
        return sum_but(terms, 0, 2 if dim == 0 else 3).to(self.weight_dtype)


@rule(F.batch_norm, copied=("running_mean", "running_var"))
def batch_norm(
    input: Operand,
    running_mean: Operand | None,
    running_var: Operand | None,
    weight: Operand | None = None,
    bias: Operand | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if isinstance(running_mean, Var) or isinstance(running_var, Var):
        return NotImplemented
    x = value_of(input)
    # The real function writes the running statistics.
    result = F.batch_norm(x, running_mean, running_var, value_of(weight), value_of(bias), training, momentum, eps)
    mean, var = (None, None) if training else (running_mean, running_var)
    return BatchNorm(input, weight, bias, mean, var, eps), result
