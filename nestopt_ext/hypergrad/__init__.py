"""Gradients of outer losses in hyperparameters, and loops that use them."""

import importlib
from typing import TYPE_CHECKING, Any

from ._report import Direction, Finding, HypergradientReport
from .best_response import best_response
from .fixed_point import FixedPointMap
from .gradient_step import gradient_step
from .hoag import HoagResult, HoagStep, hoag
from .hypergradient import hypergradient
from .unrolled import unrolled

if TYPE_CHECKING:
    from .captured import CapturedHypergradient
    from .check import check_hypergradient
    from .cost import Cost, estimate_cost
    from .loop import BilevelLoop, LoopDiverged, LoopRecord

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

#: What is imported when it is asked for: a good part of the package, which a loop of one's own does not need.
_ON_DEMAND = {
    "BilevelLoop": "loop",
    "CapturedHypergradient": "captured",
    "Cost": "cost",
    "LoopDiverged": "loop",
    "LoopRecord": "loop",
    "check_hypergradient": "check",
    "estimate_cost": "cost",
}


def __getattr__(name: str) -> Any:
    if name in _ON_DEMAND:
        return getattr(importlib.import_module(f"{__name__}.{_ON_DEMAND[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
