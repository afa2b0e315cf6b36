"""What a benchmark is: cases, the contestants that meet in each, and the goals they are held to."""

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

OURS = "ours"
BASELINE = "baseline"
YARDSTICK = "yardstick"

#: The yardstick whose time is the unit of the cases that have it.
TRAINING_PASS = "forward + backward"


@dataclass
class Contestant:
    """One way to do the work of a case, on arrays of its own."""

    name: str
    role: str  # OURS is held to the goals, a BASELINE does the same work, a YARDSTICK only moves as many bytes
    step: Callable[[], object]
    bytes_moved: (
        int  # least traffic of one step: every word of its state read or written once; 0 where that says nothing
    )
    written: Callable[[], Sequence[Tensor]] = tuple  # what the steps update
    expected: Callable[[int], Sequence[Tensor]] | None = None  # the reference's, after so many steps, in float64
    tolerance: float = 8.0  # largest error, in units of eps(dtype) * (1 + |expected|)


@dataclass(frozen=True)
class Goal:
    """A limit on the time, or extra memory, of ours over that of a contestant.

    With none named, on extra memory in parameter sizes.
    """

    against: str | None
    at_most: float
    text: str
    of_memory: bool = False


@dataclass
class Field:
    """The contestants of a case, built on one device; the first one is ours."""

    contestants: list[Contestant]
    num_tensors: int
    num_elements: int
    param_bytes: int
    left_out: dict[str, str]  # name of a contestant that cannot take part, and why


@dataclass(frozen=True)
class Setting:
    """Where and how large a case is built."""

    device: torch.device
    quick: bool = False


@dataclass(frozen=True)
class Case:
    """An op under test with its inputs and its rivals."""

    name: str
    summary: str
    build: Callable[[Setting], Field]
    goals: tuple[Goal, ...] = ()
    quick: bool = True  # False where, at small sizes, another case does the same


CASES: dict[str, Case] = {}


def add(case: Case) -> None:
    """Registers a case; its name must be new."""
    if case.name in CASES:
        raise ValueError(f"bench.registry.add: case.name must be new; got {case.name!r} again.")
    CASES[case.name] = case


def select(pattern: str, *, quick: bool = False) -> list[Case]:
    """The cases whose name matches a shell pattern, in the order of registration; ``quick`` those of a quick run."""
    found = [case for name, case in CASES.items() if fnmatch.fnmatchcase(name, pattern)]
    return [case for case in found if case.quick or not quick]


def wrong_by(contestant: Contestant, num_steps: int) -> float:
    """The largest error after ``num_steps`` steps, in units of eps * (1 + |expected|); infinite where a NaN is."""
    if contestant.expected is None:
        return 0.0
    worst = 0.0
    for actual, expected in zip(contestant.written(), contestant.expected(num_steps), strict=True):
        if actual.shape != expected.shape:
            return float("inf")
        if actual.numel() == 0:
            continue
        error = (actual.detach().double() - expected).abs_().div_(expected.abs() + 1).max().item()
        worst = max(worst, error / torch.finfo(actual.dtype).eps) if error == error else float("inf")
    return worst
