"""The inner problem of a hypergradient: its gradient, its curvature, and the response of its params to hparams."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .. import _lists, _reference
from .._types import Loss, MatVec, TensorList, Tensors
from ..curvature._gradient import Gradient, check_params
from ..solvers import Solver
from ..solvers._outcome import Verdict, judge, warn
from ..solvers._product import Product
from ..solvers._solve import check_solver


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


@dataclass(frozen=True)
class Solve:
    """An inverse product, how it ended, and the products it took."""

    value: TensorList
    verdict: Verdict
    num_products: int


class InnerProblem:
    """The inner loss, differentiated once, and a way to invert its curvature."""

    def __init__(self, variables: Variables, inner_loss: Loss, solver: Solver, curvature: MatVec | None) -> None:
        caller = variables.caller
        check_solver(caller, solver)
        if curvature is not None and not callable(curvature):
            got = _lists.value_name(curvature)
            raise TypeError(f"{caller}: curvature must be None or a callable on tensors like params; got {got}.")
        self._variables = variables
        self._solver = solver
        self._curvature = curvature
        self._gradient = Gradient(caller, "inner_loss", inner_loss, variables.params)

    def uses(self, hparams: TensorList) -> bool:
        """Whether the inner loss depends on any of ``hparams``."""
        return self._gradient.loss_uses(hparams)

    def response(self, v: TensorList, hparams: TensorList) -> list[Tensor | None]:
        """``v`` A^-1 d2L/dparams dhparams; warns once if the solve cannot be trusted."""
        solve = self.solve(v)
        warn(self._variables.caller, solve.verdict)
        return self.carry(solve.value, hparams)

    def solve(self, v: TensorList, start: TensorList | None = None) -> Solve:
        """A^-1 ``v``, from ``start`` on: the solver gets what it leaves of ``v`` and finds what is to be added to it.

        For a series, and for conjugate gradients, that is the same as starting there. It takes one more product.
        """
        caller = self._variables.caller
        product = self._product(v)
        right = v if start is None else _rest(product, v, start, getattr(self._solver, "damping", 0.0))
        outcome = self._solver.run(product, right)
        value = outcome.value if start is None else [x + x0 for x, x0 in zip(outcome.value, start, strict=True)]
        return Solve(value, judge(caller, outcome), product.count)

    def carry(self, solved: TensorList, hparams: TensorList) -> list[Tensor | None]:
        """``solved`` d2L/dparams dhparams: the solved outer gradient, carried through the response of the params.

        The gradient in params is differentiated in ``hparams``, not the other way round, which costs the same for any
        number of them.
        """
        return self._gradient.mixed(hparams, solved)

    def _product(self, v: TensorList) -> Product:
        caller = self._variables.caller
        if self._curvature is not None:
            return Product(caller, self._curvature, self._variables.structure, v, name="curvature")
        _, structure = _lists.flatten(caller, "params", v)
        return Product(caller, self._gradient.product, structure, v, name="inner_loss's Hessian")


def _rest(product: Product, v: TensorList, start: TensorList, damping: float) -> TensorList:
    """V - (A + damping I) start, the difference taken in the dtype of the arithmetic."""
    rest = []
    for right, x, ax in zip(v, start, product(start), strict=True):
        wide = _reference.opmath(right.dtype)
        shifted = _reference.plus(ax.detach().to(wide), x, damping)
        rest.append((right.detach() - shifted).to(right.dtype))
    return rest
