"""Faults that were published, or reproduced, in packages of this field; each as a test of ours.

Where a number is quoted, it is the relative error of the faulty package on the same kind of problem.
"""

import warnings

import pytest
import torch
from cases import F64, PROBLEMS, leaf, normal, quadratic, relative_error, spd
from helpers import same_bits

import nestopt_ext as nx
from nestopt_ext import games
from nestopt_ext.solvers import ConjugateGradient, Exact, FixedPoint, Neumann, Nystrom, Status, solve

A, V = spd(1, 8, 8.5), normal(2, 8)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_conjugate_gradients_return_the_iterate_that_converged(dtype):
    """Two packages return the iterate before it: 0 for 2 x = 3."""
    solution = solve(lambda x: 2 * x, torch.tensor(3.0, dtype=dtype), ConjugateGradient())
    assert solution.value == 1.5 and solution.status is Status.converged
    assert relative_error(solve(lambda x: A @ x, V, ConjugateGradient(100)).value, torch.linalg.solve(A, V)) < 1e-5


def test_conjugate_gradients_use_the_new_residual():
    """0.93 where the direction is updated with the old one."""
    solution = solve(lambda x: A @ x, V, ConjugateGradient(8, rtol=0.0))
    assert relative_error(solution.value, torch.linalg.solve(A, V)) < 1e-12


@pytest.mark.parametrize("scale", [1e-3, 0.1, 10.0, 1e4])
def test_a_scaled_curvature_gives_a_scaled_solution(scale):
    """8.0 where the scale enters the step and not the residual."""
    plain = solve(lambda x: A @ x, V, ConjugateGradient(8, rtol=0.0)).value
    scaled = solve(lambda x: scale * (A @ x), V, ConjugateGradient(8, rtol=0.0)).value
    assert relative_error(scale * scaled, plain) < 1e-12


def test_two_variables_in_float32_converge_and_stay():
    """NaN where the iteration goes on dividing after it has converged."""
    diagonal = torch.tensor([2.0, 5.0])
    for iterations in (2, 3, 10, 50):
        solution = solve(lambda x: diagonal * x, torch.tensor([1.0, -3.0]), ConjugateGradient(iterations, rtol=0.0))
        torch.testing.assert_close(solution.value, torch.tensor([0.5, -0.6]), rtol=1e-6, atol=0)


def test_a_nystrom_sketch_of_full_rank_is_the_damped_inverse():
    wanted = torch.linalg.solve(A + 0.1 * torch.eye(8, dtype=F64), V)
    assert relative_error(solve(lambda x: A @ x, V, Nystrom(rank=8, damping=0.1)).value, wanted) < 1e-10


def test_a_series_counts_its_terms_in_one_way():
    """One package sums a term less in its dense form than in its matrix-free form."""
    for terms in (0, 1, 4):
        dense = sum(torch.linalg.matrix_power(torch.eye(8, dtype=F64) - 0.5 * A, j) for j in range(terms + 1)) @ V / 2
        assert relative_error(nx.neumann_ihvp(lambda x: A @ x, V, num_terms=terms, alpha=0.5), dense) < 1e-14
        steps = solve(lambda x: 0.5 * (A @ x), 0.5 * V, FixedPoint(max_iters=terms + 1, rtol=0.0)).value
        assert relative_error(steps, dense) < 1e-14


@pytest.mark.parametrize(
    "solver", [Neumann(3, 0.5), ConjugateGradient(5), FixedPoint(5), Exact(), Nystrom(2, damping=0.1)]
)
@pytest.mark.parametrize("where", ["outer", "inner"])
def test_nan_stays_nan(where, solver):
    """One package turns NaN in a gradient into zero."""
    bad = torch.tensor([1.0, float("nan")], dtype=F64)
    good = torch.ones(2, dtype=F64)
    w, h = leaf(good), leaf(good)
    inner = (0.5 * (bad if where == "inner" else good) * w.square() - w * h).sum()
    outer = (w.square() * (bad if where == "outer" else good)).sum()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (found,) = nx.hypergradient(outer, inner, w, h, solver=solver)
    assert found.isnan().any()


class _Fault(Exception):
    pass


@pytest.mark.parametrize("fault", [False, True])
def test_weights_and_everything_else_are_restored_bit_for_bit(fault):
    """Packages that move the weights to differentiate leave them a rounding off."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(5, 6), torch.nn.BatchNorm1d(6), torch.nn.Dropout(0.5), torch.nn.Linear(6, 1)
    )
    h = torch.zeros((), requires_grad=True)
    x = torch.randn(9, 5)

    def inner():
        loss = model(x).square().mean() + h.exp() * sum(p.square().sum() for p in model.parameters())
        if fault:
            raise _Fault
        return loss

    def outer():
        return model(x).mean()

    def criterion(outputs, targets):
        inner()
        return (outputs - targets).square().mean()

    before = {k: t.clone() for k, t in model.state_dict().items()}
    state = torch.get_rng_state()
    params = list(model.parameters())
    ones = [torch.ones_like(p) for p in params]
    calls = [
        lambda: nx.hypergradient(outer, inner, params, h, solver=Neumann(3, 1e-3)),
        lambda: nx.Hessian(inner, params, mode="forward-over-reverse")(ones),
        lambda: nx.GaussNewton(model, criterion, x, x[:, :1], params)(ones),
    ]
    for call in calls:
        if fault:
            with pytest.raises(_Fault):
                call()
        else:
            call()
        assert all(same_bits(t, before[k]) for k, t in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), state)
        assert all(p.grad is None for p in [*params, h])


@pytest.mark.parametrize("name", PROBLEMS)
def test_conjugate_gradients_reach_the_closed_form(name):
    """1e-3 to 8.0 in three packages."""
    problem = PROBLEMS[name]()
    outer, inner = problem.losses()
    solver = ConjugateGradient(60, rtol=1e-13)
    found = nx.hypergradient(outer, inner, problem.params, problem.hparams, solver=solver)
    assert relative_error(found, problem.hypergradient) < 1e-9


def test_competitive_gradients_of_players_of_one_element():
    """One package crashes on them."""
    players = [leaf(torch.tensor([1.0], dtype=F64)), leaf(torch.tensor([2.0], dtype=F64))]
    product = (players[0] * players[1]).sum()
    x, y = games.cgd([product, -product], players, lr=0.5)
    # (I + a J_off)^-1 xi, with xi = (y, -x) = (2, -1) and J_off = [[0, 1], [-1, 0]]
    wanted = torch.linalg.solve(
        torch.tensor([[1.0, 0.5], [-0.5, 1.0]], dtype=F64), torch.tensor([2.0, -1.0], dtype=F64)
    )
    torch.testing.assert_close(torch.cat([x, y]), wanted)


def test_unused_hyperparameters_get_zeros_everywhere():
    problem = quadratic()
    unused = leaf(normal(9, 3))
    outer, inner = problem.losses()
    for solver in (Neumann(3), ConjugateGradient(3), Exact()):
        found = nx.hypergradient(outer, inner, problem.params, [*problem.hparams, unused], solver=solver)
        assert found[1].shape == (3,) and found[1].abs().max() == 0
