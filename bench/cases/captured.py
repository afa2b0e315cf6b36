"""Cases of captured hypergradients: a whole step with K products on new data, in each mode of CapturedHypergradient.

The problems, the peers and what a step is are those of the hypergradient cases. Ours is the mode that "auto" finds.
"""

import functools
import shutil

from nestopt_ext.hypergrad import CapturedHypergradient
from nestopt_ext.solvers import Neumann

from .. import registry
from ..registry import BASELINE, OURS, Case, Contestant, Field, Goal, Setting
from . import _bilevel, _inputs
from ._bilevel import Bilevel
from ._problems import KINDS, Problem
from .hypergradient import ALPHA, LOG_DECAY, PROBLEMS, by_hypergradient

NUM_TERMS = {"mlp": (20, 100)}  # of the others 20


def _contestant(bilevel: Bilevel, mode: str, role: str) -> Contestant:
    params, hparams, problem = bilevel.params, bilevel.hparams, bilevel.problem
    captured = CapturedHypergradient(
        lambda x, y: bilevel.outer_on(x, y, params),
        lambda x, y: bilevel.inner_on(x, y, params, hparams),
        params,
        hparams,
        solver=Neumann(num_terms=bilevel.num_terms, alpha=ALPHA),
        mode=mode,  # type: ignore[arg-type]
    )
    return bilevel.contestant(
        f"captured, {mode}",
        role,
        lambda _: captured.step((problem.inner_x, problem.inner_y), (problem.outer_x, problem.outer_y)),
    )


def _build(name: str, num_terms: int, setting: Setting) -> Field:
    terms = min(num_terms, 20) if setting.quick else num_terms
    bilevel = Bilevel(Problem(name, setting), LOG_DECAY, terms, ALPHA)
    modes = ["eager", "recorded", "compiled"] if setting.device.type == "cpu" else ["eager", "cuda-graph"]
    left_out = {}
    if "compiled" in modes and (setting.quick or shutil.which("c++") is None):
        modes.remove("compiled")
        left_out["captured, compiled"] = "takes half a minute to compile" if setting.quick else "no C++ compiler"
    contestants = [
        _contestant(bilevel, "auto", OURS),
        *(_contestant(bilevel, mode, BASELINE) for mode in modes),
        bilevel.contestant("hypergradient", BASELINE, by_hypergradient),
        bilevel.contestant("autograd + _foreach", BASELINE, _bilevel.by_hand),
    ]
    params = bilevel.params
    return Field(contestants, len(params), sum(p.numel() for p in params), _inputs.num_bytes(params), left_out)


for _name in PROBLEMS:
    for _num_terms in NUM_TERMS.get(_name, (20,)):
        registry.add(
            Case(
                f"captured/{_name}-K{_num_terms}",
                f"a captured hypergradient step with {_num_terms} products, {KINDS[_name].summary}",
                functools.partial(_build, _name, _num_terms),
                (
                    Goal("hypergradient", 1.0, "never slower than a step that is built anew"),
                    *([Goal("autograd + _foreach", 0.5, "2x faster than plain autograd")] if _name != "cnn" else []),
                ),
            )
        )
