"""Linear layers whose weights respond to hyperparameters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._affine import StnAffine


class StnLinear(StnAffine, nn.Linear):
    r"""A `torch.nn.Linear` whose weights are an affine function of hyperparameters, for each example its own.

    .. math:: y = W x + b + (U_w h) \odot (V x) + (U_b h) \odot c

    So the weight of an example with gate input h is W + diag(U_w h) V, its bias b + (U_b h) * c. W and b are ``weight``
    and ``bias`` and start as torch's do; V and c, ``response_weight`` and ``response_bias``, are drawn like them; U,
    ``gate_weight`` [2 out_features, num_hparams] (the rows for c left out without a bias), from N(0, 0.01^2).

    The call takes ``input`` [..., in_features] and, where it is not called inside a `StnModel`, ``gate_input``: [n] or
    [1, n] for all examples, or a row for each of those along ``batch_dim`` of the input. Without any gate input the
    layer is the plain one.

    Raises ValueError for a gate input of another shape, and for ``num_hparams`` below 1 or ``batch_dim`` below 0.

    Reference: MacKay et al., Self-Tuning Networks, ICLR 2019, section 3.3 (there W x + b has one more factor, learned
    and 1 at the start, in convolutional networks only; it is left out here).

    >>> layer = StnLinear(2, 1, bias=False, num_hparams=1)
    >>> with torch.no_grad():
    ...     _ = layer.weight.fill_(1.0), layer.response_weight.fill_(2.0), layer.gate_weight.fill_(0.5)
    >>> layer(torch.ones(3, 2), torch.tensor([[0.0], [1.0], [-1.0]])).squeeze(1).tolist()
    [2.0, 4.0, 0.0]
    """

    channel_dim = -1

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
        super().__init__(in_features, out_features, bias, device, dtype)
        self.add_response(num_hparams, batch_dim)

    def product(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """W x + b."""
        return F.linear(input, weight, bias)


class DeltaStnLinear(StnLinear):
    """`StnLinear` about a centre: the gate input is h - h0 and U starts at zero, so that W and b serve at h0.

    Reference: Bae & Grosse, Delta-STN, NeurIPS 2020, section 4.
    """

    gate_std = 0.0
