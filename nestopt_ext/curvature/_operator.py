"""What every curvature operator can do: be called on tensors, be added, be scaled, be written out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from numbers import Real

import torch
from torch import Tensor

from .. import _lists
from .._types import SameTensors, TensorList, Tensors


class CurvatureOperator(ABC):
    """A symmetric linear map on tensors like ``params``.

    An implementation says how to multiply a flat list, in :meth:`_product`.
    """

    def __init__(self, params: TensorList, structure: _lists.Structure) -> None:
        self._params = params
        self._structure = structure

    @abstractmethod
    def _product(self, v: TensorList) -> TensorList:
        """The product with a list of the shapes, dtypes and devices of the params; new tensors without graph."""

    def __call__(self, v: SameTensors) -> SameTensors:
        """The product with ``v``; new tensors, in the structure of the params, without graph."""
        name = type(self).__name__
        flat = self._structure.match(name, "v", v)
        _lists.check_like(name, self._structure.labels("v"), flat, self._params)
        result: SameTensors = self._structure.pack(self._product([t.detach() for t in flat]))
        return result

    def __add__(self, other: CurvatureOperator) -> CurvatureOperator:
        if not isinstance(other, CurvatureOperator):
            return NotImplemented
        return _Sum(self, other)

    def __mul__(self, scalar: float) -> CurvatureOperator:
        if not isinstance(scalar, Real):
            return NotImplemented
        return _Scaled(self, float(scalar))

    __rmul__ = __mul__

    def dense(self) -> Tensor:
        """The matrix, of shape [P, P] with P the number of elements of the params in order; costs P products."""
        columns = [
            torch.cat([t.reshape(-1).to(self._params[0].device) for t in self._product(unit)]) for unit in self._units()
        ]
        return torch.stack(columns, dim=1) if columns else self._params[0].new_zeros((0, 0))

    def diagonal(self) -> Tensors:
        """The diagonal of the matrix, in the structure and shapes of the params; exact, and costs P products."""
        entries = [_lists.dot(unit, self._product(unit)) for unit in self._units()]
        parts: TensorList = []
        for param in self._params:
            own, entries = entries[: param.numel()], entries[param.numel() :]
            stacked = torch.stack([e.to(param) for e in own]) if own else param.new_zeros(0)
            parts.append(stacked.reshape(param.shape))
        result: Tensors = self._structure.pack(parts)
        return result

    def _units(self) -> Iterator[TensorList]:
        """The unit vectors of the space of the params, one at a time; each is valid until the next is asked for."""
        unit = [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in self._params]
        for part in unit:
            entries = part.view(-1)
            for i in range(part.numel()):
                entries[i] = 1
                yield unit
                entries[i] = 0


class _Sum(CurvatureOperator):
    """The sum of two operators on the same params."""

    def __init__(self, left: CurvatureOperator, right: CurvatureOperator) -> None:
        if len(left._params) != len(right._params) or any(
            a is not b for a, b in zip(left._params, right._params, strict=True)
        ):
            raise ValueError("CurvatureOperator: both sides of + must act on the same params; got different tensors.")
        super().__init__(left._params, left._structure)
        self._left = left
        self._right = right

    def _product(self, v: TensorList) -> TensorList:
        return [a + b for a, b in zip(self._left._product(v), self._right._product(v), strict=True)]


class _Scaled(CurvatureOperator):
    """An operator times a number."""

    def __init__(self, operator: CurvatureOperator, scalar: float) -> None:
        super().__init__(operator._params, operator._structure)
        self._operator = operator
        self._scalar = scalar

    def _product(self, v: TensorList) -> TensorList:
        return [self._scalar * t for t in self._operator._product(v)]
