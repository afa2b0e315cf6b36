"""Which way to a sum of K terms is faster: K products, or the span of the rows; estimated from sizes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from .. import _lists
from .._types import TensorList
from ._example_rows import gram_macs
from ._tape import Node, Tape

#: How a series is summed.
Route: TypeAlias = Literal["auto", "loop", "dual"]

#: Rows whose inner products are worth a matrix.
MAX_DUAL_ROWS = 16_384
#: What the rows may take where the choice is free.
_MOST_BYTES = 2**31


@dataclass(frozen=True)
class Plan:
    """How an operator sums a Neumann series of ``num_terms`` products, and the estimates that say so.

    ``route`` is "loop", which takes one product with the operator after the other, or "dual", which finds the inner
    products of the gradients of all examples and sums the series in their span. ``reason`` says why. ``rows`` is the
    number of those gradients, None where they cannot be told apart. ``loop_time`` and ``dual_time`` are seconds on an
    imagined device of the kind at hand, of use only beside each other; ``loop_memory`` and ``dual_memory`` are bytes
    beside the model, its recording and the result. ``dual_time`` leaves out what the operator has found already.
    ``break_even`` is the smallest number of products for which the dual route is faster. What is unknown is None.
    """

    route: Literal["loop", "dual"]
    reason: str
    num_terms: int
    rows: int | None = None
    loop_time: float | None = None
    dual_time: float | None = None
    loop_memory: int | None = None
    dual_memory: int | None = None
    break_even: int | None = None

    def __str__(self) -> str:
        lines = [f"{self.route} for {self.num_terms} terms: {self.reason}"]
        for route, time, memory in (
            ("loop", self.loop_time, self.loop_memory),
            ("dual", self.dual_time, self.dual_memory),
        ):
            if time is not None and memory is not None:
                rows = f", {self.rows} rows" if route == "dual" else ""
                lines.append(f"  {route}: time {time:.2g}, memory {memory / 2**20:.3g} MiB{rows}")
        if self.break_even is not None:
            lines.append(f"  break-even at {self.break_even} terms")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Device:
    """Multiplications, and bytes of memory, per second, and seconds for one operation from Python."""

    macs: float
    bytes: float
    overhead: float


_CPU_CORE = _Device(macs=2.5e10, bytes=1e10, overhead=4e-6)
_ACCELERATOR = _Device(macs=1e13, bytes=1e12, overhead=8e-6)


@dataclass(frozen=True)
class Costs:
    """What both routes take: seconds for each product of the loop, and before and with each term of the dual route."""

    term: float
    build: float
    solve: float
    dual_term: float
    loop_memory: int
    dual_memory: int

    def loop(self, num_terms: int) -> float:
        return num_terms * self.term

    def dual(self, num_terms: int, built: bool) -> float:
        return (0.0 if built else self.build) + self.solve + num_terms * self.dual_term

    def break_even(self, built: bool) -> int | None:
        """The smallest K for which the dual route is faster."""
        gain = self.term - self.dual_term
        return None if gain <= 0 else int(self.dual(0, built) / gain) + 1


def costs(tape: Tape, params: TensorList, batch: int, rank: int) -> Costs:
    """Estimates for ``rank`` rows of each of ``batch`` examples, from what the nodes say of their multiplications."""
    device = _device(params[0].device)
    rows = rank * batch
    numel, itemsize = _lists.numel(params), params[0].element_size()
    in_params = in_operands = gram = 0.0
    deltas = 0
    for node in tape.nodes:
        of_params = [node.slots[i] for i in node.wanted if node.slots[i] < tape.num_params]
        in_params += node.macs if of_params else 0
        in_operands += node.macs if len(of_params) < len(node.wanted) else 0
        for slot in of_params:
            cost, kept = _gram_of(node, params[slot], batch, rows)
            gram += cost
            deltas += kept
    nodes, count = len(tape.nodes), len(params)
    term = (2 * in_params + 2 * in_operands) / device.macs
    term += 5 * numel * itemsize / device.bytes + (3 * nodes + 4 * count) * device.overhead
    vmapped = 1 if rank == 1 else 20
    build = (rank * in_operands + gram) / device.macs
    build += deltas * itemsize / device.bytes + (2 * nodes * vmapped + 6 * count) * device.overhead
    solve = 2 * in_params / device.macs + 3 * numel * itemsize / device.bytes + (10 * count + 20) * device.overhead
    matrix = rows * rows * itemsize
    return Costs(
        term,
        build,
        solve,
        rows * rows * max(1 / device.macs, itemsize / device.bytes / 4) + 1e-6,
        3 * numel * itemsize,
        deltas * itemsize + matrix,
    )


def _gram_of(node: Node, param: Tensor, batch: int, rows: int) -> tuple[float, int]:
    """Multiplications of the Gram matrix of a param, and elements that are kept of its rows."""
    size = max(1, param.numel())
    positions = node.macs // max(1, batch * size)
    if param.dim() < 2 or positions == 0:
        return 0.5 * float(rows) ** 2 * size, rows * size
    out = param.shape[0]
    return min(gram_macs(rows, batch, positions, out, size // out)), rows * positions * out


def chosen(num_terms: int, route: Route, rows: int, found: Costs, built: bool) -> Plan:
    """The plan for a model whose examples are apart."""
    loop, dual = found.loop(num_terms), found.dual(num_terms, built)
    if route != "auto":
        choice, reason = route, "as route says"
    elif found.dual_memory > _MOST_BYTES and not built:
        choice, reason = "loop", f"the rows take more than {_MOST_BYTES // 2**20} MiB"
    elif dual < loop:
        choice, reason = "dual", "estimated to be faster"
    else:
        choice, reason = "loop", "estimated to be faster"
    return Plan(
        "dual" if choice == "dual" else "loop",
        reason,
        num_terms,
        rows,
        loop,
        dual,
        found.loop_memory,
        found.dual_memory,
        found.break_even(built),
    )


def _device(device: torch.device) -> _Device:
    if device.type != "cpu":
        return _ACCELERATOR
    threads = torch.get_num_threads()
    return _Device(_CPU_CORE.macs * threads, _CPU_CORE.bytes * min(threads, 4), _CPU_CORE.overhead)


__all__ = ["MAX_DUAL_ROWS", "Costs", "Plan", "Route", "chosen", "costs"]
_ = Sequence
