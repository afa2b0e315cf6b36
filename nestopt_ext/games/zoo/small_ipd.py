"""The iterated prisoner's dilemma with one number for each player, and its mixture with matching pennies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...optim._arguments import check_real
from ._game import ZooGame
from .matching_pennies import pennies_losses

#: The logit of cooperating after the other has defected.
FORGIVENESS = -3.0


class SmallIpd(ZooGame):
    """One logit for each player; made by :func:`small_ipd`."""

    name = "small_ipd"

    def __init__(self, discount: float, **options: Any) -> None:
        super().__init__([(), ()], **options)
        self.discount = discount

    def losses(self, players: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The discounted cost of each player, as a mean over the rounds: 1 for cooperation, 2 for defection."""
        first, second = players
        return small_ipd_losses(first, second, self.discount)


class Mix(ZooGame):
    """Between the small dilemma and matching pennies; made by :func:`mix`."""

    name = "mix"

    def __init__(self, tau: float, discount: float, **options: Any) -> None:
        super().__init__([(), ()], **options)
        self.tau = tau
        self.discount = discount

    def losses(self, players: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The weighted sum of both games' losses, for each player."""
        first, second = players
        pairs = zip(pennies_losses(first, second), small_ipd_losses(first, second, self.discount), strict=True)
        return tuple(self.tau * pennies + (1 - self.tau) * dilemma for pennies, dilemma in pairs)


def small_ipd(
    discount: float = 0.9,
    *,
    start: Sequence[Tensor] | None = None,
    batch: int | None = None,
    generator: torch.Generator | int | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> SmallIpd:
    r"""The iterated prisoner's dilemma with one logit for each player: a game in the plane with two solutions.

    Player i cooperates with probability :math:`p_i = \sigma(w_i)` in the first round and after the other cooperated,
    and with :math:`f = \sigma(-3)` after the other defected; costs are those of :func:`ipd`. The losses are the
    discounted sums times 1 - discount, the mean cost of a round. Each player answers the other's last move, and the
    costs add up from the two moves, so that only the discounted chances :math:`C_i` to see i cooperate count:

    .. math:: L_1 = 2 + (1 - \gamma) (C_1 - 2 C_2), \qquad
              C_i = p_i + \gamma f / (1 - \gamma) + \gamma (p_i - f) C_j .

    Gradient descent ends in tit-for-tat (1, 1) or in defection (1.96, 1.96), on both sides of a saddle at
    :math:`p_1 = p_2 = 0.6030`. ``discount`` is gamma in [0, 1). The other arguments are those of every game of the zoo.

    Source: Lorraine et al., Lyapunov exponents for diversity in differentiable games (2022). The solution in closed
    form is ours; it is :func:`ipd` with the logits (w, w, -3, w, -3) and, for player 2, (w, w, w, -3, -3).

    >>> reliable = torch.tensor(40.0)                                      # tit-for-tat that never errs first
    >>> game = small_ipd(start=(reliable, reliable))
    >>> [round(loss.item(), 12) for loss in game.losses(game.players)]
    [1.0, 1.0]
    """
    _check_discount("small_ipd", discount)
    return SmallIpd(discount, start=start, batch=batch, generator=generator, dtype=dtype, device=device)


def mix(
    tau: float = 0.25,
    discount: float = 0.9,
    *,
    start: Sequence[Tensor] | None = None,
    batch: int | None = None,
    generator: torch.Generator | int | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Mix:
    r"""Between the small prisoner's dilemma and matching pennies: :math:`\tau L^{\text{pennies}} + (1 - \tau)
    L^{\text{dilemma}}`.

    The players are the logits of :func:`small_ipd`, which are those of :func:`matching_pennies` too. At tau = 0.25
    there is a stable spiral, with complex eigenvalues, beside an attractor that lies far out; at tau = 0.1 a spiral and
    a saddle. ``tau`` is in [0, 1], ``discount`` that of the dilemma. The other arguments are those of every game of the
    zoo.

    Source: Lorraine et al., Lyapunov exponents for diversity in differentiable games (2022).

    >>> game = mix(1.0, start=(torch.tensor(0.0), torch.tensor(2.0)))      # matching pennies
    >>> [loss.item() for loss in game.losses(game.players)]
    [0.0, 0.0]
    """
    check_real("mix", "tau", tau)
    if not 0 <= tau <= 1:
        raise ValueError(f"mix: tau must be in [0, 1]; got {tau}.")
    _check_discount("mix", discount)
    return Mix(tau, discount, start=start, batch=batch, generator=generator, dtype=dtype, device=device)


def small_ipd_losses(first: Tensor, second: Tensor, discount: float) -> tuple[Tensor, Tensor]:
    """The losses of :func:`small_ipd` from the logits, elementwise."""
    p, q = torch.sigmoid(first), torch.sigmoid(second)
    forgiving = 1 / (1 + math.exp(-FORGIVENESS))
    later = discount * forgiving / (1 - discount)
    answer_p, answer_q = discount * (p - forgiving), discount * (q - forgiving)
    scale = (1 - discount) / (1 - answer_p * answer_q)
    c1 = scale * (p + later + answer_p * (q + later))
    c2 = scale * (q + later + answer_q * (p + later))
    return 2 + c1 - 2 * c2, 2 + c2 - 2 * c1


def _check_discount(caller: str, discount: float) -> None:
    check_real(caller, "discount", discount, minimum=0.0)
    if discount >= 1:
        raise ValueError(f"{caller}: discount must be below 1; got {discount}.")
