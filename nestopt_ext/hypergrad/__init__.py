"""Gradients of outer losses in hyperparameters, and loops that use them."""

from ._report import Direction, Finding, HypergradientReport
from .best_response import best_response
from .captured import CapturedHypergradient
from .check import check_hypergradient
from .cost import Cost, estimate_cost
from .fixed_point import FixedPointMap
from .gradient_step import gradient_step
from .hoag import HoagResult, HoagStep, hoag
from .hypergradient import hypergradient
from .loop import BilevelLoop, LoopDiverged, LoopRecord
from .unrolled import unrolled

__all__ = [
    "BilevelLoop",
    "CapturedHypergradient",
    "Cost",
    "Direction",
    "Finding",
    "FixedPointMap",
    "HoagResult",
    "HoagStep",
    "HypergradientReport",
    "LoopDiverged",
    "LoopRecord",
    "best_response",
    "check_hypergradient",
    "estimate_cost",
    "gradient_step",
    "hoag",
    "hypergradient",
    "unrolled",
]
