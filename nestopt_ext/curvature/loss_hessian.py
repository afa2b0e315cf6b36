"""The Hessian of a loss in the outputs of a model."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _functions, _lists
from ._criteria import CrossEntropy, Elementwise, Targets, recognize, reduction_of
from ._evaluation import check_scalar, observe
from ._gradient import _refuse_error_nodes, named_faults
from ._vjp import vjps

#: Rows of a factor that are worth forming where it takes an eigendecomposition of the whole matrix.
_MAX_DENSE_ROWS = 1024
#: Elements of the matrices of all rows, and products, for which these are worth forming.
_MAX_BLOCKS, _WORTH_BLOCKS = 2**15, 5


class LossHessian(ABC):
    r"""The Hessian :math:`H = \partial^2 \ell / \partial z\,\partial z^\top` of a scalar loss in outputs z, as an
    operator on tensors like them.

    Made by :func:`loss_hessian`. ``name`` says which form it has: that of the closed form, such as "cross_entropy", or
    "double_backward"; ``outputs`` are the outputs z it was made for.
    """

    def __init__(self, name: str, outputs: Tensor) -> None:
        self.name = name
        self.outputs = outputs

    def __repr__(self) -> str:
        return f"LossHessian({self.name}, {_lists.shape_name(self.outputs.shape)})"

    def __call__(self, u: Tensor) -> Tensor:
        """H u, for ``u`` of the shape, dtype and device of the outputs; a new tensor, with a graph where grad mode is
        on and ``u`` or the outputs have one.

        Raises TypeError or ValueError unless ``u`` is like the outputs.
        """
        if not isinstance(u, Tensor):
            raise TypeError(f"LossHessian: u must be a Tensor; got {_lists.value_name(u)}.")
        _lists.check_like("LossHessian", ["u"], [u], [self.outputs])
        return self._product(u)

    @abstractmethod
    def _product(self, u: Tensor) -> Tensor:
        """H u, with a graph where there is one."""

    def product(self, u: Tensor) -> Tensor:
        """H u without graph, for a ``u`` that is known to fit."""
        with torch.no_grad():
            return self._product(u)

    def for_products(self, num_products: int) -> Callable[[Tensor], Tensor]:
        """:meth:`product`, by what is made once for so many of them where that pays."""
        return self.product

    @abstractmethod
    def products(self, u: Tensor) -> Tensor:
        """H u for k tensors, [k, *shape of the outputs]; without graph."""

    def scaled(self, scale: float | Tensor) -> LossHessian:
        """The same times a number, 0-dim."""
        return ScaledLossHessian(self, scale)

    @abstractmethod
    def factor(self) -> tuple[Tensor, Tensor] | None:
        """S, [r, *shape of the outputs], and c, [r], with H = S' diag(c) S; None where that takes too long to find."""

    def example_rank(self, batch: int) -> int | None:
        """How many rows of S each of ``batch`` examples has, where each row of S is of one example; else None.

        The first dimension of the outputs runs over examples, or over a multiple of them with what belongs to one next
        to each other.
        """
        return None

    def example_factor(self, batch: int) -> tuple[Tensor, Tensor]:
        """S and c by example: [m, *shape of the outputs] and [m, B], with m the :meth:`example_rank`.

        A row of S is the entry of one example in one of the m tensors, with zeros for all other examples.
        """
        raise NotImplementedError


def loss_hessian(criterion: Callable[..., Tensor], outputs: Tensor, targets: Any) -> LossHessian:
    r"""The Hessian of ``criterion(outputs, targets)`` in ``outputs``, in closed form where it is known.

    ``criterion`` is one of these, as a module of exactly this type or as the function in torch.nn.functional, bare or
    in a ``functools.partial`` with keyword arguments, with reduction "mean" or "sum":

    - ``CrossEntropyLoss``, logits [C], [N, C] or [N, C, d1, ...], targets class indices or probabilities, with
      ``weight``, ``ignore_index`` and ``label_smoothing``. Each row gives w (diag(p) - p p'), p the softmax, w the sum
      over classes of class weight times target probability, over what the mean divides by; 0 for a row ignored.
    - ``MSELoss``: 2. ``BCEWithLogitsLoss``, with ``weight`` and ``pos_weight``: p (1 - p) times those.
      ``PoissonNLLLoss``: exp(z), or t / (z + eps)^2 with ``log_input=False``. ``GaussianNLLLoss``: 1 / max(var, eps).
      Each on the diagonal, over the number of elements for the mean.

    These are positive semidefinite (for weights >= 0 and Poisson counts >= 0). Any other callable, or options and
    shapes not named here, are differentiated twice, and the result is whatever that loss has.

    ``outputs`` (z) is a float32, float64, bfloat16 or float16 tensor, with or without graph. ``targets`` is what comes
    after it: one argument, or a tuple of several, for GaussianNLLLoss (target, var). Nothing is modified, and the graph
    of ``outputs`` stays alive. Products are differentiable in ``outputs`` and in u.

    Raises TypeError or ValueError for bad arguments, and RuntimeError, with the way out, where PyTorch has no second
    derivative of the criterion.

    Source: Schraudolph, Fast curvature matrix-vector products for second-order gradient descent (2002), for the losses
    that match their output nonlinearity.

    >>> import torch
    >>> hessian = loss_hessian(torch.nn.CrossEntropyLoss(), torch.zeros(1, 2), torch.tensor([0]))
    >>> hessian(torch.tensor([[4.0, 0.0]]))                       # p = (1/2, 1/2)
    tensor([[ 1., -1.]])
    >>> hessian
    LossHessian(cross_entropy, (1, 2))
    """
    check_criterion("loss_hessian", criterion)
    if not isinstance(outputs, Tensor):
        raise TypeError(f"loss_hessian: outputs must be a Tensor; got {_lists.value_name(outputs)}.")
    _lists.check_floating("loss_hessian", ["outputs"], [outputs])
    return make_loss_hessian("loss_hessian", criterion, outputs, as_targets(targets))


def check_criterion(caller: str, criterion: object) -> None:
    """It is callable, and reduces its terms to one number."""
    if not callable(criterion):
        got = _lists.value_name(criterion)
        raise TypeError(f"{caller}: criterion must be a callable on (outputs, targets); got {got}.")
    reduction = reduction_of(criterion)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{caller}: criterion must have reduction 'mean' or 'sum'; got {reduction!r}.")


def as_targets(targets: Any) -> Targets:
    """The arguments of a criterion after the outputs."""
    return tuple(targets) if isinstance(targets, tuple | list) else (targets,)


def make_loss_hessian(
    caller: str,
    criterion: Callable[..., Tensor],
    outputs: Tensor,
    targets: Targets,
    denominator: Tensor | int | None = None,
) -> LossHessian:
    """The same on checked arguments; ``denominator`` replaces that of a known criterion, for a part of a batch."""
    known = recognize(criterion)
    if known is None or not known.accepts(outputs, targets):
        return _DoubleBackward(caller, criterion, outputs, targets)
    if denominator is None:
        denominator = known.denominator(outputs, targets)
    if isinstance(known, CrossEntropy):
        return _Softmax(known, outputs, targets, denominator)
    assert isinstance(known, Elementwise)
    return DiagonalLossHessian(known.name, outputs, known.second(outputs, targets) / denominator)


class _Softmax(LossHessian):
    """w (diag(p) - p p') for each row of logits."""

    def __init__(self, known: CrossEntropy, outputs: Tensor, targets: Targets, denominator: Tensor | int) -> None:
        super().__init__(known.name, outputs)
        self._rows = known.rows
        self._dim = 0 if outputs.dim() == 1 else 1
        self._row_weight = known.row_weight(outputs, targets, denominator)

    def product(self, u: Tensor) -> Tensor:
        """By the op itself, in place on a copy of ``u``."""
        with torch.no_grad():
            if u.dim() == 2:
                rows = u.clone(memory_format=torch.contiguous_format)
                _functions.softmax_hessian_(rows, self.outputs, self._row_weight)
                return rows
            rows = u.movedim(self._dim, -1).clone(memory_format=torch.contiguous_format)
            _functions.softmax_hessian_(rows, self._rows(self.outputs), self._row_weight)
            return rows.movedim(-1, self._dim)

    def for_products(self, num_products: int) -> Callable[[Tensor], Tensor]:
        """On the CPU, for few and small rows, by their matrices: the op would take their exponentials each time."""
        logits, classes = self.outputs, self.outputs.shape[-1]
        plain = logits.device.type == "cpu" and logits.dim() == 2 and logits.dtype in (torch.float32, torch.float64)
        small = logits.numel() * classes <= _MAX_BLOCKS and num_products >= _WORTH_BLOCKS
        if not plain or not small:
            return self.product
        with torch.no_grad():
            p = logits.double().softmax(1)
            blocks = -p.unsqueeze(2) * p.unsqueeze(1)
            diagonal = blocks.diagonal(dim1=1, dim2=2)
            diagonal.zero_().sub_(blocks.sum(2))  # p - p^2 without cancellation, as rows sum to zero
            weight = self._row_weight.view(-1, 1, 1)
            # A row of no weight may hold anything, and counts for nothing.
            blocks = (weight * blocks).masked_fill_(weight == 0, 0.0).to(logits.dtype)
            counts = (self._row_weight != 0).unsqueeze(1).expand_as(logits).to(logits.dtype)
        kept = torch.ops.aten.threshold_backward.default
        return lambda u: torch.bmm(blocks, kept(u, counts, 0).unsqueeze(2)).squeeze(2)

    def _product(self, u: Tensor) -> Tensor:
        rows = _functions.softmax_hessian(self._rows(self.outputs), u.movedim(self._dim, -1), self._row_weight)
        return rows.movedim(-1, self._dim)

    def scaled(self, scale: float | Tensor) -> LossHessian:
        """With scaled row weights."""
        result = copy.copy(self)
        result._row_weight = (self._row_weight * scale).to(self._row_weight.dtype)
        return result

    def products(self, u: Tensor) -> Tensor:
        with torch.no_grad():
            rows = u.movedim(self._dim + 1, -1)
            logits = self._rows(self.outputs).expand(rows.shape)
            weight = self._row_weight.expand(rows.shape[:-1])
            return _functions.softmax_hessian(logits, rows, weight).movedim(-1, self._dim + 1)

    def factor(self) -> tuple[Tensor, Tensor]:
        """From diag(p) - p p' = (diag(q) - p q')(diag(q) - p q')', q the square root of p."""
        with torch.no_grad():
            logits = self._rows(self.outputs)
            p = logits.to(self._row_weight.dtype).softmax(-1)
            count, classes = self._row_weight.numel(), p.shape[-1]
            p = p.reshape(count, classes)
            root = p.sqrt()
            blocks = torch.diag_embed(root) - root.unsqueeze(2) * p.unsqueeze(1)  # [row, column of the factor, class]
            full = p.new_zeros(count, classes, count, classes)
            index = torch.arange(count, device=p.device)
            full[index, :, index, :] = blocks
            shape = (count * classes, *logits.shape)
            factor = full.view(shape).movedim(-1, self._dim + 1).to(self.outputs.dtype)
            return factor, self._row_weight.reshape(-1).repeat_interleave(classes)

    def example_rank(self, batch: int) -> int | None:
        """The outputs of one example."""
        return None if self.outputs.dim() == 1 else self.outputs.numel() // batch

    def example_factor(self, batch: int) -> tuple[Tensor, Tensor]:
        """The factors of :meth:`factor`, class by class for each row of logits of an example."""
        with torch.no_grad():
            logits = self._rows(self.outputs)
            classes = logits.shape[-1]
            p = logits.to(self._row_weight.dtype).softmax(-1).reshape(batch, -1, classes)  # [B, rows of an example, C]
            own = p.shape[1]
            root = p.sqrt()
            blocks = torch.diag_embed(root) - root.unsqueeze(3) * p.unsqueeze(2)  # [B, rows, row of the factor, class]
            full = blocks.movedim(2, 0)
            if own > 1:  # each row of logits in tensors of its own
                place = torch.eye(own, dtype=p.dtype, device=p.device).view(own, 1, 1, own, 1)
                full = place * full.unsqueeze(0)
            factor = full.reshape(-1, *logits.shape).movedim(-1, self._dim + 1).to(self.outputs.dtype)
            weight = self._row_weight.reshape(batch, own).T.unsqueeze(1).expand(own, classes, batch)
            return factor, weight.reshape(-1, batch)


class DiagonalLossHessian(LossHessian):
    """A number for each output."""

    def __init__(self, name: str, outputs: Tensor, entries: Tensor) -> None:
        super().__init__(name, outputs)
        self._entries = entries.to(outputs.dtype)

    def _product(self, u: Tensor) -> Tensor:
        return self._entries * u

    def scaled(self, scale: float | Tensor) -> LossHessian:
        """With scaled entries."""
        return DiagonalLossHessian(self.name, self.outputs, self._entries * scale)

    def products(self, u: Tensor) -> Tensor:
        """The entries times each of k tensors."""
        with torch.no_grad():
            return self._entries * u

    def factor(self) -> tuple[Tensor, Tensor]:
        """The unit vectors, and the entries."""
        size = self.outputs.numel()
        units = torch.eye(size, dtype=self.outputs.dtype, device=self.outputs.device)
        return units.view(size, *self.outputs.shape), self._entries.detach().reshape(-1)

    def example_rank(self, batch: int) -> int | None:
        """The outputs of one example."""
        return self.outputs.numel() // batch

    def example_factor(self, batch: int) -> tuple[Tensor, Tensor]:
        """The unit vectors of one example, for all of them at once, and the entries."""
        size = self.outputs.numel() // batch
        units = torch.eye(size, dtype=self.outputs.dtype, device=self.outputs.device)
        factor = units.unsqueeze(1).expand(size, batch, size).reshape(size, *self.outputs.shape)
        return factor, self._entries.detach().reshape(batch, size).T


class OuterProducts(LossHessian):
    """The sum over terms of weight * s s', with s the gradient of a term in the outputs, no two of them overlapping.

    ``gradient`` holds all s side by side, like the outputs; ``dims`` are the dimensions that one term reaches over, and
    ``weight`` is a number, 0-dim.
    """

    def __init__(self, outputs: Tensor, gradient: Tensor, dims: tuple[int, ...], weight: Tensor) -> None:
        super().__init__("empirical_fisher", outputs)
        self._gradient = gradient
        self._weighted = (weight * gradient.to(weight.dtype)).to(gradient.dtype)
        self._weight = weight
        self._dims = dims

    def _product(self, u: Tensor) -> Tensor:
        dots = self._gradient * u
        if self._dims:
            dots = dots.sum([d - self._gradient.dim() for d in self._dims], keepdim=True)
        return self._weighted * dots

    def scaled(self, scale: float | Tensor) -> LossHessian:
        """With a scaled weight."""
        return OuterProducts(self.outputs, self._gradient, self._dims, self._weight * scale)

    def products(self, u: Tensor) -> Tensor:
        """Each of k tensors times the same."""
        return self.product(u)

    def factor(self) -> tuple[Tensor, Tensor]:
        """The gradients of the terms, one by one, and the weight."""
        with torch.no_grad():
            terms = [size for d, size in enumerate(self._gradient.shape) if d not in self._dims]
            count = math.prod(terms)
            units = torch.eye(count, dtype=self._gradient.dtype, device=self._gradient.device)
            kept = [1 if d in self._dims else size for d, size in enumerate(self._gradient.shape)]
            return units.view(count, *kept) * self._gradient, self._weight.expand(count)

    def _terms_of_example(self, batch: int) -> list[int]:
        """How many terms an example has in each dimension of the outputs, 1 where a term reaches over all of it."""
        sizes = [1 if d in self._dims else size for d, size in enumerate(self._gradient.shape)]
        return [sizes[0] // batch, *sizes[1:]]

    def example_rank(self, batch: int) -> int | None:
        """The terms of one example."""
        return None if 0 in self._dims or not self._gradient.dim() else math.prod(self._terms_of_example(batch))

    def example_factor(self, batch: int) -> tuple[Tensor, Tensor]:
        """The gradients of one term of each example, and the weight."""
        with torch.no_grad():
            own = self._terms_of_example(batch)
            count = math.prod(own)
            weight = self._weight.expand(count, batch)
            if count == 1:
                return self._gradient.unsqueeze(0), weight
            units = torch.eye(count, dtype=self._gradient.dtype, device=self._gradient.device)
            gradient = self._gradient.reshape(batch, -1, *self._gradient.shape[1:])
            return (units.view(count, 1, *own) * gradient).reshape(count, *self._gradient.shape), weight


class _DoubleBackward(LossHessian):
    """The derivative of the gradient of any criterion."""

    def __init__(self, caller: str, criterion: Callable[..., Tensor], outputs: Tensor, targets: Targets) -> None:
        super().__init__("double_backward", outputs)
        self._caller = caller
        # A view of its own cuts off what else the loss may depend on, but not the outputs' own graph.
        self._outputs = outputs.view_as(outputs) if outputs.requires_grad else outputs.detach().requires_grad_()
        with named_faults(caller, "criterion"):
            loss = observe(lambda: criterion(self._outputs, *targets)).value
        check_scalar(caller, "criterion", loss)
        self._gradient = gradient_in_outputs(caller, "criterion", loss, self._outputs)

    def _product(self, u: Tensor) -> Tensor:
        return hessian_product(self._caller, "criterion", self._gradient, self._outputs, u)

    def products(self, u: Tensor) -> Tensor:
        if not self._gradient.requires_grad:
            return torch.zeros_like(u)
        with named_faults(self._caller, "criterion"):
            return vjps([self._gradient], [self._outputs], [u])[0]

    def factor(self) -> tuple[Tensor, Tensor] | None:
        size = self.outputs.numel()
        if size > _MAX_DENSE_ROWS:
            return None
        units = torch.eye(size, dtype=self.outputs.dtype, device=self.outputs.device)
        dense = self.products(units.view(size, *self.outputs.shape)).reshape(size, size)
        wide = dense.to(_lists.scalar_dtype(dense.device))
        values, vectors = torch.linalg.eigh((wide + wide.T) / 2)
        return vectors.T.to(dense.dtype).reshape(size, *self.outputs.shape), values.to(dense.dtype)


class ScaledLossHessian(LossHessian):
    """The Hessian of a part of a loss, which counts ``scale`` times."""

    def __init__(self, hessian: LossHessian, scale: float | Tensor) -> None:
        super().__init__(hessian.name, hessian.outputs)
        self._hessian = hessian
        self._scale = scale

    def _product(self, u: Tensor) -> Tensor:
        return (self._scale * self._hessian._product(u)).to(u.dtype)

    def products(self, u: Tensor) -> Tensor:
        """The part's, scaled."""
        return (self._scale * self._hessian.products(u)).to(u.dtype)

    def factor(self) -> tuple[Tensor, Tensor] | None:
        """The part's, with scaled weights."""
        found = self._hessian.factor()
        return None if found is None else (found[0], self._scale * found[1])

    def example_rank(self, batch: int) -> int | None:
        """As for all of the loss."""
        return self._hessian.example_rank(batch)

    def example_factor(self, batch: int) -> tuple[Tensor, Tensor]:
        """The part's, with scaled weights."""
        factor, weights = self._hessian.example_factor(batch)
        return factor, self._scale * weights


def gradient_in_outputs(caller: str, name: str, loss: Tensor, outputs: Tensor) -> Tensor:
    """The gradient of ``loss`` in ``outputs`` with its graph."""
    with torch.enable_grad(), named_faults(caller, name):
        # A seed that requires grad makes every once_differentiable function leave its error node in the graph.
        seed = torch.ones_like(loss, requires_grad=True)
        (gradient,) = torch.autograd.grad(loss, outputs, seed, create_graph=True, allow_unused=True)
        if gradient is None:
            raise ValueError(
                f"{caller}: {name} must be computed from outputs; got a loss that does not depend on that tensor."
            )
        _refuse_error_nodes([gradient])
    return gradient


def hessian_product(caller: str, name: str, gradient: Tensor, outputs: Tensor, u: Tensor) -> Tensor:
    """The derivative of the gradient times ``u``, with a graph where grad mode is on; zeros for a linear loss."""
    found = None
    if gradient.requires_grad:
        with named_faults(caller, name):
            (found,) = torch.autograd.grad(
                gradient, outputs, u, retain_graph=True, create_graph=torch.is_grad_enabled(), allow_unused=True
            )
    return torch.zeros_like(outputs, requires_grad=False) if found is None else found
