"""Cases of hypergradient: a whole step with K products, against plain autograd, TorchOpt and curvlinops.

A step is the graph of the outer loss and its gradient, the gradient of the inner loss with its graph, K Hessian
products of a Neumann series, and the mixed product. The hyperparameters are a decay of its own for each weight.
"""

import functools

from nestopt_ext.hypergrad import hypergradient
from nestopt_ext.solvers import Neumann

from .. import registry
from ..registry import BASELINE, OURS, Case, Field, Goal, Setting
from . import _bilevel, _inputs
from ._bilevel import Bilevel
from ._problems import KINDS, Params, Problem

PROBLEMS = ("logistic", "mlp", "deep-mlp", "cnn")
NUM_TERMS = (1, 5, 20, 100)
ALPHA = 0.01
LOG_DECAY = 2.0  # with less the curvature of the CNN is indefinite


def by_hypergradient(bilevel: Bilevel) -> Params:
    params, hparams = bilevel.params, bilevel.hparams
    solver = Neumann(num_terms=bilevel.num_terms, alpha=ALPHA)
    return hypergradient(bilevel.outer(params), bilevel.inner(params, hparams), params, hparams, solver=solver)


def _ours_closures(bilevel: Bilevel) -> Params:
    params, hparams = bilevel.params, bilevel.hparams
    return hypergradient(
        lambda: bilevel.outer(params),
        lambda: bilevel.inner(params, hparams),
        params,
        hparams,
        solver=Neumann(num_terms=bilevel.num_terms, alpha=ALPHA),
    )


def _build(name: str, num_terms: int, setting: Setting) -> Field:
    terms = min(num_terms, 20) if setting.quick else num_terms
    bilevel = Bilevel(Problem(name, setting), LOG_DECAY, terms, ALPHA)
    found, left_out = _bilevel.peers(bilevel)
    contestants = [
        bilevel.contestant("hypergradient", OURS, by_hypergradient),
        bilevel.contestant("hypergradient, closures", BASELINE, _ours_closures),
        bilevel.contestant("autograd + _foreach", BASELINE, _bilevel.by_hand),
        *found,
    ]
    params = bilevel.params
    return Field(contestants, len(params), sum(p.numel() for p in params), _inputs.num_bytes(params), left_out)


_NOT_SLOWER = Goal("autograd + _foreach", 1.0, "never slower than plain autograd")

for _name in PROBLEMS:
    for _num_terms in NUM_TERMS:
        _goals = [_NOT_SLOWER]
        if _name == "mlp" and _num_terms == 20:
            _goals += [Goal(peer, 0.5, "2x faster than each peer") for peer in _bilevel.HESSIAN_PEERS]
        registry.add(
            Case(
                f"hypergradient/{_name}-K{_num_terms}",
                f"a hypergradient step with {_num_terms} products, {KINDS[_name].summary}",
                functools.partial(_build, _name, _num_terms),
                tuple(_goals),
            )
        )
