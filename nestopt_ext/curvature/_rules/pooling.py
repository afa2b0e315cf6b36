"""Pooling: the largest of each window, whose places are kept, and averages, which are linear."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._tape import MixesExamples, Node, Operand, accumulated, rule, value_of

_aten = torch.ops.aten


class Pool(Node):
    """A function of windows over the last n dimensions of x."""

    def __init__(self, x: Operand, n: int, result: Tensor) -> None:
        super().__init__(x)
        self.n = n
        self.shape, self.size = value_of(x).shape, result.shape

    def batch_dim(self, dims: Sequence[int | None], batch: int) -> int | None:
        """That of x, unless windows go over it."""
        if dims[0] is not None and dims[0] >= len(self.shape) - self.n:
            raise MixesExamples("a pooling layer has examples in its windows")
        return dims[0]


class MaxPool(Pool):
    """The largest of each window; ``places`` are numbered within the last n dimensions of x."""

    def __init__(self, x: Operand, n: int, result: Tensor, places: Tensor) -> None:
        super().__init__(x, n, result)
        self.places = places.flatten(-n).contiguous()

    def jvp(self, tangents: Sequence[Tensor | None]) -> Tensor:
        assert tangents[0] is not None
        return tangents[0].flatten(-self.n).gather(-1, self.places).view(self.size)

    def vjp(self, i: int, cotangent: Tensor, into: Tensor | None) -> Tensor:
        u = cotangent.reshape(self.places.shape)
        if into is not None and into.is_contiguous():
            into.flatten(-self.n).scatter_add_(-1, self.places, u)
            return into
        zeros = u.new_zeros((*self.shape[: -self.n], math.prod(self.shape[-self.n :])))
        return accumulated(zeros.scatter_add_(-1, self.places, u).view(self.shape), into)


class AveragePool(Pool):
    """An average: ``forward`` as a function of x, and ``backward`` of a cotangent and of something of the shape of x.

    ``divisor`` is given where the windows cover x without overlap: then each element has its share of one.
    """

    def __init__(
        self,
        x: Operand,
        n: int,
        result: Tensor,
        forward: Callable[[Tensor], Tensor],
        backward: Callable[[Tensor, Tensor], Tensor],
        divisor: int | None,
    ) -> None:
        super().__init__(x, n, result)
        self.forward, self.backward, self.divisor = forward, backward, divisor
        self.like = value_of(x).new_empty(()).expand(self.shape)
        before = self.shape[:-n]
        inner, outer = self.shape[-n:], self.size[-n:]
        self.tiles = [*before, *(s for o in outer for s in (o, 1))]
        if divisor is not None:
            self.tiled = [*before, *(s for i, o in zip(inner, outer, strict=True) for s in (o, i // o))]

    def jvp(self, tangents: Sequence[Tensor | None]) -> Tensor:
        assert tangents[0] is not None
        return self.forward(tangents[0])

    def vjp(self, i: int, cotangent: Tensor, into: Tensor | None) -> Tensor:
        if self.divisor is None:
            return accumulated(self.backward(cotangent, self.like), into)
        tiles = cotangent.reshape(self.tiles) / self.divisor
        if into is not None and into.is_contiguous():
            into.view(self.tiled).add_(tiles)
            return into
        return accumulated(tiles.expand(self.tiled).contiguous().view(self.shape), into)


def _is_tiled(inner: Sequence[int], outer: Sequence[int]) -> bool:
    return all(o > 0 and i % o == 0 for i, o in zip(inner, outer, strict=True))


def _register_max_pool(n: int, pool: Any, adaptive: Any, plain: Any) -> None:
    find = getattr(F, f"max_pool{n}d_with_indices")
    find_adaptive = getattr(F, f"adaptive_max_pool{n}d_with_indices")

    @rule(pool, plain)
    def max_pool(
        input: Operand,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Any:
        if return_indices:
            return NotImplemented
        result, places = find(value_of(input), kernel_size, stride, padding, dilation, ceil_mode)
        return MaxPool(input, n, result, places), result

    @rule(adaptive)
    def adaptive_max_pool(input: Operand, output_size: Any, return_indices: bool = False) -> Any:
        if return_indices:
            return NotImplemented
        result, places = find_adaptive(value_of(input), output_size)
        return MaxPool(input, n, result, places), result


_register_max_pool(1, F.max_pool1d, F.adaptive_max_pool1d, torch.max_pool1d)
_register_max_pool(2, F.max_pool2d, F.adaptive_max_pool2d, torch.max_pool2d)
_register_max_pool(3, F.max_pool3d, F.adaptive_max_pool3d, torch.max_pool3d)


def _register_average_pool(n: int, pool: Any, adaptive: Any) -> None:
    # The functions of sequences have no backward of their own: they are images of one row.
    back = _aten.avg_pool3d_backward if n == 3 else _aten.avg_pool2d_backward
    adaptive_back = _aten._adaptive_avg_pool3d_backward if n == 3 else _aten._adaptive_avg_pool2d_backward

    def backward(of_images: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        if n != 1:
            return of_images
        return lambda u, like: of_images(u.unsqueeze(-2), like.unsqueeze(-2)).squeeze(-2)

    def each(value: Any, missing: int) -> list[int]:
        values = [value] if isinstance(value, int) else list(value)
        values = values * n if len(values) == 1 else values
        return [missing, *values] if n == 1 else values

    @rule(pool)
    def avg_pool(
        input: Operand,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Any:
        x = value_of(input)
        extents = each(kernel_size, 1)
        steps = extents if stride is None or stride in ((), []) else each(stride, 1)
        around = each(padding, 0)
        divisor = (divisor_override,) if n > 1 else ()

        def forward(t: Tensor) -> Tensor:
            found: Tensor = pool(t, kernel_size, stride, padding, ceil_mode, count_include_pad, *divisor)
            return found

        def of_images(u: Tensor, like: Tensor) -> Tensor:
            found: Tensor = back(u, like, extents, steps, around, ceil_mode, count_include_pad, divisor_override)
            return found

        result = forward(x)
        inner, outer = x.shape[-n:], result.shape[-n:]
        tiled = steps == extents and not any(around)
        tiled = tiled and all(i == o * k for i, o, k in zip(inner, outer, extents[-n:], strict=True))
        share = (divisor_override or math.prod(extents)) if tiled else None
        return AveragePool(input, n, result, forward, backward(of_images), share), result

    @rule(adaptive)
    def adaptive_avg_pool(input: Operand, output_size: Any) -> Any:
        x = value_of(input)
        result = adaptive(x, output_size)
        inner, outer = x.shape[-n:], list(result.shape[-n:])
        tiled = _is_tiled(inner, outer)
        share = math.prod(i // o for i, o in zip(inner, outer, strict=True)) if tiled else None

        def forward(t: Tensor) -> Tensor:
            found: Tensor = adaptive(t, outer)
            return found

        def mean(t: Tensor) -> Tensor:
            return t.mean(list(range(-n, 0)), keepdim=True)

        whole = all(o == 1 for o in outer)
        return AveragePool(input, n, result, mean if whole else forward, backward(adaptive_back), share), result


_register_average_pool(1, F.avg_pool1d, F.adaptive_avg_pool1d)
_register_average_pool(2, F.avg_pool2d, F.adaptive_avg_pool2d)
_register_average_pool(3, F.avg_pool3d, F.adaptive_avg_pool3d)
