"""What the papers prove of response models, on the layers and models of the package.

Expectations are sums over quadrature nodes, one example each, and every objective here is quadratic in the weights, so
that one Newton step is its minimum: nothing is sampled and nothing is iterated.
"""

import math

import numpy as np
import pytest
import torch
from cases import F64, flat, generator
from torch import nn

from nestopt_ext.response import DeltaStnLinear, HyperParameters, StnLinear, StnModel


def normal(scale, count=40):
    """Gauss-Hermite nodes and weights of N(0, scale^2)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return scale * torch.from_numpy(nodes), torch.from_numpy(weights) / math.sqrt(2 * math.pi)


def uniform(scale, count=20):
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return scale * torch.from_numpy(nodes), torch.from_numpy(weights) / 2


def lopsided(scale):
    """Two points, of mean zero and far from symmetric."""
    return scale * torch.tensor([-0.5, 4.0], dtype=F64), torch.tensor([8 / 9, 1 / 9], dtype=F64)


def grid(distribution, scales):
    """Nodes [K, n] and weights [K] of independent perturbations."""
    axes = [distribution(scale) for scale in scales]
    nodes = torch.cartesian_prod(*(nodes for nodes, _ in axes)).reshape(-1, len(scales))
    weights = torch.cartesian_prod(*(weights for _, weights in axes)).reshape(-1, len(scales)).prod(1)
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(weights @ nodes, torch.zeros(len(scales), dtype=F64), rtol=0, atol=1e-12)
    return nodes, weights


def hessian(loss, params):
    """Gradient and Hessian of a scalar, [P] and [P, P]."""
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, params, create_graph=True)])
    rows = [torch.autograd.grad(g, params, retain_graph=True, materialize_grads=True) for g in gradient]
    return gradient.detach(), torch.stack([flat(row) for row in rows])


def minimize(objective, params):
    """One Newton step, after which nothing is left of the gradient."""
    gradient, curvature = hessian(objective(), params)
    assert torch.linalg.eigvalsh(curvature)[0] > 0
    move = torch.linalg.solve(curvature, gradient).split([p.numel() for p in params])
    with torch.no_grad():
        for p, part in zip(params, move, strict=True):
            p -= part.view_as(p)
    left = torch.autograd.grad(objective(), params)
    assert flat(left).norm() < 1e-9 * (1 + gradient.norm())


def hyperparameters(start):
    hparams = HyperParameters(dtype=F64)
    for i, value in enumerate(start):
        hparams.add(f"h{i}", value)
    return hparams


# ---- a quadratic: the fitted response is the true one (Self-Tuning Networks, section 2) ------------------------------


def affine_weights(kind, start, count):
    """A model that answers 1 with ``count`` weights, w0 + U h (or U (h - h0)): its direction is fixed to ones."""
    layer = kind(1, count, bias=False, dtype=F64, num_hparams=len(start))
    with torch.no_grad():
        layer.response_weight.fill_(1.0)
        layer.gate_weight.normal_()
    return StnModel(layer, hyperparameters(start), centred=kind is DeltaStnLinear), layer


@pytest.mark.parametrize("distribution", [normal, uniform, lopsided])
@pytest.mark.parametrize(("kind", "linearized"), [(StnLinear, False), (DeltaStnLinear, False), (DeltaStnLinear, True)])
def test_response_to_a_quadratic_has_the_true_jacobian_whatever_the_perturbation(kind, linearized, distribution):
    g = generator(3)
    count, start = 4, [0.7, -1.3]
    root = torch.randn(count, count, generator=g, dtype=F64)
    a, b = root @ root.T + torch.eye(count, dtype=F64), torch.randn(count, 2, generator=g, dtype=F64)
    c, d = torch.randn(count, generator=g, dtype=F64), torch.randn(2, 2, generator=g, dtype=F64)
    model, layer = affine_weights(kind, start, count)
    h0 = model.hparams.unconstrained.detach()
    nodes, weights = grid(distribution, [0.8, 1.7])

    def objective():
        with model.at(h0 + nodes, linearized=linearized):
            w = model(torch.ones(len(nodes), 1, dtype=F64))  # [K, count], those of each node
        h = h0 + nodes
        f = 0.5 * ((w @ a) * w).sum(1) + ((h @ b.T) * w).sum(1) + w @ c + ((h @ d) * h).sum(1)
        return weights @ f

    minimize(objective, [layer.weight, layer.gate_weight])
    jacobian = -torch.linalg.solve(a, b)
    served = model(torch.ones(1, 1, dtype=F64))[0]
    assert (layer.gate_weight - jacobian).norm() < 1e-6 * jacobian.norm()
    torch.testing.assert_close(served, -torch.linalg.solve(a, b @ h0 + c), rtol=1e-9, atol=1e-9)


# ---- ridge regression: what a joint fit costs (Delta-STN, section 4) -------------------------------------------------


class Ridge:
    """1/2n ||X w - t||^2 + e^h / 2 ||w||^2, and a layer with one gate, which is open: w(h') = w0 + (h' - h) v."""

    def __init__(self):
        g = generator(1)
        self.x = torch.randn(30, 4, generator=g, dtype=F64)
        self.t = self.x @ torch.randn(4, generator=g, dtype=F64) + 0.3 * torch.randn(30, generator=g, dtype=F64)
        self.layer = DeltaStnLinear(4, 1, bias=False, dtype=F64, num_hparams=1)
        with torch.no_grad():
            self.layer.gate_weight.fill_(1.0)
        self.model = StnModel(self.layer, hyperparameters([-0.5]), centred=True)
        self.h = self.model.hparams.unconstrained.detach()

    def solution(self, h):
        gram = self.x.T @ self.x / len(self.x)
        return torch.linalg.solve(gram + h.exp() * torch.eye(4, dtype=F64), self.x.T @ self.t / len(self.x))

    def at_centre(self):
        """The loss at the current hyperparameter, of the weights that serve there."""
        with self.model.at_centre():
            fit = (self.model(self.x)[:, 0] - self.t).square().mean()
        return 0.5 * fit + 0.5 * self.h.exp().sum() * self.layer.weight.square().sum()

    def about(self, scale, *, linearized):
        """The expected loss of perturbed hyperparameters: each example at each node."""
        nodes, weights = grid(normal, [scale])
        each = nodes.repeat_interleave(len(self.x), 0)
        with self.model.at(self.h + each, linearized=linearized):
            missed = self.model(self.x.repeat(len(nodes), 1))[:, 0] - self.t.repeat(len(nodes))
        fit = missed.square().view(len(nodes), -1).mean(1)
        (response,) = self.layer.responses()
        decay = torch.stack([response.at(node).square().sum() for node in nodes])
        return weights @ (0.5 * fit + 0.5 * (self.h + nodes)[:, 0].exp() * decay)


def off(found, wanted):
    return float((found.detach() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("linearized", [False, True])
def test_joint_fit_of_ridge_regression_biases_the_weights_it_serves_and_separate_objectives_do_not(linearized):
    joint, separate, slopes = [], [], []
    for scale in (0.1, 0.5, 1.0):
        ridge = Ridge()
        exact, slope = ridge.solution(ridge.h), torch.func.jacrev(ridge.solution)(ridge.h)[:, 0]
        centre, direction = ridge.layer.weight, ridge.layer.response_weight
        minimize(lambda ridge=ridge, s=scale: ridge.about(s, linearized=linearized), [centre, direction])
        joint.append(off(centre[0], exact))

        minimize(ridge.at_centre, [centre])
        minimize(lambda ridge=ridge, s=scale: ridge.about(s, linearized=linearized), [direction])
        separate.append(off(centre[0], exact))
        slopes.append(off(direction[0], slope))
    assert joint[0] < joint[1] < joint[2]
    assert 1e-3 < joint[2] < 1e-1
    assert max(separate) < 1e-6
    assert slopes[0] < slopes[1] < slopes[2]  # the curvature in h stays: small scales matter
    assert 1e-3 < slopes[0] < 1e-2 < slopes[2]


# ---- conditioning (Delta-STN, section 3) ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("h", "scale", "stn", "delta"), [(2.0, 1.0, 34.0, 1.0), (2.0, 0.5, 108.0, 4.0), (5.0, 0.5, 2754.0, 4.0)]
)
def test_centring_makes_the_fit_of_the_response_well_conditioned(h, scale, stn, delta):
    nodes, weights = grid(normal, [scale])
    for kind, wanted in ((StnLinear, stn), (DeltaStnLinear, delta)):
        model, layer = affine_weights(kind, [h], 1)
        with model.at(h + nodes):
            w = model(torch.ones(len(nodes), 1, dtype=F64))[:, 0]
        _, curvature = hessian(0.5 * weights @ w.square(), [layer.gate_weight, layer.weight])
        assert float(torch.linalg.cond(curvature)) == pytest.approx(wanted, rel=0.01)


# ---- two linear layers: gating of rows is the exact response (Self-Tuning Networks, section 3.1) ---------------------


class Gated:
    """y = s' Q x with 1/2n ||X w - t||^2 + e^h / 2 ||dy/dx||^2: rows of Q are the principal directions of the inputs,
    s fits without penalty, and the best response scales row i by sigmoid(log d_i^2 - h)."""

    def __init__(self):
        g = generator(5)
        self.x = torch.randn(20, 4, generator=g, dtype=F64) * torch.tensor([3.0, 1.0, 0.5, 0.2], dtype=F64)
        self.t = torch.randn(20, generator=g, dtype=F64)
        left, d, self.q = torch.linalg.svd(self.x / math.sqrt(20), full_matrices=False)
        self.s = left.T @ self.t / math.sqrt(20) / d
        self.open_at = 2 * d.log()  # the h at which a gate is half open

    def gates(self, h):
        return torch.sigmoid(self.open_at - h)

    def exact(self, h, x):
        gram = self.x.T @ self.x / 20 + torch.exp(torch.as_tensor(h, dtype=F64)) * torch.eye(4, dtype=F64)
        return x @ torch.linalg.solve(gram, self.x.T @ self.t / 20)

    def top(self):
        top = nn.Linear(4, 1, bias=False, dtype=F64)
        with torch.no_grad():
            top.weight.copy_(self.s)
        return top


def test_row_gating_is_the_exact_response_of_two_linear_layers():
    problem = Gated()
    layer, top = StnLinear(4, 4, bias=False, dtype=F64, num_hparams=4), problem.top()
    with torch.no_grad():
        layer.weight.zero_()
        layer.response_weight.copy_(problem.q)
        layer.gate_weight.copy_(torch.eye(4))
    x = torch.randn(7, 4, generator=generator(6), dtype=F64)
    points = torch.linspace(-6, 3, 7, dtype=F64)  # one for each example
    answers = top(layer(x, problem.gates(points[:, None])))[:, 0]
    exact = torch.stack([problem.exact(h, row) for h, row in zip(points, x, strict=True)])
    torch.testing.assert_close(answers, exact, rtol=1e-10, atol=1e-10)


def test_linearized_gating_has_the_exact_slope_of_two_linear_layers():
    problem, h = Gated(), -1.0
    layer = DeltaStnLinear(4, 4, bias=False, dtype=F64, num_hparams=1)
    gates = problem.gates(h)
    with torch.no_grad():
        layer.weight.copy_(gates[:, None] * problem.q)
        layer.response_weight.copy_(problem.q)
        layer.gate_weight.copy_(-(gates * (1 - gates))[:, None])
    model = StnModel(nn.Sequential(layer, problem.top()), hyperparameters([h]), centred=True)
    x = torch.randn(7, 4, generator=generator(6), dtype=F64)
    torch.testing.assert_close(model(x)[:, 0], problem.exact(h, x), rtol=1e-10, atol=1e-10)
    step = 1e-4
    slope = (problem.exact(h + step, x) - problem.exact(h - step, x)) / (2 * step)
    with model.at(model.hparams.unconstrained.detach() + torch.full((7, 1), 0.1, dtype=F64), linearized=True):
        tangent = (model(x)[:, 0] - problem.exact(h, x)) / 0.1
    torch.testing.assert_close(tangent, slope, rtol=1e-6, atol=1e-8)
