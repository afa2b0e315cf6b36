"""Batches that begin anew whenever they are asked for: shuffled examples, or a text from its beginning."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..data import Part
from . import text

Batch = tuple[Tensor, Tensor]


class Shuffled:
    """The examples of a part in a new order each time, ``batch_size`` at once; the last batch may be smaller.

    The order is drawn from ``generator``, a CPU one, when an epoch begins.
    """

    def __init__(self, part: Part, batch_size: int, seed: int) -> None:
        self.part = part
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return math.ceil(len(self.part) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        order = torch.randperm(len(self.part), generator=self.generator).to(self.part.y.device)
        starts = range(0, len(order), self.batch_size)
        return (self._batch(order[start : start + self.batch_size]) for start in starts)

    def _batch(self, index: Tensor) -> Batch:
        return self.part.x[index], self.part.y[index]


class Chunks:
    """A text [T, B] in chunks of ``length`` words, from the top."""

    def __init__(self, columns: Tensor, length: int) -> None:
        self.columns = columns
        self.length = length

    def __len__(self) -> int:
        return math.ceil((len(self.columns) - 1) / self.length)

    def __iter__(self) -> Iterator[Batch]:
        return text.chunks(self.columns, self.length)
