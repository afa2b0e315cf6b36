"""The inner problem of a hypergradient: the equation its params solve, its curvature, and their response to hparams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from .. import _lists
from .._distributed import average_, check_group
from .._operator import LinearOperator
from .._types import Loss, MatVec, TensorList, Tensors
from ..curvature import CurvatureOperator
from ..curvature._gradient import Gradient, check_params
from ..curvature.all_reduced import all_reduced
from ..solvers import ConjugateGradient, Nystrom, Solver, Woodbury
from ..solvers._outcome import warn
from ..solvers._product import Product
from ..solvers._solve import Inverse, check_solver, invert
from .fixed_point import FixedPointEquation, FixedPointMap

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: Solvers that are wrong, without a sign of it, where the matrix is not symmetric.
_SYMMETRIC = (ConjugateGradient, Nystrom, Woodbury)


class Variables:
    """The params and hparams of one call, checked."""

    def __init__(self, caller: str, params: Tensors, hparams: Tensors, *, all_hparams: bool) -> None:
        self.caller = caller
        self.params, self.structure = _lists.flatten(caller, "params", params)
        self.hparams, self.hparam_structure = _lists.flatten(caller, "hparams", hparams)
        check_params(caller, "params", self.structure.labels("params"), self.params)
        self._check_hparams(all_hparams)

    def _check_hparams(self, all_of_them: bool) -> None:
        labels = self.hparam_structure.labels("hparams")
        if not self.hparams:
            raise ValueError(f"{self.caller}: hparams must hold at least one tensor; got none.")
        _lists.check_floating(self.caller, labels, self.hparams)
        if not all_of_them and not any(h.requires_grad for h in self.hparams):
            raise ValueError(
                f"{self.caller}: hparams must hold a tensor that requires grad; got none. Call .requires_grad_() on it."
            )
        others = {id(p): label for p, label in zip(self.params, self.structure.labels("params"), strict=True)}
        for label, hparam in zip(labels, self.hparams, strict=True):
            if all_of_them and not hparam.requires_grad:
                raise ValueError(
                    f"{self.caller}: {label} must require grad; got one that does not. Call .requires_grad_() on it."
                )
            if id(hparam) in others:
                raise ValueError(f"{self.caller}: {label} must not be one of params; got {others[id(hparam)]}.")


class Equation(Protocol):
    """F(params, hparams) = 0, which the params solve and so depend on the hparams: a derivative of F, from the left.

    For a loss F is its gradient in params; for a fixed-point map Phi it is params - Phi.
    """

    def product(self, v: TensorList) -> TensorList:
        """``v`` dF/dparams, a list like the params that shares no memory with ``v``."""
        ...

    def mixed(self, hparams: TensorList, v: TensorList) -> list[Tensor | None]:
        """``v`` dF/dhparams; None where F does not depend on one."""
        ...

    def uses(self, hparams: TensorList) -> bool:
        """Whether what was evaluated depends on any of ``hparams``."""
        ...


class InnerProblem:
    """The inner problem, differentiated once, and a way to invert its curvature."""

    def __init__(
        self,
        variables: Variables,
        inner_loss: Loss | FixedPointMap,
        solver: Solver,
        curvature: MatVec | None,
        process_group: ProcessGroup | None,
    ) -> None:
        caller = variables.caller
        check_group(caller, process_group)
        check_solver(caller, solver)
        if curvature is not None and not callable(curvature):
            got = _lists.value_name(curvature)
            raise TypeError(f"{caller}: curvature must be None or a callable on tensors like params; got {got}.")
        if isinstance(curvature, CurvatureOperator):
            curvature = curvature.on(variables.params, variables.structure)
        self._variables = variables
        self._solver = solver
        self._group = process_group
        self._curvature = curvature
        if curvature is not None and process_group is not None:
            self._curvature = all_reduced(curvature, process_group)
        self._equation: Equation
        if isinstance(inner_loss, FixedPointMap):
            if curvature is not None:
                raise ValueError(
                    f"{caller}: curvature must be None with a FixedPointMap; got {_lists.value_name(curvature)}."
                    " The matrix to invert is I - dPhi/dparams, which the map gives."
                )
            if isinstance(solver, _SYMMETRIC):
                raise ValueError(
                    f"{caller}: solver must not ask for a symmetric matrix with a FixedPointMap; got"
                    f" {_lists.value_name(solver)}. Use FixedPoint() or Neumann(num_terms=..., alpha=1.0)."
                )
            self._equation = FixedPointEquation(caller, inner_loss, variables.params, variables.structure)
            self._matrix = "FixedPointMap's I - dPhi/dparams"
        else:
            self._equation = Gradient(caller, "inner_loss", inner_loss, variables.params)
            self._matrix = "inner_loss's Hessian"

    def uses(self, hparams: TensorList) -> bool:
        """Whether the inner problem depends on any of ``hparams``."""
        return self._equation.uses(hparams)

    def response(self, v: Sequence[Tensor | None], hparams: TensorList) -> list[Tensor | None]:
        """``v`` A^-1 dF/dhparams: minus the outer gradient ``v``, carried through the response of the params.

        Warns once if the solve cannot be trusted. None stands for zeros.
        """
        solved = self.solve(v)
        if solved is None:
            return [None] * len(hparams)
        warn(self._variables.caller, solved.verdict)
        return self.carry(solved.value, hparams)

    def solve(self, v: Sequence[Tensor | None], start: TensorList | None = None) -> Inverse | None:
        """A^-1 ``v``, from ``start`` on; None where ``v`` is zero for certain, on every rank. Never warns."""
        if self._group is None and all(t is None for t in v):
            return None
        right = [t.detach() for t in _filled(self.mean(v, self._variables.params), self._variables.params)]
        return invert(self._variables.caller, self._product(right), right, self._solver, start=start)

    def carry(self, solved: TensorList, hparams: TensorList) -> list[Tensor | None]:
        """``solved`` dF/dhparams, where None stands for zeros.

        F is differentiated in ``hparams`` (of a loss: the gradient in params, not the other way round), which costs the
        same for any number of them.
        """
        return self.mean(self._equation.mixed(hparams, solved), hparams)

    def mean(self, tensors: Sequence[Tensor | None], like: TensorList) -> list[Tensor | None]:
        """The mean over the process group, where there is one, with None for zeros; else ``tensors`` as they are."""
        if self._group is None:
            return list(tensors)
        means = [t.detach().clone() for t in _filled(tensors, like)]
        average_(means, self._group)
        return [*means]

    def _product(self, v: TensorList) -> Product:
        caller = self._variables.caller
        if self._curvature is not None:
            return Product(caller, self._curvature, self._variables.structure, v, name="curvature")
        if isinstance(self._equation, Gradient):
            self._equation.expect(getattr(self._solver, "num_terms", getattr(self._solver, "max_iters", 0)))
        structure = self._variables.structure
        matrix = _Matrix(self._equation, self._variables.params, structure, self._group)
        return Product(caller, matrix, structure, v, name=self._matrix)


class _Matrix(LinearOperator):
    """The matrix of an equation on flat lists, averaged over the process group; its products need no checks."""

    sums_terms = True

    def __init__(
        self, equation: Equation, params: TensorList, structure: _lists.Structure, group: ProcessGroup | None
    ) -> None:
        super().__init__(params, structure)
        self._equation = equation
        self._group = group

    def flat_product(self, v: TensorList) -> TensorList:
        return self._averaged(self._equation.product(v))

    def flat_loop(
        self, v: TensorList, num_terms: int, alpha: Tensor, damping: float, diagonal: TensorList | None = None
    ) -> tuple[TensorList, Tensor] | None:
        if self._group is not None or diagonal is not None or not isinstance(self._equation, Gradient):
            return None
        return self._equation.neumann_sum(v, num_terms, alpha, damping)

    def flat_products(self, v: TensorList) -> TensorList:
        if isinstance(self._equation, Gradient):
            return self._averaged(self._equation.products(v))
        return super().flat_products(v)

    def _averaged(self, product: TensorList) -> TensorList:
        if self._group is not None:
            average_(product, self._group)
        return product


def _filled(tensors: Sequence[Tensor | None], like: TensorList) -> TensorList:
    """The tensors, with zeros in place of None."""
    return [torch.zeros_like(z) if t is None else t for t, z in zip(tensors, like, strict=True)]
