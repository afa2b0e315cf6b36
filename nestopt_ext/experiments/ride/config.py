"""What a run of `ride` is made of: every choice, its default for each game, its check, and its JSON form."""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from ..config import ConfigError, check_number, check_one_of, check_whole
from ..run_folder import CHECKPOINT, LOG

PLANAR_GAMES = ("small-ipd", "random-subspace-ipd", "mix", "matching-pennies")
TOY_GAMES = (*PLANAR_GAMES, "ipd")
#: Problems with one loss, ridden along the eigenvectors of its Hessian from a saddle.
LOSSES = ("polynomial", "shapes")
GAMES = (*TOY_GAMES, *LOSSES, "gan")
OPTIMIZERS = ("sgd", "extragradient", "lola")
ORDERS = ("breadth", "depth")

PORTRAIT, TREE, SOLUTIONS = "portrait.png", "tree.png", "solutions.png"

#: What makes a look at the whole path of a few seconds, not a result; beside it come the starts.
QUICK: dict[str, dict[str, Any]] = {
    **{game: {"starts": 2, "ascent_steps": 20, "branch_sizes": (2.0,), "steps": 300} for game in TOY_GAMES},
    "polynomial": {"steps": 200},
    "shapes": {"images": 128, "steps": 300},
    "gan": {"ascent_steps": 1, "branch_sizes": (1.0,), "directions": 1, "steps": 300, "width": 8},
}

_GENERALIZED: dict[str, Any] = {
    "optimizer": "sgd",
    "lr": 1.0,
    "starts": 10,
    "spread": 2.0,
    "exponent_steps": 10,
    "ascent_steps": 150,
    "ascent_lr": 0.1,
    "branch_sizes": (0.5, 1.0, 2.0, 4.0, 8.0),
    "directions": 1,
    "steps": 1500,
}
#: What each game has, and how it is set where nothing is said.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "small-ipd": _GENERALIZED,
    "random-subspace-ipd": _GENERALIZED,
    # Ten steps see no farther than the fast outer parts of the spiral, and the climb runs off along them.
    "mix": {
        **_GENERALIZED, "optimizer": "extragradient", "exponent_steps": 50, "ascent_steps": 20, "directions": 2,
        "steps": 3500, "tau": 0.25,
    },
    # One solution, which takes ever longer to come back to from afar.
    "matching-pennies": {**_GENERALIZED, "optimizer": "extragradient", "branch_sizes": (0.5, 1.0, 2.0), "steps": 3000},
    "ipd": {**_GENERALIZED, "optimizer": "lola", "spread": 1.0, "directions": 2, "steps": 1000},
    "polynomial": {"dim": 2, "order": "breadth", "step_size": 0.05, "lr": 0.1, "noise": 0.01, "steps": 500},
    "shapes": {
        "images": 512, "width": 4, "directions": 3, "step_size": 0.1, "lr": 0.5, "noise": 0.01, "steps": 800,
    },
    "gan": {
        "lr": 0.1, "exponent_steps": 10, "ascent_steps": 5, "ascent_lr": 0.1, "branch_sizes": (1.0,), "directions": 4,
        "steps": 3000, "modes": 4, "width": 16,
    },
}  # fmt: skip


@dataclass(frozen=True)
class RideConfig:
    """One run of `ride`. None stands for the default of the game, which `resolved` fills in, or for a choice that the
    game does not have.

    game: one of `GAMES`. optimizer, lr: what rides a game, and the descent that finishes the ride of a loss.
    starts: random ones, each a search of its own, drawn from N(0, spread^2). exponent_steps: k, over which the
    exponent is taken. ascent_steps, ascent_lr: of the climb to its largest value. branch_sizes: displacements to both
    sides along each of so many ``directions``, from the start and from the end of the climb. steps: of a ride.
    step_size, order: of a ridge. noise: standard deviation with which descents leave the saddle that it is compared
    with. tau: of the mixed game.
    dim: variables of the polynomial. images: training images. modes: Gaussians. width: hidden units.
    """

    files: ClassVar[tuple[str, ...]] = (LOG, CHECKPOINT, PORTRAIT, TREE, SOLUTIONS)
    resumable: ClassVar[bool] = True
    kind: ClassVar[str] = "run of ride"

    game: str = "small-ipd"
    optimizer: str | None = None
    lr: float | None = None
    starts: int | None = None
    spread: float | None = None
    exponent_steps: int | None = None
    ascent_steps: int | None = None
    ascent_lr: float | None = None
    branch_sizes: tuple[float, ...] | None = None
    directions: int | None = None
    steps: int | None = None
    step_size: float | None = None
    noise: float | None = None
    order: str | None = None
    tau: float | None = None
    dim: int | None = None
    images: int | None = None
    modes: int | None = None
    width: int | None = None
    seed: int = 0

    def resolved(self) -> "RideConfig":
        """The same run with every default written out. Raises ConfigError when a choice is out of range."""
        check_one_of("game", self.game, GAMES)
        defaults = _DEFAULTS[self.game]
        for field in fields(self):
            if field.name not in ("game", "seed", *defaults) and getattr(self, field.name) is not None:
                raise ConfigError(
                    f"--{_dashes(field.name)} is no option of --game {self.game}, which has"
                    f" {', '.join('--' + _dashes(name) for name in defaults)}."
                )
        filled = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        config = replace(self, **filled)
        config._check(set(defaults))
        return config

    def to_json(self) -> str:
        """The configuration as indented JSON."""
        return json.dumps({"experiment": "ride", **asdict(self)}, indent=2) + "\n"

    @staticmethod
    def from_json(text: str, where: Path) -> "RideConfig":
        """Reads what `to_json` wrote; ``where`` is named in the ConfigError that any other text raises."""
        try:
            values = json.loads(text)
            known = {"experiment", *(field.name for field in fields(RideConfig))}
            if not isinstance(values, dict) or set(values) != known or values.pop("experiment") != "ride":
                raise ValueError("its keys are not those of such a run")
            choices: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            return RideConfig(**choices).resolved()
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise ConfigError(f"{where} is not the configuration of a run of ride: {error}") from error

    def _check(self, choices: set[str]) -> None:
        whole = {"starts": 10**4, "exponent_steps": 10**4, "directions": 64, "steps": 10**7, "dim": 64}
        whole |= {"images": 10**5, "modes": 64, "width": 1024}
        for name in choices & set(whole):
            check_whole(name, getattr(self, name), 1)
            if getattr(self, name) > whole[name]:
                raise ConfigError(f"--{_dashes(name)} must be <= {whole[name]}; got {getattr(self, name)}.")
        if self.images is not None and self.images % 16:
            raise ConfigError(f"--images must be a multiple of 16; got {self.images}.")
        if "ascent_steps" in choices:
            check_whole("ascent_steps", self.ascent_steps, 0)
        for name in choices & {"lr", "spread", "ascent_lr", "step_size", "noise"}:
            if check_number(name, getattr(self, name)) <= 0:
                raise ConfigError(f"--{_dashes(name)} must be > 0; got {getattr(self, name)}.")
        for name, allowed in (("optimizer", OPTIMIZERS), ("order", ORDERS)):
            if name in choices:
                check_one_of(name, getattr(self, name), allowed)
        if "branch_sizes" in choices:
            _check_sizes(self.branch_sizes)
        if "tau" in choices and not 0 <= check_number("tau", self.tau) <= 1:
            raise ConfigError(f"--tau must be from 0 to 1; got {self.tau}.")
        check_whole("seed", self.seed, 0)
        if self.seed >= 2**32:
            raise ConfigError(f"--seed must be below 2**32; got {self.seed}.")


def _check_sizes(sizes: object) -> None:
    if not isinstance(sizes, tuple) or not sizes:
        raise ConfigError(f"--branch-sizes must be one or more numbers; got {sizes!r}.")
    for size in sizes:
        if check_number("branch_sizes", size) <= 0:
            raise ConfigError(f"--branch-sizes must be > 0; got {size}.")
    if len(set(sizes)) != len(sizes):
        raise ConfigError(f"--branch-sizes must name every number once; got {', '.join(map(str, sizes))}.")


def _dashes(name: str) -> str:
    return name.replace("_", "-")
