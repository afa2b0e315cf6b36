"""The state of an iteration: tensors in any nesting of lists, tuples and dicts, as one flat list.

An optimizer's state is rarely flat: weights by name, and buffers by name beside them. ``_lists`` keeps to one level,
which is all that a solver or an operator sees.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _lists
from .._types import TensorList

_Builder = Callable[[Iterator[Tensor]], Any]


@dataclass(frozen=True)
class Nest:
    """How a flat list is nested: where each element is, as a message names it, and what builds the nest again."""

    suffixes: tuple[str, ...]
    build: _Builder

    def labels(self, name: str) -> list[str]:
        return [name + suffix for suffix in self.suffixes]

    def pack(self, flat: Sequence[Tensor]) -> Any:
        return self.build(iter(flat))

    def match(self, caller: str, name: str, value: object) -> TensorList:
        """The tensors of ``value`` in the order of this nest; ValueError unless it holds the same elements.

        List and tuple count as one kind, because ``torch.autograd.grad`` turns every sequence into a tuple.
        """
        flat, nest = flatten(caller, name, value)
        if nest.suffixes == self.suffixes:
            return flat
        found = dict(zip(nest.suffixes, flat, strict=True))
        for suffix in self.suffixes:
            if suffix not in found:
                raise ValueError(f"{caller}: {name} must have the structure of params; got no {name}{suffix}.")
        for suffix in found:
            if suffix not in self.suffixes:
                raise ValueError(
                    f"{caller}: {name} must have the structure of params; got {name}{suffix}, which params have not."
                )
        return [found[suffix] for suffix in self.suffixes]


def flatten(caller: str, name: str, value: object) -> tuple[TensorList, Nest]:
    """The tensors as a list, with the nest that packs them again; TypeError for anything that is not tensors."""
    found: dict[str, Tensor] = {}
    build = _visit(f"{caller}: {name}", value, "", found)
    return list(found.values()), Nest(tuple(found), build)


def _visit(context: str, item: object, suffix: str, found: dict[str, Tensor]) -> _Builder:
    """Adds the tensors of ``item`` to those found, by where they are, and says how to build it again."""
    if isinstance(item, Tensor):
        found[suffix] = item
        return next
    if isinstance(item, torch.nn.ParameterDict):
        item = dict(item.items())
    if isinstance(item, Mapping):
        return _mapping(item, {key: _visit(context, part, f"{suffix}[{key!r}]", found) for key, part in item.items()})
    if isinstance(item, list | tuple) or (not suffix and isinstance(item, Iterator)):
        return _sequence(item, [_visit(context, part, f"{suffix}[{i}]", found) for i, part in enumerate(item)])
    module = isinstance(item, torch.nn.Module)
    remedy = " Pass its parameters: dict(module.named_parameters())." if module else ""
    wanted = "a Tensor, or lists, tuples and dicts of tensors"
    raise TypeError(f"{context}{suffix} must be {wanted}; got {_lists.value_name(item)}.{remedy}")


def _mapping(like: Mapping[Any, object], builders: dict[Any, _Builder]) -> _Builder:
    kind: type[dict[Any, Any]] = OrderedDict if isinstance(like, OrderedDict) else dict
    return lambda flat: kind((key, build(flat)) for key, build in builders.items())


def _sequence(like: object, builders: list[_Builder]) -> _Builder:
    if isinstance(like, tuple) and hasattr(like, "_fields"):
        named: Callable[..., Any] = type(like)
        return lambda flat: named(*[build(flat) for build in builders])
    kind = tuple if isinstance(like, tuple) else list
    return lambda flat: kind([build(flat) for build in builders])
