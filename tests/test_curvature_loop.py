"""Neumann series of model curvatures whose steps are taken inside the products."""

import pytest
import torch
from torch import nn

from nestopt_ext.curvature import Diagonal, EmpiricalFisher, GaussNewton, Hessian
from nestopt_ext.solvers import Neumann, neumann_ihvp, solve

F64 = torch.float64


def problem(dtype=F64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).to(dtype)
    return model, torch.randn(9, 5, dtype=dtype), torch.randint(4, (9,))


def like(params, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, dtype=F64, generator=generator).to(p.dtype) for p in params]


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


CRITERIA = {
    "cross entropy": nn.CrossEntropyLoss(),
    "squares": lambda z, t: nn.functional.mse_loss(z, nn.functional.one_hot(t, 4).to(z)),
    "known squares": nn.MSELoss(),
}
OPERATORS = {
    "gauss-newton": lambda *a: GaussNewton(*a),
    "empirical fisher": lambda *a: EmpiricalFisher(*a),
}
SHAPES = {
    "alone": lambda op, d, p: op,
    "with a diagonal": lambda op, d, p: op + Diagonal(d, p),
    "diagonal first": lambda op, d, p: 0.5 * Diagonal(d, p).damped(0.1) + op,
    "scaled and damped": lambda op, d, p: 0.5 * (op + Diagonal(d, p)).damped(0.2),
    "turned round": lambda op, d, p: (op + Diagonal(d, p)).on(p[::-1], op.structure),
}


@pytest.mark.parametrize("num_terms", [0, 1, 7])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("kind", OPERATORS)
def test_the_sum_is_that_of_plain_products(kind, criterion, shape, num_terms):
    model, x, y = problem()
    if criterion == "known squares":
        y = nn.functional.one_hot(y, 4).to(x)
    params = list(model.parameters())
    op = OPERATORS[kind](model, CRITERIA[criterion], x, y, params)
    op = SHAPES[shape](op, [t.abs() for t in like(params, 3)], params)
    v = like(params if shape != "turned round" else params[::-1])
    before = [t.clone() for t in v]
    calls = 0

    def matvec(w):
        nonlocal calls
        calls += 1
        return op(w)

    options = {"num_terms": num_terms, "alpha": 0.05, "damping": 0.3}
    expected = solve(matvec, v, Neumann(**options))
    found = solve(op, v, Neumann(**options))
    assert found.num_products == expected.num_products == calls == num_terms + 1
    assert found.status is expected.status
    torch.testing.assert_close(flat(found.value), flat(expected.value), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.residual_norm, expected.residual_norm, rtol=1e-9, atol=1e-14)
    assert all(torch.equal(a, b) for a, b in zip(v, before, strict=True))
    assert op.flat_loop(v, num_terms, torch.tensor(0.05), 0.3) is not None


def test_single_precision_a_step_in_a_tensor_and_vectors_of_other_strides():
    model, x, y = problem(torch.float32)
    params = list(model.parameters())
    op = GaussNewton(model, nn.CrossEntropyLoss(), x, y, params)
    v = [t.mT.contiguous().mT if t.dim() == 2 else t for t in like(params)]
    alpha = torch.tensor(0.5, dtype=F64)
    found = neumann_ihvp(op, v, num_terms=20, alpha=alpha, damping=0.1)
    expected = neumann_ihvp(lambda w: op(w), v, num_terms=20, alpha=alpha, damping=0.1)
    torch.testing.assert_close(flat(found), flat(expected), rtol=2e-6, atol=2e-6)


def test_a_series_that_may_end_early_or_has_several_right_sides_goes_by_products():
    model, x, y = problem()
    params = list(model.parameters())
    op = GaussNewton(model, nn.CrossEntropyLoss(), x, y, params).damped(1.0)
    v = like(params)
    early = solve(op, v, Neumann(num_terms=500, alpha=0.5, rtol=1e-3))
    assert early.status.name == "converged" and early.num_products < 100
    many = solve(op, [torch.stack([t, 2 * t]) for t in v], Neumann(num_terms=9, alpha=0.5), batched=True)
    one = solve(op, v, Neumann(num_terms=9, alpha=0.5))
    torch.testing.assert_close(flat([t[1] for t in many.value]), 2 * flat(one.value), rtol=1e-12, atol=1e-14)


def test_no_loop_where_a_step_cannot_be_taken_inside():
    model, x, y = problem()
    params = list(model.parameters())
    v = like(params)
    parts = GaussNewton(model, nn.CrossEntropyLoss(), x, y, params, microbatch=3)
    both = GaussNewton(model, nn.CrossEntropyLoss(), x, y, params) + Hessian(
        nn.functional.cross_entropy(model(x), y), params
    )
    for op in (parts, both):
        assert op.flat_loop(v, 3, torch.tensor(0.1), 0.0) is None
        found = neumann_ihvp(op, v, num_terms=3, alpha=0.1)
        expected = neumann_ihvp(lambda w, op=op: op(w), v, num_terms=3, alpha=0.1)
        torch.testing.assert_close(flat(found), flat(expected), rtol=1e-12, atol=1e-14)


def test_a_nan_is_not_hidden():
    model, x, y = problem()
    params = list(model.parameters())
    op = GaussNewton(model, nn.CrossEntropyLoss(), x, y, params)
    v = like(params)
    v[0][0, 0] = float("nan")
    solution = solve(op, v, Neumann(num_terms=3, alpha=0.1))
    assert solution.status.name == "non_finite"


def test_what_is_made_of_an_operator_has_its_plan():
    model, x, y = problem()
    params = list(model.parameters())
    fisher = EmpiricalFisher(model, nn.CrossEntropyLoss(), x, y, params, route="dual")
    diagonal = Diagonal([torch.ones_like(p) for p in params], params)
    for same in (fisher, fisher.damped(0.1), 2 * fisher, fisher.on(params[::-1], fisher.structure)):
        assert same.plan(50).route == "dual" and same.plan(50).rows == 9
    assert (fisher + diagonal).plan(50).reason == "a diagonal does not commute with it"
    assert (fisher + fisher).plan(50).route == (-1 * fisher).plan(50).route == diagonal.plan(50).route == "loop"
