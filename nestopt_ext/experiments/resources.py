"""What a run takes of the machine: its device, CPU threads, and memory."""

import contextlib
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from .config import ConfigError

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def usable_device(name: str) -> torch.device:
    """The device called ``name``. Raises ConfigError when there is none such or it cannot hold a tensor."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # the device meta makes tensors, but holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise ConfigError(f"--device must be a device of this machine; got {name!r}: {_first_line(error)}.") from error
    return device


@contextlib.contextmanager
def fitting(device: torch.device, width: int | None) -> Iterator[None]:
    """While open, what torch says of data and network that ``device`` cannot hold is a ConfigError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        cause = _first_line(error)[:120].rstrip(".")
        raise ConfigError(f"--width {width} or the data set is too large for --device {device}: {cause}.") from error


@contextlib.contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """While open, torch computes on ``count`` CPU threads; None leaves the setting of the process, which comes back.

    Steps of small networks are too short to share out: threads would only wait for each other.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def reset_peak(device: torch.device) -> None:
    """Starts a new stretch. Where the system cannot forget an earlier peak, later figures include it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")  # Linux: the peak becomes the present resident size


def peak_mib(device: torch.device) -> float:
    """Peak since `reset_peak` in MiB: tensors on a CUDA device, resident memory of the whole process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0].rstrip(".")
