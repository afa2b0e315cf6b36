"""A hypergradient compared with an exact solve and with finite differences, and what is off about it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _lists
from .._operator import LinearOperator
from .._types import Loss, MatVec, Tensors
from ..curvature import CurvatureOperator
from ..curvature._evaluation import evaluate, preserved_rng
from ..curvature._gradient import Gradient, named_faults
from ..solvers import FixedPoint, Identity, Neumann, Solution, Solver, solve
from ..solvers._power import auto_alpha, usable_step
from ..solvers._product import Product
from ..solvers._solve import check_solver
from ._diagnosis import Evidence, diagnose
from ._inner_solution import Flat, InnerSolution, InnerSolver, kept
from ._problem import Variables
from ._report import Direction, Finding, HypergradientReport
from ._spectrum import DENSE_ELEMENTS, Spectrum, dense_matrix, dense_spectrum, lanczos
from .fixed_point import FixedPointMap

_CALLER = "check_hypergradient"


def check_hypergradient(
    outer_loss: Loss,
    inner_loss: Loss,
    params: Tensors,
    hparams: Tensors,
    *,
    solver: Solver = Neumann(),  # noqa: B008  a frozen value
    curvature: MatVec | None = None,
    num_directions: int = 3,
    step: float | None = None,
    rtol: float = 0.01,
    seed: int = 0,
) -> HypergradientReport:
    r"""Compare what :func:`hypergradient` gives for these arguments with better answers, and say what is off.

    The better answers are, at the params as they are, the same formula with the Hessian inverted exactly (by its
    eigenvalues up to 2000 elements of params, by Lanczos' method above), and central finite differences of the outer
    loss along unit directions of all hparams together: the inner problem is solved again by Newton's method, from the
    params as they are, for hparams moved by ``step`` and by twice as much both ways, along the hypergradient and along
    ``num_directions`` (int >= 0) random directions drawn with ``seed``. ``step`` is a positive number in units of the
    hparams; None is the cube root of the rounding error of the dtype times the norm of the hparams, at least 1.

    Both losses are zero-argument closures, which are called many times, with the same random numbers each time.
    ``solver`` and ``curvature`` are as in :func:`hypergradient`. ``rtol`` in (0, 1) is the relative error that counts
    as agreement. Costs up to 2000 Hessian products at a time, and 4 (``num_directions`` + 1) inner solves: this is for
    a small version of a problem, not for its training loop.

    Returns a :class:`HypergradientReport`: numbers, the part of the error that the solver, its damping, the curvature
    and inner params off their minimum have in it, and ``findings``, each with a name, a severity and a sentence that
    says what is off and what to do. ``report.agrees`` where there is none; ``print(report)`` shows all of it. Names:
    non_finite, curvature_indefinite, curvature_singular, alpha_too_large, alpha_too_small, too_few_terms,
    solver_inexact, damping_too_large, curvature_differs, inner_not_converged, inner_not_solved,
    finite_differences_unreliable, not_differentiated, unused_hparam, stochastic_loss, exact_unreliable.

    Params and hparams are moved and put back bit for bit, also after an exception; nothing else is modified. Raises
    TypeError or ValueError for bad arguments, a loss that is a tensor among them, and RuntimeError as
    :func:`hypergradient`. It warns of nothing.

    >>> import torch
    >>> w = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)       # minimizes w^2 - 3 h w, so w = 1.5 h
    >>> h = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    >>> outer, inner = (lambda: 0.5 * w**2), (lambda: w**2 - 3 * h * w)
    >>> check_hypergradient(outer, inner, w, h, solver=Neumann(num_terms=60, alpha=0.4)).agrees
    True
    >>> report = check_hypergradient(outer, inner, w, h, solver=Neumann(num_terms=2, alpha=0.01))
    >>> [finding.name for finding in report.findings], round(report.error, 3)            # 0.98^3
    (['alpha_too_small'], 0.941)
    """
    for name, loss in (("outer_loss", outer_loss), ("inner_loss", inner_loss)):
        _check_closure(name, loss)
    variables = Variables(_CALLER, params, hparams, all_hparams=True)
    check_solver(_CALLER, solver)
    _check_numbers(num_directions, step, rtol, seed)
    with preserved_rng(), kept([*variables.params, *variables.hparams]):
        return _Check(outer_loss, inner_loss, variables, solver, curvature, rtol).report(num_directions, step, seed)


@dataclass(frozen=True)
class _Point:
    """The losses differentiated at one place: d outer / d params and hparams, and the inner gradient."""

    outer: float
    v: Tensor
    direct: list[Tensor | None]
    inner: float
    gradient: Tensor
    equation: Gradient


class _Check:
    """The arguments of one check, at the params and hparams as they are."""

    def __init__(
        self,
        outer_loss: Loss,
        inner_loss: Loss,
        variables: Variables,
        solver: Solver,
        curvature: MatVec | None,
        rtol: float,
    ) -> None:
        self._outer_loss = outer_loss
        self._inner_loss = inner_loss
        self._variables = variables
        self._solver = solver
        if isinstance(curvature, CurvatureOperator):
            curvature = curvature.on(variables.params, variables.structure)
        self._curvature = curvature
        self._rtol = rtol
        self._w = Flat(variables.params)
        self._h = Flat(variables.hparams)
        self._eps = max(self._w.eps, self._h.eps)
        self._cutoff = max(self._w.values().numel(), 16) * self._w.eps
        self._inner_solver = InnerSolver(_CALLER, inner_loss, variables.params, self._cutoff)

    def report(self, num_directions: int, step: float | None, seed: int) -> HypergradientReport:
        point = self._differentiate()
        solution, x = self._solve(point)
        mixed = point.equation.mixed(self._variables.hparams, self._w.unpack(x))
        method = self._total(point, x)
        hessian, solved, gap = self._spectra(point)
        evidence = Evidence(
            solver=self._solver,
            has_curvature=self._curvature is not None,
            rtol=self._rtol,
            singular=self._cutoff,
            status=solution.status,
            residual=_ratio(float(solution.residual_norm), float(point.v.norm())),
            hessian=hessian,
            solved=solved,
            damping=self._damping,
            alpha=self._alpha(point),
            method=method,
            total=lambda x: self._total(point, x),
        )
        finite = all(bool(t.isfinite().all()) for t in (point.v, point.gradient, method)) and evidence.is_finite
        sources = {
            "outer_loss": math.isfinite(point.outer),
            "inner_loss": math.isfinite(point.inner),
            "the gradient of outer_loss": bool(point.v.isfinite().all()),
            "the gradient of inner_loss": bool(point.gradient.isfinite().all()),
            "the Hessian or curvature": evidence.is_finite,
            "the hypergradient": bool(method.isfinite().all()),
        }
        findings: list[Finding] = []
        exact = evidence.exact if finite else torch.full_like(method, float("nan"))
        step = self._eps ** (1 / 3) * max(1.0, float(self._h.values().norm())) if step is None else float(step)
        directions = self._directions(method, num_directions, seed)
        table = [(name, float(method @ d), float(exact @ d), math.nan, math.nan) for name, d in directions]
        best = InnerSolution(self._w.values(), math.nan, False)
        inner_error = math.nan
        at_best = exact
        exact_residual = self._exact_residual(point, evidence) if finite else math.nan
        if finite:
            findings += diagnose(evidence)
            if not evidence.hessian.is_dense and exact_residual > self._rtol:
                text = (
                    f"{evidence.exact_method} leave a residual of {exact_residual:.3g} of v, so it is not exact."
                    " Trust the finite differences, or check a smaller or better conditioned problem."
                )
                findings.append(Finding("exact_unreliable", "warning", text))
            if evidence.hessian.extremes[0] >= -self._cutoff * abs(evidence.hessian.extremes[1]):
                best, at_best = self._minimum(point, exact)
                inner_error = _relative(exact, at_best) if best.found else math.nan
                if best.found:
                    table = self._finite_differences(directions, method, exact, best, step)
                findings += self._comparisons(best, at_best, inner_error, directions, table, step)
        else:
            wrong = ", ".join(name for name, good in sources.items() if not good)
            text = f"NaN or Inf in {wrong}. Look for a log or division at zero, or an overflow, in the first of these."
            findings.append(Finding("non_finite", "error", text))
        unused = self._unused(point, mixed)
        stochastic = self._stochastic(point)
        findings += _about(unused, stochastic)
        start = self._w.values()
        fd, ours = _column(table, 3), _column(table, 1)
        nan = (math.nan, math.nan)
        return HypergradientReport(
            hypergradient=tuple(self._h.unpack(method)),
            exact=tuple(self._h.unpack(exact)),
            exact_method=evidence.exact_method,
            exact_residual=exact_residual,
            error=_relative(method, exact),
            cosine=_cosine(method, exact),
            finite_difference_error=_relative(ours, fd),
            finite_difference_cosine=_cosine(ours, fd),
            directions=tuple(Direction(*row) for row in table),
            step=step,
            inner_gradient_norm=float(point.gradient.norm()),
            inner_distance=_ratio(float((best.params - start).norm()), float(best.params.norm()))
            if best.found
            else math.nan,
            inner_error=inner_error,
            hessian_eigenvalues=hessian.extremes if finite else nan,
            solved_eigenvalues=evidence.solved_extremes if finite else nan,
            alpha=evidence.alpha,
            alpha_limit=evidence.alpha_limit if finite else math.nan,
            status=solution.status,
            num_products=solution.num_products - 1,
            residual=evidence.residual,
            curvature_gap=gap,
            solver_error=evidence.solver_error if finite else math.nan,
            damping_error=evidence.damping_error if finite else math.nan,
            curvature_error=evidence.curvature_error if finite else math.nan,
            unused_hparams=unused,
            stochastic_losses=stochastic,
            findings=tuple(findings),
        )

    # ---- at one place -----------------------------------------------------------------------------------------------

    def _differentiate(self) -> _Point:
        """The losses at the params and hparams as they are now."""
        params, hparams = self._variables.params, self._variables.hparams
        outer = evaluate(_CALLER, "outer_loss", self._outer_loss)
        with outer.differentiating(), named_faults(_CALLER, "outer_loss"):
            grads = torch.autograd.grad(outer.loss, [*params, *hparams], retain_graph=True, allow_unused=True)
        inner = evaluate(_CALLER, "inner_loss", self._inner_loss)
        with inner.differentiating(), named_faults(_CALLER, "inner_loss"):
            slope = torch.autograd.grad(inner.loss, params, allow_unused=True)
        equation = Gradient(_CALLER, "inner_loss", self._inner_loss, params)
        v = self._w.pack(list(grads[: len(params)]))
        direct: list[Tensor | None] = [*grads[len(params) :]]
        values = float(outer.loss.detach()), float(inner.loss.detach())
        return _Point(values[0], v, direct, values[1], self._w.pack(list(slope)), equation)

    def _total(self, point: _Point, x: Tensor) -> Tensor:
        """The hypergradient with ``x`` for the inverse product."""
        mixed = point.equation.mixed(self._variables.hparams, self._w.unpack(x))
        return self._h.pack(point.direct) - self._h.pack(mixed)

    def _hessian(self, point: _Point) -> Callable[[Tensor], Tensor]:
        return lambda v: self._w.pack(point.equation.product(self._w.unpack(v)))

    @property
    def _damping(self) -> float:
        return float(getattr(self._solver, "damping", 0.0))

    # ---- the method -------------------------------------------------------------------------------------------------

    def _product(self, point: _Point) -> Product:
        """The product that the solver is given."""
        like = self._w.unpack(point.v)
        if self._curvature is not None:
            return Product(_CALLER, self._curvature, self._variables.structure, like, name="curvature")
        _, structure = _lists.flatten(_CALLER, "params", like)
        return Product(_CALLER, point.equation.product, structure, like, name="inner_loss's Hessian")

    def _solve(self, point: _Point) -> tuple[Solution[Any], Tensor]:
        like = self._w.unpack(point.v)
        if self._curvature is None:
            solution: Solution[Any] = solve(point.equation.product, like, self._solver)
            return solution, self._w.pack(solution.value)
        self._product(point)(like)  # names a fault of the curvature
        structure = self._variables.structure
        solution = solve(self._curvature, structure.pack(like), self._solver)
        return solution, self._w.pack(structure.match(_CALLER, "curvature(v)", solution.value))

    def _alpha(self, point: _Point) -> float | None:
        """The step that the solver takes, where it is a series in the curvature itself."""
        solver = self._solver
        if isinstance(solver, FixedPoint):
            return 1.0
        if not isinstance(solver, Neumann | Identity) or getattr(solver, "preconditioner", None) is not None:
            return None
        if not isinstance(solver.alpha, str):
            return float(solver.alpha)
        known = self._curvature.largest_eigenvalue() if isinstance(self._curvature, LinearOperator) else None
        if known is not None:
            return float(usable_step(0.9 / (known.detach().double() + self._damping)))
        product = self._product(point)
        return float(auto_alpha(product, self._w.unpack(point.v), self._damping))

    def _spectra(self, point: _Point) -> tuple[Spectrum, Spectrum, float]:
        """Of the Hessian, of the curvature that is solved with, and their relative distance."""
        hessian = self._hessian(point)
        first = _spectrum(hessian, point.v)
        if self._curvature is None:
            return first, first, 0.0
        product = self._product(point)

        def curvature(v: Tensor) -> Tensor:
            return self._w.pack(product(self._w.unpack(v)))

        second = _spectrum(curvature, point.v)
        if first.matrix is None or second.matrix is None:
            return first, second, _relative(curvature(point.v), hessian(point.v))
        return first, second, _relative(second.matrix, first.matrix)

    def _exact_residual(self, point: _Point, evidence: Evidence) -> float:
        x = evidence.hessian.solve(0.0, self._cutoff)
        return _ratio(float((self._hessian(point)(x) - point.v).norm()), float(point.v.norm()))

    # ---- the inner problem solved again -----------------------------------------------------------------------------

    def _minimum(self, point: _Point, exact: Tensor) -> tuple[InnerSolution, Tensor]:
        """The minimum of the inner loss for the hparams as they are, and the exact hypergradient there."""
        start = self._w.values()
        with kept(self._variables.params):
            best = self._inner_solver.solve(start)
            if not best.found:
                return best, exact
            self._w.write(best.params)
            there = self._differentiate()
            hessian = _spectrum(self._hessian(there), there.v)
            if not bool(hessian.values.isfinite().all()):
                return InnerSolution(best.params, best.last_step, False), exact
            return best, self._total(there, hessian.solve(0.0, self._cutoff))

    def _directions(self, method: Tensor, number: int, seed: int) -> list[tuple[str, Tensor]]:
        found = []
        length = method.norm()
        if bool(length.isfinite()) and float(length) > 0:
            found.append(("hypergradient", method / length))
        generator = torch.Generator().manual_seed(seed)
        for i in range(number):
            random = torch.randn(method.numel(), generator=generator, dtype=torch.float64, device="cpu").to(method)
            found.append((f"random {i + 1}", random / random.norm()))
        return found

    def _finite_differences(
        self,
        directions: list[tuple[str, Tensor]],
        method: Tensor,
        exact: Tensor,
        best: InnerSolution,
        step: float,
    ) -> list[tuple[str, float, float, float, float]]:
        rows = []
        for name, direction in directions:
            slopes, noise = [], 0.0
            for distance in (step, 2 * step):
                ahead, back = (self._response(best, direction, sign * distance) for sign in (1, -1))
                slopes.append((ahead[0] - back[0]) / (2 * distance))
                noise = max(noise, (ahead[1] + back[1]) / (2 * distance))
            uncertainty = abs(slopes[1] - slopes[0]) + noise
            rows.append((name, float(method @ direction), float(exact @ direction), slopes[0], uncertainty))
        return rows

    def _response(self, best: InnerSolution, direction: Tensor, distance: float) -> tuple[float, float]:
        """The outer loss once the inner problem is solved for moved hparams, and its rounding error."""
        with kept([*self._variables.params, *self._variables.hparams]):
            self._h.write(self._h.values() + distance * direction)
            solution = self._inner_solver.solve(best.params)
            if not solution.found:
                return math.nan, math.nan
            self._w.write(solution.params)
            loss = float(evaluate(_CALLER, "outer_loss", self._outer_loss).loss.detach())
        return loss, 4 * self._eps * abs(loss)

    # ---- what they say ----------------------------------------------------------------------------------------------

    def _comparisons(
        self,
        best: InnerSolution,
        at_best: Tensor,
        inner_error: float,
        directions: list[tuple[str, Tensor]],
        table: list[tuple[str, float, float, float, float]],
        step: float,
    ) -> Iterator[Finding]:
        fd, unsure = _column(table, 3), _column(table, 4)
        if not best.found or bool(fd.isnan().any()):
            yield Finding(
                "inner_not_solved",
                "warning",
                "no minimum of inner_loss was found by Newton's method near the params, so there are no finite"
                " differences. Train the params further, or add a decay to inner_loss.",
            )
            return
        if inner_error > self._rtol:
            yield Finding(
                "inner_not_converged",
                "warning",
                f"the params are not at the minimum of inner_loss, which changes the exact hypergradient by"
                f" {inner_error:.3g}. Take more inner steps before the hypergradient.",
            )
        size, spread = float(fd.norm()), float(unsure.norm())
        both_zero = float(_column(table, 1).norm()) == 0 and size <= 2 * spread
        if spread > self._rtol * size and not both_zero:
            yield Finding(
                "finite_differences_unreliable",
                "warning",
                f"finite differences at step {step:.3g} are uncertain by {_ratio(spread, size):.3g} of their size: they"
                " change with the step, or by rounding. Try another step, float64, or a smoother loss.",
            )
            return
        expected = torch.stack([at_best @ d for _, d in directions]) if directions else fd
        gap = float((expected.to(fd) - fd).norm())
        if gap > max(self._rtol * size, 3 * spread):
            yield Finding(
                "not_differentiated",
                "error",
                f"finite differences differ by {_ratio(gap, size):.3g} from the exact formula at the minimum: a part of"
                " the losses is hidden from autograd. Look for .detach(), .item(), no_grad, rounding or a"
                " straight-through estimator between hparams, params and losses.",
            )

    def _unused(self, point: _Point, mixed: list[Tensor | None]) -> tuple[str, ...]:
        labels = self._variables.hparam_structure.labels("hparams")
        return tuple(
            label
            for label, direct, response in zip(labels, point.direct, mixed, strict=True)
            if direct is None and response is None
        )

    def _stochastic(self, point: _Point) -> tuple[str, ...]:
        """The losses that change with random state, or from call to call."""
        found = []
        for name, loss, value in (
            ("outer_loss", self._outer_loss, point.outer),
            ("inner_loss", self._inner_loss, point.inner),
        ):
            again = float(evaluate(_CALLER, name, loss).loss.detach())
            with _other_random_state():
                other = float(evaluate(_CALLER, name, loss).loss.detach())
            if any(x != value and not (math.isnan(x) and math.isnan(value)) for x in (again, other)):
                found.append(name)
        return tuple(found)


def _relative(found: Tensor, wanted: Tensor) -> float:
    return _ratio(float((found - wanted).norm()), float(wanted.norm()))


def _spectrum(matvec: Callable[[Tensor], Tensor], v: Tensor) -> Spectrum:
    return lanczos(matvec, v) if v.numel() > DENSE_ELEMENTS else dense_spectrum(dense_matrix(matvec, v), v)


def _about(unused: tuple[str, ...], stochastic: tuple[str, ...]) -> Iterator[Finding]:
    for label in unused:
        yield Finding(
            "unused_hparam",
            "warning",
            f"{label} is neither in outer_loss nor in the gradient of inner_loss, so its hypergradient is zero. Compute"
            " the losses from this very tensor, not from a copy, or leave it out.",
        )
    for name in stochastic:
        yield Finding(
            "stochastic_loss",
            "warning",
            f"{name} gives another value with other random numbers, or from call to call, so one hypergradient is a"
            " sample. Fix the batch, use eval mode, or average several.",
        )


@contextmanager
def _other_random_state() -> Iterator[None]:
    with preserved_rng():
        torch.default_generator.manual_seed(torch.default_generator.initial_seed() + 1)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.manual_seed_all(torch.cuda.initial_seed() + 1)
        yield


def _column(table: list[tuple[str, float, float, float, float]], i: int) -> Tensor:
    return torch.tensor([row[i] for row in table], dtype=torch.float64, device="cpu")


def _ratio(a: float, b: float) -> float:
    """A / b, where 0 / 0 is 0."""
    if b == 0:
        return 0.0 if a == 0 else math.inf
    return a / b


def _cosine(a: Tensor, b: Tensor) -> float:
    lengths = float(a.norm() * b.norm())
    if lengths == 0:
        return 1.0 if float(a.norm()) == float(b.norm()) else 0.0
    return float(a @ b) / lengths


def _check_closure(name: str, loss: object) -> None:
    if isinstance(loss, FixedPointMap):
        raise TypeError(
            f"{_CALLER}: {name} must be a loss; got a FixedPointMap, which cannot be checked here. Compare the"
            " hypergradient with that of solver=Exact()."
        )
    if isinstance(loss, Tensor) or not callable(loss):
        raise TypeError(
            f"{_CALLER}: {name} must be a zero-argument closure, to be evaluated again at moved hparams;"
            f" got {_lists.value_name(loss)}. Wrap its computation in a function."
        )


def _check_numbers(num_directions: object, step: object, rtol: object, seed: object) -> None:
    for name, value, least in (("num_directions", num_directions, 0), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{_CALLER}: {name} must be an int; got {value!r}.")
        if value < least:
            raise ValueError(f"{_CALLER}: {name} must be >= {least}; got {value}.")
    for name, number in (("step", step), ("rtol", rtol)):
        if number is None and name == "step":
            continue
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise TypeError(f"{_CALLER}: {name} must be a number; got {number!r}.")
        if not 0 < number < (math.inf if name == "step" else 1):
            limit = "finite and > 0" if name == "step" else "> 0 and < 1"
            raise ValueError(f"{_CALLER}: {name} must be {limit}; got {number}.")
