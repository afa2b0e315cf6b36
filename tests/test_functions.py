"""softmax_hessian as a function: any shape, every order of derivative, and never a silent zero."""

import re

import pytest
import torch
from helpers import Memory
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

from nestopt_ext._functions import softmax_hessian

INF, NAN = float("inf"), float("nan")


def plain(logits, u, row_weight):
    """The same in PyTorch's own operations."""
    p = logits.softmax(-1)
    return row_weight.unsqueeze(-1) * p * (u - (p * u).sum(-1, keepdim=True))


def make(*shape, device="cpu", dtype=torch.float64):
    """Leaves that require grad; one of the weights is zero."""
    logits, u = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    weight = torch.rand(shape[:-1], dtype=dtype, device=device)
    if weight.numel() > 1:
        weight.view(-1)[0] = 0.0
    return [t.requires_grad_() for t in (2 * logits, u, weight)]


SHAPES = [(4,), (2, 1), (3, 5), (2, 2, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_derivatives(shape, device):
    arguments = make(*shape, device=device)
    torch.testing.assert_close(softmax_hessian(*arguments), plain(*arguments), rtol=1e-12, atol=1e-13)
    assert gradcheck(
        softmax_hessian, arguments, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert gradgradcheck(softmax_hessian, arguments, check_fwd_over_rev=True, check_batched_grad=shape == (3, 5))


def test_derivatives_beside_classes_left_out(device):
    logits, u, weight = make(3, 5, device=device)
    left_out = torch.zeros(3, 5, dtype=torch.bool, device=device)
    left_out[1, 2:] = left_out[2, 0] = True

    def product(logits, u, weight):
        return softmax_hessian(logits.masked_fill(left_out, -INF), u, weight)

    assert gradcheck(product, (logits, u, weight), check_forward_ad=True)
    assert gradgradcheck(product, (logits, u, weight), check_fwd_over_rev=True)


@pytest.mark.parametrize("order", [3, 4])
def test_higher_derivatives(order, device):
    """Along one line, by reverse mode alone."""
    values = []
    for function in (softmax_hessian, plain):
        torch.manual_seed(1)
        logits, u, weight = (t.detach() for t in make(2, 3, device=device))
        s = torch.tensor(0.3, dtype=torch.float64, device=device, requires_grad=True)
        value = (function(logits * (1 + s), u + s * s, weight - s) ** 2).sum()
        for _ in range(order):
            (value,) = torch.autograd.grad(value, s, create_graph=True)
        values.append(value)
    assert values[0].abs() > 1e-3
    torch.testing.assert_close(*values, rtol=1e-10, atol=0)


def test_it_is_the_hessian_of_every_cross_entropy(device):
    logits, u, _ = make(6, 5, device=device)
    class_weights = torch.rand(5, dtype=torch.float64, device=device)
    indices = torch.tensor([0, 4, -100, 2, 2, 1], device=device)
    kept = (indices != -100).double()
    probabilities = torch.rand(6, 5, dtype=torch.float64, device=device)
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    cases = [
        (functional.cross_entropy(logits, indices, reduction="sum"), kept),
        (functional.cross_entropy(logits, indices, reduction="sum", label_smoothing=0.1), kept),
        (
            functional.cross_entropy(logits, indices, class_weights, reduction="sum"),
            kept * class_weights[indices.clamp(min=0)],
        ),
        (functional.cross_entropy(logits, probabilities, reduction="mean"), torch.full_like(kept, 1 / 6)),
    ]
    for loss, row_weight in cases:
        (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
        (want,) = torch.autograd.grad(gradient, logits, u.detach())
        torch.testing.assert_close(softmax_hessian(logits, u, row_weight).detach(), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (None, 0, None), (1, None, 0), (2, 1, None), (None, None, 0)], ids=str)
def test_under_vmap(in_dims, device):
    shapes = ((4, 3), (4, 3), (4,))
    arguments = [
        torch.randn((*shape[: dim or 0], 5, *shape[dim or 0 :]) if dim is not None else shape, dtype=torch.float64)
        for shape, dim in zip(shapes, in_dims, strict=True)
    ]
    arguments = [t.to(device) for t in arguments]
    found = torch.vmap(softmax_hessian, in_dims)(*arguments)
    want = torch.vmap(plain, in_dims)(*arguments)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-14)


def test_under_the_transforms_of_torch_func(device):
    logits, u, weight = (t.detach() for t in make(3, 4, device=device))

    def square(function):
        return lambda logits, u: (function(logits, u, weight) ** 2).sum()

    for argnums in (0, 1):
        found = torch.func.hessian(square(softmax_hessian), argnums)(logits, u)
        torch.testing.assert_close(found, torch.func.hessian(square(plain), argnums)(logits, u), rtol=1e-9, atol=1e-11)
    found = torch.vmap(torch.func.jacrev(softmax_hessian))(logits, u, weight)
    torch.testing.assert_close(found, torch.vmap(torch.func.jacrev(plain))(logits, u, weight), rtol=1e-9, atol=1e-11)


def test_batched_gradients_of_large_rows(device):
    """is_grads_batched, which must not fall over ops without a batching rule."""
    logits, u, weight = make(3, 4, device=device)
    grads = torch.randn(7, 3, 4, dtype=torch.float64, device=device)
    found = torch.autograd.grad(softmax_hessian(logits, u, weight), [logits, u, weight], grads, is_grads_batched=True)
    for i in range(7):
        want = torch.autograd.grad(plain(logits, u, weight), [logits, u, weight], grads[i])
        torch.testing.assert_close([f[i] for f in found], list(want), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 0, 4), (0,)], ids=str)
def test_nothing(shape, device):
    arguments = make(*shape, device=device)
    result = softmax_hessian(*arguments)
    assert result.shape == shape
    result.sum().backward()
    assert all((t.grad == 0).all() for t in arguments)


@pytest.mark.parametrize(
    "pair", [(torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.float32, torch.bfloat16)], ids=str
)
def test_16_bits(pair, device):
    """Results and gradients come in the dtype of what they belong to, and are right to its precision."""
    exact = make(5, 9, device=device)
    u, logits = (t.detach().to(d).requires_grad_() for t, d in zip((exact[1], exact[0]), pair, strict=True))
    weight = exact[2].detach().float().requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in (logits, u, weight)]
    found, want = softmax_hessian(logits, u, weight), plain(*exact)
    found.backward(u.detach())
    want.backward(exact[1].detach())
    assert found.dtype == u.dtype
    for a, b, dtype in zip(
        (found, logits.grad, u.grad, weight.grad),
        (want, *(t.grad for t in exact)),
        (u.dtype, logits.dtype, u.dtype, u.dtype),
        strict=True,
    ):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2 * torch.finfo(dtype).eps * b.abs().max().item())


def test_rows_of_no_weight_pass_no_nan_on(device):
    """What padding leaves in a batch: its derivatives are zero, and others are not touched."""
    logits, u, weight = (t.detach() for t in make(4, 3, device=device))
    weight[:2] = 0
    logits[0, 1], u[0, 0] = NAN, INF
    leaves = [t.requires_grad_() for t in (logits, u, weight)]
    direction = torch.randn(4, 3, dtype=torch.float64, device=device)
    result = softmax_hessian(*leaves)
    assert (result[:2] == 0).all()
    first = torch.autograd.grad(result, leaves, direction, create_graph=True)
    assert (first[0][:2] == 0).all() and (first[1][:2] == 0).all()
    assert first[2][0].isnan() and first[2][1:].isfinite().all()
    second = torch.autograd.grad([first[0], first[1]], leaves, [direction, direction])
    assert (second[0][0] == 0).all() and (second[1][0] == 0).all()
    assert all(t[1:].isfinite().all() for t in second)
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(t, torch.ones_like(t)) for t in leaves[:2]]
        tangent = torch.autograd.forward_ad.unpack_dual(softmax_hessian(*duals, weight)).tangent
    assert (tangent[:2] == 0).all() and tangent.isfinite().all()


def test_a_mixed_derivative_at_weight_zero_is_not_lost(device):
    """The gradient in the logits is linear in the weight, with a slope that is not zero where the weight is."""
    logits, u, _ = make(1, 3, device=device)
    for start in (0.0, 1.0):
        weight = torch.full((1,), start, dtype=torch.float64, device=device, requires_grad=True)
        slopes = []
        for function in (softmax_hessian, plain):
            (gradient,) = torch.autograd.grad(function(logits, u, weight)[0, 0], logits, create_graph=True)
            slopes.append(torch.autograd.grad(gradient[0, 0], weight)[0])
        assert slopes[0].abs() > 1e-3
        torch.testing.assert_close(*slopes, rtol=1e-10, atol=0)


def test_arguments_are_only_read(device):
    arguments = [t.detach() for t in make(3, 4, device=device)]
    memory = Memory(arguments)
    result = softmax_hessian(*arguments)
    assert memory.unchanged()
    assert result.data_ptr() != arguments[1].data_ptr()


def test_any_strides(device):
    logits, u, weight = (t.detach() for t in make(6, 5, 4, device=device))
    want = softmax_hessian(logits, u, weight)
    torch.testing.assert_close(softmax_hessian(logits.mT.contiguous().mT, u.mT.contiguous().mT, weight), want)
    torch.testing.assert_close(
        softmax_hessian(logits[:1].expand(6, 5, 4), u, weight), softmax_hessian(logits[:1].repeat(6, 1, 1), u, weight)
    )


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((), (), ()), "logits must have a last dimension, the classes; got shape ()."),
        (((3, 4), (4, 3), (3,)), "u must have the shape of logits (3, 4); got (4, 3)."),
        (((3, 4), (3, 4), (4,)), "row_weight must have a number for each row of logits, shape (3,); got (4,)."),
        (((3, 4), (3, 4), (3, 1)), "row_weight must have a number for each row of logits, shape (3,); got (3, 1)."),
        (((4,), (4,), (1,)), "row_weight must have a number for each row of logits, shape (); got (1,)."),
    ],
    ids=str,
)
def test_wrong_shapes(shapes, message):
    with pytest.raises(ValueError, match=f"^softmax_hessian: {re.escape(message)}$"):
        softmax_hessian(*map(torch.zeros, shapes))


def test_wrong_dtypes():
    zeros = torch.zeros(3, 4)
    with pytest.raises(TypeError, match="softmax_hessian_: u must be float32, float64, bfloat16 or float16; got int64"):
        softmax_hessian(zeros, zeros.long(), torch.ones(3))
    with pytest.raises(
        TypeError, match="softmax_hessian_: logits must be float32, bfloat16 or float16 beside u of float"
    ):
        softmax_hessian(zeros.double(), zeros, torch.ones(3))
