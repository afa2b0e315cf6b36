"""The recurrence of an LSTM over all time steps, and its linearization, in torch's operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._functions import stn_gate
from ._layer import Response, gates_of, join, split

#: Hidden and cell state.
State = tuple[Tensor, Tensor]
#: Pre-activations of a step, [B, 4H], from what all steps had at once and the last hidden state.
FromHidden = Callable[[Tensor, Tensor], Tensor]


def answer(x: Tensor, start: State, ih: list[Response], hh: list[Response], h: Tensor | None) -> tuple[Tensor, State]:
    """Output [T, B, H] and last states of one cell at gate input h."""
    if h is not None and len(h) != 1:
        return _gated(x, start, ih, hh, h)
    (w_ih, *b_ih), (w_hh, *b_hh) = ([r.centre if h is None else r.at(h[0]) for r in part] for part in (ih, hh))
    inputs = F.linear(x, w_ih, _sum(b_ih + b_hh))
    return _ended(run(inputs, *_like(inputs, start), _addmm(w_hh)))


def linearized(
    x: Tensor, start: State, ih: list[Response], hh: list[Response], h: Tensor | None
) -> tuple[Tensor, State]:
    """Output and last states with their tangents."""
    x, dx = split(x)
    inputs = F.linear(x, ih[0].centre, _sum([b.centre for b in ih[1:] + hh[1:]]))
    (h_0, dh), (c_0, dc) = (split(state) for state in _like(inputs, start))
    at = trajectory(inputs, h_0, c_0, _addmm(hh[0].centre))
    if h is None and dx is None and dh is None and dc is None:
        return at.h, (at.h[-1], at.c[-1])
    moved = None if dx is None else F.linear(dx, ih[0].centre)
    if h is not None:
        bias = _sum([gates_of(h, b.gate_weight) * b.direction for b in ih[1:] + hh[1:]])
        moved = _add(moved, F.linear(x, ih[0].direction), gates_of(h, ih[0].gate_weight), bias)
        moved = _add(moved, F.linear(at.before[0], hh[0].direction), gates_of(h, hh[0].gate_weight), None)
    moved = torch.zeros_like(inputs) if moved is None else moved
    dhs, dc = tangents(at, moved, dh, dc, hh[0].centre)
    return join(at.h, torch.stack(dhs)), (join(at.h[-1], dhs[-1]), join(at.c[-1], dc))


def _gated(x: Tensor, start: State, ih: list[Response], hh: list[Response], h: Tensor) -> tuple[Tensor, State]:
    """The answer with gates for each example."""
    bias = _sum([gates_of(h, b.gate_weight) * b.direction + b.centre for b in ih[1:] + hh[1:]])
    inputs = _add(F.linear(x, ih[0].centre), F.linear(x, ih[0].direction), gates_of(h, ih[0].gate_weight), bias)
    gates = gates_of(h, hh[0].gate_weight).to(inputs.dtype)
    plain, response = _addmm(hh[0].centre), hh[0].direction

    def from_hidden(z: Tensor, last: Tensor) -> Tensor:
        return torch.addcmul(plain(z, last), gates, F.linear(last, response))

    return _ended(run(inputs, *_like(inputs, start), from_hidden))


class Trajectory(NamedTuple):
    """What the cells of all time steps were: gates i, f, o, candidates g, cell states c with their tanh, hidden states.

    Each is [T, B, H]; ``before`` are the hidden and cell states [T, B, H] that the steps started from.
    """

    i: Tensor
    f: Tensor
    g: Tensor
    o: Tensor
    c: Tensor
    tanh_c: Tensor
    h: Tensor
    before: tuple[Tensor, Tensor]


def run(inputs: Tensor, h: Tensor, c: Tensor, from_hidden: FromHidden) -> tuple[list[Tensor], ...]:
    """Time steps of an LSTM from the states h, c [B, H], with pre-activations from_hidden(inputs[t], h).

    Returns i, f, g, o, c, tanh(c) and h of each step, in lists of [B, H].
    """
    steps = []
    for from_input in inputs.unbind(0):
        i, f, g, o = from_hidden(from_input, h).chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = torch.addcmul(i * g, f, c)
        tanh_c = c.tanh()
        h = o * tanh_c
        steps.append((i, f, g, o, c, tanh_c, h))
    return tuple(map(list, zip(*steps, strict=True)))


def trajectory(inputs: Tensor, h: Tensor, c: Tensor, from_hidden: FromHidden) -> Trajectory:
    """The time steps of `run`, stacked."""
    steps = run(inputs, h, c, from_hidden)
    *_, cells, _, hidden = steps
    before = torch.stack([h, *hidden[:-1]]), torch.stack([c, *cells[:-1]])
    i, f, g, o, cs, tanh_c, hs = (torch.stack(of_steps) for of_steps in steps)
    return Trajectory(i, f, g, o, cs, tanh_c, hs, before)


def tangents(
    at: Trajectory, inputs: Tensor, dh: Tensor | None, dc: Tensor | None, weight: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Derivatives of the hidden states of all steps, and of the last cell state.

    ``inputs`` [T, B, 4H] are derivatives of the pre-activations but for what comes through the last hidden state, dh
    and dc [B, H] those of the first states, None where zero; ``weight`` [4H, H] is W_hh. All the coefficients are there
    before the first step, whose work is one product and a few sums then.
    """
    _, c_before = at.before
    through_c = at.o * (1 - at.tanh_c.square())
    coefficients = torch.cat(
        [
            at.g * at.i * (1 - at.i),
            c_before * at.f * (1 - at.f),
            at.i * (1 - at.g.square()),
            at.tanh_c * at.o * (1 - at.o),
        ],
        -1,
    )
    found = []
    for dz, k, f, k_c in zip(inputs, coefficients, at.f, through_c, strict=True):
        if dh is not None:
            dz = torch.addmm(dz, dh, weight.t())
        through_i, through_f, through_g, through_o = (k * dz).chunk(4, -1)
        moved = through_i + through_f + through_g
        dc = moved if dc is None else torch.addcmul(moved, f, dc)
        dh = torch.addcmul(through_o, k_c, dc)
        found.append(dh)
    assert dc is not None
    return found, dc


def _add(plain: Tensor | None, response: Tensor, gates: Tensor, bias: Tensor | None) -> Tensor:
    """Sums plain + gates * response + bias, [T, B, 4H], with a row of gates and of the bias for each example."""
    if bias is None:
        return stn_gate(plain, response, gates.to(response), batch_dim=1)
    both = torch.cat([gates, bias], 1).to(response)  # the bias as a gate of ones
    return stn_gate(plain, response, both, None, response.new_ones(response.shape[-1]), batch_dim=1)


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
