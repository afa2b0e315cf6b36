"""A weight decay on top of a problem, and whole hypergradient steps in it: by hand and by peers."""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..registry import BASELINE, Contestant
from . import _curvatures
from ._curvatures import GAUSS_NEWTON, HESSIAN, ZERO, Product, neumann_sum
from ._problems import Params, Problem, compared

Step = Callable[["Bilevel"], Params]


class Bilevel:
    """Weights that minimize a cross-entropy with a decay, whose logarithm is the hyperparameter.

    There is a decay for each weight, or, ``shared``, one for all. An inverse is a Neumann sum with ``num_terms``
    products and step ``alpha``.
    """

    def __init__(self, problem: Problem, log_decay: float, num_terms: int, alpha: float, shared: bool = False) -> None:
        self.problem = problem
        self.params = problem.params
        self.log_decay = log_decay
        self.num_terms = num_terms
        self.alpha = alpha
        self.shared = shared
        like = [self.params[0].new_zeros(())] if shared else self.params
        self.hparams = [torch.full_like(t, log_decay).detach().requires_grad_() for t in like]

    @functools.cached_property
    def in_float64(self) -> "Bilevel":
        """The same numbers in float64."""
        return Bilevel(self.problem.in_float64(), self.log_decay, self.num_terms, self.alpha, self.shared)

    def inner(self, params: Params, hparams: Params) -> Tensor:
        return self.inner_on(self.problem.inner_x, self.problem.inner_y, params, hparams)

    def outer(self, params: Params) -> Tensor:
        return self.outer_on(self.problem.outer_x, self.problem.outer_y, params)

    def inner_on(self, x: Tensor, y: Tensor, params: Params, hparams: Params) -> Tensor:
        loss = self.outer_on(x, y, params)
        if self.shared:
            return loss + hparams[0].exp() * sum([p.square().sum() for p in params])
        return loss + sum([(h.exp() * p.square()).sum() for h, p in zip(hparams, params, strict=True)])

    def outer_on(self, x: Tensor, y: Tensor, params: Params) -> Tensor:
        loss: Tensor = self.problem.criterion(self.problem.call(params, x), y)
        return loss

    def decay_curvature(self) -> list[Tensor]:
        """The diagonal of the Hessian of the decay, a list like the params."""
        of = self.hparams * len(self.params) if self.shared else self.hparams
        return [(2 * h.detach().exp()).expand_as(p) for h, p in zip(of, self.params, strict=True)]

    def damped(self, product: Product) -> Product:
        """The product with a matrix of the cross-entropy and the curvature of the decay added."""
        diagonal = self.decay_curvature()

        def both(v: Params) -> Sequence[Tensor]:
            return [av + d * t for av, d, t in zip(product(v), diagonal, v, strict=True)]

        return both

    @functools.lru_cache  # noqa: B019  as long-lived as the case
    def exact(self, kind: str, inverted: bool = False) -> Params:
        """The hypergradient with a matrix and the decay in float64: by the same sum, or ``inverted`` by the inverse."""
        other = self.in_float64
        product = other.damped(_curvatures.reference(kind, other.problem))
        return by_hand(other, product, (lambda v: _conjugate_gradients(product, v)) if inverted else None)

    def contestant(
        self, name: str, role: str, step: Step, kind: str = HESSIAN, *, inverted: bool = False
    ) -> Contestant:
        """A step that solves with a matrix, judged by what it finds more than it would with the decay alone."""
        return compared(
            name, role, lambda: step(self), lambda: self.exact(kind, inverted), lambda: self.exact(ZERO, inverted)
        )


def _conjugate_gradients(product: Product, v: Params, num_steps: int = 200) -> list[Tensor]:
    x = [torch.zeros_like(t) for t in v]
    residual = [t.clone() for t in v]
    direction = list(residual)
    start = size = _dot(residual, residual)
    for _ in range(num_steps):
        if size <= 1e-24 * start:
            break
        image = product(direction)
        length = size / _dot(direction, image)
        x = [a + length * b for a, b in zip(x, direction, strict=True)]
        residual = [a - length * b for a, b in zip(residual, image, strict=True)]
        before, size = size, _dot(residual, residual)
        direction = [a + size / before * b for a, b in zip(residual, direction, strict=True)]
    return x


def _dot(a: Params, b: Params) -> float:
    return sum(torch.dot(s.flatten(), t.flatten()).item() for s, t in zip(a, b, strict=True))


# ---- by hand --------------------------------------------------------------------------------------------------------


def by_hand(
    bilevel: Bilevel, product: Product | None = None, inverse: Callable[[Params], Params] | None = None
) -> Params:
    """What one writes by hand: the graph kept for all products, the series in place, two calls a term.

    ``product`` None stands for the Hessian.
    """
    params, hparams = bilevel.params, bilevel.hparams
    v = torch.autograd.grad(bilevel.outer(params), params)
    grads = torch.autograd.grad(bilevel.inner(params, hparams), params, create_graph=True)

    def hessian(v: Params) -> Sequence[Tensor]:
        return torch.autograd.grad(grads, params, tuple(v), retain_graph=True)

    if inverse is None:
        solved: Params = neumann_sum(product or hessian, v, bilevel.num_terms, bilevel.alpha)
    else:
        solved = inverse(v)
    found = torch.autograd.grad(grads, hparams, torch._foreach_neg(list(solved)))
    return [g.detach() for g in found]


def by_hand_gauss_newton(bilevel: Bilevel) -> Params:
    """The same with the best that autograd can do for the Gauss-Newton matrix."""
    way = _curvatures.kept_graph(GAUSS_NEWTON)
    return by_hand(bilevel, bilevel.damped(way.make(bilevel.problem)))


# ---- peers ----------------------------------------------------------------------------------------------------------


def _torchopt(bilevel: Bilevel) -> Step:
    torchopt: Any = importlib.import_module("torchopt")
    solve = torchopt.linear_solve.solve_inv(ns=True, maxiter=bilevel.num_terms, alpha=bilevel.alpha)
    optimality: Any = torch.func.grad(bilevel.inner)

    # It asks for the names of the arguments, hence named functions.
    def stationary(params: Params, hparams: Params) -> Params:
        found: Params = optimality(params, hparams)
        return found

    def inner_solution(params: Params, hparams: Params) -> Params:
        return params

    solution = torchopt.diff.implicit.custom_root(stationary, argnums=1, solve=solve)(inner_solution)

    def step(bilevel: Bilevel) -> Params:
        best = solution(tuple(bilevel.params), tuple(bilevel.hparams))
        return torch.autograd.grad(bilevel.outer(best), bilevel.hparams)

    return step


class _Objective(torch.nn.Module):
    """The inner loss as a model: what curvlinops differentiates is then the same function, the decay included."""

    def __init__(self, bilevel: Bilevel) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList([torch.nn.Parameter(p.detach().clone()) for p in bilevel.params])
        self._bilevel = bilevel

    def forward(self, x: Tensor) -> Tensor:
        return self._bilevel.inner(list(self.weights), self._bilevel.hparams).reshape(1)


class _Value(torch.nn.Module):
    """A loss that is its input; ``reduction`` is what curvlinops asks every loss for."""

    reduction = "sum"

    def forward(self, value: Tensor, target: Tensor) -> Tensor:
        return value.sum()


def _inverse_by_curvlinops(bilevel: Bilevel, matrix: Any, v: Params) -> Params:
    curvlinops: Any = importlib.import_module("curvlinops")
    inverse = curvlinops.NeumannInverseLinearOperator(
        matrix, num_terms=bilevel.num_terms, scale=bilevel.alpha, check_nan=False
    )
    solved: Params = inverse @ list(v)
    return solved


def _curvlinops(bilevel: Bilevel) -> Step:
    curvlinops: Any = importlib.import_module("curvlinops")
    objective, loss = _Objective(bilevel), _Value()
    weights = list(objective.weights)
    x = bilevel.problem.inner_x
    data = [(x[:1], x[:1])]

    def step(bilevel: Bilevel) -> Params:
        hparams = bilevel.hparams
        v = torch.autograd.grad(bilevel.outer(weights), weights)
        hessian = curvlinops.HessianLinearOperator(
            objective, loss, weights, data, check_deterministic=False, num_data=1
        )
        solved = _inverse_by_curvlinops(bilevel, hessian, v)
        grads = torch.autograd.grad(bilevel.inner(weights, hparams), weights, create_graph=True)
        return torch.autograd.grad(grads, hparams, torch._foreach_neg(list(solved)))

    return step


def _curvlinops_gauss_newton(bilevel: Bilevel) -> Step:
    base: Any = importlib.import_module("curvlinops._torch_base")

    class Decay(base.PyTorchLinearOperator):  # type: ignore[misc]
        """A diagonal matrix; curvlinops has none."""

        SELF_ADJOINT = True

        def __init__(self, diagonal: Sequence[Tensor]) -> None:
            shapes = [tuple(d.shape) for d in diagonal]
            super().__init__(shapes, shapes)
            self._diagonal = [d.unsqueeze(-1) for d in diagonal]

        @property
        def device(self) -> torch.device:
            return self._diagonal[0].device

        @property
        def dtype(self) -> torch.dtype:
            return self._diagonal[0].dtype

        def _matmat(self, columns: list[Tensor]) -> list[Tensor]:
            return [d * c for d, c in zip(self._diagonal, columns, strict=True)]

    def step(bilevel: Bilevel) -> Params:
        def inverse(v: Params) -> Params:
            matrix = _curvatures.curvlinops_matrix(GAUSS_NEWTON, bilevel.problem) + Decay(bilevel.decay_curvature())
            return _inverse_by_curvlinops(bilevel, matrix, v)

        return by_hand(bilevel, inverse=inverse)

    return step


#: Peers that solve with the Hessian, and with the Gauss-Newton matrix: the package, and how its step is made.
HESSIAN_PEERS: dict[str, tuple[str, Callable[[Bilevel], Step]]] = {
    "TorchOpt": ("torchopt", _torchopt),
    "curvlinops": ("curvlinops", _curvlinops),
}
GAUSS_NEWTON_PEERS: dict[str, tuple[str, Callable[[Bilevel], Step]]] = {
    "curvlinops, GGN": ("curvlinops", _curvlinops_gauss_newton),
}


def peers(bilevel: Bilevel, *, gauss_newton: bool = False) -> tuple[list[Contestant], dict[str, str]]:
    """The peers that are installed as contestants, and why the others are left out."""
    found = []
    left_out = {}
    for kind, those in ((HESSIAN, HESSIAN_PEERS), *([(GAUSS_NEWTON, GAUSS_NEWTON_PEERS)] if gauss_newton else [])):
        for name, (module, make) in those.items():
            if importlib.util.find_spec(module) is None:
                left_out[name] = f"{module} is not installed"
            elif bilevel.problem.setting.quick and name == "curvlinops" and len(bilevel.params) > 10:
                left_out[name] = "--quick"  # a second a step, however small the layers are
            else:
                found.append(bilevel.contestant(name, BASELINE, make(bilevel), kind))
    return found, left_out
