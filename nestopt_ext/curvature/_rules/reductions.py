"""Functions of many numbers: sums over dimensions, each element with a factor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._tape import REWRITES, MixesExamples, Node, Operand, rule, value_of


def _dims(dim: Any, rank: int) -> tuple[int, ...]:
    """The dimensions that a function goes over, in order; all for None."""
    if dim is None or dim == () or dim == []:
        return tuple(range(rank))
    if rank == 0:
        return ()
    return tuple(sorted(d % rank for d in (dim if isinstance(dim, list | tuple) else (dim,))))


class Sum(Node):
    """A sum over dimensions, of elements times a factor: a tensor like the operand, one over their number, or None."""

    def __init__(self, x: Operand, dims: Sequence[int], keepdim: bool, factor: float | Tensor | None = None) -> None:
        super().__init__(x)
        self.dims, self.keepdim, self.factor = tuple(dims), keepdim, factor
        self.before = value_of(x).shape
        self.kept = tuple(1 if d in self.dims else size for d, size in enumerate(self.before))
        self.shares_memory = not isinstance(factor, Tensor)  # what goes back is one number for many elements

    def jvp(self, tangents: Sequence[Tensor | None]) -> Tensor:
        tangent = tangents[0]
        assert tangent is not None
        if isinstance(self.factor, Tensor):
            tangent = tangent * self.factor
        if not self.dims:
            return tangent
        if isinstance(self.factor, float):
            return tangent.mean(self.dims, keepdim=self.keepdim)
        return tangent.sum(self.dims, keepdim=self.keepdim)

    def vjp(self, i: int, cotangent: Tensor, into: Tensor | None) -> Tensor:
        cotangent = cotangent.reshape(self.kept)
        if isinstance(self.factor, Tensor):
            return cotangent * self.factor if into is None else into.addcmul_(cotangent, self.factor)
        if into is not None:
            return into.add_(cotangent, alpha=1 if self.factor is None else self.factor)
        return (cotangent if self.factor is None else cotangent * self.factor).expand(self.before)

    def batch_dim(self, dims: Sequence[int | None], batch: int) -> int | None:
        dim = dims[0]
        if dim is None or self.keepdim:
            if dim in self.dims and batch != 1:
                raise MixesExamples("a sum is over examples")
            return dim
        if dim in self.dims:
            raise MixesExamples("a sum is over examples")
        return dim - sum(d < dim for d in self.dims)


@rule(torch.sum, Tensor.sum)
def total(input: Operand, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    x = value_of(input)
    if dtype not in (None, x.dtype):
        return NotImplemented
    dims = _dims(dim, x.dim())
    return Sum(input, dims, keepdim), x.sum(dim, keepdim=keepdim) if x.dim() else x.sum()


@rule(torch.mean, Tensor.mean)
def mean(input: Operand, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    x = value_of(input)
    if dtype not in (None, x.dtype) or not x.numel():
        return NotImplemented
    dims = _dims(dim, x.dim())
    value = x.mean(dim, keepdim=keepdim) if x.dim() else x.mean()
    return Sum(input, dims, keepdim, value.numel() / x.numel()), value


def _kept(value: Tensor, dims: tuple[int, ...], keepdim: bool) -> Tensor:
    """A result with its dimensions kept, as it is asked for."""
    return value if keepdim or not dims else value.squeeze(dims)


@rule(torch.amax, Tensor.amax)
def amax(input: Operand, dim: Any = (), keepdim: bool = False) -> Any:
    return _extreme(input, dim, keepdim, torch.amax)


@rule(torch.amin, Tensor.amin)
def amin(input: Operand, dim: Any = (), keepdim: bool = False) -> Any:
    return _extreme(input, dim, keepdim, torch.amin)


def _extreme(input: Operand, dim: Any, keepdim: bool, function: Any) -> Any:
    """The derivative is shared by the elements that are the extreme one."""
    x = value_of(input)
    dims = _dims(dim, x.dim())
    if not x.is_floating_point() or not dims:
        return NotImplemented
    value = function(x, dims, keepdim=True)
    reached = (x == value).to(x.dtype)
    return Sum(input, dims, keepdim, reached / reached.sum(dims, keepdim=True)), _kept(value, dims, keepdim)


@rule(torch.logsumexp, Tensor.logsumexp)
def logsumexp(input: Operand, dim: Any, keepdim: bool = False) -> Any:
    x = value_of(input)
    dims = _dims(dim, x.dim())
    if not x.is_floating_point() or not dims:
        return NotImplemented
    value = x.logsumexp(dims, keepdim=True)
    # Of minus infinity alone the result is that, and has no derivative.
    factor = torch.exp(x - torch.where(value == -torch.inf, 0.0, value).to(x.dtype))
    return Sum(input, dims, keepdim, factor), _kept(value, dims, keepdim)


@rule(torch.var, Tensor.var)
def var(
    input: Operand, dim: Any = None, unbiased: bool = True, keepdim: bool = False, *, correction: Any = None
) -> Any:
    return _spread(input, dim, keepdim, int(unbiased) if correction is None else correction, root=False)


@rule(torch.std, Tensor.std)
def std(
    input: Operand, dim: Any = None, unbiased: bool = True, keepdim: bool = False, *, correction: Any = None
) -> Any:
    return _spread(input, dim, keepdim, int(unbiased) if correction is None else correction, root=True)


def _spread(input: Operand, dim: Any, keepdim: bool, correction: float, root: bool) -> Any:
    """Variances: the derivative of the mean in them cancels."""
    x = value_of(input)
    if isinstance(dim, bool) or x.dim() == 0:  # var(unbiased)
        return NotImplemented
    dims = _dims(dim, x.dim())
    center = x.mean(dims, keepdim=True)
    value = x.var(dims, correction=correction, keepdim=True)
    count = x.numel() // max(value.numel(), 1) - correction
    factor = (x - center) * (2 / count) if count else torch.full_like(x, torch.nan)
    if root:
        value = value.sqrt()
        factor = factor / (2 * value)
    return Sum(input, dims, keepdim, factor), _kept(value, dims, keepdim)


@rule(torch.norm, Tensor.norm)
def norm(
    input: Operand, p: Any = "fro", dim: Any = None, keepdim: bool = False, out: Any = None, dtype: Any = None
) -> Any:
    if p not in (2, "fro") or out is not None or dtype is not None:
        return NotImplemented
    return vector_norm(input, 2, dim, keepdim)


@rule(torch.linalg.vector_norm)
def vector_norm(x: Operand, ord: Any = 2, dim: Any = None, keepdim: bool = False) -> Any:
    """Of what is zero the derivative is taken to be zero."""
    elements = value_of(x)
    dims = _dims(dim, elements.dim())
    if ord != 2 or not elements.is_floating_point() or not dims:
        return NotImplemented
    value = torch.linalg.vector_norm(elements, 2, dims, keepdim=True)
    factor = torch.where(value == 0, 0.0, elements / value).to(elements.dtype)
    return Sum(x, dims, keepdim, factor), _kept(value, dims, keepdim)


def normalize(input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Any = None) -> Any:
    """Divided by its norm."""
    return NotImplemented if out is not None else input / input.norm(p, dim, keepdim=True).clamp_min(eps)


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Directions v of length g: one for each index of ``dim``, or one in all for -1."""
    dims = [d for d in range(v.dim()) if d != dim]
    lengths: Tensor = torch.linalg.vector_norm(v, 2, dims, keepdim=True)
    return v * (g / lengths)


REWRITES[F.normalize] = normalize
REWRITES[torch._weight_norm] = weight_norm


def _max(function: Any, chosen: Any) -> Any:
    """Of a tensor, along a dimension, with where it is found, or of two tensors."""

    def extreme(input: Tensor, dim: Any = None, keepdim: bool = False, *, other: Any = None) -> Any:
        other = dim if isinstance(dim, Tensor) else other
        if other is not None:
            return torch.maximum(input, other) if function is torch.max else torch.minimum(input, other)
        if dim is None:
            return input.amax() if function is torch.max else input.amin()
        index = chosen(input.detach(), dim, keepdim=True)
        values = input.gather(dim, index) if input.dim() else input.clone()
        if not keepdim and input.dim():
            values, index = values.squeeze(dim), index.squeeze(dim)
        return getattr(torch.return_types, function.__name__)((values, index))

    return extreme


REWRITES[torch.max] = REWRITES[Tensor.max] = _max(torch.max, torch.argmax)
REWRITES[torch.min] = REWRITES[Tensor.min] = _max(torch.min, torch.argmin)
