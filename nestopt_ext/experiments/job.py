"""From what was typed to a run: its configuration and its folder, checked before anything is touched."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from .command import UsageError, free_folder
from .run_folder import FolderError, check_usable, stored_config

Config = TypeVar("Config", bound=Any)


@dataclass(frozen=True)
class Job(Generic[Config]):
    """A run to make in ``folder``, or to continue there."""

    config: Config
    folder: Path
    resume: bool = False
    overwrite: bool = False


def prepare(
    typed: dict[str, Any],
    kind: type[Config],
    *,
    checked: Callable[[Config], Config],
    quick: Mapping[str, Any],
    default_folder: Callable[[Config], Path],
    movable: tuple[str, ...] = (),
) -> Job[Config]:
    """What was asked for; ``typed`` has only what was typed, and is used up.

    ``checked`` makes a new configuration whole, or raises ConfigError. ``quick`` is what --quick sets where nothing
    else is said. A run that is continued keeps its configuration, but for what is ``movable``.
    """
    resume, output = typed.pop("resume", None), typed.pop("output", None)
    in_a_hurry, overwrite = typed.pop("quick", False), typed.pop("overwrite", False)
    if resume is not None:
        for name, given in (("--output", output), ("--quick", in_a_hurry), ("--overwrite", overwrite)):
            if given:
                raise UsageError(f"--resume continues a run as it was started; {name} cannot be given with it.")
        return Job(_stored(Path(resume), kind, typed, movable), Path(resume), resume=True)
    config = checked(kind(**({**quick, **typed} if in_a_hurry else typed)))
    default = default_folder(config)
    folder = Path(output) if output is not None else default if overwrite else free_folder(default)
    check_usable(folder, config, overwrite=overwrite)
    return Job(config, folder, overwrite=overwrite)


def _stored(folder: Path, kind: type[Config], typed: dict[str, Any], movable: tuple[str, ...]) -> Config:
    """The configuration of the run in ``folder``; what was typed must agree with it, unless it may have moved."""
    try:
        config: Config = stored_config(folder, kind)
    except FolderError as error:
        raise UsageError(f"--resume {error} There is no run to continue.") from error
    moved = {name: typed.pop(name) for name in movable if name in typed}
    for name, value in typed.items():
        if value != getattr(config, name):
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{option} {value} conflicts with the run in {folder}, which has {getattr(config, name)}.")
    return replace(config, **moved)
