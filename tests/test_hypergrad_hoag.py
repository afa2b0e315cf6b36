"""HOAG on ridge regression with one decay, whose best value is found by scanning the closed form."""

import functools
import itertools
import math

import pytest
import torch
from cases import F64, leaf, normal

from nestopt_ext.hypergrad import hoag, hypergradient
from nestopt_ext.solvers import ConjugateGradient

X, X_OUT = normal(10, 40, 12), normal(21, 200, 12)
TRUE = normal(11, 12)
Y, Y_OUT = X @ TRUE + 3 * normal(12, 40), X_OUT @ TRUE + 3 * normal(22, 200)


def solution(decay):
    return torch.linalg.solve(X.T @ X / 40 + decay.exp() * torch.eye(12, dtype=F64), X.T @ Y / 40)


def outer_at(w):
    return 0.5 * (X_OUT @ w - Y_OUT).square().mean()


def inner_at(w, decay):
    return 0.5 * (X @ w - Y).square().mean() + 0.5 * decay.exp() * w.square().sum()


def best_decay():
    """By golden section on the closed form, where it has one minimum."""
    low, high = -4.0, 1.0
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(60):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        values = [float(outer_at(solution(torch.tensor(d, dtype=F64)))) for d in (left, right)]
        low, high = (low, right) if values[0] < values[1] else (left, high)
    return (low + high) / 2


class Ridge:
    """Leaves, losses on them, and how often each was called."""

    def __init__(self, decay=-4.0, dtype=F64):
        self.w = leaf(torch.zeros(12, dtype=dtype))
        self.decay = leaf(torch.tensor(decay, dtype=dtype))
        self.data = [t.to(dtype) for t in (X, Y, X_OUT, Y_OUT)]
        self.calls = {"inner": 0, "outer": 0}

    def inner(self):
        x, y, _, _ = self.data
        self.calls["inner"] += 1
        return 0.5 * (x @ self.w - y).square().mean() + 0.5 * self.decay.exp() * self.w.square().sum()

    def outer(self):
        _, _, x, y = self.data
        self.calls["outer"] += 1
        return 0.5 * (x @ self.w - y).square().mean()

    def run(self, **options):
        return hoag(self.outer, self.inner, self.w, self.decay, **{"num_steps": 30, **options})


@pytest.mark.parametrize("decay", [-4.0, 2.0])
@pytest.mark.parametrize(
    ("tolerances", "accuracy"),
    [("exponential", 1e-3), ("quadratic", 1e-3), ("cubic", 1e-4), ("exact", 1e-6), (lambda k: 1e-3 * 0.5**k, 1e-6)],
    ids=["exponential", "quadratic", "cubic", "exact", "own"],
)
def test_finds_the_best_decay(tolerances, accuracy, decay):
    problem = Ridge(decay)
    result = problem.run(tolerances=tolerances)
    wanted = best_decay()
    assert abs(problem.decay.item() - wanted) < accuracy
    assert result.history[-1].inner_residual <= max(result.history[-1].tolerance, 1e-11)
    assert result.outer_loss == problem.outer().item()
    assert result.outer_loss == pytest.approx(float(outer_at(solution(torch.tensor(wanted)))), rel=1e-5)
    assert len(result.history) == 31 and result.history[-1].hypergradient_norm < accuracy


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("exponential", lambda k: 1e-3 * 0.9**k),
        ("quadratic", lambda k: 1e-3 / max(k, 1) ** 2),
        ("cubic", lambda k: 1e-3 / max(k, 1) ** 3),
        ("exact", lambda k: 1e-12 if k else 1e-3),
    ],
)
def test_schedules_and_their_sums(name, wanted):
    history = Ridge(2.0).run(tolerances=name, num_steps=12).history
    assert all(step.accepted for step in history), "no tolerance is halved in this run"
    assert [step.tolerance for step in history] == pytest.approx([wanted(k) for k in range(13)], rel=1e-12)
    bound = {"exponential": 9e-3, "quadratic": 1e-3 * math.pi**2 / 6, "cubic": 1.2021e-3, "exact": 12.1e-12}[name]
    assert sum(step.tolerance for step in history[1:]) <= bound
    assert all(step.inner_residual <= max(step.tolerance, 1e-11) for step in history), "down to rounding"


def test_looser_tolerances_cost_fewer_inner_evaluations():
    spent = {
        name: sum(step.inner_evaluations for step in Ridge(2.0).run(tolerances=name, num_steps=10).history)
        for name in ("exponential", "cubic", "exact")
    }
    assert spent["exponential"] < spent["cubic"] < spent["exact"]


def test_the_result_is_where_it_ends_and_its_hypergradient_is_exact():
    problem = Ridge()
    result = problem.run(tolerances="exact", num_steps=3)
    wanted = hypergradient(problem.outer, problem.inner, problem.w, problem.decay, solver=ConjugateGradient(100, 1e-13))
    assert float(result.hypergradient[0]) == pytest.approx(float(wanted[0]), rel=1e-9)
    assert float((problem.w - solution(problem.decay)).norm().detach()) < 1e-10


def test_a_failed_move_is_undone_doubles_the_estimate_and_halves_the_tolerance():
    problem = Ridge(-1.9)
    problem.run(num_steps=0)
    far = problem.run(num_steps=1, tolerances=lambda k: 1e-4)  # a first move of length 1 from next to the optimum
    assert not far.history[1].accepted
    assert far.history[1].outer_loss > far.history[0].outer_loss
    assert far.history[1].lipschitz == 2 * far.history[0].lipschitz
    assert far.history[1].tolerance == 0.5e-4
    assert problem.decay.item() == -1.9
    assert far.outer_loss == pytest.approx(far.history[0].outer_loss, rel=1e-4)
    assert float((problem.w - solution(problem.decay)).norm().detach()) < 1e-3


def test_accepted_moves_never_raise_the_loss_and_a_decrease_raises_the_step():
    history = Ridge().run(tolerances="exact", num_steps=40).history
    accepted = [step.outer_loss for step in history if step.accepted]
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(accepted))
    assert any(b.lipschitz == 0.95 * a.lipschitz for a, b in itertools.pairwise(history))
    assert history[-1].hypergradient_norm < 1e-9


def test_the_box_is_respected_and_its_corner_is_found():
    problem = Ridge(-4.0)
    seen = []

    def inner():
        seen.append(problem.decay.item())
        return Ridge.inner(problem)

    hoag(problem.outer, inner, problem.w, problem.decay, num_steps=20, bounds=(-4.5, -2.5))
    assert min(seen) >= -4.5 and max(seen) <= -2.5
    assert problem.decay.item() == -2.5, "the optimum is above the box"


def test_warm_starts_are_used():
    problem = Ridge(best_decay())
    history = problem.run(num_steps=6, tolerances=lambda k: 1e-4).history
    assert history[0].inner_evaluations > 3 and history[0].cg_products > 3
    assert history[-1].inner_evaluations <= 3 and history[-1].cg_products <= 3


def test_several_hparams_by_name_and_a_direct_part():
    weights = {"w": leaf(torch.zeros(12, dtype=F64))}
    hparams = {"decay": leaf(torch.full((12,), -2.0, dtype=F64)), "shift": leaf(torch.tensor(2.0, dtype=F64))}

    def inner():
        w, decay = weights["w"], hparams["decay"]
        return 0.5 * (X @ w - Y).square().mean() + 0.5 * (decay.exp() * w.square()).sum()

    def outer():
        return 0.5 * (X_OUT @ weights["w"] - Y_OUT).square().mean() + (hparams["shift"] - 1).square()

    result = hoag(outer, inner, weights, hparams, num_steps=60, bounds=(-6, 6))
    assert hparams["shift"].item() == pytest.approx(1.0, abs=0.02)
    moved = hparams["decay"].detach().clone().requires_grad_()
    w = torch.linalg.solve(X.T @ X / 40 + torch.diag(moved.exp()), X.T @ Y / 40)
    (grad,) = torch.autograd.grad(outer_at(w), moved)
    inside = (moved.abs() < 6).detach()
    assert float(grad[inside].norm()) < 0.02 * result.history[0].hypergradient_norm
    assert bool((grad[~inside] * moved.detach()[~inside] <= 0).all()), "pushed against the box"
    assert [h.shape for h in result.hypergradient] == [(12,), ()]


def test_float32():
    problem = Ridge(2.0, torch.float32)
    result = problem.run()
    assert problem.decay.item() == pytest.approx(best_decay(), abs=2e-2)
    assert min(step.tolerance for step in result.history) >= 4 * torch.finfo(torch.float32).eps


def test_an_outer_loss_without_params_has_the_direct_part_only():
    problem = Ridge()
    hoag(lambda: (problem.decay + 1) ** 2, problem.inner, problem.w, problem.decay, num_steps=40)
    assert problem.decay.item() == pytest.approx(-1.0, abs=1e-6)


def test_grads_and_random_state_stay_and_masks_are_frozen():
    w, decay = leaf(normal(1, 12)), leaf(torch.tensor(-1.0, dtype=F64))
    w.grad = torch.ones_like(w)
    masks = []

    def inner():
        mask = (torch.rand(40, dtype=F64) > 0.3).to(F64)
        masks.append(mask)
        return (mask * (X @ w - Y).square()).mean() + decay.exp() * w.square().sum()

    state = torch.get_rng_state()
    hoag(lambda: outer_at(w), inner, w, decay, num_steps=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(w.grad, torch.ones_like(w)) and decay.grad is None
    assert all(torch.equal(mask, masks[0]) for mask in masks) and len(masks) > 10


# ---- faults ---------------------------------------------------------------------------------------------------------


@functools.cache
def visited():
    """Where runs of 0, 1, 2, ... steps end, and the start."""
    ends = [(torch.zeros(12, dtype=F64), torch.tensor(-4.0, dtype=F64))]
    for steps in range(5):
        problem = Ridge()
        problem.run(num_steps=steps)
        ends.append((problem.w.detach(), problem.decay.detach()))
    return ends


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("when", [1, 12, 25, 40])
def test_an_interruption_leaves_the_last_accepted_step(kind, when):
    problem = Ridge()
    calls = 0

    def inner():
        nonlocal calls
        calls += 1
        if calls == when:
            raise kind
        return problem.inner()

    with pytest.raises(kind):
        hoag(problem.outer, inner, problem.w, problem.decay, num_steps=4)
    at = [torch.equal(problem.w, w) and torch.equal(problem.decay, decay) for w, decay in visited()]
    assert any(at) and at[0] == (when <= 12)
    assert problem.w.grad is None


@pytest.mark.parametrize("name", ["outer", "inner", "gradient"])
def test_what_is_not_finite_surfaces(name):
    problem = Ridge()
    poison = torch.full((), float("nan"), dtype=F64)
    losses = {"outer": problem.outer, "inner": problem.inner}
    if name == "gradient":
        losses["outer"] = lambda: problem.outer() + (problem.w[:0].sum() * 0 + (problem.decay + 4)).clamp(min=0).sqrt()
        with pytest.raises(RuntimeError, match=r"^hoag: the hypergradient must be finite; got NaN or Inf"):
            hoag(losses["outer"], losses["inner"], problem.w, problem.decay, num_steps=2)
    else:
        good = losses[name]
        losses[name] = lambda: good() * poison
        with pytest.raises(RuntimeError, match=rf"^hoag: {name}_loss .*must be finite; got nan"):
            hoag(losses["outer"], losses["inner"], problem.w, problem.decay, num_steps=2)
    assert torch.equal(problem.w, torch.zeros(12, dtype=F64)) and problem.decay.item() == -4.0


def test_an_indefinite_inner_problem_is_said():
    w, h = leaf(torch.tensor([0.0, 0.0], dtype=F64)), leaf(torch.tensor(1.0, dtype=F64))
    signs = torch.tensor([1.0, -0.5], dtype=F64)
    with pytest.warns(RuntimeWarning, match="^hoag: .*negative curvature"):
        hoag(lambda: (w - h).square().sum(), lambda: (signs * (w + 0 * h).square()).sum(), w, h, num_steps=0)


def bad_calls():
    p = Ridge()
    good = {"outer_loss": p.outer, "inner_loss": p.inner, "params": p.w, "hparams": p.decay, "num_steps": 1}
    half = leaf(torch.zeros(3, dtype=torch.bfloat16))
    return {
        "a tensor for a loss": (
            {**good, "inner_loss": p.inner()},
            TypeError,
            "inner_loss must be a zero-argument closure, called many times; got Tensor",
        ),
        "no scalar": ({**good, "inner_loss": lambda: p.w * p.decay}, ValueError, "inner_loss must be a scalar"),
        "inner without params": ({**good, "inner_loss": lambda: p.decay * 1}, ValueError, "inner_loss must depend on"),
        "outer on neither": (
            {**good, "outer_loss": lambda: leaf(torch.ones(())) * 1},
            ValueError,
            "outer_loss must depend on params or hparams",
        ),
        "params not leaves": ({**good, "params": [p.w * 1]}, ValueError, r"params\[0\] must be a leaf"),
        "hparams not leaves": ({**good, "hparams": p.decay * 1}, ValueError, "hparams must be a leaf"),
        "frozen params": ({**good, "params": p.w.detach()}, ValueError, "params must require grad"),
        "16 bits": ({**good, "params": half}, TypeError, "params must be float32 or float64; got bfloat16"),
        "num_steps": ({**good, "num_steps": 1.5}, TypeError, "num_steps must be an int; got 1.5"),
        "negative": ({**good, "num_steps": -1}, ValueError, "num_steps must be >= 0; got -1"),
        "schedule": (
            {**good, "tolerances": "linear"},
            ValueError,
            "tolerances must be one of exponential, quadratic, cubic, exact, or a function of the step; got 'linear'",
        ),
        "number for a schedule": ({**good, "tolerances": 0.1}, TypeError, "tolerances must be one of"),
        "schedule of one": (
            {**good, "tolerances": lambda k: 1.0},
            ValueError,
            r"tolerances\(1\) must be in \(0, 1\); got 1.0",
        ),
        "initial tolerance": (
            {**good, "initial_tolerance": 0.0},
            ValueError,
            r"initial_tolerance must be in \(0, 1\); got 0.0",
        ),
        "bounds": ({**good, "bounds": 6}, TypeError, "bounds must be None or a pair"),
        "bounds upside down": ({**good, "bounds": (6, -6)}, ValueError, "bounds must be low <= high"),
        "outside": ({**good, "bounds": (-3, 3)}, ValueError, r"hparams must lie in bounds \(-3, 3\)"),
        "inner evaluations": (
            {**good, "max_inner_evaluations": 0},
            ValueError,
            "max_inner_evaluations must be >= 1; got 0",
        ),
        "products": ({**good, "max_cg_products": True}, TypeError, "max_cg_products must be an int; got True"),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_bad_calls_are_refused_by_name(name):
    arguments, kind, message = bad_calls()[name]
    with pytest.raises(kind, match=f"^hoag: {message}"):
        hoag(**arguments)
