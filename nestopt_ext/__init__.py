"""Nested (bilevel) optimization for PyTorch: one set of parameters optimized inside the objective of another.

Optimizers     ComplexSGD
Products       hvp
Curvature      Hessian
Inverses       neumann_ihvp, solve; Neumann, Identity; Solution, Status
Hypergradients hypergradient, best_response
This build     native_status, build_info
"""

from . import _ops as _ops
from ._library import build_info, native_status
from ._version import __version__
from .curvature import Hessian, hvp
from .hypergrad import best_response, hypergradient
from .optim import ComplexSGD
from .solvers import Identity, Neumann, Solution, Status, neumann_ihvp, solve

__all__ = [
    "ComplexSGD",
    "Hessian",
    "Identity",
    "Neumann",
    "Solution",
    "Status",
    "__version__",
    "best_response",
    "build_info",
    "hvp",
    "hypergradient",
    "native_status",
    "neumann_ihvp",
    "solve",
]
