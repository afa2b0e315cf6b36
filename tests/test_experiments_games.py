"""The game experiments: races against the optimizers themselves, figures against the theory, what a run leaves."""

import cmath
import dataclasses
import json
import math
import statistics

import pytest
import torch

from nestopt_ext import games
from nestopt_ext.experiments.config import ConfigError
from nestopt_ext.experiments.games import (
    BilinearConfig,
    DiracConfig,
    MixtureConfig,
    SpectraConfig,
    SweepConfig,
    adversarialness_plots,
    adversarialness_report,
    bilinear,
    bilinear_plots,
    bilinear_report,
    dirac,
    dirac_plots,
    dirac_report,
    mixture,
    spectra,
    spectra_plots,
    spectra_report,
    sweep,
)
from nestopt_ext.experiments.games._contest import (
    RECOMMENDED,
    Method,
    competitors,
    contest,
    grid,
    learning_rates,
    optimizers,
    replay,
    steps_at,
    unit_start,
)
from nestopt_ext.experiments.games._race import LinearGame, race
from nestopt_ext.experiments.games.adversarialness import mixed_game
from nestopt_ext.experiments.games.dirac import EXTENT, WALKS, step_eigenvalues
from nestopt_ext.experiments.games.spectra import LEVELS, MOMENTA, phase_map, random_game
from nestopt_ext.experiments.tune import Interrupted

ROTATION = LinearGame.of(games.bilinear())
EAST = torch.tensor([1.0, 0.0], dtype=torch.float64)


def race_one(game, rule, lr, beta, start, tolerance=1e-6, max_steps=5000):
    setting = torch.tensor([lr], dtype=torch.float64), torch.tensor([beta], dtype=torch.complex128)
    nobody = torch.zeros(1, dtype=torch.long)
    return race(game, rule, start, *setting, nobody, tolerance=tolerance, max_steps=max_steps)[0].steps


# Races


@pytest.mark.parametrize(
    ("rule", "lr", "beta"),
    [
        ("simultaneous", 0.06, RECOMMENDED),
        ("simultaneous", 0.5, cmath.rect(0.7, 0.4 * math.pi)),
        ("alternating", 0.06, RECOMMENDED),
        ("alternating", 1.2, -0.3),
        ("optimistic", 0.5, 0),
        ("extragradient", 0.7, 0),
    ],
)
@pytest.mark.parametrize("problem", ["bilinear", "mixed"])
def test_race_takes_the_steps_of_the_optimizers(rule, lr, beta, problem):
    def made(start=None):
        if problem == "mixed":
            return mixed_game(0.7, 3.0, start=start)
        return games.bilinear([1.0, 0.6], start=start)

    game = LinearGame.of(made())
    start = unit_start(len(game.jacobian), seed=3)
    played = made((start[: game.num_first], start[game.num_first :]))
    path = replay(played, rule, lr, beta, tolerance=1e-4, max_steps=5000)
    steps = race_one(game, rule, lr, beta, start, tolerance=1e-4)
    assert path.status is games.PlayStatus.converged
    assert steps == path.num_steps
    assert path.num_gradients == steps * (2 if rule == "extragradient" else 1)


def test_iterations_of_the_recommended_momentum():
    # Simulated independently: 677 simultaneous at lr 0.059, 664 alternating at 0.058, 483 for pi/16 at 0.026.
    assert race_one(ROTATION, "simultaneous", 0.059, RECOMMENDED, EAST) == 677
    assert race_one(ROTATION, "alternating", 0.058, RECOMMENDED, EAST) == 664
    assert race_one(ROTATION, "simultaneous", 0.026, cmath.rect(0.9, math.pi / 16), EAST) == 483
    assert math.isinf(race_one(ROTATION, "simultaneous", 0.059, 0.9, EAST))


def test_real_momentum_diverges_with_the_optimizer_too():
    game = games.bilinear(start=([1.0], [0.0]))
    played = games.simultaneous(game, optimizers("simultaneous", 0.059, 0.9), 2000, tolerance=1e-6)
    assert played.status is games.PlayStatus.diverged


@pytest.mark.parametrize("rule", ["simultaneous", "alternating"])
def test_a_race_of_many_finds_the_best_of_each_group(rule):
    lrs = torch.tensor([0.03, 0.06, 0.1, 0.3, 1.0], dtype=torch.float64)
    momenta = [RECOMMENDED, cmath.rect(0.7, math.pi / 2), -0.5, 0.9]
    lr, beta = grid(lrs, momenta)
    group = torch.arange(len(momenta)).repeat_interleave(len(lrs))
    start = unit_start(2, seed=0)
    together = race(ROTATION, rule, start, lr, beta, group, tolerance=1e-6, max_steps=3000)
    for k, momentum in enumerate(momenta):
        alone = [race_one(ROTATION, rule, float(step), momentum, start, max_steps=3000) for step in lrs]
        assert together[k].steps == min(alone)
        if math.isfinite(min(alone)):
            assert together[k].setting == 5 * k + alone.index(min(alone))
        else:
            assert together[k].setting == -1


def test_a_contest_tells_slow_from_divergent():
    lrs, start = learning_rates(10), unit_start(2, seed=0)
    limits = {"tolerance": 1e-6, "max_steps": 20}
    by_name = {method.name: method for method in competitors(5)}
    slow = contest(ROTATION, by_name["optimistic"], start, lrs, **limits)
    assert math.isinf(slow.gradients) and not slow.diverged
    for name in ("gradient descent", "real momentum"):
        assert contest(ROTATION, by_name[name], start, lrs, **limits).diverged


def test_optimal_settings_of_the_rivals_are_found():
    # Rates 1/sqrt(2) of optimistic steps at lr 1/2, sqrt(3)/2 of extragradient at lr 1/sqrt(2).
    start = unit_start(2, seed=0)
    for rule, lr, rate in (("optimistic", 0.5, math.sqrt(0.5)), ("extragradient", math.sqrt(0.5), math.sqrt(0.75))):
        lrs = torch.tensor([lr / 2, lr, 2 * lr], dtype=torch.float64)
        entry = contest(ROTATION, Method(rule, rule), start, lrs, tolerance=1e-12, max_steps=1000)
        assert entry.lr == lr
        # Near a double root the found modulus is off by the root of the rounding.
        assert entry.rate == pytest.approx(rate, abs=1e-7)
        per_step = 2 if rule == "extragradient" else 1
        assert entry.predicted == pytest.approx(per_step * steps_at(rate, 1e-12), rel=1e-6)
        # A double root makes the distance steps * rate ** steps, up to a factor near 1.
        late = math.log(entry.steps) / -math.log(rate) if rule == "optimistic" else 0
        assert entry.gradients == pytest.approx(entry.predicted + per_step * late, abs=3 * per_step)


# The experiments


SMALL_BILINEAR = BilinearConfig(angles=9, lrs=15, size=2, condition=2.0, max_steps=1500, tolerance=1e-9)


@pytest.fixture(scope="module")
def turned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bilinear")
    return bilinear(SMALL_BILINEAR, folder), folder


def test_bilinear_measures_what_the_theory_predicts(turned):
    ratios = []
    for game in turned[0].games:
        for curve in game.curves:
            for measured, predicted in zip(curve.measured, curve.predicted, strict=True):
                if math.isinf(predicted):
                    assert math.isinf(measured)
                elif predicted < 0.9 * SMALL_BILINEAR.max_steps:
                    ratios.append(measured / predicted)
    assert len(ratios) > 50
    # The fastest of the learning rates may be one whose path passes near the solution early, but none is late.
    assert statistics.median(ratios) == pytest.approx(1, abs=0.02)
    assert min(ratios) > 0.75 and max(ratios) < 1.06


def test_bilinear_converges_at_the_angles_of_the_small_step_test(turned):
    for game in turned[0].games:
        for curve in game.curves:
            momenta = torch.polar(
                torch.full((9,), curve.modulus, dtype=torch.float64),
                math.pi * torch.tensor(curve.angles, dtype=torch.float64),
            )
            small = games.small_step_converges(momenta, alternating=curve.rule == "alternating")
            assert [math.isfinite(p) for p in curve.predicted] == small.tolist()


def test_bilinear_ranks_the_methods_as_known(turned):
    for game in turned[0].games:
        entries = {entry.method: entry for entry in game.entries}
        assert entries["gradient descent"].diverged and entries["real momentum"].diverged
        ours = entries["complex momentum"]
        assert ours.gradients > entries["optimistic"].gradients  # a slow rotation is not where it shines
        assert entries["complex momentum, alternating"].gradients <= entries["negative momentum, alternating"].gradients
        for entry in game.entries:
            if math.isfinite(entry.gradients):
                assert entry.replayed == entry.gradients
    assert all(abs(beta) < 1 for beta in (entry.beta for game in turned[0].games for entry in game.entries))


def test_bilinear_logs_its_figures(turned):
    result, folder = turned
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert lines[0]["event"] == "config" and lines[0]["experiment"] == "bilinear" and lines[0]["angles"] == 9
    curves = [line for line in lines if line["event"] == "curve"]
    assert len(curves) == 20
    first = result.games[0].curves[2]
    assert curves[2]["modulus"] == first.modulus
    assert curves[2]["measured"] == [None if math.isinf(m) else m for m in first.measured]
    results = [line for line in lines if line["event"] == "result"]
    assert [line["gradients"] for line in results] == [
        entry.gradients if math.isfinite(entry.gradients) else None for game in result.games for entry in game.entries
    ]


def test_bilinear_says_what_is_better_than_complex_momentum(turned):
    lines = bilinear_report.findings(turned[0])
    assert any("of optimistic, " in line and line.endswith("times as many.") for line in lines)
    for header, rows in bilinear_report.tables(turned[0]):
        assert all(len(row) == len(header) for row in rows)
        assert [row[3] for row in rows if row[0] == "real momentum"] == ["diverges"]


SMALL_SWEEP = SweepConfig(levels=3, lrs=20, angles=9, condition=2.0, max_steps=3000)


@pytest.fixture(scope="module")
def swept():
    return sweep(SMALL_SWEEP)


def test_sweep_game_has_the_spectrum_it_claims():
    for level in (0.0, 0.3, 1.0):
        eigenvalues = torch.linalg.eigvals(mixed_game(level, 4.0).jacobian())
        expected = [
            scale * complex(1 - level * share, sign * level * share)
            for share in (0, 0.5, 1)
            for scale in (0.25, 0.5, 1)
            for sign in (1, -1)
        ]
        key = lambda z: (round(z.real, 9), round(z.imag, 9))  # noqa: E731
        found = sorted(eigenvalues.tolist(), key=key)
        assert torch.allclose(
            torch.tensor(found, dtype=torch.complex128), torch.tensor(sorted(expected, key=key), dtype=torch.complex128)
        )


def test_sweep_complex_momentum_is_the_one_that_works_on_both_ends(swept):
    first, last = ({name: entries[k].gradients for name, entries in swept.entries.items()} for k in (0, -1))
    assert swept.levels[0] == 0 and swept.levels[-1] == 1
    # Cooperative: with angle 0 among its choices it is the heavy ball, and that beats the methods without momentum.
    assert first["complex momentum"] == first["real momentum"]
    assert first["real momentum"] < min(first["gradient descent"], first["optimistic"], first["extragradient"])
    # Adversarial: real momentum and gradient descent arrive with no setting.
    assert swept.entries["gradient descent"][-1].diverged and swept.entries["real momentum"][-1].diverged
    assert math.isfinite(last["complex momentum"])
    # And there the rivals that were made for it are better.
    assert min(last["optimistic"], last["extragradient"]) < last["complex momentum"]
    lines = adversarialness_report.findings(swept)
    assert any(line.startswith("optimistic: better than simultaneous complex momentum at max G 1") for line in lines)
    assert any(line.startswith("real momentum") and "arrives nowhere at max G 1." in line for line in lines)


def test_sweep_is_near_the_predictions(swept):
    for entries in swept.entries.values():
        for entry in entries:
            if entry.gradients > 100 and math.isfinite(entry.gradients):
                # The start has only a part of its length in the slowest direction: log(18) / log(1e6) less at most.
                assert 0.75 < entry.gradients / entry.predicted < 1.1


def test_equal_seeds_give_equal_figures_and_others_do_not(swept):
    again = sweep(dataclasses.replace(SMALL_SWEEP, levels=2))
    other = sweep(dataclasses.replace(SMALL_SWEEP, levels=2, seed=1))
    for name, entries in again.entries.items():
        assert repr(entries[0]) == repr(swept.entries[name][0])
    assert any(repr(entries) != repr(again.entries[name]) for name, entries in other.entries.items())


@pytest.fixture(scope="module")
def spiralled():
    return dirac(DiracConfig(steps=300))


def test_dirac_paths_go_where_the_theory_says(spiralled):
    verdicts = {path.walk.method: path.inwards for path in spiralled.paths}
    assert verdicts == {
        "gradient descent": False,
        "real momentum": False,
        "complex momentum": True,
        "complex momentum, alternating": True,
        "optimistic": True,
        "extragradient": True,
    }
    assert sorted(spiralled.jacobian.imag.tolist()) == pytest.approx([-0.5, 0.5])
    assert spiralled.jacobian.real.abs().max() < 1e-12
    for path in spiralled.paths:
        assert path.inwards == (path.rate < 1)
        if path.inwards:
            assert path.measured_rate == pytest.approx(path.rate, abs=3e-3)


def test_dirac_steps_have_the_rates_of_the_games_room():
    rotation = torch.tensor([[0.0, 0.5], [-0.5, 0.0]], dtype=torch.float64)
    for walk in WALKS:
        method = {"optimistic": "optimistic", "extragradient": "extragradient"}.get(walk.rule, "momentum")
        expected = games.convergence_rate([0.5j], walk.lr, walk.beta, method=method, alternating=walk.alternating)
        assert float(step_eigenvalues(rotation, walk).abs().max()) == pytest.approx(float(expected), abs=1e-7)


def test_dirac_field_is_the_descent_of_both_players(spiralled):
    # theta falls along psi f'(psi theta), psi rises along theta f'(psi theta), f'(t) = 1 / (1 + exp t).
    theta, psi = spiralled.grid[None, :], spiralled.grid[:, None]
    slope = torch.sigmoid(-psi * theta)
    assert torch.allclose(spiralled.field[..., 0], -psi * slope)
    assert torch.allclose(spiralled.field[..., 1], theta * slope)
    assert spiralled.grid[-1] == EXTENT


@pytest.fixture(scope="module")
def looked():
    return spectra(SpectraConfig(size=4, points=24))


def test_spectra_of_steps_are_those_of_the_matrix(looked):
    for game, level in zip(looked.games, LEVELS.values(), strict=True):
        jacobian = random_game(looked.config, level).jacobian()
        assert torch.allclose(
            torch.linalg.eigvals(jacobian).abs().sort().values, game.eigenvalues.abs().sort().values, atol=1e-9
        )
        for step in game.steps:
            moduli = torch.linalg.eigvals(games.momentum_matrix(jacobian, step.lr, step.beta)).abs()
            assert torch.allclose(moduli.sort().values, step.eigenvalues.abs().sort().values, atol=1e-6)
            assert step.rate == pytest.approx(float(moduli.max()), abs=1e-9)
    adversarial = {step.momentum: step for step in looked.games[1].steps}
    plain = adversarial["no momentum"]
    assert plain.rate == pytest.approx(math.sqrt(1 + plain.lr**2), abs=1e-9)  # the largest singular value is 1
    assert adversarial["real momentum 0.9"].rate > 1 > adversarial["0.9 exp(iπ/8)"].rate
    assert set(MOMENTA) == set(adversarial)


@pytest.mark.parametrize("alternating", [False, True])
def test_phase_map_agrees_with_the_small_step_test(alternating):
    phases = phase_map(20, 41, alternating=alternating)
    assert torch.equal(phases.steps.isfinite(), phases.small_steps)
    best = float(phases.steps.min())
    optimum = games.optimal_momentum([1j, -1j], alternating=alternating).rate
    # No grid point is faster than the optimum, and the grid is not far from it.
    assert steps_at(optimum, 1e-6) * (1 - 1e-3) <= best < 1.6 * steps_at(optimum, 1e-6)


TINY_MIXTURE = MixtureConfig(
    moduli=(0.0, 0.8),
    angles=(1 / 8,),
    lrs=(0.02,),
    tuning_seeds=1,
    test_seeds=1,
    steps=4,
    evaluations=2,
    batch_size=8,
    width=4,
    noise_dim=2,
    samples=20,
)


def finished_mixture(folder):
    folder.mkdir()
    (folder / "config.json").write_text(TINY_MIXTURE.to_json())
    return mixture(TINY_MIXTURE, folder)


def test_spectra_of_a_trained_gan(tmp_path):
    result = finished_mixture(tmp_path / "mixture")
    before = {path.name: path.read_bytes() for path in (tmp_path / "mixture").iterdir()}
    found = spectra(SpectraConfig(size=2, points=4, mixture=str(tmp_path / "mixture")))
    assert {path.name: path.read_bytes() for path in (tmp_path / "mixture").iterdir()} == before
    best = result.best(lambda cell: not cell.is_real)
    game = result.game(best.cell, best.test[0].seed)
    dense = torch.linalg.eigvals(games.game_jacobian(game.losses(game.players), game.players).dense())
    leading = dense.abs().sort(descending=True).values
    gan = found.gan.eigenvalues.abs().sort(descending=True).values
    assert torch.allclose(gan[:20], leading[:20], rtol=1e-6)
    assert any(str(best.cell) in line for line in spectra_report.findings(found))


def test_spectra_refuse_a_run_that_is_not_finished(tmp_path):
    assert finished_mixture(tmp_path / "mixture").outcomes
    checkpoint = tmp_path / "mixture" / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-50])
    with pytest.raises(ConfigError, match="--mixture must be the folder of a finished run"):
        spectra(SpectraConfig(mixture=str(tmp_path / "mixture")))
    checkpoint.unlink()
    with pytest.raises(ConfigError, match="--mixture must be the folder of a finished run"):
        spectra(SpectraConfig(mixture=str(tmp_path / "mixture")))
    with pytest.raises(ConfigError, match="--mixture must be the folder of a finished run"):
        spectra(SpectraConfig(mixture=str(tmp_path / "absent")))


# What all have in common

TINY = {
    bilinear: BilinearConfig(angles=3, lrs=4, size=1, condition=2.0, max_steps=200),
    sweep: SweepConfig(levels=2, lrs=4, angles=3, condition=2.0, max_steps=200),
    dirac: DiracConfig(steps=30),
    spectra: SpectraConfig(size=2, points=6),
}
REPORTS = {bilinear: bilinear_report, sweep: adversarialness_report, dirac: dirac_report, spectra: spectra_report}
PLOTS = {bilinear: bilinear_plots, sweep: adversarialness_plots, dirac: dirac_plots, spectra: spectra_plots}
EXPERIMENTS = pytest.mark.parametrize("experiment", list(TINY), ids=lambda function: function.__name__)


@EXPERIMENTS
def test_even_the_smallest_run_has_tables_and_pictures(experiment, tmp_path):
    pytest.importorskip("matplotlib")
    config = TINY[experiment]
    result = experiment(config, tmp_path)
    for header, rows in REPORTS[experiment].tables(result):
        assert rows and all(len(row) == len(header) for row in rows)
    assert all(isinstance(line, str) and "\n" not in line for line in REPORTS[experiment].findings(result))
    PLOTS[experiment].save_pictures(tmp_path, result)
    assert {path.name for path in tmp_path.iterdir()} == set(config.files)
    for name in config.files:
        if name.endswith(".png"):
            assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@EXPERIMENTS
def test_stopping_raises_and_keeps_the_log(experiment, tmp_path):
    with pytest.raises(Interrupted):
        experiment(TINY[experiment], tmp_path, should_stop=lambda: True)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[0]["event"] == "config"


def test_a_long_race_stops_before_its_end():
    asked = []

    def stop():
        asked.append(None)
        if len(asked) == 3:
            raise Interrupted

    setting = torch.tensor([0.01], dtype=torch.float64), torch.tensor([0j])
    with pytest.raises(Interrupted):
        race(
            ROTATION, "simultaneous", EAST, *setting, torch.zeros(1, dtype=torch.long),
            tolerance=1e-6, max_steps=10**9, tick=stop,
        )  # fmt: skip


@EXPERIMENTS
def test_progress_is_told_every_piece(experiment):
    class Progress:
        pieces = 0

        def stage(self, label):
            assert label

        def advance(self, steps, note=""):
            self.pieces += steps

    progress = Progress()
    experiment(TINY[experiment], progress=progress)
    from nestopt_ext.experiments.cli_games import _EXPERIMENTS

    assert progress.pieces == _EXPERIMENTS[TINY[experiment].experiment].num_pieces(TINY[experiment])


@EXPERIMENTS
def test_configurations_survive_json_and_nothing_else_does(experiment, tmp_path):
    config = TINY[experiment]
    assert type(config).from_json(config.to_json(), tmp_path) == config
    values = json.loads(config.to_json())
    damaged = [{**values, "experiment": "other"}, {**values, "more": 1}, {**values, "seed": -1}, [], {"seed": 0}]
    for text in [*map(json.dumps, damaged), "{", "null"]:
        with pytest.raises(ConfigError, match=f"not the configuration of a run of games {config.experiment}"):
            type(config).from_json(text, tmp_path)


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (BilinearConfig(angles=1), "--angles must be a whole number >= 2; got 1"),
        (BilinearConfig(tolerance=1.0), "--tolerance must be > 0 and < 1; got 1.0"),
        (BilinearConfig(condition=math.nan), "--condition must be a finite number"),
        (BilinearConfig(max_steps=10**8), "--max-steps must be <= 10000000"),
        (SweepConfig(levels=1), "--levels must be"),
        (SweepConfig(lrs=True), "--lrs must be a whole number"),
        (DiracConfig(radius=0.0), "--radius must be > 0"),
        (SpectraConfig(size=0), "--size must be"),
        (SpectraConfig(seed=2**32), "--seed must be"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(config, part):
    experiment = {BilinearConfig: bilinear, SweepConfig: sweep, DiracConfig: dirac, SpectraConfig: spectra}
    with pytest.raises(ConfigError) as caught:
        experiment[type(config)](config)
    assert part in str(caught.value) and "\n" not in str(caught.value)
