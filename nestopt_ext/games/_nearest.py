"""Points met so far, and which of them a new one is the same as."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Nearest:
    """Points [K] in one tensor that grows by doubling, numbered in the order in which they came."""

    def __init__(self, distance: float, points: Iterable[Tensor] = ()) -> None:
        self._distance = distance
        known = list(points)
        self._points = torch.stack(known) if known else torch.empty(0, 0)
        self._count = len(known)

    def find(self, point: Tensor) -> int | None:
        """The number of the nearest point, None where all are further away than the distance."""
        if self._count == 0:
            return None
        nearest, number = (self._points[: self._count] - point).norm(dim=1).min(dim=0)
        return int(number) if float(nearest) <= self._distance else None

    def add(self, point: Tensor) -> None:
        """One point more."""
        if self._count == 0:
            self._points = point.new_empty(8, len(point))
        elif self._count == len(self._points):
            self._points = torch.cat([self._points, torch.empty_like(self._points)])
        self._points[self._count] = point
        self._count += 1
