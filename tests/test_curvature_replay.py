"""Replayed Hessian products: the numbers of autograd, and autograd itself wherever a replay could be wrong."""

import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nestopt_ext import hypergradient
from nestopt_ext.curvature import Hessian, _replay, _vjp
from nestopt_ext.curvature._gradient import Gradient
from nestopt_ext.solvers import Neumann, neumann_ihvp, solve


def mlp(activation):
    return nn.Sequential(nn.Linear(5, 6), activation, nn.Linear(6, 7), activation, nn.Linear(7, 3)), (8, 5)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        weights = (q @ k.transpose(-1, -2) / 2).softmax(-1)
        return self.head((weights @ v + x).mean(1))


MODELS = {
    "tanh": lambda: mlp(nn.Tanh()),
    "sigmoid": lambda: mlp(nn.Sigmoid()),
    "gelu": lambda: mlp(nn.GELU()),
    "silu": lambda: mlp(nn.SiLU()),
    "relu": lambda: mlp(nn.ReLU()),
    "softplus": lambda: mlp(nn.Softplus()),
    "cnn": lambda: (
        nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3).eval(), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)
        ),
        (4, 2, 6, 6),
    ),
    "attention": lambda: (Attention(), (4, 5, 4)),
}


def problem(name, dtype=torch.float64):
    torch.manual_seed(0)
    model, shape = MODELS[name]()
    model.to(dtype)
    x, y = torch.randn(shape, dtype=dtype), torch.randint(3, (shape[0],))
    params = list(model.parameters())
    decay = [torch.rand_like(p).requires_grad_() for p in params]

    def inner():
        return F.cross_entropy(model(x), y) + sum((d.exp() * p**2).sum() for d, p in zip(decay, params, strict=True))

    return model, params, decay, inner


def vectors(params, count):
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in params] for _ in range(count)]


def replaying(loss, params):
    """A gradient whose next product is a replay, if it can be one."""
    gradient = Gradient("test", "loss", loss, params)
    gradient.expect(100)
    return gradient


def is_replayed(gradient):
    return gradient._replay._program is not None


def by_autograd(loss, params, v):
    grads = torch.autograd.grad(loss, params, create_graph=True)
    return torch.autograd.grad(grads, params, v, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("name", MODELS)
def test_replays_give_the_numbers_of_autograd(name):
    _, params, _, inner = problem(name)
    gradient = replaying(inner, params)
    for v in vectors(params, 3):
        for found, expected in zip(gradient.product(v), by_autograd(inner(), params, v), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
            assert not found.requires_grad
    assert is_replayed(gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_long_series_is_the_same_with_and_without(monkeypatch, dtype):
    model, params, decay, inner = problem("tanh", dtype)
    outer = lambda: model(torch.ones(2, 5, dtype=dtype)).square().sum()  # noqa: E731
    solver = Neumann(num_terms=40, alpha=0.05)
    graph_passes = []
    run = _vjp._engine_run_backward
    monkeypatch.setattr(_vjp, "_engine_run_backward", lambda *a, **k: graph_passes.append(1) or run(*a, **k))
    found = hypergradient(outer, inner, params, decay, solver=solver)
    assert len(graph_passes) < 10
    monkeypatch.setattr(_replay, "_WORTH", 10**9)
    graph_passes.clear()
    expected = hypergradient(outer, inner, params, decay, solver=solver)
    assert len(graph_passes) > 40
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=200 * torch.finfo(dtype).eps * float(b.abs().max()))


def test_few_products_are_not_recorded_and_many_are_without_being_told():
    _, params, _, inner = problem("tanh")
    hessian = Hessian(inner, params)
    (v,) = vectors(params, 1)
    for count in range(1, 20):
        found = hessian(v)
        assert is_replayed(hessian._gradient) == (count > _replay._WORTH)
    torch.testing.assert_close(found, list(by_autograd(inner(), params, v)), rtol=1e-10, atol=1e-11)


def test_results_are_new_memory_and_vectors_may_be_of_any_strides():
    w = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    unused = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    gradient = replaying((w**2).sum() / 2 + (w @ w.T).sum(), [w, unused])
    v = torch.randn(4, 3, dtype=torch.float64).T
    first, nothing = gradient.product([v, unused.detach()])
    kept = first.clone()
    second, _ = gradient.product([torch.ones(1, 1, dtype=torch.float64).expand(3, 4), unused.detach()])
    assert is_replayed(gradient) and torch.equal(first, kept) and not torch.equal(first, second)
    expected = v + 2 * v.sum(0).expand(3, 4)
    torch.testing.assert_close(first, expected)
    assert torch.equal(nothing, torch.zeros(2, dtype=torch.float64)) and nothing.data_ptr() != unused.data_ptr()


class ThroughNumpy(torch.autograd.Function):
    """Its derivative leaves PyTorch on the way, where no recorder sees it."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x * scale

    @staticmethod
    def backward(ctx, g):
        return ThroughNumpy.apply(g, ctx.scale), None


class InNumpy(ThroughNumpy):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return torch.from_numpy(x.detach().numpy() * scale)

    @staticmethod
    def backward(ctx, g):
        return InNumpy.apply(g, ctx.scale), None


class Noisy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return Noisy.apply(g * (1 + 0 * torch.rand_like(g)))


class ReadsItsGradient(Noisy):
    @staticmethod
    def backward(ctx, g):
        return ReadsItsGradient.apply(g if g.abs().max().item() < 1 else g * 1)


@pytest.mark.parametrize("function", [lambda x: InNumpy.apply(x, 2.0), Noisy.apply, ReadsItsGradient.apply])
def test_what_cannot_be_recorded_is_left_to_autograd(function):
    w = torch.randn(4, dtype=torch.float64, requires_grad=True)
    loss = lambda: (function(w) ** 3).sum() + (w**2).sum()  # noqa: E731
    gradient = replaying(loss, [w])
    for v in vectors([w], 3):
        torch.testing.assert_close(gradient.product(v)[0], by_autograd(loss(), [w], v)[0])
    assert not is_replayed(gradient)


def test_functions_in_python_that_stay_in_pytorch_are_replayed():
    w = torch.randn(4, dtype=torch.float64, requires_grad=True)
    loss = (ThroughNumpy.apply(w, 2.0) ** 3).sum()
    gradient = replaying(loss, [w])
    (v,) = vectors([w], 1)
    torch.testing.assert_close(gradient.product(v)[0], 48 * w.detach() * v[0])
    assert is_replayed(gradient)


def test_constants_that_are_not_finite_are_not_hidden():
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    gradient = replaying((w * torch.tensor([1.0, float("inf")])).square().sum(), [w])
    product = gradient.product([torch.tensor([1.0, 0.0])])[0]
    assert not is_replayed(gradient) and product[0] == 2 and product[1].isnan()
    gradient = replaying(w.pow(3).sum(), [w])
    assert gradient.product([torch.tensor([1.0, float("nan")])])[0].isnan().tolist() == [False, True]
    assert is_replayed(gradient)


def test_a_param_changed_in_place_is_refused_as_ever():
    _, params, _, inner = problem("tanh")
    gradient = replaying(inner(), params)
    (v,) = vectors(params, 1)
    gradient.product(v)
    assert is_replayed(gradient)
    with torch.no_grad():
        params[2].mul_(2)
    with pytest.raises(RuntimeError, match="changed in place since"):
        gradient.product(v)


def test_surroundings_that_change_operators_go_by_autograd():
    _, params, _, inner = problem("tanh", torch.float32)
    (v,) = vectors(params, 1)
    expected = by_autograd(inner(), params, v)
    gradient = replaying(inner, params)
    gradient.product(v)
    assert is_replayed(gradient)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradient.product(v)
        assert all(map(torch.equal, found, torch.autograd.grad(gradient._grads, params, v, retain_graph=True)))
    with torch.inference_mode():
        gradient.product(v)
    torch.testing.assert_close(gradient.product(v), list(expected), rtol=1e-4, atol=1e-5)


def test_large_problems_are_not_recorded():
    w = torch.randn(1000, 1000, requires_grad=True)
    gradient = replaying(w.pow(3).sum(), [w])
    gradient.product([torch.ones_like(w)])
    assert not is_replayed(gradient)
    small = torch.randn(30, requires_grad=True)
    x = torch.randn(200_000, 30)
    gradient = replaying(torch.tanh(x @ small).sum(), [small])
    gradient.product([torch.ones_like(small)])
    assert not is_replayed(gradient)


def test_threads_that_share_an_operator_get_their_own_products():
    _, params, _, inner = problem("tanh")
    gradient = replaying(inner, params)
    chosen = vectors(params, 4)
    expected = [by_autograd(inner(), params, v) for v in chosen]
    wrong = []

    def work(v, right):
        for _ in range(50):
            for a, b in zip(gradient.product(v), right, strict=True):
                if not torch.allclose(a, b, rtol=1e-10, atol=1e-11):
                    wrong.append(a)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(chosen, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_no_reference_cycle_keeps_what_was_recorded():
    gc.collect()
    gc.disable()
    try:
        _, params, _, inner = problem("tanh")
        gradient = replaying(inner, params)
        (v,) = vectors(params, 1)
        gradient.product(v)
        assert is_replayed(gradient)
        kept = [
            weakref.ref(t)
            for t, _ in gradient._replay._program._versions
            if t.grad_fn is not None or not t.requires_grad
        ]
        tensors = [weakref.ref(t) for t in gradient._replay._program._inputs]
        del gradient
        assert kept and not any(ref() is not None for ref in tensors)
    finally:
        gc.enable()


def series(matvec, v, num_terms, alpha, damping):
    """The textbook sum on lists."""
    total = term = v
    for _ in range(num_terms):
        product = matvec(term)
        term = [t - alpha * (p + damping * t) for t, p in zip(term, product, strict=True)]
        total = [s + t for s, t in zip(total, term, strict=True)]
    return [alpha * s for s in total]


@pytest.mark.parametrize("num_terms", [0, 1, 3, 30], ids=lambda k: f"K{k}")
@pytest.mark.parametrize("name", ["tanh", "relu", "cnn", "attention"])
def test_a_sum_taken_in_one_go_is_that_of_products(name, num_terms):
    _, params, _, inner = problem(name)
    (v,) = vectors(params, 1)
    kept = [t.clone() for t in v]
    found = neumann_ihvp(Hessian(inner, params), v, num_terms=num_terms, alpha=0.05, damping=0.1)
    again = neumann_ihvp(lambda v: by_autograd(inner(), params, v), v, num_terms=num_terms, alpha=0.05, damping=0.1)
    expected = series(lambda v: by_autograd(inner(), params, v), v, num_terms, 0.05, 0.1)
    for a, b, c in zip(found, again, expected, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(b, c, rtol=1e-10, atol=1e-11)
        assert not a.requires_grad
    assert all(map(torch.equal, v, kept))


@pytest.mark.parametrize("num_terms", [2, 20], ids=["by autograd", "replayed"])
def test_products_that_are_the_vector_itself_or_nothing(num_terms):
    w, unused = torch.randn(3, requires_grad=True), torch.randn(2, requires_grad=True)
    hessian = Hessian((w**2).sum() / 2, [w, unused])  # autograd hands the cotangent back
    v = [torch.ones(3), torch.ones(2)]
    found = neumann_ihvp(hessian, v, num_terms=num_terms, alpha=0.5)
    torch.testing.assert_close(found[0], torch.full((3,), 1 - 0.5 ** (num_terms + 1)))
    torch.testing.assert_close(found[1], torch.full((2,), 0.5 * (num_terms + 1)))
    assert v[0].eq(1).all()


@pytest.mark.parametrize("num_terms", [2, 20], ids=["by autograd", "replayed"])
def test_a_sum_that_is_not_finite_or_diverges_says_so(num_terms):
    w = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    hessian = Hessian(w.pow(4).sum() + w.square().sum(), w)
    with pytest.warns(RuntimeWarning, match="v must be finite"):
        found = neumann_ihvp(hessian, torch.tensor([1.0, float("nan"), 1.0]), num_terms=num_terms, alpha=0.01)
    assert found.isnan().tolist() == [False, True, False]
    with pytest.warns(RuntimeWarning, match="diverges"):
        neumann_ihvp(hessian, torch.ones(3), num_terms=num_terms, alpha=0.1)
    with pytest.warns(RuntimeWarning, match="is not finite"):
        neumann_ihvp(hessian, torch.ones(3), num_terms=num_terms, alpha=1e30)


@pytest.mark.parametrize("num_terms", [2, 20], ids=["by autograd", "replayed"])
def test_a_sum_after_a_param_was_changed_in_place_is_refused(num_terms):
    _, params, _, inner = problem("tanh")
    (v,) = vectors(params, 1)
    hessian = Hessian(inner(), params)
    neumann_ihvp(hessian, v, num_terms=num_terms, alpha=0.05)
    with torch.no_grad():
        params[2].mul_(2)
    with pytest.raises(RuntimeError, match="changed in place since"):
        neumann_ihvp(hessian, v, num_terms=num_terms, alpha=0.05)


def test_sums_of_half_precision_keep_their_terms_in_float32():
    w = torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True)
    solution = solve(Hessian(w.square().sum(), w), torch.ones(2, dtype=torch.bfloat16), Neumann(20, 0.25))
    assert solution.value.dtype == torch.bfloat16 and solution.value.eq(0.5).all()


@pytest.mark.parametrize("scale", [0.5, 3.0, 1e30])
def test_multiples_of_a_hessian(scale):
    w = torch.randn(3, dtype=torch.float64, requires_grad=True)
    matrix = scale * Hessian((w**4).sum(), w)
    v = torch.ones(3, dtype=torch.float64)
    diagonal = scale * 12 * w.detach() ** 2
    alpha = 0.5 / float(diagonal.max())
    found = neumann_ihvp(matrix, v, num_terms=12, alpha=alpha)
    torch.testing.assert_close(found, series(lambda u: [diagonal * u[0]], [v], 12, alpha, 0)[0], rtol=1e-10, atol=0)


def test_a_mode_that_listens_to_operators_hears_those_of_autograd():
    class Listening(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    _, params, _, inner = problem("tanh")
    gradient = replaying(inner, params)
    (v,) = vectors(params, 1)
    with Listening():
        gradient.product(v)
    assert not is_replayed(gradient)
    gradient.expect(100)
    gradient.product(v)
    assert is_replayed(gradient)
