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
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .. import _lists
from .._types import Loss, TensorList

#: Generators handed to operators, and where they stood.
_GeneratorStates: TypeAlias = list[tuple[torch.Generator, Tensor]]


_NOTHING = nullcontext()


class Evaluation:
    """A value with its graph, and what its evaluation had written into tensors that are now as before."""

    def __init__(self, value: Any, regions: TensorList, written: TensorList) -> None:
        self.value = value
        self._regions = regions
        self._written = written

    @property
    def loss(self) -> Tensor:
        """The value, where it is a scalar loss."""
        loss: Tensor = self.value
        return loss

    def wrote(self) -> bool:
        """Whether older tensors would hold other values now, had their writing not been undone."""
        return not all(map(torch.equal, self._regions, self._written))

    def differentiating(self) -> AbstractContextManager[None]:
        """While open, tensors hold what the graph saw when it was built; afterwards, what they held on entry."""
        return self._restored() if self._regions else _NOTHING

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
        evaluation = observe(loss)
    else:
        got = _lists.value_name(loss)
        raise TypeError(f"{caller}: {name} must be a scalar tensor or a zero-argument closure; got {got}.")
    check_scalar(caller, name, evaluation.value)
    return evaluation


def observe(closure: Callable[[], Any]) -> Evaluation:
    """Calls a closure once, with grad mode on, and leaves nothing of it behind but its value."""
    with Replay().run() as call:
        return call(closure)


class Replay:
    """Calls of closures in sequence, which draw the same random numbers each time the sequence is run."""

    def __init__(self) -> None:
        self._start = _global_rng()
        self._own: _GeneratorStates = []

    @contextmanager
    def run(self, *, undo: bool = True) -> Iterator[Callable[[Callable[[], Any]], Evaluation]]:
        """Yields what calls a closure; random numbers go on from one call to the next, and are put back at the end.

        Without ``undo``, what the closures write stays written.
        """
        present: _GeneratorStates = []
        with preserved_rng():
            _set_global_rng(self._start)
            try:
                for generator, state in self._own:
                    present.append((generator, generator.get_state()))
                    generator.set_state(state)
                yield lambda closure: self._call(closure, present, undo)
            finally:
                for generator, state in present:
                    generator.set_state(state)

    def _call(self, closure: Callable[[], Any], present: _GeneratorStates, undo: bool) -> Evaluation:
        recorder = _Recorder() if undo else _GeneratorRecorder()
        written: TensorList = []
        try:
            with torch.enable_grad(), recorder:
                value = closure()
            written = [region.clone() for region in recorder.regions]
        finally:
            recorder.undo()
            known = {id(generator) for generator, _ in self._own}
            drawn = [entry for entry in recorder.generators if id(entry[0]) not in known]
            self._own += drawn
            present += drawn
        return Evaluation(value, recorder.regions, written)


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Puts the global generators of the CPU and, if it is in use, of CUDA back where they were."""
    state = _global_rng()
    try:
        yield
    finally:
        _set_global_rng(state)


@contextmanager
def seeded_from_cpu() -> Iterator[None]:
    """Draws one number from the CPU, and while open all global generators start from it; then they go on as before."""
    seed = int(torch.empty((), dtype=torch.int64).random_())
    with preserved_rng():
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.manual_seed_all(seed)
        yield


def _global_rng() -> tuple[Tensor, TensorList]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() and not _capturing() else []  # type: ignore[no-untyped-call]
    return torch.get_rng_state(), cuda


def _capturing() -> bool:
    """Whether a CUDA graph is being captured: where its generators will stand in a replay is for its owner to say."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


def _set_global_rng(state: tuple[Tensor, TensorList]) -> None:
    cpu, cuda = state
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)


def check_scalar(caller: str, name: str, loss: object) -> None:
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


class _GeneratorRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the state of each generator that is handed to an operator, as it was before the first use."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.regions: TensorList = []
        self.generators: _GeneratorStates = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._note_generator(kwargs.get("generator"))
        return func(*args, **kwargs)

    def _note_generator(self, generator: Any) -> None:
        new = isinstance(generator, torch.Generator) and all(generator is not known for known, _ in self.generators)
        if new and (generator.device.type != "cuda" or not _capturing()):
            self.generators.append((generator, generator.get_state()))

    def undo(self) -> None:
        """Nothing but the generators is recorded, and their states are put back by whoever asked for them."""


class _Recorder(_GeneratorRecorder):  # type: ignore[no-untyped-call]
    """Copies each region of older memory just before an operator first writes to it.

    A storage is older when it first turns up as an input, and new when it first turns up as an output.
    """

    def __init__(self) -> None:
        super().__init__()
        self._before: TensorList = []
        self._seen: set[tuple[object, ...]] = set()
        self._older: set[int] = set()
        self._newer: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        older, newer = self._older, self._newer
        for tensor in _tensors((*args, *kwargs.values()) if kwargs else args):
            storage = _storage(tensor)
            if storage is not None and storage not in newer:
                older.add(storage)
        for position, name in _written_arguments(func):
            for tensor in _tensors((args[position] if position < len(args) else kwargs.get(name),)):
                self._keep(tensor)
        if kwargs:
            self._note_generator(kwargs.get("generator"))
        result = func(*args, **kwargs)
        for tensor in _tensors((result,)):
            storage = _storage(tensor)
            if storage is not None and storage not in older:
                newer.add(storage)
        return result

    def undo(self) -> None:
        """The last region first, so that of overlapping regions the oldest copy is written last."""
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


def _tensors(values: Sequence[Any]) -> TensorList:
    found: TensorList = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, _SEQUENCES):
            found += _tensors(value)
    return found


#: As a tuple: a union would be made anew for each question.
_SEQUENCES = (list, tuple)


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
