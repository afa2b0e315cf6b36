"""Why a hypergradient is off: its error taken apart by what could have been done exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..solvers import FixedPoint, Identity, Neumann, Solver, Status
from ._report import Finding
from ._spectrum import Spectrum


@dataclass(frozen=True)
class Evidence:
    """What is known at the params as they are; ``total`` maps an inverse product to the hypergradient with it."""

    solver: Solver
    has_curvature: bool
    rtol: float
    #: Eigenvalues of at most this fraction of the largest count as zero.
    singular: float
    status: Status
    residual: float
    hessian: Spectrum
    solved: Spectrum
    damping: float
    alpha: float | None
    method: Tensor
    total: Callable[[Tensor], Tensor]

    @property
    def is_finite(self) -> bool:
        return bool(self.hessian.values.isfinite().all() & self.solved.values.isfinite().all())

    @property
    def exact_method(self) -> str:
        return "dense" if self.hessian.is_dense else f"Lanczos, {len(self.hessian.values)} products"

    @property
    def solved_extremes(self) -> tuple[float, float]:
        low, high = self.solved.extremes
        return low + self.damping, high + self.damping

    @property
    def alpha_limit(self) -> float:
        high = self.solved_extremes[1]
        return 2 / high if high > 0 else math.inf

    @cached_property
    def exact(self) -> Tensor:
        return self.total(self.hessian.solve(0.0, self.singular))

    @cached_property
    def damped(self) -> Tensor:
        """With the matrix that the solver is given, inverted exactly."""
        return self.total(self.solved.solve(self.damping, self.singular))

    @cached_property
    def undamped(self) -> Tensor:
        return self.total(self.solved.solve(0.0, self.singular))

    @cached_property
    def solver_error(self) -> float:
        return _relative(self.method, self.damped)

    @cached_property
    def damping_error(self) -> float:
        return _relative(self.damped, self.undamped) if self.damping else 0.0

    @cached_property
    def curvature_error(self) -> float:
        return _relative(self.undamped, self.exact) if self.has_curvature else 0.0

    def series(self, alpha: float, num_terms: int) -> Tensor:
        """The hypergradient with the sum over the terms 0 .. num_terms of the Neumann series."""

        def function(values: Tensor) -> Tensor:
            shifted = alpha * (values + self.damping)
            covered = 1 - (1 - shifted) ** (num_terms + 1)
            limit = torch.full_like(values, alpha * (num_terms + 1))
            return torch.where(shifted.abs() > 1e-12, alpha * covered / shifted, limit)

        return self.total(self.solved.apply(function))


def diagnose(evidence: Evidence) -> Iterator[Finding]:
    """The findings about the matrix, the solver, its damping and the curvature."""
    low, high = evidence.solved_extremes
    level = evidence.singular * max(abs(low), abs(high))
    whose = "curvature" if evidence.has_curvature else "Hessian of inner_loss"
    indefinite = low < -level
    if indefinite:
        yield Finding(
            "curvature_indefinite",
            "error",
            f"the {whose} plus damping has the eigenvalue {low:.4g} < 0, and the series of it grows. Train the params"
            f" to a minimum, raise damping above {evidence.damping - low:.4g}, or use a Gauss-Newton curvature.",
        )
    elif low <= level:
        yield Finding(
            "curvature_singular",
            "warning",
            f"the {whose} plus damping has the eigenvalue {low:.4g}, zero beside {high:.4g}, so the minimum is not one"
            " point and the response depends on how it is reached. Raise damping, or add a decay to inner_loss.",
        )
    yield from _about_solver(evidence, indefinite)
    if evidence.damping_error > evidence.rtol:
        yield Finding(
            "damping_too_large",
            "warning",
            f"damping {evidence.damping:.4g} changes the hypergradient by {evidence.damping_error:.3g}. Lower it"
            f" towards the lowest eigenvalue {evidence.solved.extremes[0]:.4g}, or see it as a decay of the solver.",
        )
    if evidence.curvature_error > evidence.rtol:
        yield Finding(
            "curvature_differs",
            "warning",
            f"the curvature is not the Hessian of inner_loss, which changes the hypergradient by"
            f" {evidence.curvature_error:.3g}. Leave curvature out for the Hessian, or take this as its price.",
        )


def _about_solver(evidence: Evidence, indefinite: bool) -> Iterator[Finding]:
    alpha, solver = evidence.alpha, evidence.solver
    low, high = evidence.solved_extremes
    if alpha is not None and not isinstance(solver, Identity) and high > 0 and alpha >= evidence.alpha_limit:
        yield Finding(
            "alpha_too_large",
            "error",
            f"alpha {alpha:.4g} is not below 2 / (largest eigenvalue) = {evidence.alpha_limit:.4g}, so the series"
            f" diverges. Take alpha='auto', or at most {0.45 * evidence.alpha_limit:.4g}.",
        )
        return
    if evidence.solver_error <= evidence.rtol or indefinite:
        return
    if isinstance(solver, Identity):
        yield Finding(
            "too_few_terms",
            "error",
            f"the identity in place of the inverse is off by {evidence.solver_error:.3g}. Use Neumann or"
            " ConjugateGradient.",
        )
    elif isinstance(solver, Neumann) and alpha is not None:
        yield from _about_series(evidence, solver, alpha)
    elif isinstance(solver, FixedPoint) or hasattr(solver, "max_iters"):
        yield Finding(
            "too_few_terms",
            "error",
            f"{type(solver).__name__} ended ({evidence.status.name}) with an error of {evidence.solver_error:.3g}, at a"
            f" residual of {evidence.residual:.3g} of v. Raise max_iters or lower rtol.",
        )
    else:
        yield Finding(
            "solver_inexact",
            "error",
            f"{type(solver).__name__} ended ({evidence.status.name}) with an error of {evidence.solver_error:.3g}, at a"
            f" residual of {evidence.residual:.3g} of v, for eigenvalues from {low:.4g} to {high:.4g}. Raise its rank"
            " or accuracy, or use ConjugateGradient.",
        )


def _about_series(evidence: Evidence, solver: Neumann, alpha: float) -> Iterator[Finding]:
    low, high = evidence.solved_extremes
    best = 0.9 / high
    covered = 1 - (1 - alpha * low) ** (solver.num_terms + 1)
    error = f"an error of {evidence.solver_error:.3g}"
    sofar = f"the sum has covered {100 * covered:.3g} % of the slowest direction, {error}"
    better = _relative(evidence.series(best, solver.num_terms), evidence.damped)
    if alpha < best / 2:
        yield Finding(
            "alpha_too_small",
            "error",
            f"alpha {alpha:.4g} is far below 0.9 / (largest eigenvalue) = {best:.4g}, so the terms are nearly parallel:"
            f" {sofar}. Take alpha='auto'.",
        )
        if better <= evidence.rtol:
            return
    rate = 1 - max(alpha, best) * low
    needed = f"about {math.ceil(math.log(evidence.rtol) / math.log(rate))}" if 0 < rate < 1 else "more"
    yield Finding(
        "too_few_terms",
        "error",
        f"num_terms={solver.num_terms} is too few: {sofar}. Take {needed} terms, ConjugateGradient, or damping.",
    )


def _relative(found: Tensor, wanted: Tensor) -> float:
    size, distance = float(wanted.norm()), float((found - wanted).norm())
    return distance / size if size else (math.inf if distance else 0.0)
