"""The command `games`: one subcommand for each experiment on games, with its options, its run folder, its run."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from .._checkpoint import CheckpointError
from .._progress import ProgressBar
from .command import Call, StopRequest, draw, print_tables
from .games import (
    adversarialness_plots,
    adversarialness_report,
    bilinear_plots,
    bilinear_report,
    dirac_plots,
    dirac_report,
    mixture_config,
    mixture_plots,
    mixture_report,
    spectra_plots,
    spectra_report,
)
from .games._config import GameConfig
from .games.adversarialness import SweepConfig, sweep
from .games.adversarialness import num_pieces as sweep_pieces
from .games.bilinear import BilinearConfig, bilinear
from .games.bilinear import num_pieces as bilinear_pieces
from .games.dirac import DiracConfig, dirac
from .games.dirac import num_pieces as dirac_pieces
from .games.mixture import mixture
from .games.mixture import num_pieces as mixture_pieces
from .games.mixture_config import MixtureConfig
from .games.spectra import SpectraConfig, check_inputs, spectra
from .games.spectra import num_pieces as spectra_pieces
from .job import prepare
from .run_folder import begin
from .tune import Interrupted

Table = tuple[list[str], list[list[str]]]


@dataclass(frozen=True)
class _Experiment:
    """What the command line must know of an experiment.

    ``quick`` is what --quick sets where nothing else is said: a look at the whole path in a few seconds, not a result.
    ``options`` are flag, type, placeholder and help.
    """

    text: str
    config: type[GameConfig]
    quick: Mapping[str, Any]
    options: tuple[tuple[str, Callable[[str], Any], str, str], ...]
    run: Callable[..., Any]
    num_pieces: Callable[[Any], int]
    tables: Callable[[Any], list[Table]]
    findings: Callable[[Any], list[str]]
    save_pictures: Callable[[Path, Any], None]
    check_inputs: Callable[[Any], None] = lambda config: None


def _numbers(text: str) -> tuple[float, ...]:
    """Numbers with commas between them, fractions among them."""
    try:
        return tuple(float(Fraction(part)) for part in text.split(","))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"must be numbers such as 0.5,1/8 with commas between them; got {text!r}"
        ) from None


_TOLERANCE = ("--tolerance", float, "X", "share of the first distance at which a run is over")
_MAX_STEPS = ("--max-steps", int, "N", "steps after which a run is given up")

_EXPERIMENTS = {
    "bilinear": _Experiment(
        "gradient evaluations against the angle of the momentum, on games of pure rotation",
        BilinearConfig,
        {"angles": 9, "lrs": 12, "condition": 3.0, "size": 2, "max_steps": 3000},
        (
            ("--angles", int, "N", "angles of the momentum from 0 to pi"),
            ("--lrs", int, "N", "learning rates to choose from"),
            ("--size", int, "N", "singular values of the second game"),
            ("--condition", float, "X", "their largest over their smallest"),
            _TOLERANCE,
            _MAX_STEPS,
        ),
        bilinear,
        bilinear_pieces,
        bilinear_report.tables,
        bilinear_report.findings,
        bilinear_plots.save_pictures,
    ),
    "sweep": _Experiment(
        "gradient evaluations as a game turns from cooperative to adversarial",
        SweepConfig,
        {"levels": 3, "lrs": 10, "angles": 5, "condition": 3.0, "max_steps": 3000},
        (
            ("--levels", int, "N", "levels of adversarialness from 0 to 1"),
            ("--lrs", int, "N", "learning rates to choose from"),
            ("--angles", int, "N", "angles of the momentum to choose from"),
            ("--condition", float, "X", "largest over smallest scale of the coordinates"),
            _TOLERANCE,
            _MAX_STEPS,
        ),
        sweep,
        sweep_pieces,
        adversarialness_report.tables,
        adversarialness_report.findings,
        adversarialness_plots.save_pictures,
    ),
    "dirac": _Experiment(
        "phase portraits of the smallest GAN",
        DiracConfig,
        {"steps": 300},
        (
            ("--steps", int, "N", "steps of every method"),
            ("--radius", float, "X", "distance of the start from the solution"),
        ),
        dirac,
        dirac_pieces,
        dirac_report.tables,
        dirac_report.findings,
        dirac_plots.save_pictures,
    ),
    "spectra": _Experiment(
        "eigenvalues of games and of steps with momentum, and a map of the momenta that converge",
        SpectraConfig,
        {"size": 4, "points": 24},
        (
            ("--size", int, "N", "parameters of each player"),
            ("--condition", float, "X", "of couplings and curvatures"),
            ("--points", int, "N", "angles of the map, and half as many moduli"),
            ("--mixture", str, "DIR", "a finished run of games mixture, for the spectrum of its best GAN"),
        ),
        spectra,
        spectra_pieces,
        spectra_report.tables,
        spectra_report.findings,
        spectra_plots.save_pictures,
        check_inputs=check_inputs,
    ),
    "mixture": _Experiment(
        "GANs on a ring of Gaussians, trained with a grid of momenta",
        MixtureConfig,
        mixture_config.QUICK,
        (
            ("--moduli", _numbers, "X,...", "moduli of the momenta"),
            ("--angles", _numbers, "X,...", "their angles in units of pi"),
            (
                "--lrs",
                _numbers,
                "X,...",
                "effective rates to choose from (sgd 0.005,0.01,0.02,0.04; adam a tenth)",
            ),
            ("--optimizer", str, "NAME", "complex-sgd | complex-adam"),
            ("--loss", str, "NAME", "of the generator: non-saturating | minimax"),
            ("--tuning-seeds", int, "N", "trainings of each momentum at each learning rate"),
            ("--test-seeds", int, "N", "trainings of each momentum at its best learning rate"),
            ("--steps", int, "N", "steps of a training"),
            ("--batch-size", int, "N", "examples per gradient"),
            ("--width", int, "N", "units of a hidden layer"),
            ("--noise-dim", int, "N", "inputs of the generator"),
            ("--modes", int, "N", "Gaussians"),
            ("--radius", float, "X", "of their ring"),
            ("--std", float, "X", "their standard deviation"),
            ("--evaluations", int, "N", "looks at a training"),
            ("--samples", int, "N", "points generated for a look"),
            ("--mode-share", float, "X", "share of the points that makes a mode covered"),
            ("--batch-runs", int, "N", "trainings that go on together"),
            ("--threads", int, "N", "CPU threads"),
        ),
        mixture,
        mixture_pieces,
        lambda result: [mixture_report.table_rows(result)],
        mixture_report.findings,
        mixture_plots.save_pictures,
    ),
}


def add(commands: Any) -> None:
    """Adds the parser of the command to the subparsers ``commands``."""
    text = "experiments on games: which momentum finds solutions, and how fast"
    parser = commands.add_parser("games", help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.set_defaults(run=lambda typed: parser.print_help() or 0)
    experiments = parser.add_subparsers(metavar="experiment")
    for name, experiment in _EXPERIMENTS.items():
        _add(experiments, name, experiment)


def _add(experiments: Any, name: str, experiment: _Experiment) -> None:
    # Only what was typed appears in the namespace, so that --resume can tell a conflict from a default.
    parser = experiments.add_parser(
        name,
        help=experiment.text,
        description=f"{experiment.text[0].upper()}{experiment.text[1:]}. Leaves a JSON log and pictures in the output"
        " folder.",
        argument_default=argparse.SUPPRESS,
    )
    for flag, kind, placeholder, text in experiment.options:
        parser.add_argument(flag, type=kind, metavar=placeholder, help=text + _default(experiment.config, flag))
    parser.add_argument("--seed", type=int, metavar="N", help="of everything that is drawn (0)")
    parser.add_argument(
        "--output",
        metavar="DIR",
        help=f"folder for what the run leaves (runs/games-{name}-<seed>, with -run2 and so on when taken)",
    )
    parser.add_argument("--overwrite", action="store_true", help="start anew in an output folder that holds a run")
    if experiment.config.resumable:
        parser.add_argument(
            "--resume", metavar="DIR", help="continue the run in DIR to the numbers of an uninterrupted one"
        )
    parser.add_argument("--quick", action="store_true", help="a small run of a few seconds, to see the whole path")

    def run(typed: dict[str, Any]) -> int:
        call = Call(f"games {name}", (CheckpointError,), resumable=experiment.config.resumable)
        return call.exit_code(lambda call: _run(experiment, typed, call))

    parser.set_defaults(run=run)


def _default(config: type[GameConfig], flag: str) -> str:
    """The default of an option as a remark behind its help; empty where the help says it all."""
    value = getattr(config(), flag.removeprefix("--").replace("-", "_"))
    if value is None:
        return ""
    if isinstance(value, tuple):
        return f" ({','.join(map(_number, value))})"
    return f" ({_number(value) if isinstance(value, float) else value})"


def _number(value: float) -> str:
    """A number as it would be typed; one that needs many digits, and is an eighth or so, as a fraction.

    >>> _number(0.0), _number(0.95), _number(1 / 32), _number(1e-6)
    ('0', '0.95', '1/32', '1e-6')
    """
    part = Fraction(value)
    if value != round(value, 2) and part.denominator <= 128:
        return str(part)
    return f"{value:g}".replace("e-0", "e-")


def _run(experiment: _Experiment, typed: dict[str, Any], call: Call) -> int:
    job = prepare(typed, experiment.config, checked=_checked, quick=experiment.quick, default_folder=_default_folder)
    # The folder is touched when nothing is left that the caller could have got wrong.
    experiment.check_inputs(job.config)
    if not job.resume:
        begin(job.folder, job.config, overwrite=job.overwrite)
    call.begun = job.folder
    further = {"resume": job.resume} if experiment.config.resumable else {}
    bar = ProgressBar(experiment.num_pieces(job.config))
    with StopRequest() as stop:
        try:
            result = experiment.run(job.config, job.folder, should_stop=stop.asked, progress=bar, **further)
        except Interrupted:
            bar.close()
            return call.interrupted(stop.number)
        finally:
            bar.close()
    draw(lambda: experiment.save_pictures(job.folder, result))
    print_tables(experiment.tables(result), experiment.findings(result))
    print(f"Log and pictures: {job.folder}")
    return 0


def _checked(config: GameConfig) -> GameConfig:
    config.check()
    return config


def _default_folder(config: GameConfig) -> Path:
    return Path("runs") / f"games-{config.experiment}-{config.seed}"
