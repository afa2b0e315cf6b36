"""Nested (bilevel) optimization for PyTorch."""

from . import _ops as _ops
from ._library import build_info, native_status
from ._version import __version__
from .optim import ComplexSGD

__all__ = ["ComplexSGD", "__version__", "build_info", "native_status"]
