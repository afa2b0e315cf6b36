"""Which parts of a model can be converted, and why others cannot."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from ._forms import DROPOUTS, FORMS, Form
from ._layer import StnLayer

#: Modules that do not call what is inside of them as it stands there.
_SEALED: tuple[tuple[type, str], ...] = (
    (nn.MultiheadAttention, "nn.MultiheadAttention reads the weights of its layers and does not call them"),
    (nn.AdaptiveLogSoftmaxWithLoss, "nn.AdaptiveLogSoftmaxWithLoss calls its layers with some of the examples"),
    (torch.jit.ScriptModule, "it is compiled by TorchScript"),
)
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
#: What a subclass may define and still compute what its base does.
_HARMLESS = {"__init__", "reset_parameters", "extra_repr", "__repr__", "__annotate__", "__annotate_func__"}


def plain_type(module: nn.Module) -> type[nn.Module] | None:
    """The torch type, of layers or dropouts that have another form, which ``module`` is or adds only a start to."""
    for base in type(module).__mro__:
        if base in FORMS or base in DROPOUTS:
            return base
        own = {name for name, value in vars(base).items() if inspect.isfunction(value) or not name.startswith("__")}
        if not own <= _HARMLESS:
            return None
    return None


def reasons(modules: Mapping[str, nn.Module], exclude: Collection[str]) -> dict[str, str]:
    """Why modules cannot be converted, by name; what has neither parameters nor a rate has no place in it."""
    sealed = _sealed(modules, exclude)
    found = {}
    for name, module in modules.items():
        if _concerned(module):
            why = sealed.get(module) or _own_reason(module)
            if why:
                found[name] = why
    _add_ties(found, modules)
    return found


def _concerned(module: nn.Module) -> bool:
    rates = (*DROPOUTS, nn.AlphaDropout, nn.FeatureAlphaDropout)
    lazy = isinstance(module, parametrize.ParametrizationList)
    return (bool(module._parameters) and not lazy) or isinstance(module, rates) or parametrize.is_parametrized(module)


def _sealed(modules: Mapping[str, nn.Module], exclude: Collection[str]) -> dict[nn.Module, str]:
    found = {part: "it is excluded" for name in exclude for part in modules[name].modules()}
    for module in modules.values():
        for kind, why in _SEALED:
            if isinstance(module, kind):
                for part in module.modules():
                    found.setdefault(part, why)
    return found


def _own_reason(module: nn.Module) -> str | None:
    kind = type(module).__name__
    if isinstance(module, StnLayer):
        return "it is a response layer already"
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return "it is lazy. Call the model with a batch first"
    if parametrize.is_parametrized(module):
        computed = ", ".join(name for name, _ in module.get_submodule("parametrizations").named_children())
        return f"its {computed} is computed by a parametrization"
    if isinstance(module, _NORMS):
        return "normalization has no response form"
    plain = plain_type(module)
    if plain is None:
        base = next((b for b in type(module).__mro__ if b in FORMS or b in DROPOUTS), None)
        return (
            f"{kind} has no response form"
            if base is None
            else f"{kind} is a {base.__name__} with methods or attributes of its own"
        )
    if "forward" in vars(module):
        return "its forward was replaced"
    if plain in DROPOUTS:
        return None
    return _unlike(module, plain, FORMS[plain]) or _fixed(module)


def _unlike(module: nn.Module, plain: type[nn.Module], form: Form) -> str | None:
    """What tells a layer from one that its type's constructor makes."""
    if getattr(module, "proj_size", 0):
        return "it has projections (proj_size)"
    made = plain(**{**form.arguments(module), "device": "meta"})
    for part, kind in (("_parameters", "parameters"), ("_buffers", "buffers"), ("_modules", "modules")):
        has, wanted = getattr(module, part), getattr(made, part)
        if has.keys() != wanted.keys():
            return f"its {kind} are {', '.join(has) or 'none'}, not those of a {plain.__name__} (weight norm, pruning?)"
    for name, parameter in made._parameters.items():
        if _shape(module._parameters[name]) != _shape(parameter):
            return f"its {name} is not that of a {plain.__name__} with its sizes"
    return None


def _shape(parameter: nn.Parameter | None) -> torch.Size | None:
    return None if parameter is None else parameter.shape


def _fixed(module: nn.Module) -> str | None:
    parameters = list(module.parameters(recurse=False))
    if not any(p.requires_grad for p in parameters):
        return "its parameters are frozen"
    if not all(p.is_floating_point() for p in parameters):
        return "its parameters are not real"
    return None


def _add_ties(found: dict[str, str], modules: Mapping[str, nn.Module]) -> None:
    """Of layers with a common parameter the first in the order of ``FORMS`` responds."""
    owner: dict[nn.Parameter, str] = {}
    layers = {name: plain_type(module) for name, module in modules.items() if _concerned(module) and name not in found}
    for plain in FORMS:
        for name in (name for name, kind in layers.items() if kind is plain):
            own = list(modules[name].parameters(recurse=False))
            first = next((owner[p] for p in own if p in owner), None)
            if first is not None:
                found[name] = f"it shares parameters with {first!r}, which responds; it uses the plain part of them"
            else:
                owner.update(dict.fromkeys(own, name))
