"""Inverse products: methods given as values, and one function that runs them on any matvec."""

from ._outcome import Solver
from ._solution import Solution, Status
from ._solve import solve
from .conjugate_gradient import ConjugateGradient, cg_ihvp
from .exact import Exact
from .fixed_point import FixedPoint
from .identity import Identity
from .neumann import Neumann, neumann_ihvp
from .nystrom import Nystrom
from .woodbury import Woodbury

__all__ = [
    "ConjugateGradient",
    "Exact",
    "FixedPoint",
    "Identity",
    "Neumann",
    "Nystrom",
    "Solution",
    "Solver",
    "Status",
    "Woodbury",
    "cg_ihvp",
    "neumann_ihvp",
    "solve",
]
