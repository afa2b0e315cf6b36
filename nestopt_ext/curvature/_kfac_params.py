"""Which params of a model a KFAC covers, and the layer of each."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from .. import _lists
from .._types import TensorList
from ._gradient import check_params
from ._kfac_layers import Layer, is_supported

_WAY_OUT = "Pass params as names or patterns, such as params=['features.*'], that leave it out."


def chosen_params(caller: str, model: nn.Module, params: Any) -> tuple[TensorList, _lists.Structure]:
    """All that require grad for None; a dict by name for names and patterns; tensors as they come."""
    if isinstance(params, str):
        params = [params]
    elif isinstance(params, Iterable) and not isinstance(params, Tensor | Mapping):
        params = list(params)
    if params is None:
        params = [p for p in model.parameters() if p.requires_grad]
    elif isinstance(params, Sequence) and params and all(isinstance(p, str) for p in params):
        params = _by_pattern(caller, model, params)
    flat, structure = _lists.flatten(caller, "params", params)
    check_params(caller, "params", structure.labels("params"), flat)
    for label, tensor in zip(structure.labels("params"), flat, strict=True):
        if type(tensor) not in (Tensor, nn.Parameter):
            raise TypeError(
                f"{caller}: {label} must be a plain tensor; got {type(tensor).__name__}."
                " Pass a module whose parameters are neither sharded nor quantized nor yet to be initialized."
            )
    return flat, structure


def _by_pattern(caller: str, model: nn.Module, patterns: Sequence[str]) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    found: dict[str, Tensor] = {}
    for i, pattern in enumerate(patterns):
        matches = [pattern] if pattern in named else [n for n, p in named.items() if fnmatchcase(n, pattern)]
        matches = [n for n in matches if n == pattern or named[n].requires_grad]
        if not matches:
            raise ValueError(
                f"{caller}: params[{i}] must name, or match, a parameter that requires grad; got {pattern!r}."
                f" The names are {', '.join(named) or 'none'}."
            )
        found.update((n, named[n]) for n in matches)
    return found


def layers_of(caller: str, model: nn.Module, params: TensorList) -> list[Layer]:
    """The layers that own the params, in the order of the model; raises for a param without exactly one."""
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for name, module in model.named_modules():
        for kind, p in module._parameters.items():
            if p is not None:
                owners.setdefault(id(p), []).append((name, module, kind))
    strangers = [i for i, p in enumerate(params) if id(p) not in owners]
    if strangers:
        raise ValueError(
            f"{caller}: params must be parameters of model; got {len(strangers)} that are not,"
            f" the first at position {strangers[0]}."
        )
    shared = [[_full(owner) for owner in owners[id(p)]] for p in params if len(owners[id(p)]) > 1]
    if shared:
        raise ValueError(
            f"{caller}: params must belong to one layer each; got {' = '.join(shared[0])}, shared. {_WAY_OUT}"
        )
    uncovered = [owner for p in params for owner in owners[id(p)] if not is_supported(owner[1])]
    if uncovered:
        listed = ", ".join(f"{_full(owner)} ({type(owner[1]).__name__})" for owner in uncovered)
        raise ValueError(
            f"{caller}: params must belong to Linear, Conv1d, Conv2d or Conv3d layers; got {listed}. {_WAY_OUT}"
        )
    place = {id(p): i for i, p in enumerate(params)}
    layers = []
    for name, module in model.named_modules():
        mine = {kind: place[id(p)] for kind, p in module._parameters.items() if p is not None and id(p) in place}
        if mine:
            groups = int(getattr(module, "groups", 1))
            layers.append(Layer(name, module, groups, mine.get("weight"), mine.get("bias")))
    return layers


def check_used_once(caller: str, outputs: Tensor, params: TensorList, layers: Sequence[Layer]) -> None:
    """Every param enters the graph of the outputs at one place: the layer that was watched."""
    names = {id(params[i]): f"{layer.name}.{kind}".lstrip(".") for layer in layers for kind, i in _kinds(layer)}
    uses = dict.fromkeys(names, 0)
    waiting: list[Any] = [outputs.grad_fn]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        for following, _ in node.next_functions:
            if following is None:
                continue
            variable = getattr(following, "variable", None)
            if variable is not None and id(variable) in uses:
                uses[id(variable)] += 1
            if following not in seen:
                seen.add(following)
                waiting.append(following)
    for key, count in uses.items():
        if count > 1:
            raise ValueError(
                f"{caller}: params must be used once in the forward pass; got {names[key]}, used {count} times."
                f" {_WAY_OUT}"
            )


def unwrapped(caller: str, model: object) -> nn.Module:
    """The module itself under wrappers for data parallelism and compilation, whose calls hooks would not see."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be a torch.nn.Module; got {_lists.value_name(model)}.")
    while isinstance(model, _PARALLEL) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, _PARALLEL) else model._orig_mod
        assert isinstance(model, nn.Module)
    for name, module in model.named_modules():
        if isinstance(module, _PARALLEL):
            raise ValueError(
                f"{caller}: model must not hold data-parallel wrappers; got {type(module).__name__} at {name!r}."
                " Put its .module there."
            )
    return model


def is_compiled(model: nn.Module) -> bool:
    return any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules())


_PARALLEL = (nn.DataParallel, torch.nn.parallel.DistributedDataParallel)


def _kinds(layer: Layer) -> list[tuple[str, int]]:
    return [(kind, place) for kind, place in (("weight", layer.weight), ("bias", layer.bias)) if place is not None]


def _full(owner: tuple[str, nn.Module, str]) -> str:
    return f"{owner[0]}.{owner[2]}" if owner[0] else owner[2]
