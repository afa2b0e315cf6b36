"""The data sets of the experiments, and seeded splits of them.

===============  =================================================================================================
``digits``       "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, UCI Machine Learning
                 Repository, CC BY 4.0; 1797 pictures of 8x8, embedded in scikit-learn
``mnist``        Y. LeCun, C. Cortes, C. J. C. Burges; commonly passed on under CC BY-SA 3.0
``fashion-mnist``  H. Xiao, K. Rasul, R. Vollgraf, Zalando SE; MIT
``cifar10``      A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009; no licence stated
===============  =================================================================================================

The last three are read from files that the caller has; nothing is ever downloaded.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import formats
from .formats import Labels, Pixels

NAMES = ("digits", "mnist", "fashion-mnist", "cifar10")
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FASHION_CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
_DIGITS = tuple("0123456789")

_HOMES = {
    "mnist": "the four idx files (train-images-idx3-ubyte.gz, ...) are at the authors' page, yann.lecun.com/exdb/mnist",
    "fashion-mnist": "the four idx files (train-images-idx3-ubyte.gz, ...) are in the authors' repository,"
    " github.com/zalandoresearch/fashion-mnist, data/fashion",
    "cifar10": "cifar-10-python.tar.gz and cifar-10-binary.tar.gz are at the author's page,"
    " www.cs.toronto.edu/~kriz/cifar.html",
}


class DataError(ValueError):
    """The data cannot be had or does not allow the split; the message is one line and says what to do."""


@dataclass(frozen=True)
class Dataset:
    """Pictures and labels as published.

    ``images`` is uint8 [N, channels, height, width] with values 0..``peak``; ``test_images`` and ``test_labels`` are
    None where the publication has no test part of its own.
    """

    name: str
    classes: tuple[str, ...]
    peak: int
    images: Pixels
    labels: Labels
    test_images: Pixels | None = None
    test_labels: Labels | None = None


@dataclass(frozen=True)
class Part:
    """One part of a split: ``x`` float32 [N, channels, height, width], ``y`` int64 [N]."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def to(self, device: torch.device) -> "Part":
        """The same part on ``device``."""
        return Part(self.x.to(device), self.y.to(device))


@dataclass(frozen=True)
class Split:
    """Training, validation and test parts that share no example; pixels are standardized by the training part.

    ``flipped`` is a bool tensor [N]: which training labels were replaced by a wrong one. Validation and test labels are
    never touched. ``true_y`` keeps the training labels as published, and ``peak`` and ``shift`` undo the scaling for
    pictures: ``pixel = x * scale + shift``.
    """

    train: Part
    valid: Part
    test: Part
    flipped: Tensor
    true_y: Tensor
    classes: tuple[str, ...]
    shift: float = field(default=0.0)
    scale: float = field(default=1.0)

    def to(self, device: torch.device) -> "Split":
        """The same split on ``device``; the bookkeeping of labels stays on the CPU."""
        return Split(
            self.train.to(device),
            self.valid.to(device),
            self.test.to(device),
            self.flipped,
            self.true_y,
            self.classes,
            self.shift,
            self.scale,
        )


def load(name: str, data_dir: Path | None = None) -> Dataset:
    """Reads the data set ``name`` (one of `NAMES`), from files in ``data_dir`` unless it is embedded.

    Raises DataError when ``data_dir`` is missing or does not hold the files, and FormatError when a file is damaged.
    """
    if name == "digits":
        return _digits()
    if name not in NAMES:
        raise DataError(f"data must be one of {', '.join(NAMES)}; got {name!r}.")
    if data_dir is None:
        raise DataError(f"data {name} needs --data-dir, the folder with its files; {_HOMES[name]}.")
    if not data_dir.is_dir():
        raise DataError(f"--data-dir {data_dir} is not a folder; {_HOMES[name]}.")
    return _cifar10(data_dir) if name == "cifar10" else _idx_set(name, data_dir)


def make_split(dataset: Dataset, train_size: int, valid_size: int, label_noise: float, seed: int) -> Split:
    """Draws disjoint training and validation parts; the test part is the published one, or else all the rest.

    ``label_noise`` is the share of training labels, rounded to whole examples, each replaced by a wrong label drawn
    uniformly. Equal arguments give an equal split. Raises DataError when there are too few examples.
    """
    available = len(dataset.labels)
    test_from_rest = dataset.test_images is None
    if train_size + valid_size + test_from_rest > available:
        raise DataError(
            f"train size {train_size} and valid size {valid_size} must fit into the {available} examples of"
            f" {dataset.name}{' and leave some to test on' if test_from_rest else ''}."
            " Lower --train-size or --valid-size."
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(available, generator=generator).numpy()
    train, valid, rest = (
        order[:train_size],
        order[train_size : train_size + valid_size],
        order[train_size + valid_size :],
    )
    pixels = torch.from_numpy(dataset.images[train].astype(np.float32))
    shift, scale = float(pixels.mean()), max(float(pixels.std()), 1e-6)

    def part(images: Pixels, labels: Labels) -> Part:
        x = (torch.from_numpy(images.astype(np.float32)) - shift) / scale
        return Part(x, torch.from_numpy(labels.astype(np.int64)))

    train_part = part(dataset.images[train], dataset.labels[train])
    noisy, flipped = flip_labels(train_part.y, label_noise, len(dataset.classes), generator)
    if dataset.test_images is None or dataset.test_labels is None:
        test_part = part(dataset.images[rest], dataset.labels[rest])
    else:
        test_part = part(dataset.test_images, dataset.test_labels)
    return Split(
        train=Part(train_part.x, noisy),
        valid=part(dataset.images[valid], dataset.labels[valid]),
        test=test_part,
        flipped=flipped,
        true_y=train_part.y,
        classes=dataset.classes,
        shift=shift,
        scale=scale,
    )


def flip_labels(labels: Tensor, rate: float, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Replaces ``round(rate * N)`` labels by a wrong one drawn uniformly; returns new labels and a bool mask, both [N].

    >>> labels, flipped = flip_labels(torch.zeros(10, dtype=torch.int64), 0.4, 10, torch.Generator().manual_seed(0))
    >>> int(flipped.sum()), bool((labels[flipped] != 0).all()), bool((labels[~flipped] == 0).all())
    (4, True, True)
    """
    chosen = torch.randperm(len(labels), generator=generator)[: round(rate * len(labels))]
    noisy = labels.clone()
    noisy[chosen] = (labels[chosen] + torch.randint(1, classes, (len(chosen),), generator=generator)) % classes
    flipped = torch.zeros(len(labels), dtype=torch.bool)
    flipped[chosen] = True
    return noisy, flipped


def _digits() -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("data digits needs scikit-learn. Install it: pip install nestopt_ext[experiments]") from error
    bunch = load_digits()
    images = bunch.images.astype(np.uint8)[:, None]
    return Dataset("digits", _DIGITS, 16, images, bunch.target.astype(np.int64))


def _idx_set(name: str, data_dir: Path) -> Dataset:
    """Looks for the four files in the folder itself and where torchvision keeps them."""
    places = [data_dir, data_dir / "raw", data_dir / "MNIST" / "raw", data_dir / "FashionMNIST" / "raw"]

    def find(stem: str, dims: int) -> Path:
        names = [f"{stem}-idx{dims}-ubyte.gz", f"{stem}-idx{dims}-ubyte", f"{stem}.idx{dims}-ubyte"]
        for place in places:
            for file in names:
                if (place / file).is_file():
                    return place / file
        raise DataError(f"{data_dir} has no {names[0]} (nor without .gz); {_HOMES[name]}.")

    paths = [
        find(stem, dims)
        for stem, dims in (("train-images", 3), ("train-labels", 1), ("t10k-images", 3), ("t10k-labels", 1))
    ]
    images, labels = formats.read_idx_pair(paths[0], paths[1], 10)
    test_images, test_labels = formats.read_idx_pair(paths[2], paths[3], 10)
    if images.shape[1:] != test_images.shape[1:]:
        got = "x".join(str(s) for s in test_images.shape[2:])
        raise formats.FormatError(f"{paths[2]}: pictures must have the size of {paths[0].name}; got {got}.")
    classes = _DIGITS if name == "mnist" else FASHION_CLASSES
    return Dataset(name, classes, 255, images, labels, test_images, test_labels)


def _cifar10(data_dir: Path) -> Dataset:
    for read in (_cifar10_batches, _cifar10_archive, _cifar10_class_folders):
        parts = read(data_dir)
        if parts is not None:
            (images, labels), (test_images, test_labels) = parts
            return Dataset("cifar10", CIFAR10_CLASSES, 255, images, labels, test_images, test_labels)
    raise DataError(
        f"{data_dir} has no CIFAR-10: neither batches, nor a published archive, nor archives *train*.tar.* and"
        f" *test*.tar.* of class folders; {_HOMES['cifar10']}."
    )


_Parts = tuple[tuple[Pixels, Labels], tuple[Pixels, Labels]]
_TRAIN_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))


def _cifar10_batches(data_dir: Path) -> _Parts | None:
    readers: tuple[tuple[str, str, Callable[[Path], tuple[Pixels, Labels]]], ...] = (
        ("cifar-10-batches-py", "", formats.read_cifar_python),
        ("cifar-10-batches-bin", ".bin", formats.read_cifar_binary),
    )
    for folder, suffix, read in readers:
        for place in (data_dir, data_dir / folder):
            if not (place / f"{_TRAIN_BATCHES[0]}{suffix}").is_file():
                continue
            paths = [place / f"{name}{suffix}" for name in (*_TRAIN_BATCHES, "test_batch")]
            missing = [path.name for path in paths if not path.is_file()]
            if missing:
                raise DataError(f"{place} has no {missing[0]}; {_HOMES['cifar10']}.")
            return formats.join([read(path) for path in paths[:-1]]), read(paths[-1])
    return None


def _cifar10_archive(data_dir: Path) -> _Parts | None:
    for file, suffix in (("cifar-10-python.tar.gz", ""), ("cifar-10-binary.tar.gz", ".bin")):
        path = data_dir / file
        if path.is_file():
            train = formats.read_tar_batches(path, [f"{name}{suffix}" for name in _TRAIN_BATCHES])
            return train, formats.read_tar_batches(path, [f"test_batch{suffix}"])
    return None


def _cifar10_class_folders(data_dir: Path) -> _Parts | None:
    train, test = sorted(data_dir.glob("*train*.tar*")), sorted(data_dir.glob("*test*.tar*"))
    if not train or not test:
        return None
    try:
        return formats.read_class_folders(train[0], CIFAR10_CLASSES), formats.read_class_folders(
            test[0], CIFAR10_CLASSES
        )
    except ModuleNotFoundError as error:
        raise DataError(
            f"{train[0].name} needs Pillow to be read. Install it: pip install nestopt_ext[experiments]"
        ) from error
