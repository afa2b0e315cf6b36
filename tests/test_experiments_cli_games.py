"""The command `games`: help, exit codes, one-line errors, folders that are not overwritten, stopping and continuing."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nestopt_ext.experiments import cli, cli_games
from nestopt_ext.experiments.command import StopRequest

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
SMALL = {
    "bilinear": ["--angles", "3", "--lrs", "4", "--size", "1", "--condition", "2", "--max-steps", "200"],
    "sweep": ["--levels", "2", "--lrs", "4", "--angles", "3", "--max-steps", "200"],
    "dirac": ["--steps", "30"],
    "spectra": ["--size", "2", "--points", "6"],
    "mixture": [
        "--moduli", "0,0.8", "--angles", "1/8", "--lrs", "0.02", "--tuning-seeds", "1", "--test-seeds", "1",
        "--steps", "6", "--evaluations", "3", "--batch-size", "8", "--width", "4", "--noise-dim", "2",
        "--samples", "20", "--batch-runs", "1", "--threads", "1",
    ],
}  # fmt: skip
FILES = {
    "bilinear": {"config.json", "log.jsonl", "bilinear.png"},
    "sweep": {"config.json", "log.jsonl", "sweep.png"},
    "dirac": {"config.json", "log.jsonl", "dirac.png"},
    "spectra": {"config.json", "log.jsonl", "spectra.png", "phases.png"},
    "mixture": {"config.json", "log.jsonl", "checkpoint.pt", "heatmap.png", "samples.png"},
}
EXPERIMENTS = pytest.mark.parametrize("name", list(SMALL))


def run(*arguments: str) -> int:
    try:
        return cli.main(["games", *arguments])
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else 1


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_games_alone_prints_its_experiments(capsys):
    assert run() == 0
    text = capsys.readouterr().out
    assert all(name in text for name in SMALL)


@EXPERIMENTS
def test_help_names_every_setting(name, capsys):
    assert run(name, "--help") == 0
    text = capsys.readouterr().out
    settings = [field.name for field in dataclasses.fields(cli_games._EXPERIMENTS[name].config)]
    assert all("--" + setting.replace("_", "-") in text for setting in settings)
    assert "--quick" in text and "--output" in text and ("--resume" in text) == (name == "mixture")


def test_help_tells_defaults_as_they_would_be_typed(capsys):
    assert run("mixture", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    defaults = cli_games._EXPERIMENTS["mixture"].config()
    assert "(complex-sgd) --loss" in text and f"looks at a training ({defaults.evaluations})" in text
    written = text[text.index("in units of pi (") :].split("(")[1].split(")")[0]
    assert cli_games._numbers(written) == defaults.angles and "1/32" in written


@EXPERIMENTS
def test_run_leaves_everything_and_says_where(name, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "o"
    assert run(name, *SMALL[name], "--output", str(folder)) == 0
    captured = capsys.readouterr()
    assert captured.out.rstrip().endswith(f"Log and pictures: {folder}")
    assert captured.err == ""  # quiet where stderr is no terminal
    assert {path.name for path in folder.iterdir()} == FILES[name]
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert lines[0]["event"] == "config" and lines[0]["experiment"] == name


@pytest.mark.usefixtures("undrawn")
@EXPERIMENTS
def test_output_with_a_run_in_it_is_not_overwritten_unasked(name, tmp_path, capsys):
    folder = tmp_path / "o"
    assert run(name, *SMALL[name], "--output", str(folder)) == 0
    (folder / "notes.txt").write_text("mine")
    before = content(folder)
    capsys.readouterr()
    assert run(name, *SMALL[name], "--output", str(folder)) == 2
    error = capsys.readouterr().err
    assert "--overwrite" in error and error.count("\n") == 1 and content(folder) == before
    assert run(name, *SMALL[name], "--output", str(folder), "--overwrite", "--seed", "1") == 0
    after = content(folder)
    assert after.keys() == before.keys() and after["notes.txt"] == b"mine"
    assert after["log.jsonl"] != before["log.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["nonsense"], "nonsense"),
        (["bilinear", "--nonsense"], "--nonsense"),
        (["bilinear", "--angles", "many"], "--angles"),
        (["bilinear", "--angles", "1"], "--angles must be"),
        (["bilinear", "--tolerance", "2"], "--tolerance must be"),
        (["bilinear", "--tolerance", "nan"], "--tolerance must be"),
        (["bilinear", "--resume", "x"], "--resume"),
        (["sweep", "--levels", "1"], "--levels must be"),
        (["sweep", "--condition", "inf"], "--condition must be"),
        (["sweep", "--seed", "-1"], "--seed must be"),
        (["dirac", "--radius", "0"], "--radius must be"),
        (["dirac", "--steps", str(2**70)], "--steps must be"),
        (["spectra", "--mixture", "/nonexistent"], "--mixture must be the folder of a finished run"),
        (["mixture", "--angles", "1/0"], "--angles"),
        (["mixture", "--angles", "0,2"], "--angles must be"),
        (["mixture", "--resume", "/nonexistent"], "no run to continue"),
        (["mixture", "--resume", "x", "--output", "y"], "--output cannot be given"),
        (["mixture", "--resume", "x", "--quick"], "--quick cannot be given"),
    ],
)
def test_bad_arguments_give_one_line_and_code_2(tmp_path, capsys, monkeypatch, arguments, part):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and part in captured.err and not captured.out
    assert not list(tmp_path.rglob("log.jsonl"))


@pytest.mark.parametrize("names", [["log.jsonl", "dirac.png"], [".hidden"], ["config.json"], ["sub/file"]])
@pytest.mark.parametrize("extra", [[], ["--overwrite"]])
def test_folder_with_foreign_files_is_refused_and_left_alone(tmp_path, capsys, names, extra):
    folder = tmp_path / "mine"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"mine": true}')
    before = content(folder)
    assert run("dirac", *SMALL["dirac"], "--output", str(folder), *extra) == 2
    error = capsys.readouterr().err
    assert str(folder) in error and "left alone" in error and error.count("\n") == 1
    assert content(folder) == before


@pytest.mark.usefixtures("undrawn")
def test_run_of_another_experiment_is_left_alone(tmp_path, capsys):
    folder = tmp_path / "o"
    assert run("dirac", *SMALL["dirac"], "--output", str(folder)) == 0
    before = content(folder)
    assert run("sweep", *SMALL["sweep"], "--output", str(folder), "--overwrite") == 2
    assert "left alone" in capsys.readouterr().err and content(folder) == before


@pytest.mark.usefixtures("undrawn")
def test_overwrite_on_a_full_disk_keeps_the_finished_run(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    folder = tmp_path / "o"
    assert run("dirac", *SMALL["dirac"], "--output", str(folder)) == 0
    before = content(folder)
    monkeypatch.setattr("nestopt_ext._checkpoint.os.fsync", full)
    assert run("dirac", *SMALL["dirac"], "--output", str(folder), "--overwrite") == 1
    assert "No space left" in capsys.readouterr().err and content(folder) == before
    assert run("dirac", *SMALL["dirac"], "--output", str(tmp_path / "new" / "deep")) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["o"]  # the folders that the call made are gone


@pytest.mark.usefixtures("undrawn")
def test_overwrite_refuses_a_folder_under_the_name_of_a_file(tmp_path, capsys):
    folder = tmp_path / "o"
    assert run("dirac", *SMALL["dirac"], "--output", str(folder)) == 0
    (folder / "dirac.png").unlink()
    (folder / "dirac.png").mkdir()
    before = content(folder)
    assert run("dirac", *SMALL["dirac"], "--output", str(folder), "--overwrite") == 2
    assert "dirac.png" in capsys.readouterr().err and content(folder) == before


@pytest.mark.usefixtures("undrawn")
def test_default_output_never_meets_an_earlier_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run("dirac", *SMALL["dirac"], "--seed", "3") == 0
    assert run("dirac", *SMALL["dirac"], "--seed", "3", "--overwrite") == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["games-dirac-3", "games-dirac-3-run2"]


@pytest.mark.usefixtures("undrawn")
def test_quick_is_quick_and_yields_to_what_is_typed(tmp_path):
    assert run("dirac", "--quick", "--radius", "1", "--output", str(tmp_path / "o")) == 0
    config = json.loads((tmp_path / "o" / "config.json").read_text())
    assert config == {"experiment": "dirac", "seed": 0, "steps": 300, "radius": 1.0}


def test_absent_matplotlib_does_not_stop_the_run(tmp_path, capsys, monkeypatch):
    for name in [m for m in sys.modules if m == "matplotlib" or m.startswith("matplotlib.")] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert run("dirac", *SMALL["dirac"], "--output", str(tmp_path / "o")) == 0
    captured = capsys.readouterr()
    assert "complex momentum" in captured.out and "pip install" in captured.err
    assert {path.name for path in (tmp_path / "o").iterdir()} == {"config.json", "log.jsonl"}


def test_ctrl_c_before_the_run_began_promises_nothing(tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_games, "begin", interrupt)
    assert run("mixture", *SMALL["mixture"], "--output", str(tmp_path / "o")) == 130
    assert "--resume" not in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_a_step(tmp_path, number, code):
    folder = tmp_path / "o"
    command = [sys.executable, "-m", "nestopt_ext", "games", "bilinear", "--max-steps", "10000000"]
    process = subprocess.Popen([*command, "--output", str(folder)], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    log, deadline = folder / "log.jsonl", time.monotonic() + 100
    while not (log.exists() and log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert str(folder) in errors and "Traceback" not in errors and "--resume" not in errors


@pytest.mark.usefixtures("undrawn")
def test_mixture_continues_to_the_same_numbers(tmp_path, capsys, monkeypatch):
    class FifthLook(StopRequest):
        """A signal comes while the second of four trainings is looked at."""

        looks = 0

        def asked(self) -> bool:
            self.looks += 1
            if self.looks == 5:
                self.number = signal.SIGINT
            return super().asked()

    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    with monkeypatch.context() as patch:
        patch.setattr(cli_games, "StopRequest", FifthLook)
        assert run("mixture", *SMALL["mixture"], "--output", str(stopped)) == 130
    assert f"games mixture --resume {stopped}" in capsys.readouterr().err
    assert run("mixture", "--resume", str(stopped), "--width", "4") == 0
    assert run("mixture", *SMALL["mixture"], "--output", str(whole)) == 0
    assert (stopped / "log.jsonl").read_text() == (whole / "log.jsonl").read_text()
    before = content(stopped)
    capsys.readouterr()
    assert run("mixture", "--resume", str(stopped), "--width", "5") == 2
    assert "--width 5 conflicts" in capsys.readouterr().err
    (stopped / "checkpoint.pt").write_bytes(b"damaged")
    assert run("mixture", "--resume", str(stopped)) == 1
    error = capsys.readouterr().err
    assert "checkpoint.pt" in error and error.count("\n") == 1
    (stopped / "config.json").write_text("{")
    assert run("mixture", "--resume", str(stopped)) == 2
    assert "config.json" in capsys.readouterr().err
    assert content(stopped)["log.jsonl"] == before["log.jsonl"]
