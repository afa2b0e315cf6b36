"""effective_lr: its closed form, and that it is what the optimizers do."""

import cmath
import math

import pytest
import torch
from torch.nn import Parameter

import nestopt_ext as nx
from nestopt_ext import ComplexSGD, effective_lr

BETAS = [0, 0.9, -0.5, 0.5j, cmath.rect(0.9, math.pi / 8), cmath.rect(0.8, -2.0)]


@pytest.mark.parametrize("beta", BETAS, ids=str)
def test_it_is_the_long_run_step_of_complex_sgd(beta):
    p = Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = ComplexSGD([p], lr=0.25, momentum=beta)
    for _ in range(500):
        before = p.item()
        p.grad = torch.full_like(p, -1.0)
        optimizer.step()
    assert p.item() - before == pytest.approx(effective_lr(0.25, beta), rel=1e-11)


@pytest.mark.parametrize(
    ("modulus", "angle", "wanted"),
    [(0.9, 0, 10), (0.9, math.pi / 16, 2.63), (0.9, math.pi / 8, 1.146), (0.9, math.pi / 2, 0.552), (0.8, 0, 5)],
)
def test_published_values(modulus, angle, wanted):
    assert effective_lr(1.0, cmath.rect(modulus, angle)) == pytest.approx(wanted, rel=2e-3)


@pytest.mark.parametrize("beta", BETAS, ids=str)
def test_the_two_forms_of_the_formula_agree(beta):
    assert effective_lr(2.0, beta) == pytest.approx(2 * (1 - beta.real) / abs(1 - beta) ** 2, rel=1e-14)
    assert effective_lr(2.0, beta) == pytest.approx(effective_lr(2.0, complex(beta).conjugate()), rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_tensor_stays_a_tensor_with_its_derivative(dtype):
    lr = torch.tensor(0.1, dtype=dtype, requires_grad=True)
    out = effective_lr(lr, 0.75)
    assert out.dtype == dtype and out.shape == ()
    (derivative,) = torch.autograd.grad(out, lr)
    torch.testing.assert_close(derivative, torch.tensor(4.0, dtype=dtype))


@pytest.mark.parametrize(
    ("lr", "beta", "kind", "message"),
    [
        (-0.1, 0.5, ValueError, "lr must be finite and >= 0; got -0.1"),
        (float("nan"), 0.5, ValueError, "lr must be finite and >= 0; got nan"),
        ("1", 0.5, TypeError, "lr must be a number or a tensor; got '1'"),
        (torch.ones(2), 0.5, ValueError, "lr must be a float32 or float64 tensor of one element"),
        (0.1, 1.0, ValueError, "beta must have modulus below 1; got 1.0"),
        (0.1, 1j, ValueError, "beta must have modulus below 1"),
        (0.1, None, TypeError, "beta must be a real or complex number; got None"),
    ],
)
def test_bad_arguments_are_refused(lr, beta, kind, message):
    with pytest.raises(kind, match=f"^effective_lr: {message}"):
        effective_lr(lr, beta)


def test_it_is_public():
    assert nx.effective_lr is effective_lr and "effective_lr" in nx.__all__
