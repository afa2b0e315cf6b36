"""A computation on a CUDA device as one graph: warmed up, captured once, and launched again and again.

The part that knows ``torch.cuda`` stands behind two small classes, :class:`CudaGraph` and :class:`Draws`, so that what
is built on them does not depend on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

#: Runs before a capture, in which libraries choose their algorithms and take their workspaces.
_WARM_UPS = 2


class Graph(Protocol):
    """A computation without arguments whose results keep their memory."""

    def part(self, number: int) -> AbstractContextManager[None]:
        """Surrounds a part of the computation, which draws the random numbers that it would draw by itself."""
        ...

    def warm_up(self, function: Callable[[], Any]) -> None:
        """Runs it as it will be captured, for what happens the first time only."""
        ...

    def capture(self, function: Callable[[], Result]) -> Result:
        """Takes it down; what is returned is filled by every :meth:`replay`, and not before."""
        ...

    def turn(self) -> AbstractContextManager[None]:
        """While open, nobody else uses the memory of the computation, inputs and results: a replay goes inside."""
        ...

    def replay(self) -> None:
        """Computes again, from what the memory that it reads now holds."""
        ...


class Draws:
    """Where each part of a captured computation draws its random numbers.

    A hypergradient evaluates every loss from where the generators stand, and leaves them there. In a graph a generator
    can neither be read nor set, but the state that it draws from can be exchanged for another one that was registered
    with the graph. So each part has a copy of every generator's state, put where the generators stand before each
    replay. What draws outside of the parts, such as a power iteration, draws from the generators themselves, which are
    put back behind the replay.
    """

    def __init__(self, generators: Sequence[torch.Generator], num_parts: int) -> None:
        self.generators = list(generators)
        self._copies = [[g.clone_state() for g in self.generators] for _ in range(num_parts)]

    def states(self) -> list[torch.Generator]:
        """The generators and all copies, to be registered with a graph before it is captured."""
        return [*self.generators, *(copy for part in self._copies for copy in part)]

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Begins with the copies where the generators stand, and ends with the generators there."""
        states = [generator.get_state() for generator in self.generators]
        for part in self._copies:
            for copy, state in zip(part, states, strict=True):
                copy.set_state(state)
        try:
            yield
        finally:
            for generator, state in zip(self.generators, states, strict=True):
                generator.set_state(state)

    @contextmanager
    def part(self, number: int) -> Iterator[None]:
        """While open, the generators draw from the copies of that part."""
        own = [g.graphsafe_get_state() for g in self.generators]
        try:
            for generator, copy in zip(self.generators, self._copies[number], strict=True):
                generator.graphsafe_set_state(copy)
            yield
        finally:
            for generator, state in zip(self.generators, own, strict=True):
                generator.graphsafe_set_state(state)


def generators_of(device: torch.device, own: Sequence[torch.Generator] = ()) -> list[torch.Generator]:
    """The global generator of a device, and those of a caller that are not the same."""
    default = torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index]
    # Not by identity: an operator is handed another object for the same generator.
    return [default, *(generator for generator in own if _address(generator) != _address(default))]


def _address(generator: torch.Generator) -> int:
    return int(generator._cdata)  # type: ignore[attr-defined]


class CudaGraph:
    """A ``torch.cuda.CUDAGraph`` on one device, captured on a stream of its own."""

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator], num_parts: int) -> None:
        self._device = device
        self._draws = Draws(generators, num_parts)
        self._graph = torch.cuda.CUDAGraph()
        for state in self._draws.states():
            self._graph.register_generator_state(state)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def part(self, number: int) -> AbstractContextManager[None]:
        return self._draws.part(number)

    def warm_up(self, function: Callable[[], Any]) -> None:
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UPS):
                    with self._draws.replaying():
                        function()
            current.wait_stream(self._stream)

    def capture(self, function: Callable[[], Result]) -> Result:
        # Those that the graph knows of, the global one among them in any case.
        generators = generators_of(self._device, self._draws.generators)
        intact = [generator.clone_state() for generator in generators]
        try:
            # Other threads, such as one that pins the memory of a data loader, may go on meanwhile.
            with (
                torch.cuda.device(self._device),
                torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"),
            ):
                return function()
        except BaseException:
            # A capture that failed leaves the states of the generators as if the capture went on.
            for generator, state in zip(generators, intact, strict=True):
                generator.graphsafe_set_state(state)
            raise

    @contextmanager
    def turn(self) -> Iterator[None]:
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            current.wait_event(self._done)  # the turn before may have been on another stream
            try:
                yield
            finally:
                self._done.record(current)

    def replay(self) -> None:
        with self._draws.replaying():
            self._graph.replay()


class Mailbox:
    """Rows of numbers on their way from the device to the host, which reads a row without waiting once it is there.

    Rows come out in the order in which they were posted, each with its label. With ``room`` rows on the way, the next
    one waits for the oldest.
    """

    def __init__(self, device: torch.device, width: int, *, room: int = 64) -> None:
        cuda = device.type == "cuda"
        self._rows = torch.empty((room, width), dtype=torch.float64, pin_memory=cuda)
        self._events = [torch.cuda.Event() for _ in range(room)] if cuda else []  # type: ignore[no-untyped-call]
        self._labels: list[int] = []
        self._next = 0

    def post(self, label: int, numbers: Tensor) -> list[tuple[int, list[float]]]:
        """Sends a row off, and returns the one that had to make room, if any."""
        pushed = [self._wait()] if len(self._labels) == len(self._rows) else []
        self._rows[self._next].copy_(numbers, non_blocking=True)
        if self._events:
            self._events[self._next].record(torch.cuda.current_stream(numbers.device))
        self._next = (self._next + 1) % len(self._rows)
        self._labels.append(label)
        return pushed

    def arrived(self) -> list[tuple[int, list[float]]]:
        """The rows that are there; nothing is waited for."""
        found = []
        while self._labels and self._is_there(self._oldest()):
            found.append(self._take())
        return found

    def all(self) -> list[tuple[int, list[float]]]:
        """The rows that are on the way, waited for."""
        return [self._wait() for _ in range(len(self._labels))]

    def _oldest(self) -> int:
        return (self._next - len(self._labels)) % len(self._rows)

    def _is_there(self, row: int) -> bool:
        return not self._events or bool(self._events[row].query())  # type: ignore[no-untyped-call]

    def _wait(self) -> tuple[int, list[float]]:
        if self._events:
            self._events[self._oldest()].synchronize()
        return self._take()

    def _take(self) -> tuple[int, list[float]]:
        numbers: list[float] = self._rows[self._oldest()].tolist()
        return self._labels.pop(0), numbers
