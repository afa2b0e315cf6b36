r"""A constructed set of pictures that each of three features classifies alone, and sets in which some of them lie.

A picture has three colour channels of 8 x 8 pixels, each with one of two shapes: stripes across or upright in red, a
plus or a cross in green, a disc or a pair of bars in blue. In training the class decides all three. A shape is drawn
light on dark or dark on light, by chance, so that the mean picture of both classes is the same grey: no pixel says
anything, only products of two do. The shapes differ in contrast, red most.

Channel f of picture n is :math:`c_f \, s_f (T_f(y) + \text{noise})`, with templates T of mean 0 and norm 1, contrast
c and sign s. Every drawn picture enters in all eight combinations of signs, so that statements about expectations hold
for the set itself.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIDE = 8
FEATURES = ("red", "green", "blue")
#: Contrast of each channel, and the standard deviation of the noise in a pixel of contrast 1.
CONTRASTS = (4.0, 3.6, 3.5)
NOISE = 0.06
_SIGNS = len(FEATURES)


@dataclass(frozen=True)
class Pictures:
    """Pictures ``x`` [N, 192], channel by channel, of classes ``y`` [N], 0 or 1."""

    x: Tensor
    y: Tensor


def templates() -> Tensor:
    """The shapes of class 0 and 1 in each channel, [3, 2, 8, 8], of mean 0 and norm 1."""
    place = torch.arange(SIDE, dtype=torch.float64) - (SIDE - 1) / 2
    down, across = torch.meshgrid(place, place, indexing="ij")
    stripes = (torch.arange(SIDE) // 2 % 2).double().expand(SIDE, SIDE)
    pairs = (
        (stripes.T, stripes),
        ((down.abs() < 1) | (across.abs() < 1), ((down - across).abs() < 1.5) | ((down + across).abs() < 1.5)),
        (down.square() + across.square() < 9, across.abs() > 2),
    )
    shapes = torch.stack([torch.stack([shape.double() for shape in pair]) for pair in pairs])
    shapes = shapes - shapes.mean((2, 3), keepdim=True)
    normalized: Tensor = shapes / shapes.flatten(2).norm(dim=2)[..., None, None]
    return normalized


def pictures(count: int, seed: int, *, telling: Sequence[str] = FEATURES) -> Pictures:
    """``count`` pictures, a multiple of 16, half of them of each class; float64.

    The features ``telling`` show the class; each other one shows a class of its own, drawn for every picture.
    """
    random = torch.Generator().manual_seed(seed)
    drawn = count // 2**_SIGNS
    y = torch.arange(drawn) % 2
    channels = []
    for feature, contrast, shapes in zip(FEATURES, CONTRASTS, templates(), strict=True):
        chance = torch.randint(2, (drawn,), generator=random)
        noise = NOISE * torch.randn(drawn, SIDE, SIDE, dtype=torch.float64, generator=random)
        channels.append(contrast * (shapes[y if feature in telling else chance] + noise))
    signs = torch.tensor([*itertools.product((1.0, -1.0), repeat=_SIGNS)], dtype=torch.float64)
    x = signs[:, None, :, None, None] * torch.stack(channels, 1)  # [8, drawn, 3, 8, 8]
    return Pictures(x.flatten(2).flatten(0, 1), y.repeat(len(signs)))
