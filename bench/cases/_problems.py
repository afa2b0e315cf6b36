"""Networks with a batch for the inner and one for the outer loss: what curvatures and hypergradients are timed on."""

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..registry import TRAINING_PASS, YARDSTICK, Contestant, Setting
from . import _inputs

CLASSES = 10
# Products in float32 sum over examples, positions and channels, and a series rounds several times a term.
TOLERANCE = 100.0
KINK_MARGIN = 1e-5  # about ten times the rounding of an activation after 18 layers in float32

Params = Sequence[Tensor]
Call = Callable[[Params, Tensor], Tensor]

# ---- networks -------------------------------------------------------------------------------------------------------


def _dense(*sizes: int) -> nn.Module:
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def _call_dense(params: Params, x: Tensor) -> Tensor:
    *hidden, last = zip(params[::2], params[1::2], strict=True)
    for weight, bias in hidden:
        x = torch.tanh(F.linear(x, weight, bias))
    return F.linear(x, *last)


def _convolutional(*channels: int) -> nn.Module:
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(channels):
        layers += [nn.Conv2d(fan_in, fan_out, 3, stride=2, padding=1), nn.Tanh()]
    width = 32 >> (len(channels) - 1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * width * width, CLASSES))


def _call_convolutional(params: Params, x: Tensor) -> Tensor:
    for weight, bias in zip(params[:-2:2], params[1:-2:2], strict=True):
        x = torch.tanh(F.conv2d(x, weight, bias, stride=2, padding=1))
    return F.linear(x.flatten(1), *params[-2:])


class _Block(nn.Module):
    """Two convolutions and a way around them; a module for each activation, so that hooks see what goes in."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        self.around: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            conv = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.around = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.relu1(self.norm1(self.conv1(x)))
        out: Tensor = self.relu2(self.norm2(self.conv2(inner)) + self.around(x))
        return out


class _ResNet18(nn.Module):
    """The network of 18 layers, with the first one for 32x32 images; of 10 with one block for each width."""

    def __init__(self, width: int, blocks_each: int = 2) -> None:
        super().__init__()
        widths = [width << i for i in range(4)]
        blocks = []
        for channels_in, channels in zip([width, *widths], widths, strict=False):
            blocks.append(_Block(channels_in, channels, 1 if channels == width else 2))
            blocks += [_Block(channels, channels, 1) for _ in range(blocks_each - 1)]
        stem = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.features = nn.Sequential(*stem, *blocks)
        self.head = nn.Linear(widths[-1], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(x).mean((2, 3)))
        return out


class _Layer(nn.Module):
    """Attention and two dense layers, each behind a normalization and with a way around it.

    The formula is written out: of fused attention PyTorch has neither second derivatives nor, on CPUs, forward mode.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)  # a bias of the keys would have the gradient zero
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.dense = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        out: Tensor = x + self.dense(self.norm2(x))
        return out


class _Transformer(nn.Module):
    """Tokens in, the class of the sequence out."""

    def __init__(self, vocabulary: int, length: int, width: int, heads: int, num_layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.1 * torch.randn(length, width))
        self.layers = nn.Sequential(*[_Layer(width, heads) for _ in range(num_layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.layers(self.tokens(x) + self.positions)).mean(1))
        return out


# ---- with their batches ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """A network and the shape of a batch for it."""

    model: Callable[[], nn.Module]
    input_shape: _inputs.Shape
    vocabulary: int = 0  # 0 where inputs are real numbers


@dataclass(frozen=True)
class Kind:
    """A network at full size and in a quick run, and the same as a function of its params where that is short."""

    summary: str
    full: Size
    quick: Size
    call: Call | None = None


def _dense_kind(summary: str, sizes: Sequence[int], batch: int, quick: Sequence[int] = ()) -> Kind:
    def size(sizes: Sequence[int], batch: int) -> Size:
        return Size(lambda: _dense(*sizes), (batch, sizes[0]))

    return Kind(summary, size(sizes, batch), size(quick or sizes, 16), _call_dense)


KINDS: dict[str, Kind] = {
    "logistic": _dense_kind("logistic regression, 784-10, batch 64", (784, CLASSES), 64),
    "mlp": _dense_kind("an MLP 64-64-10, batch 64", (64, 64, CLASSES), 64),
    "deep-mlp": _dense_kind("an MLP of 7 layers of 16, batch 64", (20, *[16] * 6, CLASSES), 64),
    "large-mlp": _dense_kind("an MLP 784-512-512-10, batch 256", (784, 512, 512, CLASSES), 256, (48, 32, 32, CLASSES)),
    "cnn": Kind(
        "three convolutions on 32x32 images, batch 32",
        Size(lambda: _convolutional(3, 16, 32, 32), (32, 3, 32, 32)),
        Size(lambda: _convolutional(3, 4, 8), (8, 3, 32, 32)),
        _call_convolutional,
    ),
    "resnet18": Kind(
        "ResNet-18 of width 16 on 32x32 images, normalizations in eval mode, batch 8",
        Size(lambda: _ResNet18(16), (8, 3, 32, 32)),
        Size(lambda: _ResNet18(2, 1), (2, 3, 16, 16)),
    ),
    "transformer": Kind(
        "a transformer of 4 layers of 64 with 4 heads on 32 tokens, batch 16",
        Size(lambda: _Transformer(1_000, 32, 64, 4, 4), (16, 32), 1_000),
        Size(lambda: _Transformer(20, 6, 8, 2, 1), (3, 6), 20),
    ),
}


class Problem:
    """A network as it is initialized, in eval mode, and two batches of random inputs and classes.

    The same numbers on every call and device.
    """

    def __init__(self, name: str, setting: Setting) -> None:
        kind = KINDS[name]
        size = kind.quick if setting.quick else kind.full
        self.name = name
        self.setting = setting
        self.criterion = nn.CrossEntropyLoss()
        self._call = kind.call
        generator = torch.Generator().manual_seed(1)
        batch = size.input_shape[0]
        classes = torch.randint(CLASSES, (2, batch), generator=generator)

        def inputs(count: int) -> Tensor:
            shape = (count, *size.input_shape[1:])
            if size.vocabulary:
                return torch.randint(size.vocabulary, shape, generator=generator)
            return torch.randn(shape, generator=generator)

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = size.model()
            _move_norms(model)
        if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
            _set_running_statistics(model, inputs(batch))
        model.eval()
        x = _clear_of_kinks(model, inputs, 2 * batch) if _kinks(model) else inputs(2 * batch)
        self.inner_x, self.outer_x = torch.split(x.to(setting.device), batch)
        self.inner_y, self.outer_y = classes.to(setting.device).unbind()
        self._take(model.to(setting.device))

    def _take(self, model: nn.Module) -> None:
        self.model = model
        self.params: list[Tensor] = list(model.parameters())
        self._names = [name for name, _ in model.named_parameters()]

    def in_float64(self) -> "Problem":
        """The same numbers in float64."""
        other = copy.copy(self)
        other._take(copy.deepcopy(self.model).double())
        if self.inner_x.is_floating_point():
            other.inner_x, other.outer_x = self.inner_x.double(), self.outer_x.double()
        return other

    def call(self, params: Params, x: Tensor) -> Tensor:
        """The network as a function of its params."""
        if self._call is not None:
            return self._call(params, x)
        out: Tensor = torch.func.functional_call(self.model, dict(zip(self._names, params, strict=True)), (x,))
        return out

    def inner_loss(self) -> Tensor:
        loss: Tensor = self.criterion(self.model(self.inner_x), self.inner_y)
        return loss

    def outer_gradient(self) -> list[Tensor]:
        """The right-hand side that an inverse product of a hypergradient has."""
        loss = self.criterion(self.model(self.outer_x), self.outer_y)
        return list(torch.autograd.grad(loss, self.params))

    def training_pass(self) -> Contestant:
        """A training step without its optimizer: the unit in which products and solves are counted."""
        step = lambda: torch.autograd.grad(self.inner_loss(), self.params)  # noqa: E731
        return Contestant(TRAINING_PASS, YARDSTICK, step, 0)


def _move_norms(model: nn.Module) -> None:
    """Moves the params of normalizations from the ones and zeros that they begin with: at zero a decay does nothing."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, 0.1)
            nn.init.normal_(module.bias, 0.0, 0.1)


def _set_running_statistics(model: nn.Module, x: Tensor) -> None:
    """Gives normalizations over the batch the statistics of x, with which activations keep their size."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(x)


def _kinks(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.ReLU)]


def _clear_of_kinks(model: nn.Module, inputs: Callable[[int], Tensor], count: int) -> Tensor:
    """Examples with no unit so close to zero that rounding might decide on which side of a ReLU it is.

    One unit on the other side makes another matrix, and then float64 says nothing about float32.
    """
    nearest: list[Tensor] = []

    def note(module: nn.Module, arguments: tuple[Tensor]) -> None:
        nearest.append(arguments[0].abs().flatten(1).amin(1))

    hooks = [m.register_forward_pre_hook(note) for m in _kinks(model)]
    kept: list[Tensor] = []
    with torch.no_grad():
        while sum(map(len, kept)) < count:
            x = inputs(4 * count)
            nearest.clear()
            model(x)
            kept.append(x[torch.stack(nearest).amin(0) > KINK_MARGIN])
    for hook in hooks:
        hook.remove()
    return torch.cat(kept)[:count]


def compared(
    name: str,
    role: str,
    compute: Callable[[], Params],
    exact: Callable[[], Params],
    trivial: Callable[[], Params] | None = None,
) -> Contestant:
    """A contestant whose step computes tensors, which are compared in units of the largest entry of each.

    ``exact`` gives what they should be, in float64. ``trivial`` is the part of it that is no work, and would hide
    faults in the rest: it is taken away first, and a unit is then no less than 0.3 of the largest entry with it, since
    that is what is rounded.
    """
    found: list[Tensor] = []

    def step() -> None:
        found[:] = compute()

    def in_units(tensors: Params) -> list[Tensor]:
        right = exact()
        without = [torch.zeros_like(e) for e in right] if trivial is None else trivial()
        least = 0.0 if trivial is None else 0.3
        return [
            ((t.detach().double() - w) / torch.maximum((e - w).abs().max(), least * e.abs().max())).to(t.dtype)
            for t, e, w in zip(tensors, right, without, strict=True)
        ]

    return Contestant(name, role, step, 0, lambda: in_units(found), lambda _: in_units(exact()), TOLERANCE)
