"""Response layers against their definition, the plain layer, forward AD and the double-backward construction."""

import copy
import math
import pickle
from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from nestopt_ext import response
from nestopt_ext.response import HyperParameters, Sample, StnModel, using_sample

N = 3  # hyperparameters
B = 4  # examples
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}

#: Name of the torch layer, its arguments, shape of its input, dimension of its examples.
CASES = {
    "linear": ("Linear", (5, 4), {}, (B, 5), 0),
    "linear-no-bias": ("Linear", (5, 4), {"bias": False}, (B, 5), 0),
    "linear-positions": ("Linear", (5, 4), {}, (B, 2, 5), 0),
    "linear-time-first": ("Linear", (5, 4), {}, (2, B, 5), 1),
    "conv1d": ("Conv1d", (2, 3, 3), {"padding": 1}, (B, 2, 6), 0),
    "conv2d": ("Conv2d", (2, 3, 3), {}, (B, 2, 5, 4), 0),
    "conv2d-no-bias": ("Conv2d", (2, 3, 3), {"bias": False}, (B, 2, 5, 4), 0),
    "conv2d-strides": ("Conv2d", (2, 3, (3, 2)), {"stride": (2, 1), "dilation": 2, "padding": 2}, (B, 2, 6, 5), 0),
    "conv2d-groups": ("Conv2d", (4, 6, 3), {"groups": 2}, (B, 4, 5, 4), 0),
    "conv2d-depthwise": ("Conv2d", (3, 3, 3), {"groups": 3, "bias": False}, (B, 3, 5, 4), 0),
    "conv2d-reflect": ("Conv2d", (2, 3, 3), {"padding": 1, "padding_mode": "reflect"}, (B, 2, 5, 4), 0),
    "conv2d-circular": ("Conv2d", (2, 3, 3), {"padding": 1, "padding_mode": "circular"}, (B, 2, 5, 4), 0),
    "conv2d-same": ("Conv2d", (2, 3, 3), {"padding": "same"}, (B, 2, 5, 4), 0),
    "conv3d": ("Conv3d", (2, 3, 2), {}, (B, 2, 3, 4, 3), 0),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
each_number_of_rows = pytest.mark.parametrize(
    ("dtype", "rows"), [(torch.float64, B), (torch.float64, 1), (torch.float32, B)], ids=str
)


def make(case, dtype=torch.float64, prefix="Stn"):
    """A response layer and an input for it; the response of a Delta layer is made to differ from zero."""
    name, args, options, shape, batch_dim = case
    layer = getattr(response, prefix + name)(*args, **options, dtype=dtype, num_hparams=N, batch_dim=batch_dim)
    with torch.no_grad():
        layer.gate_weight.normal_()
    return layer, torch.randn(shape, dtype=dtype)


def defined(case, params, x, h):
    """The output example by example, through torch's layer with the weights W + diag(U_w h) V and b + (U_b h) * c."""
    name, args, options, _, batch_dim = case
    plain = getattr(nn, name)(*args, **options, dtype=x.dtype)
    out = len(params["weight"])
    outputs = []
    for x_b, h_b in zip(x.unbind(batch_dim), h.expand(B, N), strict=True):
        gates = params["gate_weight"] @ h_b
        w = params["weight"]
        at = {"weight": w + gates[:out].reshape(-1, *[1] * (w.dim() - 1)) * params["response_weight"]}
        if "bias" in params:
            at["bias"] = params["bias"] + gates[out:] * params["response_bias"]
        outputs.append(functional_call(plain, at, (x_b.unsqueeze(0),)).squeeze(0))
    return torch.stack(outputs, batch_dim)


def with_gradients(outputs, sources):
    """Outputs, and the gradients of a fixed random combination of all their elements."""
    torch.manual_seed(1)
    total = sum((torch.randn_like(y) * y).sum() for y in outputs)
    found = torch.autograd.grad(total, sources, allow_unused=True)
    return [*outputs, *[torch.zeros_like(s) if g is None else g for s, g in zip(sources, found, strict=True)]]


def assert_close(found, wanted, dtype):
    for f, w in zip(found, wanted, strict=True):
        assert f.shape == w.shape and f.dtype == w.dtype
        torch.testing.assert_close(f, w, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * (1 + w.abs().max().item()))


def by_double_backward(f, tangents):
    """f(0) and its derivative along ``tangents`` by two backward passes, both with a graph."""
    zeros = [torch.zeros_like(t, requires_grad=True) for t in tangents]
    y = f(*zeros)
    v = torch.zeros_like(y, requires_grad=True)
    pulled = torch.autograd.grad(y, zeros, v, create_graph=True)
    return y, torch.autograd.grad(pulled, v, tangents, create_graph=True)[0]


# ---- one layer ------------------------------------------------------------------------------------------------------


@each_number_of_rows
@each_case
def test_output_and_gradients_are_those_of_the_definition(case, dtype, rows):
    layer, x = make(case, dtype)
    h = torch.randn(rows, N, dtype=dtype, requires_grad=True)
    x.requires_grad_()
    sources = [x, h, *layer.parameters()]
    found = with_gradients([layer(x, h)], sources)
    wanted = with_gradients([defined(case, dict(layer.named_parameters()), x, h)], sources)
    assert_close(found, wanted, dtype)


@each_case
def test_one_stacked_product_gives_what_two_give(case):
    layer, x = make(case)
    h = torch.randn(B, N, dtype=x.dtype, requires_grad=True)
    sources = [x.requires_grad_(), h, *layer.parameters()]
    two = with_gradients([layer(x, h)], sources)
    assert layer.stacked is (False if getattr(layer, "groups", 1) > 1 else None)
    layer.stacked = layer.stacked is None
    assert_close(with_gradients([layer(x, h)], sources), two, x.dtype)


@each_case
def test_a_vector_is_one_row_and_the_sample_is_as_good_as_the_argument(case):
    layer, x = make(case)
    h = torch.randn(B, N, dtype=x.dtype)
    torch.testing.assert_close(layer(x, h[0]), layer(x, h[:1]), rtol=0, atol=0)
    with using_sample(Sample(h, {})):
        torch.testing.assert_close(layer(x), layer(x, h), rtol=0, atol=0)
        torch.testing.assert_close(layer(x, h[:1]), layer(x, h[0]), rtol=0, atol=0)  # the argument goes first


@each_case
@pytest.mark.parametrize("prefix", ["Stn", "DeltaStn"])
def test_without_a_response_it_is_the_plain_layer(case, prefix):
    layer, x = make(case, prefix=prefix)
    name, args, options, _, _ = case
    plain = getattr(nn, name)(*args, **options, dtype=x.dtype)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if k in plain.state_dict()})
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=0)
    for rows in (1, B):
        torch.testing.assert_close(layer(x, x.new_zeros(rows, N)), plain(x))
    with using_sample(Sample(None, {}, linearized=True)):
        torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=0)


def test_a_new_delta_layer_is_the_plain_layer_everywhere_and_a_new_stn_layer_is_not():
    h = torch.randn(B, N)
    for name, args, options, shape, batch_dim in CASES.values():
        x = torch.randn(shape)
        options = dict(options, num_hparams=N, batch_dim=batch_dim)
        delta, stn = (getattr(response, prefix + name)(*args, **options) for prefix in ("DeltaStn", "Stn"))
        torch.testing.assert_close(delta(x, h), delta(x))
        assert (stn(x, h) - stn(x)).abs().max() > 0


@each_number_of_rows
@each_case
@pytest.mark.parametrize("moves", [True, False], ids=["input-moves", "input-fixed"])
def test_linearized_is_the_jvp_in_input_and_gate_input(case, dtype, rows, moves):
    layer, x = make(case, dtype, "DeltaStn")
    h, dx = torch.randn(rows, N, dtype=dtype, requires_grad=True), torch.randn_like(x, requires_grad=True)
    sources = [x.requires_grad_(), h, *layer.parameters(), *([dx] if moves else [])]

    def at(h, x=x):
        return layer(x, h)

    with forward_ad.dual_level(), using_sample(Sample(h, {}, linearized=True)):
        y = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, dx) if moves else x))
        found = with_gradients([y.primal, y.tangent], sources)
    zero = torch.zeros_like(h)
    forward = jvp(at, (zero, x), (h, dx)) if moves else jvp(at, (zero,), (h,))
    assert_close(found, with_gradients(forward, sources), dtype)
    backward = by_double_backward(lambda h, *dx: at(h, *(x + d for d in dx)), [h, dx] if moves else [h])
    assert_close(found, with_gradients(backward, sources), dtype)


@each_case
def test_without_gate_input_the_linearized_layer_still_carries_the_tangent_of_its_input(case):
    layer, x = make(case)
    dx = torch.randn_like(x)
    with forward_ad.dual_level(), using_sample(Sample(None, {}, linearized=True)):
        y = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, dx)))
    torch.testing.assert_close((y.primal, y.tangent), jvp(layer, (x,), (dx,)))


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv2d-groups"])
@pytest.mark.parametrize("linearized", [False, True])
def test_twice_differentiable(name, linearized):
    layer, x = make(CASES[name])
    names, values = zip(*layer.named_parameters(), strict=True)
    x = x[:2].requires_grad_()
    h = torch.randn(2, N, dtype=x.dtype, requires_grad=True)

    def call(x, h, *values):
        params = dict(zip(names, values, strict=True))
        if not linearized:
            return functional_call(layer, params, (x, h))
        with forward_ad.dual_level(), using_sample(Sample(h, {}, linearized=True)):
            return sum(forward_ad.unpack_dual(functional_call(layer, params, (x,))))

    assert torch.autograd.gradcheck(call, (x, h, *values), check_forward_ad=not linearized, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, h, *values), fast_mode=True)


# ---- networks -------------------------------------------------------------------------------------------------------


def mlp(prefix, dtype):
    linear = partial(getattr(response, f"{prefix}Linear"), num_hparams=N, dtype=dtype)
    return nn.Sequential(linear(5, 7), nn.ReLU(), linear(7, 6), nn.Tanh(), linear(6, 3)), torch.randn(B, 5, dtype=dtype)


def cnn(prefix, dtype):
    conv = partial(getattr(response, f"{prefix}Conv2d"), num_hparams=N, dtype=dtype)
    linear = partial(getattr(response, f"{prefix}Linear"), num_hparams=N, dtype=dtype)
    return nn.Sequential(
        conv(2, 4, 3, padding=1),
        nn.BatchNorm2d(4, dtype=dtype, track_running_stats=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        conv(4, 4, 3, groups=2, bias=False),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        linear(4, 3),
    ), torch.randn(B, 2, 8, 8, dtype=dtype)


@each_dtype
@pytest.mark.parametrize("network", [mlp, cnn])
def test_a_linearized_network_is_its_first_order_expansion_in_the_gate_input(network, dtype):
    module, x = network("DeltaStn", dtype)
    hparams = HyperParameters(dtype=dtype)
    for i in range(N):
        hparams.add(f"h{i}", 0.3)
    model = StnModel(module, hparams, centred=True)
    with torch.no_grad():
        for layer in module:
            if hasattr(layer, "gate_weight"):
                layer.gate_weight.normal_()
    h0 = hparams.unconstrained.detach()
    h = torch.randn(B, N, dtype=dtype)

    def at(shift):
        with using_sample(Sample(shift, {})):
            return module(x)

    # torch's forward AD of batch norm takes mean and deviation for constants where the input needs a gradient.
    sources = list(module.parameters() if network is mlp else model.response_parameters())
    for p in model.general_parameters():
        p.requires_grad_(network is mlp)
    with model.at(h0 + h, linearized=True):
        found = with_gradients([model(x)], sources)
    assert_close(found, with_gradients([sum(jvp(at, (torch.zeros_like(h),), (h,)))], sources), dtype)
    assert_close(found, with_gradients([sum(by_double_backward(at, [h]))], sources), dtype)


class Products(TorchDispatchMode):
    """Counts matrix products and convolutions."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name == "convolution_backward":
            self.count += sum(args[-1][:2])  # gradients of input and weight are a convolution each
        elif name in ("mm", "addmm", "convolution"):
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("network", [mlp, cnn])
def test_the_response_step_takes_five_products_a_layer_and_three_in_the_first(network):
    module, x = network("DeltaStn", torch.float64)
    layers = [layer for layer in module if hasattr(layer, "gate_weight")]
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("response" in name)
    with Products() as products:
        with forward_ad.dual_level(), using_sample(Sample(torch.randn(B, N, dtype=x.dtype), {}, linearized=True)):
            primal, tangent = forward_ad.unpack_dual(module(x))
        assert not primal.requires_grad
        tangent.sum().backward()
    assert products.count - len(layers) == 5 * len(layers) - 2  # besides the gates, U h


# ---- what torch's layers do, these do -------------------------------------------------------------------------------


@each_case
def test_copies_pickles_and_state_dicts_keep_everything(case):
    layer, x = make(case)
    h = torch.randn(B, N, dtype=x.dtype)
    other, _ = make(case)
    other.load_state_dict(layer.state_dict())
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        torch.testing.assert_close(copied(x, h), layer(x, h), rtol=0, atol=0)
    assert layer.to(torch.float32)(x.float(), h.float()).dtype == torch.float32


@each_case
def test_weights_of_the_plain_layer_load_and_only_the_response_is_missing(case):
    layer, _ = make(case)
    name, args, options, _, _ = case
    plain = getattr(nn, name)(*args, **options, dtype=torch.float64)
    found = layer.load_state_dict(plain.state_dict(), strict=False)
    assert found.unexpected_keys == []
    assert set(found.missing_keys) == {k for k, _ in layer.named_parameters() if k.startswith(("response_", "gate_"))}
    assert [id(p) for p in layer.response_parameters()] == [
        id(p) for k, p in layer.named_parameters() if k in found.missing_keys
    ]


@each_case
@pytest.mark.parametrize("rows", [B, 1])
def test_vmap_over_networks_and_over_gate_inputs(case, rows):
    layer, x = make(case)
    h = torch.randn(2, rows, N, dtype=x.dtype)
    wanted = torch.stack([layer(x, h_i) for h_i in h])
    torch.testing.assert_close(vmap(layer, in_dims=(None, 0))(x, h), wanted)
    other, _ = make(case)
    stacked, _ = torch.func.stack_module_state([layer, other])
    found = vmap(lambda params, h: functional_call(layer, params, (x, h)))(stacked, h)
    torch.testing.assert_close(found, torch.stack([layer(x, h[0]), other(x, h[1])]))


@each_case
def test_under_autocast_outputs_have_the_dtype_of_the_plain_layer(case):
    layer, x = make(case, torch.float32)
    dx = torch.randn_like(x)
    for h in (None, torch.randn(1, N), torch.randn(B, N)):
        exact = layer(x, h)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x, h)
            with forward_ad.dual_level(), using_sample(Sample(h, {}, linearized=True)):
                dual = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, dx)))
        assert y.dtype == dual.primal.dtype == dual.tangent.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), exact, rtol=0, atol=0.1 * exact.abs().max().item())


@pytest.mark.parametrize("rows", [None, 1, B])
def test_channels_last_stays(rows):
    layer, x = make(CASES["conv2d-strides"])
    x = x.to(memory_format=torch.channels_last)
    layer.to(memory_format=torch.channels_last)
    h = None if rows is None else torch.randn(rows, N, dtype=x.dtype)
    y = layer(x, h)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, layer(x.contiguous(), h))


@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d", "conv3d"])
def test_one_example_without_a_dimension_for_it(name):
    layer, x = make(CASES[name])
    h = torch.randn(N, dtype=x.dtype)
    torch.testing.assert_close(layer(x[0]), layer(x)[0])
    torch.testing.assert_close(layer(x[0], h), layer(x, h)[0])
    with forward_ad.dual_level(), using_sample(Sample(h[None], {}, linearized=True)):
        y = forward_ad.unpack_dual(layer(x[0]))
    torch.testing.assert_close(y.tangent, layer(x[0], h) - layer(x[0]))
    with pytest.raises(ValueError, match=r"must have shape \(3,\), \(1, 3\); got \(4, 3\)"):
        layer(x[0], torch.randn(B, N, dtype=x.dtype))


def test_one_word_without_a_dimension_for_examples():
    for layer, words in (embedding(), embedding(batch_dim=1)):
        word, h = words[0, 0] if layer.batch_dim == 0 else words[:, 0], torch.randn(N, dtype=torch.float64)
        wanted = F.embedding(word, next(layer.responses()).at(h))
        torch.testing.assert_close(layer(word, h), wanted)
        with forward_ad.dual_level(), using_sample(Sample(h[None], {}, linearized=True)):
            torch.testing.assert_close(sum(forward_ad.unpack_dual(layer(word))), wanted)


@pytest.mark.parametrize("name", ["linear", "conv2d", "linear-time-first"])
def test_an_empty_batch(name):
    layer, x = make(CASES[name])
    x = x.narrow(CASES[name][-1], 0, 0)
    assert layer(x, x.new_empty(0, N)).shape == layer(x).shape


def test_reset_draws_everything_as_torch_draws_weights():
    layer = response.StnConv2d(4, 300, 3, num_hparams=N)
    before = copy.deepcopy(layer.state_dict())
    layer.reset_parameters()
    bound = 1 / math.sqrt(36)
    for name, value in layer.state_dict().items():
        assert not torch.equal(value, before[name])
        if name != "gate_weight":
            assert bound * 0.95 < value.abs().max() <= bound
    assert 0.009 < layer.gate_weight.std() < 0.011
    delta = response.DeltaStnConv2d(4, 300, 3, num_hparams=N)
    assert torch.equal(delta.gate_weight, torch.zeros(600, N))


def test_responses_give_the_plain_parameters_at_a_gate_input():
    layer, x = make(CASES["conv2d"])
    h = torch.randn(N, dtype=x.dtype)
    at = {r.name: r.at(h) for r in layer.responses()}
    torch.testing.assert_close(F.conv2d(x, at["weight"], at["bias"]), layer(x, h))


def test_the_layers_say_how_many_hyperparameters_they_have():
    assert repr(response.StnLinear(2, 3, num_hparams=N)) == (
        "StnLinear(in_features=2, out_features=3, bias=True, num_hparams=3)"
    )
    assert "num_hparams=3" in repr(response.DeltaStnConv1d(2, 3, 1, num_hparams=N))


# ---- embeddings -----------------------------------------------------------------------------------------------------

V, D = 6, 4  # words, columns


def embedding(dtype=torch.float64, prefix="Stn", **options):
    layer = getattr(response, f"{prefix}Embedding")(V, D, dtype=dtype, num_hparams=N, **options)
    with torch.no_grad():
        layer.gate_weight.normal_()
    shape = (B, 5) if layer.batch_dim == 0 else (5, B)
    return layer, torch.randint(V, shape)


@each_dtype
@pytest.mark.parametrize("rows", [B, 1])
@pytest.mark.parametrize("options", [{}, {"batch_dim": 1}, {"padding_idx": 2}, {"scale_grad_by_freq": True}], ids=str)
def test_embeddings_are_those_of_the_definition(options, dtype, rows):
    layer, x = embedding(dtype, **options)
    h = torch.randn(rows, N, dtype=dtype, requires_grad=True)
    gates = (h @ layer.gate_weight.t()).expand(B, D).unsqueeze(1 - layer.batch_dim)
    table = {k: v for k, v in options.items() if k != "batch_dim"}
    tables = [F.embedding(x, w, **table) for w in (layer.weight, layer.response_weight)]
    sources = [h, *layer.parameters()]
    wanted = with_gradients([tables[0] + gates * tables[1]], sources)
    assert_close(with_gradients([layer(x, h)], sources), wanted, dtype)
    assert_close([layer(x)], [tables[0]], dtype)
    at = [next(layer.responses()).at(h_b) for h_b in h.expand(B, N)]
    one_by_one = [F.embedding(x_b, w) for x_b, w in zip(x.unbind(layer.batch_dim), at, strict=True)]
    assert_close([layer(x, h)], [torch.stack(one_by_one, layer.batch_dim)], dtype)


def test_the_linearized_embedding_is_its_jvp_in_the_gate_input():
    layer, x = embedding(prefix="DeltaStn", padding_idx=1)
    h = torch.randn(B, N, dtype=torch.float64, requires_grad=True)
    sources = [h, *layer.parameters()]
    with forward_ad.dual_level(), using_sample(Sample(h, {}, linearized=True)):
        found = with_gradients(forward_ad.unpack_dual(layer(x)), sources)
    wanted = jvp(lambda h: layer(x, h), (torch.zeros_like(h),), (h,))
    assert_close(found, with_gradients(wanted, sources), torch.float64)
    with forward_ad.dual_level(), using_sample(Sample(None, {}, linearized=True)):
        assert forward_ad.unpack_dual(layer(x)).tangent is None


def test_an_embedding_is_twice_differentiable():
    layer, x = embedding()
    h = torch.randn(B, N, dtype=torch.float64, requires_grad=True)

    def call(h, weight, direction, gates):
        params = {"weight": weight, "response_weight": direction, "gate_weight": gates}
        return functional_call(layer, params, (x, h))

    inputs = (h, layer.weight, layer.response_weight, layer.gate_weight)
    assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("batch_dim", [0, 1])
def test_words_are_dropped_everywhere_from_both_tables_at_the_rate_of_the_example(batch_dim):
    layer = response.StnEmbedding(2000, 1, num_hparams=1, batch_dim=batch_dim, word_dropout="rate")
    words = torch.arange(2000).repeat(2)
    x = torch.stack([words, words, words], batch_dim)
    rates = torch.tensor([0.0, 0.25, 0.8])
    h = torch.randn(3, 1)
    whole = layer.eval()(x, h)
    with using_sample(Sample(h, {"rate": rates})):
        assert torch.equal(layer(x), whole)
        dropped = layer.train()(x)
    ratio = (dropped / whole).squeeze(-1).movedim(batch_dim, 0).unflatten(1, (2, 2000))
    for b, rate in enumerate(rates.tolist()):
        first, again = ratio[b]
        assert torch.equal(first, again)  # the same word, at another place
        kept = first > 0
        torch.testing.assert_close(first[kept], torch.full_like(first[kept], 1 / (1 - rate)))
        assert abs(kept.float().mean() - (1 - rate)) < 0.04
    assert not (dropped.movedim(batch_dim, 0)[2] != 0)[(dropped.movedim(batch_dim, 0)[1] == 0)].any()


def test_the_linearized_embedding_drops_the_same_words_from_primal_and_tangent():
    layer, x = embedding(prefix="DeltaStn", word_dropout="rate")
    h = torch.randn(B, N, dtype=torch.float64)
    values = {"rate": torch.tensor([0.5], dtype=torch.float64)}
    with forward_ad.dual_level(), using_sample(Sample(h, values, linearized=True)):
        primal, tangent = forward_ad.unpack_dual(layer(x))
    dropped = primal == 0
    assert dropped.any() and not dropped.all() and torch.equal(dropped, tangent == 0)


def test_a_rate_of_one_drops_all_words_and_a_rate_outside_shows():
    layer, x = embedding(word_dropout="rate")
    with using_sample(Sample(None, {"rate": torch.tensor([1.0, 0.0, 1.5, -0.5])})):
        y = layer(x)
    assert not y[0].any() and torch.equal(y[1], layer.eval()(x)[1]) and y[2:].isnan().all()
    assert layer(x[0]).shape == (5, D)


def test_words_of_an_embedding_need_a_rate_to_be_dropped():
    layer, x = embedding(word_dropout="rate")
    with pytest.raises(RuntimeError, match="StnEmbedding: must be called with a sample"):
        layer(x)
    with using_sample(Sample(None, {"other": torch.zeros(1)})), pytest.raises(KeyError, match="rate"):
        layer(x)
    for shape in ((1, 2), (B + 1,)):
        with (
            using_sample(Sample(None, {"rate": torch.zeros(shape)})),
            pytest.raises(ValueError, match=r"'rate' must be one num"),
        ):
            layer(x)


def test_an_embedding_starts_copies_and_prints_like_the_others():
    layer, x = embedding(padding_idx=3)
    h = torch.randn(B, N, dtype=torch.float64)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(copied(x, h), layer(x, h), rtol=0, atol=0)
    layer.reset_parameters()
    assert not layer.response_weight[3].any() and layer.response_weight[:3].all()
    delta = response.DeltaStnEmbedding(V, D, num_hparams=N)
    torch.testing.assert_close(delta(x, h.float()), delta(x), rtol=0, atol=0)
    assert repr(delta) == "DeltaStnEmbedding(6, 4, num_hparams=3)"
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x, h).dtype == layer(x).dtype
    with pytest.raises(ValueError, match=r"StnEmbedding: gate_input must have shape .* or \(4, 3\); got \(5, 3\)"):
        layer(x, torch.zeros(5, N))


def test_a_decoder_may_be_tied_to_the_table_at_the_centre():
    layer, x = embedding(torch.float32)
    decoder = response.StnLinear(D, V, num_hparams=N)
    decoder.weight = layer.weight
    h = torch.randn(B, N)
    decoder(layer(x, h), h).sum().backward()
    assert layer.weight.grad is decoder.weight.grad is not None
    assert not torch.equal(decoder.response_weight, layer.response_weight)


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (2,), (1, 2), (B, 2), (B + 1, N), (B, 1, N)])
def test_a_gate_input_of_a_wrong_shape_is_refused(shape):
    layer = response.StnLinear(5, 4, num_hparams=N)
    wanted = r"StnLinear: gate_input must have shape \(3,\), \(1, 3\) or \(4, 3\); got "
    for call in (lambda x, h: layer(x, h), lambda x, h: _in_sample(layer, x, h)):
        with pytest.raises(ValueError, match=wanted) as caught:
            call(torch.randn(B, 5), torch.zeros(shape))
        assert str(shape) in str(caught.value) and "num_hparams=3" in str(caught.value)


def _in_sample(layer, x, h):
    with using_sample(Sample(h, {})):
        return layer(x)


def test_rows_are_counted_along_the_batch_dimension():
    layer = response.DeltaStnLinear(5, 4, num_hparams=N, batch_dim=1)
    with pytest.raises(ValueError, match=r"or \(2, 3\); got \(4, 3\).*dimension 1 of the input"):
        layer(torch.randn(B, 2, 5), torch.zeros(B, N))


def test_constructors_refuse_what_makes_no_layer():
    with pytest.raises(ValueError, match="StnLinear: num_hparams must be at least 1; got 0"):
        response.StnLinear(2, 3, num_hparams=0)
    with pytest.raises(ValueError, match="DeltaStnLinear: batch_dim must be at least 0; got -1"):
        response.DeltaStnLinear(2, 3, num_hparams=1, batch_dim=-1)
    with pytest.raises(ValueError, match="StnConv1d: batch_dim must be 0; got 1"):
        response.StnConv1d(2, 3, 1, num_hparams=1, batch_dim=1)
