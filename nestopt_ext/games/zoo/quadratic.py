"""Zero-sum quadratic games: the bilinear game, and the sweep from cooperative to adversarial."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _lists
from ._game import ZooGame, as_tensor


class Bilinear(ZooGame):
    """L_1 = x' M y = -L_2; made by :func:`bilinear`."""

    name = "bilinear"

    def __init__(self, matrix: Tensor, **options: Any) -> None:
        super().__init__([(matrix.shape[0],), (matrix.shape[1],)], **options)
        self.matrix = matrix.to(self.players[0])

    @property
    def solution(self) -> tuple[Tensor, ...]:
        """The origin; the only one where M is square and regular."""
        return (self.matrix.new_zeros(self.matrix.shape[0]), self.matrix.new_zeros(self.matrix.shape[1]))

    def losses(self, players: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The value x' M y for the first player and its negative for the second."""
        x, y = players
        value = ((x @ self.matrix) * y).sum(-1)
        return value, -value

    def jacobian(self) -> Tensor:
        """The constant [[0, M], [-M', 0]]."""
        return _zero_sum_jacobian(None, self.matrix, None)


class Mixed(ZooGame):
    """Between cooperation and competition, coordinate by coordinate; made by :func:`mixed`."""

    name = "mixed"

    def __init__(self, share: Tensor, coupling: Tensor, curvatures: tuple[Tensor, Tensor], **options: Any) -> None:
        size = share.numel()
        super().__init__([(size,), (size,)], **options)
        like = self.players[0]
        self.adversarialness = share.to(like)
        self.coupling = (share[:, None] * coupling).to(like)
        first, second = ((1 - share)[:, None] * c for c in curvatures)
        self.curvatures = (first.to(like), second.to(like))

    @property
    def solution(self) -> tuple[Tensor, ...]:
        """The origin."""
        return (torch.zeros_like(self.adversarialness), torch.zeros_like(self.adversarialness))

    def losses(self, players: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The objective for the first player and its negative for the second."""
        x, y = players
        first, second = self.curvatures
        value = ((x @ self.coupling) * y).sum(-1) + ((x @ first) * x).sum(-1) - ((y @ second) * y).sum(-1)
        return value, -value

    def jacobian(self) -> Tensor:
        """The constant [[S_1 + S_1', G A], [-(G A)', S_2 + S_2']] with S_i = (I - G) B_i."""
        first, second = self.curvatures
        return _zero_sum_jacobian(first + first.T, self.coupling, second + second.T)


def bilinear(
    matrix: Tensor | Sequence[float] | int = 1,
    *,
    start: Sequence[Tensor] | None = None,
    batch: int | None = None,
    generator: torch.Generator | int | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Bilinear:
    r"""The bilinear zero-sum game :math:`\min_x \max_y x^\top M y`, the purest rotation.

    ``matrix`` is M of shape [m, n]; or its singular values, a sequence or 1-D tensor, for a diagonal M; or a size n,
    for the identity. The players are x of shape (m,) and y of shape (n,), and the eigenvalues of the Jacobian are
    :math:`\pm i \sigma` for every singular value of M. The other arguments are those of every game of the zoo.

    >>> game = bilinear([1.0, 0.5])
    >>> game.jacobian()
    tensor([[ 0.0000,  0.0000,  1.0000,  0.0000],
            [ 0.0000,  0.0000,  0.0000,  0.5000],
            [-1.0000, -0.0000,  0.0000,  0.0000],
            [-0.0000, -0.5000,  0.0000,  0.0000]], dtype=torch.float64)
    """
    if isinstance(matrix, int):
        if matrix < 1:
            raise ValueError(f"bilinear: matrix must be a size of at least 1, or values; got {matrix}.")
        matrix = torch.eye(matrix, dtype=torch.float64)
    values = _matrix("bilinear", "matrix", matrix)
    return Bilinear(values, start=start, batch=batch, generator=generator, dtype=dtype, device=device)


def mixed(
    adversarialness: float | Sequence[float] | Tensor,
    *,
    size: int = 1,
    coupling: Tensor | Sequence[float] | None = None,
    curvatures: tuple[Tensor | Sequence[float], Tensor | Sequence[float]] | None = None,
    start: Sequence[Tensor] | None = None,
    batch: int | None = None,
    generator: torch.Generator | int | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Mixed:
    r"""From cooperative to adversarial: :math:`\min_x \max_y x^\top (G A) y + x^\top ((I - G) B_1) x - y^\top ((I - G)
    B_2) y`.

    ``adversarialness`` is the diagonal of G, in [0, 1]: one value for each of n coordinates, or one number for all
    ``size`` of them. At G = 0 each player minimizes a quadratic of its own and the spectrum of the Jacobian is real; at
    G = I the game is bilinear and the spectrum imaginary. ``coupling`` is A and ``curvatures`` (B_1, B_2), of shape
    [n, n] or diagonals of n values; identities where None. With them the eigenvalues are :math:`2 (1 - g) \pm i g` for
    each entry g of G. The other arguments are those of every game of the zoo.

    Source: Lorraine, Acuna, Vicol, Duvenaud, Complex momentum for optimization in games (2022).

    >>> mixed(0.5).jacobian()
    tensor([[ 1.0000,  0.5000],
            [-0.5000,  1.0000]], dtype=torch.float64)
    """
    if isinstance(adversarialness, int | float) and not isinstance(adversarialness, bool):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"mixed: size must be an int of at least 1; got {size!r}.")
        adversarialness = [float(adversarialness)] * size
    share = torch.as_tensor(adversarialness, dtype=torch.float64)
    if share.dim() != 1 or share.numel() == 0:
        shape = _lists.shape_name(share.shape)
        raise ValueError(f"mixed: adversarialness must be a number or a vector; got shape {shape}.")
    if not bool(((share >= 0) & (share <= 1)).all()):
        raise ValueError(f"mixed: adversarialness must be in [0, 1]; got {share.tolist()}.")
    n = share.numel()
    identity = torch.eye(n, dtype=torch.float64)
    matrices = [
        identity if value is None else _matrix("mixed", name, value, size=n)
        for name, value in (
            ("coupling", coupling),
            ("curvatures[0]", None if curvatures is None else curvatures[0]),
            ("curvatures[1]", None if curvatures is None else curvatures[1]),
        )
    ]
    a, first, second = (m.to(share) for m in matrices)
    return Mixed(share, a, (first, second), start=start, batch=batch, generator=generator, dtype=dtype, device=device)


def _matrix(caller: str, name: str, value: Tensor | Sequence[float], *, size: int | None = None) -> Tensor:
    """A matrix in float64; a vector is its diagonal."""
    if not isinstance(value, Tensor | list | tuple):
        raise TypeError(f"{caller}: {name} must be a tensor or a sequence of numbers; got {_lists.value_name(value)}.")
    matrix = as_tensor(value).detach().to(torch.float64)
    if matrix.dim() == 1:
        matrix = torch.diag(matrix)
    wanted = None if size is None else (size, size)
    if matrix.dim() != 2 or matrix.numel() == 0 or (wanted is not None and tuple(matrix.shape) != wanted):
        rule = "be a matrix or a vector of values" if wanted is None else f"have shape {wanted}, or be {size} values"
        raise ValueError(f"{caller}: {name} must {rule}; got shape {_lists.shape_name(matrix.shape)}.")
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"{caller}: {name} must be finite; got NaN or Inf.")
    return matrix


def _zero_sum_jacobian(first: Tensor | None, coupling: Tensor, second: Tensor | None) -> Tensor:
    m, n = coupling.shape
    first = coupling.new_zeros(m, m) if first is None else first
    second = coupling.new_zeros(n, n) if second is None else second
    return torch.cat([torch.cat([first, coupling], 1), torch.cat([-coupling.T, second], 1)], 0)
