import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import (
    F64,
    PROBLEMS,
    flat,
    leaf,
    normal,
    quadratic,
    relative_error,
    ridge,
    ridge_inner,
    ridge_outer,
    ridge_solution,
    scalar,
    values,
)
from torch import nn

from nestopt_ext.curvature import Hessian
from nestopt_ext.hypergrad import best_response, hypergradient
from nestopt_ext.solvers import Exact, Identity, Neumann

MANY = 400


def by_best_response(outer, inner, params, hparams, **options):
    """What :func:`hypergradient` returns, found by a backward pass through :func:`best_response`."""
    best = best_response(inner, params, hparams, **options)
    grads = torch.autograd.grad(outer(best), values(hparams), allow_unused=True)
    return tuple(torch.zeros_like(h) if g is None else g for g, h in zip(grads, values(hparams), strict=True))


# ---- closed forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("closures", [False, True])
@pytest.mark.parametrize("name", PROBLEMS)
def test_closed_form(name, closures):
    problem = PROBLEMS[name]()
    losses = problem.closures() if closures else problem.losses()
    found = hypergradient(*losses, problem.params, problem.hparams, solver=Neumann(MANY, problem.alpha))
    assert isinstance(found, tuple) and len(found) == len(values(problem.hparams))
    assert [t.shape for t in found] == [t.shape for t in values(problem.hparams)]
    assert not any(t.requires_grad for t in found)
    assert relative_error(found, problem.hypergradient) < 1e-12
    assert all(t.grad is None for t in values(problem.params) + values(problem.hparams))


@pytest.mark.parametrize("name", PROBLEMS)
def test_closed_form_with_the_default_alpha(name):
    problem = PROBLEMS[name]()
    found = hypergradient(*problem.losses(), problem.params, problem.hparams, solver=Neumann(MANY))
    assert relative_error(found, problem.hypergradient) < 1e-12


@pytest.mark.parametrize("name", PROBLEMS)
def test_best_response_closed_form(name):
    problem = PROBLEMS[name]()
    found = by_best_response(
        lambda best: problem.outer(best, problem.hparams),
        problem.closures()[1],
        problem.params,
        problem.hparams,
        solver=Neumann(MANY, problem.alpha),
    )
    assert relative_error(found, problem.hypergradient) < 1e-12


def test_ridge_error_falls_with_every_term_and_needs_many():
    problem = ridge()
    errors = [
        relative_error(
            hypergradient(*problem.losses(), problem.params, problem.hparams, solver=Neumann(k, problem.alpha)),
            problem.hypergradient,
        )
        for k in (0, 1, 2, 3, 5, 10, 20, 40, MANY)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1 and errors[6] > 1e-4, "20 terms must not be enough"
    assert errors[-1] < 1e-8


@pytest.mark.parametrize("solver", [Identity(0.3), Neumann(0, 0.3)])
def test_without_terms_it_is_alpha_times_the_mixed_product(solver):
    problem = ridge()
    w, decay = problem.params.detach(), problem.hparams.detach()
    outer_grad = torch.autograd.grad(problem.losses()[0], problem.params)[0]
    found = hypergradient(*problem.losses(), problem.params, problem.hparams, solver=solver)
    assert relative_error(found, -0.3 * outer_grad * decay.exp() * w) < 1e-14


def test_the_direct_part_has_a_plus_sign_and_the_response_a_minus_sign():
    problem = scalar()
    w, h = problem.params, problem.hparams
    outer, inner = 0.5 * w**2 + 10 * h, problem.losses()[1]
    (found,) = hypergradient(outer, inner, w, h, solver=Neumann(200, 0.4))
    assert float(found) == pytest.approx(10 + 1.5 * 1.5, rel=1e-14)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_equals_differentiating_through_gradient_steps_from_the_optimum(steps):
    problem = ridge()
    alpha = 0.7 * problem.alpha
    decay = leaf(problem.hparams)
    w = problem.params.detach().clone().requires_grad_()
    start = w
    for _ in range(steps):
        (grad,) = torch.autograd.grad(ridge_inner(w, decay), w, create_graph=True)
        w = w - alpha * grad
    (unrolled,) = torch.autograd.grad(ridge_outer(w, decay), decay)
    found = hypergradient(*problem.losses(), problem.params, problem.hparams, solver=Neumann(steps - 1, alpha))
    assert relative_error(found, unrolled) < 1e-12
    assert (
        relative_error(
            hypergradient(*problem.losses(), problem.params, problem.hparams, solver=Neumann(steps, alpha)), unrolled
        )
        > 1e-3
    )
    assert start.grad is None


def test_equals_finite_differences_of_the_refitted_problem():
    problem = ridge()
    found = hypergradient(*problem.losses(), problem.params, problem.hparams, solver=Neumann(MANY, problem.alpha))[0]
    step = 1e-5
    for i in range(12):
        shift = torch.zeros(12, dtype=F64)
        shift[i] = step
        up, down = (ridge_outer(ridge_solution(problem.hparams.detach() + s), None) for s in (shift, -shift))
        assert float(found[i]) == pytest.approx(float(up - down) / (2 * step), rel=1e-5, abs=1e-9)


def test_best_response_passes_gradcheck_where_the_inner_problem_is_solved_exactly():
    alpha = ridge().alpha / 2

    def refit(decay):
        w = leaf(ridge_solution(decay))
        best = best_response(lambda: ridge_inner(w, decay), w, decay, solver=Neumann(600, alpha))
        return ridge_outer(best, decay) + decay.square().sum(), best

    assert torch.autograd.gradcheck(refit, leaf(ridge().hparams), rtol=1e-6, atol=1e-8)


def test_damping_is_added_to_the_curvature():
    problem = ridge()
    outer_grad = torch.autograd.grad(problem.losses()[0], problem.params)[0]
    damped = problem.hessian + 0.5 * torch.eye(12, dtype=F64)
    wanted = -torch.linalg.solve(damped, outer_grad) * problem.hparams.exp() * problem.params
    found = hypergradient(*problem.losses(), problem.params, problem.hparams, solver=Neumann(MANY, 0.3, damping=0.5))
    assert relative_error(found, wanted) < 1e-12


@pytest.mark.parametrize("name", ["quadratic", "named_ridge"])
def test_a_curvature_of_ones_own_takes_the_place_of_the_hessian(name):
    problem = PROBLEMS[name]()
    outer, inner = problem.losses()
    doubled = 2 * Hessian(inner, problem.params)
    half_step = Neumann(MANY, problem.alpha / 2)
    halved = hypergradient(outer, inner, problem.params, problem.hparams, solver=half_step, curvature=doubled)
    full = hypergradient(outer, inner, problem.params, problem.hparams, solver=Neumann(MANY, problem.alpha))
    direct = hypergradient(outer, inner, problem.params, problem.hparams, solver=Identity(1e-300))
    assert relative_error([2 * h - d for h, d in zip(halved, direct, strict=True)], full) < 1e-12
    assert relative_error(halved, full) > 1e-2


def test_curvature_sees_the_structure_of_params_and_its_faults_are_named():
    problem = PROBLEMS["named_ridge"]()

    def wrong(v):
        assert list(v) == ["weight", "bias"]
        return {"weight": v["weight"].reshape(-1), "bias": v["bias"]}

    with pytest.raises(
        ValueError, match=r"^hypergradient: curvature\(v\)\['weight'\] must have shape \(1, 5\); got \(5,\)"
    ):
        hypergradient(*problem.losses(), problem.params, problem.hparams, solver=Neumann(2, 0.1), curvature=wrong)
    w, h = leaf(torch.ones((), dtype=F64)), leaf(torch.ones((), dtype=F64))
    loss = w**2 - h * w
    with pytest.raises(ValueError, match=r"^Hessian: params must be the 1 tensors the operator was made for; got 1"):
        hypergradient(loss, loss, w, h, curvature=Hessian(lambda: h**2, h))
    with pytest.raises(TypeError, match=r"^hypergradient: curvature must be None or a callable"):
        hypergradient(*problem.losses(), problem.params, problem.hparams, curvature="ggn")


def test_an_operator_may_hold_its_params_in_another_order_and_structure():
    problem = PROBLEMS["named_ridge"]()
    outer, inner = problem.losses()
    turned = Hessian(inner, [problem.params["bias"], problem.params["weight"]])
    found = hypergradient(outer, inner, problem.params, problem.hparams, solver=Exact(), curvature=turned)
    assert relative_error(found, problem.hypergradient) < 1e-12


# ---- which hparams --------------------------------------------------------------------------------------------------


def test_unused_hparams_give_zeros():
    problem = quadratic()
    outer, inner = problem.losses()
    unused, outer_only = leaf(torch.ones(2, 2)), leaf(torch.tensor(3.0, dtype=F64))
    found = hypergradient(
        outer + outer_only**2,
        inner,
        problem.params,
        [unused, *problem.hparams, outer_only],
        solver=Neumann(MANY, problem.alpha),
    )
    assert torch.equal(found[0], torch.zeros(2, 2))
    assert relative_error(found[1:2], problem.hypergradient) < 1e-12
    assert float(found[2]) == 6.0


def test_an_inner_term_without_params_gives_zeros_and_not_an_error():
    problem = quadratic()
    extra = leaf(torch.tensor(3.0, dtype=F64))
    found = hypergradient(problem.losses()[0], problem.losses()[1] + extra**2, problem.params, extra, solver=Identity())
    assert float(found[0]) == 0.0


def test_an_outer_loss_without_params_has_the_direct_part_only():
    problem = quadratic()
    (found,) = hypergradient(problem.hparams[0].sum(), problem.losses()[1], problem.params, problem.hparams)
    assert torch.equal(found, torch.ones(5, dtype=F64))
    found += 1
    assert torch.equal(found, torch.full((5,), 2.0, dtype=F64)), "the result has memory of its own"


def test_an_inner_loss_linear_in_params_has_no_curvature():
    w, h = leaf(normal(0, 3)), leaf(normal(1, 3))
    (found,) = hypergradient(w.square().sum(), (w * h).sum(), w, h, solver=Neumann(2, 0.5))
    torch.testing.assert_close(found, -0.5 * 3 * 2 * w.detach())


def test_params_that_one_loss_does_not_use():
    problem = ridge()
    idle = leaf(normal(0, 4))
    found = hypergradient(
        *problem.losses(), [idle, problem.params], problem.hparams, solver=Neumann(MANY, problem.alpha)
    )
    assert relative_error(found, problem.hypergradient) < 1e-12


@pytest.mark.parametrize("solve", [hypergradient, by_best_response])
def test_hparams_need_not_be_leaves(solve):
    problem = ridge()
    raw = leaf(problem.hparams / 2)
    decay = raw * 2
    w = problem.params
    outer = ridge_outer(w, decay) if solve is hypergradient else lambda best: ridge_outer(best, decay)
    found = solve(outer, ridge_inner(w, decay), w, decay, solver=Neumann(MANY, problem.alpha))
    assert relative_error(found, problem.hypergradient) < 1e-12
    (in_raw,) = torch.autograd.grad(decay, raw, found[0])
    assert relative_error([in_raw], [2 * problem.hypergradient[0]]) < 1e-12


def test_best_response_reaches_through_to_the_leaves_behind_hparams():
    problem = ridge()
    raw = leaf(problem.hparams / 2)
    decay = raw * 2
    best = best_response(ridge_inner(problem.params, decay), problem.params, decay, solver=Neumann(MANY, problem.alpha))
    ridge_outer(best, decay).backward()
    assert relative_error([raw.grad], [2 * problem.hypergradient[0]]) < 1e-12
    assert problem.params.grad is None


def test_best_response_with_some_hparams_frozen():
    problem = PROBLEMS["named_ridge"]()
    problem.hparams["offset"].requires_grad_(False)
    best = best_response(problem.closures()[1], problem.params, problem.hparams, solver=Neumann(MANY, problem.alpha))
    assert list(best) == ["weight", "bias"]
    problem.outer(best, problem.hparams).backward()
    assert relative_error([problem.hparams["decay"].grad], problem.hypergradient[:1]) < 1e-12
    assert problem.hparams["offset"].grad is None
    assert all(p.grad is None for p in problem.params.values())


def test_best_response_may_go_backward_twice_and_accumulate():
    problem = ridge()
    best = best_response(problem.losses()[1], problem.params, problem.hparams, solver=Neumann(MANY, problem.alpha))
    loss = ridge_outer(best, None)
    loss.backward(retain_graph=True)
    once = problem.hparams.grad.clone()
    loss.backward()
    assert torch.equal(problem.hparams.grad, 2 * once)


def test_best_response_gives_copies_of_the_params():
    problem = ridge()
    kept = problem.params.detach().clone()
    best = best_response(problem.losses()[1], problem.params, problem.hparams)
    assert torch.equal(best, kept)
    best.mul_(0)
    assert torch.equal(problem.params, kept)


def test_best_response_used_in_part():
    problem = PROBLEMS["named_ridge"]()
    best = best_response(problem.losses()[1], problem.params, problem.hparams, solver=Neumann(MANY, problem.alpha))
    (found,) = torch.autograd.grad(best["bias"], problem.hparams["decay"])
    (wanted, _) = hypergradient(
        problem.params["bias"] * 1,
        problem.losses()[1],
        problem.params,
        problem.hparams,
        solver=Neumann(MANY, problem.alpha),
    )
    assert torch.equal(found, wanted)


def test_best_response_has_no_second_derivative_and_says_so():
    problem = ridge()
    best = best_response(problem.losses()[1], problem.params, problem.hparams, solver=Neumann(5, problem.alpha))
    (first,) = torch.autograd.grad(ridge_outer(best, None), problem.hparams, create_graph=True)
    with pytest.raises(
        RuntimeError, match="best_response: the result must be differentiated once; got a second differentiation"
    ):
        torch.autograd.grad(first.sum(), problem.hparams)


def test_best_response_refuses_forward_mode():
    problem = ridge()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(problem.hparams, torch.ones_like(problem.hparams))
        with pytest.raises(
            NotImplementedError, match="best_response: the result must be differentiated in reverse mode"
        ):
            best_response(lambda: ridge_inner(problem.params, dual), problem.params, dual)


# ---- what stays as it was -------------------------------------------------------------------------------------------


class Boom(Exception):
    pass


def training_problem():
    """A network with dropout and batch normalization in training mode, one decay per weight, and closures."""
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.4), nn.Linear(8, 2)
    ).train()
    x, y = torch.randn(16, 4), torch.randint(0, 2, (16,))
    params = dict(net.named_parameters())
    decays = {name: torch.full_like(p, -2.0).requires_grad_() for name, p in params.items()}

    def outer():
        return F.cross_entropy(net(x), y)

    def inner():
        return F.cross_entropy(net(x), y) + sum((decays[n].exp() * p.square()).sum() for n, p in params.items())

    return net, params, decays, outer, inner


def state_of(net, decays):
    tensors = [*net.parameters(), *net.buffers(), *decays.values()]
    return [
        (t.detach().clone(), t.data_ptr(), None if t.grad is None else t.grad.clone()) for t in tensors
    ], torch.get_rng_state()


def assert_same_state(net, decays, state):
    before, rng = state
    assert torch.equal(torch.get_rng_state(), rng)
    for t, (value, address, grad) in zip([*net.parameters(), *net.buffers(), *decays.values()], before, strict=True):
        assert torch.equal(t, value) and t.data_ptr() == address
        assert (t.grad is None) == (grad is None) and (grad is None or torch.equal(t.grad, grad))


@pytest.mark.parametrize("with_grads", [False, True])
@pytest.mark.parametrize("fails", [None, "outer", "inner", "curvature", "interrupt"])
def test_everything_stays_bit_for_bit(fails, with_grads):
    net, params, decays, outer, inner = training_problem()
    if with_grads:
        inner().backward()

    def failing(function, error):
        def fail(*args):
            function(*args)
            raise error

        return fail

    state = state_of(net, decays)
    curvature = None
    if fails == "outer":
        outer = failing(outer, Boom)
    elif fails == "inner":
        inner = failing(inner, Boom)
    elif fails in ("curvature", "interrupt"):
        curvature = failing(lambda v: torch.rand(1), Boom if fails == "curvature" else KeyboardInterrupt)
    if fails:
        with pytest.raises((Boom, KeyboardInterrupt)):
            hypergradient(outer, inner, params, decays, solver=Neumann(3, 0.1), curvature=curvature)
    else:
        hypergradient(outer, inner, params, decays, solver=Neumann(3, 0.1))
        best = best_response(inner, params, decays, solver=Neumann(3, 0.1))
        torch.autograd.grad(sum(t.sum() for t in best.values()), list(decays.values()))
    assert_same_state(net, decays, state)


def test_closures_and_tensors_give_the_same_bits_on_a_network_in_training_mode():
    _net, params, decays, outer, inner = training_problem()
    found = hypergradient(outer, inner, params, decays, solver=Neumann(4, 0.05))
    rng = torch.get_rng_state()
    outer_value = outer()
    torch.set_rng_state(rng)
    inner_value = inner()
    again = hypergradient(outer_value, inner_value, params, decays, solver=Neumann(4, 0.05))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert any(t.abs().max() > 0 for t in found)


@pytest.mark.parametrize("closures", [False, True])
def test_inference_mode_is_refused_since_it_would_lose_the_mixed_part(closures):
    w, h = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    losses = w.square().sum(), (h * w.square()).sum()
    if closures:
        losses = tuple((lambda loss=loss: loss) for loss in losses)
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match=r"outside torch\.inference_mode"),
    ):
        hypergradient(*losses, w, h)


def test_graphs_handed_in_stay_alive():
    problem = ridge()
    outer, inner = problem.losses()
    first = hypergradient(outer, inner, problem.params, problem.hparams)
    second = hypergradient(outer, inner, problem.params, problem.hparams)
    assert torch.equal(first[0], second[0])
    (outer + inner).backward()


@pytest.mark.parametrize("stale", ["outer_loss", "inner_loss"])
def test_params_changed_in_place_since_the_losses_are_named(stale):
    problem = scalar()
    losses = dict(zip(["outer_loss", "inner_loss"], problem.closures(), strict=True))
    losses[stale] = losses[stale]()
    optimizer = torch.optim.SGD(values(problem.params), lr=0.1)
    for param in values(problem.params):
        param.grad = torch.ones_like(param)
    optimizer.step()
    with pytest.raises(RuntimeError) as error:
        hypergradient(losses["outer_loss"], losses["inner_loss"], problem.params, problem.hparams)
    assert str(error.value) == (
        f"hypergradient: {stale} must be computed from the params as they are; got params, or another tensor it uses,"
        " changed in place since. Compute it and call hypergradient after such a change (an optimizer step is one), or"
        " pass a closure."
    )
    hypergradient(*problem.closures(), problem.params, problem.hparams, solver=Identity())


def test_params_changed_in_place_between_best_response_and_backward_are_named():
    w, h = leaf(torch.tensor(1.5, dtype=F64)), leaf(torch.tensor(1.0, dtype=F64))
    best = best_response(w**4 - h * w, w, h)
    with torch.no_grad():
        w.sub_(0.1)
    with pytest.raises(RuntimeError, match=r"^best_response: inner_loss must be .* call best_response after such a"):
        best.square().backward()


def test_the_default_device_does_not_matter():
    problem = ridge()
    outer, inner = problem.losses()

    def both():
        best = best_response(inner, problem.params, problem.hparams)
        through = torch.autograd.grad([b.sum() for b in values(best)], values(problem.hparams))
        return [*hypergradient(outer, inner, problem.params, problem.hparams), *through]

    wanted = both()
    torch.set_default_device("meta")
    try:
        found = both()
    finally:
        torch.set_default_device(None)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_works_with_grad_mode_off():
    problem = ridge()
    with torch.no_grad():
        found = hypergradient(*problem.closures(), problem.params, problem.hparams, solver=Neumann(MANY, problem.alpha))
    assert relative_error(found, problem.hypergradient) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_params(dtype):
    problem = ridge()
    w, decay = leaf(problem.params.to(dtype)), leaf(problem.hparams.to(dtype))
    x, y = normal(10, 40, 12).to(dtype), normal(11, 40).to(dtype)
    inner = 0.5 * (x @ w - y).square().mean() + 0.5 * (decay.exp() * w.square()).sum()
    (found,) = hypergradient((w - 1).square().sum(), inner, w, decay, solver=Neumann(200))
    hessian = x.double().T @ x.double() / 40 + torch.diag(decay.double().exp())
    wanted = -torch.linalg.solve(hessian, 2 * (w.double() - 1)) * decay.double().exp() * w.double()
    assert found.dtype == dtype
    assert relative_error(found.double(), wanted) < (1e-5 if dtype == torch.float32 else 3e-2)


# ---- honesty and refusals -------------------------------------------------------------------------------------------


def saddle():
    w, h = leaf(torch.tensor([0.3, 0.2], dtype=F64)), leaf(torch.ones(2, dtype=F64))
    return w, h, (w**2).sum(), (h * torch.tensor([1.0, -0.5], dtype=F64) * w**2).sum()


def test_an_indefinite_hessian_is_said_once():
    w, h, outer, inner = saddle()
    with pytest.warns(RuntimeWarning, match="^hypergradient: the Neumann sum diverges") as caught:
        hypergradient(outer, inner, w, h, solver=Neumann(30))
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        best = best_response(inner, w, h, solver=Neumann(30))
    with pytest.warns(RuntimeWarning, match="^best_response: the Neumann sum diverges") as caught:
        best.square().sum().backward()
    assert len(caught) == 1


@pytest.mark.parametrize("where", ["outer", "inner"])
def test_nan_in_a_loss_is_kept_and_said(where):
    problem = ridge()
    outer, inner = problem.losses()
    poison = torch.ones(12, dtype=F64)
    poison[4] = float("nan")
    poisoned = (poison * problem.params.square()).sum()
    losses = (outer + poisoned, inner) if where == "outer" else (outer, inner + poisoned)
    with pytest.warns(RuntimeWarning, match="^hypergradient: .*(NaN|not finite)") as caught:
        (found,) = hypergradient(*losses, problem.params, problem.hparams, solver=Neumann(5, 0.1))
    assert len(caught) == 1
    assert found[4].isnan()


def bad_calls():
    p = ridge()
    w, h = p.params, p.hparams
    outer, inner = p.losses()
    frozen = torch.ones(12, dtype=F64)
    strange = leaf(torch.ones(3, dtype=F64))
    freed = p.losses()[1]
    torch.autograd.grad(freed, w)
    return {
        "frozen params": (
            (outer, inner, [frozen], h),
            ValueError,
            r"params\[0\] must require grad; got one that does not",
        ),
        "frozen hparams": ((outer, inner, w, {"a": frozen}), ValueError, r"hparams\['a'\] must require grad"),
        "no params": ((outer, inner, [], h), ValueError, "params must hold at least one tensor; got none"),
        "no hparams": ((outer, inner, w, ()), ValueError, "hparams must hold at least one tensor; got none"),
        "params of None": (
            (outer, inner, None, h),
            TypeError,
            "params must be a Tensor, or a list, tuple or dict of tensors; got None",
        ),
        "module": (
            (outer, inner, nn.Linear(1, 1), h),
            TypeError,
            r"params must be .*; got Linear. Pass its parameters: dict\(",
        ),
        "integer hparams": ((outer, inner, w, torch.ones(2, dtype=torch.int64)), TypeError, "hparams must be float32"),
        "tied params": (
            (outer, inner, [w, w], h),
            ValueError,
            r"params\[1\] must be a tensor of its own; got the same as params\[0\]",
        ),
        "param as hparam": (
            (outer, inner, w, [h, w]),
            ValueError,
            r"hparams\[1\] must not be one of params; got params",
        ),
        "outer is not scalar": ((w * 1, inner, w, h), ValueError, r"outer_loss must be a scalar; got shape \(12,\)"),
        "inner is not scalar": (
            (outer, lambda: w * h, w, h),
            ValueError,
            r"inner_loss must be a scalar; got shape \(12,\)",
        ),
        "outer without graph": ((outer.detach(), inner, w, h), ValueError, "outer_loss must have a graph"),
        "inner without graph": ((outer, lambda: inner.detach(), w, h), ValueError, "inner_loss must have a graph"),
        "inner is a number": (
            (outer, 3.0, w, h),
            TypeError,
            "inner_loss must be a scalar tensor or a zero-argument closure; got float",
        ),
        "closure returns None": (
            (lambda: None, inner, w, h),
            TypeError,
            "outer_loss must return a scalar tensor; got None",
        ),
        "graph freed": (
            (outer, freed, w, h),
            RuntimeError,
            "inner_loss must still have its graph; got one that was freed",
        ),
        "outer on neither": ((strange.sum(), inner, w, h), ValueError, "outer_loss must depend on params or hparams"),
        "inner without params": ((outer, h.sum(), w, h), ValueError, "inner_loss must depend on params"),
        "hparams unused": (
            (outer, inner, w, [strange]),
            ValueError,
            "hparams must be used by outer_loss or inner_loss; got 1 in neither",
        ),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_bad_calls_are_refused_by_name(name):
    args, kind, message = bad_calls()[name]
    with pytest.raises(kind, match=f"^hypergradient: {message}"):
        hypergradient(*args)


@pytest.mark.parametrize(
    "name",
    [
        "frozen params",
        "no params",
        "no hparams",
        "module",
        "inner is not scalar",
        "inner without graph",
        "graph freed",
        "param as hparam",
    ],
)
def test_bad_calls_of_best_response_are_refused_by_name(name):
    (_, *args), kind, message = bad_calls()[name]
    with pytest.raises(kind, match=f"^best_response: {message}"):
        best_response(*args)


def test_best_response_needs_one_hparam_that_requires_grad():
    problem = ridge()
    with pytest.raises(ValueError, match=r"^best_response: hparams must hold a tensor that requires grad; got none"):
        best_response(problem.losses()[1], problem.params, torch.ones(12, dtype=F64))


def test_a_solver_class_is_not_a_solver():
    problem = ridge()
    with pytest.raises(TypeError, match=r"^hypergradient: solver must be a solver such as .*; got Neumann"):
        hypergradient(*problem.losses(), problem.params, problem.hparams, solver=Neumann)


def test_the_graph_is_built_once_whatever_the_number_of_terms():
    calls = {"outer": 0, "inner": 0}
    problem = ridge()
    outer, inner = problem.closures()

    def counted(name, function):
        def call():
            calls[name] += 1
            return function()

        return call

    hypergradient(counted("outer", outer), counted("inner", inner), problem.params, problem.hparams, solver=Neumann(25))
    assert calls == {"outer": 1, "inner": 1}


def test_nothing_is_kept_alive():
    import gc
    import weakref

    problem = ridge()
    witness = torch.ones(12, dtype=F64)
    alive = weakref.ref(witness)

    def call(witness):
        inner = ridge_inner(problem.params * witness, problem.hparams)
        hypergradient(ridge_outer(problem.params, None), inner, problem.params, problem.hparams)
        best = best_response(inner, problem.params, problem.hparams)
        ridge_outer(best, None).backward()

    gc.disable()
    try:
        call(witness)
        del witness
        assert alive() is None, "no reference cycle holds the graph"
    finally:
        gc.enable()


def test_flat_parameters_of_a_module_are_accepted_as_torch_accepts_them():
    net = nn.Linear(3, 1).double()
    decay = leaf(torch.zeros((), dtype=F64))
    x = normal(0, 6, 3)

    def inner():
        return net(x).square().mean() + decay.exp() * sum(p.square().sum() for p in net.parameters())

    generator = hypergradient(lambda: net(x).mean(), inner, net.parameters(), decay, solver=Neumann(10))
    listed = hypergradient(lambda: net(x).mean(), inner, list(net.parameters()), decay, solver=Neumann(10))
    assert torch.equal(generator[0], listed[0]) and flat(generator).abs() > 0
