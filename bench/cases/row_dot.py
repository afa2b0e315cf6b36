"""Cases of row_dot_: inner products of the rows of two matrices, against calls of torch."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nestopt_ext import _ops, _reference

from .. import registry
from ..registry import BASELINE, OURS, Case, Contestant, Field, Goal, Setting
from . import _inputs

# Adds the inner products to out; from out, x, y.
Step = Callable[[Tensor, Tensor, Tensor], object]


def _eager(out: Tensor, x: Tensor, y: Tensor) -> None:
    out.add_((x * y).sum(1))


def _batched(out: Tensor, x: Tensor, y: Tensor) -> None:
    """As products of a row and a column, which make no temporary matrix."""
    torch.baddbmm(out[:, None, None], x[:, None, :], y[:, :, None], out=out[:, None, None])


def _vecdot(out: Tensor, x: Tensor, y: Tensor) -> None:
    out.add_(torch.linalg.vecdot(x, y))


def _rows(rows: int, columns: int) -> Callable[[Setting], Field]:
    def build(setting: Setting) -> Field:
        count = max(1, rows // 16) if setting.quick else rows
        x, y = (_inputs.normal([(count, columns)], setting, seed)[0] for seed in range(2))
        moved = _inputs.num_bytes([x, y])

        @functools.cache
        def expected(num_steps: int) -> Sequence[Tensor]:
            out = torch.zeros(count, dtype=torch.float64, device=setting.device)
            for _ in range(num_steps):
                _reference.row_dot_(out, x.double(), y.double())
            return [out]

        def contestant(name: str, role: str, step: Step) -> Contestant:
            out = torch.zeros(count, device=setting.device)
            # Of the size of columns ** 0.5, and off by a few roundings of that; by more where a sum is a plain loop.
            tolerance = (4.0 if role == OURS else 64.0) * columns**0.5
            return Contestant(name, role, lambda: step(out, x, y), moved, lambda: [out], expected, tolerance)

        contestants = [
            contestant("row_dot_", OURS, _ops.row_dot_),
            contestant("eager (x * y).sum(1)", BASELINE, _eager),
            contestant("torch.baddbmm", BASELINE, _batched),
            contestant("torch.linalg.vecdot", BASELINE, _vecdot),
        ]
        yardsticks = [_inputs.triad(moved, setting)]
        return Field([*contestants, *yardsticks], 1, x.numel(), _inputs.num_bytes([x]), {})

    return build


_GOALS = (
    Goal("eager (x * y).sum(1)", 1 / 1.5, "1.5x faster than eager calls"),
    Goal(None, 0.01, "no temporary of the size of x"),
)

for _num_rows, _columns in ((256, 512), (256, 100_000)):
    registry.add(
        Case(
            f"row_dot/{_num_rows}x{_columns}",
            f"row_dot_ of {_num_rows} fp32 rows of {_columns} columns",
            _rows(_num_rows, _columns),
            _GOALS,
        )
    )
