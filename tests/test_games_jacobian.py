"""The simultaneous gradient and the Jacobian of a game, against Hessians of functions of one flat vector."""

import pytest
import torch
from cases import F64, normal
from game_cases import ModuleGame, SmoothGame, dense_of
from helpers import Memory
from torch import nn

from nestopt_ext.games import GameJacobian, game_jacobian, gradients, parameters

TOL = {"rtol": 1e-12, "atol": 1e-12}


def tensors(players):
    return [t for player in players for t in parameters(player)]


def flat(parts):
    return torch.cat([t.reshape(-1) for part in parts for t in parameters(part)])


def random_like(jacobian, seed):
    size = sum(jacobian.sizes)
    shape = (size,) if jacobian.batch_size is None else (jacobian.batch_size, size)
    return jacobian.unflatten(normal(seed, *shape))


@pytest.fixture(params=["containers", "modules"])
def game(request):
    """The losses and players of a game, and the dense truth."""
    if request.param == "modules":
        game = ModuleGame(0)
        return game.losses(game.players), game.players, game.dense()
    game = SmoothGame(1)
    players = game.players()
    return game.losses(players), players, dense_of(game)


def test_gradients_are_each_players_own(game):
    losses, players, dense = game
    torch.testing.assert_close(flat(gradients(losses, players)), dense.xi, **TOL)


def test_products_are_those_of_the_dense_jacobian(game):
    losses, players, dense = game
    jacobian = game_jacobian(losses, players)
    assert not torch.allclose(dense.jacobian, dense.jacobian.T), "a symmetric truth could not tell J from its transpose"
    assert jacobian.sizes == dense.sizes
    torch.testing.assert_close(jacobian.dense(), dense.jacobian, **TOL)
    torch.testing.assert_close(flat(jacobian.gradients), dense.xi, **TOL)
    for seed in range(3):
        v = random_like(jacobian, seed)
        torch.testing.assert_close(flat(jacobian(v)), dense.jacobian @ flat(v), **TOL)
        torch.testing.assert_close(flat(jacobian.transpose(v)), dense.jacobian.T @ flat(v), **TOL)
        torch.testing.assert_close(flat(jacobian.off_diagonal(v)), dense.off_diagonal @ flat(v), **TOL)


def test_results_have_the_players_structure():
    game = SmoothGame(1)
    players = tuple(game.players())
    jacobian = game_jacobian(game.losses(players), players)
    for found in (gradients(game.losses(players), players), jacobian(random_like(jacobian, 0))):
        assert type(found) is tuple
        assert [type(part) for part in found] == [list, dict, torch.Tensor]
        assert list(found[1]) == ["gain", "bias"]
        assert [t.shape for t in tensors(found)] == [t.shape for t in tensors(players)]
        assert not any(t.requires_grad for t in tensors(found))


def test_a_module_is_its_parameters_that_require_grad():
    module = nn.Linear(2, 1).double()
    module.bias.requires_grad_(False)
    y = normal(0, 1).requires_grad_()
    loss = module(normal(1, 3, 2)).square().sum() * y.sum()
    (found, _) = gradients([loss, -loss], [module, y])
    assert [t.shape for t in found] == [module.weight.shape]
    assert GameJacobian([loss, -loss], [module, y]).sizes == (2, 1)


def test_batched_starts_are_independent_games():
    game = SmoothGame(2, batch=4)
    players = game.players()
    jacobian = game_jacobian(game.losses(players), players)
    v = random_like(jacobian, 3)
    found = {
        "xi": jacobian.flatten(gradients(game.losses(players), players)),
        "J": jacobian.flatten(jacobian(v)),
        "J'": jacobian.flatten(jacobian.transpose(v)),
        "J_o": jacobian.flatten(jacobian.off_diagonal(v)),
        "dense": jacobian.dense(),
    }
    assert jacobian.batch_size == 4
    assert found["dense"].shape == (4, 9, 9)
    for b in range(4):
        dense, vector = dense_of(game, game.start[b]), jacobian.flatten(v)[b]
        wanted = {
            "xi": dense.xi,
            "J": dense.jacobian @ vector,
            "J'": dense.jacobian.T @ vector,
            "J_o": dense.off_diagonal @ vector,
            "dense": dense.jacobian,
        }
        for name, value in wanted.items():
            torch.testing.assert_close(found[name][b], value, **TOL)


def test_gradients_can_be_differentiated():
    game = SmoothGame(1)
    players = game.players()
    xi = gradients(game.losses(players), players, create_graph=True)
    u = normal(4, 9)
    found = torch.autograd.grad(flat(xi) @ u, tensors(players))
    torch.testing.assert_close(flat(found), dense_of(game).jacobian.T @ u, **TOL)


def test_players_of_several_dtypes():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = torch.tensor(3.0, dtype=F64, requires_grad=True)
    losses = [(x.double().prod() * y), (x.sum() * y**2).float()]
    jacobian = game_jacobian(losses, [x, y])
    found = jacobian([torch.tensor([1.0, 0.0]), torch.tensor(1.0, dtype=F64)])
    assert [t.dtype for t in found] == [torch.float32, F64]
    torch.testing.assert_close(jacobian.dense(), torch.tensor([[0, 3, 2], [3, 0, 1], [6, 6, 6]], dtype=F64))
    assert [t.dtype for t in gradients(losses, [x, y])] == [torch.float32, F64]


def test_nothing_is_modified_and_graphs_are_retained():
    game = SmoothGame(1)
    players = game.players()
    losses = game.losses(players)
    memory = Memory(tensors(players))
    first, second = (game_jacobian(losses, players) for _ in range(2))
    v = random_like(first, 0)
    torch.testing.assert_close(flat(first(v)), flat(second(v)), rtol=0, atol=0)
    torch.testing.assert_close(flat(first(v)), flat(first(v)), rtol=0, atol=0)
    gradients(losses, players)
    assert memory.unchanged()
    assert all(t.grad is None for t in tensors(players))
    sum(losses).backward()  # still there


def test_results_share_no_memory():
    x, y = (torch.ones(3, dtype=F64, requires_grad=True) for _ in range(2))
    z = torch.ones((), dtype=F64, requires_grad=True)

    def losses():
        return [(x + y).sum() * z + (x.square().sum() + y.square().sum()) / 2, z * (x + y).sum()]

    players = [[x, y], z]
    v = [[torch.ones(3, dtype=F64), torch.ones(3, dtype=F64)], torch.ones((), dtype=F64)]
    jacobian = game_jacobian(losses(), players)
    for found in (gradients(losses(), players), jacobian(v), jacobian.transpose(v), jacobian.off_diagonal(v)):
        for t in tensors(found):
            before = [o.clone() for o in (*tensors(found), *tensors(v), x.detach(), y.detach()) if o is not t]
            t.mul_(7)  # an expanded tensor would refuse, a shared one would change another
            after = [o for o in (*tensors(found), *tensors(v), x.detach(), y.detach()) if o is not t]
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_tensor_that_its_loss_does_not_use_gets_zeros():
    x, unused, y = (torch.ones(2, dtype=F64, requires_grad=True) for _ in range(3))
    losses = [(x * y).sum(), (y**2).sum()]
    assert torch.equal(gradients(losses, [[x, unused], y])[0][1], torch.zeros(2, dtype=F64))
    jacobian = game_jacobian(losses, [[x, unused], y])
    expected = torch.zeros(6, 6, dtype=F64)
    expected[:2, 4:] = torch.eye(2)
    expected[4:, 4:] = 2 * torch.eye(2)
    torch.testing.assert_close(jacobian.dense(), expected)


@pytest.mark.parametrize("function", [gradients, game_jacobian])
def test_a_loss_that_does_not_use_its_player_is_an_error(function):
    x, y = (torch.ones(2, requires_grad=True) for _ in range(2))
    with pytest.raises(ValueError, match=r"losses\[1\] must depend on players\[1\]"):
        function([(x * y).sum(), x.sum()], [x, y])
    with pytest.raises(ValueError, match=r"losses\[0\] must depend on players\[0\]"):
        function([y.sum(), x.sum()], [x, y])  # the order mixed up


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


def test_an_operation_without_second_derivative_is_named():
    x, y = (torch.ones(2, requires_grad=True) for _ in range(2))
    losses = [(OnceDifferentiable.apply(x) * y).sum(), -(x * y).sum()]
    torch.testing.assert_close(gradients(losses, [x, y])[0], torch.full((2,), 3.0))  # first derivatives are there
    with pytest.raises(RuntimeError, match=r"losses\[0\] must be twice differentiable.*once_differentiable"):
        game_jacobian(losses, [x, y])
    with pytest.raises(RuntimeError, match="must be twice differentiable"):
        gradients(losses, [x, y], create_graph=True)


def test_an_operation_without_second_derivative_is_named_where_its_cotangent_is_constant():
    x, y = (torch.ones(2, requires_grad=True) for _ in range(2))
    losses = [OnceDifferentiable.apply(x).sum() + (x * y).sum(), -(x * y).sum()]
    with pytest.raises(RuntimeError, match=r"losses\[0\] must be twice differentiable.*once_differentiable"):
        game_jacobian(losses, [x, y])


def test_an_operation_without_second_derivative_that_shows_in_the_product_is_named():
    x = torch.randn(1, 4, 8, requires_grad=True)
    y = torch.ones((), requires_grad=True)
    backend = torch.nn.attention.SDPBackend.FLASH_ATTENTION
    with torch.nn.attention.sdpa_kernel(backend):
        out = torch.nn.functional.scaled_dot_product_attention(x[None], x[None], x[None])
    jacobian = game_jacobian([out.sum() * y, out.square().sum() * y], [x, y])
    with pytest.raises(RuntimeError, match=r"twice differentiable; got a fused scaled-dot-product.*SDPBackend\.MATH"):
        jacobian([torch.ones_like(x), torch.ones(())])


def test_players_changed_in_place_since_are_named():
    x, y = (torch.ones(2, requires_grad=True) for _ in range(2))
    losses = [(x**2 * y**2).sum(), (x * y**2).sum()]
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match=r"gradients: losses\[0\] must be computed from the params as they are"):
        gradients(losses, [x, y])


def X(**kwargs):
    return torch.ones(2, requires_grad=True, **kwargs)


BAD = {
    "no list": (lambda x, y: ([x.sum(), y.sum()], x), TypeError, "players must be a list or tuple"),
    "module": (lambda x, y: ([x.sum()], nn.Linear(1, 1)), TypeError, "players must be a list or tuple"),
    "none": (lambda x, y: ([], []), ValueError, "players must hold at least one player"),
    "empty": (lambda x, y: ([x.sum(), y.sum()], [x, []]), ValueError, r"players\[1\] must hold at least one tensor"),
    "frozen": (lambda x, y: ([x.sum()], [x.detach()]), ValueError, r"players\[0\] must require grad"),
    "twice": (lambda x, y: ([x.sum(), x.sum()], [x, {"w": x}]), ValueError, r"players\[1\]\['w'\] must be a tensor of"),
    "integers": (lambda x, y: ([x.sum()], [torch.ones(2).long()]), TypeError, r"players\[0\] must be float32"),
    "count": (lambda x, y: ([x.sum()], [x, y]), ValueError, "losses must have 2 entries"),
    "losses": (lambda x, y: (x.sum(), [x, y]), TypeError, "losses must be a list or tuple"),
    "number": (lambda x, y: ([x.sum(), 1.0], [x, y]), TypeError, r"losses\[1\] must be a tensor; got float"),
    "no graph": (lambda x, y: ([x.sum(), y.sum().detach()], [x, y]), ValueError, r"losses\[1\] must have a graph"),
    "matrix": (lambda x, y: ([x[None] * y[:, None], y.sum()], [x, y]), ValueError, r"losses\[0\] must be a scalar"),
    "shapes": (lambda x, y: ([x.sum(), y], [x, y]), ValueError, r"losses\[1\] must have the shape of losses\[0\]"),
    "one": (
        lambda x, y: ([x.sum()[None], y.sum()[None]], [x, y]),
        ValueError,
        r"players\[0\] must have leading dimension 1",
    ),
    "no starts": (lambda x, y: ([x[:0], y[:0]], [x, y]), ValueError, "losses must be of at least one start"),
    "complex": (lambda x, y: ([x.sum() * 1j, y.sum()], [x, y]), TypeError, r"losses\[0\] must be of a real"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("function", [gradients, GameJacobian])
def test_bad_games_are_refused_by_name(function, case):
    make, kind, message = BAD[case]
    with pytest.raises(kind, match=f"^{function.__name__}: {message}"):
        function(*make(X(), X()))


BAD_VECTORS = {
    "count": ([torch.ones(2)], TypeError, "v must be a list or tuple with one entry for each of the 2 players"),
    "structure": ([[torch.ones(2)], torch.ones(2)], TypeError, r"v\[0\] must be a Tensor"),
    "shape": ([torch.ones(3), torch.ones(2)], ValueError, r"v\[0\] must have shape \(2,\)"),
    "dtype": ([torch.ones(2), torch.ones(2, dtype=F64)], TypeError, r"v\[1\] must be float32"),
}


@pytest.mark.parametrize("case", BAD_VECTORS)
def test_bad_vectors_are_refused_by_name(case):
    x, y = X(), X()
    jacobian = game_jacobian([(x * y).sum(), -(x * y).sum()], [x, y])
    vector, kind, message = BAD_VECTORS[case]
    for product in (jacobian, jacobian.off_diagonal, jacobian.flatten):
        with pytest.raises(kind, match=f"GameJacobian: {message}"):
            product(vector)
    with pytest.raises(ValueError, match=r"vector must be a tensor of shape \(4,\)"):
        jacobian.unflatten(torch.ones(3))


@pytest.mark.parametrize("batch", [None, 3])
def test_flatten_and_unflatten_are_inverse(batch):
    game = SmoothGame(5, batch=batch)
    players = game.players()
    jacobian = game_jacobian(game.losses(players), players)
    vector = normal(0, *([9] if batch is None else [batch, 9]))
    assert torch.equal(jacobian.flatten(jacobian.unflatten(vector)), vector)
    assert torch.equal(jacobian.flatten(players), game.start)


def test_on_a_device(device):
    game = SmoothGame(1)
    for name in ("a", "b", "c", "start"):
        setattr(game, name, getattr(game, name).to(device))
    players = game.players()
    jacobian = game_jacobian(game.losses(players), players)
    assert jacobian.dense().device.type == device.type
    torch.testing.assert_close(jacobian.dense().cpu(), dense_of(SmoothGame(1)).jacobian, rtol=1e-9, atol=1e-9)
