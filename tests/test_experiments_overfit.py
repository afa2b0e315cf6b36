"""Overfitting a validation set: what it reaches, what it writes, that it continues to the same numbers bit for bit."""

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
from nestopt_ext.experiments.overfit import OverfitConfig, OverfitError, load_split, overfit
from nestopt_ext.experiments.tune import Interrupted

pytest.importorskip("sklearn")

TINY = OverfitConfig(steps=45, train_size=20, valid_size=20, width=8, inner_lr=0.01, hyper_lr=0.05, inner_steps=2)
SMALL = ["--steps", "45", "--train-size", "20", "--valid-size", "20", "--width", "8", "--inner-steps", "2"]


def run(*arguments: str) -> int:
    try:
        return cli.main(["overfit", *arguments])
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else 1


def untimed(log: Path) -> list[dict]:
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


class StopAfter:
    """Says stop at the n-th question."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == 0


# What it reaches


@pytest.fixture(scope="module")
def learned():
    return overfit(OverfitConfig(seed=1, steps=200, inner_lr=0.003, hyper_lr=0.02, inner_steps=2))


def test_learns_both_parts_by_heart(learned):
    assert learned.learned_at is not None and learned.learned_at == learned.points[-1]["step"] < 200
    assert learned.final.train_accuracy == learned.final.valid_accuracy == 1.0
    assert learned.points[0]["valid_accuracy"] < 0.8
    assert learned.final.test_accuracy < 0.9 and learned.final.test_loss > 1.5 * learned.final.valid_loss


def test_it_is_the_decays_that_learn_the_validation_part(learned):
    frozen = overfit(dataclasses.replace(learned.config, steps=learned.learned_at, hyper_lr=1e-9))
    assert frozen.learned_at is None and frozen.final.valid_accuracy < 0.8
    assert frozen.final.valid_loss > 3 * learned.final.valid_loss
    moved = torch.cat([h.flatten() for h in learned.hparams])
    assert moved.min() < -5 and moved.max() > -3


def test_scores_are_those_of_the_model_it_returns(learned):
    split = load_split(learned.config)
    outputs = learned.model(split.test.x)
    accuracy = float((outputs.argmax(1) == split.test.y).double().mean())
    assert accuracy == pytest.approx(learned.final.test_accuracy, abs=1e-12)
    assert split.train.x.min() == 0 and split.train.x.max() == 1 and len(split.test) == 1697


# Continuing


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return overfit(TINY, folder), folder


@pytest.mark.parametrize("stop", [1, 20, 33])
def test_stopped_run_continues_bit_for_bit(tmp_path, whole, stop):
    with pytest.raises(Interrupted):
        overfit(TINY, tmp_path, should_stop=StopAfter(stop))
    torch.manual_seed(stop)
    resumed = overfit(TINY, tmp_path, resume=True)
    assert untimed(tmp_path / "log.jsonl") == untimed(whole[1] / "log.jsonl")
    assert all(torch.equal(x, y) for x, y in zip(resumed.hparams, whole[0].hparams, strict=True))
    assert resumed.points == whole[0].points and [p["step"] for p in resumed.points] == [20, 40, 45]


def test_finished_run_is_told_again_without_a_step(whole):
    before = content(whole[1])
    again = overfit(TINY, whole[1], resume=True, should_stop=lambda: pytest.fail("a step was taken"))
    assert again.points == whole[0].points and content(whole[1]) == before


def test_checkpoint_of_another_run_is_refused(tmp_path, whole):
    with pytest.raises(Interrupted):
        overfit(TINY, tmp_path, should_stop=StopAfter(3))
    before = content(tmp_path)
    for change in ({"seed": 1}, {"inner_lr": 0.02}, {"width": 9}, {"model": "linear"}):
        with pytest.raises(CheckpointError, match=r"checkpoint\.pt: does not fit this loop"):
            overfit(dataclasses.replace(TINY, **change), tmp_path, resume=True)
    with pytest.raises(
        CheckpointError, match=rf"was made with seed {TINY.seed}, but the configuration to resume has 1"
    ):
        overfit(dataclasses.replace(TINY, seed=1), tmp_path, resume=True)
    with pytest.raises(RuntimeError, match="must not be there when a run begins"):
        overfit(TINY, tmp_path)
    assert content(tmp_path) == before
    with pytest.raises(ValueError, match="output must be given to resume"):
        overfit(TINY, resume=True)


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        (("loop", "step_count"), 10**6),
        (("loop", "step_count"), 45),
        (("loop", "stateful", 0, "points"), [{"step": 1}]),
        (("loop", "stateful", 0, "learned_at"), 3),
        (("loop", "stateful", 0), {}),
        (("loop", "hparams"), []),
        (("log_bytes",), -1),
    ],
)
def test_tampered_checkpoint_is_refused_in_one_line(tmp_path, place, wrong):
    with pytest.raises(Interrupted):
        overfit(TINY, tmp_path, should_stop=StopAfter(3))
    path = tmp_path / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    inside = state
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = wrong
    torch.save(state, path)
    with pytest.raises(CheckpointError) as caught:
        overfit(TINY, tmp_path, resume=True)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_divergence_is_said():
    with pytest.raises(OverfitError, match="the training diverged"):
        overfit(dataclasses.replace(TINY, inner_lr=1e30))


def test_random_state_and_threads_are_left_alone():
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    overfit(dataclasses.replace(TINY, steps=2))
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)


# The command


@pytest.mark.parametrize("model", ["mlp", "linear"])
def test_run_leaves_everything_and_says_where(tmp_path, capsys, model):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "o"
    assert run(*SMALL, "--model", model, "--output", str(folder)) == 0
    captured = capsys.readouterr()
    assert "highest test accuracy" in captured.out and str(folder) in captured.out and captured.err == ""
    assert {p.name for p in folder.iterdir()} == {"checkpoint.pt", "config.json", "curves.png", "log.jsonl"}
    assert (folder / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert {line["event"] for line in untimed(folder / "log.jsonl")} == {"step", "point"}


@pytest.mark.usefixtures("undrawn")
def test_output_with_a_run_in_it_is_not_overwritten_unasked(tmp_path, capsys):
    folder = tmp_path / "o"
    assert run(*SMALL, "--output", str(folder)) == 0
    capsys.readouterr()
    before = content(folder)
    assert run(*SMALL, "--output", str(folder)) == 2
    assert "--overwrite" in capsys.readouterr().err and content(folder) == before
    assert run("--resume", str(folder), "--seed", "1") == 2
    assert "--seed 1 conflicts" in capsys.readouterr().err
    assert run("--resume", str(folder)) == 0
    assert run(*SMALL, "--output", str(folder), "--overwrite", "--seed", "1") == 0
    assert content(folder)["log.jsonl"] != before["log.jsonl"]


@pytest.mark.usefixtures("undrawn")
def test_stop_gives_the_command_that_continues(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("nestopt_ext.experiments.command.StopRequest.asked", lambda self: True)
    assert run(*SMALL, "--output", str(tmp_path / "o")) >= 128
    assert f"overfit --resume {tmp_path / 'o'}" in capsys.readouterr().err
    monkeypatch.undo()
    assert run("--resume", str(tmp_path / "o")) == 0


def test_quick_run_without_the_extra_for_pictures(tmp_path, capsys, monkeypatch):
    for name in [m for m in sys.modules if m == "matplotlib" or m.startswith("matplotlib.")] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.chdir(tmp_path)
    assert run("--quick", "--steps", "3") == 0
    assert "pip install" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["overfit-mlp-0"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--model", "cnn"], "--model"),
        (["--steps", "0"], "--steps must be"),
        (["--seed", str(2**32)], "--seed must be below"),
        (["--inner-lr", "0"], "--inner-lr must be > 0"),
        (["--hyper-lr", "nan"], "--hyper-lr"),
        (["--log-decay", "3"], "--log-decay must be in"),
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
    resolved = OverfitConfig(model="linear").resolved()
    assert resolved.steps == 6000 and OverfitConfig().resolved().steps == 3000
    assert OverfitConfig.from_json(resolved.to_json(), Path("c.json")) == resolved
    for text in ("", "{}", "[]", resolved.to_json().replace("6000", '"6000"')):
        with pytest.raises(ConfigError, match=r"c\.json"):
            OverfitConfig.from_json(text, Path("c.json"))
    with pytest.raises(ConfigError, match="--inner-lr"):
        OverfitConfig(inner_lr=math.inf).resolved()
