"""The networks whose training is tuned."""

import torch
from torch import nn


def build_model(name: str, shape: tuple[int, int, int], classes: int, width: int, seed: int) -> nn.Module:
    """Makes ``linear``, ``mlp`` (one hidden layer) or ``cnn`` (two convolutions), equal for equal seeds.

    ``shape`` is channels, height, width of a picture; ``width`` is hidden units, or channels of the first convolution.
    The global random state is left as it was. Raises ValueError for another name.

    >>> sum(p.numel() for p in build_model("linear", (1, 8, 8), 10, 1, seed=0).parameters())
    650
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _layers(name, shape, classes, width)


def _layers(name: str, shape: tuple[int, int, int], classes: int, width: int) -> nn.Module:
    channels, rows, columns = shape
    pixels = channels * rows * columns
    if name == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes))
    if name == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, classes))
    if name == "cnn":
        return nn.Sequential(
            nn.Conv2d(channels, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width * _halved_twice(rows) * _halved_twice(columns), classes),
        )
    raise ValueError(f"build_model: name must be linear, mlp or cnn; got {name!r}.")


def _halved_twice(size: int) -> int:
    return ((size + 1) // 2 + 1) // 2
