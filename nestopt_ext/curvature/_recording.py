"""A model's Jacobian on one batch: from a recording of the model where that can be had, else by autograd."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from .._stack import caller_depth
from .._types import TensorList
from ._evaluation import Evaluation
from ._linearization import Linearization
from ._model import Model
from ._tape import Node, Recorder, Tape, Unrecordable, Var, autocast_is_on, tensors_in, without_autocast

#: Vectors that are carried through a recording at once.
_AT_ONCE = 64
#: What a notice has been given of already.
_noticed: set[str] = set()


class Jacobian(Protocol):
    """Products with the Jacobian J of a model's outputs on a batch, and with J'; all without graph."""

    def forward(self, v: TensorList) -> Tensor:
        """J v, like the outputs."""
        ...

    def forwards(self, v: TensorList) -> Tensor:
        """J v for k lists, [k, *shape] for each param; [k, *shape of the outputs]."""
        ...

    def backward(self, u: Tensor) -> TensorList:
        """J' u, a list like the params."""
        ...

    def backwards(self, u: Tensor) -> TensorList:
        """J' u for k tensors, [k, *shape of the outputs]; [k, *shape] for each param."""
        ...

    def backward_into(self, u: Tensor, into: TensorList) -> None:
        """Adds J' u to ``into``, in place."""
        ...


class Opaque(Node):
    """A function without a rule, differentiated by autograd: J' by its graph, J by the graph of that."""

    def __init__(self, caller: str, output: Tensor, leaves: TensorList, operands: list[Var]) -> None:
        super().__init__(*operands)
        self._jacobian = Linearization(caller, "model", output, leaves)
        self._leaves = leaves

    def jvp(self, tangents: Sequence[Tensor | None]) -> Tensor:
        """By the graph of the gradient."""
        return self._jacobian.forward(
            [torch.zeros_like(x) if t is None else t for x, t in zip(self._leaves, tangents, strict=True)]
        )

    def vjps(self, cotangent: Tensor, operands: Sequence[int]) -> list[Tensor]:
        """By one backward pass for all operands."""
        found = dict(zip(self.wanted, self._jacobian.backward(cotangent), strict=True))
        return [found[i] for i in operands]


class Recording:
    """The Jacobian by the rules of a tape."""

    def __init__(
        self,
        caller: str,
        tape: Tape,
        params: TensorList,
        data: Sequence[Tensor],
        evaluation: Evaluation,
    ) -> None:
        self.tape = tape
        self._caller = caller
        self.params = params
        self._evaluation = evaluation
        watched = (*params, *data, tape.outputs)  # the last layer may have kept what it gave
        self._versions = [(t, t._version) for t in watched if not t.is_inference()] + tape.constants

    def forward(self, v: TensorList) -> Tensor:
        """J v."""
        self._check_unchanged()
        with self._evaluation.differentiating(), without_autocast(), torch.no_grad():
            return self.tape.jvp(v)

    def forwards(self, v: TensorList) -> Tensor:
        """J v for k lists at once."""
        self._check_unchanged()
        with self._evaluation.differentiating(), without_autocast(), torch.no_grad():
            return _at_once(lambda *v: [self.tape.jvp(v)], v, [self.tape.outputs])[0]

    def backward(self, u: Tensor) -> TensorList:
        """J' u."""
        self._check_unchanged()
        with self._evaluation.differentiating(), without_autocast(), torch.no_grad():
            return self._filled(self.tape.vjp(u))

    def backwards(self, u: Tensor) -> TensorList:
        """J' u for k tensors at once."""
        self._check_unchanged()
        with self._evaluation.differentiating(), without_autocast(), torch.no_grad():
            return _at_once(lambda u: self._filled(self.tape.vjp(u, in_place=False)), [u], self.params)

    def backward_into(self, u: Tensor, into: TensorList) -> None:
        """Adds J' u, each layer's part where it arises."""
        self._check_unchanged()
        with self._evaluation.differentiating(), without_autocast(), torch.no_grad():
            self.tape.vjp(u, into)

    def _filled(self, found: Sequence[Tensor | None]) -> TensorList:
        """Zeros for None."""
        pairs = zip(found, self.params, strict=True)
        return [torch.zeros_like(p, requires_grad=False) if t is None else t for t, p in pairs]

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Without graph, with everything as it was recorded, for who reads what the nodes have kept."""
        self._check_unchanged()
        with self._evaluation.differentiating(), without_autocast(), torch.no_grad():
            yield

    def _check_unchanged(self) -> None:
        for t, version in self._versions:
            if t._version != version:
                raise RuntimeError(
                    f"{self._caller}: model must be computed from the params as they are; got params, or another tensor"
                    " it uses, changed in place since. Make a new one after such a change; an optimizer step is one."
                )


def _at_once(function: Callable[..., list[Tensor]], arguments: Sequence[Tensor], like: TensorList) -> TensorList:
    """The function of each row of the arguments, [k, *shape]: some rows at once, or one by one where that fails."""
    count = len(arguments[0])
    if count == 0:
        return [t.new_zeros((0, *t.shape), requires_grad=False) for t in like]
    try:
        found: list[Tensor] = torch.func.vmap(function, chunk_size=min(count, _AT_ONCE))(*arguments)
        return found
    except (RuntimeError, NotImplementedError, ValueError):  # an operation without a batching rule
        rows = [function(*row) for row in zip(*arguments, strict=True)]
        return [torch.stack(column) for column in zip(*rows, strict=True)]


def recorded(
    caller: str, model: Model, inputs: Any, params: TensorList, call: Callable[[Callable[[], Any]], Evaluation]
) -> tuple[Tensor, Recording]:
    """The model's outputs, without graph, and the recording of their evaluation; raises :class:`Unrecordable`."""
    from . import _rules  # noqa: F401  registers the rules: a good part of the package's import time

    data = tensors_in((inputs,))
    if autocast_is_on():
        raise Unrecordable("autocast is on")
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise Unrecordable("a transform of torch.func is running")
    if any(p._backward_hooks for p in params):
        raise Unrecordable("a param has a hook that sees its gradient")

    recorder = Recorder(params, data, lambda out, leaves, operands: Opaque(caller, out, leaves, operands))

    def run() -> Tape | None:
        with recorder:
            outputs = model.evaluated(inputs)
        model.check_outputs(outputs)  # not under the recorder, to which each question is a call
        return recorder.tape(outputs)

    evaluation = call(run)
    tape: Tape | None = evaluation.value
    if tape is None:
        raise Unrecordable("its output does not depend on the params")
    return tape.outputs, Recording(caller, tape, params, data, evaluation)


def by_autograd(
    caller: str, model: Model, inputs: Any, params: TensorList, call: Callable[[Callable[[], Any]], Evaluation]
) -> tuple[Tensor, Linearization]:
    """The same without a recording: the graph of the model is kept."""
    evaluation = call(lambda: model.outputs(inputs))
    outputs: Tensor = evaluation.value
    return outputs.detach(), Linearization(caller, "model", outputs, params, evaluation)


def notice(caller: str, jacobian: Jacobian) -> None:
    """Says once of each function in a recording that it has no rule."""
    functions = jacobian.tape.opaque if isinstance(jacobian, Recording) else ()
    new = [name for name in functions if name not in _noticed]
    _noticed.update(new)
    if new:
        warnings.warn(
            f"{caller}: no rule for {', '.join(new)}: autograd takes that part, at about three times the cost.",
            stacklevel=caller_depth(),
        )
