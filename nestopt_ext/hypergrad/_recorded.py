"""A step on the CPU as three recordings of its operators: up to the gradients, one product, and the mixed product.

A recording of a product (``curvature._replay``) holds what does not depend on the vector as constants, which are of one
point and one batch. Here the operators that lead to those constants are recorded as well, from the params, the hparams
and the data on, those among them that were spent on making the recording of the product shorter. Run again at another
point, they refill the constants where they lie, and the recordings of the products hold there.
"""

from __future__ import annotations

import operator
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _lists
from .._operator import LinearOperator
from .._types import TensorList
from ..curvature._evaluation import observe
from ..curvature._gradient import Gradient
from ..curvature._program import Entry, Program, Recorder, compiled
from ..curvature._program import Unfit as Unrecordable
from ..curvature._series import sum_by_products
from ..solvers._product import Product
from ..solvers._solve import invert
from ._batch import Batch
from ._routes import Reports, Task, Unfit
from .hypergradient import differences, outer_gradients

#: Of all that is computed on the way; above it the arithmetic outweighs what a recording saves.
_MOST_BYTES = 64 * 2**20

#: What ``torch.compile`` makes a product with.
_BACKEND = "inductor"


class Recorded:
    """A step taken by recordings; with ``compile_product`` the product is one that ``torch.compile`` made of its own.

    The solver runs as ever, so its options and its verdict are those of a hypergradient.
    """

    def __init__(self, task: Task, reports: Reports, batch: Batch, *, compile_product: bool = False) -> None:
        variables = task.variables
        _check(task, batch)
        self._variables = variables
        self._solver = task.solver
        self._reports = reports
        self._inputs, data = batch.staying()
        try:
            self._set_up(_Recording(task, data, self._inputs), compile_product)
        except Unrecordable as fault:
            raise Unfit(
                "a step cannot be recorded that draws random numbers, writes to older tensors, takes a shape or a"
                f" number from values, or is too large{f' (at {fault})' if str(fault) else ''}"
            ) from None

    def _set_up(self, recording: _Recording, compile_product: bool) -> None:
        product: Callable[[TensorList], TensorList]
        with torch.no_grad():
            if compile_product:
                product, constants = _by_inductor(recording), recording.outside(recording.product)
            else:
                product = recording.program(recording.product, recording.v, recording.products)
                constants = product.constants()
            self._mixed = recording.program(recording.mixed, recording.u, recording.mixed_products)
            self._refilled = recording.bases([*constants, *self._mixed.constants()])
            self._gradients = recording.up_to([*self._refilled, *recording.outer_grads])
        self._in_params, self._in_hparams = recording.in_params, recording.in_hparams
        self._in_mixed = recording.in_mixed
        _, self._structure = _lists.flatten(self._variables.caller, "params", recording.v)
        self._matrix = _Matrix(product, self._variables.params, self._structure)

    def step(self, batch: Batch, number: int) -> tuple[Tensor, ...]:
        """The hypergradient in new memory."""
        params, hparams = self._variables.params, self._variables.hparams
        caller = self._variables.caller
        with torch.no_grad():
            if self._inputs:
                torch._foreach_copy_(self._inputs, batch.tensors)
            found = self._gradients([])
            if self._refilled:
                torch._foreach_copy_(self._refilled, found[: len(self._refilled)])
            outer = iter(found[len(self._refilled) :])
            v = [next(outer) if used else torch.zeros_like(p) for used, p in zip(self._in_params, params, strict=True)]
            direct = [next(outer) if used else None for used in self._in_hparams]
            response: list[Tensor | None] = [None] * len(hparams)
            verdict = None
            if any(self._in_params):
                product = Product(caller, self._matrix, self._structure, v, name="inner_loss's Hessian")
                inverse = invert(caller, product, v, self._solver)
                mixed = iter(self._mixed(inverse.value))
                response = [next(mixed) if used else None for used in self._in_mixed]
                verdict = inverse.verdict
            grads = differences(direct, response, hparams)
        self._reports.take(verdict, number)
        return grads

    def holds(self) -> bool:
        """Everything is computed anew from what tensors hold."""
        return True

    def settle(self) -> None:
        """Nothing is late."""


class _Matrix(LinearOperator):
    """The product as an operator."""

    sums_terms = True

    def __init__(self, product: Callable[[TensorList], TensorList], params: TensorList, structure: Any) -> None:
        super().__init__(params, structure)
        self._product = product

    def flat_product(self, v: TensorList) -> TensorList:
        return self._product(v)

    def flat_loop(
        self, v: TensorList, num_terms: int, alpha: Tensor, damping: float, diagonal: TensorList | None = None
    ) -> tuple[TensorList, Tensor] | None:
        program = self._product
        if diagonal is not None or not isinstance(program, Program):
            return None
        torch._foreach_copy_(program.inputs, v)
        return sum_by_products(program.inputs, program.run, num_terms, alpha, damping)


def _check(task: Task, batch: Batch) -> None:
    """Raises where a recording is not worth trying."""
    if task.curvature is not None:
        raise Unfit("the curvature is the caller's own, and only the Hessian of inner_loss is recorded")
    for tensor in (*task.variables.params, *task.variables.hparams, *batch.tensors):
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
            raise Unfit(f"a tensor is a {type(tensor).__name__} of layout {_lists.dtype_name(tensor.layout)}")
    for tensor in (*task.variables.params, *task.variables.hparams):
        if tensor.dtype not in (torch.float32, torch.float64):
            raise Unfit(f"a param is {_lists.dtype_name(tensor.dtype)}, and float32 and float64 are recorded")
        if not tensor.is_leaf:
            raise Unfit("a param was computed from other tensors, which may change")
    if torch.is_autocast_enabled("cpu"):
        raise Unfit("autocast is on")


class _Recording:
    """The operators of a step in order, and which tensors they begin with."""

    def __init__(self, task: Task, data: tuple[Sequence[Any], Sequence[Any]], inputs: TensorList) -> None:
        variables = task.variables
        caller, params, hparams = variables.caller, variables.params, variables.hparams
        inner, outer = data
        self.v, self.u = _random(params, 0), _random(params, 1)
        recorder = Recorder(_MOST_BYTES)

        def record() -> Any:
            with recorder:
                _, in_params, in_hparams = outer_gradients(caller, task.outer_loss(*outer), variables)
                gradient = Gradient(caller, "inner_loss", task.inner_loss(*inner), params)
                begin = len(recorder.log)
                products = gradient.product(self.v)
                middle = len(recorder.log)
                return in_params, in_hparams, products, gradient.mixed(hparams, self.u), begin, middle

        found = observe(record)
        if found.wrote():  # batch normalization in training does, and its operator does not say so
            raise Unrecordable
        in_params, in_hparams, self.products, mixed, begin, middle = found.value
        self.in_params, self.in_hparams, self.in_mixed = (
            [t is not None for t in g] for g in (in_params, in_hparams, mixed)
        )
        begins = [*params, *hparams, *inputs, *self.v, *self.u]
        names = _Names(begins)
        before, self.product, self.mixed = (
            names.resolved(part) for part in (recorder.log[:begin], recorder.log[begin:middle], recorder.log[middle:])
        )
        self.outer_grads = [names.of(g) for g in (*in_params, *in_hparams) if g is not None]
        self.products = [names.of(g) for g in self.products]
        self.mixed_products = [names.of(g) for g in mixed if g is not None]
        self._log = [*before, *self.product, *self.mixed]
        self._begins = [*begins, *names.older.values()]

    def program(self, log: list[Entry], inputs: TensorList, outputs: TensorList) -> Program:
        """A program of a part, whose constants may be made on the way; how they are becomes part of the recording."""
        folding = Recorder(_MOST_BYTES)
        with folding:
            program = compiled(log, inputs, outputs)
        self._log += folding.log
        return program

    def bases(self, constants: TensorList) -> TensorList:
        """The tensors, each with memory of its own, that hold the constants which depend on what a step begins with."""
        lying = {_storage(t) for t in self._begins}
        owners: dict[int, Tensor] = {}
        for _, _, _, result in self._log:
            for tensor in _tensors((result,)):
                owners.setdefault(_storage(tensor), tensor)
        wanted = dict.fromkeys(_storage(t) for t in constants)
        return [owners[s] for s in wanted if s not in lying and s in owners]

    def outside(self, log: list[Entry]) -> TensorList:
        """What the operators of a part read that they did not make."""
        made = {id(t) for entry in log for t in _tensors((entry[3],))} | {id(t) for t in (*self.v, *self.u)}
        read = {id(t): t for entry in log for t in _tensors((entry[1], tuple(entry[2].values())))}
        return [t for key, t in read.items() if key not in made]

    def up_to(self, outputs: TensorList) -> Program:
        """A program that computes them from what the params, the hparams and the data hold."""
        return compiled(self._log, self._begins, outputs, bound=True)


class _Names:
    """One object for each tensor of a recording.

    Autograd hands out what it has saved as a new object on the same memory, which no operator made.
    """

    def __init__(self, begins: TensorList) -> None:
        self.older: dict[int, Tensor] = {}
        self._known = {id(t) for t in begins}
        self._by_memory = {_memory_key(t): t for t in begins}
        self._storages = {_storage(t) for t in begins}

    def resolved(self, log: Sequence[Entry]) -> list[Entry]:
        entries = []
        for func, args, kwargs, result in log:
            if func is torch.ops.aten.lift_fresh.default:
                continue  # returns its argument
            args = self._replaced(args)
            kwargs = {key: self._replaced(arg) for key, arg in kwargs.items()}
            for tensor in _tensors((result,)):
                self._known.add(id(tensor))
                self._by_memory[_memory_key(tensor)] = tensor
                self._storages.add(_storage(tensor))
            entries.append((func, args, kwargs, result))
        return entries

    def of(self, tensor: Tensor) -> Tensor:
        if id(tensor) in self._known:
            return tensor
        same = self._by_memory.get(_memory_key(tensor))
        if same is not None:
            return same
        if _storage(tensor) in self._storages:
            raise Unfit("a tensor shares memory with another one in a way that is not recorded")
        self.older[id(tensor)] = tensor
        self._known.add(id(tensor))
        self._by_memory[_memory_key(tensor)] = tensor
        return tensor

    def _replaced(self, arg: Any) -> Any:
        if isinstance(arg, Tensor):
            return self.of(arg)
        if isinstance(arg, list | tuple):
            return type(arg)(self._replaced(part) for part in arg)
        return arg


def _by_inductor(recording: _Recording) -> Callable[[TensorList], TensorList]:
    """The product as ``torch.compile`` makes it."""
    if _BACKEND == "inductor" and shutil.which("c++") is None and shutil.which("g++") is None:
        raise Unfit("torch.compile needs a C++ compiler; none was found")
    graph = torch.fx.Graph()
    constants = recording.outside(recording.product)
    nodes: dict[int, Any] = {}
    for i, tensor in enumerate([*recording.v, *constants]):
        nodes[id(tensor)] = graph.placeholder(f"t{i}")

    def replaced(arg: Any) -> Any:
        if isinstance(arg, Tensor):
            return nodes[id(arg)]
        return type(arg)(map(replaced, arg)) if isinstance(arg, list | tuple) else arg

    for func, args, kwargs, result in recording.product:
        node = graph.call_function(func, replaced(args), {key: replaced(arg) for key, arg in kwargs.items()})
        if isinstance(result, Tensor):
            nodes[id(result)] = node
        else:
            for i, tensor in enumerate(result):
                if isinstance(tensor, Tensor):
                    nodes[id(tensor)] = graph.call_function(operator.getitem, (node, i))
    graph.output([nodes.get(id(t)) for t in recording.products])
    module = torch.compile(torch.fx.GraphModule({}, graph), backend=_BACKEND, dynamic=False)
    lying = [t.detach() for t in constants]

    def product(v: TensorList) -> TensorList:
        with torch.no_grad():
            found: TensorList = list(module(*v, *lying))
        return found

    return product


def _random(like: TensorList, seed: int) -> TensorList:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, dtype=t.dtype, generator=generator) for t in like]


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _memory_key(tensor: Tensor) -> tuple[Any, ...]:
    return _storage(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
