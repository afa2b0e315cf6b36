"""Penalties on activations of recurrent networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ._sample import current_value

_CALLER = "ActivationRegularization"


class ActivationRegularization:
    r"""Regularizer :math:`\alpha_b\,\overline{d_b^2} + \beta_b\,\overline{(\Delta r_b)^2}`, averaged over examples b.

    d are a sequence's activations after dropout, r those before it, :math:`\Delta r` their changes from one time step
    to the next, and bars are means over time steps and units.
    ``alpha`` (activation regularization) and ``beta`` (temporal) name hyperparameters of shape (); None leaves that
    part out. ``select`` takes what the model returned to d, or to a pair (d, r) where they differ; None where the model
    returns d itself. ``batch_dim`` and ``time_dim`` say how d and r lie, time first by default.

    Called inside a sample as ``regularizer(model, outputs)``. Returns a scalar, in float32 at least, with a graph to
    the activations and none to the hyperparameters. With one time step the temporal part is 0.

    Raises ValueError where activations lack these dimensions or coefficients fit none of them.

    Source: Merity et al., Revisiting Activation Regularization for Language RNNs (2017); coefficients tuned by
    MacKay et al. (ICLR 2019), where a batch shares those of its first example. Here each has its own, as its gates are.

    >>> from nestopt_ext.response import HyperParameters, StnModel
    >>> hparams = HyperParameters().add("alpha", 2.0, low=0).add("beta", 1.0, low=0)
    >>> model = StnModel(nn.Identity(), hparams, centred=True)
    >>> d = torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1)
    >>> with model.at_centre():
    ...     penalty = ActivationRegularization("alpha", "beta")(model, model(d))
    >>> f"{penalty.item():.4f}"                                             # 2 * (1 + 4 + 9) / 3 + 1 * (1 + 1) / 2
    '10.3333'
    """

    def __init__(
        self,
        alpha: str | None,
        beta: str | None = None,
        *,
        select: Callable[[Any], Tensor | tuple[Tensor, Tensor]] | None = None,
        batch_dim: int = 1,
        time_dim: int = 0,
    ) -> None:
        if alpha is None and beta is None:
            raise ValueError(f"{_CALLER}: alpha or beta must name a hyperparameter; got None for both.")
        if batch_dim == time_dim:
            raise ValueError(f"{_CALLER}: time_dim must differ from batch_dim; got {time_dim} for both.")
        self.alpha = alpha
        self.beta = beta
        self.select = select
        self.batch_dim = batch_dim
        self.time_dim = time_dim

    def __call__(self, model: nn.Module, outputs: Any) -> Tensor:
        """The penalty of ``outputs``, what the model returned."""
        selected = outputs if self.select is None else self.select(outputs)
        dropped, raw = selected if isinstance(selected, tuple) else (selected, selected)
        terms = []
        if self.alpha is not None:
            terms.append(self._weighted(self.alpha, dropped))
        if self.beta is not None:
            terms.append(self._weighted(self.beta, raw, temporal=True))
        return torch.stack(terms).sum()

    def _weighted(self, hparam: str, activations: Any, *, temporal: bool = False) -> Tensor:
        """The mean over examples of coefficient times mean square."""
        if not isinstance(activations, Tensor):
            raise TypeError(f"{_CALLER}: outputs must be a tensor; got {type(activations).__name__}. Give select.")
        if activations.dim() <= max(self.batch_dim, self.time_dim):
            wanted = f"dimensions {self.time_dim} (time) and {self.batch_dim} (examples)"
            raise ValueError(f"{_CALLER}: activations must have {wanted}; got shape {tuple(activations.shape)}.")
        x = activations.to(torch.promote_types(activations.dtype, torch.float32))
        x = x.movedim((self.batch_dim, self.time_dim), (0, 1))
        if temporal:
            x = x.diff(dim=1)
        squares = x.square().flatten(1)
        per_example = squares.mean(1) if squares.shape[1] else squares.sum(1)
        coefficient = current_value(hparam, _CALLER).detach()
        if coefficient.dim() != 1 or len(coefficient) not in (1, len(x)):
            found = tuple(coefficient.shape)
            raise ValueError(
                f"{_CALLER}: {hparam} must be one number for each of {len(x)} examples; got shape {found}."
            )
        return (coefficient * per_example).mean()
