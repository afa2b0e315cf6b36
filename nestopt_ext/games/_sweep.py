"""Sweeps along a trajectory of a map: what its Jacobians do, one after the other, to the displacements of a start."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .._stack import caller_depth
from .._types import TensorList
from ..hypergrad._recompute import run_recomputing
from ._golub_kahan import leading_triples
from ._linearized import Linearized, Step, check_state, check_step
from .map_jacobian import DENSE_SIZE, _signed
from .spectrum import _check_count

#: Products with Jacobians of all steps before the search for directions is given up.
MAX_PRODUCTS = 400


class Sweep:
    """``num_steps`` steps from ``start`` [B, S], differentiable in it where it requires grad and grad mode is on.

    ``residual`` is that of the directions searched last, relative to the largest singular value, where it is larger
    than it was to be; 0.0 otherwise.
    """

    def __init__(
        self,
        caller: str,
        step: Step,
        start: Tensor,
        num_steps: int,
        recompute: bool = False,
        max_products: int = MAX_PRODUCTS,
    ) -> None:
        check_step(caller, step)
        check_state(caller, "start", start)
        self.caller = caller
        self._step = step
        self._start = start
        self.num_steps = _check_count(caller, "num_steps", num_steps, 1)
        self.state_size = start.shape[1]
        self._recompute = check_flag(caller, "recompute", recompute)
        self._max_products = _check_count(caller, "max_products", max_products, 1)
        self.residual = 0.0
        self._create_graph = torch.is_grad_enabled() and start.requires_grad

    def product(self) -> tuple[Tensor, Tensor]:
        """A multiple of the product of all Jacobians [B, S, S], and the logarithm [B] of what it is short of."""
        batch, size = self._start.shape
        identity = torch.eye(size, dtype=self._start.dtype, device=self._start.device).expand(batch, size, size)

        def multiply(here: Linearized, product: Tensor, log_scale: Tensor) -> TensorList:
            product = here.dense() @ product
            scale = product.detach().abs().amax(dim=(1, 2))
            scale = torch.where((scale > 0) & scale.isfinite(), scale, 1.0)
            return [product / scale[:, None, None], log_scale + scale.log() + _fault(here.value)]

        product, log_scale = self._run(multiply, [identity, _fault(self._start)])
        return product, log_scale

    def step_by_step(self) -> tuple[Tensor, Tensor]:
        """The mean of 2 log sigma_max over the steps, [B], and the direction of the first step, [B, S]."""
        directions: TensorList = []

        def add(here: Linearized, total: Tensor) -> TensorList:
            values, right = leading(here.dense(), 1)
            if not directions:
                directions.append(right[:, :, 0])
            return [total + values[:, 0].log() + _fault(here.value)]

        (total,) = self._run(add, [_fault(self._start)])
        return total * (2 / self.num_steps), directions[0]

    def along(self, frame: Tensor) -> Tensor:
        """The exponents [B, m] of the columns of ``frame`` [B, S, m]."""
        dense = frame.shape[1] <= DENSE_SIZE

        def carry(here: Linearized, columns: Tensor, total: Tensor) -> TensorList:
            images = here.dense() @ columns if dense else here.push(columns)
            columns, growth = _orthonormal(images)
            return [columns, total + growth + _fault(here.value)[:, None]]

        columns, _ = _orthonormal(frame)
        _, total = self._run(carry, [columns, _fault(self._start)[:, None].expand(-1, frame.shape[2])])
        return total * (2 / self.num_steps)

    def leading_directions(self, count: int) -> Tensor:
        """The ``count`` leading right singular vectors of the product of Jacobians, [B, S, count], without graph."""
        with torch.no_grad():
            start = self._start.detach()
            plain = Sweep(self.caller, self._step, start, self.num_steps, max_products=self._max_products)
            if start.shape[1] <= DENSE_SIZE:
                return leading(plain.product()[0], count)[1]
            found = plain._searched_directions(count)
            self.residual = plain.residual
            return found

    def _searched_directions(self, count: int) -> Tensor:
        state, states = self._start, []
        for _ in range(self.num_steps):
            states.append(state)
            state = Linearized(self.caller, self._step, state).value
        finite = torch.stack([s.isfinite().all(dim=1) for s in (*states, state)]).all(dim=0)[:, None]
        steps = [Linearized(self.caller, self._step, torch.where(finite, s, 0.0)) for s in states]

        def forward(v: Tensor) -> Tensor:
            for here in steps:
                v = here.push(v[:, :, None])[:, :, 0]
            return torch.where(finite, v, 0.0)

        def backward(u: Tensor) -> Tensor:
            for here in reversed(steps):
                u = here.pull(u[:, :, None])[:, :, 0]
            return torch.where(finite, u, 0.0)

        rtol = torch.finfo(state.dtype).eps ** (2 / 3)
        capacity = min(count + 17, state.shape[1])
        found = leading_triples(
            forward, backward, state, count, capacity=capacity, rtol=rtol, max_products=self._max_products
        )
        if not found.converged:
            self.residual = float((found.residuals / found.values[:, :1]).nan_to_num(0.0).max())
        return _signed(found.left, found.right)[1]

    def _run(self, visit: Callable[..., TensorList], carried: TensorList) -> TensorList:
        """What is carried along, renewed by ``visit`` at each linearized step."""

        def advance(flat: TensorList, number: int) -> TensorList:
            state = flat[0]
            if self._create_graph and not state.requires_grad:
                state = state.detach().requires_grad_()
            here = Linearized(self.caller, self._step, state, create_graph=self._create_graph)
            return [here.value, *visit(here, *flat[1:])]

        flat = [self._start, *carried]
        with torch.set_grad_enabled(self._create_graph):
            if self._recompute and self._create_graph:
                return run_recomputing(self.caller, advance, flat, range(self.num_steps), [])[1:]
            for number in range(self.num_steps):
                flat = advance(flat, number)
        return flat[1:]


def _fault(state: Tensor) -> Tensor:
    """What to add to the exponents [B] of states: NaN where one is not finite, 0 elsewhere."""
    return state.detach().mul(0).sum(dim=1)


def _orthonormal(columns: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of growing spans of columns [B, S, m], and the logarithm [B, m] of what each added."""
    if columns.shape[2] == 1:
        scale = columns.detach().abs().amax(dim=1, keepdim=True)  # whose square may leave the range of the dtype
        scale = torch.where((scale > 0) & scale.isfinite(), scale, 1.0)
        columns = columns / scale
        length = columns.norm(dim=1, keepdim=True)
        return columns / torch.where(length > 0, length, 1.0), length[:, 0].log() + scale[:, 0].log()
    basis, triangle = torch.linalg.qr(columns)
    return basis, torch.diagonal(triangle, dim1=1, dim2=2).abs().log()


def leading(matrices: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest singular values [B, count] with their graph, and right vectors [B, S, count]; NaN if not finite."""
    finite = matrices.detach().isfinite().all(dim=2).all(dim=1)
    _, values, right = torch.linalg.svd(torch.where(finite[:, None, None], matrices, 0.0))
    right = right.detach().mT[:, :, :count]
    _, right = _signed(right, right)
    nan = torch.nan
    return torch.where(finite[:, None], values[:, :count], nan), torch.where(finite[:, None, None], right, nan)


def warn_of_directions(caller: str, residual: float, remedy: str) -> None:
    """Says that directions have not converged, unless ``residual`` is 0; see :class:`Sweep`."""
    if residual > 0:
        warnings.warn(
            f"{caller}: the leading directions must converge within the products allowed; got residuals up to"
            f" {residual:.3g} of the largest singular value. {remedy} The best found is used.",
            RuntimeWarning,
            stacklevel=caller_depth(),
        )


def check_flag(caller: str, name: str, value: object) -> bool:
    """The bool that ``value`` is; TypeError where it is none."""
    if not isinstance(value, bool):
        raise TypeError(f"{caller}: {name} must be a bool; got {value!r}.")
    return value
