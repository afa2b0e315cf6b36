"""What a play leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .. import _lists
from .._types import TensorList
from ._players import Players
from ._watch import PlayStatus


@dataclass(frozen=True, eq=False)
class Trajectory:
    """What :func:`simultaneous` and :func:`alternating` return; R records, n players, B starts, all tensors on the CPU.

    ``steps`` [R] says how many steps had been taken at each record; the first record is the start, the last the end.
    ``losses`` is [R, n], or [R, n, B]. ``recorded`` is what ``measure`` returned, or the players, in the structure that
    they had, every tensor with a leading dimension R.

    ``num_steps`` counts the steps taken, and ``num_gradients`` the gradients (directions) that each player took for
    them, or the player that took the most: extragradient takes two a step. ``converged_at`` and ``failed_at``, int64 of
    shape () or (B,), are the first step at which a start came within the tolerance, or became too large, NaN or Inf; -1
    where it never did.
    """

    steps: Tensor
    losses: Tensor
    recorded: Any
    num_steps: int
    num_gradients: int
    status: PlayStatus
    converged_at: Tensor
    failed_at: Tensor


class Recorder:
    """Copies to the CPU, every so many steps, the losses and the players or what is measured of them."""

    def __init__(
        self,
        caller: str,
        game_players: Any,
        players: Players,
        measure: Callable[[Any], Any] | None,
        record_every: int | None,
    ) -> None:
        self._caller = caller
        self._game_players = game_players
        self._players = players
        self._measure = measure
        self._every = record_every
        self._structure: _lists.Structure | None = None  # of what is measured, from the first record on
        self._steps: list[int] = []
        self._losses: TensorList = []
        self._values: list[TensorList] = []

    def due(self, step: int) -> bool:
        """Whether a record is wanted after so many steps, the end apart."""
        return step == 0 or (self._every is not None and step % self._every == 0)

    def record(self, step: int, losses: Any) -> None:
        """Takes a record; on an accelerator this waits for it."""
        self._steps.append(step)
        self._losses.append(torch.stack([_on_host(loss).to(torch.float64) for loss in losses]))
        values = self._players.tensors if self._measure is None else self._measured(self._measure)
        self._values.append([_on_host(t) for t in values])

    def recorded(self) -> tuple[Tensor, Tensor, Any]:
        """The steps, losses and values of all records, stacked."""
        stacked = [torch.stack(list(same)) for same in zip(*self._values, strict=True)]
        pack = self._players.pack if self._structure is None else self._structure.pack
        return torch.tensor(self._steps, device="cpu"), torch.stack(self._losses), pack(stacked)

    def _measured(self, measure: Callable[[Any], Any]) -> TensorList:
        found = measure(self._game_players)
        if isinstance(found, Mapping):
            found = {key: _as_tensor(value) for key, value in found.items()}
        elif isinstance(found, list | tuple):
            found = tuple(map(_as_tensor, found))
        else:
            found = _as_tensor(found)
        name = "measure(players)"
        if self._structure is None:
            flat, self._structure = _lists.flatten(self._caller, name, found)
            return flat
        flat = self._structure.match(self._caller, name, found, returned=True)
        for label, value, first in zip(self._structure.labels(name), flat, self._values[0], strict=True):
            if value.shape != first.shape:
                raise ValueError(
                    f"{self._caller}: {label} must have the shape that it had at the start,"
                    f" {_lists.shape_name(first.shape)}; got {_lists.shape_name(value.shape)}."
                )
        return flat


def _as_tensor(value: Any) -> Any:
    return torch.tensor(float(value), dtype=torch.float64, device="cpu") if isinstance(value, Real) else value


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
