"""Rows of a table that whole numbers name, and what tells numbers apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .._tape import MixesExamples, Node, Operand, Picked, by_example, rule, value_of
from .arithmetic import is_active


class Embedding(Node):
    """The rows of a table [V, D] at an index; nothing goes back to the one that is padding."""

    def __init__(self, table: Operand, index: Operand, padding: int | None) -> None:
        super().__init__(table, index)
        self.index, self.shape = value_of(index), value_of(table).shape
        self.num_picked = self.index.numel()
        self.kept = None if padding is None else (self.index != padding).to(value_of(table).dtype).unsqueeze(-1)

    def _masked(self, rows: Tensor) -> Tensor:
        return rows if self.kept is None else rows * self.kept

    def jvp(self, tangents: Sequence[Tensor | None]) -> Tensor:
        """The transpose of what goes back; where there is padding, torch.func.jvp is not."""
        assert tangents[0] is not None
        return self._masked(F.embedding(self.index, tangents[0]))

    def vjp(self, i: int, cotangent: Tensor, into: Tensor | None) -> Tensor:
        rows = self._masked(cotangent).reshape(-1, self.shape[1])
        if into is not None:
            return into.index_add_(0, self.index.reshape(-1), rows)
        return cotangent.new_zeros(self.shape).index_add(0, self.index.reshape(-1), rows)

    def batch_dim(self, dims: Sequence[int | None], batch: int) -> int | None:
        """That of the index."""
        if dims[0] is not None:
            raise MixesExamples("a table has a row for each example")
        return dims[1]

    def example_gradients(self, i: int, cotangent: Tensor, dims: Sequence[int | None], batch: int) -> Picked:
        if dims[1] is None:
            raise MixesExamples("an embedding has the same index for all examples")
        index = by_example(self.index, dims[1], batch).reshape(batch, -1)
        rows = by_example(self._masked(cotangent), dims[1], batch).reshape(batch, -1, self.shape[1])
        return Picked(rows, index, self.shape[0])


@rule(F.embedding)
def embedding(
    input: Operand,
    weight: Operand,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if max_norm is not None or scale_grad_by_freq or sparse or not is_active(weight):
        return NotImplemented
    table = value_of(weight)
    padding = padding_idx if padding_idx is None or padding_idx >= 0 else len(table) + padding_idx
    return Embedding(weight, input, padding), F.embedding(value_of(input), table, padding_idx)


class Labels(Node):
    """What is made of whole numbers of a batch, with one more dimension at the end: nothing depends on params."""

    def batch_dim(self, dims: Sequence[int | None], batch: int) -> int | None:
        return dims[0]


@rule(F.one_hot)
def one_hot(tensor: Operand, num_classes: int = -1) -> Any:
    return Labels(tensor), F.one_hot(value_of(tensor), num_classes)
