"""The tuning run: what it improves, what it writes, and that it continues to the same numbers bit for bit."""

import contextlib
import dataclasses
import io
import json
import math
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch

from nestopt_ext import _checkpoint as checkpoint
from nestopt_ext._checkpoint import CheckpointError
from nestopt_ext._json_log import JsonLog
from nestopt_ext.experiments import TuneConfig, config, data, report, tune
from nestopt_ext.experiments.config import ConfigError
from nestopt_ext.experiments.plots import save_picture
from nestopt_ext.experiments.problems import PerWeightDecay, example_weights
from nestopt_ext.experiments.tune import Interrupted, TuneError, auc, load_inputs

pytest.importorskip("sklearn")
pytest.importorskip("optuna")

TINY = TuneConfig(steps=6, inner_steps=2, warmup=1, trials=2, train_size=40, valid_size=30, width=4)
WEIGHTS = dataclasses.replace(TINY, hparams="per-example-weight", label_noise=0.4)


def untimed(log: Path) -> list[dict]:
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "peak_mib")} for line in lines]


def assert_same_run(a, b, folder_a: Path, folder_b: Path) -> None:
    assert untimed(folder_a / "log.jsonl") == untimed(folder_b / "log.jsonl")
    assert all(torch.equal(x, y) for x, y in zip(a.hparams, b.hparams, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True))
    assert [m.points for m in a.methods] == [m.points for m in b.methods]


class StopAfter:
    """Says stop at the n-th question."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == 0


# What it reaches


@pytest.fixture(scope="module")
def decays():
    return tune(TuneConfig(steps=80, trials=3, train_size=150, valid_size=150, width=16))


@pytest.fixture(scope="module")
def weights():
    return tune(TuneConfig(hparams="per-example-weight", label_noise=0.4, steps=80, trials=3, width=16))


def test_per_weight_decay_improves_the_validation_loss(decays):
    none, found, tuned = (decays.method(m).final for m in ("no-decay", "global-decay", "per-weight-decay"))
    assert tuned.valid_loss < 0.7 * min(none.valid_loss, found.valid_loss)
    assert tuned.test_loss < none.test_loss
    assert decays.method("per-weight-decay").num_hparams == sum(p.numel() for p in decays.model.parameters())


def test_per_example_weights_find_the_wrong_labels(weights):
    uniform, tuned = weights.method("no-decay").final, weights.method("per-example-weight")
    assert tuned.auc > 0.85
    assert tuned.final.test_accuracy > uniform.test_accuracy + 0.1
    learned = example_weights(weights.hparams[0])
    assert learned[weights.split.flipped].mean() < learned[~weights.split.flipped].mean()


def test_result_is_that_of_the_model_it_returns(decays):
    outputs = decays.model(decays.split.test.x)
    accuracy = float((outputs.argmax(1) == decays.split.test.y).double().mean())
    assert accuracy == pytest.approx(decays.method("per-weight-decay").final.test_accuracy, abs=1e-12)


def test_search_reports_the_best_of_its_trials(tmp_path):
    result = tune(TINY, tmp_path)
    trials = [line for line in untimed(tmp_path / "log.jsonl") if line["event"] == "trial"]
    best = min(trials, key=lambda t: t["valid_loss"])
    assert result.method("global-decay").log_decay == best["log_decay"]
    assert result.method("global-decay").final.valid_loss == best["valid_loss"]


@pytest.mark.parametrize(
    ("scores", "positive", "expected"),
    [
        ([0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1], 1.0),
        ([0.4, 0.3, 0.2, 0.1], [0, 0, 1, 1], 0.0),
        ([0.5, 0.5, 0.5, 0.5], [0, 1, 0, 1], 0.5),
        ([0.1, 0.9], [1, 1], None),
    ],
)
def test_auc(scores, positive, expected):
    assert auc(torch.tensor(scores), torch.tensor(positive, dtype=torch.bool)) == expected


def test_auc_equals_scikit_learn():
    from sklearn.metrics import roc_auc_score

    scores, positive = torch.randint(0, 9, (200,)) / 9, torch.rand(200) < 0.3
    assert auc(scores, positive) == pytest.approx(roc_auc_score(positive.numpy(), scores.numpy()), abs=1e-12)


# Continuing


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return tune(TINY, folder), folder


@pytest.mark.parametrize("stop", [1, 5, 6, 9, 13, 18, 20, 24, 27, 29])
def test_stopped_run_continues_bit_for_bit(tmp_path, whole, stop):
    with pytest.raises(Interrupted):
        tune(TINY, tmp_path, should_stop=StopAfter(stop))
    torch.manual_seed(stop)  # nothing may depend on the state of the process
    resumed = tune(TINY, tmp_path, resume=True)
    assert_same_run(whole[0], resumed, whole[1], tmp_path)


@pytest.mark.parametrize("optimizer", config.INNER_OPTIMIZERS)
@pytest.mark.parametrize("base", [TINY, WEIGHTS])
def test_run_stopped_again_and_again_continues_bit_for_bit(tmp_path, base, optimizer):
    setting = dataclasses.replace(base, inner_optimizer=optimizer, batch_size=16)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    expected = tune(setting, tmp_path / "a")
    resume = False
    for _ in range(20):
        try:
            resumed = tune(setting, tmp_path / "b", resume=resume, should_stop=StopAfter(4))
            break
        except Interrupted:
            resume = True
    assert_same_run(expected, resumed, tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("crash", [3, 14, 26])
def test_killed_run_continues_from_its_last_checkpoint(tmp_path, whole, crash):
    class Killed(BaseException):
        pass

    class Killer:
        def __init__(self) -> None:
            self.left = crash

        def stage(self, label: str) -> None: ...

        def advance(self, steps: int, note: str = "") -> None:
            self.left -= steps
            if self.left < 0:
                raise Killed

    with pytest.raises(Killed):
        tune(TINY, tmp_path, progress=Killer())
    resumed = tune(TINY, tmp_path, resume=True)
    assert_same_run(whole[0], resumed, whole[1], tmp_path)


def test_checkpoints_within_a_training_do_not_change_it(tmp_path, whole, monkeypatch):
    module = sys.modules["nestopt_ext.experiments.tune"]
    monkeypatch.setattr(module, "_CHECKPOINT_SECONDS", 0.0)
    assert_same_run(whole[0], tune(TINY, tmp_path), whole[1], tmp_path)


def test_finished_run_is_told_again_without_training(whole):
    again = tune(TINY, whole[1], resume=True, should_stop=lambda: pytest.fail("a step was taken"))
    assert [m.seconds for m in again.methods] == [m.seconds for m in whole[0].methods]


def test_other_data_under_a_checkpoint_is_refused(tmp_path, monkeypatch):
    with pytest.raises(Interrupted):
        tune(TINY, tmp_path, should_stop=StopAfter(3))
    split = data.make_split

    def other(dataset, train_size, valid_size, label_noise, seed):
        return split(dataset, train_size, valid_size, label_noise, seed + 1)

    monkeypatch.setattr(data, "make_split", other)
    with pytest.raises(TuneError, match="other data"):
        tune(TINY, tmp_path, resume=True)


@pytest.mark.parametrize(
    ("name", "value"), [("seed", 1), ("steps", 7), ("inner_lr", 0.2), ("hparams", "per-example-weight"), ("alpha", 0.1)]
)
def test_other_configuration_under_a_checkpoint_is_refused_by_name(tmp_path, name, value):
    with pytest.raises(Interrupted):
        tune(TINY, tmp_path, should_stop=StopAfter(3))
    with pytest.raises(TuneError, match=rf"checkpoint\.pt: was made with {name} "):
        tune(dataclasses.replace(TINY, **{name: value}), tmp_path, resume=True)


def test_new_run_replaces_no_files(tmp_path):
    for name in ("log.jsonl", "checkpoint.pt"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(TuneError, match="is there already"):
            tune(TINY, tmp_path)
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()


def test_global_random_state_and_threads_are_left_alone():
    threads = torch.get_num_threads()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tune(TINY)
    assert torch.equal(torch.rand(3), expected) and torch.get_num_threads() == threads


# Checkpoints


def test_checkpoint_round_trip(tmp_path):
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"version": 1, "x": torch.arange(5), "y": [1.5, None, {"z": "t"}]})
    state = checkpoint.load(path, 1)
    assert torch.equal(state["x"], torch.arange(5)) and state["y"] == [1.5, None, {"z": "t"}]
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_truncated_or_damaged_checkpoint_is_refused_in_one_line(tmp_path):
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"version": 1, "x": torch.arange(500)})
    content = path.read_bytes()
    damaged = [content[:n] for n in (0, 1, 100, len(content) // 2, len(content) - 1)]
    at = content.index(torch.arange(500).numpy().tobytes()) + 80
    damaged += [content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :], b"garbage" * 100]
    for wrong in damaged:
        path.write_bytes(wrong)
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load(path, 1)
        assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_checkpoint_of_another_version_or_kind_is_refused(tmp_path):
    path = tmp_path / "c.pt"
    for state in ({"version": 2}, {"x": 1}):
        checkpoint.save(path, state)
        with pytest.raises(CheckpointError, match="version 1"):
            checkpoint.load(path, 1)
    with pytest.raises(CheckpointError, match="no such file"):
        checkpoint.load(tmp_path / "absent.pt", 1)


def changes(value, path=()):
    """Every place in a tree of dicts and lists, with values there that do not belong."""
    for wrong in (None, 3, -5, 2.5, "x", [], {}, {"x": 1}, torch.ones(2, 3, 7, dtype=torch.int8)):
        yield path, wrong
    if isinstance(value, dict):
        for key in value:
            yield from changes(value[key], (*path, key))
    elif isinstance(value, list) and value:
        yield from changes(value[0], (*path, 0))


def changed(value, path, wrong):
    if not path:
        return wrong
    copy = list(value) if isinstance(value, list) else type(value)(value)
    copy[path[0]] = changed(value[path[0]], path[1:], wrong)
    return copy


def test_ill_typed_checkpoint_is_refused_in_one_line_or_harmless(tmp_path):
    tried = set()
    adam = dataclasses.replace(WEIGHTS, inner_optimizer="adam")
    for number, (setting, stop) in enumerate([(TINY, 2), (TINY, 14), (TINY, 29), (adam, 29), (TINY, 0)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        with contextlib.suppress(Interrupted):
            tune(setting, folder, should_stop=StopAfter(stop))
        state = checkpoint.load(folder / "checkpoint.pt", 3)
        log, inputs, refused = (folder / "log.jsonl").read_bytes(), load_inputs(setting), 0
        # What an earlier state had in the same place was tried there.
        fresh = [(path, wrong) for path, wrong in changes(state) if path not in tried]
        for path, wrong in fresh:
            (folder / "log.jsonl").write_bytes(log)
            (folder / "checkpoint.pt").unlink()
            torch.save(changed(state, path, wrong), folder / "checkpoint.pt")
            try:
                with contextlib.suppress(Interrupted):
                    tune(setting, folder, inputs=inputs, resume=True, should_stop=lambda: True)
            except (CheckpointError, TuneError) as error:
                refused += 1
                assert str(error).startswith(str(folder / "checkpoint.pt")) and "\n" not in str(error)
        assert refused > len(fresh) // 2
        tried.update(path for path, _ in fresh)


@pytest.mark.parametrize(
    "dropped", ["version", "config", "data", "log_bytes", "finished", "trials", "tuned", "pending"]
)
def test_checkpoint_without_a_part_is_refused(tmp_path, whole, dropped):
    shutil.copytree(whole[1], tmp_path, dirs_exist_ok=True)
    state = checkpoint.load(tmp_path / "checkpoint.pt", 3)
    torch.save({key: value for key, value in state.items() if key != dropped}, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: "):
        tune(TINY, tmp_path, resume=True)


def test_checkpoint_cannot_execute_code(tmp_path):
    marker, path = tmp_path / "executed", tmp_path / "c.pt"

    class Bomb:
        def __reduce__(self):
            return Path.touch, (marker,)

    torch.save({"version": 1, "x": Bomb()}, path)
    with pytest.raises(CheckpointError):
        checkpoint.load(path, 1)
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError):
        checkpoint.load(path, 1)
    assert not marker.exists()


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_failed_save_leaves_the_earlier_checkpoint_whole(tmp_path, monkeypatch, failing):
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"version": 1, "x": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"nestopt_ext._checkpoint.os.{failing}", full)
    with pytest.raises(CheckpointError, match=r"c\.pt: cannot be written: No space left"):
        checkpoint.save(path, {"version": 1, "x": 2})
    monkeypatch.undo()
    assert checkpoint.load(path, 1)["x"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


# What it writes


def test_log_follows_its_schema(whole):
    lines = [json.loads(line) for line in (whole[1] / "log.jsonl").read_text().splitlines()]
    assert lines[0]["event"] == "config" and lines[0]["steps"] == 6
    scores = {f"{part}_{what}" for part in ("train", "valid", "test") for what in ("loss", "accuracy")}
    for line in lines[1:]:
        if line["event"] == "point":
            assert set(line) == {"event", "method", "step", *scores}
        elif line["event"] == "trial":
            assert set(line) == {"event", "method", "number", "log_decay", "valid_loss", "seconds"}
        else:
            assert line["event"] == "result" and set(line["final"]) == scores
    assert [x["method"] for x in lines if x["event"] == "result"] == [m.method for m in whole[0].methods]


def test_log_writes_null_for_what_json_cannot_say(tmp_path):
    with JsonLog(tmp_path / "l.jsonl") as log:
        log.write("point", x=math.nan, y=[math.inf, 1.0])
    assert json.loads((tmp_path / "l.jsonl").read_text()) == {"event": "point", "x": None, "y": [None, 1.0]}


def test_log_that_lost_lines_is_refused(tmp_path):
    (tmp_path / "l.jsonl").write_bytes(b"{}\n")
    with pytest.raises(OSError, match="must hold the 10 bytes"):
        JsonLog(tmp_path / "l.jsonl", 10)


@pytest.mark.parametrize("plain", [False, True])
def test_table_says_everything(weights, monkeypatch, plain):
    if plain:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    out = io.StringIO()
    report.print_table(weights, out)
    text = out.getvalue()
    final = weights.method("per-example-weight").final
    for part in ("no decay", "one global decay", "one weight per example", "800", "AUC", "trained on", "peak MiB"):
        assert part in text
    assert f"{final.test_loss:.3f} / {100 * final.test_accuracy:.1f} %" in text
    assert "320 of 800 training labels are wrong" in text


@pytest.mark.parametrize("model", config.MODELS)
def test_picture_of_decays(tmp_path, model):
    pytest.importorskip("matplotlib")
    result = tune(dataclasses.replace(TINY, model=model, steps=2))
    save_picture(tmp_path / "p.png", result)
    assert (tmp_path / "p.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_picture_of_weights(tmp_path, weights):
    pytest.importorskip("matplotlib")
    save_picture(tmp_path / "p.png", weights)
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_missing_optuna_skips_that_baseline_with_the_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    result = tune(TINY)
    assert "pip install" in result.method("global-decay").skipped
    out = io.StringIO()
    report.print_table(result, out)
    assert "skipped" in out.getvalue() and "Optuna is not installed" in out.getvalue()
    assert result.method("per-weight-decay").final.valid_loss > 0


# Choices


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"hparams": "x"}, "--hparams must be one of"),
        ({"data": "x"}, "--data must be one of"),
        ({"label_noise": 1.0}, "--label-noise"),
        ({"label_noise": math.nan}, "--label-noise"),
        ({"steps": 0}, "--steps"),
        ({"trials": -1}, "--trials"),
        ({"inner_lr": 0.0}, "--inner-lr"),
        ({"hyper_lr": math.inf}, "--hyper-lr"),
        ({"log_decay": 3.0}, "--log-decay"),
        ({"alpha": -1.0}, "--alpha"),
        ({"seed": 2**32}, "--seed"),
        ({"steps": True}, "--steps"),
        ({"threads": 4097}, "--threads must be <= 4096"),
        ({"num_terms": 10**9}, "--num-terms"),
        ({"width": 2**63}, "--width must be below"),
    ],
)
def test_bad_choice_is_refused_by_name(choice, message):
    with pytest.raises(ConfigError, match=message):
        TuneConfig(**choice).resolved()


def test_config_survives_json():
    resolved = WEIGHTS.resolved()
    assert TuneConfig.from_json(resolved.to_json(), Path("c.json")) == resolved
    huge = resolved.to_json().replace('"label_noise": 0.4', f'"label_noise": {10**400}')
    for text in ("", "{}", "[]", "[" * 10**5, huge, resolved.to_json().replace('"steps": 6', '"steps": "6"')):
        with pytest.raises(ConfigError, match=r"c\.json"):
            TuneConfig.from_json(text, Path("c.json"))


def test_decays_stay_in_their_range():
    problem = PerWeightDecay(torch.nn.Linear(2, 2), -7.0)
    with torch.no_grad():
        problem.hparams[0].fill_(5.0)
        problem.hparams[1].fill_(-50.0)
    problem.project_()
    assert problem.hparams[0].detach().max() == config.LOG_DECAY_RANGE[1]
    assert problem.hparams[1].detach().min() == config.LOG_DECAY_RANGE[0]


def test_divergence_is_said():
    with pytest.raises(TuneError, match=r"diverged.*--inner-lr"):
        tune(dataclasses.replace(TINY, inner_lr=1e6, inner_steps=20))
