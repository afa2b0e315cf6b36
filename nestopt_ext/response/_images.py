"""Transforms of image batches [B, C, H, W] with explicit numbers for each image. Each returns a new tensor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_GRAY = (0.2989, 0.587, 0.114)  # ITU-R 601-2, as torchvision rounds it


def per_image(numbers: Tensor) -> Tensor:
    """[B] as [B, 1, 1, 1]."""
    return numbers.reshape(-1, 1, 1, 1)


def gray(x: Tensor) -> Tensor:
    """Luma of RGB images, [B, 1, H, W]; images of one channel as they are."""
    if x.shape[1] == 1:
        return x
    return sum(weight * x[:, i : i + 1] for i, weight in enumerate(_GRAY))  # type: ignore[return-value]


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply by ``factor``, within [0, 1]."""
    return (per_image(factor) * x).clamp(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """From the mean luma (factor 0) over x (1) and beyond, within [0, 1]."""
    mean = gray(x).mean((1, 2, 3), keepdim=True)
    return _blend(x, mean, factor)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """From the gray image (factor 0) over x (1) and beyond, within [0, 1]; images of one channel as they are."""
    return x if x.shape[1] == 1 else _blend(x, gray(x), factor)


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue of HSV by ``shift`` turns; images of one channel as they are."""
    if x.shape[1] == 1:
        return x
    r, g, b = x.unbind(1)
    value, chroma = x.amax(1), x.amax(1) - x.amin(1)
    safe = chroma.where(chroma > 0, 1)
    sextant = torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    sextant = torch.where(value == r, (g - b) / safe, sextant) + 6 * shift.reshape(-1, 1, 1)
    channels = []
    for offset in (5, 3, 1):  # r, g, b: each is the value less a piecewise linear part of the chroma
        k = (offset + sextant).remainder(6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, 1).clamp(0, 1)


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(other, x, per_image(factor)).clamp(0, 1)


def cutout(x: Tensor, rows: Tensor, columns: Tensor, length: Tensor, holes: Tensor, fill: float = 0.0) -> Tensor:
    """Fills the first ``holes`` [B] of K squares of ``length`` [B] pixels, cut at the border.

    ``rows`` and ``columns`` [B, K] are their centres; a square of an even length begins length / 2 before its centre.
    An image of more than K holes, or of a NaN, is NaN.
    """
    height, width = x.shape[2:]
    length = length.floor()
    used = torch.arange(rows.shape[1], device=x.device) < holes.unsqueeze(1)
    mask_rows = _within(height, rows, length) & used.unsqueeze(2)  # [B, K, H]
    mask_columns = _within(width, columns, length)  # [B, K, W]
    covered = torch.bmm(mask_rows.to(x.dtype).transpose(1, 2), mask_columns.to(x.dtype)) > 0.5
    fills = torch.where(holes > rows.shape[1], torch.nan, 0 * (length + holes))  # NaN stays NaN
    return x.masked_fill(covered.unsqueeze(1), fill) + per_image(fills).to(x.dtype)


def _within(size: int, centres: Tensor, length: Tensor) -> Tensor:
    """Which of ``size`` pixels the interval of each centre [B, K] covers, [B, K, size]."""
    length = length.reshape(-1, 1, 1)
    past = torch.arange(size, device=centres.device) - centres.unsqueeze(2) + (length / 2).floor()
    return (past >= 0) & (past < length)


def affine(
    x: Tensor, angle: Tensor, translate: Tensor, scale: Tensor, shear: Tensor, mode: str, fill: Tensor | None
) -> Tensor:
    """Shears, scales, turns about the centre and then moves each image; the rest is ``fill``, [C or 1, 1, 1] or 0.

    ``angle`` [B] in degrees, clockwise; ``translate`` [B, 2] in widths and heights; ``scale`` [B]; ``shear`` [B] in
    degrees along x. A point at p from the centre goes to translate + scale R(angle) [[1, -tan(shear)], [0, 1]] p.
    """
    height, width = x.shape[2:]
    turn, tangent = angle.deg2rad(), shear.deg2rad().tan()
    cos, sin = turn.cos() / scale, turn.sin() / scale
    # The inverse, shear^-1 R^T / scale, from output to input, in half widths and half heights from the centre.
    ratio = height / width
    entries = [cos - tangent * sin, ratio * (sin + tangent * cos), -sin / ratio, cos]
    linear = torch.stack(entries, 1).reshape(-1, 2, 2)
    offset = -2 * (linear * translate.unsqueeze(1)).sum(2, keepdim=True)
    theta = torch.cat([linear, offset], 2).to(x.dtype)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)

    def moved_with_zeros(image: Tensor) -> Tensor:
        return F.grid_sample(image, grid, mode=mode, padding_mode="zeros", align_corners=False)

    moved = moved_with_zeros(x)
    if fill is not None:  # added outside; taken off before and put back after, it would round what is inside
        moved = moved + (1 - moved_with_zeros(torch.ones_like(x[:, :1]))) * fill
    return moved + per_image(0 * theta.sum((1, 2)))  # a NaN in the grid would be taken for a place outside
