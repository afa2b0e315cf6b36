"""Which way steps on data of one kind are taken: what is open, what is right, and what is fastest."""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from typing import Literal, NoReturn, TypeAlias

import torch
from torch import Tensor

from ..solvers import Solver
from ._batch import Batch
from ._graph import CudaGraph
from ._recorded import Recorded
from ._routes import NUM_PARTS, Captured, Eager, MakeGraph, Reports, Route, Task, Unfit
from .hypergradient import ImplicitGradient

#: How a step is taken.
CaptureMode: TypeAlias = Literal["auto", "eager", "cuda-graph", "recorded", "compiled"]

#: What captures a step, for each kind of device that can.
GRAPHS: dict[str, MakeGraph] = {"cuda": lambda device, generators: CudaGraph(device, generators, NUM_PARTS)}

#: Steps that are held against hypergradient: the second one is on other values than those that were captured.
_CHECKED = 2
#: How often a way is tried before the fastest one is chosen.
_TRIALS = 5


class Setup:
    """The way that was chosen for steps on data of one kind.

    ``reason`` says why it is the eager one where that was not asked for, and ``notice`` what is worth a warning.
    """

    def __init__(self, caller: str, task: Task, reports: Reports, asked: CaptureMode) -> None:
        self.mode: CaptureMode = "eager"
        self.reason: str | None = None
        self.notice: str | None = None
        self.timings: dict[str, float] = {}
        self._caller = caller
        self._task = task
        self._reports = reports
        self._asked = asked
        self._eager = Eager(task, reports)
        self._route: Route | None = None
        self._tried: CaptureMode = "cuda-graph"
        self._unchecked = 0 if asked == "eager" else _CHECKED

    def step(self, batch: Batch, number: int) -> tuple[Tensor, ...]:
        """The hypergradient; the first time the way is chosen."""
        if self.reason is not None and self._asked != "auto":
            self._refuse()
        if self._route is not None and not self._route.holds():
            self._route.settle()
            self._route, self._unchecked = None, _CHECKED
        if self._unchecked == 0:
            return (self._route or self._eager).step(batch, number)
        expected = self._task.gradient(batch.arguments())  # what is wrong with the losses is said here
        try:
            if self._route is None:
                self._route = self._opened(batch)
            with self._reports.muted():
                found = self._route.step(batch, number)
                self._route.settle()
            self._hold(found, expected)
        except Unfit as fault:
            self._give_up(str(fault))
        self._reports.take(None if expected.solve is None else expected.solve.verdict, number)
        if self._route is not None and self._asked == "auto" and self.mode == "recorded" and not self.timings:
            self._race(batch, number)
        return expected.grads

    def stay_eager(self, reason: str) -> None:
        """Sets nothing up, for that reason."""
        self.reason = self.notice = reason
        self._unchecked = 0

    def settle(self) -> None:
        """Reports on all solves that are not yet reported."""
        if self._route is not None:
            self._route.settle()

    def _opened(self, batch: Batch) -> Route:
        """The way that was asked for, or the one to try on such a device."""
        task, reports = self._task, self._reports
        device = _only_device([*task.variables.params, *task.variables.hparams, *batch.tensors])
        mode = self._asked
        if mode == "auto":
            mode = "recorded" if device.type == "cpu" and "cpu" not in GRAPHS else "cuda-graph"
        self._tried = mode
        try:
            route: Route
            if mode == "cuda-graph":
                if device.type not in GRAPHS:
                    raise Unfit(f"the tensors are on {device}, and graphs are captured on a CUDA device")
                route = Captured(task, reports, batch, device, GRAPHS[device.type])
            else:
                if device.type != "cpu":
                    raise Unfit(f"the tensors are on {device}, and steps are recorded on the CPU")
                route = Recorded(task, reports, batch, compile_product=mode == "compiled")
        except Unfit:
            raise
        except Exception as error:  # the eager step was fine, so this is about the way it is taken
            text = " ".join(str(error).split())
            hint = ""
            if mode == "cuda-graph":
                # Autograd makes the stream on which that graph was built wait for the one that is captured.
                hint = " (a loss from before that is still referenced keeps a graph of the params alive: delete it)"
            raise Unfit(f"setting it up raised {type(error).__name__}: {text[:300]}{hint}") from error
        self.mode = mode
        return route

    def _hold(self, found: Sequence[Tensor], expected: ImplicitGradient) -> None:
        """Raises Unfit unless the results agree; a solve that cannot be trusted is rounding, and says nothing."""
        if expected.solve is not None and expected.solve.verdict.is_trouble:
            return
        apart = _apart(found, expected.grads)
        dtypes = {t.dtype for t in (*self._task.variables.params, *self._task.variables.hparams)}
        if not apart <= max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5:
            raise Unfit(
                f"its result differs from hypergradient's by {apart:.2g}; a loss computes with what PyTorch does not"
                " see, or changes from call to call"
            )
        self._unchecked -= 1

    def _give_up(self, reason: str) -> None:
        self._route, self.mode, self._unchecked = None, "eager", 0
        self.reason = reason
        if self._asked != "auto":
            self._refuse()
        if self._tried == "cuda-graph":
            self.notice = f"steps are not captured: {reason}. They are taken as hypergradient does."

    def _refuse(self) -> NoReturn:
        raise RuntimeError(
            f"{self._caller}: mode={self._asked!r} must be open to these losses and tensors; got: {self.reason}. Use"
            " mode='auto' or mode='eager'."
        )

    def _race(self, batch: Batch, number: int) -> None:
        """Times the ways in turns, and keeps the faster one."""
        ways: dict[CaptureMode, Route] = {"eager": self._eager}
        if self._route is not None:
            ways[self.mode] = self._route
        best = dict.fromkeys(ways, float("inf"))
        with self._reports.muted():
            for _ in range(_TRIALS):
                for name, way in ways.items():
                    start = time.perf_counter()
                    way.step(batch, number)
                    best[name] = min(best[name], time.perf_counter() - start)
        self.timings = {str(name): seconds for name, seconds in best.items()}
        if best["eager"] <= best[self.mode]:
            took = ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in best.items())
            self.reason = f"it is the faster way here ({took})"
            self._route, self.mode, self._unchecked = None, "eager", 0


def numbers_of(solver: Solver) -> Hashable:
    """The tensors among the options of a solver: on the host their values, which a capture keeps, else their place."""
    options = [v for v in getattr(solver, "__dict__", {}).values() if isinstance(v, Tensor)]
    return tuple(tuple(t.reshape(-1).tolist()) if t.device.type == "cpu" else t.data_ptr() for t in options)


def _only_device(tensors: Sequence[Tensor]) -> torch.device:
    devices = sorted({str(t.device) for t in tensors})
    if len(devices) > 1:
        raise Unfit(f"params, hparams and data must be on one device; they are on {' and '.join(devices)}")
    return tensors[0].device


def _apart(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The distance relative to the length of what is expected, over all tensors; NaN where one is not finite."""
    both = [torch.cat([t.detach().reshape(-1).double() for t in side]) for side in (found, expected)]
    length = torch.linalg.vector_norm(both[1])
    distance = torch.linalg.vector_norm(both[0] - both[1])
    return float(torch.where(distance == 0, distance, distance / length))
