"""What a run of `ride` found: the archive of the ride, and the ends of its rivals, told apart alike."""

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ...games import Archive
from .config import RideConfig
from .study import Study


@dataclass(frozen=True, eq=False)
class Ends:
    """Where the descents of a rival ended: its name, the gradients it took, states [N, S] and keys [N, K]."""

    name: str
    gradients: int
    states: Tensor
    keys: Tensor


@dataclass(frozen=True, eq=False)
class Row:
    """A solution of the ride or of a rival: its ``key`` [K], from how many starts and at the end of how many branches
    the ride found it, and how many descents of each rival ended there.
    """

    name: str
    key: Tensor
    starts: int
    branches: int
    rivals: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class RideResult:
    """An archive, and the rivals of the ride."""

    config: RideConfig
    study: Study
    archive: Archive
    ends: tuple[Ends, ...]

    @cached_property
    def rows(self) -> list[Row]:
        """All solutions: those of the ride, most branches first, and behind them those that only rivals found."""
        keys = [solution.key for solution in self.archive.solutions]
        places = [self._places(end.keys, keys) for end in self.ends]
        starts = [self._starts_of(number) for number in range(len(self.archive.solutions))]
        rows = []
        for number, key in enumerate(keys):
            found = number < len(self.archive.solutions)
            rows.append(
                Row(
                    self.study.label(key),
                    key,
                    starts[number] if found else 0,
                    len(self.archive.solutions[number].branches) if found else 0,
                    tuple(places_of.count(number) for places_of in places),
                )
            )
        return _told_apart(sorted(rows, key=lambda row: (-row.branches, *(-count for count in row.rivals))))

    def found(self, rival: int | None) -> int:
        """How many different solutions a rival found, or, for None, the ride."""
        return sum((row.branches if rival is None else row.rivals[rival]) > 0 for row in self.rows)

    def most_from_one_start(self) -> list[int]:
        """How many different solutions the ride found from each start."""
        assert self.archive.starts is not None
        return [len(self.archive.found_from(start)) for start in range(len(self.archive.starts))]

    def _starts_of(self, solution: int) -> int:
        assert self.archive.starts is not None
        found = [self.archive.found_from(start) for start in range(len(self.archive.starts))]
        return sum(any(s.id == solution for s in solutions) for solutions in found)

    def _places(self, ends: Tensor, keys: list[Tensor]) -> list[int]:
        """Which of ``keys`` each end belongs to, -1 for one that is not finite; new ones are appended."""
        places = []
        for key in ends:
            if not bool(key.isfinite().all()):
                places.append(-1)
                continue
            apart = torch.stack([key.new_tensor(torch.inf), *((key - known).norm() for known in keys)])[1:]
            if not len(apart) or float(apart.min()) > self.study.distance:
                keys.append(key)
                places.append(len(keys) - 1)
            else:
                places.append(int(apart.argmin()))
        return places


def _told_apart(rows: list[Row]) -> list[Row]:
    """The rows with a number behind a name that an earlier one has: two solutions may be near the same known one."""
    seen: Counter[str] = Counter()
    numbered = []
    for row in rows:
        seen[row.name] += 1
        numbered.append(row if seen[row.name] == 1 else replace(row, name=f"{row.name} ({seen[row.name]})"))
    return numbered
