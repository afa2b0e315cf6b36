r"""Square roots of the Hessian of a criterion in the outputs of a model.

For outputs [N, ...] whose entries along dimension 0 are examples, the Hessian of a criterion that is a sum over
examples is block diagonal, :math:`H = S S^\top`, and a column of S for all examples at once is a tensor like the
outputs. For the three criteria that are negative log-likelihoods,

.. math:: L = \sum_m \omega_m \, \mathrm{nll}_m, \qquad H = \sum_m \omega_m \, E_{y \sim p_m} [s_m(y) s_m(y)^\top],

with the score :math:`s_m` the gradient of :math:`\mathrm{nll}_m` in the outputs of term m; the weights
:math:`\omega_m` hold the reduction, class weights, masks and smoothing. So :math:`\sqrt{\omega_m} s_m` is a random
root, with labels drawn from the model, and the root of an empirical Fisher, with labels as they are.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _lists, _reference
from ._gradient import Gradient

#: Elements that the Hessians of all examples may have where they must be written out.
_DENSE_ELEMENTS = 2**26


class LossRoot(ABC):
    """What can be backpropagated from the outputs to get a curvature of the criterion; tensors like the outputs."""

    @abstractmethod
    def columns(self) -> Iterator[Tensor]:
        """The columns of S, as many as an example has outputs."""

    def sampled(self, generator: torch.Generator) -> Tensor:
        """The score of targets drawn from the model, times the root of its weight."""
        raise NotImplementedError

    def given(self) -> Tensor:
        """The score of the targets as they are, times the root of its weight."""
        raise NotImplementedError


def loss_root(caller: str, criterion: Callable[..., Any], outputs: Tensor, targets: Any) -> LossRoot:
    """The root for a criterion that has already been called on these outputs and targets without complaint."""
    outputs = outputs.detach()
    kind = type(criterion)
    if kind is nn.CrossEntropyLoss or criterion is F.cross_entropy:
        return _CrossEntropy(caller, criterion, outputs, targets)
    if kind is nn.MSELoss or criterion is F.mse_loss:
        return _SquaredError(caller, criterion, outputs, targets)
    if kind is nn.BCEWithLogitsLoss or criterion is F.binary_cross_entropy_with_logits:
        return _Logistic(caller, criterion, outputs, targets)
    return _Generic(caller, criterion, outputs, targets)


def has_likelihood(criterion: object) -> bool:
    """Whether the criterion is known as a negative log-likelihood, so that targets can be drawn from it."""
    known = (nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss)
    functions = (F.cross_entropy, F.mse_loss, F.binary_cross_entropy_with_logits)
    return type(criterion) in known or any(criterion is function for function in functions)


class _CrossEntropy(LossRoot):
    """Classes along dimension 1; S = sqrt(w) (diag(sqrt p) - p sqrt(p)') for each position of the other dimensions."""

    def __init__(self, caller: str, criterion: Any, outputs: Tensor, targets: Tensor) -> None:
        if outputs.dim() < 2:
            raise ValueError(
                f"{caller}: outputs of the model must be [N, C, ...] for a cross-entropy;"
                f" got shape {_lists.shape_name(outputs.shape)}. Give the inputs a batch dimension."
            )
        self._like = outputs
        logits = outputs.movedim(1, -1).flatten(1, -2) if outputs.dim() > 2 else outputs.unsqueeze(1)
        self._p = logits.to(_reference.opmath(outputs.dtype)).softmax(-1)  # [N, T, C]
        classes = outputs.shape[1]
        smoothing = float(getattr(criterion, "label_smoothing", 0.0))
        class_weight = getattr(criterion, "weight", None)
        weight = self._p.new_ones(classes) if class_weight is None else class_weight.detach().to(self._p)
        mean = getattr(criterion, "reduction", "mean") == "mean"
        if targets.dtype.is_floating_point:
            wanted = targets.detach().movedim(1, -1).reshape(self._p.shape).to(self._p)
            terms = self._p.new_full((), self._p.shape[0] * self._p.shape[1])
        else:
            labels = targets.reshape(self._p.shape[:2])
            kept = labels != getattr(criterion, "ignore_index", -100)
            labels = labels.masked_fill(~kept, 0)
            wanted = F.one_hot(labels, classes).to(self._p) * kept.unsqueeze(-1)
            terms = (weight[labels] * kept).sum()
        wanted = ((1 - smoothing) * wanted + smoothing / classes * wanted.sum(-1, keepdim=True)) * weight
        mass = wanted.sum(-1)
        self._root_weight = (mass / terms if mean else mass).sqrt().unsqueeze(-1)  # [N, T, 1]
        self._mean_target = wanted / torch.where(mass == 0, 1.0, mass).unsqueeze(-1)

    def columns(self) -> Iterator[Tensor]:
        root_p = self._p.sqrt()
        for position in range(self._p.shape[1]):
            p, scale = self._p[:, position], self._root_weight[:, position]
            for c in range(self._p.shape[2]):
                column = -p * root_p[:, position, c : c + 1]
                column[:, c] += root_p[:, position, c]
                whole = torch.zeros_like(self._p)
                whole[:, position] = scale * column
                yield self._packed(whole)

    def sampled(self, generator: torch.Generator) -> Tensor:
        labels = torch.multinomial(self._p.flatten(0, 1), 1, generator=generator).view(self._p.shape[:2])
        return self._packed(self._root_weight * (self._p - F.one_hot(labels, self._p.shape[2])))

    def given(self) -> Tensor:
        return self._packed(self._root_weight * (self._p - self._mean_target))

    def _packed(self, rows: Tensor) -> Tensor:
        shape = (self._like.shape[0], *self._like.shape[2:], self._like.shape[1])
        return rows.reshape(shape).movedim(-1, 1).to(self._like.dtype)


class _Elementwise(LossRoot):
    """A criterion that is a sum over elements: S is diagonal, ``root`` its diagonal, like the outputs."""

    def __init__(self, outputs: Tensor, root: Tensor) -> None:
        self._like = outputs
        self._root = root

    def columns(self) -> Iterator[Tensor]:
        flat = self._root.reshape(len(self._root), -1)
        for j in range(flat.shape[1]):
            column = torch.zeros_like(flat)
            column[:, j] = flat[:, j]
            yield self._packed(column)

    def _packed(self, values: Tensor) -> Tensor:
        return values.reshape(self._like.shape).to(self._like.dtype)


class _SquaredError(_Elementwise):
    """nll = (f - y)^2, the Gaussian of variance 1/2: S = sqrt(2 w), score 2 (f - y)."""

    def __init__(self, caller: str, criterion: Any, outputs: Tensor, targets: Tensor) -> None:
        _check_shape(caller, outputs, targets)
        weight = 1 / outputs.numel() if getattr(criterion, "reduction", "mean") == "mean" else 1.0
        wide = outputs.to(_reference.opmath(outputs.dtype))
        super().__init__(outputs, torch.full_like(wide, (2 * weight) ** 0.5))
        self._residual = wide - targets.detach().to(wide)

    def sampled(self, generator: torch.Generator) -> Tensor:
        noise = torch.empty_like(self._root).normal_(generator=generator)
        return self._packed(self._root * noise)

    def given(self) -> Tensor:
        return self._packed(2**0.5 * self._root * self._residual)


class _Logistic(_Elementwise):
    """The Bernoulli of p = sigmoid(f): S = sqrt(w p (1 - p)), score p - y; w is larger by pos_weight where y is 1."""

    def __init__(self, caller: str, criterion: Any, outputs: Tensor, targets: Tensor) -> None:
        _check_shape(caller, outputs, targets)
        wide = outputs.to(_reference.opmath(outputs.dtype))
        target = targets.detach().to(wide)
        weight, pos_weight = getattr(criterion, "weight", None), getattr(criterion, "pos_weight", None)
        positive = target if pos_weight is None else pos_weight.detach().to(wide) * target
        mass = positive + 1 - target
        self._mean_target = positive / mass
        if weight is not None:
            mass = mass * weight.detach().to(wide)
        if getattr(criterion, "reduction", "mean") == "mean":
            mass = mass / outputs.numel()
        self._p = wide.sigmoid()
        self._root_weight = mass.sqrt()
        # sigmoid(-f), not 1 - p, which is zero already at f = 17 in float32.
        super().__init__(outputs, self._root_weight * (self._p * (-wide).sigmoid()).sqrt())

    def sampled(self, generator: torch.Generator) -> Tensor:
        labels = torch.bernoulli(self._p, generator=generator)
        return self._packed(self._root_weight * (self._p - labels))

    def given(self) -> Tensor:
        return self._packed(self._root_weight * (self._p - self._mean_target))


class _Generic(LossRoot):
    """Any criterion that is convex in the outputs and a sum over examples: eigenvectors of each dense Hessian."""

    def __init__(self, caller: str, criterion: Callable[..., Any], outputs: Tensor, targets: Any) -> None:
        self._like = outputs
        examples, width = len(outputs), outputs[:1].numel()
        if examples * width**2 > _DENSE_ELEMENTS:
            raise ValueError(
                f"{caller}: criterion must be CrossEntropyLoss, MSELoss or BCEWithLogitsLoss for outputs of this size,"
                f" whose Hessians would have {examples} x {width}^2 elements; got {_lists.value_name(criterion)}."
                " Pass fewer inputs."
            )
        point = outputs.clone().requires_grad_()
        with torch.enable_grad():
            gradient = Gradient(caller, "criterion", lambda: criterion(point, targets), [point])

        def product(v: Tensor) -> Tensor:
            return gradient.product([v.reshape(outputs.shape)])[0].reshape(examples, width)

        wide = _reference.opmath(outputs.dtype)
        rows = []
        for j in range(width):
            unit = outputs.new_zeros(examples, width)
            unit[:, j] = 1
            rows.append(product(unit))
        hessian = torch.stack(rows, 1).to(wide) if rows else outputs.new_zeros((examples, 0, 0), dtype=wide)
        tolerance = torch.finfo(outputs.dtype).eps ** 0.5
        probe = torch.randn(examples, width, generator=torch.Generator().manual_seed(0)).to(outputs)
        apart = torch.einsum("nij,nj->ni", hessian, probe.to(wide)) - product(probe)
        if bool(apart.norm() > tolerance * hessian.norm() * width**0.5):
            raise ValueError(
                f"{caller}: criterion must be a sum or mean over dimension 0 of the outputs; got one that couples"
                " examples. Use Hessian, which needs no such structure."
            )
        values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
        if bool((values < -tolerance * values.abs().amax(-1, keepdim=True)).any()):
            raise ValueError(
                f"{caller}: criterion must be convex in the outputs of the model;"
                f" got an output Hessian with the eigenvalue {float(values.min()):.3g}. A Gauss-Newton matrix of it is"
                " not positive semidefinite and has no Kronecker factors."
            )
        self._root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)  # [N, K, K], columns are eigenvectors

    def columns(self) -> Iterator[Tensor]:
        for j in range(self._root.shape[-1]):
            yield self._root[..., j].reshape(self._like.shape).to(self._like.dtype)


def _check_shape(caller: str, outputs: Tensor, targets: Tensor) -> None:
    if targets.shape != outputs.shape:
        raise ValueError(
            f"{caller}: targets must have the shape of the outputs of the model {_lists.shape_name(outputs.shape)};"
            f" got {_lists.shape_name(targets.shape)}."
        )
