"""Inverse products: methods given as values, and one function that runs them on any matvec."""

from ._outcome import Solver
from ._solution import Solution, Status
from ._solve import solve
from .identity import Identity
from .neumann import Neumann, neumann_ihvp

__all__ = ["Identity", "Neumann", "Solution", "Solver", "Status", "neumann_ihvp", "solve"]
