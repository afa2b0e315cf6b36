"""What response layers share: gates, and the linearized answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn

from ._sample import current_sample, current_value


@dataclass(frozen=True)
class Response:
    """How one parameter of a layer responds: to centre + gates * direction, a gate for each index of ``dim``.

    ``name`` is that of the centre in its layer, ``gate_weight`` [centre.shape[dim], n] the part of U for it.
    """

    name: str
    centre: Tensor
    direction: Tensor
    gate_weight: Tensor
    dim: int = 0

    def at(self, gate_input: Tensor) -> Tensor:
        """The parameter of the plain layer at one gate input, [n]."""
        return torch.addcmul(self.centre, self._gates(gate_input), self.direction)

    def along(self, gate_input: Tensor) -> Tensor:
        """How that parameter moves from the centre: what `at` adds to it."""
        return self._gates(gate_input) * self.direction

    def _gates(self, gate_input: Tensor) -> Tensor:
        shape = [1] * self.centre.dim()
        shape[self.dim] = -1
        return gates_of(gate_input, self.gate_weight).reshape(shape)


class StnLayer(nn.Module):
    """A layer whose parameters respond. Parameters named ``response_...`` and ``gate_weight...`` are the response's."""

    num_hparams: int
    batch_dim: int

    def set_dimensions(self, num_hparams: int, batch_dim: int) -> None:
        """Remembers how many numbers gates depend on, and which dimension of the input counts examples."""
        for name, value, least in (("num_hparams", num_hparams, 1), ("batch_dim", batch_dim, 0)):
            if value < least:
                raise ValueError(f"{type(self).__name__}: {name} must be at least {least}; got {value}.")
        self.num_hparams, self.batch_dim = num_hparams, batch_dim

    def responses(self) -> Iterator[Response]:
        """What responds, one by one."""
        raise NotImplementedError

    def response_parameters(self) -> Iterator[nn.Parameter]:
        """Directions and gate weights; the other parameters are the general ones, which serve at the centre."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith(("response_", "gate_weight")):
                yield parameter


def gate_input_of(layer: StnLayer, given: Tensor | None, examples: int | None) -> tuple[Tensor | None, bool]:
    """What ``layer`` multiplies its gate matrix with, [M, n] or None for zeros, and whether it is a tangent.

    ``given`` is the argument of the layer's call, [n] or [M, n]; without one the current sample has it. M is 1 or the
    number of ``examples`` in the input, which is None for an input of one example without a dimension for it.
    """
    h, linearized = given, False
    sample = current_sample()
    if h is None and sample is not None:
        h, linearized = sample.gate_input, sample.linearized
    if h is None:
        return None, linearized
    n = layer.num_hparams
    if h.shape[-1:] != (n,) or h.shape[:-1] not in ((), (1,), (examples,)):
        rows = "" if examples is None else f" or ({examples}, {n})"
        raise ValueError(
            f"{type(layer).__name__}: gate_input must have shape ({n},), (1, {n}){rows}; got {tuple(h.shape)}."
            f" Columns are the layer's num_hparams={n}; give one row for all examples, or one for each along"
            f" dimension {layer.batch_dim} of the input, the layer's batch_dim."
        )
    return (h if h.dim() == 2 else h.unsqueeze(0)), linearized


def rate_of(layer: StnLayer, name: str, examples: int | None) -> Tensor:
    """The rate at which ``layer`` drops something, [M] with M 1 or the number of ``examples``, from the sample."""
    rate = current_value(name, type(layer).__name__).detach()
    if rate.shape not in ((1,), (examples,)):
        raise ValueError(
            f"{type(layer).__name__}: hyperparameter {name!r} must be one number for all examples or for each of"
            f" {examples}; got shape {tuple(rate.shape)}. Add it to the hyperparameters with shape=()."
        )
    return rate


def gates_of(gate_input: Tensor, gate_weight: Tensor) -> Tensor:
    """U h for each example: [M, n], [gates, n] -> [M, gates], where the layer is and in its dtype."""
    return F.linear(gate_input.to(gate_weight), gate_weight)


def split(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Primal and tangent of an activation; the tangent is None where it is zero."""
    primal, tangent = forward_ad.unpack_dual(x)  # type: ignore[no-untyped-call]
    return primal, tangent


def join(primal: Tensor, tangent: Tensor) -> Tensor:
    """The activation that carries ``tangent`` along; raises RuntimeError outside of a StnModel's call."""
    if forward_ad._current_level < 0:
        raise RuntimeError(
            "StnLayer: a linearized sample must be answered by the StnModel; got a call of a part of it."
            " Call the model itself inside `with model.at(h, linearized=True)`."
        )
    dual: Tensor = forward_ad.make_dual(primal, tangent)  # type: ignore[no-untyped-call]
    return dual
