"""The identity in place of the inverse."""

from dataclasses import dataclass

from torch import Tensor

from ._arguments import check_alpha
from ._outcome import Outcome
from ._system import System
from .neumann import series


@dataclass(frozen=True)
class Identity:
    r"""Take :math:`\alpha v` for :math:`A^{-1} v`: no product at all.

    With ``alpha`` (a number or 0-dim tensor, finite and > 0, units 1/curvature) the inner learning rate this is one
    step of unrolled differentiation, known as T1-T2 (Luketina et al., Scalable gradient-based tuning, 2016). It equals
    ``Neumann(num_terms=0)`` with the same alpha.

    >>> Identity(alpha=0.1)
    Identity(alpha=0.1)
    """

    alpha: float | Tensor = 1.0

    def __post_init__(self) -> None:
        check_alpha("Identity", self.alpha, auto=False)

    def run(self, system: System) -> Outcome:
        """The product of alpha and the right-hand sides of ``system``."""
        return series(system, num_terms=0, alpha=self.alpha, damping=0.0)
