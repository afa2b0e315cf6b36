"""A network whose weights respond to hyperparameters, with the hyperparameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ._layer import StnLayer
from ._linearized import linearized_call, without_fast_paths
from ._report import ConversionReport
from ._sample import Sample, current_sample, using_sample
from .export import exported
from .hyper_parameters import HyperParameters


class StnModel(nn.Module):
    r"""A module with response layers, and the hyperparameters they respond to.

    Called as it is, it answers at the current hyperparameters h0: ``model(x)``. Inside ``with model.at(h)`` it answers
    at h, one point for each example or one for all. The weights are w(h); a graph leads from the answer to h through
    the gates of its layers and no other way: the rate of a dropout is a value, whatever it was computed from.

    With ``centred`` (Delta-STN) w(h) = w0 + Theta (h - h0), and h0 is a constant in it, so that moving h0 leaves the
    weights that serve where they are. Otherwise (STN) w(h) = w0 + Theta h. Inside ``with model.at(h, linearized=True)``
    a centred model answers with its linearization in the weights, :math:`f(x; w_0) + J_w f(x; w_0)\, \Theta (h - h_0)`,
    for every tensor of the answer, computed in one pass of forward-mode differentiation.

    Args:
        module: any module; the layers in it that are response layers respond. It becomes a submodule, as it is.
        hparams: at least one hyperparameter, as many as the layers were made for. It becomes a submodule, and takes no
            further entries.
        centred: whether the gate input is h - h0, or h.

    ``parameters()`` are those of ``general_parameters()``, of ``response_parameters()`` and of ``hparams``, which have
    an optimizer each: gradients of a training loss must not move hyperparameters.

    A ``torch.utils.checkpoint`` region inside is computed again during backward, so backward must then be called inside
    of ``at`` as well, and is not supported where the backward pass has threads of its own, as on a GPU.

    References: MacKay et al., Self-Tuning Networks, ICLR 2019, section 3; Bae and Grosse, Delta-STN, NeurIPS 2020,
    section 4. There the tangent comes from two backward passes; here it is the forward pass's.

    >>> import torch
    >>> from nestopt_ext.response import DeltaStnLinear, HyperParameters, StnModel
    >>> layer = DeltaStnLinear(1, 1, bias=False, num_hparams=1)
    >>> model = StnModel(layer, HyperParameters().add("decay", 1.0), centred=True)
    >>> with torch.no_grad():
    ...     for parameter, value in zip(layer.parameters(), (3.0, 5.0, 0.5)):  # w0, direction, U
    ...         _ = parameter.fill_(value)
    >>> x = torch.ones(2, 1)
    >>> model(x).flatten().tolist()
    [3.0, 3.0]
    >>> with model.at(torch.tensor([[1.0], [3.0]])):  # w0 + 0.5 (h - 1) 5
    ...     model(x).flatten().tolist()
    [3.0, 8.0]
    """

    def __init__(self, module: nn.Module, hparams: HyperParameters, *, centred: bool) -> None:
        super().__init__()
        _check(module, hparams)
        self.module = module
        self.hparams = hparams
        self.centred = centred
        #: What conversion did, of a model that `to_stn` or `to_delta_stn` made.
        self.report: ConversionReport | None = None
        self._linearized_in: set[bool] = set()  # training modes in which a linearized answer was watched
        hparams.frozen = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns at the current sample, or at the current hyperparameters where there is none.

        A linearized answer holds tensors in tuples, lists and dicts (or what ``torch.utils._pytree`` knows); each is
        the sum of primal and tangent. Raises TypeError where it holds other objects, which might hide a tensor, and
        RuntimeError where an operation inside has no forward-mode derivative, where the call is itself inside of
        forward-mode differentiation, or under ``torch.inference_mode()``, which drops tangents in silence.
        """
        sample = current_sample()
        if sample is None or sample.hparams not in (None, self.hparams):
            with self._at_current():
                return self(*args, **kwargs)
        if sample.linearized:
            first = self.module.training not in self._linearized_in
            answer = linearized_call(self.module, args, kwargs, watched=first)
            self._linearized_in.add(self.module.training)
            return answer
        with without_fast_paths():
            return self.module(*args, **kwargs)

    @contextlib.contextmanager
    def at(self, unconstrained: Tensor, *, linearized: bool = False) -> Iterator[Sample]:
        """While open, the model answers at the points ``unconstrained``.

        Args:
            unconstrained: [B, n], a point for each example of the batches that the model is called with; [1, n] or [n],
                one for all. In unconstrained units, as ``hparams.unconstrained`` and ``hparams.perturbed(B)``.
            linearized: answers with the linearization about the current hyperparameters; of a centred model only. For
                gradients, call it with ``requires_grad`` of the general parameters False: the graph is smaller, and
                those of PyTorch's tangents to the primal are wrong for LayerNorm, InstanceNorm and BatchNorm in
                training mode (there is a warning), and fail for softmax, logsumexp and attention. Gradients to the
                response are right either way.

        Yields the sample, whose ``values`` are the hyperparameters in natural units. Calls may be nested: the innermost
        counts. Raises TypeError and ValueError, before anything is computed, for what is not such a tensor.
        """
        h = self._points(unconstrained)
        if linearized and not self.centred:
            raise ValueError(
                "StnModel.at: linearized must be False for a model that is not centred; got True."
                " Make the model with to_delta_stn, or StnModel(..., centred=True)."
            )
        gate_input = h - self.hparams.unconstrained.detach() if self.centred else h
        with using_sample(Sample(gate_input, self.hparams.natural(h.detach()), linearized, self.hparams)) as sample:
            yield sample

    @contextlib.contextmanager
    def at_centre(self, *, first_order: bool = False) -> Iterator[Sample]:
        """While open, the model answers at the current hyperparameters, without a graph to them.

        The response layers of a centred model are plain layers then, at the cost of plain layers. ``first_order``
        promises that answers are differentiated once at most, and backward: an LSTM is torch's kernel then.
        """
        h0 = self.hparams.unconstrained.detach().unsqueeze(0)
        gate_input = None if self.centred else h0
        values = self.hparams.natural(h0)
        with using_sample(Sample(gate_input, values, hparams=self.hparams, first_order=first_order)) as sample:
            yield sample

    @contextlib.contextmanager
    def fixed_buffers(self) -> Iterator[None]:
        """While open, calls write to copies of the module's buffers, which are dropped when it closes.

        For second calls within one training step: running statistics then move once a step, by the batch at the
        current hyperparameters. Graphs built inside remain valid.
        """
        copies: dict[int, Tensor] = {}
        held = [
            (module._buffers, name, buffer)
            for module in self.module.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        for buffers, name, buffer in held:
            buffers[name] = copies.setdefault(id(buffer), buffer.clone())
        try:
            yield
        finally:
            for buffers, name, buffer in held:
                buffers[name] = buffer

    def export(self) -> nn.Module:
        """A plain module with the tuned values in it: what the model is at the current hyperparameters.

        A copy of ``module`` with torch's own layers, of w(h0), and dropouts, of the tuned rates, in place of response
        layers and tuned dropouts; nothing of this package is left in it. In evaluation it answers as the model does.
        Its state_dict has the names and shapes of the model that was converted. Where that shares a weight among
        layers, the export of a centred model does too; otherwise the layer that responds has its own.

        Warns with a list of what no plain module does: a rate for each unit (their mean is taken), masks that are the
        same for all time steps, dropped words and weights (left out), other modules of this package (nn.Identity), and
        weights that are not shared any more. None of these but the last matters in evaluation.

        Raises TypeError for response layers from elsewhere.
        """
        with torch.no_grad(), self.at_centre() as sample:
            return exported(self.module, sample)

    def general_parameters(self) -> Iterator[nn.Parameter]:
        """The weights that serve at the centre, each once: all of the module but those of the response."""
        response = {id(p) for p in self.response_parameters()}
        return (p for p in self.module.parameters() if id(p) not in response)

    def response_parameters(self) -> Iterator[nn.Parameter]:
        """Directions and gate weights of all response layers, each once."""
        layers = (layer for layer in self.module.modules() if isinstance(layer, StnLayer))
        seen = {id(p): p for layer in layers for p in layer.response_parameters()}
        return iter(seen.values())

    def _at_current(self) -> contextlib.AbstractContextManager[Sample]:
        h0 = self.hparams.unconstrained
        return self.at(h0) if torch.is_grad_enabled() and h0.requires_grad else self.at_centre()

    def _points(self, unconstrained: Tensor) -> Tensor:
        if not isinstance(unconstrained, Tensor):
            raise TypeError(
                f"StnModel.at: unconstrained must be a tensor; got {type(unconstrained).__name__}."
                " Take model.hparams.perturbed(batch_size), or model.hparams.unconstrained."
            )
        h = unconstrained.unsqueeze(0) if unconstrained.dim() == 1 else unconstrained
        n = len(self.hparams)
        if h.dim() != 2 or h.shape[1] != n or not h.is_floating_point():
            raise ValueError(
                f"StnModel.at: unconstrained must be of shape (examples or 1, {n}) and of floating dtype;"
                f" got shape {tuple(unconstrained.shape)}, {unconstrained.dtype}."
            )
        return h


def _check(module: nn.Module, hparams: HyperParameters) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"StnModel: module must be a torch.nn.Module; got {type(module).__name__}.")
    if not isinstance(hparams, HyperParameters):
        raise TypeError(f"StnModel: hparams must be a HyperParameters; got {type(hparams).__name__}.")
    if not len(hparams):
        raise ValueError(
            "StnModel: hparams must have at least one entry; got none. Add one by hparams.add(name, value)."
        )
    check_layers(module, len(hparams))


def check_layers(module: nn.Module, num_hparams: int) -> None:
    """Raises ValueError where something in ``module`` is not made for this number of hyperparameters."""
    for name, part in module.named_modules():
        if isinstance(part, HyperParameters):
            raise ValueError(f"StnModel: module must hold no hyperparameters of its own; got some in {name!r}.")
        if isinstance(part, StnLayer) and part.num_hparams != num_hparams:
            raise ValueError(
                f"StnModel: {name or 'module'} must be made for {num_hparams} hyperparameters, as many as hparams has;"
                f" got num_hparams={part.num_hparams}."
            )
