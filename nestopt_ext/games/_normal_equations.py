"""Conjugate gradients on the normal equations, for a linear map that is square but not symmetric."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._types import TensorList
from ._players import dot, scaled

Product = Callable[[TensorList], TensorList]

#: A look at the residual waits for the device, so it is taken once in so many iterations.
_LOOK_EVERY = 4


@dataclass(frozen=True)
class LinearSolution:
    """``value``, and per start the norm of its residual, relative to that of the right-hand side."""

    value: TensorList
    relative_residual: Tensor
    num_iterations: int


def solve(
    product: Product,
    transposed: Product,
    v: TensorList,
    start: TensorList,
    *,
    batch: int | None,
    max_iters: int,
    rtol: float,
) -> LinearSolution:
    """M x = v by CG on M'M x = M'v, with the residual of the former at hand (CGLS); M'M is SPD wherever M is regular.

    A start stops moving once its residual is at most ``rtol`` times the norm of its part of ``v``, or where M' r = 0
    with r not zero, which only a singular M can give. The residual is recomputed from ``value`` at the end.
    """
    x = start
    r = _difference(v, product(x))
    s = transposed(r)
    p = s
    square, target = dot(s, s, batch), rtol**2 * dot(v, v, batch)
    iterations = 0
    for iterations in range(max_iters + 1):
        moving = (dot(r, r, batch) > target) & (square > 0)
        if iterations == max_iters or (iterations % _LOOK_EVERY == 0 and not bool(moving.any())):
            break
        q = product(p)
        length = dot(q, q, batch)
        alpha = torch.where(moving & (length > 0), square / length, 0.0)
        x = _sum(x, scaled(alpha, p))
        r = _difference(r, scaled(alpha, q))
        s = transposed(r)
        previous, square = square, dot(s, s, batch)
        p = _sum(s, scaled(torch.where(moving, square / previous, 0.0), p))
    r = _difference(v, product(x))
    size = dot(v, v, batch).sqrt()
    residual = dot(r, r, batch).sqrt()
    return LinearSolution(x, torch.where(residual == 0, residual, residual / size), iterations)


def _sum(a: Sequence[Tensor], b: Sequence[Tensor]) -> TensorList:
    return [x + y for x, y in zip(a, b, strict=True)]


def _difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> TensorList:
    return [x - y for x, y in zip(a, b, strict=True)]
