"""Times contestants in turns, so that whatever slows the machine down slows all of them."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

Step = Callable[[], object]


@dataclass
class Samples:
    """Seconds of one step, one entry per round."""

    wall: list[float] = field(default_factory=list)  # on CUDA the slower of host and device, the pace of a loop
    cpu: list[float] = field(default_factory=list)  # of all threads; CPU only
    host: list[float] = field(default_factory=list)  # until the call returns; CUDA only
    device: list[float] = field(default_factory=list)  # between events around the step; CUDA only


@dataclass(frozen=True)
class Spread:
    """The middle of a sample and the range of its inner 80 %."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        tenths = statistics.quantiles(values, n=10, method="inclusive")
        return cls(statistics.median(values), tenths[0], tenths[-1])


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Ours over theirs: the ratio of the medians, with the spread of the ratios within each round."""
    each = Spread.of([a / b for a, b in zip(ours, theirs, strict=True)])
    return Spread(statistics.median(ours) / statistics.median(theirs), each.p10, each.p90)


def measure(
    steps: Mapping[str, Step],
    device: torch.device,
    *,
    budget: float,
    min_block: float,
    min_rounds: int,
    patience: float = math.inf,
    slow: float = 0.2,
) -> dict[str, Samples]:
    """Times each step in each round, A B C A B C ..., for about ``budget`` seconds and at least ``min_rounds``.

    Where so many rounds would take more than ``patience`` seconds, there are as many as fit, at least three. A turn
    repeats a step that is shorter than ``min_block`` seconds (on the CPU) until the turn is that long. One step warms
    up what takes ``slow`` seconds or more, three what is shorter.
    """
    turn = _cuda_turn(device) if device.type == "cuda" else _cpu_turn
    samples = {name: Samples() for name in steps}
    repeats = {}
    per_round = 0.0
    for name, step in steps.items():
        seconds = _seconds(step, device)
        if seconds < slow:
            step()
            seconds = _seconds(step, device)
        repeats[name] = max(1, math.ceil(min_block / seconds)) if device.type == "cpu" else 1
        per_round += seconds * repeats[name]
    fitting = min(min_rounds, max(3, int(min(patience / per_round, min_rounds))))
    num_rounds = min(max(math.ceil(budget / per_round), fitting), 201)
    names = list(steps)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for i in range(num_rounds):
            first = i % len(names)  # nobody always runs after the same neighbour's leftovers in the cache
            for name in names[first:] + names[:first]:
                turn(steps[name], repeats[name], samples[name])
    finally:
        if collecting:
            gc.enable()
    return samples


def _seconds(step: Step, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return max(time.perf_counter() - start, 1e-7)


def _cpu_turn(step: Step, repeats: int, samples: Samples) -> None:
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(repeats):
        step()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    samples.wall.append(wall / repeats)
    samples.cpu.append(cpu / repeats)


def _cuda_turn(device: torch.device) -> Callable[[Step, int, Samples], None]:
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)  # several times the L2 cache of any GPU
    ready, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    clock = 2e9  # Hz, about

    def turn(step: Step, repeats: int, samples: Samples) -> None:
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        step()
        host = time.perf_counter() - start
        # The device sleeps while the host queues the step, so that the events see no gap that the host makes.
        flush.zero_()
        torch.cuda._sleep(int(clock * (2 * host + 2e-4)))  # type: ignore[no-untyped-call]
        ready.record()
        step()
        done.record()
        done.synchronize()
        device_seconds = ready.elapsed_time(done) / 1e3
        samples.host.append(host)
        samples.device.append(device_seconds)
        samples.wall.append(max(host, device_seconds))

    return turn
