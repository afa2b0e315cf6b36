"""Watches a computation for what cannot be put into a graph, so that the reason can be named before it is tried."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Inspection(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While open, notes what of the operators called would not be the same, or not be possible, in a replay.

    ``reason`` is the first thing found that rules a replay out, None while there is none. ``draws`` says whether random
    numbers are drawn on the device, and ``generators`` are those of the caller among them. ``read`` holds the tensors
    that were there before and are read, which a replay needs alive.
    """

    supports_higher_order_operators = True

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reason: str | None = None
        self.draws = False
        self.generators: list[torch.Generator] = []
        self.read: dict[int, Tensor] = {}
        self._device = device
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(_tensors((*args, *kwargs.values())))
        for tensor in given:
            if (storage := _storage(tensor)) not in self._made:
                self.read.setdefault(storage, tensor.detach())
        result = func(*args, **kwargs)
        made = list(_tensors((result,)))
        self._made.update(_storage(t) for t in made if _storage(t) not in self.read)
        if self.reason is None:
            self.reason = self._fault(func, given, made, kwargs.get("generator"))
        return result

    def _fault(
        self, func: Any, given: Sequence[Tensor], made: Sequence[Tensor], generator: torch.Generator | None
    ) -> str | None:
        tags = getattr(func, "tags", ())
        on_device = any(t.device == self._device for t in given)
        if on_device and (torch.Tag.data_dependent_output in tags or _shaped_by_values(func, tags, given)):
            return f"the host reads a value from the device ({func}), which a replay cannot do"
        if torch.Tag.nondeterministic_seeded in tags:
            if any(t.device != self._device for t in (*given, *made)):
                return f"random numbers are drawn elsewhere than on {self._device} ({func})"
            self.draws = True
            if generator is not None and all(generator is not known for known in self.generators):
                self.generators.append(generator)
        return None


def _shaped_by_values(func: Any, tags: Sequence[Any], given: Sequence[Tensor]) -> bool:
    if torch.Tag.dynamic_output_shape not in tags:
        return False
    # Indexing carries the tag whatever the index is, but only a mask has to be counted.
    indexing = func in (torch.ops.aten.index.Tensor, torch.ops.aten._unsafe_index.Tensor)
    return not indexing or any(t.dtype in (torch.bool, torch.uint8) for t in given[1:])


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)
