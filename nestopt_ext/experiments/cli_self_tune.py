"""The command `self-tune`: its options, its run folder, its run."""

import argparse
from pathlib import Path
from typing import Any

from .._checkpoint import CheckpointError
from .._progress import ProgressBar
from . import run_folder
from .command import Call, StopRequest, draw, print_tables
from .job import prepare
from .self_tune import METHODS, SelfTuneConfig, SelfTuneError, make_problem, self_tune
from .self_tune.config import DATA, MODELS
from .self_tune.picture import save_picture
from .self_tune.report import findings, tables
from .self_tune.run import PIECES
from .self_tune.space import EXTRAS
from .tune import Interrupted

#: What --quick sets where nothing else is said: a look at the whole path in a few seconds, not a result.
_QUICK = {"epochs": 15, "trials": 3, "width": 16, "warmup": 2}

_TEXT = """\
Tunes dropout rates, augmentation and other regularization while a network trains, by response models, and compares
that with searches on the same problem within the same budget. Leaves a JSON log, a picture and a checkpoint in the
output folder. Ctrl-C stops; --resume continues."""


def add(commands: Any) -> None:
    """Adds the parser of the command to the subparsers ``commands``."""
    # Only what was typed appears in the namespace, so that --resume can tell a conflict from a default.
    parser = commands.add_parser(
        "self-tune",
        help="tune dropout, augmentation and more while training, beside searches",
        description=_TEXT,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what is compared, on what")
    what.add_argument(
        "--method",
        type=_names,
        action=_Collected,
        metavar="NAME,...",
        help=f"{', '.join(METHODS)}; more than once, or with commas (delta-stn,stn,random)",
    )
    what.add_argument("--data", choices=DATA, help="the data set (digits, embedded in scikit-learn)")
    what.add_argument("--data-dir", metavar="DIR", help="folder with the data set's published files")
    what.add_argument(
        "--model",
        choices=MODELS,
        help="the network (mlp; simple-cnn for fashion-mnist, alexnet for cifar10, lstm for ptb)",
    )
    what.add_argument("--width", type=int, metavar="N", help="hidden units, or channels of the first convolution")
    what.add_argument(
        "--extra",
        type=_names,
        action=_Collected,
        metavar="NAME,...",
        help=f"further hyperparameters: {', '.join(EXTRAS)}",
    )
    what.add_argument(
        "--train-size", type=int, metavar="N", help="training examples (digits 300; others 0: all that are left)"
    )
    what.add_argument(
        "--valid-size", type=int, metavar="N", help="validation examples (digits 300; others 0: 15 %%, cifar10 20 %%)"
    )

    spent = parser.add_argument_group("what is spent")
    spent.add_argument(
        "--epochs", type=int, metavar="N", help="length of one training (digits 150; mlp 500, lstm 150, others 200)"
    )
    spent.add_argument(
        "--budget",
        metavar="90s|5m|N",
        help="seconds, minutes or epochs of training that each method has, whatever it makes of them (one training, or"
        " for a search --trials of them)",
    )
    spent.add_argument("--trials", type=int, metavar="N", help="trainings of a search where no budget is given (10)")

    train = parser.add_argument_group("how it is trained and tuned")
    train.add_argument(
        "--batch-size", type=int, metavar="N", help="examples per gradient (digits 50, lstm 40, others 128)"
    )
    train.add_argument(
        "--lr", type=float, metavar="LR", help="SGD's rate (0.01, digits 0.03; deep networks 0.03; lstm 30)"
    )
    train.add_argument(
        "--hyper-lr", type=float, metavar="LR", help="RMSprop's rate on hyperparameters (0.01, digits 0.03)"
    )
    train.add_argument(
        "--lr-drops", type=_epochs, metavar="N,...", help="epochs at which it falls to a fifth (deep 60,120,180)"
    )
    train.add_argument("--warmup", type=int, metavar="N", help="epochs before the hyperparameters move (5)")
    train.add_argument("--train-steps", type=int, metavar="N", help="steps on the weights in turn (5; lstm 2)")
    train.add_argument("--valid-steps", type=int, metavar="N", help="with steps on the hyperparameters (1)")
    train.add_argument("--start-rate", type=float, metavar="X", help="dropout rates that are tuned start here (0.05)")
    train.add_argument("--entropy-weight", type=float, metavar="X", help="of the perturbations' entropy (0.001)")
    train.add_argument("--scale", type=float, metavar="X", help="of the perturbations at the start (1)")
    train.add_argument("--bptt", type=int, metavar="N", help="words of a chunk of text (70)")

    run = parser.add_argument_group("the run")
    run.add_argument("--seed", type=int, metavar="N", help="of split, start, batches, noise and searches (0)")
    run.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (cpu)")
    run.add_argument("--threads", type=int, metavar="N", help="CPU threads (1)")
    run.add_argument(
        "--output",
        metavar="DIR",
        help="folder for what the run leaves (runs/self-tune-<data>-<model>-<seed>, with -run2 and so on when taken)",
    )
    run.add_argument("--overwrite", action="store_true", help="start anew in an output folder that holds a run")
    run.add_argument("--resume", metavar="DIR", help="continue the run in DIR to the numbers of an uninterrupted one")
    run.add_argument("--quick", action="store_true", help="a small run of a few seconds, to see the whole path")
    parser.set_defaults(run=_run)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _epochs(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be epochs such as 60,120 with commas between; got {text!r}") from None


class _Collected(argparse.Action):
    """Joins what an option was given each time."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, (*getattr(namespace, self.dest, ()), *values))


def _run(typed: dict[str, Any]) -> int:
    return Call("self-tune", (CheckpointError, SelfTuneError), resumable=True).exit_code(
        lambda call: _self_tune(typed, call)
    )


def _self_tune(typed: dict[str, Any], call: Call) -> int:
    job = prepare(
        typed,
        SelfTuneConfig,
        checked=SelfTuneConfig.resolved,
        quick=_QUICK,
        default_folder=_default_folder,
        movable=("data_dir",),
    )
    # The folder is touched when nothing is left that the caller could have got wrong.
    problem = make_problem(job.config)
    if not job.resume:
        run_folder.begin(job.folder, job.config, overwrite=job.overwrite)
    call.begun = job.folder
    bar = ProgressBar(PIECES * len(job.config.method))
    with StopRequest() as stop:
        try:
            result = self_tune(
                job.config, job.folder, problem=problem, resume=job.resume, should_stop=stop.asked, progress=bar
            )
        except Interrupted:
            bar.close()
            return call.interrupted(stop.number)
        finally:
            bar.close()
    draw(lambda: save_picture(job.folder / run_folder.PICTURE, result))
    print_tables(tables(result), findings(result))
    print(f"Log, checkpoint and picture: {job.folder}")
    return 0


def _default_folder(config: SelfTuneConfig) -> Path:
    return Path("runs") / f"self-tune-{config.data}-{config.model}-{config.seed}"
