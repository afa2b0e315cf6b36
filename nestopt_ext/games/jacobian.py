"""The simultaneous gradient of a game, and its Jacobian as an operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._types import TensorList
from ._blocks import Blocks, own_gradient, owned
from ._players import Player, Players, check_losses, widest


def gradients(losses: Sequence[Tensor], players: Sequence[Player], *, create_graph: bool = False) -> Any:
    r"""The simultaneous gradient :math:`\xi = (\nabla_{w_1} L_1, \dots, \nabla_{w_n} L_n)`, each player's own.

    ``losses`` has one loss with a graph for each player, scalars, or tensors of shape (B,) for B independent starts
    (every player tensor then has leading dimension B). A player is a Tensor, a list, tuple or dict of tensors, or a
    module, which stands for its parameters that require grad.

    Returns tensors in the structure of ``players``, a list in ``parameters()`` order for a module; without graph unless
    ``create_graph``. A tensor that its player's loss does not use gets zeros; a loss that uses none of its player's
    tensors is an error. Nothing is written to ``.grad``, and the graphs of the losses are retained.

    Raises TypeError or ValueError for bad arguments, and RuntimeError, with the way out, where a graph was freed or
    changed in place or, with ``create_graph``, PyTorch has no second derivative.

    >>> x = torch.tensor(2.0, requires_grad=True)
    >>> y = torch.tensor(3.0, requires_grad=True)
    >>> gradients([x * y, -x * y], [x, y])            # (y, -x)
    [tensor(3.), tensor(-2.)]
    """
    caller = "gradients"
    parties = Players(caller, players)
    check_losses(caller, losses, parties)
    found: list[Tensor | None] = []
    for i, loss in enumerate(losses):
        found += own_gradient(caller, loss, parties, i, create_graph=create_graph)
    if not create_graph:
        return parties.pack(owned(found, parties.tensors))
    return parties.pack([torch.zeros_like(t) if g is None else g for g, t in zip(found, parties.tensors, strict=True)])


def game_jacobian(losses: Sequence[Tensor], players: Sequence[Player]) -> GameJacobian:
    r"""The Jacobian :math:`J = d\xi/dw` of the simultaneous gradient, an operator on tensors like the players.

    The same as ``GameJacobian(losses, players)``; see there. Losses are to be computed without ``.detach()``: what was
    detached has a zero block.

    >>> x = torch.tensor(2.0, requires_grad=True)
    >>> y = torch.tensor(3.0, requires_grad=True)
    >>> game_jacobian([x * y, x * y**2], [x, y]).dense()           # [[0, 1], [2y, 2x]]
    tensor([[0., 1.],
            [6., 4.]])
    """
    return GameJacobian(losses, players)


class GameJacobian:
    r"""The Jacobian of a game, :math:`J_{ij} = \partial^2 L_i / \partial w_i \, \partial w_j`; not symmetric.

    ``losses`` and ``players`` are as in :func:`gradients`. Every loss is differentiated once in all players, when the
    operator is made, and that graph is kept as long as the operator lives; it is never formed, except by
    :meth:`dense`. For B starts it is B independent Jacobians, and products are taken start by start. Products are new
    tensors without graph, in the structure of ``players``; nothing is written to ``.grad``.

    A block is zero where a loss does not use a player. That includes a player that was detached on its way into
    another's loss, as GAN code does to save time: for a Jacobian, compute the losses without ``.detach()``.

    ``batch_size`` is B, or None for scalar losses; ``sizes`` the number of elements of each player in one start.

    Raises TypeError or ValueError for bad arguments, and RuntimeError, with the way out, where PyTorch has no second
    derivative.

    The products are Pearlmutter's (Fast exact multiplication by the Hessian, 1994), row by row.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> y = torch.tensor(3.0, requires_grad=True)
    >>> jacobian = GameJacobian([x[0] * x[1] * y, x.sum() * y**2], [x, y])
    >>> jacobian.dense()               # L_1: [0, y, x1], [y, 0, x0];  L_2: [2y, 2y, 2(x0 + x1)]
    tensor([[0., 3., 2.],
            [3., 0., 1.],
            [6., 6., 6.]])
    >>> v = [torch.tensor([1.0, 0.0]), torch.tensor(1.0)]
    >>> jacobian(v)
    [tensor([2., 4.]), tensor(12.)]
    >>> jacobian.transpose(v)
    [tensor([6., 9.]), tensor(8.)]
    >>> jacobian.off_diagonal(v)
    [tensor([2., 1.]), tensor(6.)]
    """

    def __init__(self, losses: Sequence[Tensor], players: Sequence[Player]) -> None:
        self._blocks = Blocks("GameJacobian", losses, players)
        self._players = self._blocks.players
        self.batch_size = self._blocks.batch
        self.sizes = tuple(
            sum(t.numel() // (self.batch_size or 1) for t in self._players.tensors[own]) for own in self._players.slices
        )

    @property
    def gradients(self) -> Any:
        """The simultaneous gradient at the point where the Jacobian is taken; new tensors without graph."""
        return self._players.pack([t.clone() for t in self._blocks.xi])

    def __call__(self, v: Any) -> Any:
        """J v; costs one backward pass for each player."""
        return self._players.pack(self._blocks.product(self._match("v", v)))

    def transpose(self, u: Any) -> Any:
        """J' u; costs one backward pass."""
        return self._players.pack(self._blocks.transposed(self._match("u", u)))

    def off_diagonal(self, v: Any) -> Any:
        """The product with J less its diagonal blocks, that is with the blocks i != j alone."""
        return self._players.pack(self._blocks.off_diagonal(self._match("v", v)))

    def dense(self) -> Tensor:
        """The matrix, [P, P] with P = ``sum(sizes)``, or [B, P, P] for B starts; costs P backward passes.

        Rows and columns are in the order of the players, their tensors and the elements of these. It is of the widest
        dtype among the players' and on the device of the first.
        """
        size = sum(self.sizes)
        shape = () if self.batch_size is None else (self.batch_size,)
        like = self._players.tensors[0]
        unit = torch.zeros(*shape, size, dtype=self._dtype, device=like.device)
        rows = []
        for k in range(size):
            unit[..., k] = 1
            rows.append(self._flat(self._blocks.transposed(self._lists(unit))))
            unit[..., k] = 0
        return torch.stack(rows, dim=-2) if rows else unit.new_zeros(*shape, 0, 0)

    def flatten(self, v: Any) -> Tensor:
        """Tensors in the structure of the players as one vector, [P] or [B, P], in the order of :meth:`dense`."""
        return self._flat(self._match("v", v))

    def unflatten(self, vector: Tensor) -> Any:
        """The inverse of :meth:`flatten`."""
        size = sum(self.sizes)
        shape = (size,) if self.batch_size is None else (self.batch_size, size)
        if not isinstance(vector, Tensor) or tuple(vector.shape) != shape:
            got = tuple(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
            raise ValueError(f"GameJacobian: vector must be a tensor of shape {shape}; got {got}.")
        return self._players.pack(self._lists(vector))

    @property
    def _dtype(self) -> torch.dtype:
        dtypes = {t.dtype for t in self._players.tensors}
        return dtypes.pop() if len(dtypes) == 1 else widest(self._players.tensors)

    def _match(self, name: str, value: Any) -> TensorList:
        return self._players.match("GameJacobian", name, value)

    def _flat(self, tensors: TensorList) -> Tensor:
        like = torch.empty(0, dtype=self._dtype, device=self._players.tensors[0].device)
        shape = (-1,) if self.batch_size is None else (self.batch_size, -1)
        return torch.cat([t.to(like).reshape(shape) for t in tensors], dim=-1)

    def _lists(self, vector: Tensor) -> TensorList:
        """The vector cut into tensors like the players', in memory of their own."""
        counts = [t.numel() // (self.batch_size or 1) for t in self._players.tensors]
        parts = torch.split(vector.detach(), counts, dim=-1)
        return [part.reshape(t.shape).to(t).clone() for part, t in zip(parts, self._players.tensors, strict=True)]
