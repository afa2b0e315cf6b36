"""One function for every solver."""

import torch

from .. import _lists, _reference
from .._types import MatVec, SameTensors, TensorList
from ._outcome import Outcome, Solver, judge, warn
from ._product import Product
from ._solution import Solution


def solve(matvec: MatVec, v: SameTensors, solver: Solver) -> Solution[SameTensors]:
    r"""Solve :math:`(A + \delta I) x = v` and say how well it went.

    ``matvec`` is any callable that returns A times the tensors it is given, in the same structure; the tensors it is
    given may be read only, and only during the call. ``v`` (Tensor, list, tuple or dict of float32, float64, bfloat16
    or float16 tensors) is not modified. ``solver`` (:class:`Neumann`, :class:`Identity`) is the method with its
    options, damping
    :math:`\delta` among them.

    The residual is the true one, v - (A + damping I) x, at the price of one product, which is counted. The status is
    ``non_finite`` when x or the residual holds NaN or Inf; ``converged`` when the norm of the residual is at rounding
    level, which is 64 eps of the dtype (2 eps in 16 bits) times |v| + |x| / alpha, the normwise backward error with
    1/alpha for the size of A, but at most |v| / 10; ``diverged`` when the terms of a series grow; else ``max_terms``.
    None of these raises or warns.

    Raises TypeError or ValueError when an argument, or what ``matvec`` returns, breaks these rules.

    >>> import torch
    >>> from nestopt_ext.solvers import Neumann
    >>> solution = solve(lambda v: 2 * v, torch.tensor(3.0), Neumann(num_terms=60, alpha=0.4))
    >>> solution.value, solution.num_products, solution.status.name
    (tensor(1.5000), 61, 'converged')
    """
    caller = "solve"
    flat, structure = _lists.flatten(caller, "v", v)
    _lists.check_floating(caller, structure.labels("v"), flat)
    check_solver(caller, solver)
    product = Product(caller, matvec, structure, flat)
    outcome = solver.run(product, flat)
    residual_norm = _residual_norm(product, outcome, flat)
    verdict = judge(caller, outcome, residual_norm, _rounding_residual(outcome, flat))
    return Solution(structure.pack(outcome.value), residual_norm, product.count, verdict.status)


def inverse_product(caller: str, product: Product, v: TensorList, solver: Solver) -> TensorList:
    """The solution alone, with no product spent on the residual; warns once if it cannot be trusted."""
    outcome = solver.run(product, v)
    warn(caller, judge(caller, outcome))
    return outcome.value


def check_solver(caller: str, solver: object) -> None:
    if isinstance(solver, type) or not callable(getattr(solver, "run", None)):
        got = solver.__name__ if isinstance(solver, type) else _lists.value_name(solver)
        raise TypeError(f"{caller}: solver must be a solver such as Neumann(num_terms=3); got {got}.")


def _rounding_residual(outcome: Outcome, v: TensorList) -> torch.Tensor:
    """The norm of a residual that rounding alone may leave, for |A| of about 1/alpha.

    In 16 bits only the result and each product are rounded; else the rounding of every term of the sum adds to it.
    """
    level = max((torch.finfo(t.dtype).eps * (2 if t.dtype.itemsize == 2 else 64) for t in v), default=0.0)
    right = _lists.norm(v)
    solved = _lists.norm(outcome.value) / outcome.alpha.to(right.device)
    return torch.minimum(level * (right + solved), 0.1 * right)


def _residual_norm(product: Product, outcome: Outcome, v: TensorList) -> torch.Tensor:
    """The norm of v - (A + damping I) x, a 0-dim tensor that is not waited for."""
    residual = product(outcome.value)
    for i, (right, x) in enumerate(zip(v, outcome.value, strict=True)):
        shifted = _reference.plus(residual[i].to(_reference.opmath(right.dtype)), x, outcome.damping)
        residual[i] = shifted.sub_(right.detach())
    return _lists.norm(residual)
