"""Loops that play a game with any optimizers, all players at once or one after the other."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import _lists
from .._progress import ProgressBar
from .._types import TensorList
from ..optim._arguments import check_real
from ._blocks import own_gradient, owned
from ._players import Game, Players, check_losses, parameters
from ._watch import Watch
from .trajectory import Recorder, Trajectory

#: Takes ``(losses, players)`` and returns what to step along, in the structure of the players.
Direction: TypeAlias = Callable[[Sequence[Tensor], Any], Any]
#: One optimizer for each player, or a function that makes one from a list of tensors.
Optimizers: TypeAlias = Sequence[Optimizer] | Callable[[TensorList], Optimizer]


class _Move(Protocol):
    """One step of the game from ``losses``, the losses at its beginning; returns what the players stepped along.

    Empties ``losses`` once they are of no use, so that their graphs are gone before the next ones are made.
    """

    def __call__(self, losses: TensorList) -> TensorList: ...


def simultaneous(
    game: Game,
    optimizers: Optimizers,
    num_steps: int,
    *,
    direction: Direction | None = None,
    measure: Callable[[Any], Any] | None = None,
    record_every: int | None = 1,
    tolerance: float | None = None,
    divergence: float | None = 1e6,
    progress: bool = False,
) -> Trajectory:
    r"""Plays a game with simultaneous updates: all players step from the same point.

    Args:
        game: has ``players`` and ``losses(players)``; see :class:`~nestopt_ext.games.Game`.
        optimizers: one ``torch.optim.Optimizer`` for each player, which holds exactly its tensors, or a function that
            makes one from a list of tensors. One with an ``extrapolate()`` method gets a gradient, extrapolates
            together with all others that can, gets a second gradient there, and steps. One that needs a closure gets
            one that evaluates its player's gradient, the others staying where the step began.
        num_steps: the most steps to take.
        direction: ``(losses, players) ->`` tensors in the structure of the players, to step along in place of
            :func:`~nestopt_ext.games.gradients`; ``functools.partial(lola, lr=1.0)`` is one.
        measure: what to record of the players: a function of ``game.players`` that returns a number, a tensor, or a
            list, tuple or dict of these, alike each time. None records the players themselves: a copy of all of them in
            the host's memory for each record, too much for most networks.
        record_every: steps from record to record; None records the start and the end only.
        tolerance: a start has converged when its distance to ``game.solution`` is at most this, a Euclidean norm over
            all players; where the game has no solution, when the norm of what it steps along is. When all have
            converged or failed the play stops.
        divergence: a start has failed when an element of a player or a loss is larger than this in magnitude; None
            for no bound. NaN and Inf are always a failure.
        progress: shows a bar where stderr is a terminal.

    For B independent starts (losses of shape (B,)) the optimizers must work element by element, as all of torch's but
    LBFGS do. Where a player is on an accelerator the host looks for the end of the play once in ten steps, so that up
    to nine more may be taken; ``converged_at`` and ``failed_at`` name the right step all the same.

    The losses are evaluated once for each gradient, and once more at the end. A schedule of the lr can follow the
    steps: ``optimizer.register_step_post_hook(lambda *_: scheduler.step())``.

    Modifies the players, their ``.grad`` and the optimizers.

    Raises TypeError or ValueError for bad arguments, before anything is modified. What the game, ``direction`` or
    ``measure`` raise, and KeyboardInterrupt, passes through, with players that had extrapolated back where they were;
    the records are lost with it, so play in portions to keep them.

    >>> from nestopt_ext.games.zoo import bilinear
    >>> game = bilinear(start=([1.0], [0.0]))
    >>> played = simultaneous(game, lambda params: torch.optim.SGD(params, lr=0.5), 2)
    >>> torch.cat(played.recorded, dim=1)             # x - y / 2, y + x / 2
    tensor([[1.0000, 0.0000],
            [1.0000, 0.5000],
            [0.7500, 1.0000]], dtype=torch.float64)
    """
    table = _Table("simultaneous", game, optimizers, direction)
    return table.play(table.move_together, num_steps, measure, record_every, tolerance, divergence, progress)


def alternating(
    game: Game,
    optimizers: Optimizers,
    num_steps: int,
    *,
    direction: Direction | None = None,
    measure: Callable[[Any], Any] | None = None,
    record_every: int | None = 1,
    tolerance: float | None = None,
    divergence: float | None = 1e6,
    progress: bool = False,
) -> Trajectory:
    """Plays a game with alternating updates: in each step every player moves once, in order, and sees the moves before.

    The gradient of player i is taken where the players before it have moved to. All else is as in
    :func:`simultaneous`. The losses are computed once for each player, so a step costs that much more than a
    simultaneous one; the gradients cost the same.

    >>> from nestopt_ext.games.zoo import bilinear
    >>> game = bilinear(start=([1.0], [0.0]))
    >>> played = alternating(game, lambda params: torch.optim.SGD(params, lr=0.5), 2)
    >>> torch.cat(played.recorded, dim=1)             # x - y / 2, then y + x / 2 with the new x
    tensor([[1.0000, 0.0000],
            [1.0000, 0.5000],
            [0.7500, 0.8750]], dtype=torch.float64)
    """
    table = _Table("alternating", game, optimizers, direction)
    return table.play(table.move_in_turn, num_steps, measure, record_every, tolerance, divergence, progress)


class _Table:
    """A game with everyone at the table: its players, and an optimizer for each."""

    def __init__(self, caller: str, game: Game, optimizers: Optimizers, direction: Direction | None) -> None:
        if not hasattr(game, "players") or not callable(getattr(game, "losses", None)):
            raise TypeError(f"{caller}: game must have players and losses(players); got {_lists.value_name(game)}.")
        if direction is not None and not callable(direction):
            raise TypeError(
                f"{caller}: direction must be None or callable, such as functools.partial(games.lola, lr=0.1);"
                f" got {_lists.value_name(direction)}."
            )
        self._caller = caller
        self._game = game
        self._players = Players(caller, game.players)
        self._optimizers = _check_optimizers(caller, optimizers, self._players)
        self._needs_closure = [_needs_closure(optimizer) for optimizer in self._optimizers]
        self._direction = direction
        self._gradients_taken = [0] * len(self._players)

    def play(
        self,
        move: _Move,
        num_steps: int,
        measure: Callable[[Any], Any] | None,
        record_every: int | None,
        tolerance: float | None,
        divergence: float | None,
        progress: bool,
    ) -> Trajectory:
        """Moves until all steps are taken or nothing is left to play for."""
        _check_count(self._caller, "num_steps", num_steps, minimum=0)
        if record_every is not None:
            _check_count(self._caller, "record_every", record_every, minimum=1)
        _check_bound(self._caller, "tolerance", tolerance)
        _check_bound(self._caller, "divergence", divergence)
        if measure is not None and not callable(measure):
            raise TypeError(f"{self._caller}: measure must be None or callable; got {_lists.value_name(measure)}.")
        losses = self._losses()
        batch = check_losses(self._caller, losses, self._players)
        watch = Watch(
            self._players.tensors,
            batch,
            solution=None if tolerance is None else self._solution(batch),
            tolerance=tolerance,
            divergence=divergence,
        )
        recorder = Recorder(self._caller, self._game.players, self._players, measure, record_every)
        bar = ProgressBar(num_steps, shown=progress)
        bar.stage(self._caller)
        step = 0
        try:
            while True:
                watch.see(step, losses)
                ends = step == num_steps or watch.stops(step)
                if ends or recorder.due(step):
                    recorder.record(step, losses)
                if ends:
                    break
                watch.see_directions(step, move(losses))
                step += 1
                losses = self._losses()
                bar.advance(1)
        finally:
            bar.close()
        steps, recorded_losses, recorded = recorder.recorded()
        return Trajectory(
            steps=steps,
            losses=recorded_losses,
            recorded=recorded,
            num_steps=step,
            num_gradients=max(self._gradients_taken),
            status=watch.verdict(),
            converged_at=watch.converged_at.cpu(),
            failed_at=watch.failed_at.cpu(),
        )

    def move_together(self, losses: TensorList) -> TensorList:
        """One simultaneous step."""
        everyone = range(len(self._players))
        by_gradient = [i for i in everyone if not self._needs_closure[i]]
        twice = [i for i in by_gradient if hasattr(self._optimizers[i], "extrapolate")]
        directions = dict(zip(by_gradient, self._take_directions(losses, by_gradient), strict=True))
        losses.clear()
        moved: dict[int, TensorList] = {}
        for i in everyone:
            if self._needs_closure[i]:  # steps from where all are, and goes back until all have stepped
                own = self._players.tensors[self._players.slices[i]]
                before = [t.detach().clone() for t in own]
                self._optimizers[i].step(self._closure(i))
                directions[i] = [torch.zeros_like(t) if t.grad is None else t.grad for t in own]
                moved[i] = [t.detach().clone() for t in own]
                _write(own, before)
        if twice:
            with self._extrapolated(twice):
                self._take_directions(self._losses(), twice)
        for i in by_gradient:
            self._optimizers[i].step()
        for i, values in moved.items():
            _write(self._players.tensors[self._players.slices[i]], values)
        return [t for i in everyone for t in directions[i]]

    def move_in_turn(self, losses: TensorList) -> TensorList:
        """One alternating step."""
        directions: TensorList = []
        for i, optimizer in enumerate(self._optimizers):
            if self._needs_closure[i]:
                losses.clear()
                optimizer.step(self._closure(i))
                own = self._players.tensors[self._players.slices[i]]
                directions += [torch.zeros_like(t) if t.grad is None else t.grad for t in own]
                continue
            (first,) = self._take_directions(losses if i == 0 else self._losses(), [i])
            losses.clear()
            directions += first
            if hasattr(optimizer, "extrapolate"):
                with self._extrapolated([i]):
                    self._take_directions(self._losses(), [i])
            optimizer.step()
        return directions

    def _closure(self, player: int) -> Callable[[], Any]:
        def closure() -> Tensor:
            losses = self._losses()
            self._take_directions(losses, [player])
            return losses[player].detach().sum()

        return closure

    @contextmanager
    def _extrapolated(self, players: list[int]) -> Iterator[None]:
        """Where the optimizers of some players extrapolate to; if what is done there raises, they are brought back."""
        away: list[Any] = []
        try:
            for i in players:
                optimizer: Any = self._optimizers[i]
                optimizer.extrapolate()
                away.append(optimizer)
            yield
        except BaseException:
            for optimizer in away:
                if hasattr(optimizer, "restore"):
                    optimizer.restore()
            raise

    def _losses(self) -> TensorList:
        """The losses where the players are now, checked."""
        torch.clear_autocast_cache()  # an autocast around the loop would go on with casts of players that have moved
        with torch.enable_grad():
            losses = self._game.losses(self._game.players)
        check_losses(self._caller, losses, self._players)
        return list(losses)

    def _take_directions(self, losses: Sequence[Tensor], wanted: list[int]) -> list[TensorList]:
        """The directions of some players at ``losses``, which are also put into ``.grad``."""
        if self._direction is None:
            found = [self._gradient(losses[i], i) for i in wanted]
        elif wanted:
            returned = self._direction(losses, self._game.players)
            flat = self._players.match(self._caller, "direction(losses, players)", returned)
            found = [[t.detach() for t in flat[self._players.slices[i]]] for i in wanted]
        else:
            found = []
        for i, direction in zip(wanted, found, strict=True):
            self._gradients_taken[i] += 1
            for tensor, part in zip(self._players.tensors[self._players.slices[i]], direction, strict=True):
                tensor.grad = part
        return found

    def _gradient(self, loss: Tensor, player: int) -> TensorList:
        found = own_gradient(self._caller, loss, self._players, player)
        return owned(found, self._players.tensors[self._players.slices[player]])

    def _solution(self, batch: int | None) -> TensorList | None:
        """The game's solution as a flat list; None where it has none."""
        solution = getattr(self._game, "solution", None)
        if solution is None:
            return None
        flat = [t for part in solution for t in parameters(part)]
        if len(flat) != len(self._players.tensors):
            raise ValueError(
                f"{self._caller}: game.solution must have {len(self._players.tensors)} tensors, as the players;"
                f" got {len(flat)}."
            )
        for label, value, tensor in zip(self._players.labels, flat, self._players.tensors, strict=True):
            if value.shape != tensor.shape and (batch is None or value.shape != tensor.shape[1:]):
                raise ValueError(
                    f"{self._caller}: game.solution must have the shapes of the players, without their dimension of"
                    f" starts; got {_lists.shape_name(value.shape)} for {label} of {_lists.shape_name(tensor.shape)}."
                )
        return [value.detach().to(tensor) for value, tensor in zip(flat, self._players.tensors, strict=True)]


def _write(tensors: TensorList, values: TensorList) -> None:
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)


def _needs_closure(optimizer: Optimizer) -> bool:
    """Whether ``step()`` without arguments would fail, as that of LBFGS does."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def _check_optimizers(caller: str, optimizers: Optimizers, players: Players) -> list[Optimizer]:
    if callable(optimizers):
        found: list[Any] = [optimizers(list(players.tensors[own])) for own in players.slices]
    elif isinstance(optimizers, list | tuple):
        found = list(optimizers)
    else:
        raise TypeError(
            f"{caller}: optimizers must be a list with one optimizer for each player, or a function that makes one from"
            f" a list of tensors; got {_lists.value_name(optimizers)}."
        )
    if len(found) != len(players):
        raise ValueError(
            f"{caller}: optimizers must have {len(players)} entries, one for each player; got {len(found)}."
        )
    for i, (optimizer, own) in enumerate(zip(found, players.slices, strict=True)):
        label = f"optimizers[{i}]"
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"{caller}: {label} must be a torch.optim.Optimizer; got {_lists.value_name(optimizer)}.")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        mine = {id(t): name for t, name in zip(players.tensors[own], players.labels[own], strict=True)}
        missing = [name for key, name in mine.items() if key not in held]
        if missing or len(held) > len(mine):
            got = f"one without {missing[0]}" if missing else f"{len(held) - len(mine)} tensors more"
            raise ValueError(f"{caller}: {label} must hold exactly the tensors of players[{i}]; got {got}.")
    return found


def _check_count(caller: str, name: str, value: object, *, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{caller}: {name} must be an int; got {_lists.value_name(value)}.")
    if value < minimum:
        raise ValueError(f"{caller}: {name} must be at least {minimum}; got {value}.")


def _check_bound(caller: str, name: str, value: float | None) -> None:
    if value is not None:
        check_real(caller, name, value, minimum=0.0)
