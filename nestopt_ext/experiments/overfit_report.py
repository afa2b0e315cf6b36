"""What a run of overfit shows: a table, sentences, and a picture."""

import math
from pathlib import Path
from typing import Any

import torch

from .games import _style
from .overfit import OverfitResult


def table(result: OverfitResult) -> tuple[list[str], list[list[str]]]:
    """A header and a row for each of three points of the curve."""
    highest = max(result.points, key=lambda point: point["valid_accuracy"])
    rows = [
        _row("highest test accuracy", result.best_test),
        _row("highest validation accuracy", highest),
        _row("end", result.points[-1]),
    ]
    return ["", "outer step", "train loss / acc", "valid loss / acc", "test loss / acc"], rows


def findings(result: OverfitResult) -> list[str]:
    """What the figures say."""
    config = result.config
    lost = 100 * (result.best_test["test_accuracy"] - result.final.test_accuracy)
    goal = (
        f"Both parts were learned by heart at outer step {result.learned_at}."
        if result.learned_at is not None
        else f"Both parts were not learned by heart in {config.steps} outer steps."
    )
    return [
        f"{config.model}: {sum(h.numel() for h in result.hparams):,} decays, {config.train_size} training and"
        f" {config.valid_size} validation digits; seed {config.seed}.",
        goal,
        f"The test accuracy ends {lost:.1f} points below its highest: the decays know the validation part, not digits.",
    ]


def save_picture(path: Path, result: OverfitResult) -> None:
    """Draws the run into the PNG ``path``. Raises ImportError without Matplotlib."""
    count = f"{sum(h.numel() for h in result.hparams):,}"
    figure = _style.new_figure(13, 4.6, f"overfitting {result.config.valid_size} validation digits with {count} decays")
    accuracy, loss, decays = figure.subplots(1, 3)
    parts = (("train", "training", _style.BLUE, "--"), ("valid", "validation", _style.ORANGE, "-"))
    for part, name, colour, dashes in (*parts, ("test", "test", "black", "-")):
        steps = [point["step"] for point in result.points]
        right = [100 * point[f"{part}_accuracy"] for point in result.points]
        accuracy.plot(steps, right, color=colour, ls=dashes, lw=1.6, label=name)
        loss.plot(steps, [point[f"{part}_loss"] for point in result.points], color=colour, ls=dashes, lw=1.6)
    accuracy.set(xlabel="outer steps", ylabel="right, %", title="accuracy")
    accuracy.legend(fontsize=9)
    loss.set(xlabel="outer steps", ylabel="cross-entropy", yscale="log", title="loss")
    _histogram(decays, result)
    for axes in (accuracy, loss, decays):
        _style.tidy(axes)
    _style.save(figure, path)


def _histogram(axes: Any, result: OverfitResult) -> None:
    values = torch.cat([h.flatten() for h in result.hparams]) / math.log(10)
    axes.hist(values.numpy(), bins=60, color=_style.SKY)
    axes.axvline(result.config.log_decay / math.log(10), color="0.2", ls=(0, (4, 2)), lw=1.2, label="start")
    axes.set(xlabel="log10 decay", ylabel="weights", yscale="log", title="learned decays")
    axes.legend(fontsize=9)


def _row(name: str, point: dict[str, float]) -> list[str]:
    pairs = [f"{point[f'{p}_loss']:.3f} / {100 * point[f'{p}_accuracy']:.1f} %" for p in ("train", "valid", "test")]
    return [name, f"{point['step']:.0f}", *pairs]
