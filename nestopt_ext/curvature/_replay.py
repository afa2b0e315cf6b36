"""Products with the same matrix again and again, replayed as a flat list of operator calls.

A product by autograd walks the graph of the gradient each time: it makes views anew, multiplies by the same factors
one after another, and allocates each intermediate result. For a small model that bookkeeping is most of the time. Here
one product is recorded below autograd. What does not depend on the vector is kept as a constant, views are made once
on memory that stays, factors are merged, sums are left to the matrix products, and the rest is called again for each
vector.

A recording is a shortcut and never a different answer. It is used only on the CPU, for float32 and float64, where it
is small, and after it was held against autograd on random numbers and against zero, which it must map to zero exactly:
anything that reached the result past PyTorch's dispatcher would show there. Whatever it cannot represent (an operator
that writes in place or draws random numbers, a subclass, a number read from the vector) is left to autograd, and so
are all products after a tensor that the graph saved was changed, which is for autograd to refuse.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .._types import TensorList
from ._program import Program, Recorder, compiled
from ._series import sum_by_products

#: A recording costs as much time as about this many products save.
_WORTH = 8
#: Above these sizes the arithmetic outweighs the bookkeeping, and the memory that stays would be felt.
_MOST_BYTES = 8 * 2**20
#: Between a replay and autograd there is rounding only, in units of eps of the whole vector.
_ROUNDING = 1e3

_SEED = 0


class Replay:
    """The products of one matrix: by ``product`` at first, and by a recording of it once that pays."""

    def __init__(self, product: Callable[[TensorList], TensorList], params: TensorList) -> None:
        self._product = product
        self._params = params
        self._count = 0
        self._expected = 0
        self._program: Program | None = None
        self._open = True
        self._busy = threading.Lock()

    def expect(self, num_products: int) -> None:
        """Says that so many products are about to come."""
        self._expected = self._count + num_products

    def __call__(self, v: TensorList) -> TensorList:
        """The product with ``v``, in new memory."""
        self._count += 1
        with self._recording(v) as program:
            if program is not None:
                return program(v)
        return self._product(v)

    def neumann_sum(
        self, v: TensorList, num_terms: int, alpha: Tensor, damping: float
    ) -> tuple[TensorList, Tensor] | None:
        """The Neumann sum with ``num_terms`` products, and the squared norms of its terms; None without a recording."""
        with self._recording(v) as program:
            if program is None:
                return None
            with torch.no_grad():
                torch._foreach_copy_(program.inputs, v)
                found = sum_by_products(program.inputs, program.run, num_terms, alpha, damping)
            if not program.holds():  # another thread was at it, which is for autograd to refuse
                return None
            self._count += num_terms
            return found

    @contextmanager
    def _recording(self, v: TensorList) -> Iterator[Program | None]:
        """The recording, if it pays and can be used for ``v``, for this thread alone: it has one set of buffers."""
        fit = self.pays() and _plain_surroundings() and all(map(_replayable, v))
        if not (fit and self._busy.acquire(blocking=False)):
            yield None
            return
        try:
            if self._program is None:
                self._program = _record(self._product, self._params)
                self._open = self._program is not None
            yield self._program if self._program is not None and self._program.holds() else None
        finally:
            self._busy.release()

    def pays(self) -> bool:
        """Whether there is a recording, or one is worth its time and not known to be impossible."""
        if not self._open:
            return False
        return self._program is not None or self._expected - self._count >= _WORTH or self._count > _WORTH


def _replayable(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return plain and tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64)


def _plain_surroundings() -> bool:
    """Whether operators called here do what they did when they were recorded."""
    return not (
        torch.is_autocast_enabled("cpu")
        or torch.is_inference_mode_enabled()
        or torch.is_anomaly_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _num_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _record(product: Callable[[TensorList], TensorList], params: TensorList) -> Program | None:
    """A program for the product, checked; None where there cannot be one."""
    if not all(map(_replayable, params)) or _num_bytes(params) > _MOST_BYTES // 4:
        return None
    generator = torch.Generator().manual_seed(_SEED)
    probe = [torch.empty(p.shape, dtype=p.dtype, device="cpu").uniform_(-1, 1, generator=generator) for p in params]
    recorder = Recorder(_MOST_BYTES)
    try:
        with recorder:
            expected = product(probe)
        with torch.no_grad():
            program = compiled(recorder.log, probe, expected)
            return program if program.num_bytes <= _MOST_BYTES and _agree(program, probe, expected) else None
    except Exception:  # a shortcut has no errors of its own: what is wrong with the product, autograd will say
        return None


def _agree(program: Program, probe: TensorList, expected: TensorList) -> bool:
    """Whether the program gives for ``probe`` what was recorded, and zero for zero."""
    torch._foreach_zero_(program.inputs)
    if any(bool(t.any()) for t in program.run()):
        return False
    torch._foreach_copy_(program.inputs, probe)
    here, there = (torch.cat([t.reshape(-1) for t in side]) for side in (program.run(), expected))
    eps = max(torch.finfo(p.dtype).eps for p in probe)
    return bool(torch.linalg.vector_norm(here - there) <= _ROUNDING * eps * torch.linalg.vector_norm(there))
