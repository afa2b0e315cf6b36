r"""What an optimizer does to a game, as a map of states whose iterates, Jacobians and exponents can be studied.

A state is one tensor [B, S], a row for each of B independent starts: the players' parameters one after the other, and
behind them the buffers of the optimizer, if it has any. All players step at once. With :math:`\xi` the simultaneous
gradient:

=================  =====================================================================================
sgd_map            :math:`w - \text{lr} \, \xi(w)`
extragradient_map  :math:`w - \text{lr} \, \xi(w - \text{lr} \, \xi(w))`
momentum_map       :math:`b \leftarrow \beta b + \xi(w)`, then :math:`w \leftarrow w - \text{lr} \, \mathrm{Re} \, b`
lola_map           :math:`w - \text{lr} \, (\xi - \text{lr} \, J_o \xi - \text{lr} \, \chi)`, see ``directions``
=================  =====================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _lists
from ..optim._arguments import check_lr, check_momentum
from ._flat_game import FlatGame
from ._players import Game

#: From flat parameters [B, P] to what to step along, [B, P]; differentiable where asked to.
_Direction = Callable[[FlatGame, Tensor, bool], Tensor]
#: From a game, flat parameters [B, P], the buffers behind them and whether to keep the graph to the next state's parts.
_Update = Callable[[FlatGame, Tensor, Tensor, bool], list[Tensor]]


class OptimizerMap:
    r"""A step of an optimizer on a game, :math:`F : [B, S] \to [B, S]`; see :func:`sgd_map` and its siblings.

    A map is a function: it neither moves the game's players nor keeps anything from call to call. Row b of the result
    depends on row b of the state alone. It is differentiable to every order that the losses are; where the state does
    not require grad, or under ``torch.no_grad()``, the result has no graph. A state of shape (S,) is one start.

    The players may be tensors or modules: parameters are put into a module for the time of a call. If the losses are of
    shape (B,), the game is called with all starts at once; if they are scalars, as those of networks, it is mapped over
    the starts by ``torch.vmap``, which refuses random numbers and in-place updates of buffers, or called as it is for
    one start.

    ``num_parameters`` is P, the parameters of all players in one start; ``state_size`` is S, with the buffers.
    """

    def __init__(self, caller: str, game: Game, update: _Update, *, num_buffers: int = 0) -> None:
        self._caller = caller
        self._flat = FlatGame(caller, game)
        self._update = update
        self.num_parameters = self._flat.size
        self.state_size = (1 + num_buffers) * self._flat.size

    @property
    def game(self) -> Game:
        """The game that is stepped."""
        return self._flat.game

    def start(self, players: Any = None) -> Tensor:
        """The state [B, S] in which the parameters are given and the buffers are zero; a new tensor.

        ``players`` are [B, P] or, for one start, (P,); or in the structure of the game's players; None for where these
        are now.
        """
        if players is None:
            flat = self._flat.current()
        elif isinstance(players, Tensor):
            flat = players.to(self._flat.like)
            flat = flat.unsqueeze(0) if flat.dim() == 1 else flat
            if flat.dim() != 2 or flat.shape[1] != self._flat.size:
                raise ValueError(
                    f"{self._caller}: players must have shape (B, {self._flat.size}) or ({self._flat.size},);"
                    f" got {_lists.shape_name(players.shape)}."
                )
        else:
            flat = self._flat.match("players", players)
        return torch.cat([flat, flat.new_zeros(flat.shape[0], self.state_size - self._flat.size)], dim=1)

    def players(self, state: Tensor) -> Any:
        """The parameters in the structure of the game's players, with leading dimension B where the state has one.

        A module's part is a list of tensors. They are views of the state.
        """
        rows = self._rows(state)
        tensors = self._flat.tensors(rows[:, : self._flat.size])
        return self._flat.pack([t.squeeze(0) for t in tensors] if state.dim() == 1 else tensors)

    def losses(self, state: Tensor) -> tuple[Tensor, ...]:
        """The loss of each player, of shape (B,), or () for a state of shape (S,); with a graph if the state has."""
        rows = self._rows(state)
        losses = self._flat.losses(self._flat.tensors(rows[:, : self._flat.size]))
        return tuple(loss.squeeze(0) if state.dim() == 1 else loss for loss in losses)

    def __call__(self, state: Tensor) -> Tensor:
        """The next state."""
        rows = self._rows(state)
        create_graph = torch.is_grad_enabled() and rows.requires_grad
        parameters, buffers = rows[:, : self._flat.size], rows[:, self._flat.size :]
        parts = self._update(self._flat, parameters, buffers, create_graph)
        following = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        return following.squeeze(0) if state.dim() == 1 else following

    def _rows(self, state: Tensor) -> Tensor:
        if not isinstance(state, Tensor):
            raise TypeError(f"{self._caller}: state must be a tensor; got {_lists.value_name(state)}.")
        if state.dim() not in (1, 2) or state.shape[-1] != self.state_size or state.numel() == 0:
            size = self.state_size
            raise ValueError(
                f"{self._caller}: state must have shape (B, {size}) or ({size},);"
                f" got {_lists.shape_name(state.shape)}. Make one with .start(players)."
            )
        like = self._flat.like
        if state.dtype != like.dtype or state.device != like.device:
            raise TypeError(
                f"{self._caller}: state must be {_lists.dtype_name(like.dtype)} on {like.device}, as the players;"
                f" got {_lists.dtype_name(state.dtype)} on {state.device}. Make one with .start(players)."
            )
        return state if state.dim() == 2 else state.unsqueeze(0)


def sgd_map(game: Game, lr: float | Tensor) -> OptimizerMap:
    r"""Simultaneous gradient descent as a map, :math:`F(w) = w - \text{lr} \, \xi(w)`.

    ``game`` is anything with players and losses, see :class:`~nestopt_ext.games.Game`; ``lr`` >= 0 a number or a tensor
    of one element. Its Jacobian is :math:`I - \text{lr} \, J`, J being that of the game. Costs a gradient for each
    player. Raises TypeError or ValueError for bad arguments.

    >>> from nestopt_ext.games.zoo import bilinear
    >>> step = sgd_map(bilinear(), 0.5)
    >>> step(step.start(torch.tensor([[1.0, 0.0], [0.0, 2.0]])))          # (x - y / 2, y + x / 2), two starts
    tensor([[ 1.0000,  0.5000],
            [-1.0000,  2.0000]], dtype=torch.float64)
    """
    return _descent("sgd_map", game, lr, _simultaneous)


def extragradient_map(game: Game, lr: float | Tensor) -> OptimizerMap:
    r"""Extragradient as a map, :math:`F(w) = w - \text{lr} \, \xi(w - \text{lr} \, \xi(w))`: two gradients a step.

    The arguments are those of :func:`sgd_map`; the step is that of :class:`~nestopt_ext.ExtraSGD`. Source: Korpelevich,
    The extragradient method for finding saddle points (1976).

    >>> from nestopt_ext.games.zoo import bilinear
    >>> step = extragradient_map(bilinear(), 0.5)
    >>> step(step.start(torch.tensor([1.0, 0.0])))                         # (x, y) / 4 less, and turned
    tensor([[0.7500, 0.5000]], dtype=torch.float64)
    """
    lr = _checked_lr("extragradient_map", lr)

    def ahead(flat: FlatGame, parameters: Tensor, create_graph: bool) -> Tensor:
        first = parameters - lr * _simultaneous(flat, parameters, create_graph)
        return _simultaneous(flat, first, create_graph)

    return _descent("extragradient_map", game, lr, ahead)


def lola_map(game: Game, lr: float | Tensor) -> OptimizerMap:
    r"""LOLA as a map, :math:`F(w) = w - \text{lr} \, (\xi - \text{lr} \, J_o \xi - \text{lr} \, \chi)`.

    Player i descends :math:`L_i - \text{lr} \sum_{j \ne i} \langle \nabla_{w_j} L_i, \nabla_{w_j} L_j \rangle`, its
    loss where the others will be after a step, to first order; the step is that of :func:`~nestopt_ext.games.lola` with
    the same ``lr`` for both. The arguments are those of :func:`sgd_map`. Source: Foerster et al., Learning with
    opponent-learning awareness (2018), in the form of Letcher et al. (2019).

    >>> from nestopt_ext.games.zoo import bilinear
    >>> step = lola_map(bilinear(), 0.5)
    >>> step(step.start(torch.tensor([2.0, 3.0])))              # less (y + x, -x + y) / 2
    tensor([[-0.5000,  2.5000]], dtype=torch.float64)
    """
    lr = _checked_lr("lola_map", lr)

    def shaping(flat: FlatGame, parameters: Tensor, create_graph: bool) -> Tensor:
        with torch.enable_grad():
            tensors = flat.leaves(parameters)
            losses = flat.losses(tensors)
            grads = [flat.derivatives(f"losses[{i}]", v, tensors, create_graph=True) for i, v in enumerate(losses)]
            foreseen = [
                loss - lr * sum(_dot(grads[i][own], grads[j][own]) for j, own in enumerate(flat.slices) if j != i)
                for i, loss in enumerate(losses)
            ]
            return flat.own_gradients(foreseen, tensors, create_graph=create_graph)

    return _descent("lola_map", game, lr, shaping)


def momentum_map(game: Game, lr: float | Tensor, momentum: complex) -> OptimizerMap:
    r"""Gradient descent with momentum as a map of parameters and buffers.

    :math:`b' = \beta b + \xi(w)`, :math:`w' = w - \text{lr} \, \mathrm{Re} \, b'`: the steps of
    :class:`~nestopt_ext.ComplexSGD`, whose buffers begin at zero. For a real ``momentum`` the state is [w, b], S = 2 P;
    for a complex one [w, Re b, Im b], S = 3 P. The modulus is below 1. The other arguments are those of
    :func:`sgd_map`. Source: Lorraine, Acuna, Vicol, Duvenaud, Complex momentum for optimization in games (2022).

    >>> from nestopt_ext.games.zoo import bilinear
    >>> step = momentum_map(bilinear(), 0.5, 0.5)
    >>> step(step(step.start(torch.tensor([1.0, 0.0]))))
    tensor([[ 0.7500,  1.2500,  0.5000, -1.5000]], dtype=torch.float64)
    """
    caller = "momentum_map"
    lr = _checked_lr(caller, lr)
    check_momentum(caller, "momentum", momentum)
    beta = complex(momentum)
    turning = isinstance(momentum, complex)

    def update(flat: FlatGame, parameters: Tensor, buffers: Tensor, create_graph: bool) -> list[Tensor]:
        gradient = _simultaneous(flat, parameters, create_graph)
        if not turning:
            buffer = beta.real * buffers + gradient
            return [parameters - lr * buffer, buffer]
        real, imaginary = torch.split(buffers, flat.size, dim=1)
        turned = beta.real * real - beta.imag * imaginary + gradient
        return [parameters - lr * turned, turned, beta.real * imaginary + beta.imag * real]

    return OptimizerMap(caller, game, update, num_buffers=2 if turning else 1)


def _checked_lr(caller: str, lr: float | Tensor) -> float | Tensor:
    """The learning rate, a tensor as one of 0 dimensions, which leaves the dtype of a state as it is."""
    check_lr(caller, lr)
    return lr.reshape(()) if isinstance(lr, Tensor) else lr


def _descent(caller: str, game: Game, lr: float | Tensor, direction: _Direction) -> OptimizerMap:
    lr = _checked_lr(caller, lr)

    def update(flat: FlatGame, parameters: Tensor, buffers: Tensor, create_graph: bool) -> list[Tensor]:
        return [parameters - lr * direction(flat, parameters, create_graph)]

    return OptimizerMap(caller, game, update)


def _simultaneous(flat: FlatGame, parameters: Tensor, create_graph: bool) -> Tensor:
    return flat.gradients(parameters, create_graph=create_graph)


def _dot(first: list[Tensor], second: list[Tensor]) -> Any:
    """The inner product of two lists for each start, (B,), with its graph."""
    return sum((a * b).reshape(a.shape[0], -1).sum(1) for a, b in zip(first, second, strict=True))
