"""Eigenvalues and eigenvectors of a game's Jacobian, or of any other map of its parameters."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from .. import _lists
from .._types import MatVec, Tensors
from ..optim._arguments import check_real
from ._arnoldi import Key, leading, leading_pairs
from ._players import widest
from .jacobian import GameJacobian

Which: TypeAlias = Literal["largest_modulus", "largest_real", "smallest_real", "largest_imaginary"]

_KEYS: dict[str, Key] = {
    "largest_modulus": lambda values: values.abs(),
    "largest_real": lambda values: values.real,
    "smallest_real": lambda values: -values.real,
    "largest_imaginary": lambda values: values.imag.abs(),
}

#: Up to this size a matrix is decomposed as a whole: a few seconds of one core, and tens of megabytes.
DENSE_SIZE = 1000


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Eigenvalues, leading ones first, conjugates next to each other with the positive imaginary part first.

    ``eigenvalues``: complex128 on the CPU, shape (k,).
    ``eigenvectors``: in the columns of a complex (P, k) tensor, of norm 1, the element of largest modulus real and
    positive; those of real eigenvalues have imaginary part 0.
    ``residuals``: ||J v - lambda v|| of each, float64 on the CPU, shape (k,), measured. Times the condition of the
    eigenvalue it bounds the error: for a matrix near a defective one that is large.
    ``num_products``: products with the map, those for the residuals included; 0 for a matrix.
    ``converged``: whether the leading pairs were found to the tolerance.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    residuals: Tensor
    num_products: int
    converged: bool
    _pack: Callable[[Tensor], Any]

    def eigenvector(self, i: int) -> tuple[Any, Any]:
        """The real and the imaginary part of eigenvector ``i``, each in the structure of the players."""
        vector = self.eigenvectors[:, i]
        return self._pack(vector.real), self._pack(vector.imag)


def spectrum(
    jacobian: GameJacobian | Tensor | MatVec,
    k: int | None = None,
    *,
    which: Which = "largest_modulus",
    like: Tensors | None = None,
    basis_size: int | None = None,
    rtol: float | None = None,
    max_products: int | None = None,
) -> Spectrum:
    r"""Eigenvalues :math:`\lambda` and eigenvectors v, :math:`J v = \lambda v`, of a map that need not be symmetric.

    All of them, or the ``k`` leading ones. A matrix of up to 1000 rows, and any map with few rows, is decomposed as a
    whole. For others Arnoldi's method with Krylov-Schur restarts (Stewart, "A Krylov-Schur algorithm for large
    eigenproblems", 2002) builds up to ``basis_size`` orthonormal directions from products alone, and goes on with the
    leading ones. It starts from the same random direction in every run, and tries another one at the end, since a
    Krylov space holds one copy of a multiple eigenvalue.

    Args:
        jacobian: a :class:`GameJacobian`, a real (P, P) tensor, or a callable J v on tensors like ``like``.
        k: how many, 1 <= k <= P; None is all, which needs P <= 1000. One more is returned where the last would leave
            its conjugate.
        which: what leads: "largest_modulus", "largest_real", "smallest_real" (the least stable directions of a game) or
            "largest_imaginary" (the fastest rotations; by modulus of the imaginary part).
        like: for a callable: a Tensor, or a list, tuple or dict of tensors, of which structure, shapes, dtype and
            device are used.
        basis_size: directions kept, more than k + 3; memory for as many vectors. None is max(30, 3 k).
        rtol: the leading pairs have converged when they are those of a matrix within ``rtol`` times the norm of J. None
            is eps^(2/3): 4e-11 in float64, 2e-5 in float32.
        max_products: the limit of products before the search is given up, at least ``basis_size``. None is
            20 ``basis_size`` + 1000.

    Returns:
        A :class:`Spectrum`. The map is only called; nothing is written to ``.grad``.

    Warns:
        RuntimeWarning: not converged within ``max_products``. The best found is returned with its residuals.

    Raises:
        TypeError, ValueError: an argument is not of its kind or out of range; a Jacobian of more than one start; a
            product that is not finite.

    A saddle of a matrix game turns at the singular values of its matrix:

    >>> x = torch.zeros(2, requires_grad=True)
    >>> y = torch.zeros(2, requires_grad=True)
    >>> payoff = x @ torch.diag(torch.tensor([3.0, 1.0])) @ y
    >>> found = spectrum(GameJacobian([payoff, -payoff], [x, y]), k=2)
    >>> [complex(round(z.real), round(z.imag)) for z in found.eigenvalues.tolist()]
    [3j, -3j]
    >>> real, imaginary = found.eigenvector(0)          # x along (1, 0), y the same, a quarter turn ahead
    >>> real[0].abs(), imaginary[1].abs()
    (tensor([0.7071, 0.0000]), tensor([0.7071, 0.0000]))
    """
    caller = "spectrum"
    if which not in _KEYS:
        raise ValueError(f"{caller}: which must be one of {', '.join(_KEYS)}; got {which!r}.")
    operator = _operator(caller, jacobian, like)
    count = operator.size if k is None else _check_count(caller, "k", k, 1, operator.size)
    capacity = max(30, 3 * count) if basis_size is None else _check_count(caller, "basis_size", basis_size, count + 4)
    eps = torch.finfo(operator.like.dtype).eps
    if rtol is not None:
        check_real(caller, "rtol", rtol, minimum=0.0)
    tolerance = eps ** (2 / 3) if rtol is None else rtol
    limit = 20 * capacity + 1000
    if max_products is not None:
        limit = _check_count(caller, "max_products", max_products, capacity)

    if k is None and operator.size > DENSE_SIZE:
        raise ValueError(
            f"{caller}: k must be given for a Jacobian of more than {DENSE_SIZE} rows; got {operator.size} rows."
            " Ask for the leading eigenvalues: k=10."
        )
    known = operator.matrix is not None and operator.size <= DENSE_SIZE
    if k is None or known or operator.size <= 2 * capacity:
        return _whole(operator, count, _KEYS[which])
    pairs = leading_pairs(
        operator.product, operator.like, count, _KEYS[which], capacity=capacity, rtol=tolerance, max_products=limit
    )
    vectors = _normalized(pairs.vectors, pairs.values)
    residuals, spent = _residuals(operator, pairs.values, vectors)
    products = pairs.num_products + spent
    if not pairs.converged:
        warnings.warn(
            f"{caller}: the {count} leading eigenvalues must converge within max_products={limit}; got residuals up to"
            f" {residuals.max().item():.3g} after {products} products. Raise max_products or basis_size={capacity}, or"
            f" rtol={tolerance:.3g}. The best found is returned.",
            RuntimeWarning,
            stacklevel=2,
        )
    return Spectrum(pairs.values, vectors, residuals, products, pairs.converged, operator.pack)


# ---- maps -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Operator:
    """A linear map on vectors (P,) like ``like``, how a vector is packed for the caller, and its matrix where known."""

    product: Callable[[Tensor], Tensor]
    like: Tensor
    pack: Callable[[Tensor], Any]
    matrix: Tensor | None = None

    @property
    def size(self) -> int:
        return self.like.numel()


def _operator(caller: str, jacobian: object, like: Tensors | None) -> _Operator:
    if isinstance(jacobian, Tensor):
        return _matrix_operator(caller, jacobian)
    if isinstance(jacobian, GameJacobian):
        if jacobian.batch_size is not None:
            raise ValueError(
                f"{caller}: jacobian must be of one start; got {jacobian.batch_size} starts."
                " Take torch.linalg.eigvals(jacobian.dense())."
            )
        vector = jacobian.flatten(jacobian.gradients)
        vector = vector.to(widest([vector]))  # 16 bits are too few for a basis that stays orthonormal
        return _checked(
            caller, lambda v: jacobian.flatten(jacobian(jacobian.unflatten(v))).to(vector), vector, jacobian.unflatten
        )
    if not callable(jacobian):
        got = _lists.value_name(jacobian)
        raise TypeError(f"{caller}: jacobian must be a GameJacobian, a Tensor or a callable; got {got}.")
    if like is None:
        raise TypeError(f"{caller}: like must be given for a callable; got None. Pass tensors of the kind it takes.")
    return _callable_operator(caller, jacobian, like)


def _matrix_operator(caller: str, matrix: Tensor) -> _Operator:
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] == 0:
        shape = _lists.shape_name(matrix.shape)
        raise ValueError(f"{caller}: jacobian must be a square matrix; got shape {shape}.")
    _lists.check_floating(caller, ["jacobian"], [matrix])
    if not bool(matrix.isfinite().all()):
        raise ValueError(f"{caller}: jacobian must be finite; got NaN or Inf.")
    matrix = matrix.detach().to(widest([matrix]))
    return _Operator(lambda v: matrix @ v, matrix[0], lambda v: v, matrix)


def _callable_operator(caller: str, product: Callable[[Any], Any], like: Tensors) -> _Operator:
    tensors, structure = _lists.flatten(caller, "like", like)
    labels = structure.labels("like")
    _lists.check_floating(caller, labels, tensors)
    if _lists.numel(tensors) == 0:
        raise ValueError(f"{caller}: like must have at least one element; got none.")
    vector = torch.empty(0, dtype=widest(tensors), device=tensors[0].device)

    def flat(value: object) -> Tensor:
        name = "what jacobian returned"
        parts = structure.match(caller, name, value, returned=True)
        _lists.check_like(caller, structure.labels(name), parts, tensors)
        return torch.cat([part.detach().reshape(-1).to(vector) for part in parts])

    def pack(v: Tensor) -> Any:
        parts = torch.split(v.detach(), [t.numel() for t in tensors])
        return structure.pack([part.reshape(t.shape).to(t).clone() for part, t in zip(parts, tensors, strict=True)])

    return _checked(
        caller, lambda v: flat(product(pack(v))), torch.cat([t.detach().reshape(-1).to(vector) for t in tensors]), pack
    )


def _checked(
    caller: str, product: Callable[[Tensor], Tensor], like: Tensor, pack: Callable[[Tensor], Any]
) -> _Operator:
    """The operator that refuses a product with NaN or Inf."""

    def finite(v: Tensor) -> Tensor:
        image = product(v)
        if not bool(image.isfinite().all()):
            raise ValueError(f"{caller}: jacobian must give finite products for finite vectors; got NaN or Inf.")
        return image

    return _Operator(finite, like, pack)


# ---- eigenpairs -----------------------------------------------------------------------------------------------------


def _whole(operator: _Operator, count: int, key: Key) -> Spectrum:
    """The leading ``count`` of all eigenpairs, from the matrix."""
    matrix, spent = operator.matrix, 0
    if matrix is None:
        spent = operator.size
        identity = torch.eye(operator.size, dtype=operator.like.dtype, device=operator.like.device)
        matrix = torch.stack([operator.product(column) for column in identity], dim=1)
    matrix = matrix.to("cpu", torch.float64)
    values, vectors = torch.linalg.eig(matrix)
    order = leading(values, key, count)
    values, vectors = values[order], _normalized(vectors[:, order], values[order])
    residuals = torch.linalg.vector_norm(matrix.to(vectors) @ vectors - vectors * values, dim=0)
    return Spectrum(values, vectors.to(operator.like.device), residuals, spent, True, operator.pack)


def _normalized(vectors: Tensor, values: Tensor) -> Tensor:
    """Columns of norm 1 whose element of largest modulus is real and positive; exactly real for real eigenvalues."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    turned = vectors * (largest.conj() / largest.abs())
    turned = turned / torch.linalg.vector_norm(turned, dim=0)
    real = (values.imag == 0).to(vectors.device)
    return torch.where(real, torch.complex(turned.real, torch.zeros_like(turned.real)), turned)


def _residuals(operator: _Operator, values: Tensor, vectors: Tensor) -> tuple[Tensor, int]:
    """||J v - lambda v|| of every column, and the products spent: the columns of conjugates are conjugates."""
    residuals, spent = torch.zeros(len(values), dtype=torch.float64), 0
    for i, value in enumerate(values.tolist()):
        if value.imag < 0:
            residuals[i] = residuals[i - 1]
            continue
        parts = (vectors[:, i].real, vectors[:, i].imag) if value.imag else (vectors[:, i].real,)
        images = [operator.product(part.contiguous()) for part in parts]
        spent += len(images)
        image = torch.complex(images[0], images[1] if value.imag else torch.zeros_like(images[0]))
        residuals[i] = torch.linalg.vector_norm(image - value * vectors[:, i]).item()
    return residuals, spent


def _check_count(caller: str, name: str, value: object, minimum: int, maximum: int | None = None) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{caller}: {name} must be an integer; got {value!r}.")
    if value < minimum or (maximum is not None and value > maximum):
        rule = f">= {minimum}" if maximum is None else f"between {minimum} and {maximum}"
        raise ValueError(f"{caller}: {name} must be {rule}; got {value}.")
    return value
