"""The hyperparameters of each network: where they start, their range, and where searches look for them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ...response import HyperParameters
from .models import START_RATE

EXTRAS = ("weight-decay", "label-smoothing")


@dataclass(frozen=True)
class Dimension:
    """One hyperparameter: it starts at ``start`` within the open range ``low`` to ``high``.

    ``search`` is the closed range that searches draw from, evenly in the logarithm where ``log``; whole numbers where
    ``discrete``.
    """

    name: str
    start: float
    low: float
    high: float
    search: tuple[float, float]
    discrete: bool = False
    log: bool = False

    def grid(self, count: int) -> list[float]:
        """``count`` values over the search range, both ends among them; fewer where there are not as many.

        >>> Dimension("holes", 1, 0, 5, (0, 4), discrete=True).grid(3)
        [0.0, 2.0, 4.0]
        """
        low, high = (math.log(end) for end in self.search) if self.log else self.search
        values = torch.linspace(low, high, count, dtype=torch.float64)
        values = values.exp() if self.log else values.round() if self.discrete else values
        return sorted(set(values.clamp(*self.search).tolist()))  # a logarithm that is undone may be beyond an end


def rates(names: Iterable[str], start: float = START_RATE) -> list[Dimension]:
    """Dropout rates; searches stay below 0.75, since hardly anything is learned above."""
    return [Dimension(name, start, 0.0, 0.95, (0.0, 0.75)) for name in names]


def cutout(rows: int) -> list[Dimension]:
    """Side and number of the squares that are cut out: up to 24 of 32 rows, and less of smaller pictures."""
    longest = max(4, min(24, 3 * rows // 4 if rows < 24 else 24))
    start = min(4, longest // 2)
    return [
        Dimension("cutout_length", start, min(2, start - 1), longest, (min(2, start - 1), longest - 1), discrete=True),
        Dimension("cutout_holes", 1, 0, 5, (0, 4), discrete=True),
    ]


def colours() -> list[Dimension]:
    """Strengths of the colour jitter."""
    jitter = [Dimension(name, 0.05, 0.0, 1.0, (0.0, 0.8)) for name in ("brightness", "contrast", "saturation")]
    return [*jitter, Dimension("hue", 0.05, 0.0, 0.5, (0.0, 0.4))]


def affine() -> list[Dimension]:
    """Strengths of random affine maps; angles in degrees, the others as shares."""
    angles = [Dimension(name, 5.0, 0.0, 45.0, (0.0, 40.0)) for name in ("degrees", "shear")]
    return [*angles, *(Dimension(name, 0.05, 0.0, 0.5, (0.0, 0.45)) for name in ("translate", "scale"))]


def activation() -> list[Dimension]:
    """Strengths of activation regularization and of its temporal form."""
    return [Dimension(name, 0.05, 0.0, math.inf, (0.0, 4.0)) for name in ("alpha", "beta")]


def extra(name: str) -> Dimension:
    """One of `EXTRAS`."""
    if name == "weight-decay":
        return Dimension("weight_decay", 1e-5, 0.0, math.inf, (1e-7, 1e-2), log=True)
    return Dimension("label_smoothing", 0.05, 0.0, 0.5, (0.0, 0.4))


def hyper_parameters(space: Iterable[Dimension], scale: float, device: torch.device) -> HyperParameters:
    """The space as `HyperParameters` at their start, perturbed by ``scale`` in unconstrained units."""
    hparams = HyperParameters(device=device)
    for d in space:
        transform = "exp" if d.log else None
        start = int(d.start) if d.discrete else d.start
        hparams.add(d.name, start, low=d.low, high=d.high, transform=transform, discrete=d.discrete, scale=scale)
    return hparams


def inside(space: Iterable[Dimension], values: dict[str, float]) -> dict[str, float]:
    """The values, moved off the ends of open ranges by a thousandth of the search range."""
    moved = {}
    for d in space:
        margin = 0.0 if d.discrete or d.log else 1e-3 * (d.search[1] - d.search[0])
        moved[d.name] = min(max(values[d.name], d.low + margin), d.high - margin)
    return moved
