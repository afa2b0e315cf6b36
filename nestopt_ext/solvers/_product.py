"""The one door between a solver and a caller's matvec."""

from typing import Any

import torch

from .. import _lists
from .._types import MatVec, TensorList


class Product:
    """A caller's matvec as a map on flat lists: counted, checked, and kept from touching the solver's memory.

    The matvec gets the structure and dtypes of the right-hand side. It may return its own argument or a view of it
    (such results are cloned), but may not write to it; a write that bypasses PyTorch's version counters cannot be seen.
    """

    def __init__(
        self, caller: str, matvec: MatVec, structure: _lists.Structure, like: TensorList, *, name: str = "matvec"
    ) -> None:
        if not callable(matvec):
            remedy = " Pass lambda v: A @ v." if isinstance(matvec, torch.Tensor) else ""
            raise TypeError(f"{caller}: {name} must be callable; got {_lists.value_name(matvec)}.{remedy}")
        self.count = 0
        self._caller = caller
        self._name = name
        self._matvec = matvec
        self._structure = structure
        self._like = like

    def __call__(self, vector: TensorList) -> TensorList:
        """The product with ``vector``, whose dtype may be wider than that of the right-hand side."""
        pairs = zip(vector, self._like, strict=True)
        handed = [t.detach() if t.dtype == like.dtype else t.detach().to(like.dtype) for t, like in pairs]
        versions = [t._version for t in handed]
        returned: Any = self._matvec(self._structure.pack(handed))
        self.count += 1
        name = f"{self._name}(v)"
        flat = self._structure.match(self._caller, name, returned, returned=True)
        _lists.check_like(self._caller, self._structure.labels(name), flat, self._like)
        for label, tensor, version in zip(self._structure.labels("v"), handed, versions, strict=True):
            if tensor._version != version:
                raise ValueError(
                    f"{self._caller}: {self._name} must not modify its argument; got {label} written in place."
                    " Return new tensors."
                )
        return _lists.unshare(flat, vector)
