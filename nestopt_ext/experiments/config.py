"""What one tuning run is made of: every choice, its default, its check, and its JSON form."""

import dataclasses
import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..solvers import Neumann
from . import data
from .run_folder import CHECKPOINT, LOG, PICTURE

HPARAMS = ("per-weight-decay", "per-example-weight")
MODELS = ("linear", "mlp", "cnn")
INNER_OPTIMIZERS = ("sgd", "adam", "complex-sgd")
SOLVERS = ("neumann", "identity")

#: Learning rates that train every model here steadily. ComplexSGD at 0.9 exp(i pi/8) moves 1.146 times the learning
#: rate per unit of steady gradient, where SGD with momentum 0.9 moves 10 times, so its rate is higher.
_INNER_LR = {"sgd": 0.1, "adam": 0.003, "complex-sgd": 0.3}
#: A convolution's weight acts at many places at once, which makes the loss steeper in it.
_CNN_INNER_LR = {"sgd": 0.02, "adam": 0.003, "complex-sgd": 0.1}
#: Logarithms of decays are kept in this interval: below it a decay does nothing, above it the weight is zero anyway and
#: the training with a fixed step would become unstable.
LOG_DECAY_RANGE = (-16.0, 0.0)
#: Above this the OpenMP library ends the process instead of refusing.
MOST_THREADS = 4096


class ConfigError(ValueError):
    """A choice is out of range; the message is one line that names the option."""


@dataclass(frozen=True)
class TuneConfig:
    """One run of `nestopt_ext.experiments.tune`. None stands for a default that `resolved` fills in.

    hparams: what is tuned, one of `HPARAMS`. data, data_dir: see `nestopt_ext.experiments.data`.
    label_noise: share of training labels that are replaced by wrong ones, 0 <= rate < 1.
    train_size, valid_size: examples; the test part is the published one or all the rest.
    model, width: architecture; hidden units or channels. steps: outer steps. inner_steps: steps of the inner optimizer
    per outer step. warmup: outer steps before the hyperparameters move. batch_size: examples per gradient, 0 for all.
    inner_optimizer, inner_lr: how weights are trained. hyper_lr: RMSprop's rate on the hyperparameters.
    log_decay: log of the decay, where per-weight decays start, and what stays fixed beside per-example weights.
    solver, num_terms, alpha: the inverse-Hessian product; alpha in 1/curvature, None for 0.9 / largest eigenvalue
    (Identity: 1). trials: global decays that random search tries, each trained as long as the tuned model.
    threads: of the CPU; one unless the model is a cnn, since shorter steps are not worth sharing out.
    """

    files: ClassVar[tuple[str, ...]] = (LOG, CHECKPOINT, PICTURE)
    resumable: ClassVar[bool] = True
    kind: ClassVar[str] = "tuning run"

    hparams: str = "per-weight-decay"
    data: str = "digits"
    data_dir: str | None = None
    label_noise: float = 0.0
    train_size: int | None = None
    valid_size: int | None = None
    model: str | None = None
    width: int | None = None
    steps: int = 300
    inner_steps: int = 5
    warmup: int | None = None
    batch_size: int | None = None
    inner_optimizer: str = "sgd"
    inner_lr: float | None = None
    hyper_lr: float | None = None
    log_decay: float | None = None
    solver: str = "neumann"
    num_terms: int = 3
    alpha: float | None = None
    trials: int = 20
    seed: int = 0
    device: str = "cpu"
    threads: int | None = None

    def resolved(self) -> "TuneConfig":
        """The same run with every default written out. Raises ConfigError when a choice is out of range."""
        for name, allowed in (
            ("hparams", HPARAMS),
            ("data", data.NAMES),
            ("inner_optimizer", INNER_OPTIMIZERS),
            ("solver", SOLVERS),
        ):
            check_one_of(name, getattr(self, name), allowed)
        filled = {name: value for name, value in self._defaults().items() if getattr(self, name) is None}
        config = dataclasses.replace(self, **filled)
        config._check()
        return config

    def to_json(self) -> str:
        """The configuration as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @staticmethod
    def from_json(text: str, where: Path) -> "TuneConfig":
        """Reads what `to_json` wrote; ``where`` is named in the ConfigError that a damaged text raises."""
        try:
            values = json.loads(text)
            known = {field.name for field in fields(TuneConfig)}
            if not isinstance(values, dict) or set(values) != known:
                raise ValueError("its keys are not those of a tuning run")
            return TuneConfig(**values).resolved()
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise ConfigError(f"{where} is not the configuration of a tuning run: {error}") from error

    def _defaults(self) -> dict[str, Any]:
        decays = self.hparams == "per-weight-decay"
        small = self.data == "digits"
        if small:
            train, valid = (300, 300) if decays else (800, 200)
        else:
            train, valid = (2000, 2000) if decays else (4000, 500)
        model = self.model or ("cnn" if self.data == "cifar10" else "mlp")
        return {
            "train_size": train,
            "valid_size": valid,
            "model": model,
            "width": 16 if model == "cnn" else 64,
            "warmup": self.steps // 10,
            "batch_size": 0 if small else 256,
            "threads": torch.get_num_threads() if model == "cnn" else 1,
            "inner_lr": (_CNN_INNER_LR if model == "cnn" else _INNER_LR)[self.inner_optimizer],
            "hyper_lr": 0.02 if decays else 0.05,
            "log_decay": -7.0 if decays else -6.0,
        }

    def _check(self) -> None:
        check_one_of("model", self.model, MODELS)
        for name in ("train_size", "valid_size", "width", "steps", "inner_steps", "threads"):
            check_whole(name, getattr(self, name), 1)
        for name in ("warmup", "batch_size", "num_terms", "trials", "seed"):
            check_whole(name, getattr(self, name), 0)
        if isinstance(self.threads, int) and self.threads > MOST_THREADS:
            raise ConfigError(f"--threads must be <= {MOST_THREADS}; got {self.threads}.")
        try:
            Neumann(num_terms=self.num_terms)
        except ValueError as error:
            raise ConfigError(f"--num-terms {self.num_terms} is too many: {error}") from error
        if self.seed >= 2**32:
            raise ConfigError(f"--seed must be below 2**32; got {self.seed}.")
        for name in ("inner_lr", "hyper_lr"):
            value = check_number(name, getattr(self, name))
            if value <= 0:
                raise ConfigError(f"{_option(name)} must be > 0; got {value}.")
        noise = check_number("label_noise", self.label_noise)
        if not 0 <= noise < 1:
            raise ConfigError(f"--label-noise must be in [0, 1); got {noise}.")
        low, high = LOG_DECAY_RANGE
        if not low <= check_number("log_decay", self.log_decay) <= high:
            raise ConfigError(f"--log-decay must be in [{low:g}, {high:g}]; got {self.log_decay}.")
        if self.alpha is not None and check_number("alpha", self.alpha) <= 0:
            raise ConfigError(f"--alpha must be auto or > 0; got {self.alpha}.")
        if self.data_dir is not None and not isinstance(self.data_dir, str):
            raise ConfigError(f"--data-dir must be a path; got {self.data_dir!r}.")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Requires one of ``allowed`` as choice ``name``."""
    if value not in allowed:
        raise ConfigError(f"{_option(name)} must be one of {', '.join(allowed)}; got {value!r}.")


def check_whole(name: str, value: object, least: int) -> None:
    """Requires a whole number from ``least`` on as choice ``name``."""
    if type(value) is not int or value < least:
        raise ConfigError(f"{_option(name)} must be a whole number >= {least}; got {value!r}.")
    if value >= 2**63:
        raise ConfigError(f"{_option(name)} must be below 2**63; got {value}.")


def check_number(name: str, value: object) -> float:
    """Requires a finite number as choice ``name``, and returns it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{_option(name)} must be a finite number; got {value!r}.")
    return float(value)
