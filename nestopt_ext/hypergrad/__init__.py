"""Gradients of outer losses in hyperparameters, and loops that use them."""

from .best_response import best_response
from .fixed_point import FixedPointMap
from .gradient_step import gradient_step
from .hoag import HoagResult, HoagStep, hoag
from .hypergradient import hypergradient
from .loop import BilevelLoop, LoopDiverged, LoopRecord
from .unrolled import unrolled

__all__ = [
    "BilevelLoop",
    "FixedPointMap",
    "HoagResult",
    "HoagStep",
    "LoopDiverged",
    "LoopRecord",
    "best_response",
    "gradient_step",
    "hoag",
    "hypergradient",
    "unrolled",
]
