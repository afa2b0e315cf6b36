"""Ascent on the largest Lyapunov exponent, to where small displacements change most of what is to come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..optim._arguments import check_real
from ._linearized import Step, check_state, check_step
from ._sweep import MAX_PRODUCTS, Sweep, check_flag, warn_of_directions
from .lyapunov import largest
from .maps import OptimizerMap
from .spectrum import _check_count

#: An ascent on its way, plain data, so that it can be saved as it is: the ``number`` of exponents taken, the worst
#: ``residual`` of their directions and, with a row for each start, the highest point so far (``start``, ``exponent``,
#: ``direction``), what leads up from there (``uphill``), how far to go (``length``) and where to look next
#: (``proposal``). A step makes a new one and leaves the old as it was.
Climb: TypeAlias = dict[str, Any]


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
    max_products: int = MAX_PRODUCTS,
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
        max_products: bounds the search for directions; see :func:`max_lyapunov_exponent`. One warning for all of it.

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
    ascent = Ascent("max_lyapunov_start", step, num_steps, lr, max_steps, normalized, recompute, max_products)
    check_state(ascent.caller, "start", start)
    climb, history = ascent.begin(start), []
    while not ascent.done(climb):
        climb = ascent.advance(climb)
        history.append(climb["exponent"])
    warn_of_directions(ascent.caller, climb["residual"], "Raise max_products, or take float64.")
    return LyapunovStart(climb["start"], climb["exponent"], climb["direction"], torch.stack(history))


@dataclass(frozen=True)
class Ascent:
    """Steps that are taken back, and halved from there on, where they lead no higher; start by start."""

    caller: str
    step: Step
    num_steps: int
    lr: float
    max_steps: int
    normalized: bool = True
    recompute: bool = False
    max_products: int = MAX_PRODUCTS

    def __post_init__(self) -> None:
        check_step(self.caller, self.step)
        check_real(self.caller, "lr", self.lr)
        if self.lr <= 0:
            raise ValueError(f"{self.caller}: lr must be > 0; got {self.lr}.")
        _check_count(self.caller, "num_steps", self.num_steps, 1)
        _check_count(self.caller, "max_steps", self.max_steps, 0)
        check_flag(self.caller, "normalized", self.normalized)

    def begin(self, start: Tensor) -> Climb:
        """At the start, of which nothing is known yet."""
        start = start.detach()
        return {
            "number": 0,
            "residual": 0.0,
            "start": start,
            "proposal": start,
            "exponent": start.new_full(start.shape[:1], torch.nan),
            "direction": torch.full_like(start, torch.nan),
            "uphill": torch.zeros_like(start),
            "length": start.new_full((start.shape[0], 1), self.lr),
        }

    def done(self, climb: Climb) -> bool:
        """Whether all steps were taken and the exponent at their end is known."""
        return bool(climb["number"] > self.max_steps)

    def advance(self, climb: Climb) -> Climb:
        """Takes the proposal where its exponent is higher, and makes another one; NaN is the lowest."""
        exponent, direction, uphill, residual = self._look(climb["proposal"], last=climb["number"] == self.max_steps)
        higher = (exponent > climb["exponent"]) | climb["exponent"].isnan()
        row = higher[:, None]
        start = torch.where(row, climb["proposal"], climb["start"])
        uphill = torch.where(row, uphill, climb["uphill"])
        length = torch.where(row, climb["length"], climb["length"] / 2)
        return {
            "number": climb["number"] + 1,
            "residual": max(residual, climb["residual"]),
            "start": start,
            "proposal": start + length * uphill,
            "exponent": torch.where(higher, exponent, climb["exponent"]),
            "direction": torch.where(row, direction, climb["direction"]),
            "uphill": uphill,
            "length": length,
        }

    def _look(self, x: Tensor, *, last: bool) -> tuple[Tensor, Tensor, Tensor, float]:
        """The exponent at x, its direction, what to step along, and the residual of the direction."""
        with torch.enable_grad():
            x = x.detach().requires_grad_(not last)
            sweep = Sweep(self.caller, self.step, x, self.num_steps, self.recompute, self.max_products)
            found = largest(sweep)
            total = found.exponent.sum()
        gradient = torch.zeros_like(x)
        if total.requires_grad:  # it is constant where the Jacobian is
            (gradient,) = torch.autograd.grad(total, x)
        moved = self.step.num_parameters if isinstance(self.step, OptimizerMap) else x.shape[1]
        return found.exponent.detach(), found.direction, _uphill(gradient, moved, self.normalized), sweep.residual


def _uphill(gradient: Tensor, moved: int, normalized: bool) -> Tensor:
    """What to step along: zero in the buffers, and where it is not finite."""
    gradient = torch.cat([gradient[:, :moved], torch.zeros_like(gradient[:, moved:])], dim=1)
    length = gradient.norm(dim=1, keepdim=True)
    usable = length.isfinite() & (length > 0)
    unit = gradient / torch.where(usable, length, 1.0) if normalized else gradient
    return torch.where(usable, unit, 0.0)
