"""Makes response models of ordinary ones."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from ._convertible import plain_type, reasons
from ._forms import DROPOUTS, FORMS, PLAIN_TYPE
from ._layer import StnLayer
from ._report import ConversionReport
from ._substitution import CARRIED, attributes_put_on, substituted
from .hyper_parameters import HyperParameters
from .model import StnModel, check_layers

#: The range of the rate of a dropout, and where it starts if the module's is zero: Delta-STN's and STN's settings.
_HIGHEST_RATE, _FIRST_RATE = 0.95, 0.05


def to_stn(
    model: nn.Module,
    hparams: HyperParameters,
    *,
    dropout: str | Mapping[str, str] | None = None,
    batch_dim: int = 0,
    exclude: Collection[str] = (),
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> StnModel:
    r"""Makes a Self-Tuning Network of a copy of ``model``, which is left as it is.

    Layers of type Linear, Conv1d, Conv2d, Conv3d, Embedding and LSTM, however deep inside, become response layers:
    w(h) = w + diag(U h) V, where w is a copy of the layer's weights, V is drawn as torch draws weights and
    U ~ N(0, 0.01^2). At h = 0 the model computes what it did. What calls them may be any Python code. Of each module
    its device, dtype, hooks, training mode and ``requires_grad`` are kept. Dropout, Dropout1d, Dropout2d and Dropout3d
    become dropouts with a tuned rate.

    ``.report`` of what is returned lists what was converted, and what was left alone and why:

    - normalization, other recurrent layers and whatever else has parameters but no response form;
    - a subclass with methods of its own, a replaced ``forward``, parameters that are recomputed (weight norm, spectral
      norm, pruning) or not there yet (lazy layers), or all frozen;
    - layers that others read instead of calling them, as nn.MultiheadAttention does with its ``out_proj``;
    - of layers with a common parameter all but one, the embedding where there is one: they use its w, as the decoder of
      the paper's language model, which is tied to the plain part of the embedding.

    An LSTM keeps its own dropout between layers, and takes no packed sequences when it responds.
    Where a model's own code reads ``layer.weight`` or calls ``torch.nn.functional.dropout``, nothing of that is
    visible here: it reads w, and drops at its own rate. Name such layers in ``exclude``.

    Args:
        model: any module.
        hparams: becomes part of the model. It goes to the model's device if that is one.
        dropout: which hyperparameter is the rate of which dropout. None: each has one of its own, named like the
            module. A name: that one for all. A mapping from modules' names to hyperparameters': those, and others are
            left alone. Hyperparameters that are not in ``hparams`` are added, in the range (0, 0.95), and start at the
            rate of the first module that has them, or at 0.05 where that is zero.
        batch_dim: which dimension of the layers' inputs counts examples, 1 for sequences with time first. Of an LSTM
            its ``batch_first`` tells, of convolutions it is always 0.
        exclude: names of modules to leave alone, with all inside of them.
        options: by the name of a module, keyword arguments of the response layer or dropout that it becomes, such as
            ``{"rnn": {"weight_dropout": "dropconnect"}}`` or another ``batch_dim``.

    Raises TypeError or ValueError for arguments of other kinds, for names that are not in the model, and where nothing
    would respond; nothing is modified then.

    Reference: MacKay et al., Self-Tuning Networks, ICLR 2019, section 3.3 and appendix.

    >>> import torch
    >>> from nestopt_ext.response import HyperParameters, to_stn
    >>> plain = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.2), torch.nn.BatchNorm1d(4))
    >>> model = to_stn(plain, HyperParameters().add("decay", 1e-3, low=0.0))
    >>> print(model.report)
    responds    0: Linear -> StnLinear
    tuned       1: rate is '1'
    left alone  2: normalization has no response form
    >>> {name: round(value.item(), 3) for name, value in model.hparams.values().items()}
    {'decay': 0.001, '1': 0.2}
    """
    return _Conversion("to_stn", model, hparams, dropout, exclude, options).model(batch_dim, centred=False)


def to_delta_stn(
    model: nn.Module,
    hparams: HyperParameters,
    *,
    dropout: str | Mapping[str, str] | None = None,
    batch_dim: int = 0,
    exclude: Collection[str] = (),
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> StnModel:
    r"""Makes a Delta-STN of a copy of ``model``, which is left as it is.

    As `to_stn`, with w(h) = w + diag(U (h - h0)) V about the current hyperparameters h0, and U = 0 at first: the model
    computes what it did, at any h, until U is trained. Further, it can be linearized: see `StnModel`.

    Reference: Bae and Grosse, Delta-STN, NeurIPS 2020, section 4.

    >>> import torch
    >>> from nestopt_ext.response import HyperParameters, to_delta_stn
    >>> plain = torch.nn.Linear(3, 4)
    >>> model = to_delta_stn(plain, HyperParameters().add("decay", 1e-3, low=0.0))
    >>> x = torch.ones(2, 3)
    >>> with model.at(model.hparams.perturbed(2), linearized=True):
    ...     torch.equal(model(x), plain(x))
    True
    """
    return _Conversion("to_delta_stn", model, hparams, dropout, exclude, options).model(batch_dim, centred=True)


class _Conversion:
    """One call: what is to be converted and what is left for what reason, all checked, and then the conversion."""

    def __init__(
        self,
        caller: str,
        model: nn.Module,
        hparams: HyperParameters,
        dropout: str | Mapping[str, str] | None,
        exclude: Collection[str],
        options: Mapping[str, Mapping[str, Any]] | None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"{caller}: model must be a torch.nn.Module; got {type(model).__name__}.")
        if not isinstance(hparams, HyperParameters):
            raise TypeError(f"{caller}: hparams must be a HyperParameters; got {type(hparams).__name__}.")
        for name, part in model.named_modules():
            if isinstance(part, StnModel):
                where = f"a StnModel in {name!r}" if name else "a StnModel"
                raise TypeError(f"{caller}: model must be of ordinary layers; got {where}. Convert its export().")
        if isinstance(exclude, str):
            raise TypeError(f"{caller}: exclude must be a collection of names; got the string {exclude!r}.")
        self.caller, self.source, self.hparams, self.options = caller, model, hparams, options or {}
        self.modules = dict(model.named_modules())
        self._check_names("exclude", exclude, self.modules)
        self.left = reasons(self.modules, exclude)
        able = {n: plain_type(m) for n, m in self.modules.items() if n not in self.left}
        self.layers = [name for name, plain in able.items() if plain in FORMS]
        self.rates = self._rates(dropout, [name for name, plain in able.items() if plain in DROPOUTS])
        self._check_options()
        if not self.layers:
            raise ValueError(f"{caller}: model must have a layer that can respond; got none.\n{self._report()}")

    def model(self, batch_dim: int, *, centred: bool) -> StnModel:
        """Converts."""
        report, new_entries = self._report(), self._new_entries()
        num_hparams = len(self.hparams) + len(new_entries)
        if not num_hparams:
            raise ValueError(
                f"{self.caller}: hparams must have at least one entry; got none, and no dropout of the model is tuned."
                " Add one by hparams.add(name, value)."
            )
        replacements: dict[nn.Module, nn.Module] = {}
        for name in self.layers:
            layer = self.modules[name]
            replacements[layer] = self._response_layer(name, num_hparams, batch_dim, centred)
            report.converted[name] = f"{type(layer).__name__} -> {type(replacements[layer]).__name__}"
        for name, hparam in self.rates.items():
            replacements[self.modules[name]] = self._tuned_dropout(name, hparam, batch_dim)
            report.dropouts[name] = hparam
        module = substituted(self.source, replacements)
        check_layers(module, num_hparams)
        _freeze(module)
        for hparam, rate in new_entries.items():
            self.hparams.add(hparam, rate, low=0.0, high=_HIGHEST_RATE)
        model = StnModel(module, _placed(self.hparams, module), centred=centred)
        model.training, model.report = self.source.training, report
        return model

    def _response_layer(self, name: str, num_hparams: int, batch_dim: int, centred: bool) -> StnLayer:
        layer = self.modules[name]
        form = FORMS[_plain(layer)]
        given = {
            "num_hparams": num_hparams,
            "batch_dim": form.batch_dim(layer, batch_dim),
            **self.options.get(name, {}),
        }
        new = (form.delta if centred else form.stn)(**form.arguments(layer), **given)
        setattr(new, CARRIED, attributes_put_on(layer, new))
        return new

    def _tuned_dropout(self, name: str, hparam: str, batch_dim: int) -> nn.Module:
        module = self.modules[name]
        plain = _plain(module)
        of_units = hparam in self.hparams.entries and self.hparams.entries[hparam].shape
        given: dict[str, Any] = {"batch_dim": batch_dim} if plain is nn.Dropout else {"batch_dim": 0}
        if plain is nn.Dropout and of_units:
            given["unit_dim"] = -1
        new = DROPOUTS[plain](hparam, **{**given, **self.options.get(name, {})})
        setattr(new, PLAIN_TYPE, plain)
        setattr(new, CARRIED, attributes_put_on(module, plain()))
        return new

    def _rates(self, dropout: str | Mapping[str, str] | None, names: list[str]) -> dict[str, str]:
        """Which hyperparameter is the rate of which dropout; those that are not tuned are left, with the reason."""
        if dropout is None:
            rates = {name: name or "dropout" for name in names}
        elif isinstance(dropout, str):
            rates = dict.fromkeys(names, dropout)
        else:
            self._check_names("dropout", dropout, names)
            rates = {name: dropout[name] for name in names if name in dropout}
        for name in names:
            rate = self.modules[name].p
            if name not in rates:
                self.left[name] = "`dropout` gives it no hyperparameter"
            elif rates[name] not in self.hparams.entries and not 0 <= rate < _HIGHEST_RATE:
                self.left[name] = f"its rate {rate} is outside of the range (0, {_HIGHEST_RATE})"
        return {name: hparam for name, hparam in rates.items() if name not in self.left}

    def _new_entries(self) -> dict[str, float]:
        """Hyperparameters that are still to be added, and the rates that they start at."""
        found: dict[str, float] = {}
        for name, hparam in self.rates.items():
            if hparam not in self.hparams.entries:
                found.setdefault(hparam, float(self.modules[name].p) or _FIRST_RATE)
        return found

    def _check_options(self) -> None:
        if not isinstance(self.options, Mapping):
            raise TypeError(f"{self.caller}: options must be a dict by modules; got {type(self.options).__name__}.")
        self._check_names("options", self.options, [*self.layers, *self.rates])
        for name, given in self.options.items():
            if not isinstance(given, Mapping):
                raise TypeError(f"{self.caller}: options[{name!r}] must be a dict; got {type(given).__name__}.")
            module = self.modules[name]
            plain = _plain(module)
            form, decided = (
                (FORMS[plain].stn, {"num_hparams", *FORMS[plain].arguments(module)})
                if plain in FORMS
                else (DROPOUTS[plain], {"hparam"})
            )
            allowed = sorted(inspect.signature(form).parameters.keys() - decided)
            for option in given:
                if option not in allowed:
                    raise TypeError(
                        f"{self.caller}: options[{name!r}] must be among {', '.join(allowed)}, which a {form.__name__}"
                        f" is free to have; got {option!r}."
                    )

    def _report(self) -> ConversionReport:
        return ConversionReport(left=self.left)

    def _check_names(self, argument: str, names: Iterable[str], wanted: Collection[str]) -> None:
        kind = {"exclude": "modules", "dropout": "dropouts", "options": "layers or dropouts that are converted"}[
            argument
        ]
        for name in names:
            if name not in wanted:
                why = f" It is left alone: {self.left[name]}." if argument != "exclude" and name in self.left else ""
                raise ValueError(f"{self.caller}: {argument} must name {kind} of the model; got {name!r}.{why}")


def _plain(module: nn.Module) -> type[nn.Module]:
    plain = plain_type(module)
    assert plain is not None  # of what `reasons` has nothing against
    return plain


def _freeze(module: nn.Module) -> None:
    """Takes the response from parameters that training leaves where they are."""
    for layer in module.modules():
        if isinstance(layer, StnLayer):
            for response in layer.responses():
                if not response.centre.requires_grad:
                    response.direction.detach().zero_()
                    response.direction.requires_grad_(False)


def _placed(hparams: HyperParameters, module: nn.Module) -> HyperParameters:
    devices = {parameter.device for parameter in module.parameters()}
    return hparams.to(devices.pop()) if len(devices) == 1 else hparams
