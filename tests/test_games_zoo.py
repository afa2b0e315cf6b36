"""The games of the zoo: their losses, closed-form Jacobians, solutions and starts."""

import math

import pytest
import torch
from cases import F64, generator, normal

from nestopt_ext.games import (
    bilinear,
    dirac_gan,
    game_jacobian,
    gradients,
    ipd,
    matching_pennies,
    mix,
    mixed,
    random_subspace_ipd,
    small_ipd,
)

MATRIX = normal(0, 3, 2)
SQUARE = [normal(i, 3, 3) for i in range(3)]


def softplus_like(t):
    return -torch.nn.functional.softplus(-2 * t) + torch.sin(t)


MAKERS = {
    "bilinear": bilinear,
    "bilinear matrix": lambda **kw: bilinear(MATRIX, **kw),
    "bilinear values": lambda **kw: bilinear([2.0, 0.5], **kw),
    "bilinear size": lambda **kw: bilinear(3, **kw),
    "mixed": lambda **kw: mixed([0.0, 0.3, 1.0], **kw),
    "mixed matrices": lambda **kw: mixed([0.1, 0.5, 0.9], coupling=SQUARE[0], curvatures=(SQUARE[1], SQUARE[2]), **kw),
    "mixed size": lambda **kw: mixed(0.5, size=2, **kw),
    "dirac": dirac_gan,
    "dirac wasserstein": lambda **kw: dirac_gan("wasserstein", **kw),
    "dirac non-saturating": lambda **kw: dirac_gan(saturating=False, **kw),
    "dirac function": lambda **kw: dirac_gan(softplus_like, saturating=False, **kw),
    "pennies": matching_pennies,
    "ipd": ipd,
    "small ipd": small_ipd,
    "mix": mix,
    "random subspace ipd": random_subspace_ipd,
}

#: Dilemmas, which have neither a Jacobian in closed form nor one solution.
DILEMMAS = (ipd, small_ipd, mix, random_subspace_ipd)


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


@pytest.mark.parametrize("batch", [None, 5])
def test_closed_form_jacobians_are_what_autograd_finds(make, batch):
    game = make(generator=3, batch=batch)
    found = game_jacobian(game.losses(game.players), game.players).dense()
    if not hasattr(game, "jacobian"):
        assert make in DILEMMAS
        return
    torch.testing.assert_close(game.jacobian().expand_as(found), found, rtol=1e-12, atol=1e-13)


def test_gradients_vanish_at_the_solution(make):
    game = make(generator=0)
    if game.solution is None:
        assert make in DILEMMAS
        return
    game.reset(game.solution)
    for grad in gradients(game.losses(game.players), game.players):
        assert torch.equal(grad.abs(), torch.zeros_like(grad))


def test_starts_are_the_same_in_every_dtype_and_batches_draw_all(make):
    single = make(generator=7)
    assert all(p.is_leaf and p.requires_grad and p.dtype == F64 for p in single.players)
    half = make(generator=7, dtype=torch.float32)
    for a, b in zip(single.players, half.players, strict=True):
        assert torch.equal(a.float(), b)
    batched = make(generator=7, batch=4)
    assert batched.batch == 4
    assert single.batch is None
    for a, b in zip(single.players, batched.players, strict=True):
        assert b.shape == (4, *a.shape)
    other = make(generator=generator(7), batch=4)
    assert all(torch.equal(a, b) for a, b in zip(batched.players, other.players, strict=True))
    assert all(loss.shape == (4,) for loss in batched.losses(batched.players))
    assert all(loss.shape == () for loss in single.losses(single.players))


def test_reset_writes_into_the_players_and_drops_their_gradients(make):
    game = make(generator=0, batch=3)
    players = game.players
    sum(loss.sum() for loss in game.losses(players)).backward()
    game.reset(generator=1)
    again = make(generator=1, batch=3)
    for player, wanted, held in zip(game.players, again.players, players, strict=True):
        assert player is held
        assert torch.equal(player, wanted)
        assert player.grad is None
    with pytest.raises(ValueError, match=r"\.reset: start\[0\] must have shape"):
        game.reset([p[:2].detach() for p in players])


def test_numbers_keep_all_their_digits():
    game = bilinear([0.1], start=([0.1], [0.3]))
    assert [p.item() for p in game.players] == [0.1, 0.3]
    assert game.matrix.item() == 0.1
    assert mixed(0.1).adversarialness.item() == 0.1


def test_given_starts_are_copied():
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    game = bilinear(2, start=(x, y))
    with torch.no_grad():
        game.players[0].zero_()
    assert x.tolist() == [1.0, 2.0]
    assert bilinear(2, start=(x.expand(5, 2), y.expand(5, 2))).batch == 5


def test_on_a_device(make, device):
    game = make(generator=0, device=device, dtype=torch.float32)
    assert all(loss.device.type == device.type for loss in game.losses(game.players))
    assert all(torch.isfinite(g).all() for g in gradients(game.losses(game.players), game.players))


# ---- what each game is -----------------------------------------------------------------------------------------------


def test_bilinear():
    game = bilinear(MATRIX, generator=0)
    x, y = game.players
    first, second = game.losses(game.players)
    torch.testing.assert_close(first, sum(x[i] * MATRIX[i, j] * y[j] for i in range(3) for j in range(2)))
    assert second == -first
    rotations = torch.linalg.eigvals(bilinear([2.0, 0.5]).jacobian())
    torch.testing.assert_close(rotations.imag.sort().values, torch.tensor([-2.0, -0.5, 0.5, 2.0], dtype=F64))
    torch.testing.assert_close(rotations.real, torch.zeros(4, dtype=F64))


def test_mixed_is_the_published_objective():
    share = torch.tensor([0.1, 0.5, 0.9], dtype=F64)
    a, b1, b2 = SQUARE
    game = mixed(share, coupling=a, curvatures=(b1, b2), generator=0)
    x, y = game.players
    g, rest = torch.diag(share), torch.eye(3, dtype=F64) - torch.diag(share)
    wanted = x @ (g @ a) @ y + x @ (rest @ b1) @ x - y @ (rest @ b2) @ y
    first, second = game.losses(game.players)
    torch.testing.assert_close(first, wanted)
    torch.testing.assert_close(second, -wanted)


@pytest.mark.parametrize("g", [0.0, 0.25, 1.0])
def test_mixed_turns_from_real_to_imaginary(g):
    eigenvalues = torch.linalg.eigvals(mixed(g).jacobian())
    torch.testing.assert_close(eigenvalues.real, torch.full((2,), 2 * (1 - g), dtype=F64))
    torch.testing.assert_close(eigenvalues.imag.sort().values, torch.tensor([-g, g], dtype=F64))


def test_dirac_gan():
    theta, psi = torch.tensor(0.7, dtype=F64), torch.tensor(-1.3, dtype=F64)
    t = theta * psi
    logistic = dirac_gan(start=(theta, psi))
    log2 = math.log(2.0)
    found = logistic.losses(logistic.players)
    torch.testing.assert_close(found[0], -torch.log1p(torch.exp(-t)))
    torch.testing.assert_close(found[1], torch.log1p(torch.exp(-t)) + log2)
    kind = dirac_gan(saturating=False, start=(theta, psi))
    torch.testing.assert_close(kind.losses(kind.players)[0], torch.log1p(torch.exp(t)))
    torch.testing.assert_close(kind.losses(kind.players)[1], found[1])
    slope, bend = torch.sigmoid(-t), -torch.sigmoid(t) * torch.sigmoid(-t)
    corner = slope + t * bend
    wanted = torch.stack([psi**2 * bend, corner, -corner, -(theta**2) * bend]).reshape(2, 2)
    torch.testing.assert_close(logistic.jacobian(), wanted)
    wasserstein = dirac_gan("wasserstein", start=(theta, psi))
    torch.testing.assert_close(torch.stack(wasserstein.losses(wasserstein.players)), torch.stack([t, -t]))


@pytest.mark.parametrize(("f", "slope"), [("logistic", 0.5), ("wasserstein", 1.0), (softplus_like, 2.0)])
@pytest.mark.parametrize("saturating", [True, False])
def test_dirac_gan_is_a_pure_rotation_at_its_solution(f, slope, saturating):
    game = dirac_gan(f, saturating=saturating, start=(torch.tensor(0.0), torch.tensor(0.0)))
    eigenvalues = torch.linalg.eigvals(game.jacobian())
    torch.testing.assert_close(eigenvalues.real, torch.zeros(2, dtype=F64), atol=1e-15, rtol=0)
    torch.testing.assert_close(eigenvalues.imag.sort().values, torch.tensor([-slope, slope], dtype=F64))


def test_matching_pennies_is_the_matrix_game():
    game = matching_pennies(generator=0)
    p, q = (torch.sigmoid(logit) for logit in game.players)
    matrix = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=F64)
    wanted = torch.stack([p, 1 - p]) @ matrix @ torch.stack([q, 1 - q])
    first, second = game.losses(game.players)
    torch.testing.assert_close(first, wanted)
    torch.testing.assert_close(second, -wanted)


# ---- the iterated prisoner's dilemma ---------------------------------------------------------------------------------

COSTS = {("C", "C"): (1, 1), ("C", "D"): (3, 0), ("D", "C"): (0, 3), ("D", "D"): (2, 2)}
STATES = [("C", "C"), ("C", "D"), ("D", "C"), ("D", "D")]


def played_out(first, second, discount, rounds):
    """The discounted costs of two memory-one players, round by round; probabilities to cooperate by state."""
    weights = dict.fromkeys(STATES, 0.0)
    for state in STATES:
        p, q = first["start"], second["start"]
        weights[state] = (p if state[0] == "C" else 1 - p) * (q if state[1] == "C" else 1 - q)
    totals = [0.0, 0.0]
    for t in range(rounds):
        for i in range(2):
            totals[i] += discount**t * sum(weights[s] * COSTS[s][i] for s in STATES)
        following = dict.fromkeys(STATES, 0.0)
        for before in STATES:
            p, q = first[before], second[before]
            for after in STATES:
                chance = (p if after[0] == "C" else 1 - p) * (q if after[1] == "C" else 1 - q)
                following[after] += weights[before] * chance
        weights = following
    return totals


def test_ipd_is_the_game_played_out():
    game = ipd(0.8, generator=5)
    first, second = (
        dict(zip(["start", *STATES], torch.sigmoid(logits).tolist(), strict=True)) for logits in game.players
    )
    found = [loss.item() for loss in game.losses(game.players)]
    assert found == pytest.approx(played_out(first, second, 0.8, 200), rel=1e-13)
    assert [v.item() for v in game.per_round(game.players)] == pytest.approx([0.2 * v for v in found])


#: Logits in the order start, CC, CD, DC, DD; the first letter is player 1's move for both players.
BIG = 60.0
TIT_FOR_TAT = ([BIG, BIG, -BIG, BIG, -BIG], [BIG, BIG, BIG, -BIG, -BIG])  # player 2 answers the first letter
DEFECT = [-BIG] * 5
COOPERATE = [BIG] * 5


@pytest.mark.parametrize(
    ("first", "second", "wanted"),
    [
        (COOPERATE, COOPERATE, (1.0, 1.0)),
        (DEFECT, DEFECT, (2.0, 2.0)),
        (COOPERATE, DEFECT, (3.0, 0.0)),
        (TIT_FOR_TAT[0], TIT_FOR_TAT[1], (1.0, 1.0)),
        (TIT_FOR_TAT[0], DEFECT, (0.04 * 3 + 0.96 * 2, 0.96 * 2)),  # exploited once
        (DEFECT, TIT_FOR_TAT[1], (0.96 * 2, 0.04 * 3 + 0.96 * 2)),
        (TIT_FOR_TAT[0], [-BIG, *TIT_FOR_TAT[1][1:]], (0.04 * 3 / (1 - 0.96**2), 0.04 * 0.96 * 3 / (1 - 0.96**2))),
    ],
)
def test_ipd_of_known_strategies(first, second, wanted):
    game = ipd(start=(torch.tensor(first), torch.tensor(second)))
    assert [v.item() for v in game.per_round(game.players)] == pytest.approx(wanted, rel=1e-12)


def test_ipd_exchanged_players_exchange_losses():
    """Exchanging the players exchanges the letters of every state, and so the entries CD and DC."""
    game = ipd(generator=2)
    exchange = torch.tensor([0, 1, 3, 2, 4])
    x, y = (p.detach() for p in game.players)
    exchanged = ipd(start=(y[exchange], x[exchange]))
    torch.testing.assert_close(
        torch.stack(exchanged.losses(exchanged.players)).flip(0), torch.stack(game.losses(game.players))
    )


def stationary(game, start):
    """The point near ``start`` where the simultaneous gradient vanishes, and the Jacobian there; by Newton's method."""
    game.reset(torch.tensor(start, dtype=F64).unbind())
    for _ in range(30):
        jacobian = game_jacobian(game.losses(game.players), game.players)
        point = jacobian.flatten([p.detach() for p in game.players])
        moved = point - torch.linalg.solve(jacobian.dense(), jacobian.flatten(jacobian.gradients))
        game.reset(moved.unbind())
    assert (moved - point).abs().max() < 1e-12
    return moved, game_jacobian(game.losses(game.players), game.players).dense()


def descended(game, num_steps, lr=1.0):
    for _ in range(num_steps):
        moved = [
            p - lr * g for p, g in zip(game.players, gradients(game.losses(game.players), game.players), strict=True)
        ]
        game.reset([p.detach() for p in moved])
    return torch.stack(game.losses(game.players)).detach()


def test_small_ipd_is_ipd_with_one_logit():
    a, b = torch.randn(2, 6, dtype=F64)
    forgive = torch.full((6,), -3.0, dtype=F64)
    whole = ipd(0.9, start=(torch.stack([a, a, forgive, a, forgive], 1), torch.stack([b, b, b, forgive, forgive], 1)))
    game = small_ipd(start=(a, b))
    wanted = torch.stack(whole.per_round(whole.players))
    torch.testing.assert_close(torch.stack(game.losses(game.players)), wanted, rtol=1e-13, atol=0)


def test_small_ipd_has_its_saddle_where_it_is_published():
    game = small_ipd(generator=0)
    saddle, jacobian = stationary(game, [0.4, 0.4])
    torch.testing.assert_close(torch.sigmoid(saddle), torch.tensor([0.6030, 0.6030], dtype=F64), atol=1e-4, rtol=0)
    torch.testing.assert_close(saddle, torch.tensor([0.4179, 0.4179], dtype=F64), atol=1e-4, rtol=0)
    assert [loss.item() for loss in game.losses(game.players)] == pytest.approx([1.7940] * 2, abs=1e-4)
    values, vectors = torch.linalg.eig(jacobian)
    order = values.real.argsort()
    assert values.imag.abs().max() == 0
    assert values.real[order].tolist() == pytest.approx([-0.03925, 0.03925], abs=1e-5)
    root = 0.5**0.5
    assert vectors[:, order[0]].real.abs().tolist() == pytest.approx([root, root])
    assert (vectors[0, order[1]] / vectors[1, order[1]]).real.item() == pytest.approx(-1.0)


def test_small_ipd_branches_into_both_solutions():
    saddle, _ = stationary(small_ipd(generator=0), [0.4, 0.4])
    start = saddle + torch.tensor([[1.0], [-1.0]], dtype=F64)
    game = small_ipd(start=start.unbind(1))
    losses = descended(game, 500, lr=3.0)
    assert losses[:, 0].tolist() == pytest.approx([1.0, 1.0], abs=0.005)
    assert losses[:, 1].tolist() == pytest.approx([1.96, 1.96], abs=0.005)


def test_mix_is_between_its_games():
    players = torch.randn(2, 4, dtype=F64).unbind()
    pennies, dilemma = matching_pennies(start=players), small_ipd(start=players)
    both = [torch.stack(game.losses(game.players)) for game in (pennies, dilemma)]
    for tau in (0.0, 0.3, 1.0):
        game = mix(tau, start=players)
        wanted = tau * both[0] + (1 - tau) * both[1]
        torch.testing.assert_close(torch.stack(game.losses(game.players)), wanted, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(
    ("tau", "start", "eigenvalues", "losses"),
    [
        (0.25, [0.115, -0.237], [0.0022 - 0.0609j, 0.0022 + 0.0609j], [1.403, 1.373]),
        (0.1, [0.202, -1.395], [0.0012 - 0.0189j, 0.0012 + 0.0189j], None),
        (0.1, [0.258, 0.985], [-0.0381, 0.0308], None),
    ],
)
def test_mix_has_the_published_stationary_points(tau, start, eigenvalues, losses):
    game = mix(tau, generator=0)
    point, jacobian = stationary(game, start)
    assert point.tolist() == pytest.approx(start, abs=1e-3)
    found = torch.linalg.eigvals(jacobian).tolist()
    assert sorted(found, key=lambda z: (z.real, z.imag)) == pytest.approx(eigenvalues, abs=1e-4)
    if losses is not None:
        assert [loss.item() for loss in game.losses(game.players)] == pytest.approx(losses, abs=1e-3)


def test_mix_has_another_attractor_far_out():
    losses = descended(mix(start=(torch.tensor(3.0), torch.tensor(3.0))), 600, lr=5.0)
    assert losses.tolist() == pytest.approx([1.0, 0.5], abs=0.005)


def test_random_subspace_ipd_is_ipd_on_a_plane():
    game = random_subspace_ipd(seed=4, batch=5, generator=1)
    first, second = game.logits(game.players)
    whole = ipd(start=(first.detach(), second.detach()))
    assert torch.equal(torch.stack(game.losses(game.players)), torch.stack(whole.losses(whole.players)))
    torch.testing.assert_close(
        torch.stack(game.per_round(game.players)), 0.04 * torch.stack(whole.losses(whole.players))
    )
    assert game.directions.abs().max() < 2
    assert not torch.equal(game.directions, random_subspace_ipd(seed=5).directions)
    assert torch.equal(game.directions.float(), random_subspace_ipd(seed=4, dtype=torch.float32).directions)
    centre = random_subspace_ipd(start=(torch.tensor(0.0), torch.tensor(0.0)))
    first, second = (torch.sigmoid(logits).tolist() for logits in centre.logits(centre.players))
    assert first == pytest.approx([0.5, 0.75, 0.25, 0.75, 0.25])
    assert second == pytest.approx([0.5, 0.75, 0.75, 0.25, 0.25])


# ---- bad arguments ---------------------------------------------------------------------------------------------------

BAD = [
    (lambda: bilinear(0), ValueError, "bilinear: matrix must be a size of at least 1"),
    (lambda: bilinear("identity"), TypeError, "bilinear: matrix must be a tensor or a sequence"),
    (lambda: bilinear(torch.zeros(2, 2, 2)), ValueError, r"got shape \(2, 2, 2\)"),
    (lambda: bilinear([math.nan]), ValueError, "bilinear: matrix must be finite"),
    (lambda: bilinear(dtype=torch.int64), TypeError, "bilinear: dtype must be float32"),
    (lambda: bilinear(batch=0), ValueError, "bilinear: batch must be at least 1"),
    (lambda: bilinear(batch=2.0), TypeError, "bilinear: batch must be None or an int"),
    (lambda: bilinear(start=torch.ones(2)), TypeError, "bilinear: start must be a list or tuple of 2 tensors"),
    (lambda: bilinear(start=([1.0], [1.0, 2.0])), ValueError, r"bilinear: start\[1\] must have shape \(1,\)"),
    (lambda: bilinear(start=([[1.0]], [1.0])), ValueError, r"bilinear: start\[1\] must have shape \(1, 1\)"),
    (lambda: bilinear(start=([1.0], [1.0]), batch=2), ValueError, r"bilinear: start\[0\] must have shape \(2, 1\)"),
    (lambda: mixed(1.5), ValueError, r"mixed: adversarialness must be in \[0, 1\]"),
    (lambda: mixed(math.nan), ValueError, r"mixed: adversarialness must be in \[0, 1\]"),
    (lambda: mixed(0.5, size=0), ValueError, "mixed: size must be an int of at least 1"),
    (lambda: mixed([0.5], coupling=torch.ones(2, 2)), ValueError, r"mixed: coupling must have shape \(1, 1\)"),
    (lambda: mixed([0.5], curvatures=([1.0], [1.0, 2.0])), ValueError, r"mixed: curvatures\[1\] must have shape"),
    (lambda: dirac_gan("hinge"), ValueError, "dirac_gan: f must be one of"),
    (lambda: dirac_gan(3), TypeError, "dirac_gan: f must be a name or a function"),
    (lambda: ipd(1.0), ValueError, "ipd: discount must be below 1"),
    (lambda: ipd(-0.1), ValueError, "ipd: discount must be finite and >= 0"),
    (lambda: ipd(dtype=torch.bfloat16), TypeError, "ipd: dtype must be float32 or float64"),
    (lambda: small_ipd(1.0), ValueError, "small_ipd: discount must be below 1"),
    (lambda: mix(1.5), ValueError, r"mix: tau must be in \[0, 1\]"),
    (lambda: mix(math.nan), ValueError, "mix: tau must be finite"),
    (lambda: mix(discount=1.0), ValueError, "mix: discount must be below 1"),
    (lambda: random_subspace_ipd(1.0), ValueError, "random_subspace_ipd: discount must be below 1"),
    (lambda: random_subspace_ipd(seed=1.5), TypeError, "random_subspace_ipd: seed must be an int"),
    (lambda: random_subspace_ipd(dtype=torch.float16), TypeError, "random_subspace_ipd: dtype must be float32"),
]


@pytest.mark.parametrize(("make", "kind", "message"), BAD)
def test_bad_arguments_are_refused_by_name(make, kind, message):
    with pytest.raises(kind, match=message):
        make()
