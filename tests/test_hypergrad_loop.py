"""The loop: equal to one written by hand, bit for bit the same when continued, and stopped before it does harm."""

import json
import math
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import F64, leaf, normal, quadratic
from helpers import all_same_bits, same_bits
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset, WeightedRandomSampler

from nestopt_ext._checkpoint import CheckpointError
from nestopt_ext.curvature import Hessian
from nestopt_ext.hypergrad import BilevelLoop, LoopDiverged, hypergradient
from nestopt_ext.hypergrad._batches import Batches
from nestopt_ext.solvers import ConjugateGradient, Identity, Neumann, Status

# ---- a small problem with everything that moves: dropout, batch statistics, shuffling -------------------------------


class Setting:
    """A network, its decays, their optimizers and loaders, made anew and alike each time."""

    def __init__(self, folder=None, *, own_generators=True, seed=0, batch_norm=True, dropout=0.3, lr=0.01, **options):
        torch.manual_seed(seed)
        layers = [nn.Linear(5, 8), nn.BatchNorm1d(8) if batch_norm else nn.Identity(), nn.Tanh()]
        self.model = nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(8, 3))
        self.params = list(self.model.parameters())
        self.hparams = [torch.full_like(p, -4.0).requires_grad_() for p in self.params]
        fixed = torch.Generator().manual_seed(7)
        x, y = torch.randn(22, 5, generator=fixed), torch.randint(0, 3, (22,), generator=fixed)
        self.generators = [torch.Generator().manual_seed(s) for s in (1, 2)] if own_generators else [None, None]
        self.loaders = [
            DataLoader(TensorDataset(x[half], y[half]), batch_size=4, shuffle=True, generator=generator)
            for half, generator in zip((slice(11), slice(11, 22)), self.generators, strict=True)
        ]
        self.inner_optimizer = torch.optim.Adam(self.params, lr=lr)
        self.outer_optimizer = torch.optim.RMSprop(self.hparams, lr=0.02)
        files = {} if folder is None else {"log": folder / "log.jsonl", "checkpoint": folder / "checkpoint.pt"}
        batches = {"inner_batches": self.loaders[0], "outer_batches": self.loaders[1], "inner_steps": 3}
        defaults = {"solver": Neumann(3, damping=100.0), "stateful": self.model, **batches, **files}
        self.loop = BilevelLoop(
            self.outer_loss, self.inner_loss, self.params, self.hparams, self.inner_optimizer, self.outer_optimizer,
            **{**defaults, **options},
        )  # fmt: skip

    def outer_loss(self, batch):
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def inner_loss(self, batch):
        decay = sum((h.exp() * p * p).sum() for h, p in zip(self.hparams, self.params, strict=True))
        return F.cross_entropy(self.model(batch[0]), batch[1]) + decay

    def tensors(self):
        return [*self.params, *self.hparams, *self.model.buffers()]


def untimed(records):
    return [{k: v for k, v in vars(r).items() if k != "seconds"} for r in records]


def lines(path: Path):
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in path.read_text().splitlines()]


def folders(tmp_path):
    made = [tmp_path / "whole", tmp_path / "parts"]
    for folder in made:
        folder.mkdir()
    return made


def assert_same_run(whole: Setting, parts: Setting, folder_a: Path, folder_b: Path):
    assert all_same_bits(whole.tensors(), parts.tensors())
    assert lines(folder_a / "log.jsonl") == lines(folder_b / "log.jsonl")
    assert whole.loop.num_failed_solves == parts.loop.num_failed_solves


# ---- what a step is -------------------------------------------------------------------------------------------------


def test_equals_the_loop_written_by_hand():
    ours, theirs = (Setting(dropout=0.0, batch_norm=False, progress=False) for _ in range(2))
    records = ours.loop.run(9)
    torch.manual_seed(3)
    inner, outer = ([batch for _ in range(60) for batch in loader] for loader in theirs.loaders)
    for record in records:
        for _ in range(3):
            theirs.inner_optimizer.zero_grad()
            loss = theirs.inner_loss(inner.pop(0))
            loss.backward()
            theirs.inner_optimizer.step()
        batches = outer.pop(0), inner.pop(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses = theirs.outer_loss(batches[0]), theirs.inner_loss(batches[1])
            grads = hypergradient(*losses, theirs.params, theirs.hparams, solver=Neumann(3, damping=100.0))
        assert record.outer_loss == theirs.outer_loss(batches[0]).item() and record.inner_loss == loss.item()
        for h, g in zip(theirs.hparams, grads, strict=True):
            h.grad = g
        theirs.outer_optimizer.step()
    assert all_same_bits(ours.tensors(), theirs.tensors())
    assert all_same_bits([h.grad for h in ours.hparams], [h.grad for h in theirs.hparams])
    assert [r.step for r in records] == list(range(1, 10)) and ours.loop.step_count == 9


def closed_form(**options):
    """Newton steps on w^2 - 3 h w, whose solution is 1.5 h; the hypergradient of w^2 / 2 is 2.25 h."""
    w, h = (torch.tensor(v, dtype=F64, requires_grad=True) for v in (0.0, 1.0))
    options = {"solver": Identity(alpha=0.5), "progress": False, **options}
    outer, inner = torch.optim.SGD([h], lr=0.1), torch.optim.SGD([w], lr=0.5)
    return w, h, BilevelLoop(lambda: 0.5 * w**2, lambda: w**2 - 3 * h * w, w, h, inner, outer, **options)


def test_closed_form():
    w, h, loop = closed_form()
    records = loop.run(5)
    for k, record in enumerate(records):
        before = 0.775**k
        assert record.outer_loss == pytest.approx(0.5 * (1.5 * before) ** 2, rel=1e-12)
        assert record.hypergrad_norm == pytest.approx(2.25 * before, rel=1e-12)
    assert float(h.detach()) == pytest.approx(0.775**5, rel=1e-12)
    assert float(w.detach()) == pytest.approx(1.5 * 0.775**4, rel=1e-12)
    assert [r.num_products for r in records] == [0] * 5 and records[0].status is Status.max_terms


def test_warmup_moves_the_params_alone():
    _, h, loop = closed_form(warmup=3)
    records = loop.run(4)
    assert [r.outer_loss is None for r in records] == [True, True, True, False]
    assert records[0].status is None and records[0].num_products == 0 and records[0].hypergrad_norm is None
    assert float(h.detach()) == pytest.approx(0.775, rel=1e-12)


def test_gradients_are_clipped_by_their_global_norm():
    problem = quadratic()
    inner = torch.optim.SGD([problem.params] if torch.is_tensor(problem.params) else problem.params, lr=0.0)
    outer = torch.optim.SGD([problem.hparams] if torch.is_tensor(problem.hparams) else problem.hparams, lr=0.0)
    outer_loss, inner_loss = problem.closures()
    options = {"clip_outer": 1e-3, "clip_inner": 1e-3, "solver": Neumann(50, problem.alpha)}
    loop = BilevelLoop(
        outer_loss, lambda: 5 * inner_loss() + sum(p.sum() for p in inner.param_groups[0]["params"]),
        problem.params, problem.hparams, inner, outer, progress=False, **options,
    )  # fmt: skip
    record = loop.step()
    for optimizer, norm in ((inner, record.inner_grad_norm), (outer, record.hypergrad_norm)):
        clipped = torch.cat([p.grad.reshape(-1) for p in optimizer.param_groups[0]["params"]]).norm()
        assert norm > 1e-2 and float(clipped) == pytest.approx(1e-3, rel=1e-3)


def test_nothing_is_added_to_the_gradients_of_hparams():
    setting = Setting(warmup=100, progress=False)
    setting.loop.run(2)
    assert all(h.grad is None for h in setting.hparams) and all(p.grad is not None for p in setting.params)


def test_batch_statistics_are_those_of_training_alone():
    setting = Setting(progress=False)
    setting.loop.run(4)
    assert int(setting.model[1].num_batches_tracked) == 12  # three inner steps in each of four


def test_inner_optimizer_that_needs_a_closure():
    w, h = leaf(normal(0, 4)), leaf(normal(1, 4))
    target = normal(2, 4)
    inner = torch.optim.LBFGS([w], lr=1, max_iter=30, line_search_fn="strong_wolfe")
    loop = BilevelLoop(
        lambda: ((w - target) ** 2).sum(), lambda: ((w - h) ** 2).sum(), w, h, inner, torch.optim.SGD([h], lr=0.3),
        solver=Identity(alpha=0.5), progress=False,
    )  # fmt: skip
    loop.run(40)
    assert torch.allclose(h, target, atol=1e-6)


def test_several_groups_a_project_and_a_frozen_param():
    w, v, frozen = leaf(normal(0, 3)), leaf(normal(1, 2)), torch.ones(2, dtype=F64)
    h = leaf(normal(2, 3))
    inner = torch.optim.SGD([{"params": [w, frozen]}, {"params": [v], "lr": 0.2}], lr=0.1)
    grad_modes = []

    def project():
        grad_modes.append(torch.is_grad_enabled())
        h.clamp_(-0.1, 0.1)

    loop = BilevelLoop(
        lambda: w.square().sum() + v.sum() ** 2, lambda: (w - h).square().sum() + (v * frozen).square().sum(),
        [w, v], h, inner, torch.optim.Adam([h], lr=1.0), project=project, solver=Identity(), progress=False,
    )  # fmt: skip
    loop.run(3)
    assert h.abs().max() <= 0.1 and grad_modes == [False] * 3


# ---- the solve ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_warm_start_goes_on_where_the_last_solve_ended(damping):
    """With everything else at rest, k solves of K products are one Neumann sum of k (K + 1) terms."""
    problem = quadratic()
    flat = {}
    for name, value in (("params", problem.params), ("hparams", problem.hparams)):
        flat[name] = [value] if torch.is_tensor(value) else list(value)
    still = [torch.optim.SGD(flat[name], lr=0.0) for name in ("params", "hparams")]
    alpha = 0.3 * problem.alpha
    loop = BilevelLoop(
        *problem.closures(), problem.params, problem.hparams, *still, solver=Neumann(2, alpha, damping),
        warm_start=True, progress=False,
    )  # fmt: skip
    for solves in range(1, 5):
        record = loop.step()
        assert record.num_products == (2 if solves == 1 else 3)
        wanted = hypergradient(
            *problem.closures(), problem.params, problem.hparams, solver=Neumann(3 * solves - 1, alpha, damping)
        )
        for h, g in zip(flat["hparams"], wanted, strict=True):
            assert torch.allclose(h.grad, g, rtol=1e-12, atol=1e-14)


def test_diverged_solves_are_counted_without_a_warning_and_not_begun_from():
    w, h = leaf(normal(0, 3)), leaf(normal(1, 3))
    still = torch.optim.SGD([w], lr=0.0), torch.optim.SGD([h], lr=0.0)
    loop = BilevelLoop(
        lambda: w.sum(), lambda: (w - h).square().sum(), w, h, *still, solver=Neumann(4, alpha=3.0), warm_start=True,
        progress=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        records = loop.run(3)
    assert loop.num_failed_solves == 3 and {r.status for r in records} == {Status.diverged}
    assert [r.num_products for r in records] == [4] * 3  # a solve that begins somewhere takes one more


def test_negative_curvature_is_a_failed_solve():
    w, h = leaf(normal(0, 3)), leaf(normal(1, 3))
    still = torch.optim.SGD([w], lr=0.0), torch.optim.SGD([h], lr=0.0)
    loop = BilevelLoop(
        lambda: w.sum(), lambda: -(w - h).square().sum(), w, h, *still, solver=ConjugateGradient(), warm_start=True,
        progress=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loop.step().status is Status.negative_curvature
    assert loop.num_failed_solves == 1 and loop.state_dict()["start"] == []


def test_curvature_is_made_anew_from_the_inner_batch():
    w, h = leaf(normal(0, 3)), leaf(normal(1, 3))
    seen = []

    def curvature(batch):
        seen.append(batch)
        return Hessian((batch * (w - h) ** 2).sum(), w)

    loop = BilevelLoop(
        lambda: w.sum(), lambda batch: (batch * (w - h) ** 2).sum(), w, h, torch.optim.SGD([w], lr=0.1),
        torch.optim.SGD([h], lr=0.1), curvature=curvature, inner_batches=[1.0, 2.0, 3.0], progress=False,
    )  # fmt: skip
    loop.run(3)
    assert seen == [2.0, 1.0, 3.0]  # every other batch: one for the inner step, one for the hypergradient


# ---- random numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True])
def test_random_numbers_of_the_outer_loss_differ_from_step_to_step(own):
    """The hypergradient puts them back; a loss that alone draws would see the same ones for ever."""
    w, h = leaf(normal(0, 3)), leaf(normal(1, 3))
    generator = torch.Generator().manual_seed(0) if own else None
    drawn = []

    def outer():
        drawn.append(torch.rand(3, dtype=F64, generator=generator))
        return (drawn[-1] * w).sum()

    loop = BilevelLoop(
        outer, lambda: (w - h).square().sum(), w, h, torch.optim.SGD([w], lr=0.1), torch.optim.SGD([h], lr=0.1),
        generators=[generator] if own else (), progress=False,
    )  # fmt: skip
    loop.run(4)
    wanted = [torch.rand(3, dtype=F64, generator=g) for g in [torch.Generator().manual_seed(0)] for _ in range(4)]
    assert all_same_bits(drawn, wanted)


def test_losses_draw_one_after_the_other_and_the_curvature_draws_what_the_inner_loss_does():
    w, h = leaf(normal(0, 3)), leaf(normal(1, 3))
    drawn = {"outer": [], "inner": [], "curvature": []}

    def draw(name):
        drawn[name].append(float(torch.rand(())))

    def inner():
        draw("inner")
        return (w - h).square().sum()

    def outer():
        draw("outer")
        return w.sum()

    def curvature():
        draw("curvature")
        return lambda v: v

    sgd = torch.optim.SGD([w], lr=0.1), torch.optim.SGD([h], lr=0.1)
    BilevelLoop(outer, inner, w, h, *sgd, curvature=curvature, progress=False).run(2)
    torch.manual_seed(0)
    first, second = torch.rand(6).double().reshape(2, 3).tolist()
    assert drawn["inner"] == [first[0], first[2], second[0], second[2]]
    assert drawn["outer"] == [first[1], second[1]] and drawn["curvature"] == [first[2], second[2]]


# ---- continuing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own_generators", [True, False])
@pytest.mark.parametrize("warm_start", [True, False])
def test_continued_run_is_the_same_bit_for_bit(tmp_path, own_generators, warm_start):
    folder_a, folder_b = folders(tmp_path)
    options = {"own_generators": own_generators, "warm_start": warm_start, "progress": False}
    if not warm_start:
        options["solver"] = Neumann(3)  # diverges now and then, which is counted
    whole = Setting(folder_a, **options)
    records = whole.loop.run(20)
    found = Setting(folder_b, **options).loop.run(7)
    torch.manual_seed(1234)  # nothing may depend on the state of the process
    parts = Setting(folder_b, seed=5, **options)
    assert parts.loop.resume() and parts.loop.step_count == 7
    found += parts.loop.run(20 - parts.loop.step_count)
    assert untimed(found) == untimed(records)
    assert bool(parts.loop.state_dict()["start"]) == warm_start
    assert warm_start or whole.loop.num_failed_solves > 0
    assert_same_run(whole, parts, folder_a, folder_b)
    assert [line["step"] for line in lines(folder_b / "log.jsonl")] == list(range(1, 21))


@pytest.mark.parametrize("stop", [1, 5, 8])
def test_exception_in_a_callback_leaves_the_step_on_the_disk(tmp_path, stop):
    folder_a, folder_b = folders(tmp_path)
    whole = Setting(folder_a, progress=False)
    whole.loop.run(9)

    class Stop(Exception):
        pass

    called = []

    def interrupt(loop, record):
        if record.step == stop:
            raise Stop

    stopped = Setting(folder_b, callbacks=[interrupt, lambda loop, record: called.append(record.step)], progress=False)
    with pytest.raises(Stop):
        stopped.loop.run(9)
    assert called == list(range(1, stop + 1))  # the others were called too, so the step is whole
    parts = Setting(folder_b, seed=5, progress=False)
    assert parts.loop.resume() and parts.loop.step_count == stop
    parts.loop.run(9 - stop)
    assert_same_run(whole, parts, folder_a, folder_b)


def test_ctrl_c_ends_the_run_after_the_step(tmp_path):
    folder_a, folder_b = folders(tmp_path)
    whole = Setting(folder_a, progress=False)
    whole.loop.run(6)
    before = signal.getsignal(signal.SIGINT)
    stopped, calls = Setting(folder_b, progress=False), []
    inner_loss = stopped.inner_loss

    def interrupted(batch):
        calls.append(0)
        if len(calls) == 6:  # in the second inner step of the second outer step
            signal.raise_signal(signal.SIGINT)
        return inner_loss(batch)

    stopped.loop._inner_loss = interrupted
    with pytest.raises(KeyboardInterrupt):
        stopped.loop.run(6)
    assert stopped.loop.step_count == 2 and len(calls) == 8 and signal.getsignal(signal.SIGINT) is before
    parts = Setting(folder_b, progress=False)
    assert parts.loop.resume()
    parts.loop.run(4)
    assert_same_run(whole, parts, folder_a, folder_b)


def test_second_ctrl_c_acts_at_once():
    def inner():
        calls.append(0)
        signal.raise_signal(signal.SIGINT)
        return (w - h).square().sum()

    w, h, calls = leaf(normal(0, 3)), leaf(normal(1, 3)), []
    sgd = torch.optim.SGD([w], lr=0.1), torch.optim.SGD([h], lr=0.1)
    loop = BilevelLoop(lambda: w.sum(), inner, w, h, *sgd, inner_steps=3, progress=False)
    with pytest.raises(KeyboardInterrupt):
        loop.run(1)
    assert len(calls) == 2 and loop.step_count == 0


def test_killed_run_continues_from_its_last_checkpoint(tmp_path):
    folder_a, folder_b = folders(tmp_path)
    whole = Setting(folder_a, progress=False)
    whole.loop.run(9)
    killed, calls = Setting(folder_b, checkpoint_every=3, progress=False), []

    def inner_loss(batch):
        calls.append(0)
        if len(calls) == 31:  # in the eighth step
            raise MemoryError
        return Setting.inner_loss(killed, batch)

    killed.loop._inner_loss = inner_loss
    with pytest.raises(MemoryError):
        killed.loop.run(9)
    with (folder_b / "log.jsonl").open("ab") as log:
        log.write(b'{"event": "st')  # what a crash of the system may leave
    parts = Setting(folder_b, progress=False)
    assert parts.loop.resume() and parts.loop.step_count == 6
    parts.loop.run(3)
    assert_same_run(whole, parts, folder_a, folder_b)


def test_schedulers_and_other_state_are_saved_too(tmp_path):
    folder_a, folder_b = folders(tmp_path)

    def make(folder):
        scheduler = []
        setting = Setting(folder, callbacks=lambda loop, record: scheduler[0].step() and None, progress=False)
        scheduler.append(torch.optim.lr_scheduler.MultiStepLR(setting.inner_optimizer, [3, 5], gamma=0.1))
        setting.loop._stateful.append(scheduler[0])
        return setting

    whole = make(folder_a)
    whole.loop.run(8)
    make(folder_b).loop.run(4)
    parts = make(folder_b)
    parts.loop.resume()
    parts.loop.run(4)
    assert parts.inner_optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)
    assert_same_run(whole, parts, folder_a, folder_b)


def test_checkpoint_needs_no_code_to_be_read(tmp_path):
    setting = Setting(tmp_path, warm_start=True, progress=False)
    setting.loop.run(2)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["loop"]["step_count"] == 2 and len(state["loop"]["start"]) == len(setting.params)


def test_state_of_one_loop_goes_into_another():
    a, b = Setting(progress=False), Setting(seed=1, progress=False)
    a.loop.run(3)
    b.loop.load_state_dict(a.loop.state_dict())
    assert all_same_bits(a.tensors(), b.tensors()) and b.loop.step_count == 3


def test_run_can_be_ended_by_a_callback_or_by_stop(tmp_path):
    for callback in (lambda loop, record: record.step == 3, lambda loop, record: record.step == 3 and loop.stop()):
        _, _, loop = closed_form(callbacks=callback)
        assert len(loop.run(10)) == 3
        assert len(loop.run(2)) == 2  # and goes on when asked to


# ---- the position in the batches ------------------------------------------------------------------------------------


class Stateful:
    """Knows its own position, as torchdata's StatefulDataLoader does."""

    def __init__(self):
        self.at = 0
        self.resumed = False

    def __iter__(self):
        if not self.resumed:
            self.at = 0
        self.resumed = False
        while self.at < 3:
            self.at += 1
            yield self.at - 1

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at, self.resumed = state["at"], True


def data(n=7):
    return TensorDataset(torch.arange(n))


def weighted():
    sampler = WeightedRandomSampler([1.0] * 9, 9, generator=torch.Generator().manual_seed(1))
    return DataLoader(data(9), batch_size=2, sampler=sampler)


SOURCES = {
    "list": lambda: [0, 1, 2],
    "plain": lambda: DataLoader(data(), batch_size=3),
    "shuffled": lambda: DataLoader(data(), batch_size=3, shuffle=True),
    "generator": lambda: DataLoader(data(), 3, shuffle=True, generator=torch.Generator().manual_seed(7)),
    "weighted": weighted,
    "workers": lambda: DataLoader(data(), 3, shuffle=True, num_workers=1, generator=torch.Generator().manual_seed(7)),
    "distributed": lambda: DataLoader(data(), 2, sampler=DistributedSampler(data(), 2, 0)),
    "stateful": Stateful,
}


def numbers(batch):
    return batch[0].tolist() if isinstance(batch, list | tuple) else batch


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("taken", [0, 2, 3, 5])
def test_position_is_found_again(name, taken):
    torch.manual_seed(11)
    whole = Batches("loop", "batches", SOURCES[name](), resumable=True)
    wanted = [numbers(whole.draw()) for _ in range(10)]
    assert wanted[:3] != wanted[3:6] or name in ("list", "plain", "stateful")
    torch.manual_seed(11)
    first = Batches("loop", "batches", SOURCES[name](), resumable=True)
    found = [numbers(first.draw()) for _ in range(taken)]
    position, states = first.state_dict(), [torch.get_rng_state(), *(g.get_state() for g in first.generators)]
    torch.manual_seed(12)
    second = Batches("loop", "batches", SOURCES[name](), resumable=True)
    second.check(position)
    second.load_state_dict(position)
    torch.set_rng_state(states[0])
    for generator, state in zip(second.generators, states[1:], strict=True):
        generator.set_state(state)
    assert found + [numbers(second.draw()) for _ in range(10 - taken)] == wanted


def test_sources_that_do_not_serve():
    with pytest.raises(ValueError, match=r"loop: batches must hold at least one batch; got none"):
        Batches("loop", "batches", [], resumable=True).draw()
    with pytest.raises(ValueError, match=r"begin again.*one-shot iterator.*DataLoader itself"):
        Batches("loop", "batches", iter([1, 2]), resumable=True)
    once = Batches("loop", "batches", iter([1, 2]), resumable=False)
    assert [once.draw(), once.draw()] == [1, 2]
    with pytest.raises(RuntimeError, match="ended after 2 batches"):
        once.draw()
    longer, shorter = (Batches("loop", "batches", list(range(n)), resumable=True) for n in (3, 2))
    for _ in range(3):
        longer.draw()
    with pytest.raises(ValueError, match="the 3 batches that were taken; got 2"):
        shorter.load_state_dict(longer.state_dict())
    for wrong in (None, {}, {**longer.state_dict(), "taken": -1}, {**longer.state_dict(), "began": None}):
        with pytest.raises(ValueError, match="batches"):
            shorter.check(wrong)


# ---- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_inner_loss_that_is_not_finite_is_not_stepped_on(tmp_path, value):
    factor = [1.0]
    w, h = leaf(normal(0, 3)), leaf(normal(1, 3))
    adam = torch.optim.Adam([w], lr=0.1), torch.optim.Adam([h], lr=0.1)
    loop = BilevelLoop(
        lambda: w.sum(), lambda: factor[0] * (w - h).square().sum(), w, h, *adam, progress=False, inner_steps=2,
        checkpoint=tmp_path / "c.pt", log=tmp_path / "l.jsonl", checkpoint_every=1,
    )  # fmt: skip
    loop.run(2)
    kept, content = [t.detach().clone() for t in (w, h)], (tmp_path / "c.pt").read_bytes()
    factor[0] = value
    message = r"^BilevelLoop: inner_loss must be finite; got (nan|inf) in inner step 1 of outer step 3, .*Lower"
    with pytest.raises(LoopDiverged, match=message):
        loop.run(2)
    assert all_same_bits([w.detach(), h.detach()], kept) and (tmp_path / "c.pt").read_bytes() == content
    assert len(lines(tmp_path / "l.jsonl")) == 2
    factor[0] = 1.0
    assert len(loop.run(2)) == 2  # nothing was poisoned


def test_gradients_that_are_not_finite_are_not_stepped_on():
    w, h = torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True)
    sgd = torch.optim.SGD([w], lr=0.1), torch.optim.SGD([h], lr=0.1)
    loop = BilevelLoop(lambda: w.sum(), lambda: (h * w.abs().sqrt()).sum(), w, h, *sgd, progress=False)
    with pytest.raises(LoopDiverged, match=r"the gradient of inner_loss must be finite; got (nan|inf)"):
        loop.step()
    assert torch.equal(w, torch.zeros(3)) and loop.step_count == 0


@pytest.mark.parametrize(
    ("outer", "message"),
    [
        (lambda w: w.sum() * math.nan, r"outer_loss must be finite; got nan in outer step 1"),
        (lambda w: (w - w.detach()).abs().sqrt().sum(), r"the hypergradient must be finite; got (nan|inf) in outer"),
    ],
)
def test_outer_loss_that_is_not_finite_is_not_stepped_on(outer, message):
    w, h = leaf(normal(0, 3)), leaf(normal(1, 3))
    sgd = torch.optim.SGD([w], lr=0.1), torch.optim.SGD([h], lr=0.1)
    loop = BilevelLoop(lambda: outer(w), lambda: (w - h).square().sum(), w, h, *sgd, warm_start=True, progress=False)
    kept = h.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(LoopDiverged, match=message):
            loop.step()
    assert same_bits(h.detach(), kept) and h.grad is None and loop._start is None


def test_exception_in_a_loss_leaves_random_numbers_and_buffers_alone():
    setting = Setting(inner_batches=[(torch.randn(4, 5), torch.zeros(4, dtype=torch.long))], progress=False)
    setting.loop.step()
    buffers, state = [b.clone() for b in setting.model.buffers()], torch.get_rng_state()

    def broken(batch):
        setting.outer_loss(batch)
        raise MemoryError

    setting.loop._outer_loss = broken
    setting.loop._outer_batches = None
    setting.loop._outer_loss = lambda: broken((torch.randn(4, 5), torch.zeros(4, dtype=torch.long)))
    with pytest.raises(MemoryError):
        setting.loop._outer_step()
    assert all_same_bits(buffers, setting.model.buffers()) and torch.equal(state, torch.get_rng_state())


def test_earlier_run_is_not_overwritten_unasked(tmp_path):
    Setting(tmp_path, progress=False).loop.run(1)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for dropped in (None, "checkpoint.pt"):
        if dropped:
            (tmp_path / dropped).unlink()
            del before[dropped]
        other = Setting(tmp_path, progress=False)
        kept = [t.detach().clone() for t in other.tensors()]
        for act in (other.loop.step, lambda loop=other.loop: loop.run(1)):
            with pytest.raises(RuntimeError, match=r"must not be there when a run begins.*resume\(\)"):
                act()
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
        assert all_same_bits(kept, other.tensors())
    assert not other.loop.resume()  # there is no checkpoint any more


def test_resume_in_the_wrong_place(tmp_path):
    with pytest.raises(ValueError, match="checkpoint must be given"):
        Setting(progress=False).loop.resume()
    setting = Setting(tmp_path, progress=False)
    setting.loop.run(1)
    with pytest.raises(RuntimeError, match="before the first step; got 1"):
        setting.loop.resume()
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(OSError, match="must hold the"):
        Setting(tmp_path, progress=False).loop.resume()
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    with pytest.raises(RuntimeError, match=r"checkpoint\.pt: is damaged"):
        Setting(tmp_path, progress=False).loop.resume()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step_count": -1}, "step_count must be a whole number"),
        ({"num_failed_solves": "x"}, "num_failed_solves"),
        ({"params": []}, "params must be a list of 6 tensors"),
        ({"hparams": [torch.ones(1)] * 6}, r"hparams\[0\] must be float32 of shape \(8, 5\)"),
        ({"start": [torch.ones(1)]}, "start must be a list of 6"),
        ({"inner_optimizer": {}}, "inner_optimizer must be the state of an optimizer"),
        ({"outer_optimizer": {"state": {}, "param_groups": []}}, r"groups of \[6\] tensors; got \[\]"),
        ({"stateful": []}, "stateful must be a list of 1"),
        ({"random": {}}, "random must hold"),
        ({"random": {"cpu": torch.zeros(3, dtype=torch.uint8), "cuda": [], "generators": [1, 2]}}, "random"),
        ({"inner_batches": None}, "inner_batches must hold"),
        ({"unknown": 1}, "it must be a dict with the keys"),
    ],
)
def test_state_that_does_not_fit_changes_nothing(change, message):
    setting = Setting(progress=False)
    setting.loop.run(1)
    kept = [t.detach().clone() for t in setting.tensors()]
    with pytest.raises(ValueError, match=message):
        setting.loop.load_state_dict({**setting.loop.state_dict(), **change})
    assert all_same_bits(kept, setting.tensors()) and setting.loop.step_count == 1


def test_state_that_a_file_cannot_hold_is_named(tmp_path):
    class Odd:
        def state_dict(self):
            return {"best": [1.0, np.float64(2.0)]}

        def load_state_dict(self, state):
            pass

    setting = Setting(tmp_path, stateful=[Odd()], progress=False)
    with pytest.raises(TypeError, match=r"stateful\[0\]\.state_dict\(\)\['best'\]\[1\] must be made.*numpy\.float64"):
        setting.loop.step()
    assert not list(tmp_path.iterdir()) and setting.loop.step_count == 0


def ok():
    w, h = leaf(normal(0, 3)), leaf(normal(1, 3))
    return {
        "outer_loss": lambda: w.sum(),
        "inner_loss": lambda: (w - h).square().sum(),
        "params": w,
        "hparams": h,
        "inner_optimizer": torch.optim.SGD([w], lr=0.1),
        "outer_optimizer": torch.optim.SGD([h], lr=0.1),
    }


BAD = [
    (
        lambda a: {"outer_loss": a["params"].sum()},
        TypeError,
        "outer_loss must be callable; got Tensor. Pass a f",
    ),
    (lambda a: {"inner_loss": None}, TypeError, "inner_loss must be callable; got None"),
    (lambda a: {"params": [a["params"] * 1]}, ValueError, r"params\[0\] must be a leaf tensor"),
    (lambda a: {"hparams": [a["hparams"] * 1]}, ValueError, r"hparams\[0\] must be a leaf tensor"),
    (lambda a: {"params": a["params"].detach()}, ValueError, "params must require grad"),
    (lambda a: {"hparams": []}, ValueError, "hparams must hold at least one"),
    (lambda a: {"hparams": a["params"]}, ValueError, "must not be one of params"),
    (lambda a: {"inner_optimizer": torch.optim.SGD}, TypeError, "inner_optimizer must be a torch.optim.Optimizer"),
    (
        lambda a: {"inner_optimizer": a["outer_optimizer"]},
        ValueError,
        "inner_optimizer must hold all of params; got one without 1 of the 1",
    ),
    (
        lambda a: {"inner_optimizer": torch.optim.SGD([a["params"], a["hparams"]], lr=0.1)},
        ValueError,
        r"inner_optimizer must hold no tensors but params; got 1 others.*\(3,\)",
    ),
    (
        lambda a: {"outer_optimizer": a["inner_optimizer"]},
        ValueError,
        "outer_optimizer must hold all of hparams",
    ),
    (lambda a: {"outer_optimizer": torch.optim.LBFGS([a["hparams"]])}, ValueError, "without a closure; got LBFGS"),
    (lambda a: {"inner_steps": 0}, ValueError, "inner_steps must be >= 1; got 0"),
    (lambda a: {"inner_steps": 1.5}, TypeError, "inner_steps must be an int; got 1.5"),
    (lambda a: {"warmup": -1}, ValueError, "warmup must be >= 0"),
    (lambda a: {"checkpoint_every": True}, TypeError, "checkpoint_every must be an int"),
    (lambda a: {"clip_inner": 0.0}, ValueError, "clip_inner must be finite and > 0"),
    (lambda a: {"clip_outer": math.inf}, ValueError, "clip_outer must be finite and > 0"),
    (lambda a: {"clip_outer": "1"}, TypeError, "clip_outer must be None or a number"),
    (lambda a: {"solver": Neumann}, TypeError, "solver must be a solver such as"),
    (lambda a: {"curvature": 3}, TypeError, "curvature must be callable; got int"),
    (lambda a: {"project": 3}, TypeError, "project must be callable; got int"),
    (lambda a: {"callbacks": [print, 3]}, TypeError, r"callbacks\[1\] must be callable; got int"),
    (lambda a: {"stateful": [3]}, TypeError, r"stateful\[0\] must have state_dict\(\)"),
    (lambda a: {"generators": 3}, TypeError, r"generators\[0\] must be a torch.Generator"),
    (lambda a: {"inner_batches": 3}, TypeError, "inner_batches must be a DataLoader"),
    (lambda a: {"outer_batches": torch.ones(3)}, TypeError, "outer_batches must be a DataLoader"),
    (
        lambda a: {"inner_batches": iter([1]), "checkpoint": "c.pt"},
        ValueError,
        "inner_batches must be an iterable that can begin again",
    ),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD)
def test_bad_argument_is_refused_by_name(change, kind, message):
    good = ok()
    with pytest.raises(kind, match=f"^BilevelLoop: .*{message}"):
        BilevelLoop(**{**good, **change(good)})


@pytest.mark.parametrize(
    ("name", "loss", "message"),
    [
        ("inner_loss", lambda a: lambda: 3.0, "inner_loss must be a scalar tensor"),
        ("inner_loss", lambda a: lambda: a["params"] * 2, r"inner_loss must be a scalar; got shape \(3,\)"),
        ("inner_loss", lambda a: lambda: a["hparams"].sum(), "inner_loss must depend on params"),
        ("outer_loss", lambda a: lambda: torch.ones(()), "outer_loss must have a graph"),
    ],
)
def test_bad_loss_is_refused_by_name_and_before_a_step(name, loss, message):
    good = ok()
    loop = BilevelLoop(**{**good, name: loss(good)}, progress=False)
    kept = good["hparams"].detach().clone()
    with pytest.raises((TypeError, ValueError), match=f"^BilevelLoop: {message}"):
        loop.step()
    assert same_bits(good["hparams"].detach(), kept) and loop.step_count == 0


def test_bad_number_of_steps():
    loop = BilevelLoop(**ok(), progress=False)
    for wrong, kind in ((-1, ValueError), (1.5, TypeError)):
        with pytest.raises(kind, match="num_steps must be"):
            loop.run(wrong)
    assert loop.run(0) == []


def test_log_follows_its_schema(tmp_path):
    setting = Setting(tmp_path, warmup=1, progress=False)
    setting.loop.run(2)
    setting.loop.log_event("note", value=math.inf)
    first, second, note = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    fields = {"event", "step", "inner_loss", "inner_grad_norm", "outer_loss", "hypergrad_norm", "status"}
    assert set(first) == set(second) == fields | {"num_products", "seconds"} and first["event"] == "step"
    assert first["outer_loss"] is None and first["status"] is None and second["status"] in Status.__members__
    assert note == {"event": "note", "value": None}


def test_runs_on_either_device(device):
    setting_device = torch.device(device)
    w = torch.randn(4, device=setting_device, requires_grad=True)
    h = torch.zeros(4, device=setting_device, requires_grad=True)
    adam = torch.optim.Adam([w], lr=0.1), torch.optim.RMSprop([h], lr=0.1)
    dropout = nn.Dropout(0.5)
    loop = BilevelLoop(
        lambda: dropout(w).square().sum(), lambda: (dropout(w) - h.exp()).square().sum(), w, h, *adam,
        warm_start=True, clip_inner=1.0, clip_outer=1.0, progress=False,
    )  # fmt: skip
    state = loop.state_dict()
    assert all(math.isfinite(r.hypergrad_norm) for r in loop.run(3)) and state["step_count"] == 0


def test_loaders_that_keep_their_workers_are_refused_with_a_checkpoint(tmp_path):
    data = TensorDataset(torch.ones(4, 5), torch.zeros(4, dtype=torch.int64))
    loader = DataLoader(data, batch_size=2, num_workers=1, persistent_workers=True)
    with pytest.raises(ValueError, match="inner_batches must start its workers anew for each epoch"):
        Setting(tmp_path, inner_batches=loader, progress=False)


def test_a_checkpoint_of_another_optimizer_does_not_fit(tmp_path):
    whole = Setting(tmp_path, progress=False)
    whole.loop.run(2)
    other = Setting(tmp_path, progress=False)
    other.loop.outer_optimizer = torch.optim.SGD(other.hparams, lr=0.1)
    with pytest.raises(CheckpointError, match="does not fit this loop: outer_optimizer must be the state of a SGD"):
        other.loop.resume()


def test_an_edited_log_is_not_cut_within_a_line(tmp_path):
    whole = Setting(tmp_path, progress=False)
    whole.loop.run(3)
    log = tmp_path / "log.jsonl"
    log.write_bytes(b'{"note": 1}\n' + log.read_bytes())
    before = log.read_bytes()
    with pytest.raises(OSError, match="it was edited"):
        Setting(tmp_path, progress=False).loop.resume()
    assert log.read_bytes() == before
