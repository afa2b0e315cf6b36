"""One named hyperparameter: its range, and the map between unconstrained numbers and natural units."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

#: What a number for a hyperparameter, or one for each of its units, may be given as.
Numbers: TypeAlias = float | Sequence[float] | Tensor

#: For each transform, which ranges it maps to.
TRANSFORMS = {
    "identity": "no bounds",
    "softplus": "one finite bound",
    "exp": "a finite low, as low=0, and no high",
    "sigmoid": "two finite bounds",
}


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), exact to rounding in float64 too; torch's own cuts e^-20 off."""
    return F.softplus(x, threshold=40.0)


def inverse_softplus(y: Tensor) -> Tensor:
    """The x whose softplus is y > 0."""
    return y + torch.log(-torch.expm1(-y))


def log_softplus(x: Tensor) -> Tensor:
    """log(log(1 + e^x)), which is x where e^x is below rounding; finite with its gradient where softplus is 0."""
    tail = -37.0
    return torch.where(x < tail, x, softplus(x.clamp(min=tail)).log())


@dataclass(frozen=True)
class Entry:
    """One named hyperparameter: its range, its transform and its place in the unconstrained vector.

    The natural value of an unconstrained number h is

    - identity: h
    - softplus: low + log(1 + e^h), or high - log(1 + e^h) where only ``high`` is finite
    - exp: low + e^h
    - sigmoid: low + (high - low) / (1 + e^-h)

    and its floor for a discrete one. Bounds are open, in floating point too: where the map rounds to a bound, or
    overflows, the value is the nearest number inside. So floor(2..24) is one of 2, 3, ..., 23, never 24.
    """

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

    @property
    def range(self) -> str:
        """The open interval, or the whole numbers, that it lies in."""
        if not self.discrete:
            return f"({self.low:g}, {self.high:g})"
        first = [f"{self.low:g}"] if math.isfinite(self.low) else []
        last = [f"{self.high - 1:g}"] if math.isfinite(self.high) else []
        numbers = first if first and first == last else [*first, "...", *last]
        return f"{{{', '.join(numbers)}}}"

    def natural(self, unconstrained: Tensor) -> Tensor:
        """From unconstrained [..., count] to natural units [..., *shape]."""
        h = unconstrained.reshape((*unconstrained.shape[:-1], *self.shape))
        value = self._mapped(h)
        if self.discrete:
            return value.floor().clamp(self.low, self.high - 1)
        return value if self.transform == "identity" else value.clamp(*_inside(self.low, self.high, h.dtype))

    def unconstrained(self, value: Tensor) -> Tensor:
        """The inverse of `natural`, from [..., *shape] to [..., count]; of the middle of what has the same floor."""
        if self.discrete:
            value = value.floor() + 0.5
        if self.transform == "identity":
            h = value
        elif self.transform == "softplus":
            h = inverse_softplus(value - self.low if math.isfinite(self.low) else self.high - value)
        elif self.transform == "exp":
            h = (value - self.low).log()
        else:
            h = (value - self.low).log() - (self.high - value).log()
        return h.flatten(h.dim() - len(self.shape)) if self.shape else h.unsqueeze(-1)

    def start_from(self, caller: str, value: Numbers) -> Tensor:
        """The unconstrained numbers [count] (float64, CPU) of ``value``. Raises unless it lies inside the range."""
        numbers = as_numbers(caller, f"value of {self.name!r}", value, self.shape)
        inside = numbers.floor() if self.discrete else numbers
        outside = ~((inside > self.low) | ((inside == self.low) & self.discrete)) | ~(inside < self.high)
        outside |= ~numbers.isfinite()
        if outside.any():
            raise ValueError(
                f"{caller}: value of {self.name!r} must be finite and in {self.range}; got {numbers[outside][0]:g}."
                " Choose another, or a wider range."
            )
        return self.unconstrained(numbers)

    def _mapped(self, h: Tensor) -> Tensor:
        if self.transform == "identity":
            return h
        if self.transform == "softplus":
            return self.low + softplus(h) if math.isfinite(self.low) else self.high - softplus(h)
        if self.transform == "exp":
            largest = (
                math.log(torch.finfo(h.dtype).max) - 1
            )  # a margin for rounding: inf would make a NaN of a gradient
            return self.low + h.clamp(max=largest).exp()
        above = self.high * h.sigmoid()
        return self.low * (-h).sigmoid() + above if self.low else above


def make_entry(
    caller: str,
    name: str,
    *,
    low: float,
    high: float,
    transform: str | None,
    discrete: bool,
    shape: Sequence[int],
    start: int,
    dtype: torch.dtype,
) -> Entry:
    """The entry of these arguments of ``caller``. Raises ValueError or TypeError where they break a rule."""
    if not isinstance(name, str):
        raise TypeError(f"{caller}: name must be a string; got {type(name).__name__}.")
    if not name or name != name.strip() or not name.isprintable():
        raise ValueError(f"{caller}: name must be printable text without spaces at its ends; got {name!r}.")
    sizes = _sizes(caller, name, shape)
    low, high = _bounds(caller, name, low, high, discrete, dtype)
    fitting = ("identity", "softplus", "sigmoid")[math.isfinite(low) + math.isfinite(high)]
    if transform is None:
        transform = fitting
    if transform not in TRANSFORMS:
        raise ValueError(f"{caller}: transform of {name!r} must be one of {', '.join(TRANSFORMS)}; got {transform!r}.")
    fits = math.isfinite(low) and math.isinf(high) if transform == "exp" else transform == fitting
    if not fits:
        raise ValueError(
            f"{caller}: transform of {name!r} must fit its bounds: {transform} needs {TRANSFORMS[transform]};"
            f" got ({low:g}, {high:g}). Leave transform out to have {fitting}."
        )
    return Entry(name, sizes, low, high, transform, bool(discrete), start)


def _sizes(caller: str, name: str, shape: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(shape, tuple | list | torch.Size):
        raise TypeError(f"{caller}: shape of {name!r} must be a tuple of sizes; got {shape!r}. Write shape=(units,).")
    if any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in shape):
        raise ValueError(f"{caller}: shape of {name!r} must have sizes of at least 1; got {tuple(shape)}.")
    return tuple(shape)


def _bounds(caller: str, name: str, low: float, high: float, discrete: bool, dtype: torch.dtype) -> tuple[float, float]:
    try:
        low, high = float(low), float(high)
    except (TypeError, ValueError):
        raise TypeError(f"{caller}: low and high of {name!r} must be numbers; got {low!r} and {high!r}.") from None
    smallest, largest = _inside(low, high, dtype)
    if not low < high or not smallest <= largest:  # a NaN breaks this rule too, and so do bounds that dtype cannot part
        raise ValueError(f"{caller}: low of {name!r} must be less than high; got low={low:g}, high={high:g}.")
    for bound in (low, high):
        if discrete and math.isfinite(bound) and bound != int(bound):
            raise ValueError(f"{caller}: bounds of {name!r}, a discrete one, must be whole numbers; got {bound:g}.")
        if math.isfinite(bound) and abs(bound) >= torch.finfo(dtype).max:
            raise ValueError(f"{caller}: bounds of {name!r} must be finite in {dtype}, or infinite; got {bound:g}.")
    return low, high


@functools.cache
def _inside(low: float, high: float, dtype: torch.dtype) -> tuple[float, float]:
    """The ends of what ``dtype`` has between two open bounds, to within two roundings."""
    info = torch.finfo(dtype)
    smallest = low + max(abs(low) * info.eps, info.tiny) if math.isfinite(low) else info.min
    largest = high - max(abs(high) * info.eps, info.tiny) if math.isfinite(high) else info.max
    return smallest, largest


def as_numbers(caller: str, what: str, value: Numbers, shape: tuple[int, ...]) -> Tensor:
    """``value`` as float64 on the CPU, expanded to ``shape``. Raises TypeError or ValueError, which name ``what``."""
    if isinstance(value, Tensor) and value.is_complex():
        raise TypeError(f"{caller}: {what} must be real; got {value.dtype}.")
    try:
        numbers = torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{caller}: {what} must be a number or a list of numbers; got {value!r}.") from None
    try:
        return numbers.expand(shape)
    except RuntimeError:
        found = tuple(numbers.shape)
        raise ValueError(f"{caller}: {what} must fit shape {shape}; got shape {found}. Give shape={found}.") from None
