"""Gradients of outer losses in hyperparameters."""

from .best_response import best_response
from .gradient_step import gradient_step
from .hypergradient import hypergradient
from .unrolled import unrolled

__all__ = ["best_response", "gradient_step", "hypergradient", "unrolled"]
