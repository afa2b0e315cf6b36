"""What a step allocates beyond its state, and how many kernels it launches."""

from collections.abc import Mapping

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from .timing import Step

_RSS_NOISE = 1 << 20  # pages that the process touches anyway


def extra_bytes(steps: Mapping[str, Step], device: torch.device) -> dict[str, int]:
    """The most memory that one step of each holds beyond what was there before it."""
    if device.type == "cuda":
        return {name: _cuda_bytes(step, device) for name, step in steps.items()}
    allocated = _allocator_bytes(steps)
    resident = {name: _resident_bytes(step) for name, step in steps.items()}
    return {name: max(allocated[name], resident[name] if resident[name] > _RSS_NOISE else 0) for name in steps}


def launches(step: Step) -> int | None:
    """Kernel launches of one step on CUDA; None where the profiler sees none."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        step()
        torch.cuda.synchronize()
    launched = ("cudaLaunchKernel", "cuLaunchKernel")
    return sum(e.count for e in prof.key_averages() if e.key.startswith(launched)) or None


def _cuda_bytes(step: Step, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _allocator_bytes(steps: Mapping[str, Step]) -> dict[str, int]:
    """Peak of torch's CPU allocator during each step."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        for name, step in steps.items():
            with record_function(name):
                step()
    results = prof.profiler.kineto_results if prof.profiler is not None else None
    events = sorted(results.events(), key=lambda e: e.start_ns()) if results is not None else []
    memory = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    peaks = {}
    for event in events:
        if event.name() in steps:
            level = peak = 0
            for when, change in memory:
                if event.start_ns() <= when <= event.end_ns():
                    level += change
                    peak = max(peak, level)
            peaks[event.name()] = peak
    return peaks


def _resident_bytes(step: Step) -> int:
    """Peak of the process's resident memory during the step, which also sees memory that torch did not allocate."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the high-water mark
        before = _status("VmRSS")
        step()
        return _status("VmHWM") - before
    except OSError:  # not Linux, or not allowed
        return 0


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(key))
