"""Second derivatives of PyTorch's layers: right, or refused by a name with the way out."""

import pytest
import torch
import torch.nn.functional as F
from cases import leaf, normal
from helpers import run_python
from torch import nn
from torch.utils.checkpoint import checkpoint

from nestopt_ext import gradient_step, unrolled
from nestopt_ext.curvature import GaussNewton, Hessian, hvp
from nestopt_ext.games import game_jacobian

IMAGE, SEQUENCE, ROWS = normal(1, 2, 4, 6, 6), normal(2, 5, 2, 4), normal(3, 4, 3)
INDEX, OFFSETS = torch.tensor([0, 2, 2, 1, 4]), torch.tensor([0, 2])


def loss_of(layer, *inputs):
    """A loss that is not linear in what the layer returns, and mixes its elements."""
    result = layer(*inputs)
    result = (result[0] if isinstance(result, tuple) else result).reshape(-1)
    c = normal(7, *result.shape)
    return (c * result).sum() + 0.3 * (result * c.flip(0)).sum() ** 2 + 0.1 * (c * result**3).sum()


def compared(loss, params):
    """The product, and finite differences of the gradient."""
    v = [normal(20 + i, *p.shape) for i, p in enumerate(params)]

    def gradient(step):
        with torch.no_grad():
            for p, t in zip(params, v, strict=True):
                p.data.add_(t, alpha=step)
        grads = torch.autograd.grad(loss(), params)
        with torch.no_grad():
            for p, t in zip(params, v, strict=True):
                p.data.add_(t, alpha=-step)
        return torch.cat([g.reshape(-1) for g in grads])

    found = torch.cat([t.reshape(-1) for t in hvp(loss, params, v)])
    return found, (gradient(1e-6) - gradient(-1e-6)) / 2e-6


def two(layer):
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), layer)


POINTWISE = [
    *("ELU", "Hardswish", "Hardtanh", "LeakyReLU", "LogSigmoid", "PReLU", "ReLU6", "SELU", "CELU", "GELU", "Sigmoid"),
    *("SiLU", "Mish", "Softplus", "Softshrink", "Softsign", "Tanh", "Tanhshrink"),
]

LAYERS = {
    **{name: (getattr(nn, name)(), IMAGE) for name in POINTWISE},
    "GLU": (nn.GLU(1), IMAGE),
    "Softmax": (nn.Softmax(1), IMAGE),
    "LogSoftmax": (nn.LogSoftmax(1), IMAGE),
    "Conv2d": (nn.Conv2d(4, 4, 3, groups=2, padding=1, padding_mode="circular"), IMAGE),
    "ConvTranspose2d": (nn.ConvTranspose2d(4, 4, 3, stride=2), IMAGE),
    "MaxPool2d": (two(nn.MaxPool2d(2)), IMAGE),
    "AvgPool2d": (two(nn.AvgPool2d(2)), IMAGE),
    "AdaptiveMaxPool2d": (two(nn.AdaptiveMaxPool2d(3)), IMAGE),
    "AdaptiveAvgPool2d": (two(nn.AdaptiveAvgPool2d(3)), IMAGE),
    "BatchNorm2d": (two(nn.BatchNorm2d(4)), IMAGE),
    "BatchNorm2d, eval": (two(nn.BatchNorm2d(4)).eval(), IMAGE),
    "InstanceNorm2d": (two(nn.InstanceNorm2d(4, affine=True)), IMAGE),
    "GroupNorm": (two(nn.GroupNorm(2, 4)), IMAGE),
    "LayerNorm": (two(nn.LayerNorm(6)), IMAGE),
    "RMSNorm": (two(nn.RMSNorm(6)), IMAGE),
    "LocalResponseNorm": (two(nn.LocalResponseNorm(2)), IMAGE),
    "ReflectionPad2d": (two(nn.ReflectionPad2d(1)), IMAGE),
    "ReplicationPad2d": (two(nn.ReplicationPad2d(1)), IMAGE),
    "PixelShuffle": (two(nn.PixelShuffle(2)), IMAGE),
    "Upsample, bilinear": (two(nn.Upsample(scale_factor=1.7, mode="bilinear")), IMAGE),
    "Upsample, bicubic": (two(nn.Upsample(scale_factor=1.7, mode="bicubic")), IMAGE),
    "RNN": (nn.RNN(4, 3, 2, bidirectional=True), SEQUENCE),
    "LSTM": (nn.LSTM(4, 3, 2, bidirectional=True), SEQUENCE),
    "GRU": (nn.GRU(4, 3, 2, bidirectional=True), SEQUENCE),
    "LSTMCell": (nn.LSTMCell(3, 4), ROWS),
    "GRUCell": (nn.GRUCell(3, 4), ROWS),
    "MultiheadAttention": (nn.MultiheadAttention(4, 2), SEQUENCE, SEQUENCE, SEQUENCE),
    "Bilinear": (nn.Bilinear(3, 3, 2), ROWS, ROWS),
    "Embedding": (nn.Embedding(5, 3), INDEX),
    "weight_norm over all": (nn.utils.parametrizations.weight_norm(nn.Linear(3, 3), dim=-1), ROWS),
    "spectral_norm": (nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)).eval(), ROWS),
    "grid_sample": (
        lambda x: F.grid_sample(x, F.affine_grid(x[:, 0, :2, :3], (2, 4, 3, 3), False), align_corners=False),
        0.3 * IMAGE,
    ),
    "checkpoint": (lambda x: checkpoint(lambda t: (t @ t.T).tanh(), x, use_reentrant=False), ROWS),
    "cdist by matrix products": (
        lambda x: torch.cdist(x, x.flip(1) + 1, compute_mode="use_mm_for_euclid_dist"),
        ROWS,
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_differentiated_twice_as_finite_differences_say(name):
    layer, *inputs = LAYERS[name]
    inputs = [leaf(x) if x.is_floating_point() else x for x in inputs]
    params = [x for x in inputs if x.requires_grad]
    if isinstance(layer, nn.Module):
        params += [p for p in layer.double().parameters() if p.requires_grad]
    found, wanted = compared(lambda: loss_of(layer, *inputs), params)
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


W = leaf(normal(5, 5, 3))
REFUSED = {
    "attention": (
        lambda: F.scaled_dot_product_attention(*[W.repeat(1, 8).expand(1, 1, 5, 24)] * 3),
        r"a fused scaled-dot-product attention .*SDPBackend.MATH",
    ),
    "reentrant checkpoint": (
        lambda: checkpoint(torch.tanh, W, use_reentrant=True),
        "a reentrant checkpoint.* Pass use_reentrant=False",
    ),
    "weight_norm": (lambda: torch._weight_norm(W, W[:, :1].abs(), 0), r"torch's weight_norm.* g \* v / v.norm"),
    "once": (lambda: Once.apply(W), r"an autograd\.Function marked once_differentiable"),
    "sparse embedding": (
        lambda: F.embedding(INDEX, W, sparse=True),
        "an embedding with sparse gradients.* Make it with sparse=False",
    ),
    "embedding bag": (lambda: F.embedding_bag(INDEX, W, OFFSETS, mode="sum"), "an embedding bag.* Take the sum"),
    "ctc": (
        lambda: F.ctc_loss(W.unsqueeze(1).log_softmax(-1), torch.tensor([[1, 2]]), (5,), (2,)),
        "the CTC loss .*elementary operations",
    ),
    "cdist": (lambda: torch.cdist(W, W[:3]), "torch.cdist .*use_mm_for_euclid_dist"),
    "hardsigmoid": (lambda: F.hardsigmoid(W), r"hardsigmoid .*relu6\(x \+ 3\) / 6"),
    "multi-margin": (
        lambda: F.multi_margin_loss(W, torch.tensor([0, 2, 1, 1, 0])),
        "an operation without one",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_second_derivative_is_named_with_the_way_out(name):
    operation, message = REFUSED[name]
    with pytest.raises(RuntimeError, match=f"^hvp: loss must be twice differentiable; got {message}"):
        hvp(lambda: operation().pow(3).sum(), W, W.detach())


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda: F.silu(W), "without a forward-mode derivative .* Use mode='double-backward'"),
        (lambda: Once.apply(W), r"an autograd\.Function without a jvp"),
        (lambda: torch._weight_norm(W, W[:, :1].abs(), 0), "torch's weight_norm"),
    ],
)
def test_forward_mode_names_its_own_limits(operation, message):
    with pytest.raises(RuntimeError, match=f"^hvp: loss must be twice differentiable; got .*{message}"):
        hvp(lambda: operation().pow(3).sum(), W, W.detach(), mode="forward-over-reverse")


# ---- weight_norm: PyTorch's second derivative is wrong, and not refused ---------------------------------------------


class Normed(nn.Module):
    """The way out that the message names."""

    def forward(self, g, v):
        return g * v / v.norm(dim=1, keepdim=True)

    def right_inverse(self, weight):
        return weight.norm(dim=1, keepdim=True), weight


def test_weight_norm_is_wrong_in_pytorch():
    """When this fails, PyTorch is right at last, and the refusal can go."""
    v, g = leaf(normal(8, 3, 4)), leaf(normal(9, 3, 1))
    assert not torch.autograd.gradgradcheck(lambda v, g: torch._weight_norm(v, g, 0), (v, g), raise_exception=False)


def test_the_way_out_of_weight_norm_is_right():
    layer = nn.Linear(3, 3).double()
    nn.utils.parametrize.register_parametrization(layer, "weight", Normed())
    found, wanted = compared(lambda: loss_of(layer, ROWS), list(layer.parameters()))
    assert (found - wanted).norm() < 1e-6 * wanted.norm()


def test_weight_norm_is_refused_only_where_it_is_wrong():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3).double())
    scale = layer.parametrizations.weight.original0
    direction = layer.parametrizations.weight.original1
    loss = loss_of(layer, ROWS)
    found, wanted = compared(lambda: loss_of(layer, ROWS), [scale, layer.bias])
    assert (found - wanted).norm() < 1e-6 * wanted.norm()
    hessian = Hessian(loss, [scale, direction])
    with pytest.raises(RuntimeError, match="Hessian: loss must be twice differentiable; got torch's weight_norm"):
        hessian([torch.ones_like(scale), torch.ones_like(direction)])
    with pytest.raises(RuntimeError, match="got torch's weight_norm"):
        hessian.dense()


def test_gauss_newton_through_weight_norm_is_right_and_not_refused():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2).double())
    params = dict(layer.named_parameters())
    targets = normal(11, 4, 2)
    found = GaussNewton(layer, nn.MSELoss(), ROWS, targets, params).dense()

    def outputs(*flat):
        return torch.func.functional_call(layer, dict(zip(params, flat, strict=True)), (ROWS,)).reshape(-1)

    rows = torch.autograd.functional.jacobian(outputs, tuple(params.values()))
    jacobian = torch.cat([j.reshape(8, -1) for j in rows], dim=1)
    torch.testing.assert_close(found, 2 * jacobian.T @ jacobian / 8)


# ---- wrappers -------------------------------------------------------------------------------------------------------

_WRAPPED = """
import os, tempfile, torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from nestopt_ext.curvature import hvp
store = tempfile.mktemp()
dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), torch.ones(5, 3)
params = list(net.parameters())
v = [torch.ones_like(p) for p in params]
plain = hvp(lambda: net(x).pow(2).mean(), params, v)
ddp = nn.parallel.DistributedDataParallel(net)
for loss in (lambda: ddp(x).pow(2).mean(), ddp(x).pow(2).mean()):
    assert all(map(torch.equal, plain, hvp(loss, params, v)))
sharded = fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
params = list(sharded.parameters())
try:
    hvp(lambda: sharded(x).pow(2).mean(), params, params)
except TypeError as error:
    print(error)
dist.destroy_process_group()
"""


def test_ddp_works_and_fsdp_is_refused_with_the_reason():
    done = run_python(_WRAPPED)
    assert done.returncode == 0, done.stderr
    assert "hvp: params[0] must be a plain tensor; got a DTensor." in done.stdout
    assert "DistributedDataParallel" in done.stdout


def test_compiled_modules_work_from_closures_or_are_named():
    linear = nn.Linear(3, 2).double()
    compiled = torch.compile(linear, backend="aot_eager")
    v = [torch.ones_like(p) for p in linear.parameters()]
    wanted = hvp(lambda: linear(ROWS).pow(3).sum(), list(linear.parameters()), v)
    try:
        found = hvp(lambda: compiled(ROWS).pow(3).sum(), list(linear.parameters()), v)
    except RuntimeError as error:
        assert "a module compiled by torch.compile" in str(error)
    else:
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b)


def test_unrolling_and_games_refuse_a_wrong_second_derivative_too():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2).double())
    names, params = zip(*layer.named_parameters(), strict=True)
    h = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def inner(w, h):
        outputs = torch.func.functional_call(layer, dict(zip(names, w, strict=True)), (ROWS,))
        return outputs.square().sum() * h.exp()

    step = gradient_step(inner, 0.1)
    with pytest.raises(RuntimeError, match="weight_norm"):
        unrolled(step, params, h, num_steps=1)
    loss = layer(ROWS).square().sum()
    with pytest.raises(RuntimeError, match="weight_norm"):
        game_jacobian([loss], [list(params)])
