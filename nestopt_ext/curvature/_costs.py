"""What ways to a sum of K terms cost: by products, in the space of the outputs, and in the span of the rows; estimated
from sizes alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _lists
from .._types import TensorList
from ._example_rows import gram_macs
from ._output_series import MOST_STEPS
from ._tape import Node, Tape


@dataclass(frozen=True)
class _Device:
    """What is done in a second: multiplications in matrix products, bytes of vectors passed, bytes of a matrix read
    again and again; and the seconds of one operation called from Python.
    """

    macs: float
    bytes: float
    matrix_bytes: float
    overhead: float


#: From MLPs of 64 and 512 units on one core.
_CPU_CORE = _Device(macs=6e10, bytes=1e10, matrix_bytes=2.5e10, overhead=5e-6)
#: From data sheets; only the order of magnitude counts.
_ACCELERATOR = _Device(macs=1e13, bytes=1e12, matrix_bytes=2e12, overhead=8e-6)

#: Operations from Python: of a node in both passes of a product, and for each param; of a node when its deltas are
#: found, for one cotangent and for several at once; for each param and in all, when a series is summed; in the space
#: of the outputs, of a term beside its nodes, and in all.
_OF_NODE, _OF_PARAM = 3, 4
_OF_DELTAS, _OF_MANY_DELTAS = 8, 60
_OF_ROWS, _OF_SERIES = 15, 40
_OF_OUTPUTS_TERM, _OF_OUTPUTS_SERIES = 5, 30


@dataclass(frozen=True)
class Loop:
    """Seconds for each product, and bytes."""

    term: float
    memory: int

    def time(self, num_terms: int) -> float:
        return num_terms * self.term


@dataclass(frozen=True)
class InOutputs:
    """Seconds before and with each term, and bytes; ``layers`` give what is made of params in so many terms."""

    start: float
    term: float
    layers: Sequence[Callable[[int], float]]
    memory: int

    def time(self, num_terms: int) -> float:
        starts = max(1, -(-num_terms // MOST_STEPS))
        return starts * self.start + num_terms * self.term + sum(layer(num_terms) for layer in self.layers)


@dataclass(frozen=True)
class Dual:
    """Seconds before, with each, and with each term of, a series in the span of so many rows; and bytes."""

    rows: int
    build: float
    solve: float
    term: float
    memory: int

    def time(self, num_terms: int, built: bool) -> float:
        return (0.0 if built else self.build) + self.solve + num_terms * self.term


class Sizes:
    """What the nodes of a tape multiply in all, and how many there are."""

    def __init__(self, tape: Tape, params: TensorList) -> None:
        self.tape, self.params = tape, params
        self.device = _device(params[0].device)
        self.itemsize = params[0].element_size()
        self.size = _lists.numel(params) * self.itemsize
        self.nodes, self.count = len(tape.nodes), len(params)
        #: Each use of a param by a node.
        self.uses = [(n, n.slots[i]) for n in tape.nodes for i in n.wanted if n.slots[i] < tape.num_params]
        self.layers = list({id(n): n for n, _ in self.uses}.values())
        self.with_params = sum(n.macs for n in self.layers)
        onwards = (n for n in tape.nodes if any(n.slots[i] >= tape.num_params for i in n.wanted))
        self.with_operands = sum(n.macs for n in onwards)

    def product(self) -> float:
        """Seconds of J and J', each once."""
        return (
            2 * (self.with_params + self.with_operands) / self.device.macs
            + self.of_params(self.size, self.count)
            + _OF_NODE * self.nodes * self.device.overhead
        )

    def of_params(self, size: int, count: int) -> float:
        """Seconds for ``count`` params of so many bytes in a product, besides multiplications."""
        return 5 * size / self.device.bytes + _OF_PARAM * count * self.device.overhead


def loop_costs(sizes: Sizes) -> Loop:
    """Estimates for products one by one, from what the nodes say of their multiplications."""
    return Loop(sizes.product(), 2 * sizes.size)


def outputs_costs(sizes: Sizes) -> InOutputs:
    """Estimates for products in the space of the outputs."""
    device, outputs = sizes.device, sizes.tape.outputs.numel() * sizes.itemsize
    kept = [_kept_for_kernel(node, sizes.params[slot]) for node, slot in sizes.uses]
    return InOutputs(
        start=sizes.product() + (_OF_NODE * sizes.nodes + _OF_OUTPUTS_SERIES) * device.overhead,
        term=2 * sizes.with_operands / device.macs
        + 20 * outputs / device.bytes
        + (_OF_NODE * sizes.nodes + _OF_OUTPUTS_TERM) * device.overhead,
        layers=[functools.partial(_through_params, sizes, node) for node in sizes.layers],
        memory=sum(kept) * sizes.itemsize + 6 * outputs,
    )


def _through_params(sizes: Sizes, node: Node, num_terms: int) -> float:
    """Seconds that the params of a layer take in so many terms; as much as in the loop where gradients are formed."""
    macs, forms_gradients = node.macs_through_params(num_terms)
    seconds = macs / sizes.device.macs
    if forms_gradients:
        own = [sizes.params[slot] for n, slot in sizes.uses if n is node]
        seconds += num_terms * sizes.of_params(_lists.numel(own) * sizes.itemsize, len(own))
    return seconds


def _kept_for_kernel(node: Node, param: Tensor) -> int:
    """Elements of a cotangent, and of the inner products of rows or a gradient, whichever is smaller."""
    if param.dim() < 2 or not param.numel():
        return 0
    rows = node.macs // param.numel()
    return rows * param.shape[0] + min(rows * rows, param.numel())


def dual_costs(sizes: Sizes, batch: int, rank: int) -> Dual:
    """Estimates for ``rank`` rows of each of ``batch`` examples."""
    device, itemsize, rows = sizes.device, sizes.itemsize, rank * batch
    found = [_gram_of(node, sizes.params[slot], batch, rows) for node, slot in sizes.uses]
    of_gram, kept = sum(macs for macs, _ in found), sum(elements for _, elements in found)
    matrix = rows * rows * itemsize
    deltas = _OF_DELTAS if rank == 1 else _OF_MANY_DELTAS
    return Dual(
        rows=rows,
        build=(rank * sizes.with_operands + of_gram) / device.macs
        + kept * itemsize / device.bytes
        + (deltas * sizes.nodes + _OF_ROWS * sizes.count) * device.overhead,
        solve=2 * sizes.with_params / device.macs
        + 3 * (sizes.size + kept * itemsize) / device.bytes
        + (_OF_ROWS * sizes.count + _OF_SERIES) * device.overhead,
        term=matrix / device.matrix_bytes + 1e-6,
        memory=kept * itemsize + matrix,
    )


def _gram_of(node: Node, param: Tensor, batch: int, rows: int) -> tuple[float, int]:
    """Multiplications of the Gram matrix of a param, and elements that are kept of its rows."""
    size = max(1, param.numel())
    if node.num_picked:
        positions, width = node.num_picked // batch, size // param.shape[0]
        return gram_macs(rows, 0, positions, width, 0)[0], rows * positions * width
    positions = node.macs // (batch * size)
    if param.dim() < 2 or positions == 0:
        return 0.5 * float(rows) ** 2 * size, rows * size
    out = param.shape[0]
    return min(gram_macs(rows, batch, positions, out, size // out)), rows * positions * out


def _device(device: torch.device) -> _Device:
    if device.type != "cpu":
        return _ACCELERATOR
    threads = torch.get_num_threads()
    shared = min(threads, 4)  # what saturates memory
    core = _CPU_CORE
    return _Device(core.macs * threads, core.bytes * shared, core.matrix_bytes * shared, core.overhead)
