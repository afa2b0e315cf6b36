"""What a run leaves behind in words: the closing table."""

import math
import sys
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from .results import MethodResult
    from .tune import TuneResult

LABELS = {
    "no-decay": "no decay",
    "global-decay": "one global decay, random search",
    "global-decay-refit": "  the same, on train + validation",
    "per-weight-decay": "one decay per weight, implicit",
    "per-example-weight": "one weight per example, implicit",
}


def table_rows(result: "TuneResult") -> tuple[list[str], list[list[str]]]:
    """The closing table as text: its header and a row of cells for each method."""
    weights_examples = result.config.hparams == "per-example-weight"
    header = ["method", "hparams", "train loss / acc", "valid loss / acc", "test loss / acc", "test acc *"]
    header += [*(["AUC"] if weights_examples else []), "time", "peak MiB"]
    rows = []
    for method in result.methods:
        row = [LABELS[method.method], f"{method.num_hparams:,}"]
        if method.skipped:
            row += ["skipped", *["-"] * (len(header) - 3)]
        else:
            row += _score_cells(method)
            if weights_examples:
                row.append("-" if method.auc is None else f"{method.auc:.3f}")
            row += [f"{method.seconds:.1f} s", f"{method.peak_mib:.0f}"]
        rows.append(row)
    return header, rows


def notes(result: "TuneResult") -> list[str]:
    """What a reader must know to read the table."""
    config, split = result.config, result.split
    lines = [
        f"{config.data}: {len(split.train)} training, {len(split.valid)} validation, {len(split.test)} test examples;"
        f" seed {config.seed}; each model {config.steps * config.inner_steps} steps of {config.inner_optimizer}.",
        "* at the step of lowest validation loss (early stopping); the other figures are those of the last step.",
        "The validation loss is what was minimized and flatters; only the test part was not looked at.",
    ]
    if any(method.auc is not None for method in result.methods):
        lines.append(
            "AUC: how well the learned weights tell right from wrong training labels (0.5: not at all; 1: all)."
        )
    if config.label_noise:
        flipped = int(split.flipped.sum())
        lines.insert(
            1, f"{flipped} of {len(split.train)} training labels are wrong; validation and test labels are clean."
        )
    for method in result.methods:
        if method.skipped:
            lines.append(f"{LABELS[method.method].strip()}: skipped, {method.skipped}.")
        elif method.method == "global-decay" and method.log_decay is not None:
            lines.append(
                f"Best of {config.trials} global decays, each trained in full: {math.exp(method.log_decay):.2e}."
            )
        elif method.diverged_solves:
            lines.append(
                f"In {method.diverged_solves} of {config.steps - (config.warmup or 0)} hypergradients the Neumann sum"
                " grew (the inner loss was not convex there); its terms were used as they are."
            )
    return lines


def print_table(result: "TuneResult", file: IO[str] | None = None) -> None:
    """Prints the closing table and its notes, with rich where it is installed, as plain text otherwise."""
    file = file or sys.stdout
    header, rows = table_rows(result)
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        file.write(plain_table(header, rows) + "\n")
    else:
        table = Table(*header)
        for column in table.columns[1:]:
            column.justify = "right"
        for column in table.columns:
            column.no_wrap = True
        for row in rows:
            table.add_row(*row, style="bold" if row is rows[-1] else None)

        class Patient(Console):
            def on_broken_pipe(self) -> None:
                raise  # rich would end the program here, with a code of its own

        # A table that wraps is unreadable; a line that is too long for the window is not.
        wide = max(160, Console(file=file).width)
        Patient(file=file, width=wide, highlight=False).print(table)
    file.write("".join(f"{line}\n" for line in notes(result)))


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns lined up with spaces, the first to the left and the others to the right.

    >>> print(plain_table(["a", "b"], [["x", "10"]]))
    a   b
    -  --
    x  10
    """
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
        for r in cells
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(line.rstrip() for line in lines)


def _score_cells(method: "MethodResult") -> list[str]:
    final = method.final
    pairs = (
        (final.train_loss, final.train_accuracy),
        (final.valid_loss, final.valid_accuracy),
        (final.test_loss, final.test_accuracy),
    )
    cells = [f"{loss:.3f} / {100 * accuracy:.1f} %" for loss, accuracy in pairs]
    early = f"{100 * method.stopped_early.test_accuracy:.1f} %"
    if method.method == "global-decay-refit":  # its validation part was trained on and says nothing
        cells[1], early = "trained on", "-"
    return [*cells, early]
