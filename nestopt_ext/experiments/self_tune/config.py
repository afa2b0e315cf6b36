"""What one run of self-tune is made of: every choice, its default, its check, and its JSON form."""

import json
import math
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from .. import data
from ..config import MOST_THREADS, ConfigError, check_number, check_one_of, check_whole
from ..run_folder import CHECKPOINT, LOG, PICTURE
from . import models
from .space import EXTRAS

RESPONSE_METHODS = ("delta-stn", "centred", "stn")
SEARCHES = ("random", "tpe", "gp", "grid")
METHODS = (*RESPONSE_METHODS, "hypernet", "ift", "fixed", *SEARCHES)
DATA = (*data.NAMES, "ptb")
MODELS = (*models.NAMES, "lstm")

_WIDTH = {"mlp": 1200, "simple-cnn": 16, "alexnet": 64, "vgg16": 64, "resnet18": 64, "lstm": 650}
#: SGD's rate on the weights; momentum 0.9, for the LSTM none.
_LR = {"mlp": 1e-2, "simple-cnn": 1e-2, "alexnet": 3e-2, "vgg16": 3e-2, "resnet18": 3e-2, "lstm": 30.0}
_MODEL = {"fashion-mnist": "simple-cnn", "cifar10": "alexnet", "ptb": "lstm"}


@dataclass(frozen=True)
class Budget:
    """What a method may spend on training: seconds, or passes over the training part."""

    seconds: float = math.inf
    epochs: float = math.inf

    @staticmethod
    def of(text: str) -> "Budget":
        """Reads ``90s``, ``5m`` or ``40`` (epochs). Raises ConfigError for anything else.

        >>> Budget.of("1.5m"), Budget.of("40")
        (Budget(seconds=90.0, epochs=inf), Budget(seconds=inf, epochs=40.0))
        """
        match = re.fullmatch(r"(\d+(?:\.\d*)?)([sm]?)", text)
        if match is None or not 0 < float(match[1]) < 1e9:
            raise ConfigError(f"--budget must be seconds such as 90s, minutes such as 5m, or epochs; got {text!r}.")
        number = float(match[1])
        return Budget(epochs=number) if not match[2] else Budget(seconds=number * (60 if match[2] == "m" else 1))


@dataclass(frozen=True)
class SelfTuneConfig:
    """One run of `self_tune`. None stands for a default that `resolved` fills in.

    method: what is compared, of `METHODS`, each on its own. data, data_dir: see `nestopt_ext.experiments.data`; also
    ``ptb``. train_size, valid_size: examples; 0 for all that are left, and for 15 % of the published training part (20
    % of cifar10). The parts of ptb are the published ones. model, width: see
    `nestopt_ext.experiments.self_tune.models`. extra: hyperparameters beside those of the network, of `EXTRAS`.
    epochs: length of one training. budget: what each method may spend; see `Budget`. Without one, a method that tunes
    while it trains makes one training, and a search ``trials``. warmup: epochs before hyperparameters move.
    train_steps, valid_steps: steps on weights and on hyperparameters in turn. lr, hyper_lr: their rates. lr_drops:
    epochs at which the former falls to a fifth. start_rate: of the dropouts that are tuned. entropy_weight, scale: of
    the perturbations of response models. bptt: words of a chunk of text. threads: of the CPU.
    """

    files: ClassVar[tuple[str, ...]] = (LOG, CHECKPOINT, PICTURE)
    resumable: ClassVar[bool] = True
    kind: ClassVar[str] = "run of self-tune"

    method: tuple[str, ...] = ("delta-stn", "stn", "random")
    data: str = "digits"
    data_dir: str | None = None
    train_size: int | None = None
    valid_size: int | None = None
    model: str | None = None
    width: int | None = None
    extra: tuple[str, ...] = ()
    epochs: int | None = None
    budget: str | None = None
    trials: int = 10
    warmup: int = 5
    batch_size: int | None = None
    train_steps: int | None = None
    valid_steps: int = 1
    lr: float | None = None
    lr_drops: tuple[int, ...] | None = None
    hyper_lr: float | None = None
    start_rate: float = models.START_RATE
    entropy_weight: float = 1e-3
    scale: float = 1.0
    bptt: int = 70
    seed: int = 0
    device: str = "cpu"
    threads: int = 1

    def resolved(self) -> "SelfTuneConfig":
        """The same run with every default written out. Raises ConfigError when a choice is out of range."""
        check_one_of("data", self.data, DATA)
        model = self.model or _MODEL.get(self.data, "mlp")
        check_one_of("model", model, MODELS)
        if (model == "lstm") != (self.data == "ptb"):
            raise ConfigError(f"--model lstm and --data ptb go together; got --model {model} and --data {self.data}.")
        defaults = self._defaults(model)
        config = replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})
        config._check()
        return config

    @property
    def limit(self) -> Budget | None:
        """The budget of each method, where one was given."""
        return None if self.budget is None else Budget.of(self.budget)

    def to_json(self) -> str:
        """The configuration as indented JSON."""
        return json.dumps({"experiment": "self-tune", **asdict(self)}, indent=2) + "\n"

    @staticmethod
    def from_json(text: str, where: Path) -> "SelfTuneConfig":
        """Reads what `to_json` wrote; ``where`` is named in the ConfigError that any other text raises."""
        try:
            values = json.loads(text)
            known = {"experiment", *(field.name for field in fields(SelfTuneConfig))}
            if not isinstance(values, dict) or set(values) != known or values.pop("experiment") != "self-tune":
                raise ValueError("its keys are not those of such a run")
            choices: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            return SelfTuneConfig(**choices).resolved()
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise ConfigError(f"{where} is not the configuration of a run of self-tune: {error}") from error

    def _defaults(self, model: str) -> dict[str, Any]:
        digits = self.data == "digits"
        return {
            "model": model,
            "width": 96 if digits and model == "mlp" else _WIDTH[model],
            "train_size": 300 if digits else 0,
            "valid_size": 300 if digits else 0,
            "epochs": {"mlp": 500, "lstm": 150}.get(model, 200) if not digits else 150,
            "batch_size": 50 if digits else 40 if model == "lstm" else 128,
            "train_steps": 2 if model == "lstm" else 5,
            "hyper_lr": 3e-2 if digits else 1e-2,
            "lr_drops": (60, 120, 180) if model in ("alexnet", "vgg16", "resnet18") else (),
            "lr": 3e-2 if digits and model == "mlp" else _LR[model],
        }

    def _check(self) -> None:
        _check_names("method", self.method, METHODS)
        if not self.method:
            raise ConfigError(f"--method must be one or more of {', '.join(METHODS)}; got none.")
        _check_names("extra", self.extra, EXTRAS)
        for name in ("width", "epochs", "trials", "batch_size", "train_steps", "valid_steps", "bptt", "threads"):
            check_whole(name, getattr(self, name), 1)
        for name in ("train_size", "valid_size", "warmup", "seed"):
            check_whole(name, getattr(self, name), 0)
        if self.threads > MOST_THREADS:
            raise ConfigError(f"--threads must be <= {MOST_THREADS}; got {self.threads}.")
        if self.seed >= 2**32:
            raise ConfigError(f"--seed must be below 2**32; got {self.seed}.")
        _check_drops(self.lr_drops)
        for name in ("lr", "hyper_lr", "scale"):
            if check_number(name, getattr(self, name)) <= 0:
                raise ConfigError(f"--{name.replace('_', '-')} must be > 0; got {getattr(self, name)}.")
        if not 0 < check_number("start_rate", self.start_rate) < 0.95:
            raise ConfigError(f"--start-rate must be > 0 and < 0.95; got {self.start_rate}.")
        if check_number("entropy_weight", self.entropy_weight) < 0:
            raise ConfigError(f"--entropy-weight must be >= 0; got {self.entropy_weight}.")
        if self.budget is not None:
            if not isinstance(self.budget, str):
                raise ConfigError(f"--budget must be a text such as 90s; got {self.budget!r}.")
            Budget.of(self.budget)
        if self.data_dir is not None and not isinstance(self.data_dir, str):
            raise ConfigError(f"--data-dir must be a path; got {self.data_dir!r}.")


def _check_names(option: str, names: object, allowed: tuple[str, ...]) -> None:
    if not isinstance(names, tuple):
        raise ConfigError(f"--{option} must be names; got {names!r}.")
    for name in names:
        check_one_of(option, name, allowed)
    if len(set(names)) != len(names):
        raise ConfigError(f"--{option} must name each one once; got {','.join(names)}.")


def _check_drops(drops: object) -> None:
    if not isinstance(drops, tuple):
        raise ConfigError(f"--lr-drops must be epochs; got {drops!r}.")
    for epoch in drops:
        check_whole("lr_drops", epoch, 1)
    if list(drops) != sorted(set(drops)):
        raise ConfigError(f"--lr-drops must increase; got {','.join(map(str, drops))}.")
