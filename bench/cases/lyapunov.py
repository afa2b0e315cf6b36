"""Cases of Lyapunov exponents: thousands of starts of a small game as one program, against a Python loop over starts.

The loops take so long that they are timed on a hundredth of the starts, and the goals count that.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from nestopt_ext.games import ipd, max_lyapunov_exponent, sgd_map, small_ipd

from .. import registry
from ..registry import BASELINE, OURS, Case, Contestant, Field, Goal, Setting

LR = 1.0
NUM_STEPS = 10
SHARE = 100  # one start in so many is what a loop is timed on
FASTER = 50
FORGIVENESS = -3.0  # a logit of small_ipd
TOLERANCE = 1e5  # eps: ten Jacobians and a singular value of their product

#: From starts [B, 2] to exponents [B], or to their gradients [B, 2].
Exponents = Callable[[Tensor], Tensor]


class _Problem:
    """Random starts of the small prisoner's dilemma under gradient descent."""

    def __init__(self, setting: Setting, gradient: bool) -> None:
        self.gradient = gradient
        generator = torch.Generator().manual_seed(0)
        num_starts = 200 if setting.quick else 10_000
        self.starts = torch.randn(num_starts, 2, dtype=torch.float64, generator=generator).to(setting.device)
        self.step = sgd_map(small_ipd(device=setting.device), LR)

    def contestant(self, name: str, role: str, exponents: Exponents, *, one_by_one: bool = False) -> Contestant:
        starts = self.starts[: len(self.starts) // SHARE] if one_by_one else self.starts
        found: list[Tensor] = []

        def whole(rows: Tensor) -> Tensor:
            return _gradient(exponents, rows) if self.gradient else exponents(rows)

        def step() -> None:
            found[:] = [torch.cat([whole(row) for row in torch.split(starts, 1)]) if one_by_one else whole(starts)]

        return Contestant(name, role, step, 0, lambda: found, lambda _: [self.expected[: len(starts)]], TOLERANCE)

    @functools.cached_property
    def expected(self) -> Tensor:
        """By torch.func, from the dilemma of ten logits and its system of equations."""
        whole = ipd(0.9, device=self.starts.device)

        def descend(row: Tensor) -> Tensor:
            def loss(i: int) -> Callable[[Tensor], Tensor]:
                def of(w: Tensor) -> Tensor:
                    forgive = torch.full_like(w[0], FORGIVENESS)
                    a, b = w
                    players = (torch.stack([a, a, forgive, a, forgive]), torch.stack([b, b, b, forgive, forgive]))
                    return whole.per_round(players)[i]

                return of

            return row - LR * torch.stack([torch.func.grad(loss(i))(row)[i] for i in (0, 1)])

        exponents = functools.partial(_by_torch_func, descend)
        return _gradient(exponents, self.starts) if self.gradient else exponents(self.starts)


def _gradient(exponents: Exponents, starts: Tensor) -> Tensor:
    x = starts.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(exponents(x).sum(), x)
    return gradient


def _by_torch_func(descend: Exponents, starts: Tensor) -> Tensor:
    """All starts at once, with a Jacobian by torch.func in each step."""

    def with_value(row: Tensor) -> tuple[Tensor, Tensor]:
        value = descend(row)
        return value, value

    jacobian = torch.func.vmap(torch.func.jacrev(with_value, has_aux=True))
    product = torch.eye(2, dtype=starts.dtype, device=starts.device)
    x = starts
    for _ in range(NUM_STEPS):
        j, x = jacobian(x)
        product = j @ product
    exponents: Tensor = torch.linalg.svdvals(product)[:, 0].log() * (2 / NUM_STEPS)
    return exponents


def _by_autograd(step: Exponents, starts: Tensor) -> Tensor:
    """What one writes by hand for one start: a Jacobian row by row, a product, its largest singular value."""
    create_graph = starts.requires_grad
    x = starts[0] if create_graph else starts[0].detach().requires_grad_()
    product = torch.eye(2, dtype=starts.dtype, device=starts.device)
    for _ in range(NUM_STEPS):
        value = step(x)
        rows = [torch.autograd.grad(v, x, retain_graph=True, create_graph=create_graph)[0] for v in value]
        product = torch.stack(rows) @ product
        x = value if create_graph else value.detach().requires_grad_()
    exponent: Tensor = torch.linalg.matrix_norm(product, 2).log() * (2 / NUM_STEPS)
    return exponent[None]


def _build(gradient: bool, setting: Setting) -> Field:
    problem = _Problem(setting, gradient)
    step = problem.step

    def ours(starts: Tensor) -> Tensor:
        return max_lyapunov_exponent(step, starts, num_steps=NUM_STEPS).exponent

    losses = small_ipd().losses  # outside, since a game draws its players

    def descend(row: Tensor) -> Tensor:
        def loss(i: int) -> Callable[[Tensor], Tensor]:
            return lambda w: losses(tuple(w))[i]

        return row - LR * torch.stack([torch.func.grad(loss(i))(row)[i] for i in (0, 1)])

    contestants = [
        problem.contestant("max_lyapunov_exponent", OURS, ours),
        problem.contestant("ours, loop over 1 %", BASELINE, ours, one_by_one=True),
        problem.contestant("autograd, loop over 1 %", BASELINE, functools.partial(_by_autograd, step), one_by_one=True),
        problem.contestant("torch.func, batched", BASELINE, functools.partial(_by_torch_func, descend)),
    ]
    size = problem.starts.numel()
    return Field(contestants, 1, size, size * problem.starts.element_size(), {})


_GOALS = tuple(
    Goal(loop, SHARE / FASTER, f"{FASTER}x faster than a loop over all starts")
    for loop in ("ours, loop over 1 %", "autograd, loop over 1 %")
)

registry.add(
    Case(
        "lyapunov/exponent",
        f"largest exponents over {NUM_STEPS} steps of 10 000 starts of a game in the plane",
        functools.partial(_build, False),
        _GOALS,
    )
)
registry.add(
    Case(
        "lyapunov/gradient",
        f"their gradients in the starts, over {NUM_STEPS} steps",
        functools.partial(_build, True),
        _GOALS,
    )
)
