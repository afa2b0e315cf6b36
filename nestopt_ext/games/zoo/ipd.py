"""The iterated prisoner's dilemma between players that remember one round, with its exact discounted loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._lists import dtype_name
from ...optim._arguments import check_real
from ._game import ZooGame

#: What each player pays in the states CC, CD, DC, DD, whose first letter is player 1's move.
_COSTS = ((1.0, 3.0, 0.0, 2.0), (1.0, 0.0, 3.0, 2.0))


class IteratedPrisonersDilemma(ZooGame):
    """Five logits for each player; made by :func:`ipd`."""

    name = "ipd"

    def __init__(self, discount: float, **options: Any) -> None:
        super().__init__([(5,), (5,)], **options)
        self.discount = discount

    def losses(self, players: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The expected discounted cost of each player, summed over all rounds."""
        first, second = (torch.sigmoid(logits) for logits in players)
        return memory_one_losses(first, second, self.discount)

    def per_round(self, players: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The losses times 1 - discount, which is how they are reported: 1 for cooperation, 2 for defection."""
        return tuple((1 - self.discount) * loss for loss in self.losses(players))


def ipd(
    discount: float = 0.96,
    *,
    start: Sequence[Tensor] | None = None,
    batch: int | None = None,
    generator: torch.Generator | int | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> IteratedPrisonersDilemma:
    r"""The iterated prisoner's dilemma with memory of one round.

    Each player is 5 logits of the probability to cooperate: in the first round, and after each of the joint moves CC,
    CD, DC, DD. The first letter is always player 1's move, for **both** players: entry 2 of player 2 is its answer to
    player 1 cooperating while it defected itself. A round costs the players (1, 1) in CC, (3, 0) in CD, (0, 3) in DC
    and (2, 2) in DD. With p the distribution of the first round and P the matrix of transitions the loss is exact,

    .. math:: L_i = p^\top (I - \gamma P)^{-1} c_i.

    It sums over all rounds, so the published learning rate is 1; ``game.per_round`` gives :math:`(1 - \gamma) L_i`, 2
    where both always defect and 1 where both cooperate. ``discount`` is gamma in [0, 1). The other arguments are those
    of every game of the zoo.

    Source: Foerster et al., Learning with opponent-learning awareness (2018), whose value is -L.

    >>> defect = torch.full((5,), -40.0)
    >>> tit_for_tat = torch.tensor([40.0, 40.0, -40.0, 40.0, -40.0])       # player 1 answers the second letter
    >>> game = ipd(0.5, start=(tit_for_tat, defect))
    >>> [round(loss.item(), 6) for loss in game.losses(game.players)]      # once (3, 0), then always (2, 2)
    [5.0, 2.0]
    """
    check_real("ipd", "discount", discount, minimum=0.0)
    if discount >= 1:
        raise ValueError(f"ipd: discount must be below 1; got {discount}.")
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"ipd: dtype must be float32 or float64; got {dtype_name(dtype)}.")
    return IteratedPrisonersDilemma(discount, start=start, batch=batch, generator=generator, dtype=dtype, device=device)


def memory_one_losses(first: Tensor, second: Tensor, discount: float) -> tuple[Tensor, Tensor]:
    """The losses of :func:`ipd`, from the probabilities to cooperate, [..., 5], both in the order of player 1."""
    both = first * second, first * (1 - second), (1 - first) * second, (1 - first) * (1 - second)
    joint = torch.stack(both, dim=-1)  # [..., 5, 4]
    opening, transitions = joint[..., 0, :], joint[..., 1:, :]
    identity = torch.eye(4, dtype=joint.dtype, device=joint.device)
    visits = torch.linalg.solve(identity - discount * transitions.mT, opening)
    costs = torch.tensor(_COSTS, dtype=joint.dtype, device=joint.device)
    losses = visits @ costs.T
    return losses[..., 0], losses[..., 1]
