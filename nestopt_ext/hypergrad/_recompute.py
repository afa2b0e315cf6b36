"""An iteration whose graph keeps a state now and then in place of all its tensors, and computes them again when asked.

The steps are run in segments. Autograd builds the graph of every segment as usual, but hands each tensor that it would
save to a hook, which keeps its place in order and drops it when the segment is done. The first time that a derivative
asks for one, the segment is run once more from the state it started with, and what autograd saves on the way, in the
same order, answers for all of them. The graph is thus the true one: derivatives of any order, and in tensors that the
steps reach without being handed them, are those of the plain iteration.

``torch.utils.checkpoint`` does the same for a function that is not differentiated inside. A step usually is, and every
derivative inside would run its checkpoint again; here a segment keeps its tensors until it is done.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _lists
from .._types import TensorList
from ..curvature._evaluation import observe, preserved_rng

#: A flat state, and the number of the step that is to follow.
Step = Callable[[TensorList, int], TensorList]


def run_recomputing(caller: str, step: Step, state: TensorList, steps: range, given: TensorList) -> TensorList:
    """The state after ``steps``, in about sqrt(len(steps)) segments; ``given`` is what the steps read beside it."""
    length = math.isqrt(max(len(steps) - 1, 0)) + 1
    cache = _Cache()
    for start in range(0, len(steps), length):
        segment = _Segment(caller, step, steps[start : start + length], state, given, cache)
        state = segment.run(state)
    return state


@dataclass(frozen=True)
class _Place:
    """What the graph holds for a tensor that it has saved."""

    segment: _Segment
    index: int


class _Cache:
    """The tensors of the segment that was computed again last."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # autograd has a thread for each device
        self._owner: int | None = None
        self._tensors: TensorList = []

    def get(self, place: _Place) -> Tensor:
        with self.lock:
            if self._owner != place.segment.start:
                self._owner, self._tensors = None, []  # the old ones go before the new ones come
                self._tensors = place.segment.compute_again()
                self._owner = place.segment.start
            return self._tensors[place.index]


class _Segment:
    """Steps in a row."""

    def __init__(
        self, caller: str, step: Step, steps: range, state: TensorList, given: TensorList, cache: _Cache
    ) -> None:
        self.start = steps.start
        self._caller = caller
        self._step = step
        self._steps = steps
        self._begin = [(t.detach(), t.requires_grad) for t in state]
        self._given = [(t, t._version) for t in given]
        self._cache = cache
        self._rng = _random_state()
        self._autocast = _autocast_state()
        self._open: TensorList | None = None
        self._saved: list[tuple[torch.Size, torch.dtype, torch.device]] = []
        self._end: TensorList = []

    def run(self, state: TensorList) -> TensorList:
        """The steps with their graph, whose tensors are kept until they are done."""
        self._open = []
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack), _autocast(self._autocast):
                for number in self._steps:
                    state = self._step(state, number)
            self._saved = [_kind(t) for t in self._open]
            self._end = [t.detach() for t in state]
        finally:
            self._open = None
        return state

    def compute_again(self) -> TensorList:
        """The tensors that the graph has saved; random state, and older tensors that a step writes to, are put back."""
        for tensor, version in self._given:
            if tensor._version != version:
                raise RuntimeError(
                    f"{self._caller}: hparams must stay as they are until the derivative is taken, while"
                    f" recompute=True; got one of shape {_lists.shape_name(tensor.shape)} changed in place since."
                )
        tensors: TensorList = []
        with preserved_rng():
            # PyTorch takes other formulas for some derivatives while anyone watches the operators, so the steps are
            # run unwatched. What a step writes to is learned from one that is watched and undone.
            watched = observe(lambda: self._compute([], self._steps[:1]))
            with watched.differentiating(), torch.enable_grad():
                end = self._compute(tensors, self._steps)
        if [_kind(t) for t in tensors] != self._saved or not _agree(end, self._end, [t for t, _ in self._begin]):
            raise RuntimeError(
                f"{self._caller}: step_fn must compute the same each time, while recompute=True; got another result for"
                f" the steps from {self.start} on when they were computed again. Choose a batch by the argument step,"
                " not by next(...), and leave out torch.Generator objects of your own."
            )
        return tensors

    def _compute(self, tensors: TensorList, steps: range) -> TensorList:
        _set_random_state(self._rng)

        def keep(tensor: Tensor) -> Tensor:
            kept = tensor.detach()
            tensors.append(kept)
            return kept

        state = [t.detach().requires_grad_(wanted) for t, wanted in self._begin]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept), _autocast(self._autocast):
            for number in steps:
                state = self._step(state, number)
        return [t.detach() for t in state]

    def _pack(self, tensor: Tensor) -> _Place:
        assert self._open is not None
        self._open.append(tensor.detach())
        return _Place(self, len(self._open) - 1)

    def _unpack(self, place: _Place) -> Tensor:
        return self._cache.get(place) if self._open is None else self._open[place.index]


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device


def _agree(again: TensorList, first: TensorList, begin: TensorList) -> bool:
    """Whether two runs from ``begin`` ended alike, up to the order of sums that some CUDA kernels leave open.

    They may differ by a hundredth of what the steps did, and by rounding; another batch differs by about as much as the
    steps did. The host waits for each device once.
    """
    return all(
        _agree_on_device(*[[tensors[i] for i in positions] for tensors in (again, first, begin)])
        for positions in _lists.by_device(first).values()
    )


def _agree_on_device(again: TensorList, first: TensorList, begin: TensorList) -> bool:
    exact = [(a == f).all() for a, f in zip(again, first, strict=True) if not f.is_floating_point()]
    floating = [i for i, f in enumerate(first) if f.is_floating_point()]
    if floating:
        eps = max(torch.finfo(first[i].dtype).eps for i in floating)
        apart = _lists.norm([again[i] - first[i] for i in floating])
        moved = _lists.norm([first[i] - begin[i] for i in floating])
        allowed = 0.01 * moved + 64 * eps * _lists.norm([first[i] for i in floating])
        exact.append((apart <= allowed) | ~allowed.isfinite())  # what is not finite cannot be compared
    return not exact or bool(torch.stack(exact).all())


def _random_state() -> tuple[Tensor, TensorList]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return torch.get_rng_state(), cuda


def _set_random_state(state: tuple[Tensor, TensorList]) -> None:
    cpu, cuda = state
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)


def _autocast_state() -> list[tuple[str, torch.dtype]]:
    """Device types under autocast, and its dtype for each."""
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [(kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)]


@contextlib.contextmanager
def _autocast(state: list[tuple[str, torch.dtype]]) -> Iterator[None]:
    """The same autocast, without its cache: a weight cast in one segment must be cast again when another is rerun."""
    with contextlib.ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            dtype = dict(state).get(kind)
            if dtype is not None:
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=False))
            elif torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
