"""Sums of products in Einstein's notation, taken apart into matrix products, two operands at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._tape import REWRITES


def einsum(equation: Any, *operands: Any) -> Any:
    """Of labels that are letters, each once in an operand; other forms are not known."""
    if not isinstance(equation, str) or "." in equation:
        return NotImplemented
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    left, arrow, out = equation.replace(" ", "").partition("->")
    labels = left.split(",")
    if not arrow:
        out = "".join(sorted(c for c in set(left) - {","} if left.count(c) == 1))
    if any(len(set(part)) < len(part) for part in (*labels, out)):
        return NotImplemented
    terms = list(zip(labels, operands, strict=True))
    sizes: dict[str, set[int]] = {}
    for part, operand in terms:
        for label, size in zip(part, operand.shape, strict=True):
            sizes.setdefault(label, set()).add(size)
    if any(len(found) > 1 for found in sizes.values()):  # ones are broadcast
        return NotImplemented
    while len(terms) > 1:
        first, second, *terms = terms
        later = {*out, *(label for part, _ in terms for label in part)}
        terms.insert(0, _product(first, second, later, out))
    part, result = _summed(*terms[0], set(out))
    return _in_order(part, result, out)


def _product(first: tuple[str, Tensor], second: tuple[str, Tensor], later: set[str], out: str) -> tuple[str, Tensor]:
    """One matrix product, with the labels that are still wanted."""
    a_labels, a = _summed(*first, later | set(second[0]))
    b_labels, b = _summed(*second, later | set(first[0]))
    shared = [c for c in a_labels if c in b_labels]
    over = [c for c in shared if c not in later]
    batch = sorted((c for c in shared if c in later), key=lambda c: (out + a_labels).index(c))
    rows, columns = [c for c in a_labels if c not in b_labels], [c for c in b_labels if c not in a_labels]
    size = dict(zip(a_labels, a.shape, strict=True)) | dict(zip(b_labels, b.shape, strict=True))

    def shape(labels: Sequence[str]) -> list[int]:
        return [size[c] for c in labels]

    summed = math.prod(shape(over))
    a = _in_order(a_labels, a, "".join([*batch, *rows, *over]))
    b = _in_order(b_labels, b, "".join([*batch, *over, *columns]))
    # Without a batch the rows stay dimensions, so that examples are found among them.
    a = a.reshape(*shape(batch), *([math.prod(shape(rows))] if batch else shape(rows)), summed)
    b = b.reshape(*shape(batch), summed, math.prod(shape(columns)))
    labels = [*batch, *rows, *columns]
    return "".join(labels), torch.matmul(a, b).reshape(shape(labels))


def _summed(labels: str, x: Tensor, wanted: set[str]) -> tuple[str, Tensor]:
    """Without the labels that nothing else has."""
    dims = [d for d, c in enumerate(labels) if c not in wanted]
    return "".join(c for c in labels if c in wanted), x.sum(dims) if dims else x


def _in_order(labels: str, x: Tensor, wanted: str) -> Tensor:
    return x if labels == wanted else x.permute([labels.index(c) for c in wanted])


REWRITES[torch.einsum] = einsum
