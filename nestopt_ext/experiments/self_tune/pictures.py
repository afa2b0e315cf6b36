"""The problem on pictures: one of the classifiers, dropouts, and for the larger ones learned augmentation."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...response import Affine, ColorJitter, Cutout, HyperParameters, StnModel, to_delta_stn, to_stn
from .. import data
from ..data import Part, Split
from . import models, space
from .batches import Shuffled
from .config import SelfTuneConfig
from .problem import SelfTuningProblem
from .space import Dimension

#: Examples per forward pass where no gradient is asked for.
_EVALUATION_BATCH = 2048
#: Squares that are drawn for a cutout: its hyperparameter stays below 5.
_MOST_HOLES = 4
#: Share of the published training part that is for validation.
_VALID_SHARE = {"mnist": 0.15, "fashion-mnist": 0.15, "cifar10": 0.2}


class PictureProblem(SelfTuningProblem):
    """Pixels from 0 to 1, as augmentation needs them; the network itself standardizes them.

    ======================  ===========================================================================
    network                 hyperparameters, beside a dropout rate for each place of the network
    ======================  ===========================================================================
    mlp                     none: 3 in all
    simple-cnn              length and number of cutouts: 6 in all
    alexnet, vgg16          the same, 4 of colour jitter (where there are colours), 4 of affine maps: 18 in all
    resnet18                likewise, 15 in all
    ======================  ===========================================================================
    """

    def __init__(self, config: SelfTuneConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        dataset = data.load(config.data, Path(config.data_dir) if config.data_dir else None)
        available = len(dataset.labels)
        valid_size = config.valid_size or round(_VALID_SHARE.get(config.data, 0.15) * available)
        split = data.make_split(dataset, config.train_size or available - valid_size, valid_size, 0.0, config.seed)
        self.split = _unscaled(split, dataset.peak).to(device)
        #: Mean and deviation of the training part's pixels.
        self.shift, self.deviation = split.shift / dataset.peak, split.scale / dataset.peak
        self.plain = models.build(
            config.model or "",
            self.shape,
            len(split.classes),
            config.width or 0,
            shift=self.shift,
            scale=self.deviation,
            seed=config.seed,
        )
        rates = space.rates(models.dropouts(self.plain), config.start_rate)
        self.space = [*rates, *self._augmentations(), *self.extras()]
        self.augment = self._augment()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of a picture."""
        channels, rows, columns = self.split.train.x.shape[1:]
        return channels, rows, columns

    def network(self, hparams: HyperParameters, *, centred: bool) -> StnModel:
        """The network with response layers; see `SelfTuningProblem`."""
        convert = to_delta_stn if centred else to_stn
        return convert(self.plain, hparams, dropout={name: name for name in models.dropouts(self.plain)})

    def train_batches(self) -> Shuffled:
        """The training part in an order that the seed gives; see `SelfTuningProblem`."""
        return Shuffled(self.split.train, self.config.batch_size or 0, 2 * self.config.seed)

    def valid_batches(self) -> Shuffled:
        """The validation part, likewise."""
        return Shuffled(self.split.valid, self.config.batch_size or 0, 2 * self.config.seed + 1)

    def forward(self, model: Callable[..., Any], batch: Any, carry: Any) -> tuple[Tensor, Tensor, Any]:
        """Logits [B, classes] and labels [B]; see `SelfTuningProblem`."""
        x, y = batch
        return model(x), y, None

    def scores(self, answer: Callable[..., Any]) -> dict[str, float]:
        """Cross-entropy and share of right answers; see `SelfTuningProblem`."""
        found = {}
        for name, part in (("valid", self.split.valid), ("test", self.split.test)):
            found[f"{name}_loss"], found[f"{name}_accuracy"] = _score(answer, part)
        return found

    def fingerprint(self) -> int:
        """A check sum of all parts."""
        total = 0
        for part in (self.split.train, self.split.valid, self.split.test):
            for tensor in (part.x, part.y):
                total = zlib.crc32(tensor.cpu().numpy().tobytes(), total)
        return total

    def _augmentations(self) -> Sequence[Dimension]:
        channels, rows, _ = self.shape
        if self.config.model == "mlp":
            return []
        if self.config.model == "simple-cnn":
            return space.cutout(rows)
        return [*space.cutout(rows), *(space.colours() if channels == 3 else []), *space.affine()]

    def _augment(self) -> nn.Module | None:
        names = {dimension.name for dimension in self.space}
        steps: list[nn.Module] = []
        if "hue" in names:
            steps.append(ColorJitter("brightness", "contrast", "saturation", "hue"))
        if "degrees" in names:
            steps.append(Affine("degrees", "translate", "scale", "shear"))
        if "cutout_length" in names:
            steps.append(Cutout("cutout_length", "cutout_holes", max_holes=_MOST_HOLES, fill=self.shift))
        return nn.Sequential(*steps) if steps else None


def _unscaled(split: Split, peak: int) -> Split:
    """The split with pixels from 0 to 1."""
    parts = (split.train, split.valid, split.test)
    train, valid, test = (Part((part.x * split.scale + split.shift) / peak, part.y) for part in parts)
    return replace(split, train=train, valid=valid, test=test, shift=0.0, scale=float(peak))


def _score(answer: Callable[..., Any], part: Part) -> tuple[float, float]:
    loss, right = 0.0, 0
    for start in range(0, len(part), _EVALUATION_BATCH):
        y = part.y[start : start + _EVALUATION_BATCH]
        outputs = answer(part.x[start : start + _EVALUATION_BATCH])
        loss += float(nn.functional.cross_entropy(outputs, y, reduction="sum"))
        right += int((outputs.argmax(1) == y).sum())
    return loss / len(part), right / len(part)
