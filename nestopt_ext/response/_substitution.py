"""Copies a module with some of the modules inside replaced by others."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

#: Where a response layer keeps which attributes were put on the layer that it was made of.
CARRIED = "carried_attributes"


def substituted(root: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """A deep copy of ``root``, with ``replacements`` in it for the modules that are their keys, wherever they occur.

    A replacement takes over copies of the parameters that it has in common with the replaced module, whose sharing with
    others holds among the copies too, its hooks, its training mode, and the attributes that one of them names by
    ``CARRIED``.
    """
    memo = _detached(root)
    memo |= {id(old): new for old, new in replacements.items()}
    for old, new in replacements.items():
        for name in new._parameters.keys() & old._parameters.keys():
            setattr(new, name, copy.deepcopy(old._parameters[name], memo))
        mine, given = vars(new), vars(old)
        mine["training"] = old.training
        hooks = [name for name, value in given.items() if "_hooks" in name and value]
        for name in (*hooks, *mine.get(CARRIED, given.get(CARRIED, ()))):
            mine[name] = copy.deepcopy(given[name], memo)
    return copy.deepcopy(root, memo)


def attributes_put_on(module: nn.Module, made: nn.Module) -> tuple[str, ...]:
    """What ``module`` has and ``made``, by a constructor and of the same type or a subtype, has not."""
    return tuple(vars(module).keys() - vars(made).keys())


def _detached(root: nn.Module) -> dict[int, Any]:
    """Copies of tensors with a graph that modules keep as attributes: pruned weights, or what a call left behind."""
    kept = (value for module in root.modules() for value in vars(module).values() if isinstance(value, Tensor))
    return {id(value): value.detach().clone() for value in kept if not value.is_leaf}
