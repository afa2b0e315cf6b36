"""OptimisticSGD and OptimisticAdam: their numbers."""

import io
import math

import numpy as np
import pytest
import torch
from helpers import all_same_bits, product, same_bits
from optimizers import assert_all_close, make_params, set_grads
from torch.nn import Parameter
from torch.optim import SGD, Adam

from nestopt_ext import OptimisticAdam, OptimisticSGD

SHAPES = [(), (3,), (4, 5), (0,)]
implementations = pytest.mark.parametrize("foreach", [True, False], ids=["foreach", "loop"])
OPTIONS = product(
    weight_decay=[0, 0.1], maximize=[False, True], optimism=[0.0, 0.4, 1.0], plain_first_step=[False, True]
)


class Recurrence:
    """The definition for one parameter, in NumPy: the previous direction is kept as it was followed."""

    def __init__(self, w, lr, *, weight_decay, maximize, optimism, plain_first_step):
        self.w, self.lr, self.decay, self.sign = w, lr, weight_decay, -1 if maximize else 1
        self.optimism, self.plain_first_step, self.previous = optimism, plain_first_step, None

    def step(self, grad):
        d = self.direction(self.sign * grad + self.decay * self.w)
        if self.previous is None:
            self.previous = d if self.plain_first_step else np.zeros_like(d)
        self.w = self.w - self.lr * ((1 + self.optimism) * d - self.optimism * self.previous)
        self.previous = d

    def direction(self, g):
        return g


class AdamRecurrence(Recurrence):
    def __init__(self, w, lr, betas, eps, amsgrad, **options):
        super().__init__(w, lr, **options)
        self.betas, self.eps, self.amsgrad, self.t = betas, eps, amsgrad, 0
        self.m = self.v = self.largest = np.zeros_like(w)

    def direction(self, g):
        self.t += 1
        beta1, beta2 = self.betas
        self.m, self.v = beta1 * self.m + (1 - beta1) * g, beta2 * self.v + (1 - beta2) * g * g
        self.largest = np.maximum(self.largest, self.v)
        square = (self.largest if self.amsgrad else self.v) / (1 - beta2**self.t)
        return self.m / (1 - beta1**self.t) / (np.sqrt(square) + self.eps)


def follow(optimizer, params, references):
    """Eight steps with a changing lr, some gradients late and some missing for a while."""
    for i in range(8):
        optimizer.param_groups[0]["lr"] = lr = 0.1 / (1 + i % 3)
        set_grads(params, i)
        if i < 2:
            params[1].grad = None
        if i in (3, 4):
            params[2].grad = None
        for p, reference in zip(params, references, strict=True):
            reference.lr = lr
            if p.grad is not None:
                reference.step(p.grad.numpy())
        optimizer.step()
        for p, reference in zip(params, references, strict=True):
            np.testing.assert_allclose(p.detach().numpy(), reference.w, rtol=1e-12, atol=1e-13)


@implementations
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_sgd_is_its_recurrence(options, foreach):
    params = make_params(SHAPES)
    optimizer = OptimisticSGD(params, lr=0.1, foreach=foreach, **options)
    references = [Recurrence(p.detach().numpy().copy(), 0.1, **options) for p in params]
    follow(optimizer, params, references)
    for p, reference in zip(params, references, strict=True):
        found = optimizer.state[p]["previous_direction"].numpy()
        np.testing.assert_allclose(found, reference.previous, rtol=1e-13, atol=1e-14)


@implementations
@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_adam_is_its_recurrence(options, amsgrad, foreach):
    """The previous direction comes from the state alone, and is the one that was followed."""
    params = make_params(SHAPES)
    numbers = {"betas": (0.6, 0.8), "eps": 1e-3, "amsgrad": amsgrad}
    optimizer = OptimisticAdam(params, lr=0.1, foreach=foreach, **numbers, **options)
    follow(optimizer, params, [AdamRecurrence(p.detach().numpy().copy(), 0.1, **numbers, **options) for p in params])


@implementations
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", product(weight_decay=[0, 0.1], maximize=[False, True]), ids=str)
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(OptimisticSGD, SGD), (OptimisticAdam, Adam), (OptimisticAdam, lambda *a, **o: Adam(*a, amsgrad=True, **o))],
    ids=["SGD", "Adam", "AMSGrad"],
)
def test_without_optimism_it_is_torchs_bit_for_bit(ours, theirs, options, dtype, foreach):
    params, twin = make_params(SHAPES, dtype), make_params(SHAPES, dtype)
    plain = theirs(twin, lr=0.1, foreach=False, **options)
    amsgrad = {"amsgrad": True} if plain.defaults.get("amsgrad") else {}
    optimizer = ours(params, lr=0.1, optimism=0.0, foreach=foreach, **options, **amsgrad)
    for i in range(5):
        for group in (params, twin):
            set_grads(group, i)
            group[1].grad = None if i < 2 else group[1].grad
        optimizer.step()
        plain.step()
        assert all_same_bits(params, twin)


# ---- the bilinear game ----------------------------------------------------------------------------------------------


def play(lr, steps, **options):
    """min_x max_y xy from x + iy = 1; the points as complex numbers, whose field is multiplication by -i."""
    x, y = (Parameter(torch.tensor(v, dtype=torch.float64)) for v in (1.0, 0.0))
    optimizer = OptimisticSGD([{"params": [x]}, {"params": [y], "maximize": True}], lr=lr, **options)
    points = [1 + 0j]
    for _ in range(steps):
        optimizer.zero_grad()
        (x * y).backward()
        optimizer.step()
        points.append(complex(x.item(), y.item()))
    return np.array(points)


@pytest.mark.parametrize("plain_first_step", [False, True], ids=["double", "plain"])
def test_best_rate_in_the_bilinear_game(plain_first_step):
    """At lr 1/2 the root (1 + i)/2 of x^2 - (1 + i) x + i/2 is double, so the points are (A + B t) root^t.

    The first step fixes B: A = 1 and A + B = z_1 / root. Rounding perturbs a double root by its square root,
    so the points are compared while t * sqrt(eps) is small, and the rate, from the ratio over a doubling of t, to the
    accuracy of its expansion: |A + 2tB| / |A + tB| = 2 (1 + O(1/t)).
    """
    root = (1 + 1j) / 2
    z = play(0.5, 800, plain_first_step=plain_first_step)
    first = 1 + (0.5j if plain_first_step else 1j)
    b = first / root - 1
    t = np.arange(51)
    np.testing.assert_allclose(z[:51], (1 + b * t) * root**t, rtol=1e-12, atol=0)
    n = 400
    rate = (abs(z[2 * n] / z[n]) / 2) ** (1 / n)
    assert abs(rate / math.sqrt(0.5) - 1) < 2 * abs(1 / b) / n**2


@pytest.mark.parametrize("lr", [0.1, 0.3, 0.45, 0.55])
@pytest.mark.parametrize("optimism", [1.0, 0.8])
def test_rate_in_the_bilinear_game_is_that_of_the_linear_theory(optimism, lr):
    """The larger root of x^2 - (1 + (1 + c) lr i) x + c lr i."""
    roots = np.roots([1, -(1 + (1 + optimism) * lr * 1j), optimism * lr * 1j])
    small, large = sorted(abs(roots))
    z = play(lr, 300, optimism=optimism)
    n = 150  # the share of the smaller root is gone: (small / large)^n
    assert (small / large) ** n < 1e-3
    assert abs(z[2 * n] / z[n]) ** (1 / n) == pytest.approx(large, rel=20 * (small / large) ** n / n + 1e-12)


def test_plain_descent_moves_away_where_optimism_converges():
    away = play(0.3, 50, optimism=0.0)
    np.testing.assert_allclose(abs(away[1:] / away[:-1]), math.hypot(1, 0.3), rtol=1e-14)
    assert abs(play(0.3, 50)[-1]) < 0.5


def test_the_best_lr_is_a_half():
    rates = {lr: abs(np.roots([1, -(1 + 2j * lr), 1j * lr])).max() for lr in (0.4, 0.49, 0.5, 0.51, 0.57)}
    assert min(rates, key=rates.get) == 0.5
    far = {lr: abs(play(lr, 200)[-1]) for lr in rates}
    assert min(far, key=far.get) == 0.5


# ---- the first step, and state from elsewhere -----------------------------------------------------------------------


@pytest.mark.parametrize("make", [OptimisticSGD, OptimisticAdam])
@pytest.mark.parametrize(("options", "factor"), [({}, 2.0), ({"optimism": 0.5}, 1.5), ({"plain_first_step": True}, 1)])
def test_the_first_step(options, factor, make):
    """By default the previous gradient counts as zero; so for a parameter that comes later."""
    params = make_params([(3,), (3,)])
    optimizer = make(params, lr=0.125, **options)
    for first in params:
        before = first.detach().clone()
        if first is params[1]:
            set_grads(params, 0)
        else:
            set_grads(params[:1], 0)
        optimizer.step()
        direction = first.grad if make is OptimisticSGD else first.grad.sign()
        torch.testing.assert_close(first.detach(), before - 0.125 * factor * direction, rtol=1e-7, atol=1e-7)


def saved(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_checkpoint_of_adam_goes_on_from_its_last_direction(amsgrad):
    params = make_params(SHAPES)
    options = {"lr": 0.1, "betas": (0.5, 0.9), "amsgrad": amsgrad}
    adam = Adam(params, **options)
    for i in range(3):
        start = [p.detach().clone() for p in params]
        set_grads(params, i)
        adam.step()
    last = [p.detach() - w for p, w in zip(params, start, strict=True)]  # -lr times the direction
    ours = [Parameter(p.detach().clone()) for p in params]
    optimizer = OptimisticAdam(ours)
    optimizer.load_state_dict(saved(adam))
    start = [p.detach().clone() for p in params]
    for group, one in ((params, adam), (ours, optimizer)):
        set_grads(group, 3)
        one.step()
    wanted = [w + 2 * (p.detach() - w) - back for p, w, back in zip(params, start, last, strict=True)]
    assert_all_close(ours, wanted, rtol=1e-12, atol=1e-13)


def test_a_count_of_zero_is_a_state_without_a_direction():
    """As a tool leaves it that makes the state before the first step."""
    params, twin = make_params([(3,)]), make_params([(3,)])
    optimizer, fresh = OptimisticAdam(params), OptimisticAdam(twin)
    empty = {"step": torch.tensor(0.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: empty}})
    for group, one in ((params, optimizer), (twin, fresh)):
        set_grads(group, 0)
        one.step()
    assert all_same_bits(params, twin)


def test_amsgrad_may_begin_in_the_middle_of_a_run():
    """The previous direction is then that of the largest average known, which is the one there is."""
    params, twin = make_params([(3,)]), make_params([(3,)])
    optimizer, plain = OptimisticAdam(params, lr=0.1), OptimisticAdam(twin, lr=0.1)
    for i in range(3):
        for group, one in ((params, optimizer), (twin, plain)):
            set_grads(group, i)
            if i == 2:
                group[0].grad.mul_(100)  # the average grows, so the largest is the average
            one.step()
        optimizer.param_groups[0]["amsgrad"] = i >= 1
    assert "max_exp_avg_sq" in optimizer.state[params[0]]
    assert all_same_bits(params, twin)


@implementations
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [OptimisticSGD, OptimisticAdam])
def test_16_bit_parameters_are_rounded_once_per_step(make, dtype, foreach):
    """All arithmetic is float32, and so is the state."""
    p = Parameter(torch.randn(50).to(dtype))
    twin = Parameter(p.detach().float())
    optimizer, wide = (make([q], lr=0.1, weight_decay=0.1, foreach=foreach) for q in (p, twin))
    for i in range(5):
        set_grads([p], i)
        twin.grad = p.grad.float()
        optimizer.step()
        wide.step()
        assert same_bits(p.detach(), twin.detach().to(dtype))
        twin.data.copy_(p.detach().float())
    assert all(t.dtype == torch.float32 for t in optimizer.state[p].values())
