"""Cases of one product with a Gauss-Newton or empirical Fisher matrix; what products share is made beforehand."""

import functools

from .. import registry
from ..registry import BASELINE, OURS, TRAINING_PASS, Case, Field, Goal, Setting
from . import _curvatures, _inputs
from ._curvatures import EMPIRICAL_FISHER, GAUSS_NEWTON, Way
from ._problems import KINDS, Params, Problem, compared

PROBLEMS = ("logistic", "mlp", "large-mlp", "cnn", "resnet18", "transformer")


def _build(kind: str, name: str, setting: Setting) -> Field:
    problem = Problem(name, setting)
    v = problem.outer_gradient()

    @functools.cache
    def exact(matrix: str) -> Params:
        return _curvatures.reference(matrix, problem.in_float64())([t.double() for t in v])

    contestants = []
    left_out: dict[str, str] = {}

    def enter(way: Way, role: str) -> None:
        reason = way.left_out(problem)
        if reason is not None:
            left_out[way.name] = reason
            return
        product = way.make(problem)
        contestants.append(compared(way.name, role, lambda: product(v), functools.partial(exact, way.matrix or kind)))

    enter(_curvatures.ours(kind), OURS)
    for way in [_curvatures.linearized(kind), *_curvatures.rivals(kind), _curvatures.DOUBLE_BACKWARD]:
        enter(way, BASELINE)
    contestants.append(problem.training_pass())
    return Field(contestants, len(v), sum(t.numel() for t in v), _inputs.num_bytes(v), left_out)


_GOALS = {
    (GAUSS_NEWTON, "large-mlp"): Goal(TRAINING_PASS, 1.1, "1.1 forward + backward a product"),
    (GAUSS_NEWTON, "mlp"): Goal(TRAINING_PASS, 0.4, "0.4 forward + backward a product"),
}

for _kind in (GAUSS_NEWTON, EMPIRICAL_FISHER):
    for _name in PROBLEMS:
        registry.add(
            Case(
                f"product/{_kind}/{_name}",
                f"a product with {_curvatures.OURS[_kind].__name__}, {KINDS[_name].summary}",
                functools.partial(_build, _kind, _name),
                tuple(goal for key, goal in _GOALS.items() if key == (_kind, _name)),
            )
        )
