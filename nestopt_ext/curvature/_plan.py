"""Which way to a sum of K terms is faster: K products, or the span of the rows; estimated from sizes alone."""

from __future__ import annotations

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
#: What rows and matrix may take where the choice is free.
_MOST_BYTES = 2**31


@dataclass(frozen=True)
class Plan:
    """How a Gauss-Newton or Fisher operator sums a Neumann series of ``num_terms`` products, and the estimates behind.

    ``route`` is "loop", one product after the other, or "dual": the inner products of the gradients of all examples are
    found once, and the series is summed in their span. ``reason`` says why. ``rows`` counts those gradients; it is None
    where examples cannot be told apart, and then so is all that follows. ``loop_time`` and ``dual_time`` are seconds on
    an imagined device of the kind at hand, of use only beside each other; ``dual_time`` leaves out what the operator
    has found already. ``loop_memory`` and ``dual_memory`` are bytes beside the recorded model, v and the result.
    ``break_even`` is the smallest number of products for which the dual route is faster, None if it never is.

    >>> plan = Plan("dual", "estimated to be faster", 20, 256, 0.16, 0.012, 8_000_000, 2_400_000, 2)
    >>> print(plan)
    dual for 20 terms: estimated to be faster
      loop: time 0.16, memory 7.6 MiB
      dual: time 0.012, memory 2.3 MiB, 256 rows
      break-even at 2 terms
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
        estimates = (("loop", self.loop_time, self.loop_memory), ("dual", self.dual_time, self.dual_memory))
        for route, time, memory in estimates:
            if time is not None and memory is not None:
                rows = f", {self.rows} rows" if route == "dual" else ""
                lines.append(f"  {route}: time {time:.2g}, memory {memory / 2**20:.1f} MiB{rows}")
        if self.break_even is not None:
            lines.append(f"  break-even at {self.break_even} terms")
        return "\n".join(lines)


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
#: found, for one cotangent and for several at once; for each param and in all, when a series is summed.
_OF_NODE, _OF_PARAM = 3, 4
_OF_DELTAS, _OF_MANY_DELTAS = 8, 60
_OF_ROWS, _OF_SERIES = 15, 40


@dataclass(frozen=True)
class Costs:
    """Seconds for each product of the loop; before, with each, and with each term of, a series in the dual route."""

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
        """The smallest number of products for which the dual route is faster."""
        gain = self.term - self.dual_term
        return None if gain <= 0 else int(self.dual(0, built) / gain) + 1


def costs(tape: Tape, params: TensorList, batch: int, rank: int) -> Costs:
    """Estimates for ``rank`` rows of each of ``batch`` examples, from what the nodes say of their multiplications."""
    device = _device(params[0].device)
    rows, itemsize = rank * batch, params[0].element_size()
    with_params = with_operands = of_gram = 0.0
    kept = 0
    for node in tape.nodes:
        of_params = [node.slots[i] for i in node.wanted if node.slots[i] < tape.num_params]
        with_params += node.macs if of_params else 0
        with_operands += node.macs if len(of_params) < len(node.wanted) else 0
        for slot in of_params:
            macs, elements = _gram_of(node, params[slot], batch, rows)
            of_gram, kept = of_gram + macs, kept + elements
    nodes, count = len(tape.nodes), len(params)
    size = _lists.numel(params) * itemsize
    matrix = rows * rows * itemsize
    deltas = _OF_DELTAS if rank == 1 else _OF_MANY_DELTAS
    return Costs(
        term=2 * (with_params + with_operands) / device.macs
        + 5 * size / device.bytes
        + (_OF_NODE * nodes + _OF_PARAM * count) * device.overhead,
        build=(rank * with_operands + of_gram) / device.macs
        + kept * itemsize / device.bytes
        + (deltas * nodes + _OF_ROWS * count) * device.overhead,
        solve=2 * with_params / device.macs
        + 3 * (size + kept * itemsize) / device.bytes
        + (_OF_ROWS * count + _OF_SERIES) * device.overhead,
        dual_term=matrix / device.matrix_bytes + 1e-6,
        loop_memory=2 * size,
        dual_memory=kept * itemsize + matrix,
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


def chosen(num_terms: int, route: Route, rows: int, found: Costs, built: bool) -> Plan:
    """The plan for a model whose examples are apart."""
    loop, dual = found.loop(num_terms), found.dual(num_terms, built)
    choice: Literal["loop", "dual"] = "dual" if dual < loop else "loop"
    reason = "estimated to be faster"
    if route != "auto":
        choice, reason = route, "as route says"
    elif found.dual_memory > _MOST_BYTES and not built:
        choice, reason = "loop", f"{rows} rows would take more than {_MOST_BYTES // 2**20} MiB"
    return Plan(
        choice, reason, num_terms, rows, loop, dual, found.loop_memory, found.dual_memory, found.break_even(built)
    )


def _device(device: torch.device) -> _Device:
    if device.type != "cpu":
        return _ACCELERATOR
    threads = torch.get_num_threads()
    shared = min(threads, 4)  # what saturates memory
    core = _CPU_CORE
    return _Device(core.macs * threads, core.bytes * shared, core.matrix_bytes * shared, core.overhead)
