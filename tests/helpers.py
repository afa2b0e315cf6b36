"""Layouts, snapshots of memory and the error criterion, shared by the tests of the ops."""

import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
FLOATING = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
POISON = 12345.0

#: Empty, 0-dim, one element, odd, around the size of a chunk of the kernels, several chunks, several dimensions.
SHAPES = [(0,), (), (1,), (3, 0, 2), (7,), (33, 3), (16383,), (16384,), (16385,), (2, 3, 5501)]


def opmath(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def storage_bytes(t):
    """The whole storage of a tensor, seen as bytes; a view, not a copy."""
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())


def byte_view(t, storage):
    """The bytes of a view ``t`` inside ``storage``, which has the size of the storage of ``t``."""
    size = t.element_size()
    return storage.as_strided([*t.shape, size], [s * size for s in t.stride()] + [1], t.storage_offset() * size)


class Memory:
    """Remembers whole storages, so that any write shows, beside a tensor too."""

    def __init__(self, tensors):
        self.tensors = list(tensors)
        self.before = [storage_bytes(t).clone() for t in self.tensors]
        self.versions = [None if t.is_inference() else t._version for t in self.tensors]

    def unchanged(self):
        """Nothing was written, and autograd was told of no write."""
        return all(
            torch.equal(before, storage_bytes(t)) and (version is None or version == t._version)
            for t, before, version in zip(self.tensors, self.before, self.versions, strict=True)
        )

    def changed_only(self, written):
        """No byte outside the views ``written`` has changed."""
        views = {}
        for w in written:
            if w.numel():
                views.setdefault(w.untyped_storage().data_ptr(), []).append(w)
        for t, before in zip(self.tensors, self.before, strict=True):
            allowed = torch.zeros_like(before, dtype=torch.bool)
            for w in views.get(t.untyped_storage().data_ptr(), []):
                byte_view(w, allowed).fill_(True)
            if bool(((before != storage_bytes(t)) & ~allowed).any()):
                return False
        return True


def _as_integers(t):
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.detach().contiguous().view(integer)


def same_bits(a, b):
    """Bitwise equality: -0.0 is not 0.0, and a NaN equals itself."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_as_integers(a), _as_integers(b))


def all_same_bits(first, second):
    first, second = list(first), list(second)
    return len(first) == len(second) and all(map(same_bits, first, second))


# ---- refusals -------------------------------------------------------------------------------------------------------


def assert_refused(call, tensors, kind, message):
    """The call raises ``kind`` with this message, to the letter, and writes to none of the tensors."""
    memory = Memory(t for t in tensors if t.layout == torch.strided and t.device.type == "cpu")
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        call()
    assert memory.unchanged()


def freed(*shape):
    """A tensor whose storage was taken away but for 8 bytes."""
    t = torch.zeros(shape)
    t.untyped_storage().resize_(8)
    return t


def of_inference_mode(*shape):
    with torch.inference_mode():
        return torch.zeros(shape)


# ---- layouts: each puts given values into a view of a poisoned storage ----------------------------------------------


def _inside(shape, dtype, device, extra=0):
    return torch.full((math.prod(shape) + extra,), POISON, dtype=dtype, device=device)


def contiguous(values):
    return values.clone(memory_format=torch.contiguous_format)


def offset(values):
    """Starts one element into its storage, off every boundary that vector instructions like."""
    out = _inside(values.shape, values.dtype, values.device, 4)[1 : 1 + values.numel()].view(values.shape)
    return out.copy_(values)


def permuted(values):
    """Dense, the dimensions in storage in another order."""
    order = [*range(1, values.dim()), 0] if values.dim() else []
    inverse = [order.index(d) for d in range(values.dim())]
    return (
        _inside(values.shape, values.dtype, values.device)
        .view([values.shape[d] for d in order])
        .permute(inverse)
        .copy_(values)
    )


def channels_last(values):
    return values.clone(memory_format=torch.channels_last) if values.dim() == 4 else permuted(values)


def every_other(values):
    """Every second element of the last dimension."""
    if values.dim() == 0:
        return offset(values)
    wide = (*values.shape[:-1], 2 * values.shape[-1])
    return _inside(wide, values.dtype, values.device).view(wide)[..., 1::2].copy_(values)


def padded(values):
    """Rows inside longer rows, columns inside taller ones."""
    wide = tuple(s + 3 for s in values.shape)
    out = _inside(wide, values.dtype, values.device).view(wide)
    for d, size in enumerate(values.shape):
        out = out.narrow(d, 1, size)
    return out.copy_(values)


LAYOUTS = {f.__name__: f for f in (contiguous, offset, permuted, channels_last, every_other, padded)}


def expanded(values):
    """Only to be read: the first row, for every row."""
    return values[:1].clone().expand(values.shape) if values.dim() else values.clone()


def random_lists(shapes, dtypes, layouts, device="cpu"):
    """A list of normal random values for each layout; ``dtypes`` has those of an entry, one for each list, in turns."""
    lists = [[] for _ in layouts]
    for i, shape in enumerate(shapes):
        for list_, layout, dtype in zip(lists, layouts, dtypes[i % len(dtypes)], strict=True):
            list_.append(layout(torch.randn(shape, dtype=torch.float64).to(device=device, dtype=dtype)))
    return lists


def as_number(value, device="cpu"):
    """A tensor of one element from a number; a tensor, and None, as they are."""
    if value is None or isinstance(value, torch.Tensor):
        return value
    return torch.tensor(value, dtype=torch.float64, device=device)


# ---- the criterion --------------------------------------------------------------------------------------------------


def exact(t):
    """The values in extended precision."""
    return t.detach().cpu().double().numpy().astype(np.longdouble)


def error(found, truth):
    """Largest deviation over a list, relative to the largest value."""
    worst = scale = 0.0
    for f, t in zip(found, truth, strict=True):
        if f.numel():
            assert f.shape == t.shape
            worst = max(worst, float(np.nan_to_num(np.abs(exact(f) - t), nan=np.inf).max()))
            scale = max(scale, float(np.abs(t).max()))
    return worst / scale if scale else worst


def assert_as_good_as(found, reference, truth):
    """The error of ``found`` is at most twice that of eager PyTorch, or of one rounding where eager was lucky."""
    for dtype in {f.dtype for f in found}:
        mine = [i for i, f in enumerate(found) if f.dtype == dtype]
        f, r, t = ([x[i] for i in mine] for x in (found, reference, truth))
        assert error(f, t) <= 2 * max(error(r, t), torch.finfo(dtype).eps / 2), dtype


# ---- other processes ------------------------------------------------------------------------------------------------


def run_python(code, *, timeout=120, **environment):
    """Runs code in a new interpreter beside the tests; returns the finished process."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "2", **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=timeout, cwd=ROOT
    )


def product(**choices):
    """All combinations, as dicts."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
