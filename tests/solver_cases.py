"""Operators and matvecs that count, for the tests of the solvers."""

import torch
from cases import F64, Problem, flat, values

from nestopt_ext import _lists
from nestopt_ext._low_rank import explicit
from nestopt_ext._operator import LinearOperator


class Counted:
    """A matvec that counts its calls."""

    def __init__(self, function):
        self.function = function
        self.calls = 0

    def __call__(self, v):
        self.calls += 1
        return self.function(v)


def on_structure(matrix, like):
    """A dense matrix as a matvec on tensors like ``like``."""
    structure = _lists.flatten("test", "like", like)[1]
    shapes = [t.shape for t in values(like)]

    def product(v):
        found = matrix @ flat(v).to(matrix.dtype)
        parts = found.split([s.numel() for s in shapes])
        return structure.pack([p.reshape(s).to(t.dtype) for p, s, t in zip(parts, shapes, values(v), strict=True)])

    return product


def right_side(problem: Problem, seed: int = 5):
    """Normal random numbers in the structure of the params."""
    flat_params, structure = _lists.flatten("test", "params", problem.params)
    generator = torch.Generator().manual_seed(seed)
    return structure.pack([torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in flat_params])


class DenseOperator(LinearOperator):
    """A symmetric matrix as an operator, which offers what it is told to."""

    def __init__(self, matrix, params, *, inverse=False, low_rank=None, series=False, eigenvalue=False):
        super().__init__(*_lists.flatten("DenseOperator", "params", params))
        self.matrix = matrix
        self.products = 0
        self.batches = 0
        self._inverse = inverse
        self._low_rank = low_rank
        self._series = series
        self._eigenvalue = eigenvalue

    def __call__(self, v):
        raise AssertionError("a solver multiplies by flat_product")

    def _rows(self, v):
        return torch.cat([_lists.rows(t) for t in v], dim=1)

    def _lists(self, rows):
        parts = rows.split([p.numel() for p in self.flat_params], dim=1)
        return [part.reshape(len(rows), *p.shape).to(p.dtype) for part, p in zip(parts, self.flat_params, strict=True)]

    def flat_product(self, v):
        self.products += 1
        return [t[0] for t in self._lists(self._rows([t.unsqueeze(0) for t in v]) @ self.matrix.T)]

    def flat_products(self, v):
        self.products += len(v[0])
        self.batches += 1
        return self._lists(self._rows(v) @ self.matrix.T)

    def flat_inverse(self, v, damping):
        if not self._inverse:
            return None
        return self._lists(torch.linalg.solve(self.damped(damping), self._rows(v).T).T)

    def flat_low_rank(self):
        if self._low_rank is None:
            return None
        rows, weights, diagonal = self._low_rank
        split = self._lists(rows)
        return explicit(split, weights, None if diagonal is None else [t[0] for t in self._lists(diagonal[None])])

    def flat_series(self, v, num_terms, alpha, damping):
        if not self._series:
            return None
        rows = self._rows([t.unsqueeze(0) for t in v])[0]
        values_, vectors = torch.linalg.eigh(self.damped(damping))
        powers = [(1 - alpha * values_) ** j for j in range(num_terms + 1)]
        inside = vectors.T @ rows
        total = vectors @ (alpha * sum(powers) * inside)
        return [t[0] for t in self._lists(total[None])], torch.stack([(p * inside).square().sum() for p in powers])

    def largest_eigenvalue(self):
        return torch.linalg.eigvalsh(self.matrix)[-1] if self._eigenvalue else None

    def damped(self, damping):
        return self.matrix + damping * torch.eye(len(self.matrix), dtype=self.matrix.dtype)


def as_low_rank(matrix):
    """A positive definite matrix as rows, weights and a diagonal."""
    values_, vectors = torch.linalg.eigh(matrix)
    shift = values_[0] / 2
    return vectors.T.contiguous(), values_ - shift, torch.full((len(matrix),), float(shift), dtype=F64)


def rows_of(low):
    """The rows of a matrix of low rank, [r, P] in float64."""
    return torch.cat([_lists.rows(t) for t in low.lift(torch.eye(len(low.weights), dtype=F64))], dim=1)


def matrix_of(low):
    """A matrix of low rank, written out in float64."""
    rows = rows_of(low)
    matrix = (rows.T * low.weights.double()) @ rows
    return matrix if low.diagonal is None else matrix + torch.diag(flat(low.diagonal).double())
