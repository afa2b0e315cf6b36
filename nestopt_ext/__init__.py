"""Nested (bilevel) optimization for PyTorch: one set of parameters optimized inside the objective of another.

Optimizers     ComplexSGD, ComplexAdam, effective_lr; ExtraSGD, ExtraAdam, OptimisticSGD, OptimisticAdam
Products       hvp
Curvature      Hessian
Inverses       neumann_ihvp, solve; Neumann, Identity; Solution, Status
Hypergradients hypergradient, best_response
Games          games
This build     native_status, build_info
"""

from . import _ops as _ops
from . import games as games
from ._library import build_info, native_status
from ._version import __version__
from .curvature import Hessian, hvp
from .hypergrad import best_response, hypergradient
from .optim import ComplexAdam, ComplexSGD, ExtraAdam, ExtraSGD, OptimisticAdam, OptimisticSGD, effective_lr
from .solvers import Identity, Neumann, Solution, Status, neumann_ihvp, solve

__all__ = [
    "ComplexAdam",
    "ComplexSGD",
    "ExtraAdam",
    "ExtraSGD",
    "Hessian",
    "Identity",
    "Neumann",
    "OptimisticAdam",
    "OptimisticSGD",
    "Solution",
    "Status",
    "__version__",
    "best_response",
    "build_info",
    "effective_lr",
    "games",
    "hvp",
    "hypergradient",
    "native_status",
    "neumann_ihvp",
    "solve",
]
