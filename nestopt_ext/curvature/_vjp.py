"""Products with a retained graph, for one cotangent and for many at once."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import has_torch_function

from .._types import TensorList

#: Cotangents that are carried through a graph at once; each takes the memory of a backward pass of its own.
_AT_ONCE = 64


def backward(
    outputs: TensorList, inputs: TensorList, cotangents: TensorList, *, create_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """``torch.autograd.grad`` for cotangents that are known to be like the outputs; the graph is kept.

    The checks of each pair, left out here, take a fifth of the time of a small product. The engine repeats those of
    shape and dtype.
    """
    if has_torch_function((*outputs, *inputs)):  # a subclass, or a mode, that has a say in it
        return torch.autograd.grad(
            outputs, inputs, cotangents, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
    found: tuple[Tensor | None, ...] = _engine_run_backward(
        tuple(outputs), tuple(cotangents), True, create_graph, tuple(inputs), True, accumulate_grad=False
    )
    return found


def vjp(outputs: TensorList, inputs: TensorList, cotangents: TensorList) -> TensorList:
    """The sum of cotangent times derivative, for each input; zeros where ``outputs`` do not depend on one."""
    found = backward(outputs, inputs, cotangents)
    return owned(
        [torch.zeros_like(i) if f is None else f.detach() for i, f in zip(inputs, found, strict=True)], cotangents
    )


def vjps(outputs: TensorList, inputs: TensorList, cotangents: TensorList) -> TensorList:
    """The same for k lists of cotangents, [k, *shape] for each output; gives [k, *shape] for each input.

    The graph is passed once for all of them, or once for each where PyTorch has no rule for that.
    """
    count = cotangents[0].shape[0]
    parts = []
    for start in range(0, count, _AT_ONCE):
        part = [c[start : start + _AT_ONCE] for c in cotangents]
        try:
            found = torch.autograd.grad(
                outputs, inputs, part, retain_graph=True, allow_unused=True, is_grads_batched=True
            )
        except (RuntimeError, NotImplementedError):  # an operation without a batching rule, or too little memory
            parts += [[t.unsqueeze(0) for t in vjp(outputs, inputs, list(row))] for row in zip(*part, strict=True)]
            continue
        rows = part[0].shape[0]
        parts.append(
            owned(
                [
                    i.new_zeros((rows, *i.shape)) if f is None else f.detach()
                    for i, f in zip(inputs, found, strict=True)
                ],
                part,
            )
        )
    return joined(parts, lambda: [i.new_zeros((0, *i.shape)) for i in inputs])


def owned(tensors: TensorList, others: TensorList) -> TensorList:
    """The tensors, copied where they share memory with one of ``others``, with each other, or within themselves.

    Autograd hands out the same tensor for both sides of a sum, and expanded ones for the terms of a reduction; whoever
    gets them may write to them.
    """
    taken = {t.untyped_storage().data_ptr() for t in others if t.numel()}
    result = []
    for t in tensors:
        address = t.untyped_storage().data_ptr()
        strides = t.stride()
        expanded = 0 in strides and any(size > 1 and stride == 0 for size, stride in zip(t.shape, strides, strict=True))
        result.append(t.clone(memory_format=torch.contiguous_format) if address in taken or expanded else t)
        if t.numel():
            taken.add(address)
    return result


def joined(parts: Sequence[TensorList], empty: Callable[[], TensorList]) -> TensorList:
    """Lists one after another along the leading dimension of their tensors."""
    if not parts:
        return empty()
    return list(parts[0]) if len(parts) == 1 else [torch.cat(column) for column in zip(*parts, strict=True)]
