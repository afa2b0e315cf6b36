"""Padding, by a constant or by elements of the tensor itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._tape import MixesExamples, Node, Operand, accumulated, rule, value_of


class Pad(Node):
    """Padding of the last dimensions of x: ``pad`` is as for ``F.pad``, and negative where it takes away."""

    def __init__(self, x: Operand, pad: Sequence[int]) -> None:
        super().__init__(x)
        self.pad = list(pad)
        self.dims = value_of(x).dim()

    def jvp(self, tangents: Sequence[Tensor | None]) -> Tensor:
        """Zeros around the tangent."""
        assert tangents[0] is not None
        return F.pad(tangents[0], self.pad)

    def vjp(self, i: int, cotangent: Tensor, into: Tensor | None) -> Tensor:
        return accumulated(F.pad(cotangent, [-p for p in self.pad]), into)

    def batch_dim(self, dims: Sequence[int | None], batch: int) -> int | None:
        """That of x, unless it is padded."""
        of_x = dims[0]
        if of_x is not None:
            behind = 2 * (self.dims - 1 - of_x)
            if any(self.pad[behind : behind + 2]):
                raise MixesExamples("padding is between the examples")
        return of_x


class PadFromWithin(Pad):
    """Padding by elements of x: ``places`` has, for each padded dimension, from the last, where they come from."""

    def __init__(self, x: Operand, pad: Sequence[int], mode: str) -> None:
        super().__init__(x, pad)
        self.mode = mode
        t = value_of(x)
        self.sizes = [t.shape[-1 - d] for d in range(len(self.pad) // 2)]
        self.places = [_places(mode, size, self.pad[2 * d : 2 * d + 2], t.device) for d, size in enumerate(self.sizes)]

    def jvp(self, tangents: Sequence[Tensor | None]) -> Tensor:
        assert tangents[0] is not None
        return F.pad(tangents[0], self.pad, self.mode)

    def vjp(self, i: int, cotangent: Tensor, into: Tensor | None) -> Tensor:
        u = cotangent
        for d, (size, places) in enumerate(zip(self.sizes, self.places, strict=True)):
            if any(self.pad[2 * d : 2 * d + 2]):
                shape = list(u.shape)
                shape[-1 - d] = size
                u = u.new_zeros(shape).index_add_(-1 - d, places, u)
        return accumulated(u, into) if u is not cotangent or into is not None else u.clone()


def _places(mode: str, size: int, pad: Sequence[int], device: torch.device) -> Tensor:
    """Where the elements of one padded dimension come from: what becomes of their numbers, which are small enough."""
    numbers = torch.arange(size, dtype=torch.float64, device=device)
    return F.pad(numbers.view(1, 1, size), pad, mode).view(-1).to(torch.int64)


@rule(F.pad)
def pad(input: Operand, pad: Any, mode: str = "constant", value: float | None = None) -> Any:
    result = F.pad(value_of(input), pad, mode, value)
    if mode == "constant":
        return Pad(input, pad), result
    return PadFromWithin(input, pad, mode), result
