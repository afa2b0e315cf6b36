"""Dropout with a rate for each example: its statistics, its masks, and what a graph leads to."""

import math

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn

from nestopt_ext.response import (
    DeltaStnLinear,
    HyperParameters,
    StnChannelDropout,
    StnDropout,
    StnModel,
    StnVariationalDropout,
)
from nestopt_ext.response.dropconnect import dropped_weight
from nestopt_ext.response.dropout import dropout

LAYERS = {
    "elements": lambda: StnDropout("rate"),
    "channels": lambda: StnChannelDropout("rate"),
    "variational": lambda: StnVariationalDropout("rate", batch_dim=0, time_dim=1),
}


def model_of(*layers, rate=0.5, centred=True, dtype=torch.float32, **entry):
    hparams = HyperParameters(dtype=dtype).add("rate", rate, low=0, high=0.95, **entry)
    return StnModel(nn.Sequential(*layers).to(dtype), hparams, centred=centred)


def h_of(model, *rates):
    """Points at these rates, [B, n]."""
    entry = model.hparams.entries["rate"]
    return entry.unconstrained(torch.tensor(rates, dtype=torch.float64)).to(model.hparams.unconstrained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_each_example_is_dropped_at_its_own_rate(dtype, device):
    rates = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], device=device)
    n = 20_000
    y = dropout(torch.ones(5, n, dtype=dtype, device=device), rates)
    assert y.dtype == dtype
    dropped = (y == 0).float().mean(1)
    deviation = (rates * (1 - rates) / n).sqrt()
    assert ((dropped - rates).abs() <= 5 * deviation).all()
    for rate, row in zip(rates.tolist(), y, strict=True):
        expected = {0.0} | ({torch.tensor(1 / (1 - rate), dtype=dtype).item()} if rate < 1 else set())
        assert all(min(abs(v - e) for e in expected) <= 1e-2 * v for v in row.unique().tolist())


@pytest.mark.parametrize("batch_dim", [0, 1, -1])
def test_examples_may_be_any_dimension(batch_dim):
    rates = torch.tensor([0.0, 1.0, 0.0])
    y = dropout(torch.ones(3, 3, 3), rates, batch_dim=batch_dim)
    assert torch.equal(y, (1 - rates).expand(3, 3, 3).movedim(-1, batch_dim))


def test_one_rate_serves_all_examples():
    y = dropout(torch.ones(100, 200), torch.tensor([0.25]))
    assert abs((y == 0).float().mean().item() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 20_000)


def test_units_have_rates_of_their_own():
    model = model_of(StnDropout("rate", unit_dim=2), rate=[0.1, 0.5, 0.9], shape=(3,))
    y = model(torch.ones(50, 100, 3))
    dropped = (y == 0).float().mean((0, 1))
    rates = torch.tensor([0.1, 0.5, 0.9])
    assert ((dropped - rates).abs() < 5 * (rates * (1 - rates) / 5000).sqrt()).all()
    with model.at(h_of(model, [1e-9, 1e-9, 0.5], [0.9, 1e-9, 1e-9])):
        zeros = (model(torch.ones(2, 100, 3)) == 0).any(1)
    assert zeros.tolist() == [[False, False, True], [True, False, False]]


def test_channels_are_dropped_whole():
    model = model_of(StnChannelDropout("rate"))
    for spatial in [(), (5,), (4, 4), (2, 3, 4)]:
        y = model(torch.ones(8, 40, *spatial)).flatten(2) if spatial else model(torch.ones(8, 40)).unsqueeze(-1)
        assert torch.equal(y, y[:, :, :1].expand_as(y))
        assert 0 < (y == 0).float().mean() < 1


def test_variational_dropout_keeps_its_mask_through_time():
    model = model_of(StnVariationalDropout("rate"))
    y = model(torch.ones(7, 8, 40))
    assert torch.equal(y, y[:1].expand_as(y))
    with model.at(h_of(model, 1e-9, 0.9)):
        y = model(torch.ones(7, 2, 400))
    assert (y[:, 0] != 0).all()
    assert abs((y[0, 1] == 0).float().mean().item() - 0.9) < 5 * math.sqrt(0.9 * 0.1 / 400)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_eval_mode_is_the_identity_and_asks_for_no_sample(layer):
    layer = layer().eval()
    x = torch.randn(2, 3, 4)
    assert layer(x) is x


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_without_a_sample_or_its_hyperparameter_it_says_so(layer):
    with pytest.raises(RuntimeError, match=f"{type(layer()).__name__}: must be called with a sample"):
        layer()(torch.ones(2, 3, 4))
    other = StnModel(layer(), HyperParameters().add("other", 1.0), centred=True)
    with pytest.raises(KeyError, match="hyperparameter must be one of other; got 'rate'"):
        other(torch.ones(2, 3, 4))


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_a_graph_leads_to_the_input_and_never_to_the_rate(layer):
    model = model_of(layer())
    x = torch.ones(3, 4, 5, requires_grad=True)
    h = model.hparams.perturbed(3)
    with model.at(h):
        y = model(x)
    (grad,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert torch.equal(grad, y.detach())
    assert torch.autograd.grad(y.sum(), h, allow_unused=True) == (None,)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_primal_and_tangent_have_one_mask(layer):
    first = DeltaStnLinear(5, 6, num_hparams=1, dtype=torch.float64)
    nn.init.normal_(first.gate_weight)
    model = model_of(first, layer(), dtype=torch.float64)
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    h = h_of(model, 0.3, 0.5, 0.7).detach()

    def answer(linearized):
        torch.manual_seed(3)
        with model.at(h, linearized=linearized):
            return model(x)

    # The gates are affine in h: the linearization is exact, if the mask is the same.
    linearized = answer(True)
    assert 0 < (linearized == 0).double().mean() < 1
    torch.testing.assert_close(linearized, answer(False), rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(linearized.sum(), first.gate_weight)
    assert grad.abs().sum() > 0


def test_a_rate_outside_its_range_and_a_nan_show():
    y = dropout(torch.ones(4, 100), torch.tensor([-0.1, 1.1, math.nan, 0.5]))
    assert y.isnan().all(1).tolist() == [True, True, True, False]


def test_bad_shapes_are_refused():
    x = torch.ones(4, 3)
    for rate, options, message in (
        (torch.ones(3), {}, r"x \(4, 3\) with batch_dim=0, unit_dim=None; got \(3,\)"),
        (torch.ones(4, 3), {}, "say which dimension has them: unit_dim"),
        (torch.ones(4), {"batch_dim": 2}, "batch_dim=2"),
        (torch.ones(4, 2), {"unit_dim": 1}, r"unit_dim=1; got \(4, 2\)"),
        (torch.tensor(0.5), {}, r"got \(\)"),
    ):
        with pytest.raises(ValueError, match=f"dropout: rate must be one for each example.*{message}"):
            dropout(x, rate, **options)
    with pytest.raises(ValueError, match="batch_dim must be 0 or 1; got 2"):
        StnChannelDropout("rate", batch_dim=2)
    with pytest.raises(ValueError, match="time_dim must differ from batch_dim; got 1 for both"):
        StnVariationalDropout("rate", time_dim=1)
    with pytest.raises(ValueError, match=r"must have examples and channels; got shape \(5,\)"):
        model_of(StnChannelDropout("rate"))(torch.ones(5))


def test_dropped_weights_share_the_mask_of_the_first_rate():
    w, v = torch.randn(50, 40, requires_grad=True), torch.randn(50, 40)
    for p in (torch.tensor(0.25), torch.tensor([0.25, 1.0]), torch.tensor([[0.25]])):
        dropped_w, dropped_v = dropped_weight(w, v, p=p)
        zero = dropped_w == 0
        assert torch.equal(zero, dropped_v == 0)
        assert abs(zero.float().mean().item() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 2000)
        torch.testing.assert_close(dropped_w[~zero], w[~zero] / 0.75)
        torch.testing.assert_close(dropped_v[~zero], v[~zero] / 0.75)
    (grad,) = torch.autograd.grad(dropped_w.sum(), w)
    torch.testing.assert_close(grad, (~zero).float() / 0.75)
    assert torch.equal(dropped_weight(v, p=torch.tensor(0.0))[0], v)
    with pytest.raises(ValueError, match=r"weights\[1\] must have the shape of weights\[0\] \(50, 40\); got \(50,\)"):
        dropped_weight(w, torch.ones(50), p=torch.tensor(0.5))


def test_dropout_of_a_dual_number_makes_no_zero_tangent_for_its_mask() -> None:
    x, dx = torch.randn(2, 6, 3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, dx)
        with torch.profiler.profile() as profile:
            primal, tangent = forward_ad.unpack_dual(dropout(dual, torch.tensor([0.5])))
    assert torch.equal(primal * dx, tangent * x)
    assert "aten::_efficientzerotensor" not in {event.key for event in profile.key_averages()}


def test_dropout_composes_with_torch_func() -> None:
    x, dx = torch.randn(2, 6, 3, dtype=torch.float64)

    def f(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return dropout(x, torch.linspace(0, 0.9, 6)).pow(3).sum()

    slope = torch.func.grad(f)(x)
    curved = torch.func.jvp(torch.func.grad(f), (x,), (dx,))[1]
    torch.testing.assert_close(torch.func.jvp(f, (x,), (dx,))[1], (slope * dx).sum())
    nested = torch.func.jvp(lambda a: torch.func.jvp(f, (a,), (dx,))[1], (x,), (dx,))[1]
    torch.testing.assert_close(nested, (curved * dx).sum())
