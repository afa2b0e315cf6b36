"""Dropout with the mask that fell when the model was recorded."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .._tape import Operand, rule, value_of
from .activations import Factor


@rule(F.dropout, inplace_position=3)
def dropout(input: Operand, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    x = value_of(input)
    if not training or p == 0:
        F.dropout(x, p, training)  # for its errors
        return input
    # Ones that are dropped are the factors, and draw the random numbers that x would.
    factor = F.dropout(torch.ones_like(x), p, True, inplace)
    return Factor(input, factor), x * factor


def _of_channels(function: Any, batched_dims: int | None) -> None:
    """Registers a dropout of whole channels. An input of fewer than ``batched_dims`` dimensions is one example."""

    @rule(function, inplace_position=3)
    def dropout_of_channels(input: Operand, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        x = value_of(input)
        if not training or p == 0:
            function(x, p, training)
            return input
        kept = 2 if batched_dims is None or x.dim() == batched_dims else 1
        ones = x.new_ones([*x.shape[:kept], *[1] * (x.dim() - kept)])
        factor = function(ones, p, True, inplace)
        return Factor(input, factor), x * factor


_of_channels(F.dropout1d, 3)
_of_channels(F.dropout2d, None)
_of_channels(F.dropout3d, 5)
