"""The loops that play games, against recurrences written out by hand."""

import cmath
import math
import sys
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from cases import F64, normal
from game_cases import ModuleGame, SmoothGame
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import nestopt_ext as nx
from nestopt_ext import games
from nestopt_ext.games import PlayStatus, alternating, simultaneous

RECOMMENDED = cmath.rect(0.9, math.pi / 8)


def sgd(lr):
    return lambda params: torch.optim.SGD(params, lr=lr)


def complex_sgd(lr, momentum):
    return lambda params: nx.ComplexSGD(params, lr=lr, momentum=momentum)


class Coupled:
    """Two vectors with L_1 = x' M y + |x|^4 / 4 + 1/2 |x|^2 and L_2 = -x' M y + sum cos(y) x_1; nothing symmetric."""

    def __init__(self):
        self.m = normal(0, 3, 2)
        self.players = [(0.3 * normal(i, n)).requires_grad_() for i, n in ((1, 3), (2, 2))]

    def losses(self, players):
        x, y = players
        pull = x @ self.m @ y
        return pull + x.square().sum() ** 2 / 4 + x.square().sum() / 2, -pull + y.cos().sum() * x[0]

    def gradients(self, x, y):
        first = self.m @ y + x.square().sum() * x + x
        return first, -self.m.T @ x - y.sin() * x[0]


# ---- the recurrences of complex momentum -----------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [RECOMMENDED, 0.9, -0.3, 0.5j])
@pytest.mark.parametrize("together", [True, False])
def test_the_loops_are_the_published_recurrences(beta, together):
    """mu <- beta mu - g; w <- w + Re(lr mu), both players from the same point, or the second seeing the first move."""
    lr, steps = 0.05, 40
    game = Coupled()
    x, y = (p.detach().clone() for p in game.players)
    mu = [torch.zeros(3, dtype=torch.complex128), torch.zeros(2, dtype=torch.complex128)]
    wanted = [torch.cat([x, y])]
    for _ in range(steps):
        mu[0] = beta * mu[0] - game.gradients(x, y)[0]
        new_x = x + (lr * mu[0]).real
        mu[1] = beta * mu[1] - game.gradients(x if together else new_x, y)[1]
        x, y = new_x, y + (lr * mu[1]).real
        wanted.append(torch.cat([x, y]))
    play = simultaneous if together else alternating
    played = play(game, complex_sgd(lr, beta), steps)
    torch.testing.assert_close(torch.cat(played.recorded, dim=1), torch.stack(wanted), rtol=1e-12, atol=1e-14)
    assert played.steps.tolist() == list(range(steps + 1))
    assert (played.num_steps, played.num_gradients) == (steps, steps)
    assert played.status is PlayStatus.completed


def test_in_turn_each_player_sees_those_before_it_moved():
    """Three players whose gradients are the others' values: a step of 1 shows who saw what."""

    class Watching:
        players = tuple(torch.zeros((), dtype=F64, requires_grad=True) for _ in range(3))

        def losses(self, players):
            a, b, c = players
            return a * -1.0, b * (a - 1).detach() * -1.0, c * (10 * a + b).detach() * -1.0

    played = alternating(Watching(), sgd(1.0), 2)
    # a: 1, 2.  b adds a - 1 with the new a: 0, 1.  c adds 10 a + b with the new both: 10, 10 + 21.
    assert torch.stack(played.recorded, dim=1).tolist() == [[0, 0, 0], [1, 0, 10], [2, 1, 31]]


@pytest.mark.parametrize(
    ("beta", "lr", "play", "fewest", "most"),
    [
        (RECOMMENDED, 0.059, simultaneous, 600, 750),
        (RECOMMENDED, 0.058, alternating, 600, 750),
        (cmath.rect(0.9, math.pi / 16), 0.026, simultaneous, 430, 530),
        (-0.08, 1.78, alternating, 15, 40),
    ],
)
def test_steps_to_solve_the_bilinear_game(beta, lr, play, fewest, most):
    game = games.bilinear(start=([1.0], [0.0]))
    played = play(game, complex_sgd(lr, beta), 2000, tolerance=1e-6, record_every=None)
    assert played.status is PlayStatus.converged
    assert fewest <= played.num_steps <= most
    assert played.num_gradients == played.num_steps == played.converged_at.item()
    assert math.hypot(*(p.item() for p in game.players)) <= 1e-6


@pytest.mark.parametrize("beta", [0.9, 0.5, 0.0, -0.3, -0.9])
def test_no_real_momentum_solves_the_bilinear_game_simultaneously(beta):
    game = games.bilinear(start=([1.0], [0.0]))
    played = simultaneous(game, complex_sgd(1.0, beta), 1000, tolerance=1e-6, divergence=100, record_every=None)
    assert played.status is PlayStatus.diverged
    assert played.failed_at.item() == played.num_steps
    assert max(abs(v.item()) for v in (*game.players, *played.losses[-1])) > 100


@pytest.mark.parametrize(("beta", "status"), [(-0.3, PlayStatus.converged), (0.3, PlayStatus.diverged)])
def test_negative_momentum_solves_the_bilinear_game_in_turn(beta, status):
    game = games.bilinear(start=([1.0], [0.0]))
    played = alternating(game, complex_sgd(0.5, beta), 1000, tolerance=1e-6, divergence=100, record_every=None)
    assert played.status is status


def test_lola_cooperates_where_naive_learners_defect():
    losses = {}
    for name, direction in (("naive", None), ("lola", partial(games.lola, lr=1.0))):
        game = games.ipd(batch=50, generator=0)
        simultaneous(game, sgd(1.0), 100, direction=direction, record_every=None)
        losses[name] = torch.stack(game.per_round(game.players)).detach()
    assert losses["naive"].mean() > 1.95
    assert losses["naive"].min() > 1.8
    assert losses["lola"].mean() < 1.2
    # tit-for-tat: player 1 answers the second letter of CC, CD, DC, DD
    after = torch.sigmoid(game.players[0]).mean(0)
    assert after[1] > 0.8 > 0.3 > after[2]
    assert after[3] > 0.8 > 0.3 > after[4]


# ---- optimizers of every kind ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [True, False])
def test_extragradient_takes_its_second_gradient_where_it_looked(together):
    lr, game = 0.1, Coupled()
    x, y = (p.detach().clone() for p in game.players)
    for _ in range(5):
        if together:
            ahead = [w - lr * g for w, g in zip((x, y), game.gradients(x, y), strict=True)]
            x, y = (w - lr * g for w, g in zip((x, y), game.gradients(*ahead), strict=True))
        else:
            x = x - lr * game.gradients(x - lr * game.gradients(x, y)[0], y)[0]
            y = y - lr * game.gradients(x, y - lr * game.gradients(x, y)[1])[1]
    play = simultaneous if together else alternating
    played = play(game, lambda params: nx.optim.ExtraSGD(params, lr=lr), 5)
    torch.testing.assert_close([p.detach() for p in game.players], [x, y], rtol=1e-12, atol=0)
    assert played.num_gradients == 10


def test_beside_an_extragradient_player_a_plain_one_steps_from_where_it_stands():
    lr, game = 0.1, Coupled()
    x, y = (p.detach().clone() for p in game.players)
    first, second = game.gradients(x, y)
    wanted = [x - lr * game.gradients(x - lr * first, y)[0], y - lr * second]
    optimizers = [nx.optim.ExtraSGD([game.players[0]], lr=lr), torch.optim.SGD([game.players[1]], lr=lr)]
    played = simultaneous(game, optimizers, 1)
    torch.testing.assert_close([p.detach() for p in game.players], wanted, rtol=1e-12, atol=0)
    assert played.num_gradients == 2


@pytest.mark.parametrize("together", [True, False])
def test_a_closure_sees_the_others_where_the_step_began(together):
    """LBFGS evaluates again and again; simultaneous play must not show it what the others did in this step."""
    game, mirror = Coupled(), Coupled()
    options = {"lr": 0.5, "max_iter": 3}
    optimizers = [torch.optim.LBFGS([game.players[0]], **options), torch.optim.SGD([game.players[1]], lr=0.1)]
    played = (simultaneous if together else alternating)(game, optimizers, 4)

    x, y = (p.detach().clone().requires_grad_() for p in mirror.players)
    lbfgs = torch.optim.LBFGS([x], **options)
    evaluations = 0

    def closure():
        nonlocal evaluations
        evaluations += 1
        loss = mirror.losses((x, y))[0]
        (x.grad,) = torch.autograd.grad(loss, x)
        return loss

    for _ in range(4):
        before = x.detach().clone()
        lbfgs.step(closure)
        step = mirror.gradients(before if together else x.detach(), y.detach())[1]
        with torch.no_grad():
            y -= 0.1 * step
    torch.testing.assert_close([p.detach() for p in game.players], [x.detach(), y.detach()], rtol=1e-12, atol=0)
    assert played.num_gradients == evaluations > 4


def test_two_closures_at_once():
    game, mirror = Coupled(), Coupled()
    simultaneous(game, lambda params: torch.optim.LBFGS(params, lr=0.5, max_iter=2), 1)
    start = [p.detach().clone() for p in mirror.players]
    for i in range(2):
        own = start[i].clone().requires_grad_()
        players = [own if j == i else start[j] for j in range(2)]
        lbfgs = torch.optim.LBFGS([own], lr=0.5, max_iter=2)

        def closure(own=own, players=players, i=i):
            loss = mirror.losses(players)[i]
            (own.grad,) = torch.autograd.grad(loss, own)
            return loss

        lbfgs.step(closure)
        torch.testing.assert_close(game.players[i].detach(), own.detach(), rtol=1e-12, atol=0)


def test_networks_with_their_own_optimizers():
    torch.manual_seed(0)
    game = ModuleGame(1)
    outside = nn.Parameter(torch.ones(()))
    inner = game.losses
    game.losses = lambda players: tuple(loss * outside for loss in inner(players))
    optimizers = [torch.optim.Adam(p.parameters(), lr=0.01) for p in game.players[:2]]
    optimizers.append(torch.optim.SGD([game.players[2]], lr=0.01))
    before = [p.detach().clone() for p in game.first.parameters()]
    played = alternating(game, optimizers, 6, record_every=4, measure=lambda players: players[2].square().sum())
    assert played.steps.tolist() == [0, 4, 6]
    assert played.recorded.shape == (3,)
    assert played.recorded[-1] == game.third.detach().square().sum()
    assert all(not torch.equal(a, b) for a, b in zip(before, game.first.parameters(), strict=True))
    assert outside.grad is None, "a gradient went to a tensor that is no player's"


def test_directions_replace_the_gradient():
    game = SmoothGame(3)
    direction = partial(games.lola, lr=0.1)
    game.players = game.players()
    wanted = [p.detach() for player in game.players for p in games.parameters(player)]
    found = direction(game.losses(game.players), game.players)
    wanted = [w - 0.1 * d for w, d in zip(wanted, [t for part in found for t in games.parameters(part)], strict=True)]
    simultaneous(game, sgd(0.1), 1, direction=direction)
    now = [p.detach() for player in game.players for p in games.parameters(player)]
    torch.testing.assert_close(now, wanted, rtol=1e-14, atol=0)


# ---- starts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("play", [simultaneous, alternating])
def test_batched_starts_are_independent_plays(play):
    options = {"tolerance": 1e-3, "record_every": None}
    batched = games.mixed([0.9, 0.5], batch=3, generator=0)
    starts = [p.detach().clone() for p in batched.players]
    together = play(batched, complex_sgd(0.04, RECOMMENDED), 600, **options)
    assert together.status is PlayStatus.converged
    assert together.losses.shape == (2, 2, 3)
    for b in range(3):
        single = games.mixed([0.9, 0.5], start=[s[b] for s in starts])
        alone = play(single, complex_sgd(0.04, RECOMMENDED), 600, **options)
        assert together.converged_at[b] == alone.converged_at
    assert together.num_steps == together.converged_at.max()


def test_a_start_that_fails_leaves_the_others_to_play_on():
    start = (torch.tensor([[1.0], [1e5], [math.nan], [0.1]]), torch.zeros(4, 1))
    game = games.bilinear(start=start)
    played = simultaneous(game, complex_sgd(0.059, RECOMMENDED), 3000, tolerance=1e-6, divergence=1e4)
    assert played.status is PlayStatus.non_finite
    assert played.failed_at.tolist() == [-1, 0, 0, -1]
    assert played.converged_at[[1, 2]].tolist() == [-1, -1]
    assert 600 <= played.converged_at[0] <= 750
    assert played.converged_at[3] < played.converged_at[0] == played.num_steps


@pytest.mark.parametrize("divergence", [1e6, None])
def test_a_nan_stops_the_play_at_its_step(divergence):
    class Bursting(Coupled):
        count = 0

        def losses(self, players):
            self.count += 1
            first, second = super().losses(players)
            return first, second * (math.nan if self.count == 4 else 1.0)

    played = simultaneous(Bursting(), sgd(0.01), 100, divergence=divergence)
    assert played.status is PlayStatus.non_finite
    assert (played.num_steps, played.failed_at.item()) == (3, 3)
    assert torch.isnan(played.losses[-1, 1])
    assert torch.isfinite(played.losses[:-1]).all()


def test_a_nan_after_convergence_is_not_hidden():
    class Late:
        players = (torch.tensor([[1.0], [1e-9]], requires_grad=True), torch.zeros(2, 1, requires_grad=True))
        solution = (torch.zeros(1), torch.zeros(1))
        count = 0

        def losses(self, players):
            self.count += 1
            x, y = (p.squeeze(1) for p in players)
            spoil = torch.tensor([1.0, math.nan if self.count == 3 else 1.0])
            return x * y * spoil, -x * y

    played = simultaneous(Late(), sgd(0.1), 5, tolerance=1e-6)
    assert played.status is PlayStatus.non_finite
    assert played.converged_at.tolist() == [-1, 0]
    assert played.failed_at.tolist() == [-1, 2]


def test_a_start_that_has_failed_cannot_converge_any_more():
    class Apart:
        players = (torch.tensor([[5.0], [1.0]], requires_grad=True),)
        solution = (torch.zeros(1),)

        def losses(self, players):
            return (players[0].square().sum(1) / 2,)

    played = simultaneous(Apart(), sgd(0.5), 100, tolerance=1e-3, divergence=3.0)
    assert played.status is PlayStatus.diverged
    assert (played.failed_at.tolist(), played.converged_at.tolist()) == ([0, -1], [-1, 10])


def test_without_a_solution_the_size_of_the_direction_counts():
    class Unsolved:
        known = games.mixed([0.9, 0.5], generator=0)
        players = known.players

        def losses(self, players):
            return self.known.losses(players)

    game = Unsolved()
    played = simultaneous(game, complex_sgd(0.04, RECOMMENDED), 600, tolerance=1e-3)
    assert played.status is PlayStatus.converged
    at = played.converged_at.item()
    norms = (torch.cat(played.recorded, dim=1) @ game.known.jacobian().T).norm(dim=1)
    assert norms[at] <= 1e-3 < norms[:at].min()
    assert played.num_steps == at + 1


# ---- what the loops leave behind -------------------------------------------------------------------------------------


@pytest.mark.parametrize("play", [simultaneous, alternating])
@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("failing", [2, 3, 4])
def test_a_fault_between_the_half_steps_brings_the_players_back(play, kind, failing):
    class Faulty(Coupled):
        evaluations = 0

        def losses(self, players):
            self.evaluations += 1
            if self.evaluations == failing:
                raise kind
            return super().losses(players)

    game = Faulty()
    optimizers = [nx.ExtraSGD([p], lr=0.1) for p in game.players]
    with pytest.raises(kind):
        play(game, optimizers, 5)
    assert not any(group["extrapolated"] for o in optimizers for group in o.param_groups)
    wanted = []
    for steps in range(3):  # each player is where it was after a whole number of steps
        reference = Coupled()
        play(reference, lambda params: nx.ExtraSGD(params, lr=0.1), steps)
        wanted.append([p.detach() for p in reference.players])
    for i, player in enumerate(game.players):
        assert any(torch.equal(player, at[i]) for at in wanted)
    assert play(game, optimizers, 3).num_steps == 3


@pytest.mark.parametrize("play", [simultaneous, alternating])
def test_an_autocast_around_the_loop_sees_the_players_move(play):
    class Cast:
        def __init__(self, inside):
            torch.manual_seed(0)
            self.players = [nn.Linear(2, 1), nn.Linear(1, 1)]
            self.inside = inside

        def losses(self, players):
            with torch.autocast("cpu", torch.bfloat16) if self.inside else nullcontext():
                score = players[1](players[0](torch.ones(1, 2))).float().sum()
            return [(score - 1) ** 2, -score]

    seen = []
    for around in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            seen.append(play(Cast(not around), sgd(0.1), 4, measure=lambda players: 0.0).losses)
    assert len(seen[0].unique(dim=0)) == 5
    assert torch.equal(seen[1], seen[0])


@pytest.mark.parametrize("play", [simultaneous, alternating])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, nx.ExtraSGD, torch.optim.LBFGS])
@pytest.mark.parametrize("direction", [None, partial(games.lola, lr=0.1)])
def test_the_graphs_of_a_step_are_gone_before_the_next_ones_are_made(play, optimizer, direction):
    class Counting(Coupled):
        graphs: tuple = ()
        most = 0

        def losses(self, players):
            self.graphs = [g for g in self.graphs if not g.expired()]
            self.most = max(self.most, len(self.graphs))
            kept = players[0].exp()  # its backward needs its result
            self.graphs.append(StorageWeakRef(kept.untyped_storage()))
            return [loss + kept.square().sum() for loss in super().losses(players)]

    game = Counting()
    play(game, lambda params: optimizer(params, lr=0.01), 3, direction=direction)
    assert game.most == 0


# ---- records ---------------------------------------------------------------------------------------------------------


def test_records():
    game = games.bilinear(2, generator=0)
    played = simultaneous(game, sgd(0.1), 7, record_every=3)
    assert played.steps.tolist() == [0, 3, 6, 7]
    assert [t.shape for t in played.recorded] == [(4, 2), (4, 2)]
    assert all(torch.equal(t[-1], p.detach()) for t, p in zip(played.recorded, game.players, strict=True))
    torch.testing.assert_close(played.losses[:, 0], (played.recorded[0] * played.recorded[1]).sum(1))
    torch.testing.assert_close(played.losses[:, 1], -played.losses[:, 0])
    assert simultaneous(game, sgd(0.1), 7, record_every=None).steps.tolist() == [0, 7]
    still = simultaneous(game, sgd(0.1), 0)
    assert (still.steps.tolist(), still.num_gradients) == ([0], 0)


def test_measures_may_be_numbers_tensors_or_several():
    def measure(players):
        return {"sum": players[0].sum().item(), "eigenvalues": torch.linalg.eigvals(game.jacobian())}

    game = games.bilinear(2, generator=0)
    played = simultaneous(game, sgd(0.1), 2, measure=measure)
    assert played.recorded["sum"].shape == (3,)
    assert played.recorded["eigenvalues"].shape == (3, 4)
    assert simultaneous(game, sgd(0.1), 2, measure=lambda players: (1.0, 2)).recorded[1].tolist() == [2, 2, 2]
    one = simultaneous(game, sgd(0.1), 2, measure=lambda players: np.float32(0.5))
    assert one.recorded.tolist() == [0.5, 0.5, 0.5]
    with pytest.raises(TypeError, match=r"simultaneous: measure\(players\) must be a Tensor"):
        simultaneous(game, sgd(0.1), 2, measure=lambda players: "many")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((torch.zeros(2), torch.zeros(3)), r"measure\(players\) must have the shape .* \(2,\); got \(3,\)"),
        (([1.0], [1.0, 2.0]), r"measure\(players\) must have 1 tensors; got 2"),
        (({"a": 1.0}, {"b": 1.0}), r"measure\(players\) must have the keys \['a'\]; got \['b'\]"),
    ],
)
def test_a_measure_that_changes_is_refused_when_it_does(values, message):
    found = iter(values)
    with pytest.raises(ValueError, match=message):
        simultaneous(games.bilinear(generator=0), sgd(0.1), 1000, measure=lambda players: next(found))


def test_trajectories_are_equal_only_to_themselves():
    one, other = (simultaneous(games.bilinear(generator=0), sgd(0.1), 1) for _ in range(2))
    assert one == one
    assert one != other


def test_records_do_not_share_the_players_memory():
    game = games.bilinear(generator=0)
    played = simultaneous(game, sgd(0.1), 1, measure=lambda players: players[0])
    kept = played.recorded.clone()
    with torch.no_grad():
        game.players[0].fill_(7)
    assert torch.equal(played.recorded, kept)


def test_on_a_device(device):
    """Where the host looks once in ten steps, the step that is named is still the right one."""
    reference = simultaneous(
        games.bilinear(start=([1.0], [0.0])), complex_sgd(0.059, RECOMMENDED), 1000, tolerance=1e-6, record_every=100
    )
    game = games.bilinear(start=([1.0], [0.0]), device=device)
    played = simultaneous(game, complex_sgd(0.059, RECOMMENDED), 1000, tolerance=1e-6, record_every=100)
    assert played.status is PlayStatus.converged
    assert played.converged_at == reference.converged_at
    assert played.converged_at <= played.num_steps < played.converged_at + 10
    assert played.losses.device.type == played.recorded[0].device.type == "cpu"


def test_between_looks_the_right_step_is_still_named(monkeypatch):
    from nestopt_ext.games import _watch

    class Rarely(_watch.Watch):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self._look_every = 10

    monkeypatch.setattr("nestopt_ext.games.play.Watch", Rarely)
    game = games.bilinear(start=([1.0], [0.0]))
    played = simultaneous(game, complex_sgd(0.059, RECOMMENDED), 1000, tolerance=1e-6)
    assert (played.converged_at.item(), played.num_steps) == (677, 680)


# ---- progress --------------------------------------------------------------------------------------------------------


class Terminal:
    def __init__(self):
        self.text = ""

    def isatty(self):
        return True

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_progress_is_shown_on_a_terminal_only(monkeypatch):
    pytest.importorskip("tqdm")
    for progress, terminal in ((True, Terminal()), (False, Terminal())):
        monkeypatch.setattr(sys, "stderr", terminal)
        simultaneous(games.bilinear(generator=0), sgd(0.1), 3, progress=progress)
        assert ("simultaneous" in terminal.text) is progress


def test_a_missing_tqdm_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    simultaneous(games.bilinear(generator=0), sgd(0.1), 3, progress=True)
    assert "tqdm is not installed" in terminal.text


# ---- bad arguments ---------------------------------------------------------------------------------------------------


def make_bad():
    game = games.bilinear(generator=0)
    x, y = game.players
    other = torch.ones(1, requires_grad=True)

    def held(*tensors):
        return torch.optim.SGD(tensors, lr=0.1)

    return [
        ((object(), sgd(0.1), 1), {}, TypeError, "game must have players and losses"),
        ((game, held(x), 1), {}, TypeError, "optimizers must be a list with one optimizer"),
        ((game, [held(x)], 1), {}, ValueError, "optimizers must have 2 entries"),
        ((game, [held(x), "sgd"], 1), {}, TypeError, r"optimizers\[1\] must be a torch.optim.Optimizer; got str"),
        (
            (game, [held(y), held(x)], 1),
            {},
            ValueError,
            r"optimizers\[0\] must hold exactly the tensors of players\[0\]",
        ),
        ((game, [held(x, other), held(y)], 1), {}, ValueError, r"optimizers\[0\] must hold exactly .* 1 tensors more"),
        ((game, lambda p: p, 1), {}, TypeError, r"optimizers\[0\] must be a torch.optim.Optimizer; got list"),
        ((game, sgd(0.1), 1.5), {}, TypeError, "num_steps must be an int"),
        ((game, sgd(0.1), -1), {}, ValueError, "num_steps must be at least 0"),
        ((game, sgd(0.1), 1), {"record_every": 0}, ValueError, "record_every must be at least 1"),
        ((game, sgd(0.1), 1), {"tolerance": -1.0}, ValueError, "tolerance must be finite and >= 0"),
        ((game, sgd(0.1), 1), {"divergence": math.nan}, ValueError, "divergence must be finite and >= 0"),
        ((game, sgd(0.1), 1), {"direction": 3}, TypeError, "direction must be None or callable"),
        ((game, sgd(0.1), 1), {"measure": 3}, TypeError, "measure must be None or callable"),
        (
            (game, sgd(0.1), 1),
            {"direction": lambda losses, players: [players[0]]},
            TypeError,
            r"direction\(losses, players\) must be a list or tuple with one entry for each of the 2 players",
        ),
    ]


@pytest.mark.parametrize("play", [simultaneous, alternating])
@pytest.mark.parametrize("case", range(len(make_bad())))
def test_bad_arguments_are_refused_by_name(play, case):
    arguments, options, kind, message = make_bad()[case]
    game = arguments[0]
    before = [p.detach().clone() for p in getattr(game, "players", [])]
    with pytest.raises(kind, match=f"^{play.__name__}: {message}"):
        play(*arguments, **options)
    assert all(torch.equal(a, b) for a, b in zip(before, getattr(game, "players", []), strict=True))


def test_a_solution_of_other_shapes_is_refused():
    class Wrong(Coupled):
        solution = (torch.zeros(2), torch.zeros(2))

    with pytest.raises(ValueError, match=r"game.solution must have the shapes of the players.*players\[0\]"):
        simultaneous(Wrong(), sgd(0.1), 1, tolerance=0.1)
    Wrong.solution = (torch.zeros(()), torch.zeros(()))  # right for three and two starts, but here is one
    with pytest.raises(ValueError, match=r"game.solution must have the shapes of the players.*players\[0\]"):
        simultaneous(Wrong(), sgd(0.1), 1, tolerance=0.1)
