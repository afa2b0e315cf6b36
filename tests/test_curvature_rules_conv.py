"""Rules of a recording: convolutions."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from rules import Wrapped, check_example_gradients, check_rule, close, tangents
from torch import nn

from nestopt_ext.curvature import linearize
from nestopt_ext.curvature._tape import MixesExamples

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


@pytest.mark.filterwarnings("ignore:Using padding='same'")
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


@pytest.mark.parametrize("name", [name for name in LAYERS if "1d" not in name])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(name, dtype):
    make, size = LAYERS[name]
    model = seeded(lambda: nn.Sequential(nn.Linear(size[-1], size[-1]), make(), nn.Tanh())).to(dtype)
    check_rule(model, normal(3, 4, *size).to(dtype), rtol={torch.float32: 1e-5, torch.bfloat16: 0.06}[dtype])


@pytest.mark.parametrize("name", [name for name in LAYERS if "1d" not in name])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_channels_last(name, dtype):
    make, size = LAYERS[name]
    order = torch.channels_last if len(size) == 2 else torch.channels_last_3d
    model = seeded(lambda: nn.Sequential(nn.Linear(size[-1], size[-1]), make(), nn.Tanh())).to(dtype)
    x = normal(3, 4, *size).to(dtype)
    rtol = 1e-12 if dtype == F64 else 1e-5
    check_rule(model, x.to(memory_format=order), rtol=rtol)
    check_rule(model.to(memory_format=order), x, rtol=rtol)
    check_rule(model, x.to(memory_format=order), rtol=rtol)
    check_example_gradients(model, x.to(memory_format=order), rtol=rtol)


def test_a_padding_of_the_layer_itself():
    """Whose function pads first."""
    for mode in ("circular", "reflect", "replicate"):
        layer = nn.Conv2d(3, 2, (3, 2), padding=(2, 1), stride=2, padding_mode=mode)
        model = seeded(lambda layer=layer: nn.Sequential(nn.Linear(4, 4), layer, nn.Tanh()).double())
        check_rule(model, normal(2, 3, 5, 4))
        check_example_gradients(model, normal(2, 3, 5, 4))


KERNEL, WIDE, BIAS = normal(2, 3, 2, 2), normal(3, 3, 2, 2), normal(3)
FUNCTIONS = {
    "a weight used twice": lambda x, w, b: F.conv2d(torch.tanh(F.conv2d(x, w, b, padding=1)), w, b, padding=1),
    "a weight used by both kinds": lambda x, w, b: F.conv_transpose2d(torch.tanh(F.conv2d(x, w, b)), w, b),
    "a weight that is computed": lambda x, w, b: F.conv2d(x, torch.tanh(w), torch.exp(b)),
    "no weight of its own": lambda x, w, b: F.conv2d(torch.tanh(F.conv2d(x, w, b)), KERNEL),
    "a bias of its own": lambda x, w, b: F.conv2d(torch.tanh(F.conv2d(x, w)), WIDE, b),
    "only a bias": lambda x, w, b: F.conv2d(x, WIDE, b),
    "a frozen bias": lambda x, w, b: F.conv2d(torch.tanh(F.conv2d(x, w, BIAS)), w, BIAS),
    "numbers for all": lambda x, w, b: F.conv2d(x, w, b, 2, 1, 2, 1),
    "lists of one": lambda x, w, b: F.conv2d(x, w, b, stride=[2], padding=[1]),
    "named": lambda x, w, b: F.conv2d(input=torch.tanh(F.conv2d(x, weight=w)), weight=w, bias=b, padding=(0, 1)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    f = FUNCTIONS[name]
    x = normal(4, 3, 6, 6)
    model = Wrapped(lambda x, b: f(x, None, b), normal(3)) if name == "only a bias" else None
    model = model or Wrapped(f, normal(3, 3, 3, 3), normal(3))
    check_rule(model, x)
    if name not in ("a weight that is computed", "a frozen bias"):
        check_example_gradients(model, x)


def test_params_that_are_images():
    """The kernel is data."""
    model = Wrapped(lambda x, image: F.conv2d(torch.tanh(image), x), normal(2, 3, 5, 5))
    check_rule(model, normal(4, 3, 2, 2))
    check_rule(
        Wrapped(lambda x, image: F.conv_transpose2d(torch.tanh(image), x), normal(2, 4, 3, 3)), normal(4, 3, 2, 2)
    )
    assert_mixes(model, normal(4, 3, 2, 2))


def assert_mixes(model, x, reason="has examples in its weight, or sums over them"):
    tape = linearize(model, x)._jacobian.tape
    dims = {var.slot: 0 for var in tape.data}
    with pytest.raises(MixesExamples, match=reason):
        for node in tape.all_nodes:
            dims[node.output] = node.batch_dim([None if s < 0 else dims.get(s) for s in node.slots], len(x))


def test_an_image_without_batch_dimension_has_no_examples():
    assert_mixes(seeded(lambda: nn.Conv2d(4, 2, 2).double()), normal(4, 3, 3))


def test_an_empty_batch():
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Conv2d(3, 2, 2), nn.Tanh()).double())
    jacobian = linearize(model, normal(0, 3, 4, 4))
    assert jacobian.reason is None
    assert all(not t.any() for t in jacobian.vjp(normal(0, 2, 3, 3)).values())
    assert jacobian.jvp(dict(model.named_parameters())).shape == (0, 2, 3, 3)


def test_some_params_of_a_layer():
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 2), nn.Tanh(), nn.Conv2d(4, 2, 2)).double())
    x = normal(5, 3, 4, 4)
    whole = linearize(model, x)
    v, u = tangents(dict(model.named_parameters())), normal(5, 2, 2, 2)
    found = whole.vjp(u)
    for names in (["0.weight"], ["2.weight"], ["0.bias"], ["2.bias"], ["0.weight", "2.bias"]):
        some = linearize(model, x, names)
        assert some.reason is None and not some.opaque
        for n, t in some.vjp(u).items():
            close(t, found[n], 1e-12)
        zeros = {n: t if n in names else torch.zeros_like(t) for n, t in v.items()}
        close(some.jvp({n: v[n] for n in names}), whole.jvp(zeros), 1e-12)


def test_what_is_kept():
    """Of the input and the weight, what the gradient in the other needs."""
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 2), nn.Tanh(), nn.Conv2d(4, 2, 2)).double())
    x = normal(5, 3, 4, 4)
    for names, inputs, weights in ((["0.weight"], [True, False], [False, True]), (["2.bias"], [False], [False])):
        nodes = [n for n in linearize(model, x, names)._jacobian.tape.nodes if hasattr(n, "macs") and n.macs]
        assert [n.x.untyped_storage().nbytes() > 8 for n in nodes] == inputs
        assert [n.weight.untyped_storage().nbytes() > 8 for n in nodes] == weights


def test_multiplications():
    def macs(model, x):
        return [n.macs for n in linearize(model, x)._jacobian.tape.nodes]

    assert macs(nn.Conv2d(4, 6, (2, 3), groups=2), torch.randn(5, 4, 7, 8)) == [5 * 6 * 6 * 6 * 2 * 2 * 3]
    assert macs(nn.ConvTranspose1d(4, 6, 3, groups=2), torch.randn(5, 4, 7)) == [5 * 4 * 7 * 3 * 3]


def test_errors_of_the_functions_are_theirs():
    weight, image = torch.randn(4, 3, 3, 3), torch.randn(2, 3, 5, 5)
    for model, x in (
        (nn.Conv2d(3, 4, 3), torch.randn(2, 2, 5, 5)),
        (nn.Conv2d(3, 4, 7), torch.randn(2, 3, 5, 5)),
        (nn.Conv2d(3, 4, 3), torch.randn(2, 5)),
        (
            Wrapped(lambda x, w: F.conv2d(x, w, stride=2, padding="same"), torch.randn(4, 3, 3, 3)),
            torch.randn(2, 3, 5, 5),
        ),
        (Wrapped(lambda x, w: F.conv2d(x, w, padding="other"), weight), image),
    ):
        with pytest.raises(RuntimeError) as theirs:
            model(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(RuntimeError) as ours:
                linearize(model, x)
        assert str(ours.value) == str(theirs.value)
