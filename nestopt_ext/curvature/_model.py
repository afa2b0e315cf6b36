"""The model of an operator: unwrapped, its params chosen, called on a batch or on a part of it."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _lists
from .._types import TensorList
from ._gradient import check_params

#: Which params of a module: all that require grad, or tensors, or names and patterns of names.
Params = Any


class Model:
    """A callable that gives outputs, without what PyTorch wraps around a module to speed it up or spread it out.

    A module compiled by ``torch.compile`` runs eagerly here, since what was compiled has no second derivative; of
    ``DistributedDataParallel`` and ``DataParallel`` the module inside is called, so there is no communication. It is
    called in a context that ``under`` makes, if that is given.
    """

    def __init__(
        self, caller: str, model: object, under: Callable[[], contextlib.AbstractContextManager[Any]] | None = None
    ) -> None:
        self._caller = caller
        self._under = under or contextlib.nullcontext
        self.call = _unwrapped(model)
        if not callable(self.call):
            got = _lists.value_name(model)
            raise TypeError(f"{caller}: model must be a module or a callable; got {got}.")
        self._compiled = isinstance(self.call, nn.Module) and any(
            "_orig_mod" in m._modules or m._compiled_call_impl is not None for m in self.call.modules()
        )

    def choose(self, params: Params) -> tuple[TensorList, _lists.Structure]:
        """The params the caller asked for, checked, and how they are packed."""
        caller = self._caller
        if params is None:
            chosen: Any = {name: p for name, p in self._named("None") if p.requires_grad}
            if not chosen:
                raise ValueError(f"{caller}: model must have a parameter that requires grad; got none.")
        elif isinstance(params, str):
            chosen = self._matching([params])
        elif isinstance(params, Sequence) and params and all(isinstance(p, str) for p in params):
            chosen = self._matching(params)
        else:
            chosen = params
        flat, structure = _lists.flatten(caller, "params", chosen)
        check_params(caller, "params", structure.labels("params"), flat)
        return flat, structure

    def _named(self, asked: str) -> list[tuple[str, Tensor]]:
        if not isinstance(self.call, nn.Module):
            got = _lists.value_name(self.call)
            raise TypeError(
                f"{self._caller}: params must be tensors where model is not a module; got {asked} with a {got}."
            )
        return list(self.call.named_parameters())

    def _matching(self, patterns: Sequence[str]) -> dict[str, Tensor]:
        """The params whose name equals one of ``patterns``, or, among those that require grad, matches it."""
        named = self._named("names")
        for i, pattern in enumerate(patterns):
            if not any(name == pattern or (p.requires_grad and _matches(name, pattern)) for name, p in named):
                known = ", ".join(name for name, p in named[:8]) + (", ..." if len(named) > 8 else "")
                raise ValueError(
                    f"{self._caller}: params[{i}] must match the name of a parameter that requires grad;"
                    f" got {pattern!r}. The model has {known}."
                )
        return {
            name: p
            for name, p in named
            if name in patterns or (p.requires_grad and any(_matches(name, pattern) for pattern in patterns))
        }

    def outputs(self, inputs: Any) -> Tensor:
        """What the model gives for ``inputs``: one tensor, a tuple of arguments, or a dict of keyword arguments."""
        outputs = self.evaluated(inputs)
        self.check_outputs(outputs)
        return outputs

    def evaluated(self, inputs: Any) -> Tensor:
        """The same, unchecked."""
        with self._eager(), self._under():
            outputs: Tensor
            if isinstance(inputs, Tensor):  # first, since the checks of the rest take longer
                outputs = self.call(inputs)
            elif isinstance(inputs, Mapping):
                outputs = self.call(**inputs)
            elif isinstance(inputs, tuple | list):
                outputs = self.call(*inputs)
            else:
                outputs = self.call(inputs)
        return outputs

    def check_outputs(self, outputs: object) -> None:
        """They are one tensor that can be differentiated."""
        caller = self._caller
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"{caller}: model must return one tensor; got {_lists.value_name(outputs)}."
                " Pass a function that picks it: lambda x: model(x)[0]."
            )
        if not outputs.is_floating_point() or outputs.layout != torch.strided:
            got = _lists.dtype_name(outputs.dtype if outputs.layout == torch.strided else outputs.layout)
            raise TypeError(f"{caller}: model must return a dense tensor of a real floating dtype; got {got}.")
        if not outputs.requires_grad:
            raise ValueError(
                f"{caller}: model must return outputs that depend on params; got a tensor that does not require grad."
            )

    def check_microbatch(self) -> None:
        """Statistics over the batch would differ in its parts."""
        modules = self.call.named_modules() if isinstance(self.call, nn.Module) else ()
        for name, module in modules:
            normalizes = isinstance(module, nn.modules.batchnorm._BatchNorm)
            if normalizes and (module.training or module.running_mean is None):
                raise ValueError(
                    f"{self._caller}: microbatch must be None for a model that normalizes over its batch;"
                    f" got {type(module).__name__} {name!r} in training mode. Call model.eval()."
                )

    @contextlib.contextmanager
    def _eager(self) -> Iterator[None]:
        if not self._compiled:
            yield
            return
        with torch.compiler.set_stance("force_eager"):
            yield


def _unwrapped(model: Any) -> Callable[..., Any]:
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(_attribute(model, "_orig_mod"), nn.Module):
            model = model._orig_mod
        elif _attribute(model, "_torchdynamo_orig_callable") is not None:
            model = model._torchdynamo_orig_callable
        else:
            found: Callable[..., Any] = model
            return found


def _attribute(model: Any, name: str) -> Any:
    """What ``model`` has under a name, or None; a module that has nothing would make words for that first."""
    if isinstance(model, nn.Module):
        return model._modules.get(name) or vars(model).get(name)
    return getattr(model, name, None)


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern)


def batch_size(caller: str, name: str, batch: Any) -> int:
    """The common length of the first dimension of all tensors in ``batch``."""
    sizes = [t.shape[0] if t.dim() else None for t in _tensors(batch)]
    if not sizes or None in sizes or len(set(sizes)) != 1:
        raise ValueError(
            f"{caller}: {name} must be tensors with one batch dimension in front; got {sizes or 'no tensor'}."
        )
    return int(sizes[0])  # type: ignore[arg-type]


def batch_length(caller: str, batch: Any) -> int:
    """The length of the first dimension of the first tensor in ``batch``."""
    for tensor in _tensors(batch):
        if tensor.dim():
            return tensor.shape[0]
        break
    raise ValueError(
        f"{caller}: batches must hold a tensor with a batch dimension in front; got {_lists.value_name(batch)}."
        " Use weights='sum'."
    )


def part_of(batch: Any, start: int, stop: int) -> Any:
    """The examples from ``start`` to ``stop`` of every tensor in ``batch``."""
    if isinstance(batch, Tensor):
        return batch[start:stop]
    if isinstance(batch, Mapping):
        return {key: part_of(value, start, stop) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(part_of(value, start, stop) for value in batch)
    return batch


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, tuple | list):
        for value in batch:
            yield from _tensors(value)
