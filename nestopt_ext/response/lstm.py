"""LSTMs whose weights respond to hyperparameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .._functions import stn_gate
from . import _recurrence
from ._layer import Response, StnLayer, gate_input_of, gates_of, join, split
from ._sample import current_value

State = tuple[Tensor, Tensor]


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

    The cell is made of torch's operations and so can be differentiated any number of times, forward and backward. With
    ``fused``, torch's own kernel (cuDNN, oneDNN) takes the calls in which all examples share their weights, such as the
    general step of Delta-STN; most of those kernels can be differentiated only once, and backward.

    Raises what `StnLinear` raises; ValueError for a ``batch_dim`` other than ``batch_first`` says, for ``proj_size``,
    and for an input or a state of a wrong shape; TypeError for packed sequences; with ``weight_dropout`` in training
    mode RuntimeError outside of a sample and KeyError where it has no such hyperparameter.

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
        fused: bool = False,
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
        if self.fused and not linearized and (h is None or len(h) == 1):
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

    def _map(self, part: str, cell: str, mask: Tensor | None = None) -> list[Response]:
        """The affine map of a cell from its input, "ih", or hidden state, "hh": weight, and bias if there is one."""
        kinds = ("weight", "bias") if self.bias else ("weight",)
        names = [f"{kind}_{part}_{cell}" for kind in kinds]
        gate_weights = getattr(self, f"gate_weight_{part}_{cell}").split(4 * self.hidden_size)
        found = [
            Response(name, getattr(self, name), getattr(self, f"response_{name}"), gate_weight)
            for name, gate_weight in zip(names, gate_weights, strict=True)
        ]
        if mask is not None:
            weight = found[0]
            found[0] = dataclasses.replace(weight, centre=weight.centre * mask, direction=weight.direction * mask)
        return found

    def _mask(self, cell: str) -> Tensor | None:
        """What W_hh and V_hh of a cell are multiplied with in this call."""
        if self.weight_dropout is None or not self.training:
            return None
        rate = current_value(self.weight_dropout, type(self).__name__)[0].detach()
        weight = getattr(self, f"weight_hh_{cell}")
        return (torch.rand_like(weight) >= rate).to(weight.dtype) / (1 - rate).to(weight.dtype)

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

    def _by_kernel(self, input: Tensor, hx: State, h: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """One call of torch's kernel with the weights that serve all examples."""
        weights = {}
        for cell in self._cells():
            for response in (*self._map("ih", cell), *self._map("hh", cell, self._mask(cell))):
                weights[response.name] = response.centre if h is None else response.at(h[0])
        flat = [weights[name] for name in self._flat_weights_names]
        options = (self.bias, self.num_layers, self.dropout, self.training, self.bidirectional, self.batch_first)
        return torch.lstm(input, hx, flat, *options)

    def _by_cells(self, input: Tensor, hx: State, h: Tensor | None, linearized: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Layer by layer, cell by cell."""
        x = input.transpose(0, 1) if self.batch_first else input
        ways = 2 if self.bidirectional else 1
        ends: list[State] = []
        for layer in range(self.num_layers):
            outputs = []
            for way, cell in enumerate(self._cells()[layer * ways : (layer + 1) * ways]):
                start = hx[0][len(ends)], hx[1][len(ends)]
                maps = self._map("ih", cell), self._map("hh", cell, self._mask(cell))
                steps = x.flip(0) if way else x
                y, end = _linearized(steps, start, *maps, h) if linearized else _answer(steps, start, *maps, h)
                outputs.append(y.flip(0) if way else y)
                ends.append(end)
            x = torch.cat(outputs, -1) if self.bidirectional else outputs[0]
            if self.dropout and layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        h_n, c_n = (torch.stack(states) for states in zip(*ends, strict=True))
        return (x.transpose(0, 1) if self.batch_first else x), h_n, c_n


def _answer(x: Tensor, start: State, ih: list[Response], hh: list[Response], h: Tensor | None) -> tuple[Tensor, State]:
    """Output [T, B, H] and last states of one cell at gate input h."""
    if h is not None and len(h) != 1:
        return _gated(x, start, ih, hh, h)
    (w_ih, *b_ih), (w_hh, *b_hh) = ([r.centre if h is None else r.at(h[0]) for r in part] for part in (ih, hh))
    inputs = F.linear(x, w_ih, _sum(b_ih + b_hh))
    return _ended(_recurrence.run(inputs, *_like(inputs, start), _addmm(w_hh)))


def _gated(x: Tensor, start: State, ih: list[Response], hh: list[Response], h: Tensor) -> tuple[Tensor, State]:
    """The same with gates for each example."""
    bias = _sum([gates_of(h, b.gate_weight) * b.direction + b.centre for b in ih[1:] + hh[1:]])
    inputs = _add(F.linear(x, ih[0].centre), F.linear(x, ih[0].direction), gates_of(h, ih[0].gate_weight), bias)
    gates = gates_of(h, hh[0].gate_weight).to(inputs.dtype)
    plain, response = _addmm(hh[0].centre), hh[0].direction

    def from_hidden(z: Tensor, last: Tensor) -> Tensor:
        return torch.addcmul(plain(z, last), gates, F.linear(last, response))

    return _ended(_recurrence.run(inputs, *_like(inputs, start), from_hidden))


def _linearized(
    x: Tensor, start: State, ih: list[Response], hh: list[Response], h: Tensor | None
) -> tuple[Tensor, State]:
    """Output and last states with their tangents."""
    x, dx = split(x)
    (h_0, dh), (c_0, dc) = (split(state) for state in start)
    inputs = F.linear(x, ih[0].centre, _sum([b.centre for b in ih[1:] + hh[1:]]))
    at = _recurrence.trajectory(inputs, *_like(inputs, (h_0, c_0)), _addmm(hh[0].centre))
    if h is None and dx is None and dh is None and dc is None:
        return at.h, (at.h[-1], at.c[-1])
    moved = torch.zeros_like(inputs) if dx is None else F.linear(dx, ih[0].centre)
    if h is not None:
        bias = _sum([gates_of(h, b.gate_weight) * b.direction for b in ih[1:] + hh[1:]])
        moved = _add(moved, F.linear(x, ih[0].direction), gates_of(h, ih[0].gate_weight), bias)
        moved = _add(moved, F.linear(at.before[0], hh[0].direction), gates_of(h, hh[0].gate_weight), None)
    dhs, dc = _recurrence.tangents(at, moved, dh, dc, hh[0].centre)
    return join(at.h, torch.stack(dhs)), (join(at.h[-1], dhs[-1]), join(at.c[-1], dc))


def _add(plain: Tensor, response: Tensor, gates: Tensor, bias: Tensor | None) -> Tensor:
    """Sums plain + gates * response + bias, [T, B, 4H], with a row of gates and of the bias for each example."""
    if bias is None:
        return stn_gate(plain, response, gates.to(plain.dtype), batch_dim=1)
    both = torch.cat([gates, bias], 1).to(plain.dtype)  # the bias as a gate of ones
    return stn_gate(plain, response, both, None, plain.new_ones(response.shape[-1]), batch_dim=1)


def _addmm(weight: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    transposed = weight.t()
    return lambda z, last: torch.addmm(z, last, transposed)


def _sum(biases: list[Tensor]) -> Tensor | None:
    return biases[0] + biases[1] if biases else None


def _like(inputs: Tensor, states: State) -> State:
    """The states in the dtype of the products, which autocast may have chosen."""
    return states[0].to(inputs.dtype), states[1].to(inputs.dtype)


def _ended(steps: tuple[list[Tensor], ...]) -> tuple[Tensor, State]:
    *_, cells, _, hidden = steps
    return torch.stack(hidden), (hidden[-1], cells[-1])


class DeltaStnLSTM(StnLSTM):
    """`StnLSTM` about a centre, as `DeltaStnLinear`."""

    gate_std = 0.0
