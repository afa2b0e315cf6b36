"""What a linear operator may offer a solver, besides being called: faster or exact routes that its structure allows.

A solver takes any callable. For an instance of :class:`LinearOperator` it may also use the methods below, all of them
on flat lists. A route that an operator does not have returns None, and the solver then goes by products.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor

from ._lists import Structure
from ._low_rank import LowRank
from ._types import TensorList


class LinearOperator(ABC):
    """A linear map on lists of the shapes, dtypes and devices of ``params``.

    What comes back from any method is new memory without graph, and arguments are only read.
    """

    #: Whether :meth:`flat_loop` adds up the very terms whose norms it returns, and then multiplies by alpha: the norms
    #: bound the entries of such a sum, and what is not finite in it is not finite in them.
    sums_terms = False

    def __init__(self, params: TensorList, structure: Structure) -> None:
        self._params = params
        self._structure = structure

    @property
    def flat_params(self) -> TensorList:
        """The tensors whose shapes, dtypes and devices the operator acts on."""
        return self._params

    @property
    def structure(self) -> Structure:
        """How the flat list is packed in arguments and results."""
        return self._structure

    @abstractmethod
    def flat_product(self, v: TensorList) -> TensorList:
        """The product with a list like the params."""

    def flat_products(self, v: TensorList) -> TensorList:
        """Products with k lists at once, [k, *shape] for each param."""
        rows = [self.flat_product(list(row)) for row in zip(*v, strict=True)]
        return stacked(rows, v)

    def flat_inverse(self, v: TensorList, damping: float) -> TensorList | None:
        """(A + damping I)^-1 applied to k lists at once, [k, *shape] for each param, in closed form."""
        return None

    def flat_low_rank(self) -> LowRank | None:
        """The operator as a diagonal matrix and one of low rank."""
        return None

    def flat_series(
        self, v: TensorList, num_terms: int, alpha: Tensor, damping: float
    ) -> tuple[TensorList, Tensor] | None:
        """The sum alpha sum_j (I - alpha (A + damping I))^j v over j = 0 .. num_terms, in closed form, for one list.

        Also the squared norms of the num_terms + 1 terms, [num_terms + 1], without the factor alpha.
        """
        return None

    def flat_loop(
        self, v: TensorList, num_terms: int, alpha: Tensor, damping: float, diagonal: TensorList | None = None
    ) -> tuple[TensorList, Tensor] | None:
        """The same sum and norms term by term, by num_terms products, where a step can be taken inside a product.

        ``diagonal`` is added to A, with an entry for each element.
        """
        return None

    def largest_eigenvalue(self) -> Tensor | None:
        """The largest eigenvalue, a 0-dim tensor, where it costs no products."""
        return None


def stacked(rows: Iterable[TensorList], like: TensorList) -> TensorList:
    """Lists as one list of tensors with a leading dimension; ``like`` is what an empty one looks like."""
    columns = [list(column) for column in zip(*rows, strict=True)]
    return [torch.stack(column) for column in columns] if columns else [torch.empty_like(t) for t in like]
