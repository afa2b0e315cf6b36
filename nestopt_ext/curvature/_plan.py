"""Which way to a sum of K terms is taken: by products, in the space of the outputs, or in the span of the rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from ._costs import Dual, InOutputs, Loop

#: How a series is summed, and how it may be told to be.
Way: TypeAlias = Literal["loop", "outputs", "dual"]
Route: TypeAlias = Literal["auto", "loop", "outputs", "dual"]

#: Rows whose inner products are worth a matrix.
MAX_DUAL_ROWS = 16_384
#: What rows and matrix may take where the choice is free.
_MOST_BYTES = 2**31
#: Terms beyond which no break-even is looked for.
_MOST_TERMS = 2**20


@dataclass(frozen=True)
class Plan:
    """How a Gauss-Newton or Fisher operator sums a Neumann series of ``num_terms`` products, and the estimates behind.

    ``route`` is "loop", one product after the other; "outputs", where the terms are followed in the space of the
    model's outputs alone, by one product with J J' for each; or "dual": the inner products of the gradients of all
    examples are found once, and the series is summed in their span. ``reason`` says why. ``rows`` counts those
    gradients; it is None where examples cannot be told apart. ``loop_time``, ``dual_time`` and ``outputs_time`` are
    seconds on an imagined device of the kind at hand, of use only beside each other; they leave out what the operator
    has made already. ``loop_memory``, ``dual_memory`` and ``outputs_memory`` are bytes beside the recorded model, v and
    the result. All are None for a way that cannot be gone. ``break_even`` is the smallest number of products for which
    the loop is not the fastest way, None if it always is.

    >>> plan = Plan("dual", "estimated to be faster", 20, 256, 0.16, 0.012, 8_000_000, 2_400_000, 2)
    >>> print(plan)
    dual for 20 terms: estimated to be faster
      loop: time 0.16, memory 7.6 MiB
      dual: time 0.012, memory 2.3 MiB, 256 rows
      break-even at 2 terms
    """

    route: Way
    reason: str
    num_terms: int
    rows: int | None = None
    loop_time: float | None = None
    dual_time: float | None = None
    loop_memory: int | None = None
    dual_memory: int | None = None
    break_even: int | None = None
    outputs_time: float | None = None
    outputs_memory: int | None = None

    def __str__(self) -> str:
        lines = [f"{self.route} for {self.num_terms} terms: {self.reason}"]
        estimates = (
            ("loop", self.loop_time, self.loop_memory),
            ("outputs", self.outputs_time, self.outputs_memory),
            ("dual", self.dual_time, self.dual_memory),
        )
        for route, time, memory in estimates:
            if time is not None and memory is not None:
                rows = f", {self.rows} rows" if route == "dual" else ""
                lines.append(f"  {route}: time {time:.2g}, memory {memory / 2**20:.1f} MiB{rows}")
        if self.break_even is not None:
            lines.append(f"  break-even at {self.break_even} terms")
        return "\n".join(lines)


@dataclass(frozen=True)
class Costs:
    """Those of each way that can be gone; ``no_dual`` says why that is none of them."""

    loop: Loop
    outputs: InOutputs | None
    dual: Dual | None
    no_dual: str | None

    def times(self, num_terms: int, built: bool) -> dict[Way, float]:
        """Seconds of each way."""
        found: dict[Way, float] = {"loop": self.loop.time(num_terms)}
        if self.outputs is not None:
            found["outputs"] = self.outputs.time(num_terms)
        if self.dual is not None:
            found["dual"] = self.dual.time(num_terms, built)
        return found

    def free(self, built: bool) -> Costs:
        """Those of the ways that may be chosen freely."""
        dual = self.dual
        if dual is None or dual.memory <= _MOST_BYTES or built:
            return self
        return replace(self, dual=None, no_dual=f"{dual.rows} rows would take more than {_MOST_BYTES // 2**20} MiB")

    def fastest(self, num_terms: int, built: bool) -> Way:
        """The way that is estimated to be, the loop where several are."""
        times = self.times(num_terms, built)
        return min(times, key=times.__getitem__)

    def break_even(self, built: bool) -> int | None:
        """The smallest number of products for which the loop is not the fastest way."""
        # Once it is not it stays so: what a term costs elsewhere falls with their number.
        most = 1
        while self.fastest(most, built) == "loop":
            most *= 2
            if most > _MOST_TERMS:
                return None
        least = most // 2
        while most - least > 1:
            middle = (least + most) // 2
            least, most = (middle, most) if self.fastest(middle, built) == "loop" else (least, middle)
        return most


def chosen(num_terms: int, route: Route, costs: Costs, built: bool) -> Way:
    """The way that is gone in a recorded model; ``built`` says whether the span of the rows is there already."""
    return costs.free(built).fastest(num_terms, built) if route == "auto" else route


def planned(num_terms: int, route: Route, costs: Costs, built: bool) -> Plan:
    """The same with all estimates."""
    free, reason = costs.free(built), "as route says"
    if route == "auto":
        reason = "estimated to be faster" + ("" if free.no_dual is None else f"; no dual route: {free.no_dual}")
    times, dual = costs.times(num_terms, built), costs.dual
    return Plan(
        chosen(num_terms, route, costs, built),
        reason,
        num_terms,
        None if dual is None else dual.rows,
        times["loop"],
        times.get("dual"),
        costs.loop.memory,
        None if dual is None else dual.memory,
        free.break_even(built),
        times.get("outputs"),
        None if costs.outputs is None else costs.outputs.memory,
    )
