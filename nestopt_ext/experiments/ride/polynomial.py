r"""A polynomial whose minima are known, and of which descent from the saddle sees only those of the steepest valleys.

.. math:: f(w) = \sum_i \left( \tfrac{1}{4} v_i^4 - \tfrac{1}{2} a_i v_i^2 \right)
          + \tfrac{c}{2} \sum_{i < j} v_i^2 v_j^2, \qquad v = Q^\top w

Q is orthogonal, the :math:`a_i` fall from 1 to 1/2, and c = 8. The origin is a saddle with eigenvalues :math:`-a_i`
along the columns of Q. At :math:`v = \pm \sqrt{a_i} e_i` the eigenvalues are :math:`2 a_i` and :math:`c a_i - a_j > 0`,
so that these 2n points are minima; there are no others, since two variables that are not zero have a Hessian block
of determinant :math:`4 v_i^2 v_j^2 (1 - c^2) < 0`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

COUPLING = 8.0
#: The slowest growth from the saddle, where the fastest is 1.
LEAST = 0.5


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
