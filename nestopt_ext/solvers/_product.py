"""The one door between a solver and a caller's matvec."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import _lists
from .._low_rank import LowRank
from .._operator import LinearOperator
from .._types import MatVec, TensorList

_T = TypeVar("_T")


class Product:
    """A caller's matvec as a map on flat lists: counted, checked, and kept from touching the solver's memory.

    The matvec gets the structure and dtypes of the right-hand side. It may return its own argument or a view of it
    (such results are cloned), but may not write to it; a write that bypasses PyTorch's version counters cannot be seen.
    An instance of :class:`~nestopt_ext._operator.LinearOperator` is matched with the right-hand side once and trusted
    from then on, and what else it offers is asked for here; of any other matvec these routes are None.
    """

    def __init__(
        self,
        caller: str,
        matvec: MatVec | LinearOperator,
        structure: _lists.Structure,
        like: TensorList,
        *,
        name: str = "matvec",
    ) -> None:
        if not callable(matvec) and not isinstance(matvec, LinearOperator):
            remedy = " Pass lambda v: A @ v." if isinstance(matvec, torch.Tensor) else ""
            raise TypeError(f"{caller}: {name} must be callable; got {_lists.value_name(matvec)}.{remedy}")
        self.count = 0
        self.caller = caller
        self.like = like
        self._name = name
        self._matvec: Any = matvec
        self._structure = structure
        self._dtypes = [t.dtype for t in like]
        self._narrow = any(t.dtype.itemsize == 2 for t in like)
        self._operator = matvec if isinstance(matvec, LinearOperator) else None
        self._inwards: list[int] | None = None
        if self._operator is not None:
            self._meet(self._operator)

    def beside(self, matvec: MatVec, name: str) -> Product:
        """Another map on the same lists, with a count of its own."""
        return Product(self.caller, matvec, self._structure, self.like, name=name)

    def __call__(self, vector: TensorList) -> TensorList:
        """The product with ``vector``, whose dtype may be wider than that of the right-hand side."""
        handed = self.narrowed(vector)
        if self._operator is None:
            return self._checked(handed, vector)
        product = self._out(self._operator.flat_product(self._in(handed)))
        self.count += 1
        return product

    def many(self, vectors: TensorList) -> TensorList:
        """The products with k lists, [k, *shape] for each tensor; one at a time unless the matvec is an operator."""
        count = len(vectors[0]) if vectors else 0
        if count == 0:
            return [torch.empty_like(t) for t in vectors]
        if self._operator is None:
            found = [
                torch.empty(t.shape, dtype=o.dtype, device=o.device) for t, o in zip(vectors, self.like, strict=True)
            ]
            for i in range(count):  # one by one into their place: a matvec may use its buffers again
                for rows, product in zip(found, self([t[i] for t in vectors]), strict=True):
                    rows[i] = product
            return found
        products = self._out(self._operator.flat_products(self._in(self.narrowed(vectors))))
        self.count += count
        return products

    def inverse(self, vectors: TensorList, damping: float) -> TensorList | None:
        """(A + damping I)^-1 times k lists, [k, *shape] for each tensor, where the operator has it in closed form."""
        if self._operator is None:
            return None
        found = self._operator.flat_inverse(self._in(self.narrowed(vectors)), damping)
        return None if found is None else self._out(found)

    def low_rank(self) -> LowRank | None:
        found = None if self._operator is None else self._operator.flat_low_rank()
        if found is None:
            return None
        return LowRank(
            self._arranged(found.blocks), found.weights, None if found.diagonal is None else self._out(found.diagonal)
        )

    def series(
        self, vector: TensorList, num_terms: int, alpha: Tensor, damping: float
    ) -> tuple[TensorList, Tensor] | None:
        """The Neumann sum and the squared norms of its terms, where the operator has them in closed form."""
        if self._operator is None:
            return None
        found = self._operator.flat_series(self._in(self.narrowed(vector)), num_terms, alpha, damping)
        return None if found is None else (self._out(found[0]), found[1])

    def loop(
        self, vector: TensorList, num_terms: int, alpha: Tensor, damping: float
    ) -> tuple[TensorList, Tensor] | None:
        """The same by ``num_terms`` products, where the operator steps a vector inside its products."""
        if self._operator is None or self._narrow:
            return None
        found = self._operator.flat_loop(self._in(vector), num_terms, alpha, damping)
        if found is None:
            return None
        self.count += num_terms
        return self._out(found[0]), found[1]

    def narrowed(self, vector: TensorList) -> TensorList:
        """A list in the dtypes of the right-hand side; a solver works in float32 where those have 16 bits."""
        if not self._narrow:
            return vector
        return [t.to(dtype) for t, dtype in zip(vector, self._dtypes, strict=True)]

    @property
    def sums_terms(self) -> bool:
        """Whether the norms that :meth:`loop` gives bound its sum."""
        return self._operator is not None and self._operator.sums_terms

    def largest_eigenvalue(self) -> Tensor | None:
        return None if self._operator is None else self._operator.largest_eigenvalue()

    def _meet(self, operator: LinearOperator) -> None:
        """Matches the right-hand side with what the operator acts on; a dict may come in another order."""
        theirs = operator.structure
        if theirs is self._structure and _lists.all_like(self.like, operator.flat_params):
            return
        name = type(operator).__name__
        ordered = theirs.match(name, "v", self._structure.pack(self.like))
        _lists.check_like(name, theirs.labels("v"), ordered, operator.flat_params)
        if theirs.keys is not None and self._structure.keys is not None and theirs.keys != self._structure.keys:
            self._inwards = [self._structure.keys.index(key) for key in theirs.keys]

    def _in(self, vector: TensorList) -> TensorList:
        return vector if self._inwards is None else [vector[i] for i in self._inwards]

    def _out(self, vector: TensorList) -> TensorList:
        return self._arranged(vector)

    def _arranged(self, vector: list[_T]) -> list[_T]:
        if self._inwards is None:
            return vector
        place = {i: position for position, i in enumerate(self._inwards)}
        return [vector[place[i]] for i in range(len(vector))]

    def _checked(self, vector: TensorList, source: TensorList) -> TensorList:
        """The product of a foreign matvec, of which nothing is taken on trust."""
        handed = [t.detach() for t in vector]
        versions = _versions(handed)
        returned: Any = self._matvec(self._structure.pack(handed))
        self.count += 1
        name = f"{self._name}(v)"
        flat = self._structure.match(self.caller, name, returned, returned=True)
        if not _lists.all_like(flat, self.like):
            _lists.check_like(self.caller, self._structure.labels(name), flat, self.like)
        if versions != (now := _versions(handed)):
            written = [i for i, (before, after) in enumerate(zip(versions, now, strict=True)) if before != after]
            label = self._structure.labels("v")[written[0]] if len(written) == 1 else "v"
            raise ValueError(
                f"{self.caller}: {self._name} must not modify its argument; got {label} written in place."
                " Return new tensors."
            )
        return _lists.unshare(flat, source)


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [0 if t.is_inference() else t._version for t in tensors]
