"""Ridges of symmetric saddles counted by groups, and ends told from saddles by bounds of the lowest eigenvalue."""

import math
import warnings

import pytest
import torch
from cases import F64, generator

from nestopt_ext.games import EigenRidges, map_jacobian, ridge_rider
from nestopt_ext.games._lanczos import lowest_eigenvalue, lowest_pairs


def rotation(size, seed=0):
    return torch.linalg.qr(torch.randn(size, size, dtype=F64, generator=generator(seed)))[0]


def saddle(curvatures, dtype=F64):
    """A loss whose Hessian at 0 has these eigenvalues, along rotated axes; only the first direction ever rises."""
    curvatures = torch.tensor(curvatures, dtype=dtype)
    axes = rotation(len(curvatures)).to(dtype)

    def loss(w):
        v = w @ axes
        return v.square() @ curvatures / 2 + v[:, 0] ** 4 / 4

    return loss, axes


def linear(matrix):
    """Products with a matrix as the Jacobian of a map, at two starts."""
    return map_jacobian(lambda x: x @ matrix.T, torch.zeros(2, len(matrix), dtype=matrix.dtype))


def with_eigenvalues(values, seed=0):
    axes = rotation(len(values), seed)
    return axes @ torch.diag(values) @ axes.T


# ---- repeated eigenvalues -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "dtype"), [(12, F64), (80, F64), (80, torch.float32), (300, F64)])
def test_directions_count_groups_of_equal_eigenvalues(size, dtype):
    """-1 three times, -0.7 twice, -0.4 three times: as many of each as symmetries make."""
    repeated = [-1.0] * 3 + [-0.7] * 2 + [-0.4] * 3
    loss, axes = saddle(repeated + torch.linspace(0.5, 2, size - len(repeated)).tolist(), dtype)
    for most, wanted in ((1, [-1.0]), (2, [-1.0, -0.7]), (3, [-1.0, -0.7, -0.4]), (5, [-1.0, -0.7, -0.4])):
        method = EigenRidges(num_directions=most, max_steps=1, min_curvature=1e-3)
        found = ridge_rider(loss, torch.zeros(size, dtype=dtype), method, max_depth=1)
        assert [b.rank for b in found.branches] == [rank for rank in range(len(wanted)) for _ in range(2)]
        assert [v.real for v in found.bifurcations[0].values] == pytest.approx(wanted, abs=1e-4)
        for branch, value in zip(found.branches[::2], wanted, strict=True):
            inside = torch.tensor([abs(v - value) < 1e-3 for v in repeated])
            assert float((branch.direction @ axes)[: len(repeated)][inside].norm()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("size", [12, 80])
def test_all_of_a_group_are_as_many_directions(size):
    loss, _ = saddle([-1.0] * 3 + [-0.5] + torch.linspace(0.5, 2, size - 4).tolist())
    method = EigenRidges(num_directions=2, max_steps=1, min_curvature=1e-3, repeated="all")
    found = ridge_rider(loss, torch.zeros(size, dtype=F64), method, max_depth=1)
    assert [v.real for v in found.bifurcations[0].values] == pytest.approx([-1.0, -1.0], abs=1e-6)
    assert abs(float(found.branches[0].direction @ found.branches[2].direction)) < 1e-6


def test_lowest_pairs_are_those_of_the_matrix():
    values = torch.cat([torch.tensor([-2.0, -1.5, -1.5, -1.0]), torch.linspace(-0.3, 3, 196)]).to(F64)
    matrix = with_eigenvalues(values)
    pairs = lowest_pairs(linear(matrix), 3, equal=1e-6, rtol=1e-10, max_products=500)
    torch.testing.assert_close(pairs.values.real, torch.tensor([[-2.0, -1.5, -1.0]] * 2, dtype=F64))
    vectors = pairs.vectors.real[0]
    torch.testing.assert_close(matrix @ vectors, vectors * pairs.values.real[0])
    few = lowest_pairs(linear(matrix), 3, equal=1e-6, rtol=1e-10, max_products=10)
    assert bool((few.values.real >= -2).all())  # Rayleigh quotients


# ---- minima and saddles ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("lowest", [-0.2, -0.01, 0.0, 0.3])
def test_bounds_hold_the_lowest_eigenvalue(lowest, seed):
    values = torch.linspace(lowest, 2, 400, dtype=F64)
    jacobian = linear(with_eigenvalues(values, seed))
    for limit in (-0.1, 0.2):
        low, high = lowest_eigenvalue(jacobian, limit, 200)[0].tolist()
        assert low <= lowest <= high + 1e-12
        assert (low >= limit) if lowest >= limit else (high < limit)  # no limit is nearer than the products resolve


def test_bounds_of_what_they_cannot_decide_are_as_tight_as_promised():
    values = torch.linspace(0, 2, 400, dtype=F64)
    low, high = lowest_eigenvalue(linear(with_eigenvalues(values)), -1e-9, 100)[0].tolist()
    share = (math.log(1.648 * 20 / 1e-3) / 199) ** 2
    assert low < -1e-9 < high
    assert high - low == pytest.approx(2 * share / (1 - 2 * share), rel=0.01)


@pytest.mark.parametrize(
    ("values", "lowest"),
    [(torch.full((300,), 0.5), 0.5), (torch.cat([torch.full((299,), 1.0), torch.tensor([-1.0])]), -1.0)],
)
def test_an_invariant_space_decides(values, lowest):
    bounds = lowest_eigenvalue(linear(torch.diag(values.to(F64))), lowest, 50)
    torch.testing.assert_close(bounds, torch.full((2, 2), lowest, dtype=F64))


def test_a_start_that_overflows_leaves_the_others_alone():
    matrix = with_eigenvalues(torch.linspace(-1, 2, 300, dtype=F64))
    start = torch.zeros(2, 300, dtype=F64)
    start[1] = 1e200
    jacobian = map_jacobian(lambda x: x @ matrix.T + x.square().square().square(), start)
    bounds = lowest_eigenvalue(jacobian, 0.0, 50)
    assert bool(bounds[1].isnan().all()) and -1 - 1e-9 <= float(bounds[0, 1]) < 0
    pairs = lowest_pairs(jacobian, 1, equal=1e-6, rtol=1e-6, max_products=200)
    assert bool(pairs.values[1].isnan().all()) and float(pairs.values[0, 0].real) == pytest.approx(-1)


def ridden(size, flat, **options):
    """A well along the first direction; the eigenvalues beside it are from ``flat`` to 1 all along."""
    loss, _ = saddle([-1.0, *torch.linspace(flat, 1, size - 1).tolist()])
    method = EigenRidges(**{"step": 0.1, "num_directions": 1, "finish": 0.3, "finish_steps": 100, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return ridge_rider(loss, torch.zeros(size, dtype=F64), method, max_depth=1)


@pytest.mark.parametrize(("size", "known"), [(3, True), (100, True), (300, False)])
def test_ends_say_how_sure_it_is_that_they_are_minima(size, known):
    found = ridden(size, 0.3, min_curvature=1e-3)
    assert len(found.solutions) == 2
    for branch in found.branches:
        low, high = branch.curvature
        assert low == high == pytest.approx(0.3) if known else -1e-3 <= low < 0.3 <= high
    assert "curvature" in found.table()


def test_an_end_that_is_undecided_counts_as_a_minimum_and_says_so():
    found = ridden(300, 0.0, search_products=50)
    assert len(found.solutions) == 2
    assert all(branch.curvature[0] < -1e-6 <= branch.curvature[1] for branch in found.branches)


@pytest.mark.parametrize("size", [3, 300])
def test_an_end_with_curvature_left_is_no_solution(size):
    found = ridden(size, -0.1, min_curvature=1e-2)
    assert found.solutions == []
    assert all(branch.curvature[1] < -1e-2 for branch in found.branches)


# ---- games of several players ---------------------------------------------------------------------------------------


class Plane:
    """Two players of ``size`` parameters each, x and y, pulled apart along the first of them, else drawn to 0."""

    def __init__(self, size, repeats=1):
        self.players = [torch.zeros(1, size, dtype=F64, requires_grad=True) for _ in range(2)]
        self.pull = torch.linspace(0.5, 2, size, dtype=F64)
        self.pull[:repeats] = -1.0

    def losses(self, players):
        x, y = players
        turn = 0.1 * (x * y)[:, -1]
        return [(self.pull * x.square()).sum(1) / 2 + turn, (2 * y.square()).sum(1) / 2 - turn]


@pytest.mark.parametrize("size", [40, 120])
def test_ridges_of_a_large_game_count_groups_too(size):
    game = Plane(size, repeats=3)
    game.pull[3] = -0.5
    method = EigenRidges(num_directions=2, max_steps=3, min_curvature=1e-2)
    found = ridge_rider(game, None, method, max_depth=1)
    assert [v.real for v in found.bifurcations[0].values] == pytest.approx([-1.0, -0.5])
    assert all(b.curvature[0] == b.curvature[1] == pytest.approx(-1) for b in found.branches)


def test_a_search_that_finds_rough_ridges_alone_says_what_to_do():
    game = Plane(40)
    game.pull[:] = 10000 * torch.linspace(0, 1, 40, dtype=F64) ** 6 - 1  # crowded below
    with pytest.warns(RuntimeWarning, match="ridges must be eigenvectors; got .* Lower num_directions"):
        ridge_rider(game, None, EigenRidges(num_directions=3, max_steps=1, repeated="all"), max_depth=1)
