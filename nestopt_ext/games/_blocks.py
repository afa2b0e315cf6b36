"""The gradient of every loss in every player, kept with its graph: its derivatives are the blocks of the Jacobian.

With L_i the loss and w_i the tensors of player i, block (i, j) of the Jacobian is d2 L_i / dw_i dw_j. A vector here is
a flat list like the players' tensors. Second derivatives are symmetric, so a product with row i differentiates
<grad L_i, v> in w_i, and no product needs more than one backward pass for each player.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._types import TensorList
from ..curvature._gradient import _refuse_error_nodes, named_faults, refuse_wrong_nodes
from ._players import Player, Players, check_losses


def own_gradient(
    caller: str, loss: Tensor, players: Players, player: int, *, create_graph: bool = False
) -> list[Tensor | None]:
    """The gradient of one player's loss in its own tensors; None for a tensor that the loss does not use."""
    return _gradient(caller, loss, players, player, players.tensors[players.slices[player]], create_graph=create_graph)


class Blocks:
    """All first gradients of one set of losses, and the products with their derivatives.

    ``batch`` is the number of starts, None for scalar losses; ``xi`` the gradient of each player's loss in the player.
    """

    def __init__(self, caller: str, losses: Sequence[Tensor], players: Sequence[Player]) -> None:
        self.players = Players(caller, players)
        self.batch = check_losses(caller, losses, self.players)
        self._caller = caller
        self._grads = [
            _gradient(caller, loss, self.players, i, self.players.tensors, create_graph=True)
            for i, loss in enumerate(losses)
        ]
        self._own = [self._grads[i][k] for i, own in enumerate(self.players.slices) for k in range(own.start, own.stop)]
        self.xi = owned(self._own, self.players.tensors)

    def product(self, v: TensorList) -> TensorList:
        """J v."""
        return self._rows([(grads, v) for grads in self._grads])

    def transposed(self, u: TensorList) -> TensorList:
        """J' u, in one backward pass."""
        return self._pull(self._own, u, self.players.tensors)

    def off_diagonal(self, v: TensorList) -> TensorList:
        """J_o v, J_o being J without its diagonal blocks."""
        return self._rows([(self._others(i, grads), v) for i, grads in enumerate(self._grads)])

    def off_diagonal_transposed(self, u: TensorList) -> TensorList:
        """J_o' u."""
        return self._rows([(self._others(i, self._own), u) for i in range(len(self.players))])

    def shaping(self) -> TensorList:
        """Part i is sum_{j != i} (d2 L_j / dw_i dw_j) dL_i/dw_j: how player i's loss feels that it moves the others."""
        return self._rows([(self._others(i, self._own), grads) for i, grads in enumerate(self._grads)])

    def _others(self, player: int, grads: list[Tensor | None]) -> list[Tensor | None]:
        """The gradients with those in the player's own tensors left out."""
        own = self.players.slices[player]
        return [None if own.start <= k < own.stop else g for k, g in enumerate(grads)]

    def _rows(self, pairs: list[tuple[list[Tensor | None], Sequence[Tensor | None]]]) -> TensorList:
        """For each player the derivative of <gradients, cotangents> in its own tensors."""
        rows: TensorList = []
        for own, (grads, cotangents) in zip(self.players.slices, pairs, strict=True):
            rows += self._pull(grads, cotangents, self.players.tensors[own])
        return rows

    def _pull(self, grads: list[Tensor | None], cotangents: Sequence[Tensor | None], inputs: TensorList) -> TensorList:
        """The derivative of <gradients, cotangents> in ``inputs``; None in either stands for zeros."""
        live = [(g, c.detach()) for g, c in zip(grads, cotangents, strict=True) if g is not None and c is not None]
        found: Sequence[Tensor | None] = [None] * len(inputs)
        if live:
            outputs, seeds = zip(*live, strict=True)
            with named_faults(self._caller, "losses"):
                found = torch.autograd.grad(outputs, inputs, seeds, retain_graph=True, allow_unused=True)
        return owned(found, inputs, apart_from=[c for _, c in live])


def owned(found: Sequence[Tensor | None], like: Sequence[Tensor], *, apart_from: Sequence[Tensor] = ()) -> TensorList:
    """What autograd found as tensors without graph in memory of their own, zeros for None.

    Autograd may hand out one tensor twice, an expanded scalar, or the cotangent it was given.
    """
    taken = {t.untyped_storage().data_ptr() for t in (*apart_from, *like)}
    result: TensorList = []
    for tensor, other in zip(found, like, strict=True):
        if tensor is None:
            result.append(torch.zeros_like(other))
            continue
        plain = tensor.detach()
        address = plain.untyped_storage().data_ptr()
        if address in taken or torch._debug_has_internal_overlap(plain) != 0:
            plain = plain.clone(memory_format=torch.contiguous_format)
        taken.add(address)
        result.append(plain)
    return result


def _gradient(
    caller: str, loss: Tensor, players: Players, player: int, inputs: TensorList, *, create_graph: bool
) -> list[Tensor | None]:
    """The gradient of ``loss`` in ``inputs``, among which are the player's own tensors; the graph is retained."""
    name = f"losses[{player}]"
    # With create_graph, a seed that requires grad makes every once_differentiable function leave its error node.
    seed = torch.ones_like(loss, requires_grad=create_graph)
    with torch.enable_grad(), named_faults(caller, name):
        found: list[Tensor | None] = [
            *torch.autograd.grad(loss, inputs, seed, retain_graph=True, create_graph=create_graph, allow_unused=True)
        ]
        if create_graph:
            _refuse_error_nodes([g for g in found if g is not None])
            refuse_wrong_nodes(loss, inputs)
    own = {id(t) for t in players.tensors[players.slices[player]]}
    if all(g is None for g, t in zip(found, inputs, strict=True) if id(t) in own):
        raise ValueError(
            f"{caller}: {name} must depend on players[{player}]; got a graph that none of its {len(own)} tensors is in."
            " Compute the losses from these very tensors, in the order of the players."
        )
    return found
