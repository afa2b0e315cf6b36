"""The recurrence of an LSTM over all time steps, and its linearization, in torch's operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

#: What is added to the part of the pre-activations that all time steps had at once, from the last hidden state.
FromHidden = Callable[[Tensor, Tensor], Tensor]


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
    """The same, with the steps stacked."""
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
