"""How well generated points cover the modes of a mixture."""

from typing import NamedTuple

import torch
from torch import Tensor

from .mixture_gan import Ring


class Coverage(NamedTuple):
    """Scores of sets of points; each tensor has an entry for each set.

    modes: modes within 3 std of which at least the required share of the points lies. quality: share of the points
    within 3 std of a mode. js: Jensen-Shannon divergence in bits, from 0 to 1, between the share of points at each mode
    with the rest as one more class, and equal shares of all modes.
    """

    modes: Tensor
    quality: Tensor
    js: Tensor


def coverage(points: Tensor, ring: Ring, mode_share: float) -> Coverage:
    """Scores of points [..., N, 2]; a set with a point that is not finite has no mode, quality 0 and divergence 1.

    >>> ring = Ring(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), std=0.1)
    >>> points = torch.tensor([[0.0, 0.29], [0.0, 0.0], [0.1, 0.1], [0.5, 0.0]])    # three at the first mode, one lost
    >>> scores = coverage(points, ring, mode_share=0.1)
    >>> int(scores.modes), float(scores.quality)
    (1, 0.75)
    >>> at_one = coverage(torch.zeros(4, 2), ring, mode_share=0.1)      # (log2(4/3) + log2(2/3) / 2 + 1/2) / 2
    >>> round(float(at_one.js), 4)
    0.3113
    """
    finite = points.isfinite().all(-1).all(-1)
    apart = points.double()[..., None, :] - ring.means.double()
    distance, nearest = apart.nan_to_num().norm(dim=-1).min(-1)
    num_modes = len(ring.means)
    close = (distance <= 3 * ring.std) & finite[..., None]
    shares = torch.stack([(close & (nearest == mode)).double().mean(-1) for mode in range(num_modes)], -1)
    lost = 1 - shares.sum(-1, keepdim=True)
    found = torch.cat([shares, lost.clamp_min(0)], -1)
    wanted = torch.cat([torch.full_like(shares, 1 / num_modes), torch.zeros_like(lost)], -1)
    return Coverage((shares >= mode_share).sum(-1), close.double().mean(-1), _js(found, wanted))


def _js(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence in bits of distributions along the last dimension."""
    middle = (p + q) / 2
    return (_kl(p, middle) + _kl(q, middle)) / 2


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1) / torch.log(torch.tensor(2.0, dtype=p.dtype))
