"""Named hyperparameters in one unconstrained vector."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ._entry import Entry, Numbers, as_numbers, inverse_softplus, log_softplus, make_entry, softplus


class HyperParameters(nn.Module):
    r"""Named hyperparameters: one unconstrained vector inside, natural units outside.

    Each entry has a range, and a transform that maps an unconstrained number h to it (see :meth:`add`). The parameter
    ``unconstrained`` [n] is what to optimize. Response models are trained around it, at points drawn for each example,

    .. math:: h' = h + \sigma \odot \epsilon, \quad \epsilon \sim N(0, I), \quad \sigma = \log(1 + e^{r}),

    in unconstrained units, with r the parameter ``raw_scale`` [n]. Its ``state_dict`` has both, the entries, and the
    history of :meth:`record`; ``torch.load(..., weights_only=True)`` reads it, and loading refuses other entries.

    ``device`` and ``dtype`` (floating point, torch's default if None) are those of the two parameters.

    Source: MacKay et al., Self-Tuning Networks (ICLR 2019), section 4 and appendix; Bae & Grosse, Delta-STN (NeurIPS
    2020). There bounds may be reached by rounding; here they are open. There a discrete value is the floor of what may
    round to the upper bound; here it stays below.

    >>> hparams = HyperParameters()
    >>> _ = hparams.add("dropout", 0.5, low=0, high=1).add("length", 4, low=2, high=24, discrete=True)
    >>> _ = hparams.add("decay", 1.0, low=0, transform="exp", scale=0.5)
    >>> hparams.unconstrained[0].item(), hparams.unconstrained[2].item()     # logit(1/2), log(1)
    (0.0, 0.0)
    >>> print(hparams)
    name     value  range         transform  scale
    dropout  0.5    (0, 1)        sigmoid    1
    length   4      {2, ..., 23}  sigmoid    1
    decay    1      (0, inf)      exp        0.5
    """

    unconstrained: nn.Parameter
    raw_scale: nn.Parameter

    def __init__(self, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        dtype = dtype or torch.get_default_dtype()
        if not dtype.is_floating_point:
            raise TypeError(f"HyperParameters: dtype must be a floating point one; got {dtype}.")
        self.entries: dict[str, Entry] = {}
        #: Set when layers are made for these hyperparameters: their number is fixed then.
        self.frozen = False
        #: What was recorded: {"step": [...], "values": {name: [...]}, "scales": {name: [...]}}, all plain numbers.
        self.history: dict[str, Any] = {"step": [], "values": {}, "scales": {}}
        self.unconstrained = nn.Parameter(torch.empty(0, device=device, dtype=dtype))
        self.raw_scale = nn.Parameter(torch.empty(0, device=device, dtype=dtype))

    def add(
        self,
        name: str,
        value: Numbers,
        *,
        low: float = -math.inf,
        high: float = math.inf,
        transform: str | None = None,
        discrete: bool = False,
        shape: Sequence[int] = (),
        scale: Numbers = 1.0,
    ) -> HyperParameters:
        """Adds a hyperparameter that starts at ``value`` (natural units, strictly inside its range); returns self.

        ``name`` is unique. ``low`` and ``high`` are open bounds. ``transform``: "identity" without bounds, "softplus"
        with one, "sigmoid" with two, "exp" with ``low`` alone; None: the first of these that fits. ``discrete``: the
        floor of the mapped value, so one of low, ..., high - 1; bounds are whole numbers then, and ``value`` may be
        ``low``. ``shape``: () for one shared number, (layers,) or (units,) for one each; ``value`` and ``scale`` are
        numbers, or tensors or lists that expand to it. ``scale`` > 0: the standard deviation of perturbations, in
        unconstrained units.

        ``unconstrained`` and ``raw_scale`` are new parameters afterwards: add before an optimizer takes them.

        Raises ValueError or TypeError for arguments that break a rule, and RuntimeError once layers were made for, or
        :meth:`record` was called on, the entries that are there. Nothing is changed then.

        >>> HyperParameters().add("rates", [0.25, 0.5], low=0, high=1, shape=(2,)).values()["rates"]
        tensor([0.2500, 0.5000])
        """
        caller = "HyperParameters.add"
        self._check_open(caller, name)
        dtype = self.unconstrained.dtype
        options = {"low": low, "high": high, "transform": transform, "discrete": discrete, "shape": shape}
        entry = make_entry(caller, name, **options, start=len(self), dtype=dtype)  # type: ignore[arg-type]
        h = entry.start_from(caller, value)
        deviation = as_numbers(caller, f"scale of {name!r}", scale, entry.shape).reshape(-1)
        wrong = ~(deviation > 0) | deviation.isinf()
        if wrong.any():
            raise ValueError(
                f"{caller}: scale of {name!r} must be positive and finite; got {deviation[wrong][0]:g}."
                " To leave perturbations out, ask the model at `unconstrained` itself."
            )
        self.entries[name] = entry
        self.unconstrained = _appended(self.unconstrained, h)
        self.raw_scale = _appended(self.raw_scale, inverse_softplus(deviation))
        return self

    def __len__(self) -> int:
        return self.unconstrained.numel()

    def scale(self) -> Tensor:
        """Standard deviations of perturbations in unconstrained units, [n]: softplus of ``raw_scale``."""
        return softplus(self.raw_scale)

    def perturbed(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """``batch_size`` draws of h + scale * N(0, I), [batch_size, n]; differentiable in both."""
        if batch_size < 1:
            raise ValueError(f"HyperParameters.perturbed: batch_size must be at least 1; got {batch_size}.")
        h = self.unconstrained
        noise = torch.empty(batch_size, len(self), device=h.device, dtype=h.dtype).normal_(generator=generator)
        return h + self.scale() * noise

    def entropy(self) -> Tensor:
        """Entropy of the perturbations, in nats: the sum of log(scale * sqrt(2 pi e)); differentiable.

        >>> hparams = HyperParameters().add("x", 0.0, scale=1.0)
        >>> f"{hparams.entropy().item():.4f}"                                # log(2 pi e) / 2
        '1.4189'
        """
        return (log_softplus(self.raw_scale) + 0.5 * math.log(2 * math.pi * math.e)).sum()

    def natural(self, unconstrained: Tensor) -> dict[str, Tensor]:
        """Values in natural units of points [..., n]: [..., *shape] for each name; differentiable, but for floors."""
        if unconstrained.dim() == 0 or unconstrained.shape[-1] != len(self):
            raise ValueError(
                f"HyperParameters.natural: unconstrained must have {len(self)} numbers in its last dimension;"
                f" got shape {tuple(unconstrained.shape)}."
            )
        return {name: entry.natural(unconstrained[..., entry.place]) for name, entry in self.entries.items()}

    def values(self) -> dict[str, Tensor]:
        """The current values in natural units, [*shape] each: copies without graph."""
        return self.natural(self.unconstrained.detach().clone())

    def assign(self, values: Mapping[str, Numbers]) -> None:
        """Sets hyperparameters to values in natural units, in place.

        Raises KeyError for an unknown name, and as :meth:`add` for a value; nothing is changed then.

        >>> hparams = HyperParameters().add("dropout", 0.1, low=0, high=1)
        >>> hparams.assign({"dropout": 0.5})
        >>> hparams.unconstrained.item()
        0.0
        """
        caller = "HyperParameters.assign"
        for name in values:
            if name not in self.entries:
                raise KeyError(f"{caller}: name must be one of {', '.join(self.entries)}; got {name!r}.")
        new = {name: self.entries[name].start_from(caller, value) for name, value in values.items()}
        with torch.no_grad():
            for name, h in new.items():
                self.unconstrained[self.entries[name].place] = h.to(self.unconstrained)

    def record(self, step: int) -> dict[str, Any]:
        """Appends the current values (natural units) and scales to ``history``; returns what it appended.

        Numbers and, for entries with a shape, lists of them: ready for a log or a plot. Waits for the device once.

        >>> hparams = HyperParameters().add("holes", 1, low=0, high=4, discrete=True)
        >>> hparams.record(10)
        {'step': 10, 'values': {'holes': 1}, 'scales': {'holes': 1.0}}
        >>> hparams.history["step"], hparams.history["values"]["holes"]
        ([10], [1])
        """
        h, scales = torch.stack([self.unconstrained.detach(), self.scale().detach()]).cpu()
        row: dict[str, Any] = {"step": step, "values": {}, "scales": {}}
        for name, entry in self.entries.items():
            value = entry.natural(h[entry.place])
            row["values"][name] = (value.long() if entry.discrete and value.isfinite().all() else value).tolist()
            row["scales"][name] = scales[entry.place].reshape(entry.shape).tolist()
        self.history["step"].append(step)
        for kind in ("values", "scales"):
            for name, numbers in row[kind].items():
                self.history[kind].setdefault(name, []).append(copy.copy(numbers))
        return row

    def describe(self) -> str:
        """A table of names, values in natural units, ranges, transforms and perturbation scales."""
        rows = [("name", "value", "range", "transform", "scale")]
        scales = self.scale().detach()
        for (name, value), entry in zip(self.values().items(), self.entries.values(), strict=True):
            rows.append((name, _text(value), entry.range, entry.transform, _text(scales[entry.place])))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)

    def __str__(self) -> str:
        return self.describe()

    def extra_repr(self) -> str:
        """One line for each entry: its name, shape, range and transform."""
        return "\n".join(
            f"{entry.name}: {f'{entry.shape} ' if entry.shape else ''}in {entry.range} by {entry.transform}"
            for entry in self.entries.values()
        )

    def get_extra_state(self) -> dict[str, Any]:
        """Entries and history as plain values, for ``state_dict``."""
        return {"entries": self._plain_entries(), "history": copy.deepcopy(self.history)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes the history from what :meth:`get_extra_state` returned."""
        self.history = copy.deepcopy(state["history"])

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        state = state_dict.get(f"{prefix}_extra_state")
        difference = None if state is None else _difference(self._plain_entries(), state["entries"])
        if difference:
            args[-1].append(f"HyperParameters.load_state_dict: entries must be the same; {difference}.")
        else:
            super()._load_from_state_dict(state_dict, prefix, *args)

    def _plain_entries(self) -> dict[str, dict[str, Any]]:
        return {name: asdict(entry) for name, entry in self.entries.items()}

    def _check_open(self, caller: str, name: str) -> None:
        if self.frozen:
            raise RuntimeError(
                f"{caller}: {name!r} must be added before layers are made for {len(self)} hyperparameters."
                " Add all of them first, then make the layers and the model anew."
            )
        if self.history["step"]:
            raise RuntimeError(f"{caller}: {name!r} must be added before the first record. Add all of them first.")
        if name in self.entries:
            raise ValueError(f"{caller}: name must be unique; got {name!r} again. Use assign to change its value.")


def _appended(parameter: nn.Parameter, more: Tensor) -> nn.Parameter:
    joined = torch.cat([parameter.detach(), more.to(parameter)])
    return nn.Parameter(joined, requires_grad=parameter.requires_grad)


def _text(values: Tensor) -> str:
    """One number, or the ends of many and how many they are."""
    if values.numel() == 1:
        return f"{values.item():.4g}"
    low, high = (end.item() for end in values.aminmax())
    return f"{low:.4g} to {high:.4g} ({values.numel()})"


def _difference(mine: Mapping[str, Mapping[str, Any]], given: Mapping[str, Mapping[str, Any]]) -> str:
    """What parts two lists of entries, in words; "" where nothing does."""
    missing = [name for name in mine if name not in given]
    unknown = [name for name in given if name not in mine]
    other = [
        f"{name!r} has {key} {entry[key]}, got {given[name].get(key)}"
        for name, entry in mine.items()
        if name in given
        for key in entry
        if entry[key] != given[name].get(key)
    ]
    parts = [
        f"{words} {', '.join(map(repr, names))}"
        for words, names in (("lacks", missing), ("has unknown", unknown))
        if names
    ]
    if parts:
        return "what was given " + " and ".join(parts)
    return other[0] if other else ""
