"""Delta-STN, centred STN and STN on 8x8 digits: the final losses of each, seed by seed.

    python -m bench.self_tuning_digits [--seeds 10] [--epochs 300] [--lr 0.05] [--stn-lr 0.02] ...

A perceptron with dropout of inputs and of hidden units, all tuned from one start. Split, initial general weights and
order of batches are those of the seed for all methods. They have the same optimizers and schedule, those of Delta-STN's
paper but for the learning rate of weights, which is to be chosen for each kind of network on other seeds: the sum of
general and response weights that STN trains moves faster at one rate. ``stn-paper`` is STN with the schedule and hyper
optimizer of its own paper.

Which one ends lower depends on where they start and for how long they train. From dropout rates of 0.5 at a rate of
0.05 Delta-STN ends at or below STN in most seeds; from 0.05, next to the optimum, or at the papers' 0.01, with which
these few thousand steps do not converge, STN does. Both are to be shown.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestopt_ext.response import (
    DeltaStnLinear,
    DeltaStnTrainer,
    EpochRecord,
    HyperParameters,
    ResponseTrainer,
    StnDropout,
    StnLinear,
    StnModel,
    StnTrainer,
    accuracy,
)

METHODS = ("delta-stn", "centred", "stn", "stn-paper")


@dataclass(frozen=True)
class Setting:
    """What all methods of a comparison share."""

    epochs: int = 300
    start: float = 0.05
    lr: float = 0.01
    stn_lr: float = 0.01
    num_train: int = 400
    num_valid: int = 400
    width: int = 128
    hidden: int = 1
    batch_size: int = 64


class Batches:
    """Batches of a part, in another order each time."""

    def __init__(self, x: Tensor, y: Tensor, size: int, seed: int) -> None:
        self.x, self.y, self.size = x, y, size
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for places in torch.split(torch.randperm(len(self.x), generator=self.generator), self.size):
            yield self.x[places], self.y[places]


def digits(seed: int, num_train: int, num_valid: int) -> list[tuple[Tensor, Tensor]]:
    """Training, validation and test part of a split by ``seed``; pixels in [0, 1]."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    x, y = torch.as_tensor(images)[order].float() / 16, torch.as_tensor(labels)[order]
    sizes = [num_train, num_valid, len(x) - num_train - num_valid]
    return list(zip(torch.split(x, sizes), torch.split(y, sizes), strict=True))


def network(method: str, seed: int, setting: Setting) -> StnModel:
    """The network, its general weights drawn alike for all methods."""
    widths = [64, *[setting.width] * setting.hidden, 10]
    names = ["input", *(f"hidden{i}" for i in range(1, setting.hidden + 1))]
    hparams = HyperParameters()
    for name in names:
        hparams.add(name, setting.start, low=0.0, high=0.95, scale=1.0)
    centred = not method.startswith("stn")
    layer: type[StnLinear] = DeltaStnLinear if centred else StnLinear
    torch.manual_seed(seed)
    layers = [layer(i, o, num_hparams=len(names)) for i, o in itertools.pairwise(widths)]
    torch.manual_seed(seed)
    for linear in layers:
        nn.Linear.reset_parameters(linear)
    parts: list[nn.Module] = []
    for name, linear in zip(names, layers, strict=True):
        parts += [StnDropout(name), linear, nn.ReLU()]
    return StnModel(nn.Sequential(*parts[:-1]), hparams, centred=centred)


def trainer(method: str, seed: int, setting: Setting) -> ResponseTrainer:
    """A trainer of the method."""

    def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=setting.lr if model.centred else setting.stn_lr, momentum=0.9)

    def rmsprop(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.RMSprop(params, lr=0.01)

    train, valid, test = digits(seed, setting.num_train, setting.num_valid)
    batches = [Batches(*part, setting.batch_size, seed) for part in (train, valid)]
    shared: dict[str, Any] = {"optimizer": sgd, "test_batches": [test], "metrics": {"accuracy": accuracy}}
    model = network(method, seed, setting)
    if model.centred:
        shared |= {"response_optimizer": sgd, "linearize": method == "delta-stn"}
        return DeltaStnTrainer(model, F.cross_entropy, *batches, **shared)
    if method == "stn":
        shared |= {"train_steps": 5, "hyper_optimizer": rmsprop}
    return StnTrainer(model, F.cross_entropy, *batches, **shared)


def run(method: str, seed: int, setting: Setting) -> EpochRecord:
    """The record of the last epoch."""
    return trainer(method, seed, setting).fit(setting.epochs, progress=False).history[-1]


def main() -> None:
    """Runs all methods and prints what they came to."""
    parser = argparse.ArgumentParser(description="Delta-STN, centred STN and STN on 8x8 digits.")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    for name, default in vars(Setting()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    choices = vars(parser.parse_args())
    first, methods = choices.pop("first_seed"), choices.pop("methods")
    seeds = range(first, first + choices.pop("seeds"))
    setting = Setting(**choices)
    print(setting)
    print("seed  method     valid   test    accuracy  seconds  values")
    final: dict[str, list[EpochRecord]] = {method: [] for method in methods}
    for seed in seeds:
        for method in methods:
            record = run(method, seed, setting)
            final[method].append(record)
            print(f"{seed:4}  {method:10}{_row(record)}", flush=True)
    for method in methods:
        print(f"mean  {method:10}{_means(final[method])}{_wins(final, method)}")


def _row(record: EpochRecord) -> str:
    values = "  ".join(f"{name} {value:.3f}" for name, value in record.values.items())
    losses = f"{record.valid_loss:.4f}  {record.test['loss']:.4f}  {record.test['accuracy']:.4f}"
    return f" {losses}  {record.seconds:7.1f}    {values}"


def _means(records: list[EpochRecord]) -> str:
    columns = ([r.valid_loss for r in records], [r.test["loss"] for r in records])
    return "".join(f"  {torch.tensor(column).mean():.4f}" for column in columns)[1:]


def _wins(final: dict[str, list[EpochRecord]], rival: str) -> str:
    first = next(iter(final))
    if rival == first:
        return ""
    pairs = list(zip(final[first], final[rival], strict=True))
    wins = [sum(x <= y for x, y in both) for both in (
        [(a.valid_loss, b.valid_loss) for a, b in pairs], [(a.test["loss"], b.test["loss"]) for a, b in pairs],
    )]  # fmt: skip
    return f"  {first} is at or below in {wins[0]} (validation) and {wins[1]} (test) of {len(pairs)} seeds"


if __name__ == "__main__":
    main()
