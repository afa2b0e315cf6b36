"""The ways to take a step on data of one kind: as :func:`hypergradient` does, or as a graph that was captured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import _lists
from .._types import MatVec, TensorList
from ..solvers import Solver, Status
from ..solvers._outcome import Testimony, Verdict, warn
from ._batch import Batch
from ._graph import Graph, Mailbox, generators_of
from ._inspection import Inspection
from ._problem import Variables
from .hypergradient import ImplicitGradient, implicit_gradient

#: Makes the graph that a step is captured in, whose random numbers come from the generators given.
MakeGraph = Callable[[torch.device, Sequence[torch.Generator]], Graph]

#: The parts of a hypergradient that run code of the caller, each of which may draw random numbers.
OUTER, CURVATURE, INNER = range(3)
NUM_PARTS = 3


class Unfit(Exception):
    """A way is not open; the text is the reason."""


@dataclass(frozen=True)
class Task:
    """A hypergradient with losses that are functions of data."""

    variables: Variables
    outer_loss: Callable[..., Tensor]
    inner_loss: Callable[..., Tensor]
    solver: Solver
    curvature: Callable[..., MatVec] | None

    def gradient(
        self,
        data: tuple[Sequence[Any], Sequence[Any]],
        part: Callable[[int], AbstractContextManager[None]] = lambda number: nullcontext(),
    ) -> ImplicitGradient:
        """The hypergradient on ``data``, the arguments of the inner and of the outer loss; ``part`` surrounds each."""
        inner, outer = data

        def outer_loss() -> Tensor:
            with part(OUTER):
                return self.outer_loss(*outer)

        def inner_loss() -> Tensor:
            with part(INNER):
                return self.inner_loss(*inner)

        def curvature() -> MatVec | None:
            if self.curvature is None:
                return None
            with part(CURVATURE):
                return self.curvature(*inner)

        return implicit_gradient(self.variables, outer_loss, inner_loss, self.solver, curvature)


class Reports:
    """What became known of the solves: the status of the latest one, and a warning for each that is in trouble."""

    def __init__(self, caller: str) -> None:
        self.status: Status | None = None
        self._caller = caller
        self._latest = 0
        self._muted = False

    @contextmanager
    def muted(self) -> Iterator[None]:
        """While open, nothing is taken: what is run is a trial."""
        self._muted = True
        try:
            yield
        finally:
            self._muted = False

    def take(self, verdict: Verdict | None, number: int, *, late: bool = False) -> None:
        """That of step ``number``, None where there was nothing to solve; a late one is heard of after its step."""
        if self._muted:
            return
        if number >= self._latest:
            self._latest = number
            self.status = None if verdict is None else verdict.status
        if verdict is not None:
            warn(f"{self._caller} (step {number})" if late else self._caller, verdict)


class Route(Protocol):
    """A way to take a step."""

    def step(self, batch: Batch, number: int) -> tuple[Tensor, ...]:
        """The hypergradient in new memory; reports on the solve now or later."""
        ...

    def holds(self) -> bool:
        """Whether nothing has changed that was taken for a constant."""
        ...

    def settle(self) -> None:
        """Reports on all solves that are not yet reported."""
        ...


class Eager:
    """What :func:`hypergradient` does."""

    def __init__(self, task: Task, reports: Reports) -> None:
        self._task = task
        self._reports = reports

    def step(self, batch: Batch, number: int) -> tuple[Tensor, ...]:
        found = self._task.gradient(batch.arguments())
        self._reports.take(None if found.solve is None else found.solve.verdict, number)
        return found.grads

    def holds(self) -> bool:
        """Nothing was taken for a constant."""
        return True

    def settle(self) -> None:
        """Nothing is late."""


class Captured:
    """One graph for the whole step, launched on memory into which the data are copied.

    The host's look at the evidence of a solve is outside: the evidence is sent to the host behind each replay, and read
    once it is there.
    """

    def __init__(self, task: Task, reports: Reports, batch: Batch, device: torch.device, make_graph: MakeGraph) -> None:
        with Inspection(device) as seen:
            task.gradient(batch.arguments())
        if seen.reason is not None:
            raise Unfit(seen.reason)
        handed = {t.data_ptr() for t in batch.tensors}
        # The graph knows their addresses only.
        self._alive = [t for t in seen.read.values() if t.data_ptr() not in handed]
        self._on_host = [(t, t._version) for t in self._alive if t.device != device]
        self._inputs, data = batch.staying()
        graph = self._graph = make_graph(device, generators_of(device, seen.generators) if seen.draws else [])

        def compute() -> tuple[TensorList, _Evidence | None]:
            found = task.gradient(data, graph.part)
            return list(found.grads), None if found.solve is None else _Evidence(found.solve.testimony, device)

        graph.warm_up(compute)
        self._grads, self._evidence = graph.capture(compute)
        self._reports = reports
        self._caller = task.variables.caller
        self._mailbox = None if self._evidence is None else Mailbox(device, len(self._evidence.packed))
        self._unread: list[tuple[int, list[float]]] = []

    def step(self, batch: Batch, number: int) -> tuple[Tensor, ...]:
        late = [] if self._mailbox is None else self._mailbox.arrived()
        with self._graph.turn():
            _copy(self._inputs, batch.tensors)
            self._graph.replay()
            grads = [torch.empty_like(g) for g in self._grads]
            _copy(grads, self._grads)
            if self._mailbox is not None and self._evidence is not None:
                late += self._mailbox.post(number, self._evidence.packed)
            else:
                self._reports.take(None, number)
        self._read(late)
        return tuple(grads)

    def holds(self) -> bool:
        """Whether tensors on the host, which a replay does not look at, still say what they said."""
        return all(t._version == version for t, version in self._on_host)

    def settle(self) -> None:
        self._read([] if self._mailbox is None else self._mailbox.all())

    def _read(self, rows: list[tuple[int, list[float]]]) -> None:
        self._unread += rows
        while self._unread and self._evidence is not None:
            number, row = self._unread.pop(0)  # first, since a warning may be turned into an exception
            self._reports.take(self._evidence.verdict(self._caller, row), number, late=True)


class _Evidence:
    """The evidence of a solve in one tensor on the device, and that part of it which is on the host and never changes.

    The step length of a series is there, where it is a number.
    """

    def __init__(self, testimony: Testimony, device: torch.device) -> None:
        self._testimony = testimony
        tensors = testimony.tensors()
        self._sizes = [t.numel() if t.device == device else None for t in tensors]
        self._on_host = _lists.to_host([t for t in tensors if t.device != device])
        self.packed = torch.cat([t.detach().reshape(-1).double() for t in tensors if t.device == device])

    def verdict(self, caller: str, row: list[float]) -> Verdict:
        """What the numbers of ``packed`` say."""
        on_host, numbers, start = iter(self._on_host), [], 0
        for size in self._sizes:
            if size is None:
                numbers.append(next(on_host))
            else:
                numbers.append(row[start : start + size])
                start += size
        return self._testimony.verdict(caller, numbers)


def _copy(into: TensorList, tensors: Sequence[Tensor]) -> None:
    if into:
        torch._foreach_copy_(into, list(tensors))
