"""One function for every solver."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _lists, _reference
from .._types import MatVec, SameTensors, TensorList, Tensors
from ._outcome import Outcome, Solver, Testimony, Verdict, judge, testify, warn
from ._product import Product
from ._solution import Solution
from ._system import System


def solve(
    matvec: MatVec, v: SameTensors, solver: Solver, *, start: Tensors | None = None, batched: bool = False
) -> Solution[SameTensors]:
    r"""Solve :math:`(A + \delta I) x = v` and say how well it went.

    ``matvec`` is any callable that returns A times the tensors it is given, in the same structure; the tensors it is
    given may be read only, and only during the call. A curvature operator is taken at its word about shapes and dtypes,
    and asked for whatever it has in closed form. ``v`` (Tensor, list, tuple or dict of float32, float64, bfloat16 or
    float16 tensors) is not modified. ``solver`` is the method with its options, damping :math:`\delta` among them:
    :class:`Neumann`, :class:`ConjugateGradient`, :class:`FixedPoint`, :class:`Exact`, :class:`Nystrom`,
    :class:`Woodbury` or :class:`Identity`.

    ``start``, tensors like ``v``, is where to begin: A d = v - (A + damping I) start is solved, at the price of one
    product, and the solution is start + d. Tolerances stay relative to the norm of ``v``.

    With ``batched`` every tensor of ``v`` is [k, *shape], and the k equations are solved at once, each with its own
    step lengths and its own end. An operator multiplies all of them in one go; any other matvec is called for one after
    the other, with tensors of the given ``shape``. k products are counted where one would be.

    The residual is the true one, v - (A + damping I) x, at the price of one product, which is counted. The status is
    ``non_finite`` when x or the residual holds NaN or Inf; ``converged`` when the norm of the residual is at most the
    ``rtol`` of the solver times the norm of ``v``, or at rounding level; else what the method saw: ``diverged``,
    ``negative_curvature``, ``breakdown`` or ``max_terms``. Rounding level is 64 eps of the dtype (2 eps in 16 bits)
    times |v| + |A| |x|, the normwise backward error with the norm of A as far as the method knows it (1/alpha in a
    series), but at most |v| / 10, and sqrt(eps) |v| in a series, whose step may be far too small. Of several right-hand
    sides the worst counts. None of these raises or warns.

    Raises TypeError or ValueError when an argument, or what ``matvec`` returns, breaks these rules.

    >>> import torch
    >>> from nestopt_ext.solvers import ConjugateGradient, Neumann
    >>> solution = solve(lambda v: 2 * v, torch.tensor(3.0), Neumann(num_terms=60, alpha=0.4))
    >>> solution.value, solution.num_products, solution.status.name
    (tensor(1.5000), 61, 'converged')
    >>> curvature = torch.tensor([1.0, 2.0])
    >>> solve(lambda v: curvature * v, torch.ones(3, 2), ConjugateGradient(), batched=True).value
    tensor([[1.0000, 0.5000],
            [1.0000, 0.5000],
            [1.0000, 0.5000]])
    """
    caller = "solve"
    flat, structure = _lists.flatten(caller, "v", v)
    labels = structure.labels("v")
    _lists.check_floating(caller, labels, flat)
    check_solver(caller, solver)
    columns, like = _columns(caller, labels, flat) if batched else (None, flat)
    product = Product(caller, matvec, structure, like)
    begin = _start(caller, structure, start, flat)
    system, outcome = _run(System(product, flat, columns), solver, begin)
    residual_norm = system.lengths(_residual(system, outcome.value, _damping(solver)))
    verdict = judge(caller, outcome, residual_norm, _tolerance(system, outcome))
    return Solution(structure.pack(outcome.value), residual_norm, product.count, verdict.status)


@dataclass(frozen=True)
class Inverse:
    """A solution without its residual, and what the host has yet to read of how it was found."""

    caller: str
    value: TensorList
    num_products: int
    testimony: Testimony

    @functools.cached_property
    def verdict(self) -> Verdict:
        """How the solve ended; the first look waits for the device."""
        return self.testimony.verdict(self.caller)


def invert(caller: str, product: Product, v: TensorList, solver: Solver, *, start: TensorList | None = None) -> Inverse:
    """The solution alone, with no product spent on the residual; whether to :func:`warn` is left to the caller.

    ``start`` is a list like ``v`` or None; with it one product is spent. The device is not waited for, unless the
    options of the solver say so. The verdict is what the method saw, so a series that ends at its last term is
    ``max_terms`` however small that is.
    """
    _, outcome = _run(System(product, v), solver, start)
    return Inverse(caller, outcome.value, product.count, testify(outcome))


def inverse_tensors(caller: str, matvec: MatVec, v: SameTensors, solver: Solver) -> SameTensors:
    """:func:`invert` for a public function that takes tensors in any structure, returns them, and warns."""
    flat, structure = _lists.flatten(caller, "v", v)
    _lists.check_floating(caller, structure.labels("v"), flat)
    inverse = invert(caller, Product(caller, matvec, structure, flat), flat, solver)
    warn(caller, inverse.verdict)
    result: SameTensors = structure.pack(inverse.value)
    return result


def check_solver(caller: str, solver: object) -> None:
    if isinstance(solver, type) or not callable(getattr(solver, "run", None)):
        got = solver.__name__ if isinstance(solver, type) else _lists.value_name(solver)
        raise TypeError(f"{caller}: solver must be a solver such as Neumann(num_terms=3); got {got}.")


def _run(system: System, solver: Solver, start: TensorList | None) -> tuple[System, Outcome]:
    """The system and its solution, found as a correction where there is a start."""
    if start is None:
        return system, solver.run(system)
    norm = system.length()
    correction = _residual(system, start, _damping(solver))
    outcome = solver.run(System(system.product, correction, system.columns, norm))
    value = [t.detach().to(c.dtype) + x.to(c.dtype) for t, c, x in zip(start, correction, outcome.value, strict=True)]
    value = [t.to(like.dtype) for t, like in zip(value, system.product.like, strict=True)]
    return system, dataclasses.replace(outcome, value=value, is_bounded=False)


def _damping(solver: Solver) -> float:
    """What the solver adds to the diagonal of A."""
    return float(getattr(solver, "damping", 0.0))


def _columns(caller: str, labels: list[str], flat: TensorList) -> tuple[int, TensorList]:
    """The number of right-hand sides, and what one of them looks like, in no memory of its own."""
    for label, t in zip(labels, flat, strict=True):
        if t.dim() == 0:
            raise ValueError(
                f"{caller}: {label} must be [k, *shape] with batched=True; got a 0-dim tensor. Stack the right-hand"
                " sides along a new first dimension."
            )
        if len(t) != len(flat[0]):
            raise ValueError(
                f"{caller}: {label} must hold {len(flat[0])} right-hand sides, as {labels[0]} does; got {len(t)}."
            )
    like = [t.detach().new_zeros(()).expand(t.shape[1:]) for t in flat]
    return (len(flat[0]) if flat else 1), like


def _start(caller: str, structure: _lists.Structure, start: Tensors | None, v: TensorList) -> TensorList | None:
    if start is None:
        return None
    flat = structure.match(caller, "start", start)
    _lists.check_like(caller, structure.labels("start"), flat, v)
    return [t.detach() for t in flat]


def _tolerance(system: System, outcome: Outcome) -> Tensor:
    """The norm of a residual that counts as converged: what was asked for, and what rounding alone may leave.

    In 16 bits only the result and each product are rounded; else the rounding of every term of a sum adds to it.
    """
    like = system.product.like
    level = max((torch.finfo(t.dtype).eps * (2 if t.dtype.itemsize == 2 else 64) for t in like), default=0.0)
    right = system.lengths(system.v)
    solved = system.lengths(outcome.value) * outcome.curvature.to(right.device)
    rounding = torch.minimum(level * (right + solved), outcome.most_rounding * right)
    return torch.maximum(rounding, outcome.rtol * right)


def _residual(system: System, x: TensorList, damping: float) -> TensorList:
    """The list v - (A + damping I) x, in the dtype that sums are kept in; nothing is waited for."""
    residual = []
    for product, right, t in zip(system.apply(x), system.v, x, strict=True):
        shifted = _reference.plus(product.to(_reference.opmath(right.dtype)), t, damping)
        residual.append(right.detach() - shifted)
    return residual
