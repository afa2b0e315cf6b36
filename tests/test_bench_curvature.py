"""The cases of curvatures: their networks, what contestants are compared with, and that faults are found."""

import dataclasses
import importlib.util

import pytest
import torch

from bench import registry
from bench.cases import _bilevel, _curvatures, curvature_solve
from bench.cases._curvatures import EMPIRICAL_FISHER, GAUSS_NEWTON, HESSIAN
from bench.cases._problems import KINDS, Problem
from bench.registry import Setting
from nestopt_ext.curvature._dual import DualSpace

QUICK = Setting(torch.device("cpu"), quick=True)


@pytest.mark.parametrize("name", KINDS)
def test_a_problem_is_the_same_every_time_and_in_float64(name):
    first, again = Problem(name, QUICK), Problem(name, QUICK)
    torch.rand(1)
    exact = first.in_float64()
    for a, b, c in zip(first.params, again.params, exact.params, strict=True):
        assert torch.equal(a, b) and torch.equal(a.double(), c)
    assert torch.equal(first.inner_x, again.inner_x) and not torch.equal(first.inner_x, first.outer_x)
    assert not first.model.training
    outputs = exact.model(exact.inner_x)
    torch.testing.assert_close(exact.call(exact.params, exact.inner_x), outputs)
    torch.testing.assert_close(first.model(first.inner_x).double(), outputs, rtol=1e-4, atol=1e-5)


def test_the_networks_have_the_sizes_they_are_named_after():
    full = Setting(torch.device("cpu"))
    counts = {name: sum(p.numel() for p in Problem(name, full).params) for name in ("logistic", "mlp", "large-mlp")}
    assert counts == {"logistic": 7850, "mlp": 4810, "large-mlp": 784 * 512 + 512 + 512 * 512 + 512 + 5130}
    resnet = Problem("resnet18", full).model
    convolutions = [m for m in resnet.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) == 17  # and one dense layer


def dense(product, params):
    columns = []
    for unit in torch.eye(sum(p.numel() for p in params), dtype=params[0].dtype):
        parts = torch.split(unit, [p.numel() for p in params])
        v = [t.view_as(p) for t, p in zip(parts, params, strict=True)]
        columns.append(torch.cat([t.flatten() for t in product(v)]))
    return torch.stack(columns)


def test_references_are_the_matrices_by_definition():
    problem = Problem("large-mlp", QUICK).in_float64()
    problem.model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    problem.params = list(problem.model.parameters())
    problem.inner_x, problem.inner_y = torch.randn(6, 4).double(), torch.randint(3, (6,))
    logits = problem.model(problem.inner_x)
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(z, problem.params, retain_graph=True)])
        for z in logits.flatten()
    ]
    jacobian = torch.stack(rows).view(6, 3, -1)
    p = logits.detach().softmax(-1)
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected = torch.einsum("nip,nij,njq->pq", jacobian, middle, jacobian) / 6
    found = dense(_curvatures.reference(GAUSS_NEWTON, problem), problem.params)
    torch.testing.assert_close(found, expected)
    grads = torch.einsum("nip,ni->np", jacobian, p - torch.eye(3).double()[problem.inner_y])
    found = dense(_curvatures.reference(EMPIRICAL_FISHER, problem), problem.params)
    torch.testing.assert_close(found, grads.T @ grads / 6)


def test_fewer_terms_go_by_the_route_of_all(monkeypatch):
    """Else their memory would be that of another algorithm."""
    summed = []
    series = DualSpace.series
    monkeypatch.setattr(DualSpace, "series", lambda self, v, *rest: summed.append(rest[0]) or series(self, v, *rest))
    for num_terms in (20, 100):
        field = curvature_solve._build(EMPIRICAL_FISHER, "logistic", num_terms, Setting(torch.device("cpu")))
        (fewer,) = [c for c in field.contestants if c.name == f"EmpiricalFisher, K = {num_terms // 5}"]
        for contestant in (field.contestants[0], fewer):
            summed.clear()
            contestant.step()
            assert summed == [num_terms if contestant is field.contestants[0] else num_terms // 5]


def test_the_hessian_of_logistic_regression_is_its_gauss_newton_matrix():
    problem = Problem("logistic", QUICK).in_float64()
    v = problem.outer_gradient()
    pairs = zip(*(_curvatures.reference(kind, problem)(v) for kind in (HESSIAN, GAUSS_NEWTON)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", [GAUSS_NEWTON, EMPIRICAL_FISHER])
def test_a_solve_that_forgets_the_curvature_is_found(kind):
    problem = Problem("mlp", QUICK)
    sums = curvature_solve._Sums(kind, problem, 5)
    right = sums.contestant(_curvatures.ours(kind), registry.OURS)
    right.step()
    assert registry.wrong_by(right, 1) <= right.tolerance
    total = _curvatures.neumann_sum(_curvatures.reference(kind, problem), sums.v, 5, sums.alpha)
    forgot = [6 * sums.alpha * t for t in sums.v]
    for fault in (0.0, 1e-3):
        solve = lambda *_, fault=fault: [s + fault * (f - s) for s, f in zip(total, forgot, strict=True)]  # noqa: E731
        other = sums.contestant(_curvatures.Way("faulty", None, solve), registry.BASELINE)
        other.step()
        assert (registry.wrong_by(other, 1) > other.tolerance) == (fault > 0)


def test_a_step_with_another_matrix_is_found():
    for name in ("step/one-decay/logistic-K20", "step/decay-per-weight/logistic-K20"):
        contestants = {c.name: c for c in registry.CASES[name].build(QUICK).contestants}
        ours, other = contestants["GaussNewton"], contestants["EmpiricalFisher"]
        other.step()
        assert registry.wrong_by(other, 1) <= other.tolerance
        crossed = dataclasses.replace(other, expected=ours.expected)
        assert registry.wrong_by(crossed, 1) > 10 * crossed.tolerance


def test_the_exact_inverse_is_that_of_the_damped_matrix():
    bilevel = _bilevel.Bilevel(Problem("mlp", QUICK).in_float64(), -3.0, 5, 0.1)
    product = bilevel.damped(_curvatures.reference(GAUSS_NEWTON, bilevel.problem))
    v = bilevel.problem.outer_gradient()
    for a, b in zip(product(_bilevel._conjugate_gradients(product, v)), v, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("missing", ["curvlinops", "hessian_eigenthings", "torchopt"])
def test_peers_that_are_not_installed_are_left_out_by_name(monkeypatch, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    label = {"curvlinops": "curvlinops", "hessian_eigenthings": "hessian-eigenthings", "torchopt": "TorchOpt"}[missing]
    family = "step/one-decay" if missing == "torchopt" else "product/empirical_fisher"
    field = registry.CASES[f"{family}/logistic{'-K20' if missing == 'torchopt' else ''}"].build(QUICK)
    assert field.left_out[label] == f"{missing} is not installed"
    assert label not in [c.name for c in field.contestants]


def test_a_matrix_of_gradients_that_is_too_large_is_left_out_by_name():
    problem = Problem("large-mlp", Setting(torch.device("cpu")))
    ways = {way.name: way for way in _curvatures.rivals(EMPIRICAL_FISHER)}
    assert ways["vmap of grad, rows kept"].left_out(problem, 100) is None  # 0.7 GB
    anew = ways["hessian-eigenthings"].unfit(problem, 100)
    assert "0.7 GB, anew for each of 100 products" in anew and ways["hessian-eigenthings"].unfit(problem, 5) is None
