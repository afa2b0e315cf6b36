"""Evaluates a caller's loss so that nothing but its value and graph is left behind.

A closure in training mode draws random numbers, updates running statistics, counts batches. A hypergradient is a
question, not a training step, so all of that is undone: the random number generators and every tensor that existed
before and was written in place are put back bit for bit, after an exception too.

The graph may have saved a tensor as the closure left it (a running mean that a later layer reads). So the written
values are kept, and :meth:`Evaluation.differentiating` puts them back for as long as the graph is being differentiated.

What is undone is what PyTorch sees: in-place writes that pass its dispatcher, its global generators on CPU and CUDA,
and any ``torch.Generator`` handed to an operator. A Python attribute that the closure rebinds, a write through NumPy,
and the generators of ``random`` and ``numpy`` are the closure's own affair.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .. import _lists
from .._types import Loss, TensorList


class Evaluation:
    """A scalar loss with its graph, and what its evaluation had written into tensors that are now as before."""

    def __init__(self, loss: Tensor, regions: TensorList, written: TensorList) -> None:
        self.loss = loss
        self._regions = regions
        self._written = written

    def differentiating(self) -> AbstractContextManager[None]:
        """While open, tensors hold what the graph saw when it was built; afterwards, what they held on entry."""
        return self._restored() if self._regions else nullcontext()

    @contextmanager
    def _restored(self) -> Iterator[None]:
        present = [region.clone() for region in self._regions]
        try:
            _write(self._regions, self._written)
            yield
        finally:
            _write(self._regions[::-1], present[::-1])


def evaluate(caller: str, name: str, loss: Loss) -> Evaluation:
    """Calls ``loss`` if it is a closure, and checks that it is a scalar with a graph."""
    if isinstance(loss, Tensor):
        evaluation = Evaluation(loss, [], [])
    elif callable(loss):
        evaluation = _call(loss)
    else:
        got = _lists.value_name(loss)
        raise TypeError(f"{caller}: {name} must be a scalar tensor or a zero-argument closure; got {got}.")
    _check_scalar(caller, name, evaluation.loss)
    return evaluation


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Puts the global generators of the CPU and, if it is in use, of CUDA back where they were."""
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def _call(closure: Callable[[], Tensor]) -> Evaluation:
    recorder = _Recorder()
    written: TensorList = []
    try:
        with preserved_rng(), torch.enable_grad(), recorder:
            loss = closure()
        written = [region.clone() for region in recorder.regions]
    finally:
        recorder.undo()
    return Evaluation(loss, recorder.regions, written)


def _check_scalar(caller: str, name: str, loss: object) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"{caller}: {name} must return a scalar tensor; got {_lists.value_name(loss)}.")
    if loss.numel() != 1:
        raise ValueError(
            f"{caller}: {name} must be a scalar; got shape {_lists.shape_name(loss.shape)}. Reduce it with .mean()."
        )
    if not loss.is_floating_point():
        raise TypeError(f"{caller}: {name} must be of a real floating dtype; got {_lists.dtype_name(loss.dtype)}.")
    if not loss.requires_grad:
        raise ValueError(
            f"{caller}: {name} must have a graph; got a tensor that does not require grad."
            " Compute it with grad mode on, from tensors that require grad, without .detach() or .item()."
        )


def _write(regions: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Restores values without a trace in the version counters: each region is a ``.data`` alias with a counter of its
    own.

    A bump would make autograd refuse the graph of a batch normalization, which saves its running statistics.
    """
    for region, value in zip(regions, values, strict=True):
        region.copy_(value)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Copies each region of older memory just before an operator first writes to it.

    A storage is older when it first turns up as an input, and new when it first turns up as an output.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.regions: TensorList = []
        self._before: TensorList = []
        self._seen: set[tuple[object, ...]] = set()
        self._older: set[int] = set()
        self._newer: set[int] = set()
        self._generators: list[tuple[torch.Generator, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((*args, *kwargs.values())):
            storage = _storage(tensor)
            if storage is not None and storage not in self._newer:
                self._older.add(storage)
        for position, name in _written_arguments(func):
            for tensor in _tensors((args[position] if position < len(args) else kwargs.get(name),)):
                self._keep(tensor)
        generator = kwargs.get("generator")
        if isinstance(generator, torch.Generator) and all(generator is not known for known, _ in self._generators):
            self._generators.append((generator, generator.get_state()))
        result = func(*args, **kwargs)
        for tensor in _tensors((result,)):
            storage = _storage(tensor)
            if storage is not None and storage not in self._older:
                self._newer.add(storage)
        return result

    def undo(self) -> None:
        """The last region first, so that of overlapping regions the oldest copy is written last."""
        for generator, state in self._generators:
            generator.set_state(state)
        _write(self.regions[::-1], self._before[::-1])

    def _keep(self, tensor: Tensor) -> None:
        storage = _storage(tensor)
        key = (storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if storage is None or storage in self._newer or key in self._seen:
            return
        self._seen.add(key)
        region = tensor.data
        self._before.append(region.clone())
        self.regions.append(region)


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _storage(tensor: Tensor) -> int | None:
    """The identity of the memory; None for a layout without one of its own."""
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else None


@functools.cache
def _written_arguments(func: Any) -> list[tuple[int, str]]:
    """Position and name of each argument an operator writes: those its schema marks, and running statistics.

    The schemas of batch normalization leave the latter unmarked.
    """
    written: list[tuple[int, str]] = []
    arguments = func._schema.arguments if isinstance(func, torch._ops.OpOverload) else ()
    for position, argument in enumerate(arguments):
        marked = argument.alias_info is not None and argument.alias_info.is_write
        if marked or argument.name.startswith("running_"):
            written.append((position, argument.name))
    return written
