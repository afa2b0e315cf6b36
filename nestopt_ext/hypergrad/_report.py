"""What a check of a hypergradient found, as numbers, as sentences, and as a table to read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..solvers import Status


@dataclass(frozen=True)
class Finding:
    """One thing that is off: its ``name``, whether it makes the result wrong or only doubtful, and what to do."""

    name: str
    severity: Literal["error", "warning"]
    message: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.name}: {self.message}"


@dataclass(frozen=True)
class Direction:
    """Derivatives of the outer loss along one unit direction of all hparams together.

    ``method`` and ``exact`` at the params as they are, ``finite_difference`` at the inner problem solved again, NaN
    where it was not; ``uncertainty`` is how far that one may be off.
    """

    name: str
    method: float
    exact: float
    finite_difference: float
    uncertainty: float


@dataclass(frozen=True)
class HypergradientReport:
    """What :func:`check_hypergradient` returns. Errors are relative, norm of difference over norm of the second."""

    #: What :func:`hypergradient` gives for these arguments, new tensors in the order of ``hparams``.
    hypergradient: tuple[Tensor, ...]
    #: With the Hessian inverted exactly, at the params as they are.
    exact: tuple[Tensor, ...]
    #: How that was solved: "dense", or "Lanczos" with the number of products.
    exact_method: str
    #: Norm of v - H x over that of v, for the exact solve.
    exact_residual: float
    error: float
    cosine: float
    #: The same against finite differences, over the directions.
    finite_difference_error: float
    finite_difference_cosine: float
    directions: tuple[Direction, ...]
    #: The distance each way along a unit direction.
    step: float
    #: Norm of the inner gradient, and distance to the minimum of the inner loss, relative to the norm of params.
    inner_gradient_norm: float
    inner_distance: float
    #: The relative change of the exact hypergradient from here to that minimum.
    inner_error: float
    #: The lowest and highest eigenvalue of the Hessian, and of the matrix that the solver inverts, damping included.
    hessian_eigenvalues: tuple[float, float]
    solved_eigenvalues: tuple[float, float]
    #: The step of a series, None for other solvers; it must be below 2 / the highest eigenvalue.
    alpha: float | None
    alpha_limit: float
    status: Status
    num_products: int
    #: Norm of v - (A + damping I) x over that of v, for the solver.
    residual: float
    #: Relative difference of the curvature from the Hessian: of the matrices where small, else of A v from H v.
    curvature_gap: float
    #: The parts of the error: of the solver, of its damping, and of a curvature that is not the Hessian.
    solver_error: float
    damping_error: float
    curvature_error: float
    unused_hparams: tuple[str, ...]
    stochastic_losses: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def agrees(self) -> bool:
        """Whether nothing is off."""
        return not self.findings

    def __str__(self) -> str:
        alpha = "-" if self.alpha is None else f"{self.alpha:.4g} (stable below {self.alpha_limit:.4g})"
        rows = [
            ("error against the exact inverse", f"{self.error:.3g} (cosine {self.cosine:.6f})"),
            (
                "error against finite differences",
                f"{self.finite_difference_error:.3g} (cosine {self.finite_difference_cosine:.6f})",
            ),
            ("  of the solver", f"{self.solver_error:.3g}"),
            ("  of its damping", f"{self.damping_error:.3g}"),
            ("  of the curvature", f"{self.curvature_error:.3g} (matrix {self.curvature_gap:.3g})"),
            ("  of inner params off their minimum", f"{self.inner_error:.3g} (distance {self.inner_distance:.3g})"),
            ("exact inverse", f"{self.exact_method}, residual {self.exact_residual:.3g}"),
            ("solver", f"{self.status.name}, residual {self.residual:.3g}, {self.num_products} products"),
            ("alpha", alpha),
            ("eigenvalues of the Hessian", "{:.4g} to {:.4g}".format(*self.hessian_eigenvalues)),
            ("eigenvalues of what is solved", "{:.4g} to {:.4g}".format(*self.solved_eigenvalues)),
            ("norm of the inner gradient", f"{self.inner_gradient_norm:.3g}"),
        ]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {text}" for name, text in rows]
        head = f"{'derivative along':<16} {'method':>13} {'exact':>13} {'finite diff.':>13} {'+-':>9}"
        table = [
            f"{d.name:<16} {d.method:>13.6g} {d.exact:>13.6g} {d.finite_difference:>13.6g} {d.uncertainty:>9.2g}"
            for d in self.directions
        ]
        end = [str(f) for f in self.findings] or ["agrees: nothing is off"]
        return "\n".join([*lines, "", head, *table, "", *end])
