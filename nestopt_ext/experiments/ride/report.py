"""What a reader of a ride is told: the table of solutions, and sentences."""

from ...games import EigenRidges, LyapunovBranches
from .results import RideResult


def tables(result: RideResult) -> list[tuple[list[str], list[list[str]]]]:
    """A header and a row for each solution."""
    num_starts = len(result.study.starts)
    header = ["solution", *result.study.header]
    header += [f"starts of {num_starts}"] if num_starts > 1 else []
    header += [f"branches of {len(result.archive.branches)}"]
    header += [f"{end.name} ({len(end.states)})" for end in result.ends]
    rows = []
    for row in result.rows:
        cells = [row.name, *result.study.row(row.key)]
        cells += [_count(row.starts)] if num_starts > 1 else []
        rows.append([*cells, _count(row.branches), *map(_count, row.rivals)])
    return [(header, rows)]


def findings(result: RideResult) -> list[str]:
    """What the figures say."""
    ride, archive = result.found(None), result.archive
    lines = [
        f"{result.study.title}: {_many(ride, 'solution')} at the ends of {_many(len(archive.branches), 'branch')} from"
        f" {_many(len(archive.bifurcations), 'place')}, {result.study.gradients(archive):,} gradient evaluations."
    ]
    per_start = result.most_from_one_start()
    if len(per_start) > 1:
        several = sum(count > 1 for count in per_start)
        lines.append(f"From one start: two or more solutions in {several} of {len(per_start)} starts.")
    for number, end in enumerate(result.ends):
        lines.append(
            f"{end.name[0].upper()}{end.name[1:]}: {_many(result.found(number), 'solution')} in"
            f" {_many(len(end.states), 'descent')} of {end.gradients // max(1, len(end.states)):,} steps."
        )
    failed = sum(branch.status.failed for branch in archive.branches)
    if failed:
        lines.append(f"{_many(failed, 'branch')} left the bounds or overflowed, without an end.")
    if isinstance(result.study.method, LyapunovBranches):
        lines.append(
            f"An end counts where it is after {result.study.method.max_steps:,} steps, settled or on its way; more"
            " (--steps) merge those on their way."
        )
    if isinstance(result.study.method, EigenRidges):
        least = -result.study.method.min_curvature
        undecided = sum(b.curvature is not None and b.curvature[0] < least <= b.curvature[1] for b in archive.branches)
        if undecided:
            lines.append(f"{_many(undecided, 'branch')} ended where a minimum cannot be told from a saddle.")
    return lines


def _count(number: int) -> str:
    return str(number) if number else "-"


def _many(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}{'es' if what.endswith('ch') else 's'}"
