"""A network whose output is the weights of another one."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .. import _lists
from ..hypergrad._loop_arguments import check_count

_CALLER = "Hypernetwork"


class Hypernetwork(nn.Module):
    r"""Weights of ``model`` as a function of hyperparameters: the best response, learned.

    .. math:: w_\phi(\lambda) = A\, t(\lambda - \lambda_0) + a, \qquad
              t(x) = x, \quad \text{or hidden layers of ReLU units, or } B x + b \text{ through a bottleneck}

    Without ``hidden`` and ``bottleneck`` this is linear: the tangent plane of the response, with
    (num_hparams + 1) P weights for the P of the model. ``bottleneck=k`` makes A k columns wide, (num_hparams + 1) k +
    (k + 1) P weights, which is what millions of hyperparameters leave room for. ``hidden=(50,)`` puts ReLU layers in
    front, for a response that is learned everywhere at once (:func:`global_hypertrain`).

    Args:
        model: any module. It stays as it is, is not copied, and is no part of this one: its mode, its device and its
            buffers are the caller's. Parameters that do not require grad are left to it.
        num_hparams: n, how many numbers a point in hyperparameter space has.
        hidden: widths of the ReLU layers.
        bottleneck: width of a linear layer before the last one; None for none.
        init_std: A, B, b and the hidden layers start as normal numbers of this standard deviation, a at the weights of
            the model. 0 for a linear one that starts as constant.
        centre: :math:`\lambda_0` [n], a constant that h is counted from; None for zero. Where hyperparameters begin far
            from zero, as logarithms do, give where: the fit of a slope is badly conditioned away from the centre, and
            through a bottleneck the start of many hyperparameters would add up to weights far from the model's.
        names: which parameters respond, by their names in ``model.named_parameters()``; None for all that require
            grad. The others are copied into ``shared``, are trained along and are the same at every h.

    Device and dtype are those of the model's parameters, of which there must be one each. ``parameters()`` and
    ``state_dict()`` are those of the hypernetwork alone; buffers of the model are saved with the model.

    A call takes h, [n] or [B, n], and returns a dict of all parameters that require grad, by name, [\*shape] or
    [B, \*shape]: what ``torch.func.functional_call`` takes. All weights of a point are one row of one matrix product,
    and the tensors are views of it. :meth:`call` answers with the model itself; :meth:`export` makes a plain module.

    Raises TypeError or ValueError for bad arguments.

    Source: Lorraine, Duvenaud, Stochastic hyperparameter optimization through hypernetworks (2018), section 2. There
    all weights start as normal numbers of deviation 0.01, the vector a too; here a is the model's own start, without
    which normalization layers would begin at zero.

    >>> import torch
    >>> model = torch.nn.Linear(784, 10)
    >>> [sum(p.numel() for p in Hypernetwork(model, *args, **kwargs).parameters()) for args, kwargs in (
    ...     ((1,), {}), ((1,), {"hidden": (50,)}), ((7850,), {"bottleneck": 10}), ((10,), {}))]
    [15700, 400450, 164860, 86350]
    >>> hypernet = Hypernetwork(model, 2, init_std=0.0)
    >>> x = torch.randn(3, 784)
    >>> torch.equal(hypernet.call(torch.tensor([1.0, -1.0]), x), model(x))
    True
    >>> {name: tuple(w.shape) for name, w in hypernet(torch.zeros(5, 2)).items()}
    {'weight': (5, 10, 784), 'bias': (5, 10)}
    """

    centre: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        num_hparams: int,
        *,
        hidden: Sequence[int] = (),
        bottleneck: int | None = None,
        init_std: float = 0.01,
        centre: Tensor | None = None,
        names: Iterable[str] | None = None,
    ) -> None:
        super().__init__()
        check_count(_CALLER, "num_hparams", num_hparams, 1)
        widths = _checked_widths(hidden, bottleneck)
        _check_init_std(init_std, starts_stuck=bool(widths))
        responding, shared = _chosen(model, names)
        like = next(iter(responding.values()))
        self.num_hparams = num_hparams
        self.register_buffer("centre", _checked_centre(centre, num_hparams, like))
        self._model = (model,)  # in a tuple it is no submodule
        self._shapes = {name: p.shape for name, p in responding.items()}
        self._shared_names = tuple(shared)
        self.shared = nn.ParameterList(p.detach().clone() for p in shared.values())
        sizes = [num_hparams, *widths]
        layers: list[nn.Module] = []
        for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
            layers.append(_normal_layer(inputs, outputs, init_std, like))
            if i < len(hidden):
                layers.append(nn.ReLU())
        self.trunk = nn.Sequential(*layers)
        count = sum(p.numel() for p in responding.values())
        self.output = _normal_layer(sizes[-1], count, init_std, like)
        with torch.no_grad():
            torch.cat([p.flatten() for p in responding.values()], out=self.output.bias)

    @property
    def model(self) -> nn.Module:
        """The module whose weights these are."""
        return self._model[0]

    def forward(self, h: Tensor) -> dict[str, Tensor]:
        """The parameters at ``h``, [n] or [B, n]: {name: [*shape] or [B, *shape]}, with a graph to h."""
        self._check_point(h)
        flat = self.output(self.trunk(h if self.centre is None else h - self.centre))
        lead = h.shape[:-1]
        parts = flat.split([shape.numel() for shape in self._shapes.values()], dim=-1)
        made = {n: part.view((*lead, *shape)) for (n, shape), part in zip(self._shapes.items(), parts, strict=True)}
        same = {n: p.expand(*lead, *p.shape) for n, p in zip(self._shared_names, self.shared, strict=True)}
        return made | same

    def call(self, h: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the model answers with its weights at ``h``; at each of the points [B, n], one answer in front.

        Arguments are the same for all points. Of several points, ``torch.func.vmap`` makes one pass; dropout masks
        differ between them.
        """
        params = self(h)
        if h.dim() == 1:
            return functional_call(self.model, params, args, kwargs)
        return torch.func.vmap(lambda p: functional_call(self.model, p, args, kwargs), randomness="different")(params)

    def export(self, h: Tensor) -> nn.Module:
        """A copy of the model with its weights at ``h``, [n]: a plain module without hyperparameters."""
        if h.dim() != 1:
            raise ValueError(f"{_CALLER}.export: h must be one point, [{self.num_hparams}]; got {tuple(h.shape)}.")
        exported = copy.deepcopy(self.model)
        with torch.no_grad():
            own = dict(exported.named_parameters())
            for name, value in self(h).items():
                own[name].copy_(value)
        return exported

    def extra_repr(self) -> str:
        """Sizes, and whose weights these are."""
        count = sum(shape.numel() for shape in self._shapes.values())
        return f"num_hparams={self.num_hparams}, responding={count}, model={type(self.model).__name__}"

    def _check_point(self, h: Tensor) -> None:
        if not isinstance(h, Tensor):
            raise TypeError(f"{_CALLER}: h must be a Tensor; got {_lists.value_name(h)}.")
        if h.dim() not in (1, 2) or h.shape[-1] != self.num_hparams:
            n = self.num_hparams
            raise ValueError(f"{_CALLER}: h must have shape ({n},) or (B, {n}); got {tuple(h.shape)}.")


def _chosen(model: Any, names: Iterable[str] | None) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """The parameters that respond, and those that are the same everywhere."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_CALLER}: model must be a torch.nn.Module; got {_lists.value_name(model)}.")
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError(f"{_CALLER}: model must have a parameter that requires grad; got none.")
    labels = [f"model.{name}" for name in trainable]
    _lists.check_floating(_CALLER, labels, list(trainable.values()))
    first = next(iter(trainable.values()))
    for label, p in zip(labels, trainable.values(), strict=True):
        if p.dtype != first.dtype or p.device != first.device:
            raise ValueError(
                f"{_CALLER}: {label} must be {_lists.dtype_name(first.dtype)} on {first.device}, as {labels[0]} is;"
                f" got {_lists.dtype_name(p.dtype)} on {p.device}."
            )
    if names is None:
        return trainable, {}
    if isinstance(names, str):
        raise TypeError(f"{_CALLER}: names must be a list of names; got the text {names!r}. Pass [{names!r}].")
    wanted = list(names)
    for name in wanted:
        if name not in trainable:
            raise ValueError(f"{_CALLER}: names must be among {', '.join(trainable)}; got {name!r}.")
    if not wanted:
        raise ValueError(f"{_CALLER}: names must name a parameter that responds; got none.")
    chosen = set(wanted)
    return (
        {name: p for name, p in trainable.items() if name in chosen},
        {name: p for name, p in trainable.items() if name not in chosen},
    )


def _checked_widths(hidden: Sequence[int], bottleneck: int | None) -> list[int]:
    if isinstance(hidden, str) or not isinstance(hidden, Sequence):
        raise TypeError(f"{_CALLER}: hidden must be a sequence of widths; got {hidden!r}. Pass (50,) for one layer.")
    for i, width in enumerate(hidden):
        check_count(_CALLER, f"hidden[{i}]", width, 1)
    if bottleneck is not None:
        check_count(_CALLER, "bottleneck", bottleneck, 1)
    return [*hidden, *([] if bottleneck is None else [bottleneck])]


def _checked_centre(centre: Tensor | None, num_hparams: int, like: Tensor) -> Tensor | None:
    if centre is None:
        return None
    if not isinstance(centre, Tensor):
        raise TypeError(f"{_CALLER}: centre must be a Tensor; got {_lists.value_name(centre)}.")
    if centre.shape != (num_hparams,):
        raise ValueError(f"{_CALLER}: centre must have shape ({num_hparams},); got {tuple(centre.shape)}.")
    return centre.detach().to(like, copy=True)


def _check_init_std(init_std: float, *, starts_stuck: bool) -> None:
    """At zero, layers in front of the last one would get no gradient."""
    if isinstance(init_std, bool) or not isinstance(init_std, int | float):
        raise TypeError(f"{_CALLER}: init_std must be a number; got {init_std!r}.")
    if not math.isfinite(init_std) or init_std < 0 or (starts_stuck and init_std == 0):
        rule = "be finite and > 0, where there are hidden layers or a bottleneck" if starts_stuck else "be finite, >= 0"
        raise ValueError(f"{_CALLER}: init_std must {rule}; got {init_std}.")


def _normal_layer(inputs: int, outputs: int, std: float, like: Tensor) -> nn.Linear:
    # Made without memory first: torch's own start of a matrix this large would be time for nothing.
    layer = nn.Linear(inputs, outputs, device="meta", dtype=like.dtype).to_empty(device=like.device)
    nn.init.normal_(layer.weight, std=std)
    nn.init.normal_(layer.bias, std=std)
    return layer
