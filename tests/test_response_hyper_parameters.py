"""Hyperparameters: what may be added, the maps to natural units, perturbations, history, and their state."""

import copy
import io
import json
import math
import pickle

import pytest
import torch

from nestopt_ext.response import HyperParameters

RANGES = {
    "identity": ({}, [-3.0, 0.0, 1e4]),
    "softplus above": ({"low": 2.0}, [2.0 + 1e-9, 2.5, 30.0, 1e4]),
    "softplus below": ({"high": -1.0}, [-1.0 - 1e-9, -2.0, -25.0]),
    "exp": ({"low": 1.0, "transform": "exp"}, [1.0 + 1e-9, 2.0, 1e8]),
    "sigmoid": ({"low": -0.5, "high": 0.95}, [-0.5 + 1e-9, 0.0, 0.3, 0.95 - 1e-9]),
}
DISCRETE = {
    "identity": ({}, [-3, 0, 7]),
    "softplus above": ({"low": 2}, [2, 3, 40]),
    "softplus below": ({"high": 3}, [2, 1, -40]),
    "exp": ({"low": 0, "transform": "exp"}, [0, 1, 1000]),
    "sigmoid": ({"low": 2, "high": 24}, [2, 3, 13, 23]),
}


def three(dtype=torch.float64, **kwargs):
    hparams = HyperParameters(dtype=dtype, **kwargs)
    hparams.add("rate", [0.1, 0.2], low=0, high=0.9, shape=(2,), scale=[0.5, 1.0])
    hparams.add("holes", 1, low=0, high=5, discrete=True)
    return hparams.add("decay", 1e-3, low=0, transform="exp", scale=0.25)


@pytest.mark.parametrize(("options", "values"), RANGES.values(), ids=RANGES)
def test_what_is_added_and_assigned_is_what_is_read(options, values, device):
    hparams = HyperParameters(dtype=torch.float64, device=device)
    hparams.add("a", values[0], **options).add("b", values, shape=(len(values),), **options)
    expected = torch.tensor(values, dtype=torch.float64, device=device)
    torch.testing.assert_close(hparams.values()["b"], expected, rtol=1e-12, atol=1e-12)
    assert hparams.values()["a"].shape == ()
    for value in values:
        hparams.assign({"a": value})
        torch.testing.assert_close(hparams.values()["a"].item(), value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("options", "values"), DISCRETE.values(), ids=DISCRETE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_discrete_one_is_whole_and_starts_in_the_middle_of_its_floor(options, values, dtype):
    hparams = HyperParameters(dtype=dtype).add("n", values, discrete=True, shape=(len(values),), **options)
    assert hparams.values()["n"].tolist() == values
    h = hparams.unconstrained.detach()
    nudged = hparams.natural(torch.stack([h - 1e-4, h + 1e-4]))["n"]
    assert nudged.tolist() == [values, values]
    hparams.assign({"n": [v + 0.75 for v in values]})
    assert hparams.values()["n"].tolist() == values


def test_transforms_are_their_formulas():
    h = torch.linspace(-4, 4, 9, dtype=torch.float64).unsqueeze(-1)

    def natural(**options):
        return HyperParameters(dtype=torch.float64).add("x", 1, **options).natural(h)["x"]

    x = h.squeeze(-1)
    for found, expected in (
        (natural(), x),
        (natural(low=0.5), 0.5 + torch.log(1 + x.exp())),
        (natural(high=2), 2 - torch.log(1 + x.exp())),
        (natural(low=0, transform="exp"), x.exp()),
        (natural(low=-1, high=3), -1 + 4 / (1 + (-x).exp())),
        (natural(low=-1, high=3, discrete=True), (-1 + 4 / (1 + (-x).exp())).floor()),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [o for o, _ in RANGES.values() if o], ids=[r for r in RANGES if r != "identity"])
@pytest.mark.parametrize("discrete", [False, True])
def test_extreme_numbers_stay_inside_the_open_range(dtype, options, discrete):
    options = {**options, "low": math.floor(options.get("low", -math.inf)) if "low" in options else -math.inf}
    options["high"] = math.ceil(options["high"]) if "high" in options else math.inf
    low, high = options["low"], options["high"]
    value = low if math.isfinite(low) else high - 1
    hparams = HyperParameters(dtype=dtype).add("x", value + (0 if discrete else 0.5), discrete=discrete, **options)
    largest = min(torch.finfo(dtype).max, 1e30)
    h = torch.tensor([-largest, -500.0, -50.0, 50.0, 500.0, largest], dtype=dtype).unsqueeze(-1).requires_grad_()
    x = hparams.natural(h)["x"]
    assert x.isfinite().all()
    assert ((x >= low) if discrete else (x > low)).all()
    assert (x < high).all()
    if not discrete:
        x.sum().backward()
        assert h.grad.isfinite().all()


def test_floor_of_2_to_24_ends_at_2_and_23():
    hparams = HyperParameters().add("length", 4, low=2, high=24, discrete=True)
    h = torch.linspace(-200, 200, 40001).unsqueeze(-1)
    assert hparams.natural(h)["length"].unique().tolist() == list(range(2, 24))


def test_nan_comes_through():
    nan = torch.full((4,), math.nan, dtype=torch.float64)
    assert all(value.isnan().all() for value in three().natural(nan).values())


def test_natural_values_are_differentiable():
    hparams = HyperParameters(dtype=torch.float64)
    for i, (options, values) in enumerate(RANGES.values()):
        hparams.add(f"x{i}", values[1], **options)
    h = hparams.unconstrained.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda h: tuple(hparams.natural(h).values()), h, check_forward_ad=True)


def test_values_are_copies():
    hparams = HyperParameters().add("x", 1.0)
    before = hparams.values()["x"]
    hparams.assign({"x": 2.0})
    assert before.item() == 1.0
    assert not before.requires_grad


BAD = {
    "name type": (TypeError, {"name": 3}, "name must be a string; got int"),
    "name empty": (ValueError, {"name": ""}, "name must be printable text"),
    "name spaces": (ValueError, {"name": " x"}, "name must be printable text without spaces at its ends; got ' x'"),
    "name twice": (ValueError, {"name": "there"}, "name must be unique; got 'there' again"),
    "low over high": (ValueError, {"low": 1, "high": 0}, "low of 'x' must be less than high; got low=1, high=0"),
    "low is high": (ValueError, {"low": 1, "high": 1}, "must be less than high"),
    "low nan": (ValueError, {"low": math.nan}, "must be less than high; got low=nan"),
    "too close": (ValueError, {"low": 1, "high": 1 + 1e-9}, "must be less than high"),
    "bound type": (TypeError, {"low": "a"}, "low and high of 'x' must be numbers; got 'a'"),
    "bound too large": (ValueError, {"high": 1e39}, "bounds of 'x' must be finite in torch.float32"),
    "bound half": (ValueError, {"low": 0.5, "discrete": True}, "bounds of 'x', a discrete one, must be whole"),
    "value at low": (ValueError, {"value": 0.0, "low": 0}, r"value of 'x' must be finite and in \(0, inf\); got 0\."),
    "value at high": (ValueError, {"value": 0.9, "low": 0, "high": 0.9}, r"in \(0, 0.9\); got 0.9\."),
    "value nan": (ValueError, {"value": math.nan}, "must be finite and in .*; got nan"),
    "value inf": (ValueError, {"value": math.inf}, "must be finite and in .*; got inf"),
    "discrete high": (ValueError, {"value": 24, "low": 2, "high": 24, "discrete": True}, r"in \{2, ..., 23\}; got 24"),
    "discrete low": (ValueError, {"value": 1.9, "low": 2, "high": 24, "discrete": True}, r"in \{2, ..., 23\}; got 1.9"),
    "value type": (TypeError, {"value": "a"}, "value of 'x' must be a number or a list of numbers; got 'a'"),
    "value complex": (TypeError, {"value": torch.tensor(1j)}, "value of 'x' must be real"),
    "value shape": (ValueError, {"value": [1.0, 2.0]}, r"must fit shape \(\); got shape \(2,\). Give shape=\(2,\)"),
    "shape type": (TypeError, {"shape": 3}, r"shape of 'x' must be a tuple of sizes; got 3. Write shape=\(units,\)"),
    "shape empty": (ValueError, {"shape": (0,)}, r"shape of 'x' must have sizes of at least 1; got \(0,\)"),
    "transform": (
        ValueError,
        {"transform": "tanh"},
        "transform of 'x' must be one of identity, softplus, exp, sigmoid",
    ),
    "exp without low": (ValueError, {"transform": "exp"}, "exp needs a finite low, as low=0, and no high"),
    "sigmoid open": (ValueError, {"transform": "sigmoid", "low": 0}, "sigmoid needs two finite bounds"),
    "identity bound": (ValueError, {"transform": "identity", "low": 0}, "identity needs no bounds.*to have softplus"),
    "scale zero": (ValueError, {"scale": 0.0}, "scale of 'x' must be positive and finite; got 0"),
    "scale nan": (ValueError, {"scale": math.nan}, "scale of 'x' must be positive and finite; got nan"),
    "scale shape": (ValueError, {"scale": [1.0, 2.0]}, "scale of 'x' must fit shape"),
}


@pytest.mark.parametrize(("error", "changes", "message"), BAD.values(), ids=BAD)
def test_what_breaks_a_rule_is_refused_and_changes_nothing(error, changes, message):
    hparams = HyperParameters(dtype=torch.float32).add("there", 1.0)
    before, parameters = copy.deepcopy(hparams.state_dict()), list(hparams.parameters())
    with pytest.raises(error, match=f"HyperParameters.add: .*{message}"):
        hparams.add(**{"name": "x", "value": 0.5, **changes})
    assert str(before) == str(hparams.state_dict())
    assert all(a is b for a, b in zip(parameters, hparams.parameters(), strict=True))


def test_the_number_is_fixed_by_layers_and_by_records():
    hparams = three()
    hparams.frozen = True
    with pytest.raises(RuntimeError, match=r"'x' must be added before layers are made for 4 .*make the layers"):
        hparams.add("x", 1.0)
    hparams = three()
    hparams.record(0)
    with pytest.raises(RuntimeError, match="'x' must be added before the first record"):
        hparams.add("x", 1.0)


def test_other_bad_arguments():
    hparams = three()
    with pytest.raises(TypeError, match="dtype must be a floating point one; got"):
        HyperParameters(dtype=torch.int64)
    with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
        hparams.perturbed(0)
    with pytest.raises(
        ValueError, match=r"unconstrained must have 4 numbers in its last dimension; got shape \(2, 3\)"
    ):
        hparams.natural(torch.zeros(2, 3))


def test_assign_changes_all_or_nothing():
    hparams = three()
    before = hparams.unconstrained.clone()
    for error, values in (
        (KeyError, {"decay": 1.0, "unknown": 2.0}),
        (ValueError, {"decay": 1.0, "rate": 0.9}),
        (ValueError, {"decay": 1.0, "holes": math.nan}),
    ):
        with pytest.raises(error, match=r"HyperParameters.assign: .*must be"):
            hparams.assign(values)
        assert torch.equal(before, hparams.unconstrained)
    parameter = hparams.unconstrained
    hparams.assign({"rate": torch.tensor([0.3, 0.4]), "decay": 1.0})
    assert parameter is hparams.unconstrained
    torch.testing.assert_close(
        hparams.values()["rate"], torch.tensor([0.3, 0.4], dtype=torch.float64), atol=1e-7, rtol=0
    )
    assert hparams.values()["decay"].item() == 1.0
    assert hparams.values()["holes"].item() == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scales_are_what_was_given(dtype):
    expected = [1e-6, 0.5, 1.0, 30.0]
    hparams = HyperParameters(dtype=dtype).add("x", 0.0, shape=(4,), scale=expected)
    torch.testing.assert_close(
        hparams.scale(), torch.tensor(expected, dtype=dtype), rtol=8 * torch.finfo(dtype).eps, atol=0
    )


def test_perturbations_have_mean_h_and_the_scales_as_deviations(device):
    hparams = three(device=device)
    n = 40_000
    generator = torch.Generator(device).manual_seed(1)
    h = hparams.perturbed(n, generator).detach()
    z = (h - hparams.unconstrained.detach()) / hparams.scale().detach()
    assert (z.mean(0).abs() < 5 / n**0.5).all()  # five standard errors
    assert ((z.var(0) - 1).abs() < 5 * (2 / n) ** 0.5).all()
    assert torch.equal(h, hparams.perturbed(n, generator.manual_seed(1)).detach())
    correlations = torch.corrcoef(z.T) - torch.eye(4, device=device, dtype=z.dtype)
    assert (correlations.abs() < 5 / n**0.5).all()


def test_gradients_of_perturbations_are_those_of_their_formula():
    hparams = three()
    h = hparams.perturbed(7)
    noise = ((h - hparams.unconstrained) / hparams.scale()).detach()
    of_h, of_r = torch.autograd.grad(h.sum(), hparams.parameters())
    assert of_h.tolist() == [7.0] * 4
    torch.testing.assert_close(of_r, hparams.raw_scale.detach().sigmoid() * noise.sum(0), rtol=1e-10, atol=1e-10)


def test_entropy_is_that_of_the_normal_distribution():
    hparams = three()
    expected = torch.distributions.Normal(0, hparams.scale().detach()).entropy().sum()
    torch.testing.assert_close(hparams.entropy().detach(), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entropy_and_its_gradient_stay_finite_where_the_scale_vanishes(dtype):
    hparams = HyperParameters(dtype=dtype).add("x", 0.0)
    slopes = []
    for r in (-1000.0, -200.0, -37.5, -36.5):
        hparams.raw_scale.data.fill_(r)
        entropy = hparams.entropy()
        torch.testing.assert_close(entropy.item(), r + 0.5 * math.log(2 * math.pi * math.e), rtol=1e-6, atol=0)
        slopes += torch.autograd.grad(entropy, hparams.raw_scale)[0].tolist()
    assert slopes == pytest.approx([1.0] * 4, rel=1e-6)


def test_history_is_plain_numbers():
    hparams = three()
    first = hparams.record(0)
    hparams.assign({"decay": 1.0, "holes": 4})
    hparams.record(10)
    assert first["values"]["holes"] == 1
    assert hparams.history["step"] == [0, 10]
    assert hparams.history["values"]["holes"] == [1, 4]
    assert hparams.history["values"]["decay"] == pytest.approx([1e-3, 1.0], rel=1e-12)
    assert hparams.history["values"]["rate"][1] == pytest.approx([0.1, 0.2], rel=1e-12)
    assert hparams.history["scales"]["rate"][0] == pytest.approx([0.5, 1.0], rel=1e-12)
    assert json.loads(json.dumps(hparams.history)) == hparams.history
    first["values"]["rate"][0] = 7.0
    assert hparams.history["values"]["rate"][0][0] == pytest.approx(0.1)


def test_a_nan_is_recorded_as_one():
    hparams = three()
    hparams.unconstrained.data.fill_(math.nan)
    assert all(map(math.isnan, [hparams.record(0)["values"][name] for name in ("holes", "decay")]))


def test_state_carries_values_and_history_and_is_read_without_pickle():
    hparams = three()
    hparams.record(0)
    file = io.BytesIO()
    torch.save(hparams.state_dict(), file)
    hparams.record(1)  # the saved state does not see it
    file.seek(0)
    other = three()
    other.assign({"decay": 2.0})
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.unconstrained, hparams.unconstrained)
    assert other.history["step"] == [0]
    other.record(5)
    assert other.history["values"]["holes"] == [1, 1]


DIFFERENT = {
    "missing": (lambda h: h, "lacks 'decay'"),
    "other name": (lambda h: h.add("wd", 1.0), "lacks 'decay' and has unknown 'wd'"),
    "other range": (lambda h: h.add("decay", 1.0), "'decay' has low 0.0, got -inf"),
}


@pytest.mark.parametrize(("add", "message"), DIFFERENT.values(), ids=DIFFERENT)
def test_other_entries_are_refused_by_name(add, message):
    given = HyperParameters(dtype=torch.float64)
    given.add("rate", [0.1, 0.2], low=0, high=0.9, shape=(2,)).add("holes", 1, low=0, high=5, discrete=True)
    state = add(given).state_dict()
    hparams = three()
    before = hparams.unconstrained.clone()
    with pytest.raises(RuntimeError, match=f"entries must be the same; .*{message}"):
        hparams.load_state_dict(state)
    assert torch.equal(before, hparams.unconstrained)


def test_order_matters_to_a_state():
    one = HyperParameters().add("a", 1.0).add("b", 2.0)
    other = HyperParameters().add("b", 2.0).add("a", 1.0)
    with pytest.raises(RuntimeError, match="'a' has start 0, got 1"):
        one.load_state_dict(other.state_dict())


@pytest.mark.parametrize("again", [copy.deepcopy, lambda h: pickle.loads(pickle.dumps(h))], ids=["deepcopy", "pickle"])
def test_copies_are_whole_and_apart(again):
    hparams = three()
    hparams.record(0)
    hparams.frozen = True
    other = again(hparams)
    assert str(other) == str(hparams)
    assert other.frozen
    assert other.history == hparams.history
    other.assign({"decay": 1.0})
    other.record(1)
    assert hparams.history["step"] == [0]
    assert hparams.values()["decay"].item() == pytest.approx(1e-3)


def test_it_moves_and_trains_as_a_module(device):
    hparams = three().to(device, torch.float32)
    assert hparams.values()["rate"].dtype == torch.float32
    assert hparams.values()["rate"].device.type == device.type
    assert [name for name, _ in hparams.named_parameters()] == ["unconstrained", "raw_scale"]
    loss = hparams.natural(hparams.perturbed(8))["decay"].sum() - hparams.entropy()
    loss.backward()
    before = hparams.unconstrained.detach().clone()
    torch.optim.RMSprop(hparams.parameters(), 0.01).step()
    assert not torch.equal(before[3:], hparams.unconstrained[3:])
    hparams.unconstrained.requires_grad_(False)
    assert not hparams.add("late", 1.0).unconstrained.requires_grad


def test_the_table_says_what_there_is():
    hparams = three().add("free", 2.0).add("above", 3, low=1, discrete=True).add("one", 0, low=0, high=1, discrete=True)
    assert str(hparams).splitlines() == [
        "name   value           range        transform  scale",
        "rate   0.1 to 0.2 (2)  (0, 0.9)     sigmoid    0.5 to 1 (2)",
        "holes  1               {0, ..., 4}  sigmoid    1",
        "decay  0.001           (0, inf)     exp        0.25",
        "free   2               (-inf, inf)  identity   1",
        "above  3               {1, ...}     softplus   1",
        "one    0               {0}          sigmoid    1",
    ]
    assert "rate: (2,) in (0, 0.9) by sigmoid" in repr(hparams)
    assert repr(torch.nn.ModuleList([hparams])).count("decay") == 1
    assert str(HyperParameters()) == "name  value  range  transform  scale"
