"""Rules of a recording: attention, by the formula that its fused kernels compute."""

import pytest
import torch
import torch.nn.functional as F
from rules import Wrapped, check_example_gradients, check_rule
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nestopt_ext.curvature import linearize

F64 = torch.float64
#: What layers of a transformer need besides.
INF = float("inf")


def normal(*shape, seed=3):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _twice_differentiable():
    """What the rules are compared with must be."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with sdpa_kernel(SDPBackend.MATH):
        yield
    torch.backends.mha.set_fastpath_enabled(fast)


def seeded(make):
    torch.manual_seed(0)
    return make().double()


def lower(rows, columns):
    return torch.ones(rows, columns, dtype=torch.bool).tril()


SDPA = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "bool mask": {"attn_mask": lower(4, 4)},
    "mask of nothing seen": {"attn_mask": lower(4, 4) & (torch.arange(4) > 0).unsqueeze(1)},
    "float mask": {"attn_mask": normal(4, 4)},
    "infinite mask": {"attn_mask": torch.zeros(4, 4, dtype=F64).masked_fill(~lower(4, 4), -INF)},
    "mask for each head": {"attn_mask": normal(2, 4, 4)},
}


@pytest.mark.parametrize("name", SDPA)
def test_scaled_dot_product_attention(name):
    def f(x, w):
        q, k, v = F.linear(x, w).view(5, 4, 3, 2, 3).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, **SDPA[name]).transpose(1, 2).flatten(2)

    check_rule(Wrapped(f, normal(18, 6)), normal(5, 4, 6))
    check_example_gradients(Wrapped(f, normal(18, 6)), normal(5, 4, 6))


def test_groups_of_queries_for_one_key():
    def f(x, w, k):
        q = F.linear(x, w).view(5, 4, 4, 3).transpose(1, 2)
        key, value = F.linear(x, k).view(5, 4, 2, 2, 3).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, key, value, enable_gqa=True)

    check_rule(Wrapped(f, normal(12, 6), normal(12, 6, seed=4)), normal(5, 4, 6))
    check_example_gradients(Wrapped(f, normal(12, 6), normal(12, 6, seed=4)), normal(5, 4, 6))


def test_a_bias_that_is_learned_and_other_lengths():
    def f(x, w, k, bias):
        return F.scaled_dot_product_attention(F.linear(x, w), F.linear(x[:, 1:], k), x[:, 1:], attn_mask=bias)

    params = normal(6, 6), normal(6, 6, seed=4), normal(4, 3)
    check_rule(Wrapped(f, *params), normal(5, 4, 6))
    check_example_gradients(Wrapped(f, *params), normal(5, 4, 6))


class Attends(nn.Module):
    """nn.MultiheadAttention of [B, T, 6], with masks made of the inputs or constant."""

    def __init__(self, call, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, **options)
        for name, p in self.attention.named_parameters():
            if "bias" in name:
                nn.init.normal_(p)
        self.call = call

    def forward(self, x):
        return self.call(self.attention, x)


def padded(x):
    """Which keys may not be seen: never the first."""
    return (x[..., 0] > 0.5) & (torch.arange(x.shape[-2]) > 0)


FORMS = {
    "of itself": (lambda a, x: a(x, x, x)[0], {}),
    "without weights": (lambda a, x: a(x, x, x, need_weights=False)[0], {}),
    "the weights": (lambda a, x: a(x, x, x)[1], {}),
    "the weights of each head": (lambda a, x: a(x, x, x, average_attn_weights=False)[1], {}),
    "without bias": (lambda a, x: a(x, x, x)[0], {"bias": False}),
    "of others": (lambda a, x: a(x[:, :2], x * 2, x * 2)[0], {}),
    "of three": (lambda a, x: a(x, x * 2, x * x)[0], {}),
    "of other widths": (lambda a, x: a(x, x[..., :3], x[..., :4])[0], {"kdim": 3, "vdim": 4}),
    "with padding": (lambda a, x: a(x, x, x, key_padding_mask=padded(x))[0], {}),
    "with padding, without weights": (
        lambda a, x: a(x, x, x, key_padding_mask=padded(x), need_weights=False)[0],
        {},
    ),
    "with a mask": (lambda a, x: a(x, x, x, attn_mask=~lower(4, 4))[0], {}),
    "with a mask that is added": (lambda a, x: a(x, x, x, attn_mask=normal(4, 4), need_weights=False)[0], {}),
    "with a mask for each head": (
        lambda a, x: a(x, x, x, attn_mask=normal(2 * len(x), 4, 4))[0],
        {},
    ),
    "with both masks": (
        lambda a, x: a(x, x, x, attn_mask=~lower(4, 4), key_padding_mask=padded(x), need_weights=False)[0],
        {},
    ),
    "causal": (
        lambda a, x: a(x, x, x, attn_mask=~lower(4, 4), is_causal=True, need_weights=False)[0],
        {},
    ),
    "causal with padding": (
        lambda a, x: a(x, x, x, attn_mask=~lower(4, 4), is_causal=True, key_padding_mask=padded(x))[0],
        {},
    ),
    "with a learned key": (lambda a, x: a(x, x, x, attn_mask=~lower(4, 4))[0], {"add_bias_kv": True}),
    "with a key of zeros": (
        lambda a, x: a(x, x, x, key_padding_mask=padded(x), need_weights=False)[0],
        {"add_zero_attn": True},
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_multihead_attention(name):
    call, options = FORMS[name]
    model = seeded(lambda: Attends(call, batch_first=True, **options))
    check_rule(model, normal(5, 4, 6))
    check_example_gradients(model, normal(5, 4, 6))


def test_positions_first_and_one_sequence():
    model = seeded(lambda: Attends(lambda a, x: a(x.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1))[0].mT))
    check_rule(model, normal(5, 4, 6))
    back = seeded(lambda: Attends(lambda a, x: a(*[x.transpose(0, 1)] * 3, need_weights=False)[0].transpose(0, 1)))
    check_rule(back, normal(5, 4, 6))
    check_example_gradients(back, normal(5, 4, 6))
    check_rule(seeded(lambda: Attends(lambda a, x: a(x, x, x)[0])), normal(4, 6))
    check_rule(seeded(lambda: Attends(lambda a, x: a(x, x, x, key_padding_mask=padded(x))[1])), normal(4, 6))


class Block(nn.Module):
    """A layer of a transformer that normalizes first."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(6), nn.LayerNorm(6)
        self.heads, self.out = nn.Linear(6, 18), nn.Linear(6, 6)
        self.feed = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))

    def forward(self, x):
        q, k, v = self.heads(self.norm1(x)).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.feed(self.norm2(x))


def test_transformer_with_its_own_heads():
    model = seeded(lambda: nn.Sequential(*(Block() for _ in range(4)), nn.Linear(6, 3)))
    check_rule(model, normal(5, 4, 6), rtol=1e-11)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer_encoder(norm_first, batch_first):
    options = {"norm_first": norm_first, "batch_first": batch_first, "activation": "gelu"}
    layers = seeded(
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, **options), 4, None, False)
    ).eval()
    model = nn.Sequential(layers)
    check_rule(model, normal(5, 4, 6), rtol=1e-11)
    if batch_first:
        check_example_gradients(model, normal(5, 4, 6), rtol=1e-11)


def test_transformer_encoder_with_masks():
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, norm_first=True)
    encoder = seeded(lambda: nn.TransformerEncoder(layer, 2, nn.LayerNorm(6), False)).eval()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encoder

        def forward(self, x):
            mask = ~lower(x.shape[1], x.shape[1])
            return self.encoder(x, mask=mask, src_key_padding_mask=padded(x), is_causal=True)

    check_rule(Model(), normal(5, 4, 6), rtol=1e-11)
    check_example_gradients(Model(), normal(5, 4, 6), rtol=1e-11)


def test_transformer_decoder():
    layer = nn.TransformerDecoderLayer(6, 2, 8, batch_first=True)
    decoder = seeded(lambda: nn.TransformerDecoder(layer, 2)).eval()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = decoder

        def forward(self, x):
            return self.decoder(x, 2 * x[:, :3])

    check_rule(Model(), normal(5, 4, 6), rtol=1e-11)


def test_static_keys_go_by_autograd():
    a = seeded(lambda: nn.MultiheadAttention(6, 2))

    def f(x, w):
        return F.multi_head_attention_forward(
            x, x, x, 6, 2, w, a.in_proj_bias, None, None, False, 0.0, a.out_proj.weight, a.out_proj.bias,
            static_k=normal(10, 4, 3), static_v=normal(10, 4, 3),
        )[0]  # fmt: skip

    jacobian = linearize(Wrapped(f, a.in_proj_weight.detach()), normal(4, 5, 6))
    assert jacobian.reason == "attention was given static keys or values"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    model = seeded(lambda: Attends(lambda a, x: a(x, x, x, need_weights=False)[0], batch_first=True)).to(dtype)
    check_rule(model, normal(5, 4, 6).to(dtype), rtol=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_transformer_that_leaves_out_its_padding_is_left_to_autograd(frozen):
    """Without gradients, and in eval mode, its results are zero there; while any mode is active they are not."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    body, head = nn.TransformerEncoder(layer, 1).double().eval().requires_grad_(not frozen), nn.Linear(4, 3).double()

    def model(x, padding):
        with torch.set_grad_enabled(frozen):
            h = body(x, src_key_padding_mask=padding)
        return head(h.mean(1))

    inputs = normal(2, 3, 4), torch.tensor([[False, False, True], [False, True, True]])
    jacobian = linearize(model, inputs, list(head.parameters()))
    assert jacobian.reason == "a transformer without gradients may leave out its padding"
    torch.testing.assert_close(jacobian.outputs, model(*inputs).detach())
