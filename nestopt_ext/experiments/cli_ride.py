"""The command `ride`: its options, its run folder, its run."""

import argparse
from fractions import Fraction
from pathlib import Path
from typing import Any

from .._checkpoint import CheckpointError
from .._progress import ProgressBar
from . import run_folder
from .command import Call, StopRequest, draw, print_tables
from .job import prepare
from .ride import pictures
from .ride.config import GAMES, OPTIMIZERS, ORDERS, QUICK, RideConfig
from .ride.report import findings, tables
from .ride.run import num_pieces, ride
from .tune import Interrupted

_RIDE_TEXT = """\
Looks for every solution of a game, not one: goes to where a small step decides what is reached, branches, rides every
branch to its end, and says which solutions descents without branches find for as many gradients. Leaves a JSON log,
pictures and a checkpoint in the output folder. Ctrl-C stops; --resume continues.

small-ipd, random-subspace-ipd, mix, matching-pennies, ipd: toy games, from where neighbours part fastest
polynomial: a loss with known minima, along the ridges of its saddle
shapes: a network on pictures in which each of three features tells the class, from its most symmetric saddle
gan: a small GAN on a ring of Gaussians"""


def add(commands: Any) -> None:
    """Adds the parser of the command to the subparsers ``commands``."""
    # Only what was typed appears in the namespace, so that --resume can tell a conflict from a default.
    parser = commands.add_parser(
        "ride",
        help="find many solutions of a game by branching where paths part",
        description=_RIDE_TEXT,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("which game")
    what.add_argument("--game", choices=GAMES, help=f"{', '.join(GAMES)} (small-ipd)", metavar="NAME")
    _add(what, "--tau", float, "X", "share of matching pennies in mix")
    _add(what, "--dim", int, "N", "variables of polynomial")
    _add(what, "--images", int, "N", "training pictures of shapes, a multiple of 16")
    _add(what, "--modes", int, "N", "Gaussians of gan")
    _add(what, "--width", int, "N", "units of a hidden layer, shapes and gan")

    where = parser.add_argument_group("from where games are ridden")
    _add(where, "--starts", int, "N", "random starts, toy games")
    _add(where, "--spread", float, "X", "their standard deviation, toy games")
    _add(where, "--exponent-steps", int, "K", "steps over which an exponent is taken")
    _add(where, "--ascent-steps", int, "N", "steps of the climb to the largest exponent")
    _add(where, "--ascent-lr", float, "X", "their length")
    _add(where, "--branch-sizes", _numbers, "X,...", "first steps of the branches, to both sides of each direction")

    how = parser.add_argument_group("how it is ridden")
    how.add_argument("--optimizer", choices=OPTIMIZERS, help=f"what rides a toy game {_default('optimizer')}")
    _add(how, "--lr", float, "LR", "learning rate of the rides, and of the descent at the end of a ridge")
    _add(how, "--steps", int, "N", "steps of a ride, or of that descent")
    _add(how, "--directions", int, "N", "directions to branch along, not for polynomial, which takes all")
    _add(how, "--step-size", float, "X", "length of a step along a ridge, polynomial and shapes")
    how.add_argument("--order", choices=ORDERS, help=f"in which branches of polynomial are ridden {_default('order')}")
    _add(how, "--noise", float, "X", "with which rivals leave the saddle, polynomial and shapes")

    run = parser.add_argument_group("the run")
    run.add_argument("--seed", type=int, metavar="N", help="of everything that is drawn (0)")
    run.add_argument(
        "--output",
        metavar="DIR",
        help="folder for what the run leaves (runs/ride-<game>-<seed>, with -run2 and so on when taken)",
    )
    run.add_argument("--overwrite", action="store_true", help="start anew in an output folder that holds a run")
    run.add_argument("--resume", metavar="DIR", help="continue the run in DIR to the numbers of an uninterrupted one")
    run.add_argument("--quick", action="store_true", help="a small run of a few seconds, to see the whole path")
    parser.set_defaults(run=_run)


def _add(group: Any, flag: str, kind: Any, placeholder: str, text: str) -> None:
    name = flag.removeprefix("--").replace("-", "_")
    group.add_argument(flag, type=kind, metavar=placeholder, help=f"{text} {_default(name)}")


def _default(name: str) -> str:
    """What the games set an option to, the value of most first, and the names of those with another one.

    >>> _default("ascent_steps"), _default("tau")
    ('(150; mix 20; gan 5)', '(0.25)')
    """
    games: dict[str, list[str]] = {}
    for game in GAMES:
        value = getattr(RideConfig(game).resolved(), name)
        if value is not None:
            told = ",".join(f"{x:g}" for x in value) if isinstance(value, tuple) else f"{value}".removesuffix(".0")
            games.setdefault(told, []).append(game)
    usual = max(games, key=lambda told: len(games[told]))
    others = [f"{', '.join(names)} {told}" for told, names in games.items() if told != usual]
    return f"({'; '.join([usual, *others])})"


def _numbers(text: str) -> tuple[float, ...]:
    """Numbers with commas between them, fractions among them."""
    try:
        return tuple(float(Fraction(part)) for part in text.split(","))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"must be numbers such as 0.5,1/8 with commas between them; got {text!r}"
        ) from None


def _run(typed: dict[str, Any]) -> int:
    call = Call("ride", (CheckpointError,), resumable=True)
    return call.exit_code(lambda call: _ride(typed, call))


def _ride(typed: dict[str, Any], call: Call) -> int:
    quick = QUICK.get(typed.get("game", RideConfig.game), {})
    job = prepare(typed, RideConfig, checked=RideConfig.resolved, quick=quick, default_folder=_default_folder)
    if not job.resume:
        run_folder.begin(job.folder, job.config, overwrite=job.overwrite)
    call.begun = job.folder
    bar = ProgressBar(num_pieces(job.config))
    with StopRequest() as stop:
        try:
            result = ride(job.config, job.folder, resume=job.resume, should_stop=stop.asked, progress=bar)
        except Interrupted:
            bar.close()
            return call.interrupted(stop.number)
        finally:
            bar.close()
    draw(lambda: pictures.save_pictures(job.folder, result))
    print_tables(tables(result), findings(result))
    print(f"Log, checkpoint and pictures: {job.folder}")
    return 0


def _default_folder(config: RideConfig) -> Path:
    return Path("runs") / f"ride-{config.game}-{config.seed}"
