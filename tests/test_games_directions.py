"""The corrected directions, against their formulas written out with explicit Jacobian blocks."""

import math
import warnings

import pytest
import torch
from cases import F64, normal
from game_cases import Dense, ModuleGame, SmoothGame, dense_of

from nestopt_ext import games
from nestopt_ext.games import parameters
from nestopt_ext.games._players import dot

TOL = {"rtol": 1e-10, "atol": 1e-11}


def flat(parts):
    return torch.cat([t.reshape(-1) for part in parts for t in parameters(part)])


# ---- the formulas, dense ---------------------------------------------------------------------------------------------


def consensus(d: Dense, gamma=1.0):
    return d.xi + gamma * d.jacobian.T @ d.xi


def sga_sign(d: Dense):
    antisymmetric = (d.jacobian - d.jacobian.T) / 2
    ascent = d.jacobian.T @ d.xi
    return torch.sign((d.xi @ ascent) * ((antisymmetric.T @ d.xi) @ ascent) / len(d.xi) + 0.1)


def sga(d: Dense, lam="aligned"):
    antisymmetric = (d.jacobian - d.jacobian.T) / 2
    return d.xi + (sga_sign(d) if lam == "aligned" else lam) * antisymmetric.T @ d.xi


def lookahead(d: Dense, lr):
    return d.xi - lr * d.off_diagonal @ d.xi


def lola(d: Dense, lr):
    return lookahead(d, lr) - lr * d.chi


def sos_parts(d: Dense, lr, a=0.5, b=0.1):
    """p1 and p2."""
    ahead = lookahead(d, lr)
    s = -lr * d.chi @ ahead
    p1 = 1.0 if s >= 0 else min(1.0, float(-a * ahead.norm() ** 2 / s))
    p2 = float(d.xi.norm() ** 2) if d.xi.norm() < b else 1.0
    return p1, p2


def sos(d: Dense, lr, a=0.5, b=0.1):
    return lookahead(d, lr) - min(sos_parts(d, lr, a, b)) * lr * d.chi


def cgd(d: Dense, lr):
    return torch.linalg.solve(torch.eye(len(d.xi), dtype=F64) + lr * d.off_diagonal, d.xi)


CASES = [
    (games.consensus, consensus, {}),
    (games.consensus, consensus, {"gamma": 10.0}),
    (games.sga, sga, {}),
    (games.sga, sga, {"lam": 0.7}),
    (games.lookahead, lookahead, {"lr": 0.3}),
    (games.lola, lola, {"lr": 0.3}),
    (games.sos, sos, {"lr": 0.3}),
    (games.sos, sos, {"lr": 0.03, "a": 0.9, "b": 0.5}),
    (games.cgd, cgd, {"lr": 0.05}),
    (games.cgd, cgd, {"lr": 0.3}),
]
IDS = [f"{f.__name__}-{'-'.join(map(str, k.values()))}" for f, _, k in CASES]
#: cgd is a solve, here to near the end of float64; the others are formulas.
SOLVE = {"max_iters": 200, "rtol": 1e-13}


def options(function, keywords):
    return {**keywords, **(SOLVE if function is games.cgd else {})}


@pytest.mark.parametrize(("function", "formula", "keywords"), CASES, ids=IDS)
@pytest.mark.parametrize("seed", range(3))
def test_three_players_of_several_tensors(function, formula, keywords, seed):
    game = SmoothGame(seed)
    players = game.players()
    found = function(game.losses(players), players, **options(function, keywords))
    assert [type(part) for part in found] == [list, dict, torch.Tensor]
    torch.testing.assert_close(flat(found), formula(dense_of(game), **keywords), **TOL)
    assert all(t.grad is None for player in players for t in parameters(player))


@pytest.mark.parametrize(("function", "formula", "keywords"), CASES, ids=IDS)
def test_modules(function, formula, keywords):
    game = ModuleGame(3)
    found = function(game.losses(game.players), game.players, **options(function, keywords))
    torch.testing.assert_close(flat(found), formula(game.dense(), **keywords), **TOL)


@pytest.mark.parametrize(("function", "formula", "keywords"), CASES, ids=IDS)
def test_batched_starts_are_independent_games(function, formula, keywords):
    game = SmoothGame(11, batch=6, scale=0.7)
    game.start[0] *= 1e-3  # starts of unlike size: what one start needs must not leak into another
    game.start[1] *= 4
    players = game.players()
    found = function(game.losses(players), players, **options(function, keywords))
    found = torch.cat([t.reshape(6, -1) for part in found for t in parameters(part)], dim=1)
    for b in range(6):
        torch.testing.assert_close(found[b], formula(dense_of(game, game.start[b]), **keywords), **TOL)


# ---- the branches ----------------------------------------------------------------------------------------------------


def at(game, start):
    players = game.players(start)
    return game.losses(players), players, dense_of(game, start)


def test_sos_takes_every_branch():
    """p = 1, p from the angle, and p from the size of the gradient, each where the dense formula says so."""
    seen = set()
    for seed in (0, 22, 23):
        game = SmoothGame(seed)
        losses, players, dense = at(game, game.start)
        p1, p2 = sos_parts(dense, 0.3)
        assert p2 == 1
        seen.add("free" if p1 == 1 else "bounded")
        torch.testing.assert_close(flat(games.sos(losses, players, lr=0.3)), sos(dense, 0.3), **TOL)
    assert seen == {"free", "bounded"}
    m = normal(0, 3, 2)
    near = games.bilinear(m, start=(0.01 * normal(1, 3), 0.01 * normal(2, 2)))
    w = torch.cat([p.detach() for p in near.players])
    dense = Dense.of([lambda w, s=s: s * (w[:3] @ m @ w[3:]) for s in (1, -1)], w, (3, 2))
    p1, p2 = sos_parts(dense, 0.3)
    assert p2 < min(p1, 0.01)
    torch.testing.assert_close(flat(games.sos(near.losses(near.players), near.players, lr=0.3)), sos(dense, 0.3), **TOL)


def test_sga_aligns_with_both_signs():
    signs = {float(sga_sign(dense_of(SmoothGame(seed)))) for seed in range(6)}
    assert signs == {-1.0, 1.0}
    for seed in range(6):
        losses, players, dense = at(SmoothGame(seed), SmoothGame(seed).start)
        torch.testing.assert_close(flat(games.sga(losses, players)), sga(dense), **TOL)


@pytest.mark.parametrize(("curvature", "sign"), [(0.15, 1.0), (0.25, -1.0)])
def test_sga_adds_a_tenth_to_the_mean_product(curvature, sign):
    """With J = [[-c, 1], [-1, -c]] and |xi| = 1 the inner products are -c and 1, and d = 2: sign(0.1 - c / 2)."""
    jacobian = torch.tensor([[-curvature, 1], [-1, -curvature]], dtype=F64)
    x, y = (v.clone().requires_grad_() for v in torch.linalg.inv(jacobian)[:, 0])  # so that xi = (1, 0)
    losses = [x * y - curvature * x**2 / 2, -x * y - curvature * y**2 / 2]
    torch.testing.assert_close(flat(games.sga(losses, [x, y])), torch.tensor([1.0, sign], dtype=F64), **TOL)


@pytest.mark.parametrize(("size", "p"), [(0.11, 1.0), (0.09, 0.09**2)])
def test_sos_fades_out_where_the_norm_is_below_b(size, p):
    x, y = (torch.tensor(v, dtype=F64, requires_grad=True) for v in (0.0, size))
    wanted = torch.tensor([size, 0.5 * size + p * 0.5 * size], dtype=F64)  # xi + lr (x, y) + p lr (x, y)
    torch.testing.assert_close(flat(games.sos([x * y, -x * y], [x, y], lr=0.5)), wanted, **TOL)


def test_inner_products_keep_the_digits_of_the_widest_dtype():
    single, double = torch.ones(1), torch.full((1,), 1e-5, dtype=F64)
    assert dot([single, double], [single, double], None).item() == 1 + 1e-10


# ---- definitions -----------------------------------------------------------------------------------------------------


def own_gradient_after_others_step(game, w, i, lr, through):
    """The gradient of L_i(w_i, w_-i - lr xi_-i) in w_i; ``through`` says whether the others' step depends on w_i."""
    owner = dense_of(game).owner

    def value(w):
        xi = torch.stack([torch.func.grad(lambda w, j=j: game.flat_loss(j, w))(w) for j in range(3)])
        step = xi[owner, torch.arange(9)] * (owner != i)
        return game.flat_loss(i, w - lr * (step if through else step.detach()))

    w = w.clone().requires_grad_()
    (grad,) = torch.autograd.grad(value(w), w)
    return grad[owner == i]


@pytest.mark.parametrize(("function", "through"), [(games.lola, True), (games.lookahead, False)])
def test_lola_and_lookahead_are_first_order_in_the_step_of_the_others(function, through):
    """(direction - xi) / lr is the derivative, at lr = 0, of the gradient against opponents that have stepped."""
    game = SmoothGame(7)
    losses, players, dense = at(game, game.start)
    h = 1e-4
    parts = []
    for i in range(3):
        plus, minus = (own_gradient_after_others_step(game, game.start, i, s * h, through) for s in (1, -1))
        parts.append((plus - minus) / (2 * h))
    found = flat(function(losses, players, lr=1.0)) - dense.xi
    torch.testing.assert_close(found, torch.cat(parts), rtol=1e-5, atol=1e-5)


def test_two_players_bilinear_closed_forms():
    m, x, y = normal(0, 3, 2), normal(1, 3), normal(2, 2)
    a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
    losses = [a @ m @ b, -(a @ m @ b)]
    lr = 0.4
    wanted = {
        "consensus": (m @ y + m @ m.T @ x, -m.T @ x + m.T @ m @ y),
        "lookahead": (m @ y + lr * m @ m.T @ x, -m.T @ x + lr * m.T @ m @ y),
        "lola": (m @ y + 2 * lr * m @ m.T @ x, -m.T @ x + 2 * lr * m.T @ m @ y),
    }
    for name, value in wanted.items():
        keywords = {} if name == "consensus" else {"lr": lr}
        torch.testing.assert_close(getattr(games, name)(losses, [a, b], **keywords), list(value), **TOL)
    eye = torch.eye(3, dtype=F64), torch.eye(2, dtype=F64)
    cgd = (
        torch.linalg.solve(eye[0] + lr**2 * m @ m.T, m @ y + lr * m @ m.T @ x),
        torch.linalg.solve(eye[1] + lr**2 * m.T @ m, -m.T @ x + lr * m.T @ m @ y),
    )
    torch.testing.assert_close(games.cgd(losses, [a, b], lr=lr, rtol=1e-13), list(cgd), **TOL)


def test_one_player_has_nobody_to_look_at():
    x = normal(0, 4).requires_grad_()
    loss = x.pow(4).sum()
    for function in (games.lookahead, games.lola, games.sos, games.cgd):
        torch.testing.assert_close(function([loss], [x], lr=0.5), [4 * x.detach() ** 3])
    torch.testing.assert_close(games.sga([loss], [x]), [4 * x.detach() ** 3])  # a Hessian has no antisymmetric part


def test_lr_may_be_a_tensor():
    game = SmoothGame(0)
    players = game.players()
    for function in (games.lookahead, games.lola, games.sos, games.cgd):
        for lr in (torch.tensor(0.1, dtype=F64), torch.tensor([0.1], dtype=F64)):
            found = function(game.losses(players), players, lr=lr)
            wanted = function(game.losses(players), players, lr=0.1)
            torch.testing.assert_close(flat(found), flat(wanted), rtol=1e-14, atol=0)


# ---- the solve -------------------------------------------------------------------------------------------------------


def test_cgd_needs_one_iteration_for_each_singular_value_of_a_zero_sum_game():
    game = games.bilinear([2.0, 1.0, 0.5], start=(normal(0, 3), normal(1, 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        games.cgd(game.losses(game.players), game.players, lr=1.0, max_iters=3, rtol=1e-12)
    with pytest.warns(RuntimeWarning, match="relative residual of rtol=1e-12; got .* after 2 iterations"):
        games.cgd(game.losses(game.players), game.players, lr=1.0, max_iters=2, rtol=1e-12)


def test_cgd_says_once_that_its_matrix_is_singular():
    x, y = (torch.tensor(v, dtype=F64, requires_grad=True) for v in (1.0, 2.0))
    losses = [x * y + x, x * y]  # I + 1 J_o = [[1, 1], [1, 1]], and xi = (3, 1) is not in its range
    with pytest.warns(RuntimeWarning, match="cgd: the solve must reach") as caught:
        found = games.cgd(losses, [x, y], lr=1.0)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert all(math.isfinite(t.item()) for t in found)


def test_cgd_keeps_the_nan_of_one_start_to_itself():
    start = (torch.tensor([[1.0], [math.nan], [2.0]]), torch.tensor([[0.5], [1.0], [0.0]]))
    game = games.bilinear(start=start)
    with pytest.warns(RuntimeWarning, match="got nan"):
        x, _ = games.cgd(game.losses(game.players), game.players, lr=0.5)
    assert torch.isnan(x[1]).all()
    torch.testing.assert_close(x[[0, 2], 0], torch.tensor([1.0, 1.0 / 1.25], dtype=F64) * torch.tensor([0.8, 1.0]))


def test_at_a_fixed_point_nothing_moves():
    game = games.bilinear(2, start=([0.0, 0.0], [0.0, 0.0]))
    for function in (games.lookahead, games.lola, games.sos, games.cgd):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = function(game.losses(game.players), game.players, lr=0.5)
        assert torch.equal(flat(found).abs(), torch.zeros(4, dtype=F64)), function


BAD = [
    (games.lookahead, {"lr": -1.0}, ValueError, "lookahead: lr must be finite and >= 0"),
    (games.lola, {"lr": math.inf}, ValueError, "lola: lr must be finite and >= 0"),
    (games.sos, {"lr": "1"}, TypeError, "sos: lr must be a number or a tensor"),
    (games.sos, {"lr": 1.0, "a": 1.0}, ValueError, r"sos: a must be in \(0, 1\)"),
    (games.sos, {"lr": 1.0, "b": 0.0}, ValueError, r"sos: b must be in \(0, 1\)"),
    (games.sga, {"lam": "sign"}, TypeError, "sga: lam must be a number"),
    (games.consensus, {"gamma": math.nan}, ValueError, "consensus: gamma must be finite"),
    (games.cgd, {"lr": 1.0, "rtol": 0.0}, ValueError, r"cgd: rtol must be in \(0, 1\)"),
    (games.cgd, {"lr": 1.0, "max_iters": 0}, ValueError, "cgd: max_iters must be at least 1"),
    (games.cgd, {"lr": 1.0, "max_iters": 2.5}, TypeError, "cgd: max_iters must be an int"),
]


@pytest.mark.parametrize(("function", "keywords", "kind", "message"), BAD)
def test_bad_options_are_refused_by_name(function, keywords, kind, message):
    game = games.bilinear(generator=0)
    with pytest.raises(kind, match=message):
        function(game.losses(game.players), game.players, **keywords)
