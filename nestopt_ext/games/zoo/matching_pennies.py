"""Matching pennies, the zero-sum game without a pure equilibrium."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._game import ZooGame


class MatchingPennies(ZooGame):
    """One logit for each player; made by :func:`matching_pennies`."""

    name = "matching_pennies"

    def __init__(self, **options: Any) -> None:
        super().__init__([(), ()], **options)

    @property
    def solution(self) -> tuple[Tensor, ...]:
        """Heads with probability 1/2 for both: logits 0."""
        zero = torch.zeros((), dtype=self.players[0].dtype, device=self.players[0].device)
        return (zero, zero.clone())

    def losses(self, players: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """(2 p_1 - 1)(2 p_2 - 1) for the first player and its negative for the second."""
        return pennies_losses(*players)

    def jacobian(self) -> Tensor:
        """The matrix at the players, [2, 2] or [B, 2, 2]; [[0, 1/4], [-1/4, 0]] at the solution."""
        a, b = (torch.tanh(p.detach() / 2) for p in self.players)
        da, db = ((1 - t**2) / 2 for t in (a, b))
        # tanh(x / 2)'' = -tanh(x / 2) tanh(x / 2)'
        rows = [[-a * da * b, da * db], [-da * db, a * b * db]]
        return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def matching_pennies(
    *,
    start: Sequence[Tensor] | None = None,
    batch: int | None = None,
    generator: torch.Generator | int | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> MatchingPennies:
    r"""Matching pennies: :math:`L_1 = x^\top \begin{pmatrix} 1 & -1 \\ -1 & 1 \end{pmatrix} y = -L_2` with :math:`x =
    (p_1, 1 - p_1)`, :math:`y = (p_2, 1 - p_2)`.

    The players are the logits of :math:`p_i`, the probability of heads: 0-dim tensors. The first player pays where the
    pennies match. The arguments are those of every game of the zoo.

    >>> game = matching_pennies(start=(torch.tensor(0.0), torch.tensor(0.0)))
    >>> game.jacobian()
    tensor([[-0.0000,  0.2500],
            [-0.2500,  0.0000]], dtype=torch.float64)
    """
    return MatchingPennies(start=start, batch=batch, generator=generator, dtype=dtype, device=device)


def pennies_losses(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The losses of :func:`matching_pennies` from the logits, elementwise."""
    value = torch.tanh(first / 2) * torch.tanh(second / 2)
    return value, -value
