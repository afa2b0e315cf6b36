"""An eigendirection, or the invariant plane of a complex pair, followed from matrix to matrix by overlap."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _lists
from .map_jacobian import Eigenpairs
from .spectrum import _check_count


@dataclass(frozen=True, eq=False)
class Eigenspace:
    r"""A real line or plane that a matrix maps into itself, one for each of B starts.

    ``basis`` [B, S, 2] has orthonormal columns; the second one is zero where the space is a line. ``dim`` [B] is 1 or
    2. ``values`` [B, 2] complex are the eigenvalues in it, the second NaN for a line. ``overlap`` [B], in [0, 1], says
    how much of the space before it was found again: the cosine of the angle between lines, the product of the cosines
    of both angles between planes, the cosine of the angle between a line and a plane; 1 for a space that was chosen.
    Where eigenpairs are NaN, all but ``dim`` is.
    """

    basis: Tensor
    dim: Tensor
    values: Tensor
    overlap: Tensor


def eigenspace(pairs: Eigenpairs, index: int = 0) -> Eigenspace:
    r"""The space of eigenpair ``index`` of each start: its line, or for a complex one, :math:`v = u + i q`, the plane
    spanned by u and q, the first direction along u.

    ``pairs`` come from :func:`leading_eigenpairs`. Raises TypeError or ValueError for bad arguments.

    >>> from nestopt_ext.games import leading_eigenpairs
    >>> turn = torch.tensor([[[0.0, -2.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 1.0]]])
    >>> space = eigenspace(leading_eigenpairs(turn))
    >>> space.dim, space.values.imag.round()                               # the plane of 2i and -2i
    (tensor([2]), tensor([[ 2., -2.]]))
    """
    _check_pairs("eigenspace", pairs)
    _check_count("eigenspace", "index", index, 0, pairs.values.shape[1] - 1)
    value, vector = pairs.values[:, index], pairs.vectors[:, :, index]
    plane = value.imag != 0
    first = vector.real / vector.real.norm(dim=1, keepdim=True)
    second, _ = _perpendicular(vector.imag[:, :, None], first)
    second = torch.where(plane[:, None], second[:, :, 0], 0.0)
    other = torch.where(plane, value.conj(), torch.nan)
    lost = value.isnan()
    return Eigenspace(
        torch.where(lost[:, None, None], torch.nan, torch.stack([first, second], dim=2)),
        1 + plane.long(),
        torch.stack([value, other], dim=1),
        torch.where(lost, torch.nan, torch.ones_like(value.real)),
    )


def track(pairs: Eigenpairs, space: Eigenspace) -> Eigenspace:
    """The space of the next matrix that overlaps most with ``space``, the one of the matrix before, start by start.

    A line goes on as the line of a real eigenvector, its sign kept, or, where its eigenvalue has met another and become
    complex, as the plane of the pair. A plane stays a plane: that of a complex pair, or, where the pair has met on the
    real axis and parted, the one spanned by two real eigenvectors. Its basis is turned as little as may be. ``overlap``
    tells how well that went: where it is far from 1 the path was sampled too coarsely, or the space is lost.

    ``pairs`` are those of the next matrix, all or enough of them, as :func:`leading_eigenpairs` finds them. Raises
    TypeError or ValueError for bad arguments.

    >>> from nestopt_ext.games import leading_eigenpairs
    >>> before = eigenspace(leading_eigenpairs(torch.diag(torch.tensor([3.0, 2.0]))[None]))
    >>> track(leading_eigenpairs(torch.diag(torch.tensor([1.0, 2.0]))[None]), before).values[0, 0]      # not the first
    tensor(1.+0.j)
    """
    _check_pairs("track", pairs)
    if not isinstance(space, Eigenspace):
        raise TypeError(f"track: space must be an Eigenspace; got {_lists.value_name(space)}.")
    if space.basis.shape[:2] != pairs.vectors.shape[:2]:
        raise ValueError(
            f"track: space must be of the starts and size of pairs, {tuple(pairs.vectors.shape[:2])};"
            f" got {tuple(space.basis.shape[:2])}."
        )
    found = _Best(space)
    for i in range(pairs.values.shape[1]):
        found.consider(pairs, i)
    return found.aligned()


class _Best:
    """The best candidate so far of every start."""

    def __init__(self, space: Eigenspace) -> None:
        self._before = space
        self._line = space.dim == 1
        self._overlap = torch.full_like(space.overlap, -1.0)
        self._basis = torch.full_like(space.basis, torch.nan)
        self._values = torch.full_like(space.values, torch.nan)
        self._dim = space.dim.clone()

    def consider(self, pairs: Eigenpairs, i: int) -> None:
        """The line of eigenvector i, and the planes it spans with its imaginary part or with real ones after it."""
        value, vector = pairs.values[:, i], pairs.vectors[:, :, i]
        first = vector.real / vector.real.norm(dim=1, keepdim=True)
        q = self._before.basis
        ahead = (first[:, None, :] @ q).squeeze(1)  # [B, 2], with both directions of the space before
        real = value.imag == 0
        lines = torch.stack([value, torch.full_like(value, torch.nan)], dim=1)
        basis = torch.stack([first, torch.zeros_like(first)], dim=2)
        self._take(ahead[:, 0].abs(), self._line & real, basis, lines, 1)

        partners = torch.cat([vector.imag[:, :, None], pairs.vectors[:, :, i + 1 :].real], dim=2)
        values = torch.cat([value.conj()[:, None], pairs.values[:, i + 1 :]], dim=1)
        crossed = real[:, None] & (values.imag == 0) & ~self._line[:, None]
        crossed[:, 0] = value.imag > 0
        seconds, independent = _perpendicular(partners, first)
        aside = q.mT @ seconds  # [B, 2, j]
        with_line = (ahead[:, :1].square() + aside[:, 0].square()).sqrt()
        with_plane = (ahead[:, :1] * aside[:, 1] - ahead[:, 1:] * aside[:, 0]).abs()
        overlap = torch.where(self._line[:, None], with_line, with_plane)
        overlap, j = torch.where(crossed & independent, overlap, -1.0).max(dim=1)
        second = seconds.gather(2, j[:, None, None].expand(-1, seconds.shape[1], 1))
        basis = torch.cat([first[:, :, None], second], dim=2)
        self._take(overlap, overlap >= 0, basis, torch.stack([value, values.gather(1, j[:, None])[:, 0]], dim=1), 2)

    def _take(self, overlap: Tensor, allowed: Tensor, basis: Tensor, values: Tensor, dim: int) -> None:
        better = allowed & (overlap > self._overlap)
        self._overlap = torch.where(better, overlap, self._overlap)
        self._basis = torch.where(better[:, None, None], basis, self._basis)
        self._values = torch.where(better[:, None], values, self._values)
        self._dim = torch.where(better, dim, self._dim)

    def aligned(self) -> Eigenspace:
        """With a basis as near as may be to the one before."""
        seen = self._basis.mT @ self._before.basis  # [B, 2, 2]
        known = self._overlap >= 0
        left, _, right = torch.linalg.svd(torch.where(known[:, None, None], seen, 0.0))
        nearest = left @ right
        x, y = seen[:, 0, 0], seen[:, 1, 0]
        leading = torch.stack([torch.stack([x, -y], dim=1), torch.stack([y, x], dim=1)], dim=1)
        leading = leading / torch.hypot(x, y)[:, None, None]  # the first direction along what is left of the line
        basis = self._basis @ torch.where(self._line[:, None, None], leading, nearest)
        basis = torch.where((self._dim == 1)[:, None, None] & torch.tensor([False, True], device=x.device), 0.0, basis)
        overlap = torch.where(known, self._overlap.clamp(max=1.0), torch.nan)
        return Eigenspace(torch.where(known[:, None, None], basis, torch.nan), self._dim, self._values, overlap)


def _perpendicular(vectors: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Unit columns along what [B, S, j] has beside a unit direction [B, S], and whether it has anything."""
    rest = vectors
    for _ in range(2):
        rest = rest - direction[:, :, None] * (direction[:, None, :] @ rest)
    length = rest.norm(dim=1, keepdim=True)
    return rest / torch.where(length > 0, length, 1.0), length.squeeze(1) > 0


def _check_pairs(caller: str, pairs: object) -> None:
    if not isinstance(pairs, Eigenpairs):
        got = _lists.value_name(pairs)
        raise TypeError(f"{caller}: pairs must be Eigenpairs, as leading_eigenpairs(...) returns; got {got}.")
