"""Rules of a recording: normalizations."""

import copy

import pytest
import torch
import torch.nn.functional as F
from rules import Wrapped, check_example_gradients, check_rule, close, tangents
from torch import nn
from torch.func import functional_call, jvp, vjp

from nestopt_ext.curvature import linearize
from nestopt_ext.curvature._evaluation import Replay
from nestopt_ext.curvature._model import Model
from nestopt_ext.curvature._recording import recorded
from nestopt_ext.curvature._tape import MixesExamples

F64 = torch.float64


def normal(*shape, seed=3):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def randomized(module):
    """The module in float64, with no param or buffer at a special value."""
    generator = torch.Generator().manual_seed(5)
    module = module.double()
    with torch.no_grad():
        for t in (*module.parameters(), *module.buffers()):
            if t.is_floating_point():
                t.copy_(0.5 + torch.rand(t.shape, generator=generator, dtype=F64))
    return module


#: Layers on [B, 6, 4, 5]; they are put between functions with params.
IMAGES = {
    "batch norm": lambda: nn.BatchNorm2d(6),
    "batch norm, eval": lambda: nn.BatchNorm2d(6).eval(),
    "batch norm, not affine": lambda: nn.BatchNorm2d(6, affine=False),
    "batch norm, not affine, eval": lambda: nn.BatchNorm2d(6, affine=False).eval(),
    "batch norm, no running statistics": lambda: nn.BatchNorm2d(6, track_running_stats=False),
    "batch norm, no running statistics, eval": lambda: nn.BatchNorm2d(6, track_running_stats=False).eval(),
    "batch norm, cumulative average": lambda: nn.BatchNorm2d(6, momentum=None),
    "batch norm, large eps": lambda: nn.BatchNorm2d(6, eps=0.5),
    "batch norm, large eps, eval": lambda: nn.BatchNorm2d(6, eps=0.5).eval(),
    "layer norm": lambda: nn.LayerNorm(5),
    "layer norm over three": lambda: nn.LayerNorm([6, 4, 5]),
    "layer norm, not affine": lambda: nn.LayerNorm([4, 5], elementwise_affine=False),
    "layer norm, no bias": lambda: nn.LayerNorm([4, 5], bias=False),
    "layer norm, large eps": lambda: nn.LayerNorm(5, eps=0.5),
    "rms norm": lambda: nn.RMSNorm(5),
    "rms norm over two": lambda: nn.RMSNorm([4, 5], eps=0.1),
    "rms norm, not affine": lambda: nn.RMSNorm(5, elementwise_affine=False),
    "group norm": lambda: nn.GroupNorm(3, 6),
    "group norm of all": lambda: nn.GroupNorm(1, 6, eps=0.5),
    "group norm of each": lambda: nn.GroupNorm(6, 6),
    "group norm, not affine": lambda: nn.GroupNorm(2, 6, affine=False),
    "instance norm": lambda: nn.InstanceNorm2d(6),
    "instance norm, affine": lambda: nn.InstanceNorm2d(6, affine=True, eps=0.1),
    "instance norm, running statistics": lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
    "instance norm, eval": lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True).eval(),
}
MIXING = {name for name in IMAGES if name.startswith("batch norm") and "eval" not in name} | {
    "batch norm, no running statistics, eval"
}


def image_model(name):
    """A function with params on both sides, so that the layer has an active operand and is not the last one."""
    layer = randomized(IMAGES[name]())
    # In eval mode as the layer is, whose children keep their own mode.
    return nn.Sequential(randomized(nn.Linear(3, 5)), layer, nn.Tanh(), randomized(nn.Linear(5, 2)))


def batch_dims(model, x):
    named = list(model.parameters())
    with Replay().run() as call:
        _, recording = recorded("test", Model("test", model), x, named, call)
    tape = recording.tape
    dims = {var.slot: 0 for var in tape.data}
    for node in tape.all_nodes:
        dims[node.output] = node.batch_dim([None if s < 0 else dims.get(s) for s in node.slots])
    return dims[tape.output_slot]


@pytest.mark.parametrize("name", IMAGES)
def test_on_images(name):
    model, x = image_model(name), normal(4, 6, 4, 3)
    check_rule(model, x)
    if name in MIXING:
        with pytest.raises(MixesExamples, match="from the batch"):
            batch_dims(model, x)
    elif name != "instance norm, running statistics":  # which cannot be written for one example at a time
        check_example_gradients(model, x)


@pytest.mark.parametrize("name", IMAGES)
def test_as_the_first_layer_and_the_last(name):
    layer = randomized(IMAGES[name]())
    if list(layer.parameters()):
        check_rule(layer, normal(4, 6, 4, 5))
    check_rule(nn.Sequential(randomized(nn.Linear(3, 5)), layer), normal(4, 6, 4, 3))
