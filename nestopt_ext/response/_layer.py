"""What response layers share: gates, and the linearized answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn

from ._sample import current_sample


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
        shape = [1] * self.centre.dim()
        shape[self.dim] = -1
        gates = gates_of(gate_input, self.gate_weight).reshape(shape)
        return torch.addcmul(self.centre, gates, self.direction)


class StnLayer(nn.Module):
    """A layer whose parameters respond. Parameters named ``response_...`` and ``gate_weight...`` are the response's."""

    num_hparams: int
    batch_dim: int

    def responses(self) -> Iterator[Response]:
        """What responds, one by one."""
        raise NotImplementedError

    def response_parameters(self) -> Iterator[nn.Parameter]:
        """Directions and gate weights; the other parameters are the general ones, which serve at the centre."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith(("response_", "gate_weight")):
                yield parameter


def gate_input_of(given: Tensor | None) -> tuple[Tensor | None, bool]:
    """What a layer multiplies its gate matrix with, [M, n] or None for zeros, and whether it is a tangent.

    ``given`` is the argument of the layer's call, [n] or [M, n]; without one the current sample has it.
    """
    if given is not None:
        return (given if given.dim() == 2 else given.unsqueeze(0)), False
    sample = current_sample()
    return (None, False) if sample is None else (sample.gate_input, sample.linearized)


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
