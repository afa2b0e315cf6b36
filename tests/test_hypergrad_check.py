import math
import warnings

import pytest
import torch
from cases import F64, PROBLEMS, flat, generator, leaf, normal, quadratic, relative_error, ridge, scalar, spd, values
from helpers import all_same_bits
from torch import nn

from nestopt_ext.curvature import Diagonal, GaussNewton, Hessian
from nestopt_ext.hypergrad import FixedPointMap, check_hypergradient, hypergradient
from nestopt_ext.hypergrad._spectrum import lanczos
from nestopt_ext.solvers import ConjugateGradient, Exact, FixedPoint, Identity, Neumann, Status

EXACT = [Exact(), ConjugateGradient(200, 1e-12), Neumann(4000, rtol=1e-10)]


def names(report):
    return [finding.name for finding in report.findings]


def checked(problem, **options):
    return check_hypergradient(*problem.closures(), problem.params, problem.hparams, **{"solver": Exact(), **options})


@pytest.mark.parametrize("solver", EXACT, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("name", PROBLEMS)
def test_healthy_problems_have_no_findings(name, solver):
    problem = PROBLEMS[name]()
    report = checked(problem, solver=solver)
    assert report.findings == () and report.agrees
    assert relative_error(report.exact, problem.hypergradient) < 1e-11
    assert report.error < 1e-9 and report.finite_difference_error < 1e-7
    assert 1 - report.cosine < 1e-12 and 1 - report.finite_difference_cosine < 1e-12
    found = hypergradient(*problem.closures(), problem.params, problem.hparams, solver=solver)
    assert relative_error(report.hypergradient, found) < 1e-13  # products may be recorded in one and not in the other
    eigenvalues = torch.linalg.eigvalsh(problem.hessian)
    assert report.hessian_eigenvalues == pytest.approx((float(eigenvalues[0]), float(eigenvalues[-1])), rel=1e-9)
    assert str(report).endswith("agrees: nothing is off")


def test_the_finite_differences_are_those_of_the_problem_solved_again():
    """The optimum of a quadratic problem is known, so the derivative along a direction is, too."""
    problem = quadratic()
    report = checked(problem, num_directions=4, seed=3)
    wanted = flat(problem.hypergradient)
    assert len(report.directions) == 5
    assert report.directions[0].finite_difference == pytest.approx(float(wanted.norm()), rel=1e-8)
    for d in report.directions:
        assert abs(d.finite_difference - d.exact) <= 2 * d.uncertainty + 1e-9
    again = checked(problem, num_directions=4, seed=3)
    assert again.directions == report.directions
    assert checked(problem, num_directions=4, seed=4).directions[1] != report.directions[1]
    assert len(checked(problem, num_directions=0).directions) == 1


# ---- one fault each -------------------------------------------------------------------------------------------------


def ill(kappa=100.0):
    """w' A w / 2 - w'h, outer |w - c|^2 / 2."""
    a, c = spd(1, 8, kappa), normal(3, 8)
    h = leaf(normal(4, 8))
    w = leaf(torch.linalg.solve(a, h))
    return (lambda: 0.5 * (w - c).square().sum()), (lambda: 0.5 * w @ a @ w - w @ h), w, h


def test_indefinite_curvature():
    a = torch.diag(torch.tensor([1.0, -0.5], dtype=F64))
    h = leaf(normal(0, 2))
    w = leaf(torch.linalg.solve(a, h))
    arguments = (lambda: 0.5 * w.square().sum() + w.sum()), (lambda: 0.5 * w @ a @ w - w @ h), w, h
    report = check_hypergradient(*arguments, solver=Exact())
    assert names(report) == ["curvature_indefinite"]
    assert report.hessian_eigenvalues == pytest.approx((-0.5, 1.0))
    assert "-0.5 < 0" in report.findings[0].message and "above 0.5" in report.findings[0].message
    assert math.isnan(report.directions[0].finite_difference)
    report = check_hypergradient(*arguments, solver=Exact(damping=0.6))
    assert "curvature_indefinite" not in names(report)
    assert "damping_too_large" in names(report)


def test_singular_curvature():
    h = leaf(torch.tensor(1.0, dtype=F64))
    w = leaf(torch.tensor([0.5, 0.5], dtype=F64))
    report = check_hypergradient(
        lambda: 0.5 * w.sum() ** 2, lambda: 0.5 * (w.sum() - h) ** 2, w, h, solver=ConjugateGradient()
    )
    assert names(report) == ["curvature_singular"]
    assert report.error < 1e-6 and report.finite_difference_error < 1e-6


def test_alpha_too_large():
    problem = ridge()
    limit = 2 / float(torch.linalg.eigvalsh(problem.hessian)[-1])
    report = checked(problem, solver=Neumann(60, alpha=1.05 * limit))
    assert names(report) == ["alpha_too_large"]
    assert report.status is Status.diverged
    assert report.alpha_limit == pytest.approx(limit)
    assert checked(problem, solver=Neumann(400, alpha=0.95 * limit)).agrees


def test_alpha_too_small():
    problem = quadratic()
    top = float(torch.linalg.eigvalsh(problem.hessian)[-1])
    terms = 200
    report = checked(problem, solver=Neumann(terms, alpha=1e-4 / top))
    assert names(report) == ["alpha_too_small"]
    low = report.solved_eigenvalues[0]
    share = 100 * (1 - (1 - report.alpha * low) ** (terms + 1))
    assert f"covered {share:.3g} %" in report.findings[0].message
    assert checked(problem, solver=Neumann(terms, alpha=0.9 / top)).agrees


def test_too_few_terms_and_the_number_named_is_enough():
    problem = ridge()
    report = checked(problem, solver=Neumann(3))
    assert names(report) == ["too_few_terms"] and report.status is Status.max_terms
    assert report.residual > 0.01 and report.error == pytest.approx(report.solver_error)
    needed = int(report.findings[0].message.partition("Take about ")[2].split()[0])
    assert checked(problem, solver=Neumann(needed + 2)).agrees


def test_alpha_too_small_and_too_few_terms_at_once():
    outer, inner, w, h = ill()
    assert names(check_hypergradient(outer, inner, w, h, solver=Neumann(3, alpha=1e-3))) == [
        "alpha_too_small",
        "too_few_terms",
    ]


@pytest.mark.parametrize("solver", [Identity(), ConjugateGradient(2), FixedPoint(3)], ids=lambda s: type(s).__name__)
def test_other_solvers_that_end_early(solver):
    outer, inner, w, h = ill()
    report = check_hypergradient(outer, inner, w, h, solver=solver)
    assert names(report) == ["too_few_terms"]
    assert report.solver_error > 0.01


def test_damping_and_its_part_of_the_error():
    outer, inner, w, h = ill()
    report = check_hypergradient(outer, inner, w, h, solver=Exact(damping=0.1))
    assert names(report) == ["damping_too_large"]
    assert report.error == pytest.approx(report.damping_error) and report.solver_error < 1e-12
    assert report.solved_eigenvalues == pytest.approx((0.11, 1.1))


def test_a_curvature_that_is_not_the_hessian():
    problem = quadratic()
    hessian = Hessian(problem.losses()[1], problem.params)
    assert checked(problem, curvature=hessian).agrees
    other = Diagonal(hessian.diagonal(), problem.params)
    report = checked(problem, curvature=other)
    assert names(report) == ["curvature_differs"]
    diagonal = torch.diag(problem.hessian.diagonal())
    wanted = float((problem.hessian - diagonal).norm() / problem.hessian.norm())
    assert report.curvature_gap == pytest.approx(wanted)
    assert report.error == pytest.approx(report.curvature_error) and report.solver_error < 1e-12
    assert checked(problem, curvature=lambda v: v, solver=Neumann(20)).curvature_gap > 0.1


def test_inner_params_off_their_minimum():
    outer, inner, w, h = ill(3.0)
    best = w.detach().clone()
    with torch.no_grad():
        w += 0.1
    report = check_hypergradient(outer, inner, w, h, solver=Exact())
    assert names(report) == ["inner_not_converged"]
    shift = float((w.detach() - best).norm())
    assert report.inner_distance == pytest.approx(shift / float(best.norm()), rel=1e-9)
    there = hypergradient(outer, inner, w, h, solver=Exact())[0]
    with torch.no_grad():
        w.copy_(best)
    here = hypergradient(outer, inner, w, h, solver=Exact())[0]
    assert report.inner_error == pytest.approx(relative_error(there, here), rel=1e-9)
    assert report.finite_difference_error > 0.01


def test_an_inner_loss_without_a_minimum():
    h = leaf(torch.tensor(1.0, dtype=F64))
    w = leaf(torch.tensor(0.0, dtype=F64))
    report = check_hypergradient(lambda: w.square() + w, lambda: (h * w - 3).exp(), w, h, solver=Exact())
    assert names(report) == ["inner_not_solved"]


def test_unused_hparams_by_name():
    problem = scalar()
    extra = leaf(torch.ones(2, dtype=F64))
    outer, inner = problem.closures()
    hparams = {"used": problem.hparams, "unused": extra}
    report = check_hypergradient(outer, inner, problem.params, hparams, solver=Exact())
    assert report.unused_hparams == ("hparams['unused']",)
    assert names(report) == ["unused_hparam"]
    report = check_hypergradient(outer, inner, problem.params, extra, solver=Exact())
    assert names(report) == ["unused_hparam"] and report.hypergradient[0].tolist() == [0, 0]


@pytest.mark.parametrize("which", ["outer_loss", "inner_loss"])
def test_stochastic_losses(which):
    problem = scalar()
    outer, inner = problem.closures()
    noisy = {"outer_loss": outer, "inner_loss": inner}
    quiet = noisy[which]
    noisy[which] = lambda: quiet() * (1 + 0.1 * torch.rand((), dtype=F64))
    report = check_hypergradient(*noisy.values(), problem.params, problem.hparams, solver=Exact())
    assert names(report) == ["stochastic_loss"] and report.stochastic_losses == (which,)


def test_a_loss_with_a_batch_of_its_own_each_time():
    problem = scalar()
    outer, inner = problem.closures()
    calls = []

    def changing():
        calls.append(None)
        return outer() + 1e-3 * len(calls)

    report = check_hypergradient(changing, inner, problem.params, problem.hparams, solver=Exact())
    assert "stochastic_loss" in names(report)


@pytest.mark.parametrize("step", [1e-14, 1.0])
def test_steps_too_small_and_too_large(step):
    h = leaf(torch.tensor(0.3, dtype=F64))
    w = leaf(h.exp().sin())
    report = check_hypergradient(
        lambda: w.pow(3) + 1.3, lambda: 0.5 * (w - h.exp().sin()).square(), w, h, solver=Exact(), step=step
    )
    assert names(report) == ["finite_differences_unreliable"]
    assert report.error < 1e-12


@pytest.mark.parametrize("hidden", ["inner", "outer"])
def test_what_is_hidden_from_autograd(hidden):
    h = leaf(torch.tensor(1.0, dtype=F64))
    w = leaf(torch.tensor(1.0, dtype=F64))
    inner = lambda: 0.5 * (w - (h if hidden == "outer" else 0.5 * h + 0.5 * h.detach())).square()  # noqa: E731
    outer = lambda: w.square() + (h.detach() if hidden == "outer" else h)  # noqa: E731
    report = check_hypergradient(outer, inner, w, h, solver=Exact())
    assert names(report) == ["not_differentiated"]
    assert report.directions[0].finite_difference == pytest.approx(3.0, rel=1e-6)


@pytest.mark.parametrize("where", ["outer", "inner", "curvature"])
def test_nan_is_said_and_kept(where):
    problem = scalar()
    bad = torch.tensor(math.nan if where != "curvature" else 1.0, dtype=F64)
    outer, inner = problem.closures()
    curvature = (lambda v: v * math.nan) if where == "curvature" else None
    report = check_hypergradient(
        lambda: outer() * (bad if where == "outer" else 1),
        lambda: inner() * (bad if where == "inner" else 1),
        problem.params,
        problem.hparams,
        curvature=curvature,
        solver=Neumann(2),
    )
    assert names(report) == ["non_finite"]
    assert report.hypergradient[0].isnan() and math.isnan(report.error)
    assert (f"{where}_loss" if where != "curvature" else "Hessian or curvature") in report.findings[0].message
    assert "nan" in str(report)


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", ["auto", 0.2])
def test_the_alpha_reported_is_the_one_used(alpha):
    """The residual of a series of K products is (I - alpha A)^(K+1) v."""
    problem = ridge()
    report = checked(problem, solver=Neumann(4, alpha=alpha))
    outer = problem.losses()[0]
    (v,) = torch.autograd.grad(outer, problem.params)
    rest = torch.eye(12, dtype=F64) - report.alpha * problem.hessian
    wanted = (torch.linalg.matrix_power(rest, 5) @ v).norm() / v.norm()
    assert report.residual == pytest.approx(float(wanted), rel=1e-9)
    assert report.num_products == (9 if alpha == "auto" else 4)


def large():
    """Too many params to write the matrix out; 2500 elements, condition number 50."""
    scale = torch.linspace(1, 50, 2500, dtype=F64)
    h = leaf(normal(4, 2500))
    w = leaf(h.detach() / scale)
    c = normal(5, 2500)
    return (lambda: 0.5 * (w - c).square().mean()), (lambda: (0.5 * scale * w.square() - w * h).mean()), w, h


def test_large_problems_are_solved_without_the_matrix():
    outer, inner, w, h = large()
    report = check_hypergradient(outer, inner, w, h, solver=ConjugateGradient(200, 1e-10), num_directions=1)
    assert report.findings == ()
    assert report.exact_method.startswith("Lanczos") and report.exact_residual < 1e-8
    assert report.finite_difference_error < 1e-5
    assert report.hessian_eigenvalues == pytest.approx((1 / 2500, 50 / 2500), rel=0.05)
    report = check_hypergradient(outer, inner, w, h, solver=Neumann(5), num_directions=0)
    assert names(report) == ["too_few_terms"]


def test_lanczos_equals_the_eigenvalues_of_a_small_matrix():
    a, v = spd(1, 20, 30.0), normal(2, 20)
    spectrum = lanczos(lambda x: a @ x, v)
    torch.testing.assert_close(spectrum.values, torch.linalg.eigvalsh(a))
    torch.testing.assert_close(spectrum.solve(0.5, 0.0), torch.linalg.solve(a + 0.5 * torch.eye(20, dtype=F64), v))
    eigenvector = torch.linalg.eigh(a)[1][:, 3]
    assert len(lanczos(lambda x: a @ x, eigenvector).values) <= 3
    assert lanczos(lambda x: a @ x, torch.zeros_like(v)).solve(0.0, 0.0).abs().max() == 0


def test_single_precision_is_judged_by_its_own_rounding():
    a, h = spd(1, 6, 5.0).float(), leaf(normal(2, 6).float())
    w = leaf(torch.linalg.solve(a, h))
    report = check_hypergradient(
        lambda: 0.5 * (w - 1).square().sum(), lambda: 0.5 * w @ a @ w - w @ h, w, h, solver=Exact()
    )
    assert report.findings == ()
    assert report.step == pytest.approx(2 ** (-23 / 3) * max(1.0, float(h.detach().norm())))
    assert report.finite_difference_error < 5e-3


# ---- what it leaves behind ------------------------------------------------------------------------------------------


#: The call of the inner loss at which its params are being moved.
MID_SOLVE = 8


class Boom(Exception):
    pass


@pytest.mark.parametrize("fails_at", [None, 2, MID_SOLVE])
def test_everything_stays_bit_for_bit(fails_at):
    torch.manual_seed(0)
    layers = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 1)
    net = nn.Sequential(*layers).double().train()
    decay = leaf(torch.tensor(0.1, dtype=F64))
    x = normal(1, 16, 3)
    params = list(net.parameters())
    for p in [*params, decay]:
        p.grad = torch.ones_like(p)
    calls = []

    def inner():
        calls.append(None)
        if len(calls) == fails_at:
            raise Boom
        return net(x).square().mean() + 5 * sum((decay.exp() * (p - 0.1).square()).sum() for p in params)

    def outer():
        return (net(x) - 1).square().mean()

    own = [*params, decay, *(p.grad for p in params), decay.grad]
    graph = inner()
    calls.clear()
    before = [t.detach().clone() for t in (*own, *net.buffers())]
    versions = [t._version for t in own]
    rng = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if fails_at is None:
            report = check_hypergradient(outer, inner, params, decay, solver=Neumann(5), num_directions=1)
            assert "stochastic_loss" in names(report) and len(calls) > 2 * MID_SOLVE
        else:
            with pytest.raises(Boom):
                check_hypergradient(outer, inner, params, decay, solver=Neumann(5), num_directions=1)
    assert all_same_bits(before, [t.detach() for t in (*own, *net.buffers())])
    assert versions == [t._version for t in own]
    assert torch.equal(rng, torch.get_rng_state())
    torch.autograd.grad(graph, params)


def test_structures_and_leafless_hparams():
    problem = PROBLEMS["named_ridge"]()
    report = checked(problem)
    assert len(report.hypergradient) == len(values(problem.hparams))
    assert [t.shape for t in report.exact] == [t.shape for t in values(problem.hparams)]


P = scalar()
OUTER, INNER = P.closures()


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "message"),
    [
        ((P.losses()[0], INNER), {}, TypeError, "outer_loss must be a zero-argument closure.*got Tensor. Wrap its"),
        ((OUTER, P.losses()[1]), {}, TypeError, "inner_loss must be a zero-argument closure.*got Tensor"),
        ((OUTER, 3), {}, TypeError, "inner_loss must be a zero-argument closure.*got int"),
        ((OUTER, INNER), {"solver": Neumann}, TypeError, "solver must be a solver"),
        ((OUTER, INNER), {"num_directions": -1}, ValueError, "num_directions must be >= 0; got -1"),
        ((OUTER, INNER), {"num_directions": 1.0}, TypeError, "num_directions must be an int; got 1.0"),
        ((OUTER, INNER), {"step": 0.0}, ValueError, "step must be finite and > 0; got 0.0"),
        ((OUTER, INNER), {"step": math.nan}, ValueError, "step must be finite and > 0; got nan"),
        ((OUTER, INNER), {"rtol": 1.0}, ValueError, "rtol must be > 0 and < 1; got 1.0"),
        ((OUTER, INNER), {"seed": True}, TypeError, "seed must be an int; got True"),
        ((OUTER, INNER), {"curvature": 3}, TypeError, "curvature must be callable; got int"),
        ((OUTER, INNER), {"curvature": lambda v: v.float()}, TypeError, r"curvature\(v\) must be float64"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, options, kind, message):
    with pytest.raises(kind, match="^check_hypergradient: " + message):
        check_hypergradient(*arguments, P.params, P.hparams, **options)


def test_params_and_hparams_are_checked_as_everywhere():
    with pytest.raises(ValueError, match="hparams must require grad"):
        check_hypergradient(OUTER, INNER, P.params, torch.ones((), dtype=F64))
    with pytest.raises(ValueError, match="inner_loss must depend on params"):
        check_hypergradient(OUTER, lambda: P.hparams.square(), P.params, P.hparams)


def test_the_random_directions_come_from_a_generator_of_their_own():
    own = generator(0)
    torch.randn(1, generator=own)
    state = torch.get_rng_state()
    checked(scalar())
    assert torch.equal(state, torch.get_rng_state())


def test_an_operator_may_hold_its_params_in_another_structure():
    torch.manual_seed(0)
    model, x, y = torch.nn.Linear(3, 1).double(), torch.randn(8, 3).double(), torch.randn(8, 1).double()
    params, mse = list(model.parameters()), torch.nn.MSELoss()
    h = torch.zeros((), dtype=torch.float64, requires_grad=True)
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(8, 1).double()], 1), y).solution
    with torch.no_grad():
        params[0].copy_(solution[:3].T)
        params[1].copy_(solution[3])
    curvature = GaussNewton(model, mse, x, y)
    assert set(dict(model.named_parameters())) == {"weight", "bias"}, "the operator acts on a dict of these"
    report = check_hypergradient(
        lambda: model(x[:2]).sum(),
        lambda: mse(model(x), y + h),
        params,
        h,
        solver=Exact(),
        curvature=curvature,
    )
    assert "curvature_differs" not in [finding.name for finding in report.findings]


def test_a_fixed_point_map_is_refused_by_name():
    w, h = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    with pytest.raises(TypeError, match="inner_loss must be a loss; got a FixedPointMap, which cannot be checked"):
        check_hypergradient(lambda: w.sum(), FixedPointMap(lambda: w * h), w, h)
