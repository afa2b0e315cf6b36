"""Cases of softmax_hessian_: the Hessian of cross-entropy in the logits, times a vector, against calls of torch."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from nestopt_ext import _ops, _reference

from .. import registry
from ..registry import BASELINE, OURS, Case, Contestant, Field, Goal, Setting
from . import _inputs

# Applies the product to u in place; from u, logits, row_weight.
Step = Callable[[Tensor, Tensor, Tensor], object]


class _Problem:
    """The vector u, the logits and a weight for each row; every contestant takes a copy of u."""

    def __init__(self, setting: Setting, rows: int, classes: int) -> None:
        self.setting = setting
        self.u, self.logits = (_inputs.normal([(rows, classes)], setting, seed)[0] for seed in range(2))
        # With p near 1 / classes and this weight the product is near a projection, so that u neither grows nor
        # shrinks, to subnormal numbers in the end, in as many steps as there may be.
        self.logits *= 1e-3
        self.row_weight = torch.full((rows,), float(classes), device=setting.device)
        self.moved = 3 * _inputs.num_bytes([self.u])  # u read and written, logits read

    def contestant(self, name: str, role: str, step: Step) -> Contestant:
        u = self.u.clone()
        run = functools.partial(step, u, self.logits, self.row_weight)
        # Sums and softmax in float32 lose a digit or two in rows of many classes.
        return Contestant(name, role, run, self.moved, lambda: [u], self.expected, 8.0 if role == OURS else 64.0)

    @functools.cached_property
    def expected(self) -> Callable[[int], Sequence[Tensor]]:
        @functools.cache
        def after(num_steps: int) -> Sequence[Tensor]:
            u, logits = self.u.double(), self.logits.double()
            for _ in range(num_steps):
                _reference.softmax_hessian_(u, logits, self.row_weight)
            return [u]

        return after


def _product(p: Tensor, u: Tensor, row_weight: Tensor) -> Tensor:
    return row_weight[:, None] * p * (u - (p * u).sum(-1, keepdim=True))


def _eager(u: Tensor, logits: Tensor, row_weight: Tensor) -> None:
    u.copy_(_product(logits.softmax(-1), u, row_weight))


def _cached(problem: _Problem) -> Step:
    """With p given, and a scratch matrix that is kept: the fewest passes over memory that eager calls allow."""
    p = problem.logits.softmax(-1)
    scratch = torch.empty_like(p)

    def step(u: Tensor, logits: Tensor, row_weight: Tensor) -> None:
        torch.mul(p, u, out=scratch)
        u.sub_(scratch.sum(-1, keepdim=True)).mul_(p).mul_(row_weight[:, None])

    return step


def _double_backward(problem: _Problem) -> Step:
    """Through the graph of the gradient of a cross-entropy, made beforehand."""
    leaf = problem.logits.clone().requires_grad_()
    target = torch.arange(leaf.shape[0], device=leaf.device) % leaf.shape[1]
    losses = functional.cross_entropy(leaf, target, reduction="none")
    (gradient,) = torch.autograd.grad((losses * problem.row_weight).sum(), leaf, create_graph=True)

    def step(u: Tensor, logits: Tensor, row_weight: Tensor) -> None:
        (product,) = torch.autograd.grad(gradient, leaf, u, retain_graph=True)
        u.copy_(product)

    return step


def _compiled(*, cached: bool, problem: _Problem) -> Step:
    p = problem.logits.softmax(-1)
    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=False)
    def product(u: Tensor, given: Tensor, row_weight: Tensor) -> None:
        u.copy_(_product(given if cached else given.softmax(-1), u, row_weight))

    def step(u: Tensor, logits: Tensor, row_weight: Tensor) -> None:
        product(u, p if cached else logits, row_weight)

    return step


def _rows(rows: int, classes: int) -> Callable[[Setting], Field]:
    def build(setting: Setting) -> Field:
        problem = _Problem(setting, max(1, rows // 32) if setting.quick else rows, classes)
        contestants = [
            problem.contestant("softmax_hessian_", OURS, _ops.softmax_hessian_),
            problem.contestant("eager, softmax given", BASELINE, _cached(problem)),
            problem.contestant("eager, softmax each time", BASELINE, _eager),
            problem.contestant("double backward of cross_entropy", BASELINE, _double_backward(problem)),
        ]
        left_out = {}
        if setting.quick:
            left_out["torch.compile"] = "--quick"
        else:
            for name, cached in (("softmax given", True), ("softmax each time", False)):
                step = _compiled(cached=cached, problem=problem)
                contestants.append(problem.contestant(f"torch.compile, {name}", BASELINE, step))
        yardsticks = [make(problem.moved, setting) for make in (_inputs.copy, _inputs.triad)]
        return Field([*contestants, *yardsticks], 1, problem.u.numel(), _inputs.num_bytes([problem.u]), left_out)

    return build


_GOALS = (
    Goal("eager, softmax given", 1 / 1.5, "1.5x faster than eager calls that are given the softmax"),
    Goal("eager, softmax each time", 1 / 2.5, "2.5x faster than eager calls"),
    Goal("double backward of cross_entropy", 1 / 2, "2x faster than double backward"),
    Goal(None, 0.01, "no temporary of the size of u"),
)

for _num_rows, _classes in ((4_096, 1_000), (512, 50_257), (64, 130_000)):
    registry.add(
        Case(
            f"softmax_hessian/{_num_rows}x{_classes}",
            f"softmax_hessian_ on {_num_rows} fp32 rows of {_classes} classes",
            _rows(_num_rows, _classes),
            _GOALS,
        )
    )
