"""The smallest GAN: one true point, one generated point, a linear discriminator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._game import ZooGame

Scalar = Callable[[Tensor], Tensor]


def _identity(t: Tensor) -> Tensor:
    return t * 1.0


#: f of the objective f(D(fake)) + f(-D(real)) that the discriminator ascends.
_LOSSES: dict[str, Scalar] = {"logistic": F.logsigmoid, "wasserstein": _identity}


class DiracGan(ZooGame):
    """Generator theta against discriminator psi; made by :func:`dirac_gan`."""

    name = "dirac_gan"

    def __init__(self, f: Scalar, saturating: bool, **options: Any) -> None:
        super().__init__([(), ()], **options)
        self._f = f
        self.saturating = saturating

    @property
    def solution(self) -> tuple[Tensor, ...]:
        """The generated point on the true one, the discriminator flat."""
        zero = torch.zeros((), dtype=self.players[0].dtype, device=self.players[0].device)
        return (zero, zero.clone())

    def losses(self, players: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The losses of the generator and of the discriminator."""
        theta, psi = players
        score = psi * theta
        generator = self._f(score) if self.saturating else -self._f(-score)
        return generator, -self._f(score) - self._f(torch.zeros_like(score))

    def jacobian(self) -> Tensor:
        """The matrix at the players, [2, 2] or [B, 2, 2], from the derivatives of f in the score t = psi theta.

        With h the generator's loss as a function of t and d the discriminator's, it is
        [[psi^2 h'', h' + t h''], [d' + t d'', theta^2 d'']].
        """
        theta, psi = (p.detach() for p in self.players)
        t = psi * theta
        first, second = _derivatives(self._f, t)
        minus_first, minus_second = _derivatives(self._f, -t)
        generator = (first, second) if self.saturating else (minus_first, -minus_second)
        discriminator = (-first, -second)
        rows = [
            [psi**2 * generator[1], generator[0] + t * generator[1]],
            [discriminator[0] + t * discriminator[1], theta**2 * discriminator[1]],
        ]
        return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def dirac_gan(
    f: str | Scalar = "logistic",
    *,
    saturating: bool = True,
    start: Sequence[Tensor] | None = None,
    batch: int | None = None,
    generator: torch.Generator | int | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> DiracGan:
    r"""The Dirac GAN: true data at 0, generated data at :math:`\theta`, discriminator :math:`D(x) = \psi x`.

    .. math:: L_\theta = f(\psi \theta) \quad (\text{or } -f(-\psi \theta) \text{ if not saturating}), \qquad
              L_\psi = -f(\psi \theta) - f(0)

    ``f`` is ``"logistic"``, :math:`f(t) = -\log(1 + e^{-t})`; ``"wasserstein"``, :math:`f(t) = t`; or a twice
    differentiable elementwise function on tensors. The players are theta and psi, 0-dim tensors. At the solution (0, 0)
    the eigenvalues of the Jacobian are :math:`\pm i f'(0)`: 0.5i and 1i. The other arguments are those of every game of
    the zoo.

    Source: Mescheder, Geiger, Nowozin, Which training methods for GANs do actually converge? (2018).

    >>> game = dirac_gan(start=(torch.tensor(0.0), torch.tensor(0.0)))
    >>> (2 * game.jacobian()).int()
    tensor([[ 0,  1],
            [-1,  0]], dtype=torch.int32)
    """
    if isinstance(f, str):
        if f not in _LOSSES:
            raise ValueError(f"dirac_gan: f must be one of {sorted(_LOSSES)}, or a function; got {f!r}.")
        f = _LOSSES[f]
    elif not callable(f):
        raise TypeError(f"dirac_gan: f must be a name or a function on tensors; got {f!r}.")
    return DiracGan(f, saturating, start=start, batch=batch, generator=generator, dtype=dtype, device=device)


def _derivatives(f: Scalar, t: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the second derivative of f at t, elementwise."""
    with torch.enable_grad():
        t = t.detach().requires_grad_()
        (first,) = torch.autograd.grad(f(t).sum(), t, create_graph=True)
        if not first.requires_grad:
            return first, torch.zeros_like(t)
        (second,) = torch.autograd.grad(first.sum(), t, allow_unused=True)
    return first.detach(), torch.zeros_like(t) if second is None else second
