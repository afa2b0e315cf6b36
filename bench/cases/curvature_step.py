"""Cases of a whole hypergradient step whose inverse is of a Gauss-Newton or empirical Fisher matrix and a decay.

A step is the graph of the outer loss and its gradient, the gradient of the inner loss with its graph, the operator, the
inverse product, and the mixed product. With one decay for all weights the curvature is the matrix and a multiple of the
identity; with a decay of its own for each weight it is the matrix and a diagonal one. Peers, and what is written by
hand, solve with the Hessian where they have nothing else; for logistic regression that is the same matrix.
"""

import functools
import math

from nestopt_ext.curvature import Diagonal
from nestopt_ext.hypergrad import hypergradient
from nestopt_ext.solvers import Neumann, Solver, Woodbury

from .. import registry
from ..registry import BASELINE, OURS, Case, Field, Goal, Setting
from . import _bilevel, _curvatures, _inputs
from ._bilevel import Bilevel, Step
from ._curvatures import EMPIRICAL_FISHER, GAUSS_NEWTON, ROUTES
from ._problems import CLASSES, KINDS, Params, Problem

PROBLEMS = ("logistic", "mlp", "large-mlp", "cnn", "resnet18", "transformer")
NUM_TERMS = 20
STEP = 0.5  # alpha in units of 1 / lambda_max of the matrix
DECAY = 0.1  # curvature of the decay in units of lambda_max
SHARED, EACH = "one-decay", "decay-per-weight"


def _ours(kind: str, route: str | None = None, exactly: bool = False) -> Step:
    def step(bilevel: Bilevel) -> Params:
        params, hparams = bilevel.params, bilevel.hparams
        matrix = _curvatures.operator(kind, bilevel.problem, route)
        if bilevel.shared:
            curvature = matrix.damped(2 * math.exp(bilevel.log_decay))
        else:
            curvature = matrix + Diagonal(bilevel.decay_curvature(), params)
        solver: Solver = Woodbury() if exactly else Neumann(num_terms=bilevel.num_terms, alpha=bilevel.alpha)
        outer, inner = bilevel.outer(params), bilevel.inner(params, hparams)
        return hypergradient(outer, inner, params, hparams, solver=solver, curvature=curvature)

    return step


def _build(name: str, shared: bool, setting: Setting) -> Field:
    problem = Problem(name, setting)
    largest = _curvatures.largest_eigenvalue(
        _curvatures.reference(GAUSS_NEWTON, problem.in_float64()), [t.double() for t in problem.outer_gradient()]
    )
    terms = 2 if setting.quick else NUM_TERMS
    bilevel = Bilevel(problem, math.log(DECAY * largest / 2), terms, STEP / largest, shared)
    contestants = [bilevel.contestant("GaussNewton", OURS, _ours(GAUSS_NEWTON), GAUSS_NEWTON)]
    left_out: dict[str, str] = {}
    for kind in (GAUSS_NEWTON, EMPIRICAL_FISHER):
        word = _curvatures.OURS[kind].__name__
        if kind == EMPIRICAL_FISHER:
            contestants.append(bilevel.contestant(word, BASELINE, _ours(kind), kind))
        for route in ROUTES if shared else ():
            label = f"{word}, {route}"
            reason = _curvatures.refused(kind, problem, route)
            if reason is None:
                contestants.append(bilevel.contestant(label, BASELINE, _ours(kind, route), kind))
            else:
                left_out[label] = reason
        label = f"{word}, Woodbury"
        rows = len(problem.inner_y) * (CLASSES if kind == GAUSS_NEWTON else 1)
        formed = 0 if _curvatures.takes_route(kind) else rows * _inputs.num_bytes(problem.params)
        if formed > _curvatures.MAX_ROW_BYTES:
            left_out[label] = f"{word} forms {rows} rows, {formed / 1e9:.1f} GB, in this version"
        else:
            step = _ours(kind, exactly=True)
            contestants.append(bilevel.contestant(label, BASELINE, step, kind, inverted=True))
    by_hand = _bilevel.by_hand_gauss_newton
    contestants += [
        bilevel.contestant("autograd, kept graph (GGN)", BASELINE, by_hand, GAUSS_NEWTON),
        bilevel.contestant("autograd, kept graph (Hessian)", BASELINE, _bilevel.by_hand),
    ]
    found, missing = _bilevel.peers(bilevel, gauss_newton=True)
    contestants += [*found, problem.training_pass()]
    params = bilevel.params
    left_out |= missing
    return Field(contestants, len(params), sum(p.numel() for p in params), _inputs.num_bytes(params), left_out)


_QUICK = ((SHARED, "logistic"), (EACH, "logistic"), (EACH, "large-mlp"), (SHARED, "cnn"), (SHARED, "transformer"))
_PEERS = (*_bilevel.HESSIAN_PEERS, *_bilevel.GAUSS_NEWTON_PEERS)

for _name in PROBLEMS:
    for _word, _shared in ((SHARED, True), (EACH, False)):
        registry.add(
            Case(
                f"step/{_word}/{_name}-K{NUM_TERMS}",
                f"a hypergradient step with {NUM_TERMS} products, {_word.replace('-', ' ')}, {KINDS[_name].summary}",
                functools.partial(_build, _name, _shared),
                tuple(Goal(peer, 0.2, "5x faster than each peer") for peer in _PEERS) if _name == "logistic" else (),
                quick=(_word, _name) in _QUICK,
            )
        )
