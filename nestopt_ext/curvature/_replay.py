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
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._types import TensorList
from ._program import Program, Recorder, compiled

#: A recording costs as much time as about this many products save.
_WORTH = 10
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
        wanted = self._open and (self._program is not None or self._pays())
        if wanted and _plain_surroundings() and all(map(_replayable, v)) and self._busy.acquire(blocking=False):
            # The program has one set of buffers: a second thread goes by autograd meanwhile.
            try:
                if self._program is None:
                    self._program = _record(self._product, self._params)
                    self._open = self._program is not None
                if self._program is not None and self._program.holds():
                    return self._program(v)
            finally:
                self._busy.release()
        return self._product(v)

    def _pays(self) -> bool:
        return self._expected - self._count >= _WORTH or self._count > _WORTH


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
    )


def _num_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _record(product: Callable[[TensorList], TensorList], params: TensorList) -> Program | None:
    """A program for the product, checked; None where there cannot be one."""
    if not all(map(_replayable, params)) or _num_bytes(params) > _MOST_BYTES // 4:
        return None
    generator = torch.Generator().manual_seed(_SEED)
    probe = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in params]
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
    for tensor in program([torch.zeros_like(p) for p in probe]):
        if bool(tensor.any()):
            return False
    here, there = (torch.cat([t.reshape(-1) for t in side]) for side in (program(probe), expected))
    eps = max(torch.finfo(p.dtype).eps for p in probe)
    return bool(torch.linalg.vector_norm(here - there) <= _ROUNDING * eps * torch.linalg.vector_norm(there))
