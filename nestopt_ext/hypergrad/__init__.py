"""Gradients of outer losses in hyperparameters."""

from .best_response import best_response
from .hypergradient import hypergradient

__all__ = ["best_response", "hypergradient"]
