"""Smooth games whose gradients and Jacobian are also had by differentiating one function of one flat vector."""

from dataclasses import dataclass
from typing import Any

import torch
from cases import F64, generator
from torch import Tensor, nn

SIZES = (4, 3, 2)


class SmoothGame:
    """Three players, 9 numbers; L_i(w) = sum sin(A_i w) + w' B_i w + (c_i' w)^3 / 10, no two alike."""

    def __init__(self, seed: int, batch: int | None = None, scale: float = 0.5):
        g = generator(seed)
        total = sum(SIZES)
        self.a = torch.randn(3, 5, total, dtype=F64, generator=g)
        self.b = torch.randn(3, total, total, dtype=F64, generator=g)
        self.c = torch.randn(3, total, dtype=F64, generator=g)
        shape = () if batch is None else (batch,)
        self.start = scale * torch.randn(*shape, total, dtype=F64, generator=g)

    def flat_loss(self, i: int, w: Tensor) -> Tensor:
        """The loss of player i at a flat vector, [P] or [B, P]."""
        quadratic = ((w @ self.b[i]) * w).sum(-1)
        return torch.sin(w @ self.a[i].T).sum(-1) + quadratic + 0.1 * (w @ self.c[i]) ** 3

    def players(self, start: Tensor | None = None) -> list[Any]:
        """A list of two tensors, one a matrix; a dict; a tensor."""
        w = self.start if start is None else start
        lead = w.shape[:-1]
        parts = w.split([3, 1, 1, 2, 2], dim=-1)
        shapes = [(3, 1), (1,), (), (2,), (1, 2)]
        leaves = [p.reshape([*lead, *s]).detach().clone().requires_grad_() for p, s in zip(parts, shapes, strict=True)]
        return [[leaves[0], leaves[1]], {"gain": leaves[2], "bias": leaves[3]}, leaves[4]]

    def losses(self, players: list[Any]) -> list[Tensor]:
        return [self.flat_loss(i, self.flat(players)) for i in range(3)]

    def flat(self, players: list[Any]) -> Tensor:
        """The players as one vector, with their graph."""
        lead = self.start.shape[:-1]
        tensors = [*players[0], *players[1].values(), players[2]]
        return torch.cat([t.reshape(*lead, -1) for t in tensors], dim=-1)


@dataclass
class Dense:
    """Gradients and blocks at one point, from Hessians of functions of the flat vector."""

    sizes: tuple[int, ...]
    grads: Tensor  # [n, P], row i the gradient of L_i in everything
    hessians: Tensor  # [n, P, P]

    @classmethod
    def of(cls, losses: Any, w: Tensor, sizes: tuple[int, ...]) -> "Dense":
        grads = [torch.func.grad(loss)(w) for loss in losses]
        hessians = [torch.func.hessian(loss)(w) for loss in losses]
        return cls(sizes, torch.stack(grads), torch.stack(hessians))

    @property
    def owner(self) -> Tensor:
        """The player of each element."""
        return torch.repeat_interleave(torch.arange(len(self.sizes)), torch.tensor(self.sizes))

    @property
    def xi(self) -> Tensor:
        return self.grads[self.owner, torch.arange(sum(self.sizes))]

    @property
    def jacobian(self) -> Tensor:
        return self.hessians[self.owner, torch.arange(sum(self.sizes))]

    @property
    def off_diagonal(self) -> Tensor:
        return self.jacobian * (self.owner[:, None] != self.owner[None, :])

    @property
    def chi(self) -> Tensor:
        """Block i: sum over j != i of (d2 L_j / dw_i dw_j) (dL_i / dw_j)."""
        chi = torch.zeros(sum(self.sizes), dtype=F64)
        for i in range(len(self.sizes)):
            for j in range(len(self.sizes)):
                if i != j:
                    mine, theirs = self.owner == i, self.owner == j
                    chi[mine] += self.hessians[j][mine][:, theirs] @ self.grads[i][theirs]
        return chi


def dense_of(game: SmoothGame, start: Tensor | None = None) -> Dense:
    """The dense truth of an unbatched game, or of one start of a batched one."""
    w = game.start if start is None else start
    return Dense.of([lambda w, i=i: game.flat_loss(i, w) for i in range(3)], w, SIZES)


class ModuleGame:
    """Two small networks against each other, and a tensor; the losses mix all three."""

    def __init__(self, seed: int):
        torch.manual_seed(seed)
        self.first = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
        self.second = nn.Sequential(nn.Linear(1, 2), nn.Softplus(), nn.Linear(2, 1)).double()
        self.third = torch.randn(2, dtype=F64, requires_grad=True)
        self.data = torch.randn(6, 2, dtype=F64)
        self.players = [self.first, self.second, self.third]
        self.sizes = (*(sum(p.numel() for p in m.parameters()) for m in (self.first, self.second)), 2)

    def losses(self, players: Any) -> tuple[Tensor, ...]:
        first, second, third = players
        return self._losses(first(self.data), second, third)

    def _losses(self, made: Tensor, second: Any, third: Tensor) -> tuple[Tensor, ...]:
        score = second(made) + (self.data @ third)[:, None] * made
        return score.square().mean(), -score.sigmoid().mean() + third.square().sum(), (score * third.sum()).mean()

    def dense(self) -> Dense:
        modules = (self.first, self.second)
        names = [[name for name, _ in m.named_parameters()] for m in modules]
        w = torch.cat([p.detach().reshape(-1) for p in (*self.first.parameters(), *self.second.parameters())])
        w = torch.cat([w, self.third.detach()])

        def loss(w: Tensor, i: int) -> Tensor:
            parts = list(w.split(list(self.sizes)))
            weights = []
            for m, own, part in zip(modules, names, parts, strict=False):
                shapes = [p.shape for p in m.parameters()]
                pieces = part.split([s.numel() for s in shapes])
                weights.append({n: p.reshape(s) for n, p, s in zip(own, pieces, shapes, strict=True)})
            made = torch.func.functional_call(self.first, weights[0], (self.data,))
            return self._losses(made, lambda x: torch.func.functional_call(self.second, weights[1], (x,)), parts[2])[i]

        return Dense.of([lambda w, i=i: loss(w, i) for i in range(3)], w, self.sizes)
