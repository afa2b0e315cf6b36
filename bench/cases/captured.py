"""Cases of captured hypergradients: a whole step with K products on new data, in each mode of CapturedHypergradient.

The problems, the peers and what a step is are those of the hypergradient cases. Ours is the mode that "auto" finds.
"""

import functools
import shutil
from collections.abc import Callable

from nestopt_ext.hypergrad import CapturedHypergradient
from nestopt_ext.solvers import Neumann

from .. import registry
from ..registry import BASELINE, OURS, Case, Contestant, Field, Goal, Setting
from . import _inputs
from .hypergradient import ALPHA, Problem, by_autograd, by_hypergradient, cnn_problem, dense_problem

NUM_TERMS = {"mlp": (20, 100)}  # of the others 20


def _contestant(problem: Problem, mode: str, role: str) -> Contestant:
    params, hparams = problem.params, problem.hparams
    captured = CapturedHypergradient(
        lambda x, y: problem.outer_on(x, y, params),
        lambda x, y: problem.inner_on(x, y, params, hparams),
        params,
        hparams,
        solver=Neumann(num_terms=problem.num_terms, alpha=ALPHA),
        mode=mode,  # type: ignore[arg-type]
    )
    return problem.contestant(
        f"captured, {mode}",
        role,
        lambda problem: captured.step((problem.inner_x, problem.inner_y), (problem.outer_x, problem.outer_y)),
    )


def _build(make: Callable[[Setting, int], Problem], num_terms: int, setting: Setting) -> Field:
    problem = make(setting, min(num_terms, 20) if setting.quick else num_terms)
    modes = ["eager", "recorded", "compiled"] if setting.device.type == "cpu" else ["eager", "cuda-graph"]
    left_out = {}
    if "compiled" in modes and (setting.quick or shutil.which("c++") is None):
        modes.remove("compiled")
        left_out["captured, compiled"] = "takes half a minute to compile" if setting.quick else "no C++ compiler"
    contestants = [
        _contestant(problem, "auto", OURS),
        *(_contestant(problem, mode, BASELINE) for mode in modes),
        problem.contestant("hypergradient", BASELINE, by_hypergradient),
        problem.contestant("autograd + _foreach", BASELINE, by_autograd),
    ]
    params = problem.params
    return Field(contestants, len(params), sum(p.numel() for p in params), _inputs.num_bytes(params), left_out)


_PROBLEMS: dict[str, tuple[str, Callable[[Setting, int], Problem]]] = {
    "logistic": ("logistic regression, 784-10", dense_problem(784, 10)),
    "mlp": ("an MLP 64-64-10", dense_problem(64, 64, 10)),
    "deep-mlp": ("an MLP of 7 layers of 16", dense_problem(20, 16, 16, 16, 16, 16, 16, 10)),
    "cnn": ("three convolutions on 32x32 images", cnn_problem),
}

for _name, (_summary, _make) in _PROBLEMS.items():
    for _num_terms in NUM_TERMS.get(_name, (20,)):
        registry.add(
            Case(
                f"captured/{_name}-K{_num_terms}",
                f"a captured hypergradient step with {_num_terms} products, {_summary}",
                functools.partial(_build, _make, _num_terms),
                (
                    Goal("hypergradient", 1.0, "never slower than a step that is built anew"),
                    *([Goal("autograd + _foreach", 0.5, "2x faster than plain autograd")] if _name != "cnn" else []),
                ),
            )
        )
