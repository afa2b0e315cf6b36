r"""The inverse of a positive definite curvature by conjugate gradients.

After k products the iterate is the best one, in the norm of A, in the span of :math:`v, A v, \dots, A^{k-1} v`; a
relative error needs about :math:`\sqrt{\kappa}` products where a Neumann series needs :math:`\kappa`.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from .._types import MatVec, SameTensors, TensorList
from ._arguments import (
    CheckEvery,
    check_check_every,
    check_count,
    check_damping,
    check_preconditioner,
    check_rtol,
    looks,
)
from ._outcome import Finding, Outcome, unfit_right_side
from ._solution import Status
from ._solve import inverse_tensors
from ._space import Space
from ._system import System


@dataclass(frozen=True)
class ConjugateGradient:
    r"""Solve :math:`(A + \delta I) x = v` by conjugate gradients, for a symmetric positive definite
    :math:`A + \delta I`.

    ``max_iters`` (int >= 1) counts products. ``rtol`` in [0, 1) is the residual, relative to the norm of v, at which a
    right-hand side is done; its iterate is then frozen on the device, each right-hand side by itself. 0 goes on to
    where another step would change nothing. ``damping`` = delta (units of curvature) is finite and >= 0.

    ``preconditioner`` is a callable that returns M times tensors like v for a symmetric positive definite M close to
    the inverse of A + damping I, such as that of KFAC. ``rtol`` is about the residual without M all the same.

    ``check_every`` is after how many iterations the host looks whether all is done, and each look waits for the device.
    ``"auto"`` looks at every one where all tensors are on the CPU, and otherwise never, as None does: ``max_iters``
    products are then spent, and those after the end change nothing.

    A direction p of negative curvature, p' (A + delta I) p < 0, ends the solve with the iterate before it, as in
    Steihaug (The conjugate gradient method and trust regions in large scale optimization, 1983), and the status
    ``negative_curvature``. Where the very first direction is one there is no iterate but zero, and the result is that
    direction, which is v, as in Nocedal and Wright (Numerical optimization, algorithm 7.1); we scale it by
    \|v\|^2 / \|v'(A + delta I) v\|, so that c A gives x / c. A direction along which the curvature is zero, or below
    rounding beside the largest one met, ends it with ``breakdown``. NaN is never taken for an end.

    State is kept in float32 for 16-bit tensors, and with a product takes about five times the memory of v. v is scaled
    by a power of two, so its size does not matter.

    Raises TypeError or ValueError, naming the option, when one is out of range.

    Source: Hestenes and Stiefel (Methods of conjugate gradients for solving linear systems, 1952).

    >>> import torch
    >>> from nestopt_ext.solvers import solve
    >>> solution = solve(lambda v: 2 * v, torch.tensor(3.0), ConjugateGradient())
    >>> solution.value, solution.num_products, solution.status.name       # one product, and one for the residual
    (tensor(1.5000), 2, 'converged')
    """

    max_iters: int = 20
    rtol: float = 1e-5
    damping: float = 0.0
    _: KW_ONLY
    preconditioner: MatVec | None = None
    check_every: CheckEvery = "auto"

    def __post_init__(self) -> None:
        _check("ConjugateGradient", self.max_iters, self.rtol, self.damping)
        check_preconditioner("ConjugateGradient", self.preconditioner)
        check_check_every("ConjugateGradient", self.check_every)

    def run(self, system: System) -> Outcome:
        """The iterate for the right-hand sides of ``system``."""
        space = Space(system)
        state = _State(system, space, self)
        look = looks(self.check_every, system.v)
        for i in range(self.max_iters):
            if look and i % look == 0 and not bool(state.active.any()):
                break
            state.iterate(first=i == 0)
        used = f"max_iters={self.max_iters}, rtol={self.rtol:.4g}, damping={self.damping:.4g}"
        evidence = _Ends(state.ends(), used)
        return Outcome(state.solution(), evidence, state.curvature(), self.rtol)


def cg_ihvp(matvec: MatVec, v: SameTensors, *, max_iters: int, rtol: float, damping: float = 0.0) -> SameTensors:
    r"""An inverse curvature product :math:`(A + \delta I)^{-1} v` by conjugate gradients.

    ``matvec`` is any callable that returns A times the tensors it is given, in the same structure, for a symmetric A;
    the tensors it is given may be read only, and only during the call. ``v`` (Tensor, list, tuple or dict of float32,
    float64, bfloat16 or float16 tensors of any shape) is not modified. At most ``max_iters`` products are spent; the
    solve ends when the norm of the residual is at most ``rtol`` times that of ``v``, and the iterate that reached it is
    what is returned. ``damping`` = delta (units of curvature) is >= 0.

    Returns new tensors like ``v``, without graph. Negative curvature, a singular curvature and NaN or Inf give what
    :class:`ConjugateGradient` says, with one RuntimeWarning. Raises TypeError or ValueError when an argument, or what
    ``matvec`` returns, breaks these rules.

    >>> import torch
    >>> curvature = torch.tensor([1.0, 4.0])
    >>> cg_ihvp(lambda v: curvature * v, torch.tensor([1.0, 1.0]), max_iters=10, rtol=1e-5)
    tensor([1.0000, 0.2500])
    """
    caller = "cg_ihvp"
    _check(caller, max_iters, rtol, damping)
    return inverse_tensors(caller, matvec, v, ConjugateGradient(max_iters, rtol, damping))


class _State:
    """The iterates of all right-hand sides; numbers [] or [k] say how each one goes.

    The solve is for v / ``unit``. ``active`` marks the right-hand sides that are not done; the others take steps of
    length zero and keep their direction, so that a late product changes nothing.
    """

    def __init__(self, system: System, space: Space, options: ConjugateGradient) -> None:
        self._space = space
        self._system = system
        self._damping = options.damping
        self._inner = None
        if options.preconditioner is not None:
            self._inner = system.beside(system.product.beside(options.preconditioner, "preconditioner"))
        self._zero, self._one = system.scalars(), system.scalars(1.0)
        residual = space.copied(system.v)
        self._start = space.norm(residual)
        self._unit = space.unit(self._start)
        space.scale_(residual, 1 / self._unit)
        self._x = [torch.zeros_like(t) for t in residual]
        self._residual = residual
        self._residual_views = space.views(residual)
        self._length = self._start / self._unit
        # Where the residual is eps^2 of v, a step is below rounding unless the condition number is above 1 / eps.
        target = torch.maximum(options.rtol * system.length() / self._unit, space.eps**2 * self._length)
        self._target = torch.where(target.isfinite(), target, self._zero)
        self.active = ~(self._length <= self._target)
        preconditioned = self._preconditioned()
        self._direction = [t.clone() for t in preconditioned]
        self._direction_views = space.views(self._direction)
        self._square = space.dot(residual, preconditioned)
        self._direction_square = self._square
        self._largest = self._zero
        self._largest_product = self._zero
        self._tiny = system.scalars(torch.finfo(space.scalar).tiny)
        self._end = system.scalars(math.inf)
        self._count = self._zero

    def iterate(self, *, first: bool) -> None:
        space, p = self._space, self._direction
        product = space.gather(self._system.apply(self._direction_views))
        if self._damping:
            product = [a.add(t, alpha=self._damping) for a, t in zip(product, p, strict=True)]
        # The curvature along p in units of the preconditioner: the reciprocal of the step length, an element of the
        # tridiagonal matrix of the Lanczos process, which lies between the extreme eigenvalues of A.
        curvature = space.dot(p, product) / self._square
        self._largest = torch.fmax(self._largest, curvature.abs())
        # Rounding leaves in p'Ap about eps |A| p'p, of which p'p is known without an inner product.
        noise = torch.addcmul(self._tiny, self._largest, self._direction_square / self._square, value=4 * space.eps)
        ended = self.active & (curvature < noise)
        quotient = curvature / noise
        if self._inner is not None:
            unfit = self.active & (self._square <= 0)
            ended, quotient = ended | unfit, torch.where(unfit, self._zero, quotient)
            self._note_size(product)
        self._end = torch.where(ended, quotient, self._end)
        going = self.active & ~ended
        length = curvature.reciprocal()
        step = torch.where(going, length, self._zero)
        if first:
            step = torch.where(self.active & (quotient < -1), length.abs(), step)
        self._count = self._count + self.active
        space.add_(self._x, p, step)
        space.add_(self._residual, product, step, sign=-1)
        del product
        self._turn(going)

    def solution(self) -> TensorList:
        """The iterates; NaN where the residual is not finite, as after a product that overflowed."""
        return self._space.returned(self._x, self._unit + 0 * self._length)

    def curvature(self) -> Tensor:
        """The norm of A + damping I, as far as it was seen."""
        return self._largest if self._inner is None else self._largest_product

    def ends(self) -> TensorList:
        """For each right-hand side its norm, that of its residual, the target, how it ended, and its iterations.

        The third is the last curvature over what rounding leaves of one, or infinity where that was no reason to end.
        """
        return [self._start, self._length, self._target, self._end, self._count]

    def _turn(self, going: Tensor) -> None:
        """The next direction, for the right-hand sides that are not done."""
        space = self._space
        preconditioned = self._preconditioned()
        square = space.dot(self._residual, preconditioned)
        self._length = square.sqrt() if self._inner is None else space.norm(self._residual)
        self.active = going & ~(self._length <= self._target)
        ratio = torch.where(self.active, square / self._square, self._one)
        share = self.active.to(square)
        space.scale_(self._direction, ratio)
        space.add_(self._direction, preconditioned, share)
        # The new residual and the old direction are orthogonal (in the norm of the inverse of M, if there is one).
        self._direction_square = torch.where(
            self.active, torch.addcmul(square, ratio * ratio, self._direction_square), self._direction_square
        )
        self._square = torch.where(self.active, square, self._square)

    def _preconditioned(self) -> TensorList:
        """M times the residual."""
        if self._inner is None:
            return self._residual
        return self._space.gather(self._inner.apply(self._residual_views))

    def _note_size(self, product: TensorList) -> None:
        """The norm of A, as far as a direction shows it; with M the curvature along it does not."""
        size = self._space.norm(product) / self._space.norm(self._direction)
        self._largest_product = torch.fmax(self._largest_product, size)


@dataclass(frozen=True)
class _Ends:
    """How each right-hand side ended, as :meth:`_State.ends` says."""

    found: TensorList
    used: str

    def tensors(self) -> TensorList:
        return self.found

    def read(self, caller: str, numbers: list[list[float]]) -> Finding:
        ends = list(zip(*numbers, strict=True))
        statuses = [_status(residual, target, end) for _, residual, target, end, _ in ends]

        def explain(status: Status) -> str:
            if not all(map(math.isfinite, numbers[0])):
                return unfit_right_side(self.used)
            iterations = next((int(end[-1]) for end, own in zip(ends, statuses, strict=True) if own is status), 0)
            return _explain(status, f"{self.used}; iteration {iterations}")

        return Finding(statuses, explain)


def _status(residual: float, target: float, end: float) -> Status:
    if not math.isfinite(residual):
        return Status.non_finite
    if end < math.inf:
        return Status.negative_curvature if end < -1 else Status.breakdown
    return Status.converged if residual <= target else Status.max_terms


def _explain(status: Status, used: str) -> str:
    if status is Status.negative_curvature:
        return (
            f"A + damping*I must be positive definite for conjugate gradients; got a direction of negative curvature"
            f" ({used}). Raise damping, or use a positive semi-definite curvature (Gauss-Newton). The iterate before it"
            " is returned, or the first direction where there is none."
        )
    if status is Status.breakdown:
        return (
            f"A + damping*I, and a preconditioner, must be positive definite for conjugate gradients; got a direction"
            f" of no curvature ({used}). Raise damping. The iterate before it is returned."
        )
    return (
        f"the result of conjugate gradients is not finite ({used}). Look for NaN or Inf in what matvec and"
        " preconditioner return. The values are returned as they are."
    )


def _check(caller: str, max_iters: object, rtol: object, damping: object) -> None:
    check_count(caller, "max_iters", max_iters)
    check_rtol(caller, rtol)
    check_damping(caller, damping)
