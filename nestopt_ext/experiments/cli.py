"""The command line: `python -m nestopt_ext tune` and `python -m nestopt_ext info`."""

import argparse
import dataclasses
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from . import config as choices
from . import data, info, run_folder
from .checkpoint import CheckpointError
from .config import ConfigError, TuneConfig
from .formats import FormatError
from .plots import save_picture
from .report import ProgressBar, print_table
from .run_folder import FolderError
from .tune import Inputs, Interrupted, TuneError, TuneResult, load_inputs, tune

#: What --quick sets where nothing else is said: a look at the whole path in a few seconds, not a result.
_QUICK = {"steps": 40, "trials": 4, "train_size": 150, "valid_size": 150, "width": 16}

_TUNE_TEXT = """\
Tunes one weight decay per weight of a network (or, with --hparams per-example-weight, one weight per training example)
by implicit differentiation, beside two baselines on the same split: no decay, and one global decay found by Optuna's
random search. Leaves a JSON log, a picture and a checkpoint in the output folder. Ctrl-C stops; --resume continues."""


class UsageError(ValueError):
    """The arguments do not go together; the message is one line."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is what --help is for."""

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code: 0 done, 1 run failed, 2 bad arguments or data, 128 + n by signal n."""
    parser = _parser()
    options = parser.parse_args(arguments)
    command = vars(options).pop("command", None)
    if command is None:
        parser.print_help()
        return 0
    if command == "info":
        return _info(as_json=options.json)
    return _tune(vars(options))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m nestopt_ext", description="Nested (bilevel) optimization for PyTorch.")
    commands = parser.add_subparsers(dest="command", metavar="command")
    _add_tune(commands)
    text = "print versions, native status, SIMD level, CUDA architectures, devices"
    about = commands.add_parser("info", help=text, description=text)
    about.add_argument("--json", action="store_true", help="as one JSON object")
    return parser


def _add_tune(commands: Any) -> None:
    # Only what was typed appears in the namespace, so that --resume can tell a conflict from a default.
    parser = commands.add_parser(
        "tune",
        help="tune one weight decay per weight, or one weight per example, on real data",
        description=_TUNE_TEXT,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what is tuned, on what")
    what.add_argument("--hparams", choices=choices.HPARAMS, help="the hyperparameters (per-weight-decay)")
    what.add_argument("--data", choices=data.NAMES, help="the data set (digits, embedded in scikit-learn)")
    what.add_argument("--data-dir", metavar="DIR", help="folder with the data set's published files")
    what.add_argument("--label-noise", type=float, metavar="RATE", help="share of training labels made wrong (0)")
    what.add_argument(
        "--train-size", type=int, metavar="N", help="training examples (digits 300 | 800 to weight; others 2000 | 4000)"
    )
    what.add_argument(
        "--valid-size",
        type=int,
        metavar="N",
        help="validation examples (digits 300 | 200 to weight; others 2000 | 500)",
    )
    what.add_argument("--model", choices=choices.MODELS, help="the network (mlp; cnn for cifar10)")
    what.add_argument(
        "--width", type=int, metavar="N", help="hidden units (64) or channels of the first convolution (16)"
    )

    inner = parser.add_argument_group("how the weights are trained")
    inner.add_argument("--inner-optimizer", choices=choices.INNER_OPTIMIZERS, help="(sgd, momentum 0.9)")
    inner.add_argument(
        "--inner-lr", type=float, metavar="LR", help="(sgd 0.1, adam 0.003, complex-sgd 0.3; less for a cnn)"
    )
    inner.add_argument("--inner-steps", type=int, metavar="N", help="inner steps per outer step (5)")
    inner.add_argument(
        "--batch-size", type=int, metavar="N", help="examples per gradient, 0 for all (digits 0, others 256)"
    )

    outer = parser.add_argument_group("how the hyperparameters are tuned")
    outer.add_argument("--steps", type=int, metavar="N", help="outer steps (300)")
    outer.add_argument("--warmup", type=int, metavar="N", help="outer steps before they move (a tenth)")
    outer.add_argument(
        "--hyper-lr", type=float, metavar="LR", help="RMSprop's rate (decays 0.02, example weights 0.05)"
    )
    outer.add_argument(
        "--log-decay", type=float, metavar="X", help="log of the decay at the start (-7), or beside weights (-6)"
    )
    outer.add_argument("--solver", choices=choices.SOLVERS, help="of the inverse-Hessian product (neumann)")
    outer.add_argument("--num-terms", type=int, metavar="K", help="Hessian products of the Neumann series (3)")
    outer.add_argument(
        "--alpha", type=_alpha, metavar="auto|X", help="step of the series (auto: 0.9 / largest eigenvalue)"
    )
    outer.add_argument(
        "--trials", type=int, metavar="N", help="global decays that random search tries, each in full (20)"
    )

    run = parser.add_argument_group("the run")
    run.add_argument("--seed", type=int, metavar="N", help="of split, noise, start, batches and search (0)")
    run.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (cpu)")
    run.add_argument("--threads", type=int, metavar="N", help="CPU threads (1; for a cnn as many as PyTorch takes)")
    run.add_argument(
        "--output",
        metavar="DIR",
        help="folder for what the run leaves (runs/tune-<data>-<hparams>-<seed>, with -run2 and so on when taken)",
    )
    run.add_argument("--overwrite", action="store_true", help="start anew in an output folder that holds a run")
    run.add_argument("--resume", metavar="DIR", help="continue the run in DIR to the numbers of an uninterrupted one")
    run.add_argument("--quick", action="store_true", help="a small run of a few seconds, to see the whole path")


def _alpha(text: str) -> float | None:
    if text == "auto":
        return None
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be auto or a number; got {text!r}") from None


def _info(*, as_json: bool) -> int:
    facts = info.collect()
    print(json.dumps(facts, indent=2) if as_json else "\n".join(info.lines(facts)))
    return 0


def _tune(typed: dict[str, Any]) -> int:
    begun: Path | None = None
    try:
        job = _prepare(typed)
        # The folder is touched when nothing is left that the caller could have got wrong.
        inputs = load_inputs(job.config)
        if not job.resume:
            run_folder.begin(job.folder, job.config, overwrite=job.overwrite)
        begun = job.folder
        return _run(job, inputs)
    except (ConfigError, UsageError, FolderError, data.DataError, FormatError) as error:
        return _fail(error, 2)
    except (CheckpointError, TuneError) as error:
        return _fail(error, 1)
    except OSError as error:
        place = error.filename or begun
        return _fail(f"{place}: {error.strerror or error}" if place else error, 1)
    except KeyboardInterrupt:
        return _interrupted(begun, signal.SIGINT)


def _run(job: "_Job", inputs: Inputs) -> int:
    config, folder = job.config, job.folder
    total = config.steps * (3 + config.trials)
    bar = ProgressBar(total)
    with _StopRequest() as stop:
        try:
            result = tune(config, folder, inputs=inputs, resume=job.resume, should_stop=stop.asked, progress=bar)
        except Interrupted:
            bar.close()
            return _interrupted(folder, stop.number)
        finally:
            bar.close()
    print_table(result)
    _picture(folder / run_folder.PICTURE, result)
    print(f"Log, checkpoint and picture: {folder}")
    return 0


def _picture(path: Path, result: TuneResult) -> None:
    try:
        save_picture(path, result)
    except ImportError:
        print(
            "No picture: Matplotlib is not installed. Install it: pip install nestopt_ext[experiments]", file=sys.stderr
        )


@dataclasses.dataclass(frozen=True)
class _Job:
    """A run to make in ``folder``, or to continue there."""

    config: TuneConfig
    folder: Path
    resume: bool = False
    overwrite: bool = False


def _prepare(typed: dict[str, Any]) -> _Job:
    """What was asked for, with the arguments and the folder checked and nothing touched."""
    resume, output = typed.pop("resume", None), typed.pop("output", None)
    quick, overwrite = typed.pop("quick", False), typed.pop("overwrite", False)
    if resume is not None:
        for name, given in (("--output", output), ("--quick", quick), ("--overwrite", overwrite)):
            if given:
                raise UsageError(f"--resume continues a run as it was started; {name} cannot be given with it.")
        return _Job(_stored(Path(resume), typed), Path(resume), resume=True)
    config = TuneConfig(**({**_QUICK, **typed} if quick else typed)).resolved()
    default = _default_folder if overwrite else _free_folder
    folder = default(config) if output is None else Path(output)
    run_folder.check_usable(folder, overwrite=overwrite)
    return _Job(config, folder, overwrite=overwrite)


def _stored(folder: Path, typed: dict[str, Any]) -> TuneConfig:
    """The configuration of the run in ``folder``; what was typed must agree with it, but the data may have moved."""
    try:
        config = run_folder.stored_config(folder)
    except FolderError as error:
        raise UsageError(f"--resume {error} There is no run to continue.") from error
    moved = {"data_dir": typed.pop("data_dir")} if "data_dir" in typed else {}
    for name, value in typed.items():
        if value != getattr(config, name):
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{option} {value} conflicts with the run in {folder}, which has {getattr(config, name)}.")
    return dataclasses.replace(config, **moved)


def _default_folder(config: TuneConfig) -> Path:
    return Path("runs") / f"tune-{config.data}-{config.hparams}-{config.seed}"


def _free_folder(config: TuneConfig) -> Path:
    """The default folder, with a number behind its name when something is there."""
    plain = _default_folder(config)
    folder, number = plain, 1
    while not run_folder.is_free(folder):
        number += 1
        folder = plain.with_name(f"{plain.name}-run{number}")
    return folder


def _fail(error: object, code: int) -> int:
    print(f"python -m nestopt_ext tune: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _interrupted(folder: Path | None, number: int) -> int:
    if folder is None:
        print("Interrupted before the run began.", file=sys.stderr)
    else:
        print(f"Interrupted. Continue with: python -m nestopt_ext tune --resume {folder}", file=sys.stderr)
    return 128 + number


class _StopRequest:
    """Turns the first SIGINT or SIGTERM into a request to stop after the step; the second one acts as usual."""

    def __init__(self) -> None:
        self.number = 0
        self._earlier: dict[int, Any] = {}

    def asked(self) -> bool:
        """Whether a signal came."""
        return self.number != 0

    def __enter__(self) -> "_StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._earlier[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self._earlier = {}
