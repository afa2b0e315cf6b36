r"""Lyapunov exponents of a map of states, how fast neighbours part along its trajectories, and ascent on the largest.

With :math:`x_{t+1} = F(x_t)`, :math:`J_t = dF/dx` at :math:`x_t` and the product :math:`P = J_{k-1} \cdots J_0`, a
displacement d of the start is P d after k steps. Exponents are of *squared* lengths per step, twice the usual ones:

.. math:: \lambda(d) = \tfrac{1}{k} \log |P d|^2 = \tfrac{2}{k} \log |P d|, \quad |d| = 1, \qquad
          \lambda_i = \tfrac{2}{k} \log \sigma_i(P).

Source: Lorraine et al., Lyapunov exponents for diversity in differentiable games (2022).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _lists
from .._types import TensorList
from ..hypergrad._recompute import run_recomputing
from ..optim._arguments import check_real
from ._golub_kahan import leading_triples
from ._linearized import Linearized, Step, check_state, check_step
from .map_jacobian import DENSE_SIZE, _signed
from .maps import OptimizerMap
from .spectrum import _check_count


class MaxLyapunovExponent(NamedTuple):
    """``exponent`` [B], and ``direction`` [B, S], the unit displacement of the start that grows by it, without graph.

    The element of largest magnitude of a direction is positive.
    """

    exponent: Tensor
    direction: Tensor


def max_lyapunov_exponent(
    step: Step, start: Tensor, *, num_steps: int, per_step: bool = False, recompute: bool = False
) -> MaxLyapunovExponent:
    r"""The largest exponent over ``num_steps`` steps, :math:`\tfrac{2}{k} \log \sigma_{\max}(J_{k-1} \cdots J_0)`.

    Args:
        step: an :class:`OptimizerMap`, or any differentiable function from [B, S] to [B, S], row by row; see
            :func:`map_jacobian`.
        start: states [B, S], float32 or float64; exponents are differentiable in them.
        num_steps: k >= 1.
        per_step: stretch each step on its own: :math:`\tfrac{1}{k} \sum_t \log \sigma_{\max}(J_t)^2`, an upper bound,
            whose direction is that of the first step.
        recompute: keep about sqrt(k) states in place of the graphs of all steps, and run the steps once more in the
            backward pass, as :func:`~nestopt_ext.unrolled` does. Values and derivatives are the same.

    Up to S = 64 the Jacobians are formed, one batched backward pass for each step, and their product is scaled as it
    grows, so that it can neither overflow nor vanish; derivatives of every order exist where the largest singular value
    is simple. Beyond, the direction is found from products alone (Golub and Kahan's bidiagonalization, to a relative
    residual of eps^(2/3)), and the exponent is that of :func:`lyapunov_exponents` along it: first derivatives are
    exact, because the direction is stationary, and second ones are refused.

    Returns exponent and direction; an exponent is NaN where the states or Jacobians of its start cease to be finite,
    and -inf where a Jacobian product is zero. Nothing is modified. Raises TypeError or ValueError for bad arguments.

    >>> stretch = torch.tensor([[2.0, 0.0], [0.0, 0.5]], dtype=torch.float64)
    >>> found = max_lyapunov_exponent(lambda x: x @ stretch.T, torch.ones(1, 2, dtype=torch.float64), num_steps=50)
    >>> found.exponent, found.direction                                    # 2 log 2
    (tensor([1.3863], dtype=torch.float64), tensor([[1., 0.]], dtype=torch.float64))
    """
    sweep = _Sweep("max_lyapunov_exponent", step, start, num_steps, recompute)
    _check_flag(sweep.caller, "per_step", per_step)
    if start.shape[1] <= DENSE_SIZE:
        if per_step:
            exponent, direction = sweep.step_by_step()
            return MaxLyapunovExponent(exponent, direction)
        product, log_scale = sweep.product()
        largest, right = _leading(product, 1)
        return MaxLyapunovExponent((largest[:, 0].log() + log_scale) * (2 / num_steps), right[:, :, 0])
    if per_step:
        raise ValueError(
            f"{sweep.caller}: per_step must be False for states of more than {DENSE_SIZE} numbers;"
            f" got {start.shape[1]}."
        )
    right = sweep.leading_directions(1)
    return MaxLyapunovExponent(_first_order(sweep.along(right))[:, 0], right[:, :, 0])


def lyapunov_exponents(
    step: Step,
    start: Tensor,
    *,
    num_steps: int,
    num_exponents: int = 1,
    direction: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    r"""Several exponents over ``num_steps`` steps, or those of given directions, [B, m].

    m directions are carried along and made orthonormal again after every step, :math:`J_t Q_t = Q_{t+1} R_t`; exponent
    i is :math:`\tfrac{2}{k} \sum_t \log |(R_t)_{ii}|`. This never forms a product of Jacobians, whose smaller singular
    values drown in rounding.

    Args:
        step: as in :func:`max_lyapunov_exponent`, as are ``start``, ``num_steps`` and ``recompute``.
        start: states [B, S].
        num_steps: k >= 1.
        num_exponents: m, 1 <= m <= S; where ``direction`` is given, it says how many.
        direction: [B, S], or (S,) for all starts: the exponent of this displacement, [B, 1]. Or [B, S, m]: exponent i
            is that of column i with the columns before it projected out, so that the sum of the first i belongs to the
            volume that they span. They need not be of length 1. None: the m leading right singular vectors of the
            product, for which exponent i is :math:`\tfrac{2}{k} \log \sigma_i`, largest first, as far as
            :math:`\sigma_i / \sigma_1` exceeds rounding; beyond, the vectors are generic ones and the exponents tend to
            the asymptotic ones like 1/k (Benettin et al. 1980).
        recompute: bounds the memory of derivatives.

    Derivatives in ``start`` hold the directions fixed: of every order where they are given; where not, first
    derivatives, which are those of the singular values, and second ones are refused. Up to S = 64 Jacobians are formed;
    beyond, m products are taken.

    Returns [B, m]; NaN where the states or Jacobians of a start cease to be finite, -inf where nothing is left of a
    direction. Nothing is modified. Raises TypeError or ValueError for bad arguments.

    >>> stretch = torch.tensor([[2.0, 0.0], [0.0, 0.5]], dtype=torch.float64)
    >>> start = torch.ones(1, 2, dtype=torch.float64)
    >>> lyapunov_exponents(lambda x: x @ stretch.T, start, num_steps=50, num_exponents=2)     # 2 log 2, 2 log 1/2
    tensor([[ 1.3863, -1.3863]], dtype=torch.float64)
    >>> lyapunov_exponents(lambda x: x @ stretch.T, start, num_steps=50, direction=torch.tensor([0.0, 1.0]))
    tensor([[-1.3863]], dtype=torch.float64)
    """
    sweep = _Sweep("lyapunov_exponents", step, start, num_steps, recompute)
    count = _check_count(sweep.caller, "num_exponents", num_exponents, 1, start.shape[1])
    if direction is not None:
        return sweep.along(_frame(sweep.caller, direction, start))
    return _first_order(sweep.along(sweep.leading_directions(count)))


@dataclass(frozen=True, eq=False)
class LyapunovStart:
    """The highest point that each ascent came to: ``start`` [B, S], its ``exponent`` [B] and ``direction`` [B, S].

    ``history`` [steps + 1, B] has the highest exponent after each step, that of the given start first.
    """

    start: Tensor
    exponent: Tensor
    direction: Tensor
    history: Tensor


def max_lyapunov_start(
    step: Step,
    start: Tensor,
    *,
    num_steps: int,
    lr: float = 0.1,
    max_steps: int = 150,
    normalized: bool = True,
    recompute: bool = False,
) -> LyapunovStart:
    r"""Gradient ascent on the largest exponent: where small displacements change most of what is to come.

    Such points lie near the borders between basins of attraction, from where branches to both sides find different
    solutions; a saddle is one, but no gradient has to vanish.

    Args:
        step: as in :func:`max_lyapunov_exponent`. Of an :class:`OptimizerMap` the parameters are moved and the buffers
            stay; of another map all of the state is moved.
        start: states [B, S], a row for each ascent.
        num_steps: k, the steps over which the exponent is taken.
        lr: length of the first step of each ascent, > 0; without ``normalized`` it multiplies the gradient. A step
            that leads no higher is taken back, and those that follow it are half as long.
        max_steps: steps of the ascent, >= 0.
        normalized: the length of a step does not depend on that of the gradient. A start whose gradient vanishes or
            is not finite stays where it is.
        recompute: bounds the memory of derivatives; see :func:`max_lyapunov_exponent`.

    Returns a :class:`LyapunovStart`, without graph. Nothing is modified. Raises TypeError or ValueError for bad
    arguments.

    Source: Lorraine et al., Lyapunov exponents for diversity in differentiable games (2022), whose steps are all of one
    length and end about as far from the maximum as that.

    >>> from nestopt_ext.games import sgd_map, small_ipd
    >>> step = sgd_map(small_ipd(), lr=1.0)
    >>> found = max_lyapunov_start(step, step.start(torch.tensor([0.5, 0.5])), num_steps=10, max_steps=20)
    >>> [round(x, 1) for x in found.start[0].tolist()], round(found.exponent.item(), 3)
    ([0.9, 0.9], 0.099)
    """
    caller = "max_lyapunov_start"
    check_step(caller, step)
    check_state(caller, "start", start)
    check_real(caller, "lr", lr)
    if lr <= 0:
        raise ValueError(f"{caller}: lr must be > 0; got {lr}.")
    _check_count(caller, "num_steps", num_steps, 1)
    _check_count(caller, "max_steps", max_steps, 0)
    _check_flag(caller, "normalized", normalized)
    moved = step.num_parameters if isinstance(step, OptimizerMap) else start.shape[1]
    climb = _Climb(start.detach(), lr)
    history = []
    for number in range(max_steps + 1):
        with torch.enable_grad():
            x = climb.proposal.detach().requires_grad_(number < max_steps)
            found = max_lyapunov_exponent(step, x, num_steps=num_steps, recompute=recompute)
        gradient = torch.zeros_like(x)
        if found.exponent.requires_grad:  # it is constant where the Jacobian is
            (gradient,) = torch.autograd.grad(found.exponent.sum(), x)
        climb.judge(found.exponent.detach(), found.direction, _uphill(gradient, moved, normalized))
        history.append(climb.exponent)
    return LyapunovStart(climb.start, climb.exponent, climb.direction, torch.stack(history))


class _Climb:
    """Steps that are taken back, and halved from there on, where they lead no higher; start by start."""

    def __init__(self, start: Tensor, length: float) -> None:
        self.start = self.proposal = start
        self.exponent = start.new_full(start.shape[:1], torch.nan)
        self.direction = torch.full_like(start, torch.nan)
        self._uphill = torch.zeros_like(start)
        self._length = start.new_full((start.shape[0], 1), length)

    def judge(self, exponent: Tensor, direction: Tensor, uphill: Tensor) -> None:
        """Takes the proposal where its exponent is higher, and makes another one; NaN is the lowest."""
        higher = (exponent > self.exponent) | self.exponent.isnan()
        row = higher[:, None]
        self.start = torch.where(row, self.proposal, self.start)
        self.exponent = torch.where(higher, exponent, self.exponent)
        self.direction = torch.where(row, direction, self.direction)
        self._uphill = torch.where(row, uphill, self._uphill)
        self._length = torch.where(row, self._length, self._length / 2)
        self.proposal = self.start + self._length * self._uphill


def _uphill(gradient: Tensor, moved: int, normalized: bool) -> Tensor:
    """What to step along: zero in the buffers, and where it is not finite."""
    gradient = torch.cat([gradient[:, :moved], torch.zeros_like(gradient[:, moved:])], dim=1)
    length = gradient.norm(dim=1, keepdim=True)
    usable = length.isfinite() & (length > 0)
    unit = gradient / torch.where(usable, length, 1.0) if normalized else gradient
    return torch.where(usable, unit, 0.0)


# ---- sweeps along a trajectory --------------------------------------------------------------------------------------


class _Sweep:
    """``num_steps`` steps from ``start`` [B, S], differentiable in it where it requires grad and grad mode is on."""

    def __init__(self, caller: str, step: Step, start: Tensor, num_steps: int, recompute: bool) -> None:
        check_step(caller, step)
        check_state(caller, "start", start)
        self.caller = caller
        self._step = step
        self._start = start
        self._num_steps = _check_count(caller, "num_steps", num_steps, 1)
        _check_flag(caller, "recompute", recompute)
        self._recompute = recompute
        self._create_graph = torch.is_grad_enabled() and start.requires_grad

    def product(self) -> tuple[Tensor, Tensor]:
        """A multiple of the product of all Jacobians [B, S, S], and the logarithm [B] of what it is short of."""
        batch, size = self._start.shape
        identity = torch.eye(size, dtype=self._start.dtype, device=self._start.device).expand(batch, size, size)

        def multiply(here: Linearized, product: Tensor, log_scale: Tensor) -> TensorList:
            product = here.dense() @ product
            scale = product.detach().abs().amax(dim=(1, 2))
            scale = torch.where((scale > 0) & scale.isfinite(), scale, 1.0)
            return [product / scale[:, None, None], log_scale + scale.log()]

        product, log_scale = self._run(multiply, [identity, self._start.new_zeros(batch)])
        return product, log_scale

    def step_by_step(self) -> tuple[Tensor, Tensor]:
        """The mean of 2 log sigma_max over the steps, [B], and the direction of the first step, [B, S]."""
        directions: TensorList = []

        def add(here: Linearized, total: Tensor) -> TensorList:
            values, right = _leading(here.dense(), 1)
            if not directions:
                directions.append(right[:, :, 0])
            return [total + values[:, 0].log()]

        (total,) = self._run(add, [self._start.new_zeros(self._start.shape[0])])
        return total * (2 / self._num_steps), directions[0]

    def along(self, frame: Tensor) -> Tensor:
        """The exponents [B, m] of the columns of ``frame`` [B, S, m]."""
        dense = frame.shape[1] <= DENSE_SIZE

        def carry(here: Linearized, columns: Tensor, total: Tensor) -> TensorList:
            images = here.dense() @ columns if dense else here.push(columns)
            columns, growth = _orthonormal(images)
            return [columns, total + growth]

        columns, _ = _orthonormal(frame)
        _, total = self._run(carry, [columns, frame.new_zeros(frame.shape[0], frame.shape[2])])
        return total * (2 / self._num_steps)

    def leading_directions(self, count: int) -> Tensor:
        """The ``count`` leading right singular vectors of the product of Jacobians, [B, S, count], without graph."""
        with torch.no_grad():
            plain = _Sweep(self.caller, self._step, self._start.detach(), self._num_steps, False)
            if self._start.shape[1] <= DENSE_SIZE:
                return _leading(plain.product()[0], count)[1]
            return plain._searched_directions(count)

    def _searched_directions(self, count: int) -> Tensor:
        state, states = self._start, []
        for _ in range(self._num_steps):
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
        found = leading_triples(forward, backward, state, count, capacity=capacity, rtol=rtol, max_products=400)
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
                return run_recomputing(self.caller, advance, flat, range(self._num_steps), [])[1:]
            for number in range(self._num_steps):
                flat = advance(flat, number)
        return flat[1:]


def _orthonormal(columns: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of growing spans of columns [B, S, m], and the logarithm [B, m] of what each added."""
    if columns.shape[2] == 1:
        length = columns.norm(dim=1, keepdim=True)
        return columns / torch.where(length > 0, length, 1.0), length[:, 0].log()
    basis, triangle = torch.linalg.qr(columns)
    return basis, torch.diagonal(triangle, dim1=1, dim2=2).abs().log()


def _leading(matrices: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest singular values [B, count] with their graph, and right vectors [B, S, count]; NaN if not finite."""
    finite = matrices.detach().isfinite().all(dim=2).all(dim=1)
    _, values, right = torch.linalg.svd(torch.where(finite[:, None, None], matrices, 0.0))
    right = right.detach().mT[:, :, :count]
    _, right = _signed(right, right)
    nan = torch.nan
    return torch.where(finite[:, None], values[:, :count], nan), torch.where(finite[:, None, None], right, nan)


class _FirstOrder(torch.autograd.Function):
    """The value itself; its gradient may be differentiated in ``value``, which is refused."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (value,) = ctx.saved_tensors
        found: Tensor = _Refusal.apply(gradient, value)  # type: ignore[no-untyped-call]
        return found


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, value: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError(
            "lyapunov_exponents: a second derivative must not be taken of exponents whose directions were searched; it"
            " would miss how these turn with the start. Pass direction, or use max_lyapunov_exponent on a state of up"
            f" to {DENSE_SIZE} numbers."
        )


def _first_order(value: Tensor) -> Tensor:
    """The value, whose second derivative is refused."""
    result: Tensor = _FirstOrder.apply(value)  # type: ignore[no-untyped-call]
    return result


def _frame(caller: str, direction: Tensor, start: Tensor) -> Tensor:
    """Directions as columns [B, S, m]."""
    if not isinstance(direction, Tensor):
        raise TypeError(f"{caller}: direction must be a tensor; got {_lists.value_name(direction)}.")
    batch, size = start.shape
    shape = tuple(direction.shape)
    if shape == (size,):
        columns = direction.expand(batch, size)[:, :, None]
    elif shape == (batch, size):
        columns = direction[:, :, None]
    elif direction.dim() == 3 and shape[:2] == (batch, size) and 1 <= shape[2] <= size:
        columns = direction
    else:
        raise ValueError(
            f"{caller}: direction must have shape ({size},), ({batch}, {size}) or ({batch}, {size}, m), m <= {size};"
            f" got {_lists.shape_name(shape)}."
        )
    columns = columns.to(start)
    if not bool((columns.detach().norm(dim=1) > 0).all()):
        raise ValueError(f"{caller}: direction must be finite and not zero; got one of length 0 or NaN.")
    return columns


def _check_flag(caller: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{caller}: {name} must be a bool; got {value!r}.")
