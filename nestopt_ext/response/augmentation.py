"""Augmentations of images whose strengths are hyperparameters, other ones for each image.

Modules on batches [B, C, H, W] of floating point pixels, to be put together with ``nn.Sequential`` and called inside a
sample. Their arguments name hyperparameters of shape (); None leaves a part out. Random numbers are drawn for each
image, by torch's global generators, on the device of the images; nothing waits for it. No graph leads to the
hyperparameters. In eval mode each is the identity.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import _images
from ._sample import current_value


class _Augmentation(nn.Module):
    """Checks images, and reads strengths from the sample."""

    def forward(self, x: Tensor) -> Tensor:
        """Images of the shape and dtype of ``x`` [B, C, H, W]."""
        if not self.training:
            return x
        caller = type(self).__name__
        if x.dim() != 4:
            raise ValueError(f"{caller}: x must be images [B, C, H, W]; got shape {tuple(x.shape)}.")
        if not x.is_floating_point():
            raise TypeError(f"{caller}: x must be floating point; got {x.dtype}. Divide bytes by 255.")
        return self._augmented(x)

    def _augmented(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _strength(self, hparam: str | None, x: Tensor) -> Tensor:
        """The hyperparameter for each image, [B] in the dtype of ``x``; zeros without one."""
        if hparam is None:
            return x.new_zeros(len(x))
        caller = type(self).__name__
        value = current_value(hparam, caller)
        if value.dim() != 1 or len(value) not in (1, len(x)):
            found = tuple(value.shape)
            raise ValueError(f"{caller}: {hparam} must be one number for each of {len(x)} images; got shape {found}.")
        return value.detach().to(x.dtype).expand(len(x))


def _uniform(low: Tensor, high: Tensor) -> Tensor:
    """A draw between two numbers for each image."""
    return torch.lerp(low, high, torch.rand_like(low))


def _shift(strength: Tensor) -> Tensor:
    return _uniform(-strength, strength)


def _factor(strength: Tensor) -> Tensor:
    return _uniform((1 - strength).clamp(min=0), 1 + strength)


class InputScale(_Augmentation):
    """Multiplies each image by u ~ U[1 / (1 + s), 1 + s], s the hyperparameter ``scale``.

    Source: the code of MacKay et al., Self-Tuning Networks (ICLR 2019).
    """

    def __init__(self, scale: str) -> None:
        super().__init__()
        self.scale = scale

    def _augmented(self, x: Tensor) -> Tensor:
        most = 1 + self._strength(self.scale, x)
        return x * _images.per_image(_uniform(1 / most, most))

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.scale!r}"


class GaussianNoise(_Augmentation):
    """Adds N(0, std^2) to each pixel, in units of the pixels that it is given."""

    def __init__(self, std: str) -> None:
        super().__init__()
        self.std = std

    def _augmented(self, x: Tensor) -> Tensor:
        return x + _images.per_image(self._strength(self.std, x)) * torch.randn_like(x)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.std!r}"


class Cutout(_Augmentation):
    """Fills squares of ``length`` pixels, ``holes`` of them (one where it is None), with ``fill``.

    Centres are uniform over pixels and squares are cut at the border. ``length`` and ``holes`` are taken down to whole
    numbers: discrete hyperparameters. ``fill`` 0 is the mean of standardized pixels. An image that asks for more than
    ``max_holes``, the number that is drawn, becomes NaN.

    Source: DeVries & Taylor, Improved Regularization of CNNs with Cutout (2017). In their code a square of odd length
    is one pixel smaller.

    >>> from nestopt_ext.response import HyperParameters, StnModel
    >>> hparams = HyperParameters().add("length", 3, low=2, high=24, discrete=True)
    >>> model = StnModel(nn.Identity(), hparams, centred=True)
    >>> with model.at_centre():
    ...     x = Cutout("length")(torch.ones(100, 1, 9, 9))
    >>> int((x == 0).sum((1, 2, 3)).max())                                   # where no border cuts it
    9
    """

    def __init__(self, length: str, holes: str | None = None, *, max_holes: int = 8, fill: float = 0.0) -> None:
        super().__init__()
        if max_holes < 1:
            raise ValueError(f"Cutout: max_holes must be at least 1; got {max_holes}.")
        self.length = length
        self.holes = holes
        self.max_holes = 1 if holes is None else max_holes
        self.fill = fill

    def _augmented(self, x: Tensor) -> Tensor:
        length = self._strength(self.length, x)
        holes = torch.ones_like(length) if self.holes is None else self._strength(self.holes, x)
        batch, _, height, width = x.shape
        rows = torch.randint(height, (batch, self.max_holes), device=x.device)
        columns = torch.randint(width, (batch, self.max_holes), device=x.device)
        return _images.cutout(x, rows, columns, length, holes.floor(), self.fill)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.length!r}, {self.holes!r}, max_holes={self.max_holes}, fill={self.fill}"


class ColorJitter(_Augmentation):
    """Changes brightness, contrast, saturation and hue, each by a factor or shift of its own for each image.

    The first three are factors u ~ U[max(0, 1 - s), 1 + s] of the hyperparameter s; the hue turns by u ~ U[-s, s],
    s <= 1/2. They are applied in a random order, drawn once for the batch, each within [0, 1], as torchvision defines
    them on tensors. ``x`` has 3 channels, or 1, of which saturation and hue leave it as it is.

    ``mean`` and ``std``, numbers or one for each channel, say how pixels were standardized from [0, 1]: the jitter
    undoes it before and does it again after. Without them pixels must lie in [0, 1]: others are cut off. (0.5, 0.5)
    serves for pixels in [-1, 1].

    Source: torchvision.transforms.ColorJitter, whose factors are one for all images of a batch.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        brightness: str | None = None,
        contrast: str | None = None,
        saturation: str | None = None,
        hue: str | None = None,
        *,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
    ) -> None:
        super().__init__()
        self.brightness = brightness
        self.contrast = contrast
        self.saturation = saturation
        self.hue = hue
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.float32).reshape(-1, 1, 1), persistent=False)
        if not (self.std > 0).all():
            raise ValueError(f"ColorJitter: std must be positive; got {std}.")

    def _augmented(self, x: Tensor) -> Tensor:
        if x.shape[1] not in (1, 3):
            raise ValueError(f"ColorJitter: x must have 1 or 3 channels; got shape {tuple(x.shape)}.")
        if not {len(self.mean), len(self.std)} <= {1, x.shape[1]}:
            raise ValueError(
                f"ColorJitter: mean and std must have a number for each channel of x, or one; got {len(self.mean)} and"
                f" {len(self.std)} for {x.shape[1]}."
            )
        steps = [
            (_images.adjust_brightness, self.brightness, _factor),
            (_images.adjust_contrast, self.contrast, _factor),
            (_images.adjust_saturation, self.saturation, _factor),
            (_images.adjust_hue, self.hue, _shift),
        ]
        mean, std = self.mean.to(x), self.std.to(x)
        y = x * std + mean
        for i in torch.randperm(len(steps)).tolist():
            adjust, hparam, drawn = steps[i]
            if hparam is not None:
                y = adjust(y, drawn(self._strength(hparam, x)))
        return (y - mean) / std

    def extra_repr(self) -> str:
        """The arguments."""
        names = ("brightness", "contrast", "saturation", "hue")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names if getattr(self, name) is not None)


class Affine(_Augmentation):
    """Turns, moves, scales and shears each image about its centre; what comes from outside is ``fill``.

    The angle is U[-degrees, degrees]; the move U[-translate, translate] of the width and of the height; the scale
    U[1 - scale, 1 + scale]; the shear along x U[-shear, shear], in degrees. ``mode``: "bilinear" or "nearest".
    ``fill``: a number, or one for each channel, in units of the pixels; 0 is the mean of standardized pixels, and
    ``-mean / std`` the black of pixels that were standardized from [0, 1]. At a border, bilinear interpolation is
    between the image and ``fill``.

    Raises ValueError for another ``mode``, and where ``fill`` does not fit the channels of the images.

    Source: torchvision.transforms.RandomAffine, which moves by whole pixels, and takes the nearest by default; tuned in
    the code of Bae & Grosse, Delta-STN (NeurIPS 2020).

    >>> from nestopt_ext.response import HyperParameters, StnModel
    >>> model = StnModel(nn.Identity(), HyperParameters().add("move", 1.0, low=0.0, high=9.0), centred=True)
    >>> with model.at(torch.full((1000, 1), 9.0)):                           # moves of up to 9 widths, most of them > 1
    ...     x = Affine(translate="move", fill=0.5)(torch.ones(1000, 1, 2, 2))
    >>> x.min().item(), x.max().item(), x.mean().item() < 0.6
    (0.5, 1.0, True)
    """

    fill: Tensor

    def __init__(
        self,
        degrees: str | None = None,
        translate: str | None = None,
        scale: str | None = None,
        shear: str | None = None,
        *,
        mode: str = "bilinear",
        fill: float | Sequence[float] = 0.0,
    ) -> None:
        super().__init__()
        if mode not in ("bilinear", "nearest"):
            raise ValueError(f"Affine: mode must be 'bilinear' or 'nearest'; got {mode!r}.")
        self.degrees = degrees
        self.translate = translate
        self.scale = scale
        self.shear = shear
        self.mode = mode
        self.register_buffer("fill", torch.as_tensor(fill, dtype=torch.float32).reshape(-1, 1, 1), persistent=False)
        self._filled = bool((self.fill != 0).any())

    def _augmented(self, x: Tensor) -> Tensor:
        if len(self.fill) not in (1, x.shape[1]):
            raise ValueError(
                f"Affine: fill must be a number for each channel of x, or one; got {len(self.fill)} for {x.shape[1]}."
            )
        angle, move_x, move_y, growth, shear = (
            _shift(self._strength(hparam, x))
            for hparam in (self.degrees, self.translate, self.translate, self.scale, self.shear)
        )
        moves = torch.stack([move_x, move_y], 1)
        return _images.affine(x, angle, moves, 1 + growth, shear, self.mode, self.fill.to(x) if self._filled else None)

    def extra_repr(self) -> str:
        """The arguments."""
        names = ("degrees", "translate", "scale", "shear")
        given = ", ".join(f"{name}={getattr(self, name)!r}" for name in names if getattr(self, name) is not None)
        fill = f", fill={self.fill.flatten().tolist()}" if self._filled else ""
        return f"{given}, mode={self.mode!r}{fill}"
