"""What a hypergradient will take in memory and in products, before it is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from .. import _lists, _reference
from .._operator import LinearOperator
from .._types import Loss, MatVec, TensorList, Tensors
from ..curvature import CurvatureOperator
from ..curvature._evaluation import evaluate, preserved_rng
from ..curvature._gradient import Gradient
from ..solvers import ConjugateGradient, Exact, FixedPoint, Identity, Neumann, Nystrom, Solver, Woodbury
from ..solvers._power import POWER_PRODUCTS
from ..solvers._solve import check_solver
from ._problem import Variables

_CALLER = "estimate_cost"

#: The memory of a backward pass through a graph, beside the graph and relative to it; measured on MLPs and CNNs.
_PASS = 1.25


@dataclass(frozen=True)
class _Work:
    """What a solver takes: products with the curvature, lists like params held at once, and other bytes."""

    products: int
    vectors: int
    other_bytes: int = 0
    at_most: bool = False


def _neumann(solver: Neumann, size: int, known: bool) -> _Work:
    power = 0 if known or not isinstance(solver.alpha, str) else POWER_PRODUCTS
    preconditioned = getattr(solver, "preconditioner", None) is not None
    # The right-hand side, the term, the sum, and what a product returns.
    return _Work(solver.num_terms + power, 5 if preconditioned else 4, at_most=getattr(solver, "rtol", 0.0) > 0)


def _conjugate_gradient(solver: ConjugateGradient, size: int, known: bool) -> _Work:
    # The right-hand side, the iterate, the residual, the direction, and what a product returns.
    return _Work(solver.max_iters, 5 if solver.preconditioner is None else 6, at_most=True)


def _fixed_point(solver: FixedPoint, size: int, known: bool) -> _Work:
    return _Work(solver.max_iters - 1, 5, at_most=True)


def _exact(solver: Exact, size: int, known: bool) -> _Work:
    return _Work(size, 3, 2 * 8 * size * size, at_most=True)  # the matrix and its factors


def _nystrom(solver: Nystrom, size: int, known: bool) -> _Work:
    rank = min(solver.rank, size)
    return _Work(rank, 3, 4 * 8 * rank * size)


#: For each solver, what it takes for params of so many elements, and whether the largest eigenvalue is known for free.
_WORK: dict[type, Callable[[Any, int, bool], _Work]] = {
    Neumann: _neumann,
    Identity: lambda solver, size, known: _Work(0, 3),
    ConjugateGradient: _conjugate_gradient,
    FixedPoint: _fixed_point,
    Exact: _exact,
    Nystrom: _nystrom,
    Woodbury: lambda solver, size, known: _Work(0, 3),
}


@dataclass(frozen=True)
class Cost:
    """What :func:`estimate_cost` returns; None is what is not known of a solver.

    The fields ending in ``bytes`` are bytes. ``at_most`` says that the solver may end after fewer products.
    """

    solver: str
    num_params: int
    num_hparams: int
    num_products: int | None
    at_most: bool
    #: Lists like params that the solver holds at once, and all their memory with the matrices of the solver.
    num_vectors: int | None
    vector_bytes: int | None
    #: The graph of the inner gradient: what autograd saved for it, without params and data.
    graph_bytes: int
    outer_graph_bytes: int
    peak_bytes: int | None
    #: 2 + 2 num_products + 2, in units of one gradient of the inner loss.
    gradient_evaluations: int | None
    #: What differentiating through as many unrolled steps would hold: num_products graphs and params.
    unrolled_bytes: int | None

    def __str__(self) -> str:
        products = "unknown" if self.num_products is None else f"{'at most ' * self.at_most}{self.num_products}"
        time = "unknown"
        if self.gradient_evaluations is not None:
            time = f"{self.gradient_evaluations} gradient evaluations = 2 + 2 * {self.num_products} + 2"
        rows = [
            ("solver", self.solver),
            ("elements", f"{self.num_params} of params, {self.num_hparams} of hparams"),
            ("products", products),
            ("time", time),
            ("graph of the inner gradient", _size(self.graph_bytes)),
            (
                "vectors of the solver",
                f"{_size(self.vector_bytes)} ({'?' if self.num_vectors is None else self.num_vectors} like params)",
            ),
            ("peak", _size(self.peak_bytes)),
            ("unrolled, as many steps", _size(self.unrolled_bytes)),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def estimate_cost(
    outer_loss: Loss,
    inner_loss: Loss,
    params: Tensors,
    hparams: Tensors,
    *,
    solver: Solver = Neumann(),  # noqa: B008  a frozen value
    curvature: MatVec | None = None,
) -> Cost:
    r"""Estimate the memory and the number of products that :func:`hypergradient` takes for these arguments.

    Each loss, a zero-argument closure, is evaluated once and differentiated once; what autograd saves in that is added
    up, each memory once, params, hparams and data left out. No product is spent. With g these bytes for the gradient of
    ``inner_loss``, o those for ``outer_loss``, P those of params and s those the solver holds,

    .. math:: \text{peak} = \max\bigl(2 o + P,\; 2.25 g + P + s + P\bigr) + 2 H

    beside what is there already: a pass backward through a graph takes about 1.25 of it (measured; it depends on the
    model, so see the estimate as good to a third), and H is the size of the hparams. The time is 2 + 2 K + 2 gradients
    for K products: those of the two losses, the second one with a graph, two for a product, and two for the mixed one.

    ``solver`` and ``curvature`` are as in :func:`hypergradient`; of a curvature of one's own a product counts as one,
    whatever it does, and its own memory does not. A series that an operator sums
    in the span of its examples takes none; its memory, and that of one in the space of the outputs, is as its
    ``plan()`` says.

    Returns a :class:`Cost`; ``print`` it to read it. For a solver that is not one of this package, products, vectors
    and what follows from them are None. Nothing is modified, as with :func:`hypergradient`. Raises TypeError or
    ValueError for bad arguments, a loss that is a tensor among them: its graph is there already and cannot be seen.

    >>> import torch
    >>> w = torch.ones(1000, requires_grad=True)
    >>> h = torch.tensor(1.0, requires_grad=True)
    >>> cost = estimate_cost(lambda: w.sum(), lambda: (w**3).sum() * h, w, h, solver=Neumann(10))
    >>> cost.num_products, cost.gradient_evaluations, cost.vector_bytes               # 10 terms, and 5 for alpha
    (15, 34, 16000)
    """
    for name, loss in (("outer_loss", outer_loss), ("inner_loss", inner_loss)):
        if isinstance(loss, Tensor) or not callable(loss):
            raise TypeError(
                f"{_CALLER}: {name} must be a zero-argument closure, to see its graph being built; got"
                f" {_lists.value_name(loss)}. Wrap its computation in a function."
            )
    variables = Variables(_CALLER, params, hparams, all_hparams=True)
    check_solver(_CALLER, solver)
    if curvature is not None and not callable(curvature):
        raise TypeError(
            f"{_CALLER}: curvature must be None or a callable on tensors like params;"
            f" got {_lists.value_name(curvature)}."
        )
    own = [*variables.params, *variables.hparams]
    with preserved_rng():
        with _saved_bytes(own) as outer:
            outer_loss_graph = evaluate(_CALLER, "outer_loss", outer_loss)
        del outer_loss_graph
        with _saved_bytes(own) as inner:
            gradient = Gradient(_CALLER, "inner_loss", inner_loss, variables.params)
        del gradient
    return _cost(solver, curvature, variables, graph=sum(inner.values()), outer_graph=sum(outer.values()))


def _cost(solver: Solver, curvature: MatVec | None, variables: Variables, *, graph: int, outer_graph: int) -> Cost:
    size = _lists.numel(variables.params)
    held = _bytes(variables.params)
    vector = sum(t.numel() * _reference.opmath(t.dtype).itemsize for t in variables.params)
    work = _work(solver, size, curvature)
    vectors = peak = unrolled = time = None
    if work is not None:
        vectors = work.vectors * vector + work.other_bytes
        passes = 2 * outer_graph + held, int((1 + _PASS) * graph) + held + vectors + held
        peak = max(passes) + 2 * _bytes(variables.hparams)
        unrolled = work.products * (graph + held)
        time = 2 + 2 * work.products + 2
    return Cost(
        solver=type(solver).__name__,
        num_params=size,
        num_hparams=_lists.numel(variables.hparams),
        num_products=None if work is None else work.products,
        at_most=work is not None and work.at_most,
        num_vectors=None if work is None else work.vectors,
        vector_bytes=vectors,
        graph_bytes=graph,
        outer_graph_bytes=outer_graph,
        peak_bytes=peak,
        gradient_evaluations=time,
        unrolled_bytes=unrolled,
    )


def _work(solver: Solver, size: int, curvature: MatVec | None) -> _Work | None:
    count = _WORK.get(type(solver))
    known = isinstance(curvature, LinearOperator) and curvature.largest_eigenvalue() is not None
    work = None if count is None else count(solver, size, known)
    if work is not None and isinstance(solver, Neumann) and isinstance(curvature, CurvatureOperator):
        plan = curvature.plan(solver.num_terms)
        if solver.preconditioner is not None:
            return work
        if plan.route == "dual":  # the right-hand side, the sum, and a multiple of the former
            return _Work(work.products - solver.num_terms, 3, plan.dual_memory or 0)
        if plan.route == "outputs":  # the right-hand side and the sum
            return _Work(work.products, 2, plan.outputs_memory or 0)
    return work


@contextmanager
def _saved_bytes(own: TensorList) -> Iterator[dict[int, int]]:
    """The bytes of each new memory that autograd saves meanwhile, by its address."""
    sizes: dict[int, int] = {}
    taken = {t.untyped_storage().data_ptr() for t in own}
    made = _NewMemory()

    def pack(t: Tensor) -> Tensor:
        if t.layout == torch.strided:
            storage = t.untyped_storage()
            if storage.data_ptr() not in taken and storage._cdata in made.new:
                sizes[storage.data_ptr()] = storage.nbytes()
        return t.detach()

    with saved_tensors_hooks(pack, lambda t: t), made:
        yield sizes


class _NewMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Knows the storages that turned up as results first: what a loss computes, and not the data it is given."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.new: set[int] = set()
        self._old: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._old |= {s for s in _storages((args, list(kwargs.values()))) if s not in self.new}
        result = func(*args, **kwargs)
        self.new |= {s for s in _storages((result,)) if s not in self._old}
        return result


def _storages(values: Any) -> Iterator[int]:
    for value in values:
        if isinstance(value, Tensor):
            if value.layout == torch.strided:
                yield value.untyped_storage()._cdata
        elif isinstance(value, list | tuple):
            yield from _storages(value)


def _bytes(tensors: TensorList) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _size(number: int | None) -> str:
    if number is None:
        return "unknown"
    value, unit = float(number), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.4g} {unit}"
