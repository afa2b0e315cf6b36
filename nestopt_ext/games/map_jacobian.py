"""The Jacobian of a map of states: products, leading eigenpairs and leading singular pairs."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _lists
from ..optim._arguments import check_real
from ._golub_kahan import leading_triples
from ._linearized import Linearized, Step, check_state, check_step
from .spectrum import _KEYS, Which, _check_count, spectrum

#: Up to this size of a state, matrices of many starts are formed: a sweep that costs fewer passes than a search.
DENSE_SIZE = 64


class MapJacobian:
    r"""The Jacobian :math:`dF/dx` of a map of states at B states, an operator on rows; see :func:`map_jacobian`.

    ``value`` is F at the states, [B, S], without graph.
    """

    def __init__(self, step: Step, state: Tensor) -> None:
        caller = "MapJacobian"
        check_step(caller, step)
        check_state(caller, "state", state)
        self._linearized = Linearized(caller, step, state)
        self.shape = tuple(state.shape)
        self.value = self._linearized.value.clone()

    def __call__(self, v: Tensor) -> Tensor:
        """J v, start by start, for v of shape [B, S] or, for m vectors each, [B, S, m]; one backward pass a vector."""
        return self._apply("v", v, transposed=False)

    def transpose(self, u: Tensor) -> Tensor:
        """J' u, of the same shapes and cost; not the product with J, which is not symmetric."""
        return self._apply("u", u, transposed=True)

    def dense(self) -> Tensor:
        """The matrices, [B, S, S]; S backward passes, made as one."""
        return self._linearized.dense()

    def _apply(self, name: str, vectors: Tensor, *, transposed: bool) -> Tensor:
        if not isinstance(vectors, Tensor):
            raise TypeError(f"MapJacobian: {name} must be a tensor; got {_lists.value_name(vectors)}.")
        if vectors.dim() not in (2, 3) or tuple(vectors.shape[:2]) != self.shape or vectors.numel() == 0:
            raise ValueError(
                f"MapJacobian: {name} must have shape {self.shape} or {self.shape} and the number of vectors;"
                f" got {_lists.shape_name(vectors.shape)}."
            )
        columns = vectors.detach().to(self.value)
        columns = columns if columns.dim() == 3 else columns.unsqueeze(2)
        found = self._linearized.pull(columns) if transposed else self._linearized.push(columns)
        return found if vectors.dim() == 3 else found.squeeze(2)


def map_jacobian(step: Step, state: Tensor) -> MapJacobian:
    r"""The Jacobian of a map of states, :math:`J = dF/dx` at each row x of ``state`` [B, S], as an operator.

    ``step`` is an :class:`OptimizerMap`, or any differentiable function from [B, S] to [B, S] whose row b depends on
    row b alone; a gradient inside it is to be taken with ``create_graph=True``, without which its derivative is left
    out. It is called once, and the graph is kept as long as the operator lives. Products are taken start by start and
    cost what they cost for one start times B; they are new tensors without graph. ``state`` is float32 or float64.

    Raises TypeError or ValueError for bad arguments.

    >>> jacobian = map_jacobian(lambda x: torch.stack([x[:, 0] * x[:, 1], x[:, 1]], dim=1), torch.tensor([[2.0, 3.0]]))
    >>> jacobian.dense()
    tensor([[[3., 2.],
             [0., 1.]]])
    >>> jacobian(torch.tensor([[1.0, 1.0]])), jacobian.transpose(torch.tensor([[1.0, 1.0]]))
    (tensor([[5., 1.]]), tensor([[3., 3.]]))
    """
    return MapJacobian(step, state)


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Eigenvalues ``values`` [B, k] and right eigenvectors in the columns of ``vectors`` [B, S, k], both complex.

    Leading ones first; conjugates next to each other, the positive imaginary part first. Vectors have norm 1, and their
    element of largest modulus is real and positive; those of real eigenvalues have imaginary part 0. Where a matrix is
    not finite, all is NaN.
    """

    values: Tensor
    vectors: Tensor


def leading_eigenpairs(
    jacobian: MapJacobian | Tensor, k: int | None = None, *, which: Which = "largest_modulus"
) -> Eigenpairs:
    r"""The ``k`` leading eigenpairs :math:`J v = \lambda v`, real and complex, of the Jacobian at each start.

    ``jacobian`` is a :class:`MapJacobian`, or real matrices [B, S, S]. Up to S = 64, and for matrices, all eigenpairs
    are computed in one batch; beyond, :func:`spectrum` finds the leading ones of one start after the other from
    products. ``k`` None is all, for which matrices are formed. ``which`` is as in :func:`spectrum`. Exactly ``k`` pairs
    are returned, so that the last may be without its conjugate, which is known.

    Raises TypeError or ValueError for bad arguments; warns as :func:`spectrum` where a search did not converge.

    >>> turn = torch.tensor([[[0.0, -2.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 1.0]]])
    >>> torch.view_as_real(leading_eigenpairs(turn).values).round()[0]     # 2i, -2i, 1
    tensor([[ 0.,  2.],
            [ 0., -2.],
            [ 1.,  0.]])
    """
    caller = "leading_eigenpairs"
    if which not in _KEYS:
        raise ValueError(f"{caller}: which must be one of {', '.join(_KEYS)}; got {which!r}.")
    if isinstance(jacobian, MapJacobian):
        size = jacobian.shape[1]
        count = size if k is None else _check_count(caller, "k", k, 1, size)
        if k is not None and size > DENSE_SIZE:
            return _searched(jacobian, count, which)
        matrices = jacobian.dense()
    else:
        matrices = _check_matrices(caller, jacobian)
        count = matrices.shape[1] if k is None else _check_count(caller, "k", k, 1, matrices.shape[1])
    finite = matrices.isfinite().all(dim=2).all(dim=1)
    values, vectors = torch.linalg.eig(torch.where(finite[:, None, None], matrices, 0.0))
    # LAPACK puts the members of a pair side by side, and their keys are equal: a stable order keeps them there.
    order = torch.argsort(_KEYS[which](values), dim=1, descending=True, stable=True)[:, :count]
    values = values.gather(1, order)
    vectors = vectors.gather(2, order[:, None, :].expand(-1, vectors.shape[1], -1))
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    vectors = vectors * (largest.conj() / largest.abs())
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    real = (values.imag == 0)[:, None, :]
    vectors = torch.where(real, torch.complex(vectors.real, torch.zeros_like(vectors.real)), vectors)
    return Eigenpairs(
        torch.where(finite[:, None], values, torch.nan), torch.where(finite[:, None, None], vectors, torch.nan)
    )


@dataclass(frozen=True, eq=False)
class SingularPairs:
    """Singular values ``values`` [B, k], largest first, and vectors in the columns of ``left`` and ``right`` [B, S, k].

    J right = values * left. The element of largest magnitude of each right vector is positive. ``residuals`` [B, k] are
    the norms of J' left - values * right, ``num_products`` counts products with J and its transpose (0 for matrices)
    and ``converged`` says whether all pairs were found to the tolerance. Where a matrix is not finite, all is NaN.
    """

    values: Tensor
    left: Tensor
    right: Tensor
    residuals: Tensor
    num_products: int
    converged: bool


def leading_singular_pairs(
    jacobian: MapJacobian | Tensor,
    k: int = 1,
    *,
    basis_size: int | None = None,
    rtol: float | None = None,
    max_products: int = 1000,
) -> SingularPairs:
    r"""The ``k`` leading singular pairs :math:`J v = \sigma u`, :math:`J^\top u = \sigma v`, of the Jacobian at each
    start: the directions that the map stretches most, and by how much.

    ``jacobian`` is a :class:`MapJacobian`, or real matrices [B, S, S]. Up to S = 64, and for matrices, they are
    decomposed as a whole; beyond, bidiagonalization from products (Golub and Kahan 1965; restarts of Baglama and
    Reichel 2005) runs in all starts at once, with ``basis_size`` pairs of vectors kept (None: k + 17), until every
    residual is at most ``rtol`` times the largest singular value (None: eps^(2/3)), or ``max_products`` are spent.

    Raises TypeError or ValueError for bad arguments, and for products that are not finite. Warns where the search did
    not converge, and returns the best found with its residuals.

    >>> found = leading_singular_pairs(torch.tensor([[[0.0, 3.0], [1.0, 0.0]]]))
    >>> found.values, found.right
    (tensor([[3.]]), tensor([[[0.],
             [1.]]]))
    """
    caller = "leading_singular_pairs"
    if isinstance(jacobian, MapJacobian) and jacobian.shape[1] > DENSE_SIZE:
        count = _check_count(caller, "k", k, 1, jacobian.shape[1] - 1)
        eps = torch.finfo(jacobian.value.dtype).eps
        if rtol is not None:
            check_real(caller, "rtol", rtol, minimum=0.0)
        capacity = min(count + 17, jacobian.shape[1])
        if basis_size is not None:
            capacity = _check_count(caller, "basis_size", basis_size, count + 1, jacobian.shape[1])
        return _bidiagonalized(
            caller,
            jacobian,
            count,
            capacity=capacity,
            rtol=eps ** (2 / 3) if rtol is None else rtol,
            max_products=_check_count(caller, "max_products", max_products, 1),
        )
    matrices = jacobian.dense() if isinstance(jacobian, MapJacobian) else _check_matrices(caller, jacobian)
    count = _check_count(caller, "k", k, 1, matrices.shape[1])
    finite = matrices.isfinite().all(dim=2).all(dim=1)
    left, values, right = torch.linalg.svd(torch.where(finite[:, None, None], matrices, 0.0))
    values, left, right = values[:, :count], *_signed(left[:, :, :count], right.mT[:, :, :count])
    residuals = (matrices.mT @ left - values[:, None, :] * right).norm(dim=1)
    wide = finite[:, None, None]
    return SingularPairs(
        torch.where(finite[:, None], values, torch.nan),
        torch.where(wide, left, torch.nan),
        torch.where(wide, right, torch.nan),
        torch.where(finite[:, None], residuals, torch.nan),
        0,
        True,
    )


def _searched(jacobian: MapJacobian, count: int, which: Which) -> Eigenpairs:
    """The leading pairs of one start after the other, from products."""
    values, vectors = [], []
    for b in range(jacobian.shape[0]):

        def product(v: Tensor, b: int = b) -> Tensor:
            rows = torch.zeros_like(jacobian.value)
            rows[b] = v
            return jacobian(rows)[b]

        found = spectrum(product, count, which=which, like=jacobian.value[b])
        values.append(found.eigenvalues[:count].to(jacobian.value.device))
        vectors.append(found.eigenvectors[:, :count])
    return Eigenpairs(torch.stack(values), torch.stack(vectors))


def _bidiagonalized(
    caller: str, jacobian: MapJacobian, k: int, *, capacity: int, rtol: float, max_products: int
) -> SingularPairs:
    def finite(image: Tensor) -> Tensor:
        if not bool(image.isfinite().all()):
            raise ValueError(f"{caller}: jacobian must give finite products for finite vectors; got NaN or Inf.")
        return image

    found = leading_triples(
        lambda v: finite(jacobian(v)),
        lambda u: finite(jacobian.transpose(u)),
        jacobian.value,
        k,
        capacity=capacity,
        rtol=rtol,
        max_products=max_products,
    )
    if not found.converged:
        warnings.warn(
            f"{caller}: the {k} leading pairs must converge within max_products={max_products}; got residuals up to"
            f" {found.residuals.max().item():.3g} after {found.num_products} products. Raise max_products or"
            f" basis_size={capacity}, or rtol={rtol:.3g}. The best found is returned.",
            RuntimeWarning,
            stacklevel=3,
        )
    left, right = _signed(found.left, found.right)
    return SingularPairs(found.values, left, right, found.residuals, found.num_products, found.converged)


def _signed(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of columns whose right member's element of largest magnitude is positive."""
    sign = torch.sign(right.gather(1, right.abs().argmax(1, keepdim=True)))
    return left * sign, right * sign


def _check_matrices(caller: str, matrices: object) -> Tensor:
    if not isinstance(matrices, Tensor):
        got = _lists.value_name(matrices)
        raise TypeError(f"{caller}: jacobian must be a MapJacobian or a tensor of shape (B, S, S); got {got}.")
    if matrices.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{caller}: jacobian must be float32 or float64; got {_lists.dtype_name(matrices.dtype)}.")
    if matrices.dim() != 3 or matrices.shape[1] != matrices.shape[2] or matrices.numel() == 0:
        shape = _lists.shape_name(matrices.shape)
        raise ValueError(f"{caller}: jacobian must have shape (B, S, S), a matrix for each start; got {shape}.")
    return matrices.detach()
