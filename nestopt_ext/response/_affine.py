"""What affine layers share: linear ones and convolutions differ in their product alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._functions import stn_gate
from ._layer import Response, StnLayer, gate_input_of, gates_of, join, split


class StnAffine(StnLayer):
    """y = W x + b + (U_w h) * (V x) + (U_b h) * c, where W x is the product of the torch layer that a subclass is too.

    A subclass names that torch layer after this one among its bases, gives `product` and ``channel_dim``, and calls
    `add_response` when the torch layer is made.
    """

    #: How gates start: standard deviation of U.
    gate_std = 0.01
    #: Where the outputs lie that have a gate each, counted from the last dimension.
    channel_dim: int
    #: Whether the products with W and V are one of twice as many outputs. None: where the input is not on a CPU, on
    #: which copying the weights behind each other takes longer than one product instead of two saves.
    stacked: bool | None = None

    weight: Tensor
    bias: Any  # a Parameter or None
    response_weight: nn.Parameter
    response_bias: nn.Parameter | None
    gate_weight: nn.Parameter

    def product(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the plain layer computes with these weights."""
        raise NotImplementedError

    def add_response(self, num_hparams: int, batch_dim: int) -> None:
        """Makes V, c and U for the weights there are."""
        self.set_dimensions(num_hparams, batch_dim)
        self.response_weight = nn.Parameter(torch.empty_like(self.weight))
        self.response_bias = None if self.bias is None else nn.Parameter(torch.empty_like(self.bias))
        gates = len(self.weight) * (1 if self.bias is None else 2)
        self.gate_weight = nn.Parameter(self.weight.new_empty(gates, num_hparams))
        self.reset_response()

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        super().reset_parameters()  # type: ignore[misc]  # of the torch layer
        if hasattr(self, "response_weight"):
            self.reset_response()

    def reset_response(self) -> None:
        """Draws V and c as torch draws W and b, and U from a normal distribution of deviation ``gate_std``."""
        fan_in = math.prod(self.weight.shape[1:])
        bound = 1 / math.sqrt(fan_in) if fan_in else 0
        nn.init.uniform_(self.response_weight, -bound, bound)
        if self.response_bias is not None:
            nn.init.uniform_(self.response_bias, -bound, bound)
        nn.init.normal_(self.gate_weight, std=self.gate_std)

    def forward(self, input: Tensor, gate_input: Tensor | None = None) -> Tensor:
        """The output for ``input`` at ``gate_input``, [n], [1, n] or a row for each example; shapes are torch's."""
        examples = input.shape[self.batch_dim] if input.dim() > self.batch_dim - self.channel_dim else None
        h, linearized = gate_input_of(self, gate_input, examples)
        if linearized:
            return self._linearized(input, h)
        if h is None:
            return self.product(input, self.weight, self.bias)
        if len(h) == 1:  # one plain layer serves all examples
            return self.product(input, *self._parameters_of(lambda response: response.at(h[0])))
        if not input.is_cpu if self.stacked is None else self.stacked:
            plain = self.product(input, torch.cat([self.weight, self.response_weight]), None)
            return self._gated(plain, None, h, self.bias)
        plain = self.product(input, self.weight, None)
        return self._gated(plain, self.product(input, self.response_weight, None), h, self.bias)

    def responses(self) -> Iterator[Response]:
        """The weight, and the bias where there is one."""
        out = len(self.weight)
        yield Response("weight", self.weight, self.response_weight, self.gate_weight[:out])
        if self.response_bias is not None:
            yield Response("bias", self.bias, self.response_bias, self.gate_weight[out:])

    def extra_repr(self) -> str:
        """The torch layer's, and the number of hyperparameters."""
        return f"{super().extra_repr()}, num_hparams={self.num_hparams}"

    def _linearized(self, input: Tensor, h: Tensor | None) -> Tensor:
        x, dx = split(input)
        z = self.product(x, self.weight, self.bias)
        dz = None if dx is None else self.product(dx, self.weight, None)
        if h is not None and len(h) == 1:
            moved = self.product(x, *self._parameters_of(lambda response: response.along(h[0])))
            dz = moved if dz is None else dz + moved
        elif h is not None:
            dz = self._gated(dz, self.product(x, self.response_weight, None), h, None)
        return z if dz is None else join(z, dz)

    def _parameters_of(self, part: Callable[[Response], Tensor]) -> tuple[Tensor, Tensor | None]:
        weight, *bias = map(part, self.responses())
        return weight, bias[0] if bias else None

    def _gated(self, plain: Tensor | None, response: Tensor | None, h: Tensor, bias: Tensor | None) -> Tensor:
        """``plain`` with response and biases, all in the dtype of the products, which autocast may have chosen."""
        like = plain if response is None else response
        gates = gates_of(h, self.gate_weight).to(like)
        biases = (None if b is None else b.to(like) for b in (bias, self.response_bias))
        return stn_gate(plain, response, gates, *biases, batch_dim=self.batch_dim, channel_dim=self.channel_dim)
