"""The command line: help, info, exit codes, one-line errors, a real Ctrl-C and what continues it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nestopt_ext.experiments import cli, cli_tune

pytest.importorskip("sklearn")

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--steps", "6", "--inner-steps", "2", "--warmup", "1", "--trials", "1"]
SMALL += ["--train-size", "40", "--valid-size", "30", "--width", "4"]


def run(*arguments: str) -> int:
    try:
        return cli.main(arguments)
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else 1


def untimed(log: Path) -> list[dict]:
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "peak_mib")} for line in lines]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "nestopt_ext", *arguments]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_module_alone_prints_its_commands():
    done = subprocess.run(command(), capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert done.returncode == 0
    assert "tune" in done.stdout and "info" in done.stdout and not done.stderr


def test_info_for_people_and_for_programs(capsys):
    assert run("info") == 0
    text = capsys.readouterr().out
    assert "native library" in text and torch.__version__ in text and "SIMD level" in text and "CUDA archs" in text
    assert run("info", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"] == torch.__version__ and facts["devices"][0]["name"] == "cpu"
    assert set(facts["optional"]) >= {"optuna", "matplotlib", "scikit-learn", "tqdm", "rich"}


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["nonsense"], "nonsense"),
        (["tune", "--nonsense"], "--nonsense"),
        (["tune", "--steps", "many"], "--steps"),
        (["tune", "--steps", "0"], "--steps must be"),
        (["tune", "--hparams", "per-layer"], "--hparams"),
        (["tune", "--alpha", "x"], "--alpha"),
        (["tune", "--alpha", "-1"], "--alpha"),
        (["tune", "--label-noise", "1"], "--label-noise"),
        (["tune", "--label-noise", "nan"], "--label-noise"),
        (["tune", "--device", "abacus"], "--device"),
        (["tune", "--device", "cuda:99"], "--device"),
        (["tune", "--device", "meta"], "--device"),
        (["tune", "--threads", "1000000000"], "--threads must be <= 4096"),
        (["tune", "--num-terms", "1000000000"], "--num-terms"),
        (["tune", "--width", str(2**70)], "--width must be below"),
        (["tune", "--width", "1000000000000000"], "--width 1000000000000000"),
        (["tune", "--data", "mnist"], "--data-dir"),
        (["tune", "--data", "mnist", "--data-dir", "/nonexistent"], "yann.lecun.com"),
        (["tune", "--train-size", "1700"], "--train-size"),
        (["tune", "--resume", "/nonexistent"], "no run to continue"),
        (["tune", "--resume", "x", "--output", "y"], "--output cannot be given"),
    ],
)
def test_bad_arguments_give_one_line_and_code_2(tmp_path, capsys, monkeypatch, arguments, part):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and part in captured.err and not captured.out
    assert not list(tmp_path.glob("runs/*"))


def test_run_leaves_everything_and_says_where(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert run("tune", *SMALL, "--output", str(tmp_path / "o")) == 0
    captured = capsys.readouterr()
    assert "one decay per weight" in captured.out and str(tmp_path / "o") in captured.out
    assert captured.err == ""  # quiet where stderr is no terminal
    assert {p.name for p in (tmp_path / "o").iterdir()} == {"checkpoint.pt", "config.json", "curves.png", "log.jsonl"}


@pytest.mark.usefixtures("undrawn")
def test_output_with_a_run_in_it_is_not_overwritten_unasked(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("tune", *SMALL, "--output", "o") == 0
    first = (tmp_path / "o" / "log.jsonl").read_bytes()
    capsys.readouterr()
    assert run("tune", *SMALL, "--output", "o") == 2
    assert "--overwrite" in capsys.readouterr().err and (tmp_path / "o" / "log.jsonl").read_bytes() == first
    assert run("tune", *SMALL, "--output", "o", "--overwrite", "--seed", "1") == 0
    assert (tmp_path / "o" / "log.jsonl").read_bytes() != first


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


LATE_FAULTS = [
    ["--device", "cuda:99"],
    ["--data", "mnist"],
    ["--data", "mnist", "--data-dir", "/nonexistent"],
    ["--train-size", "1790"],
    ["--threads", "1000000000"],
    ["--width", "1000000000000000"],
]


@pytest.mark.parametrize(
    "names",
    [
        ["log.jsonl", "curves.png", "checkpoint.pt"],
        ["log.jsonl"],
        ["notes.txt"],
        [".hidden"],
        ["config.json", "log.jsonl"],
        ["sub/file"],
    ],
)
@pytest.mark.parametrize("extra", [[], ["--overwrite"], ["--device", "cuda:99"]])
def test_folder_with_foreign_files_is_refused_and_left_alone(tmp_path, capsys, names, extra):
    folder = tmp_path / "mine"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"mine": true}')
    before = content(folder)
    assert run("tune", *SMALL, "--output", str(folder), *extra) == 2
    error = capsys.readouterr().err
    assert str(folder) in error and "left alone" in error and error.count("\n") == 1
    assert content(folder) == before


@pytest.mark.parametrize("fault", LATE_FAULTS)
def test_fault_leaves_the_disk_as_it_was(tmp_path, capsys, fault):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent/deep"):
        assert run("tune", *SMALL, "--output", str(tmp_path / name), *fault) == 2
        assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["empty"]
    assert "Traceback" not in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "o"
    assert run("tune", *SMALL, "--output", str(folder)) == 0
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "o"))


@pytest.mark.parametrize("fault", LATE_FAULTS)
def test_overwrite_with_a_fault_keeps_the_finished_run(copied, fault):
    before = content(copied)
    assert run("tune", *SMALL, "--output", str(copied), "--overwrite", *fault) == 2
    assert content(copied) == before


@pytest.mark.usefixtures("undrawn")
def test_overwrite_replaces_the_files_of_the_run_alone(copied):
    (copied / "notes.txt").write_text("mine")
    before = content(copied)
    assert run("tune", *SMALL, "--output", str(copied), "--overwrite", "--seed", "1") == 0
    after = content(copied)
    assert after.keys() == before.keys() and after["notes.txt"] == b"mine"
    assert after["log.jsonl"] != before["log.jsonl"]


def test_overwrite_on_a_full_disk_keeps_the_finished_run(copied, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    before = content(copied)
    monkeypatch.setattr("nestopt_ext._checkpoint.os.fsync", full)
    assert run("tune", *SMALL, "--output", str(copied), "--overwrite") == 1
    assert "No space left" in capsys.readouterr().err and content(copied) == before
    assert run("tune", *SMALL, "--output", str(copied.parent / "new" / "deep")) == 1
    assert [p.name for p in copied.parent.iterdir()] == ["o"]  # the folders that the call made are gone


def test_overwrite_refuses_a_folder_under_the_name_of_a_file(copied, capsys):
    (copied / "log.jsonl").unlink()
    (copied / "log.jsonl").mkdir()
    before = content(copied)
    assert run("tune", *SMALL, "--output", str(copied), "--overwrite") == 2
    assert "log.jsonl" in capsys.readouterr().err and content(copied) == before


def test_output_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "o").write_text("mine")
    assert run("tune", *SMALL, "--output", str(tmp_path / "o"), "--overwrite") == 2
    assert "not a folder" in capsys.readouterr().err and (tmp_path / "o").read_text() == "mine"


@pytest.mark.usefixtures("undrawn")
def test_default_output_passes_by_foreign_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    taken = tmp_path / "runs" / "tune-digits-per-weight-decay-0"
    taken.mkdir(parents=True)
    (taken / "log.jsonl").write_text("mine")
    assert run("tune", *SMALL) == 0
    assert content(taken) == {"log.jsonl": b"mine"}
    assert (taken.parent / f"{taken.name}-run2" / "log.jsonl").exists()


def test_ctrl_c_before_the_run_began_promises_nothing(tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_tune, "load_inputs", interrupt)
    assert run("tune", *SMALL, "--output", str(tmp_path / "o")) == 130
    assert "--resume" not in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_resume_refuses_a_configuration_that_was_changed(copied, capsys):
    path = copied / "config.json"
    path.write_text(path.read_text().replace('"inner_steps": 2', '"inner_steps": 3'))
    before = content(copied)
    assert run("tune", "--resume", str(copied)) == 1
    error = capsys.readouterr().err
    assert "inner_steps" in error and "checkpoint.pt" in error and error.count("\n") == 1
    assert content(copied) == before


def test_absurd_threads_in_a_configuration_are_refused(copied, capsys):
    path = copied / "config.json"
    path.write_text(path.read_text().replace('"threads": 1', '"threads": 1000000000'))
    assert run("tune", "--resume", str(copied)) == 2
    error = capsys.readouterr().err
    assert str(path) in error and "--threads must be <= 4096" in error


@pytest.mark.parametrize("tampered", [{"tuned": {}}, {"tuned": 3}, {"log_bytes": -5}])
def test_tampered_checkpoint_gives_one_line(copied, capsys, tampered):
    path = copied / "checkpoint.pt"
    torch.save({**torch.load(path, weights_only=True), **tampered}, path)
    before = content(copied)
    assert run("tune", "--resume", str(copied)) == 1
    error = capsys.readouterr().err
    assert str(path) in error and next(iter(tampered)) in error and error.count("\n") == 1
    assert content(copied) == before


@pytest.mark.usefixtures("undrawn")
def test_resume_refuses_what_conflicts_and_takes_what_agrees(copied, capsys):
    folder = str(copied)
    assert run("tune", "--resume", folder, "--seed", "1") == 2
    assert "--seed 1 conflicts" in capsys.readouterr().err
    assert run("tune", "--resume", folder, "--inner-optimizer", "adam") == 2
    assert "--inner-optimizer adam conflicts" in capsys.readouterr().err
    assert run("tune", "--resume", folder, "--steps", "6", "--data-dir", folder) == 0


def test_damaged_checkpoint_gives_one_line(copied, capsys):
    path = copied / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-100])
    assert run("tune", "--resume", str(copied)) == 1
    error = capsys.readouterr().err
    assert str(path) in error and error.count("\n") == 1
    (copied / "config.json").write_text("{")
    assert run("tune", "--resume", str(copied)) == 2
    assert "config.json" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["matplotlib", "tqdm", "rich"])
def test_absent_extras_do_not_stop_the_run(tmp_path, capsys, monkeypatch, module):
    for name in [m for m in sys.modules if m == module or m.startswith(module + ".")] + [module]:
        monkeypatch.setitem(sys.modules, name, None)
    assert run("tune", *SMALL, "--output", str(tmp_path / "o")) == 0
    captured = capsys.readouterr()
    assert "one decay per weight" in captured.out
    assert ("pip install" in captured.err) == (module == "matplotlib")


LONG = [
    "--steps",
    "150",
    "--inner-steps",
    "1",
    "--trials",
    "1",
    "--train-size",
    "40",
    "--valid-size",
    "30",
    "--width",
    "4",
]


def stop_by(number: int, folder: Path) -> tuple[int, str]:
    """Starts a run in ``folder``, sends it a signal in the middle, and returns its exit code and what it said."""
    start = command("tune", *LONG, "--output", str(folder))
    process = subprocess.Popen(start, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    log, deadline = folder / "log.jsonl", time.monotonic() + 100
    while not (log.exists() and log.read_text().count("\n") > 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert log.read_text().count('"event": "result"') < 4  # it was stopped before its end
    return process.returncode, errors


@pytest.mark.usefixtures("undrawn")
def test_ctrl_c_leaves_a_run_that_continues_to_the_same_numbers(tmp_path):
    code, errors = stop_by(signal.SIGINT, tmp_path / "stopped")
    assert code == 130
    assert f"--resume {tmp_path / 'stopped'}" in errors and "Traceback" not in errors
    assert run("tune", "--resume", str(tmp_path / "stopped")) == 0
    assert run("tune", *LONG, "--output", str(tmp_path / "whole")) == 0
    assert untimed(tmp_path / "stopped" / "log.jsonl") == untimed(tmp_path / "whole" / "log.jsonl")


def test_sigterm_stops_as_ctrl_c_does(tmp_path):
    code, errors = stop_by(signal.SIGTERM, tmp_path / "stopped")
    assert code == 143 and "--resume" in errors and "Traceback" not in errors


@pytest.mark.parametrize(
    "arguments", [["info"], ["tune", *SMALL], ["games", "bilinear", "--quick"]], ids=lambda a: a[0]
)
def test_a_reader_that_goes_away_is_no_fault_of_the_run(tmp_path, arguments):
    """As in `... | head -1`: nothing is said, the code is that of SIGPIPE, and what the run leaves is whole."""
    output = [] if arguments == ["info"] else ["--output", str(tmp_path)]
    process = subprocess.Popen(
        command(*arguments, *output), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(timeout=100) == 128 + signal.SIGPIPE
    assert not output or list(tmp_path.glob("*.png"))


@pytest.mark.usefixtures("undrawn")
def test_default_output_meets_an_earlier_run_only_to_overwrite_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["tune-digits-per-weight-decay-0", "tune-digits-per-weight-decay-0-run2"]
    for extra, expected in (((), names[:1]), ((), names), (("--overwrite",), names)):
        assert run("tune", *SMALL, *extra) == 0
        assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == expected
