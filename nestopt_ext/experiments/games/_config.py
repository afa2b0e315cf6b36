"""What the configurations of the game experiments have in common: the check, and the JSON form."""

import dataclasses
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ..config import ConfigError, check_number, check_whole

Config = TypeVar("Config", bound="GameConfig")


@dataclass(frozen=True)
class GameConfig:
    """Base of the configurations; ``experiment`` is the name of the command, ``files`` what its run leaves."""

    experiment: ClassVar[str]
    files: ClassVar[tuple[str, ...]]
    resumable: ClassVar[bool] = False

    seed: int = 0

    @property
    def kind(self) -> str:
        """What messages call such a run."""
        return f"run of games {self.experiment}"

    def check(self) -> None:
        """Raises ConfigError, a line that names the option, when a choice is out of range."""
        whole(self, "seed", least=0, most=2**32 - 1)

    def to_json(self) -> str:
        """The configuration as indented JSON."""
        return json.dumps({"experiment": self.experiment, **dataclasses.asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls: type[Config], text: str, where: Path) -> Config:
        """Reads what `to_json` wrote; ``where`` is named in the ConfigError that any other text raises."""
        try:
            values = json.loads(text)
            known = {"experiment", *(field.name for field in fields(cls))}
            if not isinstance(values, dict) or set(values) != known or values.pop("experiment") != cls.experiment:
                raise ValueError("its keys are not those of such a run")
            choices: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            config = cls(**choices)
            config.check()
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise ConfigError(
                f"{where} is not the configuration of a run of games {cls.experiment}: {error}"
            ) from error
        return config


def whole(config: GameConfig, name: str, *, least: int, most: int) -> None:
    """Requires a whole number from ``least`` to ``most`` as choice ``name``."""
    value = getattr(config, name)
    check_whole(name, value, least)
    if value > most:
        raise ConfigError(f"--{name.replace('_', '-')} must be <= {most}; got {value}.")


def between(config: GameConfig, name: str, low: float, high: float) -> None:
    """Requires a number with ``low`` < number < ``high`` as choice ``name``."""
    if not low < check_number(name, getattr(config, name)) < high:
        option = "--" + name.replace("_", "-")
        raise ConfigError(f"{option} must be > {low:g} and < {high:g}; got {getattr(config, name)}.")
