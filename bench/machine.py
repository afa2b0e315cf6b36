"""Facts about the machine, the build and the checkout that a figure belongs to."""

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import nestopt_ext

ROOT = Path(__file__).resolve().parent.parent


def facts(device: torch.device) -> dict[str, Any]:
    """Everything needed to read a results file later."""
    build = nestopt_ext.build_info()
    found: dict[str, Any] = {
        "date": now(),
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "modified": [line[3:] for line in _git("status", "--porcelain", "--", "csrc", "nestopt_ext").splitlines()],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "native": build["native"],
        "compiler": build.get("compiler"),
        "simd": build.get("simd"),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "device": device.type,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "cuda_archs": build.get("cuda_archs"),
        }
    return found


def now() -> str:
    """Date and time in UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def load() -> float | None:
    """Load average of the last minute; above the number of threads in use somebody else was running."""
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.rstrip() if done.returncode == 0 else ""


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
