"""The picture of a run: learning curves, and what was learned."""

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._checkpoint import write_atomically
from .problems import example_weights
from .report import LABELS

if TYPE_CHECKING:
    from .tune import TuneResult

_COLOURS = {
    "no-decay": "0.45",
    "global-decay": "tab:blue",
    "global-decay-refit": "tab:cyan",
    "per-weight-decay": "tab:red",
    "per-example-weight": "tab:red",
}
_GRID = (3, 6)


def save_picture(path: Path, result: "TuneResult") -> None:
    """Draws the run into the PNG ``path``. Raises ImportError without Matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), dpi=120)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.08)
    FigureCanvasAgg(figure)
    figure.suptitle(_title(result), fontsize=12)
    parts: Any = figure.subfigures(2, 2, height_ratios=(1.0, 0.85), hspace=0.03, wspace=0.03)
    _losses(parts[0, 0], result)
    _accuracies(parts[0, 1], result)
    left, right = parts[1]
    if result.config.hparams == "per-weight-decay":
        _input_decays(left, result)
        _decay_histogram(right, result)
    else:
        _weight_histogram(left, result)
        _least_weighted(right, result)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())


def _title(result: "TuneResult") -> str:
    config = result.config
    count = f"{sum(h.numel() for h in result.hparams):,}"
    what = "one decay per weight" if config.hparams == "per-weight-decay" else "one weight per training example"
    noise = f", {100 * config.label_noise:.0f} % of the training labels wrong" if config.label_noise else ""
    return f"{config.data}, {config.model}: {what} ({count} hyperparameters){noise}"


def _losses(figure: Any, result: "TuneResult") -> None:
    axes = figure.subplots()
    for method in result.methods:
        if method.skipped:
            continue
        colour, refit = _COLOURS[method.method], method.method == "global-decay-refit"
        steps = [point["step"] * result.config.inner_steps for point in method.points]
        axes.plot(steps, [p["test_loss"] for p in method.points], color=colour, lw=1.2 if refit else 1.8)
        if not refit:  # it was trained on the validation part
            axes.plot(steps, [p["valid_loss"] for p in method.points], color=colour, lw=1.2, ls=(0, (4, 2)))
    title = "test loss (solid) and validation loss (dashed)"
    axes.set(yscale="log", xlabel="inner training steps", ylabel="cross-entropy", title=title)
    _tidy(axes)


def _accuracies(figure: Any, result: "TuneResult") -> None:
    axes = figure.subplots()
    for method in result.methods:
        if method.skipped:
            continue
        steps = [point["step"] * result.config.inner_steps for point in method.points]
        axes.plot(
            steps,
            [100 * p["test_accuracy"] for p in method.points],
            color=_COLOURS[method.method],
            lw=1.2 if method.method == "global-decay-refit" else 1.8,
            label=LABELS[method.method].strip(),
        )
    axes.set(xlabel="inner training steps", ylabel="test accuracy, %", title="test accuracy")
    axes.legend(fontsize=8)
    _tidy(axes)


def _input_decays(figure: Any, result: "TuneResult") -> None:
    """Decays of the first layer's weights, laid out as the pixels they look at where the layer sees whole pictures."""
    decays = (result.hparams[0] / math.log(10)).numpy()
    channels, rows, columns = result.split.train.x.shape[1:]
    if decays.ndim == 4:
        axes = figure.subplots()
        image = axes.imshow(decays.reshape(len(decays), -1), cmap="viridis", aspect="auto", interpolation="nearest")
        axes.set(xlabel="weight of a filter", ylabel="filter", title="log10 decay, first convolution")
        axes.title.set_fontsize(10)
        figure.colorbar(image, ax=axes)
        return
    maps = decays.reshape(-1, channels, rows, columns).mean(1)  # [units, rows, columns]
    if result.config.model == "linear":
        grid = figure.subplots(2, math.ceil(len(maps) / 2), squeeze=False).ravel()
        low, high = float(maps.min()), float(maps.max())
        for axes, picture, name in zip(grid, maps, result.split.classes, strict=False):
            image = axes.imshow(picture, cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
            axes.set_title(name, fontsize=8)
            axes.axis("off")
        figure.colorbar(image, ax=list(grid), label="log10 decay")
        figure.suptitle("decay of each pixel's weight, by class", fontsize=11)
        return
    mean, sample = figure.subplots(1, 2)
    image = mean.imshow(maps.mean(0), cmap="viridis", interpolation="nearest")
    mean.set_title("log10 decay by pixel,\nmean over hidden units", fontsize=10)
    figure.colorbar(image, ax=mean, shrink=0.75)
    image = sample.imshow(_tiles(maps[:16]), cmap="viridis", interpolation="nearest")
    sample.set_title("log10 decay by pixel,\n16 of the hidden units", fontsize=10)
    figure.colorbar(image, ax=sample, shrink=0.75)
    for axes in (mean, sample):
        axes.set(xticks=[], yticks=[])


def _tiles(maps: NDArray[Any]) -> NDArray[Any]:
    """Up to 16 pictures [n, rows, columns] side by side on a 4x4 board with empty lines between them."""
    count, rows, columns = maps.shape
    board = np.full((4 * (rows + 1) - 1, 4 * (columns + 1) - 1), math.nan)
    for i in range(count):
        top, left = (i // 4) * (rows + 1), (i % 4) * (columns + 1)
        board[top : top + rows, left : left + columns] = maps[i]
    return board


def _decay_histogram(figure: Any, result: "TuneResult") -> None:
    axes = figure.subplots()
    names = [name for name, _ in result.model.named_parameters()]
    layers: dict[str, list[Tensor]] = {}
    for name, h in zip(names, result.hparams, strict=True):
        layers.setdefault(name.rpartition(".")[0], []).append(h.flatten() / math.log(10))
    groups = [torch.cat(values).numpy() for values in layers.values()]
    labels = [f"layer {i} ({len(group):,})" for i, group in enumerate(groups, 1)]
    axes.hist(groups, bins=50, stacked=True, label=labels)
    start = (result.config.log_decay or 0.0) / math.log(10)
    axes.axvline(start, color="0.2", ls=(0, (4, 2)), lw=1.2, label="start")
    found = next((m.log_decay for m in result.methods if m.method == "global-decay"), None)
    if found is not None:
        axes.axvline(found / math.log(10), color="tab:blue", ls=":", lw=1.8, label="best global decay")
    axes.set(xlabel="log10 decay", ylabel="weights", title="learned decays")
    axes.legend(fontsize=8)
    _tidy(axes)


def _weight_histogram(figure: Any, result: "TuneResult") -> None:
    axes = figure.subplots()
    weights, flipped = example_weights(result.hparams[0]), result.split.flipped
    bins = [i / 20 for i in range(41)]
    axes.hist(weights[~flipped].numpy(), bins=bins, color="tab:blue", alpha=0.6, label="right label")
    if bool(flipped.any()):
        axes.hist(weights[flipped].numpy(), bins=bins, color="tab:orange", alpha=0.6, label="wrong label")
    found = result.methods[-1].auc
    score = "" if found is None else f", AUC {found:.3f}"
    axes.set(
        xlabel="weight of the example (1 at the start)", ylabel="training examples", title=f"learned weights{score}"
    )
    axes.legend(fontsize=8, loc="upper center")
    _tidy(axes)


def _least_weighted(figure: Any, result: "TuneResult") -> None:
    """The training examples that the run trusts least, with the label they came with and the true one."""
    split = result.split
    rows, columns = _GRID
    least = torch.argsort(result.hparams[0], stable=True)[: rows * columns]
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    figure.suptitle("least weighted examples: given label (true label where it differs)", fontsize=10)
    for axes in grid:
        axes.axis("off")
    for axes, n in zip(grid, least.tolist(), strict=False):
        picture = split.train.x[n].cpu() * split.scale + split.shift  # [channels, rows, columns]
        picture = (picture / picture.max().clamp_min(1e-6)).clamp(0, 1)
        axes.imshow(
            (picture[0] if len(picture) == 1 else picture.permute(1, 2, 0)).numpy(),
            cmap="gray_r",
            interpolation="nearest",
        )
        given, true = split.classes[int(split.train.y[n])], split.classes[int(split.true_y[n])]
        wrong = bool(split.flipped[n])
        axes.set_title(
            f"{given} ({true})" if wrong else given, fontsize=8, color="tab:red" if wrong else "black", pad=2
        )


def _tidy(axes: Any) -> None:
    axes.title.set_fontsize(10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, lw=0.6)
    axes.set_axisbelow(True)
