"""Products with the curvature of a loss, and the operators that give them."""

from ._operator import CurvatureOperator
from .hessian import Hessian, hvp

__all__ = ["CurvatureOperator", "Hessian", "hvp"]
