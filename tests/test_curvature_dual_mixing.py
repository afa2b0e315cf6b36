"""Which models the dual route takes apart into examples, and which it must not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nestopt_ext.curvature import EmpiricalFisher, GaussNewton
from nestopt_ext.solvers import neumann_ihvp

F64 = torch.float64
B = 5
OPERATORS = [GaussNewton, EmpiricalFisher]


def fixed(*shape):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(4))


def series(operator, model, classes, params, route):
    targets = torch.arange(B) % classes
    op = operator(lambda x: model(x, *params), nn.CrossEntropyLoss(), fixed(B, 4), targets, params, route=route)
    generator = torch.Generator().manual_seed(5)
    v = [torch.randn(p.shape, dtype=F64, generator=generator) for p in params]
    return torch.cat([t.reshape(-1) for t in neumann_ihvp(op, v, num_terms=9, alpha=0.1)])


def params_of(shapes):
    generator = torch.Generator().manual_seed(6)
    return [(0.5 * torch.randn(s, dtype=F64, generator=generator)).requires_grad_() for s in shapes]


APART = {
    "a slice of a param": (lambda x, w, q: F.linear(x, w) + q[:1], [(3, 4), (7, 3)], 3),
    "a weight and its transpose": (lambda x, w: F.linear(F.linear(x, w).tanh(), w.t()), [(3, 4)], 4),
    "a weight with a norm of its own": (
        lambda x, w, g: F.linear(x, g * w / w.norm(dim=1, keepdim=True)),
        [(3, 4), (3, 1)],
        3,
    ),
    "a product of params": (lambda x, a, b: F.linear(x, a @ b), [(3, 2), (2, 4)], 3),
    "data that mixes": (lambda x, w: F.linear(x - x.mean(0), w), [(3, 4)], 3),
}


@pytest.mark.parametrize("name", APART)
@pytest.mark.parametrize("operator", OPERATORS)
def test_taken_apart(operator, name):
    model, shapes, classes = APART[name]
    params = params_of(shapes)
    found = series(operator, model, classes, params, "dual")
    expected = series(operator, model, classes, params, "loop")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


MIXED = {
    "a detached copy as an input": (
        lambda x, w, u: F.linear(x, w) + F.linear(F.linear(x, w).detach(), u),
        [(3, 4), (3, 3)],
        3,
    ),
    "a param for each example": (lambda x, w, q: F.linear(x, w) + q, [(3, 4), (B, 3)], 3),
    "the mean over examples": (lambda x, w: F.linear(x, w) - F.linear(x, w).mean(0), [(3, 4)], 3),
    "inner products of examples": (lambda x, w: F.linear(x, w) @ F.linear(x, w).t(), [(3, 4)], B),
    "a matrix from the left": (lambda x, w: torch.eye(B, dtype=F64).roll(1, 0) @ F.linear(x, w), [(3, 4)], 3),
    "an index": (lambda x, w: F.linear(x, w)[torch.tensor([1, 0, 2, 3, 4])], [(3, 4)], 3),
    "another order": (lambda x, w: F.linear(x, w).flip(0), [(3, 4)], 3),
    "running sums, which have no rule": (lambda x, w: F.linear(x, w).cumsum(0), [(3, 4)], 3),
    "a transpose read as rows": (lambda x, w: F.linear(x, w).t().reshape(B, 3), [(3, 4)], 3),
    "a softmax over examples": (lambda x, w: F.linear(x, w).softmax(0), [(3, 4)], 3),
    "statistics of the batch": (lambda x, w: F.batch_norm(F.linear(x, w), None, None, training=True), [(3, 4)], 3),
    "a constant as long as the batch": (
        lambda x, w, u: F.linear(x, w) + F.linear(torch.ones(B, 4, dtype=F64), u),
        [(3, 4), (3, 4)],
        3,
    ),
}


@pytest.mark.filterwarnings("ignore:.*no rule for cumsum")
@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("operator", OPERATORS)
def test_refused_with_the_reason_and_summed_by_products(operator, name):
    model, shapes, classes = MIXED[name]
    params = params_of(shapes)
    with pytest.raises(
        ValueError, match=r"route must not be 'dual' for a model whose examples cannot be told apart: ."
    ):
        series(operator, model, classes, params, "dual")
    assert torch.equal(
        series(operator, model, classes, params, "auto"), series(operator, model, classes, params, "loop")
    )
