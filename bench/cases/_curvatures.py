"""Gauss-Newton and empirical Fisher matrices of a problem: ours, by hand, and by peers; products and Neumann sums."""

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nestopt_ext.curvature import EmpiricalFisher, GaussNewton, linearize
from nestopt_ext.solvers import neumann_ihvp

from ._problems import Params, Problem

GAUSS_NEWTON, EMPIRICAL_FISHER, HESSIAN, ZERO = "gauss_newton", "empirical_fisher", "hessian", "zero"
OURS: dict[str, type[GaussNewton] | type[EmpiricalFisher]] = {
    GAUSS_NEWTON: GaussNewton,
    EMPIRICAL_FISHER: EmpiricalFisher,
}
#: How our operators may be told to sum a series, besides choosing for themselves.
ROUTES = ("loop", "outputs", "dual")
MAX_ROW_BYTES = 2 << 30  # of one gradient for each row, for those who form them

Product = Callable[[Params], Sequence[Tensor]]
Solve = Callable[[Problem, Params, int, float], Sequence[Tensor]]


@dataclass(frozen=True)
class Way:
    """How to multiply with a matrix of a problem: ``make`` prepares what any number of products share."""

    name: str
    make: Callable[[Problem], Product]
    solve: Solve | None = None  # None for the plain loop
    matrix: str | None = None  # what it multiplies with; None for the one that the case is about
    module: str | None = None  # what must be installed
    # Why it cannot be used on a problem for so many products.
    unfit: Callable[[Problem, int], str | None] = lambda problem, num_products: None

    def left_out(self, problem: Problem, num_products: int = 1) -> str | None:
        """Why it does not take part."""
        if self.module is not None and importlib.util.find_spec(self.module) is None:
            return f"{self.module} is not installed"
        return self.unfit(problem, num_products)

    def sum(self, problem: Problem, v: Params, num_terms: int, alpha: float) -> Sequence[Tensor]:
        """alpha sum_j (I - alpha A)^j v over j = 0 .. num_terms; makes what its products share anew."""
        if self.solve is not None:
            return self.solve(problem, v, num_terms, alpha)
        return neumann_sum(self.make(problem), v, num_terms, alpha)


def neumann_sum(product: Product, v: Params, num_terms: int, alpha: float) -> list[Tensor]:
    """The series as one writes it by hand: in place, two ``_foreach`` calls a term."""
    term = [t.detach().clone() for t in v]
    total = [t.clone() for t in term]
    for _ in range(num_terms):
        torch._foreach_add_(term, list(product(term)), alpha=-alpha)
        torch._foreach_add_(total, term)
    torch._foreach_mul_(total, alpha)
    return total


# ---- ours -----------------------------------------------------------------------------------------------------------


def takes_route(kind: str) -> bool:
    """Whether our operator lets its caller choose how a series is summed."""
    return "route" in inspect.signature(OURS[kind]).parameters


def refused(kind: str, problem: Problem, route: str | None) -> str | None:
    """Why our operator cannot be told to take a route; a choice of its own is never refused."""
    if route is None:
        return None
    if not takes_route(kind):
        return f"{OURS[kind].__name__} takes no route in this version"
    try:
        operator(kind, problem, route)
    except ValueError as refusal:
        if "route" in str(refusal):
            return str(refusal)
        raise
    return None


def route_for(kind: str, problem: Problem, num_terms: int) -> str | None:
    """The route that our operator takes of its own for so many terms."""
    if not takes_route(kind):
        return None
    route: str = operator(kind, problem).plan(num_terms).route
    return route


def operator(kind: str, problem: Problem, route: str | None = None, params: Params | None = None) -> Any:
    """Our operator on the inner batch; ``route`` None leaves the choice to it."""
    chosen: dict[str, Any] = {} if route is None else {"route": route}
    on = problem.params if params is None else params
    return OURS[kind](problem.model, problem.criterion, problem.inner_x, problem.inner_y, list(on), **chosen)


def ours(kind: str, route: str | None = None) -> Way:
    def solve(problem: Problem, v: Params, num_terms: int, alpha: float) -> Sequence[Tensor]:
        return neumann_ihvp(operator(kind, problem, route), list(v), num_terms=num_terms, alpha=alpha)

    name = OURS[kind].__name__ + ("" if route is None else f", {route}")

    def unfit(problem: Problem, num_products: int) -> str | None:
        return refused(kind, problem, route)

    return Way(name, lambda problem: operator(kind, problem, route), solve, unfit=unfit)


def linearized(kind: str) -> Way:
    """Our Jacobian, with what lies between J' and J by calls of torch."""

    def make(problem: Problem) -> Product:
        jacobian = linearize(problem.model, problem.inner_x, problem.params)
        middle = loss_matrix(kind, jacobian.outputs, problem.inner_y)

        def product(v: Params) -> Sequence[Tensor]:
            found: Any = jacobian.vjp(middle(jacobian.jvp(list(v))))
            return list(found)

        return product

    return Way("linearize", make)


# ---- by hand --------------------------------------------------------------------------------------------------------


def loss_matrix(kind: str, logits: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """The middle factor for a mean cross-entropy in closed form: diag(p) - p p' or (p - y)(p - y)', over B."""
    p = logits.softmax(-1)
    if kind == GAUSS_NEWTON:
        p_mean = p / len(p)
        return lambda u: p_mean * (u - (p * u).sum(-1, keepdim=True))
    g = p - F.one_hot(y, p.shape[-1])
    g_mean = g / len(p)
    return lambda u: g_mean * (g * u).sum(-1, keepdim=True)


def _jvp_vjp(kind: str) -> Callable[[Problem], Product]:
    """The textbook form, which peers have too: forward mode and reverse mode, each with a forward pass of its own."""

    def make(problem: Problem) -> Product:
        params = tuple(p.detach() for p in problem.params)

        def network(*params: Tensor) -> Tensor:
            return problem.call(params, problem.inner_x)

        def product(v: Params) -> Sequence[Tensor]:
            logits, u = torch.func.jvp(network, params, tuple(v))[:2]
            pulled: Any = torch.func.vjp(network, *params)[1]
            found: Sequence[Tensor] = pulled(loss_matrix(kind, logits, problem.inner_y)(u))
            return found

        return product

    return make


def kept_graph(kind: str) -> Way:
    """Plain autograd at its best: one graph kept for all products, J v by a backward pass through a backward pass."""

    def make(problem: Problem) -> Product:
        logits = problem.model(problem.inner_x)
        dummy = torch.zeros_like(logits, requires_grad=True)
        pulled = torch.autograd.grad(logits, problem.params, dummy, create_graph=True)
        middle = loss_matrix(kind, logits.detach(), problem.inner_y)

        def product(v: Params) -> Sequence[Tensor]:
            (u,) = torch.autograd.grad(pulled, dummy, tuple(v), retain_graph=True)
            return torch.autograd.grad(logits, problem.params, middle(u), retain_graph=True)

        return product

    return Way("autograd, kept graph", make)


def _double_backward(problem: Problem) -> Product:
    """The Hessian of the loss, on the kept graph of the gradient."""
    grads = torch.autograd.grad(problem.inner_loss(), problem.params, create_graph=True)
    return lambda v: torch.autograd.grad(grads, problem.params, tuple(v), retain_graph=True)


def _rows(problem: Problem) -> Product:
    """The gradient of each example formed once, B x P numbers, and two matrix-vector products with them for each."""
    names = [name for name, _ in problem.model.named_parameters()]
    params = dict(zip(names, (p.detach() for p in problem.params), strict=True))

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits = torch.func.functional_call(problem.model, params, (x[None],))
        return F.cross_entropy(logits, y[None])

    grads: Any = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(params, problem.inner_x, problem.inner_y)
    matrices = [grads[name].flatten(1) for name in names]

    def product(v: Params) -> Sequence[Tensor]:
        dots = sum([m @ t.flatten() for m, t in zip(matrices, v, strict=True)]) / len(problem.inner_y)
        return [(dots @ m).view_as(t) for m, t in zip(matrices, v, strict=True)]

    return product


def _row_bytes(problem: Problem) -> int:
    return sum(p.numel() * p.element_size() for p in problem.params) * len(problem.inner_y)


def _too_many_rows(problem: Problem, num_products: int) -> str | None:
    size = _row_bytes(problem)
    return f"its B x P numbers take {size / 1e9:.1f} GB" if size > MAX_ROW_BYTES else None


def _too_many_rows_anew(problem: Problem, num_products: int) -> str | None:
    size = _row_bytes(problem)
    if size * num_products <= 2 * MAX_ROW_BYTES:
        return None
    return f"makes its B x P numbers, {size / 1e9:.1f} GB, anew for each of {num_products} products"


# ---- peers ----------------------------------------------------------------------------------------------------------


def curvlinops_matrix(kind: str, problem: Problem) -> Any:
    """The operator of curvlinops, without its check that the model is deterministic, which costs two passes."""
    curvlinops: Any = importlib.import_module("curvlinops")
    make = {GAUSS_NEWTON: curvlinops.GGNLinearOperator, EMPIRICAL_FISHER: curvlinops.EFLinearOperator}[kind]
    data = [(problem.inner_x, problem.inner_y)]
    return make(
        problem.model, problem.criterion, problem.params, data, check_deterministic=False, num_data=len(problem.inner_y)
    )


def _curvlinops(kind: str) -> Way:
    def make(problem: Problem) -> Product:
        matrix = curvlinops_matrix(kind, problem)
        return lambda v: matrix @ list(v)

    def solve(problem: Problem, v: Params, num_terms: int, alpha: float) -> Sequence[Tensor]:
        curvlinops: Any = importlib.import_module("curvlinops")
        inverse = curvlinops.NeumannInverseLinearOperator(
            curvlinops_matrix(kind, problem), num_terms=num_terms, scale=alpha, check_nan=False
        )
        found: Sequence[Tensor] = inverse @ list(v)
        return found

    return Way("curvlinops", make, solve, module="curvlinops")


def _eigenthings(kind: str) -> Way:
    """hessian-eigenthings, which has products of flat vectors and no series: the loop is by hand, all of it flat."""

    def matrix(problem: Problem) -> Any:
        package: Any = importlib.import_module("hessian_eigenthings")
        losses: Any = importlib.import_module("hessian_eigenthings.loss_fns")
        data = [(problem.inner_x, problem.inner_y)]
        if kind == GAUSS_NEWTON:
            of_output = losses.supervised_loss_of_output(problem.criterion)
            return package.GGNOperator(problem.model, data, losses.supervised_forward, of_output)
        of_example = losses.supervised_per_sample_loss(problem.criterion)
        return package.EmpiricalFisherOperator(problem.model, data, of_example)

    def split(problem: Problem, flat: Tensor) -> Sequence[Tensor]:
        parts = torch.split(flat, [p.numel() for p in problem.params])
        return [t.view_as(p) for t, p in zip(parts, problem.params, strict=True)]

    def joined(v: Params) -> Tensor:
        return torch.cat([t.flatten() for t in v])

    def make(problem: Problem) -> Product:
        found = matrix(problem)
        return lambda v: split(problem, found.matvec(joined(v)))

    def solve(problem: Problem, v: Params, num_terms: int, alpha: float) -> Sequence[Tensor]:
        found = matrix(problem)
        (total,) = neumann_sum(lambda term: [found.matvec(term[0]).detach()], [joined(v)], num_terms, alpha)
        return split(problem, total)

    if kind == GAUSS_NEWTON:
        return Way("hessian-eigenthings", make, solve, module="hessian_eigenthings")
    return Way("hessian-eigenthings", make, solve, module="hessian_eigenthings", unfit=_too_many_rows_anew)


def rivals(kind: str) -> list[Way]:
    """Who multiplies with the same matrix."""
    ways = [Way("jvp + vjp", _jvp_vjp(kind)), kept_graph(kind)]
    if kind == EMPIRICAL_FISHER:
        ways.append(Way("vmap of grad, rows kept", _rows, unfit=_too_many_rows))
    return [*ways, _curvlinops(kind), _eigenthings(kind)]


#: What one pays for a product with the Hessian instead; the same matrix where the network is linear in its params.
DOUBLE_BACKWARD = Way("double backward (Hessian)", _double_backward, matrix=HESSIAN)


# ---- what they are compared with ------------------------------------------------------------------------------------


def reference(kind: str, problem: Problem) -> Product:
    """The product by reverse mode alone, with what lies between J' and J by autograd too; meant for float64."""
    if kind == ZERO:
        return lambda v: [torch.zeros_like(t) for t in v]
    if kind == HESSIAN:
        return _double_backward(problem)
    logits = problem.model(problem.inner_x)
    dummy = torch.zeros_like(logits, requires_grad=True)
    pulled = torch.autograd.grad(logits, problem.params, dummy, create_graph=True)
    leaf = logits.detach().requires_grad_()
    loss: Tensor = problem.criterion(leaf, problem.inner_y)
    gradient: Tensor = torch.autograd.grad(loss, leaf, create_graph=kind == GAUSS_NEWTON)[0]

    def middle(u: Tensor) -> Tensor:
        if kind == GAUSS_NEWTON:
            hu: Tensor = torch.autograd.grad(gradient, leaf, u, retain_graph=True)[0]
            return hu
        return len(gradient) * gradient * (gradient * u).sum(-1, keepdim=True)

    def product(v: Params) -> Sequence[Tensor]:
        (u,) = torch.autograd.grad(pulled, dummy, tuple(v), retain_graph=True)
        return torch.autograd.grad(logits, problem.params, middle(u), retain_graph=True)

    return product


def largest_eigenvalue(product: Product, v: Params, num_products: int = 12) -> float:
    """By power iteration from v, to a few percent."""
    size = 0.0
    for _ in range(num_products):
        v = product([t / torch.stack(torch._foreach_norm(list(v))).norm() for t in v])
        size = torch.stack(torch._foreach_norm(list(v))).norm().item()
    return size
