"""Eigenvalues, rates and best settings of momentum in games, against the maps that the optimizers really are."""

import cmath
import math

import pytest
import torch

import nestopt_ext as nx
from nestopt_ext.games import (
    compare_methods,
    convergence_rate,
    converges,
    momentum_matrix,
    momentum_spectrum,
    optimal_momentum,
    small_step_converges,
)

PI = math.pi
TEN = [1j * 10 ** (-i / 9) for i in range(10)]  # rotations of condition 10
MIXED = [1, 0.5, 0.1, 1j, 0.5j, 0.1j, 0.5 + 0.5j]


def polar(modulus, phase):
    """The momentum with that phase in units of pi."""
    return cmath.rect(modulus, phase * PI)


def bilinear(matrix):
    """The Jacobian of min_x max_y x' M y."""
    rows, columns = matrix.shape
    top = torch.cat([torch.zeros(rows, rows, dtype=torch.float64), matrix], dim=1)
    bottom = torch.cat([-matrix.T, torch.zeros(columns, columns, dtype=torch.float64)], dim=1)
    return torch.cat([top, bottom])


def random_matrix(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def distance(a, b):
    """The largest distance in a matching of two sets of eigenvalues, nearest first."""
    rest = b.flatten().to(torch.complex128).clone()
    assert a.numel() == rest.numel()
    worst = 0.0
    for value in a.flatten():
        gaps = (rest - value).abs()
        i = int(gaps.argmin())
        worst = max(worst, gaps[i].item())
        rest = torch.cat([rest[:i], rest[i + 1 :]])
    return worst


def radius(matrix):
    return torch.linalg.eigvals(matrix).abs().max().item()


def matrix_of(step, size):
    """The matrix of a linear function of a vector."""
    return torch.stack([step(unit) for unit in torch.eye(size, dtype=torch.float64)], dim=1)


# ---- the map --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alternating", [False, True])
@pytest.mark.parametrize(
    ("lr", "beta"),
    [(0.3, polar(0.7, 0.3)), ([0.3, 0.05, 0.2], [0.9, -0.4, polar(0.8, 0.125)]), (0.1, 0.0)],
)
def test_matrix_is_what_complex_sgd_does(lr, beta, alternating):
    sizes, jacobian = [2, 1, 3], random_matrix(6, 6)
    lrs = lr if isinstance(lr, list) else [lr] * 3
    betas = beta if isinstance(beta, list) else [beta] * 3
    w = random_matrix(6, seed=1)
    players = [torch.nn.Parameter(part.clone()) for part in w.split(sizes)]
    optimizers = [nx.ComplexSGD([p], lr=a, momentum=b) for p, a, b in zip(players, lrs, betas, strict=True)]
    state = torch.cat([torch.zeros(12, dtype=torch.float64), w])
    step = momentum_matrix(jacobian, lr, beta, players=sizes, alternating=alternating)
    for _ in range(7):
        if not alternating:
            grads = (jacobian @ torch.cat([p.detach() for p in players])).split(sizes)
            for player, grad in zip(players, grads, strict=True):
                player.grad = grad.clone()
            for optimizer in optimizers:
                optimizer.step()
        else:
            for i, (player, optimizer) in enumerate(zip(players, optimizers, strict=True)):
                player.grad = (jacobian @ torch.cat([p.detach() for p in players])).split(sizes)[i].clone()
                optimizer.step()
        state = step @ state
        torch.testing.assert_close(state[12:], torch.cat([p.detach() for p in players]), rtol=1e-12, atol=1e-12)
    if beta == 0.0:
        return  # the optimizer then keeps no buffers
    for i, name in enumerate(("momentum_buffer", "momentum_buffer_imag")):
        for j, part in enumerate(state[6 * i : 6 * i + 6].split(sizes)):
            buffer = optimizers[j].state[players[j]].get(name)
            expected = torch.zeros_like(part) if buffer is None else buffer
            torch.testing.assert_close(part, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("beta", [polar(0.9, 1 / 8), polar(0.5, 0.7), 0.6j, 0.8, -0.5, 0.0])
@pytest.mark.parametrize("lr", [0.01, 0.4])
def test_cubic_has_the_eigenvalues_of_the_matrix(beta, lr):
    jacobian = random_matrix(7, 7, seed=2)
    expected = torch.linalg.eigvals(momentum_matrix(jacobian, lr, beta))
    roots = momentum_spectrum(torch.linalg.eigvals(jacobian), lr, beta)
    assert roots.shape == (7, 3)
    assert roots.dtype == torch.complex128
    # without momentum the zeros of the two buffers are a Jordan block of the matrix, not of the polynomial
    assert distance(roots, expected) < (1e-7 if beta == 0 else 1e-8)


@pytest.mark.parametrize("beta", [polar(0.9, 1 / 8), polar(0.5, 0.7), 0.6j])
@pytest.mark.parametrize("lr", [0.01, 0.4])
def test_sextic_has_the_eigenvalues_of_the_matrix(beta, lr):
    matrix = random_matrix(4, 4, seed=3)
    expected = torch.linalg.eigvals(momentum_matrix(bilinear(matrix), lr, beta, players=[4, 4], alternating=True))
    roots = momentum_spectrum(1j * torch.linalg.svdvals(matrix), lr, beta, alternating=True)
    assert roots.shape == (4, 6)
    assert distance(roots, expected) < 1e-8


@pytest.mark.parametrize("beta", [0.8, -0.5])
def test_sextic_with_real_momentum(beta):
    """The roots of the unused buffers meet at beta, where the matrix resolves them to the root of rounding."""
    matrix = random_matrix(3, 3, seed=3)
    full = momentum_matrix(bilinear(matrix), 0.3, beta, players=[3, 3], alternating=True)
    roots = momentum_spectrum(1j * torch.linalg.svdvals(matrix), 0.3, beta, alternating=True)
    used = [*range(6), *range(12, 18)]  # real buffers and parameters
    expected = torch.linalg.eigvals(full[used][:, used])
    decoupled = (roots - beta).abs() < 1e-9
    assert int(decoupled.sum()) == 6
    assert distance(roots[~decoupled], expected) < 1e-8


def test_roots_keep_their_digits_at_tiny_steps():
    """Alternating roots near 1 to second order in lr sigma: |x| = 1 + lr^2 sigma^2 H(1) H'(1) / 2 + ..."""
    beta, step = polar(0.9, 1 / 8), 1e-5
    gain = (1 / (1 - beta)).real
    slope = -(beta / (1 - beta) ** 2).real  # H'(1)
    rate = convergence_rate([1j], step, beta, alternating=True).item()
    assert (1 - rate) / step**2 == pytest.approx(gain * slope, rel=1e-4)


def test_matrix_of_batches_and_jacobians():
    x = random_matrix(2, seed=4).requires_grad_()
    y = random_matrix(3, seed=5).requires_grad_()
    coupling = random_matrix(2, 3, seed=6)
    loss = x @ coupling @ y + 0.5 * x @ x
    operator = nx.games.game_jacobian([loss, -loss], [x, y])
    dense = operator.dense()
    expected = momentum_matrix(dense, 0.1, 0.5j, players=[2, 3], alternating=True)
    torch.testing.assert_close(momentum_matrix(operator, 0.1, 0.5j, alternating=True), expected, rtol=0, atol=0)
    batch = torch.stack([dense, 2 * dense, -dense])
    for alternating in (False, True):
        stacked = momentum_matrix(batch, 0.1, 0.5j, players=[2, 3], alternating=alternating)
        single = [momentum_matrix(j, 0.1, 0.5j, players=[2, 3], alternating=alternating) for j in batch]
        torch.testing.assert_close(stacked, torch.stack(single), rtol=0, atol=1e-15)


def test_one_player_taking_turns_plays_simultaneously():
    jacobian = random_matrix(3, 3)
    a = momentum_matrix(jacobian, 0.2, polar(0.6, 0.2), players=[3], alternating=True)
    torch.testing.assert_close(a, momentum_matrix(jacobian, 0.2, polar(0.6, 0.2)), rtol=0, atol=1e-15)


# ---- rates ----------------------------------------------------------------------------------------------------------


def other_step(method, jacobian, lr, beta):
    """One step of another method as a function of its whole state, written from its definition."""
    n = len(jacobian)

    def optimistic(state):
        w, previous = state.split(n)
        grad = jacobian @ w
        return torch.cat([w - lr * (2 * grad - previous), grad])

    def extragradient(w):
        return w - lr * jacobian @ (w - lr * jacobian @ w)

    def nesterov(state):
        real, imaginary, w = state.split(n)
        grad = jacobian @ w
        real, imaginary = beta.real * real - beta.imag * imaginary + grad, beta.imag * real + beta.real * imaginary
        return torch.cat([real, imaginary, w - lr * (grad + beta.real * real - beta.imag * imaginary)])

    steps = {"optimistic": (optimistic, 2), "extragradient": (extragradient, 1), "nesterov": (nesterov, 3)}
    step, parts = steps[method]
    return matrix_of(step, parts * n)


@pytest.mark.parametrize(("method", "beta"), [("optimistic", 0), ("extragradient", 0), ("nesterov", polar(0.7, 0.3))])
def test_rates_of_other_methods(method, beta):
    jacobian = random_matrix(5, 5, seed=7)
    eigenvalues = torch.linalg.eigvals(jacobian)
    for lr in (0.02, 0.3):
        expected = radius(other_step(method, jacobian, lr, complex(beta)))
        assert convergence_rate(eigenvalues, lr, beta, method=method).item() == pytest.approx(expected, abs=1e-8)


def test_nesterov_with_real_momentum_leaves_out_the_unused_buffer():
    assert convergence_rate([1.0], 1.0, 0.5, method="nesterov").item() < 1e-7  # x^2 = 0


def test_rate_of_alternating_optimistic_gradients():
    matrix, lr = random_matrix(3, 3, seed=8), 0.2

    def step(state):
        x, y, old_x, old_y = state.split(3)
        grad_x = matrix @ y
        x = x - lr * (2 * grad_x - old_x)
        grad_y = -matrix.T @ x
        return torch.cat([x, y - lr * (2 * grad_y - old_y), grad_x, grad_y])

    rate = convergence_rate(1j * torch.linalg.svdvals(matrix), lr, method="optimistic", alternating=True)
    assert rate.item() == pytest.approx(radius(matrix_of(step, 12)), abs=1e-8)


def test_rates_broadcast():
    lrs = torch.tensor([0.01, 0.05, 0.1])
    betas = torch.tensor([polar(0.9, 1 / 8), 0.9, -0.3, 0.6j])
    rates = convergence_rate(MIXED, lrs[:, None], betas[:, None, None])
    assert rates.shape == (4, 3)
    for i, beta in enumerate(betas.tolist()):
        for j, lr in enumerate(lrs.tolist()):
            one = convergence_rate(MIXED, lr, beta)
            assert one.shape == ()
            torch.testing.assert_close(rates[i, j], one, rtol=0, atol=1e-9)
    assert converges(torch.tensor([[1j], [1.0]]), 0.05, polar(0.9, 1 / 32)).tolist() == [False, True]


def test_eigenvalue_zero_has_rate_one():
    assert convergence_rate([1.0, 0.0], 0.1, 0.5).item() == 1


@pytest.mark.parametrize("alternating", [False, True])
def test_where_nothing_moves_rounding_does_not_make_it_converge(alternating):
    unit = torch.rand(2, 200, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    beta = torch.polar(1 - 10 ** (-4 * unit[0]), math.pi * unit[1])
    for momenta in (beta, beta.real):
        for eigenvalues, lr in (([0.0, 0.0], 0.3), ([1j, -1j], 0.0), ([1e-17j, -1e-17j], 0.3)):
            assert bool((convergence_rate(eigenvalues, lr, momenta, alternating=alternating) == 1).all())
            assert not bool(converges(eigenvalues, lr, momenta, alternating=alternating).any())


@pytest.mark.parametrize(
    ("eigenvalues", "settings", "rate"),
    [
        ([1j], {"lr": 0.558, "beta": polar(0.668, 0.375)}, 0.888),
        ([1j], {"lr": 0.5, "method": "optimistic"}, 0.7071),
        ([1j], {"lr": 0.7071, "method": "extragradient"}, 0.866),
        ([1j], {"lr": 1.6, "beta": polar(0.17, 0.7625), "alternating": True}, 0.459),
        ([1j], {"lr": 1.76461, "beta": polar(0.10390, 0.83125), "alternating": True}, 0.3533),
        ([1j], {"lr": 1.76461, "beta": polar(0.10490, 0.83125), "alternating": True}, 0.456),
        ([1j], {"lr": 0.059, "beta": polar(0.9, 1 / 8)}, 0.9795),
        ([1j], {"lr": 0.058, "beta": polar(0.9, 1 / 8), "alternating": True}, 0.9794),
        ([1j], {"lr": 0.026, "beta": polar(0.9, 1 / 16)}, 0.9702),
        ([1j], {"lr": 0.095, "beta": polar(0.8, 1 / 8)}, 0.9646),
        (TEN, {"lr": 0.466, "beta": polar(0.740, 0.333)}, 0.99930),
        (MIXED, {"lr": 0.466, "beta": polar(0.740, 0.333)}, 0.99930),
    ],
)
def test_published_rates_at_their_settings(eigenvalues, settings, rate):
    assert convergence_rate(eigenvalues, **settings).item() == pytest.approx(rate, abs=2e-3)


@pytest.mark.parametrize("beta", [polar(0.9, 1 / 32), 0.8])
def test_settings_that_diverge_for_every_step_size(beta):
    lrs = torch.logspace(-4, 0.5, 400, dtype=torch.float64)[:, None]
    assert not bool(converges([1j], lrs, beta).any())


# ---- small steps ----------------------------------------------------------------------------------------------------

#: Phases in units of pi between which simultaneous updates converge, and above which alternating ones do.
PHASES = {
    0.5: (None, None, 0.205),
    0.6: (0.256, 0.551, 0.156),
    0.7: (0.145, 0.679, 0.111),
    0.8: (0.081, 0.766, 0.0704),
    0.9: (0.0355, 0.848, 0.0335),
    0.95: (0.0168, 0.896, 0.0163),
    0.99: (0.0032, 0.955, 0.0032),
}


def phase_points():
    """(modulus, phase, alternating, converges) within 3 % of every threshold, and far from it."""
    for modulus, (low, high, alternating_low) in PHASES.items():
        if low is None:
            yield from ((modulus, phase, False, False) for phase in (0.0, 0.25, 0.5, 0.75, 1.0))
        else:
            inside = (1.03 * low, 0.5 * (low + high), 1 - 1.03 * (1 - high))
            outside = (0.0, 0.97 * low, 1 - 0.97 * (1 - high), 1.0)
            yield from ((modulus, phase, False, True) for phase in inside)
            yield from ((modulus, phase, False, False) for phase in outside)
        yield from ((modulus, phase, True, True) for phase in (1.03 * alternating_low, 0.5, 1.0))
        yield from ((modulus, phase, True, False) for phase in (0.0, 0.97 * alternating_low))


@pytest.mark.parametrize(("modulus", "phase", "alternating", "inside"), list(phase_points()))
def test_phases_that_converge_at_small_steps(modulus, phase, alternating, inside):
    beta = polar(modulus, phase)
    assert bool(small_step_converges(beta, alternating=alternating)) == inside
    assert bool(small_step_converges(beta.conjugate(), alternating=alternating)) == inside
    # lr 1e-3, or less where that is no small step: the slow phases of 0.99 amplify gradients by 50
    lr = min(1e-3, 0.05 * abs(1 - beta) ** 2)
    jacobian = bilinear(torch.ones(1, 1, dtype=torch.float64))
    step = momentum_matrix(jacobian, lr, beta, players=[1, 1], alternating=alternating)
    for _ in range(45):  # after k squarings, 2^k steps
        step = step @ step
        away = torch.linalg.vector_norm(step[4:, 4]).item()  # from distance 1
        if not 1e-3 < away < 1e3:
            break
    assert away < 1e-3 if inside else away > 1e3


def test_small_steps_agree_with_rates_at_random():
    generator = torch.Generator().manual_seed(0)
    modulus, angle = torch.rand(2, 2000, dtype=torch.float64, generator=generator)
    betas = torch.polar(modulus, PI * angle)
    for alternating in (False, True):
        predicted = small_step_converges(betas, alternating=alternating)
        lr = 1e-4 * (1 - betas).abs().square()
        seen = convergence_rate([1j], lr[:, None], betas[:, None], alternating=alternating)
        clear = (seen - 1).abs() > 1e-13
        assert int(clear.sum()) > 1800
        assert torch.equal(predicted[clear], seen[clear] < 1)


@pytest.mark.parametrize(
    ("beta", "lr", "alternating", "steps"),
    [
        (polar(0.9, 1 / 8), 0.059, False, 677),
        (polar(0.9, 1 / 8), 0.058, True, 662),
        (polar(0.9, 1 / 16), 0.026, False, 483),
        (0.9, 0.059, False, None),
        (0.9, 0.059, True, None),
        (polar(0.8, 1 / 16), 0.02, False, None),
        (polar(0.5, 1 / 8), 0.02, False, None),
    ],
)
def test_complex_sgd_on_the_bilinear_game(beta, lr, alternating, steps):
    """Steps to 1e-6 from distance 1; None moves away."""
    start = torch.tensor([0.5**0.5], dtype=torch.float64)
    x, y = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    first, second = (nx.ComplexSGD([p], lr=lr, momentum=beta) for p in (x, y))
    taken, away = 0, 1.0
    while away >= 1e-6 and taken < 800:
        x.grad, y.grad = y.detach().clone(), -x.detach().clone()
        first.step()
        if alternating:
            y.grad = -x.detach().clone()
        second.step()
        taken += 1
        away = math.hypot(x.item(), y.item())
    if steps is None:
        assert away > 1
    else:
        assert abs(taken - steps) <= 1
    assert bool(converges([1j], lr, beta, alternating=alternating)) == (steps is not None)


# ---- the best setting -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rotation():
    return compare_methods([1j, -1j])


def test_best_rates_on_a_rotation(rotation):
    for name in ("gradient descent", "real momentum", "Nesterov momentum"):
        assert rotation[name] is None
    assert rotation["complex momentum"].rate == pytest.approx(0.888, abs=2e-3)
    assert rotation["optimistic"].rate == pytest.approx(2**-0.5, abs=1e-6)
    assert rotation["extragradient"].rate == pytest.approx(0.75**0.5, abs=1e-6)
    assert rotation["extragradient"].rate_per_gradient == pytest.approx(0.75**0.25, abs=1e-6)
    # (x - 1)^2 (x - b)^2 + t^2 x^3 with two double roots, where b = 7 - 4 sqrt 3
    assert rotation["alternating real momentum"].rate == pytest.approx(2 * 3**0.5 - 3, abs=1e-5)
    assert rotation["alternating real momentum"].beta.real == pytest.approx(4 * 3**0.5 - 7, abs=1e-3)
    assert rotation["alternating complex momentum"].rate < 0.3434  # the needle


def test_best_settings_have_the_rates_they_claim(rotation):
    for choice in filter(None, rotation.values()):
        rate = convergence_rate(
            [1j], choice.lr, choice.beta, method=choice.method, alternating=choice.alternating
        ).item()
        assert rate == pytest.approx(choice.rate, abs=1e-5)  # roots that meet, to the third root of rounding


def test_needle_is_real():
    """The alternating optimum again, through the matrix of both players."""
    choice = optimal_momentum([1j], alternating=True)
    jacobian = bilinear(torch.ones(1, 1, dtype=torch.float64))
    step = momentum_matrix(jacobian, choice.lr, choice.beta, players=[1, 1], alternating=True)
    assert radius(step) == pytest.approx(choice.rate, abs=2e-4)
    assert choice.rate == pytest.approx(0.3533, abs=0.012)
    moved = convergence_rate([1j], choice.lr, choice.beta * (1 + 0.01), alternating=True).item()
    assert moved > choice.rate + 0.05


@pytest.mark.parametrize(
    ("eigenvalues", "rates"),
    [
        (
            TEN,
            {
                "complex momentum": 0.99930,
                "optimistic": 0.99833,
                "extragradient": 0.99510,
                "alternating complex momentum": 0.99511,
                "alternating real momentum": 0.99703,
            },
        ),
        (MIXED, {"real momentum": None, "complex momentum": 0.99930, "optimistic": 0.99833, "extragradient": 0.99510}),
        (
            [0.1, 0.3, 0.6, 1.0],
            {"real momentum": 0.5195, "complex momentum": 0.5195, "optimistic": 0.941, "extragradient": 0.917},
        ),
    ],
)
def test_best_rates_of_published_spectra(eigenvalues, rates):
    found = compare_methods(eigenvalues)
    for name, rate in rates.items():
        if rate is None:
            assert found[name] is None
        else:
            # in the distance from 1, by which the number of steps goes
            assert 1 - found[name].rate == pytest.approx(1 - rate, rel=0.01)


def test_comparison_prints_as_a_table(rotation):
    lines = str(rotation).splitlines()
    assert len(lines) == 1 + len(rotation)
    assert lines[0].startswith("method")
    assert "no converging setting" in lines[1]
    assert "0.70711" in next(line for line in lines if line.startswith("optimistic"))
    assert "alternating optimistic" not in compare_methods([1.0])


def test_optimal_momentum_is_heavy_ball_on_a_minimization():
    for condition in (4.0, 100.0):
        root = condition**0.5
        choice = optimal_momentum([1.0, condition])
        assert choice.beta.imag == 0
        assert choice.rate == pytest.approx((root - 1) / (root + 1), abs=1e-5)
        assert choice.beta.real == pytest.approx(((root - 1) / (root + 1)) ** 2, abs=1e-3)


def test_optimal_momentum_beats_every_random_setting():
    eigenvalues = random_matrix(12, 12, seed=9)
    eigenvalues = torch.linalg.eigvals(eigenvalues @ eigenvalues.T + 4 * (eigenvalues - eigenvalues.T))
    choice = optimal_momentum(eigenvalues)
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(3, 20000, 1, dtype=torch.float64, generator=generator)
    lrs = 6 * 10 ** (-3 * u[0]) / eigenvalues.abs().max()
    betas = torch.polar(1 - 10 ** (-2 * u[1]), PI * u[2])
    assert choice.rate < 1
    assert choice.rate <= convergence_rate(eigenvalues, lrs, betas).min().item()
    assert choice.rate == pytest.approx(convergence_rate(eigenvalues, choice.lr, choice.beta).item(), abs=1e-6)


def test_optimal_momentum_sees_every_eigenvalue():
    """On an arc only the ends stick out, but the middle is slow with what is best for them."""
    arc = [cmath.rect(1, 0.5 * PI * i / 29) for i in range(30)]
    choice = optimal_momentum(arc)
    generator = torch.Generator().manual_seed(0)
    lrs, moduli, phases = torch.rand(3, 5000, 1, dtype=torch.float64, generator=generator)
    assert choice.rate <= convergence_rate(arc, lrs, torch.polar(moduli, PI * phases)).min().item()
    assert choice.rate == pytest.approx(convergence_rate(arc, choice.lr, choice.beta).item(), abs=1e-9)
    assert convergence_rate(arc, 0.558, polar(0.668, 0.375)).item() > choice.rate + 0.04  # best for i


@pytest.mark.parametrize("alternating", [False, True])
@pytest.mark.parametrize("factor", [2.0**-30, 1e6, 0.37])
def test_optimal_momentum_scales_with_the_eigenvalues(factor, alternating):
    base, scaled = (optimal_momentum([c * 1j, c * 0.5j], alternating=alternating) for c in (1, factor))
    assert scaled.rate == pytest.approx(base.rate, abs=1e-5)
    assert scaled.lr * factor == pytest.approx(base.lr, rel=1e-2)
    assert abs(scaled.beta - base.beta) < 1e-2


def test_optimal_momentum_is_the_same_each_time_and_for_conjugates():
    once = optimal_momentum([0.2 + 1j, 0.5])
    torch.rand(3)
    assert optimal_momentum([0.5, 0.2 - 1j, 0.2 + 1j, 0.5]) == once


def test_optimal_momentum_with_eigenvalues_a_little_to_the_left():
    choice = optimal_momentum([-0.01 + 1j, -0.01 - 1j])
    assert choice.rate < 1
    assert bool(converges([-0.01 + 1j], choice.lr, choice.beta))


@pytest.mark.parametrize("alternating", [False, True])
def test_robust_choice_holds_for_every_error_of_that_size(alternating):
    size = 0.03
    exact = optimal_momentum([1j], alternating=alternating)
    robust = optimal_momentum([1j], alternating=alternating, robust=size)
    generator = torch.Generator().manual_seed(0)
    radii, angles = torch.rand(2, 3000, dtype=torch.float64, generator=generator)
    errors = (2 * radii - 1).to(torch.complex128) if alternating else torch.polar(radii, 2 * PI * angles)
    around = 1j * (1 + size * errors)

    def worst(choice):
        return convergence_rate(around, choice.lr, choice.beta, alternating=alternating).item()

    assert exact.rate < robust.rate < 1
    assert worst(robust) <= robust.rate + 1e-4
    assert worst(exact) > robust.rate


def test_measured_rotations_in_single_precision():
    eigenvalues = torch.linalg.eigvals(bilinear(random_matrix(2, 2, seed=3)).float() + 1e-7)
    assert bool((eigenvalues.real != 0).any())
    choice = optimal_momentum(eigenvalues, alternating=True)
    assert bool(converges(eigenvalues, choice.lr, choice.beta, alternating=True))


def test_steps_to_a_tolerance():
    """Against the steps that the map itself takes."""
    lr, beta = 0.5, polar(0.7, 0.35)
    step = momentum_matrix(bilinear(torch.ones(1, 1, dtype=torch.float64)), lr, beta)
    state = torch.tensor([0.0, 0, 0, 0, 1, 0], dtype=torch.float64)
    taken = 0
    while torch.linalg.vector_norm(state).item() > 1e-40:
        state = step @ state
        taken += 1
    assert taken == pytest.approx(nx.games.MomentumChoice(lr, beta, radius(step)).steps_to(1e-40), rel=0.05)
    extra = nx.games.MomentumChoice(0.5, 0, 0.5, method="extragradient")
    assert (extra.steps_to(1 / 1024), extra.gradients_to(1 / 1024)) == (10, 20)
    assert nx.games.MomentumChoice(0.5, 0, 0.0).steps_to(1e-9) == 1


# ---- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: momentum_spectrum([], 0.1, 0.5), "eigenvalues must have at least one element"),
        (lambda: momentum_spectrum(torch.tensor(1.0), 0.1, 0.5), "eigenvalues must have at least one element"),
        (lambda: momentum_spectrum([float("nan")], 0.1, 0.5), "eigenvalues must be finite; got nan"),
        (lambda: momentum_spectrum(["1"], 0.1, 0.5), "eigenvalues must be a tensor or a sequence of numbers"),
        (lambda: momentum_spectrum(1j, 0.1, 0.5), "eigenvalues must be a tensor or a sequence of numbers"),
        (lambda: momentum_spectrum([1.0], -0.1, 0.5), "lr must be >= 0; got -0.1"),
        (lambda: momentum_spectrum([1.0], 0.1j, 0.5), "lr must be real"),
        (lambda: momentum_spectrum([1.0], float("inf"), 0.5), "lr must be finite"),
        (lambda: momentum_spectrum([1.0], 0.1, 1.0), "beta must have modulus below 1"),
        (lambda: momentum_spectrum([1.0], 0.1, "0.5"), "beta must be a number or a tensor"),
        (lambda: momentum_spectrum([1.0, 2.0, 3.0], torch.ones(2), 0.5), "must broadcast"),
        (lambda: momentum_spectrum([1j, 0.1 + 1j], 0.1, 0.5, alternating=True), "momentum_matrix"),
        (lambda: convergence_rate([1j], 0.1, method="adam"), "method must be one of"),
        (lambda: convergence_rate([1j], 0.1, 0.5, method="optimistic"), "beta must be 0"),
        (lambda: convergence_rate([1j], 0.1, method="extragradient", alternating=True), "alternating must be False"),
        (lambda: small_step_converges(1.0), "beta must have modulus below 1"),
        (lambda: momentum_matrix(torch.ones(2, 3), 0.1, 0.5), "jacobian must be square"),
        (lambda: momentum_matrix([[1.0]], 0.1, 0.5), "jacobian must be a Tensor or a GameJacobian"),
        (lambda: momentum_matrix(torch.ones(1, 1) * 1j, 0.1, 0.5), "jacobian must be real"),
        (lambda: momentum_matrix(torch.ones(2, 2), 0.1, 0.5, alternating=True), "players must be given"),
        (lambda: momentum_matrix(torch.ones(2, 2), [0.1, 0.2], 0.5), "players must be given"),
        (lambda: momentum_matrix(torch.ones(2, 2), 0.1, 0.5, players=[1, 2]), "players must add up to the 2 rows"),
        (lambda: momentum_matrix(torch.ones(2, 2), 0.1, 0.5, players=[1.0, 1]), r"players\[0\] must be the number"),
        (lambda: momentum_matrix(torch.ones(2, 2), [0.1], 0.5, players=[1, 1]), "lr must have one value for each"),
        (lambda: momentum_matrix(torch.ones(2, 2), 0.1, [0.5, 2], players=[1, 1]), r"beta\[1\] must have modulus"),
        (lambda: momentum_matrix(torch.ones(2, 2), torch.ones(2), 0.5), "lr must be a number, or a list"),
        (lambda: optimal_momentum([1.0, 0.0]), "eigenvalues must not be 0"),
        (lambda: optimal_momentum([1.0, -0.5]), "eigenvalues must not be real and negative"),
        (lambda: optimal_momentum([-0.5 + 1j]), "must allow some lr and beta to converge"),
        (lambda: optimal_momentum([1.0], alternating=True), "eigenvalues must be imaginary"),
        (lambda: optimal_momentum([1.0], robust=-0.1), "robust must be finite and >= 0"),
        (lambda: optimal_momentum([1.0], robust=1.0), "robust must be below 1"),
        (lambda: optimal_momentum(torch.ones(2, 2)), r"eigenvalues must have shape \(n,\)"),
        (lambda: nx.games.MomentumChoice(0.1, 0.5, 0.9).steps_to(2.0), "tolerance must be between 0 and 1"),
        (lambda: nx.games.MomentumChoice(0.1, 0.5, 1.1).steps_to(0.5), "rate must be below 1"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
