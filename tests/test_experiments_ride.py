"""Rides: what is found beside what descents find, figures against the theory, stopping, continuing, pictures."""

import dataclasses
import json
import math
import shutil

import pytest
import torch

from nestopt_ext._checkpoint import CheckpointError
from nestopt_ext.experiments.config import ConfigError
from nestopt_ext.experiments.ride import RideConfig, pictures, report, ride
from nestopt_ext.experiments.ride.config import GAMES
from nestopt_ext.experiments.ride.gan import gan_study
from nestopt_ext.experiments.ride.polynomial import COUPLING, Polynomial
from nestopt_ext.experiments.ride.results import Ends, RideResult
from nestopt_ext.experiments.ride.run import make_study, num_pieces
from nestopt_ext.experiments.ride.shapes import USED, VALUE, HeldOut, ShapesGame, name_of, network
from nestopt_ext.experiments.ride.shapes_data import pictures as draw_pictures
from nestopt_ext.experiments.ride.shapes_data import templates
from nestopt_ext.experiments.tune import Interrupted
from nestopt_ext.games import Archive, map_jacobian, sgd_map

DILEMMA = RideConfig("small-ipd", starts=3, spread=1.0, lr=5.0, ascent_steps=4, branch_sizes=(2.0,), steps=80)
GAN = RideConfig("gan", width=3, modes=3, exponent_steps=2, ascent_steps=1, directions=2, branch_sizes=(0.5,), steps=4)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that is over: its folder, of which tests take copies, what it found, and what it told of its progress."""
    folder, watch = tmp_path_factory.mktemp("finished"), Watch()
    return folder, ride(DILEMMA, folder, progress=watch), watch


@pytest.fixture(scope="module")
def dilemma(finished):
    return finished[1]


@pytest.fixture
def run_folder(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "run")


@pytest.fixture(scope="module")
def features():
    return ride(RideConfig("shapes", images=16, width=2, steps=25))


@pytest.fixture(scope="module")
def gan():
    return ride(GAN)


class Watch:
    """Counts what it is told, and asks to stop after so many pieces."""

    def __init__(self, last=math.inf):
        self.last, self.pieces, self.stages = last, 0, []

    def stage(self, label):
        self.stages.append(label)

    def advance(self, steps, note=""):
        self.pieces += steps

    def stop(self):
        return self.pieces >= self.last


def test_ride_finds_both_solutions_of_the_dilemma(dilemma):
    assert {row.name for row in dilemma.rows if row.branches} == {"tit-for-tat", "defection"}
    assert max(dilemma.most_from_one_start()) == 2
    assert sum(row.branches for row in dilemma.rows) == len(dilemma.archive.branches)
    # Plain descent has one end for each start.
    assert dilemma.ends[0].name == "gradient descent, same starts"
    assert sum(row.rivals[0] for row in dilemma.rows) == 3


def test_solutions_are_told_apart_alike_for_rides_and_rivals(dilemma):
    study, archive = dilemma.study, dilemma.archive
    known = archive.solutions[0].key
    keys = torch.stack([known, known + 0.05, known + 5, known + 5.01, torch.full_like(known, math.nan)])
    ends = Ends("rival", 5, torch.zeros(5, 2), keys)
    rows = RideResult(DILEMMA.resolved(), study, archive, (ends,)).rows
    counts = {row.name: row.rivals[0] for row in rows}
    assert counts[study.label(known)] == 2
    assert [row.rivals[0] for row in rows if not row.branches] == [2]  # the one that overflowed is nowhere


def test_two_solutions_near_one_that_is_known_have_different_names(dilemma):
    known, aside = torch.tensor([1.96, 1.96]).double(), torch.tensor([0.07, 0.0])
    nothing = Archive()
    nothing.starts = dilemma.archive.starts
    ends = Ends("rival", 5, torch.zeros(2, 2), torch.stack([known + aside, known - aside]))
    rows = RideResult(DILEMMA.resolved(), dilemma.study, nothing, (ends,)).rows
    assert [row.name for row in rows] == ["defection", "defection (2)"]


def test_rivals_get_the_gradients_of_the_ride(dilemma):
    spent = dilemma.study.gradients(dilemma.archive)
    for end in dilemma.ends[1:]:
        assert spent - DILEMMA.steps < end.gradients <= spent


@pytest.mark.parametrize("game", GAMES)
def test_every_game_has_a_study(game):
    config = RideConfig(game).resolved()
    study = make_study(config)
    state = study.step.start(study.starts)
    key = study.key(state)
    assert key.shape[0] == len(study.starts) and bool(key.isfinite().all())
    assert study.label(key[0]) and len(study.row(key[0])) == len(study.header)
    assert len({rival.name for rival in study.rivals}) == len(study.rivals)


@pytest.mark.parametrize(
    ("losses", "game", "name"),
    [
        ((1.01, 1.0), "small-ipd", "tit-for-tat"),
        ((1.96, 1.95), "small-ipd", "defection"),
        ((1.4, 1.38), "mix", "spiral"),
        ((0.01, 0.0), "matching-pennies", "even odds"),
        ((1.3, 2.0), "small-ipd", "(1.30, 2.00)"),
    ],
)
def test_solutions_are_named_by_their_losses(losses, game, name):
    assert make_study(RideConfig(game).resolved()).label(torch.tensor(losses, dtype=torch.float64)) == name


def test_ridges_of_the_polynomial_lead_to_every_minimum_and_noise_to_fewer():
    result = ride(RideConfig("polynomial", dim=3, steps=150))
    assert result.found(None) == 6 and all(row.name.startswith("valley") for row in result.rows if row.branches)
    names = [end.name for end in result.ends]
    assert 0 < result.found(names.index("noise at the saddle")) < 6


def test_polynomial_has_the_minima_and_the_saddle_that_it_says():
    game = Polynomial(4, seed=3)
    hessian = torch.autograd.functional.hessian(lambda w: game.losses([w[None]])[0].sum(), game.players[0][0].detach())
    torch.testing.assert_close(game.rotation.T @ hessian @ game.rotation, -torch.diag(game.curvatures))
    for number, minimum in enumerate(game.minima()):
        w = minimum.clone().requires_grad_()
        gradient = torch.autograd.grad(game.losses([w[None]])[0].sum(), w)[0]
        assert float(gradient.norm()) < 1e-12
        hessian = torch.autograd.functional.hessian(lambda w: game.losses([w[None]])[0].sum(), minimum)
        a = game.curvatures[number % 4]
        expected = torch.cat([2 * a[None], (COUPLING * a - game.curvatures)[torch.arange(4) != number % 4]])
        torch.testing.assert_close(torch.linalg.eigvalsh(hessian), expected.sort().values)


# ---- features of a network ------------------------------------------------------------------------------------------


def test_pictures_tell_the_class_by_products_of_pixels_alone():
    data = draw_pictures(64, seed=0)
    assert data.x.shape == (64, 192) and data.y.sum() == 32
    for label in (0, 1):
        assert float(data.x[data.y == label].mean(0).abs().max()) < 1e-12
    moments = data.x.T @ data.x / 64
    assert float(moments[:64, 64:].abs().max()) < 1e-12  # no channel says anything of another one
    broken = draw_pictures(64, seed=0, telling=["red"])
    assert torch.equal(broken.y, data.y) and torch.allclose(broken.x[:, :64].abs(), data.x[:, :64].abs())
    assert not torch.allclose(broken.x[:, 64:].abs(), data.x[:, 64:].abs())


def test_saddle_of_the_network_has_the_hessian_of_its_documentation():
    width, data = 3, draw_pictures(64, seed=0)
    game = ShapesGame(width, data)
    step = sgd_map(game, 1.0)
    saddle = step.start()
    assert float((step(saddle) - saddle).norm()) < 1e-12
    hessian = torch.eye(saddle.shape[1]) - map_jacobian(step, saddle).dense()[0]
    first, second = (data.x[data.y == label].T @ data.x[data.y == label] / 32 for label in (0, 1))
    units, ones = torch.eye(width, dtype=torch.float64), torch.ones(width, width, dtype=torch.float64)
    expected = torch.kron(-VALUE / 16 * units, second - first) + torch.kron(VALUE**2 / 16 * ones, (first + second) / 2)
    torch.testing.assert_close(hessian[: 192 * width, : 192 * width], expected)


def test_features_are_found_by_ablation():
    held_out = HeldOut(seed=0)
    state = torch.zeros(192 * 2 + 2 + 2 + 1, dtype=torch.float64)
    green = templates()[1]
    state[64:128], state[192 + 64 : 192 + 128] = 3 * green[1].flatten(), -3 * green[1].flatten()
    state[-3:-1], state[-1] = 1.0, -7.0  # softplus(u) + softplus(-u) is about |u|, 10.8 or, in class 0, 3.9
    use = held_out.use(network(2, state))
    assert use.accuracy > 0.95 and use.alone[1] > 0.95 and use.without[1] < 0.6
    assert name_of(use.alone >= USED) == "green" and float(use.without[[0, 2]].min()) > 0.95


def test_ridges_of_the_network_lead_to_different_features(features):
    result = features
    assert {row.name for row in result.rows if row.branches} == {"red", "green", "blue"}
    assert [float(s.key.max()) > 0.9 for s in result.archive.solutions] == [True] * 3


def test_gan_covers_what_its_points_cover():
    study = gan_study(GAN.resolved())
    start = study.step.start()
    # A generator that ignores its noise puts all points where its last bias is.
    state = torch.zeros_like(start)
    generator = study.step.players(state)[0]
    generator[-1][0] = torch.tensor([1.0, 0.0])  # a view of the state: the place of the first mode
    assert study.key(state).tolist() == [[1.0, 0.0, 0.0]]
    assert study.label(study.key(state)[0]) == "1"
    assert study.key(torch.full_like(start, math.nan)).tolist() == [[0.0, 0.0, 0.0]]


def test_gan_rides_from_one_start(gan):
    result = gan
    assert len(result.archive.branches) == 4 * len(result.archive.bifurcations) and len(result.archive.starts) == 1
    assert result.ends[0].name == "gradient descent, same start" and len(result.ends[0].states) == 1
    plain = result.study.step.start()
    for _ in range(4):
        plain = result.study.step(plain)
    torch.testing.assert_close(result.ends[0].states, plain)


# ---- stopping and continuing ----------------------------------------------------------------------------------------


def same(a: RideResult, b: RideResult) -> bool:
    rows = [[(r.name, r.key.tolist(), r.starts, r.branches, r.rivals) for r in result.rows] for result in (a, b)]
    ends = [[branch.end.tolist() for branch in result.archive.branches] for result in (a, b)]
    return rows[0] == rows[1] and ends[0] == ends[1]


@pytest.mark.parametrize("last", [1, 50, 90])
def test_interrupted_run_continues_to_the_same_numbers(dilemma, tmp_path, last):
    watch = Watch(last)
    with pytest.raises(Interrupted):
        ride(DILEMMA, tmp_path, should_stop=watch.stop, progress=watch)
    assert same(ride(DILEMMA, tmp_path, resume=True), dilemma)


def test_run_that_is_over_is_resumed_from_its_archive(dilemma, run_folder):
    log = (run_folder / "log.jsonl").read_bytes()
    assert same(ride(DILEMMA, run_folder, resume=True), dilemma)
    assert (run_folder / "log.jsonl").read_bytes() == log


def test_progress_tells_of_every_piece(finished):
    _, _, watch = finished
    assert watch.pieces == num_pieces(DILEMMA) and watch.stages[0] == "ride"


def test_log_tells_what_the_table_tells(finished):
    folder, dilemma, _ = finished
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert lines[0]["event"] == "config" and lines[0]["game"] == "small-ipd"
    rows = [line for line in lines if line["event"] == "row"]
    assert [(row["name"], row["branches"]) for row in rows] == [(row.name, row.branches) for row in dilemma.rows]
    assert [line["text"] for line in lines if line["event"] == "finding"] == report.findings(dilemma)


def test_checkpoint_of_another_run_is_refused(run_folder):
    with pytest.raises(CheckpointError, match="is not that of such a run"):
        ride(dataclasses.replace(DILEMMA, seed=1), run_folder, resume=True)
    with pytest.raises(CheckpointError, match="is there already"):
        ride(DILEMMA, run_folder)
    with pytest.raises(CheckpointError, match="output must be given"):
        ride(DILEMMA, resume=True)
    (run_folder / "checkpoint.pt").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="damaged"):
        ride(DILEMMA, run_folder, resume=True)


# ---- configuration, table, pictures ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choices", "part"),
    [
        ({"game": "chess"}, "--game must be one of"),
        ({"steps": 0}, "--steps must be"),
        ({"lr": math.inf}, "--lr must be"),
        ({"lr": 0.0}, "--lr must be > 0"),
        ({"starts": 10**6}, "--starts must be <= 10000"),
        ({"branch_sizes": ()}, "--branch-sizes must be"),
        ({"branch_sizes": (1.0, 1.0)}, "--branch-sizes must name every number once"),
        ({"branch_sizes": (-1.0,)}, "--branch-sizes must be > 0"),
        ({"optimizer": "adam"}, "--optimizer must be one of"),
        ({"tau": 0.5}, "--tau is no option of --game small-ipd"),
        ({"game": "shapes", "images": 8}, "--images must be a multiple of 16; got 8"),
        ({"game": "mix", "tau": 1.5}, "--tau must be from 0 to 1"),
        ({"seed": 2**32}, "--seed must be below"),
    ],
)
def test_choice_out_of_range_is_told_in_a_line_that_names_the_option(choices, part):
    with pytest.raises(ConfigError) as caught:
        RideConfig(**choices).resolved()
    assert part in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("game", GAMES)
def test_configuration_survives_its_file(game, tmp_path):
    config = RideConfig(game).resolved()
    assert RideConfig.from_json(config.to_json(), tmp_path) == config == config.resolved()


@pytest.mark.parametrize("text", ["", "{}", '{"experiment": "ride"}', "[1]"])
def test_other_text_is_no_configuration(text, tmp_path):
    with pytest.raises(ConfigError, match="is not the configuration of a run of ride"):
        RideConfig.from_json(text, tmp_path)


def test_table_has_a_row_for_each_solution_and_a_column_for_each_rival(dilemma):
    ((header, rows),) = report.tables(dilemma)
    assert [row[0] for row in rows] == [row.name for row in dilemma.rows]
    assert all(len(row) == len(header) for row in rows)
    assert len(header) == 4 + len(dilemma.ends)


def test_pictures_are_drawn(dilemma, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(pictures, "_RESOLUTION", 9)
    pictures.save_pictures(tmp_path, dilemma)
    assert {path.name for path in tmp_path.iterdir()} == {"portrait.png", "tree.png"}


@pytest.mark.parametrize("game", ["gan", "features"])
def test_pictures_of_solutions_are_drawn(game, request, tmp_path):
    pytest.importorskip("matplotlib")
    result = request.getfixturevalue(game)
    pictures.save_pictures(tmp_path, dataclasses.replace(result, ends=result.ends[:1]))
    assert {path.name for path in tmp_path.iterdir()} == {"solutions.png", "tree.png"}
