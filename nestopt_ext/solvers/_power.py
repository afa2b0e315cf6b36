"""An estimate of the largest eigenvalue, for choosing a step without knowing the curvature."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .. import _lists
from .._types import TensorList

#: Enough for a step: the series contracts as long as the estimate is above 0.45 of the true value.
POWER_PRODUCTS = 5

_SEED = 0


def auto_alpha(product: Callable[[TensorList], TensorList], vector: TensorList, damping: float) -> Tensor:
    """0.9 / lambda_max(A + damping I) by power iteration, a 0-dim tensor; 1 where that is not a positive number.

    Starts from ``vector`` plus random numbers of the same norm, since only eigenvectors that ``vector`` contains can
    make its series diverge, and the random part finds the others. The numbers come from a generator of their own.
    ``vector`` is used as work space. Spends ``POWER_PRODUCTS`` products and never waits for the device.
    """
    size = max(_lists.numel(vector), 1) ** 0.5
    _rescale(vector, size, _lists.norm(vector))
    for device, positions in _lists.by_device(vector).items():
        with _seeded(device) as generator:
            for i in positions:
                noise = torch.randn(vector[i].shape, dtype=vector[i].dtype, device=device, generator=generator)
                vector[i].add_(noise)
    _rescale(vector, size, _lists.norm(vector))
    largest = torch.zeros_like(_lists.norm(vector))
    for _ in range(POWER_PRODUCTS):
        for v, av in zip(vector, product(vector), strict=True):
            v.mul_(damping).add_(av)
        length = _lists.norm(vector)
        largest = torch.maximum(largest, length / size)
        _rescale(vector, size, length)
    return usable_step(0.9 / largest)


class _Generators(threading.local):
    """The generators of a thread, one for each device."""

    def __init__(self) -> None:
        self.of: dict[torch.device, torch.Generator] = {}


_generators = _Generators()


@contextmanager
def _seeded(device: torch.device) -> Iterator[torch.Generator]:
    """A generator that stands at its seed, and is put back there, so that it does in a replay of a CUDA graph too.

    While a graph is being captured a generator can neither be made nor seeded.
    """
    generator = _generators.of.get(device)
    if generator is None:
        generator = _generators.of[device] = torch.Generator(device)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    try:
        yield generator if capturing else generator.manual_seed(_SEED)
    finally:
        if not capturing:
            generator.manual_seed(_SEED)


def usable_step(alpha: Tensor) -> Tensor:
    """1 in place of a step that is not a positive number, as where the curvature is zero or NaN."""
    return torch.where(alpha.isfinite() & (alpha > 0), alpha, torch.ones_like(alpha))


def _rescale(vector: TensorList, size: float, length: Tensor) -> None:
    """Gives a vector of that length the root mean square 1, where 16-bit products keep their digits.

    A vector so short that the factor would overflow float32 is left as it is, zero among them.
    """
    tiny = size * torch.finfo(torch.float32).tiny
    factor = torch.where(length > tiny, size / length, torch.ones_like(length))
    for device, positions in _lists.by_device(vector).items():
        local = factor.to(device)
        for i in positions:
            vector[i].mul_(local)
