"""Cases of hadamard_gram_: the Gram matrix of per-example gradients of a layer, against calls of torch."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nestopt_ext import _ops, _reference

from .. import registry
from ..registry import BASELINE, OURS, Case, Contestant, Field, Goal, Setting
from . import _inputs

# Adds to gram; from gram, x, y.
Step = Callable[[Tensor, Tensor, Tensor], object]


class _Size(NamedTuple):
    examples: int
    distinct: int  # examples of y
    positions: int
    x_features: int
    y_features: int


def _eager(size: _Size) -> Step:
    copies = size.examples // size.distinct

    def step(gram: Tensor, x: Tensor, y: Tensor) -> None:
        y_dots = y @ y.T
        if size.positions == 1 and copies == 1:
            gram.addcmul_(x @ x.T, y_dots)
            return
        n, m, t = size.examples, size.distinct, size.positions
        x_dots = (x @ x.T).view(copies, m, t, copies, m, t)
        gram.add_((x_dots * y_dots.view(m, t, 1, m, t)).sum((2, 5)).view(n, n))

    return step


def _formed(size: _Size) -> Step:
    """By the gradients themselves, one for each example."""
    copies = size.examples // size.distinct

    def step(gram: Tensor, x: Tensor, y: Tensor) -> None:
        xs = x.unflatten(0, (copies, size.distinct, size.positions))  # type: ignore[no-untyped-call]
        ys = y.unflatten(0, (size.distinct, size.positions))  # type: ignore[no-untyped-call]
        gradients = torch.einsum("knto,nti->knoi", xs, ys).flatten(2).flatten(0, 1)
        gram.addmm_(gradients, gradients.T)

    return step


def _layer(size: _Size) -> Callable[[Setting], Field]:
    def build(setting: Setting) -> Field:
        n, m, t, x_features, y_features = size
        if setting.quick:
            m //= 4
            n //= 4
        small = _Size(n, m, t, x_features, y_features)
        x, y = (
            _inputs.normal([shape], setting, seed)[0] / shape[1] ** 0.5
            for seed, shape in enumerate(((n * t, x_features), (m * t, y_features)))
        )
        # The factors are read once; the result is read and written.
        moved = _inputs.num_bytes([x, y]) + 2 * n * n * x.element_size()

        @functools.cache
        def expected(num_steps: int) -> Sequence[Tensor]:
            gram = torch.zeros(n, n, dtype=torch.float64, device=setting.device)
            for _ in range(num_steps):
                _reference.hadamard_gram_(gram, x.double(), y.double(), positions=t)
            return [gram]

        def contestant(name: str, role: str, step: Step) -> Contestant:
            gram = torch.zeros(n, n, device=setting.device)
            # What is added up is of the size of one for each position.
            tolerance = (8.0 if role == OURS else 64.0) * t
            return Contestant(name, role, lambda: step(gram, x, y), moved, lambda: [gram], expected, tolerance)

        contestants = [
            contestant("hadamard_gram_", OURS, functools.partial(_ops.hadamard_gram_, positions=t)),
            contestant("eager, two Grams", BASELINE, _eager(small)),
        ]
        left_out = {}
        if n * x_features * y_features * x.element_size() <= 2**29:
            contestants.append(contestant("eager, gradients formed", BASELINE, _formed(small)))
        else:
            left_out["eager, gradients formed"] = "the gradients would take more than half a gigabyte"
        yardsticks = [_inputs.triad(moved, setting)]
        return Field([*contestants, *yardsticks], 1, n * n, n * n * x.element_size(), left_out)

    return build


for _name, _size, _at_most in (
    ("linear-256x512", _Size(256, 256, 1, 512, 512), 0.75),
    ("linear-64x64", _Size(64, 64, 1, 64, 64), None),
    ("gauss-newton-10x256", _Size(2560, 256, 1, 10, 512), 0.75),
    ("convolution-64x4", _Size(64, 64, 4, 256, 2304), 0.75),
):
    _goals = (
        (Goal(None, 16.0, "no more memory than a few times that of the Gram matrix"),) if _size.positions == 1 else ()
    )
    if _at_most is not None:
        _goals = (
            Goal("eager, two Grams", _at_most, f"at most {_at_most} of two Gram matrices by eager calls"),
            *_goals,
        )
    registry.add(
        Case(
            f"hadamard_gram/{_name}",
            f"hadamard_gram_ of {_size.examples} fp32 examples ({_size.distinct} in y), {_size.positions} position(s),"
            f" {_size.x_features} and {_size.y_features} features",
            _layer(_size),
            _goals,
        )
    )
