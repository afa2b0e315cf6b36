"""Augmentations with strengths for each image: against other ways to write them, statistics and identities."""

import colorsys
import math

import pytest
import torch
from torch import nn

from nestopt_ext.response import (
    Affine,
    ColorJitter,
    Cutout,
    GaussianNoise,
    HyperParameters,
    InputScale,
    StnModel,
    _images,
)

RANGES = {
    "scale": {"low": -1e-3, "high": 0.9},
    "std": {"low": -1e-3, "high": 2},
    "length": {"low": 0, "high": 25, "discrete": True},
    "holes": {"low": 0, "high": 5, "discrete": True},
    "jitter": {"low": -1e-3, "high": 1},
    "hue": {"low": -1e-3, "high": 0.5},
    "degrees": {"low": -1e-3, "high": 45},
    "move": {"low": -1e-3, "high": 0.5},
}
AUGMENTATIONS = {
    "InputScale": lambda: InputScale("scale"),
    "GaussianNoise": lambda: GaussianNoise("std"),
    "Cutout": lambda: Cutout("length", "holes"),
    "ColorJitter": lambda: ColorJitter("jitter", "jitter", "jitter", "hue"),
    "Affine": lambda: Affine("degrees", "move", "move", "degrees"),
}


@pytest.fixture
def model(device):
    hparams = HyperParameters(device=device)
    for name, options in RANGES.items():
        hparams.add(name, 0, **options)
    return StnModel(nn.Identity(), hparams, centred=True)


def points(model, count, **values):
    """Points where all is 0 but these: numbers, or lists of one for each of ``count`` examples."""
    h = model.hparams.unconstrained.detach().expand(count, -1).clone()
    for name, value in values.items():
        entry = model.hparams.entries[name]
        numbers = torch.as_tensor(value, dtype=torch.float64).expand(count)
        h[:, entry.place] = entry.unconstrained(numbers).to(h)
    return h


def images(count, channels=3, height=12, width=9, device="cpu", dtype=torch.float32):
    return torch.rand(count, channels, height, width, device=device, dtype=dtype)


# ---- what all have in common ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", AUGMENTATIONS.values(), ids=AUGMENTATIONS)
def test_strength_zero_is_the_identity(make, model, device):
    x = images(4, device=device)
    with model.at_centre():
        torch.testing.assert_close(make()(x), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", AUGMENTATIONS.values(), ids=AUGMENTATIONS)
def test_eval_mode_is_the_identity_and_asks_for_no_sample(make):
    x = images(4)
    assert make().eval()(x) is x
    with pytest.raises(RuntimeError, match="must be called with a sample"):
        make()(x)


@pytest.mark.parametrize("make", AUGMENTATIONS.values(), ids=AUGMENTATIONS)
def test_each_image_has_its_own_strength_and_its_own_draw(make, model, device):
    strong = {name: [1e-6, 0.4, 0.4] for name in ("scale", "std", "jitter", "hue", "move")} | {
        "length": [0, 5, 5],
        "holes": [0, 2, 2],
        "degrees": [1e-6, 40, 40],
    }
    x = images(1, device=device).expand(3, -1, -1, -1)
    with model.at(points(model, 3, **strong)):
        y = make()(x)
    torch.testing.assert_close(y[0], x[0], rtol=1e-3, atol=1e-3)
    assert (y[1] - x[1]).abs().max() > 0.01
    assert (y[1] - y[2]).abs().max() > 0.01
    assert y.shape == x.shape
    assert not y.requires_grad


@pytest.mark.parametrize("make", AUGMENTATIONS.values(), ids=AUGMENTATIONS)
@pytest.mark.parametrize(("channels", "height", "width", "dtype"), [(1, 5, 8, torch.float64), (3, 1, 1, torch.float32)])
def test_any_size_and_precision(make, model, device, channels, height, width, dtype):
    x = images(2, channels, height, width, device, dtype)
    with model.at(points(model, 2, scale=0.2, std=0.1, length=3, holes=1, jitter=0.5, hue=0.2, degrees=10, move=0.1)):
        y = make()(x)
    assert y.dtype == dtype
    assert y.shape == x.shape
    assert y.isfinite().all()


@pytest.mark.parametrize("make", AUGMENTATIONS.values(), ids=AUGMENTATIONS)
def test_no_graph_leads_to_the_hyperparameters(make, model, device):
    x = images(2, device=device).requires_grad_()
    h = model.hparams.perturbed(2)
    with model.at(h):
        y = make()(x)
    assert torch.autograd.grad(y.sum(), h, allow_unused=True) == (None,)


@pytest.mark.parametrize("make", AUGMENTATIONS.values(), ids=AUGMENTATIONS)
def test_what_are_no_images_is_refused(make, model):
    name = type(make()).__name__
    with model.at_centre():
        with pytest.raises(ValueError, match=rf"{name}: x must be images \[B, C, H, W\]; got shape \(3, 4\)"):
            make()(torch.ones(3, 4))
        with pytest.raises(TypeError, match=f"{name}: x must be floating point; got torch.uint8. Divide bytes by 255"):
            make()(torch.ones(1, 3, 4, 4, dtype=torch.uint8))
    with (
        model.at(points(model, 3)),
        pytest.raises(ValueError, match=r"one number for each of 2 images; got shape \(3,\)"),
    ):
        make()(images(2, device=model.hparams.unconstrained.device))


@pytest.mark.parametrize("make", AUGMENTATIONS.values(), ids=AUGMENTATIONS)
def test_a_nan_is_not_taken_for_strength_zero(make, model, device):
    h = points(model, 2, length=3, holes=1)
    h[1] = math.nan
    with model.at(h):
        y = make()(images(2, device=device))
    assert y.isnan().flatten(1).all(1).tolist() == [False, True]


def test_they_compose(model, device):
    augment = nn.Sequential(*(make() for make in AUGMENTATIONS.values()))
    with model.at(model.hparams.perturbed(4)):
        assert augment(images(4, device=device)).shape == (4, 3, 12, 9)
    assert all(hasattr(part, "extra_repr") and part.extra_repr() for part in augment)
    assert (
        repr(augment[4])
        == "Affine(degrees='degrees', translate='move', scale='move', shear='degrees', mode='bilinear')"
    )


# ---- scale and noise ------------------------------------------------------------------------------------------------


def test_input_scale_is_uniform_between_its_ends(model, device):
    n = 20_000
    x = torch.ones(n, 1, 1, 1, device=device)
    with model.at(points(model, n, scale=0.3)):
        u = InputScale("scale")(x).flatten()
    low, high = 1 / 1.3, 1.3
    assert low - 1e-6 <= u.min() < low + 1e-3
    assert high - 1e-3 < u.max() <= high + 1e-6
    assert abs(u.mean().item() - (low + high) / 2) < 5 * (high - low) / math.sqrt(12 * n)


def test_noise_has_the_deviation_of_each_image(model, device):
    with model.at(points(model, 2, std=[0.1, 1.0])):
        y = GaussianNoise("std")(torch.zeros(2, 1, 100, 200, device=device)).flatten(1)
    expected = torch.tensor([0.1, 1.0], device=device)
    assert ((y.std(1) / expected - 1).abs() < 5 / math.sqrt(2 * 20_000)).all()
    assert (y.mean(1).abs() < 5 * expected / math.sqrt(20_000)).all()


# ---- cutout ---------------------------------------------------------------------------------------------------------


def cutout_by_loops(x, rows, columns, lengths, holes):
    x = x.clone()
    for b in range(len(x)):
        for k in range(int(holes[b])):
            length = int(lengths[b])
            top, left = int(rows[b, k]) - length // 2, int(columns[b, k]) - length // 2
            x[b, :, max(top, 0) : max(top + length, 0), max(left, 0) : max(left + length, 0)] = 7.0
    return x


def test_cutout_is_its_definition(device):
    count, holes = 40, 4
    x = images(count, device=device)
    rows, columns = torch.randint(12, (count, holes)), torch.randint(9, (count, holes))
    lengths, used = torch.randint(0, 15, (count,)).float(), torch.randint(0, holes + 1, (count,)).float()
    found = _images.cutout(x, *(t.to(device) for t in (rows, columns, lengths, used)), fill=7.0)
    assert torch.equal(found, cutout_by_loops(x, rows, columns, lengths, used))


def test_cutout_places_squares_evenly_and_as_many_as_it_should(model, device):
    n = 5000
    with model.at(points(model, n, length=1, holes=3)):
        y = Cutout("length", "holes")(torch.ones(n, 1, 3, 4, device=device))
    share = (y == 0).float().mean(0).flatten()
    expected = 1 - (11 / 12) ** 3
    assert ((share - expected).abs() < 5 * math.sqrt(expected * (1 - expected) / n)).all()
    with model.at(points(model, 50, length=2)):
        y = Cutout("length", fill=5.0)(torch.ones(50, 1, 8, 8, device=device))
    assert set((y == 5).sum((1, 2, 3)).tolist()) <= {1, 2, 4}
    assert (y == 5).any()


def test_more_holes_than_are_drawn_show(model):
    with model.at(points(model, 2, length=2, holes=[2, 3])):
        y = Cutout("length", "holes", max_holes=2)(images(2, device=model.hparams.unconstrained.device))
    assert y.isnan().flatten(1).all(1).tolist() == [False, True]
    with pytest.raises(ValueError, match="max_holes must be at least 1; got 0"):
        Cutout("length", max_holes=0)


# ---- colour ---------------------------------------------------------------------------------------------------------


def test_hue_is_that_of_colorsys(device):
    x = images(4, dtype=torch.float64)
    x[0, :, 0, 0] = 0.5  # gray, black, white and pure colours
    x[0, :, 0, 1] = 0.0
    x[0, :, 0, 2] = 1.0
    x[0, :, 1, :6] = torch.tensor([[1, 0, 0, 1, 1, 0], [0, 1, 0, 1, 0, 1], [0, 0, 1, 0, 1, 1]], dtype=torch.float64)
    shifts = torch.tensor([0.0, 0.2, -0.35, 0.5], dtype=torch.float64)
    found = _images.adjust_hue(x.to(device), shifts.to(device)).cpu()
    expected = torch.empty_like(x)
    for b in range(4):
        for i in range(12):
            for j in range(9):
                hue, saturation, value = colorsys.rgb_to_hsv(*x[b, :, i, j].tolist())
                expected[b, :, i, j] = torch.tensor(
                    colorsys.hsv_to_rgb((hue + shifts[b].item()) % 1, saturation, value), dtype=torch.float64
                )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_brightness_contrast_and_saturation_are_blends():
    x = images(3, dtype=torch.float64)
    factor = torch.tensor([0.0, 0.6, 1.7], dtype=torch.float64)
    for b, f in enumerate(factor.tolist()):
        red, green, blue = x[b]
        luma = 0.2989 * red + 0.587 * green + 0.114 * blue
        for found, expected in (
            (_images.adjust_brightness(x, factor)[b], f * x[b]),
            (_images.adjust_contrast(x, factor)[b], f * x[b] + (1 - f) * luma.mean()),
            (_images.adjust_saturation(x, factor)[b], f * x[b] + (1 - f) * luma),
        ):
            torch.testing.assert_close(found, expected.clamp(0, 1), rtol=0, atol=1e-12)
    one = x[:, :1]
    assert torch.equal(_images.adjust_saturation(one, factor), one)
    assert torch.equal(_images.adjust_hue(one, factor), one)
    expected = (1.7 * one[2] + (1 - 1.7) * one[2].mean()).clamp(0, 1)
    torch.testing.assert_close(_images.adjust_contrast(one, factor)[2], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("mean", "std"), [([0.49, 0.48, 0.45], [0.2, 0.25, 0.3]), (0.5, 0.5)])
def test_colour_of_standardized_pixels_is_that_of_the_pixels(model, device, mean, std):
    x = images(5, device=device)
    m, s = (torch.tensor(t, device=device).reshape(-1, 1, 1) for t in (mean, std))

    def jittered(x, **options):
        torch.manual_seed(5)
        with model.at(points(model, 5, jitter=0.8, hue=0.3)):
            return ColorJitter("jitter", "jitter", "jitter", "hue", **options)(x)

    plain = jittered(x)
    assert plain.min() >= -1e-6
    assert plain.max() <= 1 + 1e-6
    torch.testing.assert_close(jittered((x - m) / s, mean=mean, std=std) * s + m, plain, rtol=0, atol=1e-5)


def test_factors_and_shifts_are_uniform(model, device):
    n = 20_000
    gray = torch.full((n, 1, 1, 1), 0.25, device=device)
    with model.at(points(model, n, jitter=0.5)):
        factor = ColorJitter(brightness="jitter")(gray).flatten() / 0.25
    assert 0.5 - 1e-6 <= factor.min() < 0.501
    assert 1.499 < factor.max() <= 1.5 + 1e-6
    assert abs(factor.mean().item() - 1) < 5 / math.sqrt(12 * n)
    red = torch.tensor([1.0, 0.0, 0.0], device=device).reshape(1, 3, 1, 1).expand(n, -1, -1, -1)
    with model.at(points(model, n, hue=1 / 6)):
        r, g, b = ColorJitter(hue="hue")(red)[:, :, 0, 0].unbind(1)
    turn = torch.where(g > 0, g, -b) / 6  # between magenta and yellow
    assert torch.allclose(r, torch.ones_like(r))
    assert abs(turn.mean().item()) < 5 * (1 / 3) / math.sqrt(12 * n)
    assert turn.min() < -0.165
    assert turn.max() > 0.165


def test_one_name_may_serve_brightness_and_hue(model):
    x = torch.full((2, 3, 2, 2), 0.25, device=model.hparams.unconstrained.device)  # gray: no hue to turn
    with model.at(points(model, 2, hue=0.4)):
        y = ColorJitter(brightness="hue", hue="hue")(x)
    assert ((y - x).abs().flatten(1).amax(1) > 1e-3).all()


def test_colour_refuses_other_channels(model):
    device = model.hparams.unconstrained.device
    with model.at_centre():
        with pytest.raises(ValueError, match="x must have 1 or 3 channels"):
            ColorJitter("jitter")(images(2, 4, device=device))
        with pytest.raises(
            ValueError, match="mean and std must have a number for each channel of x, or one; got 3 and 1"
        ):
            ColorJitter("jitter", mean=[0.1, 0.2, 0.3])(images(2, 1, device=device))
    with pytest.raises(ValueError, match="std must be positive; got 0"):
        ColorJitter("jitter", std=0)


# ---- affine ---------------------------------------------------------------------------------------------------------


def moved(x, *, mode="bilinear", fill=None, **numbers):
    """`_images.affine` with zeros for what is not given."""
    count = len(x)
    given = {name: torch.as_tensor(value, dtype=x.dtype, device=x.device) for name, value in numbers.items()}
    zeros = x.new_zeros(count)
    options = {"angle": zeros, "translate": x.new_zeros(count, 2), "scale": zeros + 1, "shear": zeros}
    if fill is not None:
        fill = torch.as_tensor(fill, dtype=x.dtype, device=x.device).reshape(-1, 1, 1)
    return _images.affine(x, **{**options, **given}, mode=mode, fill=fill)


def test_quarter_turns_moves_and_doubles(device):
    x = images(4, height=8, width=8, device=device, dtype=torch.float64)
    found = moved(x, angle=[0.0, 90.0, 180.0, -90.0])
    for b, turns in enumerate([0, -1, 2, 1]):  # clockwise, as the rows go down
        torch.testing.assert_close(found[b], torch.rot90(x[b], turns, (1, 2)), rtol=0, atol=1e-12)
    wide = images(2, height=6, width=10, device=device, dtype=torch.float64)
    found = moved(wide, translate=[[0.2, 0.0], [-0.1, 0.5]])
    torch.testing.assert_close(found[0, :, :, 2:], wide[0, :, :, :-2], rtol=0, atol=1e-12)
    assert (found[0, :, :, :2].abs() < 1e-12).all()
    torch.testing.assert_close(found[1, :, 3:, :-1], wide[1, :, :-3, 1:], rtol=0, atol=1e-12)
    ramp = torch.linspace(-4.5, 4.5, 10, device=device, dtype=torch.float64).expand(1, 1, 6, 10)
    torch.testing.assert_close(moved(ramp, scale=[2.0])[0, 0, 2], ramp[0, 0, 2] / 2, rtol=0, atol=1e-12)


def test_a_point_goes_where_the_matrix_says(device):
    """A linear image L(p) = a . p is carried to a . M^-1 (p - t), exactly by bilinear interpolation, inside."""
    height, width = 40, 60
    angle, shear, scale, move = 25.0, 15.0, 1.3, (0.05, -0.03)
    y, x = torch.meshgrid(torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2, indexing="ij")
    points = torch.stack([x, y], -1).double()
    a = torch.tensor([0.7, -0.4], dtype=torch.float64)
    turn, lean = math.radians(angle), math.radians(shear)
    rotation = torch.tensor([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]], dtype=torch.float64)
    matrix = scale * rotation @ torch.tensor([[1, -math.tan(lean)], [0, 1]], dtype=torch.float64)
    sources = (points - torch.tensor([move[0] * width, move[1] * height], dtype=torch.float64)) @ torch.linalg.inv(
        matrix
    ).T
    inside = (sources[..., 0].abs() < (width - 2) / 2) & (sources[..., 1].abs() < (height - 2) / 2)
    image = (points @ a).to(device).expand(1, 1, -1, -1)
    found = moved(image, angle=[angle], translate=[move], scale=[scale], shear=[shear])[0, 0].cpu()
    assert inside.double().mean() > 0.5
    torch.testing.assert_close(found[inside], (sources @ a)[inside], rtol=0, atol=1e-10)


@pytest.mark.parametrize("fill", [0.25, [0.1, -2.0, 3.0]])
def test_what_comes_from_outside_is_the_fill(model, device, fill):
    """Moved by a quarter of a pixel, the border is 3/4 image and 1/4 fill; a pixel further out all of it is fill."""
    x = images(2, height=6, width=8, device=device, dtype=torch.float64)
    outside = torch.as_tensor(fill, dtype=torch.float64, device=device).reshape(-1, 1).expand(3, 6)
    found = moved(x, translate=[[1.25 / 8, 0.0], [0.0, 0.0]], fill=fill)
    torch.testing.assert_close(found[0, :, :, 0], outside, rtol=0, atol=1e-12)
    torch.testing.assert_close(found[0, :, :, 1], 0.75 * x[0, :, :, 0] + 0.25 * outside, rtol=0, atol=1e-12)
    torch.testing.assert_close(found[0, :, :, 2:], 0.75 * x[0, :, :, 1:7] + 0.25 * x[0, :, :, :6], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[1], x[1], rtol=0, atol=1e-12)
    nearest = moved(x[:1], translate=[[2.0 / 8, 0.0]], mode="nearest", fill=fill)
    assert torch.equal(nearest[0, :, :, 2:], x[0, :, :, :6])  # to the last bit
    assert torch.equal(nearest[0, :, :, :2], outside.unsqueeze(2).expand(3, 6, 2)[..., :2])
    augment = Affine("degrees", fill=fill).to(device)
    with model.at(points(model, 2, degrees=40)):
        torch.testing.assert_close(
            augment(outside.reshape(1, 3, 6, 1).expand(2, 3, 6, 8)), outside.reshape(1, 3, 6, 1).expand(2, 3, 6, 8)
        )
        assert augment(images(2, device=device, dtype=torch.bfloat16)).dtype == torch.bfloat16
        with pytest.raises(ValueError, match="fill must be a number for each channel of x, or one; got 2 for 3"):
            Affine("degrees", fill=(0.0, 1.0)).to(device)(images(2, device=device))


def test_draws_stay_within_their_strengths(model, device):
    n = 4000
    ramp = torch.linspace(-9.5, 9.5, 20, device=device).expand(n, 1, 20, 20)
    with model.at(points(model, n, move=0.2)):
        y = Affine(translate="move")(ramp)
    shifts = -y[:, 0, 10, 10] + ramp[0, 0, 10, 10]  # the middle sees the ramp move by as many pixels
    assert shifts.min() < -3.99
    assert shifts.max() > 3.99
    assert shifts.abs().max() <= 4 + 1e-3
    assert abs(shifts.mean().item()) < 5 * 8 / math.sqrt(12 * n)
    with pytest.raises(ValueError, match="mode must be 'bilinear' or 'nearest'; got 'cubic'"):
        Affine("degrees", mode="cubic")
    with model.at(points(model, 3, degrees=40)):
        x = images(3, device=device)
        y = Affine("degrees", mode="nearest")(x)
    assert set(y.flatten().tolist()) <= set(x.flatten().tolist()) | {0.0}
