"""What a solver is given: the equation, for one right-hand side or for several at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _lists, _reference
from .._types import TensorList
from ._product import Product


@dataclass(frozen=True)
class System:
    """A x = v, where ``product`` is A and ``v`` a flat list.

    With ``columns`` = k every tensor of ``v`` is [k, *shape] and the k equations are solved at once; what is one number
    for a single right-hand side is then a vector [k]. ``v`` may be wider than the 16-bit dtypes that the product takes
    and the solution has. ``norm`` is what tolerances are relative to, None for the norm of ``v``.
    """

    product: Product
    v: TensorList
    columns: int | None = None
    norm: Tensor | None = None

    def apply(self, vector: TensorList) -> TensorList:
        """A times a list like ``v``."""
        return self.product(vector) if self.columns is None else self.product.many(vector)

    def lengths(self, vector: TensorList) -> Tensor:
        """The norm of a list like ``v``, [] or [k]."""
        return _lists.norm(vector) if self.columns is None else _lists.norms(vector)

    def length(self) -> Tensor:
        """What tolerances are relative to."""
        return self.lengths(self.v) if self.norm is None else self.norm

    def beside(self, preconditioner: Product) -> System:
        """The system of another map on the same lists."""
        return System(preconditioner, self.v, self.columns)

    def working_copy(self) -> TensorList:
        """``v`` in new memory, in the dtype that sums are kept in."""
        return [t.detach().to(_reference.opmath(t.dtype), copy=True) for t in self.v]

    def rows(self) -> TensorList:
        """``v`` as k right-hand sides, [k, *shape] for each tensor, where a single one is k = 1."""
        return [t.detach() if self.columns is not None else t.detach().unsqueeze(0) for t in self.v]

    def returned(self, rows: TensorList) -> TensorList:
        """Solutions, [k, *shape] for each tensor, in the shapes of ``v`` and the dtypes of the product."""
        like = self.product.like
        found = [t.to(o.dtype) for t, o in zip(rows, like, strict=True)]
        return found if self.columns is not None else [t.squeeze(0) for t in found]

    def scalars(self, value: float = 0.0) -> Tensor:
        """One number for each right-hand side."""
        device = self.v[0].device if self.v else torch.device("cpu")
        shape = () if self.columns is None else (self.columns,)
        return torch.full(shape, value, dtype=_lists.scalar_dtype(device), device=device)
