"""Rules of a recording: dropout."""

import pytest
import torch
import torch.nn.functional as F
from rules import Wrapped, check_rule
from torch import nn

from nestopt_ext.curvature import linearize
from nestopt_ext.curvature._evaluation import Replay
from nestopt_ext.curvature._model import Model
from nestopt_ext.curvature._recording import recorded

F64 = torch.float64


def normal(*shape):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(3))


FUNCTIONS = {
    "dropout": F.dropout,
    "dropout of a third": lambda h: F.dropout(h, 1 / 3),
    "nothing dropped": lambda h: F.dropout(h, 0.0),
    "all dropped": lambda h: F.dropout(h, 1.0),
    "in eval mode": lambda h: F.dropout(h, training=False),
    "in place": lambda h: F.dropout(h, inplace=True),
    "in eval mode, in place": lambda h: F.dropout(h, training=False, inplace=True),
    "in eval mode, then in place": lambda h: torch.relu_(F.dropout(h, training=False)),
    "twice": lambda h: F.dropout(F.dropout(h), 0.3, True, True),
    "of sequences": F.dropout1d,
    "of images": F.dropout2d,
    "of volumes": F.dropout3d,
    "of sequences, in place": lambda h: F.dropout1d(h, 0.3, True, True),
    "of images, in place": lambda h: F.dropout2d(h, 0.3, True, True),
    "of volumes, in place": lambda h: F.dropout3d(h, 0.3, inplace=True),
    "of images, in eval mode": lambda h: F.dropout2d(h, training=False),
}
SHAPES = {"of sequences": (6, 3, 4), "of images": (6, 3, 2, 4), "of volumes": (6, 3, 2, 2, 4)}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_dropout(name):
    x = normal(*SHAPES.get(name.split(",")[0], (6, 2, 4)))
    model = Wrapped(lambda x, w, v: F.linear(FUNCTIONS[name](F.linear(x, w)), v), normal(5, 4), normal(3, 5))
    check_rule(model, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
@pytest.mark.parametrize("function", [F.dropout, F.dropout2d])
def test_the_numbers_drawn_are_those_of_the_function(function, dtype):
    """So is what is drawn after it, and the mask is the same for all memory formats."""
    model = Wrapped(lambda x, w: torch.tanh(function(function(F.conv2d(x, w), 0.3))), normal(4, 3, 2, 2).to(dtype))
    for x in (normal(5, 3, 5, 4), normal(5, 3, 5, 4).to(memory_format=torch.channels_last)):
        torch.manual_seed(4)
        outputs = linearize(model, x.to(dtype)).outputs
        first = torch.rand(3)  # random state is put back
        torch.manual_seed(4)
        expected = model(x.to(dtype))
        torch.manual_seed(4)
        assert torch.equal(first, torch.rand(3))
        assert torch.equal(outputs, expected)


@pytest.mark.parametrize("shape", [(6, 4), (4,), (0, 4), (6, 3, 2, 4)])
def test_on_other_shapes(shape):
    model = Wrapped(lambda x, w: torch.tanh(F.dropout(F.linear(x, w))), normal(5, 4))
    if 0 not in shape:
        check_rule(model, normal(*shape))
    assert linearize(model, normal(*shape)).reason is None


def test_one_example_without_batch_dimension():
    """Where the channels come first: of a sequence, of a volume."""
    for function, shape in ((F.dropout1d, (3, 4)), (F.dropout3d, (3, 2, 2, 4))):
        model = Wrapped(lambda x, w, f=function: torch.tanh(f(F.linear(x, w))), normal(5, 4))
        check_rule(model, normal(*shape))
        masked = (linearize(model, normal(*shape)).outputs == 0).flatten(1)
        assert torch.equal(masked.all(1), masked.any(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.4), nn.Tanh(), nn.Dropout1d(), nn.Linear(6, 3)).to(dtype)
    check_rule(model, normal(5, 2, 4).to(dtype), rtol={torch.float32: 1e-5, torch.bfloat16: 0.06}[dtype])


def test_examples_stay_apart():
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.4), nn.Dropout1d(), nn.Dropout(0.0), nn.Tanh()).double()
    x = normal(5, 2, 4)
    with Replay().run() as call:
        _, recording = recorded("test", Model("test", model), x, list(model.parameters()), call)
    tape = recording.tape
    dims = {var.slot: 0 for var in tape.data}
    for node in tape.all_nodes:
        dims[node.output] = node.batch_dim([None if s < 0 else dims.get(s) for s in node.slots], len(x))
    assert dims[tape.output_slot] == 0
    assert len(tape.nodes) == 4  # none for what drops nothing


def test_dropout_of_the_inputs():
    """Which depend on no params."""
    for training in (True, False):
        model = Wrapped(lambda x, w, t=training: torch.tanh(F.linear(F.dropout(x, training=t), w)), normal(3, 4))
        check_rule(model, normal(5, 4))


def test_what_drops_nothing_gives_back_the_same_tensor():
    def f(x, w):
        h = F.linear(x, w)
        same = F.dropout(h, 0.0)
        assert same is h
        return torch.tanh(same)

    check_rule(Wrapped(f, normal(3, 4)), normal(5, 4))


def test_errors_of_the_functions_are_theirs():
    model = Wrapped(lambda x, w: F.dropout(F.linear(x, w), 2.0), normal(3, 4))
    with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
        linearize(model, normal(5, 4))
    for training in (True, False):
        model = Wrapped(lambda x, w, t=training: F.dropout1d(F.linear(x, w), training=t), normal(3, 4))
        with pytest.raises(RuntimeError, match="Expected 2D or 3D input"):
            linearize(model, normal(5, 2, 2, 4))
        model = Wrapped(lambda x, w, t=training: F.dropout(F.linear(x, w), -1.0, t), normal(3, 4))
        with pytest.raises(ValueError, match="between 0 and 1"):
            linearize(model, normal(5, 4))
