"""Hypergradients that are set up once: the numbers of hypergradient in every mode, and no trouble left unsaid."""

import gc
import warnings
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import Memory, all_same_bits
from torch import nn

from nestopt_ext.curvature import Diagonal, GaussNewton
from nestopt_ext.curvature._program import Recorder, compiled
from nestopt_ext.curvature._program import Unfit as Unrecordable
from nestopt_ext.hypergrad import CapturedHypergradient, _choice, _graph, _recorded, _routes, hypergradient
from nestopt_ext.hypergrad._inspection import Inspection
from nestopt_ext.solvers import ConjugateGradient, Exact, Identity, Neumann, Status

F64 = torch.float64


class StandIn:
    """A graph on the CPU: it runs the function again, and puts the results where the first ones lie."""

    made = 0

    def __init__(self, device, generators):
        type(self).made += 1
        self.generators = generators
        self.parts = []
        self.warm_ups = 0

    def part(self, number):
        self.parts.append(number)
        return nullcontext()

    def warm_up(self, function):
        function()
        self.warm_ups += 1

    def capture(self, function):
        assert self.warm_ups == 1
        self.function = function
        self.grads, self.evidence = function()
        return self.grads, self.evidence

    def turn(self):
        return nullcontext()

    def replay(self):
        grads, evidence = self.function()
        for old, new in zip(self.grads, grads, strict=True):
            old.copy_(new)
        if evidence is not None:
            self.evidence.packed.copy_(evidence.packed)


@pytest.fixture
def graphs(monkeypatch):
    """Graphs are captured on the CPU, by a stand-in; the class counts them."""
    monkeypatch.setitem(_choice.GRAPHS, "cpu", StandIn)
    StandIn.made = 0
    return StandIn


@pytest.fixture
def eager_backend(monkeypatch):
    """What torch.compile would make takes half a minute; its input is what is tested."""
    monkeypatch.setattr(_recorded, "_BACKEND", "eager")


@pytest.fixture(params=["eager", "cuda-graph", "recorded"])
def mode(request, graphs):
    return request.param


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.norm, self.head = nn.Linear(4, 12), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        return self.head(((q @ k.transpose(-1, -2) / 2).softmax(-1) @ v + x).mean(1))


MODELS = {
    "tanh": lambda: (nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)), (5,)),
    "relu": lambda: (nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)), (5,)),
    "gelu": lambda: (nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 3)), (5,)),
    "cnn": lambda: (
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3).eval(), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)),
        (2, 6, 6),
    ),
    "attention": lambda: (Attention(), (3, 4)),
}


class Problem:
    """A model with a decay for each weight, and as much data as is asked for."""

    def __init__(self, name="tanh", dtype=F64, device="cpu"):
        torch.manual_seed(0)
        self.model, self.shape = MODELS[name]()
        self.model.to(device, dtype)
        self.dtype, self.device = dtype, device
        self.params = list(self.model.parameters())
        self.decay = [torch.rand_like(p).sub_(1).requires_grad_() for p in self.params]
        self.scale = torch.tensor(0.5, dtype=dtype, device=device, requires_grad=True)  # in the outer loss alone
        self.hparams = [*self.decay, self.scale]
        self.runs = 0

    def inner(self, x, y):
        self.runs += 1
        decay = sum((d.exp() * p**2).sum() for d, p in zip(self.decay, self.params, strict=True))
        return F.cross_entropy(self.model(x), y) + decay

    def outer(self, x, y):
        return F.cross_entropy(self.model(x), y) * self.scale.exp()

    def data(self, seed, size=8):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn((2 * size, *self.shape), dtype=self.dtype, generator=g).to(self.device)
        y = torch.randint(3, (2 * size,), generator=g).to(self.device)
        return (x[:size], y[:size]), (x[size:], y[size:])

    def captured(self, **options):
        options = {"solver": Neumann(8, 0.05)} | options
        return CapturedHypergradient(self.outer, self.inner, self.params, self.hparams, **options)

    def expected(self, inner_data, outer_data, **options):
        options = {"solver": Neumann(8, 0.05)} | options
        return hypergradient(
            lambda: self.outer(*outer_data), lambda: self.inner(*inner_data), self.params, self.hparams, **options
        )

    def move(self):
        """What a training step and an outer step do."""
        with torch.no_grad():
            for t in (*self.params, *self.hparams):
                t.add_(torch.randn_like(t), alpha=0.05)


def assert_close(found, expected, slack=200):
    assert len(found) == len(expected)
    for f, e in zip(found, expected, strict=True):
        assert f.shape == e.shape and f.dtype == e.dtype and not f.requires_grad
        scale = float(e.abs().max()) if e.numel() else 0.0
        torch.testing.assert_close(f, e, rtol=0, atol=slack * torch.finfo(e.dtype).eps * scale)


# ---- the numbers of hypergradient ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_mode_gives_the_numbers_of_hypergradient_as_all_goes_on(mode, name):
    check_as_all_goes_on(mode, name)


@pytest.mark.parametrize("name", ["tanh", "attention"])
def test_a_compiled_product_gives_the_numbers_of_hypergradient(eager_backend, name):
    check_as_all_goes_on("compiled", name)


def check_as_all_goes_on(mode, name):
    problem = Problem(name)
    captured = problem.captured(mode=mode)
    for seed in range(5):
        data = problem.data(seed)
        assert_close(captured.step(*data), problem.expected(*data))
        problem.move()
    assert captured.mode == mode and captured.reason is None and captured.step_count == 5
    assert captured.check() is Status.max_terms


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("solver", [Neumann(5), ConjugateGradient(8, damping=0.1), Exact(), Identity(0.1)])
def test_recorded_steps_take_any_solver_and_the_default_alpha(solver, dtype):
    problem = Problem("relu", dtype)
    captured = problem.captured(mode="recorded", solver=solver)
    for seed in range(4):
        data = problem.data(seed)
        assert_close(captured.step(*data), problem.expected(*data, solver=solver), 1e4)
        problem.move()


def test_the_losses_are_not_run_again(mode):
    problem = Problem()
    captured = problem.captured(mode=mode)
    for seed in range(2):  # the first two steps are held against hypergradient
        captured.step(*problem.data(seed))
    problem.runs = 0
    captured.step(*problem.data(9))
    again = mode == "eager" or mode == "cuda-graph"  # the stand-in for a graph runs its function
    assert problem.runs == again


@pytest.mark.parametrize("kind", ["recorded", "cuda-graph"])
def test_numbers_of_autograd_are_not_touched_and_nothing_is_modified(graphs, kind):
    problem = Problem("cnn")
    captured = problem.captured(mode=kind)
    inner, outer = problem.data(0)
    memory = Memory([*problem.params, *problem.hparams, *problem.model.buffers(), *inner, *outer])
    rng = torch.get_rng_state()
    results = [captured.step(inner, outer) for _ in range(4)]
    assert memory.unchanged() and torch.equal(rng, torch.get_rng_state())
    assert all(t.grad is None for t in (*problem.params, *problem.hparams))
    kept = [t.clone() for t in results[2]]
    captured.step(*problem.data(1))
    assert all_same_bits(kept, results[2]), "a later step writes to what an earlier one returned"
    addresses = {t.data_ptr() for grads in results for t in grads}
    assert len(addresses) == 4 * len(problem.hparams)


@pytest.mark.parametrize("kind", ["recorded", "cuda-graph"])
def test_what_does_not_depend_on_the_other(graphs, kind):
    w, unused = torch.ones(3, dtype=F64, requires_grad=True), torch.ones(2, dtype=F64, requires_grad=True)
    h, only_outer = torch.ones(3, dtype=F64, requires_grad=True), torch.ones((), dtype=F64, requires_grad=True)
    x = torch.arange(3.0, dtype=F64)

    def inner(x):
        return (0.5 * h * w**2).sum() - (x * w).sum()

    solver = Neumann(3, 0.5)
    for outer in (lambda x: (w * x).sum() * only_outer, lambda x: (only_outer * x).sum() + (h * x).sum()):
        captured = CapturedHypergradient(outer, inner, [w, unused], [h, only_outer], solver=solver, mode=kind)
        for factor in (1.0, 2.0, 3.0):
            found = captured.step(factor * x, x)
            expected = hypergradient(
                lambda outer=outer: outer(x),
                lambda factor=factor: inner(factor * x),
                [w, unused],
                [h, only_outer],
                solver=solver,
            )
            assert_close(found, expected)
            with torch.no_grad():
                w.mul_(0.9)
        assert captured.mode == kind
    assert captured.check() is None, "with no param in the outer loss there is nothing to solve"


def test_a_tensor_that_a_loss_reads_may_be_written_in_place(mode):
    problem, weight = Problem(), torch.ones((), dtype=F64)
    inner = problem.inner
    problem.inner = lambda x, y: inner(x, y) * weight.sqrt() * torch.tensor(1.5, dtype=F64)
    captured = problem.captured(mode=mode)
    for seed in range(4):
        weight.fill_(0.5 + 0.1 * seed)
        assert_close(captured.step(*problem.data(seed)), problem.expected(*problem.data(seed)))
    assert captured.mode == mode


def test_data_of_any_structure():
    problem = Problem()
    captured = CapturedHypergradient(
        lambda batch, *, scale=1.0: problem.outer(batch["x"], batch["y"]) * scale,
        lambda batch, weight: problem.inner(batch["x"], batch["y"]) * weight,
        problem.params,
        problem.hparams,
        solver=Neumann(8, 0.05),
        mode="recorded",
    )
    for seed in range(3):
        inner, outer = ({"x": x, "y": y} for x, y in problem.data(seed))
        found = captured.step((inner, 1), outer)
        assert_close(found, problem.expected(*problem.data(seed)))
    assert len(captured._setups) == 1
    captured.step((inner, 2), outer)
    assert len(captured._setups) == 2, "another constant is another computation"


def test_a_curvature_is_made_from_the_inner_data(graphs):
    problem = Problem()
    make = lambda x, y: GaussNewton(problem.model, nn.CrossEntropyLoss(), x, y) + 0.1 * identity  # noqa: E731
    identity = Diagonal([torch.ones_like(p) for p in problem.params], problem.params)
    captured = problem.captured(mode="cuda-graph", curvature=make)
    for seed in range(3):
        inner, outer = problem.data(seed)
        assert_close(captured.step(inner, outer), problem.expected(inner, outer, curvature=make(*inner)))
        problem.move()
    recorded = problem.captured(curvature=make, mode="auto")
    assert recorded.mode is None and recorded.timings == {}
    with pytest.raises(RuntimeError, match="the curvature is the caller's own"):
        problem.captured(curvature=make, mode="recorded").step(inner, outer)


def test_random_numbers_are_those_of_hypergradient(graphs):
    problem = Problem()
    problem.model = nn.Sequential(nn.Dropout(0.3), problem.model)
    captured = problem.captured(mode="cuda-graph")
    generator_state = torch.get_rng_state()
    results = []
    for seed in range(4):
        data = problem.data(0)
        torch.manual_seed(seed)
        results.append(captured.step(*data))
        assert_close(results[-1], problem.expected(*data))
    assert not torch.allclose(results[2][0], results[3][0]), "another mask at another state"
    torch.set_rng_state(generator_state)
    graph = next(iter(captured._setups.values()))._route._graph
    assert graph.generators == [torch.default_generator]
    # warm-up, capture and three replays or more, each with a part for the outer and one for the inner loss
    assert set(graph.parts) == {_routes.OUTER, _routes.INNER}
    with pytest.raises(RuntimeError, match="draws random numbers"):
        problem.captured(mode="recorded").step(*problem.data(0))


# ---- operators -------------------------------------------------------------------------------------------------------


def written_in_part(x, w, h):
    z = x @ w
    z[:, :2].mul_(h[:2])
    return (z**3).sum()


def written_whole(x, w, h):
    return ((x @ w).add_(h).mul_(2).tanh_() ** 2).sum()


def recurrent(x, w, h):
    s = torch.zeros(len(x), 4, dtype=F64)
    for _ in range(3):
        s = torch.tanh(x @ w + s * h) * torch.sigmoid(s + h)
    return s.square().sum()


def of_a_gradient(x, w, h):
    (g,) = torch.autograd.grad((x @ w).pow(3).sum(), w, create_graph=True)
    return (g * h).square().sum()


def in_pieces(x, w, h):
    a, b = (x @ w).chunk(2, -1)
    return (torch.cat([a.sigmoid() * b, b], -1) * h).square().mean()


def of_a_factor(x, w, h):
    factor = torch.linalg.cholesky(w.T @ w + torch.diag(h.exp()))
    return factor.diagonal().log().sum() + (factor @ h).square().sum()


#: Inner losses of x [n, 5], w [5, 4] and h [4].
LOSSES = {
    "written whole": written_whole,
    "recurrent": recurrent,
    "gradient": of_a_gradient,
    "pieces": in_pieces,
    "factor": of_a_factor,
    "stack": lambda x, w, h: torch.stack([(x @ w * h[i]).sin() for i in range(3)]).logsumexp(0).sum(),
    "where": lambda x, w, h: torch.where(x @ w > 0, (x @ w) * h.exp(), (x @ w) ** 2).mean(),
    "einsum": lambda x, w, h: torch.einsum("ni,ij,nk,kj,j->n", x, w, x, w, h).mean(),
    "sort": lambda x, w, h: ((x @ w).sort(1)[0] * h).square().sum() + ((x @ w).topk(2, 1)[0] * h[:2]).exp().sum(),
    "conv": lambda x, w, h: F.conv1d(x.reshape(2, 1, -1), w.reshape(2, 1, -1)[..., :3], h[:2]).relu().square().sum(),
    "gather": lambda x, w, h: (w.gather(0, torch.zeros(1, 4, dtype=torch.long)).expand(3, 4) * h).pow(3).sum(),
    "dtypes": lambda x, w, h: ((x.float() @ w.float()).tanh().double() * h).square().sum(),
    "units": lambda x, w, h: (F.elu(x @ w) * h + F.leaky_relu(x @ w) + F.softplus(x @ w, 2.0)).square().sum(),
    "windows": lambda x, w, h: (w.repeat(2, 1).T.reshape(-1).unfold(0, 3, 2) * h[:3]).square().sum(),
    "moments": lambda x, w, h: ((x @ w).var(0) * h).sum() + (x @ w).flip(0).roll(1, 1).mul(h).mean(),
    "pools": lambda x, w, h: F.max_pool1d((F.pad(x @ w, (1, 1)) * h.sum()).unsqueeze(0), 2).square().sum(),
    "products": lambda x, w, h: torch.bmm((x @ w).reshape(2, -1, 4), (x @ w * h).reshape(2, -1, 4).mT).exp().sum(),
    "linear": lambda x, w, h: (x @ w * h).sum(),
    "constants": lambda x, w, h: (w * torch.tensor([1.0, 2, 3, 4], dtype=F64)).square().sum() * h.sum() + w.sum() ** 2,
    "clamped": lambda x, w, h: ((x @ w).clamp(-1, 1).amax(1) * h.sum()).square().mean(),
    "unit length": lambda x, w, h: (w / w.norm() * h).exp().sum(),
    "normed": lambda x, w, h: F.layer_norm(x @ w, (4,), h, 2 * h).pow(3).sum(),
    "smoothed": lambda x, w, h: F.cross_entropy(x @ w * h.exp(), torch.arange(8) % 4, label_smoothing=0.1),
    "matrices": lambda x, w, h: torch.matrix_exp(w.T @ w / 10).sum() * h.sum() + torch.linalg.inv(w.T @ w + 1).sum(),
}
REFUSED = {
    "written in part": written_in_part,
    "scattered": lambda x, w, h: (w.cumsum(0) * h).prod(1).sum(),
    "indexed": lambda x, w, h: (w[torch.tensor([0, 1, 0])] * h).square().sum(),
    "noisy": lambda x, w, h: (F.dropout(x @ w) * h).square().sum(),
}


@pytest.mark.parametrize("kind", ["recorded", "cuda-graph"])
@pytest.mark.parametrize("name", [*LOSSES, *REFUSED])
def test_operators_are_right_or_refused(graphs, kind, name):
    inner = (LOSSES | REFUSED)[name]
    w = torch.randn(5, 4, dtype=F64).mul_(0.5).requires_grad_()
    h = (torch.rand(4, dtype=F64) + 0.5).requires_grad_()
    solver = Neumann(5, 0.001)

    def outer(x):
        return (x @ w).tanh().square().sum() + h.square().sum()

    captured = CapturedHypergradient(outer, lambda x: inner(x, w, h), w, h, solver=solver, mode=kind)
    for _ in range(4):
        x = torch.randn(8, 5, dtype=F64)
        if kind == "recorded" and name in REFUSED:
            with pytest.raises(RuntimeError, match="a step cannot be recorded"):
                captured.step(x, x)
            return
        found = captured.step(x, x)
        # Numbers in float32 differ by its rounding, which is all that the sums have in common.
        assert_close(
            found,
            hypergradient(lambda x=x: outer(x), lambda x=x: inner(x, w, h), w, h, solver=solver),
            1e10 if name == "dtypes" else 1e3,
        )
        with torch.no_grad():
            w.add_(torch.randn_like(w), alpha=0.05)
            h.add_(0.02)


def test_a_constant_that_is_written_after_it_was_read_is_no_constant():
    a, v = torch.arange(3.0), torch.ones(3)
    for read_before in (False, True):
        recorder = Recorder(2**20)
        with recorder:
            constant = a * 2
            first = v * constant if read_before else v * a
            constant.add_(1)
            found = first + v * constant
        if read_before:
            with pytest.raises(Unrecordable):
                compiled(recorder.log, [v], [found])
        else:
            program = compiled(recorder.log, [v], [found])
            assert torch.equal(program([2 * v])[0], 2 * (a + 2 * a + 1))


# ---- set-ups ---------------------------------------------------------------------------------------------------------


def test_a_set_up_for_each_kind_of_data_the_oldest_dropped(graphs):
    problem = Problem()
    captured = problem.captured(mode="cuda-graph", max_captures=2)
    for size, made in ((8, 1), (4, 2), (8, 2), (6, 3), (8, 3), (4, 4)):
        data = problem.data(size, size)
        assert_close(captured.step(*data), problem.expected(*data))
        assert graphs.made == made, size
    assert len(captured._setups) == 2
    inner, outer = problem.data(4, 4)
    captured.step((inner[0].T.contiguous().T, inner[1]), outer)
    assert graphs.made == 5, "other strides"


def test_kinds_of_data_that_come_back_after_they_were_dropped_are_not_set_up_again_and_again(graphs):
    problem = Problem()
    captured = problem.captured(max_captures=2)
    made = 0
    with pytest.warns(UserWarning, match=r"more than max_captures = 2 kinds of shapes\. Raise max_captures"):
        for size in (8, 4, 6, 8, 4, 6, 8):
            data = problem.data(size, size)
            assert_close(captured.step(*data), problem.expected(*data))
            made = max(made, graphs.made)
    assert made <= 4 and captured.mode == "eager" and "max_captures" in captured.reason
    captured.reset()
    captured.step(*problem.data(8, 8))
    assert captured.reason is None


def test_what_calls_for_another_set_up(graphs):
    problem = Problem()
    alpha = torch.tensor(0.05, dtype=F64)
    captured = problem.captured(solver=Neumann(8, alpha), mode="cuda-graph", max_captures=9)
    data = problem.data(0)

    def step():
        found = captured.step(*data)
        assert_close(found, problem.expected(*data, solver=Neumann(8, alpha)))
        return graphs.made

    assert step() == step() == 1
    problem.move()
    assert step() == 1
    problem.params[0].data = problem.params[0].data.clone()
    assert step() == 2, "a param has moved"
    alpha.fill_(0.02)
    assert step() == 3, "a number on the host has changed"
    torch.set_float32_matmul_precision("high")
    try:
        assert step() == 4
    finally:
        torch.set_float32_matmul_precision("highest")
    captured.reset()
    assert not captured._setups and step() == 5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        captured.step(*data)
        assert graphs.made == 6


def test_a_number_on_the_host_that_was_taken_for_a_constant(graphs, monkeypatch):
    problem, scale = Problem(), torch.ones((), dtype=F64)
    inner = problem.inner
    problem.inner = lambda x, y: inner(x, y) * scale
    captured = problem.captured(mode="cuda-graph")
    captured.step(*problem.data(0))
    route = next(iter(captured._setups.values()))._route
    assert route.holds() and route._on_host == [], "what a graph reads again is no constant"
    route._on_host = [(scale, scale._version)]
    scale.mul_(2)
    assert_close(captured.step(*problem.data(1)), problem.expected(*problem.data(1)))
    assert graphs.made == 2 and captured.mode == "cuda-graph"


def test_memory_goes_with_the_object():
    problem = Problem()
    captured = problem.captured(mode="recorded")
    for seed in range(3):
        captured.step(*problem.data(seed))
    route = next(iter(captured._setups.values()))._route
    constants = [t for t in route._refilled if t.numel() > 1]
    references = [torch.multiprocessing.reductions.StorageWeakRef(t.untyped_storage()) for t in constants]
    assert references and not any(r.expired() for r in references)
    del captured, route, constants
    gc.collect()
    assert all(r.expired() for r in references)


# ---- the way that is chosen ------------------------------------------------------------------------------------------


def test_on_the_cpu_the_faster_way_is_kept(monkeypatch):
    problem = Problem()
    data = problem.data(0)
    clock = iter(range(10**6))
    slow = {"way": None}

    def perf_counter():
        return float(next(clock)) * slow["unit"]

    captured = problem.captured()
    captured.step(*data)
    assert set(captured.timings) == {"eager", "recorded"}
    faster = min(captured.timings, key=captured.timings.get)
    assert captured.mode == faster and (captured.reason is None) == (faster == "recorded")

    def timed(seconds):
        """A clock under which the ways, which take turns, need those seconds."""
        marks, now = [], 0.0
        for _ in range(_choice._TRIALS):
            for s in seconds:
                marks += [now, now + s]
                now += s
        return iter(marks)

    for seconds, chosen in (((2.0, 1.0), "recorded"), ((1.0, 2.0), "eager"), ((1.0, 1.0), "eager")):
        marks = timed(seconds)
        monkeypatch.setattr(_choice.time, "perf_counter", lambda marks=marks: next(marks))
        captured = problem.captured()
        captured.step(*data)
        assert captured.mode == chosen and captured.timings == {"eager": seconds[0], "recorded": seconds[1]}
        assert (captured.reason is None) == (chosen == "recorded")
        assert_close(captured.step(*problem.data(1)), problem.expected(*problem.data(1)))


def reading(loss, data):
    return loss * (2.0 if loss.item() > -1.0 else 1.0)


def counting(loss, data):
    return loss[loss.reshape(1) > -1e9].sum() if loss.dim() else loss.reshape(1)[loss.reshape(1) > -1e9].sum()


FAULTS = {
    "item": (reading, "the host reads a value from the device"),
    "mask": (counting, "the host reads a value from the device"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["auto", "cuda-graph", "recorded"])
def test_what_cannot_be_captured_is_named(graphs, kind, fault):
    problem = Problem()
    spoil, reason = FAULTS[fault]
    inner = problem.inner
    problem.inner = lambda x, y: spoil(inner(x, y), x)
    data = problem.data(0)
    captured = problem.captured(mode=kind)
    if kind != "auto":
        text = reason if kind == "cuda-graph" else "takes a shape or a number from values"
        for _ in range(2):
            with pytest.raises(RuntimeError, match=rf"mode='{kind}' must be open .*{text}.*mode='auto'"):
                captured.step(*data)
        assert captured.step_count == 0 and captured.mode is None
        return
    with pytest.warns(UserWarning, match=reason) as caught:
        first = captured.step(*data)
        second = captured.step(*problem.data(1, 4))
    assert len(caught) == 1, "one notice"
    assert caught[0].filename == __file__
    assert captured.mode == "eager" and reason in captured.reason
    assert_close(first, problem.expected(*data))
    assert_close(second, problem.expected(*problem.data(1, 4)))


def test_a_solver_that_looks_at_the_device(graphs):
    problem = Problem()
    solver = ConjugateGradient(5, damping=0.1, check_every=2)
    with pytest.raises(RuntimeError, match="the host reads a value"):
        problem.captured(mode="cuda-graph", solver=solver).step(*problem.data(0))
    solver = ConjugateGradient(5, rtol=0, damping=0.1, check_every=None)
    captured = problem.captured(mode="cuda-graph", solver=solver)
    for seed in range(3):
        assert_close(captured.step(*problem.data(seed)), problem.expected(*problem.data(seed), solver=solver))
    assert captured.mode == "cuda-graph"


def test_a_graph_that_raises_while_it_is_captured(graphs, monkeypatch):
    def refuse(self, function):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(StandIn, "capture", refuse)
    problem = Problem()
    captured = problem.captured()
    with pytest.warns(UserWarning, match="raised RuntimeError: operation not permitted when stream is capturing"):
        assert_close(captured.step(*problem.data(0)), problem.expected(*problem.data(0)))
    assert captured.mode == "eager"


def test_tensors_where_a_mode_has_no_business():
    problem = Problem()
    data = problem.data(0)
    with pytest.raises(RuntimeError, match=r"cuda-graph.* graphs are captured on a CUDA device"):
        problem.captured(mode="cuda-graph").step(*data)
    narrow = Problem(dtype=torch.bfloat16)
    captured = narrow.captured()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        captured.step(*narrow.data(0))
    assert captured.mode == "eager" and "bfloat16" in captured.reason
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match="autocast is on"):
        problem.captured(mode="recorded").step(*data)
    problem.hparams[0] = problem.hparams[0] * 1
    problem.decay[0] = problem.hparams[0]
    with pytest.raises(RuntimeError, match="computed from other tensors"):
        problem.captured(mode="recorded").step(*data)


@pytest.mark.parametrize("kind", ["recorded", "auto", "compiled"])
def test_a_loss_that_changes_is_found_at_the_second_step(eager_backend, monkeypatch, kind):
    monkeypatch.setattr(_choice.time, "perf_counter", lambda times=[0.0]: times.append(0) or float(len(times) ** 0.5))
    problem = Problem()
    inner, schedule = problem.inner, [1.0]
    problem.inner = lambda x, y: inner(x, y) * schedule[0]
    captured = problem.captured(mode=kind)
    assert_close(captured.step(*problem.data(0)), problem.expected(*problem.data(0)))
    assert captured.mode == ("recorded" if kind == "auto" else kind)
    schedule[0] = 1.5
    if kind != "auto":
        with pytest.raises(RuntimeError, match="differs from hypergradient's by"):
            captured.step(*problem.data(1))
        return
    for seed in range(1, 4):
        schedule[0] += 0.5
        assert_close(captured.step(*problem.data(seed)), problem.expected(*problem.data(seed)))
    assert captured.mode == "eager" and "changes from call to call" in captured.reason


def test_data_that_go_around_pytorch_are_found(graphs):
    problem = Problem()
    inner = problem.inner
    problem.inner = lambda x, y: inner(x, y) * float(abs(x.numpy()).mean())
    captured = problem.captured(mode="recorded")
    captured.step(*problem.data(0))
    with pytest.raises(RuntimeError, match="what PyTorch does not see"):
        captured.step(*problem.data(1))


def test_batch_normalization_in_training_is_not_recorded():
    problem = Problem("cnn")
    problem.model.train()
    before = [b.clone() for b in problem.model.buffers()]
    captured = problem.captured()
    assert_close(captured.step(*problem.data(0)), problem.expected(*problem.data(0)))
    assert captured.mode == "eager" and "writes to older tensors" in captured.reason
    assert all_same_bits(before, problem.model.buffers())


def test_faults_of_the_losses_are_those_of_hypergradient(mode):
    problem = Problem()
    problem.inner = lambda x, y: (x * 0).sum() + sum(p.sum() for p in problem.params) * torch.ones(2, dtype=F64)
    with pytest.raises(ValueError, match=r"inner_loss must be a scalar; got shape \(2,\)"):
        problem.captured(mode=mode).step(*problem.data(0))


# ---- no trouble left unsaid ------------------------------------------------------------------------------------------


def diverging():
    """A solve that diverges where the data say so; the step length is fine for data of ones."""
    w, h = torch.ones(3, dtype=F64, requires_grad=True), torch.ones(3, dtype=F64, requires_grad=True)
    options = {"solver": Neumann(6, 0.5), "mode": "cuda-graph"}
    return CapturedHypergradient(lambda: w.sum(), lambda x: (x * h * w**2).sum() / 2, w, h, **options)


def ones(factor=1.0):
    return torch.full((3,), factor, dtype=F64)


def test_divergence_is_said_in_every_mode(mode):
    w, h = torch.ones(3, dtype=F64, requires_grad=True), torch.ones(3, dtype=F64, requires_grad=True)
    captured = CapturedHypergradient(
        lambda: w.sum(), lambda x: (x * h * w**2).sum() / 2, w, h, solver=Neumann(6, 0.5), mode=mode
    )
    assert captured.check() is None
    for _ in range(3):
        captured.step(ones(), ())
    assert captured.check() is Status.max_terms
    with pytest.warns(RuntimeWarning, match="CapturedHypergradient.*the Neumann sum diverges") as caught:
        captured.step(ones(9.0), ())
        status = captured.check()
    assert status is Status.diverged and len(caught) == 1 and caught[0].filename == __file__
    with pytest.warns(RuntimeWarning, match="is not finite"):
        captured.step(ones(float("nan")), ())
        assert captured.check() is Status.non_finite


def test_a_series_that_diverges_from_the_first_step_on_is_said_at_once(mode):
    w, h = torch.ones(3, dtype=F64, requires_grad=True), torch.ones(3, dtype=F64, requires_grad=True)
    captured = CapturedHypergradient(
        lambda: w.sum(), lambda x: (x * h * w**2).sum() / 2, w, h, solver=Neumann(6, 0.5), mode=mode
    )
    with pytest.warns(RuntimeWarning, match="diverges"):
        captured.step(ones(9.0), ())


def test_the_next_step_speaks_of_the_one_before(graphs):
    captured = diverging()
    for _ in range(3):
        captured.step(ones(), ())
    captured.step(ones(9.0), ())
    with pytest.warns(RuntimeWarning, match=r"CapturedHypergradient \(step 4\): the Neumann sum diverges"):
        captured.step(ones(), ())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert captured.check() is Status.max_terms
        for _ in range(2):
            captured.step(ones(9.0), ())
            with pytest.raises(RuntimeWarning, match="diverges"):
                captured.check()
        assert captured.check() is Status.diverged


def test_what_is_on_its_way_is_read_before_it_is_lost(graphs, monkeypatch):
    monkeypatch.setattr(_graph.Mailbox, "_is_there", lambda self, row: False)
    captured = diverging()
    captured._most = 1
    for _ in range(2):
        captured.step(ones(), ())
    for drop in (captured.check, captured.reset, lambda: captured.step(torch.ones(1, dtype=F64), ())):
        for _ in range(3):
            captured.step(ones(), ())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            captured.step(ones(9.0), ())
        with pytest.warns(RuntimeWarning, match=r"\(step \d+\): the Neumann sum diverges"):
            drop()


def test_a_mailbox_keeps_order_and_makes_room(monkeypatch):
    there = set()
    monkeypatch.setattr(_graph.Mailbox, "_is_there", lambda self, row: row in there)
    box = _graph.Mailbox(torch.device("cpu"), 2, room=3)
    row = lambda i: torch.tensor([i, -i], dtype=F64)  # noqa: E731
    assert [box.post(i, row(i)) for i in range(3)] == [[], [], []]
    assert box.arrived() == []
    there.add(0)
    assert box.arrived() == [(0, [0.0, -0.0])]
    there.clear()
    assert box.post(3, row(3)) == []
    assert box.post(4, row(4)) == [(1, [1.0, -1.0])], "the oldest makes room"
    assert box.all() == [(2, [2.0, -2.0]), (3, [3.0, -3.0]), (4, [4.0, -4.0])]
    assert box.all() == []


# ---- random numbers in a graph ---------------------------------------------------------------------------------------


class Generator:
    """What Draws asks of a generator: a state that can be read, set, cloned, and exchanged."""

    def __init__(self, cell):
        self.cell = cell
        self._cdata = id(self)

    def clone_state(self):
        return Generator(list(self.cell))

    def get_state(self):
        return self.cell[0]

    def set_state(self, state):
        self.cell[0] = state

    def graphsafe_get_state(self):
        return Generator(self.cell)

    def graphsafe_set_state(self, other):
        self.cell = other.cell

    def draw(self):
        self.cell[0] += 1
        return self.cell[0]


def test_every_part_draws_from_where_the_generators_stand():
    first, second = Generator([10]), Generator([20])
    draws = _graph.Draws([first, second], 2)
    cells = first.cell, second.cell
    assert len(draws.states()) == 2 + 4
    for start in (10, 100):
        first.set_state(start)
        with draws.replaying():
            for number in (0, 1):
                with draws.part(number):
                    assert (first.draw(), first.draw(), second.draw()) == (start + 1, start + 2, 21)
            assert (first.draw(), second.draw()) == (start + 1, 21), "outside of the parts"
        assert (first.get_state(), second.get_state()) == (start, 20)
        assert (first.cell, second.cell) == cells
    with pytest.raises(ZeroDivisionError), draws.replaying(), draws.part(1):
        first.draw()
        raise ZeroDivisionError
    assert first.cell is cells[0] and first.get_state() == 100


class Cuda:
    """What CudaGraph asks of torch.cuda, and what was asked, in order."""

    def __init__(self, fails=False):
        self.log, self.fails = [], fails
        self.default_generators = [Generator([7])]

    def note(self, *what):
        self.log.append(what)

    def CUDAGraph(self):
        made = SimpleNamespace(replay=lambda: self.note("replay"))
        made.register_generator_state = lambda state: self.note("register", state.get_state())
        return made

    def Stream(self, device):
        return self.stream_named("side")

    def Event(self):
        return SimpleNamespace(record=lambda stream: self.note("record", stream.name))

    def stream_named(self, name):
        stream = SimpleNamespace(name=name, wait_event=lambda event: self.note(name, "waits for the turn before"))
        stream.wait_stream = lambda other: self.note(name, "waits for", other.name)
        return stream

    def current_stream(self):
        return self.stream_named("current")

    def device(self, device):
        return nullcontext()

    def stream(self, stream):
        return nullcontext()

    @contextmanager
    def graph(self, graph, *, stream, capture_error_mode):
        self.note("capture", stream.name, capture_error_mode)
        yield
        if self.fails:
            self.default_generators[0].cell[0] = "spoilt"
            raise RuntimeError("operation not permitted when stream is capturing")
        self.note("captured")


def test_a_graph_is_warmed_up_captured_and_replayed_in_order(monkeypatch):
    cuda = Cuda()
    monkeypatch.setattr(_graph.torch, "cuda", cuda)
    own = Generator([3])
    graph = _graph.CudaGraph(torch.device("cuda", 0), [cuda.default_generators[0], own], 2)
    assert sorted(what[1] for what in cuda.log) == [3, 3, 3, 7, 7, 7], "the generators, and a copy for each part"
    cuda.log.clear()

    def function():
        with graph.part(1):
            cuda.note("run", own.draw())
        return "result"

    graph.warm_up(function)
    assert graph.capture(function) == "result"
    runs = [("run", 4)] * 2
    assert cuda.log[:4] == [("side", "waits for", "current"), *runs, ("current", "waits for", "side")]
    assert cuda.log[4] == ("capture", "side", "thread_local") and cuda.log[-1] == ("captured",)
    cuda.log.clear()
    with graph.turn():
        cuda.note("copy in")
        graph.replay()
        cuda.note("copy out")
    begins, ends = ("current", "waits for the turn before"), ("record", "current")
    assert cuda.log == [begins, ("copy in",), ("replay",), ("copy out",), ends]
    assert own.get_state() == 3 and cuda.default_generators[0].get_state() == 7


def test_a_capture_that_fails_leaves_the_generators_fit_for_use(monkeypatch):
    cuda = Cuda(fails=True)
    monkeypatch.setattr(_graph.torch, "cuda", cuda)
    graph = _graph.CudaGraph(torch.device("cuda", 0), [], 2)
    with pytest.raises(RuntimeError, match="not permitted"):
        graph.capture(lambda: None)
    assert cuda.default_generators[0].get_state() == 7


def test_inspection_names_generators_and_holds_what_is_read():
    own = torch.Generator().manual_seed(1)
    x = torch.ones(3)
    with Inspection(torch.device("cpu")) as seen:
        made = x * 2
        (made + torch.rand(3, generator=own)).sum()
    assert seen.reason is None and seen.draws and [g._cdata for g in seen.generators] == [own._cdata]
    assert len(_graph.generators_of(torch.device("cpu"), [*seen.generators, torch.default_generator])) == 2
    assert [t.data_ptr() for t in seen.read.values()] == [x.data_ptr()]
    with Inspection(torch.device("cuda", 0)) as seen:
        torch.rand(3)
    assert "random numbers are drawn elsewhere than on cuda:0" in seen.reason
    with Inspection(torch.device("cpu")) as seen:
        x[torch.tensor([0, 1])]
    assert seen.reason is None, "an index of integers has a shape that is known"


# ---- arguments -------------------------------------------------------------------------------------------------------

W = torch.ones(2, requires_grad=True)
H = torch.ones(2, requires_grad=True)


def loss(*data):
    return (H * W**2).sum()


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"outer_loss": W.sum()}, TypeError, "outer_loss must be a function of data; got Tensor. Pass the function"),
        ({"inner_loss": None}, TypeError, "inner_loss must be a function of data; got None"),
        ({"params": []}, ValueError, "params must hold at least one tensor"),
        ({"hparams": torch.ones(2)}, ValueError, "hparams must .*require"),
        ({"solver": Neumann}, TypeError, "solver must be a solver"),
        ({"curvature": torch.eye(2)}, TypeError, "curvature must be None or a function of inner_data; got Tensor"),
        ({"mode": "graph"}, ValueError, "mode must be one of auto, eager, cuda-graph, recorded, compiled; got 'graph'"),
        ({"max_captures": 0}, ValueError, "max_captures must be an int >= 1; got 0"),
        ({"max_captures": True}, ValueError, "max_captures must be an int >= 1; got True"),
    ],
)
def test_bad_arguments(change, kind, text):
    arguments = {"outer_loss": loss, "inner_loss": loss, "params": W, "hparams": H} | change
    outer, inner, params, hparams = (arguments.pop(k) for k in ("outer_loss", "inner_loss", "params", "hparams"))
    with pytest.raises(kind, match=text):
        CapturedHypergradient(outer, inner, params, hparams, **arguments)


def test_bad_data():
    captured = CapturedHypergradient(loss, loss, W, H)
    with pytest.raises(ValueError, match=r"must not require grad; got a tensor of shape \(2,\) that does"):
        captured.step(W, ())
    with pytest.raises(TypeError, match="constants that can be hashed; got ndarray"):
        captured.step(W.detach().numpy(), ())
    assert captured.step_count == 0 and captured.check() is None


def test_an_error_in_a_step_leaves_all_as_it_was(graphs):
    problem = Problem()
    captured = problem.captured(mode="cuda-graph")
    for seed in range(3):
        captured.step(*problem.data(seed))
    (x, y), outer = problem.data(3, 5)
    with pytest.raises(IndexError):
        captured.step((x, y + 3), outer)
    assert captured.step_count == 3 and captured.mode == "cuda-graph"
    data = problem.data(4)
    assert_close(captured.step(*data), problem.expected(*data))


@pytest.mark.parametrize("kind", ["recorded", "cuda-graph"])
def test_the_closed_form_of_ridge_regression(graphs, kind):
    """Weights with a decay each, at the optimum, which moves with the data."""
    targets, inputs = torch.randn(20, dtype=F64), torch.randn(20, 4, dtype=F64)
    decay = torch.linspace(-1, 0, 4, dtype=F64).requires_grad_()
    w = torch.zeros(4, dtype=F64, requires_grad=True)
    captured = CapturedHypergradient(
        lambda x, y: 0.5 * (x @ w - y).square().mean(),
        lambda x, y: 0.5 * (x @ w - y).square().mean() + 0.5 * (decay.exp() * w**2).sum(),
        w,
        decay,
        solver=Exact() if kind == "recorded" else ConjugateGradient(8, rtol=1e-14, check_every=None),
        mode=kind,
    )
    for shift in (0.0, 0.3, 0.6):
        x, y = inputs + shift, targets + shift
        with torch.no_grad():
            hessian = x.T @ x / 20 + torch.diag(decay.exp())
            w.copy_(torch.linalg.solve(hessian, x.T @ y / 20))
            outer_grad = inputs.T @ (inputs @ w - targets) / 20
            wanted = -torch.linalg.solve(hessian, outer_grad) * decay.exp() * w
        (found,) = captured.step((x, y), (inputs, targets))
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert captured.mode == kind


# ---- on a GPU --------------------------------------------------------------------------------------------------------

gpu = pytest.mark.gpu


@gpu
@pytest.mark.parametrize("solver", [Neumann(12, 0.05), Neumann(5), ConjugateGradient(6, rtol=0, damping=0.1)])
@pytest.mark.parametrize("name", MODELS)
def test_a_cuda_graph_gives_the_numbers_of_hypergradient(name, solver):
    problem = Problem(name, device="cuda")
    captured = problem.captured(mode="cuda-graph", solver=solver)
    for seed, size in ((0, 8), (1, 8), (2, 8), (3, 4), (4, 8)):
        data = problem.data(seed, size)
        assert_close(captured.step(*data), problem.expected(*data, solver=solver), 1e5)
        problem.move()
    assert captured.mode == "cuda-graph" and captured.reason is None


@gpu
def test_dropout_in_a_cuda_graph_draws_what_hypergradient_draws():
    problem = Problem(device="cuda")
    own = torch.Generator("cuda").manual_seed(5)
    problem.model = nn.Sequential(nn.Dropout(0.3), problem.model)
    inner = problem.inner
    problem.inner = lambda x, y: inner(x * (torch.rand(x.shape, dtype=F64, device="cuda", generator=own) > 0.5), y)
    captured = problem.captured(mode="cuda-graph")
    results = []
    for seed in range(5):
        torch.cuda.manual_seed(seed)
        own.manual_seed(seed)
        states = torch.cuda.get_rng_state(), own.get_state()
        results.append(captured.step(*problem.data(0)))
        assert torch.equal(states[0], torch.cuda.get_rng_state()) and torch.equal(states[1], own.get_state())
        assert_close(results[-1], problem.expected(*problem.data(0)), 1e5)
    assert captured.mode == "cuda-graph"
    assert not torch.allclose(results[3][0], results[4][0])
    torch.rand(3, device="cuda")  # the generators are as good as before


@gpu
def test_a_replayed_step_is_one_launch_and_no_wait():
    problem = Problem(device="cuda")
    captured = problem.captured(mode="cuda-graph")
    steps = [problem.data(seed) for seed in range(8)]
    expected = [problem.expected(*data) for data in steps]
    for data in steps[:3]:
        captured.step(*data)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [captured.step(*data) for data in steps[3:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for f, e in zip(found, expected[3:], strict=True):
        assert_close(f, e, 1e5)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        captured.step(*steps[0])
    names = [event.name for event in profile.events()]
    assert names.count("cudaGraphLaunch") == 1
    assert not any("Synchronize" in name for name in names if name != "cudaDeviceSynchronize")  # the profiler's own
    # Beside it: data in, hypergradients and evidence out.
    assert sum("LaunchKernel" in name or "MemcpyAsync" in name for name in names) <= 12
    assert captured.check() is Status.max_terms


@gpu
def test_a_cuda_graph_tells_of_divergence():
    w, h = (torch.ones(3, device="cuda", requires_grad=True) for _ in range(2))
    captured = CapturedHypergradient(
        lambda: w.sum(), lambda x: (x * h * w**2).sum() / 2, w, h, solver=Neumann(6, 0.5), mode="cuda-graph"
    )
    good = torch.ones(3, device="cuda")
    for _ in range(4):
        captured.step(good, ())
    with pytest.warns(RuntimeWarning, match=r"\(step 5\): the Neumann sum diverges"):
        captured.step(9 * good, ())
        assert captured.check() is Status.diverged


@gpu
def test_steps_on_several_streams_keep_their_results_apart():
    problem = Problem(device="cuda")
    captured = problem.captured(mode="cuda-graph")
    steps = [problem.data(seed) for seed in range(12)]
    expected = [problem.expected(*data) for data in steps]
    streams = [torch.cuda.Stream() for _ in range(3)]
    found = []
    torch.cuda.synchronize()
    for i, data in enumerate(steps):
        with torch.cuda.stream(streams[i % 3]):
            found.append(captured.step(*data))
    torch.cuda.synchronize()
    for f, e in zip(found, expected, strict=True):
        assert_close(f, e, 1e5)


@gpu
def test_what_a_cuda_graph_cannot_hold_is_left_to_hypergradient():
    problem = Problem(device="cuda")
    data = problem.data(0)
    (x, y), outer = data
    with pytest.raises(RuntimeError, match="on one device; they are on cpu and cuda:0"):
        problem.captured(mode="cuda-graph").step((x.cpu(), y), outer)
    with pytest.raises(RuntimeError, match="steps are recorded on the CPU"):
        problem.captured(mode="recorded").step(*data)
    inner, noise = problem.inner, torch.ones(1)
    spoils = {
        "the host reads a value": lambda x: x * float(x.sum() > -1e9),
        "drawn elsewhere": lambda x: x + 0 * torch.rand(1).to(x),
        "setting it up raised": lambda x: x + 0 * noise.to(x.device),  # a copy that waits
    }
    for reason, spoil in spoils.items():
        problem.inner = lambda x, y, spoil=spoil: inner(spoil(x), y)
        captured = problem.captured()
        with pytest.warns(UserWarning, match=reason):
            assert_close(captured.step(*data), problem.expected(*data), 1e5)
        assert captured.mode == "eager" and reason in captured.reason
        torch.rand(3, device="cuda")  # a capture that failed leaves the generator fit for use
    problem.inner = inner
    captured = problem.captured(mode="cuda-graph")
    for seed in range(3):
        assert_close(captured.step(*problem.data(seed)), problem.expected(*problem.data(seed)), 1e5)


@gpu
def test_a_number_on_the_host_beside_a_cuda_graph():
    problem, scale = Problem(device="cuda"), torch.ones((), dtype=F64)
    inner = problem.inner
    problem.inner = lambda x, y: inner(x, y) * scale
    captured = problem.captured(mode="cuda-graph")
    for seed in range(6):
        scale.fill_(1 + 0.2 * (seed // 3))
        assert_close(captured.step(*problem.data(seed)), problem.expected(*problem.data(seed)), 1e5)
    assert captured.mode == "cuda-graph"
