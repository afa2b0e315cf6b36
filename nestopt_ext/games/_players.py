"""Who plays: the players of a game as one flat list of tensors, their losses, and inner products start by start.

A loss of shape (B,) stands for B independent starts: every player tensor then has leading dimension B, entry b of a
loss depends on entry b of the players alone, and inner products are taken per start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn

from .. import _lists
from .._reference import opmath
from .._types import TensorList

#: A Tensor, a list, tuple or dict of tensors, or a module, which stands for its parameters that require grad.
Player: TypeAlias = Tensor | Sequence[Tensor] | Mapping[str, Tensor] | nn.Module


class Game(Protocol):
    """Anything with players and one loss for each of them.

    ``players`` are tensors that require grad, in any of the forms of :data:`Player`. ``losses(players)`` returns one
    loss for each player, ``losses[i]`` the one that ``players[i]`` minimizes, with a graph: scalars, or tensors of
    shape (B,) for B independent starts.

    Detach nothing in it. GAN code detaches the generator in the discriminator's loss to save time; here that would take
    the generator out of this loss, and the Jacobian and the corrected directions would be wrong without a sign.
    """

    @property
    def players(self) -> Sequence[Player]:
        """The players, in the order of their losses."""
        ...

    def losses(self, players: Any) -> Sequence[Tensor]:
        """The loss of each player."""
        ...


def parameters(player: Player) -> TensorList:
    """The tensors of a player in order; of a module, its parameters that require grad."""
    return _members("parameters", "player", player)[0]


class Players:
    """The players of one call, checked. ``tensors`` is one flat list; ``slices[i]`` says which of it are player i's."""

    def __init__(self, caller: str, players: Sequence[Player]) -> None:
        if not isinstance(players, list | tuple | nn.ModuleList | nn.ParameterList):
            raise TypeError(
                f"{caller}: players must be a list or tuple with one entry for each player;"
                f" got {_lists.value_name(players)}. Pass [{_lists.value_name(players)}, ...]."
            )
        if len(players) == 0:
            raise ValueError(f"{caller}: players must hold at least one player; got none.")
        self.tensors: TensorList = []
        self.labels: list[str] = []
        self.slices: list[slice] = []
        self._structures: list[_lists.Structure] = []
        self._modules = {i: p for i, p in enumerate(players) if _has_parameters(p)}
        self._container: Callable[[list[Any]], Any] = _container(players)
        for i, player in enumerate(players):
            tensors, labels, structure = _members(caller, f"players[{i}]", player)
            if not tensors:
                raise ValueError(f"{caller}: players[{i}] must hold at least one tensor that requires grad; got none.")
            self.slices.append(slice(len(self.tensors), len(self.tensors) + len(tensors)))
            self.tensors += tensors
            self.labels += labels
            self._structures.append(structure)
        _check_tensors(caller, self.labels, self.tensors)

    def __len__(self) -> int:
        return len(self.slices)

    def pack(self, flat: Sequence[Tensor]) -> Any:
        """A flat list in the structure of the players; a module's part is a list."""
        pairs = zip(self._structures, self.slices, strict=True)
        return self._container([structure.pack(list(flat[own])) for structure, own in pairs])

    def call(self, function: Callable[[Any], Any], flat: Sequence[Tensor]) -> Any:
        """``function`` of the players with other tensors in them; a module stays itself, and holds them meanwhile."""
        parts = [structure.pack(list(flat[own])) for structure, own in zip(self._structures, self.slices, strict=True)]
        seated: dict[str, Tensor] = {}
        for i, module in self._modules.items():
            parts[i] = module
            labels = self.labels[self.slices[i]]
            names = [f"{i}.{label.removeprefix(f'players[{i}].')}" for label in labels]
            seated |= dict(zip(names, flat[self.slices[i]], strict=True))
        players = self._container(parts)
        if not seated:
            return function(players)
        return torch.func.functional_call(_Seats(function, self._modules), seated, (players,))

    def match(self, caller: str, name: str, value: Any) -> TensorList:
        """The tensors of ``value``, which must have the players' structure, shapes, dtypes and devices."""
        if not isinstance(value, list | tuple) or len(value) != len(self):
            got = f"{len(value)} entries" if isinstance(value, list | tuple) else _lists.value_name(value)
            raise TypeError(
                f"{caller}: {name} must be a list or tuple with one entry for each of the {len(self)} players;"
                f" got {got}."
            )
        flat: TensorList = []
        for i, (part, structure, own) in enumerate(zip(value, self._structures, self.slices, strict=True)):
            label = f"{name}[{i}]"
            tensors = structure.match(caller, label, part)
            _lists.check_like(caller, structure.labels(label), tensors, self.tensors[own])
            flat += tensors
        return flat


class _Seats(nn.Module):
    """A function under one roof with the modules it reads, by which ``functional_call`` finds their parameters."""

    def __init__(self, function: Callable[[Any], Any], modules: Mapping[int, nn.Module]) -> None:
        super().__init__()
        for i, module in modules.items():
            self.add_module(str(i), module)
        self.__dict__["_function"] = function  # not a submodule, should it be a module

    def forward(self, players: Any) -> Any:
        return self.__dict__["_function"](players)


def check_losses(caller: str, losses: Sequence[Tensor], players: Players) -> int | None:
    """One loss with a graph for each player; returns the number of starts, None for scalar losses."""
    if not isinstance(losses, list | tuple):
        raise TypeError(
            f"{caller}: losses must be a list or tuple with one loss for each player; got {_lists.value_name(losses)}."
        )
    if len(losses) != len(players):
        raise ValueError(f"{caller}: losses must have {len(players)} entries, one for each player; got {len(losses)}.")
    for i, loss in enumerate(losses):
        label = f"losses[{i}]"
        if not isinstance(loss, Tensor):
            raise TypeError(f"{caller}: {label} must be a tensor; got {_lists.value_name(loss)}.")
        if loss.dtype not in _lists.FLOATING:
            raise TypeError(f"{caller}: {label} must be of a real floating dtype; got {_lists.dtype_name(loss.dtype)}.")
        if loss.dim() > 1:
            shape = _lists.shape_name(loss.shape)
            raise ValueError(
                f"{caller}: {label} must be a scalar, or of shape (B,) for B independent starts; got shape {shape}."
                " Reduce it with .mean()."
            )
        if not loss.requires_grad:
            raise ValueError(
                f"{caller}: {label} must have a graph; got a tensor that does not require grad. Compute it with grad"
                " mode on, from the players, without .detach() or .item()."
            )
        if loss.shape != losses[0].shape:
            raise ValueError(
                f"{caller}: {label} must have the shape of losses[0], {_lists.shape_name(losses[0].shape)};"
                f" got {_lists.shape_name(loss.shape)}."
            )
    if losses[0].dim() == 0:
        return None
    batch: int = losses[0].shape[0]
    if batch == 0:
        raise ValueError(f"{caller}: losses must be of at least one start; got shape (0,).")
    for name, tensor in zip(players.labels, players.tensors, strict=True):
        if tensor.dim() == 0 or tensor.shape[0] != batch:
            raise ValueError(
                f"{caller}: {name} must have leading dimension {batch}, the number of starts in losses of shape"
                f" ({batch},); got shape {_lists.shape_name(tensor.shape)}. If the losses are values of one start,"
                " reduce them with .mean()."
            )
    return batch


def dot(a: Sequence[Tensor], b: Sequence[Tensor], batch: int | None) -> Tensor:
    """The inner product of two lists of equal shapes, 0-dim or, per start, of shape (B,).

    Summed in the widest dtype of the list, at least float32, on the device of the first element.
    """
    dtype = widest(a)
    shape = () if batch is None else (batch,)
    total = torch.zeros(shape, dtype=dtype, device=a[0].device)
    for x, y in zip(a, b, strict=True):
        products = x.detach().to(opmath(x.dtype)) * y.detach().to(opmath(y.dtype))
        part = products.sum() if batch is None else products.reshape(batch, -1).sum(1)
        total = total + part.to(total)
    return total


def scaled(factor: Tensor, tensors: Sequence[Tensor]) -> TensorList:
    """The tensors times a factor, 0-dim or one for each start."""
    return [t * factor.to(t).reshape([*factor.shape, *[1] * (t.dim() - factor.dim())]) for t in tensors]


def widest(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype in which numbers of every tensor can be summed: float64 if one of them is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _members(caller: str, name: str, player: Player) -> tuple[TensorList, list[str], _lists.Structure]:
    """The tensors of a player, what messages call them, and the structure that packs them again."""
    if not _has_parameters(player):
        tensors, structure = _lists.flatten(caller, name, player)
        return tensors, structure.labels(name), structure
    named = [(f"{name}.{key}", p) for key, p in player.named_parameters() if p.requires_grad]
    tensors, structure = _lists.flatten(caller, name, [p for _, p in named])
    return tensors, [label for label, _ in named], structure


def _has_parameters(player: object) -> TypeGuard[nn.Module]:
    """Whether a player is a module that stands for its parameters, which a list or dict of tensors does not."""
    return isinstance(player, nn.Module) and not isinstance(player, nn.ParameterList | nn.ParameterDict)


def _container(players: Any) -> Callable[[list[Any]], Any]:
    if not isinstance(players, tuple):
        return list
    return getattr(type(players), "_make", tuple)


def _check_tensors(caller: str, labels: Sequence[str], tensors: Sequence[Tensor]) -> None:
    _lists.check_floating(caller, labels, tensors)
    first: dict[int, str] = {}
    for label, tensor in zip(labels, tensors, strict=True):
        if not tensor.requires_grad:
            raise ValueError(
                f"{caller}: {label} must require grad; got one that does not. Call .requires_grad_() on it."
            )
        if id(tensor) in first:
            raise ValueError(
                f"{caller}: {label} must be a tensor of its own; got the same as {first[id(tensor)]}."
                " A tensor belongs to one player."
            )
        first[id(tensor)] = label
