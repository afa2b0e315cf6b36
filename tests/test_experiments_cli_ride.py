"""The command `ride`: help, exit codes, one-line errors, folders that are not overwritten, stopping and continuing."""

import dataclasses
import json

import pytest

from nestopt_ext.experiments import cli, cli_ride
from nestopt_ext.experiments.command import StopRequest
from nestopt_ext.experiments.ride.config import GAMES, RideConfig

SMALL = ["--game", "small-ipd", "--starts", "2", "--ascent-steps", "2", "--branch-sizes", "2", "--steps", "15"]


def run(*arguments: str) -> int:
    try:
        return cli.main(["ride", *arguments])
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else 1


@pytest.fixture
def drawn(monkeypatch):
    """Runs whose pictures are told of and not drawn."""
    folders = []
    monkeypatch.setattr(cli_ride.pictures, "save_pictures", lambda folder, result: folders.append(folder))
    return folders


def content(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_help_names_every_setting_and_game(capsys):
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert all("--" + field.name.replace("_", "-") in text for field in dataclasses.fields(RideConfig))
    assert all(game in text for game in GAMES) and "--quick" in text and "--resume" in text


def test_run_leaves_everything_and_says_where(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "o"
    assert run(*SMALL, "--output", str(folder)) == 0
    captured = capsys.readouterr()
    assert captured.out.rstrip().endswith(f"Log, checkpoint and pictures: {folder}")
    assert "solution" in captured.out and captured.err == ""  # quiet where stderr is no terminal
    assert set(content(folder)) == {"config.json", "log.jsonl", "checkpoint.pt", "portrait.png", "tree.png"}


def test_output_with_a_run_in_it_is_not_overwritten_unasked(tmp_path, capsys, drawn):
    folder = tmp_path / "o"
    assert run(*SMALL, "--output", str(folder)) == 0
    (folder / "notes.txt").write_text("mine")
    before = content(folder)
    capsys.readouterr()
    assert run(*SMALL, "--output", str(folder)) == 2
    error = capsys.readouterr().err
    assert "--overwrite" in error and error.count("\n") == 1 and content(folder) == before
    assert run(*SMALL, "--output", str(folder), "--overwrite", "--seed", "1") == 0
    after = content(folder)
    assert after.keys() == before.keys() and after["notes.txt"] == b"mine"
    assert after["log.jsonl"] != before["log.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--game", "chess"], "--game"),
        (["--nonsense"], "--nonsense"),
        (["--steps", "0"], "--steps must be"),
        (["--branch-sizes", "many"], "--branch-sizes"),
        (["--game", "gan", "--starts", "2"], "--starts is no option of --game gan"),
        (["--resume", "/nonexistent"], "--resume"),
        (["--resume", "x", "--quick"], "--quick cannot be given with it"),
    ],
)
def test_mistake_is_told_in_one_line_with_code_2(arguments, part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert part in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_interrupted_run_says_how_to_continue_and_does(tmp_path, monkeypatch, capsys, drawn):
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    assert run(*SMALL, "--output", str(whole)) == 0
    capsys.readouterr()
    asked = iter(range(10**6))
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "asked", lambda self: next(asked) >= 10)
        patch.setattr(StopRequest, "number", 2, raising=False)
        assert run(*SMALL, "--output", str(halved)) >= 128
    captured = capsys.readouterr()
    assert f"--resume {halved}" in captured.err and captured.out == ""
    assert run("--resume", str(halved), "--steps", "31") == 2
    assert run("--resume", str(halved)) == 0
    assert (halved / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()


def test_without_matplotlib_the_run_is_whole_and_says_what_is_missing(tmp_path, monkeypatch, capsys):
    def missing(folder, result):
        raise ImportError("matplotlib")

    monkeypatch.setattr(cli_ride.pictures, "save_pictures", missing)
    folder = tmp_path / "o"
    assert run(*SMALL, "--output", str(folder)) == 0
    assert "pip install" in capsys.readouterr().err
    assert json.loads((folder / "config.json").read_text())["game"] == "small-ipd"


def test_quick_run_of_the_default_game_is_quick(tmp_path, capsys, drawn):
    assert run("--quick", "--steps", "20", "--output", str(tmp_path / "o")) == 0
    assert "prisoner's dilemma" in capsys.readouterr().out
