"""Rules of a recording: pooling and padding."""

import pytest
import torch
import torch.nn.functional as F
from rules import Wrapped, check_example_gradients, check_rule
from torch import nn

from nestopt_ext.curvature import linearize
from nestopt_ext.curvature._tape import MixesExamples

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


@pytest.mark.parametrize("name", POOLS)
def test_as_the_last_layer(name):
    function, size = POOLS[name]
    model = Wrapped(lambda x, w: function(F.linear(x, w)), normal(size[-1], 5))
    check_rule(model, normal(4, 2, *size[:-1], 5))


IMAGES = [name for name in POOLS if "2d" in name and "torch" not in name]


@pytest.mark.parametrize("name", IMAGES)
def test_channels_last(name):
    function, _ = POOLS[name]
    model = Wrapped(
        lambda x, w, v: F.conv2d(torch.tanh(function(F.conv2d(x, w))), v), normal(4, 3, 2, 2), normal(2, 4, 1, 1)
    )
    x = normal(3, 3, 7, 7)
    check_rule(model, x.to(memory_format=torch.channels_last))
    check_example_gradients(model, x.to(memory_format=torch.channels_last))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", IMAGES)
def test_lower_precision(name, dtype):
    function, size = POOLS[name]
    model = Wrapped(lambda x, w: torch.tanh(function(F.linear(x, w))), normal(size[-1], 5).to(dtype))
    x = normal(4, 2, *size[:-1], 5).to(dtype)
    check_rule(model, x, rtol={torch.float32: 1e-5, torch.bfloat16: 0.06}[dtype])


class Branches(nn.Module):
    """Two functions of one tensor, joined by what has a rule: a convolution whose weight and input they are."""

    def __init__(self, first, second):
        super().__init__()
        self.weight = nn.Parameter(normal(3, 3, 2, 2))
        self.first, self.second = first, second

    def forward(self, x):
        h = torch.tanh(F.conv2d(x, self.weight))
        return F.conv2d(self.first(h), self.second(h))


@pytest.mark.parametrize("name", IMAGES)
def test_a_cotangent_that_is_added_to_another(name):
    function, size = POOLS[name]
    if size == (3, 4):
        size = (4, 4)
    x = normal(2, 3, size[0] + 1, size[1] + 1)
    smallest = nn.AdaptiveAvgPool2d(1)
    check_rule(Branches(function, smallest), x)
    check_rule(Branches(lambda h: torch.tanh(h), lambda h: smallest(function(h))), x)


def test_places_that_are_asked_for_go_by_autograd():
    model = Wrapped(lambda x, w: F.max_pool2d(F.linear(x, w), 2, return_indices=True)[0], normal(4, 4))
    check_rule(model, normal(2, 2, 4, 4), opaque=["max_pool2d_with_indices"])


MIXES = {
    "pool": (lambda h: F.max_pool1d(h, 2), "windows"),
    "average": (lambda h: F.avg_pool1d(h, 2), "windows"),
    "pad": (lambda h: F.pad(h, (0, 0, 1, 0)), "between the examples"),
}


@pytest.mark.parametrize("name", MIXES)
def test_windows_and_padding_over_examples_mix_them(name):
    function, reason = MIXES[name]
    node = linearize(Wrapped(lambda x, w: function(F.linear(x, w)), normal(3, 4)), normal(4, 4))._jacobian.tape.nodes[1]
    over, apart = (0, 1) if name == "pad" else (1, 0)
    with pytest.raises(MixesExamples, match=reason):
        node.batch_dim([over], 4)
    assert node.batch_dim([apart], 4) == apart
    assert node.batch_dim([None], 4) is None


def test_errors_of_the_functions_are_theirs():
    for function in (lambda h: F.max_pool1d(h, 9), lambda h: F.avg_pool1d(h, 9), nn.ReflectionPad1d(9)):
        model = Wrapped(lambda x, w, f=function: f(F.linear(x, w)), normal(4, 4))
        with pytest.raises(RuntimeError) as theirs:
            model(normal(2, 2, 4))
        with pytest.raises(RuntimeError) as ours:
            linearize(model, normal(2, 2, 4))
        assert str(ours.value) == str(theirs.value)
