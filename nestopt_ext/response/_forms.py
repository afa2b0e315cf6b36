"""Which plain layer has which response layer: what conversion and export go by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ._layer import StnLayer
from .conv import DeltaStnConv1d, DeltaStnConv2d, DeltaStnConv3d, StnConv1d, StnConv2d, StnConv3d
from .dropout import StnChannelDropout, StnDropout
from .embedding import DeltaStnEmbedding, StnEmbedding
from .linear import DeltaStnLinear, StnLinear
from .lstm import DeltaStnLSTM, StnLSTM


@dataclass(frozen=True)
class Form:
    """A kind of layer, plain and responding, and what its constructors are told."""

    stn: Callable[..., StnLayer]
    delta: Callable[..., StnLayer]
    options: tuple[str, ...]
    #: The dimension of the examples, given the one that holds for the model.
    batch_dim: Callable[[nn.Module, int], int]

    def arguments(self, layer: nn.Module) -> dict[str, Any]:
        """Constructor arguments that make another plain layer like ``layer``, on its device and of its dtype."""
        weight = next(layer.parameters(recurse=False))
        found = {option: getattr(layer, option) for option in self.options}
        if hasattr(layer, "bias"):  # a flag of an LSTM, a parameter or None of others
            found["bias"] = layer.bias if isinstance(layer.bias, bool) else layer.bias is not None
        return {**found, "device": weight.device, "dtype": weight.dtype}


def _as_told(layer: nn.Module, batch_dim: int) -> int:
    return batch_dim


def _first(layer: nn.Module, batch_dim: int) -> int:
    return 0


def _of_sequences(layer: nn.Module, batch_dim: int) -> int:
    return 0 if layer.batch_first else 1


_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_EMBEDDING = (
    "num_embeddings",
    "embedding_dim",
    "padding_idx",
    "max_norm",
    "norm_type",
    "scale_grad_by_freq",
    "sparse",
)
_LSTM = ("input_size", "hidden_size", "num_layers", "batch_first", "dropout", "bidirectional", "proj_size")

#: By the exact type of the plain layer. Of layers with a common parameter the first in this order responds.
FORMS: dict[type[nn.Module], Form] = {
    nn.Embedding: Form(StnEmbedding, DeltaStnEmbedding, _EMBEDDING, _as_told),
    nn.Linear: Form(StnLinear, DeltaStnLinear, ("in_features", "out_features"), _as_told),
    nn.Conv1d: Form(StnConv1d, DeltaStnConv1d, _CONV, _first),
    nn.Conv2d: Form(StnConv2d, DeltaStnConv2d, _CONV, _first),
    nn.Conv3d: Form(StnConv3d, DeltaStnConv3d, _CONV, _first),
    nn.LSTM: Form(StnLSTM, DeltaStnLSTM, _LSTM, _of_sequences),
}

#: By the exact type of the plain dropout.
DROPOUTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Dropout: StnDropout,
    nn.Dropout1d: StnChannelDropout,
    nn.Dropout2d: StnChannelDropout,
    nn.Dropout3d: StnChannelDropout,
}

#: Where a tuned dropout keeps the plain type that it was made of.
PLAIN_TYPE = "plain_type"
