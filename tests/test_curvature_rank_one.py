import pytest
import torch
from cases import F64, flat, leaf, normal
from solver_cases import matrix_of
from torch import nn

from nestopt_ext.curvature import RankOne


def rank_one(scale=1.0, structure=list, dtype=F64):
    g = [scale * normal(0, 5), scale * normal(1, 2, 3)]
    params = [leaf(torch.zeros_like(t, dtype=dtype)) for t in g]
    if structure is dict:
        params = dict(zip("ab", params, strict=True))
    loss = sum(
        (t.to(dtype) * p).sum() for t, p in zip(g, params.values() if structure is dict else params, strict=True)
    )
    return RankOne(loss, params), flat(g)


def loop(a, v, num_terms, alpha):
    """The series term by term."""
    term, total, sq_norms = v, v, [v.square().sum()]
    for _ in range(num_terms):
        term = term - alpha * (a @ term)
        total = total + term
        sq_norms.append(term.square().sum())
    return alpha * total, torch.stack(sq_norms)


def split(v):
    return [v[..., :5], v[..., 5:].reshape(*v.shape[:-1], 2, 3)]


@pytest.mark.parametrize("num_terms", [0, 1, 5, 20, 100])
@pytest.mark.parametrize("damping", [0.0, 1e-9, 0.3, 1.0])
@pytest.mark.parametrize("scale", [0.0, 1e-8, 1e-3, 0.2, 1.0])
def test_the_series_in_closed_form_is_the_loop(scale, damping, num_terms):
    operator, g = rank_one(scale)
    square, v = float(g @ g), normal(7, 11)
    a = torch.outer(g, g) + damping * torch.eye(11, dtype=F64)
    for alpha in (1e-8, 0.9 / (square + damping + 1e-3), 1.9 / (square + damping + 1e-3), 1 / (damping or 1.0)):
        wanted, sq_norms = loop(a, v, num_terms, alpha)
        if not bool(sq_norms[-1] < 1e3 * sq_norms[0]):
            continue  # divergent: the loop itself loses its digits
        found, norms = operator.flat_series(split(v), num_terms, torch.tensor(alpha, dtype=F64), damping)
        assert float((flat(found) - wanted).norm()) <= 1e-12 * float(wanted.norm())
        torch.testing.assert_close(norms, sq_norms, rtol=1e-11, atol=1e-13 * float(sq_norms[0]))


def test_a_series_that_diverges_says_so_in_its_norms():
    operator, g = rank_one()
    _, norms = operator.flat_series(split(normal(7, 11)), 50, torch.tensor(3.0 / float(g @ g)), 0.0)
    assert norms[-1] > 1e6 * norms[0]


def test_a_nan_is_not_hidden():
    operator, _ = rank_one()
    v = normal(7, 11)
    v[3] = float("nan")
    found, norms = operator.flat_series(split(v), 5, torch.tensor(0.1), 0.1)
    assert all(t.isnan().all() for t in found[1:]) and norms.isnan().all()
    assert operator.flat_product(split(v))[0].isnan().all()


def test_products_inverse_low_rank_and_largest_eigenvalue():
    operator, g = rank_one(structure=dict)
    wanted = torch.outer(g, g)
    torch.testing.assert_close(operator.dense(), wanted)
    v = normal(3, 4, 11)
    eye = torch.eye(11, dtype=F64)
    for damping in (1e-3, 2.0):
        found = operator.flat_inverse(split(v), damping)
        rows = torch.cat([t.reshape(4, -1) for t in found], dim=1)
        torch.testing.assert_close(rows, torch.linalg.solve(wanted + damping * eye, v.T).T, rtol=1e-10, atol=1e-10)
    assert operator.flat_inverse(split(v), 0.0) is None
    torch.testing.assert_close(matrix_of(operator.flat_low_rank()), wanted)
    torch.testing.assert_close(operator.largest_eigenvalue(), g @ g)


def test_damped_and_scaled_ones_keep_their_closed_forms():
    operator, g = rank_one(0.3)
    combined = (2.0 * operator).damped(0.5)
    a = 2 * torch.outer(g, g) + 0.5 * torch.eye(11, dtype=F64)
    v = normal(3, 11)
    wanted, _ = loop(a, v, 7, 0.2)
    found, _ = combined.flat_series(split(v), 7, torch.tensor(0.2, dtype=F64), 0.0)
    torch.testing.assert_close(flat(found), wanted)
    inverse = combined.flat_inverse(split(v[None]), 0.1)
    wanted = torch.linalg.solve(a + 0.1 * torch.eye(11, dtype=F64), v)
    torch.testing.assert_close(flat([t[0] for t in inverse]), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_params(dtype):
    operator, g = rank_one(0.3, dtype=dtype)
    v = normal(3, 11)
    product = operator.flat_product([t.to(dtype) for t in split(v)])
    assert all(t.dtype == dtype for t in product)
    torch.testing.assert_close(flat(product).double(), g * (g @ v), rtol=0.05, atol=0.01)
    wide, _ = operator.flat_series([t.float() for t in split(v)], 3, torch.tensor(0.1, dtype=F64), 0.0)
    assert all(t.dtype == torch.float32 for t in wide)
    wanted, _ = loop(torch.outer(g, g), v, 3, 0.1)
    torch.testing.assert_close(flat(wide).double(), wanted, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, F64])
@pytest.mark.parametrize("v_dtype", [torch.float32, torch.bfloat16, F64])
def test_vectors_of_another_precision(v_dtype, dtype):
    """The results come in the dtype of v, and v is only read."""
    operator, g = rank_one(0.3, dtype=dtype)
    g = flat(operator._g).double()
    v = [t.to(v_dtype) for t in split(normal(3, 2, 11))]
    before, exact = [t.clone() for t in v], torch.cat([t.double().reshape(2, -1) for t in v], dim=1)
    found = operator.flat_inverse(v, 0.5)
    assert all(t.dtype == v_dtype and torch.equal(a, b) for t, a, b in zip(found, v, before, strict=True))
    rows = torch.cat([t.double().reshape(2, -1) for t in found], dim=1)
    wanted = torch.linalg.solve(torch.outer(g, g) + 0.5 * torch.eye(11, dtype=F64), exact.T).T
    tolerance = 4 * torch.finfo(v_dtype if v_dtype != F64 or dtype == F64 else torch.float32).eps
    assert float((rows - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


def test_takes_closures_unused_params_and_leaves_nothing_behind():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)).double()
    unused = leaf(normal(1, 2))
    x, state = normal(0, 6, 3), [b.clone() for b in net.buffers()]
    rng = torch.get_rng_state()
    operator = RankOne(lambda: net(x).square().mean(), [*net.parameters(), unused])
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(a, b) for a, b in zip(state, net.buffers(), strict=True))
    g = torch.autograd.grad(net(x).square().mean(), list(net.parameters()))
    v = [*(torch.ones_like(p) for p in net.parameters()), torch.ones(2, dtype=F64)]
    *product, nothing = operator(v)
    torch.testing.assert_close(flat(product), flat(g) * flat(g).sum())
    assert torch.equal(nothing, torch.zeros(2, dtype=F64))
    assert all(p.grad is None for p in net.parameters())


def test_bad_arguments_are_refused_by_name():
    w = leaf(normal(0, 3))
    with pytest.raises(ValueError, match=r"RankOne: loss must be a scalar; got shape \(3,\)"):
        RankOne(lambda: w * 2, w)
    with pytest.raises(ValueError, match="RankOne: loss must depend on params"):
        RankOne(w.sum(), leaf(w))
    with pytest.raises(ValueError, match="RankOne: params must require grad"):
        RankOne(w.sum(), w.detach())
