r"""The inverse of a curvature as a Neumann series.

For a symmetric matrix :math:`A` (damping included) whose eigenvalues lie in :math:`(0, 2/\alpha)`,

.. math:: A^{-1} v = \alpha \sum_{j \ge 0} (I - \alpha A)^j v .

The sum cut after :math:`K` = ``num_terms`` products leaves the residual :math:`(I - \alpha A)^{K+1} v`.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from .. import _lists, _ops
from .._operator import stacked
from .._types import MatVec, SameTensors, TensorList
from ._arguments import (
    CheckEvery,
    alpha_tensor,
    check_alpha,
    check_check_every,
    check_damping,
    check_num_terms,
    check_preconditioner,
    check_rtol,
    looks,
)
from ._history import History
from ._outcome import Outcome, judge, warn
from ._power import auto_alpha, usable_step
from ._product import Product
from ._solution import Status
from ._system import System


@dataclass(frozen=True)
class Neumann:
    r"""Solve by the series :math:`\alpha \sum_{j=0}^{K} (I - \alpha (A + \delta I))^j v`, K = ``num_terms``.

    ``num_terms`` (int >= 0) counts products with A; 0 gives alpha * v. ``alpha`` (units 1/curvature) is a number, a
    0-dim tensor, or ``"auto"``: 0.9 / lambda_max(A + damping I), at the price of five more products. The series
    contracts for 0 < alpha < 2 / lambda_max and a positive definite A + damping I. ``damping`` (units of curvature) is
    finite and >= 0. An operator that knows its sum, or its largest eigenvalue, in closed form is asked for it, and then
    costs no products.

    ``rtol`` in [0, 1) ends the sum at the first term whose norm is at most rtol |v|; 0 takes all terms. It is looked
    for every ``check_every`` terms, each look waiting for the device; ``"auto"`` looks at every term where all tensors
    are on the CPU, and otherwise never, as None does: the terms after that one are then zero, but cost their products.

    ``preconditioner`` is a callable that returns M times tensors like v for a positive definite M close to the inverse
    of A + damping I, such as that of KFAC. The series is then :math:`\alpha \sum_j (I - \alpha M (A + \delta I))^j M
    v`, alpha has no unit, and the norms that ``rtol`` compares are those of the terms with M.

    Raises TypeError or ValueError, naming the option, when one is out of range.

    >>> Neumann(num_terms=20, damping=1e-3).num_terms
    20
    >>> import torch
    >>> from nestopt_ext.solvers import solve
    >>> solve(lambda v: 2 * v, torch.tensor(3.0), Neumann(num_terms=100, alpha=0.4, rtol=1e-4)).num_products
    7
    """

    num_terms: int = 3
    alpha: float | Tensor | Literal["auto"] = "auto"
    damping: float = 0.0
    _: KW_ONLY
    rtol: float = 0.0
    check_every: CheckEvery = "auto"
    preconditioner: MatVec | None = None

    def __post_init__(self) -> None:
        _check("Neumann", self.num_terms, self.alpha, self.damping)
        check_rtol("Neumann", self.rtol)
        check_check_every("Neumann", self.check_every)
        check_preconditioner("Neumann", self.preconditioner)

    def run(self, system: System) -> Outcome:
        """The series for the right-hand sides of ``system``."""
        return series(
            system,
            num_terms=self.num_terms,
            alpha=self.alpha,
            damping=self.damping,
            rtol=self.rtol,
            check_every=self.check_every,
            preconditioner=self.preconditioner,
        )


def neumann_ihvp(
    matvec: MatVec,
    v: SameTensors,
    *,
    num_terms: int,
    alpha: float | Tensor | Literal["auto"],
    damping: float = 0.0,
) -> SameTensors:
    r"""An inverse curvature product by a Neumann series: :math:`\alpha \sum_{j=0}^{K} (I - \alpha (A + \delta I))^j v`.

    ``matvec`` is any callable that returns A times the tensors it is given, in the same structure; the tensors it is
    given may be read only, and only during the call. A curvature operator that knows the sum in closed form is asked
    for it. ``v`` (Tensor, list, tuple or dict of float32, float64, bfloat16 or float16 tensors of any shape) is not
    modified. ``num_terms`` = K is the number of products; 0 gives alpha * v. ``alpha`` (units 1/curvature) is a number,
    a 0-dim tensor, or ``"auto"``: 0.9 / lambda_max(A + damping I) by five more products. ``damping`` = delta (units of
    curvature) is >= 0. 16-bit ``v`` is accumulated in float32.

    Returns new tensors like ``v``, without graph. Besides them the memory of one more ``v`` and of one product is used,
    and the device is waited for once, at the end. A series that diverges or meets NaN or Inf is returned as it is, with
    one RuntimeWarning. Raises TypeError or ValueError when an argument, or what ``matvec`` returns, breaks these rules.

    Source: Lorraine, Vicol, Duvenaud, Optimizing millions of hyperparameters by implicit differentiation (2020),
    algorithm 3. Here the sum carries its factor alpha in front, all its terms have a plus sign, and ``num_terms``
    counts products, so that the sum has ``num_terms`` + 1 terms.

    >>> import torch
    >>> curvature = torch.tensor([1.0, 2.0])
    >>> neumann_ihvp(lambda v: curvature * v, torch.tensor([1.0, 1.0]), num_terms=1, alpha=0.5)   # 0.5 * (2 - 0.5 * c)
    tensor([0.7500, 0.5000])
    >>> neumann_ihvp(lambda v: curvature * v, torch.tensor([1.0, 1.0]), num_terms=40, alpha=0.5)  # 1 / c
    tensor([1.0000, 0.5000])
    """
    caller = "neumann_ihvp"
    _check(caller, num_terms, alpha, damping)
    flat, structure = _lists.flatten(caller, "v", v)
    _lists.check_floating(caller, structure.labels("v"), flat)
    system = System(Product(caller, matvec, structure, flat), flat)
    outcome = series(system, num_terms=num_terms, alpha=alpha, damping=damping)
    warn(caller, judge(caller, outcome))
    result: SameTensors = structure.pack(outcome.value)
    return result


def series(
    system: System,
    *,
    num_terms: int,
    alpha: float | Tensor | Literal["auto"],
    damping: float,
    rtol: float = 0.0,
    check_every: CheckEvery = None,
    preconditioner: MatVec | None = None,
) -> Outcome:
    """The series, in closed form where the operator has one."""
    if preconditioner is None:
        factor: _Factor = _Plain(system, damping)
    else:
        factor = _Preconditioned(system, damping, system.product.beside(preconditioner, "preconditioner"))
    start: TensorList | None = None
    step = factor.known_step() if isinstance(alpha, str) else alpha_tensor(alpha)
    if step is None:
        start = factor.start()
        step = factor.largest_step(start)
    found = _in_closed_form(system, num_terms, step, damping) if preconditioner is None else None
    is_bounded = found is None
    if found is None and preconditioner is None and rtol == 0 and system.columns is None:
        found = _by_steps(system, num_terms, step, damping)
        is_bounded = found is None or system.product.sums_terms
    limit = None
    if found is None:
        start = factor.start() if start is None else start
        if rtol > 0:
            limit = rtol * system.lengths(start)
            limit = limit if system.norm is None else limit * _ratio(system.norm, system.lengths(system.v))
        value, sq_norms = _summed(system, factor, start, step, num_terms, limit, looks(check_every, system.v))
    else:
        value, sq_norms = found
    used = f"num_terms={{terms}}, alpha={{alpha}}, damping={damping:.4g}"
    known = step if isinstance(alpha, str | Tensor) else float(alpha)
    evidence = History(sq_norms, system.columns, used, _describe, known, limit)
    value = system.product.narrowed(value)
    # 1 / alpha bounds the curvature from above, by far where the step is far too small.
    most_rounding = max(
        (torch.finfo(dtype).eps ** 0.5 for dtype in {t.dtype for t in system.product.like}), default=0.0
    )
    return Outcome(value, evidence, factor.curvature(step), rtol, most_rounding, is_bounded=is_bounded)


def _summed(
    system: System, factor: _Factor, term: TensorList, step: Tensor, num_terms: int, limit: Tensor | None, look: int
) -> tuple[TensorList, TensorList]:
    """The sum in two buffers, both updated in place: ``term`` holds (I - alpha A)^j v, and ``total`` the sum of them.

    Also the squared norms of the terms on each device. A term that follows one at its limit is made zero.
    """
    total = [torch.zeros_like(t) for t in term]
    parts = [
        _Part(term, total, positions, step if step.device.type == "cpu" else step.to(device), system.columns, num_terms)
        for device, positions in _lists.by_device(term).items()
    ]
    for part in parts:
        part.step([], 0)
    used = 0
    for j in range(1, num_terms + 1):
        if limit is not None:
            alive = _above(limit, [part.sq_norms[j - 1] for part in parts])
            if look and (j - 1) % look == 0 and not bool(alive.any()):
                break
            for t in term:
                t.mul_(_broadcast(alive, t, system.columns))
        av = factor(term)
        for part in parts:
            part.step(av, j, factor.fused_damping)
        del av
        used = j
    for part in parts:
        for t in part.total:
            t.mul_(part.alpha)
    return total, [part.sq_norms[: used + 1] for part in parts]


class _Part:
    """The tensors of a sum on one device, and the squared norms of its terms there, [n] or [n, k]."""

    def __init__(
        self,
        term: TensorList,
        total: TensorList,
        positions: list[int],
        alpha: Tensor,
        columns: int | None,
        num_terms: int,
    ) -> None:
        self.term, self.total = ([tensors[i] for i in positions] for tensors in (term, total))
        self.alpha = alpha
        self._positions = positions
        self._columns = columns
        shape = (num_terms + 1,) if columns is None else (num_terms + 1, columns)
        device = self.term[0].device
        self.sq_norms = torch.zeros(shape, dtype=_lists.scalar_dtype(device), device=device)

    def step(self, av: TensorList, number: int, damping: float = 0.0) -> None:
        """The next term, from the product with the one before; the first is there already. Adds it to the total."""
        products = [av[i] for i in self._positions] if av else []
        sq_norm = self.sq_norms[number] if self._columns is None else None
        _ops.neumann_step_(self.term, self.total, products, self.alpha, damping=damping, sq_norm=sq_norm)
        if self._columns is not None:
            self.sq_norms[number] = _lists.norms(self.term).square()


class _Plain:
    """The product with A, whose damping the fused step adds."""

    def __init__(self, system: System, damping: float) -> None:
        self.fused_damping = damping
        self._system = system

    def __call__(self, term: TensorList) -> TensorList:
        return self._system.apply(term)

    def start(self) -> TensorList:
        return self._system.working_copy()

    def known_step(self) -> Tensor | None:
        """0.9 / lambda_max, if the operator knows it."""
        known = self._system.product.largest_eigenvalue()
        if known is None:
            return None
        return usable_step(0.9 / (known.detach().to(_lists.scalar_dtype(known.device)) + self.fused_damping))

    def largest_step(self, start: TensorList) -> Tensor:
        """The same by power iteration."""
        return auto_alpha(self._system.product, _one_of(self._system, start), self.fused_damping)

    def curvature(self, step: Tensor) -> Tensor:
        """The norm of A + damping I, as far as it is known."""
        return step.reciprocal()


class _Preconditioned:
    """The product with M (A + damping I)."""

    fused_damping = 0.0

    def __init__(self, system: System, damping: float, preconditioner: Product) -> None:
        self._system = system
        self._inner = system.beside(preconditioner)
        self._damping = damping
        self._largest = system.scalars()

    def __call__(self, term: TensorList) -> TensorList:
        shifted = self._shifted(term, self._system.apply(term))
        lengths = self._system.lengths(term)
        self._largest = torch.fmax(self._largest, _ratio(self._system.lengths(shifted), lengths))
        return self._inner.apply(shifted)

    def start(self) -> TensorList:
        v = self._system.working_copy()
        return [t.to(w.dtype, copy=True) for t, w in zip(self._inner.apply(v), v, strict=True)]

    def known_step(self) -> None:
        """Never: what the operator knows is without M."""

    def largest_step(self, start: TensorList) -> Tensor:
        """0.9 / lambda_max(M (A + damping I)), by power iteration."""
        product, preconditioner = self._system.product, self._inner.product
        return auto_alpha(
            lambda term: preconditioner(self._shifted(term, product(term))), _one_of(self._system, start), 0.0
        )

    def curvature(self, step: Tensor) -> Tensor:
        """The norm of A + damping I, as far as it was seen."""
        return self._largest

    def _shifted(self, term: TensorList, product: TensorList) -> TensorList:
        return [a.to(t.dtype).add(t, alpha=self._damping) for a, t in zip(product, term, strict=True)]


_Factor: TypeAlias = _Plain | _Preconditioned


def _by_steps(system: System, num_terms: int, step: Tensor, damping: float) -> tuple[TensorList, TensorList] | None:
    """The sum where the operator takes its steps itself."""
    found = system.product.loop([t.detach() for t in system.v], num_terms, step, damping)
    return None if found is None else (found[0], [found[1]])


def _in_closed_form(
    system: System, num_terms: int, step: Tensor, damping: float
) -> tuple[TensorList, TensorList] | None:
    """The sum where the operator has it in closed form."""
    if system.columns is None:
        found = system.product.series([t.detach() for t in system.v], num_terms, step, damping)
        return None if found is None else (found[0], [found[1]])
    sums, histories = [], []
    for row in zip(*system.rows(), strict=True):
        found = system.product.series(list(row), num_terms, step, damping)
        if found is None:
            return None
        sums.append(found[0])
        histories.append(found[1])
    return (stacked(sums, system.v), [torch.stack(histories, dim=1)]) if sums else None


def _one_of(system: System, start: TensorList) -> TensorList:
    """A single list to start a power iteration from, in new memory."""
    if system.columns is None:
        return [t.clone() for t in start]
    return [t[0].clone() if system.columns else t.new_zeros(t.shape[1:]) for t in start]


def _above(limit: Tensor, sq_norms: TensorList) -> Tensor:
    """Which terms are still above their limit, NaN among them."""
    total = torch.zeros_like(limit)
    for part in sq_norms:
        total = total + part.to(total.device)
    return ~(total.sqrt() <= limit)


def _broadcast(alive: Tensor, like: Tensor, columns: int | None) -> Tensor:
    mask = alive.to(like.device, like.dtype)
    return mask if columns is None else mask.reshape(-1, *[1] * (like.dim() - 1))


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """The quotient, and 1 where b is zero."""
    return torch.where(b > 0, a / b, torch.ones_like(b))


def _describe(status: Status, used: str, radius: str) -> str:
    end = "is not finite" if status is Status.non_finite else "diverges"
    return (
        f"the Neumann sum {end} ({used}); the spectral radius of I - alpha*(A + damping*I) must be below 1; got"
        f" {radius}. Lower alpha, raise damping, use alpha='auto', or use a positive semi-definite curvature"
        " (Gauss-Newton). The values are returned as they are."
    )


def _check(caller: str, num_terms: object, alpha: object, damping: object) -> None:
    check_num_terms(caller, num_terms)
    check_alpha(caller, alpha, auto=True)
    check_damping(caller, damping)
