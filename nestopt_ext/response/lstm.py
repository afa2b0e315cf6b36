"""LSTMs whose weights respond to hyperparameters."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import _recurrence
from ._layer import Response, StnLayer, gate_input_of, rate_of
from ._recurrence import State
from ._sample import current_sample
from .dropconnect import dropped_weight


class StnLSTM(StnLayer, nn.LSTM):
    r"""A `torch.nn.LSTM` whose weights are an affine function of hyperparameters, for each example its own.

    Both affine maps of a cell, from its input and from its hidden state, are those of `StnLinear`, with U of their own:

    .. math::
        (i, f, g, o) = A_{ih}(x_t, h) + A_{hh}(h_{t-1}, h), \quad
        c_t = \sigma(f) \odot c_{t-1} + \sigma(i) \odot \tanh(g), \quad h_t = \sigma(o) \odot \tanh(c_t)

    Parameters have torch's names, shapes and order of gates, so that weights of a plain LSTM load; V and c of each have
    its name behind ``response_``, U of the two maps are ``gate_weight_ih_l0``, ``gate_weight_hh_l0`` and so on. All
    start as in `StnLinear`, with torch's bounds. Gates are the same for all time steps.

    The call is torch's: ``output, (h_n, c_n) = layer(input, (h_0, c_0))``, and has ``gate_input`` as a third argument.
    ``dropout`` acts between layers as torch's. ``weight_dropout`` names a hyperparameter of the current sample, a rate:
    in training mode each call drops elements of W_hh and V_hh, the same of both and at all time steps, and divides what
    stays by 1 - rate (the rate of the first example: the weights are shared).

    The cell is made of torch's operations and so can be differentiated any number of times, forward and backward.
    Torch's own kernel (cuDNN, oneDNN), which is faster and to be differentiated only once and backward, takes calls in
    which all examples share their weights, in eval mode those without gradients: with ``fused`` True all of them; with
    None those that are differentiated no further, as in the general step of `DeltaStnTrainer` and in evaluations; with
    False none.

    Raises what `StnLinear` raises; ValueError for a ``batch_dim`` other than ``batch_first`` says, for ``proj_size``,
    and for an input or a state of a wrong shape; TypeError for packed sequences; with ``weight_dropout`` in training
    mode RuntimeError outside of a sample, KeyError where it has no such hyperparameter and ValueError where that is
    more than one number.

    Reference: MacKay et al., Self-Tuning Networks, ICLR 2019, appendix (there one bias for both maps and another order
    of gates); weights are dropped as in Merity et al., Regularizing and optimizing LSTM language models, ICLR 2018.

    >>> layer, plain = StnLSTM(2, 3, num_hparams=1), nn.LSTM(2, 3)
    >>> sorted({name.split("_")[0] for name in layer.load_state_dict(plain.state_dict(), strict=False).missing_keys})
    ['gate', 'response']
    >>> x = torch.ones(5, 4, 2)
    >>> torch.allclose(layer(x, gate_input=torch.zeros(4, 1))[0], plain(x)[0])
    True
    """

    #: How gates start: standard deviation of U.
    gate_std = 0.01

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        num_hparams: int,
        batch_dim: int | None = None,
        weight_dropout: str | None = None,
        fused: bool | None = None,
    ) -> None:
        name = type(self).__name__
        own_batch_dim = 0 if batch_first else 1
        if batch_dim not in (None, own_batch_dim):
            raise ValueError(
                f"{name}: batch_dim must be {own_batch_dim} with batch_first={batch_first}; got {batch_dim}."
                " Leave it out, or choose batch_first to fit."
            )
        if proj_size:
            raise ValueError(
                f"{name}: proj_size must be 0; got {proj_size}. Put a StnLinear behind each layer instead."
            )
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional)
        super().__init__(*sizes, device=device, dtype=dtype)
        self.set_dimensions(num_hparams, own_batch_dim)
        self.weight_dropout = weight_dropout
        self.fused = fused
        for cell in self._cells():
            for part in ("ih", "hh"):
                weight = getattr(self, f"weight_{part}_{cell}")
                for kind in ("weight", "bias") if bias else ("weight",):
                    like = getattr(self, f"{kind}_{part}_{cell}")
                    setattr(self, f"response_{kind}_{part}_{cell}", nn.Parameter(torch.empty_like(like)))
                gates = len(weight) * (2 if bias else 1)
                setattr(self, f"gate_weight_{part}_{cell}", nn.Parameter(weight.new_empty(gates, num_hparams)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        super().reset_parameters()  # all from torch's range
        for name, parameter in self.named_parameters():
            if name.startswith("gate_weight"):
                nn.init.normal_(parameter, std=self.gate_std)

    def forward(  # type: ignore[override]
        self, input: Tensor, hx: State | None = None, gate_input: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """The hidden states of the last layer for all time steps, and the last hidden and cell states of all layers."""
        name = type(self).__name__
        if isinstance(input, PackedSequence):
            raise TypeError(f"{name}: input must be a Tensor; got a PackedSequence. Pad it, and mask what is padded.")
        batched = input.dim() == 3
        h, linearized = gate_input_of(self, gate_input, input.shape[self.batch_dim] if batched else None)
        if not batched:
            input = input.unsqueeze(self.batch_dim)
            hx = None if hx is None else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        if hx is None:
            zeros = input.new_zeros(len(self._cells()), input.shape[self.batch_dim], self.hidden_size)
            hx = zeros, zeros
        self._check(input, hx)
        if not linearized and (h is None or len(h) == 1) and self._is_fused():
            output, *state = self._by_kernel(input, hx, h)
        else:
            output, *state = self._by_cells(input, hx, h, linearized)
        h_n, c_n = state
        if not batched:
            output, h_n, c_n = output.squeeze(self.batch_dim), h_n.squeeze(1), c_n.squeeze(1)
        return output, (h_n, c_n)

    def responses(self) -> Iterator[Response]:
        """Weights and biases of all cells."""
        for cell in self._cells():
            for part in ("ih", "hh"):
                yield from self._map(part, cell)

    def extra_repr(self) -> str:
        """The torch layer's, and the number of hyperparameters."""
        return f"{super().extra_repr()}, num_hparams={self.num_hparams}"

    def _cells(self) -> list[str]:
        """What names of parameters end in, in the order of the states."""
        ways = ("", "_reverse") if self.bidirectional else ("",)
        return [f"l{layer}{way}" for layer in range(self.num_layers) for way in ways]

    def _map(self, part: str, cell: str, rate: Tensor | None = None) -> list[Response]:
        """The affine map of a cell from its input, "ih", or hidden state, "hh": weight, and bias if there is one."""
        kinds = ("weight", "bias") if self.bias else ("weight",)
        names = [f"{kind}_{part}_{cell}" for kind in kinds]
        gate_weights = getattr(self, f"gate_weight_{part}_{cell}").split(4 * self.hidden_size)
        found = [
            Response(name, getattr(self, name), getattr(self, f"response_{name}"), gate_weight)
            for name, gate_weight in zip(names, gate_weights, strict=True)
        ]
        if rate is None:
            return found
        weight, *bias = found
        centre, direction = dropped_weight(weight.centre, weight.direction, p=rate)
        return [dataclasses.replace(weight, centre=centre, direction=direction), *bias]

    def _maps(self, cell: str, examples: int) -> tuple[list[Response], list[Response]]:
        """Both affine maps of a cell in one call, with weights dropped where that is asked for."""
        rate = None
        if self.weight_dropout is not None and self.training:
            rate = rate_of(self, self.weight_dropout, examples)
        return self._map("ih", cell), self._map("hh", cell, rate)

    def _check(self, input: Tensor, hx: State) -> None:
        name = type(self).__name__
        steps = "(B, T" if self.batch_first else "(T, B"
        if input.dim() != 3 or input.shape[-1] != self.input_size or input.shape[1 - self.batch_dim] == 0:
            raise ValueError(
                f"{name}: input must have shape {steps}, {self.input_size}) with T at least 1, or without B;"
                f" got {tuple(input.shape)}."
            )
        shape = (len(self._cells()), input.shape[self.batch_dim], self.hidden_size)
        for label, state in zip(("h_0", "c_0"), hx, strict=True):
            if tuple(state.shape) != shape:
                raise ValueError(
                    f"{name}: {label} must have shape (layers * directions, B, hidden_size) {shape};"
                    f" got {tuple(state.shape)}."
                )

    def _is_fused(self) -> bool:
        """Whether the kernel takes a call whose weights are those of all examples."""
        if not self.training and torch.is_grad_enabled():
            return False  # cuDNN's has no derivative in eval mode
        if self.fused is not None:
            return self.fused
        if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
            return False
        sample = current_sample()
        return not self.training or (sample is not None and sample.first_order)

    def _by_kernel(self, input: Tensor, hx: State, h: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """One call of torch's kernel with the weights that serve all examples."""
        weights = {}
        for cell in self._cells():
            for response in itertools.chain(*self._maps(cell, input.shape[self.batch_dim])):
                weights[response.name] = response.centre if h is None else response.at(h[0])
        flat = [weights[name] for name in self._flat_weights_names]
        options = (self.bias, self.num_layers, self.dropout, self.training, self.bidirectional, self.batch_first)
        return torch.lstm(input, hx, flat, *options)

    def _by_cells(self, input: Tensor, hx: State, h: Tensor | None, linearized: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Layer by layer, cell by cell."""
        x = input.transpose(0, 1) if self.batch_first else input
        ways = 2 if self.bidirectional else 1
        answer = _recurrence.linearized if linearized else _recurrence.answer
        ends: list[State] = []
        for layer in range(self.num_layers):
            outputs = []
            for way, cell in enumerate(self._cells()[layer * ways : (layer + 1) * ways]):
                start = hx[0][len(ends)], hx[1][len(ends)]
                maps = self._maps(cell, x.shape[1])
                steps = x.flip(0) if way else x
                y, end = answer(steps, start, *maps, h)
                outputs.append(y.flip(0) if way else y)
                ends.append(end)
            x = torch.cat(outputs, -1) if self.bidirectional else outputs[0]
            if self.dropout and layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        h_n, c_n = (torch.stack(states) for states in zip(*ends, strict=True))
        return (x.transpose(0, 1) if self.batch_first else x), h_n, c_n


class DeltaStnLSTM(StnLSTM):
    """`StnLSTM` about a centre, as `DeltaStnLinear`."""

    gate_std = 0.0
