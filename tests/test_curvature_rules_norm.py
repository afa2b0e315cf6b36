"""Rules of a recording: normalizations."""

import copy
import warnings

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
        dims[node.output] = node.batch_dim([None if s < 0 else dims.get(s) for s in node.slots], len(x))
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


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(name, dtype):
    rtol = {torch.float32: 1e-5, torch.bfloat16: 0.06}[dtype]
    check_rule(image_model(name).to(dtype), normal(4, 6, 4, 3).to(dtype), rtol=rtol)


def products(jacobian):
    """All kinds of products, in float64."""
    params = dict(zip(jacobian._structure.labels("p"), jacobian._params, strict=True))
    v, u = tangents(params), tangents({"u": jacobian.outputs})["u"]
    of_params, k_of_params = list(v.values()), [torch.stack([t, -2 * t]) for t in v.values()]
    into = [t.clone() for t in of_params]
    jacobian._jacobian.backward_into(u, into)
    found = [jacobian.outputs, jacobian._jacobian.forward(of_params), jacobian._jacobian.forwards(k_of_params)]
    found += [*into, *jacobian._jacobian.backward(u), *jacobian._jacobian.backwards(torch.stack([u, -2 * u]))]
    return [t.double() for t in found]


def check_same(jacobian, reference, rtol):
    assert jacobian.reason is None and reference.reason is None and not jacobian.opaque
    for actual, expected in zip(products(jacobian), products(reference), strict=True):
        close(actual, expected, rtol)


@pytest.mark.parametrize("name", IMAGES)
def test_float32_layers_beside_bfloat16(name):
    """Where PyTorch takes them; its own derivatives are not made for it."""
    model = image_model(name).bfloat16()
    model[1].float()
    x = normal(4, 6, 4, 3).bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one of them is said to be slow
        jacobian = linearize(model, x)
    found = jacobian.vjp(jacobian.outputs)
    assert all(found[n].dtype == p.dtype for n, p in model.named_parameters())
    assert jacobian.outputs.dtype == jacobian.jvp(found).dtype == torch.bfloat16
    check_same(jacobian, linearize(copy.deepcopy(model).float(), x.float()), 0.06)


@pytest.mark.parametrize("name", [name for name in IMAGES if "layer" not in name and "rms" not in name])
def test_channels_last(name):
    """Cotangents and tangents come in one memory format, what was recorded is in another, or both are the same."""
    layer = randomized(IMAGES[name]())
    x = normal(4, 4, 6, 7)
    last = x.to(memory_format=torch.channels_last)
    for model in (
        nn.Sequential(randomized(nn.Conv2d(4, 6, 3, bias=False)), layer, nn.Tanh(), randomized(nn.Conv2d(6, 3, 3))),
        nn.Sequential(randomized(nn.Conv2d(4, 6, 3, bias=False)), layer),
    ):
        reference = linearize(model, x)
        check_same(linearize(model, last), reference, 1e-12)
        model.to(memory_format=torch.channels_last)
        check_same(linearize(model, last), reference, 1e-12)
    if name not in MIXING and name != "instance norm, running statistics":
        check_example_gradients(model, last)


OTHERS = {
    "batch norm of vectors": (lambda: nn.BatchNorm1d(4), (6, 4)),
    "batch norm of vectors, eval": (lambda: nn.BatchNorm1d(4).eval(), (6, 4)),
    "batch norm of sequences": (lambda: nn.BatchNorm1d(3), (6, 3, 4)),
    "batch norm of sequences, eval": (lambda: nn.BatchNorm1d(3).eval(), (6, 3, 4)),
    "batch norm of volumes": (lambda: nn.BatchNorm3d(3), (4, 3, 2, 2, 4)),
    "batch norm of volumes, eval": (lambda: nn.BatchNorm3d(3).eval(), (4, 3, 2, 2, 4)),
    "batch norm of one, eval": (lambda: nn.BatchNorm1d(4).eval(), (1, 4)),
    "layer norm of vectors": (lambda: nn.LayerNorm(4), (6, 4)),
    "layer norm of one": (lambda: nn.LayerNorm(4), (4,)),
    "layer norm of all of one": (lambda: nn.LayerNorm([3, 4]), (3, 4)),
    "rms norm of vectors": (lambda: nn.RMSNorm(4), (6, 4)),
    "rms norm of one": (lambda: nn.RMSNorm(4), (4,)),
    "group norm of vectors": (lambda: nn.GroupNorm(1, 4), (6, 4)),
    "group norm of volumes": (lambda: nn.GroupNorm(2, 4), (3, 4, 2, 2, 4)),
    "group norm of one": (lambda: nn.GroupNorm(2, 4), (1, 4, 3, 4)),
    "instance norm of sequences": (lambda: nn.InstanceNorm1d(3, affine=True), (6, 3, 4)),
    "instance norm of volumes": (lambda: nn.InstanceNorm3d(3, affine=True), (4, 3, 2, 2, 4)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_on_other_shapes(name):
    make, shape = OTHERS[name]
    first = randomized(nn.Linear(4, 4, bias=False))  # which some of the layers take off again
    model = nn.Sequential(first, randomized(make()), nn.Tanh(), randomized(nn.Linear(4, 2)))
    check_rule(model, normal(*shape))
    mixes = name.startswith("batch") and not name.endswith("eval")
    if len(shape) > 1 and not mixes and "one" not in name:
        check_example_gradients(model, normal(*shape))


FUNCTIONS = {
    "batch norm": lambda h, w, b: F.batch_norm(h, None, None, w, b, True),
    "batch norm, eval": lambda h, w, b: F.batch_norm(h, normal(3), normal(3).exp(), w, b),
    "layer norm": lambda h, w, b: F.layer_norm(h, (3, 4), w, b),
    "group norm": lambda h, w, b: F.group_norm(h, 1, w, b),
    "instance norm": lambda h, w, b: F.instance_norm(h, None, None, w, b),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_weight_or_a_bias_alone_or_with_a_frozen_other(name):
    function = FUNCTIONS[name]
    size = (3, 4) if name == "layer norm" else (3,)
    x, w, frozen = normal(5, 3, 4), normal(4, 4), normal(*size, seed=7)
    cases = (
        lambda x, w, s: function(F.linear(x, w), s, None),
        lambda x, w, s: function(F.linear(x, w), None, s),
        lambda x, w, s: function(F.linear(x, w), s, frozen),
        lambda x, w, s: function(F.linear(x, w), frozen, s),
        lambda x, w, s: function(F.linear(x, w), s, s),
    )
    for f in cases:
        if name == "group norm" and f is cases[1]:  # autograd fails there
            ones = Wrapped(lambda x, w, s: function(F.linear(x, w), torch.ones_like(s), s), w, normal(*size))
            check_same(linearize(Wrapped(f, w, normal(*size)), x), linearize(ones, x), 1e-12)
            continue
        check_rule(Wrapped(f, w, normal(*size)), x)
    for f in (
        lambda x, s: function(x, s, None),
        lambda x, s: function(x, frozen, s),
        lambda x, s: function(x, torch.tanh(s), torch.exp(s)),
    ):
        check_rule(Wrapped(f, normal(*size)), x)


@pytest.mark.parametrize("name", ["batch norm", "batch norm, eval", "layer norm", "rms norm", "group norm"])
def test_a_layer_used_twice(name):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.layer = nn.Linear(5, 5), IMAGES[name]()

        def forward(self, x):
            return self.layer(torch.tanh(self.layer(self.first(x))))

    model = randomized(Twice())
    check_rule(model, normal(4, 6, 4, 5))
    if name not in MIXING:
        check_example_gradients(model, normal(4, 6, 4, 5))


MIXES = {
    "layer norm": (lambda h, w: F.layer_norm(h, h.shape), "over the examples"),
    "rms norm": (lambda h, w: F.rms_norm(h, h.shape), "over the examples"),
    "batch norm without running statistics": (
        lambda h, w: F.batch_norm(h, None, None, training=True),
        "from the batch",
    ),
}


@pytest.mark.parametrize("name", MIXES)
def test_statistics_over_examples_mix_them(name):
    function, reason = MIXES[name]
    model = Wrapped(lambda x, w: function(F.linear(x, w), w), normal(4, 4))
    check_rule(model, normal(5, 4))
    with pytest.raises(MixesExamples, match=reason):
        batch_dims(model, normal(5, 4))


def test_running_statistics_are_written_once_and_put_back():
    """The second layer reads what the first has left."""

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3)

        def forward(self, x):
            h = self.norm(self.first(x))
            return F.batch_norm(torch.tanh(h), self.norm.running_mean, self.norm.running_var)

    model = randomized(Reads())
    check_rule(model, normal(5, 4))
    before = {n: b.clone() for n, b in model.named_buffers()}
    jacobian = linearize(model, normal(5, 4))
    u = normal(5, 3)
    first = jacobian.vjp(u)
    with torch.no_grad():
        model.norm.running_mean.add_(1.0)  # training goes on
    second = jacobian.vjp(u)
    for n in first:
        assert torch.equal(first[n], second[n])
    assert torch.equal(model.norm.running_mean, before["norm.running_mean"] + 1.0)


class Frozen(nn.Module):
    """What ``freeze_batch_norm`` means, in words of autograd."""

    def __init__(self, first, norm, last):
        super().__init__()
        self.first, self.norm, self.last = first, norm, last

    def forward(self, x):
        h = self.first(x)
        over = [d for d in range(h.dim()) if d != 1]
        mean, var = h.detach().mean(over), h.detach().var(over, correction=0)
        h = F.batch_norm(h, mean, var, self.norm.weight, self.norm.bias, False, 0.0, self.norm.eps)
        return self.last(torch.tanh(h))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("whole", [False, True])
def test_frozen_batch_statistics(affine, whole):
    """Whether the model is recorded, or cannot be and goes by autograd as a whole."""
    first, last = randomized(nn.Linear(4, 4)), randomized(nn.Linear(4, 2))
    norm = randomized(nn.BatchNorm2d(3, affine=affine, eps=0.1))
    x = normal(5, 3, 2, 4)
    model = nn.Sequential(first, norm, nn.Tanh(), last, *([InPlace()] if whole else []))
    reference = Frozen(first, norm, last)
    params = {n: p.detach().clone() for n, p in reference.named_parameters()}
    names = dict(zip(params, dict(model.named_parameters()), strict=True))
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    jacobian = linearize(model, x, freeze_batch_norm=True)
    assert (jacobian.reason is not None) == whole and not jacobian.opaque
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    close(jacobian.outputs, copy.deepcopy(model)(x).detach(), 1e-12)
    v = tangents(params)
    expected_z, expected = jvp(lambda p: functional_call(reference, p, (x,)), (params,), (v,))
    close(jacobian.outputs, expected_z, 1e-12)
    close(jacobian.jvp({names[n]: t for n, t in v.items()}), expected, 1e-12)
    u = normal(*expected_z.shape, seed=9)
    found = jacobian.vjp(u)
    _, pull = vjp(lambda p: functional_call(reference, p, (x,)), params)
    for n, t in pull(u)[0].items():
        close(found[names[n]], t, 1e-12)
    differentiated = linearize(model, x).vjp(u)
    assert not torch.allclose(differentiated["0.weight"], found["0.weight"])


class InPlace(nn.Module):
    def forward(self, x):
        part = x[..., 0]
        x.add_(0.0)
        return x if part is not None else None


def test_frozen_batch_statistics_keep_examples_apart():
    model = nn.Sequential(randomized(nn.Linear(4, 3)), randomized(nn.BatchNorm1d(3)), nn.Tanh())
    x = normal(5, 4)
    jacobian = linearize(model, x, freeze_batch_norm=True)
    tape = jacobian._jacobian.tape
    dims = {var.slot: 0 for var in tape.data}
    for node in tape.all_nodes:
        dims[node.output] = node.batch_dim([None if s < 0 else dims.get(s) for s in node.slots], len(x))
    assert dims[tape.output_slot] == 0


def test_frozen_batch_statistics_of_layers_without_running_ones():
    """Which take those of the batch in eval mode, too; and layers in eval mode that have some keep them."""
    x = normal(5, 4)
    for norm in (nn.BatchNorm1d(3, track_running_stats=False).eval(), nn.BatchNorm1d(3, momentum=None).train()):
        model = nn.Sequential(randomized(nn.Linear(4, 3)), randomized(norm), nn.Tanh())
        reference = nn.Sequential(model[0], nn.BatchNorm1d(3).double().eval(), nn.Tanh())
        with torch.no_grad():
            h = model[0](x)
        statistics = {"running_mean": h.mean(0), "running_var": h.var(0, False)}
        reference[1].load_state_dict({**norm.state_dict(), **statistics}, strict=False)
        check_same(linearize(model, x, freeze_batch_norm=True), linearize(reference, x), 1e-12)
        check_same(linearize(reference, x, freeze_batch_norm=True), linearize(reference, x), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_batch_statistics_in_lower_precision(dtype):
    model = nn.Sequential(randomized(nn.Linear(4, 3)), randomized(nn.BatchNorm1d(3)), nn.Tanh()).to(dtype)
    x = normal(16, 4).to(dtype)
    jacobian = linearize(model, x, freeze_batch_norm=True)
    assert jacobian.reason is None
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    close(jacobian.outputs, model(x).detach(), 64 * torch.finfo(dtype).eps)
    assert any(not torch.equal(b, buffers[n]) for n, b in model.named_buffers())


def test_errors_of_the_functions_are_theirs():
    one = normal(1, 4)
    model = nn.Sequential(randomized(nn.Linear(4, 3)), randomized(nn.BatchNorm1d(3)))
    for freeze in (False, True):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            linearize(model, one, freeze_batch_norm=freeze)
    with pytest.raises(TypeError, match="freeze_batch_norm must be a bool; got 1"):
        linearize(model, one, freeze_batch_norm=1)
    single = nn.Sequential(randomized(nn.Linear(4, 1)), randomized(nn.GroupNorm(1, 1)))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        linearize(single, one)
    spatial = nn.Sequential(randomized(nn.Linear(4, 1)), nn.InstanceNorm1d(3))
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        linearize(spatial, normal(2, 3, 4))
    with pytest.raises(RuntimeError, match="normalized_shape"):
        linearize(nn.Sequential(randomized(nn.Linear(4, 4)), randomized(nn.LayerNorm(5))), one)
