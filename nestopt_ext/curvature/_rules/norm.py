"""Normalizations within an example: over the last dimensions, or over groups of channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._tape import MixesExamples, Operand, Var, rule, value_of
from .batch_norm import BatchNorm
from .normalization import Normalization, plus_product, sum_but, sum_leading

_aten = torch.ops.aten


class LayerNorm(Normalization):
    """Normalization over the last dimensions of x."""

    name = "layer normalization"

    def __init__(
        self,
        x: Operand,
        weight: Operand | None,
        bias: Operand | None,
        over: Sequence[int],
        eps: float,
        mean: Tensor,
        rstd: Tensor,
    ) -> None:
        super().__init__(x, weight, bias)
        self.x, self.weight, self.bias = value_of(x).contiguous(), value_of(weight), value_of(bias)
        self.over, self.eps, self.mean, self.rstd = list(over), eps, mean, rstd
        # The kernel knows by the weight whether the statistics are of a wider dtype than x.
        mixed = self.weight is not None and self.weight.dtype != self.dtype
        self.no_weight = torch.ones_like(self.weight) if mixed else None

    def jvp(self, tangents: Sequence[Tensor | None]) -> Tensor:
        of_x, of_weight, of_bias = tangents
        result = of_bias
        if of_weight is not None:
            result = F.layer_norm(self.x, self.over, of_weight, of_bias, self.eps)
        if of_x is None:
            assert result is not None
            return result if of_weight is not None else result.to(self.dtype).expand(self.shape).clone()
        moved: Tensor = self._kernel(of_x, self.no_weight, None, (0,))[0]
        if self.weight is not None:
            moved = plus_product(result, moved, self.weight)
        elif result is not None:
            moved = moved.add_(result)
        return moved.to(self.dtype)

    def _gradients(self, cotangent: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        if self.weight is None and 2 in wanted:
            inner = [i for i in wanted if i != 2]
            of_bias = sum_leading(cotangent, len(self.over)).to(self.bias.dtype)
            return [*(self._kernel(cotangent, None, None, inner) if inner else []), of_bias]
        return self._kernel(cotangent, self.weight, self.bias, wanted)

    def _kernel(self, u: Tensor, weight: Tensor | None, bias: Tensor | None, wanted: Sequence[int]) -> list[Tensor]:
        found = _aten.native_layer_norm_backward(
            u.contiguous(), self.x, self.over, self.mean, self.rstd, weight, bias, [i in wanted for i in range(3)]
        )
        return [found[i] for i in wanted]

    def batch_dim(self, dims: Sequence[int | None], batch: int) -> int | None:
        """That of x, unless it is one that is normalized over."""
        return _batch_before(self, dims, len(self.over))

    def _normalized(self) -> Tensor:
        normalized: Tensor = F.layer_norm(self.x, self.over, None, None, self.eps)
        return normalized

    def _summed(self, terms: Tensor, dim: int) -> Tensor:
        return terms.sum(list(range(1, terms.dim() - len(self.over))))


def _batch_before(node: Normalization, dims: Sequence[int | None], last: int) -> int | None:
    node.check_affine(dims)
    of_x = dims[0]
    if of_x is not None and of_x >= len(node.shape) - last:
        raise MixesExamples(f"{node.name} is over the examples")
    return of_x


@rule(F.layer_norm)
def layer_norm(
    input: Operand,
    normalized_shape: Sequence[int],
    weight: Operand | None = None,
    bias: Operand | None = None,
    eps: float = 1e-5,
) -> Any:
    over = list(normalized_shape)
    result, mean, rstd = torch.native_layer_norm(value_of(input), over, value_of(weight), value_of(bias), eps)
    return LayerNorm(input, weight, bias, over, eps, mean, rstd), result


class RMSNorm(Normalization):
    """Division by the root of the mean square over the last dimensions of x, without a mean taken off."""

    name = "root mean square normalization"

    def __init__(self, x: Operand, weight: Operand | None, over: Sequence[int], rstd: Tensor) -> None:
        super().__init__(x, weight, None)
        self.weight = value_of(weight)
        self.last = list(range(-len(over), 0))
        self.rstd = rstd.to(self.dtype)
        self.xhat: Tensor = (value_of(x) * rstd).to(self.dtype)

    def _moved(self, t: Tensor) -> Tensor:
        """The derivative of x^ along t, which is its own transpose."""
        along = (t * self.xhat).mean(self.last, keepdim=True)
        return torch.addcmul(t, self.xhat, along, value=-1).mul_(self.rstd)

    def jvp(self, tangents: Sequence[Tensor | None]) -> Tensor:
        of_x, of_weight, _ = tangents
        result: Tensor | None = None if of_weight is None else self.xhat * of_weight
        if of_x is not None:
            moved = self._moved(of_x)
            result = moved if self.weight is None else plus_product(result, moved, self.weight)
        assert result is not None
        return result.to(self.dtype)

    def _gradients(self, cotangent: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        found: list[Tensor] = []
        for i in wanted:
            if i == 0:
                u = cotangent if self.weight is None else cotangent * self.weight
                found.append(self._moved(u).to(self.dtype))
            else:
                found.append(sum_leading(cotangent * self.xhat, len(self.last)).to(self.weight.dtype))
        return found

    def batch_dim(self, dims: Sequence[int | None], batch: int) -> int | None:
        """That of x, unless it is one that is normalized over."""
        return _batch_before(self, dims, len(self.last))

    def _normalized(self) -> Tensor:
        return self.xhat

    def _summed(self, terms: Tensor, dim: int) -> Tensor:
        return terms.sum(list(range(1, terms.dim() - len(self.last))))


@rule(F.rms_norm, torch.rms_norm)
def rms_norm(
    input: Operand, normalized_shape: Sequence[int], weight: Operand | None = None, eps: float | None = None
) -> Any:
    x, over = value_of(input), list(normalized_shape)
    # What a missing eps stands for depends on the dtype; this knows.
    rstd = _aten._fused_rms_norm(x, over, None, eps)[1]
    return RMSNorm(input, weight, over, rstd), F.rms_norm(x, over, value_of(weight), eps)


class GroupNorm(Normalization):
    """Normalization of each of ``groups`` groups of channels, for each example."""

    name = "group normalization"

    def __init__(
        self,
        x: Operand,
        weight: Operand | None,
        bias: Operand | None,
        groups: int,
        eps: float,
        mean: Tensor,
        rstd: Tensor,
    ) -> None:
        super().__init__(x, weight, bias)
        # The backward kernel of PyTorch 2.13 for the CPU reads wild memory where images are channels last and not all
        # of its results are asked for, and does not look at how its arguments lie: all are taken in the plain order.
        self.x, self.weight, self.bias = value_of(x).contiguous(), value_of(weight), value_of(bias)
        self.groups, self.eps, self.mean, self.rstd = groups, eps, mean, rstd
        self.channels = [-1] + [1] * (self.x.dim() - 2)

    def jvp(self, tangents: Sequence[Tensor | None]) -> Tensor:
        of_x, of_weight, of_bias = tangents
        result = None if of_bias is None else of_bias.view(self.channels)
        if of_weight is not None:
            result = F.group_norm(self.x, self.groups, of_weight, of_bias, self.eps)
        if of_x is None:
            assert result is not None
            return result if of_weight is not None else result.to(self.dtype).expand(self.shape).clone()
        moved: Tensor = self._kernel(of_x, None, (0,))[0]
        if self.weight is not None:
            moved = plus_product(result, moved, self.weight.view(self.channels))
        elif result is not None:
            moved = moved.add_(result)
        return moved.to(self.dtype)

    def _gradients(self, cotangent: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        if self.weight is None and 2 in wanted:
            inner = [i for i in wanted if i != 2]
            of_bias = sum_but(cotangent, 1).to(self.bias.dtype)
            return [*(self._kernel(cotangent, None, inner) if inner else []), of_bias]
        return self._kernel(cotangent, self.weight, wanted)

    def _kernel(self, u: Tensor, weight: Tensor | None, wanted: Sequence[int]) -> list[Tensor]:
        found = _aten.native_group_norm_backward(
            u.contiguous(),
            self.x,
            self.mean,
            self.rstd,
            weight,
            *_sizes(self.shape),
            self.groups,
            [i in wanted for i in range(3)],
        )
        return [found[i] for i in wanted]

    def batch_dim(self, dims: Sequence[int | None], batch: int) -> int | None:
        """The first, if that is where the examples are."""
        self.check_affine(dims)
        if dims[0] is not None and dims[0] != 0:
            raise MixesExamples(f"{self.name} is over the examples")
        return dims[0]

    def _normalized(self) -> Tensor:
        return F.group_norm(self.x, self.groups, None, None, self.eps)

    def _summed(self, terms: Tensor, dim: int) -> Tensor:
        return sum_but(terms, 0, 2)


def _sizes(shape: Sequence[int]) -> tuple[int, int, int]:
    return shape[0], shape[1], math.prod(shape[2:])


@rule(F.group_norm)
def group_norm(
    input: Operand, num_groups: int, weight: Operand | None = None, bias: Operand | None = None, eps: float = 1e-5
) -> Any:
    x = value_of(input)
    n, c, positions = _sizes(x.shape)
    if n * c // num_groups * positions == 1:  # refused by the function itself
        return NotImplemented
    x = x.contiguous()
    result, mean, rstd = torch.native_group_norm(x, value_of(weight), value_of(bias), n, c, positions, num_groups, eps)
    return GroupNorm(input, weight, bias, num_groups, eps, mean, rstd), result


@rule(F.instance_norm, copied=("running_mean", "running_var"))
def instance_norm(
    input: Operand,
    running_mean: Operand | None = None,
    running_var: Operand | None = None,
    weight: Operand | None = None,
    bias: Operand | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if isinstance(running_mean, Var) or isinstance(running_var, Var):
        return NotImplemented
    x = value_of(input)
    # The real function writes the running statistics.
    result = F.instance_norm(
        x, running_mean, running_var, value_of(weight), value_of(bias), use_input_stats, momentum, eps
    )
    if not use_input_stats:
        assert running_mean is not None and running_var is not None
        return BatchNorm(input, weight, bias, running_mean, running_var, eps), result
    n, c, positions = _sizes(x.shape)
    x = x.contiguous()
    _, mean, rstd = torch.native_group_norm(x, value_of(weight), value_of(bias), n, c, positions, c, eps)
    return GroupNorm(input, weight, bias, c, eps, mean, rstd), result
