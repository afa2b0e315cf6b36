"""Inverses compared on regression with one decay per weight: what more products, and the step alpha, are worth.

Thirteen standardized, correlated features, as in the Boston housing set; the Hessians have condition numbers from 63 to
91.
"""

import pytest
import torch
from cases import F64, leaf, normal

import nestopt_ext as nx

FEATURES, TRAIN, VALID = 13, 365, 45
SEEDS = range(100, 1200, 100)
TERMS = (0, 1, 5, 20, 100)


class Regression:
    """At the minimum of its inner loss, where the exact hypergradient is a dense solve away."""

    def __init__(self, seed):
        def rotation(seed):
            return torch.linalg.qr(normal(seed, FEATURES, FEATURES))[0]

        spread = torch.logspace(0, -0.5, FEATURES, dtype=F64, base=128)
        x = normal(seed + 2, TRAIN + VALID, FEATURES) @ (rotation(seed) * spread) @ rotation(seed + 1)
        x = (x - x.mean(0)) / x.std(0, unbiased=False)
        y = x @ normal(seed + 3, FEATURES) + normal(seed + 4, TRAIN + VALID)
        y = (y - y.mean()) / y.std()
        (x, self.x_out), (y, self.y_out) = x.split([TRAIN, VALID]), y.split([TRAIN, VALID])
        self.x, self.y = x, y
        self.log_decay = leaf(torch.full((FEATURES,), -4.0, dtype=F64))
        decay = self.log_decay.detach().exp()
        self.hessian = 2 * x.T @ x / TRAIN + 2 * torch.diag(decay)
        self.w = leaf(torch.linalg.solve(self.hessian, 2 * x.T @ y / TRAIN))
        outer_grad = 2 * self.x_out.T @ (self.x_out @ self.w.detach() - self.y_out) / VALID
        self.exact = -torch.linalg.solve(self.hessian, outer_grad) * 2 * decay * self.w.detach()
        self.lowest, self.highest = torch.linalg.eigvalsh(self.hessian)[[0, -1]]

    def inner(self):
        return (self.x @ self.w - self.y).square().mean() + (self.log_decay.exp() * self.w.square()).sum()

    def outer(self):
        return (self.x_out @ self.w - self.y_out).square().mean()

    def found(self, solver):
        return nx.hypergradient(self.outer, self.inner, self.w, self.log_decay, solver=solver)[0]

    def cosine(self, solver):
        return float(torch.cosine_similarity(self.found(solver), self.exact, dim=0))


@pytest.fixture(scope="module")
def problems():
    return [Regression(seed) for seed in SEEDS]


def mean_cosines(problems, alpha):
    found = torch.tensor([[p.cosine(nx.Neumann(k, alpha(p))) for k in TERMS] for p in problems])
    return found.mean(0).tolist()


def test_more_products_turn_the_hypergradient_towards_the_exact_one(problems):
    """A safe step and the best step; means over the problems: .49 .55 .71 .89 .99 and .49 .67 .83 .96 1.0."""
    for alpha, at_twenty in ((lambda p: 0.9 / p.highest, 0.85), (lambda p: 2 / (p.lowest + p.highest), 0.95)):
        cosines = mean_cosines(problems, alpha)
        assert cosines == sorted(cosines) and len(set(cosines)) == len(TERMS)
        assert cosines[3] >= at_twenty and cosines[3] >= cosines[0] + 0.25
        assert cosines[4] > 0.98


def test_auto_alpha_is_as_good_as_the_step_it_estimates(problems):
    auto = mean_cosines(problems, lambda p: "auto")
    safe = mean_cosines(problems, lambda p: 0.9 / p.highest)
    assert all(a > s - 0.01 for a, s in zip(auto, safe, strict=True))


def test_the_learning_rate_of_adam_is_no_step(problems):
    """With alpha = 1e-3 twenty terms are nearly parallel to the first."""
    cosines = mean_cosines(problems, lambda p: 1e-3)
    assert cosines[3] - cosines[0] < 0.03


def test_twenty_conjugate_gradients_and_a_dense_solve_are_exact(problems):
    for problem in problems:
        assert problem.cosine(nx.ConjugateGradient(20, rtol=0.0)) > 1 - 1e-9
        for solver in (nx.Exact(), nx.ConjugateGradient(60, rtol=1e-12)):
            torch.testing.assert_close(problem.found(solver), problem.exact, rtol=1e-8, atol=1e-10)
    neumann = problems[0].found(nx.Neumann(1500, 2 / (problems[0].lowest + problems[0].highest)))
    torch.testing.assert_close(neumann, problems[0].exact, rtol=1e-8, atol=1e-10)
