"""Riding: branches that find every solution of a game, not one, beside descents that find fewer."""

from .config import RideConfig
from .results import RideResult
from .run import ride

__all__ = ["RideConfig", "RideResult", "ride"]
