"""The inner problem of a hypergradient: its gradient, its curvature, and the response of its params to hparams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _lists
from .._distributed import average_, check_group
from .._types import Loss, MatVec, TensorList, Tensors
from ..curvature import CurvatureOperator, all_reduced
from ..curvature._gradient import Gradient, check_params
from ..solvers import Neumann, Solver
from ..solvers._product import Product
from ..solvers._solve import check_solver, inverse_product

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Variables:
    """The params and hparams of one call, checked."""

    def __init__(self, caller: str, params: Tensors, hparams: Tensors, *, all_hparams: bool) -> None:
        self.caller = caller
        self.params, self.structure = _lists.flatten(caller, "params", params)
        self.hparams, self._hparam_structure = _lists.flatten(caller, "hparams", hparams)
        check_params(caller, "params", self.structure.labels("params"), self.params)
        self._check_hparams(all_hparams)

    def _check_hparams(self, all_of_them: bool) -> None:
        labels = self._hparam_structure.labels("hparams")
        if not self.hparams:
            raise ValueError(f"{self.caller}: hparams must hold at least one tensor; got none.")
        _lists.check_floating(self.caller, labels, self.hparams)
        if not all_of_them and not any(h.requires_grad for h in self.hparams):
            raise ValueError(
                f"{self.caller}: hparams must hold a tensor that requires grad; got none. Call .requires_grad_() on it."
            )
        for label, hparam in zip(labels, self.hparams, strict=True):
            if all_of_them and not hparam.requires_grad:
                raise ValueError(
                    f"{self.caller}: {label} must require grad; got one that does not. Call .requires_grad_() on it."
                )
            for other, param in zip(self.structure.labels("params"), self.params, strict=True):
                if hparam is param:
                    raise ValueError(f"{self.caller}: {label} must not be one of params; got {other}.")


class InnerProblem:
    """The inner loss, differentiated once, and a way to invert its curvature."""

    def __init__(
        self,
        variables: Variables,
        inner_loss: Loss,
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
        self._variables = variables
        self._solver = solver
        self._group = process_group
        self._curvature = curvature if curvature is None else self._mean_matvec(curvature)
        self._gradient = Gradient(caller, "inner_loss", inner_loss, variables.params)

    def uses(self, hparams: TensorList) -> bool:
        """Whether the inner loss depends on any of ``hparams``."""
        return self._gradient.loss_uses(hparams)

    def response(self, v: Sequence[Tensor | None], hparams: TensorList) -> list[Tensor | None]:
        """``v`` A^-1 d2L/dparams dhparams: the outer gradient ``v``, carried through the response of the params.

        The gradient in params is differentiated in ``hparams``, not the other way round, which costs the same for any
        number of them. None stands for zeros.
        """
        if self._group is None and all(t is None for t in v):
            return [None] * len(hparams)
        caller = self._variables.caller
        right = [t.detach() for t in _filled(self.mean(v, self._variables.params), self._variables.params)]
        solved = inverse_product(caller, self._product(right), right, self._solver)
        return self.mean(self._gradient.mixed(hparams, solved), hparams)

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
        if isinstance(self._solver, Neumann):
            self._gradient.expect(self._solver.num_terms)
        _, structure = _lists.flatten(caller, "params", v)
        hessian = self._mean_matvec(_Hessian(self._gradient, self._variables.params, structure))
        return Product(caller, hessian, structure, v, name="inner_loss's Hessian")

    def _mean_matvec(self, matvec: MatVec) -> MatVec:
        return matvec if self._group is None else all_reduced(matvec, self._group)


class _Hessian(CurvatureOperator):
    """The Hessian of the inner loss on flat lists, which a solver need not check product by product."""

    def __init__(self, gradient: Gradient, params: TensorList, structure: _lists.Structure) -> None:
        super().__init__(params, structure)
        self._gradient = gradient

    def flat_product(self, v: TensorList) -> TensorList:
        return self._gradient.product(v)


def _filled(tensors: Sequence[Tensor | None], like: TensorList) -> TensorList:
    """The tensors, with zeros in place of None."""
    return [torch.zeros_like(z) if t is None else t for t, z in zip(tensors, like, strict=True)]
