"""A recorded model taken apart into examples: where they are in each tensor, and the gradient of each in each param."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ._recording import Opaque
from ._tape import MixesExamples, Node, OuterProducts, Picked, Rows, Tape

#: Gradients of a param, one for each example, as a layer gives them.
Gradients: TypeAlias = OuterProducts | Picked | Rows
#: The same, or what makes them where they take much memory.
Use: TypeAlias = Gradients | Callable[[], Gradients]


@dataclass(frozen=True)
class Examples:
    """``batch`` examples; ``dims`` says for each variable of a recording which dimension runs over them, if any."""

    batch: int
    dims: dict[int, int | None]

    def of(self, node: Node) -> list[int | None]:
        """The dimensions of the operands of ``node``."""
        return [None if slot < 0 else self.dims[slot] for slot in node.slots]


def find_examples(tape: Tape) -> Examples:
    """Follows the batch from the inputs to the outputs; raises :class:`MixesExamples` if it gets lost.

    An example may depend on others through data alone: its gradient is then still its own.
    """
    sizes = {var.value.shape[0] if var.value.dim() else None for var in tape.data}
    if len(sizes) != 1 or None in sizes:
        raise MixesExamples(
            "its inputs must be tensors with one batch dimension in front" if sizes else "its inputs hold no tensor"
        )
    (batch,) = sizes
    if not batch:
        raise MixesExamples("its batch is empty")
    dims: dict[int, int | None] = dict.fromkeys(range(tape.num_params))
    dims.update((var.slot, 0) for var in tape.data)
    examples = Examples(batch, dims)
    needed = {id(node) for node in tape.nodes}
    for node in tape.all_nodes:
        dims[node.output] = _dim_of(node, examples, id(node) in needed)
    if dims[tape.output_slot] != 0 or tape.outputs.shape[0] % batch:
        raise MixesExamples("its outputs must have the batch dimension in front")
    return examples


def _dim_of(node: Node, examples: Examples, needed: bool) -> int | None:
    """Where the result of a node has the batch; what is not ``needed`` for derivatives may have it nowhere."""
    try:
        if isinstance(node, Opaque):
            raise MixesExamples("a function without a rule is not known to treat examples apart")
        return node.batch_dim(examples.of(node), examples.batch)
    except MixesExamples:
        if needed:
            raise
        return None


def example_gradients(tape: Tape, examples: Examples, cotangents: Tensor) -> list[list[Use]]:
    """The gradients of each param for ``cotangents`` [m, *outputs]: of each use of it, one for each example.

    What comes from cotangents is [m B, ...], m times one for each of the B examples; features of the operands are
    [B, ...]. Nothing of the size of the params is formed, and no products of all cotangents with the weights but those
    that carry them on. Raises :class:`MixesExamples` where a layer has no gradients for each example.
    """
    found: list[list[Use]] = [[] for _ in range(tape.num_params)]
    waiting: dict[int, Tensor] = {tape.output_slot: cotangents}
    shared: dict[int, Tensor] = {}  # of what is computed from the params alone: one for each example, [m B, *shape]

    def add(slot: int, use: Use) -> None:
        if slot < tape.num_params:
            found[slot].append(use)
            return
        assert isinstance(use, Rows)
        shared[slot] = use.rows if slot not in shared else shared[slot] + use.rows

    for node in reversed(tape.nodes):
        if examples.dims[node.output] is None:
            rows = shared.pop(node.output, None)
            if rows is not None:
                for i, part in zip(node.wanted, _carried(node, node.wanted, rows), strict=True):
                    add(node.slots[i], Rows(part))
            continue
        cotangent = waiting.pop(node.output, None)
        if cotangent is None:
            continue
        onwards = [i for i in node.wanted if examples.dims[node.slots[i]] is not None]
        for i in node.wanted:
            if i in onwards:
                continue
            make = functools.partial(_of_layer, node, i, cotangent, examples)
            if node.slots[i] >= tape.num_params:
                add(node.slots[i], _formed(make(), node.vjp(i, cotangent[0], None).shape))
            else:
                add(node.slots[i], make if node.gradients_are_large else make())
        if onwards:
            for i, part in zip(onwards, _carried(node, onwards, cotangent), strict=True):
                slot = node.slots[i]
                waiting[slot] = part if slot not in waiting else waiting[slot] + part
    return found


def _formed(gradients: Gradients, shape: torch.Size) -> Rows:
    """The gradients themselves, [m B, *shape]."""
    if isinstance(gradients, Rows):
        return Rows(gradients.rows.reshape(-1, *shape))
    if isinstance(gradients, Picked):
        raise MixesExamples("a table of embeddings that is computed from other params is not taken apart")
    left, right = gradients.left, gradients.right
    left = left.view(-1, *right.shape[:3], left.shape[3])
    return Rows(torch.einsum("mbtgo,btgi->mbgoi", left, right).reshape(-1, *shape))


def _carried(node: Node, operands: Sequence[int], cotangent: Tensor) -> list[Tensor]:
    """What goes back to ``operands``, for each of m cotangents."""

    def one(u: Tensor) -> tuple[Tensor, ...]:
        return tuple(node.vjps(u, operands))

    return _for_each(one, cotangent)


def _of_layer(node: Node, i: int, cotangent: Tensor, examples: Examples) -> Gradients:
    dims = examples.of(node)
    if len(cotangent) == 1:
        return node.example_gradients(i, cotangent[0], dims, examples.batch)
    made: list[Gradients] = []

    def one(u: Tensor) -> tuple[Tensor, ...]:
        gradients = node.example_gradients(i, u, dims, examples.batch)
        made.append(gradients)
        if isinstance(gradients, Rows):
            return (gradients.rows,)
        return gradients.left, gradients.right if isinstance(gradients, OuterProducts) else gradients.index

    first, *shared = _for_each(one, cotangent)
    first, kind = first.flatten(0, 1), made[0]
    if isinstance(kind, Rows):
        return Rows(first)
    if isinstance(kind, Picked):
        return Picked(first, shared[0][0], kind.size)
    return OuterProducts(first, shared[0][0])


def _for_each(function: Callable[[Tensor], tuple[Tensor, ...]], cotangent: Tensor) -> list[Tensor]:
    """The tensors that the function makes of each of m cotangents, stacked; at once where PyTorch can."""
    if len(cotangent) == 1:
        return [t.unsqueeze(0) for t in function(cotangent[0])]
    try:
        return list(torch.func.vmap(function)(cotangent))
    except (RuntimeError, NotImplementedError, ValueError):  # an operation without a batching rule
        rows = [function(u) for u in cotangent]
        return [torch.stack(column) for column in zip(*rows, strict=True)]
