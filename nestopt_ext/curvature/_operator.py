"""What every curvature operator can do: be called on tensors, be added, be scaled, be damped, be written out."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Iterator
from numbers import Real

import torch
from torch import Tensor

from .. import _lists
from .._low_rank import LowRank, RowBlock, ZeroRows, stacked_low_rank
from .._operator import LinearOperator
from .._types import SameTensors, TensorList, Tensors
from ._plan import Plan

#: Elements of the unit vectors that are multiplied at once when a matrix is written out.
_DENSE_ELEMENTS = 2**24


class CurvatureOperator(LinearOperator, ABC):
    """A symmetric linear map on tensors like ``params``.

    An implementation says how to multiply a flat list, in :meth:`flat_product`, and may offer solvers the other routes
    of :class:`~nestopt_ext._operator.LinearOperator`.
    """

    @property
    def is_mean_over_examples(self) -> bool:
        """Whether the operator of several batches of equal size is the mean of theirs."""
        return True

    def flat_diagonal(self) -> TensorList | None:
        """The entries of a matrix that is diagonal by its making; None for any other."""
        return None

    def __call__(self, v: SameTensors) -> SameTensors:
        """The product with ``v``; new tensors, in the structure of the params, without graph."""
        name = type(self).__name__.lstrip("_")  # of a sum, Sum
        flat = self._structure.match(name, "v", v)
        _lists.check_like(name, self._structure.labels("v"), flat, self._params)
        result: SameTensors = self._structure.pack(self.flat_product([t.detach() for t in flat]))
        return result

    def __add__(self, other: CurvatureOperator) -> CurvatureOperator:
        if not isinstance(other, CurvatureOperator):
            return NotImplemented
        if {id(p) for p in other._params} != {id(p) for p in self._params}:
            raise ValueError("CurvatureOperator: both sides of + must act on the same params; got different tensors.")
        return _Sum(self, other.on(self._params, self._structure))

    def __mul__(self, scalar: float) -> CurvatureOperator:
        if isinstance(scalar, bool) or not isinstance(scalar, Real):
            return NotImplemented
        return _Scaled(self, float(scalar))

    __rmul__ = __mul__

    def damped(self, damping: float) -> CurvatureOperator:
        """The operator plus ``damping`` (units of curvature, finite, >= 0) times the identity.

        For a damping of its own for each weight add a :class:`Diagonal`.
        """
        if isinstance(damping, bool) or not isinstance(damping, Real):
            raise TypeError(f"{type(self).__name__}.damped: damping must be a number; got {damping!r}.")
        if not math.isfinite(damping) or damping < 0:
            raise ValueError(f"{type(self).__name__}.damped: damping must be finite and >= 0; got {damping}.")
        return _Damped(self, float(damping))

    def on(self, params: TensorList, structure: _lists.Structure) -> CurvatureOperator:
        """The same operator with these params, which must be its own in any order and structure."""
        if len(params) == len(self._params) and all(a is b for a, b in zip(params, self._params, strict=True)):
            return self if structure is self._structure else _Rearranged(self, params, structure)
        if {id(p) for p in params} != {id(p) for p in self._params} or len(params) != len(self._params):
            raise ValueError(
                f"{type(self).__name__}: params must be the {len(self._params)} tensors the operator was made for;"
                f" got {len(params)}, not all of them the same tensors."
            )
        return _Rearranged(self, params, structure)

    def plan(self, num_terms: int) -> Plan:
        """How a Neumann series of ``num_terms`` products would be summed; see :class:`Plan`."""
        return Plan("loop", "the operator has products alone", num_terms)

    def dense(self) -> Tensor:
        """The matrix, of shape [P, P] with P the number of elements of the params in order; costs P products."""
        device = self._params[0].device
        blocks = [
            torch.cat([t.reshape(t.shape[0], -1).to(device) for t in self.flat_products(units)], dim=1)
            for units in self._units()
        ]
        return torch.cat(blocks).T.contiguous() if blocks else self._params[0].new_zeros((0, 0))

    def diagonal(self) -> Tensors:
        """The diagonal of the matrix, in the structure and shapes of the params; exact, and costs P products."""
        entries: TensorList = []
        for units in self._units():
            products = self.flat_products(units)
            entries.append(sum((u * h).reshape(len(u), -1).sum(1) for u, h in zip(units, products, strict=True)))  # type: ignore[arg-type]
        flat = torch.cat(entries) if entries else self._params[0].new_zeros(0)
        sizes = [p.numel() for p in self._params]
        parts = [e.to(p).reshape(p.shape) for e, p in zip(torch.split(flat, sizes), self._params, strict=True)]
        result: Tensors = self._structure.pack(parts)
        return result

    def _units(self) -> Iterator[TensorList]:
        """The unit vectors of the space of the params in order, as many at a time as fit; [k, *shape] for each."""
        size = _lists.numel(self._params)
        at_once = max(1, min(size, _DENSE_ELEMENTS // max(size, 1)))
        for start in range(0, size, at_once):
            rows = min(at_once, size - start)
            unit = [p.new_zeros((rows, *p.shape)) for p in self._params]
            begin = 0
            for part in unit:
                width = part[0].numel()
                first, last = max(start, begin), min(start + rows, begin + width)
                if first < last:
                    index = torch.arange(first, last, device=part.device)
                    part.view(rows, width)[index - start, index - begin] = 1
                begin += width
            yield unit


class Diagonal(CurvatureOperator):
    r"""The diagonal matrix with entries ``values``, for example the Hessian of a decay of its own for each weight.

    ``params`` are the tensors it acts on, ``values`` the same structure with their shapes, dtypes and devices; a copy
    is kept. Added to an operator of low rank it makes one that :class:`~nestopt_ext.solvers.Woodbury` inverts exactly.

    >>> import torch
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> Diagonal(torch.tensor([3.0, 4.0]), w)(torch.ones(2))       # of 1.5 w0^2 + 2 w1^2
    tensor([3., 4.])
    """

    def __init__(self, values: Tensors, params: Tensors) -> None:
        flat, structure = _lists.flatten("Diagonal", "params", params)
        entries = structure.match("Diagonal", "values", values)
        _lists.check_like("Diagonal", structure.labels("values"), entries, flat)
        super().__init__(flat, structure)
        self._values = [t.detach().clone() for t in entries]

    def flat_product(self, v: TensorList) -> TensorList:
        return [d * t for d, t in zip(self._values, v, strict=True)]

    def flat_products(self, v: TensorList) -> TensorList:
        return self.flat_product(v)

    def flat_inverse(self, v: TensorList, damping: float) -> TensorList:
        return [t / (d + damping) for d, t in zip(self._values, v, strict=True)]

    def flat_diagonal(self) -> TensorList:
        """The entries."""
        return self._values

    def flat_low_rank(self) -> LowRank:
        blocks: list[RowBlock] = [ZeroRows(0, p.shape, p.device) for p in self._params]
        return LowRank(blocks, self._params[0].new_zeros(0, requires_grad=False), self._values)


class _Sum(CurvatureOperator):
    """The sum of two operators on the same params."""

    def __init__(self, left: CurvatureOperator, right: CurvatureOperator) -> None:
        super().__init__(left._params, left._structure)
        self._left = left
        self._right = right

    @property
    def is_mean_over_examples(self) -> bool:
        return self._left.is_mean_over_examples and self._right.is_mean_over_examples

    def flat_product(self, v: TensorList) -> TensorList:
        return _added(self._left.flat_product(v), self._right.flat_product(v))

    def flat_products(self, v: TensorList) -> TensorList:
        return _added(self._left.flat_products(v), self._right.flat_products(v))

    def flat_low_rank(self) -> LowRank | None:
        left = self._left.flat_low_rank()
        right = self._right.flat_low_rank() if left is not None else None
        if left is None or right is None:
            return None
        return stacked_low_rank([left, right], [1.0, 1.0])

    def flat_diagonal(self) -> TensorList | None:
        left, right = self._left.flat_diagonal(), self._right.flat_diagonal()
        return None if left is None or right is None else _added(left, right)

    def flat_loop(
        self, v: TensorList, num_terms: int, alpha: Tensor, damping: float, diagonal: TensorList | None = None
    ) -> tuple[TensorList, Tensor] | None:
        for one, other in ((self._left, self._right), (self._right, self._left)):
            entries = other.flat_diagonal()
            if entries is not None:
                entries = entries if diagonal is None else _added(entries, diagonal)
                return one.flat_loop(v, num_terms, alpha, damping, entries)
        return None

    def plan(self, num_terms: int) -> Plan:
        """By products, of both sides."""
        commute = self._left.flat_diagonal() is None and self._right.flat_diagonal() is None
        reason = "a sum of two operators goes by their products" if commute else "a diagonal does not commute with it"
        return Plan("loop", reason, num_terms)


class _Scaled(CurvatureOperator):
    """An operator times a number."""

    def __init__(self, operator: CurvatureOperator, scalar: float) -> None:
        super().__init__(operator._params, operator._structure)
        self._operator = operator
        self._scalar = scalar

    @property
    def is_mean_over_examples(self) -> bool:
        return self._operator.is_mean_over_examples

    def flat_product(self, v: TensorList) -> TensorList:
        return [self._scalar * t for t in self._operator.flat_product(v)]

    def flat_products(self, v: TensorList) -> TensorList:
        return [self._scalar * t for t in self._operator.flat_products(v)]

    def flat_inverse(self, v: TensorList, damping: float) -> TensorList | None:
        if self._scalar <= 0:
            return None
        inverse = self._operator.flat_inverse(v, damping / self._scalar)
        return None if inverse is None else [t / self._scalar for t in inverse]

    def flat_low_rank(self) -> LowRank | None:
        inner = self._operator.flat_low_rank()
        return None if inner is None else stacked_low_rank([inner], [self._scalar])

    def flat_series(
        self, v: TensorList, num_terms: int, alpha: Tensor, damping: float
    ) -> tuple[TensorList, Tensor] | None:
        # With A = s B, alpha (A + d) = (alpha s)(B + d / s), and the sum carries alpha in place of alpha s.
        if self._scalar <= 0:
            return None
        found = self._operator.flat_series(v, num_terms, alpha * self._scalar, damping / self._scalar)
        return None if found is None else ([t / self._scalar for t in found[0]], found[1])

    def largest_eigenvalue(self) -> Tensor | None:
        inner = self._operator.largest_eigenvalue() if self._scalar > 0 else None
        return None if inner is None else self._scalar * inner

    def flat_diagonal(self) -> TensorList | None:
        entries = self._operator.flat_diagonal()
        return None if entries is None else [self._scalar * d for d in entries]

    def flat_loop(
        self, v: TensorList, num_terms: int, alpha: Tensor, damping: float, diagonal: TensorList | None = None
    ) -> tuple[TensorList, Tensor] | None:
        if self._scalar <= 0:
            return None
        diagonal = None if diagonal is None else [d / self._scalar for d in diagonal]
        found = self._operator.flat_loop(v, num_terms, alpha * self._scalar, damping / self._scalar, diagonal)
        return None if found is None else ([t / self._scalar for t in found[0]], found[1])

    def plan(self, num_terms: int) -> Plan:
        """As the operator itself."""
        if self._scalar <= 0:
            return Plan("loop", "its scale is not positive", num_terms)
        return self._operator.plan(num_terms)


class _Damped(CurvatureOperator):
    """An operator plus a number times the identity."""

    def __init__(self, operator: CurvatureOperator, damping: float) -> None:
        super().__init__(operator._params, operator._structure)
        self._operator = operator
        self._damping = damping

    @property
    def is_mean_over_examples(self) -> bool:
        return self._operator.is_mean_over_examples

    def flat_product(self, v: TensorList) -> TensorList:
        return [h.add_(t, alpha=self._damping) for h, t in zip(self._operator.flat_product(v), v, strict=True)]

    def flat_products(self, v: TensorList) -> TensorList:
        return [h.add_(t, alpha=self._damping) for h, t in zip(self._operator.flat_products(v), v, strict=True)]

    def flat_inverse(self, v: TensorList, damping: float) -> TensorList | None:
        return self._operator.flat_inverse(v, damping + self._damping)

    def flat_low_rank(self) -> LowRank | None:
        inner = self._operator.flat_low_rank()
        if inner is None:
            return None
        if inner.diagonal is None:  # in no memory of its own
            diagonal = [
                torch.full((), self._damping, dtype=p.dtype, device=p.device).expand(p.shape) for p in self._params
            ]
        else:
            diagonal = [d + self._damping for d in inner.diagonal]
        return LowRank(inner.blocks, inner.weights, diagonal)

    def flat_series(
        self, v: TensorList, num_terms: int, alpha: Tensor, damping: float
    ) -> tuple[TensorList, Tensor] | None:
        return self._operator.flat_series(v, num_terms, alpha, damping + self._damping)

    def largest_eigenvalue(self) -> Tensor | None:
        inner = self._operator.largest_eigenvalue()
        return None if inner is None else inner + self._damping

    def flat_diagonal(self) -> TensorList | None:
        entries = self._operator.flat_diagonal()
        return None if entries is None else [d + self._damping for d in entries]

    def flat_loop(
        self, v: TensorList, num_terms: int, alpha: Tensor, damping: float, diagonal: TensorList | None = None
    ) -> tuple[TensorList, Tensor] | None:
        return self._operator.flat_loop(v, num_terms, alpha, damping + self._damping, diagonal)

    def plan(self, num_terms: int) -> Plan:
        """As the operator itself."""
        return self._operator.plan(num_terms)


class _Rearranged(CurvatureOperator):
    """An operator whose params come in another order or structure."""

    def __init__(self, operator: CurvatureOperator, params: TensorList, structure: _lists.Structure) -> None:
        super().__init__(params, structure)
        self._operator = operator
        place = {id(p): i for i, p in enumerate(params)}
        self._inwards = [place[id(p)] for p in operator._params]
        self._outwards = sorted(range(len(params)), key=self._inwards.__getitem__)

    def _in(self, v: TensorList) -> TensorList:
        return [v[i] for i in self._inwards]

    def _out(self, v: TensorList) -> TensorList:
        return [v[i] for i in self._outwards]

    @property
    def is_mean_over_examples(self) -> bool:
        return self._operator.is_mean_over_examples

    def flat_product(self, v: TensorList) -> TensorList:
        return self._out(self._operator.flat_product(self._in(v)))

    def flat_products(self, v: TensorList) -> TensorList:
        return self._out(self._operator.flat_products(self._in(v)))

    def flat_inverse(self, v: TensorList, damping: float) -> TensorList | None:
        found = self._operator.flat_inverse(self._in(v), damping)
        return None if found is None else self._out(found)

    def flat_low_rank(self) -> LowRank | None:
        found = self._operator.flat_low_rank()
        if found is None:
            return None
        diagonal = None if found.diagonal is None else self._out(found.diagonal)
        return LowRank([found.blocks[i] for i in self._outwards], found.weights, diagonal)

    def flat_series(
        self, v: TensorList, num_terms: int, alpha: Tensor, damping: float
    ) -> tuple[TensorList, Tensor] | None:
        found = self._operator.flat_series(self._in(v), num_terms, alpha, damping)
        return None if found is None else (self._out(found[0]), found[1])

    def largest_eigenvalue(self) -> Tensor | None:
        return self._operator.largest_eigenvalue()

    def flat_diagonal(self) -> TensorList | None:
        entries = self._operator.flat_diagonal()
        return None if entries is None else self._out(entries)

    def flat_loop(
        self, v: TensorList, num_terms: int, alpha: Tensor, damping: float, diagonal: TensorList | None = None
    ) -> tuple[TensorList, Tensor] | None:
        inside = None if diagonal is None else self._in(diagonal)
        found = self._operator.flat_loop(self._in(v), num_terms, alpha, damping, inside)
        return None if found is None else (self._out(found[0]), found[1])

    def plan(self, num_terms: int) -> Plan:
        """As the operator itself."""
        return self._operator.plan(num_terms)


def _added(left: TensorList, right: TensorList) -> TensorList:
    return [a + b for a, b in zip(left, right, strict=True)]
