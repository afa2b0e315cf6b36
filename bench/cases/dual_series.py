"""Cases of dual_series_: all terms of a Neumann series in the span of N rows, against the steps as calls of torch."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nestopt_ext import _ops, _reference

from .. import registry
from ..registry import BASELINE, OURS, Case, Contestant, Field, Goal, Setting
from . import _inputs

DAMPING = 0.1

# Writes coefficients and sq_norms; from these, gram, weights and projections.
Series = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], object]


class _Problem:
    """Rows with weights of a mean, and a step for which the series converges; the answer is the same after each run."""

    def __init__(self, setting: Setting, rows: int, terms: int, dtype: torch.dtype) -> None:
        self.setting = setting
        self.rows, v = (t.double() for t in _inputs.normal([(rows, 4 * rows), (4 * rows,)], setting, 0))
        self.gram = (self.rows @ self.rows.T).to(dtype)
        self.weights = torch.full((rows,), 1 / rows, dtype=dtype, device=setting.device)
        self.projections = (self.rows @ v).to(dtype)
        self.sq_norm = v.square().sum().to(dtype)
        self.alpha = float(0.9 * rows / torch.linalg.matrix_norm(self.gram.double(), 2))
        self.terms = terms
        self.moved = terms * _inputs.num_bytes([self.gram])  # read once for each term, from a cache as a rule

    def contestant(self, name: str, role: str, series: Series, dtype: torch.dtype) -> Contestant:
        gram, weights, projections = self.gram, self.weights.to(dtype), self.projections.to(dtype)
        coefficients = torch.zeros_like(weights)
        norms = torch.zeros(self.terms + 1, dtype=dtype, device=self.setting.device)
        norms[0] = self.sq_norm
        run = functools.partial(series, coefficients, norms, gram, weights, projections)
        # In the dtype of the gram the roundings of the terms add up; |v|^2 is far above 1.
        tolerance = 8.0 if role == OURS else 1e3
        return Contestant(
            name, role, run, self.moved, lambda: [coefficients, norms / norms[0]], self.expected, tolerance
        )

    def expected(self, num_steps: int) -> Sequence[Tensor]:
        return self._expected

    @functools.cached_property
    def _expected(self) -> Sequence[Tensor]:
        gram, weights, projections = (t.double() for t in (self.gram, self.weights, self.projections))
        coefficients = torch.zeros_like(weights)
        norms = torch.zeros(self.terms + 1, dtype=torch.float64, device=self.setting.device)
        norms[0] = self.sq_norm
        alpha = torch.tensor(self.alpha, dtype=torch.float64)
        _reference.dual_series_(coefficients, norms, gram, weights, projections, alpha, damping=DAMPING)
        return [coefficients, norms / norms[0]]


# ---- contestants ----------------------------------------------------------------------------------------------------


def _ours(problem: _Problem) -> Series:
    alpha = torch.tensor(problem.alpha, dtype=torch.float64)

    def series(coefficients: Tensor, norms: Tensor, gram: Tensor, weights: Tensor, projections: Tensor) -> None:
        _ops.dual_series_(coefficients, norms, gram, weights, projections, alpha, damping=DAMPING)

    return series


def _loop(problem: _Problem, *, with_norms: bool) -> Series:
    """Calls that write to scratch vectors which are kept: as few as torch allows."""
    alpha, q = problem.alpha, 1 - problem.alpha * DAMPING
    scratch = [torch.empty_like(problem.weights) for _ in range(4)]

    def series(coefficients: Tensor, norms: Tensor, gram: Tensor, weights: Tensor, projections: Tensor) -> None:
        d, c, e, f = scratch
        d.copy_(projections)
        c.zero_()
        coefficients.zero_()
        for j in range(problem.terms):
            torch.mul(weights, d, out=e)
            torch.mv(gram, e, out=f)
            if with_norms:
                new = (q * q) * norms[j] - torch.dot(d, e) * (2 * q * alpha) + torch.dot(e, f) * (alpha * alpha)
                torch.clamp(new, min=0, out=norms[j + 1])
            c.mul_(q).add_(e, alpha=-alpha)
            d.mul_(q).add_(f, alpha=-alpha)
            coefficients.add_(c)

    return series


# ---- cases ----------------------------------------------------------------------------------------------------------


def _terms(rows: int, terms: int, dtype: torch.dtype) -> Callable[[Setting], Field]:
    def build(setting: Setting) -> Field:
        problem = _Problem(setting, rows // 4 if setting.quick else rows, terms, dtype)
        without = problem.contestant("loop of torch calls, no norms", BASELINE, _loop(problem, with_norms=False), dtype)
        without.expected = None  # it leaves the norms out
        contestants = [
            problem.contestant("dual_series_", OURS, _ours(problem), torch.float64),
            problem.contestant("loop of torch calls", BASELINE, _loop(problem, with_norms=True), dtype),
            without,
        ]
        return Field(contestants, 1, problem.gram.numel(), _inputs.num_bytes([problem.gram]), {})

    return build


_GOALS = (
    Goal("loop of torch calls", 0.5, "2x faster than a loop of torch calls"),
    Goal(None, 0.01, "no copy of the gram"),
)

for _num_rows, _num_terms, _dtype in (
    (256, 20, torch.float32),
    (256, 100, torch.float32),
    (256, 100, torch.float64),
    (1024, 20, torch.float32),
):
    _name = f"{_num_rows}x{_num_terms}-{str(_dtype).removeprefix('torch.')}"
    registry.add(
        Case(
            f"dual_series/{_name}",
            f"dual_series_, {_num_terms} terms in the span of {_num_rows} rows, gram in {_name.partition('-')[2]}",
            _terms(_num_rows, _num_terms, _dtype),
            _GOALS,
        )
    )
