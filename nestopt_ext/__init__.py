"""Nested (bilevel) optimization for PyTorch: one set of parameters optimized inside the objective of another.

Optimizers     ComplexSGD, ComplexAdam, effective_lr; ExtraSGD, ExtraAdam, OptimisticSGD, OptimisticAdam
Products       hvp, ggnvp, loss_hessian; linearize
Curvature      Hessian, GaussNewton, EmpiricalFisher, RankOne, KFAC, Diagonal; OverBatches, all_reduced
Inverses       neumann_ihvp, cg_ihvp, solve; Neumann, ConjugateGradient, Identity, Exact, FixedPoint, Nystrom, Woodbury;
               Solution, Status
Hypergradients hypergradient, CapturedHypergradient, best_response, FixedPointMap; unrolled, gradient_step; hoag,
               BilevelLoop; check_hypergradient, estimate_cost
Response       response (hypernetworks, Self-Tuning Networks, Delta-STN)
Games          games
This build     native_status, build_info
"""

import importlib
from typing import Any

from . import _ops as _ops
from ._library import build_info, native_status
from ._version import __version__

# For type checkers; at run time `__getattr__` imports a room when it is asked for. Not TYPE_CHECKING, under which mypy
# looks late and takes `linearize` and its like for the modules of that name.
_EAGER: bool = False
if _EAGER:
    from . import games as games
    from . import response as response
    from .curvature import (
        KFAC,
        Diagonal,
        EmpiricalFisher,
        GaussNewton,
        Hessian,
        OverBatches,
        RankOne,
        all_reduced,
        ggnvp,
        hvp,
        linearize,
        loss_hessian,
    )
    from .hypergrad import (
        BilevelLoop,
        CapturedHypergradient,
        FixedPointMap,
        best_response,
        check_hypergradient,
        estimate_cost,
        gradient_step,
        hoag,
        hypergradient,
        unrolled,
    )
    from .optim import ComplexAdam, ComplexSGD, ExtraAdam, ExtraSGD, OptimisticAdam, OptimisticSGD, effective_lr
    from .solvers import (
        ConjugateGradient,
        Exact,
        FixedPoint,
        Identity,
        Neumann,
        Nystrom,
        Solution,
        Status,
        Woodbury,
        cg_ihvp,
        neumann_ihvp,
        solve,
    )

__all__ = [
    "KFAC",
    "BilevelLoop",
    "CapturedHypergradient",
    "ComplexAdam",
    "ComplexSGD",
    "ConjugateGradient",
    "Diagonal",
    "EmpiricalFisher",
    "Exact",
    "ExtraAdam",
    "ExtraSGD",
    "FixedPoint",
    "FixedPointMap",
    "GaussNewton",
    "Hessian",
    "Identity",
    "Neumann",
    "Nystrom",
    "OptimisticAdam",
    "OptimisticSGD",
    "OverBatches",
    "RankOne",
    "Solution",
    "Status",
    "Woodbury",
    "__version__",
    "all_reduced",
    "best_response",
    "build_info",
    "cg_ihvp",
    "check_hypergradient",
    "effective_lr",
    "estimate_cost",
    "games",
    "ggnvp",
    "gradient_step",
    "hoag",
    "hvp",
    "hypergradient",
    "linearize",
    "loss_hessian",
    "native_status",
    "neumann_ihvp",
    "response",
    "solve",
    "unrolled",
]

#: The rooms, in the order in which a name is looked for in them.
_ROOMS = ("optim", "solvers", "curvature", "hypergrad", "games", "response")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name in __all__:
        for room in _ROOMS:
            module = importlib.import_module(f"{__name__}.{room}")
            if name in module.__all__:
                globals()[name] = found = getattr(module, name)
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
