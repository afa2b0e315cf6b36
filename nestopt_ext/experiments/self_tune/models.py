"""The networks whose hyperparameters are tuned: plain torch modules, each tunable place an ``nn.Dropout`` with a name.

Pictures [B, channels, rows, columns] go in as they are; a network that halves them more often than their size allows
leaves out the last poolings. `width` scales a network: hidden units of the MLP, channels of the first convolution of
the others, whose further layers keep their proportions.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

#: Dropout rate that every tunable dropout starts with.
START_RATE = 0.05
Layers = Iterator[tuple[str, nn.Module]]


class Standardize(nn.Module):
    """(x - shift) / scale, by two numbers of the training part."""

    shift: Tensor
    scale: Tensor

    def __init__(self, shift: float, scale: float) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor(shift))
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, x: Tensor) -> Tensor:
        """The standardized pixels."""
        return (x - self.shift) / self.scale


class Residual(nn.Module):
    """ReLU of a body's answer plus its input, the latter through a 1x1 convolution where the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            convolution = nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels_in, rows, columns] to [B, channels, rows / stride, columns / stride]."""
        return torch.relu(self.body(x) + self.shortcut(x))


class _Pooling:
    """Max-pooling by 2 as long as there is something to halve, and the size that is left."""

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns

    def __call__(self) -> nn.Module:
        if min(self.rows, self.columns) < 2:
            return nn.Identity()
        self.rows, self.columns = self.rows // 2, self.columns // 2
        return nn.MaxPool2d(2)

    @property
    def pixels(self) -> int:
        return self.rows * self.columns


def build(
    name: str, shape: tuple[int, int, int], classes: int, width: int, *, shift: float, scale: float, seed: int
) -> nn.Module:
    """The network ``name`` for pictures of ``shape`` (channels, rows, columns), equal for equal seeds.

    ``shift`` and ``scale`` standardize the pixels. The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = {"standardize": Standardize(shift, scale), **dict(_LAYERS[name](shape, classes, width))}
        return nn.Sequential(OrderedDict(layers))


def dropouts(model: nn.Module) -> list[str]:
    """Names of the places where a dropout rate can be tuned.

    >>> dropouts(build("mlp", (1, 8, 8), 10, 16, shift=0.0, scale=1.0, seed=0))
    ['input_dropout', 'dropout1', 'dropout2']
    """
    return [name for name, module in model.named_modules() if isinstance(module, nn.Dropout)]


def _mlp(shape: tuple[int, int, int], classes: int, width: int) -> Layers:
    """Two hidden layers; 784-1200-1200-10 on MNIST."""
    channels, rows, columns = shape
    yield "flatten", nn.Flatten()
    yield "input_dropout", nn.Dropout(START_RATE)
    yield "linear1", nn.Linear(channels * rows * columns, width)
    yield "relu1", nn.ReLU()
    yield "dropout1", nn.Dropout(START_RATE)
    yield "linear2", nn.Linear(width, width)
    yield "relu2", nn.ReLU()
    yield "dropout2", nn.Dropout(START_RATE)
    yield "linear3", nn.Linear(width, classes)


def _simple_cnn(shape: tuple[int, int, int], classes: int, width: int) -> Layers:
    """Two 5x5 convolutions of 16 and 32 channels, each pooled, and two affine layers; 1568-1568-10 on 28x28."""
    channels, rows, columns = shape
    pool = _Pooling(rows, columns)
    yield "input_dropout", nn.Dropout(START_RATE)
    for number, (size_in, size) in enumerate(((channels, width), (width, 2 * width)), 1):
        yield f"conv{number}", nn.Conv2d(size_in, size, 5, padding=2)
        yield f"relu{number}", nn.ReLU()
        yield f"pool{number}", pool()
        yield f"dropout{number}", nn.Dropout(START_RATE)
    flat = 2 * width * pool.pixels
    yield "flatten", nn.Flatten()
    yield "linear1", nn.Linear(flat, flat)
    yield "relu3", nn.ReLU()
    yield "dropout3", nn.Dropout(START_RATE)
    yield "linear2", nn.Linear(flat, classes)


def _alexnet(shape: tuple[int, int, int], classes: int, width: int) -> Layers:
    """Five 3x3 convolutions of 64-192-384-256-256 channels, the first of stride 2, and 4096-4096-10 behind them."""
    channels, rows, columns = shape
    pool = _Pooling((rows + 1) // 2, (columns + 1) // 2)
    sizes = (width, 3 * width, 6 * width, 4 * width, 4 * width)
    yield "input_dropout", nn.Dropout(START_RATE)
    for number, (size_in, size) in enumerate(zip((channels, *sizes), sizes, strict=False), 1):
        yield f"conv{number}", nn.Conv2d(size_in, size, 3, stride=2 if number == 1 else 1, padding=1)
        yield f"relu{number}", nn.ReLU()
        if number in (1, 2, 5):
            yield f"pool{number}", pool()
        yield f"dropout{number}", nn.Dropout(START_RATE)
    yield from _classifier(sizes[-1] * pool.pixels, 64 * width, classes)


def _vgg16(shape: tuple[int, int, int], classes: int, width: int) -> Layers:
    """Thirteen 3x3 convolutions in five pooled blocks of 64-128-256-512-512 channels with batch normalization."""
    channels, rows, columns = shape
    pool = _Pooling(rows, columns)
    blocks = ((2, width), (2, 2 * width), (3, 4 * width), (3, 8 * width), (3, 8 * width))
    yield "input_dropout", nn.Dropout(START_RATE)
    size_in = channels
    for block, (depth, size) in enumerate(blocks, 1):
        for number in range(1, depth + 1):
            yield f"conv{block}_{number}", nn.Conv2d(size_in, size, 3, padding=1)
            yield f"norm{block}_{number}", nn.BatchNorm2d(size)
            yield f"relu{block}_{number}", nn.ReLU()
            size_in = size
        yield f"pool{block}", pool()
        yield f"dropout{block}", nn.Dropout(START_RATE)
    yield from _classifier(size_in * pool.pixels, 8 * width, classes)


def _classifier(size: int, hidden: int, classes: int) -> Layers:
    yield "flatten", nn.Flatten()
    yield "linear1", nn.Linear(size, hidden)
    yield "relu6", nn.ReLU()
    yield "dropout6", nn.Dropout(START_RATE)
    yield "linear2", nn.Linear(hidden, hidden)
    yield "relu7", nn.ReLU()
    yield "dropout7", nn.Dropout(START_RATE)
    yield "linear3", nn.Linear(hidden, classes)


def _resnet18(shape: tuple[int, int, int], classes: int, width: int) -> Layers:
    """ResNet-18 for small pictures: a 3x3 stem, four stages of two blocks, 64-128-256-512 channels.

    A dropout at the input and one behind each stage: where the picture is halved next, or averaged.
    """
    yield "input_dropout", nn.Dropout(START_RATE)
    yield "stem", nn.Conv2d(shape[0], width, 3, padding=1, bias=False)
    yield "norm", nn.BatchNorm2d(width)
    yield "relu", nn.ReLU()
    size_in = width
    for stage in range(1, 5):
        size = width * 2 ** (stage - 1)
        blocks = (Residual(size_in, size, 1 if stage == 1 else 2), Residual(size, size, 1))
        yield f"stage{stage}", nn.Sequential(*blocks)
        yield f"dropout{stage}", nn.Dropout(START_RATE)
        size_in = size
    yield "average", nn.AdaptiveAvgPool2d(1)
    yield "flatten", nn.Flatten()
    yield "linear", nn.Linear(size_in, classes)


_LAYERS: dict[str, Callable[[tuple[int, int, int], int, int], Layers]] = {
    "mlp": _mlp,
    "simple-cnn": _simple_cnn,
    "alexnet": _alexnet,
    "vgg16": _vgg16,
    "resnet18": _resnet18,
}
#: The networks for pictures.
NAMES = tuple(_LAYERS)
