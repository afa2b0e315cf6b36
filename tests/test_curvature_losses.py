import functools

import pytest
import torch
import torch.nn.functional as F
from cases import F64, generator, leaf, normal
from torch import nn
from torch.autograd.functional import hessian as dense_hessian

from nestopt_ext.curvature import EmpiricalFisher, loss_hessian
from nestopt_ext.curvature._criteria import recognize

WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0], dtype=F64)  # of five classes


def classes(seed, *shape, high=5):
    return torch.randint(high, shape, generator=generator(seed))


def some_ignored(seed, *shape, index=-100):
    target = classes(seed, *shape)
    target.view(-1)[::3] = index
    return target


def probabilities(seed, *shape):
    return normal(seed, *shape).softmax(1 if len(shape) > 1 else 0)


def uniform(seed, *shape):
    return torch.rand(shape, dtype=F64, generator=generator(seed))


CE, BCE, MSE = nn.CrossEntropyLoss, nn.BCEWithLogitsLoss, nn.MSELoss

#: criterion by reduction, outputs, targets, name of the form, whether it is positive semidefinite
FORMS = {
    "ce": (lambda r: CE(reduction=r), normal(0, 4, 5), classes(1, 4), "cross_entropy", True),
    "ce one row": (lambda r: CE(reduction=r), normal(0, 5), torch.tensor(3), "cross_entropy", True),
    "ce positions": (lambda r: CE(reduction=r), normal(0, 2, 5, 3), classes(1, 2, 3), "cross_entropy", True),
    "ce images": (lambda r: CE(reduction=r), normal(0, 2, 5, 2, 1), classes(1, 2, 2, 1), "cross_entropy", True),
    "ce ignored": (lambda r: CE(reduction=r), normal(0, 4, 5), some_ignored(1, 4), "cross_entropy", True),
    "ce ignore_index": (
        lambda r: CE(WEIGHT, ignore_index=2, label_smoothing=0.1, reduction=r),
        normal(0, 2, 5, 3),
        some_ignored(1, 2, 3, index=2),
        "cross_entropy",
        True,
    ),
    "ce weight": (lambda r: CE(WEIGHT, reduction=r), normal(0, 4, 5), classes(1, 4), "cross_entropy", True),
    "ce smoothing": (
        lambda r: CE(label_smoothing=0.2, reduction=r),
        normal(0, 4, 5),
        classes(1, 4),
        "cross_entropy",
        True,
    ),
    "ce weight and smoothing": (
        lambda r: CE(WEIGHT, label_smoothing=0.2, reduction=r),
        normal(0, 4, 5),
        some_ignored(1, 4),
        "cross_entropy",
        True,
    ),
    "ce probabilities": (lambda r: CE(reduction=r), normal(0, 4, 5), probabilities(1, 4, 5), "cross_entropy", True),
    "ce weighted probabilities": (
        lambda r: CE(WEIGHT, label_smoothing=0.2, reduction=r),
        normal(0, 2, 5, 3),
        probabilities(1, 2, 5, 3),
        "cross_entropy",
        True,
    ),
    "ce one row of probabilities": (
        lambda r: CE(WEIGHT, reduction=r),
        normal(0, 5),
        probabilities(1, 5),
        "cross_entropy",
        True,
    ),
    "ce function": (
        lambda r: functools.partial(F.cross_entropy, weight=WEIGHT, reduction=r),
        normal(0, 4, 5),
        classes(1, 4),
        "cross_entropy",
        True,
    ),
    "mse": (lambda r: MSE(reduction=r), normal(0, 4, 3), normal(1, 4, 3), "mse", True),
    "mse function": (lambda r: functools.partial(F.mse_loss, reduction=r), normal(0, 4), normal(1, 4), "mse", True),
    "mse broadcast": (lambda r: MSE(reduction=r), normal(0, 4, 3), normal(1, 3), "double_backward", True),
    "bce": (lambda r: BCE(reduction=r), 4 * normal(0, 4, 3), uniform(1, 4, 3), "bce_with_logits", True),
    "bce weights": (
        lambda r: BCE(uniform(2, 4, 1), pos_weight=3 * uniform(3, 3), reduction=r),
        normal(0, 4, 3),
        uniform(1, 4, 3),
        "bce_with_logits",
        True,
    ),
    "poisson": (
        lambda r: nn.PoissonNLLLoss(reduction=r),
        normal(0, 4, 3),
        classes(1, 4, 3).double(),
        "poisson_nll",
        True,
    ),
    "poisson full": (
        lambda r: nn.PoissonNLLLoss(full=True, reduction=r),
        normal(0, 4, 3),
        classes(1, 4, 3).double(),
        "poisson_nll",
        True,
    ),
    "poisson rates": (
        lambda r: nn.PoissonNLLLoss(log_input=False, eps=0.1, reduction=r),
        uniform(0, 4, 3),
        classes(1, 4, 3).double(),
        "poisson_nll",
        True,
    ),
    "poisson function": (
        lambda r: functools.partial(F.poisson_nll_loss, log_input=False, reduction=r),
        0.5 + uniform(0, 4, 3),
        classes(1, 4, 3).double(),
        "poisson_nll",
        True,
    ),
    "gaussian": (
        lambda r: nn.GaussianNLLLoss(reduction=r),
        normal(0, 4, 3),
        (normal(1, 4, 3), uniform(2, 4, 3)),
        "gaussian_nll",
        True,
    ),
    "gaussian one variance": (
        lambda r: nn.GaussianNLLLoss(full=True, eps=0.5, reduction=r),
        normal(0, 4, 3),
        (normal(1, 4, 3), uniform(2, 4, 1)),
        "gaussian_nll",
        True,
    ),
    "own": (
        lambda r: lambda z, t: (z[:, 0] * z[:, 1] ** 2 - t[:, 0] * z[:, 1].exp()).sum(),
        normal(0, 4, 2),
        normal(1, 4, 2),
        "double_backward",
        False,
    ),
    "unknown option": (
        lambda r: functools.partial(F.mse_loss, weight=uniform(2, 4, 3), reduction=r),
        normal(0, 4, 3),
        normal(1, 4, 3),
        "double_backward",
        True,
    ),
    "subclass": (
        lambda r: type("Own", (nn.MSELoss,), {"forward": lambda self, z, t: ((z - t) ** 4).sum()})(reduction=r),
        normal(0, 4, 3),
        normal(1, 4, 3),
        "double_backward",
        True,
    ),
}


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_dense_hessian(form, reduction):
    make, z, targets, name, semidefinite = FORMS[form]
    criterion = make(reduction)
    arguments = targets if isinstance(targets, tuple) else (targets,)
    wanted = dense_hessian(lambda z: criterion(z, *arguments), z).reshape(z.numel(), z.numel())
    found = loss_hessian(criterion, z, targets)
    assert found.name == name
    units = torch.eye(z.numel(), dtype=F64).view(-1, *z.shape)
    one_by_one = torch.stack([found(u) for u in units]).reshape(wanted.shape)
    at_once = found.products(units).reshape(wanted.shape)
    product = found.for_products(100)
    many = torch.stack([product(u) for u in units]).reshape(wanted.shape)
    for dense in (one_by_one, at_once, many):
        torch.testing.assert_close(dense, wanted, rtol=1e-12, atol=1e-14 * float(wanted.abs().max()))
    rows, weights = found.factor()
    rows = rows.reshape(len(rows), -1)
    torch.testing.assert_close((rows.T * weights) @ rows, wanted, rtol=1e-12, atol=1e-13 * float(wanted.abs().max()))
    if semidefinite:
        assert torch.linalg.eigvalsh(wanted)[0] > -1e-12
        assert torch.linalg.eigvalsh((one_by_one + one_by_one.T) / 2)[0] > -1e-12


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("form", FORMS)
def test_products_are_differentiable_in_outputs_and_vector(form):
    make, z, targets, *_ = FORMS[form]
    criterion = make("mean")

    def product(z, u):
        return loss_hessian(criterion, z, targets)(u)

    torch.autograd.gradcheck(product, (leaf(z), leaf(normal(9, *z.shape))))


@pytest.mark.parametrize(
    ("criterion", "targets"),
    [(CE(WEIGHT), classes(1, 3)), (BCE(), uniform(1, 3, 5)), (lambda z, t: (z**3 * t).sum(), normal(1, 3, 5))],
)
def test_second_derivatives_of_products_are_right(criterion, targets):
    u = normal(9, 3, 5)
    torch.autograd.gradgradcheck(lambda z: loss_hessian(criterion, z, targets)(u), (leaf(normal(0, 3, 5)),))


def test_rows_that_are_all_ignored_give_zeros():
    z, target = normal(0, 4, 5), torch.full((4,), -100)
    assert torch.equal(loss_hessian(CE(), z, target)(normal(1, 4, 5)), torch.zeros(4, 5, dtype=F64))


def test_extreme_logits_keep_their_curvature():
    z = torch.tensor([-40.0, 40.0], dtype=F64)
    found = loss_hessian(BCE(reduction="sum"), z, torch.ones(2, dtype=F64))(torch.ones(2, dtype=F64))
    torch.testing.assert_close(found, torch.tensor([1.0, 1.0], dtype=F64) * 4.248354255291589e-18, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (F64, 1e-12)])
def test_kept_probabilities_are_as_good_as_the_op(dtype, rtol):
    """For a class that holds nearly all of p, one that is left out, and a row of no weight, whatever that holds."""
    z = torch.tensor([[30.0, 0.0, 0.0], [0.3, 1.0, -torch.inf], [1.0, 2.0, 3.0]], dtype=dtype)
    target, u = torch.tensor([0, 1, 2]), normal(5, 3, 3).to(dtype)
    hessian = loss_hessian(CE(), z, target)
    assert hessian.for_products(100) != hessian.product
    found, wanted = hessian.for_products(100)(u), loss_hessian(CE(), z.double(), target)(u.double())
    assert float(((found.double() - wanted).norm(dim=1) / wanted.norm(dim=1)).max()) <= rtol
    z[0, 0] = u[1, 1] = torch.nan
    found = hessian.for_products(100)(u)
    assert loss_hessian(CE(), z, target).for_products(100)(u)[:2].isnan().all() and found[1, :2].isnan().all()
    ignored = loss_hessian(CE(), z, torch.tensor([-100, -100, 2])).for_products(100)(u)
    assert not ignored[:2].any() and ignored[2].isfinite().all()


@pytest.mark.parametrize("scale", [1.0, 10.0, 20.0])  # beyond, products underflow
def test_kept_probabilities_lose_nothing_where_one_class_holds_nearly_all(scale):
    z, target = (scale * normal(1, 64, 10)).float(), torch.zeros(64, dtype=torch.long)
    u = (normal(2, 64, 10) + 3).float()
    found = loss_hessian(CE(), z, target).for_products(100)(u)
    wanted = loss_hessian(CE(), z.double(), target)(u.double())
    assert float(((found.double() - wanted).norm(dim=1) / wanted.norm(dim=1)).max()) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("form", ["ce weight", "bce", "mse", "gaussian"])
def test_dtypes_are_those_of_the_outputs(form, dtype):
    make, z, targets, *_ = FORMS[form]
    u = normal(5, *z.shape)
    wanted = loss_hessian(make("mean"), z, targets)(u)
    as_dtype = [
        t.to(dtype) if t.is_floating_point() else t for t in (targets if isinstance(targets, tuple) else (targets,))
    ]
    found = loss_hessian(make("mean"), z.to(dtype), tuple(as_dtype))(u.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=0.05, atol=5 * torch.finfo(dtype).eps)


def test_outputs_keep_their_graph_and_no_gradient_is_written():
    w = leaf(normal(0, 3, 3))
    z = w @ w
    for criterion in (CE(), lambda z, t: (z**3).sum()):
        product = loss_hessian(criterion, z, classes(1, 3, high=3))(torch.ones_like(z))
        assert product.requires_grad
        torch.autograd.grad(product.sum(), w, retain_graph=True)
    assert w.grad is None
    torch.autograd.grad(z.sum(), w)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((3, normal(0, 2), normal(0, 2)), TypeError, "criterion must be a callable on .outputs, targets.; got int"),
        (
            (MSE(reduction="none"), normal(0, 2), normal(0, 2)),
            ValueError,
            "criterion must have reduction 'mean' or 'sum'; got 'none'",
        ),
        ((MSE(), [1.0], normal(0, 2)), TypeError, "outputs must be a Tensor; got list"),
        ((MSE(), classes(0, 2), normal(0, 2)), TypeError, "outputs must be float32.*; got int64"),
        ((lambda z, t: z * t, normal(0, 2), normal(1, 2)), ValueError, r"criterion must be a scalar; got shape \(2,\)"),
        (
            (lambda z, t: leaf(t).sum(), normal(0, 2), normal(1, 2)),
            ValueError,
            "criterion must be computed from outputs",
        ),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, kind, message):
    with pytest.raises(kind, match=f"loss_hessian: {message}"):
        loss_hessian(*arguments)


def test_bad_vectors_are_refused_by_name():
    hessian = loss_hessian(MSE(), normal(0, 2, 3), normal(1, 2, 3))
    with pytest.raises(ValueError, match=r"LossHessian: u must have shape \(2, 3\); got \(3,\)"):
        hessian(normal(0, 3))
    with pytest.raises(TypeError, match="LossHessian: u must be a Tensor; got float"):
        hessian(1.0)
    assert repr(hessian) == "LossHessian(mse, (2, 3))"


@pytest.mark.parametrize("ignored", [False, True])
def test_gradients_of_rows_are_those_of_autograd(ignored):
    z, target = leaf(5 * normal(0, 6, 4)), classes(1, 6, high=4)
    if ignored:
        target[2:4] = -100
    found = recognize(CE()).gradient(z, (target,))
    (wanted,) = torch.autograd.grad(F.cross_entropy(z, target, reduction="sum"), z)
    assert not found.requires_grad
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("label", [-1, 4])
def test_a_label_that_is_no_class_is_refused(label):
    model, target = nn.Linear(3, 4), torch.tensor([0, label])
    with pytest.raises(
        IndexError, match=f"targets must be classes from 0 to 3, .* got {label}, which is out of bounds"
    ):
        EmpiricalFisher(model, CE(), torch.ones(2, 3), target)
