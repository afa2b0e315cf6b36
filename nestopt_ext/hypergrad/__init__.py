"""Gradients of outer losses in hyperparameters, and the loop that follows them."""

from .best_response import best_response
from .hypergradient import hypergradient
from .loop import BilevelLoop, LoopDiverged, LoopRecord

__all__ = ["BilevelLoop", "LoopDiverged", "LoopRecord", "best_response", "hypergradient"]
