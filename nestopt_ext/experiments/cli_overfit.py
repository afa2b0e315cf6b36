"""The command `overfit`: its options, its run folder, its run."""

import argparse
from pathlib import Path
from typing import Any

from .._checkpoint import CheckpointError
from .._progress import ProgressBar
from . import run_folder
from .command import Call, StopRequest, draw, print_tables
from .job import prepare
from .overfit import MODELS, OverfitConfig, OverfitError, load_split, overfit
from .overfit_report import findings, save_picture, table
from .tune import Interrupted

#: What --quick sets where nothing else is said: a look at the whole path in a few seconds, not a result.
_QUICK = {"steps": 100, "train_size": 20, "valid_size": 20, "width": 16, "inner_lr": 0.01, "hyper_lr": 0.05}

_OVERFIT_TEXT = """\
Learns 50 training and 50 validation digits by heart: one weight decay per weight, moved along the hypergradient without
any inverse (K = 0), until 99.9 % of both parts are right. Leaves a JSON log, a picture and a checkpoint in the output
folder. Ctrl-C stops; --resume continues."""


def add(commands: Any) -> None:
    """Adds the parser of the command to the subparsers ``commands``."""
    # Only what was typed appears in the namespace, so that --resume can tell a conflict from a default.
    parser = commands.add_parser(
        "overfit",
        help="overfit a validation set with one weight decay per weight",
        description=_OVERFIT_TEXT,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=MODELS, help="one hidden layer, or none (mlp)")
    parser.add_argument("--width", type=int, metavar="N", help="hidden units (64)")
    parser.add_argument("--train-size", type=int, metavar="N", help="training digits (50)")
    parser.add_argument("--valid-size", type=int, metavar="N", help="validation digits (50); all others are to test on")
    parser.add_argument("--steps", type=int, metavar="N", help="outer steps at the most (mlp 3000, linear 6000)")
    parser.add_argument("--inner-steps", type=int, metavar="N", help="steps of Adam per outer step (5)")
    parser.add_argument("--inner-lr", type=float, metavar="LR", help="Adam's rate (0.001)")
    parser.add_argument("--hyper-lr", type=float, metavar="LR", help="RMSprop's rate on the decays (0.01)")
    parser.add_argument("--log-decay", type=float, metavar="X", help="log of the decays at the start (-4)")
    parser.add_argument("--seed", type=int, metavar="N", help="of split and start (0)")
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder for what the run leaves (runs/overfit-<model>-<seed>, with -run2 and so on when taken)",
    )
    parser.add_argument("--overwrite", action="store_true", help="start anew in an output folder that holds a run")
    parser.add_argument(
        "--resume", metavar="DIR", help="continue the run in DIR to the numbers of an uninterrupted one"
    )
    parser.add_argument("--quick", action="store_true", help="a small run of a few seconds, to see the whole path")
    parser.set_defaults(run=_run)


def _run(typed: dict[str, Any]) -> int:
    call = Call("overfit", (CheckpointError, OverfitError), resumable=True)
    return call.exit_code(lambda call: _overfit(typed, call))


def _overfit(typed: dict[str, Any], call: Call) -> int:
    job = prepare(typed, OverfitConfig, checked=OverfitConfig.resolved, quick=_QUICK, default_folder=_default_folder)
    load_split(job.config)  # the folder is touched when nothing is left that the caller could have got wrong
    if not job.resume:
        run_folder.begin(job.folder, job.config, overwrite=job.overwrite)
    call.begun = job.folder
    bar = ProgressBar(job.config.steps or 0)
    with StopRequest() as stop:
        try:
            result = overfit(job.config, job.folder, resume=job.resume, should_stop=stop.asked, progress=bar)
        except Interrupted:
            bar.close()
            return call.interrupted(stop.number)
        finally:
            bar.close()
    draw(lambda: save_picture(job.folder / run_folder.PICTURE, result))
    print_tables([table(result)], findings(result))
    print(f"Log, checkpoint and picture: {job.folder}")
    return 0


def _default_folder(config: OverfitConfig) -> Path:
    return Path("runs") / f"overfit-{config.model}-{config.seed}"
