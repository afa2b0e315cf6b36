"""Races of many settings of one method on a linear game, as one tensor program.

A linear game has the gradient field xi(w) = J w, so that every method here is a linear recurrence. Settings (learning
rate and momentum) are rows of a matrix, and one step moves all of them. Of each group of settings the first to reach
the tolerance wins, and its group is finished: this is the tuning of a learning rate by grid search at the cost of the
best one. The optimizers themselves walk the same points one setting at a time; the tests hold the two against each
other.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...games.zoo import Bilinear, Mixed

#: Distances beyond this multiple of the first are given up; on its way in, momentum swings out by 1 / (1 - |beta|).
_ABANDONED = 1e3
_STEPS_BETWEEN_LOOKS = 64


@dataclass(frozen=True)
class LinearGame:
    """Two players with xi = ``jacobian`` w ([n, n]); the first one holds the first ``num_first`` coordinates of w."""

    jacobian: Tensor
    num_first: int

    @staticmethod
    def of(game: Bilinear | Mixed) -> "LinearGame":
        """The game of the zoo as such."""
        return LinearGame(game.jacobian(), game.players[0].shape[-1])


@dataclass(frozen=True)
class Finish:
    """How a group ended: the steps of its best setting and the index of that; infinite and -1 when none arrived."""

    steps: float = math.inf
    setting: int = -1


class _Momentum:
    """buf <- beta buf + xi(w); w <- w - lr Re buf, with both players moving at once."""

    def __init__(self, game: LinearGame, start: Tensor, lr: Tensor, beta: Tensor) -> None:
        self.game = game
        self.w = start.expand(len(lr), -1).clone()
        self.real, self.imag = torch.zeros_like(self.w), torch.zeros_like(self.w)
        self.lr, self.a, self.c = lr[:, None], beta.real[:, None].clone(), beta.imag[:, None].clone()

    def step(self) -> None:
        self._move(slice(None))

    def keep(self, rows: Tensor) -> None:
        for name in ("w", "real", "imag", "lr", "a", "c"):
            setattr(self, name, getattr(self, name)[rows])

    def _move(self, player: slice) -> None:
        real, imag = self.real[:, player], self.imag[:, player]
        gradient = self.w @ self.game.jacobian[player].T
        moved = self.a * real - self.c * imag + gradient
        self.imag[:, player] = self.c * real + self.a * imag
        self.real[:, player] = moved
        self.w[:, player] -= self.lr * moved


class _AlternatingMomentum(_Momentum):
    """The same, with the second player looking at where the first one has gone."""

    def step(self) -> None:
        self._move(slice(None, self.game.num_first))
        self._move(slice(self.game.num_first, None))


class _Extragradient(_Momentum):
    """w <- w - lr xi(w - lr xi(w)); the momentum is not looked at."""

    def step(self) -> None:
        jacobian = self.game.jacobian.T
        ahead = self.w - self.lr * (self.w @ jacobian)
        self.w = self.w - self.lr * (ahead @ jacobian)


class _Optimistic(_Momentum):
    """w <- w - lr (2 xi(w) - the previous xi), which is zero before the first step; the momentum is not looked at."""

    def step(self) -> None:
        gradient = self.w @ self.game.jacobian.T
        self.w = self.w - self.lr * (2 * gradient - self.real)
        self.real = gradient


_RECURRENCES: dict[str, type[_Momentum]] = {
    "simultaneous": _Momentum,
    "alternating": _AlternatingMomentum,
    "extragradient": _Extragradient,
    "optimistic": _Optimistic,
}


def race(
    game: LinearGame,
    rule: str,
    start: Tensor,
    lr: Tensor,
    beta: Tensor,
    group: Tensor,
    *,
    tolerance: float,
    max_steps: int,
    tick: Callable[[], None] = lambda: None,
) -> list[Finish]:
    """Steps until norm(w) <= ``tolerance`` norm(``start``), for the fastest setting of every group.

    ``rule`` is "simultaneous" or "alternating" (momentum), "extragradient" or "optimistic". ``start`` is [n];
    ``lr`` (real), ``beta`` (complex) and ``group`` (whole numbers from 0 on, each at least once) are [settings].
    ``tick`` is called every so many steps.
    """
    walk = _RECURRENCES[rule](game, start, lr, beta)
    goal, beyond = tolerance * float(start.norm()), _ABANDONED * float(start.norm())
    finishes = [Finish() for _ in range(int(group.max()) + 1)]
    settings = torch.arange(len(lr))
    for step in range(1, max_steps + 1):
        walk.step()
        distance = walk.w.norm(dim=1)
        arrived = distance <= goal
        if bool(arrived.any()):
            for row in arrived.nonzero().flatten().tolist():
                number = int(group[settings[row]])
                if finishes[number].setting < 0:
                    finishes[number] = Finish(step, int(settings[row]))
            finished = torch.tensor([finish.setting >= 0 for finish in finishes])
            going = ~finished[group[settings]]
        elif step % _STEPS_BETWEEN_LOOKS == 0:
            going = distance <= beyond  # false for NaN too
            tick()
        else:
            continue
        if not bool(going.all()):
            walk.keep(going)
            settings = settings[going]
        if not len(settings):
            break
    return finishes
