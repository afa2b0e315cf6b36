"""A network whose weights respond to hyperparameters, with the hyperparameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ._layer import StnLayer, split
from ._sample import Sample, current_sample, using
from .hyper_parameters import HyperParameters


class StnModel(nn.Module):
    """A module with response layers, and the hyperparameters they respond to.

    Called as it is, it answers at the current hyperparameters. Inside ``with model.at(h)`` it answers at h.
    """

    def __init__(self, module: nn.Module, hparams: HyperParameters, *, centred: bool) -> None:
        super().__init__()
        self.module = module
        self.hparams = hparams
        self.centred = centred
        hparams.frozen = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns; linearized answers are sums of primal and tangent, for every tensor in them."""
        sample = current_sample()
        if sample is None:
            with self.at(self.hparams.unconstrained.unsqueeze(0)):
                return self(*args, **kwargs)
        if not sample.linearized:
            return self.module(*args, **kwargs)
        with forward_ad.dual_level():
            return pytree.tree_map_only(Tensor, _summed, self.module(*args, **kwargs))

    @contextlib.contextmanager
    def at(self, unconstrained: Tensor, *, linearized: bool = False) -> Iterator[Sample]:
        """Answers at the points ``unconstrained``, [B or 1, n], a graph of which leads through the gates only."""
        h0 = self.hparams.unconstrained.detach()
        gate_input: Tensor | None = unconstrained - h0 if self.centred else unconstrained
        if self.centred and unconstrained is self.hparams.unconstrained and not torch.is_grad_enabled():
            gate_input = None
        with using(Sample(gate_input, self.hparams.natural(unconstrained.detach()), linearized)) as sample:
            yield sample

    @contextlib.contextmanager
    def at_centre(self) -> Iterator[Sample]:
        """Answers at the current hyperparameters without a graph to them; centred layers are plain ones then."""
        h0 = self.hparams.unconstrained.detach().unsqueeze(0)
        with using(Sample(None if self.centred else h0, self.hparams.natural(h0))) as sample:
            yield sample

    def general_parameters(self) -> Iterator[nn.Parameter]:
        """The weights that serve at the centre: all but those of the response."""
        response = {id(p) for p in self.response_parameters()}
        return (p for p in self.module.parameters() if id(p) not in response)

    def response_parameters(self) -> Iterator[nn.Parameter]:
        """Directions and gate weights of all response layers."""
        for layer in self.module.modules():
            if isinstance(layer, StnLayer):
                yield from layer.response_parameters()


def _summed(x: Tensor) -> Tensor:
    primal, tangent = split(x)
    return primal if tangent is None else primal + tangent
