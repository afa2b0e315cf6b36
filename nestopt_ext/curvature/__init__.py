"""Products with the curvature of a loss, and the operators that give them."""

from ._operator import CurvatureOperator, Diagonal
from .all_reduced import all_reduced
from .hessian import Hessian, hvp
from .kfac import KFAC

__all__ = ["KFAC", "CurvatureOperator", "Diagonal", "Hessian", "all_reduced", "hvp"]
