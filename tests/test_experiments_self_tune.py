"""Self-tuning runs: every method on one problem, equal budgets, and continuing to the same numbers bit for bit."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from nestopt_ext._checkpoint import CheckpointError
from nestopt_ext.experiments import cli
from nestopt_ext.experiments.config import ConfigError
from nestopt_ext.experiments.self_tune import METHODS, Budget, SelfTuneConfig, SelfTuneError, make_problem, self_tune
from nestopt_ext.experiments.self_tune.course import Course
from nestopt_ext.experiments.self_tune.loop_learner import LoopLearner
from nestopt_ext.experiments.self_tune.report import findings
from nestopt_ext.experiments.self_tune.response_learner import ResponseLearner
from nestopt_ext.experiments.tune import Interrupted

pytest.importorskip("sklearn")
pytest.importorskip("optuna")

TINY = SelfTuneConfig(
    method=("delta-stn",),
    train_size=40,
    valid_size=40,
    width=8,
    epochs=3,
    warmup=1,
    trials=2,
    batch_size=10,
    train_steps=2,
)
SMALL = ["--train-size", "40", "--valid-size", "40", "--width", "8", "--epochs", "2", "--warmup", "1", "--trials", "2"]


def run(*arguments: str) -> int:
    try:
        return cli.main(["self-tune", *arguments])
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else 1


def untimed(value):
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if k != "seconds"}
    return [untimed(v) for v in value] if isinstance(value, list) else value


def log_of(folder: Path) -> list[dict]:
    return [untimed(json.loads(line)) for line in (folder / "log.jsonl").read_text().splitlines()]


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


class StopAfter:
    """Says stop at the n-th question."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == 0


# Methods


@pytest.fixture(scope="module")
def problem():
    return make_problem(TINY)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    folder = tmp_path_factory.mktemp("everything")
    extras = ("weight-decay", "label-smoothing")
    config = dataclasses.replace(TINY, method=METHODS, extra=extras, epochs=2, hyper_lr=0.1)
    return self_tune(config, folder), folder


@pytest.mark.parametrize("method", METHODS)
def test_each_method_runs_and_moves_what_it_can(everything, method):
    result = everything[0].method(method)
    assert result.skipped is None and result.seconds > 0
    assert all(0 < point["valid_loss"] < 4 and 0 <= point["test_accuracy"] <= 1 for point in result.points)
    start = {d.name: d.start for d in everything[0].problem.space}
    assert list(start) == ["input_dropout", "dropout1", "dropout2", "weight_decay", "label_smoothing"]
    moved = {name for name, value in result.final["values"].items() if value != pytest.approx(start[name], rel=1e-4)}
    assert moved == (set() if method == "fixed" else set(start))
    assert result.trainings == (2 if method in ("random", "tpe", "gp", "grid") else 1)
    assert result.best["valid_loss"] == min(point["valid_loss"] for point in result.points)


def test_log_tells_everything(everything):
    events = [line["event"] for line in log_of(everything[1])]
    assert events[0] == "config" and events.count("result") == len(METHODS) and events.count("trial") == 8
    trial = next(line for line in log_of(everything[1]) if line["event"] == "trial")
    assert set(trial) == {"event", "method", "number", "values", "valid_loss", "epochs"}


def test_all_methods_start_from_one_model(problem):
    plain = problem.plain.state_dict()
    for centred in (True, False):
        first, again = problem.model(centred=centred), problem.model(centred=centred)
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
        own = first.module.state_dict()
        assert all(torch.equal(own[name], weight) for name, weight in plain.items())


def test_a_training_at_fixed_values_is_the_plain_one(problem):
    values = {"input_dropout": 0.3, "dropout1": 1e-6, "dropout2": 1e-6}
    learner = LoopLearner(problem, values)
    plain = torch.nn.Sequential(*problem.plain)
    plain.load_state_dict(dict(zip(plain.state_dict(), problem.plain.state_dict().values(), strict=True)))
    optimizer = torch.optim.SGD(plain.parameters(), lr=problem.config.lr, momentum=0.9)
    torch.manual_seed(5)
    learner.step()
    x, y = next(iter(problem.train_batches()))
    torch.manual_seed(5)
    x = plain[1](plain[0](x))
    x = x * (torch.rand(x.shape) < 0.7) / 0.7
    for module in (*plain[3:5], *plain[6:8], plain[9]):
        x = module(x)
    torch.nn.functional.cross_entropy(x, y).backward()
    optimizer.step()
    for mine, theirs in zip(learner.model.general_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert learner.values() == pytest.approx(values, rel=1e-4)


def test_dropout_rates_start_where_they_are_told_to():
    values = make_problem(dataclasses.replace(TINY, start_rate=0.5).resolved()).hyper_parameters().values()
    assert {name: round(float(value), 6) for name, value in values.items()} == {
        "input_dropout": 0.5,
        "dropout1": 0.5,
        "dropout2": 0.5,
    }


@pytest.mark.parametrize("method", ["delta-stn", "stn", "fixed", "ift"])
def test_the_rate_falls_when_it_should(method):
    problem = make_problem(dataclasses.replace(TINY, lr=0.1, lr_drops=(1, 3), train_steps=1).resolved())
    rates = []
    if method in ("delta-stn", "stn"):
        learner = ResponseLearner(problem, method)
        optimizers = [
            o for name, o in learner.trainer.optimizers.items() if name in ("optimizer", "response_optimizer")
        ]
    else:
        learner = LoopLearner(problem, tuned=method == "ift")
        optimizers = [learner.loop.inner_optimizer]
    while learner.epochs < 3.5:
        rates.append((learner.batches, {round(o.param_groups[0]["lr"], 9) for o in optimizers}))
        learner.step()
    # A trainer ends an epoch when it is asked for the first step of the next one.
    late = 1 if method in ("delta-stn", "stn") else 0
    for batches, found in rates:
        assert found == {0.1 if batches < 4 + late else 0.02 if batches < 12 + late else 0.004}


def test_gaussian_noise_has_the_mean_and_the_variance_of_dropout(problem):
    model = LoopLearner(problem, {"input_dropout": 0.2, "dropout1": 0.2, "dropout2": 0.2}, tuned=True).model
    noise = model.module.get_submodule("dropout1")
    torch.manual_seed(0)
    with model.at_centre():
        y = noise(torch.ones(500, 400))
    assert y.mean() == pytest.approx(1, abs=0.005) and y.var() == pytest.approx(0.25, abs=0.005)
    model.eval()
    assert torch.equal(noise(torch.ones(3)), torch.ones(3))


def test_what_implicit_differentiation_cannot_move_is_named_and_stays():
    config = dataclasses.replace(TINY, method=("ift",), model="simple-cnn", width=2, hyper_lr=0.1)
    result = self_tune(config).method("ift")
    assert result.fixed == ["cutout_length", "cutout_holes"]
    start, end = result.points[0]["values"], result.final["values"]
    assert {name for name in start if start[name] != end[name]} == {f"dropout{i}" for i in (1, 2, 3)} | {
        "input_dropout"
    }


def test_a_run_that_ends_within_its_warmup_says_so():
    config = dataclasses.replace(TINY, method=("delta-stn", "fixed"), epochs=2, warmup=2)
    told = [line for line in findings(self_tune(config)) if "--warmup" in line]
    assert len(told) == 1 and told[0].startswith("Delta-STN: moved nothing")
    assert not any("--warmup" in line for line in findings(self_tune(TINY)))


def test_a_hypernetwork_that_is_too_large_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.setattr("nestopt_ext.experiments.self_tune.hypernet_learner.MOST_WEIGHTS", 100)
    result = self_tune(dataclasses.replace(TINY, method=("hypernet", "delta-stn"), epochs=1))
    assert "--width" in result.method("hypernet").skipped and result.method("delta-stn").skipped is None
    with pytest.raises(SelfTuneError, match="no method came to an end"):
        self_tune(dataclasses.replace(TINY, method=("hypernet",)))


def test_divergence_is_said_of_every_method():
    with pytest.raises(SelfTuneError, match=r"delta-stn: the training diverged.*random: every training diverged"):
        self_tune(dataclasses.replace(TINY, method=("delta-stn", "random"), lr=1e30))


# Budgets


@pytest.mark.parametrize("text", ["7", "2.5"])
def test_equal_epochs(text):
    config = dataclasses.replace(TINY, method=("stn", "random"), budget=text)
    result = self_tune(config)
    batches = math.ceil(float(text) * 4)
    assert [method.epochs for method in result.methods] == [batches / 4] * 2
    assert result.method("stn").trainings == 1 and result.method("random").trainings == math.ceil(float(text) / 3)
    last = result.method("random").points[-1]["epochs"]
    assert last == batches / 4


class FakeLearner:
    """Four batches an epoch, half a second each."""

    epochs = 0.0

    def step(self):
        self.epochs += 0.25
        return 0.5

    def scores(self):
        return {"valid_loss": 1.0, "valid_accuracy": 0.5, "test_loss": 1.0, "test_accuracy": 0.5}

    def values(self):
        return {}


@pytest.mark.parametrize(
    ("allowance", "epochs"),
    [(Budget(seconds=3.1), 1.75), (Budget(epochs=2.0), 2.0), (Budget(seconds=3.1, epochs=1.0), 1.0)],
)
def test_a_course_ends_where_its_allowance_does(allowance, epochs):
    course = Course(FakeLearner(), allowance, Budget(10.0, 20.0))
    while not course.done:
        course.step()
    assert course.learner.epochs == epochs and course.seconds == 2 * epochs
    assert course.points[-1]["seconds"] == 10 + 2 * epochs and course.points[-1]["epochs"] == 20 + epochs


def test_equal_seconds(monkeypatch):
    monkeypatch.setattr(LoopLearner, "step", timed(LoopLearner.step))
    monkeypatch.setattr(ResponseLearner, "step", timed(ResponseLearner.step))
    result = self_tune(dataclasses.replace(TINY, method=("delta-stn", "random"), budget="10s"))
    assert [method.seconds for method in result.methods] == [10.0, 10.0]
    assert result.method("delta-stn").epochs == 5.0  # of its own epochs a budget of seconds knows nothing
    assert result.method("random").trainings == 2  # 12 steps, and 8


def timed(step):
    def half_a_second(learner):
        step(learner)
        return 0.5

    return half_a_second


@pytest.mark.parametrize("bad", ["", "s", "-3", "0", "1h", "nan", "1e9s", "3 s"])
def test_bad_budget(bad):
    with pytest.raises(ConfigError, match="--budget must be"):
        Budget.of(bad)


# Continuing


@pytest.fixture(scope="module", params=METHODS)
def whole(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    config = dataclasses.replace(TINY, method=(request.param,), epochs=2)
    return self_tune(config, folder), folder


@pytest.mark.parametrize("stop", [1, 6])
def test_a_stopped_run_continues_bit_for_bit(tmp_path, whole, stop):
    config = whole[0].config
    stopped = False
    try:
        self_tune(config, tmp_path, should_stop=StopAfter(stop))
    except Interrupted:
        stopped = True
    assert stopped or config.method[0] in ("hypernet", "ift")  # whose steps are of several batches
    torch.manual_seed(stop)
    resumed = self_tune(config, tmp_path, resume=True)
    assert log_of(tmp_path) == log_of(whole[1])
    for mine, theirs in zip(resumed.methods, whole[0].methods, strict=True):
        assert untimed(dataclasses.asdict(mine)) == untimed(dataclasses.asdict(theirs))


def test_a_finished_run_is_told_again_without_a_step(everything):
    before = content(everything[1])
    config = everything[0].config
    again = self_tune(config, everything[1], resume=True, should_stop=lambda: pytest.fail("a step was taken"))
    assert again.methods == everything[0].methods and content(everything[1]) == before


def test_another_run_is_refused(tmp_path):
    with pytest.raises(Interrupted):
        self_tune(TINY, tmp_path, should_stop=StopAfter(2))
    before = content(tmp_path)
    for name, value in (("seed", 1), ("warmup", 0), ("train_steps", 3), ("lr_drops", (2,))):
        with pytest.raises(SelfTuneError, match=rf"was made with {name} .*, but the configuration to resume has "):
            self_tune(dataclasses.replace(TINY, **{name: value}), tmp_path, resume=True)
    with pytest.raises(SelfTuneError, match="is there already"):
        self_tune(TINY, tmp_path)
    with pytest.raises(ValueError, match="output must be given"):
        self_tune(TINY, resume=True)
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        (("version",), 7),
        (("log_bytes",), -1),
        (("finished",), [{}]),
        (("trials",), [{"number": 0}]),
        (("trials", 0, "values"), {}),
        (("trials", 0, "points", 0, "valid_loss"), "low"),
        (("pending",), {"key": 3}),
        (("pending", "state"), {}),
        (("pending", "state", "learner"), {}),
    ],
)
def test_a_tampered_checkpoint_is_refused_in_one_line(tmp_path, place, wrong):
    config = dataclasses.replace(TINY, method=("random",), epochs=1)
    with pytest.raises(Interrupted):
        self_tune(config, tmp_path, should_stop=StopAfter(5))
    path = tmp_path / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    inside = state
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = wrong
    torch.save(state, path)
    with pytest.raises(CheckpointError) as caught:
        self_tune(config, tmp_path, resume=True)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_random_state_and_threads_are_left_alone():
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    self_tune(dataclasses.replace(TINY, epochs=1))
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)


# The command


def test_run_leaves_everything_and_says_where(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "o"
    methods = ["--method", "delta-stn,stn", "--method", "random"]
    assert run(*SMALL, *methods, "--output", str(folder)) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and str(folder) in captured.out
    assert all(
        word in captured.out for word in ("Delta-STN", "random search", "input_dropout", "Lowest validation loss")
    )
    assert {p.name for p in folder.iterdir()} == {"checkpoint.pt", "config.json", "curves.png", "log.jsonl"}
    assert (folder / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    before = content(folder)
    assert run(*SMALL, "--output", str(folder)) == 2
    assert "--overwrite" in capsys.readouterr().err and content(folder) == before
    assert run("--resume", str(folder), "--seed", "1") == 2
    assert "--seed 1 conflicts" in capsys.readouterr().err
    assert run("--resume", str(folder), *methods) == 0
    assert content(folder)["log.jsonl"] == before["log.jsonl"]


@pytest.mark.usefixtures("undrawn")
def test_stop_gives_the_command_that_continues(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("nestopt_ext.experiments.command.StopRequest.asked", lambda self: True)
    assert run(*SMALL, "--output", str(tmp_path / "o")) >= 128
    assert f"self-tune --resume {tmp_path / 'o'}" in capsys.readouterr().err
    monkeypatch.undo()
    assert run("--resume", str(tmp_path / "o")) == 0


def test_quick_run_without_the_extras(tmp_path, capsys, monkeypatch):
    for extra in ("matplotlib", "optuna"):
        for name in [m for m in sys.modules if m == extra or m.startswith(f"{extra}.")] + [extra]:
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.chdir(tmp_path)
    assert run("--quick", "--epochs", "1") == 0
    captured = capsys.readouterr()
    assert "Matplotlib is not installed" in captured.err and "Optuna is not installed" in captured.out
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["self-tune-digits-mlp-0"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--method", "adam"], "--method must be one of"),
        (["--method", "stn,stn"], "--method must name each one once"),
        (["--method", ","], "--method must be one or more"),
        (["--extra", "dropout"], "--extra must be one of"),
        (["--model", "lstm"], "--model lstm and --data ptb"),
        (["--data", "ptb", "--model", "mlp"], "--model lstm and --data ptb"),
        (["--data", "ptb"], "--data-dir"),
        (["--data", "mnist"], "--data-dir"),
        (["--epochs", "0"], "--epochs must be"),
        (["--budget", "soon"], "--budget must be"),
        (["--seed", str(2**32)], "--seed must be below"),
        (["--lr-drops", "5,5"], "--lr-drops must increase"),
        (["--lr-drops", "a"], "must be epochs such as"),
        (["--lr", "0"], "--lr must be > 0"),
        (["--start-rate", "0.95"], "--start-rate must be > 0 and < 0.95"),
        (["--hyper-lr", "nan"], "--hyper-lr"),
        (["--entropy-weight", "-1"], "--entropy-weight must be >= 0"),
        (["--threads", "100000"], "--threads must be <="),
        (["--device", "tpu9"], "--device must be"),
        (["--train-size", "1790"], "--train-size"),
        (["--resume", "/nonexistent"], "no run to continue"),
    ],
)
def test_bad_arguments_give_one_line_and_code_2(tmp_path, capsys, monkeypatch, arguments, part):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and part in captured.err and not captured.out
    assert not list(tmp_path.iterdir())


def test_config_survives_json():
    for config in (SelfTuneConfig(), SelfTuneConfig(method=("gp",), extra=("weight-decay",), budget="5m")):
        resolved = config.resolved()
        assert SelfTuneConfig.from_json(resolved.to_json(), Path("c.json")) == resolved
    assert (resolved.model, resolved.width, resolved.epochs) == ("mlp", 96, 150)
    for text in ("", "{}", "[]", resolved.to_json().replace("150", '"150"'), resolved.to_json().replace("gp", "gq")):
        with pytest.raises(ConfigError, match=r"c\.json"):
            SelfTuneConfig.from_json(text, Path("c.json"))
