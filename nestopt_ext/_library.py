"""Finds and loads the native library, and says in one sentence why it is absent."""

import hashlib
import importlib
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

_native: ModuleType | None = None
_status = "native library: not looked for yet."


def _build_report() -> dict[str, Any]:
    """What the build wrote beside the package about a library it could not make."""
    path = Path(__file__).with_name("_build_report.json")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def _is_of_other_ops(report: dict[str, Any]) -> bool:
    """Whether the library was built beside other schemas, under which its kernels would misread their arguments."""
    try:
        ops = Path(__file__).with_name("_ops.py").read_bytes()
    except OSError:  # installed without sources
        return False
    return report.get("ops", "") not in ("", hashlib.sha256(ops).hexdigest())


def load() -> None:
    """Imports ``nestopt_ext._C``; the import registers the native kernels with the dispatcher. Never raises."""
    global _native, _status
    if os.environ.get("NESTOPT_DISABLE_NATIVE", "0") not in ("", "0"):
        _status = "native library not loaded: NESTOPT_DISABLE_NATIVE is set; the PyTorch reference path is used."
        return
    report = _build_report()
    if "reason" not in report and _is_of_other_ops(report):
        _status = (
            "native library not loaded: it was built for other ops than these; build it again: python setup.py"
            " build_ext --inplace; the PyTorch reference path is used."
        )
        return
    try:
        _native = importlib.import_module("nestopt_ext._C")
    except ModuleNotFoundError as error:
        if error.name != "nestopt_ext._C":
            raise
        reason = report.get(
            "reason", "it was not built; build it with a C++ compiler: python setup.py build_ext --inplace"
        )
        _status = f"native library not loaded: {reason}; the PyTorch reference path is used."
    except ImportError as error:
        import torch

        built_for = report.get("torch")
        cause = " ".join(str(error).split())
        if built_for is not None and built_for != torch.__version__:
            cause = f"it was built for torch {built_for}, and this is torch {torch.__version__}; build it again"
        _status = f"native library not loaded: {cause}; the PyTorch reference path is used."
    else:
        facts = _native.build_info()
        cuda = f"CUDA for {facts['cuda_archs']}" if facts["cuda"] else "CPU only"
        _status = f"native library loaded: {cuda}, SIMD level {facts['simd']}, built for torch {facts['torch']}."


def native() -> ModuleType | None:
    """The loaded module ``_C``, or None on the reference path."""
    return _native


def native_status() -> str:
    """Says in one sentence whether the native library is loaded, and if not, why.

    >>> import nestopt_ext as nx
    >>> nx.native_status().startswith("native library")
    True
    """
    return _status


def build_info() -> dict[str, Any]:
    """Facts about the native build: versions, compiler, CUDA architectures, SIMD level.

    Returns a new dict. ``native`` is False on the reference path, and then only the versions are there.

    >>> import nestopt_ext as nx
    >>> nx.build_info()["version"] == nx.__version__
    True
    """
    import torch

    from ._version import __version__

    facts: dict[str, Any] = {"version": __version__, "torch_runtime": torch.__version__, "native": _native is not None}
    if _native is not None:
        facts.update(_native.build_info())
    return facts
