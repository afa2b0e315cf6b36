"""Games whose solutions, and mostly Jacobians, are known.

Every function returns a game (see :class:`~nestopt_ext.games.Game`) and takes, beside its own arguments,

- ``start``: the players' values, in their shapes, or with one leading dimension B for B independent starts; None draws
  them from N(0, 1);
- ``batch``: B, the number of independent starts to draw; None for one start without leading dimension;
- ``generator``: a ``torch.Generator`` or a seed for that draw; None for torch's global generator. Numbers are drawn in
  float64 on the generator's device, so that a seed gives the same starts in every dtype and on every device;
- ``dtype`` (float64) and ``device`` (CPU) of the players.

A game has ``players``, leaf tensors that require grad; ``losses(players)``; ``solution``, the players' values at the
solution (without leading dimension) or None; ``reset(start, generator=...)``, which writes new starts into the players;
and, where it is known in closed form, ``jacobian()``.
"""

from ._game import ZooGame
from .dirac_gan import DiracGan, dirac_gan
from .ipd import IteratedPrisonersDilemma, ipd
from .matching_pennies import MatchingPennies, matching_pennies
from .quadratic import Bilinear, Mixed, bilinear, mixed
from .random_subspace_ipd import RandomSubspaceIpd, random_subspace_ipd
from .small_ipd import Mix, SmallIpd, mix, small_ipd

__all__ = [
    "Bilinear",
    "DiracGan",
    "IteratedPrisonersDilemma",
    "MatchingPennies",
    "Mix",
    "Mixed",
    "RandomSubspaceIpd",
    "SmallIpd",
    "ZooGame",
    "bilinear",
    "dirac_gan",
    "ipd",
    "matching_pennies",
    "mix",
    "mixed",
    "random_subspace_ipd",
    "small_ipd",
]
