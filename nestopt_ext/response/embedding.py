"""Embeddings whose columns respond to hyperparameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._functions import stn_gate
from ._layer import Response, StnLayer, gate_input_of, gates_of, join, rate_of
from .dropout import mask_of


class StnEmbedding(StnLayer, nn.Embedding):
    r"""A `torch.nn.Embedding` whose columns are an affine function of hyperparameters, for each example their own.

    .. math:: y = E[x] + (U h) \odot E_2[x]

    E is ``weight``; E_2, ``response_weight``, starts as torch's embeddings do; U, ``gate_weight`` [embedding_dim,
    num_hparams], from N(0, 0.01^2). Options of torch's layer hold for both tables, but ``max_norm`` for E alone. The
    row ``padding_idx`` of both starts at zero and gets no gradient. The call takes indices of any shape and
    ``gate_input`` as `StnLinear` does.

    ``word_dropout`` names a hyperparameter of the current sample, a rate: in training mode a call drops words, the same
    row of both tables at all places, and divides what stays by 1 - rate. Each example has a rate of its own: a call
    draws one uniform number for each word, and the examples that keep more than it keep the word. A rate of 1 gives
    zeros, one outside [0, 1] NaN.

    Raises what `StnLinear` raises; with ``word_dropout`` in training mode RuntimeError outside of a sample, KeyError
    where it has no such hyperparameter and ValueError where that is more than one number.

    Reference: MacKay et al., Self-Tuning Networks, ICLR 2019, appendix; words are dropped as in Gal & Ghahramani, A
    theoretically grounded application of dropout in recurrent neural networks, NeurIPS 2016.

    >>> layer = StnEmbedding(2, 1, num_hparams=1)
    >>> with torch.no_grad():
    ...     _ = layer.weight.fill_(1.0), layer.response_weight.fill_(2.0), layer.gate_weight.fill_(0.5)
    >>> layer(torch.tensor([[0, 1], [0, 1]]), torch.tensor([[0.0], [1.0]])).squeeze(-1).tolist()
    [[1.0, 1.0], [2.0, 2.0]]
    """

    #: How gates start: standard deviation of U.
    gate_std = 0.01

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        num_hparams: int,
        batch_dim: int = 0,
        word_dropout: str | None = None,
    ) -> None:
        table = (num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        super().__init__(*table, _weight, _freeze, device, dtype)
        self.set_dimensions(num_hparams, batch_dim)
        self.word_dropout = word_dropout
        self.response_weight = nn.Parameter(torch.empty_like(self.weight))
        self.gate_weight = nn.Parameter(self.weight.new_empty(embedding_dim, num_hparams))
        self.reset_response()

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        super().reset_parameters()
        if hasattr(self, "response_weight"):
            self.reset_response()

    def reset_response(self) -> None:
        """Draws E_2 as torch draws E, and U from a normal distribution of deviation ``gate_std``."""
        nn.init.normal_(self.response_weight)
        if self.padding_idx is not None:
            with torch.no_grad():
                self.response_weight[self.padding_idx].fill_(0)
        nn.init.normal_(self.gate_weight, std=self.gate_std)

    def forward(self, input: Tensor, gate_input: Tensor | None = None) -> Tensor:
        """The embeddings, [*input.shape, embedding_dim]."""
        examples = input.shape[self.batch_dim] if input.dim() > self.batch_dim else None
        h, linearized = gate_input_of(self, gate_input, examples)
        embedded = super().forward(input)
        mask = self._mask(input, examples)
        if mask is not None:
            embedded = embedded * mask
        if h is None:
            return embedded
        response = F.embedding(
            input, self.response_weight, self.padding_idx, None, 2.0, self.scale_grad_by_freq, self.sparse
        )
        if mask is not None:
            response = response * mask
        if linearized:
            return join(embedded, self._gated(None, response, h))
        return self._gated(embedded, response, h)

    def responses(self) -> Iterator[Response]:
        """The table; a gate for each of its columns."""
        yield Response("weight", self.weight, self.response_weight, self.gate_weight, dim=1)

    def extra_repr(self) -> str:
        """The torch layer's, and the number of hyperparameters."""
        return f"{super().extra_repr()}, num_hparams={self.num_hparams}"

    def _gated(self, plain: Tensor | None, response: Tensor, h: Tensor) -> Tensor:
        gates = gates_of(h, self.gate_weight).to(response)
        if len(gates) != 1:
            return stn_gate(plain, response, gates, batch_dim=self.batch_dim)
        return gates[0] * response if plain is None else torch.addcmul(plain, gates[0], response)

    def _mask(self, input: Tensor, examples: int | None) -> Tensor | None:
        """0 where the word of an index is dropped, 1 / (1 - rate) where it stays, [*input.shape, 1]."""
        if self.word_dropout is None or not self.training:
            return None
        rate = rate_of(self, self.word_dropout, examples)
        noise = torch.rand(self.num_embeddings, device=input.device)
        over_examples = [1] * input.dim()
        if examples is not None:
            over_examples[self.batch_dim] = -1
        mask = mask_of(noise[input], rate.to(noise).reshape(over_examples))
        return mask.unsqueeze(-1).to(self.weight.dtype)


class DeltaStnEmbedding(StnEmbedding):
    """`StnEmbedding` about a centre, as `DeltaStnLinear`."""

    gate_std = 0.0
