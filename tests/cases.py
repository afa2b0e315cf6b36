"""Problems whose Hessian and hypergradient are known in closed form.

Each problem stands at the optimum of its inner loss, so the formula of the implicit function theorem is exact. The
dense Hessian and the hypergradient are written out from the algebra of the problem, without autograd through the inner
loss.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

F64 = torch.float64


@dataclass(frozen=True)
class Problem:
    """An inner and an outer loss, ``loss(params, hparams)``, at the inner optimum."""

    params: Any
    hparams: Any
    inner: Callable[[Any, Any], Tensor]
    outer: Callable[[Any, Any], Tensor]
    hessian: Tensor  # [P, P], params in order
    hypergradient: tuple[Tensor, ...]  # aligned with hparams

    @property
    def alpha(self) -> float:
        return 0.9 / float(torch.linalg.eigvalsh(self.hessian)[-1])

    def losses(self) -> tuple[Tensor, Tensor]:
        return self.outer(self.params, self.hparams), self.inner(self.params, self.hparams)

    def closures(self) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        return lambda: self.outer(self.params, self.hparams), lambda: self.inner(self.params, self.hparams)


def leaf(values: Tensor) -> Tensor:
    return values.detach().clone().requires_grad_()


def values(tensors: Any) -> list[Tensor]:
    """The tensors of any structure as a list."""
    if isinstance(tensors, Tensor):
        return [tensors]
    return list(tensors.values()) if isinstance(tensors, dict) else list(tensors)


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in values(tensors)])


def relative_error(found: Any, wanted: Any) -> float:
    return float((flat(found) - flat(wanted)).norm() / flat(wanted).norm())


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=generator(seed))


def scalar() -> Problem:
    """2 w = 3 h: w* = 1.5 h, outer loss w^2 / 2."""
    h = leaf(torch.tensor(1.0, dtype=F64))
    w = leaf(1.5 * h)
    return Problem(
        w,
        h,
        lambda w, h: w**2 - 3 * h * w,
        lambda w, h: 0.5 * w**2,
        torch.tensor([[2.0]], dtype=F64),
        (torch.tensor(2.25, dtype=F64),),
    )


def spd(seed: int, size: int, kappa: float) -> Tensor:
    """A symmetric matrix with eigenvalues spread evenly in their logarithm over [1/kappa, 1]."""
    basis, _ = torch.linalg.qr(normal(seed, size, size))
    return (basis * torch.logspace(0, -1, size, dtype=F64, base=kappa)) @ basis.T


def quadratic() -> Problem:
    """w' A w / 2 - w' B h inside; |w - c|^2 / 2 + |h|^2 / 2 outside, so there is a direct part."""
    a, b, c = spd(1, 8, 8.5), normal(2, 8, 5), normal(3, 8)
    h = leaf(normal(4, 5))
    w = leaf(torch.linalg.solve(a, b @ h))
    return Problem(
        (w,),
        [h],
        lambda w, h: 0.5 * w[0] @ a @ w[0] - w[0] @ b @ h[0],
        lambda w, h: 0.5 * (w[0] - c).square().sum() + 0.5 * h[0].square().sum(),
        a,
        ((h + b.T @ torch.linalg.solve(a, w - c)).detach(),),
    )


def ridge_data(seed: int, rows: int = 40, columns: int = 12) -> tuple[Tensor, Tensor]:
    x = normal(seed, rows, columns)
    return x, x @ normal(seed + 1, columns) + 0.3 * normal(seed + 2, rows)


def ridge_solution(decay: Tensor) -> Tensor:
    """The exact weights of :func:`ridge`, differentiable in ``decay``."""
    x, y = ridge_data(10)
    return torch.linalg.solve(x.T @ x / len(y) + torch.diag(decay.exp()), x.T @ y / len(y))


def ridge_inner(w: Tensor, decay: Tensor) -> Tensor:
    x, y = ridge_data(10)
    return 0.5 * (x @ w - y).square().mean() + 0.5 * (decay.exp() * w.square()).sum()


def ridge_outer(w: Tensor, decay: Tensor) -> Tensor:
    x, y = ridge_data(20)
    return 0.5 * (x @ w - y).square().mean()


def ridge() -> Problem:
    """One decay per weight: 12 weights, 12 hyperparameters."""
    x, y = ridge_data(10)
    x_out, y_out = ridge_data(20)
    decay = leaf(normal(13, 12) * 0.3 - 1)
    hessian = (x.T @ x / len(y) + torch.diag(decay.exp())).detach()
    w = leaf(ridge_solution(decay))
    outer_grad = x_out.T @ (x_out @ w - y_out) / len(y_out)
    wanted = -torch.linalg.solve(hessian, outer_grad) * decay.exp() * w
    return Problem(w, decay, ridge_inner, ridge_outer, hessian, (wanted.detach(),))


def named_ridge() -> Problem:
    """Weights and bias by name; one shared decay, and one offset that only the outer loss uses."""
    x, y = ridge_data(30, columns=5)
    x_out, y_out = ridge_data(40, columns=5)
    ones = torch.ones(len(y), 1, dtype=F64)
    design = torch.cat([x, ones], dim=1)
    mask = torch.tensor([1.0] * 5 + [0.0], dtype=F64)
    hparams = {"decay": leaf(torch.tensor(-0.7, dtype=F64)), "offset": leaf(torch.tensor([0.4], dtype=F64))}
    hessian = (design.T @ design / len(y) + hparams["decay"].exp() * torch.diag(mask)).detach()
    solution = torch.linalg.solve(hessian, design.T @ y / len(y))
    params = {"weight": leaf(solution[:5].reshape(1, 5)), "bias": leaf(solution[5])}
    error = torch.cat([x_out, ones], dim=1) @ solution + hparams["offset"].detach() - y_out
    outer_grad = torch.cat([x_out, ones], dim=1).T @ error / len(y_out)
    in_decay = -torch.linalg.solve(hessian, outer_grad) @ (hparams["decay"].exp() * mask * solution)

    def predict(inputs: Tensor, w: dict[str, Tensor]) -> Tensor:
        return inputs @ w["weight"].reshape(-1) + w["bias"]

    return Problem(
        params,
        hparams,
        lambda w, h: 0.5 * (predict(x, w) - y).square().mean() + 0.5 * h["decay"].exp() * w["weight"].square().sum(),
        lambda w, h: 0.5 * (predict(x_out, w) + h["offset"] - y_out).square().mean(),
        hessian,
        (in_decay.detach(), error.mean().reshape(1)),
    )


def logistic() -> Problem:
    """Logistic regression with one decay per weight, at the optimum found by Newton's method."""
    x, raw = ridge_data(50, rows=60, columns=9)
    x_out, raw_out = ridge_data(60, rows=60, columns=9)
    y, y_out = (raw > 0).to(F64), (raw_out > 0).to(F64)
    decay = leaf(normal(53, 9) * 0.5 - 3)
    scale = decay.detach().exp()

    def hessian_at(w: Tensor) -> Tensor:
        chance = torch.sigmoid(x @ w)
        return x.T @ ((chance * (1 - chance))[:, None] * x) / len(y) + torch.diag(scale)

    w = torch.zeros(9, dtype=F64)
    for _ in range(30):
        w = w - torch.linalg.solve(hessian_at(w), x.T @ (torch.sigmoid(x @ w) - y) / len(y) + scale * w)
    outer_grad = x_out.T @ (torch.sigmoid(x_out @ w) - y_out) / len(y_out)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits
    return Problem(
        [leaf(w)],
        (decay,),
        lambda w, h: entropy(x @ w[0], y) + 0.5 * (h[0].exp() * w[0].square()).sum(),
        lambda w, h: entropy(x_out @ w[0], y_out),
        hessian_at(w),
        (-torch.linalg.solve(hessian_at(w), outer_grad) * scale * w,),
    )


def learned_data() -> Problem:
    """The training inputs are the hyperparameters: 15 times as many as there are weights."""
    targets = normal(70, 15)
    data = leaf(normal(71, 15, 4))
    x_out, y_out = ridge_data(72, columns=4)
    hessian = (data.T @ data + torch.eye(4, dtype=F64)).detach()
    w = leaf(torch.linalg.solve(hessian, data.detach().T @ targets))
    inverse = torch.linalg.solve(hessian, x_out.T @ (x_out @ w - y_out) / len(y_out))
    error = data @ w - targets
    wanted = -(torch.outer(error, inverse) + torch.outer(data @ inverse, w))
    return Problem(
        w,
        data,
        lambda w, h: 0.5 * (h @ w - targets).square().sum() + 0.5 * w.square().sum(),
        lambda w, h: 0.5 * (x_out @ w - y_out).square().mean(),
        hessian,
        (wanted.detach(),),
    )


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "scalar": scalar,
    "quadratic": quadratic,
    "ridge": ridge,
    "named_ridge": named_ridge,
    "logistic": logistic,
    "learned_data": learned_data,
}
