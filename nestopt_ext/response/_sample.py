"""Where a response model is asked to answer: a point in hyperparameter space for each example."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Sample:
    """One point of hyperparameter space for each example, or one for all.

    ``gate_input`` [B or 1, n] is what response layers multiply their gate matrix with; None where it is zero, and they
    are plain layers. ``values`` are the hyperparameters in natural units, [B or 1, *shape] each; they carry no graph,
    so that a discrete one is as good as any and the only way from a loss to the hyperparameters leads through the
    gates. ``linearized`` asks for the network's linearization: the gate input is then a tangent. ``hparams`` is whose
    point it is: a StnModel of others, called inside, answers at its own. None: it is for whoever is called.
    ``first_order`` says that the answer is differentiated once at most, and backward: layers may take kernels that
    cannot be differentiated further.
    """

    gate_input: Tensor | None
    values: Mapping[str, Tensor]
    linearized: bool = False
    hparams: nn.Module | None = None
    first_order: bool = False


_current: ContextVar[Sample | None] = ContextVar("nestopt_ext.response.sample", default=None)


def current_sample() -> Sample | None:
    """The sample that layers and regularizers called now are to use; None outside of `using_sample`."""
    return _current.get()


@contextlib.contextmanager
def using_sample(sample: Sample) -> Iterator[Sample]:
    """Makes ``sample`` the one that layers and regularizers use while open; `StnModel.at` makes the usual ones.

    For hyperparameters at values of your own, and response layers outside of a model.

    >>> import torch
    >>> with using_sample(Sample(None, {"rate": torch.tensor([0.5])})):
    ...     current_value("rate", "my penalty")
    tensor([0.5000])
    """
    token = _current.set(sample)
    try:
        yield sample
    finally:
        _current.reset(token)


def current_value(name: str, asked_by: str) -> Tensor:
    """The hyperparameter ``name`` of the current sample in natural units, [B or 1, *shape].

    Raises RuntimeError outside of a sample, and KeyError where it has no such hyperparameter; both name ``asked_by``.
    """
    sample = _current.get()
    if sample is None:
        raise RuntimeError(
            f"{asked_by}: must be called with a sample of the hyperparameters; there is none."
            " Put it into a StnModel and call that, or call it inside `with model.at(...)`."
        )
    if name not in sample.values:
        raise KeyError(f"{asked_by}: hyperparameter must be one of {', '.join(sample.values)}; got {name!r}.")
    return sample.values[name]
