"""Dropout whose rate is a hyperparameter, another one for each example."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ._layer import join, split
from ._sample import current_value


def dropout(
    x: Tensor, rate: Tensor, *, batch_dim: int = 0, unit_dim: int | None = None, shared_dims: Sequence[int] = ()
) -> Tensor:
    """Zeros elements of ``x`` with the probability ``rate`` and divides the others by 1 - rate.

    ``rate`` is [B or 1], one for each index of ``batch_dim`` of ``x`` or one for all, or [B or 1, units], one for each
    index of ``unit_dim`` too. Elements that differ only in ``shared_dims`` are zeroed together. Rates in [0, 1]; rate 1
    gives zeros, and one outside gives NaN (it is not looked at, which would wait for the device). Draws from torch's
    global generator, in float32 at least whatever the dtype of ``x``. Differentiable in ``x``; a tangent of forward
    mode meets the same mask. Returns a new tensor.

    Raises ValueError where the shapes do not fit.

    >>> x = torch.ones(2, 3)
    >>> dropout(x, torch.tensor([0.0, 1.0]))
    tensor([[1., 1., 1.],
            [0., 0., 0.]])
    """
    math_dtype = torch.promote_types(x.dtype, torch.float32)
    rate = _over(x, rate.detach(), batch_dim, unit_dim).to(math_dtype)
    sizes = list(x.shape)
    for dim in shared_dims:
        sizes[dim] = 1
    noise = torch.rand(sizes, device=x.device, dtype=math_dtype)
    mask = mask_of(noise, rate).to(x.dtype)
    primal, tangent = split(x)  # torch's product of both also adds a tangent of the mask, zero, for ten times as long
    return primal * mask if tangent is None else join(primal * mask, tangent * mask)


def mask_of(noise: Tensor, rate: Tensor) -> Tensor:
    """0 where ``noise``, uniform in [0, 1), says to drop, 1 / (1 - rate) elsewhere; NaN for a rate outside [0, 1]."""
    keep = (1 - rate).masked_fill((rate < 0) | (rate > 1), torch.nan)
    return torch.where(noise >= keep, 0.0, 1 / keep)  # of a NaN no comparison holds: it comes out


def _over(x: Tensor, rate: Tensor, batch_dim: int, unit_dim: int | None) -> Tensor:
    """``rate`` in a shape that broadcasts over ``x``."""
    dims = [batch_dim] if unit_dim is None else [batch_dim, unit_dim]
    fits = rate.dim() == len(dims) and max(dims) < x.dim() and min(dims) >= -x.dim()
    sizes = [x.shape[dim] for dim in dims] if fits else []
    fits = fits and rate.shape[0] in (1, sizes[0]) and list(rate.shape[1:]) == sizes[1:]
    if not fits:
        where = f"batch_dim={batch_dim}, unit_dim={unit_dim}"
        remedy = " For one rate for each unit, say which dimension has them: unit_dim." if rate.dim() == 2 else ""
        raise ValueError(
            f"dropout: rate must be one for each example, [B or 1] or [B or 1, units], of x {tuple(x.shape)}"
            f" with {where}; got {tuple(rate.shape)}.{remedy}"
        )
    shape = [1] * x.dim()
    for dim, size in zip(dims, rate.shape, strict=True):
        shape[dim] = size
    return rate.reshape(shape)


class StnDropout(nn.Module):
    """Dropout with the rate that the current sample has for the hyperparameter ``hparam``; identity in eval mode.

    The rate of each example of dimension ``batch_dim`` is its own. An entry of shape (units,) gives each index of
    ``unit_dim`` its own rate too. No graph leads to the rate: a loss reaches the hyperparameter through gates only. In
    a linearized answer primal and tangent have one mask.

    Called in training mode outside of a sample it raises RuntimeError, and KeyError where the sample has no ``hparam``.

    Source: MacKay et al., Self-Tuning Networks (ICLR 2019), section 4; Srivastava et al. (2014), the rate being the
    probability to drop.

    >>> from nestopt_ext.response import HyperParameters, StnModel
    >>> hparams = HyperParameters().add("rate", 0.5, low=0, high=1)
    >>> model = StnModel(StnDropout("rate"), hparams, centred=True)
    >>> sorted(set(model(torch.ones(4, 50)).flatten().tolist()))            # 0, or 1 / (1 - 1/2)
    [0.0, 2.0]
    """

    def __init__(self, hparam: str, *, batch_dim: int = 0, unit_dim: int | None = None) -> None:
        super().__init__()
        self.hparam = hparam
        self.batch_dim = batch_dim
        self.unit_dim = unit_dim

    def forward(self, x: Tensor) -> Tensor:
        """``x`` of any shape with a dimension for examples."""
        if not self.training:
            return x
        rate = current_value(self.hparam, type(self).__name__)
        return dropout(x, rate, batch_dim=self.batch_dim, unit_dim=self.unit_dim)

    def extra_repr(self) -> str:
        """The arguments."""
        units = "" if self.unit_dim is None else f", unit_dim={self.unit_dim}"
        return f"{self.hparam!r}, batch_dim={self.batch_dim}{units}"


class StnChannelDropout(nn.Module):
    """Dropout of whole channels, as torch's Dropout1d, 2d and 3d; else as :class:`StnDropout`.

    The first two dimensions of the input are examples and channels (``batch_dim`` says which is which); every other is
    dropped as a whole.
    """

    def __init__(self, hparam: str, *, batch_dim: int = 0) -> None:
        super().__init__()
        if batch_dim not in (0, 1):
            raise ValueError(f"StnChannelDropout: batch_dim must be 0 or 1; got {batch_dim}.")
        self.hparam = hparam
        self.batch_dim = batch_dim

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [B, C, ...], or [C, B, ...] with ``batch_dim=1``."""
        if not self.training:
            return x
        if x.dim() < 2:
            raise ValueError(f"StnChannelDropout: x must have examples and channels; got shape {tuple(x.shape)}.")
        rate = current_value(self.hparam, type(self).__name__)
        return dropout(x, rate, batch_dim=self.batch_dim, shared_dims=range(2, x.dim()))

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.hparam!r}, batch_dim={self.batch_dim}"


class StnVariationalDropout(nn.Module):
    """Dropout with one mask for all time steps of a sequence; else as :class:`StnDropout`.

    Source: Gal & Ghahramani, A Theoretically Grounded Application of Dropout in Recurrent Neural Networks (NeurIPS
    2016); the locked dropout of Merity et al., AWD-LSTM (ICLR 2018).
    """

    def __init__(self, hparam: str, *, batch_dim: int = 1, time_dim: int = 0) -> None:
        super().__init__()
        if batch_dim == time_dim:
            raise ValueError(f"StnVariationalDropout: time_dim must differ from batch_dim; got {time_dim} for both.")
        self.hparam = hparam
        self.batch_dim = batch_dim
        self.time_dim = time_dim

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [T, B, features], or the order that the two dimensions say."""
        if not self.training:
            return x
        rate = current_value(self.hparam, type(self).__name__)
        return dropout(x, rate, batch_dim=self.batch_dim, shared_dims=(self.time_dim,))

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.hparam!r}, batch_dim={self.batch_dim}, time_dim={self.time_dim}"
