"""DropConnect: dropout of weights."""

from __future__ import annotations

import torch
from torch import Tensor

from .dropout import dropout


def dropped_weight(*weights: Tensor, p: Tensor) -> tuple[Tensor, ...]:
    """Zeros the same elements, each with probability p, in all ``weights`` (of one shape); divides the rest by 1 - p.

    A response layer gives its centre and its direction, so that the weight of each example has one mask. ``p`` holds
    rates in [0, 1], a number or one for each example: a mask serves the whole batch, so the first counts. One outside
    gives NaN. Differentiable in the weights. Returns new tensors.

    Source: Wan et al., Regularization of Neural Networks using DropConnect (ICML 2013), scaled as dropout is; MacKay et
    al., Self-Tuning Networks (ICLR 2019), for the LSTM's hidden weights.

    Raises ValueError where shapes differ.

    >>> w, v = dropped_weight(torch.ones(2, 8), 2 * torch.ones(2, 8), p=torch.tensor(0.5))
    >>> torch.equal(2 * w, v), sorted(set(w.flatten().tolist()))
    (True, [0.0, 2.0])
    """
    for i, weight in enumerate(weights):
        if weight.shape != weights[0].shape:
            found, wanted = tuple(weight.shape), tuple(weights[0].shape)
            raise ValueError(f"dropped_weight: weights[{i}] must have the shape of weights[0] {wanted}; got {found}.")
    mask = dropout(torch.ones_like(weights[0]), p.reshape(-1)[:1])
    return tuple(weight * mask for weight in weights)
