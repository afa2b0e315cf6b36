"""Makes ordinary models of response models."""

from __future__ import annotations

import warnings
from collections import Counter

from torch import Tensor, nn

from ._forms import FORMS, PLAIN_TYPE
from ._layer import StnLayer
from ._sample import Sample
from ._substitution import substituted
from .dropout import StnChannelDropout, StnDropout, StnVariationalDropout

#: Where nothing remembers another one, the plain dropout of a tuned one.
_PLAIN_DROPOUTS: dict[type[nn.Module], type[nn.Module]] = {
    StnDropout: nn.Dropout,
    StnChannelDropout: nn.Dropout2d,
    StnVariationalDropout: nn.Dropout,
}


def exported(module: nn.Module, sample: Sample) -> nn.Module:
    """A copy of ``module`` without response layers, with the weights and rates it has at ``sample``, one point."""
    notes: list[str] = []
    replacements: dict[nn.Module, nn.Module] = {}
    for name, part in module.named_modules():
        if isinstance(part, StnLayer):
            replacements[part] = _plain_layer(name, part, notes)
        elif type(part) in _PLAIN_DROPOUTS:
            replacements[part] = _plain_dropout(name, part, sample, notes)
        elif type(part).__module__.startswith(f"{__package__}."):
            replacements[part] = nn.Identity()
            notes.append(f"{name} ({type(part).__name__}) has no plain form: it is an nn.Identity")
    plain = substituted(module, replacements)
    if sample.gate_input is not None:
        _respond(module, replacements, sample.gate_input[0], notes)
    if notes:
        warnings.warn("StnModel.export: " + "; ".join(notes) + ".", UserWarning, stacklevel=3)
    return plain


def _plain_layer(name: str, layer: StnLayer, notes: list[str]) -> nn.Module:
    kind = next((base for base in type(layer).__mro__ if base in FORMS), None)
    if kind is None:
        raise TypeError(
            f"StnModel.export: {name or 'the model'} must be a response layer of this package;"
            f" got {type(layer).__name__}. Take its weights from its responses()."
        )
    dropped = (option for option in ("weight_dropout", "word_dropout") if getattr(layer, option, None) is not None)
    notes.extend(f"the {option} of {name} has no plain form: it is left out" for option in dropped)
    return kind(**{**FORMS[kind].arguments(layer), "device": "meta"})  # its own weights would be thrown away


def _respond(module: nn.Module, replacements: dict[nn.Module, nn.Module], gate_input: Tensor, notes: list[str]) -> None:
    """Sets the weights that respond, each layer's for itself: sharing with layers that do not respond ends there."""
    uses = Counter(parameter for part in module.modules() for parameter in part._parameters.values())
    names = {part: name for name, part in module.named_modules()}
    for layer, plain in replacements.items():
        if isinstance(layer, StnLayer):
            for response in layer.responses():
                value = response.at(gate_input).detach()
                setattr(plain, response.name, nn.Parameter(value, requires_grad=response.centre.requires_grad))
                if uses[layer._parameters[response.name]] > 1:
                    notes.append(
                        f"the {response.name} of {names[layer]} responds and is not shared any more:"
                        " a model that shares it cannot load both"
                    )


def _plain_dropout(name: str, dropout: nn.Module, sample: Sample, notes: list[str]) -> nn.Module:
    rates = sample.values[str(dropout.hparam)]
    rate = rates.mean().item()
    if rates.numel() > 1:
        notes.append(f"{name} has a rate for each of {rates.numel()} units: the plain one has their mean, {rate:.3g}")
    if isinstance(dropout, StnVariationalDropout):
        notes.append(f"{name} drops the same at all time steps: the plain one does not")
    plain: nn.Module = vars(dropout).get(PLAIN_TYPE, _PLAIN_DROPOUTS[type(dropout)])(rate)
    return plain
