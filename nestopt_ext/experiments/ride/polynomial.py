r"""A polynomial whose minima are known, and of which descent from the saddle sees only those of the steepest valleys.

.. math:: f(w) = \sum_i \left( \tfrac{1}{4} v_i^4 - \tfrac{1}{2} a_i v_i^2 \right)
          + \tfrac{c}{2} \sum_{i < j} v_i^2 v_j^2, \qquad v = Q^\top w

Q is orthogonal, the :math:`a_i` fall from 1 to 1/2, and c = 8. The origin is a saddle with eigenvalues :math:`-a_i`
along the columns of Q. At :math:`v = \pm \sqrt{a_i} e_i` the eigenvalues are :math:`2 a_i` and :math:`c a_i - a_j > 0`,
so that these 2n points are minima; there are no others, since two variables that are not zero have a Hessian block
of determinant :math:`4 v_i^2 v_j^2 (1 - c^2) < 0`.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ...games import Archive, EigenRidges, sgd_map
from .config import RideConfig
from .rivals import anywhere, beside_bifurcations
from .study import Rival, Study

COUPLING = 8.0
#: The slowest growth from the saddle, where the fastest is 1.
LEAST = 0.5
_RIDGE_STEPS = 200
#: Of random starts; from farther out descent at this learning rate overflows.
_SPREAD = 0.3
#: How far apart minima are at least, 2 for those of depth 1/4, is more than twice this.
_DISTANCE = 0.05


class Polynomial:
    """The polynomial as a game of one player, who holds w of shape [1, n]; Q is drawn from ``seed``.

    >>> game = Polynomial(2)
    >>> game.losses([game.minima()])[0].tolist()                      # -a_i^2 / 4, at both ends of each valley
    [-0.25, -0.0625, -0.25, -0.0625]
    """

    def __init__(self, dim: int, seed: int = 0) -> None:
        drawn = torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        self.rotation: Tensor = torch.linalg.qr(drawn)[0]
        self.curvatures = torch.linspace(1, LEAST if dim > 1 else 1, dim, dtype=torch.float64)
        #: The saddle, where it is also ridden from.
        self.players = [torch.zeros(1, dim, dtype=torch.float64, requires_grad=True)]

    def losses(self, players: Sequence[Tensor]) -> tuple[Tensor]:
        """F at each of B points, (B,)."""
        squares = (players[0] @ self.rotation).square()
        total = squares.sum(-1)
        pairs = (total.square() - squares.square().sum(-1)) / 2
        wells = (squares.square() / 4 - self.curvatures * squares / 2).sum(-1)
        return (wells + COUPLING / 2 * pairs,)

    def minima(self) -> Tensor:
        """All of them, [2n, n], in the order of their depth on either side."""
        ends = self.curvatures.sqrt()[:, None] * self.rotation.T
        return torch.cat([ends, -ends])


def polynomial_study(config: RideConfig) -> Study:
    """The ride on the polynomial, and the descents that it competes with."""
    c = config
    assert c.dim and c.lr and c.steps and c.step_size and c.noise
    dim, steps, noise = c.dim, c.steps, c.noise
    game = Polynomial(c.dim, c.seed)
    step = sgd_map(game, c.lr)
    method = EigenRidges(step=c.step_size, max_steps=_RIDGE_STEPS, finish=c.lr, finish_steps=c.steps)

    def gradients(archive: Archive) -> int:
        """A Hessian for every step, as many products as variables, though descent at the end needs none."""
        return archive.num_steps * (1 + 2 * dim)

    def equal(archive: Archive) -> int:
        return max(1, gradients(archive) // steps)

    return Study(
        title=f"polynomial of {c.dim} variables, {2 * c.dim} minima",
        problem=game,
        step=step,
        starts=step.start(),
        method=method,
        options={"order": c.order},
        key=lambda states: states,
        distance=_DISTANCE,
        label=partial(_name, game.minima()),
        header=("loss",),
        row=lambda key: [f"{game.losses([key[None]])[0].item():.3f}"],
        gradients=gradients,
        rivals=(
            Rival(
                "noise at the saddle",
                step,
                c.steps,
                lambda archive: beside_bifurcations(step, archive, noise, equal(archive), c.seed + 1),
            ),
            Rival("random starts", step, c.steps, lambda archive: anywhere(step, _SPREAD, equal(archive), c.seed + 2)),
        ),
    )


def _name(minima: Tensor, key: Tensor) -> str:
    """Which valley, the steepest being 1, and on which side."""
    apart = (minima - key).norm(dim=1)
    if float(apart.min()) > _DISTANCE:
        return "saddle" if float(key.norm()) <= _DISTANCE else "none"
    valley, side = int(apart.argmin()) % (len(minima) // 2), int(apart.argmin()) // (len(minima) // 2)
    return f"valley {valley + 1}{'+-'[side]}"
