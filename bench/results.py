"""What one run found, as plain data: the same objects are printed and written as JSON."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .registry import OURS, TRAINING_PASS, Contestant, Goal
from .timing import Samples, Spread, ratio

IDLE = 0.9  # of the CPU time that all threads could have used in the time measured


@dataclass
class Row:
    """One contestant's figures. Times are seconds of one step."""

    name: str
    role: str
    seconds: Spread
    bytes_moved: int
    gb_per_second: float
    ours_over_this: Spread | None  # none for ours
    cpu_per_wall: float | None  # CPU only
    threads_idle: bool
    extra_bytes: int
    host_seconds: Spread | None  # CUDA only, as the next two
    device_seconds: Spread | None
    launches: int | None
    num_rounds: int


@dataclass
class Verdict:
    """A goal beside what was measured. ``met`` is None where it is not judged, and ``note`` says why."""

    text: str
    against: str
    at_most: float
    measured: float | None
    met: bool | None
    note: str = ""


@dataclass
class Result:
    """A case at one thread count. A red case has no rows."""

    case: str
    summary: str
    threads: int
    num_tensors: int = 0
    num_elements: int = 0
    wrong: str | None = None  # why the case is red
    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    load_average: tuple[float | None, float | None] = (None, None)
    attempts: int = 0  # timings until one had all threads running


def row(
    contestant: Contestant,
    samples: Samples,
    ours: Samples,
    *,
    threads: int,
    extra_bytes: int,
    launches: int | None = None,
) -> Row:
    """Sums up one contestant's samples."""
    seconds = Spread.of(samples.wall)
    busy = sum(samples.cpu) / sum(samples.wall) if samples.cpu else None
    return Row(
        name=contestant.name,
        role=contestant.role,
        seconds=seconds,
        bytes_moved=contestant.bytes_moved,
        gb_per_second=contestant.bytes_moved / seconds.median / 1e9,
        ours_over_this=None if contestant.role == OURS else ratio(ours.wall, samples.wall),
        cpu_per_wall=busy,
        threads_idle=busy is not None and busy < IDLE * threads,
        extra_bytes=extra_bytes,
        host_seconds=Spread.of(samples.host) if samples.host else None,
        device_seconds=Spread.of(samples.device) if samples.device else None,
        launches=launches,
        num_rounds=len(samples.wall),
    )


def judge(
    goals: tuple[Goal, ...], rows: Mapping[str, Row], param_bytes: int, *, full_size: bool, shares: bool
) -> list[Verdict]:
    """Holds the rows against the goals. ``shares``: the work is large enough to keep all threads busy."""
    ours = next(row for row in rows.values() if row.role == OURS)
    verdicts = []
    for goal in goals:
        measured: float | None = None
        note = "" if full_size else "small sizes"
        if goal.against is None:
            measured = ours.extra_bytes / param_bytes
        elif goal.against not in rows:
            note = "left out"
        elif goal.of_memory:
            measured = ours.extra_bytes / max(1, rows[goal.against].extra_bytes)
        else:
            rival = rows[goal.against]
            measured = rival.ours_over_this.median if rival.ours_over_this else None
            if shares and (ours.threads_idle or rival.threads_idle):
                note = "not all threads ran"
        met = None if note or measured is None else measured <= goal.at_most
        verdicts.append(Verdict(goal.text, goal.against or "extra memory / params", goal.at_most, measured, met, note))
    return verdicts


def pass_seconds(result: Mapping[str, Any]) -> float | None:
    """Of a result as it is written: the seconds of a forward and backward pass, where that is the case's unit."""
    seconds: list[float] = [row["seconds"]["median"] for row in result["rows"] if row["name"] == TRAINING_PASS]
    return seconds[0] if seconds else None
