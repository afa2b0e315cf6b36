"""Hyperparameters by approximate gradients: inner problems and linear systems solved more and more exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from .. import _lists
from .._types import TensorList, Tensors
from ..curvature._evaluation import evaluate, preserved_rng
from ..curvature._gradient import Gradient
from ..solvers import ConjugateGradient
from ..solvers._outcome import warn
from ..solvers._product import Product
from ..solvers._solve import invert
from ._minimize import minimize
from ._problem import Variables
from .hypergradient import differences, outer_gradients

_CALLER = "hoag"

Tolerances: TypeAlias = Literal["exponential", "quadratic", "cubic", "exact"] | Callable[[int], float]

#: What each schedule multiplies the initial tolerance with, at step k = 1, 2, ...
_SCHEDULES: dict[str, Callable[[int], float]] = {
    "exponential": lambda k: 0.9**k,
    "quadratic": lambda k: k**-2.0,
    "cubic": lambda k: k**-3.0,
    "exact": lambda k: 0.0,
}

_SMALLEST_TOLERANCE = 1e-12


@dataclass(frozen=True)
class HoagStep:
    """One step of :func:`hoag`: a move of the hparams, and the inner problem solved there.

    ``outer_loss`` is the loss where the move led to. If it was ``accepted``, ``hypergradient_norm`` and
    ``inner_residual`` (the norm of the inner gradient that is left, relative to the largest one met) belong to that
    point; else to the one it came from, solved again. ``tolerance`` is that of the last solve, relative as well.
    ``inner_evaluations`` counts inner losses with their gradients, ``cg_products`` products with the Hessian.
    ``lipschitz`` is the estimate after the step.
    """

    tolerance: float
    outer_loss: float
    hypergradient_norm: float
    inner_evaluations: int
    inner_residual: float
    cg_products: int
    lipschitz: float
    accepted: bool


@dataclass(frozen=True)
class HoagResult:
    """What :func:`hoag` returns: its steps, the start as the first, and the outer loss and hypergradient at the end.

    ``hypergradient`` is a tuple aligned with the hparams.
    """

    history: tuple[HoagStep, ...]
    outer_loss: float
    hypergradient: tuple[Tensor, ...] = field(repr=False)


def hoag(
    outer_loss: Callable[[], Tensor],
    inner_loss: Callable[[], Tensor],
    params: Tensors,
    hparams: Tensors,
    *,
    num_steps: int,
    tolerances: Tolerances = "exponential",
    initial_tolerance: float = 1e-3,
    bounds: tuple[float, float] | None = None,
    max_inner_evaluations: int = 1000,
    max_cg_products: int = 100,
) -> HoagResult:
    r"""Minimize ``outer_loss`` in ``hparams``, with ``params`` the minimum of ``inner_loss``, by HOAG.

    Step k, with tolerance :math:`\epsilon_k`, moves the hparams and solves the inner problem there:

    1. :math:`\lambda \leftarrow \mathrm{Proj}(\lambda - p / \ell)`, with the projection onto ``bounds``;
    2. w by L-BFGS from the w before, until :math:`\|\partial L_T/\partial w\| \le \epsilon_k` times the largest such
       gradient met in the run;
    3. if the outer loss has grown, undo 1 and 2, double :math:`\ell`, and solve 2 and 4 once more with
       :math:`\epsilon_k / 2` where the step came from;
    4. q by conjugate gradients on :math:`\partial^2 L_T/\partial w\,\partial w^\top q = \partial L_V/\partial w`, from
       the q before, until the residual is :math:`\epsilon_k` times the right-hand side;
    5. :math:`p = \partial L_V/\partial\lambda - q^\top \, \partial^2 L_T/\partial w\,\partial\lambda^\top`.

    "Grown" is by more than what the inexact solves explain, :math:`\|q\|` times the norms of the two inner gradients
    that are left: the first-order error of the outer loss. A decrease by more than that error, and more than
    :math:`\ell/2 \,\|\Delta\lambda\|^2`, multiplies :math:`\ell` by 0.95. The first :math:`\ell` makes the root mean
    square of the first move 1, or is 1 where :math:`\|p\| \le 10^{-3}`.

    Losses are zero-argument closures that read ``params`` and ``hparams``, and compute the same each time: they see the
    same random numbers at every call. ``params`` and ``hparams`` (Tensor, list, tuple or dict) are leaf tensors that
    require grad, of any floating dtype but 16 bits, and are **updated in place**; so is whatever the inner loss writes,
    such as running statistics. ``.grad`` and random state are left as they were. The start, with
    ``initial_tolerance``, and ``num_steps`` steps are made. When an exception ends the run, params and hparams stand at
    the last accepted step.

    ``tolerances`` is the schedule for k = 1, 2, ...: ``"exponential"`` initial_tolerance * 0.9^k, ``"quadratic"``
    initial_tolerance / k^2, ``"cubic"`` initial_tolerance / k^3, ``"exact"`` the smallest, or a function of k.
    Tolerances are never below 1e-12, nor below 4 eps of the dtype; convergence asks that their sum is finite.
    ``bounds`` is a pair of numbers low <= high for every element of the hparams, None for none; for log decays the
    authors take (-6, 6). L-BFGS gives up at ``max_inner_evaluations`` evaluations, or when neither loss nor gradient
    improve, and conjugate gradients at ``max_cg_products``.

    Returns a :class:`HoagResult`. Raises TypeError or ValueError for bad arguments, before anything is modified;
    RuntimeError where a loss or its gradient is not finite, or as :func:`hypergradient` does. Warns as that does where
    the Hessian is not positive definite.

    Source: Pedregosa, Hyperparameter optimization with approximate gradient (2016). There the tolerance is relative to
    the first gradient, and bounds on the growth of the outer loss are in absolute numbers; here both scale with the
    losses, a move that fails is one that grows at all, and an accepted one is made once.

    >>> import torch
    >>> w = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    >>> h = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    >>> result = hoag(lambda: (w - 3) ** 2, lambda: (w - 2 * h) ** 2, w, h, num_steps=40)     # w = 2 h, so h = 1.5
    >>> round(h.item(), 3), round(w.item(), 3), len(result.history)
    (1.5, 3.0, 41)
    """
    variables = Variables(_CALLER, params, hparams, all_hparams=True)
    _check_options(num_steps, initial_tolerance, bounds, max_inner_evaluations, max_cg_products)
    schedule = _schedule(tolerances, initial_tolerance, variables.params)
    _check_variables(variables, bounds)
    for name, loss in (("outer_loss", outer_loss), ("inner_loss", inner_loss)):
        if not callable(loss):
            got = _lists.value_name(loss)
            raise TypeError(f"{_CALLER}: {name} must be a zero-argument closure, called many times; got {got}.")
    with preserved_rng(), _kept_grads(variables.params):
        run = _Run(variables, outer_loss, inner_loss, max_inner_evaluations, max_cg_products)
        return run.minimize(schedule, num_steps, bounds)


@dataclass(frozen=True)
class _Point:
    """Hparams with the solution of the inner problem there, and what is known of the outer loss around them."""

    hparams: TensorList
    params: TensorList
    outer_loss: float
    inner_norm: float
    response: TensorList
    hypergradient: TensorList


class _Run:
    """The state of one run; ``last`` is the last accepted point."""

    def __init__(
        self,
        variables: Variables,
        outer_loss: Callable[[], Tensor],
        inner_loss: Callable[[], Tensor],
        max_inner_evaluations: int,
        max_cg_products: int,
    ) -> None:
        self._variables = variables
        self._params = variables.params
        self._hparams = variables.hparams
        self._outer_loss = outer_loss
        self._inner_loss = inner_loss
        self._max_inner_evaluations = max_inner_evaluations
        self._max_cg_products = max_cg_products
        self._smallest = _smallest_tolerance(variables.params)
        self._largest_gradient = 0.0
        self._evaluations = 0
        self._products = 0
        self._history: list[HoagStep] = []
        response = _lists.zeros_like(self._params)
        self.last = _Point(_copies(self._hparams), _copies(self._params), math.inf, 0.0, response, [])

    def minimize(
        self, schedule: Callable[[int], float], num_steps: int, bounds: tuple[float, float] | None
    ) -> HoagResult:
        try:
            tolerance = schedule(0)
            inner_norm, outer = self._solve(tolerance)
            self._accept(tolerance, inner_norm, outer)
            lipschitz = _first_lipschitz(self.last.hypergradient)
            self._note(tolerance, outer, lipschitz, accepted=True)
            for k in range(1, num_steps + 1):
                tolerance = schedule(k) if self._history[-1].accepted else min(schedule(k), tolerance)
                tolerance, lipschitz = self._step(tolerance, lipschitz, bounds)
        except BaseException:
            self._return_to_last()
            raise
        return HoagResult(tuple(self._history), self.last.outer_loss, tuple(self.last.hypergradient))

    def _step(self, tolerance: float, lipschitz: float, bounds: tuple[float, float] | None) -> tuple[float, float]:
        """One move, accepted or undone; returns the tolerance of its last solve and the new estimate."""
        last = self.last
        moved = _move(self._hparams, last, lipschitz, bounds)
        inner_norm, outer = self._solve(tolerance)
        error = float(_lists.norm(last.response)) * (inner_norm + last.inner_norm)
        error += 8 * max(torch.finfo(p.dtype).eps for p in self._params) * abs(last.outer_loss)
        accepted = outer <= last.outer_loss + error
        if accepted:
            self._accept(tolerance, inner_norm, outer)
            if outer < last.outer_loss - max(error, lipschitz / 2 * moved**2):
                lipschitz *= 0.95
        else:
            lipschitz *= 2
            tolerance = max(tolerance / 2, self._smallest)
            self._return_to_last()
            self._accept(tolerance, *self._solve(tolerance))
        self._note(tolerance, outer, lipschitz, accepted=accepted)
        return tolerance, lipschitz

    def _solve(self, tolerance: float) -> tuple[float, float]:
        """Solves the inner problem; returns the norm of the gradient that is left, and the outer loss there."""

        def goal(first: float) -> float:
            self._largest_gradient = max(self._largest_gradient, first)
            return tolerance * self._largest_gradient

        norm, evaluations = minimize(
            _CALLER, "inner_loss", self._inner_loss, self._params, goal, self._max_inner_evaluations
        )
        self._evaluations += evaluations
        outer = float(evaluate(_CALLER, "outer_loss", self._outer_loss).loss.detach())
        if not math.isfinite(outer):
            raise RuntimeError(
                f"{_CALLER}: outer_loss must be finite; got {outer} after {len(self._history)} steps."
                " Bound the hparams, or start elsewhere."
            )
        return norm, outer

    def _accept(self, tolerance: float, inner_norm: float, outer: float) -> None:
        """Takes params and hparams as they are for the last accepted point, and computes its hypergradient."""
        variables = self._variables
        _, in_params, direct = outer_gradients(_CALLER, self._outer_loss, variables)
        gradient = Gradient(_CALLER, "inner_loss", self._inner_loss, self._params)
        response = _lists.zeros_like(self._params)
        if any(g is not None for g in in_params):
            v = [torch.zeros_like(p) if g is None else g.detach() for p, g in zip(self._params, in_params, strict=True)]
            _, structure = _lists.flatten(_CALLER, "params", self._params)
            product = Product(_CALLER, gradient.product, structure, v, name="inner_loss's Hessian")
            solver = ConjugateGradient(self._max_cg_products, tolerance)
            start = self.last.response if self._history else None
            inverse = invert(_CALLER, product, v, solver, start=start)
            warn(_CALLER, inverse.verdict)
            response = inverse.value
            self._products += product.count
        mixed = gradient.mixed(self._hparams, response)
        found = list(differences(direct, mixed, self._hparams))
        if not all(math.isfinite(peak) for (peak,) in _lists.to_host(_lists.max_abs(found))):
            raise RuntimeError(
                f"{_CALLER}: the hypergradient must be finite; got NaN or Inf after {len(self._history)} steps."
            )
        self.last = _Point(_copies(self._hparams), _copies(self._params), outer, inner_norm, response, found)

    def _return_to_last(self) -> None:
        with torch.no_grad():
            for tensor, value in zip(
                [*self._hparams, *self._params], [*self.last.hparams, *self.last.params], strict=True
            ):
                tensor.copy_(value)

    def _note(self, tolerance: float, outer: float, lipschitz: float, *, accepted: bool) -> None:
        norm = float(_lists.norm(self.last.hypergradient))
        left = self.last.inner_norm / self._largest_gradient if self._largest_gradient else 0.0
        self._history.append(
            HoagStep(tolerance, outer, norm, self._evaluations, left, self._products, lipschitz, accepted)
        )
        self._evaluations = self._products = 0


def _copies(tensors: TensorList) -> TensorList:
    return [t.detach().clone() for t in tensors]


def _move(hparams: TensorList, last: _Point, lipschitz: float, bounds: tuple[float, float] | None) -> float:
    """Moves the hparams by a projected gradient step, in place, and returns how far."""
    with torch.no_grad():
        for h, start, p in zip(hparams, last.hparams, last.hypergradient, strict=True):
            moved = start - p / lipschitz
            h.copy_(moved if bounds is None else moved.clamp(*bounds))
    return float(_lists.norm([h.detach() - start for h, start in zip(hparams, last.hparams, strict=True)]))


def _first_lipschitz(hypergradient: TensorList) -> float:
    norm = float(_lists.norm(hypergradient))
    return norm / math.sqrt(_lists.numel(hypergradient)) if norm > 1e-3 else 1.0


def _smallest_tolerance(params: TensorList) -> float:
    return max(_SMALLEST_TOLERANCE, 4 * max(torch.finfo(p.dtype).eps for p in params))


def _schedule(tolerances: Any, initial: float, params: TensorList) -> Callable[[int], float]:
    """The tolerance at step k = 0, 1, ..., checked where it is a caller's, and not below the smallest."""
    smallest = _smallest_tolerance(params)
    if isinstance(tolerances, str) and tolerances in _SCHEDULES:
        factor = _SCHEDULES[tolerances]
        return lambda k: max(smallest, initial * factor(k) if k else initial)
    if not callable(tolerances):
        names = ", ".join(_SCHEDULES)
        raise (ValueError if isinstance(tolerances, str) else TypeError)(
            f"{_CALLER}: tolerances must be one of {names}, or a function of the step; got {tolerances!r}."
        )

    def own(k: int) -> float:
        value = initial if k == 0 else tolerances(k)
        _check_number(f"tolerances({k})", value)
        if not 0 < value < 1:
            raise ValueError(f"{_CALLER}: tolerances({k}) must be in (0, 1); got {value}.")
        return max(smallest, float(value))

    return own


@contextmanager
def _kept_grads(params: TensorList) -> Iterator[None]:
    """Puts the ``.grad`` of each param back, which L-BFGS has for its own use."""
    grads = [p.grad for p in params]
    try:
        yield
    finally:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad


# ---- checks ---------------------------------------------------------------------------------------------------------


def _check_options(
    num_steps: Any, initial_tolerance: Any, bounds: Any, max_inner_evaluations: Any, max_cg_products: Any
) -> None:
    _check_count("num_steps", num_steps, least=0)
    _check_count("max_inner_evaluations", max_inner_evaluations, least=1)
    _check_count("max_cg_products", max_cg_products, least=1)
    _check_number("initial_tolerance", initial_tolerance)
    if not 0 < initial_tolerance < 1:
        raise ValueError(
            f"{_CALLER}: initial_tolerance must be in (0, 1); got {initial_tolerance}. It is relative to the first"
            " gradient."
        )
    if bounds is None:
        return
    if not isinstance(bounds, list | tuple) or len(bounds) != 2:
        raise TypeError(f"{_CALLER}: bounds must be None or a pair (low, high) of numbers; got {bounds!r}.")
    for i, bound in enumerate(bounds):
        _check_number(f"bounds[{i}]", bound)
    if not bounds[0] <= bounds[1]:
        raise ValueError(f"{_CALLER}: bounds must be low <= high; got {bounds}.")


def _check_variables(variables: Variables, bounds: tuple[float, float] | None) -> None:
    params = list(zip(variables.structure.labels("params"), variables.params, strict=True))
    hparams = list(zip(variables.hparam_structure.labels("hparams"), variables.hparams, strict=True))
    for label, tensor in [*params, *hparams]:
        if not tensor.is_leaf:
            raise ValueError(
                f"{_CALLER}: {label} must be a leaf, to be updated in place; got the result of an operation."
                " Pass the tensor it is computed from."
            )
        if tensor.dtype.itemsize < 4:
            raise TypeError(
                f"{_CALLER}: {label} must be float32 or float64; got {_lists.dtype_name(tensor.dtype)}."
                " Line searches need the digits."
            )
    for label, param in params:
        if param.device != variables.params[0].device:
            raise ValueError(
                f"{_CALLER}: {label} must be on {variables.params[0].device}, as {params[0][0]} is; got {param.device}."
                " L-BFGS keeps all params in one vector."
            )
    if bounds is not None:
        for label, h in hparams:
            if not bool(((h >= bounds[0]) & (h <= bounds[1])).all()):
                raise ValueError(
                    f"{_CALLER}: {label} must lie in bounds {tuple(bounds)}; got values that do not."
                    " Clamp it, or widen them."
                )


def _check_count(name: str, value: Any, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{_CALLER}: {name} must be an int; got {value!r}.")
    if value < least:
        raise ValueError(f"{_CALLER}: {name} must be >= {least}; got {value}.")


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{_CALLER}: {name} must be a number; got {value!r}.")
    if math.isnan(value):
        raise ValueError(f"{_CALLER}: {name} must be a number; got nan.")
