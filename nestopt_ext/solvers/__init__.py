"""Inverse products: methods given as values, and one function that runs them on any matvec."""

from ._outcome import Solver
from ._solution import Solution, Status
from ._solve import solve
from .conjugate_gradient import ConjugateGradient, cg_ihvp
from .identity import Identity
from .neumann import Neumann, neumann_ihvp

__all__ = [
    "ConjugateGradient",
    "Identity",
    "Neumann",
    "Solution",
    "Solver",
    "Status",
    "cg_ihvp",
    "neumann_ihvp",
    "solve",
]
