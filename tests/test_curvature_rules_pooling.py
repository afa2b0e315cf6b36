"""Rules of a recording: pooling and padding."""

import pytest
import torch
import torch.nn.functional as F
from rules import Wrapped, check_example_gradients, check_rule
from torch import nn

F64 = torch.float64


def normal(*shape):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(3))


#: Functions of [B, C, *size].
POOLS = {
    "max 1d": (lambda h: F.max_pool1d(h, 2), (7,)),
    "max 1d, all": (lambda h: F.max_pool1d(h, 3, 2, 1, 2, True), (8,)),
    "max 2d": (nn.MaxPool2d(2), (4, 6)),
    "max 2d, overlap": (nn.MaxPool2d(3, 1), (4, 5)),
    "max 2d, all": (nn.MaxPool2d((3, 2), (2, 1), (1, 0), (1, 2), ceil_mode=True), (6, 5)),
    "max 2d of torch": (lambda h: torch.max_pool2d(h, 2), (4, 4)),
    "max 3d": (nn.MaxPool3d(2, 1, 1), (2, 3, 4)),
    "adaptive max 1d": (nn.AdaptiveMaxPool1d(3), (7,)),
    "adaptive max 2d": (nn.AdaptiveMaxPool2d((2, None)), (5, 4)),
    "adaptive max 3d": (nn.AdaptiveMaxPool3d(2), (2, 3, 4)),
    "average 1d": (nn.AvgPool1d(2), (6,)),
    "average 1d, remainder": (nn.AvgPool1d(2), (7,)),
    "average 1d, all": (nn.AvgPool1d(3, 2, 1, True, False), (8,)),
    "average 2d": (nn.AvgPool2d(2), (4, 6)),
    "average 2d, remainder": (nn.AvgPool2d((2, 3)), (5, 7)),
    "average 2d, overlap": (nn.AvgPool2d(3, 1), (4, 5)),
    "average 2d, tall": (nn.AvgPool2d((2, 1)), (4, 3)),
    "average 2d, padding": (nn.AvgPool2d(2, padding=1), (4, 4)),
    "average 2d, ceil": (nn.AvgPool2d(2, ceil_mode=True), (5, 4)),
    "average 2d, all": (nn.AvgPool2d((3, 2), (2, 1), (1, 0), True, False, 5), (6, 5)),
    "average 2d, divisor": (nn.AvgPool2d(2, divisor_override=3), (4, 4)),
    "average 3d": (nn.AvgPool3d((1, 2, 2)), (2, 4, 2)),
    "average 3d, all": (nn.AvgPool3d(2, 1, 1, True, False, 7), (2, 3, 4)),
    "adaptive average 1d": (nn.AdaptiveAvgPool1d(3), (6,)),
    "adaptive average 1d, uneven": (nn.AdaptiveAvgPool1d(3), (7,)),
    "adaptive average 2d": (nn.AdaptiveAvgPool2d(1), (4, 5)),
    "adaptive average 2d, some": (nn.AdaptiveAvgPool2d((2, None)), (4, 5)),
    "adaptive average 2d, uneven": (nn.AdaptiveAvgPool2d((3, 2)), (4, 5)),
    "adaptive average 2d, more": (nn.AdaptiveAvgPool2d(6), (4, 3)),
    "adaptive average 3d": (nn.AdaptiveAvgPool3d((1, 1, 2)), (2, 3, 4)),
    "adaptive average 3d, uneven": (nn.AdaptiveAvgPool3d(2), (3, 3, 4)),
    "pad": (lambda h: F.pad(h, (1, 2)), (4,)),
    "pad by a value": (lambda h: F.pad(h, (1, 0, 2, 1), value=3.0), (3, 4)),
    "pad and crop": (lambda h: F.pad(h, (1, -2, -1, 1)), (3, 4)),
    "crop": (nn.ZeroPad2d(-1), (3, 4)),
    "reflect": (nn.ReflectionPad1d((3, 2)), (4,)),
    "reflect 2d": (nn.ReflectionPad2d((1, 0, 2, 1)), (3, 4)),
    "replicate": (nn.ReplicationPad2d((5, 1, 0, 2)), (3, 4)),
    "replicate 3d": (nn.ReplicationPad3d((1, 0, 0, 2, 1, 1)), (2, 3, 2)),
    "circular": (nn.CircularPad1d((3, 4)), (4,)),
    "circular 2d": (nn.CircularPad2d((1, 0, 3, 1)), (3, 4)),
    "circular 2d, crop": (nn.CircularPad2d((-1, 2, 1, -1)), (3, 4)),
    "no padding at all": (lambda h: F.pad(h, (0, 0, 0, 0), mode="circular"), (3, 4)),
}


@pytest.mark.parametrize("name", POOLS)
def test_between_layers(name):
    function, size = POOLS[name]
    last = function(torch.zeros(1, 2, *size)).shape[-1]
    w, v = normal(size[-1], 5), normal(3, last)
    model = Wrapped(lambda x, w, v: F.linear(torch.tanh(function(F.linear(x, w))), v), w, v)
    x = normal(4, 2, *size[:-1], 5)
    check_rule(model, x)
    check_example_gradients(model, x)
    check_rule(model, x[0])
