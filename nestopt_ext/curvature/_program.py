"""A linear map that was recorded as operators below autograd, as a short list of calls on memory that stays."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .._types import TensorList

_aten = torch.ops.aten
_ADD = _aten.add.Tensor
_ADDCMUL = _aten.addcmul.default
_ADDMM = _aten.addmm.default
_DETACH = _aten.detach.default
_MM = _aten.mm.default
_MUL = _aten.mul.Tensor
_MUL_NUMBER = _aten.mul.Scalar
_LOG_SOFTMAX_BACKWARD = _aten._log_softmax_backward_data.default
_NEG = _aten.neg.default
_SUM = _aten.sum.dim_IntList
_T = _aten.t.default

# By identity, since hashing an operator takes longer than calling a small one.
#: Their results depend on the shapes of their arguments alone.
_ZEROS = {id(f) for f in (_aten.zeros_like.default, _aten.new_zeros.default)}
_ONES = {id(f) for f in (_aten.ones_like.default, _aten.new_ones.default)}
#: Elementwise and linear in their first argument: multiplications by a factor that is the same in every product.
_FACTORS = {
    id(f)
    for f in (
        _aten.tanh_backward.default,
        _aten.sigmoid_backward.default,
        _aten.gelu_backward.default,
        _aten.silu_backward.default,
    )
}
#: Functions that can write where they are told, for the operators below them.
_OUT: dict[int, Callable[..., Any]] = {
    id(_MM): torch.mm,
    id(_aten.bmm.default): torch.bmm,
    id(_ADDMM): torch.addmm,
    id(_MUL): torch.mul,
    id(_MUL_NUMBER): torch.mul,
    id(_ADD): torch.add,
    id(_aten.sub.Tensor): torch.sub,
    id(_NEG): torch.neg,
    id(_SUM): torch.sum,
    id(_ADDCMUL): torch.addcmul,
}

#: What autograd, and modules told to, do in place to what was just made, as new values.
_IN_PLACE: dict[int, Any] = {
    id(f): g
    for f, g in (
        (_aten.add_.Tensor, _ADD),
        (_aten.sub_.Tensor, _aten.sub.Tensor),
        (_aten.mul_.Tensor, _MUL),
        (_aten.mul_.Scalar, _MUL_NUMBER),
        (_aten.div_.Tensor, _aten.div.Tensor),
        (_aten.div_.Scalar, _aten.div.Scalar),
        (_aten.neg_.default, _NEG),
        (_aten.relu_.default, _aten.relu.default),
        (_aten.tanh_.default, _aten.tanh.default),
        (_aten.sigmoid_.default, _aten.sigmoid.default),
        (_aten.masked_fill_.Scalar, _aten.masked_fill.Scalar),
        (_aten.logical_and_.default, _aten.logical_and.default),
    )
}
#: Draws random numbers; gives a number, or a shape, that depends on values.
_UNFIT = {torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}

_MOST_CALLS = 4000

_SEQUENCES = (list, tuple)
_WITH_TENSORS = (Tensor, *_SEQUENCES)

Step = tuple[Callable[..., Any], Sequence[Any], dict[str, Any]]
Entry = tuple[Any, tuple[Any, ...], dict[str, Any], Any]


class Unfit(Exception):
    """The recording cannot be replayed."""


# ---- recording ------------------------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lists the operators called while it is open with what they took and gave; stops where one cannot be replayed."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # hiding every call from torch.compile, which never traces this, takes longer than the call

    def __init__(self, most_bytes: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.log: list[Entry] = []
        self._room = most_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.log.append((func, args, kwargs, result))
        if isinstance(result, Tensor):
            self._room -= result.nbytes
        fit = id(func) in _fit or _is_fit(func)
        if not fit or self._room < 0 or len(self.log) > _MOST_CALLS or (types and not _are_plain(types)):
            self.log.clear()  # what it holds may be large
            raise Unfit(str(func))  # here, since the rest of the product would be in vain
        return result


#: The operators that were found to be fit, by identity.
_fit: dict[int, Any] = {}


def _is_fit(func: Any) -> bool:
    """Whether an operator depends on its arguments alone and changes none of them."""
    if not isinstance(func, torch._ops.OpOverload) or _UNFIT & set(func.tags):
        return False
    if func._schema.is_mutable and id(func) not in _IN_PLACE:
        return False
    _fit[id(func)] = func
    return True


def _are_plain(types: Sequence[type]) -> bool:
    return all(t is Tensor or t is torch.nn.Parameter for t in types)


# ---- the recording as calls on values -------------------------------------------------------------------------------


class _Value:
    """A tensor that depends on the inputs. ``like`` is the recorded one, ``memory`` what every replay writes."""

    __slots__ = ("call", "like", "memory", "scale", "shared", "uses")

    def __init__(self, like: Tensor, call: _Call | None = None) -> None:
        self.like = like
        self.call = call
        self.uses = 0
        self.shared = call is None or call.view  # whether another recorded tensor has the same memory
        self.memory: Tensor | None = None
        self.scale: tuple[_Value, Any] | None = None  # the value and the constant whose product this is


@dataclass(eq=False, slots=True)
class _Call:
    """An operator applied to values and constants; ``given`` are the values among its arguments."""

    func: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]
    given: list[_Value]
    outs: list[_Value | None] = field(default_factory=list)
    view: bool = False
    in_place: bool = False


def compiled(log: Sequence[Entry], inputs: TensorList, outputs: TensorList, *, bound: bool = False) -> Program:
    """The program that gives ``outputs`` for ``inputs``, and their image under the recorded map for other vectors.

    With ``bound`` the program is not given vectors, but reads the inputs where they lie, as they are when it is called.
    """
    calls, values, older = _parsed(log, inputs)
    results = [values.get(id(t), t) for t in outputs]
    rewritten = _rewritten(_live(calls, results))
    program = Program([values[id(t)] for t in inputs], _live(rewritten, results), results, older, bound)
    for call in (*calls, *rewritten):
        call.outs.clear()  # a value and its call are a cycle, which would keep the recorded tensors alive
    return program


def _parsed(log: Sequence[Entry], inputs: TensorList) -> tuple[list[_Call], dict[int, _Value], TensorList]:
    """The calls that depend on the inputs, the values by the identity of the tensor recorded, and what is older."""
    values = {id(t): _Value(t) for t in inputs}
    older: dict[int, Tensor] = {}
    made: set[int] = set()
    zeros: set[int] = set()
    calls: list[_Call] = []

    for func, recorded, kwargs, result in log:
        given: list[_Value] = []
        args = [
            _replaced(arg, values, made, older, given) if isinstance(arg, _WITH_TENSORS) else arg for arg in recorded
        ]
        if kwargs:
            kwargs = {key: _replaced(arg, values, made, older, given) for key, arg in kwargs.items()}
        outs = result if isinstance(result, _SEQUENCES) else (result,)
        if id(func) in _IN_PLACE:
            value = values.get(id(result))
            if value is None and not given and id(result) in made and not _is_read(result, calls):
                continue  # a constant that is finished before anything is made of it
            if value is None or value.shared:
                raise Unfit
            call = _Call(_IN_PLACE[id(func)], args, kwargs, given)
            value = values[id(result)] = _Value(result, call)
            call.outs.append(value)
            calls.append(call)
        elif not given or id(func) in _ZEROS or id(func) in _ONES:
            made.update(map(id, outs))
            if id(func) in _ZEROS:
                zeros.add(id(result))
        elif func is _DETACH or (
            func is _ADD and len(given) == 1 and not kwargs and _added_zero(args, given[0], result, zeros)
        ):
            values[id(result)] = given[0]
            given[0].shared = True
        else:
            call = _Call(func, args, kwargs, given, view=func.is_view)
            if call.view:
                for value in given:
                    value.shared = True
            for tensor in outs:
                call.outs.append(None if tensor is None else _new_value(tensor, call, values))
            calls.append(call)
    return calls, values, list(older.values())


def _replaced(
    arg: Any, values: dict[int, _Value], made: set[int], older: dict[int, Tensor], given: list[_Value]
) -> Any:
    """The argument with values in place of their tensors; ``given`` and ``older`` take what was found."""
    if isinstance(arg, Tensor):
        value = values.get(id(arg))
        if value is not None:
            given.append(value)
            return value
        if id(arg) not in made:
            older[id(arg)] = arg
    elif isinstance(arg, _SEQUENCES) and any(isinstance(part, Tensor) for part in arg):
        return [_replaced(part, values, made, older, given) for part in arg]
    return arg


def _is_read(tensor: Tensor, calls: Sequence[_Call]) -> bool:
    """Whether a call takes a constant that lies in the memory of ``tensor``."""
    memory = tensor.untyped_storage()._cdata
    return any(t.untyped_storage()._cdata == memory for c in calls for t in _tensors((c.args, *c.kwargs.values())))


def _added_zero(args: Sequence[Any], value: _Value, result: Tensor, zeros: set[int]) -> bool:
    """Whether a sum is its one value again."""
    other = args[1] if args[0] is value else args[0]
    return id(other) in zeros and value.like.shape == result.shape and value.like.dtype == result.dtype


def _new_value(tensor: Any, call: _Call, values: dict[int, _Value]) -> _Value:
    plain = isinstance(tensor, Tensor) and tensor.is_cpu and tensor.layout is torch.strided
    if not plain or id(tensor) in values:
        raise Unfit
    value = values[id(tensor)] = _Value(tensor, call)
    return value


def _live(calls: Sequence[_Call], results: Sequence[_Value | Tensor]) -> list[_Call]:
    """The calls that the results need, in order; counts the uses of each value."""
    for call in calls:
        for value in call.outs:
            if value is not None:
                value.uses = 0
    for result in results:
        if isinstance(result, _Value):
            result.uses += 1
    kept: list[_Call] = []
    for call in reversed(calls):
        for out in call.outs:
            if out is not None and out.uses:
                kept.append(call)
                for value in call.given:
                    value.uses += 1
                break
    return kept[::-1]


# ---- rewriting ------------------------------------------------------------------------------------------------------


def _rewritten(calls: Sequence[_Call]) -> list[_Call]:
    """Merges factors, and leaves sums to products.

    A call that takes over what an earlier one did stays where it is, so the order stays right; the earlier one loses
    its only user and is dropped afterwards.
    """
    done: list[_Call] = []
    for call in calls:
        out = call.outs[0]
        if len(call.outs) == 1 and out is not None:
            func = call.func
            if func is _MUL or func is _MUL_NUMBER or func is _NEG or id(func) in _FACTORS:
                _merge_factors(call, out)
            elif func is _LOG_SOFTMAX_BACKWARD:
                _write_out_log_softmax(call, out, done)
            elif func is _T:
                _turn_product(call, done)
            elif func is _ADD and len(call.given) == 2 and not call.kwargs and len(call.args) == 2:
                x, y = call.given
                if x is not y and not _absorb(call, out, x, y):
                    _absorb(call, out, y, x)
        done.append(call)
    return done


def _merge_factors(call: _Call, out: _Value) -> None:
    """Factor times (factor times value) as one factor times value."""
    if len(call.given) != 1:
        return
    x = call.given[0]
    factor: Any
    if call.func is _NEG:
        factor = -1.0
    elif call.func is _MUL or call.func is _MUL_NUMBER:
        factor = call.args[1] if call.args[0] is x else call.args[0]
    elif call.args[0] is x:
        factor = call.func(torch.ones_like(x.like), *call.args[1:], **call.kwargs)
    else:
        return
    if x.like.shape != out.like.shape or x.like.dtype != out.like.dtype:
        return
    if x.scale is not None and x.uses == 1:
        x, inner = x.scale
        factor = inner * factor
    out.scale = x, factor
    call.func, call.args, call.kwargs, call.given = _MUL, (x, factor), {}, [x]


def _write_out_log_softmax(call: _Call, out: _Value, before: list[_Call]) -> None:
    """The gradient less the softmax times its sum: a sum and one elementwise call, the softmax a constant."""
    g, output, dim, dtype = call.args
    if len(call.given) != 1 or call.given[0] is not g or dtype is not out.like.dtype:
        return
    sum_call = _Call(_SUM, (g, [dim], True), {}, [g])
    total = _Value(g.like.sum(dim, keepdim=True), sum_call)
    total.uses = 1
    sum_call.outs.append(total)
    before.append(sum_call)
    call.func, call.args, call.kwargs = _ADDCMUL, (g, output.exp(), total), {"value": -1}
    call.given = [g, total]
    g.uses += 1


def _turn_product(call: _Call, before: list[_Call]) -> None:
    """The transpose of a matrix product as the product of the transposes, which are views."""
    x = call.args[0]
    if x.uses == 1 and x.call is not None and x.call.func is _MM:
        a, b = x.call.args
        call.func, call.args, call.view = _MM, (_transposed(b, before), _transposed(a, before)), False
        call.given = [arg for arg in call.args if isinstance(arg, _Value)]


def _transposed(operand: Any, before: list[_Call]) -> Any:
    if isinstance(operand, Tensor):
        return operand.t()
    call = _Call(_T, (operand,), {}, [operand], view=True)
    value = _Value(operand.like.t(), call)
    call.outs.append(value)
    before.append(call)
    return value


def _absorb(call: _Call, out: _Value, x: _Value, y: _Value) -> bool:
    """Makes ``call`` compute x + y without the call that made y, if nobody else needs y."""
    same = x.like.shape == y.like.shape == out.like.shape and x.like.dtype == y.like.dtype == out.like.dtype
    if y.uses > 1 or y.call is None or not same:
        return False
    if y.scale is not None:
        other, factor = y.scale
        if isinstance(factor, Tensor):
            call.func, call.args = _ADDCMUL, (x, other, factor)
        else:
            call.args, call.kwargs = (x, other), {"alpha": factor}
        call.given = [x, other]
        return True
    if y.call.func is _MM:
        call.func, call.args, call.given = _ADDMM, (x, *y.call.args), [x, *y.call.given]
        # Where nobody else needs x either, adding to it where it lies saves a copy.
        call.in_place = x.uses == 1 and x.call is not None and not x.call.view
        return True
    return False


# ---- the program ----------------------------------------------------------------------------------------------------


class Program:
    """Calls on memory that stays, in order. One vector at a time."""

    def __init__(
        self,
        inputs: Sequence[_Value],
        calls: Sequence[_Call],
        results: Sequence[_Value | Tensor],
        older: TensorList,
        bound: bool,
    ) -> None:
        self.num_bytes = 0
        self._owned: TensorList = []
        self._versions = [(t, t._version) for t in older]
        if bound:
            for given in inputs:
                given.memory = given.like.detach()
        self._inputs = [] if bound else [self._allocated(value) for value in inputs]
        self._steps: list[Step] = []
        last: dict[int, Step] = {}
        for call in calls:
            args = [_memory(arg) for arg in call.args]
            kwargs = {key: _memory(arg) for key, arg in call.kwargs.items()}
            out = call.outs[0]
            function = _OUT.get(id(call.func))
            if call.view:
                views = call.func(*args, **kwargs)
                for value, view in zip(call.outs, views if isinstance(views, list | tuple) else [views], strict=True):
                    if value is not None:
                        value.memory = view
            elif out is not None and call.in_place:
                out.memory = args[0]
                self._steps.append((args[0].addmm_, args[1:], {}))
            elif out is not None and function is not None and out.uses == 1 and any(out is r for r in results):
                last[id(out)] = function, args, kwargs  # a result is new memory every time
            elif out is not None and function is not None:
                self._steps.append((function, args, {**kwargs, "out": self._allocated(out)}))
            else:
                buffers = [None if value is None else self._allocated(value) for value in call.outs]
                self._steps.append((_into, (buffers, call.func, args, kwargs), {}))
        self._results: list[Step] = [last.get(id(r)) or (torch.clone, (_memory(r),), {}) for r in results]

    @property
    def inputs(self) -> TensorList:
        """The memory that a vector is put into for :meth:`run`."""
        return self._inputs

    def __call__(self, vector: TensorList) -> TensorList:
        """The image of a vector, in new memory."""
        with torch.no_grad():
            if self._inputs:
                torch._foreach_copy_(self._inputs, vector)
            for function, args, kwargs in self._steps:
                function(*args, **kwargs)
            return [function(*args, **kwargs) for function, args, kwargs in self._results]

    def run(self) -> TensorList:
        """The image of what :attr:`inputs` hold, in memory that the next run writes to; for no-grad mode."""
        steps, images = self._in_place
        for step in steps:
            step()
        return images

    @functools.cached_property
    def _in_place(self) -> tuple[list[Callable[[], Any]], TensorList]:
        """The calls with results in memory that stays, and that memory."""
        steps, images = list(self._steps), []
        inputs = {t.untyped_storage()._cdata for t in self._inputs}
        for function, args, kwargs in self._results:
            image = args[0]
            if function is not torch.clone:
                image = function(*args, **kwargs)
                steps.append((function, args, {**kwargs, "out": image}))
            elif image.untyped_storage()._cdata in inputs:
                image = image.clone()
                steps.append((image.copy_, args, {}))
            images.append(image)
        return [functools.partial(function, *args, **kwargs) for function, args, kwargs in steps], images

    def holds(self) -> bool:
        """Whether no tensor from before the recording was changed since."""
        return not any(t._version != version for t, version in self._versions)

    def constants(self) -> TensorList:
        """The tensors beside the inputs that are read where they lie."""
        owned = {t.untyped_storage()._cdata for t in self._owned}
        found: dict[int, Tensor] = {}
        for _, args, kwargs in (*self._steps, *self._results):
            for tensor in _tensors((args, *kwargs.values())):
                if tensor.untyped_storage()._cdata not in owned:
                    found[id(tensor)] = tensor
        return list(found.values())

    def _allocated(self, value: _Value) -> Tensor:
        memory = value.memory = torch.empty_like(value.like)
        self._owned.append(memory)
        self.num_bytes += memory.numel() * memory.element_size()
        return memory


def _memory(arg: Any) -> Any:
    if isinstance(arg, _Value):
        return arg.memory
    return [_memory(part) for part in arg] if isinstance(arg, list) else arg


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(tuple(value.values()))


def _into(buffers: Sequence[Tensor | None], func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Calls an operator that makes its own memory, and keeps what it gives in ours."""
    found = func(*args, **kwargs)
    for buffer, tensor in zip(buffers, found if isinstance(found, list | tuple) else [found], strict=True):
        if buffer is not None:
            buffer.copy_(tensor)
