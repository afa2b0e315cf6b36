"""Unrolled differentiation: against the Neumann series, finite differences, torch.optim, and itself recomputed."""

import gc
import math
import weakref
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from cases import F64, PROBLEMS, flat, leaf, normal, relative_error, ridge, ridge_inner, ridge_outer, values
from torch import nn

from nestopt_ext.hypergrad import gradient_step, hypergradient, unrolled
from nestopt_ext.solvers import Neumann

OPTIONS = [{}, {"recompute": True}]
OPTION_NAMES = ["plain", "recompute"]


def grads_of(loss, tensors):
    return torch.autograd.grad(loss, tensors, allow_unused=True)


# ---- the Neumann series ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=OPTION_NAMES)
@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize("name", PROBLEMS)
def test_from_the_optimum_it_is_the_neumann_series_with_one_term_less(name, steps, options):
    problem = PROBLEMS[name]()
    alpha = 0.7 * problem.alpha
    step = gradient_step(problem.inner, lr=alpha)
    last = unrolled(step, problem.params, problem.hparams, num_steps=steps, **options)
    assert relative_error(last, problem.params) < 1e-12, "the optimum stays where it is"
    found = grads_of(problem.outer(last, problem.hparams), values(problem.hparams))
    found = [torch.zeros_like(h) if g is None else g for g, h in zip(found, values(problem.hparams), strict=True)]
    args = (*problem.losses(), problem.params, problem.hparams)
    assert relative_error(found, hypergradient(*args, solver=Neumann(steps - 1, alpha))) < 1e-12
    if name != "scalar":  # where one step is as good as another
        assert relative_error(found, hypergradient(*args, solver=Neumann(steps, alpha))) > 1e-6


@pytest.mark.parametrize("options", OPTIONS, ids=OPTION_NAMES)
@pytest.mark.parametrize("kept", [1, 3, 10])
def test_truncation_from_the_optimum_is_the_neumann_series(kept, options):
    problem = ridge()
    alpha = 0.7 * problem.alpha
    step = gradient_step(problem.inner, lr=alpha)
    last = unrolled(step, problem.params, problem.hparams, num_steps=14, truncate=kept, **options)
    decay_grad, start_grad = grads_of(ridge_outer(last, None), [problem.hparams, problem.params])
    wanted = hypergradient(*problem.losses(), problem.params, problem.hparams, solver=Neumann(kept - 1, alpha))
    assert relative_error(decay_grad, wanted) < 1e-12
    assert start_grad is None


def test_the_bias_of_truncation_falls_geometrically():
    problem = ridge()
    mu = float(torch.linalg.eigvalsh(problem.hessian)[0])
    step = gradient_step(problem.inner, lr=problem.alpha)
    start = leaf(torch.zeros(12, dtype=F64))

    def decay_grad(**options):
        last = unrolled(step, start, problem.hparams, num_steps=200, **options)
        return grads_of(ridge_outer(last, None), [problem.hparams])[0]

    full = decay_grad()
    errors = [relative_error(decay_grad(truncate=k), full) for k in (5, 10, 20, 40)]
    rates = [(b / a) ** (1 / k) for a, b, k in zip(errors, errors[1:], (5, 10, 20), strict=False)]
    assert max(rates) <= 1 - problem.alpha * mu + 1e-3
    assert torch.equal(decay_grad(truncate=200), full) and torch.equal(decay_grad(truncate=999), full)


# ---- derivatives ----------------------------------------------------------------------------------------------------


def curved(w, h):
    """A loss that is not quadratic, with mixed terms."""
    return (0.25 * w**4).sum() + 0.5 * (h[0].exp() * w.square()).sum() - (h[1] * w).sum() + w.prod()


def curved_case():
    return leaf(0.3 * normal(1, 4)), [leaf(0.1 * normal(2, 4)), leaf(normal(3, 4))]


@pytest.mark.parametrize("options", OPTIONS, ids=OPTION_NAMES)
def test_gradcheck_in_both_arguments_and_twice(options):
    w, hparams = curved_case()
    step = gradient_step(curved, lr=0.1)

    def last(w, *h):
        return unrolled(step, w, h, num_steps=5, **options)

    assert torch.autograd.gradcheck(last, (w, *hparams))
    assert torch.autograd.gradgradcheck(last, (w, *hparams))


@pytest.mark.parametrize("options", OPTIONS, ids=OPTION_NAMES)
def test_tensors_that_the_step_reaches_by_itself_get_their_gradient(options):
    w, (decay, shift) = curved_case()
    log_lr = leaf(torch.tensor(-2.0, dtype=F64))
    lr = log_lr.exp()

    def value(log_lr, decay, shift):
        step = gradient_step(lambda w, h: curved(w, [h, shift]), lr=log_lr.exp())
        return unrolled(step, w, decay, num_steps=5, **options).square().sum()

    step = gradient_step(lambda w, h: curved(w, [h, shift]), lr=lr)
    found = grads_of(unrolled(step, w, decay, num_steps=5, **options).square().sum(), [log_lr, shift])
    for i, (tensor, grad) in enumerate(((log_lr, found[0]), (shift, found[1]))):
        for j in range(tensor.numel()):
            moves = []
            for sign in (1, -1):
                moved = [log_lr.detach().clone(), decay, shift.detach().clone()]
                moved[0 if i == 0 else 2].view(-1)[j] += sign * 1e-6
                moves.append(value(*moved).item())
            assert float(grad.reshape(-1)[j]) == pytest.approx((moves[0] - moves[1]) / 2e-6, rel=1e-6, abs=1e-9)


def test_a_learning_rate_may_be_a_function_of_the_hparams():
    w, (decay, shift) = curved_case()
    lr = leaf(torch.tensor(0.1, dtype=F64))
    by_name = gradient_step(lambda w, h: curved(w, [h["decay"], h["shift"]]), lr=lambda h: h["lr"])
    last = unrolled(by_name, w, {"decay": decay, "shift": shift, "lr": lr}, num_steps=4)
    captured = unrolled(gradient_step(curved, lr=lr), w, [decay, shift], num_steps=4)
    assert torch.equal(last, captured)
    assert all(
        torch.equal(a, b)
        for a, b in zip(grads_of(last.sum(), [w, decay, lr]), grads_of(captured.sum(), [w, decay, lr]), strict=True)
    )


def test_without_steps_it_is_a_copy():
    w = leaf(normal(0, 3))
    last = unrolled(lambda w, h: w * h, w, torch.ones(()), num_steps=0)
    assert torch.equal(last, w) and last.data_ptr() != w.data_ptr()
    assert torch.equal(grads_of(last.sum(), [w])[0], torch.ones(3, dtype=F64))


@pytest.mark.parametrize("options", [*OPTIONS, {"truncate": 2}])
def test_without_grad_mode_the_value_is_the_same_and_has_no_graph(options):
    w, hparams = curved_case()
    step = gradient_step(curved, lr=0.1)
    with torch.no_grad():
        value = unrolled(step, w, hparams, num_steps=5, **options)
    assert not value.requires_grad
    assert torch.equal(value, unrolled(step, w, hparams, num_steps=5, **options))


def test_params_that_do_not_require_grad_may_still_be_differentiated_inside():
    w, hparams = curved_case()
    step = gradient_step(curved, lr=0.1)
    last = unrolled(step, w.detach(), hparams, num_steps=3)
    again = unrolled(step, w, hparams, num_steps=3)
    assert torch.equal(last, again)
    assert torch.equal(grads_of(last.sum(), hparams)[0], grads_of(again.sum(), hparams)[0])


# ---- torch.optim ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_equals_torch_optim_sgd_step_for_step(momentum, dtype):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    x, y = torch.randn(16, 5, dtype=dtype), torch.randint(0, 3, (16,))
    state = {n: p.detach().clone() for n, p in net.named_parameters()}

    def inner(w, h):
        return F.cross_entropy(torch.func.functional_call(net, w, (x,)), y) + h * sum(
            p.square().sum() for p in w.values()
        )

    decay = torch.tensor(0.01, dtype=dtype)
    step = gradient_step(inner, lr=0.1, momentum=momentum)
    start = state if momentum is None else (state, {n: torch.zeros_like(p) for n, p in state.items()})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=momentum or 0.0, foreach=False)
    for steps in range(1, 7):
        optimizer.zero_grad()
        inner(dict(net.named_parameters()), decay).backward()
        optimizer.step()
        last = unrolled(step, start, decay, num_steps=steps)
        weights = last if momentum is None else last[0]
        for name, param in net.named_parameters():
            assert torch.equal(weights[name], param), (steps, name)


Adam = namedtuple("Adam", ["weights", "first", "second", "count"])


@pytest.mark.parametrize("options", OPTIONS, ids=OPTION_NAMES)
def test_a_rule_of_ones_own_with_nested_state_and_an_integer_counter(options):
    """Adam, written as a step: a named tuple of dicts, and a step counter that is a tensor of integers."""
    weights = {"a": leaf(normal(1, 3)), "b": leaf(normal(2, 2))}
    target = leaf(torch.tensor(0.5, dtype=F64))

    def loss_of(w, h):
        return sum((p - h).pow(4).sum() for p in w.values())

    def adam(state, h):
        grads = torch.autograd.grad(loss_of(state.weights, h), list(state.weights.values()), create_graph=True)
        count = state.count + 1
        first, second, moved = {}, {}, {}
        for (name, w), g in zip(state.weights.items(), grads, strict=True):
            first[name] = 0.9 * state.first[name] + 0.1 * g
            second[name] = 0.999 * state.second[name] + 0.001 * g * g
            scale = (second[name] / (1 - 0.999 ** int(count))).sqrt() + 1e-8
            moved[name] = w - 0.1 * first[name] / (1 - 0.9 ** int(count)) / scale
        return Adam(moved, first, second, count)

    zeros = {n: torch.zeros_like(w) for n, w in weights.items()}
    start = Adam(weights, zeros, {n: z.clone() for n, z in zeros.items()}, torch.zeros((), dtype=torch.int64))
    last = unrolled(adam, start, target, num_steps=9, **options)
    assert isinstance(last, Adam) and int(last.count) == 9 and last.count.dtype == torch.int64
    mine = [leaf(w) for w in weights.values()]
    optimizer = torch.optim.Adam(mine, lr=0.1, foreach=False)
    for _ in range(9):
        optimizer.zero_grad()
        loss_of(dict(zip("ab", mine, strict=True)), target.detach()).backward()
        optimizer.step()
    assert relative_error(last.weights, mine) < 1e-13

    def value(h):
        with torch.no_grad():
            return sum(w.sum() for w in unrolled(adam, start, h, num_steps=9).weights.values())

    (found,) = grads_of(sum(w.sum() for w in last.weights.values()), [target])
    difference = (value(target.detach() + 1e-6) - value(target.detach() - 1e-6)) / 2e-6
    assert float(found) == pytest.approx(float(difference), rel=1e-6)


@pytest.mark.parametrize("options", [*OPTIONS, {"truncate": 2}])
def test_the_number_of_the_step_is_handed_to_whoever_asks(options):
    rates = [0.5, 0.25, 0.125, 0.0625]
    w, h = leaf(torch.tensor(1.0, dtype=F64)), leaf(torch.tensor(1.0, dtype=F64))
    last = unrolled(lambda w, h, *, step: w - rates[step] * h * w, w, h, num_steps=4, **options)
    assert last.item() == math.prod(1 - r for r in rates)
    seen = []

    def batch_loss(w, h, step):
        seen.append(step)
        return 0.5 * h * w**2

    assert unrolled(gradient_step(batch_loss, lr=0.5), w, h, num_steps=3, **options).item() == 0.125
    assert seen == [0, 1, 2]


# ---- recomputation --------------------------------------------------------------------------------------------------


def dropout_case():
    """A network with dropout, its own generator state included, as a function of weights and per-weight decays."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3)).double()
    x, y = torch.randn(12, 6, dtype=F64), torch.randint(0, 3, (12,))
    params = {n: leaf(p) for n, p in net.named_parameters()}
    decays = {n: leaf(torch.full_like(p, -3.0)) for n, p in net.named_parameters()}

    def inner(w, h):
        out = torch.func.functional_call(net, w, (x + 0.1 * torch.randn_like(x),))
        return F.cross_entropy(out, y) + sum((h[n].exp() * w[n].square()).sum() for n in w)

    return inner, params, decays


@pytest.mark.parametrize("num_steps", [1, 2, 7, 10])
@pytest.mark.parametrize("momentum", [None, 0.8])
def test_recomputation_is_the_plain_unroll_bit_for_bit_with_dropout(num_steps, momentum):
    inner, params, decays = dropout_case()
    step = gradient_step(inner, lr=0.2, momentum=momentum)
    start = params if momentum is None else (params, {n: torch.zeros_like(p) for n, p in params.items()})
    inputs = [*params.values(), *decays.values()]

    def run(recompute):
        torch.manual_seed(7)
        last = unrolled(step, start, decays, num_steps=num_steps, recompute=recompute)
        weights = last if momentum is None else last[0]
        state = torch.get_rng_state()
        grads = grads_of(sum(w.square().sum() for w in weights.values()), inputs)
        assert torch.equal(torch.get_rng_state(), state), "the backward pass draws nothing"
        return state, list(weights.values()), grads

    plain, again = run(False), run(True)
    assert torch.equal(plain[0], again[0])
    assert all(torch.equal(a, b) for a, b in zip(plain[1], again[1], strict=True))
    assert relative_error(again[2], plain[2]) < 1e-14
    assert all(float(g.abs().max()) > 0 for g in plain[2])


def peak_of(monkeypatch, recompute, num_steps):
    """The largest number of saved tensors that are alive at once, and the gradients."""
    live = peak = 0
    w, h = leaf(normal(1, 300)), leaf(torch.tensor(0.3, dtype=F64))
    detach = torch.Tensor.detach

    def dropped():
        nonlocal live
        live -= 1

    def counted(tensor):  # what a hook keeps is detached, here and in the recomputation
        nonlocal live, peak
        kept = detach(tensor)
        if tensor.numel() == 300:
            live += 1
            peak = max(peak, live)
            weakref.finalize(kept, dropped)
        return kept

    def step(w, h):
        return w - 0.1 * torch.tanh(w * h) * w.cos()

    with monkeypatch.context() as patch:
        if recompute:
            patch.setattr(torch.Tensor, "detach", counted)
            last = unrolled(step, w, h, num_steps=num_steps, recompute=True)
        else:
            with torch.autograd.graph.saved_tensors_hooks(counted, lambda kept: kept):
                last = unrolled(step, w, h, num_steps=num_steps)
        last.sum().backward()
    return peak, w.grad, h.grad


def test_recomputation_keeps_a_square_root_of_the_tensors(monkeypatch):
    peaks = {}
    for num_steps in (25, 100, 400):
        plain, *wanted = peak_of(monkeypatch, False, num_steps)
        recomputed, *found = peak_of(monkeypatch, True, num_steps)
        assert relative_error(found, wanted) < 1e-13
        peaks[num_steps] = (plain, recomputed)
    assert peaks[400][0] >= 15.9 * peaks[25][0], "the plain unroll keeps all"
    assert peaks[400][1] <= 4.4 * peaks[25][1], "twice the square root for four times the steps"
    assert peaks[400][1] < peaks[400][0] / 4


def test_nothing_is_recomputed_in_the_forward_pass_and_once_in_the_backward_pass():
    calls = []
    w, h = leaf(normal(1, 4)), leaf(torch.tensor(0.2, dtype=F64))

    def loss(w, h, step):
        calls.append(step)
        return (h * w.pow(4)).sum()

    last = unrolled(gradient_step(loss, lr=0.1), w, h, num_steps=10, recompute=True)
    assert calls == list(range(10))
    last.sum().backward()
    assert calls[10:] == [8, 8, 9, 4, 4, 5, 6, 7, 0, 0, 1, 2, 3], "and the first of each stretch to see what it writes"


def test_second_derivatives_through_recomputation_are_those_of_the_plain_unroll():
    w, hparams = curved_case()
    step = gradient_step(curved, lr=0.1)
    inputs = [w, *hparams]

    def second(recompute):
        last = unrolled(step, w, hparams, num_steps=7, recompute=recompute)
        first = torch.autograd.grad(last.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum((g * g.detach()).sum() for g in first), inputs)

    plain = second(False)
    assert relative_error(second(True), plain) < 1e-13 and float(flat(plain).norm()) > 0


def test_a_graph_that_is_recomputed_may_be_passed_twice():
    w, hparams = curved_case()
    last = unrolled(gradient_step(curved, lr=0.1), w, hparams, num_steps=7, recompute=True)
    first = torch.autograd.grad(last.sum(), hparams, retain_graph=True)
    second = torch.autograd.grad(last.sum(), hparams)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_running_statistics_are_updated_once_by_recomputation():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double().train()
    buffers = dict(net.named_buffers())
    params = {n: leaf(p) for n, p in net.named_parameters()}
    x = normal(3, 8, 3)
    step = gradient_step(lambda w, h: h * torch.func.functional_call(net, w, (x,)).square().mean(), lr=0.1)
    h = leaf(torch.tensor(1.0, dtype=F64))
    last = unrolled(step, params, h, num_steps=9, recompute=True)
    after = {n: b.clone() for n, b in buffers.items()}
    assert int(after["1.num_batches_tracked"]) == 9
    sum(p.sum() for p in last.values()).backward()
    assert all(torch.equal(after[n], b) for n, b in buffers.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_recomputation_under_autocast(dtype):
    net = nn.Linear(6, 6)
    params = {n: leaf(p) for n, p in net.named_parameters()}
    h = leaf(torch.ones(()))
    x = torch.randn(4, 6)
    step = gradient_step(lambda w, h: (h * torch.func.functional_call(net, w, (x,)).float()).square().mean(), lr=0.1)

    def run(recompute):
        with torch.autocast("cpu", dtype=dtype):
            last = unrolled(step, params, h, num_steps=9, recompute=recompute)
        return [*last.values(), *grads_of(sum(p.sum() for p in last.values()), [*params.values(), h])]

    plain, again = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(plain[:2], again[:2], strict=True))
    assert relative_error(again[2:], plain[2:]) < 1e-5


def test_nothing_is_kept_alive_by_recomputation():
    w, hparams = curved_case()
    witness = torch.ones(4, dtype=F64)
    alive = weakref.ref(witness)

    def call(witness):
        step = gradient_step(lambda w, h: curved(w * witness, h), lr=0.1)
        unrolled(step, w, hparams, num_steps=9, recompute=True).sum().backward()
        unrolled(step, w, hparams, num_steps=9, recompute=True)

    gc.disable()
    try:
        call(witness)
        del witness
        assert alive() is None, "no reference cycle holds the graph"
    finally:
        gc.enable()


@pytest.mark.parametrize("how", ["iterator", "generator", "count"])
def test_a_step_that_computes_otherwise_the_second_time_is_refused(how):
    w, h = leaf(torch.zeros(3, dtype=F64)), leaf(torch.tensor(0.1, dtype=F64))
    batches = iter(normal(5, 40, 3))
    generator = torch.Generator().manual_seed(0)
    calls = []

    def step(w, h):
        calls.append(1)
        if how == "iterator":
            target = next(batches)
        elif how == "generator":
            target = torch.randn(3, dtype=F64, generator=generator)
        else:
            target = torch.ones(3, dtype=F64)
        moved = w - h * (w - target)
        return moved * h.exp() if how == "count" and len(calls) > 9 else moved

    last = unrolled(step, w, h, num_steps=9, recompute=True)
    with pytest.raises(RuntimeError, match=r"^unrolled: step_fn must compute the same each time, while recompute=True"):
        last.sum().backward()


def test_hparams_changed_before_the_backward_pass_are_refused_by_recomputation():
    w, hparams = curved_case()
    last = unrolled(gradient_step(curved, lr=0.1), w, hparams, num_steps=5, recompute=True)
    with torch.no_grad():
        hparams[1].add_(1)
    with pytest.raises(RuntimeError, match=r"^unrolled: hparams must stay as they are until the derivative is taken"):
        last.sum().backward()


def test_an_exception_in_a_step_leaves_nothing():
    w, hparams = curved_case()
    before = [t.detach().clone() for t in (w, *hparams)]

    def failing(w, h, step):
        if step == 3:
            raise ZeroDivisionError
        return w * h[0]

    for options in OPTIONS:
        with pytest.raises(ZeroDivisionError):
            unrolled(failing, w, hparams, num_steps=5, **options)
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, (w, *hparams), strict=True))
    assert torch.equal(unrolled(lambda w, h: w * 2, w, hparams, num_steps=1), 2 * w), "no hook is left behind"


# ---- faults ---------------------------------------------------------------------------------------------------------


class OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


@pytest.mark.parametrize("options", OPTIONS, ids=OPTION_NAMES)
def test_a_hidden_zero_second_derivative_is_refused(options):
    w, h = leaf(normal(1, 3)), leaf(torch.ones(3, dtype=F64))
    step = gradient_step(lambda w, h: OnceOnly.apply(w).sum() + (h * w).sum(), lr=0.1)
    with pytest.raises(RuntimeError, match=r"^gradient_step: inner_loss must be twice differentiable; got an autograd"):
        unrolled(step, w, h, num_steps=3, **options)


def bad_calls():
    w, h = leaf(torch.ones(2, 3)), leaf(torch.ones(()))
    good = {"step_fn": lambda w, h: w * h, "params": w, "hparams": h, "num_steps": 2}
    named = {"a": w, "b": [w, h]}

    def in_place(w, h):
        with torch.no_grad():
            w.mul_(2)
        return w * h

    return {
        "no function": (
            {**good, "step_fn": w},
            TypeError,
            "step_fn must be a function of params and hparams; got Tensor",
        ),
        "params of None": ({**good, "params": None}, TypeError, "params must be a Tensor, or lists, tuples and dicts"),
        "params of numbers": (
            {**good, "params": {"a": [1.0]}},
            TypeError,
            r"params\['a'\]\[0\] must be a Tensor, or lists, tuples and dicts of tensors; got float",
        ),
        "module": (
            {**good, "params": nn.Linear(1, 1)},
            TypeError,
            r"params must be .*; got Linear. Pass its parameters",
        ),
        "no params": ({**good, "params": []}, ValueError, "params must hold at least one tensor; got none"),
        "hparams of None": ({**good, "hparams": None}, TypeError, "hparams must be a Tensor, or a list"),
        "steps of float": ({**good, "num_steps": 2.0}, TypeError, "num_steps must be an int; got 2.0"),
        "steps of bool": ({**good, "num_steps": True}, TypeError, "num_steps must be an int; got True"),
        "negative steps": ({**good, "num_steps": -1}, ValueError, "num_steps must be >= 0; got -1"),
        "truncate": ({**good, "truncate": 0}, ValueError, "truncate must be >= 1; got 0"),
        "truncate of float": ({**good, "truncate": 1.5}, TypeError, "truncate must be an int; got 1.5"),
        "recompute": ({**good, "recompute": 1}, TypeError, "recompute must be a bool; got 1"),
        "returns None": (
            {**good, "step_fn": lambda w, h: None},
            TypeError,
            r"step_fn\(params, hparams\) must be a Tensor, or lists, tuples and dicts of tensors; got None",
        ),
        "returns another shape": (
            {**good, "step_fn": lambda w, h: w[0]},
            ValueError,
            r"step_fn\(params, hparams\) must have shape \(2, 3\); got \(3,\)",
        ),
        "returns another dtype": (
            {**good, "step_fn": lambda w, h: w.double()},
            TypeError,
            r"step_fn\(params, hparams\) must be float32; got float64",
        ),
        "returns less": (
            {**good, "params": named, "step_fn": lambda p, h: {"a": p["a"], "b": p["b"][:1]}},
            ValueError,
            r"step_fn\(params, hparams\) must have the structure of params; got no .*\['b'\]\[1\]",
        ),
        "returns more": (
            {**good, "params": [w], "step_fn": lambda p, h: [p[0], h]},
            ValueError,
            r"step_fn\(params, hparams\) must have the structure of params; got step_fn\(params, hparams\)\[1\], which",
        ),
        "writes to its params": (
            {**good, "step_fn": in_place},
            ValueError,
            "step_fn must not modify its params; got params",
        ),
    }


@pytest.mark.parametrize("options", [*OPTIONS, {"truncate": 1}], ids=[*OPTION_NAMES, "truncated"])
@pytest.mark.parametrize("name", bad_calls())
def test_bad_calls_are_refused_by_name(name, options):
    arguments, kind, message = bad_calls()[name]
    before = torch.ones(2, 3)
    with pytest.raises(kind, match=f"^unrolled: {message}"):
        unrolled(**{**options, **arguments})
    if isinstance(arguments["params"], torch.Tensor):
        assert torch.equal(arguments["params"], before)


def bad_steps():
    w, h = leaf(torch.ones(3)), leaf(torch.ones(()))

    def loss(w, h):
        return (h * w.square()).sum()

    def run(inner=loss, params=w, **options):
        return lambda: gradient_step(inner, **{"lr": 0.1, **options})(params, h)

    return {
        "no function": (run(inner=1.0), TypeError, "inner_loss must be a function of params and hparams; got float"),
        "lr of text": (run(lr="auto"), TypeError, "lr must be a number or a 0-dim tensor; got 'auto'"),
        "lr of bool": (run(lr=True), TypeError, "lr must be a number or a 0-dim tensor; got True"),
        "lr of nan": (run(lr=float("nan")), ValueError, "lr must be finite; got nan"),
        "lr of a vector": (run(lr=torch.ones(3)), TypeError, r"lr must be a 0-dim floating tensor; got shape \(3,\)"),
        "lr of an integer tensor": (
            run(lr=torch.tensor(1)),
            TypeError,
            "lr must be a 0-dim floating tensor; got shape",
        ),
        "lr returns text": (run(lr=lambda h: "x"), TypeError, r"lr\(hparams\) must be a number or a 0-dim tensor"),
        "momentum": (run(momentum="heavy"), TypeError, "momentum must be a number or a 0-dim tensor; got 'heavy'"),
        "no pair": (run(momentum=0.9), TypeError, r"params must be a pair \(params, buffers\); got Tensor"),
        "buffers": (run(momentum=0.9, params=(w, w[:2])), ValueError, r"buffers must have shape \(3,\); got \(2,\)"),
        "integers": (run(params=torch.ones(3, dtype=torch.int64)), TypeError, "params must be float32"),
        "no scalar": (run(inner=lambda w, h: w * h), ValueError, r"inner_loss must be a scalar; got shape \(3,\)"),
        "no graph": (run(inner=lambda w, h: w.sum().detach()), ValueError, "inner_loss must have a graph"),
        "without params": (run(inner=lambda w, h: h * 1), ValueError, "inner_loss must depend on params"),
    }


@pytest.mark.parametrize("name", bad_steps())
def test_bad_gradient_steps_are_refused_by_name(name):
    run, kind, message = bad_steps()[name]
    with pytest.raises(kind, match=f"^gradient_step: {message}"):
        run()


def test_params_that_the_loss_does_not_use_stay():
    w, idle, h = leaf(normal(0, 2)), leaf(normal(1, 3)), leaf(torch.tensor(0.5, dtype=F64))
    last = unrolled(gradient_step(lambda p, h: ridge_like(p[0], h), lr=0.1), [w, idle], h, num_steps=2)
    assert torch.equal(last[1], idle) and not torch.equal(last[0], w)


def ridge_like(w, h):
    return (h * w.square()).sum()


def test_equals_a_loop_written_by_hand():
    decay = ridge().hparams
    start = leaf(normal(5, 12))
    w = start
    for _ in range(6):
        (grad,) = torch.autograd.grad(ridge_inner(w, decay), w, create_graph=True)
        w = w - 0.3 * grad
    last = unrolled(gradient_step(ridge_inner, lr=0.3), start, decay, num_steps=6)
    assert relative_error(last, w) < 1e-15
    wanted, found = grads_of(ridge_outer(w, None), [start, decay]), grads_of(ridge_outer(last, None), [start, decay])
    assert relative_error(found, wanted) < 1e-14
