"""Leading eigenpairs from products alone, against LAPACK's of the whole matrix and against closed forms."""

import math
import warnings

import pytest
import torch

import nestopt_ext as nx
from nestopt_ext.games import spectrum
from nestopt_ext.games._arnoldi import Basis, invariant_basis, leading, leading_pairs

SIZE = 300
KEYS = {
    "largest_modulus": lambda z: z.abs(),
    "largest_real": lambda z: z.real,
    "smallest_real": lambda z: -z.real,
    "largest_imaginary": lambda z: z.imag.abs(),
}


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthogonal(size, seed=0):
    return torch.linalg.qr(random(size, size, seed=seed)).Q


def rotations(values):
    """The block-diagonal normal matrix with eigenvalues a +- ib."""
    return torch.block_diag(*(torch.tensor([[a, b], [-b, a]], dtype=torch.float64) for a, b in values))


class Counted:
    """The product with a matrix, counted; it refuses what is not a real vector."""

    def __init__(self, matrix):
        self.matrix, self.count = matrix, 0

    def __call__(self, v):
        assert v.shape == self.matrix[0].shape
        assert v.dtype == self.matrix.dtype
        self.count += 1
        return self.matrix @ v


def leading_values(matrix, k, which):
    values = torch.linalg.eigvals(matrix.double())
    return values[KEYS[which](values).argsort(descending=True)[:k]]


def check_pairs(found, matrix, rtol=1e-9):
    """Unit vectors, their measured residuals, conjugates side by side."""
    matrix = matrix.to(torch.complex128)
    vectors = found.eigenvectors.to(torch.complex128)
    residuals = torch.linalg.vector_norm(matrix @ vectors - vectors * found.eigenvalues, dim=0)
    scale = torch.linalg.matrix_norm(matrix, 2).item()
    slack = 100 * torch.finfo(found.eigenvectors.dtype).eps * scale
    assert residuals.max().item() <= rtol * scale
    torch.testing.assert_close(found.residuals, residuals, rtol=1e-3, atol=slack)
    norms = torch.linalg.vector_norm(vectors, dim=0)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=slack / scale if scale else 1e-12)
    i = 0
    while i < len(found.eigenvalues):
        if found.eigenvalues[i].imag == 0:
            assert not bool(found.eigenvectors[:, i].imag.any())
            i += 1
        else:
            assert found.eigenvalues[i].imag > 0
            assert found.eigenvalues[i + 1] == found.eigenvalues[i].conj()
            torch.testing.assert_close(
                found.eigenvectors[:, i + 1], found.eigenvectors[:, i].conj(), rtol=0, atol=slack / scale
            )
            i += 2


# ---- against LAPACK -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", KEYS)
@pytest.mark.parametrize("k", [1, 6, 20])
def test_leading_pairs_of_random_matrices(which, k):
    matrix = random(SIZE, SIZE, seed=k)
    product = Counted(matrix)
    found = spectrum(product, k, which=which, like=matrix[0])
    assert found.converged
    assert found.num_products == product.count
    assert k <= len(found.eigenvalues) <= k + 1
    expected = leading_values(matrix, k, which)
    key = KEYS[which]
    torch.testing.assert_close(key(found.eigenvalues)[:k], key(expected), rtol=0, atol=1e-8)
    assert (key(found.eigenvalues).diff() <= 1e-12).all()
    every = torch.linalg.eigvals(matrix)
    assert (found.eigenvalues[:, None] - every).abs().amin(1).max() < 1e-8
    check_pairs(found, matrix)


@pytest.mark.parametrize("which", KEYS)
def test_leading_pairs_of_a_normal_matrix(which):
    turn = orthogonal(SIZE)
    matrix = turn @ rotations(random(SIZE // 2, 2, seed=1).tolist()) @ turn.T
    found = spectrum(Counted(matrix), 6, which=which, like=matrix[0])
    expected = KEYS[which](leading_values(matrix, 6, which))
    torch.testing.assert_close(KEYS[which](found.eigenvalues)[:6], expected, rtol=0, atol=1e-11)
    check_pairs(found, matrix)


def test_single_precision():
    matrix = random(SIZE, SIZE, seed=2).float()
    found = spectrum(Counted(matrix), 4, like=matrix[0])
    assert found.converged
    assert (found.eigenvalues.dtype, found.eigenvectors.dtype) == (torch.complex128, torch.complex64)
    expected = leading_values(matrix, 4, "largest_modulus").abs()
    torch.testing.assert_close(found.eigenvalues.abs()[:4], expected, rtol=1e-4, atol=0)
    check_pairs(found, matrix, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_jacobian_of_players_in_16_bits(dtype, rtol):
    singular = torch.linspace(0.1, 3, 100).to(dtype)
    x, y = (torch.zeros(100, dtype=dtype, requires_grad=True) for _ in range(2))
    value = (x * singular * y).sum()
    found = spectrum(nx.games.game_jacobian([value, -value], [x, y]), k=4)
    wanted = singular.double().flip(0)[[0, 0, 1, 1]]
    torch.testing.assert_close(found.eigenvalues.imag.abs(), wanted, rtol=rtol, atol=0)
    assert found.eigenvector(0)[0][0].dtype == dtype
    assert 0 < found.num_products < 400


def test_whole_matrix_in_order():
    matrix = random(40, 40)
    found = spectrum(matrix)
    assert found.num_products == 0
    assert found.converged
    assert len(found.eigenvalues) == 40
    every = torch.linalg.eigvals(matrix)
    assert (found.eigenvalues[:, None] - every).abs().amin(1).max() < 1e-12
    assert (found.eigenvalues.abs().diff() <= 1e-12).all()
    check_pairs(found, matrix, rtol=1e-12)
    few = spectrum(matrix, 5, which="smallest_real")
    expected = -KEYS["smallest_real"](leading_values(matrix, 5, "smallest_real"))
    torch.testing.assert_close(few.eigenvalues.real[:5], expected, rtol=0, atol=1e-12)


def test_small_maps_are_taken_whole():
    matrix = random(50, 50)
    product = Counted(matrix)
    found = spectrum(product, 3, like=matrix[0])
    assert found.num_products == product.count == 50
    torch.testing.assert_close(found.eigenvalues, spectrum(matrix, 3).eigenvalues, rtol=0, atol=1e-10)
    one = spectrum(lambda v: 3 * v, like=torch.ones(()))
    assert one.eigenvalues.tolist() == [3]
    assert one.eigenvector(0)[0].shape == ()


# ---- multiple, defective, invariant ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5])
def test_multiples_of_the_identity(value):
    """Every vector spans an invariant subspace, so that each step starts anew."""
    found = spectrum(lambda v: value * v, 5, like=torch.zeros(SIZE, dtype=torch.float64))
    assert found.converged
    torch.testing.assert_close(found.eigenvalues, torch.full((5,), value, dtype=torch.complex128), rtol=0, atol=1e-14)
    gram = found.eigenvectors.T @ found.eigenvectors
    assert torch.linalg.matrix_rank(gram.real) == 5


def test_every_copy_of_a_multiple_rotation():
    """min max of 3 x.y: the eigenvalues 3i and -3i, 150 times each, have Krylov spaces of two dimensions."""
    half = SIZE // 2
    found = spectrum(lambda v: torch.cat([3 * v[half:], -3 * v[:half]]), 6, like=torch.zeros(SIZE, dtype=torch.float64))
    assert found.converged
    torch.testing.assert_close(
        found.eigenvalues, torch.tensor([3j, -3j] * 3, dtype=torch.complex128), rtol=0, atol=1e-12
    )
    assert torch.linalg.matrix_rank(found.eigenvectors, rtol=1e-6) == 6


@pytest.mark.parametrize("copies", [2, 3])
def test_every_copy_of_a_multiple_eigenvalue_in_a_full_spectrum(copies):
    values = torch.linspace(0, 1, SIZE, dtype=torch.float64)
    values[-copies:] = 2.0
    values[-copies - 3 : -copies] = 1.5
    turn = orthogonal(SIZE)
    matrix = turn @ torch.diag(values) @ turn.T
    found = spectrum(Counted(matrix), copies + 2, which="largest_real", like=matrix[0])
    expected = torch.tensor([2.0] * copies + [1.5] * 2, dtype=torch.float64)
    torch.testing.assert_close(found.eigenvalues.real, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("k", [4, 6])
def test_defective_eigenvalue(k):
    """A Jordan block of size 4: eigenvalues to the fourth root of rounding, residuals to rounding."""
    matrix = torch.diag(torch.linspace(0, 1, SIZE, dtype=torch.float64))
    matrix[-4:, -4:] = 2 * torch.eye(4, dtype=torch.float64) + torch.diag(torch.ones(3, dtype=torch.float64), 1)
    turn = orthogonal(SIZE)
    matrix = turn @ matrix @ turn.T
    found = spectrum(Counted(matrix), k, like=matrix[0])
    assert found.converged
    check_pairs(found, matrix, rtol=1e-10)
    assert (found.eigenvalues[:4] - 2).abs().max() < 10 * 1e-15**0.25
    assert (found.eigenvalues[:4].sum() - 8).abs() < 1e-9  # well-conditioned, unlike each of them


def test_invariant_subspace_from_the_start():
    """A map of rank 3: the Krylov space closes after four steps, and the rest of the spectrum is 0."""
    left, right = random(SIZE, 3, seed=3), random(SIZE, 3, seed=4)
    found = spectrum(lambda v: left @ (right.T @ v), 3, like=left[:, 0])
    expected = torch.linalg.eigvals(right.T @ left)
    assert found.converged
    assert (found.eigenvalues[:3, None] - expected).abs().amin(1).max() < 1e-9
    check_pairs(found, left @ right.T)


def test_what_cannot_be_found_is_said():
    """All real parts are 0, so none leads."""
    coupling = random(SIZE // 2, SIZE // 2)
    zero = torch.zeros_like(coupling)
    matrix = torch.cat([torch.cat([zero, coupling], 1), torch.cat([-coupling.T, zero], 1)])
    with pytest.warns(RuntimeWarning, match=r"spectrum: the 4 leading eigenvalues must converge.*Raise max_products"):
        found = spectrum(Counted(matrix), 4, which="largest_real", like=matrix[0], max_products=200)
    assert not found.converged
    assert found.num_products <= 200 + 30
    assert found.residuals.max() > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = spectrum(Counted(matrix), 4, which="largest_imaginary", like=matrix[0])
    sigma = torch.linalg.svdvals(coupling)
    torch.testing.assert_close(found.eigenvalues.imag[::2], sigma[:2], rtol=1e-10, atol=0)


# ---- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 9, 12])
def test_arnoldi_of_tiny_maps(size):
    matrix = random(size, size, seed=size)
    pairs = leading_pairs(
        lambda v: matrix @ v, matrix[0], 2, KEYS["largest_modulus"], capacity=7, rtol=1e-11, max_products=5000
    )
    assert pairs.converged
    expected = leading_values(matrix, 2, "largest_modulus").abs()
    torch.testing.assert_close(pairs.values.abs()[:2], expected, rtol=1e-9, atol=0)


def test_krylov_decomposition_holds_through_restarts():
    """A V = V H + v b', with orthonormal rows, before and after the basis is cut back, and with closed subspaces."""
    dominated = random(60, 60) + 1e9 * torch.outer(*(random(2, 60, seed=2)))  # images that almost lie in the basis
    closed = torch.eye(60, dtype=torch.float64), random(60, 2) @ random(2, 60, seed=1)
    for matrix in (random(60, 60), dominated, *closed):
        basis = Basis(lambda v, matrix=matrix: matrix @ v, matrix[0], 12)
        for _ in range(4):
            basis.grow(12)
            self_check(basis, matrix)
            values, vectors = torch.linalg.eig(basis.square())
            order = leading(values, KEYS["largest_modulus"], 4)
            basis.restrict(invariant_basis(basis.square(), values[order], vectors[:, order]))
            self_check(basis, matrix)


def self_check(basis, matrix):
    n = basis.size
    rows = basis._rows[: n + 1]
    torch.testing.assert_close(rows @ rows.T, torch.eye(n + 1, dtype=torch.float64), rtol=0, atol=1e-13)
    expected = rows.T @ basis.projected[: n + 1, :n]
    torch.testing.assert_close(matrix @ rows[:n].T, expected, rtol=0, atol=1e-12 * (1 + matrix.abs().max()))


@pytest.mark.parametrize("gap", [1.0, 1e-6, 1e-9, 0.0])
def test_invariant_basis_of_nearly_defective_matrices(gap):
    """Two complex pairs that are, and almost are, one Jordan block, in coordinates that hide it."""
    block = rotations([(1.0, 0.5), (1.0 + gap, 0.5)])
    block[0, 2] = block[1, 3] = 1.0
    turn = orthogonal(20)
    whole = torch.block_diag(block, 0.1 * random(16, 16))
    whole[:4, 4:] = random(4, 16, seed=1)
    matrix = turn @ whole @ turn.T
    values, vectors = torch.linalg.eig(matrix)
    order = leading(values, KEYS["largest_modulus"], 4)
    basis = invariant_basis(matrix, values[order], vectors[:, order])
    assert basis.shape == (20, 4)
    torch.testing.assert_close(basis.T @ basis, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-13)
    defect = matrix @ basis - basis @ (basis.T @ matrix @ basis)
    assert torch.linalg.matrix_norm(defect) < 1e-12 * torch.linalg.matrix_norm(matrix)
    torch.testing.assert_close(basis @ basis.T, turn[:, :4] @ turn[:, :4].T, rtol=0, atol=1e-10)


def test_ties_keep_pairs_together():
    matrix = torch.linalg.inv(random(6, 6)) @ rotations([(0, 1)] * 3) @ random(6, 6)
    values = torch.linalg.eigvals(matrix)
    order = leading(values, KEYS["largest_modulus"], 3)
    assert len(order) == 4
    assert torch.equal(values[order][::2], values[order][1::2].conj())


# ---- games ----------------------------------------------------------------------------------------------------------


def small_gan(dtype=torch.float64):
    torch.manual_seed(0)
    generator = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).to(dtype)
    discriminator = torch.nn.Sequential(torch.nn.Linear(2, 12), torch.nn.Tanh(), torch.nn.Linear(12, 1)).to(dtype)
    real, noise = torch.randn(32, 2, dtype=dtype), torch.randn(32, 2, dtype=dtype)
    soft = torch.nn.functional.softplus
    fake = discriminator(generator(noise))
    players = [generator, discriminator]
    return [soft(-fake).mean(), soft(-discriminator(real)).mean() + soft(fake).mean()], players


@pytest.mark.parametrize("which", KEYS)
def test_jacobian_of_a_gan(which):
    losses, players = small_gan()
    jacobian = nx.games.game_jacobian(losses, players)
    dense = jacobian.dense()
    assert len(dense) > 60
    found = spectrum(jacobian, 4, which=which, basis_size=30)
    assert found.converged
    assert found.num_products != len(dense)  # not taken whole
    expected = KEYS[which](leading_values(dense, 4, which))
    torch.testing.assert_close(KEYS[which](found.eigenvalues)[:4], expected, rtol=0, atol=1e-8)
    check_pairs(found, dense)
    # the parts of an eigenvector are players: J (r + i m) = (a + i b)(r + i m)
    value = found.eigenvalues[0]
    real, imaginary = found.eigenvector(0)
    for image, wanted in (
        (jacobian(real), (value.real, -value.imag)),
        (jacobian(imaginary), (value.imag, value.real)),
    ):
        first, second = jacobian.flatten(real), jacobian.flatten(imaginary)
        torch.testing.assert_close(jacobian.flatten(image), wanted[0] * first + wanted[1] * second, rtol=0, atol=1e-8)
    assert all(p.grad is None for player in players for p in player.parameters())


def test_whole_jacobian_of_a_gan():
    losses, players = small_gan(torch.float32)
    jacobian = nx.games.game_jacobian(losses, players)
    found = spectrum(jacobian)
    dense = jacobian.dense()
    assert found.num_products == len(dense) == len(found.eigenvalues)
    every = torch.linalg.eigvals(dense.double())
    assert (found.eigenvalues[:, None] - every).abs().amin(1).max() < 1e-3
    real, imaginary = found.eigenvector(1)
    assert [t.shape for t in real[0]] == [p.shape for p in players[0].parameters()]
    assert all(t.dtype == torch.float32 for t in imaginary[1])


def test_maps_of_structured_tensors():
    like = {"a": torch.zeros(20, 10), "b": torch.zeros(100, dtype=torch.float64)}
    scale = torch.arange(1, 101, dtype=torch.float64)

    def product(v):
        assert [v["a"].shape, v["b"].dtype] == [(20, 10), torch.float64]
        return {"b": scale * v["b"], "a": -0.5 * v["a"]}

    found = spectrum(product, 3, like=like, basis_size=40)
    torch.testing.assert_close(
        found.eigenvalues.real, torch.tensor([100.0, 99, 98], dtype=torch.float64), rtol=1e-9, atol=0
    )
    real, imaginary = found.eigenvector(0)
    assert real["b"][99].item() == pytest.approx(1, abs=1e-9)
    assert not imaginary["a"].any()
    assert real["a"].dtype == torch.float32


def test_eigenvalues_feed_the_choice_of_momentum():
    game = random(2, 2, seed=3)
    x, y = torch.zeros(2, dtype=torch.float64).requires_grad_(), torch.zeros(2, dtype=torch.float64).requires_grad_()
    payoff = x @ game @ y
    found = spectrum(nx.games.game_jacobian([payoff, -payoff], [x, y]))
    choice = nx.games.optimal_momentum(found.eigenvalues, alternating=True)
    assert bool(nx.games.converges(found.eigenvalues, choice.lr, choice.beta, alternating=True))


def test_same_result_each_time():
    matrix = random(SIZE, SIZE)
    first = spectrum(Counted(matrix), 3, like=matrix[0])
    torch.rand(5)
    second = spectrum(Counted(matrix), 3, like=matrix[0])
    assert torch.equal(first.eigenvalues, second.eigenvalues)
    assert torch.equal(first.eigenvectors, second.eigenvectors)


# ---- arguments ------------------------------------------------------------------------------------------------------


BIG = torch.zeros(1001, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spectrum(torch.ones(2, 3)), r"jacobian must be a square matrix; got shape \(2, 3\)"),
        (lambda: spectrum(torch.ones(2, 2, 2)), "jacobian must be a square matrix"),
        (lambda: spectrum(torch.ones(0, 0)), "jacobian must be a square matrix"),
        (lambda: spectrum(torch.full((2, 2), math.nan)), "jacobian must be finite"),
        (lambda: spectrum(torch.ones(2, 2, dtype=torch.complex64)), "jacobian must be float32"),
        (lambda: spectrum(3), "jacobian must be a GameJacobian, a Tensor or a callable; got int"),
        (lambda: spectrum(lambda v: v), "like must be given for a callable"),
        (lambda: spectrum(lambda v: v, like=3), "like must be a Tensor"),
        (lambda: spectrum(lambda v: v, like=[]), "like must have at least one element"),
        (lambda: spectrum(lambda v: v, like=BIG), "k must be given for a Jacobian of more than 1000 rows; got 1001"),
        (lambda: spectrum(torch.ones(2, 2), 0), "k must be between 1 and 2; got 0"),
        (lambda: spectrum(torch.ones(2, 2), 3), "k must be between 1 and 2; got 3"),
        (lambda: spectrum(torch.ones(2, 2), 1.0), "k must be an integer"),
        (lambda: spectrum(torch.ones(2, 2), which="LM"), "which must be one of largest_modulus"),
        (lambda: spectrum(lambda v: v, 3, like=BIG, basis_size=6), "basis_size must be >= 7; got 6"),
        (lambda: spectrum(lambda v: v, 3, like=BIG, rtol=-1), "rtol must be finite and >= 0"),
        (lambda: spectrum(lambda v: v, 3, like=BIG, max_products=3), "max_products must be >= 30; got 3"),
        (lambda: spectrum(lambda v: v / 0, 3, like=BIG), "jacobian must give finite products"),
        (lambda: spectrum(lambda v: v[:2], 3, like=BIG), "what jacobian returned must have shape"),
        (lambda: spectrum(lambda v: None, 3, like=BIG), "what jacobian returned must be a Tensor"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises((TypeError, ValueError), match=f"spectrum: {message}"):
        call()


def test_several_starts_are_refused():
    x = torch.ones(4, 1, requires_grad=True)
    y = torch.ones(4, 1, requires_grad=True)
    payoff = (x * y).sum(1)
    with pytest.raises(ValueError, match=r"spectrum: jacobian must be of one start; got 4 starts"):
        spectrum(nx.games.game_jacobian([payoff, -payoff], [x, y]))
