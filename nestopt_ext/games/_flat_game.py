"""A game as functions of one flat vector for each start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _lists
from .._types import TensorList
from ..curvature._gradient import named_faults
from ._blocks import own_gradient
from ._players import Game, Players, check_losses, widest


class FlatGame:
    """The losses and gradients of a game at flat vectors [B, P], in the order of the players and their tensors.

    A game of independent starts is called with all of them; one whose losses are scalars is mapped over the starts.
    """

    def __init__(self, caller: str, game: Game) -> None:
        if not hasattr(game, "players") or not callable(getattr(game, "losses", None)):
            raise TypeError(f"{caller}: game must have players and losses(players); got {_lists.value_name(game)}.")
        self.caller = caller
        self.game = game
        self._players = Players(caller, game.players)
        with torch.enable_grad():
            losses = game.losses(game.players)
        batch = check_losses(caller, losses, self._players)
        for i, loss in enumerate(losses):
            own_gradient(caller, loss, self._players, i)
        self._takes_starts = batch is not None
        tensors = self._players.tensors
        self._shapes = [t.shape[1:] if self._takes_starts else t.shape for t in tensors]
        self._counts = [shape.numel() for shape in self._shapes]
        self.size = sum(self._counts)
        self.like = torch.empty(0, dtype=widest(tensors), device=tensors[0].device)

    def __len__(self) -> int:
        """The number of players."""
        return len(self._players)

    @property
    def slices(self) -> list[slice]:
        """Which of the tensors are those of each player."""
        return self._players.slices

    def current(self) -> Tensor:
        """Where the game's own players are, [B, P]; one row where its losses are scalars."""
        return self.flatten([t.detach() for t in self._players.tensors], starts=self._takes_starts)

    def match(self, name: str, value: Any) -> Tensor:
        """Players in the structure of the game's, with its number of starts, as flat vectors."""
        return self.flatten(self._players.match(self.caller, name, value), starts=self._takes_starts)

    def flatten(self, tensors: Sequence[Tensor], *, starts: bool = True) -> Tensor:
        """Tensors with a leading dimension B, or without one, as [B, P] or [1, P]."""
        rows = [t.to(self.like).reshape(t.shape[0] if starts else 1, -1) for t in tensors]
        return torch.cat(rows, dim=1)

    def tensors(self, flat: Tensor) -> TensorList:
        """The players' tensors with leading dimension B, views of ``flat`` where it has their dtype."""
        parts = torch.split(flat, self._counts, dim=1)
        triples = zip(parts, self._shapes, self._players.tensors, strict=True)
        return [part.reshape(flat.shape[0], *shape).to(like) for part, shape, like in triples]

    def pack(self, tensors: Sequence[Tensor]) -> Any:
        """Tensors in the structure of the players; a module's part is a list."""
        return self._players.pack(tensors)

    def losses(self, tensors: Sequence[Tensor]) -> TensorList:
        """The losses of all players, of shape (B,) each."""
        batch = tensors[0].shape[0]
        if self._takes_starts:
            losses = self._call(*tensors)
        elif batch == 1:
            losses = tuple(loss.unsqueeze(0) for loss in self._call(*[t.squeeze(0) for t in tensors]))
        else:
            losses = self._mapped(tensors, batch)
        if len(losses) != len(self) or any(loss.shape != (batch,) for loss in losses):
            shapes = ", ".join(_lists.shape_name(loss.shape) for loss in losses)
            raise ValueError(
                f"{self.caller}: game.losses must return {len(self)} losses of shape ({batch},) for {batch} starts;"
                f" got {shapes}. A game whose number of starts is fixed takes states of that many rows."
            )
        return list(losses)

    def gradients(self, flat: Tensor, *, create_graph: bool) -> Tensor:
        """The simultaneous gradient at flat vectors, [B, P]."""
        with torch.enable_grad():
            tensors = self.leaves(flat)
            return self.own_gradients(self.losses(tensors), tensors, create_graph=create_graph)

    def leaves(self, flat: Tensor) -> TensorList:
        """:meth:`tensors` that require grad: those of a flat vector that does keep its graph."""
        if not flat.requires_grad:
            flat = flat.detach().requires_grad_()
        return self.tensors(flat)

    def own_gradients(self, losses: Sequence[Tensor], tensors: TensorList, *, create_graph: bool) -> Tensor:
        """The gradient of every player's loss in its own tensors, side by side, [B, P]; the graph is retained."""
        found: TensorList = []
        for i, (loss, own) in enumerate(zip(losses, self.slices, strict=True)):
            found += self.derivatives(f"losses[{i}]", loss, tensors[own], create_graph=create_graph)
        return self.flatten(found)

    def derivatives(self, name: str, loss: Tensor, inputs: TensorList, *, create_graph: bool) -> TensorList:
        """The gradient of one loss of shape (B,) in some tensors, zeros where it does not use them."""
        with named_faults(self.caller, name):
            return [
                *torch.autograd.grad(
                    loss,
                    inputs,
                    torch.ones_like(loss),
                    retain_graph=True,
                    create_graph=create_graph,
                    materialize_grads=True,
                )
            ]

    def _mapped(self, tensors: Sequence[Tensor], batch: int) -> tuple[Tensor, ...]:
        try:
            found: tuple[Tensor, ...] = torch.func.vmap(self._call)(*tensors)
        except RuntimeError as error:
            if "vmap" not in str(error):  # what the game itself raises
                raise
            raise RuntimeError(
                f"{self.caller}: game.losses must be a function of the players alone, to be mapped over {batch} starts"
                " by torch.vmap; got one that is not, as the error above says. Draw random numbers once, outside of it,"
                f" use no dropout and batch norm in eval mode, or return losses of shape ({batch},)."
            ) from error
        return found

    def _call(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._players.call(self.game.losses, tensors))
