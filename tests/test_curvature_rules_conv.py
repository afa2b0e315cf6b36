"""Rules of a recording: convolutions."""

import pytest
import torch
from rules import check_example_gradients, check_rule
from torch import nn

F64 = torch.float64


def seeded(make):
    torch.manual_seed(0)
    return make()


def normal(*shape):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(3))


#: Layers with 4 channels, and the sizes of their images.
LAYERS = {
    "1d": (lambda: nn.Conv1d(4, 6, 3), (7,)),
    "1d, stride and padding": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), (9,)),
    "1d, same": (lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=3), (7,)),
    "2d": (lambda: nn.Conv2d(4, 6, 3), (5, 6)),
    "2d, no bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), (5, 6)),
    "2d, one by one": (lambda: nn.Conv2d(4, 6, 1), (3, 4)),
    "2d, stride": (lambda: nn.Conv2d(4, 6, 3, stride=2), (6, 7)),
    "2d, stride, padding, dilation": (lambda: nn.Conv2d(4, 6, (2, 3), (1, 2), (2, 1), (2, 1)), (5, 6)),
    "2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 4)),
    "2d, depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1, bias=False), (4, 4)),
    "2d, same": (lambda: nn.Conv2d(4, 6, (2, 3), padding="same"), (4, 5)),
    "2d, same, dilation and groups": (
        lambda: nn.Conv2d(4, 6, (4, 2), padding="same", dilation=(1, 3), groups=2),
        (5, 5),
    ),
    "2d, valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (5, 5)),
    "3d": (lambda: nn.Conv3d(4, 6, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1), groups=2), (2, 4, 3)),
    "3d, same": (lambda: nn.Conv3d(4, 2, (1, 2, 3), padding="same", dilation=(1, 1, 2)), (2, 3, 4)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (5,)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, 3), (3, 4)),
    "transposed 2d, all": (
        lambda: nn.ConvTranspose2d(4, 6, (2, 3), (2, 3), (1, 2), (1, 2), groups=2, dilation=(1, 2)),
        (3, 4),
    ),
    "transposed 2d, output larger by a stride": (
        lambda: nn.ConvTranspose2d(4, 6, 2, output_padding=1, dilation=2, bias=False),
        (3, 4),
    ),
    "transposed 3d": (lambda: nn.ConvTranspose3d(4, 2, (1, 2, 2), stride=(1, 2, 1), groups=2), (2, 2, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_convolutions(name):
    make, size = LAYERS[name]
    model = seeded(lambda: nn.Sequential(nn.Linear(size[-1], size[-1]), make(), nn.Tanh()).double())
    x = normal(3, 4, *size)
    check_rule(model, x)
    check_example_gradients(model, x)
    first = seeded(lambda: nn.Sequential(make(), nn.Tanh()).double())
    check_rule(first, x)
    check_rule(model, normal(4, *size))
