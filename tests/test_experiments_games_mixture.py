"""The mixture experiment: batched trainings against one GAN and real optimizers, scores, resuming, what is reported."""

import dataclasses
import json
import math

import pytest
import torch

import nestopt_ext as nx
from nestopt_ext._checkpoint import CheckpointError
from nestopt_ext.experiments.config import ConfigError
from nestopt_ext.experiments.games import mixture_plots
from nestopt_ext.experiments.games.mixture import mixture, num_pieces
from nestopt_ext.experiments.games.mixture_config import HEAT_MAP, QUICK, SAMPLES, Cell, MixtureConfig
from nestopt_ext.experiments.games.mixture_gan import PLAYERS, MixtureGame, Ring, Run, Stream, Trainings, networks
from nestopt_ext.experiments.games.mixture_report import findings, table_rows
from nestopt_ext.experiments.games.mixture_results import TEST, TUNING, MixtureResult, Outcome
from nestopt_ext.experiments.games.mixture_scores import coverage
from nestopt_ext.experiments.tune import Interrupted
from nestopt_ext.games import game_jacobian, gradients

TINY = MixtureConfig(
    moduli=(0.0, 0.8),
    angles=(0.0, 1 / 8, 1.0),
    lrs=(0.02, 0.1),
    tuning_seeds=2,
    test_seeds=2,
    steps=12,
    evaluations=3,
    batch_size=8,
    width=4,
    noise_dim=2,
    samples=60,
    batch_runs=5,
    threads=1,
)
MOMENTA = [Cell(0.0, 0.0), Cell(0.9, 0.0), Cell(0.9, 1.0), Cell(0.8, 1 / 8), Cell(0.9, 1 / 2)]


def plain_optimizers(config, cell, lr, players):
    """What the experiment claims to run, one optimizer for each player."""
    generator, discriminator = (list(player.parameters()) for player in players)
    if config.optimizer == "complex-sgd":
        return [nx.ComplexSGD(params, lr=cell.lr(lr), momentum=cell.momentum) for params in (generator, discriminator)]
    return [
        nx.ComplexAdam(generator, lr=lr, betas=(0.0, 0.999)),
        nx.ComplexAdam(discriminator, lr=cell.lr(lr), betas=(cell.momentum, 0.999)),
    ]


def train_alone(config, run, steps):
    """One GAN of ordinary modules; each step sees a game on the next batch of its seed."""
    players = [player.double() for player in networks(config, run.seed)]
    optimizers = plain_optimizers(config, run.cell, run.effective_lr, players)
    stream = Stream(config, [run.seed], torch.float64)
    for _ in range(steps):
        noise, real = (batch[0] for batch in stream.next())
        game = MixtureGame(config.loss, players, noise, real)
        for player, gradient in zip(players, gradients(game.losses(game.players), game.players), strict=True):
            for p, g in zip(player.parameters(), gradient, strict=True):
                p.grad = g
        for optimizer in optimizers:
            optimizer.step()
    return [dict(player.named_parameters()) for player in players]


@pytest.mark.parametrize("optimizer", ["complex-sgd", "complex-adam"])
@pytest.mark.parametrize("loss", ["non-saturating", "minimax"])
def test_a_batched_training_is_a_gan_trained_by_our_optimizers(optimizer, loss):
    config = dataclasses.replace(TINY, optimizer=optimizer, loss=loss)
    lr = 0.05 if optimizer == "complex-sgd" else 0.003
    runs = [Run(cell, lr, seed) for cell in MOMENTA for seed in (3, 8)]
    trainings = Trainings(config, runs, torch.float64)
    start = {player: {n: w.clone() for n, w in weights.items()} for player, weights in trainings.weights.items()}
    for _ in range(60):  # more than one block of noise
        trainings.step()
    for row, run in enumerate(runs):
        alone = train_alone(config, run, 60)
        for player, expected in zip(PLAYERS, alone, strict=True):
            for name, weight in expected.items():
                torch.testing.assert_close(trainings.weights[player][name][row], weight.detach(), rtol=1e-9, atol=1e-11)
                assert not torch.equal(weight, start[player][name][row])


def test_a_training_does_not_feel_its_neighbours():
    """Among them one that overflows."""
    runs = [
        Run(cell, lr, seed)
        for cell, lr, seed in zip(MOMENTA, (0.1, 0.05, 1e200, 0.1, 0.02), (4, 1, 1, 7, 4), strict=True)
    ]
    together = Trainings(TINY, runs, torch.float64)
    for _ in range(15):
        together.step()
    assert together.finite().tolist() == [True, True, False, True, True]
    for row, run in enumerate(runs):
        alone = Trainings(TINY, [run], torch.float64)
        for _ in range(15):
            alone.step()
        assert alone.finite().tolist() == [row != 2]
        if row != 2:
            torch.testing.assert_close(alone.generate(20)[0], together.generate(20)[row], rtol=1e-11, atol=1e-13)


def test_a_seed_fixes_weights_and_examples():
    stream, other = Stream(TINY, [5, 9]), Stream(TINY, [9])
    for _ in range(51):
        (noise, real), (again, same) = stream.next(), other.next()
    assert torch.equal(noise[1], again[0]) and torch.equal(real[1], same[0])
    assert not torch.equal(noise[0], noise[1])
    assert noise.shape == (2, TINY.batch_size, TINY.noise_dim) and real.shape == (2, TINY.batch_size, 2)
    state = torch.get_rng_state()
    first, again, another = networks(TINY, 5), networks(TINY, 5), networks(TINY, 6)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b, c in zip(first, again, another, strict=True):
        assert torch.equal(a[0].weight, b[0].weight) and not torch.equal(a[0].weight, c[0].weight)


def test_examples_are_the_ring():
    config = dataclasses.replace(TINY, batch_size=4096, modes=4, radius=2.0, std=0.05)
    stream = Stream(config, [0], torch.float64)
    points = stream.next()[1]
    scores = coverage(points, Ring.of(config), 0.2)
    assert scores.modes.tolist() == [4]
    assert scores.quality.item() == pytest.approx(1 - math.exp(-4.5), abs=0.005)  # a 2-D Gaussian within 3 std
    expected = torch.tensor([[2.0, 0], [0, 2], [-2, 0], [0, -2]], dtype=torch.float64)
    torch.testing.assert_close(Ring.of(config).means, expected)
    right = points[0][(points[0] - expected[0]).norm(dim=1) < 0.5]
    assert float(right.std(0).mean()) == pytest.approx(0.05, rel=0.1)


# Scores

RING = Ring.of(dataclasses.replace(TINY, modes=8))


def test_all_modes_in_equal_shares():
    scores = coverage(RING.means.repeat(5, 1), RING, 0.1)
    assert (scores.modes.item(), scores.quality.item()) == (8, 1.0)
    assert scores.js.item() == pytest.approx(0, abs=1e-12)


def test_a_mode_needs_its_share_and_three_deviations():
    near, far = RING.means[1] + torch.tensor([0.0, 0.29]), RING.means[2] + torch.tensor([0.31, 0.0])
    points = torch.stack([RING.means[0]] * 90 + [near] * 6 + [far] * 4)
    assert coverage(points, RING, 0.05).modes.item() == 2
    assert coverage(points, RING, 0.07).modes.item() == 1
    assert coverage(points, RING, 0.01).quality.item() == pytest.approx(0.96)


def test_js_has_its_closed_forms():
    nowhere = torch.full((10, 2), 5.0)
    one, half = RING.means[:1].repeat(8, 1), RING.means[:4]
    values = coverage(torch.stack([nowhere[:8], one, half.repeat(2, 1)]), RING, 0.01).js.tolist()
    kl = [math.log2(16 / 9), (math.log2(2 / 9) + 7) / 8]  # one mode of eight: middles 9/16 and 1/16
    assert values[0] == pytest.approx(1)
    assert values[1] == pytest.approx(sum(kl) / 2)
    assert values[2] == pytest.approx((math.log2(4 / 3) + (math.log2(2 / 3) + 1) / 2) / 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_point_that_is_not_finite_spoils_its_set_alone(bad):
    points = RING.means.repeat(2, 1, 1)
    points[0, 3, 1] = bad
    scores = coverage(points, RING, 0.1)
    assert scores.modes.tolist() == [0, 8]
    assert scores.quality.tolist() == [0, 1]
    assert scores.js.tolist() == pytest.approx([1, 0])


# The experiment


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    return mixture(TINY, folder), folder


def test_every_momentum_runs_at_every_rate_and_then_at_its_best(finished):
    result, _ = finished
    cells = [Cell(0.0, 0.0), Cell(0.8, 0.0), Cell(0.8, 1 / 8), Cell(0.8, 1.0)]
    assert [r.cell for r in result.cells] == cells
    for r in result.cells:
        assert [(o.effective_lr, o.seed) for o in r.tuning] == [(0.02, 0), (0.02, 1), (0.1, 0), (0.1, 1)]
        assert [(o.effective_lr, o.seed) for o in r.test] == [(r.effective_lr, 2), (r.effective_lr, 3)]
        merits = [[(o.modes, o.quality) for o in r.tuning if o.effective_lr == lr] for lr in TINY.lrs]
        means = [tuple(sum(column) / 2 for column in zip(*pairs, strict=True)) for pairs in merits]
        assert r.effective_lr == TINY.lrs[means.index(max(means))]
        for o in r.tuning + r.test:
            assert nx.effective_lr(o.lr, r.cell.momentum) == pytest.approx(o.effective_lr)
            assert o.modes == pytest.approx(sum(o.curve[1:]) / 2) and len(o.curve) == 3
    table = table_rows(result)
    assert [row[0] for row in table[1]].count("0.8 exp(iπ/8)") == 1 and len(table[1]) == len(cells)
    assert all(len(row) == len(table[0]) for row in table[1])


def test_the_log_tells_every_training(finished):
    result, folder = finished
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["config"] + ["training"] * len(result.outcomes) + ["finding"] * len(
        findings(result)
    )
    told = [
        {name: value for name, value in line.items() if name != "event"} for line in lines[1 : -len(findings(result))]
    ]
    assert told == [dataclasses.asdict(outcome) for outcome in result.outcomes]


@pytest.mark.parametrize("looks", [1, 7, 14])
def test_an_interrupted_run_resumes_to_the_same_numbers(finished, tmp_path, looks):
    result, folder = finished
    asked = iter(range(10**6))
    with pytest.raises(Interrupted):
        mixture(TINY, tmp_path, should_stop=lambda: next(asked) == looks)
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write("a line that no checkpoint counts\n")
    progress = Pieces()
    resumed = mixture(TINY, tmp_path, resume=True, progress=progress)
    assert resumed.outcomes == result.outcomes
    for player in PLAYERS:
        for name, weights in result.weights[player].items():
            assert torch.equal(resumed.weights[player][name], weights)
    assert (tmp_path / "log.jsonl").read_bytes() == (folder / "log.jsonl").read_bytes()
    assert progress.pieces == num_pieces(TINY)


class Pieces:
    def __init__(self):
        self.pieces = 0

    def stage(self, label):
        pass

    def advance(self, steps, note=""):
        self.pieces += steps


def test_threads_change_no_number(finished, tmp_path):
    result, _ = finished
    before = torch.get_num_threads()
    shared = mixture(dataclasses.replace(TINY, threads=3), tmp_path)
    assert shared.outcomes == result.outcomes
    for name, weights in result.weights["generator"].items():
        assert torch.equal(shared.weights["generator"][name], weights)
    assert torch.get_num_threads() == before


def test_threads_all_stop_when_asked():
    progress = Pieces()
    with pytest.raises(Interrupted):
        mixture(dataclasses.replace(TINY, threads=3), should_stop=lambda: True, progress=progress)
    assert progress.pieces <= 3 * TINY.batch_runs < num_pieces(TINY)


def test_a_finished_run_can_be_read_again(finished):
    result, folder = finished
    again = mixture(TINY, folder, resume=True, should_stop=lambda: True)
    assert again.outcomes == result.outcomes


def test_another_checkpoint_is_refused(finished, tmp_path):
    _, folder = finished
    with pytest.raises(CheckpointError, match="there already"):
        mixture(TINY, folder)
    with pytest.raises(CheckpointError, match=r"was made with std 0\.\d+, but the configuration to resume has 0\.2"):
        mixture(dataclasses.replace(TINY, std=0.2), folder, resume=True)
    with pytest.raises(CheckpointError, match="output must be given"):
        mixture(TINY, resume=True)


def damage(state, what):
    if what == "order":
        state["outcomes"][0], state["outcomes"][-1] = state["outcomes"][-1], state["outcomes"][0]
    elif what == "rate":
        state["outcomes"][0]["effective_lr"] = 0.5
    elif what == "type":
        state["outcomes"][0]["modes"] = "8"
    elif what == "rows":
        state["weights"]["generator"]["0.weight"] = state["weights"]["generator"]["0.weight"][:1]
    elif what == "many":
        state["outcomes"] = state["outcomes"] * 2
    else:
        del state["weights"]


@pytest.mark.parametrize("what", ["order", "rate", "type", "rows", "many", "missing"])
def test_a_damaged_checkpoint_is_refused(finished, tmp_path, what):
    _, folder = finished
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    damage(state, what)
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: is damaged"):
        mixture(TINY, tmp_path, resume=True)


def test_a_training_that_overflows_covers_nothing():
    result = mixture(dataclasses.replace(TINY, moduli=(0.8,), angles=(0.0,), lrs=(1e30,), test_seeds=1))
    (cell,) = result.cells
    assert (cell.diverged, cell.modes, cell.quality, cell.js) == (1, 0, 0, 1)
    assert cell.spread == 0
    assert table_rows(result)[1][0][-1] == "1 of 1"


def test_the_trained_gan_is_a_game(finished):
    result, _ = finished
    cell = result.cells[2].cell
    game = result.game(cell, seed=3)
    row = 2 * 2 + 1
    for player, module in zip(PLAYERS, game.players, strict=True):
        for name, weight in module.named_parameters():
            assert torch.equal(weight.detach(), result.weights[player][name][row].double())
    jacobian = game_jacobian(game.losses(game.players), game.players).dense()
    size = sum(p.numel() for player in game.players for p in player.parameters())
    assert jacobian.shape == (size, size) and bool(jacobian.isfinite().all())
    generator = sum(p.numel() for p in game.players[0].parameters())
    assert bool(jacobian[:generator, generator:].any()) and bool(jacobian[generator:, :generator].any())
    for wrong in ((cell, 0), (Cell(0.3, 0.0), 3)):
        with pytest.raises(KeyError, match="no training of"):
            result.game(*wrong)


def test_pictures(finished, tmp_path):
    pytest.importorskip("matplotlib")
    result, _ = finished
    outcomes = [dataclasses.replace(o, diverged=o.angle == 1.0) for o in result.outcomes]
    mixture_plots.save_pictures(tmp_path, dataclasses.replace(result, outcomes=outcomes))
    for name in (HEAT_MAP, SAMPLES):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def made_up(modes):
    """A result with these modes at each momentum, the same on every seed."""
    config = dataclasses.replace(TINY, moduli=(0.0, 0.8), angles=(0.0, 1 / 8, 1 / 2, 1.0), lrs=(0.1,))
    outcomes = [
        Outcome(stage, c.modulus, c.angle, 0.1, c.lr(0.1), seed, False, modes[str(c)], 0.5, 0.5, [0] * 3)
        for stage, seeds in ((TUNING, config.tuning), (TEST, config.test))
        for c in config.cells()
        for seed in seeds
    ]
    return MixtureResult(config, outcomes, {})


@pytest.mark.parametrize(
    ("turned", "inside", "more"),
    [(7.0, "lies", "more"), (4.0, "does NOT lie", "NOT more"), (5.0, "does NOT lie", "more")],
)
def test_findings_say_what_does_not_hold(turned, inside, more):
    modes = {"0": 6.0, "0.8": 4.0, "0.8 exp(iπ/8)": turned, "0.8 exp(iπ/2)": 1.0, "-0.8": 2.0}
    text = "\n".join(findings(made_up(modes)))
    assert f"Its angle {inside} strictly between π/32 and π/4" in text
    assert f"covers {more} modes than the best real momentum >= 0.5: 0.8 with 4.00" in text
    assert f"more in {2 if turned > 4 else 0} of 2 seeds" in text


# The configuration


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moduli": ()}, "--moduli must be one or more numbers"),
        ({"moduli": (1.0,)}, "--moduli must be >= 0 and < 1; got 1.0"),
        ({"moduli": (0.5, 0.5)}, "--moduli must name every number once; got 0.5, 0.5"),
        ({"angles": (0.0, 1.5)}, "--angles must be from 0 to 1, in units of pi; got 1.5"),
        ({"angles": (math.nan,)}, "--angles must be a finite number"),
        ({"lrs": (0.0,)}, "--lrs must be > 0; got 0.0"),
        ({"lrs": [0.1]}, "--lrs must be one or more numbers"),
        ({"optimizer": "sgd"}, "--optimizer must be one of complex-sgd, complex-adam; got 'sgd'"),
        ({"loss": "wasserstein"}, "--loss must be one of"),
        ({"tuning_seeds": 0}, "--tuning-seeds must be a whole number >= 1; got 0"),
        ({"steps": 2}, "--steps must be a whole number >= 3; got 2"),
        ({"width": 5000}, "--width must be <= 4096"),
        ({"std": 0.0}, "--std must be > 0"),
        ({"mode_share": 1.0}, "--mode-share must be > 0 and < 1"),
        ({"seed": 2**32}, "--seed must be <= 4294967295"),
    ],
)
def test_a_bad_choice_is_named(change, message):
    with pytest.raises(ConfigError) as error:
        mixture(dataclasses.replace(TINY, **change))
    assert message in str(error.value)


@pytest.mark.parametrize("config", [MixtureConfig(), MixtureConfig(**QUICK), TINY])
def test_the_configuration_survives_json(config, tmp_path):
    config.check()
    assert MixtureConfig.from_json(config.to_json(), tmp_path) == config


def test_real_momenta_are_exactly_real():
    assert [Cell(0.9, a).momentum for a in (0.0, 1.0)] == [0.9, -0.9]
    assert Cell(0.9, 1.0).momentum.imag == 0 and Cell(0.9, 0.5).momentum == 0.9j
    assert [Cell(0.5, a).is_real for a in (0.0, 0.25, 1.0)] == [True, False, True] and Cell(0.0, 0.25).is_real
