"""Products with the curvature of a loss, and the operators that give them."""

from ._operator import CurvatureOperator, Diagonal
from ._plan import Plan
from .all_reduced import all_reduced
from .empirical_fisher import EmpiricalFisher
from .gauss_newton import GaussNewton, ggnvp
from .hessian import Hessian, hvp
from .kfac import KFAC
from .linearize import Linearized, linearize
from .loss_hessian import LossHessian, loss_hessian
from .over_batches import OverBatches
from .rank_one import RankOne

__all__ = [
    "KFAC",
    "CurvatureOperator",
    "Diagonal",
    "EmpiricalFisher",
    "GaussNewton",
    "Hessian",
    "Linearized",
    "LossHessian",
    "OverBatches",
    "Plan",
    "RankOne",
    "all_reduced",
    "ggnvp",
    "hvp",
    "linearize",
    "loss_hessian",
]
