"""Weight decay whose coefficient is a hyperparameter, on weights that respond to it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._layer import StnLayer, gates_of
from ._sample import current_sample, current_value
from .hyper_parameters import HyperParameters


class WeightDecay:
    r"""The regularizer :math:`\frac{1}{2B} \sum_b \sum_i \lambda_{b i}\, w_i(h_b)^2`, the mean over examples.

    :math:`\lambda_b` is the hyperparameter ``hparam`` of the current sample at example b: of shape (), one coefficient
    for all weights; (layers,), one for each layer; (weights,), one for each weight, in the order of ``modules()`` and
    within a layer of its parameters, each flattened. :math:`w(h_b)` are the weights that example b is answered with: a
    row of a response layer is W + s V, and so, without a weight for each example,

    .. math:: \|W + s V\|^2 = \|W\|^2 + 2 s \langle W, V \rangle + s^2 \|V\|^2 .

    Other layers count with the weights that they have. ``modules``: the layers, or modules that hold them, to decay;
    none for those of the model that it is called with. ``bias`` (False): decay parameters of one dimension (biases,
    scales of normalizations) too. A parameter in two places counts once, in the first.

    Called inside a sample as ``regularizer(model, outputs)``; ``outputs`` does not matter. Returns a scalar, in float32
    at least, with a graph to weights, directions and gates, and none to :math:`\lambda`. It is exact in a linearized
    model, whose weights are linear in the gates anyway.

    Raises ValueError where there is nothing to decay, or the hyperparameter has none of these shapes; RuntimeError
    outside a sample.

    Source: Lorraine & Duvenaud, Stochastic Hyperparameter Optimization through Hypernetworks (2018), and MacKay et al.
    (ICLR 2019) for weights that vary in a batch. The factor 1/2 is the one of SGD's ``weight_decay``.

    >>> from nestopt_ext.response import StnLinear, StnModel
    >>> layer = StnLinear(2, 1, bias=False, num_hparams=1)
    >>> for p, value in zip(layer.parameters(), (1.0, 2.0, 3.0)):             # W, V, U
    ...     _ = nn.init.constant_(p, value)
    >>> model = StnModel(layer, HyperParameters().add("decay", 1.0), centred=False)
    >>> with model.at(torch.tensor([[1.0], [-1.0]])):                       # weights 1 + 6 h
    ...     WeightDecay("decay")(model).item()                              # ((7^2 + 7^2) / 2 - (5^2 + 5^2) / 2) / 2
    12.0
    """

    def __init__(self, hparam: str, *modules: nn.Module, bias: bool = False) -> None:
        self.hparam = hparam
        self.modules = modules
        self.bias = bias

    def __call__(self, model: nn.Module, outputs: Any = None) -> Tensor:
        """The penalty of ``model`` at the current sample."""
        decay = current_value(self.hparam, "WeightDecay").detach()
        sample = current_sample()
        gate_input = None if sample is None else sample.gate_input
        return 0.5 * _penalty(decay, self._layers(model), gate_input).mean()

    def _layers(self, model: nn.Module) -> list[list[_Weight]]:
        """The weights to decay of each layer that has some."""
        seen: set[int] = set()
        layers = []
        for root in self.modules or (model,):
            for module in root.modules():
                weights = [
                    w for w in _weights(module) if (self.bias or w.centre.dim() > 1) and id(w.centre) not in seen
                ]
                seen.update(id(w.centre) for w in weights)
                layers.append(weights)
        layers = [weights for weights in layers if weights]
        if not layers:
            raise ValueError(
                "WeightDecay: modules must have weights to decay; got none. Those of one dimension need bias=True."
            )
        return layers


@dataclass(frozen=True)
class _Weight:
    """A parameter, and how it responds, if it does."""

    centre: Tensor
    direction: Tensor | None = None
    gate_weight: Tensor | None = None
    dim: int = 0

    def squares(self, gate_input: Tensor | None, decay: Tensor | None = None) -> Tensor:
        """Its squares at each gate input, weighted by ``decay`` [B or 1, *centre.shape] if given, summed: [M or 1]."""
        w = self._rows(self.centre)
        weights = None if decay is None else decay.movedim(self.dim + 1, 1).reshape(len(decay), *w.shape)
        total = _row_sums(w, w, weights).sum(1)
        if self.direction is None or self.gate_weight is None or gate_input is None:
            return total
        v = self._rows(self.direction)
        s = gates_of(gate_input, self.gate_weight).to(w.dtype)
        return total + (2 * s * _row_sums(w, v, weights) + s.square() * _row_sums(v, v, weights)).sum(1)

    def _rows(self, t: Tensor) -> Tensor:
        """A row for each gate, in float32 at least."""
        t = t.to(torch.promote_types(t.dtype, torch.float32)).movedim(self.dim, 0)
        return t.flatten(1) if t.dim() > 1 else t.unsqueeze(1)


def _row_sums(a: Tensor, b: Tensor, weights: Tensor | None) -> Tensor:
    """Inner products of rows, [1, D], or with a weight for each element and example [B, D, K], [B, D]."""
    if weights is None:
        sums: Tensor = torch.linalg.vecdot(a, b).unsqueeze(0)
        return sums
    weighted: Tensor = torch.einsum("bdk,dk->bd", weights.to(a.dtype), a * b)
    return weighted


def _penalty(decay: Tensor, layers: list[list[_Weight]], gate_input: Tensor | None) -> Tensor:
    """The sum of decay * w^2 for each example."""
    shape = tuple(decay.shape[1:])
    every = [weight for weights in layers for weight in weights]
    sizes = [weight.centre.numel() for weight in every]
    if shape == (sum(sizes),):
        parts = torch.split(decay, sizes, 1)  # type: ignore[no-untyped-call]
        decays = [part.reshape(-1, *w.centre.shape) for w, part in zip(every, parts, strict=True)]
        return _total([w.squares(gate_input, of_each) for w, of_each in zip(every, decays, strict=True)])
    if shape not in ((), (len(layers),)):
        raise ValueError(
            f"WeightDecay: the hyperparameter must have shape (), ({len(layers)},) for layers or ({sum(sizes)},) for"
            f" weights; got {shape}."
        )
    squares = [_total([weight.squares(gate_input) for weight in weights]) for weights in layers]
    if shape == ():
        return decay * _total(squares)
    return _total([decay[:, i] * of_layer for i, of_layer in enumerate(squares)])


def _total(parts: list[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)


def _weights(module: nn.Module) -> Iterator[_Weight]:
    """The general parameters of one module, without its children."""
    if isinstance(module, HyperParameters):
        return
    taken: set[int] = set()
    if isinstance(module, StnLayer):
        responses = list(module.responses())
        yield from (_Weight(r.centre, r.direction, r.gate_weight, r.dim) for r in responses)
        taken = {id(p) for p in (*module.response_parameters(), *(r.centre for r in responses))}
    yield from (_Weight(p) for p in module.parameters(recurse=False) if id(p) not in taken)
