"""Named hyperparameters in one unconstrained vector."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TRANSFORMS = ("identity", "softplus", "exp", "sigmoid")


@dataclass(frozen=True)
class Entry:
    """One named hyperparameter: its range, its transform and its place in the unconstrained vector."""

    name: str
    shape: tuple[int, ...]
    low: float
    high: float
    transform: str
    discrete: bool
    start: int

    @property
    def count(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def place(self) -> slice:
        """Its columns of the unconstrained vector."""
        return slice(self.start, self.start + self.count)

    def natural(self, unconstrained: Tensor) -> Tensor:
        """From unconstrained [..., count] to natural units [..., *shape]."""
        h = unconstrained.reshape((*unconstrained.shape[:-1], *self.shape))
        if self.transform == "identity":
            value = h
        elif self.transform == "softplus":
            value = self.low + F.softplus(h) if math.isfinite(self.low) else self.high - F.softplus(h)
        elif self.transform == "exp":
            value = self.low + h.exp()
        else:
            value = self.low + (self.high - self.low) * h.sigmoid()
        return value.floor() if self.discrete else value

    def unconstrained(self, value: Tensor) -> Tensor:
        """The inverse of `natural`, from [..., *shape] to [..., count]."""
        if self.discrete:
            value = value + 0.5  # the middle of what floors to it
        if self.transform == "identity":
            h = value
        elif self.transform == "softplus":
            distance = value - self.low if math.isfinite(self.low) else self.high - value
            h = distance + torch.log(-torch.expm1(-distance))
        elif self.transform == "exp":
            h = (value - self.low).log()
        else:
            h = torch.logit((value - self.low) / (self.high - self.low))
        return h.flatten(h.dim() - len(self.shape)) if self.shape else h.unsqueeze(-1)


class HyperParameters(nn.Module):
    """Named hyperparameters: one unconstrained vector inside, natural units outside."""

    unconstrained: nn.Parameter
    raw_scale: nn.Parameter

    def __init__(self, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.entries: dict[str, Entry] = {}
        self.frozen = False
        self.unconstrained = nn.Parameter(torch.empty(0, device=device, dtype=dtype))
        self.raw_scale = nn.Parameter(torch.empty(0, device=device, dtype=dtype))

    def add(
        self,
        name: str,
        value: float | Sequence[float] | Tensor,
        *,
        low: float = -math.inf,
        high: float = math.inf,
        transform: str | None = None,
        discrete: bool = False,
        shape: tuple[int, ...] = (),
        scale: float = 1.0,
    ) -> HyperParameters:
        """Adds a hyperparameter that starts at ``value``; returns self.

        ``low`` and ``high`` are open bounds. ``transform`` None: sigmoid where both are finite, softplus where one is,
        identity where none is. ``discrete``: the floor of the mapped value. ``shape``: () for one shared number,
        (layers,) or (units,) for one each. ``scale``: standard deviation of perturbations, in unconstrained units.
        """
        if self.frozen:
            raise RuntimeError(
                f"HyperParameters.add: {name!r} must be added before layers are made for {len(self)} hyperparameters."
            )
        bounded = math.isfinite(low) + math.isfinite(high)
        transform = transform or ("identity", "softplus", "sigmoid")[bounded]
        entry = Entry(name, tuple(shape), low, high, transform, discrete, len(self))
        start = torch.as_tensor(value, dtype=torch.float64).expand(entry.shape)
        h = entry.unconstrained(start).to(self.unconstrained)
        raw = torch.full_like(h, scale + math.log(-math.expm1(-scale)))
        self.entries[name] = entry
        self.unconstrained = nn.Parameter(torch.cat([self.unconstrained.detach(), h]))
        self.raw_scale = nn.Parameter(torch.cat([self.raw_scale.detach(), raw]))
        return self

    def __len__(self) -> int:
        return self.unconstrained.numel()

    def scale(self) -> Tensor:
        """Standard deviations of perturbations in unconstrained units, [n]: softplus of ``raw_scale``."""
        return F.softplus(self.raw_scale)

    def perturbed(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """``batch_size`` draws of h + scale * N(0, I), [batch_size, n]; differentiable in both."""
        h = self.unconstrained
        noise = torch.empty(batch_size, len(self), device=h.device, dtype=h.dtype).normal_(generator=generator)
        return h + self.scale() * noise

    def entropy(self) -> Tensor:
        """Entropy of the perturbations, in nats: the sum of log(scale * sqrt(2 pi e))."""
        return (self.scale().log() + 0.5 * math.log(2 * math.pi * math.e)).sum()

    def natural(self, unconstrained: Tensor) -> dict[str, Tensor]:
        """Values in natural units of points [..., n]: [..., *shape] for each name."""
        return {name: entry.natural(unconstrained[..., entry.place]) for name, entry in self.entries.items()}

    def values(self) -> dict[str, Tensor]:
        """The current values in natural units, without graph."""
        return self.natural(self.unconstrained.detach())

    def assign(self, values: Mapping[str, float | Tensor]) -> None:
        """Sets hyperparameters to values in natural units."""
        with torch.no_grad():
            for name, value in values.items():
                entry = self.entries[name]
                start = torch.as_tensor(value, dtype=torch.float64).expand(entry.shape)
                self.unconstrained[entry.place] = entry.unconstrained(start).to(self.unconstrained)
