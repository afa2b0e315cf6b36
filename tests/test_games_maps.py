"""Optimizers as maps of states, the Jacobians of these maps, and eigenspaces followed along a path."""

import cmath
import math

import pytest
import torch
from cases import F64, generator
from game_cases import ModuleGame, SmoothGame, dense_of
from torch import nn

import nestopt_ext as nx
from nestopt_ext import games
from nestopt_ext.games import (
    eigenspace,
    extragradient_map,
    leading_eigenpairs,
    leading_singular_pairs,
    lola_map,
    map_jacobian,
    momentum_map,
    sgd_map,
    track,
)
from nestopt_ext.games._golub_kahan import leading_triples


class Smooth(SmoothGame):
    """A game of three players, 9 numbers, with players."""

    def __init__(self, seed, batch=None):
        super().__init__(seed, batch)
        self._players = super().players()

    @property
    def players(self):
        return self._players


LR, MOMENTUM, TURNING = 0.02, -0.4, cmath.rect(0.7, 0.6)

MAPS = {
    "sgd": lambda game: sgd_map(game, LR),
    "extragradient": lambda game: extragradient_map(game, LR),
    "lola": lambda game: lola_map(game, LR),
    "momentum": lambda game: momentum_map(game, LR, MOMENTUM),
    "complex momentum": lambda game: momentum_map(game, LR, TURNING),
}


def sgd_like(params, momentum):
    return nx.ComplexSGD(params, lr=LR, momentum=momentum)


#: What plays the same steps: an optimizer for each player, and a direction.
RIVALS = {
    "sgd": (lambda params: torch.optim.SGD(params, lr=LR), None),
    "extragradient": (lambda params: nx.optim.ExtraSGD(params, lr=LR), None),
    "lola": (
        lambda params: torch.optim.SGD(params, lr=LR),
        lambda losses, players: games.lola(losses, players, lr=LR),
    ),
    "momentum": (lambda params: sgd_like(params, MOMENTUM), None),
    "complex momentum": (lambda params: sgd_like(params, TURNING), None),
}


@pytest.fixture(params=MAPS)
def name(request):
    return request.param


def gathered(players):
    flat = []
    for player in players:
        parts = player.values() if isinstance(player, dict) else player if isinstance(player, list) else [player]
        flat += [t.detach().reshape(-1) for t in parts]
    return torch.cat(flat)


# ---- steps -----------------------------------------------------------------------------------------------------------


def test_maps_step_as_the_optimizers_do(name):
    game = Smooth(0)
    step = MAPS[name](game)
    begin = state = step.start()
    for _ in range(3):
        state = step(state)
    optimizer, direction = RIVALS[name]
    games.simultaneous(game, optimizer, 3, direction=direction, record_every=None)
    assert (state - begin).abs().max() > 0.1
    torch.testing.assert_close(state[0, : step.num_parameters], gathered(game.players), rtol=1e-12, atol=1e-14)


def test_starts_are_independent_however_the_game_takes_them(name):
    """A game of 5 starts, the same game of one start mapped over 5, and one start after the other."""
    many, one = MAPS[name](Smooth(1, batch=5)), MAPS[name](Smooth(1))
    state = many.start()
    assert state.shape == (5, many.state_size)
    assert torch.equal(state[:, : many.num_parameters], many.game.start)
    for _ in range(2):
        each = torch.stack([one(row) for row in state])
        torch.testing.assert_close(one(state), each, rtol=1e-13, atol=1e-14)
        state = many(state)
        torch.testing.assert_close(state, each, rtol=1e-13, atol=1e-14)


def test_players_and_losses_of_a_state():
    game = Smooth(2, batch=3)
    step = momentum_map(game, 0.1, 0.5)
    state = step.start()
    assert state.shape == (3, 18)
    assert torch.equal(state[:, 9:], torch.zeros(3, 9, dtype=F64))
    players = step.players(state)
    assert isinstance(players[1], dict)
    assert players[0][0].shape == (3, 3, 1)
    assert torch.equal(step.start(players), state)
    assert step.players(state[0])[0][0].shape == (3, 1)
    for found, wanted in zip(step.losses(state), game.losses(game.players), strict=True):
        assert torch.equal(found, wanted)
    one = sgd_map(Smooth(2), 0.1)
    assert one.losses(one.start()[0])[0].shape == ()


def test_networks_are_stepped_without_being_touched():
    game = ModuleGame(0)
    before = [p.detach().clone() for m in (game.first, game.second) for p in m.parameters()]
    dense = game.dense()
    step = sgd_map(game, 0.1)
    state = step.start()
    wanted = state - 0.1 * dense.xi
    torch.testing.assert_close(step(state), wanted, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(step(state.repeat(3, 1)), wanted.repeat(3, 1), rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(
        map_jacobian(step, state).dense()[0], torch.eye(state.shape[1], dtype=F64) - 0.1 * dense.jacobian
    )
    after = [p for m in (game.first, game.second) for p in m.parameters()]
    assert all(p.is_leaf and p.grad is None and torch.equal(p, b) for p, b in zip(after, before, strict=True))


def test_a_game_that_is_a_module_itself():
    class Duel(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(1, 1, bias=False).double(), nn.Linear(1, 1, bias=False).double()

        @property
        def players(self):
            return self.left, self.right

        def losses(self, players):
            left, right = players
            value = left(torch.ones(1, dtype=F64)) * right.weight
            return value.sum(), -value.sum()

    step = sgd_map(Duel(), 0.5)
    assert step(torch.tensor([[1.0, 2.0]], dtype=F64)).tolist() == [[0.0, 2.5]]


def test_graphs_are_made_where_they_are_asked_for(name):
    step = MAPS[name](games.small_ipd())
    state = step.start(torch.randn(4, 2, dtype=F64))
    assert not step(state).requires_grad
    state.requires_grad_()
    assert step(state).requires_grad
    with torch.no_grad():
        assert not step(state).requires_grad


def test_maps_are_differentiable_to_second_order(name):
    step = MAPS[name](games.mix())
    state = torch.randn(2, step.state_size, dtype=F64, generator=generator(3)).requires_grad_()
    assert torch.autograd.gradcheck(step, state)
    assert torch.autograd.gradgradcheck(step, state)


def test_a_map_on_a_device(device):
    step = momentum_map(games.small_ipd(dtype=torch.float32, device=device), 1.0, 0.5)
    state = step.start(torch.zeros(3, 2))
    assert state.device.type == device.type
    assert map_jacobian(step, state).dense().isfinite().all()


# ---- Jacobians -------------------------------------------------------------------------------------------------------


def test_the_jacobian_of_descent_is_that_of_the_game():
    game = Smooth(3)
    found = map_jacobian(sgd_map(game, 0.1), game.start[None]).dense()[0]
    torch.testing.assert_close(found, torch.eye(9, dtype=F64) - 0.1 * dense_of(game).jacobian)


def test_the_jacobian_of_momentum_has_the_eigenvalues_of_the_linear_analysis():
    game = games.mixed(0.6)
    jacobian = map_jacobian(momentum_map(game, 0.3, TURNING), torch.zeros(1, 6, dtype=F64))
    found = leading_eigenpairs(jacobian).values[0]
    wanted = games.momentum_spectrum(torch.linalg.eigvals(game.jacobian()), 0.3, TURNING).flatten()
    for value in wanted:
        assert (found - value).abs().min() < 1e-8


def test_products_are_those_with_the_matrix_and_its_transpose(name):
    step = MAPS[name](Smooth(4, batch=3))
    state = 0.3 * torch.randn(3, step.state_size, dtype=F64, generator=generator(0))
    jacobian = map_jacobian(step, state)
    dense = jacobian.dense()
    each = [torch.autograd.functional.jacobian(lambda x: MAPS[name](Smooth(4))(x), row) for row in state]
    torch.testing.assert_close(dense, torch.stack(each), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(jacobian.value, step(state))
    v = torch.randn(3, step.state_size, 2, dtype=F64, generator=generator(1))
    torch.testing.assert_close(jacobian(v), dense @ v, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(jacobian.transpose(v), dense.mT @ v, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(jacobian(v[:, :, 0]), (dense @ v)[:, :, 0], rtol=1e-12, atol=1e-13)
    assert not jacobian(v).requires_grad
    assert (dense - dense.mT).abs().max() > 1e-3


def test_a_map_without_derivative_is_refused_and_a_constant_part_is_zero():
    state = torch.ones(2, 2, dtype=F64)
    with pytest.raises(ValueError, match="step must be differentiable in the state"):
        map_jacobian(lambda x: x.detach() * 2, state)
    jacobian = map_jacobian(lambda x: torch.cat([x[:, :1], torch.ones_like(x[:, 1:])], 1), state)
    assert jacobian.dense()[0].tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert jacobian(state).tolist() == [[1.0, 0.0]] * 2


class _Square(torch.autograd.Function):
    """Has no rule for vmap."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        if torch._C._functorch.is_legacy_batchedtensor(grad):
            raise RuntimeError("no rule")
        return 2 * x * grad


class _Drawn:
    """A game that is no function of its players."""

    def __init__(self, layer):
        self.players = [torch.nn.Sequential(torch.nn.Linear(2, 2), layer)]
        self.fails = False

    def losses(self, players):
        if self.fails:
            raise RuntimeError("its own")
        return [players[0](torch.ones(3, 2)).square().mean()]


@pytest.mark.parametrize("layer", [torch.nn.Dropout(), torch.nn.BatchNorm1d(2)])
def test_a_game_that_cannot_be_mapped_over_starts_says_what_to_do(layer):
    game = _Drawn(layer)
    step = games.sgd_map(game, 0.1)
    states = step.start().repeat(2, 1)
    with pytest.raises(RuntimeError, match=r"sgd_map: game\.losses must be a function of the players alone.*eval mode"):
        step(states)
    game.fails = True
    with pytest.raises(RuntimeError, match=r"^its own$"):
        step(states)
    game.fails = False
    game.players[0].eval()
    assert step(states).shape == states.shape


def test_operations_that_vmap_cannot_take_are_done_one_by_one():
    state = torch.tensor([[1.0, 2.0]], dtype=F64)
    jacobian = map_jacobian(_Square.apply, state)
    assert torch.equal(jacobian.dense()[0], torch.diag(2 * state[0]))
    assert torch.equal(jacobian(torch.eye(2, dtype=F64)[None])[0], torch.diag(2 * state[0]))


# ---- leading pairs ---------------------------------------------------------------------------------------------------


def linear(matrix):
    """The linear map of [B, S, S] or [S, S]; matrix vector products row by row."""
    return lambda x: (matrix @ x.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("which", ["largest_modulus", "largest_real", "smallest_real", "largest_imaginary"])
def test_eigenpairs_of_many_matrices(which):
    matrices = torch.randn(20, 5, 5, dtype=F64, generator=generator(2))
    found = leading_eigenpairs(matrices, 3, which=which)
    residual = matrices.to(torch.complex128) @ found.vectors - found.vectors * found.values[:, None, :]
    assert residual.abs().max() < 1e-12
    torch.testing.assert_close(found.vectors.norm(dim=1), torch.ones(20, 3, dtype=F64))
    for b in range(20):
        wanted = games.spectrum(matrices[b], 3, which=which)
        torch.testing.assert_close(found.values[b], wanted.eigenvalues[:3])
        torch.testing.assert_close(found.vectors[b], wanted.eigenvectors[:, :3])


def test_pairs_of_what_is_not_finite_are_nan_and_spare_the_others():
    matrices = torch.eye(3, dtype=F64).repeat(3, 1, 1)
    matrices[1, 0, 0] = math.nan
    for found in (leading_eigenpairs(matrices), leading_singular_pairs(matrices, 3)):
        assert found.values[1].isnan().all()
        assert found.values[[0, 2]].real.tolist() == [[1.0] * 3] * 2


def test_leading_eigenpairs_of_a_large_state_come_from_products():
    g = generator(3)
    factor = torch.linalg.qr(torch.randn(90, 90, dtype=F64, generator=g))[0]
    block = torch.diag(torch.linspace(0.0, 1.0, 90, dtype=F64))
    block[80:82, 80:82] = torch.tensor([[0.5, -2.0], [2.0, 0.5]], dtype=F64)
    block[82, 82] = -3.0
    matrix = factor @ block @ factor.T
    jacobian = map_jacobian(linear(matrix), torch.zeros(2, 90, dtype=F64))
    found = leading_eigenpairs(jacobian, 3)
    wanted = torch.tensor([-3.0, 0.5 + 2j, 0.5 - 2j], dtype=torch.complex128)
    torch.testing.assert_close(found.values, wanted.repeat(2, 1))
    residual = matrix.to(torch.complex128) @ found.vectors - found.vectors * found.values[:, None, :]
    assert residual.abs().max() < 1e-8


def test_searches_draw_on_the_cpu_whatever_the_default_device():
    stretch = torch.linspace(1, 2, 70, dtype=F64)
    state = torch.zeros(1, 70, dtype=F64)
    method = games.EigenRidges(num_directions=1, max_steps=1, step=0.1)
    with torch.device("meta"):
        pairs = leading_singular_pairs(map_jacobian(lambda x: x * stretch, state))
        found = games.ridge_rider(lambda w: -w.square().sum(1), state, method, max_depth=1, max_branches=1)
    assert pairs.values.item() == pytest.approx(2.0)
    assert found.branches[0].value.real == pytest.approx(-2.0)


def test_singular_pairs_of_many_matrices():
    matrices = torch.randn(7, 5, 5, dtype=F64, generator=generator(4))
    found = leading_singular_pairs(map_jacobian(linear(matrices), torch.zeros(7, 5, dtype=F64)), 2)
    torch.testing.assert_close(found.values, torch.linalg.svdvals(matrices)[:, :2])
    torch.testing.assert_close(matrices @ found.right, found.left * found.values[:, None, :])
    largest = found.right.gather(1, found.right.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()
    assert found.residuals.max() < 1e-13


def spread(values, seed):
    """A matrix with given singular values."""
    g = generator(seed)
    left, right = (torch.linalg.qr(torch.randn(len(values), len(values), dtype=F64, generator=g))[0] for _ in range(2))
    return left @ torch.diag(values) @ right.T


def test_singular_pairs_of_large_states_by_bidiagonalization():
    """One start with a gap, one with close values, one with a multiple value, and one that is zero."""
    values = torch.linspace(1.0, 0.0, 90, dtype=F64)
    gap, close, multiple = values.clone(), values.clone(), values.clone()
    gap[0], close[:2], multiple[:3] = 3.0, torch.tensor([2.0, 1.99], dtype=F64), 2.0
    matrices = torch.stack([spread(gap, 0), spread(close, 1), spread(multiple, 2), torch.zeros(90, 90, dtype=F64)])
    jacobian = map_jacobian(linear(matrices), torch.zeros(4, 90, dtype=F64))
    found = leading_singular_pairs(jacobian, 2)
    wanted = torch.stack([gap[:2], close[:2], multiple[:2], torch.zeros(2, dtype=F64)])
    torch.testing.assert_close(found.values, wanted, rtol=1e-10, atol=1e-14)
    assert found.converged
    assert 0 < found.num_products <= 400
    true = (matrices.mT @ found.left - found.values[:, None, :] * found.right).norm(dim=1)
    torch.testing.assert_close(found.residuals, true, rtol=1e-3, atol=1e-12)
    assert true.max() < 1e-10
    with pytest.warns(RuntimeWarning, match="must converge within max_products=8"):
        short = leading_singular_pairs(jacobian, 2, basis_size=3, max_products=8)
    assert not short.converged


def test_bidiagonalization_finds_every_copy_of_a_multiple_value():
    identity = torch.zeros(2, 30, dtype=F64)
    found = leading_triples(lambda v: 2 * v, lambda u: 2 * u, identity, 3, capacity=8, rtol=1e-10, max_products=100)
    torch.testing.assert_close(found.values, torch.full((2, 3), 2.0, dtype=F64))
    torch.testing.assert_close(found.right.mT @ found.right, torch.eye(3, dtype=F64).repeat(2, 1, 1))


# ---- eigenspaces along a path ----------------------------------------------------------------------------------------

TURN = torch.linalg.qr(torch.randn(4, 4, dtype=F64, generator=generator(9)))[0]


def path(b):
    """Eigenvalues 1 +- sqrt(b), which meet at b = 0, 0.5 and -0.8; neither normal nor aligned with the axes."""
    matrix = torch.diag(torch.tensor([1.0, 1.0, 0.5, -0.8], dtype=F64))
    matrix[0, 1], matrix[1, 0], matrix[0, 2], matrix[2, 3] = 1.0, b, 0.4, 0.3
    return TURN @ matrix @ TURN.T


#: Starts that run through the crossing at different places, one of them never.
PATHS = torch.stack([torch.linspace(-0.5, 0.5, 42), torch.linspace(-0.5, -0.1, 42), torch.linspace(-0.2, 1.0, 42)])


def invariance(matrices, basis):
    """How far the span of a basis is from being mapped into itself."""
    image = matrices @ basis
    return (image - basis @ (basis.mT @ image)).norm()


def test_a_plane_is_followed_through_the_crossing_of_a_conjugate_pair():
    matrices = [torch.stack([path(b) for b in column.tolist()]) for column in PATHS.T]
    pairs = leading_eigenpairs(matrices[0], which="largest_imaginary")
    space = eigenspace(pairs)
    assert space.dim.tolist() == [2, 2, 2]
    for after in matrices[1:]:
        old, space = space, track(leading_eigenpairs(after), space)
        assert invariance(after, space.basis) < 1e-7
        assert (space.overlap > 0.99).all()
        assert (space.basis - old.basis).norm() < 0.2
        torch.testing.assert_close(space.basis.mT @ space.basis, torch.eye(2, dtype=F64).repeat(3, 1, 1))
    assert space.dim.tolist() == [2, 2, 2]
    ends = PATHS[:, -1].to(torch.complex128).sqrt()
    for found, root in zip(space.values, ends, strict=True):
        wanted = torch.stack([1 + root, 1 - root])
        assert min((found - wanted).abs().max(), (found - wanted.flip(0)).abs().max()) < 1e-6


def test_a_line_keeps_its_sign_and_becomes_the_plane_of_the_pair_that_it_joins():
    matrices = [path(b)[None] for b in torch.linspace(0.5, -0.5, 42).tolist()]
    pairs = leading_eigenpairs(matrices[0], which="largest_real")
    space = eigenspace(pairs)
    assert space.dim.item() == 1
    assert torch.equal(space.basis[:, :, 1], torch.zeros(1, 4, dtype=F64))
    dims = []
    for matrix in matrices[1:]:
        old, space = space, track(leading_eigenpairs(matrix), space)
        assert (space.basis[0, :, 0] @ old.basis[0, :, 0]) > 0.9
        assert space.overlap > 0.9
        dims.append(space.dim.item())
    assert dims == sorted(dims)
    assert dims[0] == 1
    assert dims[-1] == 2
    assert invariance(matrices[-1], space.basis) < 1e-7
    assert space.values[0].imag.abs().min() > 0.5


def test_lines_are_told_apart_when_eigenvalues_change_places():
    turned = TURN[None]
    first = turned @ torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=F64)) @ turned.mT
    second = turned @ torch.diag(torch.tensor([1.0, 2.0, 3.0, 0.0], dtype=F64)) @ turned.mT
    space = eigenspace(leading_eigenpairs(first), 0)
    after = track(leading_eigenpairs(second), space)
    assert after.values[0, 0].real.item() == pytest.approx(1.0)
    assert after.overlap.item() == pytest.approx(1.0)
    torch.testing.assert_close(after.basis, space.basis)
    flipped = track(leading_eigenpairs(second), eigenspace(leading_eigenpairs(-first), 0))
    assert flipped.overlap.item() == pytest.approx(1.0)


@pytest.mark.parametrize("angle", [0.3, 1.2, 2.0])
def test_the_plane_that_a_line_becomes_begins_along_the_line(angle):
    line = torch.tensor([math.cos(angle), math.sin(angle), 0.0], dtype=F64)
    turn = torch.tensor([[[0.0, -2.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 1.0]]], dtype=F64)
    before = eigenspace(leading_eigenpairs((torch.eye(3, dtype=F64) + torch.outer(line, line))[None]))
    space = track(leading_eigenpairs(turn), before)
    torch.testing.assert_close(space.basis[0, :, 0], before.basis[0, :, 0])
    assert space.dim.item() == 2


def test_a_space_that_is_lost_says_so():
    space = eigenspace(leading_eigenpairs(torch.diag(torch.tensor([2.0, 1.0], dtype=F64)).repeat(2, 1, 1)))
    turned = torch.tensor([[1.5, 0.5], [0.5, 1.5]], dtype=F64)
    found = track(leading_eigenpairs(torch.stack([turned, torch.full((2, 2), math.nan, dtype=F64)])), space)
    assert found.overlap[0].item() == pytest.approx(0.5**0.5)
    assert found.overlap[1].isnan()
    assert found.basis[1].isnan().all()


# ---- bad arguments ---------------------------------------------------------------------------------------------------

STATE = torch.zeros(2, 2, dtype=F64)
DIAGONAL = torch.eye(2, dtype=F64)[None]


@pytest.mark.parametrize("make", [sgd_map, extragradient_map, lola_map, lambda game, lr: momentum_map(game, lr, 0.5)])
def test_a_learning_rate_in_a_tensor_leaves_the_dtype(make):
    step = make(games.small_ipd(dtype=torch.float32), torch.ones(1, dtype=F64))
    assert step(step.start(torch.zeros(1, 2))).dtype == torch.float32


BAD = [
    (lambda: sgd_map(3, 0.1), TypeError, "sgd_map: game must have players and losses"),
    (lambda: sgd_map(games.small_ipd(), -1.0), ValueError, "sgd_map: lr must be finite and >= 0"),
    (lambda: momentum_map(games.small_ipd(), 0.1, 1.0), ValueError, "momentum_map: momentum must have modulus below 1"),
    (lambda: lola_map(games.small_ipd(), math.nan), ValueError, "lola_map: lr must be finite"),
    (lambda: extragradient_map(games.small_ipd(), None), TypeError, "extragradient_map: lr must be a number"),
    (lambda: sgd_map(games.small_ipd(), 1.0)(STATE[:, :1]), ValueError, r"state must have shape \(B, 2\) or \(2,\)"),
    (lambda: sgd_map(games.small_ipd(), 1.0)(STATE[:0]), ValueError, r"state must have shape \(B, 2\) or \(2,\)"),
    (lambda: sgd_map(games.small_ipd(), 1.0)(STATE.float()), TypeError, "state must be float64 on cpu"),
    (lambda: sgd_map(games.small_ipd(), 1.0)([0.0]), TypeError, "state must be a tensor; got list"),
    (lambda: sgd_map(games.small_ipd(), 1.0).start(STATE[:, :1]), ValueError, r"players must have shape \(B, 2\)"),
    (lambda: sgd_map(Smooth(0, batch=3), 0.1).start([1]), TypeError, "players must be a list or tuple"),
    (lambda: map_jacobian(3, STATE), TypeError, "step must be a map from state to state"),
    (lambda: map_jacobian(lambda x: x, STATE[0]), ValueError, r"state must have shape \(B, S\)"),
    (lambda: map_jacobian(lambda x: x, STATE.long()), TypeError, "state must be float32 or float64"),
    (lambda: map_jacobian(lambda x: x[:1], STATE), ValueError, r"step must return a tensor like the state, \(2, 2\)"),
    (lambda: map_jacobian(lambda x: 3, STATE), TypeError, "step must return a tensor like the state; got int"),
    (lambda: map_jacobian(lambda x: x, STATE)(STATE[0]), ValueError, r"v must have shape \(2, 2\)"),
    (lambda: map_jacobian(lambda x: x, STATE)(STATE[:, :, None][:, :, :0]), ValueError, r"v must have shape \(2, 2\)"),
    (lambda: map_jacobian(lambda x: x, STATE).transpose(3), TypeError, "u must be a tensor"),
    (lambda: leading_eigenpairs(DIAGONAL[0]), ValueError, r"jacobian must have shape \(B, S, S\)"),
    (lambda: leading_eigenpairs(DIAGONAL, 3), ValueError, "k must be between 1 and 2"),
    (lambda: leading_eigenpairs(DIAGONAL, which="largest"), ValueError, "which must be one of"),
    (lambda: leading_singular_pairs("J"), TypeError, "jacobian must be a MapJacobian or a tensor"),
    (lambda: leading_singular_pairs(DIAGONAL, 0), ValueError, "k must be between 1 and 2"),
    (lambda: eigenspace(DIAGONAL), TypeError, "eigenspace: pairs must be Eigenpairs"),
    (lambda: eigenspace(leading_eigenpairs(DIAGONAL), 2), ValueError, "index must be between 0 and 1"),
    (lambda: track(leading_eigenpairs(DIAGONAL), DIAGONAL), TypeError, "space must be an Eigenspace"),
]


@pytest.mark.parametrize(("make", "kind", "message"), BAD)
def test_bad_arguments_are_refused_by_name(make, kind, message):
    with pytest.raises(kind, match=message):
        make()
