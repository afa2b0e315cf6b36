r"""The maps that first-order methods make of one eigenvalue of a game's Jacobian, as roots of polynomials.

On a game with constant Jacobian J every method whose step is a linear filter of its gradients obeys, along an
eigenvector with eigenvalue s and with x the shift by one step,

    x - 1 = -lr s N(x) / D(x),    so    (x - 1) D(x) + lr s N(x) = 0.

If two players of a bilinear zero-sum game (s = +- i sigma) take turns, the second sees the first one's new parameters:

    (x - 1)^2 D(x)^2 + lr^2 sigma^2 x N(x)^2 = 0.

The filters N / D: momentum x(x - A)/(x^2 - 2Ax + |beta|^2) with A = Re beta, for a real beta x/(x - beta); Nesterov's
adds 1 + beta times that; optimistic gradients 2 - 1/x. Extragradient is gradient descent with lr s (1 - lr s) for lr s.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Method: TypeAlias = Literal["momentum", "nesterov", "optimistic", "extragradient"]
METHODS: tuple[Method, ...] = ("momentum", "nesterov", "optimistic", "extragradient")

#: A polynomial: its coefficients, highest power first, each a number or a tensor that broadcasts with the others.
Polynomial: TypeAlias = list[Tensor]


def simultaneous_roots(method: Method, step: Tensor, beta: Tensor) -> Tensor:
    """The eigenvalues of the map for ``step`` = lr s, shape (..., degree); a real ``beta`` leaves out those unused.

    They are found as u = x - 1, from u D(1 + u) + step N(1 + u): near 1, where stability is decided, u keeps digits
    that x has not got, and where nothing moves one root is 1 without rounding.
    """
    numerator, denominator = (_around_one(p) for p in _filter(method, beta))
    if method == "extragradient":
        step = step * (1 - step)
    drift = [*denominator[1:], 0 * denominator[0]]
    pulled = [coefficient * step for coefficient in numerator]
    return 1 + _roots([denominator[0], *(a + b for a, b in zip(drift, pulled, strict=True))])


def alternating_roots(method: Method, turn: Tensor, beta: Tensor) -> Tensor:
    """The eigenvalues of the map of both players for ``turn`` = lr sigma, shape (..., 2 degree).

    With x = y^2 the polynomial is a product of two factors whose roots differ by sign; one of them, with y = i u, is

        P(-u^2) - turn u N(-u^2),    P(x) = (x - 1) D(x),

    which has real coefficients and, for small steps, simple roots where the polynomial in x has double ones at 1: the
    roots keep their digits where stability is decided.
    """
    numerator, denominator = _filter(method, beta)
    drift = _times_shift_minus_one(denominator)
    degree = len(drift) - 1
    factor: Polynomial = []
    for power in range(degree, -1, -1):
        sign = (-1) ** (degree - power)
        factor.append(sign * drift[degree - power])
        if power > 0:
            factor.append(sign * turn * numerator[degree - power])
    return -_roots(factor).square()


def _filter(method: Method, beta: Tensor) -> tuple[Polynomial, Polynomial]:
    """Numerator and denominator, of equal length; the denominator's first coefficient is 1."""
    one = torch.ones_like(beta.real)
    if method == "optimistic":
        return [2 * one, -one], [one, 0 * one]
    if method == "extragradient":
        return [one], [one]
    if not beta.is_complex():
        return ([one, 0 * one] if method == "momentum" else [1 + beta, -beta]), [one, -beta]
    real, squared = beta.real, beta.abs().square()
    denominator = [one, -2 * real, squared]
    if method == "momentum":
        return [one, -real, 0 * one], denominator
    return [1 + real, -2 * real - squared, squared], denominator


def _around_one(polynomial: Polynomial) -> Polynomial:
    """The polynomial in u = x - 1, by repeated division by x - 1."""
    shifted = list(polynomial)
    for end in range(len(shifted), 1, -1):
        for i in range(1, end):
            shifted[i] = shifted[i] + shifted[i - 1]
    return shifted


def _times_shift_minus_one(polynomial: Polynomial) -> Polynomial:
    """(x - 1) times the polynomial."""
    inner = [b - a for a, b in pairwise(polynomial)]
    return [polynomial[0], *inner, -polynomial[-1]]


def _roots(monic: Sequence[Tensor]) -> Tensor:
    """All roots of polynomials whose first coefficient is 1, complex128, as eigenvalues of companion matrices."""
    coefficients = torch.stack(torch.broadcast_tensors(*monic[1:]), dim=-1)  # type: ignore[no-untyped-call]
    degree = coefficients.shape[-1]
    companion = torch.diag(coefficients.new_ones(degree - 1), -1).expand(*coefficients.shape, degree).clone()
    companion[..., 0, :] = -coefficients
    roots: Tensor = torch.linalg.eigvals(companion)
    return roots
