"""Prints results: with rich where it is installed, as plain text elsewhere."""

import sys
from collections.abc import Sequence
from typing import Any

from .registry import OURS
from .results import Result, Row, Verdict
from .timing import Spread

_LEGEND = """\
time       median of one step, and the range of the inner 80 % of rounds
GB/s       least traffic of the contestant's own state over its median: who goes over memory twice shows half of it
ours/this  ratio of medians, and the inner 80 % of the ratios within each round; below 1 ours is faster
busy       CPU time over wall time; ! where not all threads ran: either the work is too small to be shared, or somebody
           else had the processor and the row means little"""


def header(facts: dict[str, Any], settings: dict[str, Any]) -> str:
    """Two lines on the machine and the run."""
    where = facts.get("gpu") or f"{facts['cpu']}, {facts['cores']} cores"
    native = f"native, {facts['compiler']}, {facts['simd']}" if facts["native"] else "reference path, no native library"
    size = "quick: small sizes, goals not judged" if settings["quick"] else "full size"
    return (
        f"{where}; torch {facts['torch']}, python {facts['python']}; {native}\n"
        f"{facts['date']}, commit {facts['commit'][:9]}{' with changes' if facts['modified'] else ''}; {size}"
    )


def show(result: Result) -> None:
    """One table: the contestants, who was left out, the goals."""
    title = f"{result.case}, {result.threads} thread{'s' if result.threads > 1 else ''}: {result.summary}"
    if result.wrong is not None:
        print(f"\n{title}\n  RED, not timed: {result.wrong}")
        return
    title += f" ({result.num_elements / 1e6:.1f} M elements in {result.num_tensors})"
    on_cuda = any(row.device_seconds for row in result.rows)
    columns = ["", "time", "GB/s", "ours/this", "extra memory"]
    columns += ["host", "device", "launches"] if on_cuda else ["busy"]
    _table(title, columns, [_cells(row, on_cuda) for row in result.rows])
    for name, reason in result.left_out.items():
        print(f"  left out: {name}: {reason}")
    for verdict in result.verdicts:
        print(f"  {_verdict(verdict)}")
    sys.stdout.flush()


def legend() -> str:
    """How to read the tables."""
    return _LEGEND


def _cells(row: Row, on_cuda: bool) -> list[str]:
    name = row.name.upper() if row.role == OURS else row.name
    quotient = row.ours_over_this
    cells = [
        name,
        _time(row.seconds),
        f"{row.gb_per_second:.1f}" if row.bytes_moved else "",
        f"{quotient.median:.2f} [{quotient.p10:.2f} {quotient.p90:.2f}]" if quotient else "",
        f"{row.extra_bytes / 1e6:.1f} MB" if row.extra_bytes >= 1e5 else "0",
    ]
    if on_cuda:
        cells += [_time(t) if t else "" for t in (row.host_seconds, row.device_seconds)]
        cells.append(str(row.launches if row.launches is not None else ""))
    else:
        cells.append("" if row.cpu_per_wall is None else f"{row.cpu_per_wall:.2f}{'!' if row.threads_idle else ''}")
    return cells


def _time(seconds: Spread) -> str:
    scale, unit = (1e3, "ms") if seconds.median >= 1e-3 else (1e6, "us")
    return f"{seconds.median * scale:.2f} {unit} [{seconds.p10 * scale:.2f} {seconds.p90 * scale:.2f}]"


def _verdict(verdict: Verdict) -> str:
    word = {True: "goal met   ", False: "goal MISSED", None: f"goal not judged ({verdict.note}):"}[verdict.met]
    measured = "not measured" if verdict.measured is None else f"{verdict.measured:.3f}"
    return f"{word} {measured} (at most {verdict.at_most:.3f} of {verdict.against}: {verdict.text})"


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(line[i]) for line in [columns, *rows]) for i in range(len(columns))]
        print(f"\n{title}")
        for line in [columns, *rows]:
            cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
            print("  ".join([line[0].ljust(widths[0]), *cells[1:]]).rstrip())
        return
    table = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for line in rows:
        # rich takes [..] for markup
        table.add_row(*(cell.replace("[", "\\[") for cell in line))
    console = Console(highlight=False)
    if not console.is_terminal:  # a file has no width, and a cut figure is no figure
        console = Console(highlight=False, width=160)
    console.print()
    console.print(table)
