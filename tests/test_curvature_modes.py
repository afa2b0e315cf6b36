"""Hessian products by forward mode over reverse mode, and many at once."""

import pytest
import torch
import torch.nn.functional as F
from cases import F64, PROBLEMS, flat, leaf, normal, relative_error, values
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nestopt_ext.curvature import Hessian, hvp

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

FORWARD = "forward-over-reverse"


def like(tensors, seed):
    if isinstance(tensors, dict):
        return {key: normal(seed + i, *t.shape) for i, (key, t) in enumerate(tensors.items())}
    if isinstance(tensors, torch.Tensor):
        return normal(seed, *tensors.shape)
    return type(tensors)(normal(seed + i, *t.shape) for i, t in enumerate(tensors))


@pytest.mark.parametrize("name", PROBLEMS)
def test_forward_over_reverse_equals_the_dense_hessian(name):
    problem = PROBLEMS[name]()
    closure = problem.closures()[1]
    operator = Hessian(closure, problem.params, mode=FORWARD)
    v = like(problem.params, 90)
    wanted = problem.hessian @ flat(v)
    for product in (operator(v), operator(v), hvp(closure, problem.params, v, mode=FORWARD)):
        assert relative_error(product, [wanted]) < 1e-12
        assert not any(t.requires_grad for t in values(product))
    torch.testing.assert_close(operator.dense(), problem.hessian, rtol=1e-12, atol=1e-12)


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8, 3)
        ).double()


X, Y = normal(0, 6, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])


def test_both_modes_agree_on_a_network_in_training_mode_and_leave_nothing_behind():
    model = network().train()
    params = dict(model.named_parameters())
    state = [*model.parameters(), *model.buffers()]
    before = [(t.clone(), t.data_ptr(), t._version if t.requires_grad else None) for t in state]
    v, calls = like(params, 5), 0

    def closure():
        nonlocal calls
        calls += 1
        return F.cross_entropy(model(X), Y)

    rng = torch.get_rng_state()
    operators = [Hessian(closure, params, mode=mode) for mode in ("double-backward", FORWARD)]
    wanted, found = (flat(operator(v)) for operator in operators)
    assert torch.equal(torch.get_rng_state(), rng)
    torch.rand(3)
    again = [flat(operator(v)) for operator in operators]
    assert float((found - wanted).norm()) < 1e-12 * float(wanted.norm())
    assert torch.equal(again[0], wanted) and torch.equal(again[1], found)
    assert calls == 1 + 1 + 2
    for t, (value, address, version) in zip(state, before, strict=True):
        assert torch.equal(t, value) and t.data_ptr() == address and t.grad is None
        assert version is None or t._version == version
    loss = closure()  # a graph made before is still good
    hvp(closure, params, v, mode=FORWARD)
    torch.autograd.grad(loss, list(params.values()))


class Boom(Exception):
    pass


def test_an_exception_in_the_closure_leaves_params_without_tangents():
    w, armed = leaf(torch.tensor([1.0, -0.0, float("nan")], dtype=F64)), False

    def closure():
        if armed:
            raise Boom
        return w.pow(3).sum()

    operator = Hessian(closure, w, mode=FORWARD)
    bits, version = w.detach().clone().view(torch.int64), w._version
    armed = True
    with pytest.raises(Boom):
        operator(torch.ones(3, dtype=F64))
    assert torch.equal(w.detach().view(torch.int64), bits) and w._version == version
    with torch.autograd.forward_ad.dual_level():
        assert torch.autograd.forward_ad.unpack_dual(w).tangent is None


def test_forward_over_reverse_works_with_grad_mode_off_and_unused_or_linear_params():
    w, unused = leaf(normal(0, 3)), leaf(normal(1, 2))
    v = [torch.ones(3, dtype=F64), torch.ones(2, dtype=F64)]
    with torch.no_grad():
        one, zero = hvp(lambda: w.pow(3).sum(), [w, unused], v, mode=FORWARD)
    torch.testing.assert_close(one, 6 * w.detach())
    assert zero.tolist() == [0, 0]
    assert hvp(lambda: (2 * w).sum(), w, v[0], mode=FORWARD).tolist() == [0, 0, 0]


def test_params_may_change_between_products():
    w, v = leaf(normal(0, 3)), torch.ones(3, dtype=F64)
    operator = Hessian(lambda: w.pow(3).sum(), w, mode=FORWARD)
    operator(v)
    with torch.no_grad():
        w.mul_(2)
    torch.testing.assert_close(operator(v), 6 * w.detach())


W = leaf(normal(0, 3))
V = torch.ones(3, dtype=F64)


def once(with_jvp):
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            ctx.save_for_forward(x)
            return x**2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return torch.from_numpy(2 * ctx.saved_tensors[0].detach().numpy()) * grad.detach()

        if with_jvp:

            @staticmethod
            def jvp(ctx, tangent):
                return 2 * ctx.saved_tensors[0] * tangent

    return Once.apply


@torch.library.custom_op("nestopt_ext_tests::square", mutates_args=())
def square(x: torch.Tensor) -> torch.Tensor:
    return x**2


square.register_autograd(
    lambda ctx, grad: 2 * ctx.saved_tensors[0] * grad,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@pytest.mark.parametrize(
    ("loss", "kind", "message"),
    [
        (
            W.square().sum(),
            TypeError,
            "loss must be a zero-argument closure with mode 'forward-over-reverse'; got Tensor",
        ),
        (3.0, TypeError, "loss must be a zero-argument closure"),
        (lambda: W * W, ValueError, r"loss must be a scalar; got shape \(3,\)"),
        (lambda: leaf(V).sum(), ValueError, "loss must depend on params"),
        (
            lambda: (once(True)(W) * W).sum(),
            RuntimeError,
            r"twice differentiable; .*marked once_differentiable \(PyTorch: Once",
        ),
        (lambda: (once(False)(W) * W).sum(), RuntimeError, "twice differentiable; got an autograd.Function "),
        (lambda: (square(W) * W).sum(), RuntimeError, "got an autograd.Function without a jvp, or .*double-backward"),
    ],
)
def test_what_forward_mode_cannot_do_is_named_and_never_zero(loss, kind, message):
    with pytest.raises(kind, match=f"hvp: .*{message}"):
        hvp(loss, W, V, mode=FORWARD)


def test_attention_without_forward_mode_is_named_and_the_way_out_works():
    q = leaf(normal(0, 1, 2, 8, 16).float())
    v = normal(1, 1, 2, 8, 16).float()

    def loss():
        return F.scaled_dot_product_attention(q, q, q).square().sum()

    with pytest.raises(
        RuntimeError, match=r"hvp: loss must be twice .*got a fused scaled-dot-product attention .*MATH"
    ):
        hvp(loss, q, v, mode=FORWARD)
    with sdpa_kernel(SDPBackend.MATH):
        wanted = hvp(loss, q, v)
        assert float((hvp(loss, q, v, mode=FORWARD) - wanted).norm()) < 1e-5 * float(wanted.norm())


def test_compiled_modules_run_eagerly_inside_of_a_closure():
    linear = nn.Linear(3, 1, bias=False).double()
    compiled = torch.compile(linear, backend="aot_eager")
    for mode in ("double-backward", FORWARD):
        product = hvp(lambda: compiled(V).square().sum(), linear.weight, torch.ones(1, 3, dtype=F64), mode=mode)
        torch.testing.assert_close(product, torch.full((1, 3), 6.0, dtype=F64))


def test_params_must_be_leaves_and_the_mode_known():
    with pytest.raises(ValueError, match=r"hvp: params must be a leaf with mode 'forward-over-reverse'"):
        hvp(lambda: W.sum(), W * 2, V, mode=FORWARD)
    with pytest.raises(
        ValueError, match="Hessian: mode must be 'double-backward' or 'forward-over-reverse'; got 'both'"
    ):
        Hessian(W.sum(), W, mode="both")


# ---- many at once ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 3, 130])
def test_many_products_are_the_single_ones(count):
    model = network().eval()
    params = list(model.parameters())
    operator = Hessian(lambda: F.cross_entropy(model(X), Y), params)
    v = [normal(i, count, *p.shape) for i, p in enumerate(params)]
    found = operator.flat_products(v)
    assert [t.shape for t in found] == [t.shape for t in v]
    for i in range(0, count, 43):
        wanted = operator.flat_product([t[i] for t in v])
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-11, atol=1e-13)


def test_the_graph_is_passed_once_for_many_and_one_by_one_where_vmap_refuses():
    passes = []

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, grad):
            passes.append(1)
            (x,) = ctx.saved_tensors
            return Slope.apply(x) * grad

    class Slope(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return 3 * x**2

        @staticmethod
        def backward(ctx, grad):
            passes.append(1)
            if refuses:
                bool(grad.sum() > 0)
            return 6 * ctx.saved_tensors[0] * grad

    for refuses in (False, True):
        operator = Hessian(lambda: Cube.apply(W).sum(), W)
        passes.clear()
        torch.testing.assert_close(operator.dense(), torch.diag(6 * W.detach()))
        assert len(passes) == (4 if refuses else 1)
