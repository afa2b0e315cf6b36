"""Fixed-point maps in place of inner losses: against the loss form, dense solves, and finite differences."""

import gc
import weakref

import pytest
import torch
from cases import F64, PROBLEMS, leaf, normal, relative_error, ridge, values
from torch import nn

from nestopt_ext.hypergrad import FixedPointMap, best_response, gradient_step, hypergradient
from nestopt_ext.solvers import ConjugateGradient, Identity, Neumann


def by_best_response(outer, fixed_point, params, hparams, **options):
    best = best_response(fixed_point, params, hparams, **options)
    grads = torch.autograd.grad(outer(best), values(hparams), allow_unused=True)
    return tuple(torch.zeros_like(h) if g is None else g for g, h in zip(grads, values(hparams), strict=True))


def linear():
    """w = M w + C h with a matrix M that is not symmetric; the outer loss has a direct part."""
    m = 0.8 * torch.linalg.qr(normal(1, 6, 6))[0] @ torch.diag(torch.linspace(0.1, 1, 6, dtype=F64))
    c, h = normal(2, 6, 4), leaf(normal(3, 4))
    w = leaf(torch.linalg.solve(torch.eye(6, dtype=F64) - m, c @ h))

    def outer(w):
        return (w - 1).square().sum() + h.pow(3).sum()

    inverse = torch.linalg.inv(torch.eye(6, dtype=F64) - m)
    wanted = 3 * h.detach() ** 2 + c.T @ inverse.T @ (2 * (w.detach() - 1))
    return w, h, lambda: m @ w + c @ h, outer, wanted


def equilibrium(w0=None, bias=None):
    """A recurrent network at rest, w = tanh(M w + x h + b), in params of two tensors that feed each other."""
    m, x = 0.9 * torch.linalg.qr(normal(5, 5, 5))[0], normal(6, 5, 3)
    h = leaf(normal(7, 3) if bias is None else bias)

    def phi(w):
        state = torch.cat([w["a"], w["b"].reshape(-1)])
        state = torch.tanh(m @ state + x @ h)
        return {"b": state[2:].reshape(3, 1), "a": state[:2]}

    w = {"a": torch.zeros(2, dtype=F64), "b": torch.zeros(3, 1, dtype=F64)}
    with torch.no_grad():
        for _ in range(400):
            w = phi(w)
    return {n: leaf(t) for n, t in sorted(w.items())}, h, phi


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", [0, 3, 400])
@pytest.mark.parametrize("name", PROBLEMS)
def test_gradient_steps_give_what_the_loss_gives(name, terms):
    problem = PROBLEMS[name]()
    step = gradient_step(problem.inner, lr=problem.alpha)
    phi = FixedPointMap(lambda: step(problem.params, problem.hparams))
    outer, inner = problem.closures()
    args = (problem.params, problem.hparams)
    wanted = hypergradient(outer, inner, *args, solver=Neumann(terms, problem.alpha))
    found = hypergradient(outer, phi, *args, solver=Neumann(terms, 1.0))
    assert relative_error(found, wanted) < 1e-12
    if terms == 400:
        assert relative_error(found, problem.hypergradient) < 1e-10
    through = by_best_response(lambda w: problem.outer(w, problem.hparams), phi, *args, solver=Neumann(terms, 1.0))
    assert relative_error(through, wanted) < 1e-12


@pytest.mark.parametrize("closures", [False, True])
def test_a_linear_map_against_a_dense_solve(closures):
    w, h, phi, outer, wanted = linear()
    given = FixedPointMap(phi if closures else phi())
    found = hypergradient(outer(w), given, w, h, solver=Neumann(300, 1.0))
    assert relative_error(found, wanted) < 1e-12
    assert relative_error(by_best_response(outer, given, w, h, solver=Neumann(300, 1.0)), wanted) < 1e-12
    assert relative_error(hypergradient(outer(w), given, w, h, solver=Neumann(300)), wanted) < 1e-10, "alpha='auto'"


def test_terms_are_fixed_point_steps_of_the_transpose():
    w, h, phi, outer, _ = linear()
    (g,) = torch.autograd.grad(outer(w), w)
    image = phi()
    u = torch.zeros_like(g)
    for k in range(6):
        u = torch.autograd.grad(image, w, u, retain_graph=True)[0] + g
        found = hypergradient(outer(w), FixedPointMap(phi), w, h, solver=Neumann(k, 1.0))
        wanted = 3 * h.detach() ** 2 + torch.autograd.grad(image, h, u, retain_graph=True)[0]
        assert relative_error(found, wanted) < 1e-14


@pytest.mark.parametrize("solve", ["hypergradient", "best_response"])
def test_the_equilibrium_of_a_network_against_a_dense_solve_and_finite_differences(solve):
    w, h, phi = equilibrium()

    def outer(w):
        return (w["a"] ** 2).sum() + (w["b"] * torch.arange(3, dtype=F64)[:, None]).sum()

    given = FixedPointMap(lambda: phi(w))
    if solve == "hypergradient":
        (found,) = hypergradient(lambda: outer(w), given, w, h, solver=Neumann(600, 1.0))
    else:
        (found,) = by_best_response(outer, given, w, h, solver=Neumann(600, 1.0))

    def as_vector(a, b, h):
        out = torch.cat([a, b.reshape(-1)])
        m, x = 0.9 * torch.linalg.qr(normal(5, 5, 5))[0], normal(6, 5, 3)
        return torch.tanh(m @ out + x @ h)

    in_a, in_b, in_h = torch.autograd.functional.jacobian(as_vector, (w["a"], w["b"], h))
    jacobian = torch.cat([in_a, in_b.reshape(5, 3)], dim=1)
    assert float((jacobian - jacobian.T).norm()) > 0.1, "not symmetric"
    g = torch.cat([2 * w["a"].detach(), torch.arange(3, dtype=F64)])
    assert relative_error(found, in_h.T @ torch.linalg.solve((torch.eye(5, dtype=F64) - jacobian).T, g)) < 1e-11
    for i in range(3):
        shift = torch.zeros(3, dtype=F64)
        shift[i] = 1e-6
        up, down = (equilibrium(bias=h.detach() + s)[0] for s in (shift, -shift))
        assert float(found[i]) == pytest.approx(float((outer(up) - outer(down)).detach()) / 2e-6, rel=1e-6)


def test_params_that_the_map_gives_without_themselves():
    w, h = [leaf(torch.tensor(2.0, dtype=F64)), leaf(torch.tensor(3.0, dtype=F64))], leaf(torch.tensor(1.0, dtype=F64))
    phi = [0.5 * w[0] + h, 3 * h]  # the second is given outright
    found = hypergradient(w[0] * w[1], FixedPointMap(phi), w, h, solver=Neumann(60, 1.0))
    assert float(found[0]) == pytest.approx(3 * 2 + 2 * 3, rel=1e-12)
    fixed = [0.5 * w[0] + h, torch.tensor(3.0, dtype=F64)]
    found = hypergradient(w[0] * w[1], FixedPointMap(fixed), w, h, solver=Neumann(60, 1.0))
    assert float(found[0]) == pytest.approx(3 * 2, rel=1e-12)


def test_unused_hparams_give_zeros():
    w, h, phi, outer, wanted = linear()
    unused = leaf(torch.ones(2))
    found = hypergradient(outer(w), FixedPointMap(phi), w, [unused, h], solver=Neumann(300, 1.0))
    assert torch.equal(found[0], torch.zeros(2)) and relative_error(found[1], wanted) < 1e-12


def test_a_map_that_spreads_is_said():
    w, h = leaf(torch.tensor(1.0, dtype=F64)), leaf(torch.tensor(1.0, dtype=F64))
    with pytest.warns(RuntimeWarning, match="^hypergradient: the Neumann sum diverges"):
        hypergradient(w**2, FixedPointMap(lambda: -1.5 * w + 2.5 * h), w, h, solver=Neumann(30, 1.0))


# ---- what stays as it was -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_random_state_buffers_and_grads_stay(fails):
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Tanh()).double().train()
    w, h = leaf(normal(1, 8, 4)), leaf(torch.tensor(0.1, dtype=F64))
    w.grad = torch.ones_like(w)
    tensors = [w, h, *net.parameters(), *net.buffers()]
    before = [t.detach().clone() for t in tensors]
    state = torch.get_rng_state()

    def phi():
        out = h * net(w)
        if fails:
            raise ZeroDivisionError
        return out

    if fails:
        with pytest.raises(ZeroDivisionError):
            hypergradient(w.sum(), FixedPointMap(phi), w, h)
    else:
        first = hypergradient(w.sum(), FixedPointMap(phi), w, h)
        assert torch.equal(first[0], hypergradient(w.sum(), FixedPointMap(phi), w, h)[0]) and first[0].abs() > 0
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(w.grad, torch.ones_like(w)) and h.grad is None


def test_the_map_is_applied_once_and_works_with_grad_mode_off():
    w, h, phi, outer, wanted = linear()
    calls = []

    def counted():
        calls.append(1)
        return phi()

    with torch.no_grad():
        found = hypergradient(lambda: outer(w), FixedPointMap(counted), w, h, solver=Neumann(300, 1.0))
    assert relative_error(found, wanted) < 1e-12 and len(calls) == 1


def test_nothing_is_kept_alive():
    w, h, phi, outer, _ = linear()
    witness = torch.ones(6, dtype=F64)
    alive = weakref.ref(witness)

    def call(witness):
        given = FixedPointMap(lambda: phi() * witness)
        hypergradient(outer(w), given, w, h)
        outer(best_response(given, w, h)).backward()

    gc.disable()
    try:
        call(witness)
        del witness
        assert alive() is None
    finally:
        gc.enable()


# ---- faults ---------------------------------------------------------------------------------------------------------


def test_an_error_node_in_the_map_is_refused():
    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x / 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return grad / 2

    w, h = leaf(torch.ones(3, dtype=F64)), leaf(torch.ones(3, dtype=F64))
    loss = (Half.apply(w) ** 2 - h * w).sum()
    (grad,) = torch.autograd.grad(loss, w, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^hypergradient: FixedPointMap.step must be twice differentiable"):
        hypergradient(w.sum(), FixedPointMap(w - 0.1 * grad), w, h)


def bad_calls():
    w, h, phi, _, _ = linear()
    freed = phi()
    freed = freed.pow(2)
    torch.autograd.grad(freed.sum(), w)
    good = {"inner_loss": FixedPointMap(phi), "params": w, "hparams": h}
    return {
        "curvature": (
            {**good, "curvature": lambda v: v},
            ValueError,
            "curvature must be None with a FixedPointMap; got function",
        ),
        "conjugate gradients": (
            {**good, "solver": ConjugateGradient()},
            ValueError,
            r"solver must not ask for a symmetric matrix with a FixedPointMap; got ConjugateGradient\. Use Fixed",
        ),
        "None": ({**good, "inner_loss": FixedPointMap(None)}, TypeError, "FixedPointMap.step must be a Tensor, or a"),
        "returns None": (
            {**good, "inner_loss": FixedPointMap(lambda: None)},
            TypeError,
            "FixedPointMap.step must be a Tensor, or a list, tuple or dict of tensors; got None",
        ),
        "a list for a tensor": (
            {**good, "inner_loss": FixedPointMap(lambda: [phi()])},
            TypeError,
            r"FixedPointMap.step must be a Tensor; got list\. Return its only element",
        ),
        "shape": (
            {**good, "inner_loss": FixedPointMap(lambda: phi()[:2])},
            ValueError,
            r"FixedPointMap.step must have shape \(6,\); got \(2,\)",
        ),
        "dtype": (
            {**good, "inner_loss": FixedPointMap(lambda: phi().float())},
            TypeError,
            "FixedPointMap.step must be float64; got float32",
        ),
        "no graph": (
            {**good, "inner_loss": FixedPointMap(phi().detach())},
            ValueError,
            "FixedPointMap.step must have a",
        ),
        "without params": (
            {**good, "inner_loss": FixedPointMap(lambda: h.sum() * torch.ones(6, dtype=F64))},
            ValueError,
            "FixedPointMap.step must depend on params; got a graph that none of them is in",
        ),
        "graph freed": (
            {**good, "inner_loss": FixedPointMap(freed)},
            RuntimeError,
            "FixedPointMap.step must still have its graph; got one that was freed",
        ),
    }


@pytest.mark.parametrize("solve", ["hypergradient", "best_response"])
@pytest.mark.parametrize("name", bad_calls())
def test_bad_calls_are_refused_by_name(name, solve):
    arguments, kind, message = bad_calls()[name]
    with pytest.raises(kind, match=f"^{solve}: {message}"):
        if solve == "hypergradient":
            hypergradient(lambda: values(arguments["params"])[0].sum(), **arguments)
        else:
            best_response(**arguments)


def test_hparams_that_neither_uses_are_refused():
    w, _, _, _, _ = linear()
    with pytest.raises(ValueError, match=r"^hypergradient: hparams must be used by outer_loss or inner_loss"):
        hypergradient(w.sum(), FixedPointMap(w / 2), w, leaf(torch.ones(())))


def test_identity_is_one_step():
    problem = ridge()
    step = gradient_step(problem.inner, lr=0.3)
    found = hypergradient(
        problem.losses()[0],
        FixedPointMap(lambda: step(problem.params, problem.hparams)),
        problem.params,
        problem.hparams,
        solver=Identity(1.0),
    )
    wanted = hypergradient(*problem.losses(), problem.params, problem.hparams, solver=Identity(0.3))
    assert relative_error(found, wanted) < 1e-14
