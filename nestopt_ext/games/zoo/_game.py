"""What all games of the zoo have: players, and starts for them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ... import _lists

Shape: TypeAlias = tuple[int, ...]
Generator: TypeAlias = torch.Generator | int | None


def as_tensor(value: Tensor | Sequence[float] | float) -> Tensor:
    """A tensor as it is; numbers in float64, of which torch's default dtype would keep half the digits."""
    return value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)


class ZooGame(ABC):
    """A game of two or more tensors, one for each player; the module's docstring says what it has."""

    #: The name of the function that makes it, for messages.
    name: str

    def __init__(
        self,
        shapes: Sequence[Shape],
        *,
        start: Sequence[Tensor] | None,
        batch: int | None,
        generator: Generator,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> None:
        if dtype not in _lists.FLOATING:
            raise TypeError(
                f"{self.name}: dtype must be float32, float64, bfloat16 or float16; got {_lists.dtype_name(dtype)}."
            )
        if batch is not None and (not isinstance(batch, int) or isinstance(batch, bool)):
            raise TypeError(f"{self.name}: batch must be None or an int; got {_lists.value_name(batch)}.")
        if batch is not None and batch < 1:
            raise ValueError(f"{self.name}: batch must be at least 1; got {batch}.")
        self._shapes = tuple(shapes)
        if start is None:
            values = self._draw(() if batch is None else (batch,), generator)
        else:
            values = self._given(self.name, start, None if batch is None else (batch,))
        self._players = tuple(v.to(dtype=dtype, device=device).detach().clone().requires_grad_() for v in values)

    @property
    def players(self) -> tuple[Tensor, ...]:
        """The players: leaf tensors that require grad, with leading dimension B where there are B starts."""
        return self._players

    @property
    def batch(self) -> int | None:
        """The number of independent starts, None for one without leading dimension."""
        return self._players[0].shape[0] if self._players[0].dim() > len(self._shapes[0]) else None

    @property
    def solution(self) -> tuple[Tensor, ...] | None:
        """The players at the solution, without leading dimension; None where no point is singled out."""
        return None

    @abstractmethod
    def losses(self, players: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The loss of each player, of shape () or (B,)."""

    def reset(self, start: Sequence[Tensor] | None = None, *, generator: Generator = None) -> None:
        """Writes new values into the players, given or drawn, and drops their ``.grad``.

        The players stay the same tensors, so the number of starts stays, and optimizers keep hold of them.
        """
        leading = () if self.batch is None else (self.batch,)
        values = self._draw(leading, generator) if start is None else self._given(f"{self.name}.reset", start, leading)
        with torch.no_grad():
            for value, player in zip(values, self._players, strict=True):
                player.copy_(value)
                player.grad = None

    def _draw(self, leading: Shape, generator: Generator) -> list[Tensor]:
        if isinstance(generator, int):
            generator = torch.Generator().manual_seed(generator)
        device = None if generator is None else generator.device
        return [
            torch.randn((*leading, *shape), dtype=torch.float64, device=device, generator=generator)
            for shape in self._shapes
        ]

    def _given(self, caller: str, start: Sequence[Tensor], leading: Shape | None) -> list[Tensor]:
        """The values of ``start``, checked; None for ``leading`` takes one dimension more than the shapes have."""
        if not isinstance(start, list | tuple) or len(start) != len(self._shapes):
            got = f"{len(start)} entries" if isinstance(start, list | tuple) else _lists.value_name(start)
            raise TypeError(
                f"{caller}: start must be a list or tuple of {len(self._shapes)} tensors, one for each player;"
                f" got {got}."
            )
        values = [as_tensor(value) for value in start]
        if leading is None:
            leading = tuple(values[0].shape[:1]) if values[0].dim() == len(self._shapes[0]) + 1 else ()
        for i, (value, shape) in enumerate(zip(values, self._shapes, strict=True)):
            if value.shape != (*leading, *shape):
                raise ValueError(
                    f"{caller}: start[{i}] must have shape {_lists.shape_name((*leading, *shape))};"
                    f" got {_lists.shape_name(value.shape)}."
                )
        return values
