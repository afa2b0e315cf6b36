"""Affine layers whose weights respond to hyperparameters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._functions import stn_gate
from ._layer import Response, StnLayer, gate_input_of, gates_of, join, split


class StnLinear(nn.Linear, StnLayer):
    """y = W x + b + (U_w h) * (V x) + (U_b h) * c, with gates of its own for each example."""

    #: How gates start: standard deviation of U.
    gate_std = 0.01

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        num_hparams: int,
        batch_dim: int = 0,
    ) -> None:
        self.num_hparams = num_hparams
        self.batch_dim = batch_dim
        super().__init__(in_features, out_features, bias, device, dtype)
        self.response_weight = nn.Parameter(torch.empty_like(self.weight))
        self.response_bias = nn.Parameter(torch.empty_like(self.bias)) if bias else None
        gates = out_features * (2 if bias else 1)
        self.gate_weight = nn.Parameter(torch.empty(gates, num_hparams, device=device, dtype=dtype))
        self.reset_response()

    def reset_response(self) -> None:
        """Draws V and c as torch draws W and b, and U from a normal distribution of deviation ``gate_std``."""
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0
        nn.init.uniform_(self.response_weight, -bound, bound)
        if self.response_bias is not None:
            nn.init.uniform_(self.response_bias, -bound, bound)
        nn.init.normal_(self.gate_weight, std=self.gate_std)

    def forward(self, input: Tensor, gate_input: Tensor | None = None) -> Tensor:
        """y, [..., out_features], of ``input`` [..., in_features] at ``gate_input`` [M or 1, n]."""
        h, linearized = gate_input_of(gate_input)
        if linearized:
            return self._linearized(input, h)
        if h is None:
            return super().forward(input)
        if len(h) == 1:  # one plain layer serves all examples
            return F.linear(input, *(response.at(h[0]) for response in self.responses()))
        gates = gates_of(h, self.gate_weight)
        stacked = F.linear(input, torch.cat([self.weight, self.response_weight]))
        return stn_gate(stacked, None, gates, self.bias, self.response_bias, batch_dim=self.batch_dim, channel_dim=-1)

    def responses(self) -> Iterator[Response]:
        """The weight, and the bias where there is one."""
        out = self.out_features
        yield Response("weight", self.weight, self.response_weight, self.gate_weight[:out])
        if self.response_bias is not None:
            yield Response("bias", self.bias, self.response_bias, self.gate_weight[out:])

    def _linearized(self, input: Tensor, h: Tensor | None) -> Tensor:
        x, dx = split(input)
        z = F.linear(x, self.weight, self.bias)
        dz = None if dx is None else F.linear(dx, self.weight)
        if h is not None:
            dz = stn_gate(
                torch.zeros_like(z) if dz is None else dz,
                F.linear(x, self.response_weight),
                gates_of(h, self.gate_weight),
                None,
                self.response_bias,
                batch_dim=self.batch_dim,
                channel_dim=-1,
            )
        return z if dz is None else join(z, dz)


class DeltaStnLinear(StnLinear):
    """The same layer about a centre: its gate input is h - h0, its gates start at zero."""

    gate_std = 0.0
