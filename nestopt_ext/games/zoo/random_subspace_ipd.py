"""The iterated prisoner's dilemma seen through one number for each player, in directions drawn at random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._lists import dtype_name, value_name
from ...optim._arguments import check_real
from ._game import ZooGame
from .ipd import memory_one_losses

#: Where the lines pass through: the chances to cooperate of both players, whatever the directions.
_CENTRE = ((0.5, 0.75, 0.25, 0.75, 0.25), (0.5, 0.75, 0.75, 0.25, 0.25))
#: Directions have entries in (-2, 2).
_SPREAD = 2.0


class RandomSubspaceIpd(ZooGame):
    """One number for each player, which moves its five logits along a line; made by :func:`random_subspace_ipd`."""

    name = "random_subspace_ipd"

    def __init__(self, directions: Tensor, discount: float, **options: Any) -> None:
        super().__init__([(), ()], **options)
        like = self.players[0]
        self.discount = discount
        self.directions = directions.to(like)
        self.offsets = torch.logit(torch.tensor(_CENTRE, dtype=torch.float64)).to(like)

    def logits(self, players: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The players of :func:`ipd` at these players, of shape (5,) or (B, 5) each."""
        triples = zip(players, self.directions, self.offsets, strict=True)
        return tuple(player.unsqueeze(-1) * direction + offset for player, direction, offset in triples)

    def losses(self, players: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The expected discounted cost of each player, summed over all rounds."""
        first, second = (torch.sigmoid(logits) for logits in self.logits(players))
        return memory_one_losses(first, second, self.discount)

    def per_round(self, players: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The losses times 1 - discount, the mean cost of a round."""
        return tuple((1 - self.discount) * loss for loss in self.losses(players))


def random_subspace_ipd(
    discount: float = 0.96,
    *,
    seed: int = 0,
    start: Sequence[Tensor] | None = None,
    batch: int | None = None,
    generator: torch.Generator | int | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> RandomSubspaceIpd:
    r""":func:`ipd` on a random plane: player i holds one number :math:`w_i`, its logits are :math:`d_i w_i + b_i`.

    The directions :math:`d_i` of shape (5,) have independent entries uniform in (-2, 2), drawn from ``seed``, the same
    for every dtype and device; they are ``game.directions``. The offsets are the logits of cooperating with
    probabilities (1/2, 3/4, 1/4, 3/4, 1/4) for player 1 and (1/2, 3/4, 3/4, 1/4, 1/4) for player 2: of mostly answering
    in kind. Losses sum over all rounds, as those of :func:`ipd`, and ``game.per_round`` gives the mean cost of a round.
    ``discount`` is gamma in [0, 1). The other arguments are those of every game of the zoo.

    Source: Lorraine et al., Lyapunov exponents for diversity in differentiable games (2022).

    >>> game = random_subspace_ipd(seed=3, start=(torch.tensor(0.0), torch.tensor(0.0)))
    >>> [p.tolist() for p in (torch.sigmoid(logits) for logits in game.logits(game.players))]
    [[0.5, 0.75, 0.25, 0.75, 0.25], [0.5, 0.75, 0.75, 0.25, 0.25]]
    """
    caller = "random_subspace_ipd"
    check_real(caller, "discount", discount, minimum=0.0)
    if discount >= 1:
        raise ValueError(f"{caller}: discount must be below 1; got {discount}.")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"{caller}: seed must be an int; got {value_name(seed)}.")
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{caller}: dtype must be float32 or float64; got {dtype_name(dtype)}.")
    uniform = torch.rand(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    directions = _SPREAD * (2 * uniform - 1)
    return RandomSubspaceIpd(
        directions, discount, start=start, batch=batch, generator=generator, dtype=dtype, device=device
    )
