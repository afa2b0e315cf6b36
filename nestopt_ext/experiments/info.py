"""What `python -m nestopt_ext info` says: versions, the native library, devices, optional packages."""

import importlib.metadata
import platform
import sys
from typing import Any

import torch

from .._library import build_info, native_status

#: Distribution names of what the experiments can use.
_OPTIONAL = ("numpy", "scikit-learn", "optuna", "tqdm", "rich", "matplotlib", "pillow")


def collect() -> dict[str, Any]:
    """The facts as a dict that JSON can hold; optional packages that are absent have the version None.

    >>> collect()["torch"] == torch.__version__
    True
    """
    build = build_info()
    native = bool(build["native"])
    return {
        "nestopt_ext": build["version"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{sys.platform} {platform.machine()}",
        "native": native,
        "native_status": native_status(),
        "simd": build.get("simd") if native else None,
        "cuda_archs": build.get("cuda_archs") or None if native else None,
        "compiler": build.get("compiler") if native else None,
        "torch_cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "devices": _devices(),
        "optional": {name: _version(name) for name in _OPTIONAL},
    }


def lines(facts: dict[str, Any]) -> list[str]:
    """The facts as lines for people."""
    cuda = f"CUDA {facts['torch_cuda']}" if facts["torch_cuda"] else "no CUDA"
    named = {
        "nestopt_ext": facts["nestopt_ext"],
        "python": f"{facts['python']} on {facts['platform']}",
        "torch": f"{facts['torch']}, {facts['threads']} threads, {cuda}",
        "native": facts["native_status"],
        "SIMD level": facts["simd"] or "none (reference path)",
        "CUDA archs": facts["cuda_archs"] or "none",
        "devices": ", ".join(f"{device['name']} ({device['kind']})" for device in facts["devices"]),
        "optional": ", ".join(f"{name} {version or 'absent'}" for name, version in facts["optional"].items()),
    }
    width = max(map(len, named))
    text = [f"{name.ljust(width)}  {value}" for name, value in named.items()]
    if None in facts["optional"].values():
        text.append(f"{''.ljust(width)}  Absent packages come with: pip install nestopt_ext[experiments]")
    return text


def _devices() -> list[dict[str, str]]:
    devices = [{"name": "cpu", "kind": platform.processor() or platform.machine()}]
    if torch.cuda.is_available():
        devices += [
            {"name": f"cuda:{i}", "kind": torch.cuda.get_device_name(i)} for i in range(torch.cuda.device_count())
        ]
    if torch.backends.mps.is_available():
        devices.append({"name": "mps", "kind": "Apple GPU"})
    return devices


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
