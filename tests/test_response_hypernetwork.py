"""Hypernetworks against functional_call by hand, and hyper-training against scans of problems solved exactly."""

import copy
import itertools
import math

import pytest
import torch
from cases import F64, generator, leaf
from helpers import same_bits
from torch import nn
from torch.func import functional_call

from nestopt_ext.hypergrad import LoopDiverged
from nestopt_ext.response import (
    Hypernetwork,
    HyperParameters,
    StnDropout,
    current_sample,
    global_hypertrain,
    local_hypertrain,
)


def sgd(lr):
    return lambda tensors: torch.optim.SGD(tensors, lr=lr)


def adam(lr):
    return lambda tensors: torch.optim.Adam(tensors, lr=lr)


def small_net():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()


# ---- the network ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_hparams", "options", "count"),
    [
        (1, {}, 15_700),
        (10, {}, 86_350),
        (1, {"hidden": (50,)}, 400_450),
        (7850, {"bottleneck": 10}, 164_860),
        (3, {"hidden": (5, 6), "bottleneck": 2}, 3 * 5 + 5 + 5 * 6 + 6 + 6 * 2 + 2 + 2 * 7850 + 7850),
    ],
)
def test_counts_of_weights_are_those_of_the_paper(num_hparams, options, count):
    hypernet = Hypernetwork(nn.Linear(784, 10), num_hparams, **options)
    assert sum(p.numel() for p in hypernet.parameters()) == count
    assert sum(v.numel() for v in hypernet.state_dict().values()) == count


@pytest.mark.parametrize("options", [{}, {"hidden": (5, 7)}, {"bottleneck": 2}, {"hidden": (5,), "bottleneck": 2}])
def test_weights_are_those_of_the_formula_by_hand(device, options):
    model = small_net().to(device).eval()
    hypernet = Hypernetwork(model, 2, init_std=0.5, **options)
    h = torch.randn(2, dtype=F64, device=device)
    state = hypernet.state_dict()
    t = h
    for i in range(len(options.get("hidden", ()))):
        t = torch.relu(state[f"trunk.{2 * i}.weight"] @ t + state[f"trunk.{2 * i}.bias"])
    if "bottleneck" in options:
        last = 2 * len(options.get("hidden", ()))
        t = state[f"trunk.{last}.weight"] @ t + state[f"trunk.{last}.bias"]
    flat = state["output.weight"] @ t + state["output.bias"]
    params, start = {}, 0
    for name, p in model.named_parameters():
        params[name] = flat[start : start + p.numel()].reshape(p.shape)
        start += p.numel()
    made = hypernet(h)
    assert list(made) == list(params)
    for name, value in params.items():
        torch.testing.assert_close(made[name], value, rtol=1e-12, atol=1e-12)
    x = torch.randn(5, 3, dtype=F64, device=device)
    wanted = functional_call(model, params, (x,))
    torch.testing.assert_close(hypernet.call(h, x), wanted, rtol=1e-12, atol=1e-12)


def test_many_points_are_one_point_after_the_other(device):
    hypernet = Hypernetwork(small_net().to(device).eval(), 3, bottleneck=2, init_std=0.5)
    points, x = torch.randn(4, 3, dtype=F64, device=device), torch.randn(5, 3, dtype=F64, device=device)
    made, answers = hypernet(points), hypernet.call(points, x)
    assert answers.shape == (4, 5, 2)
    for i, h in enumerate(points):
        for name, value in hypernet(h).items():
            torch.testing.assert_close(made[name][i], value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(answers[i], hypernet.call(h, x), rtol=1e-12, atol=1e-12)


def test_all_weights_of_a_point_are_views_of_one_product():
    hypernet = Hypernetwork(small_net(), 2)
    for h in (torch.zeros(2, dtype=F64), torch.zeros(6, 2, dtype=F64)):
        made = hypernet(h)
        assert len({value.untyped_storage().data_ptr() for value in made.values()}) == 1


def test_derivatives_in_the_hyperparameters_and_in_the_weights_of_any_order():
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    hypernet = Hypernetwork(model, 2, bottleneck=1, init_std=0.5)
    names = [name for name, _ in hypernet.named_parameters()]
    x = torch.randn(3, 2, dtype=F64)

    def answer(h, *weights):
        return functional_call(hypernet, dict(zip(names, weights, strict=True)), (h,))[
            "0.weight"
        ].sum() + hypernet.call(h, x)

    for h in (leaf(torch.randn(2, dtype=F64)), leaf(torch.randn(3, 2, dtype=F64))):
        inputs = (h, *(leaf(p) for p in hypernet.parameters()))
        assert torch.autograd.gradcheck(answer, inputs, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(answer, inputs, check_fwd_over_rev=True)


def test_starts_at_the_weights_of_the_model_which_stays_as_it_is():
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    hypernet = Hypernetwork(model, 2, init_std=0.0)
    for name, value in hypernet(torch.randn(2, dtype=F64)).items():
        assert same_bits(value.detach(), before[name])
    hypernet.to(torch.float32)
    assert hypernet.model is model
    assert model not in list(hypernet.modules())
    assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())


def test_the_start_is_normal_with_the_deviation_asked_for():
    hypernet = Hypernetwork(nn.Linear(100, 100), 50, bottleneck=40, init_std=0.25)
    for drawn in (hypernet.trunk[0].weight, hypernet.output.weight):
        assert abs(float(drawn.detach().std()) - 0.25) < 0.01
        assert abs(float(drawn.detach().mean())) < 0.02


def test_buffers_are_those_of_the_model_at_the_time_of_the_call():
    model = small_net().eval()
    hypernet = Hypernetwork(model, 1)
    h, x = torch.randn(1, dtype=F64), torch.randn(5, 3, dtype=F64)
    before = hypernet.call(h, x)
    model[1].running_mean += 1
    after = hypernet.call(h, x)
    assert not torch.allclose(before, after)
    model.train()
    hypernet.call(h, x)
    assert int(model[1].num_batches_tracked) == 1


def test_chosen_parameters_respond_and_the_others_are_trained_along():
    model = small_net()
    model[3].bias.requires_grad_(False)
    hypernet = Hypernetwork(model, 2, init_std=0.5, names=["3.weight", "0.bias"])
    one, other = hypernet(torch.zeros(2, dtype=F64)), hypernet(torch.ones(2, dtype=F64))
    assert set(one) == {name for name, p in model.named_parameters() if p.requires_grad}
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    assert changed == {"3.weight", "0.bias"}
    assert same_bits(one["0.weight"].detach(), model[0].weight.detach())
    sum(value.sum() for value in hypernet(torch.zeros(3, 2, dtype=F64)).values()).backward()
    assert all(p.grad is not None for p in hypernet.shared)
    assert hypernet(torch.zeros(3, 2, dtype=F64))["0.weight"].shape == (3, 4, 3)


def test_a_centre_is_what_h_is_counted_from():
    model, centre = small_net().eval(), torch.tensor([-7.0, 3.0], dtype=F64)
    shifted = Hypernetwork(model, 2, bottleneck=2, init_std=0.5, centre=centre)
    plain = Hypernetwork(model, 2, bottleneck=2, init_std=0.5)
    plain.load_state_dict({name: value for name, value in shifted.state_dict().items() if name != "centre"})
    h = torch.randn(3, 2, dtype=F64)
    for name, value in shifted(h + centre).items():
        torch.testing.assert_close(value, plain(h)[name], rtol=1e-12, atol=1e-12)
    other = Hypernetwork(model, 2, bottleneck=2, centre=torch.zeros(2, dtype=F64))
    other.load_state_dict(shifted.state_dict())
    assert same_bits(other(h)["0.weight"], shifted(h)["0.weight"])
    centre.zero_()
    assert shifted.centre.tolist() == [-7.0, 3.0]


def test_many_hyperparameters_far_from_zero_start_at_the_weights_of_the_model():
    model, h = nn.Linear(784, 10), torch.full((7850,), -7.0)
    weight = model.weight.detach()
    centred = Hypernetwork(model, 7850, bottleneck=10, centre=h)(h)["weight"].detach()
    counted_from_zero = Hypernetwork(model, 7850, bottleneck=10)(h)["weight"].detach()
    assert float((centred - weight).norm() / weight.norm()) < 0.1
    assert float((counted_from_zero - weight).norm() / weight.norm()) > 3


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(4, 3, dtype=F64)
            self.decoder = nn.Linear(3, 4, bias=False, dtype=F64)
            self.decoder.weight = self.embedding.weight

        def forward(self, x):
            return self.decoder(self.embedding(x))

    hypernet = Hypernetwork(Tied(), 1, init_std=0.5)
    h, x = torch.ones(1, dtype=F64), torch.tensor([0, 2])
    table = hypernet(h)["embedding.weight"]
    assert list(hypernet(h)) == ["embedding.weight"]
    torch.testing.assert_close(hypernet.call(h, x), table[x] @ table.T)
    exported = hypernet.export(h)
    assert exported.decoder.weight is exported.embedding.weight
    torch.testing.assert_close(exported(x), hypernet.call(h, x))


def test_a_parameter_without_dimensions_is_one_too():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x, *, power):
            return self.scale * x**power

    hypernet = Hypernetwork(Scaled(), 1, init_std=0.0)
    assert hypernet(torch.zeros(1))["scale"].shape == ()
    assert hypernet.call(torch.zeros(3, 1), torch.tensor(3.0), power=2).tolist() == [18.0] * 3


def test_export_is_a_plain_model_at_one_point():
    model = small_net().eval()
    before = copy.deepcopy(model.state_dict())
    hypernet = Hypernetwork(model, 2, init_std=0.5)
    h, x = torch.randn(2, dtype=F64), torch.randn(5, 3, dtype=F64)
    exported = hypernet.export(h)
    assert type(exported) is type(model)
    torch.testing.assert_close(exported(x), hypernet.call(h, x))
    assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())


def test_state_dict_restores_it():
    model = small_net()
    one, other = (Hypernetwork(model, 2, bottleneck=2, names=["0.weight"]) for _ in range(2))
    other.load_state_dict(one.state_dict())
    h = torch.randn(2, dtype=F64)
    for name, value in one(h).items():
        assert same_bits(value, other(h)[name])


def _mixed():
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Hypernetwork("net", 1), TypeError, "model must be a torch.nn.Module; got str"),
        (lambda: Hypernetwork(nn.ReLU(), 1), ValueError, "model must have a parameter that requires grad; got none"),
        (lambda: Hypernetwork(_mixed(), 1), ValueError, "model.1.weight must be float32 on cpu, as model.0.weight is"),
        (lambda: Hypernetwork(small_net(), 0), ValueError, "num_hparams must be >= 1; got 0"),
        (lambda: Hypernetwork(small_net(), 1.0), TypeError, "num_hparams must be an int; got 1.0"),
        (lambda: Hypernetwork(small_net(), 1, hidden=5), TypeError, "hidden must be a sequence of widths; got 5"),
        (lambda: Hypernetwork(small_net(), 1, hidden=(5, 0)), ValueError, r"hidden\[1\] must be >= 1; got 0"),
        (lambda: Hypernetwork(small_net(), 1, bottleneck=0), ValueError, "bottleneck must be >= 1; got 0"),
        (lambda: Hypernetwork(small_net(), 1, init_std=-1.0), ValueError, "init_std must be finite, >= 0; got -1.0"),
        (lambda: Hypernetwork(small_net(), 1, init_std="1"), TypeError, "init_std must be a number; got '1'"),
        (lambda: Hypernetwork(small_net(), 1, bottleneck=1, init_std=0), ValueError, "init_std must be finite and > 0"),
        (lambda: Hypernetwork(small_net(), 2, centre=[1.0, 2.0]), TypeError, "centre must be a Tensor; got list"),
        (lambda: Hypernetwork(small_net(), 2, centre=torch.ones(3)), ValueError, r"centre must have shape \(2,\); got"),
        (lambda: Hypernetwork(small_net(), 1, names="0.bias"), TypeError, "names must be a list of names; got the"),
        (lambda: Hypernetwork(small_net(), 1, names=["bias"]), ValueError, "names must be among 0.weight, .*'bias'"),
        (lambda: Hypernetwork(small_net(), 1, names=[]), ValueError, "names must name a parameter that responds"),
        (lambda: Hypernetwork(small_net(), 2)(torch.ones(3)), ValueError, r"h must have shape \(2,\) or \(B, 2\)"),
        (lambda: Hypernetwork(small_net(), 2)([1.0, 2.0]), TypeError, "h must be a Tensor; got list"),
        (
            lambda: Hypernetwork(small_net(), 2).export(torch.ones(1, 2)),
            ValueError,
            r"export: h must be one point, \[2\]",
        ),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


# ---- hyper-training -------------------------------------------------------------------------------------------------


class Ridge:
    """Ridge regression with one log decay h, whose minimum and its slope are known for every h."""

    def __init__(self, seed=0, n=10, d=5):
        g = generator(seed)
        self.x, w = torch.randn(n, d, generator=g, dtype=F64), torch.randn(d, generator=g, dtype=F64)
        self.y = self.x @ w + 1.5 * torch.randn(n, generator=g, dtype=F64)
        self.x_valid = torch.randn(200, d, generator=g, dtype=F64)
        self.y_valid = 0.6 * self.x_valid @ w
        self.model = nn.Linear(d, 1, bias=False, dtype=F64)

    def train_loss(self, params, h):
        w = params["weight"][0]
        return 0.5 * (self.x @ w - self.y).square().mean() + 0.5 * h.exp().sum() * w.square().sum()

    def valid_loss(self, params, h):
        return 0.5 * (self.x_valid @ params["weight"][0] - self.y_valid).square().mean()

    def minimum(self, h):
        gram = self.x.T @ self.x / len(self.x)
        return torch.linalg.solve(gram + h.exp() * torch.eye(len(gram), dtype=F64), self.x.T @ self.y / len(self.x))

    def scanned(self):
        points = torch.linspace(-6, 4, 2001, dtype=F64)
        losses = torch.stack([self.valid_loss({"weight": self.minimum(h)[None]}, h) for h in points])
        best = points[losses.argmin()]
        assert -4 < best < 2  # an optimum inside the range
        return best


@pytest.mark.parametrize("start", [-2.0, 1.0])
def test_local_hypernetwork_finds_the_scanned_optimum_and_its_slope(start):
    ridge = Ridge()
    best = ridge.scanned()
    hypernet, h = Hypernetwork(ridge.model, 1), torch.tensor([start], dtype=F64, requires_grad=True)
    local_hypertrain(
        hypernet,
        ridge.train_loss,
        ridge.valid_loss,
        h,
        num_steps=300,
        train_steps=3,
        num_samples=8,
        sigma=0.25,
        optimizer=lambda tensors: torch.optim.SGD(tensors, lr=0.03, momentum=0.9),
        hyper_optimizer=adam(2e-2),
    )
    slope = torch.func.jacrev(ridge.minimum)(best)
    found = hypernet.output.weight[:, 0].detach()
    assert abs(h.item() - float(best)) < 0.1
    assert float((found - slope).norm() / slope.norm()) < 0.05


def test_global_hypernetwork_learns_the_response_and_finds_the_scanned_optimum():
    ridge = Ridge()
    best = ridge.scanned()
    hypernet = Hypernetwork(ridge.model, 1, hidden=(20,), init_std=0.3)
    h = torch.tensor([1.5], dtype=F64, requires_grad=True)
    result = global_hypertrain(
        hypernet,
        ridge.train_loss,
        ridge.valid_loss,
        h,
        num_train_steps=800,
        num_hyper_steps=300,
        sample=lambda count: -1 + 1.5 * torch.randn(count, 1, dtype=F64),
        optimizer=adam(1e-2),
        hyper_optimizer=adam(3e-2),
    )
    assert abs(h.item() - float(best)) < 0.2
    for point in (-2.5, -1.0, 0.5):
        exact = ridge.minimum(torch.tensor(point, dtype=F64))
        found = hypernet(torch.tensor([point], dtype=F64))["weight"][0].detach()
        assert float((found - exact).norm() / exact.norm()) < 0.05
    train, tune = result.history[:8], result.history[8:]
    assert [record.step for record in result.history] == list(range(100, 1101, 100))
    assert all(r.valid_loss is None and r.train_loss is not None for r in train)
    assert all(r.valid_loss is not None and r.train_loss is None for r in tune)
    assert train[-1].train_loss < train[0].train_loss
    assert tune[-1].valid_loss < tune[0].valid_loss


def linear_problem():
    """A model of one weight with L_T = (w - 2 h)^2 and L_V = (w - 3)^2 + h^2 / 2."""
    hypernet = Hypernetwork(nn.Linear(1, 1, bias=False, dtype=F64), 1, init_std=0.5)
    h = torch.tensor([0.5], dtype=F64, requires_grad=True)

    def train_loss(params, h, *batch):
        return ((params["weight"] - 2 * h) ** 2).sum()

    def valid_loss(params, h, *batch):
        return ((params["weight"] - 3) ** 2).sum() + (h**2).sum() / 2

    return hypernet, train_loss, valid_loss, h


def test_one_local_step_is_the_formula_by_hand():
    hypernet, train_loss, valid_loss, h = linear_problem()
    a, b, start = hypernet.output.weight.item(), hypernet.output.bias.item(), 0.5
    result = local_hypertrain(
        hypernet, train_loss, valid_loss, h, num_steps=1, sigma=0.0, optimizer=sgd(0.1), hyper_optimizer=sgd(0.2)
    )
    error = a * start + b - 2 * start
    a, b = a - 0.1 * 2 * error * start, b - 0.1 * 2 * error
    missed = a * start + b - 3
    wanted = start - 0.2 * (2 * missed * a + start)  # the direct part counts
    assert hypernet.output.weight.item() == pytest.approx(a, rel=1e-12)
    assert hypernet.output.bias.item() == pytest.approx(b, rel=1e-12)
    assert h.item() == pytest.approx(wanted, rel=1e-12)
    (record,) = result.history
    assert record.train_loss == pytest.approx(error**2, rel=1e-12)
    assert record.valid_loss == pytest.approx(missed**2 + start**2 / 2, rel=1e-12)
    assert record.hparams.item() == result.hparams.item() == h.item()
    assert result.stopped == "steps"


def test_the_warm_up_leaves_the_hyperparameters():
    hypernet, train_loss, valid_loss, h = linear_problem()
    seen = []
    result = local_hypertrain(
        hypernet, train_loss, valid_loss, h, num_steps=4, warmup=3, record_every=1, callbacks=lambda r: seen.append(r)
    )
    assert [float(r.hparams) for r in seen[:3]] == [0.5] * 3
    assert [r.valid_loss is None for r in seen] == [True, True, True, False]
    assert float(seen[3].hparams) != 0.5
    assert result.history == tuple(seen)


def test_frozen_weights_of_the_hypernetwork_stay():
    hypernet, train_loss, valid_loss, h = linear_problem()
    hypernet.output.bias.requires_grad_(False)
    before = copy.deepcopy(hypernet.state_dict())
    local_hypertrain(hypernet, train_loss, valid_loss, h, num_steps=2)
    after = hypernet.state_dict()
    assert same_bits(after["output.bias"], before["output.bias"])
    assert not torch.equal(after["output.weight"], before["output.weight"])


def test_train_steps_and_samples_count():
    hypernet, _, valid_loss, h = linear_problem()
    points = []

    def train_loss(params, h):
        points.append(h.item())
        return (params["weight"] ** 2).sum()

    sigma = torch.tensor([2.0], dtype=F64)
    local_hypertrain(
        hypernet,
        train_loss,
        valid_loss,
        h,
        num_steps=20,
        train_steps=5,
        num_samples=7,
        sigma=sigma,
        vectorize=False,
        hyper_optimizer=sgd(0.0),
    )
    drawn = torch.tensor(points)
    assert len(drawn) == len(set(points)) == 700
    assert abs(float(drawn.mean()) - 0.5) < 0.25
    assert abs(float(drawn.detach().std()) - 2.0) < 0.2


def test_points_at_once_are_points_one_by_one():
    found = []
    for vectorize in (True, False):
        torch.manual_seed(0)
        hypernet, train_loss, valid_loss, h = linear_problem()
        local_hypertrain(hypernet, train_loss, valid_loss, h, num_steps=5, num_samples=3, vectorize=vectorize)
        found.append([h.detach(), *hypernet.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_loss_that_vmap_cannot_see_through_says_what_to_do():
    hypernet, _, valid_loss, h = linear_problem()

    def train_loss(params, h):
        return (params["weight"] ** 2).sum() * h.item()

    with pytest.raises(RuntimeError, match=r"local_hypertrain: train_loss must go through .*Pass vectorize=False"):
        local_hypertrain(hypernet, train_loss, valid_loss, h, num_steps=1, num_samples=2)
    local_hypertrain(hypernet, train_loss, valid_loss, h, num_steps=1, num_samples=2, vectorize=False)


def test_points_draw_dropout_masks_of_their_own():
    hparams = HyperParameters(dtype=F64).add("rate", 0.5, low=0, high=0.9)
    model = nn.Sequential(nn.Linear(1, 1, bias=False, dtype=F64), StnDropout("rate"))
    hypernet, masks = Hypernetwork(model, 1), []

    def train_loss(params, values):
        answers = functional_call(model, params, (torch.ones(200, 1, dtype=F64),))
        masks.append(answers != 0)
        return answers.mean()

    options = {"num_train_steps": 1, "num_hyper_steps": 0, "sample": lambda count: torch.zeros(count, 1, dtype=F64)}
    torch.manual_seed(0)
    result = global_hypertrain(hypernet, train_loss, train_loss, hparams, num_samples=1, **options)
    assert 0.3 < float(masks[0].double().mean()) < 0.8  # kept with 1 - 0.45
    weight = hypernet(torch.zeros(1, dtype=F64))["0.weight"].item()
    result = global_hypertrain(hypernet, train_loss, train_loss, hparams, num_samples=400, **options)
    assert result.history[0].train_loss == pytest.approx(weight, rel=0.02)  # masks that were the same would miss it


@pytest.mark.parametrize("kind", ["list", "loader", "function"])
def test_batches_are_taken_in_turn(kind):
    hypernet, train_loss, valid_loss, h = linear_problem()
    data = torch.arange(3.0)
    stream = itertools.cycle(range(3))
    source = {
        "list": list(data),
        "loader": torch.utils.data.DataLoader(data, batch_size=None),
        "function": lambda: data[next(stream)],
    }[kind]
    seen = []

    def watched(params, h, batch):
        seen.append(int(batch))
        return train_loss(params, h)

    local_hypertrain(hypernet, watched, valid_loss, h, num_steps=5, train_batches=source)
    assert seen == [0, 1, 2, 0, 1]


def test_named_hyperparameters_reach_the_losses_in_natural_units_and_as_the_sample():
    hparams = HyperParameters(dtype=F64).add("decay", 0.1, low=0.0, transform="exp").add("length", 4, low=2, high=24)
    hparams.add("holes", 1, low=0, high=5, discrete=True)
    hypernet = Hypernetwork(nn.Linear(1, 1, bias=False, dtype=F64), 3)
    seen = []

    def train_loss(params, values):
        sample = current_sample()
        assert {name: float(v) for name, v in values.items()} == {n: float(v) for n, v in sample.values.items()}
        assert all(v.shape == (1,) and not v.requires_grad for v in sample.values.values())
        assert sample.gate_input is None
        seen.append({name: float(v) for name, v in values.items()})
        return (params["weight"] ** 2).sum() * values["decay"]

    def valid_loss(params, values):
        return ((params["weight"] - 1) ** 2).sum() + values["decay"]

    before = float(hparams.values()["decay"])
    result = local_hypertrain(
        hypernet, train_loss, valid_loss, hparams, num_steps=3, num_samples=2, vectorize=False, hyper_optimizer=sgd(0.1)
    )
    assert current_sample() is None
    assert len(seen) == 6
    assert all(v["decay"] > 0 and 2 < v["length"] < 24 and v["holes"] in (0, 1, 2, 3, 4) for v in seen)
    assert float(hparams.values()["decay"]) < before
    assert result.hparams.keys() == hparams.values().keys()
    assert all(torch.equal(value, hparams.values()[name]) for name, value in result.hparams.items())


def test_named_hyperparameters_are_drawn_about_with_their_scales():
    hparams = HyperParameters(dtype=F64).add("a", 0.0, scale=0.5).add("b", 3.0, scale=2.0)
    hypernet = Hypernetwork(nn.Linear(1, 1, bias=False, dtype=F64), 2)
    points = []

    def train_loss(params, values):
        points.append([float(values["a"]), float(values["b"])])
        return (params["weight"] ** 2).sum()

    global_hypertrain(
        hypernet,
        train_loss,
        train_loss,
        hparams,
        num_train_steps=40,
        num_hyper_steps=0,
        num_samples=20,
        vectorize=False,
    )
    mean, std = torch.tensor(points).mean(0), torch.tensor(points).std(0)
    torch.testing.assert_close(mean, torch.tensor([0.0, 3.0]), rtol=0, atol=0.25)
    torch.testing.assert_close(std, torch.tensor([0.5, 2.0]), rtol=0.1, atol=0)


def test_points_within_vmap_are_the_sample_of_their_own():
    hparams = HyperParameters(dtype=F64).add("a", 0.0)
    hypernet = Hypernetwork(nn.Linear(1, 1, bias=False, dtype=F64), 1, init_std=0.0)

    def train_loss(params, values):
        return ((params["weight"] - values["a"]) ** 2).sum() + (current_sample().values["a"] - values["a"]).abs().sum()

    result = global_hypertrain(
        hypernet,
        train_loss,
        lambda params, values: ((params["weight"] - 0.7) ** 2).sum(),
        hparams,
        num_train_steps=300,
        num_hyper_steps=300,
        optimizer=sgd(0.1),
        hyper_optimizer=sgd(0.1),
    )
    assert result.history[2].train_loss < 1e-6  # so the two are equal at every point
    assert float(result.hparams["a"]) == pytest.approx(0.7, abs=1e-3)


def test_going_on_with_saved_states_is_going_on():
    def run(lengths):
        torch.manual_seed(0)
        hypernet, train_loss, valid_loss, h = linear_problem()
        optimizer, hyper_optimizer = torch.optim.Adam(hypernet.parameters()), torch.optim.Adam([h], lr=0.1)
        for length in lengths:
            state = torch.get_rng_state()
            fresh, _, _, fresh_h = linear_problem()
            torch.set_rng_state(state)
            fresh.load_state_dict(hypernet.state_dict())
            fresh_h.data.copy_(h.data)
            states = copy.deepcopy((optimizer.state_dict(), hyper_optimizer.state_dict()))
            hypernet, h = fresh, fresh_h
            optimizer, hyper_optimizer = torch.optim.Adam(hypernet.parameters()), torch.optim.Adam([h], lr=0.1)
            optimizer.load_state_dict(states[0])
            hyper_optimizer.load_state_dict(states[1])
            local_hypertrain(
                hypernet,
                train_loss,
                valid_loss,
                h,
                num_steps=length,
                optimizer=optimizer,
                hyper_optimizer=hyper_optimizer,
            )
        return [h.detach(), *hypernet.parameters()]

    for one, other in zip(run([20]), run([7, 13]), strict=True):
        assert same_bits(one, other)


def test_ends_where_the_validation_loss_does_not_fall_any_more():
    hypernet, train_loss, valid_loss, h = linear_problem()
    rising = itertools.chain([9.0, 9.0, 7.0, 7.0], itertools.count(8))

    def worse_and_worse(params, h):
        return valid_loss(params, h) * 0 + next(rising)

    result = local_hypertrain(hypernet, train_loss, worse_and_worse, h, num_steps=500, record_every=2, patience=3)
    assert result.stopped == "patience"
    losses = [record.valid_loss for record in result.history]
    assert min(losses) == losses[-4]  # then three in a row that were no better
    assert all(later < earlier for earlier, later in itertools.pairwise(losses[:-3]))


def test_a_callback_ends_the_run_after_the_others_were_called():
    hypernet, train_loss, valid_loss, h = linear_problem()
    seen = []
    result = global_hypertrain(
        hypernet,
        train_loss,
        valid_loss,
        h,
        num_train_steps=10,
        num_hyper_steps=10,
        sample=lambda count: torch.randn(count, 1, dtype=F64),
        record_every=3,
        callbacks=[lambda record: record.step >= 6, seen.append],
    )
    assert result.stopped == "callback"
    assert [record.step for record in seen] == [3, 6]
    assert h.item() == 0.5


@pytest.mark.parametrize("level", ["train", "valid"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_is_named_and_not_stepped_on(level, where):
    hypernet, train_loss, valid_loss, h = linear_problem()

    def bad(params, h):
        w = params["weight"].sum()
        return w * math.nan if where == "loss" else (w - w.detach()).sqrt()  # the slope of a root at 0

    losses = (bad, valid_loss) if level == "train" else (train_loss, bad)
    moved = hypernet.parameters() if level == "train" else [h]
    before = [p.detach().clone() for p in moved]
    what = f"{level}_loss" if where == "loss" else f"the gradient of {level}_loss"
    with pytest.raises(LoopDiverged, match=f"local_hypertrain: {what} must be finite; got (nan|inf)"):
        local_hypertrain(hypernet, *losses, h, num_steps=1)
    after = hypernet.parameters() if level == "train" else [h]
    assert all(map(same_bits, before, [p.detach() for p in after]))


def _bad_calls():
    def local(hypernet, train_loss, valid_loss, h, **options):
        return local_hypertrain(hypernet, train_loss, valid_loss, h, **{"num_steps": 1, **options})

    def everywhere(hypernet, train_loss, valid_loss, h, **options):
        return global_hypertrain(
            hypernet, train_loss, valid_loss, h, **{"num_train_steps": 1, "num_hyper_steps": 1, **options}
        )

    double = torch.ones(1, dtype=F64)
    return [
        (lambda n, t, v, h: local(nn.Linear(1, 1), t, v, h), TypeError, "hypernet must be a Hypernetwork; got Linear"),
        (lambda n, t, v, h: local(n, 1.0, v, h), TypeError, "train_loss must be callable; got float"),
        (lambda n, t, v, h: local(n, t, None, h), TypeError, "valid_loss must be callable; got None"),
        (lambda n, t, v, h: local(n, t, v, [0.5]), TypeError, "hparams must be a Tensor or HyperParameters; got list"),
        (
            lambda n, t, v, h: local(n, t, v, leaf(torch.ones(2, dtype=F64))),
            ValueError,
            r"hparams must have shape \(1,\)",
        ),
        (lambda n, t, v, h: local(n, t, v, leaf(torch.ones(1))), TypeError, "hparams must be float64; got float32"),
        (lambda n, t, v, h: local(n, t, v, double), ValueError, "hparams must be a leaf that requires grad"),
        (lambda n, t, v, h: local(n, t, v, h * 2), ValueError, "hparams must be a leaf that requires grad"),
        (lambda n, t, v, h: local(n, t, v, h, num_steps=-1), ValueError, "num_steps must be >= 0; got -1"),
        (lambda n, t, v, h: local(n, t, v, h, train_steps=0), ValueError, "train_steps must be >= 1; got 0"),
        (lambda n, t, v, h: local(n, t, v, h, num_samples=0), ValueError, "num_samples must be >= 1; got 0"),
        (lambda n, t, v, h: local(n, t, v, h, warmup=1.5), TypeError, "warmup must be an int; got 1.5"),
        (lambda n, t, v, h: local(n, t, v, h, sigma=-1.0), ValueError, "sigma must be finite and >= 0; got -1.0"),
        (
            lambda n, t, v, h: local(n, t, v, h, sigma=torch.ones(2)),
            ValueError,
            r"sigma must be a number or have shape",
        ),
        (lambda n, t, v, h: local(n, t, v, h, record_every=0), ValueError, "record_every must be >= 1; got 0"),
        (lambda n, t, v, h: local(n, t, v, h, patience=0), ValueError, "patience must be >= 1; got 0"),
        (lambda n, t, v, h: local(n, t, v, h, callbacks=3), TypeError, r"callbacks\[0\] must be callable; got int"),
        (
            lambda n, t, v, h: local(n, t, v, h, train_batches=double),
            TypeError,
            "train_batches must be a DataLoader or",
        ),
        (lambda n, t, v, h: local(n, t, v, h, optimizer=sgd(0.1)([h])), ValueError, "optimizer must hold all of the"),
        (
            lambda n, t, v, h: local(n, t, v, h, hyper_optimizer=3),
            TypeError,
            "hyper_optimizer must be callable; got int",
        ),
        (
            lambda n, t, v, h: local(n, t, v, h, hyper_optimizer=torch.optim.LBFGS),
            ValueError,
            "hyper_optimizer must step without a closure; got LBFGS",
        ),
        (lambda n, t, v, h: local(n, lambda p, h: 1.0, v, h), TypeError, "train_loss must return a Tensor; got float"),
        (lambda n, t, v, h: local(n, lambda p, h: h + double, v, h), ValueError, "train_loss must depend on params"),
        (
            lambda n, t, v, h: local(n, lambda p, h: h.expand(3), v, h),
            ValueError,
            r"must return a scalar; got shape \(3,\)",
        ),
        (
            lambda n, t, v, h: everywhere(n, t, v, h),
            TypeError,
            "sample must be given where hparams is a Tensor; got None",
        ),
        (
            lambda n, t, v, h: everywhere(n, t, v, h, sample=lambda m: torch.ones(m, dtype=F64)),
            ValueError,
            r"sample\(10\) must have shape \(10, 1\); got \(10,\)",
        ),
        (
            lambda n, t, v, h: everywhere(n, t, v, h, sample=lambda m: m),
            TypeError,
            "sample must return a Tensor; got int",
        ),
        (lambda n, t, v, h: everywhere(n, t, v, h, num_train_steps=True), TypeError, "num_train_steps must be an int"),
    ]


@pytest.mark.parametrize(("call", "error", "message"), _bad_calls(), ids=[message for *_, message in _bad_calls()])
def test_bad_arguments_of_training_change_nothing(call, error, message):
    problem = linear_problem()
    hypernet, *_, h = problem
    before = [p.detach().clone() for p in [*hypernet.parameters(), h]]
    with pytest.raises(error, match=message):
        call(*problem)
    assert all(map(same_bits, before, [p.detach() for p in [*hypernet.parameters(), h]]))
