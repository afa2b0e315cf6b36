"""Cases of training steps of Delta-STN networks, without their optimizers.

A training step is the general step, forward and backward of the network at the centre, and the response step: the loss
of primal + tangent of the network linearized in its gate input, a row of which each example has, and the gradient of
the response's parameters alone. The yardstick is a step of the plain network. The rival of the response step finds the
tangent by double backward, with the same layers: the network's derivative in the gate input at zero, pulled back from
a vector of zeros, is a linear function of that vector, whose derivative along the gate input is the tangent. It takes
the general parameters for constants too.

Products count: a layer's plain step takes three, its response step five (W x, W dx, V x, and back the gradients of V
and dx), the double-backward construction eleven or twelve.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestopt_ext import response
from nestopt_ext.response import HyperParameters, StnModel

from .. import registry
from ..registry import BASELINE, OURS, TRAINING_PASS, YARDSTICK, Case, Contestant, Field, Goal, Setting
from . import _inputs
from ._problems import compared

DOUBLE_BACKWARD = "double backward"
CLASSES = 10
NUM_HPARAMS = 8

Grads = Sequence[Tensor]
Make = Callable[..., nn.Module]


# ---- networks: of torch's layers, or of response layers of the same names -------------------------------------------


def _mlp(layer: Callable[[str], Make], width: int) -> nn.Module:
    linear = layer("Linear")
    return nn.Sequential(linear(784, width), nn.Tanh(), linear(width, width), nn.Tanh(), linear(width, CLASSES))


def _cnn(layer: Callable[[str], Make], width: int) -> nn.Module:
    conv = layer("Conv2d")
    return nn.Sequential(
        conv(3, width, 3, stride=2, padding=1),
        nn.Tanh(),
        conv(width, 3 * width, 3, padding=1),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        layer("Linear")(3 * width, CLASSES),
    )


class _LanguageModel(nn.Module):
    """Embedding, LSTM and decoder; time first."""

    def __init__(self, layer: Callable[[str], Make], width: int) -> None:
        super().__init__()
        self.embedding = layer("Embedding")(1000, width)
        self.lstm = layer("LSTM")(width, width)
        self.decoder = layer("Linear")(width, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.embedding(words))
        logits: Tensor = self.decoder(hidden)
        return logits


@dataclass(frozen=True)
class Kind:
    """A network, the shape of its input, and the dimension of its examples; the last numbers are of a quick run."""

    summary: str
    network: Callable[[Callable[[str], Make], int], nn.Module]
    widths: tuple[int, int]
    inputs: tuple[tuple[int, ...], tuple[int, ...]]
    words: bool = False
    batch_dim: int = 0


KINDS = {
    "mlp": Kind("784-1200-1200-10 at 128 examples", _mlp, (1200, 60), ((128, 784), (16, 784))),
    "cnn": Kind(
        "convolutions 3-64 and 64-192 of 3x3, 16x16 places, 128 examples",
        _cnn,
        (64, 6),
        ((128, 3, 32, 32), (8, 3, 16, 16)),
    ),
    "lstm": Kind("an LSTM of 650 units, 35 steps, 40 examples", _LanguageModel, (650, 20), ((35, 40), (6, 5)), True, 1),
}


class Problem:
    """A plain and a Delta-STN network with the same weights, inputs, targets, and a gate input for each example."""

    def __init__(self, kind: Kind, setting: Setting) -> None:
        self.device = setting.device
        shape, width = kind.inputs[setting.quick], kind.widths[setting.quick]
        generator = torch.Generator().manual_seed(0)
        targets = shape[:2] if kind.words else shape[:1]
        self.x = (
            torch.randint(1000, shape, generator=generator) if kind.words else torch.randn(shape, generator=generator)
        )
        self.y = torch.randint(CLASSES, targets, generator=generator)
        self.h = 0.3 * torch.randn(shape[kind.batch_dim], NUM_HPARAMS, generator=generator)
        hparams = HyperParameters()
        for i in range(NUM_HPARAMS):
            hparams.add(f"h{i}", 0.0)
        self.model = StnModel(
            kind.network(functools.partial(_delta, batch_dim=kind.batch_dim), width), hparams, centred=True
        )
        self.plain = kind.network(lambda name: getattr(nn, name), width)
        names = dict(self.plain.named_parameters())
        with torch.no_grad():
            for name, parameter in self.model.module.named_parameters():
                spread = 0.3 if "gate_weight" in name else parameter.std().item()
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
                if name in names:
                    names[name].copy_(parameter)
        self.to(dtype=torch.float32)

    def to(self, dtype: torch.dtype) -> "Problem":
        """Moves it to its device and to a floating dtype."""
        self.model.to(self.device, dtype)
        self.plain.to(self.device, dtype)
        self.y, self.h = self.y.to(self.device), self.h.to(self.device, dtype)
        self.x = self.x.to(self.device, dtype if self.x.is_floating_point() else None)
        return self

    def loss(self, logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, -2), self.y.flatten())

    # ---- steps: the gradients -------------------------------------------------------------------------------------

    def plain_step(self) -> Grads:
        return torch.autograd.grad(self.loss(self.plain(self.x)), list(self.plain.parameters()))

    def general_step(self) -> Grads:
        with self.model.at_centre():
            loss = self.loss(self.model(self.x))
        return torch.autograd.grad(loss, list(self.model.general_parameters()))

    def response_step(self) -> Grads:
        with self._frozen(), self.model.at(self.h, linearized=True):
            loss = self.loss(self.model(self.x))
        return torch.autograd.grad(loss, list(self.model.response_parameters()))

    def response_step_by_double_backward(self) -> Grads:
        zero = torch.zeros_like(self.h, requires_grad=True)
        with self._frozen(), self.model.at(zero):
            y = self.model(self.x)
        v = torch.zeros_like(y, requires_grad=True)
        pulled = torch.autograd.grad(y, zero, v, create_graph=True)
        (tangent,) = torch.autograd.grad(pulled, v, self.h, create_graph=True)
        return torch.autograd.grad(self.loss(y.detach() + tangent), list(self.model.response_parameters()))

    def training_step(self) -> Grads:
        return [*self.general_step(), *self.response_step()]

    def training_step_by_double_backward(self) -> Grads:
        return [*self.general_step(), *self.response_step_by_double_backward()]

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[None]:
        """Takes the general parameters for constants."""
        general = list(self.model.general_parameters())
        for parameter in general:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in general:
                parameter.requires_grad_(True)


def _delta(name: str, batch_dim: int) -> Make:
    options = {"num_hparams": NUM_HPARAMS, "batch_dim": 0 if name.startswith("Conv") else batch_dim}
    if name == "LSTM":
        options["fused"] = True  # the general step by the kernel that the plain network has
    return functools.partial(getattr(response, f"DeltaStn{name}"), **options)


# ---- contestants ----------------------------------------------------------------------------------------------------


def _build(kind: Kind, whole: bool, setting: Setting) -> Field:
    problem = Problem(kind, setting)
    steps = {
        "Delta-STN": (OURS, Problem.training_step if whole else Problem.response_step),
        DOUBLE_BACKWARD: (
            BASELINE,
            Problem.training_step_by_double_backward if whole else Problem.response_step_by_double_backward,
        ),
    }

    @functools.cache
    def expected() -> Grads:
        exact = copy.deepcopy(problem).to(dtype=torch.float64)
        response_grads = exact.response_step_by_double_backward()
        return [*exact.plain_step(), *response_grads] if whole else response_grads

    contestants = [
        compared(name, role, functools.partial(step, problem), expected) for name, (role, step) in steps.items()
    ]
    contestants.append(Contestant(TRAINING_PASS, YARDSTICK, problem.plain_step, 0))
    params = list(problem.model.module.parameters())
    return Field(contestants, len(params), sum(p.numel() for p in params), _inputs.num_bytes(params), {})


_FASTER = Goal(DOUBLE_BACKWARD, 1 / 1.6, "1.6x faster than double backward")
_STEPS = (
    ("response-step", False, (Goal(TRAINING_PASS, 2.5, "at most 2.5 steps of the plain network"), _FASTER)),
    ("training-step", True, (_FASTER,)),
)

for _name, _kind in KINDS.items():
    for _word, _whole, _goals in _STEPS:
        registry.add(
            Case(
                f"response_layers/{_name}/{_word}",
                f"{_word.replace('-', ' ')} of Delta-STN, {_kind.summary}",
                functools.partial(_build, _kind, _whole),
                _goals,
                quick=_whole,
            )
        )
