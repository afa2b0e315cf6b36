"""Convolutions whose weights respond to hyperparameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._affine import StnAffine

Size = int | tuple[int, ...]


class _StnConv(StnAffine, nn.modules.conv._ConvNd):
    """The constructor and the product of convolutions of any number of dimensions."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: str | Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        num_hparams: int,
        batch_dim: int = 0,
    ) -> None:
        if batch_dim != 0:
            raise ValueError(
                f"{type(self).__name__}: batch_dim must be 0; got {batch_dim}. Move the examples to dimension 0."
            )
        plain = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        super().__init__(*plain, device=device, dtype=dtype)  # type: ignore[arg-type,call-arg]  # of the torch layer
        if groups > 1:
            self.stacked = False  # outputs of a group lie together, and those of V behind those of W would not
        self.add_response(num_hparams, batch_dim)

    def product(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution, with the padding of the layer."""
        out: Tensor = self._conv_forward(input, weight, bias)
        return out


class StnConv1d(_StnConv, nn.Conv1d):
    """A `torch.nn.Conv1d` whose weights respond to hyperparameters; as `StnConv2d`."""

    channel_dim = -2


class StnConv2d(_StnConv, nn.Conv2d):
    r"""A `torch.nn.Conv2d` whose weights are an affine function of hyperparameters, for each example its own.

    .. math:: y = W * x + b + (U_w h) \odot (V * x) + (U_b h) \odot c

    with a gate for each output channel, the same at all places. Parameters, their start and the call are those of
    `StnLinear`; examples lie along dimension 0. All options of torch's layer hold for W and V alike.

    Raises what `StnLinear` raises, and ValueError for another ``batch_dim``.

    Reference: MacKay et al., Self-Tuning Networks, ICLR 2019, section 3.3.

    >>> layer = StnConv2d(1, 1, 1, bias=False, num_hparams=1)
    >>> with torch.no_grad():
    ...     _ = layer.weight.fill_(1.0), layer.response_weight.fill_(2.0), layer.gate_weight.fill_(0.5)
    >>> layer(torch.ones(2, 1, 1, 2), torch.tensor([[0.0], [1.0]])).tolist()
    [[[[1.0, 1.0]]], [[[2.0, 2.0]]]]
    """

    channel_dim = -3


class StnConv3d(_StnConv, nn.Conv3d):
    """A `torch.nn.Conv3d` whose weights respond to hyperparameters; as `StnConv2d`."""

    channel_dim = -4


class DeltaStnConv1d(StnConv1d):
    """`StnConv1d` about a centre, as `DeltaStnLinear`."""

    gate_std = 0.0


class DeltaStnConv2d(StnConv2d):
    """`StnConv2d` about a centre, as `DeltaStnLinear`."""

    gate_std = 0.0


class DeltaStnConv3d(StnConv3d):
    """`StnConv3d` about a centre, as `DeltaStnLinear`."""

    gate_std = 0.0
