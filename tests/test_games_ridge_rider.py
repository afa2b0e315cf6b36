"""Ridge Rider in both forms: what it finds on problems whose solutions are known, and how it goes on and fails."""

import copy
import math

import pytest
import torch
from cases import F64, generator
from torch import nn

from nestopt_ext.games import (
    Archive,
    BranchStatus,
    EigenRidges,
    LyapunovBranches,
    extragradient_map,
    ipd,
    lola_map,
    matching_pennies,
    max_lyapunov_exponent,
    max_lyapunov_start,
    mix,
    momentum_map,
    ridge_rider,
    sgd_map,
    small_ipd,
)


def starts(count=10, scale=2.0):
    """One start for each seed from 0 on, N(0, scale^2)."""
    return torch.stack([scale * torch.randn(2, dtype=F64, generator=generator(seed)) for seed in range(count)])


def losses_of(solutions):
    return sorted(solution.losses for solution in solutions)


def close(found, wanted, atol):
    torch.testing.assert_close(torch.tensor(found, dtype=F64), torch.tensor(wanted, dtype=F64), rtol=0, atol=atol)


# ---- generalized: games whose solutions are known -------------------------------------------------------------------


TIT_FOR_TAT, DEFECTION = (1.0, 1.0), (1.96, 1.96)


@pytest.fixture(scope="module")
def dilemmas():
    """64 starts with a learning rate of 1 and the same with 5, as one tensor program: the descent, and the archive."""
    descent = sgd_map(small_ipd(batch=1), 1.0)

    def step(x):
        lr = torch.tensor([1.0, 5.0], dtype=F64).repeat_interleave(len(x) // 2)[:, None]
        return x + lr * (descent(x) - x)

    method = LyapunovBranches(max_steps=700, ascent_steps=40)
    begin = starts(64).repeat(2, 1)
    found = ridge_rider(
        step, begin, method, losses=descent.losses, max_depth=1, max_branches=None, bifurcation_distance=0.0
    )
    return descent, step, begin, found


def reached(branches, losses):
    return any(math.dist(branch.losses, losses) < 0.05 for branch in branches)


def share_of_both(found, rows, of_the_source=False):
    """The share of starts that lead to both solutions; of the branches that the source has, or of all."""
    both = 0
    for row in rows:
        top, start = (b for b in found.bifurcations if b.start == row)
        branches = found.children(top.id)
        branches = [b for b in branches if b.size <= 2] if of_the_source else branches + found.children(start.id)
        both += reached(branches, TIT_FOR_TAT) and reached(branches, DEFECTION)
    return both / len(rows)


@pytest.mark.parametrize("rows", [range(64), range(64, 128)], ids=["lr 1", "lr 5"])
def test_both_solutions_of_the_small_dilemma_from_almost_any_start(dilemmas, rows):
    """Of 320 starts 99 %. The source's own branches find both from 6 in 10 and 8 in 10 of them."""
    found = dilemmas[-1]
    assert share_of_both(found, rows) >= 0.9
    assert 0.4 < share_of_both(found, rows, of_the_source=True) < 0.9


def test_ascents_of_the_small_dilemma_end_at_the_published_place(dilemmas):
    found = dilemmas[-1]
    top = torch.tensor([0.93, 0.92], dtype=F64)
    ends = [b for b in found.bifurcations[:128:2] if float((b.state - top).abs().max()) < 0.03]
    assert len(ends) >= 20  # others climb toward infinity
    close([b.values[0].real for b in ends], [0.099] * len(ends), 2e-3)


def test_descent_of_the_small_dilemma_ends_in_one_solution(dilemmas):
    descent, step, state, _ = dilemmas
    with torch.no_grad():
        for _ in range(300):
            state = step(state)
    plain = torch.stack(descent.losses(state), dim=1)[64:]
    assert bool(((plain < 1.02).all(dim=1) | (plain > 1.9).all(dim=1)).all())


def test_the_dilemma_branches_along_the_diagonal():
    step = sgd_map(small_ipd(), 1.0)
    method = LyapunovBranches(max_steps=300, ascent_steps=12, sizes=(0.5, 1.0, 2.0), from_start=False)
    found = ridge_rider(step, torch.tensor([0.6, 0.5]), method, max_depth=1)
    (here,) = found.bifurcations
    close(here.state.tolist(), [0.93, 0.92], 0.03)
    close(here.values[0].real, 0.099, 2e-3)
    close(found.branches[0].direction.tolist(), [math.sqrt(0.5)] * 2, 1e-2)
    assert [(b.size, b.sign) for b in found.branches] == [(d, s) for d in (0.5, 1.0, 2.0) for s in (1, -1)]
    assert losses_of(found.found_from(0)) == losses_of(found.solutions)
    assert len(found.solutions) == 2


def test_branches_leave_the_end_of_the_ascent_and_the_start():
    step = sgd_map(small_ipd(), 1.0)
    begin = torch.tensor([[0.6, 0.5], [0.0, 1.0]], dtype=F64)
    found = ridge_rider(step, begin, LyapunovBranches(max_steps=1, ascent_steps=3, sizes=(1.0,)), max_depth=1)
    top, start, _, other = found.bifurcations
    assert [b.start for b in found.bifurcations] == [0, 0, 1, 1]
    close(start.state.tolist(), [0.6, 0.5], 0)
    close(other.state.tolist(), [0.0, 1.0], 0)
    climbed = max_lyapunov_start(step, begin[:1], num_steps=10, max_steps=3)
    close(top.state.tolist(), climbed.start[0].tolist(), 1e-12)
    for here in (top, start):
        there = max_lyapunov_exponent(step, here.state[None], num_steps=10)
        close(here.values[0].real, there.exponent.item(), 1e-12)
        close(found.children(here.id)[0].begin.tolist(), (here.state + there.direction[0]).tolist(), 1e-12)
    still = ridge_rider(step, begin, LyapunovBranches(max_steps=1, ascent_steps=0), max_depth=1)
    assert len(still.bifurcations) == 2


def test_both_attractors_of_the_mixed_game():
    """The spiral's basin is a small ellipse. Of 320 starts 76 % find both along two directions, 60 % along one."""
    step = extragradient_map(mix(0.25, batch=1), 1.0)
    method = LyapunovBranches(max_steps=800, ascent_steps=3, num_directions=2)
    found = ridge_rider(step, starts(24), method, max_depth=1)
    both = [
        all(any(math.dist(s.losses, a) < 0.05 for s in found.found_from(i)) for a in ((1.0, 0.5), (1.403, 1.373)))
        for i in range(24)
    ]
    assert sum(both) >= 0.6 * 24
    spiral = min(found.solutions, key=lambda solution: float(solution.state.norm())).state
    with torch.no_grad():
        for _ in range(800):
            spiral = step(spiral)
    close(spiral.tolist(), [0.115, -0.237], 0.05)


@pytest.mark.parametrize("ride", [None, extragradient_map])
def test_pennies_branch_in_the_plane_of_a_complex_pair(ride):
    game = matching_pennies(batch=1)
    method = LyapunovBranches(
        max_steps=400,
        directions="eigenvectors",
        num_directions=2,
        ascent_steps=0,
        sizes=(0.5,),
        ride=None if ride is None else ride(game, 1.0),
    )
    found = ridge_rider(sgd_map(game, 1.0), torch.zeros(2, dtype=F64), method, max_depth=1, key="parameters")
    close([abs(v) for v in found.bifurcations[0].values], [abs(1 + 0.25j)] * 2, 1e-12)
    u, q = found.branches[0], found.branches[2]
    assert [(b.rank, b.sign) for b in found.branches] == [(0, 1), (0, -1), (1, 1), (1, -1)]
    close((u.direction @ q.direction).item(), 0.0, 1e-12)
    close(float(u.direction.norm() + q.direction.norm()), 2.0, 1e-12)
    if ride is not None:  # extragradient leads all back; descent spirals out
        assert len(found.solutions) == 1
        close(found.solutions[0].losses, (0.0, 0.0), 1e-4)
    else:
        assert len(found.solutions) == 4


@pytest.mark.parametrize("make", [lola_map, extragradient_map, lambda game, lr: momentum_map(game, lr, 0.5 + 0.3j)])
def test_rides_with_any_optimizer(make):
    game = small_ipd(batch=1)
    method = LyapunovBranches(max_steps=300, ascent_steps=0, ride=make(game, 5.0))
    found = ridge_rider(sgd_map(game, 5.0), torch.tensor([0.6, 0.6]), method, max_depth=1)
    close(losses_of(found.solutions), [(1.0, 1.0), (1.96, 1.96)], 2e-2)
    assert all(b.end.shape == (make(game, 5.0).state_size,) for b in found.branches)


def test_rides_with_any_function_of_states():
    """x + (x - x^3) / 10 has fixed points -1, 0, 1, and 0 is where neighbours part."""

    def step(x):
        return x + 0.1 * (x - x**3)

    method = LyapunovBranches(max_steps=300, sizes=(0.5,), from_start=False, ascent_steps=12, tolerance=1e-10)
    found = ridge_rider(step, torch.tensor([[0.9], [math.nan]], dtype=F64), method, losses=lambda x: x[:, 0] ** 2)
    close(found.bifurcations[0].state.item(), 0.0, 0.1)
    assert found.bifurcations[1].status is BranchStatus.non_finite
    assert found.found_from(1) == []
    assert len(found.solutions) == 1  # by its losses it is one
    found = ridge_rider(step, torch.tensor([0.9], dtype=F64), method, key="parameters")
    close(sorted(s.state.item() for s in found.solutions), [-1.0, 1.0], 1e-9)
    assert {b.status for b in found.branches} == {BranchStatus.converged}
    assert found.complete


def test_the_search_is_repeated_from_new_solutions():
    """x + sin(x) / 2 has stable points at odd multiples of pi, and borders at even ones."""

    def step(x):
        return x + torch.sin(x) / 2

    method = LyapunovBranches(max_steps=200, sizes=(1.0, 4.0), ascent_steps=0, tolerance=1e-12)
    once = ridge_rider(step, torch.zeros(1, dtype=F64), method, max_depth=1)
    twice = ridge_rider(step, torch.zeros(1, dtype=F64), method, max_depth=2)
    close(sorted(s.state.item() / math.pi for s in once.solutions), [-1.0, 1.0], 1e-9)
    close(sorted(s.state.item() / math.pi for s in twice.solutions), [-3.0, -1.0, 1.0, 3.0], 1e-9)
    assert max(len(s.fingerprint) for s in twice.solutions) == 2


# ---- ridges ---------------------------------------------------------------------------------------------------------


def axes_polynomial(size, seed):
    """Minima at +-sqrt(c_i) along rotated axes and nowhere else; the steepest axis draws almost all descent."""
    c = torch.linspace(1.0, 0.5, size, dtype=F64)
    axes = torch.linalg.qr(torch.randn(size, size, dtype=F64, generator=generator(seed)))[0]

    def loss(w):
        z = (w @ axes).square()
        return -(z @ c) / 2 + z.square().sum(dim=1) / 4 + 2.25 * (z.sum(dim=1).square() - z.square().sum(dim=1))

    minima = (axes * c.sqrt()).T
    return loss, torch.cat([minima, -minima])


@pytest.mark.parametrize("size", [2, 10])
def test_all_minima_of_a_polynomial_and_more_than_noise_finds(size):
    loss, minima = axes_polynomial(size, seed=size)
    saddle = torch.zeros(size, dtype=F64)
    found = ridge_rider(loss, saddle, EigenRidges(step=0.02, finish=0.1, finish_steps=400))
    assert len(found.solutions) == len(minima)
    distance = torch.cdist(minima, torch.stack([s.state for s in found.solutions])).amin(dim=1)
    assert float(distance.max()) < 1e-6
    assert [s.fingerprint for s in found.solutions] == [((i, s),) for i in range(size) for s in (1, -1)]
    # a step along a ridge takes ``size`` products with the Hessian: descent has as many gradients for them
    runs = found.num_steps * (size + 1) // 400
    w = 0.01 * torch.randn(runs, size, dtype=F64, generator=generator(0))
    for _ in range(400):
        w.requires_grad_()
        w = (w - 0.1 * torch.autograd.grad(loss(w).sum(), w)[0]).detach()
    assert runs >= 4
    assert int((torch.cdist(minima, w).amin(dim=1) < 0.05).sum()) < len(minima)


def wells(w):
    """2^P minima, reached one coordinate after the other; c keeps eigenvalues apart."""
    c = 1 + 0.2 * torch.arange(w.shape[1], dtype=w.dtype)
    return (w**4 / 4 - c * w**2 / 2).sum(dim=1)


@pytest.mark.parametrize(("order", "dtype"), [("breadth", F64), ("depth", F64), ("breadth", torch.float32)])
def test_ridges_branch_again_where_curvature_is_left(order, dtype):
    method = EigenRidges(step=0.1, finish=0.2)
    found = ridge_rider(wells, torch.zeros(3, dtype=dtype), method, order=order)
    assert found.solutions[0].state.dtype == dtype
    assert len(found.solutions) == 8
    assert {len(s.fingerprint) for s in found.solutions} == {3}
    new = [b for b in found.bifurcations if b.same_as is None]
    assert len(new) == 1 + 6 + 12  # nothing, one or two coordinates in their wells, each place once
    assert len(found.branches) == sum(len(found.children(b.id)) for b in new) == 6 + 6 * 4 + 12 * 2
    first = found.path(found.solutions[0].branches[0])
    assert [b.depth for b in first] == [1, 2, 3]
    assert found.complete


def test_depth_first_reaches_a_solution_in_fewer_branches():
    method = EigenRidges(step=0.05, finish=0.2)
    for order, count in (("breadth", 0), ("depth", 1)):
        found = ridge_rider(wells, torch.zeros(3, dtype=F64), method, order=order, max_branches=3)
        assert len(found.solutions) == count
        assert not found.complete


def test_one_ridge_of_a_group_of_equal_eigenvalues_is_enough():
    def loss(w):
        return -(w**2).sum(dim=1) / 2 + (w**2).sum(dim=1) ** 2 / 4  # round: one minimum but for symmetry

    origin = torch.zeros(4, dtype=F64)
    one = ridge_rider(loss, origin, EigenRidges(step=0.05), max_depth=1)
    every = ridge_rider(loss, origin, EigenRidges(step=0.05, repeated="all"), max_depth=1)
    assert [b.rank for b in one.branches] == [0, 0]
    assert [b.rank for b in every.branches] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert {b.status for b in every.branches} == {BranchStatus.turned}
    close([float(b.end.norm()) for b in every.branches], [0.6] * 8, 1e-9)  # past 1 / sqrt 3, along a straight line


def test_a_ridge_is_followed_as_it_turns():
    """A ridge along the parabola y = x^2 / 2: det H = -10 all along it."""

    def loss(w):
        return -(w[:, 0] ** 2) / 2 + 5 * (w[:, 1] - w[:, 0] ** 2 / 2) ** 2

    def ride(**options):
        return ridge_rider(loss, torch.zeros(2, dtype=F64), EigenRidges(**options), max_depth=1)

    ahead, back = ride(step=0.02, max_steps=60).branches
    assert ahead.status is back.status is BranchStatus.completed
    assert ahead.steps == 60
    assert ahead.losses[0] < 0
    assert float(ahead.end[1]) > 0.3
    torch.testing.assert_close(ahead.end * torch.tensor([-1.0, 1.0]), back.end, rtol=0, atol=1e-12)
    lost = ride(step=0.1, min_overlap=0.9999).branches[0]
    assert lost.status is BranchStatus.lost
    assert lost.solution is None


def test_an_end_that_descent_leads_to_a_saddle_is_branched_at():
    """Where the curvature along x turns positive that along y is too; descent ends in saddles at x = +-1, y = 0."""

    def loss(w):
        x, y = w[:, 0], w[:, 1]
        return x**4 / 4 - x**2 / 2 + (1 - 1.5 * x**2) * y**2 / 2 + y**4

    found = ridge_rider(loss, torch.zeros(2, dtype=F64), EigenRidges(step=0.02, finish=0.2), max_branches=6)
    assert found.complete
    assert len(found.bifurcations) == 3
    close([b.state.abs().tolist() for b in found.bifurcations[1:]], [[1.0, 0.0]] * 2, 1e-6)
    assert len(found.solutions) == 4
    assert all(len(s.fingerprint) == 2 for s in found.solutions)


def test_ridges_of_a_game_from_its_saddle():
    game = small_ipd()
    saddle = torch.tensor([0.4179, 0.4179], dtype=F64)
    method = EigenRidges(step=0.1, max_steps=100, min_curvature=1e-3, finish=sgd_map(game, 5.0), finish_steps=500)
    found = ridge_rider(game, saddle, method, key="losses", max_depth=2)
    assert abs(found.bifurcations[0].values[0] + 0.03925) < 1e-4
    close(found.branches[0].direction.abs().tolist(), [math.sqrt(0.5)] * 2, 1e-4)
    assert {tuple(round(x, 1) for x in s.losses) for s in found.solutions} >= {(1.0, 1.0), (2.0, 2.0)}


def test_a_complex_pair_is_ridden_in_its_plane():
    """grad = (a x - y, x + a y) with a = r^2 - 1 / 2: unstable at 0, its plane the whole of it, stable outside."""

    class Spiral:
        def __init__(self):
            self.players = [torch.zeros(1, dtype=F64, requires_grad=True) for _ in range(2)]

        def losses(self, players):
            x, y = players
            return [x**4 / 4 - x**2 / 4 - x * y, y**4 / 4 - y**2 / 4 + x * y]

    found = ridge_rider(Spiral(), torch.zeros(2, dtype=F64), EigenRidges(step=0.02), max_depth=1)
    assert [(b.rank, b.sign) for b in found.branches] == [(0, 1), (0, -1), (1, 1), (1, -1)]
    assert all(abs(b.value.real + 0.5) < 1e-12 and abs(b.value.imag) == pytest.approx(1) for b in found.branches)
    assert {b.status for b in found.branches} == {BranchStatus.turned}


# ---- products only --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_products_alone_find_what_matrices_find(dtype):
    """66 parameters, of which two have negative curvature."""
    size = 66
    axes = torch.linalg.qr(torch.randn(size, size, dtype=F64, generator=generator(1)))[0].to(dtype)

    def loss(w):
        z = w @ axes
        return (
            wells(z[:, :2])
            + (1 + z[:, 2:].sin() / 5).mul(z[:, 2:] ** 2).sum(dim=1) / 2
            + z[:, 0] * z[:, 2:].sum(1) / 50
        )

    method = EigenRidges(
        step=0.1, num_directions=2, min_curvature=1e-4, finish=0.2, finish_steps=120, min_overlap=0.8, num_products=8
    )
    found = ridge_rider(loss, torch.zeros(size, dtype=dtype), method, max_depth=2)
    assert len(found.solutions) == 4
    ends = torch.stack([s.state for s in found.solutions]).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(ends).sum(), ends)
    assert float(gradient.abs().max()) < (1e-6 if dtype == F64 else 1e-4)
    signs = {tuple((s.state @ axes)[:2].sign().tolist()) for s in found.solutions}
    assert len(signs) == 4


class Coordinate:
    """A network that is to tell the first coordinate, from weights near 0, where it is a saddle."""

    def __init__(self):
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 1)).double()
        self.players = [self.net]
        self.x = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]], dtype=F64)
        self.y = self.x[:, :1]
        with torch.no_grad():
            for p in self.net.parameters():
                p.mul_(0.01)

    def losses(self, players):
        return [(players[0](self.x) - self.y).square().mean()]


def test_a_network_is_ridden_by_products():
    game = Coordinate()
    before = [p.clone() for p in game.net.parameters()]
    method = EigenRidges(step=0.1, max_steps=20, num_directions=1, min_curvature=1e-3)
    found = ridge_rider(game, None, method, max_depth=1)
    assert found.starts.shape == (1, 81)
    assert [b.sign for b in found.branches] == [1, -1]
    assert all(b.losses[0] < 0.95 and b.status is not BranchStatus.lost for b in found.branches)
    assert all(torch.equal(a, b) for a, b in zip(before, game.net.parameters(), strict=True))


# ---- limits, interruption, failures ---------------------------------------------------------------------------------


def same(first, second):
    assert first.table() == second.table()
    assert len(first.branches) == len(second.branches)
    for a, b in zip(first.branches, second.branches, strict=True):
        assert torch.equal(a.end, b.end)
        assert (a.steps, a.status, a.losses, a.solution) == (b.steps, b.status, b.losses, b.solution)


def interrupted(problem, start, method, path, every, **options):
    """The archive of a ride that stops again and again, goes into a file, and is taken up from there."""
    asked = iter(range(10**6))
    archive, stops = Archive(), 0
    while not archive.complete:
        archive = ridge_rider(
            problem,
            start if archive.starts is None else None,
            method,
            archive=archive,
            should_stop=lambda: next(asked) % every == every - 1,
            **options,
        )
        archive.save(path)
        archive = Archive.load(path)
        stops += 1
    assert stops > 3
    return archive


@pytest.mark.parametrize("order", ["breadth", "depth"])
def test_an_interrupted_ride_comes_to_the_same_numbers(order, tmp_path):
    problem = (wells, torch.zeros(2, dtype=F64), EigenRidges(step=0.1, finish=0.2))
    whole = ridge_rider(*problem, order=order)
    same(interrupted(*problem, tmp_path / "ride.pt", 17, order=order), whole)


def test_an_interrupted_search_by_exponents_comes_to_the_same_numbers(tmp_path):
    step = momentum_map(small_ipd(batch=1), 5.0, 0.5)
    problem = (step, starts(2), LyapunovBranches(max_steps=40, ascent_steps=5, sizes=(0.5, 1.0), from_start=False))
    whole = ridge_rider(*problem, max_depth=2, distance=0.3, batch_size=5)
    assert max(b.depth for b in whole.branches) == 2
    same(interrupted(*problem, tmp_path / "ride.pt", 4, max_depth=2, distance=0.3, batch_size=5), whole)


def test_an_ascent_that_was_stopped_is_none_of_another_search():
    """Stopped amid the ascents from solutions, of which a smaller depth has none."""
    step = sgd_map(small_ipd(batch=1), 5.0)
    method = LyapunovBranches(max_steps=30, ascent_steps=5, sizes=(2.0,), from_start=False)
    asked = iter(range(10**6))
    stop_at = 6 + 30 + 3  # an ascent, the rides of a generation, half an ascent
    found = ridge_rider(step, starts(1), method, should_stop=lambda: next(asked) == stop_at)
    assert (len(found.bifurcations), found.complete, found.num_steps) == (1, False, 60)
    shallow = ridge_rider(step, None, method, archive=found, max_depth=1)
    assert (len(shallow.bifurcations), shallow.complete, shallow.num_steps) == (1, True, 60)
    same(shallow, ridge_rider(step, starts(1), method, max_depth=1))


def test_directions_that_do_not_converge_are_told_of_once():
    crowded = torch.linalg.qr(torch.randn(400, 400, dtype=F64, generator=generator(0)))[0]
    crowded = crowded * torch.linspace(1.0, 0.99, 400, dtype=F64)
    method = LyapunovBranches(max_steps=1, horizon=1, ascent_steps=1, sizes=(1.0,))
    with pytest.warns(RuntimeWarning, match="ridge_rider: the leading directions must converge") as told:
        ridge_rider(lambda x: torch.sin(x @ crowded.T), torch.ones(400, dtype=F64), method, max_depth=1)
    assert len(told) == 1


def test_what_a_callback_raises_leaves_the_archive_whole():
    problem = (wells, torch.zeros(2, dtype=F64), EigenRidges(step=0.05, finish=0.2))
    asked = iter(range(10))
    archive = Archive()
    with pytest.raises(StopIteration):
        ridge_rider(*problem, archive=archive, should_stop=lambda: next(asked) < 0)
    assert archive.num_steps == 40  # four branches, ten steps each
    same(ridge_rider(*problem, archive=archive), ridge_rider(*problem))


def test_limits_are_kept_and_can_be_raised():
    method = EigenRidges(step=0.05, finish=0.2)
    start = torch.zeros(2, dtype=F64)
    whole = ridge_rider(wells, start, method)
    some = ridge_rider(wells, start, method, max_branches=3, max_steps=50)
    assert some.num_steps <= 50
    assert not some.complete
    some = ridge_rider(wells, start, method, archive=some)
    assert some.complete
    assert losses_of(some.solutions) == losses_of(whole.solutions)
    shallow = ridge_rider(wells, start, method, max_depth=1)
    assert (len(shallow.branches), len(shallow.solutions), shallow.complete) == (4, 0, True)


def test_a_batch_is_what_its_branches_are_alone():
    step = sgd_map(small_ipd(batch=1), 5.0)
    method = LyapunovBranches(max_steps=50, ascent_steps=1, sizes=(0.5, 1.0, 2.0), from_start=False)
    found = [ridge_rider(step, starts(3), method, max_depth=1, batch_size=size) for size in (None, 4)]
    for a, b in zip(*[f.branches for f in found], strict=True):
        torch.testing.assert_close(a.end, b.end, rtol=1e-12, atol=1e-12)
    calls = []
    ridge_rider(step, starts(3), method, max_depth=1, batch_size=4, on_batch=calls.append)
    assert len(calls) == 5  # 18 branches


def test_failures_are_recorded_and_stay_alone():
    def step(x):
        return torch.where(x > 0.5, x * 3, torch.where(x < -0.5, torch.sqrt(x + 0.5), x * 0.5))

    method = LyapunovBranches(max_steps=50, ascent_steps=0, sizes=(0.1, 1.0))
    found = ridge_rider(step, torch.zeros(1, dtype=F64), method, max_depth=1)
    by = {(b.size, b.sign): b for b in found.branches}
    assert by[1.0, 1].status is BranchStatus.diverged
    assert by[1.0, 1].end.item() > 1e6
    assert by[1.0, -1].status is BranchStatus.non_finite
    assert math.isnan(by[1.0, -1].end.item())
    assert by[1.0, 1].solution is None is by[1.0, -1].solution
    assert [s.branches for s in found.solutions] == [(by[0.1, 1].id, by[0.1, -1].id)]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"method": "ridge"},
            TypeError,
            "ridge_rider: method must be EigenRidges(...) or LyapunovBranches(...); got str",
        ),
        ({"order": "best"}, ValueError, "ridge_rider: order must be breadth or depth; got 'best'"),
        ({"distance": -1.0}, ValueError, "ridge_rider: distance must be finite and >= 0; got -1.0"),
        ({"max_branches": 0}, ValueError, "ridge_rider: max_branches must be >= 1; got 0"),
        ({"start": torch.zeros(2, 3, 4)}, ValueError, "ridge_rider: start must have shape (B, S)"),
        ({"start": [0.0]}, TypeError, "ridge_rider: start must be a tensor of parameters; got list"),
        ({"problem": lambda w: w.sum()}, ValueError, "ridge_rider: problem must return a loss for each start"),
        (
            {"problem": sgd_map(small_ipd(), 1.0)},
            TypeError,
            "ridge_rider: problem must be a loss or a game for EigenRidges",
        ),
        ({"start": torch.zeros(65)}, ValueError, "ridge_rider: num_directions must be given for more than 64"),
        ({"key": lambda w: w.sum()}, ValueError, "ridge_rider: key must return a tensor with"),
        ({"key": lambda w: w / 0}, ValueError, "ridge_rider: key must be finite"),
        ({"key": lambda w: w[:, :0]}, ValueError, "ridge_rider: key must return a tensor with"),
        ({"key": lambda w: torch.complex(w, w)}, ValueError, "ridge_rider: key must return a tensor with"),
        ({"progress": "no"}, TypeError, "ridge_rider: progress must be a bool; got 'no'"),
        (
            {"method": EigenRidges(step=0.2, finish=lambda w: w[:, :1])},
            ValueError,
            "ridge_rider: finish must return a tensor like the state, (8, 2)",
        ),
        ({"archive": 3}, TypeError, "ridge_rider: archive must be None or an Archive; got int"),
        ({"losses": wells}, ValueError, "ridge_rider: losses must be None with EigenRidges"),
        ({"should_stop": True}, TypeError, "ridge_rider: should_stop must be None or callable; got bool"),
    ],
)
def test_bad_arguments(options, error, message):
    arguments = {"problem": wells, "start": torch.zeros(2, dtype=F64), "method": EigenRidges(step=0.2), **options}
    with pytest.raises(error) as caught:
        ridge_rider(arguments.pop("problem"), arguments.pop("start"), arguments.pop("method"), **arguments)
    assert message in str(caught.value)


def plane(x):
    return 2 * x - x**3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"key": "losses"}, ValueError, "ridge_rider: key must not be losses where there are none"),
        ({"losses": lambda x: ()}, ValueError, "ridge_rider: losses must return a tensor of shape (B,)"),
        ({"losses": lambda x: (1.0, 2.0)}, ValueError, "ridge_rider: losses must return a tensor of shape (B,)"),
        ({"losses": lambda x: (x[:, 0], x)}, ValueError, "ridge_rider: losses must return a tensor of shape (B,)"),
        ({"losses": lambda x: x[:, 0] / 0}, ValueError, "ridge_rider: losses must be finite at a finite state"),
        ({"ride": lambda x: x[:, :1]}, ValueError, "ridge_rider: ride must return a tensor like the state, (4, 2)"),
        ({"ride": lambda x: x.float()}, ValueError, "ridge_rider: ride must return a tensor like the state, (4, 2)"),
        ({"ride": lambda x: None}, TypeError, "ridge_rider: ride must return a tensor like the state; got None"),
    ],
)
def test_bad_arguments_of_a_search_by_exponents(options, error, message):
    ride = options.get("ride")
    method = LyapunovBranches(max_steps=3, ascent_steps=1, sizes=(1.0,), ride=ride)
    start = torch.tensor([[0.5, 0.4]], dtype=F64)
    with pytest.raises(error) as caught:
        ridge_rider(plane, start, method, **{name: value for name, value in options.items() if name != "ride"})
    assert message in str(caught.value)


def test_a_ride_by_the_map_of_another_game_is_refused():
    method = LyapunovBranches(ride=sgd_map(ipd(), 1.0))
    with pytest.raises(ValueError, match="ride must be a map of 2 parameters, as the problem; got one of 10"):
        ridge_rider(sgd_map(small_ipd(), 1.0), None, method)


def still(x):
    return x + 0 * x**2


@pytest.mark.parametrize(("name", "value", "count"), [("distance", 1.0, 1), ("distance", 0.99, 2)])
def test_solutions_at_the_distance_are_one(name, value, count):
    method = LyapunovBranches(max_steps=1, ascent_steps=0, sizes=(0.5,))
    found = ridge_rider(still, torch.zeros(1, 1, dtype=F64), method, max_depth=1, **{name: value})
    assert len(found.solutions) == count


@pytest.mark.parametrize(("bound", "status"), [(4.0, BranchStatus.converged), (3.99, BranchStatus.diverged)])
def test_a_branch_at_the_bound_has_not_diverged(bound, status):
    method = LyapunovBranches(max_steps=2, ascent_steps=0, sizes=(4.0,))
    found = ridge_rider(still, torch.zeros(1, 1, dtype=F64), method, max_depth=1, divergence=bound)
    assert {branch.status for branch in found.branches} == {status}


def test_all_of_the_steps_allowed_are_taken():
    method = LyapunovBranches(max_steps=5, ascent_steps=0, sizes=(0.5,))
    start = torch.zeros(1, 2, dtype=F64)
    assert ridge_rider(plane, start, method, max_depth=1, max_steps=6).num_steps == 6
    assert ridge_rider(plane, start, method, max_depth=1, max_steps=5).num_steps == 4


def test_depth_first_begins_with_the_leading_direction_of_the_first_start():
    start = torch.zeros(2, 2, dtype=F64)
    start[1] = 0.1
    found = ridge_rider(wells, start, EigenRidges(step=0.2, max_steps=1), order="depth", max_branches=1)
    assert [b.id for b in found.branches if b.steps] == [0]
    assert (found.branches[0].start, found.branches[0].rank, found.branches[0].sign) == (0, 0, 1)


def test_a_key_keeps_its_width():
    method = LyapunovBranches(max_steps=3, ascent_steps=0, sizes=(0.5, 1.0))
    widths = iter([2, 1])
    with pytest.raises(ValueError, match="key must return 2 columns, as it did before"):
        ridge_rider(plane, torch.zeros(1, 2, dtype=F64), method, key=lambda x: x[:, : next(widths)], batch_size=2)


@pytest.mark.parametrize("finish", [None, 0.3])
def test_a_loss_of_one_parameter(finish):
    method = EigenRidges(step=0.05, finish=finish)
    found = ridge_rider(wells, torch.zeros(1, dtype=F64), method)
    assert sorted(round(solution.state.item()) for solution in found.solutions) == [-1, 1]


def test_starts_are_memory_of_the_archive_without_graph():
    start = torch.tensor([[0.5, 0.4]], dtype=F64, requires_grad=True)
    by_exponents = LyapunovBranches(max_steps=3, ascent_steps=1)
    for problem, method in ((plane, by_exponents), (wells, EigenRidges(step=0.2, max_steps=3))):
        found = ridge_rider(problem, start, method, max_branches=2)
        wanted = start.detach().clone()
        with torch.no_grad():
            start.add_(1.0)
        assert torch.equal(found.starts, wanted)
        assert torch.equal(copy.deepcopy(found).starts, wanted)
    with torch.inference_mode():
        start = torch.zeros(1, 2, dtype=F64)
    assert ridge_rider(plane, start, by_exponents, max_branches=2).solutions


def test_a_search_under_no_grad_is_the_same():
    step, method = sgd_map(small_ipd(), 1.0), LyapunovBranches(max_steps=3, ascent_steps=3)
    start = torch.tensor([0.5, 0.5], dtype=F64)
    wanted = ridge_rider(step, start, method, max_depth=1)
    with torch.no_grad():
        found = ridge_rider(step, start, method, max_depth=1)
    assert [b.state.tolist() for b in found.bifurcations] == [b.state.tolist() for b in wanted.bifurcations]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EigenRidges(step=0.0), "EigenRidges: step must be > 0; got 0.0"),
        (lambda: EigenRidges(min_overlap=2.0), "EigenRidges: min_overlap must be in (0, 1]; got 2.0"),
        (lambda: EigenRidges(finish=-1.0), "EigenRidges: finish must be > 0 for a learning rate; got -1.0"),
        (lambda: EigenRidges(repeated="two"), "EigenRidges: repeated must be one or all; got 'two'"),
        (lambda: LyapunovBranches(sizes=(0.5, -1.0)), "LyapunovBranches: sizes[1] must be > 0; got -1.0"),
        (lambda: LyapunovBranches(horizon=0), "LyapunovBranches: horizon must be >= 1; got 0"),
        (lambda: LyapunovBranches(directions="up"), "LyapunovBranches: directions must be lyapunov or eigenvectors"),
    ],
)
def test_bad_methods(make, message):
    with pytest.raises(ValueError) as caught:
        make()
    assert message in str(caught.value)


def test_an_archive_goes_on_with_what_it_came_from_only():
    method = EigenRidges(step=0.2)
    found = ridge_rider(wells, torch.zeros(2, dtype=F64), method, max_depth=1)
    with pytest.raises(ValueError, match=r"step must be that of the archive, 0\.2; got 0\.1"):
        ridge_rider(wells, None, EigenRidges(step=0.1), archive=found)
    with pytest.raises(ValueError, match="start must be that of the archive"):
        ridge_rider(wells, torch.ones(2, dtype=F64), method, archive=found)
    with pytest.raises(ValueError, match="start must be that of the archive"):
        ridge_rider(wells, torch.zeros(2), method, archive=found)
    with pytest.raises(ValueError, match="finish must be that of the archive, None; got 'function'"):
        ridge_rider(wells, None, EigenRidges(step=0.2, finish=torch.clone), archive=found)
    lost = torch.full((2,), torch.nan, dtype=F64)
    again = ridge_rider(wells, lost, method, archive=ridge_rider(wells, lost, method))
    assert [b.status for b in again.bifurcations] == [BranchStatus.non_finite]
