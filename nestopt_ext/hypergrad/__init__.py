"""Gradients of outer losses in hyperparameters."""

from .best_response import best_response
from .fixed_point import FixedPointMap
from .gradient_step import gradient_step
from .hoag import HoagResult, HoagStep, hoag
from .hypergradient import hypergradient
from .unrolled import unrolled

__all__ = [
    "FixedPointMap",
    "HoagResult",
    "HoagStep",
    "best_response",
    "gradient_step",
    "hoag",
    "hypergradient",
    "unrolled",
]
