"""Cases of rank_one_update_: v <- a v + b g for a whole list, against `_foreach` calls and a triad."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nestopt_ext import _ops, _reference

from .. import registry
from ..registry import BASELINE, OURS, Case, Contestant, Field, Goal, Setting
from . import _inputs

A, B = 0.5, 0.25

Step = Callable[[list[Tensor], list[Tensor]], object]


class _Problem:
    """The vector v and the gradient g; every contestant takes a copy of v."""

    def __init__(self, setting: Setting, shapes: Sequence[_inputs.Shape]) -> None:
        self.setting = setting
        self.v, self.g = (_inputs.normal(shapes, setting, seed) for seed in range(2))
        self.moved = 3 * _inputs.num_bytes(self.v)  # v read and written, g read

    def contestant(self, name: str, role: str, step: Step) -> Contestant:
        v = [t.clone() for t in self.v]
        return Contestant(name, role, functools.partial(step, v, self.g), self.moved, lambda: v, self.expected)

    @functools.cached_property
    def expected(self) -> Callable[[int], Sequence[Tensor]]:
        @functools.cache
        def after(num_steps: int) -> Sequence[Tensor]:
            v, g = ([t.double() for t in tensors] for tensors in (self.v, self.g))
            a, b = (torch.tensor(x, dtype=torch.float64) for x in (A, B))
            for _ in range(num_steps):
                _reference.rank_one_update_(v, g, a, b)
            return v

        return after


def _ours() -> Step:
    a, b = (torch.tensor(x, dtype=torch.float64) for x in (A, B))
    return lambda v, g: _ops.rank_one_update_(v, g, a, b)


def _two_foreach(v: list[Tensor], g: list[Tensor]) -> None:
    torch._foreach_mul_(v, A)
    torch._foreach_add_(v, g, alpha=B)


def _expressions(v: list[Tensor], g: list[Tensor]) -> None:
    """What one would write."""
    for x, y in zip(v, g, strict=True):
        x.copy_(A * x + B * y)


def _lists(shapes: Callable[[Setting], list[_inputs.Shape]]) -> Callable[[Setting], Field]:
    def build(setting: Setting) -> Field:
        problem = _Problem(setting, shapes(setting))
        contestants = [
            problem.contestant("rank_one_update_", OURS, _ours()),
            problem.contestant("2 _foreach calls", BASELINE, _two_foreach),
            problem.contestant("expressions", BASELINE, _expressions),
        ]
        yardsticks = [make(problem.moved, setting) for make in (_inputs.copy, _inputs.triad)]
        v = problem.v
        return Field([*contestants, *yardsticks], len(v), sum(t.numel() for t in v), _inputs.num_bytes(v), left_out={})

    return build


_FOREACH = Goal("2 _foreach calls", 1 / 1.4, "1.4x faster than two _foreach calls; 5 words against 3 are 1.67x")
_TRIAD = Goal("triad a += s*b", 1.10, "within 10 % of a triad of as many bytes")
_NO_TEMPORARY = Goal(None, 0.01, "no temporary of parameter size")

for _name, _summary, _shapes, _goals in (
    ("large", "one fp32 tensor of 30 M", _inputs.one_large, (_FOREACH, _TRIAD, _NO_TEMPORARY)),
    ("resnet50", "the 161 tensors of ResNet-50", _inputs.resnet50, (_FOREACH, _TRIAD, _NO_TEMPORARY)),
    ("small-many", "300 fp32 tensors of 1 000", _inputs.many_small, ()),
):
    registry.add(Case(f"rank_one_update/{_name}", f"rank_one_update_ on {_summary}", _lists(_shapes), _goals))
