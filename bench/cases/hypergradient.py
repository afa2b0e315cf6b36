"""Cases of hypergradient: a whole step with K products, against plain autograd, TorchOpt and curvlinops.

A step is the graph of the outer loss and its gradient, the gradient of the inner loss with its graph, K Hessian
products of a Neumann series, and the mixed product. The hyperparameters are a decay of its own for each weight.
"""

import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nestopt_ext.hypergrad import hypergradient
from nestopt_ext.solvers import Neumann

from .. import registry
from ..registry import BASELINE, OURS, Case, Contestant, Field, Goal, Setting
from . import _inputs

NUM_TERMS = (1, 5, 20, 100)
ALPHA = 0.01
LOG_DECAY = 2.0  # with less the curvature of the CNN is indefinite
# A series of 100 terms in float32 rounds several times per term; entries are compared in units of the largest one.
TOLERANCE = 100.0

Params = Sequence[Tensor]
Model = Callable[[Params, Tensor], Tensor]


# ---- problems -------------------------------------------------------------------------------------------------------


def _dense(params: Params, x: Tensor) -> Tensor:
    *hidden, last = zip(params[::2], params[1::2], strict=True)
    for weight, bias in hidden:
        x = torch.tanh(F.linear(x, weight, bias))
    return F.linear(x, *last)


def _dense_shapes(sizes: Sequence[int]) -> Iterator[_inputs.Shape]:
    for fan_in, fan_out in itertools.pairwise(sizes):
        yield from ((fan_out, fan_in), (fan_out,))


def _cnn(params: Params, x: Tensor) -> Tensor:
    for weight, bias in zip(params[:-2:2], params[1:-2:2], strict=True):
        x = torch.tanh(F.conv2d(x, weight, bias, stride=2, padding=1))
    return F.linear(x.flatten(1), *params[-2:])


class Problem:
    """Weights, their log-decays, and one batch each for the inner and the outer loss."""

    def __init__(
        self,
        setting: Setting,
        model: Model,
        shapes: Sequence[_inputs.Shape],
        input_shape: _inputs.Shape,
        num_terms: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._again = functools.partial(Problem, setting, model, shapes, input_shape, num_terms)
        self.model = model
        self.num_terms = num_terms
        batch, size = input_shape[0], torch.Size(input_shape[1:]).numel()
        weights = _inputs.normal(shapes, setting, 0)
        self.params = [(0.5 * w / torch.Size(w.shape[1:]).numel() ** 0.5).to(dtype).requires_grad_() for w in weights]
        self.hparams = [torch.full_like(p, LOG_DECAY).requires_grad_() for p in self.params]
        inputs = _inputs.normal([input_shape] * 2, setting, 1)
        self.inner_x, self.outer_x = ((x / size**0.5).to(dtype) for x in inputs)
        generator = torch.Generator(setting.device).manual_seed(2)
        classes = shapes[-1][0]
        self.inner_y, self.outer_y = torch.randint(
            classes, (2, batch), device=setting.device, generator=generator
        ).unbind()

    def inner(self, params: Params, hparams: Params) -> Tensor:
        return self.inner_on(self.inner_x, self.inner_y, params, hparams)

    def outer(self, params: Params) -> Tensor:
        return self.outer_on(self.outer_x, self.outer_y, params)

    def inner_on(self, x: Tensor, y: Tensor, params: Params, hparams: Params) -> Tensor:
        decay = sum([(h.exp() * p.square()).sum() for h, p in zip(hparams, params, strict=True)])
        return F.cross_entropy(self.model(params, x), y) + decay

    def outer_on(self, x: Tensor, y: Tensor, params: Params) -> Tensor:
        return F.cross_entropy(self.model(params, x), y)

    @functools.cached_property
    def exact(self) -> list[Tensor]:
        """The hypergradient of the same series in float64."""
        return [g.detach() for g in by_autograd(self._again(torch.float64))]

    def contestant(self, name: str, role: str, step: Callable[["Problem"], Sequence[Tensor]]) -> Contestant:
        found: list[Tensor] = []

        def run() -> None:
            found[:] = step(self)

        def in_units(tensors: Sequence[Tensor]) -> list[Tensor]:
            return [t / t64.abs().max() for t, t64 in zip(tensors, self.exact, strict=True)]

        return Contestant(name, role, run, 0, lambda: in_units(found), lambda _: in_units(self.exact), TOLERANCE)


# ---- contestants ----------------------------------------------------------------------------------------------------


def by_hypergradient(problem: Problem) -> Sequence[Tensor]:
    params, hparams = problem.params, problem.hparams
    solver = Neumann(num_terms=problem.num_terms, alpha=ALPHA)
    return hypergradient(problem.outer(params), problem.inner(params, hparams), params, hparams, solver=solver)


def _ours_closures(problem: Problem) -> Sequence[Tensor]:
    params, hparams = problem.params, problem.hparams
    return hypergradient(
        lambda: problem.outer(params),
        lambda: problem.inner(params, hparams),
        params,
        hparams,
        solver=Neumann(num_terms=problem.num_terms, alpha=ALPHA),
    )


def by_autograd(problem: Problem) -> Sequence[Tensor]:
    """What one writes by hand: the graph kept for all products, the series in place, two calls a term."""
    params, hparams = problem.params, problem.hparams
    v = list(torch.autograd.grad(problem.outer(params), params))
    grads = torch.autograd.grad(problem.inner(params, hparams), params, create_graph=True)
    total = [t.clone() for t in v]
    for _ in range(problem.num_terms):
        product = torch.autograd.grad(grads, params, v, retain_graph=True)
        torch._foreach_add_(v, product, alpha=-ALPHA)
        torch._foreach_add_(total, v)
    torch._foreach_mul_(total, -ALPHA)
    return torch.autograd.grad(grads, hparams, total)


def _torchopt(problem: Problem) -> Callable[[Problem], Sequence[Tensor]]:
    torchopt: Any = importlib.import_module("torchopt")
    solve = torchopt.linear_solve.solve_inv(ns=True, maxiter=problem.num_terms, alpha=ALPHA)
    optimality: Any = torch.func.grad(problem.inner)

    # It asks for the names of the arguments, hence named functions.
    def stationary(params: Params, hparams: Params) -> Params:
        found: Params = optimality(params, hparams)
        return found

    def inner_solution(params: Params, hparams: Params) -> Params:
        return params

    solution = torchopt.diff.implicit.custom_root(stationary, argnums=1, solve=solve)(inner_solution)

    def step(problem: Problem) -> Sequence[Tensor]:
        best = solution(tuple(problem.params), tuple(problem.hparams))
        return torch.autograd.grad(problem.outer(best), problem.hparams)

    return step


class _Objective(torch.nn.Module):
    """The inner loss as a model: what curvlinops differentiates is then the same function, the decay included."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList([torch.nn.Parameter(p.detach().clone()) for p in problem.params])
        self._problem = problem

    def forward(self, x: Tensor) -> Tensor:
        return self._problem.inner(list(self.weights), self._problem.hparams).reshape(1)


class _Value(torch.nn.Module):
    """A loss that is its input; ``reduction`` is what curvlinops asks every loss for."""

    reduction = "sum"

    def forward(self, value: Tensor, target: Tensor) -> Tensor:
        return value.sum()


def _curvlinops(problem: Problem) -> Callable[[Problem], Sequence[Tensor]]:
    curvlinops: Any = importlib.import_module("curvlinops")
    objective, loss = _Objective(problem), _Value()
    weights = list(objective.weights)
    data = [(problem.inner_x[:1], problem.inner_x[:1])]

    def step(problem: Problem) -> Sequence[Tensor]:
        hparams = problem.hparams
        v = list(torch.autograd.grad(problem.outer(weights), weights))
        hessian = curvlinops.HessianLinearOperator(
            objective, loss, weights, data, check_deterministic=False, num_data=1
        )
        inverse = curvlinops.NeumannInverseLinearOperator(
            hessian, num_terms=problem.num_terms, scale=ALPHA, check_nan=False
        )
        solved = inverse @ v
        grads = torch.autograd.grad(problem.inner(weights, hparams), weights, create_graph=True)
        return torch.autograd.grad(grads, hparams, torch._foreach_neg(solved))

    return step


# ---- cases ----------------------------------------------------------------------------------------------------------

_PEERS = {"TorchOpt": ("torchopt", _torchopt), "curvlinops": ("curvlinops", _curvlinops)}


def _build(make: Callable[[Setting, int], Problem], num_terms: int, setting: Setting) -> Field:
    problem = make(setting, min(num_terms, 20) if setting.quick else num_terms)
    contestants = [
        problem.contestant("hypergradient", OURS, by_hypergradient),
        problem.contestant("hypergradient, closures", BASELINE, _ours_closures),
        problem.contestant("autograd + _foreach", BASELINE, by_autograd),
    ]
    left_out = {}
    for name, (module, peer) in _PEERS.items():
        if importlib.util.find_spec(module) is None:
            left_out[name] = f"{module} is not installed"
        else:
            contestants.append(problem.contestant(name, BASELINE, peer(problem)))
    params = problem.params
    return Field(contestants, len(params), sum(p.numel() for p in params), _inputs.num_bytes(params), left_out)


def dense_problem(*sizes: int) -> Callable[[Setting, int], Problem]:
    def make(setting: Setting, num_terms: int) -> Problem:
        return Problem(setting, _dense, list(_dense_shapes(sizes)), (64, sizes[0]), num_terms)

    return make


def cnn_problem(setting: Setting, num_terms: int) -> Problem:
    channels = (3, 4, 8) if setting.quick else (3, 16, 32, 32)
    shapes: list[_inputs.Shape] = []
    for fan_in, fan_out in itertools.pairwise(channels):
        shapes += [(fan_out, fan_in, 3, 3), (fan_out,)]
    width = 32 >> (len(channels) - 1)
    shapes += [(10, channels[-1] * width * width), (10,)]
    return Problem(setting, _cnn, shapes, (8 if setting.quick else 32, 3, 32, 32), num_terms)


_PROBLEMS: dict[str, tuple[str, Callable[[Setting, int], Problem]]] = {
    "logistic": ("logistic regression, 784-10", dense_problem(784, 10)),
    "mlp": ("an MLP 64-64-10", dense_problem(64, 64, 10)),
    "deep-mlp": ("an MLP of 7 layers of 16", dense_problem(20, 16, 16, 16, 16, 16, 16, 10)),
    "cnn": ("three convolutions on 32x32 images", cnn_problem),
}
_NOT_SLOWER = Goal("autograd + _foreach", 1.0, "never slower than plain autograd")

for _problem, (_summary, _make) in _PROBLEMS.items():
    for _num_terms in NUM_TERMS:
        _goals = [_NOT_SLOWER]
        if _problem == "mlp" and _num_terms == 20:
            _goals += [Goal(peer, 0.5, "2x faster than each peer") for peer in _PEERS]
        registry.add(
            Case(
                f"hypergradient/{_problem}-K{_num_terms}",
                f"a hypergradient step with {_num_terms} products, {_summary}",
                functools.partial(_build, _make, _num_terms),
                tuple(_goals),
            )
        )
