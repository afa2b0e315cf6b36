"""Cases of a whole solve: a Neumann sum with K products of a Gauss-Newton or empirical Fisher matrix.

The operator is made in the solve: in a training loop the params, and so the matrix, are others at every step.
"""

import functools

from .. import registry
from ..registry import BASELINE, OURS, TRAINING_PASS, YARDSTICK, Case, Contestant, Field, Goal, Setting
from . import _curvatures, _inputs
from ._curvatures import EMPIRICAL_FISHER, GAUSS_NEWTON, ROUTES, Way
from ._problems import KINDS, Params, Problem, compared

NUM_TERMS = (1, 5, 20, 100)
#: Where one product takes a good part of a second, a hundred of each contestant would take half an hour.
PROBLEMS = {
    "logistic": NUM_TERMS,
    "mlp": NUM_TERMS,
    "large-mlp": NUM_TERMS,
    "cnn": NUM_TERMS,
    "resnet18": NUM_TERMS[:-1],
    "transformer": NUM_TERMS[:-1],
}
ONE_BY_ONE = 100
#: What one of so many terms may cost in training passes, by the routes that take them one by one.
TERM_GOALS = {
    ("loop", "large-mlp"): 1.1,
    ("loop", "mlp"): 0.4,
    ("outputs", "large-mlp"): 0.6,
    ("outputs", "mlp"): 0.4,
}
LINEAR = ("logistic",)  # in the params, so that the Hessian is the Gauss-Newton matrix
STEP = 0.5  # alpha in units of 1 / lambda_max


class _Sums:
    """A right-hand side, alpha, and the sums as they should be."""

    def __init__(self, kind: str, problem: Problem, num_terms: int) -> None:
        self.problem = problem
        self.num_terms = num_terms
        self.v = problem.outer_gradient()
        self._product = _curvatures.reference(kind, problem.in_float64())
        self._v64 = [t.double() for t in self.v]
        self.alpha = STEP / _curvatures.largest_eigenvalue(self._product, self._v64)

    @functools.lru_cache  # noqa: B019  as long-lived as the case
    def _exact(self, num_terms: int) -> Params:
        return _curvatures.neumann_sum(self._product, self._v64, num_terms, self.alpha)

    def contestant(self, way: Way, role: str, num_terms: int | None = None, name: str | None = None) -> Contestant:
        """Compared is what the products changed: the sum less the (K + 1) alpha v that it is without any."""
        terms = self.num_terms if num_terms is None else num_terms
        return compared(
            name or way.name,
            role,
            lambda: way.sum(self.problem, self.v, terms, self.alpha),
            lambda: self._exact(terms),
            lambda: [(terms + 1) * self.alpha * v for v in self._v64],
        )


def _build(kind: str, name: str, num_terms: int, setting: Setting) -> Field:
    problem = Problem(name, setting)
    most = 2 if name in ("resnet18", "transformer") else 4
    sums = _Sums(kind, problem, min(num_terms, most) if setting.quick else num_terms)
    ours = _curvatures.ours(kind)
    contestants = [sums.contestant(ours, OURS)]
    left_out: dict[str, str] = {}
    ways = [*(_curvatures.ours(kind, route) for route in ROUTES), *_curvatures.rivals(kind)]
    if name in LINEAR and kind == GAUSS_NEWTON:
        ways.append(_curvatures.DOUBLE_BACKWARD)
    for way in ways:
        reason = way.left_out(problem, sums.num_terms)
        if reason is None:
            contestants.append(sums.contestant(way, BASELINE))
        else:
            left_out[way.name] = reason
    fewer = _fewer(num_terms)
    if fewer is not None:
        terms = min(fewer, most - 1) if setting.quick else fewer
        same_route = _curvatures.ours(kind, _curvatures.route_for(kind, problem, sums.num_terms))
        contestants.append(sums.contestant(same_route, YARDSTICK, terms, _with_terms(kind, fewer)))
    contestants.append(problem.training_pass())
    v = sums.v
    return Field(contestants, len(v), sum(t.numel() for t in v), _inputs.num_bytes(v), left_out)


def _build_terms(kind: str, route: str, name: str, setting: Setting) -> Field:
    """K terms beside K training passes, so that their ratio is what a term costs with its share of all else."""
    problem = Problem(name, setting)
    sums = _Sums(kind, problem, 4 if setting.quick else ONE_BY_ONE)
    one_pass = problem.training_pass()

    def passes() -> None:
        for _ in range(sums.num_terms):
            one_pass.step()

    contestants = [
        sums.contestant(_curvatures.ours(kind, route), OURS),
        sums.contestant(_curvatures.kept_graph(kind), BASELINE),
        Contestant(f"{ONE_BY_ONE} x {TRAINING_PASS}", YARDSTICK, passes, 0),
        one_pass,
    ]
    v = sums.v
    return Field(contestants, len(v), sum(t.numel() for t in v), _inputs.num_bytes(v), {})


def _fewer(num_terms: int) -> int | None:
    """With how many terms ours runs once more, by the route of all terms, to see what more of them cost."""
    return num_terms // 5 if num_terms >= 20 else None


def _with_terms(kind: str, num_terms: int) -> str:
    return f"{_curvatures.OURS[kind].__name__}, K = {num_terms}"


def _goals(kind: str, name: str, num_terms: int) -> list[Goal]:
    goals = []
    if kind == EMPIRICAL_FISHER and name == "large-mlp" and num_terms in (20, 100):
        goals.append(Goal(TRAINING_PASS, 2.0, "the whole sum for 2 forward + backward"))
        if num_terms == 100:
            goals.append(Goal("EmpiricalFisher, loop", 1 / 30, "30x faster than the loop"))
    fewer = _fewer(num_terms)
    if fewer is not None:
        goals.append(Goal(_with_terms(kind, fewer), 1.05, "extra memory flat in K", of_memory=True))
    return goals


_QUICK = ("logistic", "large-mlp", "cnn", "transformer")  # of the empirical Fisher matrix

for _kind in (GAUSS_NEWTON, EMPIRICAL_FISHER):
    for _name, _all_terms in PROBLEMS.items():
        for _num_terms in _all_terms:
            registry.add(
                Case(
                    f"solve/{_kind}/{_name}-K{_num_terms}",
                    f"a Neumann sum with {_num_terms} products of {_curvatures.OURS[_kind].__name__}, "
                    f"{KINDS[_name].summary}",
                    functools.partial(_build, _kind, _name, _num_terms),
                    tuple(_goals(_kind, _name, _num_terms)),
                    quick=(_num_terms == 20 or _name == "mlp") and (_kind == GAUSS_NEWTON or _name in _QUICK),
                )
            )

_HOW = {"loop": "by {} products one by one", "outputs": "by {} products in the space of the outputs"}

for (_route, _name), _at_most in TERM_GOALS.items():
    registry.add(
        Case(
            f"{_route}/{GAUSS_NEWTON}/{_name}-K{ONE_BY_ONE}",
            f"a Neumann sum with GaussNewton {_HOW[_route].format(ONE_BY_ONE)}, {KINDS[_name].summary}",
            functools.partial(_build_terms, GAUSS_NEWTON, _route, _name),
            (Goal(f"{ONE_BY_ONE} x {TRAINING_PASS}", _at_most, f"{_at_most} forward + backward a term"),),
        )
    )
