"""Lyapunov exponents of maps: closed forms, dense products, derivatives, long horizons, and ascent."""

import math
import weakref

import pytest
import torch
from cases import F64, generator
from game_cases import SmoothGame

from nestopt_ext import games
from nestopt_ext.games import (
    lyapunov_exponents,
    max_lyapunov_exponent,
    max_lyapunov_start,
    mix,
    momentum_map,
    sgd_map,
    small_ipd,
)


def linear(matrix):
    return lambda x: (matrix @ x.unsqueeze(-1)).squeeze(-1)


def bent(matrix):
    """A map with a Jacobian that changes from place to place."""
    return lambda x: torch.sin((matrix @ x.unsqueeze(-1)).squeeze(-1)) + 0.3 * x


def product(step, start, num_steps):
    """J_{k-1} ... J_0 of one start, by torch's own Jacobians."""
    x, total = start, torch.eye(len(start), dtype=F64)
    for _ in range(num_steps):
        total = torch.autograd.functional.jacobian(lambda x: step(x[None])[0], x) @ total
        x = step(x[None])[0].detach()
    return total


MATRIX = torch.randn(4, 4, dtype=F64, generator=generator(0))
STARTS = torch.randn(6, 4, dtype=F64, generator=generator(1))

GAMES = {
    "small ipd": lambda: (sgd_map(small_ipd(), 1.0), torch.randn(5, 2, dtype=F64, generator=generator(2))),
    "mix, momentum": lambda: (
        momentum_map(mix(), 2.0, 0.5j),
        torch.randn(5, 6, dtype=F64, generator=generator(3)),
    ),
    "subspace ipd, lola": lambda: (
        games.lola_map(games.random_subspace_ipd(), 0.2),
        torch.randn(3, 2, dtype=F64, generator=generator(4)),
    ),
    "bent": lambda: (bent(MATRIX), STARTS),
}


@pytest.fixture(params=GAMES)
def case(request):
    return GAMES[request.param]()


# ---- values ----------------------------------------------------------------------------------------------------------


def test_exponents_are_those_of_the_product_of_jacobians(case):
    step, starts = case
    num_steps = 6
    found = max_lyapunov_exponent(step, starts, num_steps=num_steps)
    several = lyapunov_exponents(step, starts, num_steps=num_steps, num_exponents=2)
    products = [product(step, start, num_steps) for start in starts]
    wanted = torch.stack([torch.linalg.svdvals(p) for p in products])[:, :2].log() * (2 / num_steps)
    torch.testing.assert_close(found.exponent, wanted[:, 0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(several, wanted, rtol=1e-7, atol=1e-9)
    for p, direction, exponent in zip(products, found.direction, found.exponent, strict=True):
        assert direction.norm().item() == pytest.approx(1.0)
        assert direction[direction.abs().argmax()] > 0
        assert (2 / num_steps * (p @ direction).norm().log()).item() == pytest.approx(exponent.item(), abs=1e-10)


def test_exponents_of_directions(case):
    step, starts = case
    num_steps = 5
    frame = torch.randn(*starts.shape, 2, dtype=F64, generator=generator(5))
    found = lyapunov_exponents(step, starts, num_steps=num_steps, direction=frame)
    alone = lyapunov_exponents(step, starts, num_steps=num_steps, direction=frame[:, :, 0])
    torch.testing.assert_close(alone, found[:, :1], rtol=1e-10, atol=1e-12)
    for start, columns, exponents in zip(starts, frame, found, strict=True):
        before, after = columns, product(step, start, num_steps) @ columns
        lengths = [torch.linalg.qr(c).R.diagonal().abs().log() for c in (before, after)]
        torch.testing.assert_close(exponents, (lengths[1] - lengths[0]) * (2 / num_steps), rtol=1e-8, atol=1e-10)
    shared = lyapunov_exponents(step, starts, num_steps=num_steps, direction=7 * frame[0, :, 0])
    again = lyapunov_exponents(step, starts, num_steps=num_steps, direction=frame[0, :, 0].expand_as(starts))
    torch.testing.assert_close(shared, again)


def test_the_direction_of_one_step_on_its_own():
    step, starts = bent(MATRIX), STARTS
    found = max_lyapunov_exponent(step, starts, num_steps=3, per_step=True)
    wanted, x = torch.zeros(6, dtype=F64), starts
    for number in range(3):
        jacobians = games.map_jacobian(step, x).dense()
        wanted += torch.linalg.svdvals(jacobians)[:, 0].square().log() / 3
        if number == 0:
            stretched = (jacobians @ found.direction[:, :, None]).norm(dim=1)[:, 0]
            torch.testing.assert_close(stretched, torch.linalg.svdvals(jacobians)[:, 0])
        x = step(x)
    torch.testing.assert_close(found.exponent, wanted)
    assert (found.exponent >= max_lyapunov_exponent(step, starts, num_steps=3).exponent - 1e-12).all()


def test_closed_forms_of_linear_maps():
    start = torch.zeros(1, 2, dtype=F64)
    turn = 0.9 * torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=F64)
    exponents = lyapunov_exponents(linear(turn), start, num_steps=20, num_exponents=2)
    torch.testing.assert_close(exponents, torch.full((1, 2), 2 * math.log(0.9), dtype=F64))
    # symmetric: eigenvalues; a shear: sigma_max of [[1, k], [0, 1]]
    symmetric = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=F64)
    exponents = lyapunov_exponents(linear(symmetric), start, num_steps=30, num_exponents=2)
    torch.testing.assert_close(exponents, torch.tensor([[2 * math.log(3.0), 0.0]], dtype=F64), atol=1e-12, rtol=1e-12)
    shear = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=F64)
    found = max_lyapunov_exponent(linear(shear), start, num_steps=10).exponent.item()
    assert found == pytest.approx(2 / 10 * math.asinh(5.0))  # sigma = (k + sqrt(k^2 + 4)) / 2


def test_long_horizons_neither_overflow_nor_vanish():
    """The product would be 10^1200 by 10^-1200; the exponents of any matrix tend to those of its eigenvalues."""
    matrix = torch.tensor([[1e3, 5.0, 0.0], [0.0, 1.0, 2.0], [0.0, 0.0, 1e-3]], dtype=F64)
    start = torch.zeros(2, 3, dtype=F64)
    found = lyapunov_exponents(linear(matrix), start, num_steps=400, num_exponents=3)
    wanted = 2 * torch.tensor([1e3, 1.0, 1e-3], dtype=F64).log()
    torch.testing.assert_close(found, wanted.repeat(2, 1), atol=1e-2, rtol=0)
    assert found.sum(1).tolist() == pytest.approx([0.0, 0.0], abs=1e-9)  # log of the determinant
    largest = max_lyapunov_exponent(linear(matrix), start, num_steps=400)
    assert largest.exponent.tolist() == pytest.approx([wanted[0].item()] * 2, abs=1e-4)


@pytest.mark.parametrize(
    ("lr", "logits", "exponents"),
    [
        (1.0, [-2.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0], [-0.018, 0.010, 0.044, 0.083, 0.0985, 0.009, -0.056]),
        (5.0, [0.5], [0.408]),
    ],
)
def test_small_ipd_has_the_published_exponents(lr, logits, exponents):
    diagonal = torch.tensor(logits, dtype=F64)
    found = max_lyapunov_exponent(sgd_map(small_ipd(), lr), torch.stack([diagonal, diagonal], 1), num_steps=10)
    assert found.exponent.tolist() == pytest.approx(exponents, abs=6e-4)


def test_matching_pennies_turn():
    """At the solution J = I - lr [[0, 1/4], [-1/4, 0]]: every direction grows by 1 + lr^2 / 16."""
    step = sgd_map(games.matching_pennies(), 2.0)
    found = lyapunov_exponents(step, torch.zeros(1, 2, dtype=F64), num_steps=7, num_exponents=2)
    torch.testing.assert_close(found, torch.full((1, 2), math.log(1.25), dtype=F64))


# ---- many starts -----------------------------------------------------------------------------------------------------


def test_many_starts_are_one_start_after_the_other(case):
    step, starts = case
    together = max_lyapunov_exponent(step, starts, num_steps=4)
    several = lyapunov_exponents(step, starts, num_steps=4, num_exponents=2)
    for b in range(len(starts)):
        alone = max_lyapunov_exponent(step, starts[b : b + 1], num_steps=4)
        torch.testing.assert_close(alone.exponent, together.exponent[b : b + 1], rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(alone.direction, together.direction[b : b + 1], rtol=1e-7, atol=1e-9)
        one = lyapunov_exponents(step, starts[b : b + 1], num_steps=4, num_exponents=2)
        torch.testing.assert_close(one, several[b : b + 1], rtol=1e-6, atol=1e-8)


def test_starts_that_blow_up_are_nan_and_spare_the_others():
    def step(x):
        return x + x**3

    start = torch.tensor([[0.1, 0.2], [1e200, 0.1], [0.3, math.nan]], dtype=F64)
    alone = max_lyapunov_exponent(step, start[:1], num_steps=4)
    for options in ({}, {"per_step": True}):
        found = max_lyapunov_exponent(step, start, num_steps=4, **options)
        assert found.exponent.isnan().tolist() == [False, True, True]
    x = start.clone().requires_grad_()
    found = max_lyapunov_exponent(step, x, num_steps=4)
    assert found.exponent[0] == alone.exponent[0]
    (gradient,) = torch.autograd.grad(found.exponent[0], x)
    assert gradient[0].isfinite().all()
    several = lyapunov_exponents(step, start, num_steps=4, num_exponents=2)
    assert several.isnan().all(1).tolist() == [False, True, True]
    assert lyapunov_exponents(step, start, num_steps=4, direction=start[0]).isnan()[:, 0].tolist() == [
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("size", [2, 70])
def test_starts_that_are_not_finite_are_nan_where_the_jacobian_is_constant(size):
    start = torch.ones(3, size, dtype=F64)
    start[0, 0], start[1, 1] = torch.nan, torch.inf
    direction = torch.ones(size, dtype=F64)
    exponents = [
        max_lyapunov_exponent(lambda x: 2 * x, start, num_steps=3).exponent,
        lyapunov_exponents(lambda x: 2 * x, start, num_steps=3, direction=direction)[:, 0],
    ]
    if size == 2:
        exponents.append(max_lyapunov_exponent(lambda x: 2 * x, start, num_steps=3, per_step=True).exponent)
    for found in exponents:
        assert found[:2].isnan().all()
        assert found[2].item() == pytest.approx(2 * math.log(2))


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_lengths_whose_squares_leave_the_range_of_float32(size):
    stretch = torch.tensor([size, 0.0])
    found = lyapunov_exponents(lambda x: x * stretch, torch.zeros(1, 2), num_steps=3)
    assert found.item() == pytest.approx(2 * math.log(size), rel=1e-6)


def test_nothing_left_of_a_direction_is_minus_infinity():
    flat = torch.diag(torch.tensor([1.0, 0.0], dtype=F64))
    start = torch.zeros(1, 2, dtype=F64)
    assert max_lyapunov_exponent(linear(0 * flat), start, num_steps=3).exponent.item() == -math.inf
    found = lyapunov_exponents(linear(flat), start, num_steps=3, direction=torch.eye(2, dtype=F64)[None])
    assert found.tolist() == [[0.0, -math.inf]]
    assert lyapunov_exponents(linear(flat), start, num_steps=3, direction=torch.tensor([0.0, 1.0])).item() == -math.inf


# ---- products alone --------------------------------------------------------------------------------------------------


def large():
    """A map of 70 numbers with leading singular values apart, above the size up to which matrices are formed."""
    g = generator(6)
    left, right = (torch.linalg.qr(torch.randn(70, 70, dtype=F64, generator=g))[0] for _ in range(2))
    values = torch.linspace(0.9, 0.1, 70, dtype=F64)
    values[:3] = torch.tensor([3.0, 2.0, 1.5], dtype=F64)
    matrix = left @ torch.diag(values) @ right
    return bent(matrix), 0.1 * torch.randn(2, 70, dtype=F64, generator=g)


@pytest.mark.parametrize("num_exponents", [1, 2])
def test_large_states_are_searched_by_products(num_exponents):
    step, starts = large()
    found = lyapunov_exponents(step, starts, num_steps=4, num_exponents=num_exponents)
    values = torch.stack([torch.linalg.svdvals(product(step, start, 4)) for start in starts])
    torch.testing.assert_close(found, values[:, :num_exponents].log() / 2, rtol=1e-9, atol=1e-10)
    largest = max_lyapunov_exponent(step, starts, num_steps=4)
    torch.testing.assert_close(largest.exponent, found[:, 0], rtol=1e-10, atol=1e-11)
    alone = max_lyapunov_exponent(step, starts[1:], num_steps=4)
    torch.testing.assert_close(alone.direction[0], largest.direction[1], rtol=0, atol=1e-7)


def test_large_states_that_blow_up_are_nan_and_spare_the_others():
    step, starts = large()
    lost = starts.clone()
    lost[0, 0] = math.inf
    found = max_lyapunov_exponent(step, lost, num_steps=3).exponent
    assert found.isnan().tolist() == [True, False]
    torch.testing.assert_close(found[1], max_lyapunov_exponent(step, starts, num_steps=3).exponent[1])


def test_directions_that_do_not_converge_are_told_of_once():
    crowded = torch.linalg.qr(torch.randn(70, 70, dtype=F64, generator=generator(10)))[0]
    step = bent(crowded * torch.linspace(1.0, 0.99, 70, dtype=F64))
    start = torch.ones(1, 70, dtype=F64)
    for function, kind in (
        (max_lyapunov_exponent, "max_lyapunov_exponent"),
        (lyapunov_exponents, "lyapunov_exponents"),
        (lambda *a, **k: max_lyapunov_start(*a, **k, max_steps=2), "max_lyapunov_start"),
    ):
        message = f"{kind}: the leading directions must converge.* Raise max_products, or take float64"
        with pytest.warns(RuntimeWarning, match=message) as told:
            function(step, start, num_steps=1, max_products=40)
        assert len(told) == 1


def test_the_exponent_of_a_large_state_has_its_first_derivative_and_no_second():
    step, starts = large()
    x = starts.clone().requires_grad_()
    found = max_lyapunov_exponent(step, x, num_steps=3).exponent
    (gradient,) = torch.autograd.grad(found.sum(), x, create_graph=True)
    along = torch.randn(2, 70, dtype=F64, generator=generator(7))
    h = 1e-5
    ahead, behind = (max_lyapunov_exponent(step, starts + s * h * along, num_steps=3).exponent for s in (1, -1))
    torch.testing.assert_close((gradient * along).sum(1), (ahead - behind) / (2 * h), rtol=1e-5, atol=1e-8)
    with pytest.raises(RuntimeError, match="second derivative must not be taken"):
        torch.autograd.grad(gradient.sum(), x)


# ---- derivatives -----------------------------------------------------------------------------------------------------


def test_exponents_are_differentiable_in_the_start(case):
    step, starts = case
    x = starts[:2].clone().requires_grad_()
    direction = torch.randn(x.shape[1], 2, dtype=F64, generator=generator(8)).expand(2, -1, 2)
    for function in (
        lambda x: max_lyapunov_exponent(step, x, num_steps=2).exponent,
        lambda x: max_lyapunov_exponent(step, x, num_steps=2, per_step=True).exponent,
        lambda x: lyapunov_exponents(step, x, num_steps=2, num_exponents=2),
        lambda x: lyapunov_exponents(step, x, num_steps=2, direction=direction),
    ):
        assert torch.autograd.gradcheck(function, x, fast_mode=True)


def test_second_derivatives_are_right_or_refused():
    step, x = bent(MATRIX), STARTS[:2].clone().requires_grad_()
    direction = torch.randn(4, dtype=F64, generator=generator(9))
    assert torch.autograd.gradgradcheck(lambda x: max_lyapunov_exponent(step, x, num_steps=3).exponent, x)
    assert torch.autograd.gradgradcheck(lambda x: lyapunov_exponents(step, x, num_steps=3, direction=direction), x)
    found = lyapunov_exponents(step, x, num_steps=3, num_exponents=2)
    (gradient,) = torch.autograd.grad(found.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative must not be taken"):
        torch.autograd.grad(gradient.sum(), x)


@pytest.mark.parametrize("name", ["small ipd", "mix, momentum", "bent"])
def test_recomputation_changes_neither_values_nor_derivatives(name):
    step, starts = GAMES[name]()
    functions = [
        lambda x, again: max_lyapunov_exponent(step, x, num_steps=5, recompute=again).exponent,
        lambda x, again: max_lyapunov_exponent(step, x, num_steps=5, per_step=True, recompute=again).exponent,
        lambda x, again: lyapunov_exponents(step, x, num_steps=5, num_exponents=2, recompute=again),
        lambda x, again: lyapunov_exponents(step, x, num_steps=5, direction=starts[0], recompute=again),
    ]
    for function in functions:
        results = []
        for again in (False, True):
            x = starts.clone().requires_grad_()
            value = function(x, again)
            results.append((value.detach(), *torch.autograd.grad(value.square().sum(), x)))
        assert torch.equal(results[0][0], results[1][0])
        torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-12, atol=1e-14)


def peak_of(monkeypatch, recompute, num_steps):
    """The largest number of saved tensors that are alive at once, and the gradient."""
    live = peak = 0
    x = torch.randn(37, 2, dtype=F64, generator=generator(0)).requires_grad_()
    detach = torch.Tensor.detach

    def dropped():
        nonlocal live
        live -= 1

    def counted(tensor):  # what a hook keeps is detached, here and in the recomputation
        nonlocal live, peak
        kept = detach(tensor)
        if tensor.numel() >= 37:
            live += 1
            peak = max(peak, live)
            weakref.finalize(kept, dropped)
        return kept

    step = sgd_map(small_ipd(), 1.0)
    with monkeypatch.context() as patch:
        if recompute:
            patch.setattr(torch.Tensor, "detach", counted)
            found = max_lyapunov_exponent(step, x, num_steps=num_steps, recompute=True).exponent
        else:
            with torch.autograd.graph.saved_tensors_hooks(counted, lambda kept: kept):
                found = max_lyapunov_exponent(step, x, num_steps=num_steps).exponent
        (gradient,) = torch.autograd.grad(found.sum(), x)
    return peak, gradient


def test_recomputation_keeps_a_square_root_of_the_tensors(monkeypatch):
    peaks = {}
    for num_steps in (9, 36):
        plain, wanted = peak_of(monkeypatch, False, num_steps)
        recomputed, found = peak_of(monkeypatch, True, num_steps)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)
        peaks[num_steps] = (plain, recomputed)
    assert peaks[36][0] >= 3.9 * peaks[9][0], "the plain graph keeps all"
    assert peaks[36][1] <= 2.2 * peaks[9][1], "twice the square root for four times the steps"
    assert peaks[36][1] < peaks[36][0] / 3


def test_nothing_has_a_graph_where_none_is_asked_for():
    step, starts = GAMES["small ipd"]()
    assert not max_lyapunov_exponent(step, starts, num_steps=2).exponent.requires_grad
    x = starts.clone().requires_grad_()
    assert not max_lyapunov_exponent(step, x, num_steps=2).direction.requires_grad
    with torch.no_grad():
        assert not max_lyapunov_exponent(step, x, num_steps=2).exponent.requires_grad
        assert not lyapunov_exponents(step, x, num_steps=2).requires_grad
    assert x.grad is None


def test_exponents_on_a_device(device):
    step = sgd_map(small_ipd(device=device, dtype=torch.float32), 1.0)
    start = step.start(torch.tensor([[0.5, 0.5], [1.0, 1.0]]))
    found = max_lyapunov_exponent(step, start, num_steps=10)
    assert found.exponent.tolist() == pytest.approx([0.083, 0.0985], abs=6e-4)
    assert found.direction.device.type == device.type
    assert lyapunov_exponents(step, start, num_steps=10, num_exponents=2).isfinite().all()


# ---- ascent ----------------------------------------------------------------------------------------------------------


def test_ascent_on_small_ipd_ends_at_the_published_point():
    step = sgd_map(small_ipd(), 1.0)
    start = torch.tensor([[0.0, 0.5], [2.0, 1.0], [0.1, -0.4]], dtype=F64)
    found = max_lyapunov_start(step, start, num_steps=10, max_steps=30)
    torch.testing.assert_close(found.start, torch.tensor([[0.93, 0.92]], dtype=F64).expand(3, 2), atol=0.03, rtol=0)
    assert found.exponent.tolist() == pytest.approx([0.099] * 3, abs=1e-3)
    torch.testing.assert_close(found.direction, torch.full((3, 2), 0.5**0.5, dtype=F64), atol=0.05, rtol=0)
    assert found.history.shape == (31, 3)
    assert torch.equal(found.history[0], max_lyapunov_exponent(step, start, num_steps=10).exponent)
    assert torch.equal(found.history[-1], found.exponent)
    assert (found.history.diff(dim=0) >= 0).all()
    again = max_lyapunov_exponent(step, found.start, num_steps=10)
    torch.testing.assert_close(again.exponent, found.exponent)
    assert not found.start.requires_grad


def test_ascent_takes_gradients_where_none_are_kept():
    step = sgd_map(small_ipd(), 1.0)
    start = torch.tensor([[0.0, 0.5]], dtype=F64)
    wanted = max_lyapunov_start(step, start, num_steps=5, max_steps=3)
    with torch.no_grad():
        found = max_lyapunov_start(step, start, num_steps=5, max_steps=3)
    assert torch.equal(found.start, wanted.start)
    assert not torch.equal(found.start, start)


def test_ascent_moves_parameters_and_leaves_buffers():
    step = momentum_map(mix(), 1.0, 0.5)
    start = step.start(torch.zeros(2, 2, dtype=F64))
    for options in ({}, {"normalized": False}, {"recompute": True}):
        found = max_lyapunov_start(step, start, num_steps=4, max_steps=3, **options)
        assert torch.equal(found.start[:, 2:], start[:, 2:])
        assert (found.exponent > found.history[0]).all()
    assert torch.equal(start, torch.zeros(2, 4, dtype=F64))


def test_ascent_without_normalization_takes_the_gradient():
    step = bent(MATRIX)
    x = STARTS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(max_lyapunov_exponent(step, x, num_steps=2).exponent.sum(), x)
    found = max_lyapunov_start(step, STARTS, num_steps=2, lr=1e-3, max_steps=1, normalized=False)
    torch.testing.assert_close(found.start, STARTS + 1e-3 * gradient)
    unit = gradient / gradient.norm(dim=1, keepdim=True)
    found = max_lyapunov_start(step, STARTS, num_steps=2, lr=1e-3, max_steps=1)
    torch.testing.assert_close(found.start, STARTS + 1e-3 * unit)


def test_ascent_stays_where_there_is_no_gradient_and_counts_nan_as_the_worst():
    constant = max_lyapunov_start(linear(MATRIX), STARTS, num_steps=2, max_steps=2)
    assert torch.equal(constant.start, STARTS)

    def step(x):
        return x + x**3

    start = torch.tensor([[0.1, 0.2], [math.nan, 0.1]], dtype=F64)
    found = max_lyapunov_start(step, start, num_steps=2, max_steps=3)
    assert found.exponent.isnan().tolist() == [False, True]
    assert found.start[0].isfinite().all()
    assert found.exponent[0] > found.history[0, 0]


def test_ascent_of_a_game_of_networks():
    game = SmoothGame(0)
    players = game.players()

    class Scalar:
        def __init__(self):
            self.players = players

        def losses(self, players):
            return game.losses(players)

    step = sgd_map(Scalar(), 0.02)
    found = max_lyapunov_start(step, step.start(), num_steps=3, max_steps=3, lr=0.01)
    assert found.exponent > found.history[0]


# ---- bad arguments ---------------------------------------------------------------------------------------------------

IDENTITY = lambda x: x.clone()  # noqa: E731
START = torch.zeros(2, 3, dtype=F64)
WIDE = torch.zeros(1, 70, dtype=F64)

BAD = [
    (lambda: lyapunov_exponents(None, START, num_steps=2), TypeError, "lyapunov_exponents: step must be a map"),
    (lambda: lyapunov_exponents(IDENTITY, START[0], num_steps=2), ValueError, r"start must have shape \(B, S\)"),
    (lambda: lyapunov_exponents(IDENTITY, START.half(), num_steps=2), TypeError, "start must be float32 or float64"),
    (lambda: lyapunov_exponents(IDENTITY, START, num_steps=0), ValueError, "num_steps must be >= 1"),
    (lambda: lyapunov_exponents(IDENTITY, START, num_steps=2.0), TypeError, "num_steps must be an integer"),
    (lambda: lyapunov_exponents(IDENTITY, START, num_steps=2, num_exponents=4), ValueError, "between 1 and 3"),
    (
        lambda: lyapunov_exponents(IDENTITY, START, num_steps=2, direction=[1.0]),
        TypeError,
        "direction must be a tensor",
    ),
    (
        lambda: lyapunov_exponents(IDENTITY, START, num_steps=2, direction=START[:, :2]),
        ValueError,
        r"direction must have shape \(3,\), \(2, 3\) or \(2, 3, m\)",
    ),
    (
        lambda: lyapunov_exponents(IDENTITY, START, num_steps=2, direction=START),
        ValueError,
        "direction must be finite and not zero",
    ),
    (
        lambda: lyapunov_exponents(IDENTITY, START, num_steps=2, direction=torch.tensor([torch.inf, 0.0, 1.0])),
        ValueError,
        "direction must be finite and not zero",
    ),
    (
        lambda: lyapunov_exponents(IDENTITY, START, num_steps=2, direction=torch.tensor([1j, 0.0, 1.0])),
        TypeError,
        "direction must be real; got complex64",
    ),
    (lambda: lyapunov_exponents(IDENTITY, START, num_steps=2, recompute=1), TypeError, "recompute must be a bool"),
    (lambda: max_lyapunov_exponent(lambda x: x[:1], START, num_steps=2), ValueError, "step must return a tensor like"),
    (
        lambda: max_lyapunov_exponent(lambda x: x.detach(), START, num_steps=2),
        ValueError,
        "step must be differentiable",
    ),
    (lambda: max_lyapunov_exponent(IDENTITY, START, num_steps=2, per_step=1), TypeError, "per_step must be a bool"),
    (
        lambda: max_lyapunov_exponent(IDENTITY, WIDE, num_steps=2, per_step=True),
        ValueError,
        "per_step must be False for states of more than 64 numbers",
    ),
    (lambda: max_lyapunov_start(IDENTITY, START, num_steps=2, lr=0.0), ValueError, "lr must be > 0"),
    (lambda: max_lyapunov_start(IDENTITY, START, num_steps=2, max_steps=-1), ValueError, "max_steps must be >= 0"),
    (lambda: max_lyapunov_start(3, START, num_steps=2), TypeError, "max_lyapunov_start: step must be a map"),
]


@pytest.mark.parametrize(("make", "kind", "message"), BAD)
def test_bad_arguments_are_refused_by_name(make, kind, message):
    with pytest.raises(kind, match=message):
        make()
