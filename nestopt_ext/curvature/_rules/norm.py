"""Normalizations: by statistics that are constants, or that are differentiated through.

x^ = (x - m) r, with mean m and inverse standard deviation r over a set of elements, has the derivative
P t = r (t - mean(t) - x^ mean(t x^)) where both come from x itself. P is its own transpose, so one fused kernel serves
both directions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..._reference import opmath
from .._tape import MixesExamples, Node, Operand, Rows, Var, accumulated, by_example, rule, value_of

_aten = torch.ops.aten


class Normalization(Node):
    """x^ w + b; what subclasses share."""

    name = ""

    def __init__(self, x: Operand, weight: Operand | None, bias: Operand | None) -> None:
        super().__init__(x, weight, bias)
        self.dtype = value_of(x).dtype
        self.shape = value_of(x).shape

    def vjp(self, i: int, cotangent: Tensor, into: Tensor | None) -> Tensor:
        return accumulated(self._gradients(cotangent, (i,))[0], into)

    def vjps(self, cotangent: Tensor, into: Sequence[Tensor | None]) -> list[Tensor]:
        """All from one call."""
        found = self._gradients(cotangent, self.wanted)
        return [accumulated(t, s) for t, s in zip(found, into, strict=True)]

    def _gradients(self, cotangent: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        raise NotImplementedError

    def _check_affine(self, dims: Sequence[int | None]) -> None:
        if dims[1] is not None or dims[2] is not None:
            raise MixesExamples(f"{self.name} has examples in its weight")

    def example_gradients(self, i: int, cotangent: Tensor, dims: Sequence[int | None], batch: int) -> Rows:
        """Sums over what belongs to one example, of the cotangent or of its product with x^."""
        if dims[0] is None:
            raise MixesExamples(f"{self.name} has the same input for all examples")
        terms = cotangent if i == 2 else cotangent * self._normalized()
        return Rows(self._summed(by_example(terms, dims[0], batch), dims[0]))

    def _normalized(self) -> Tensor:
        """x^, of the shape of x."""
        raise NotImplementedError

    def _summed(self, terms: Tensor, dim: int) -> Tensor:
        """[B, r, ...], which was taken apart at ``dim``, summed to [B, *shape of the weight]."""
        raise NotImplementedError


def _sum_but(terms: Tensor, *kept: int) -> Tensor:
    over = [d for d in range(terms.dim()) if d not in kept]
    return terms.sum(over) if over else terms


class BatchNorm(Normalization):
    """Normalization of each channel, dimension 1 of x, by ``mean`` and ``var`` [C].

    They are those of the batch where ``differentiated`` says so, and constants otherwise.
    """

    name = "batch normalization"

    def __init__(
        self,
        x: Operand,
        weight: Operand | None,
        bias: Operand | None,
        mean: Tensor,
        var: Tensor,
        eps: float,
        *,
        differentiated: bool,
    ) -> None:
        super().__init__(x, weight, bias)
        t, w = value_of(x), value_of(weight)
        dtype = opmath(self.dtype)
        rstd = (var.to(dtype) + eps).rsqrt()
        self.differentiated = differentiated
        self.channels = [-1] + [1] * (t.dim() - 2)
        self.weight_dtype = self.dtype if w is None else w.dtype
        self.scale = rstd if w is None else rstd * w
        self.factor = self.scale.to(self.dtype).view(self.channels)
        self.zeros, self.ones = torch.zeros_like(rstd), torch.ones_like(rstd)
        self.xhat: Tensor | None = None
        if differentiated or 1 in self.wanted:
            centred = t - mean.to(dtype).view(self.channels)
            self.xhat = centred.mul_(rstd.view(self.channels)).to(self.dtype)

    def jvp(self, tangents: Sequence[Tensor | None]) -> Tensor:
        of_x, of_weight, of_bias = tangents
        result = None if of_bias is None else of_bias.view(self.channels)
        if of_weight is not None:
            assert self.xhat is not None
            result = _plus_product(result, self.xhat, of_weight.view(self.channels))
        if of_x is not None and self.differentiated:
            moved = self._kernel(of_x, (0,))[0]
            result = moved if result is None else moved + result
        elif of_x is not None:
            result = _plus_product(result, of_x, self.factor)
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
        terms = cotangent if i == 2 else cotangent * self.xhat
        return _sum_but(terms, 1).to(self.weight_dtype)

    def vjp(self, i: int, cotangent: Tensor, into: Tensor | None) -> Tensor:
        if i == 0 and into is not None and not self.differentiated:
            return into.addcmul_(cotangent, self.factor)
        return super().vjp(i, cotangent, into)

    def vjps(self, cotangent: Tensor, into: Sequence[Tensor | None]) -> list[Tensor]:
        if len(self.wanted) == 1:
            return [self.vjp(self.wanted[0], cotangent, into[0])]
        return super().vjps(cotangent, into)

    def _kernel(self, u: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        """What x^ makes of u: it has mean 0 and variance 1 already, so that r is part of the weight."""
        found = _aten.native_batch_norm_backward(
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

    def batch_dim(self, dims: Sequence[int | None]) -> int | None:
        """That of x, unless its channels are the examples."""
        self._check_affine(dims)
        if dims[0] is not None and self.differentiated:
            raise MixesExamples(f"{self.name} takes its statistics from the batch")
        if dims[0] == 1:
            raise MixesExamples(f"{self.name} has examples in its channels")
        return dims[0]

    def _normalized(self) -> Tensor:
        assert self.xhat is not None
        return self.xhat

    def _summed(self, terms: Tensor, dim: int) -> Tensor:
        return _sum_but(terms, 0, 2 if dim == 0 else 3).to(self.weight_dtype)


def _plus_product(sum: Tensor | None, x: Tensor, factor: Tensor) -> Tensor:
    return x * factor if sum is None else torch.addcmul(sum, x, factor)


@rule(F.batch_norm)
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
    mean, var = _moments(x) if training else (running_mean, running_var)
    return BatchNorm(input, weight, bias, mean, var, eps, differentiated=training), result


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and variance of each channel, [C], in float32 at least."""
    var, mean = torch.var_mean(x.to(opmath(x.dtype)), [d for d in range(x.dim()) if d != 1], correction=0)
    return mean, var


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

    def jvp(self, tangents: Sequence[Tensor | None]) -> Tensor:
        of_x, of_weight, of_bias = tangents
        result = of_bias
        if of_weight is not None:
            result = F.layer_norm(self.x, self.over, of_weight, of_bias, self.eps)
        if of_x is None:
            assert result is not None
            return result if of_weight is not None else result.to(self.dtype).expand(self.shape).clone()
        moved: Tensor = self._kernel(of_x, None, None, (0,))[0]
        if self.weight is not None:
            moved = _plus_product(result, moved, self.weight)
        elif result is not None:
            moved = moved + result
        return moved.to(self.dtype)

    def _gradients(self, cotangent: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        if self.weight is None and 2 in wanted:
            inner = [i for i in wanted if i != 2]
            of_bias = cotangent.sum(list(range(cotangent.dim() - len(self.over)))).to(self.bias.dtype)
            return [*(self._kernel(cotangent, None, None, inner) if inner else []), of_bias]
        return self._kernel(cotangent, self.weight, self.bias, wanted)

    def _kernel(self, u: Tensor, weight: Tensor | None, bias: Tensor | None, wanted: Sequence[int]) -> list[Tensor]:
        found = _aten.native_layer_norm_backward(
            u.contiguous(), self.x, self.over, self.mean, self.rstd, weight, bias, [i in wanted for i in range(3)]
        )
        return [found[i] for i in wanted]

    def batch_dim(self, dims: Sequence[int | None]) -> int | None:
        """That of x, unless it is one that is normalized over."""
        return _batch_before(self, dims, len(self.over))

    def _normalized(self) -> Tensor:
        return F.layer_norm(self.x, self.over, None, None, self.eps)

    def _summed(self, terms: Tensor, dim: int) -> Tensor:
        return terms.sum(list(range(1, terms.dim() - len(self.over))))


def _batch_before(node: Normalization, dims: Sequence[int | None], last: int) -> int | None:
    node._check_affine(dims)
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
        self.xhat = (value_of(x) * rstd).to(self.dtype)

    def _moved(self, t: Tensor) -> Tensor:
        """The derivative of x^ along t, which is its own transpose."""
        along = (t * self.xhat).mean(self.last, keepdim=True)
        return torch.addcmul(t, self.xhat, along, value=-1).mul_(self.rstd)

    def jvp(self, tangents: Sequence[Tensor | None]) -> Tensor:
        of_x, of_weight, _ = tangents
        result = None if of_weight is None else self.xhat * of_weight
        if of_x is not None:
            moved = self._moved(of_x)
            if self.weight is not None:
                result = _plus_product(result, moved, self.weight)
            else:
                result = moved if result is None else moved + result
        assert result is not None
        return result.to(self.dtype)

    def _gradients(self, cotangent: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        found = []
        for i in wanted:
            if i == 0:
                u = cotangent if self.weight is None else cotangent * self.weight
                found.append(self._moved(u).to(self.dtype))
            else:
                terms = cotangent * self.xhat
                over = list(range(terms.dim() - len(self.last)))
                found.append((terms.sum(over) if over else terms).to(self.weight.dtype))
        return found

    def batch_dim(self, dims: Sequence[int | None]) -> int | None:
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
        t = value_of(x)
        self.format = _group_format(t)
        self.x, self.weight, self.bias = t.contiguous(memory_format=self.format), value_of(weight), value_of(bias)
        self.groups, self.eps, self.mean, self.rstd = groups, eps, mean, rstd
        self.channels = [-1] + [1] * (t.dim() - 2)

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
            moved = _plus_product(result, moved, self.weight.view(self.channels))
        elif result is not None:
            moved = moved + result
        return moved.to(self.dtype)

    def _gradients(self, cotangent: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        if self.weight is None and 2 in wanted:
            inner = [i for i in wanted if i != 2]
            of_bias = _sum_but(cotangent, 1).to(self.bias.dtype)
            return [*(self._kernel(cotangent, None, inner) if inner else []), of_bias]
        return self._kernel(cotangent, self.weight, wanted)

    def _kernel(self, u: Tensor, weight: Tensor | None, wanted: Sequence[int]) -> list[Tensor]:
        found = _aten.native_group_norm_backward(
            u.contiguous(memory_format=self.format),
            self.x,
            self.mean,
            self.rstd,
            weight,
            *_sizes(self.shape),
            self.groups,
            [i in wanted for i in range(3)],
        )
        return [found[i] for i in wanted]

    def batch_dim(self, dims: Sequence[int | None]) -> int | None:
        """The first, if that is where the examples are."""
        self._check_affine(dims)
        if dims[0] is not None and dims[0] != 0:
            raise MixesExamples(f"{self.name} is over the examples")
        return dims[0]

    def _normalized(self) -> Tensor:
        return F.group_norm(self.x, self.groups, None, None, self.eps)

    def _summed(self, terms: Tensor, dim: int) -> Tensor:
        return _sum_but(terms, 0, 2)


def _group_format(x: Tensor) -> torch.memory_format:
    """In what order the kernels of group normalization take their arguments; they do not look themselves."""
    if x.device.type == "cpu":
        for dims, order in ((4, torch.channels_last), (5, torch.channels_last_3d)):
            if x.dim() == dims and not x.is_contiguous() and x.is_contiguous(memory_format=order):
                return order
    return torch.contiguous_format


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
    x = x.contiguous(memory_format=_group_format(x))
    result, mean, rstd = torch.native_group_norm(x, value_of(weight), value_of(bias), n, c, positions, num_groups, eps)
    return GroupNorm(input, weight, bias, num_groups, eps, mean, rstd), result


@rule(F.instance_norm)
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
        return BatchNorm(input, weight, bias, running_mean, running_var, eps, differentiated=False), result
    n, c, positions = _sizes(x.shape)
    x = x.contiguous(memory_format=_group_format(x))
    _, mean, rstd = torch.native_group_norm(x, None, None, n, c, positions, c, eps)
    return GroupNorm(input, weight, bias, c, eps, mean, rstd), result


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
        mean, var = _moments(input.detach())
    if weight is not None:  # the function takes all of one dtype
        mean, var = mean.to(weight.dtype), var.to(weight.dtype)
    return F.batch_norm(input, mean, var, weight, bias, False, momentum, eps)
