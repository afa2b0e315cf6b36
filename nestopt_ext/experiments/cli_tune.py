"""The command `tune`: its options, its run folder, its run."""

import argparse
from pathlib import Path
from typing import Any

from .._checkpoint import CheckpointError
from .._progress import ProgressBar
from . import config as choices
from . import data, run_folder
from .command import Call, StopRequest, draw
from .config import TuneConfig
from .job import prepare
from .plots import save_picture
from .report import print_table
from .tune import Interrupted, TuneError, load_inputs, tune

#: What --quick sets where nothing else is said: a look at the whole path in a few seconds, not a result.
_QUICK = {"steps": 40, "trials": 4, "train_size": 150, "valid_size": 150, "width": 16}

_TUNE_TEXT = """\
Tunes one weight decay per weight of a network (or, with --hparams per-example-weight, one weight per training example)
by implicit differentiation, beside two baselines on the same split: no decay, and one global decay found by Optuna's
random search. Leaves a JSON log, a picture and a checkpoint in the output folder. Ctrl-C stops; --resume continues."""


def add(commands: Any) -> None:
    """Adds the parser of the command to the subparsers ``commands``."""
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
    parser.set_defaults(run=_run)


def _alpha(text: str) -> float | None:
    if text == "auto":
        return None
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be auto or a number; got {text!r}") from None


def _run(typed: dict[str, Any]) -> int:
    return Call("tune", (CheckpointError, TuneError), resumable=True).exit_code(lambda call: _tune(typed, call))


def _tune(typed: dict[str, Any], call: Call) -> int:
    job = prepare(
        typed,
        TuneConfig,
        checked=TuneConfig.resolved,
        quick=_QUICK,
        default_folder=_default_folder,
        movable=("data_dir",),
    )
    # The folder is touched when nothing is left that the caller could have got wrong.
    inputs = load_inputs(job.config)
    if not job.resume:
        run_folder.begin(job.folder, job.config, overwrite=job.overwrite)
    config, folder = job.config, job.folder
    call.begun = folder
    bar = ProgressBar(config.steps * (3 + config.trials))
    with StopRequest() as stop:
        try:
            result = tune(config, folder, inputs=inputs, resume=job.resume, should_stop=stop.asked, progress=bar)
        except Interrupted:
            bar.close()
            return call.interrupted(stop.number)
        finally:
            bar.close()
    draw(lambda: save_picture(folder / run_folder.PICTURE, result))
    print_table(result)
    print(f"Log, checkpoint and picture: {folder}")
    return 0


def _default_folder(config: TuneConfig) -> Path:
    return Path("runs") / f"tune-{config.data}-{config.hparams}-{config.seed}"
