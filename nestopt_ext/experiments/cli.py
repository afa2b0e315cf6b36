"""The command line: `python -m nestopt_ext`, with `tune`, `overfit`, `self-tune`, `games`, `ride` and `info`."""

import json
from collections.abc import Sequence
from typing import Any

from . import cli_games, cli_overfit, cli_ride, cli_self_tune, cli_tune, info
from .command import PROGRAM, Parser, reader_may_leave


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code: 0 done, 1 run failed, 2 bad arguments or data, 128 + n by signal n."""
    parser = Parser(prog=PROGRAM, description="Nested (bilevel) optimization for PyTorch.")
    commands = parser.add_subparsers(metavar="command")
    cli_tune.add(commands)
    cli_overfit.add(commands)
    cli_self_tune.add(commands)
    cli_games.add(commands)
    cli_ride.add(commands)
    _add_info(commands)
    with reader_may_leave():
        options = vars(parser.parse_args(arguments))
        run = options.pop("run", None)
        if run is None:
            parser.print_help()
            return 0
        return int(run(options))


def _add_info(commands: Any) -> None:
    text = "print versions, native status, SIMD level, CUDA architectures, devices"
    parser = commands.add_parser("info", help=text, description=text)
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    parser.set_defaults(run=_info)


def _info(options: dict[str, Any]) -> int:
    facts = info.collect()
    print(json.dumps(facts, indent=2) if options["json"] else "\n".join(info.lines(facts)))
    return 0
