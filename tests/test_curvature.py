import pytest
import torch
import torch.nn.functional as F
from cases import F64, PROBLEMS, flat, leaf, normal, quadratic, relative_error, ridge, values
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nestopt_ext.curvature import GaussNewton, Hessian, hvp, loss_hessian
from nestopt_ext.curvature._evaluation import evaluate


def like(tensors, seed):
    """Random tensors in the structure of ``tensors``."""
    if isinstance(tensors, dict):
        return {key: normal(seed + i, *t.shape) for i, (key, t) in enumerate(tensors.items())}
    if isinstance(tensors, torch.Tensor):
        return normal(seed, *tensors.shape)
    return type(tensors)(normal(seed + i, *t.shape) for i, t in enumerate(tensors))


@pytest.mark.parametrize("name", PROBLEMS)
def test_products_equal_the_dense_hessian(name):
    problem = PROBLEMS[name]()
    loss = problem.losses()[1]
    operator = Hessian(loss, problem.params)
    v = like(problem.params, 90)
    wanted = problem.hessian @ flat(v)
    for product in (
        operator(v),
        operator(v),
        hvp(loss, problem.params, v),
        hvp(problem.closures()[1], problem.params, v),
    ):
        assert relative_error(product, [wanted]) < 1e-12
        assert type(product) is type(problem.params) or isinstance(product, torch.Tensor)
        assert not any(t.requires_grad for t in values(product))
    torch.testing.assert_close(operator.dense(), problem.hessian, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(flat(operator.diagonal()), problem.hessian.diagonal(), rtol=1e-12, atol=1e-12)
    assert all(t.grad is None for t in values(problem.params) + values(problem.hparams))


def test_operators_add_and_scale():
    problem = quadratic()
    loss = problem.losses()[1]
    a = Hessian(loss, problem.params)
    combined = 2 * a + Hessian(loss.square(), problem.params) * 0.5
    square = Hessian(loss.square(), problem.params).dense()
    torch.testing.assert_close(combined.dense(), 2 * problem.hessian + 0.5 * square)
    torch.testing.assert_close(a.damped(0.5).dense(), problem.hessian + 0.5 * torch.eye(8, dtype=F64))
    with pytest.raises(TypeError):
        a + 1.0
    with pytest.raises(TypeError):
        a * a
    other = ridge()
    with pytest.raises(ValueError, match="same params"):
        a + Hessian(other.losses()[1], other.params)


def test_params_may_come_in_another_order_and_structure():
    problem = PROBLEMS["named_ridge"]()
    hessian = Hessian(problem.losses()[1], problem.params)
    turned = Hessian(problem.losses()[1], [problem.params["bias"], problem.params["weight"]])
    torch.testing.assert_close((hessian + turned).dense(), 2 * problem.hessian)
    assert set((hessian + turned)(like(problem.params, 90))) == {"weight", "bias"}


def test_unused_params_and_linear_losses_give_zeros():
    w, unused = leaf(normal(0, 3)), leaf(normal(1, 2))
    one, zero = hvp(w.pow(3).sum(), [w, unused], [torch.ones(3, dtype=F64), torch.ones(2, dtype=F64)])
    torch.testing.assert_close(one, 6 * w.detach())
    assert zero.tolist() == [0, 0]
    assert hvp((2 * w).sum(), w, torch.ones(3, dtype=F64)).tolist() == [0, 0, 0]
    assert Hessian((2 * w).sum(), (w,)).dense().abs().max() == 0


def test_a_product_does_not_share_memory_with_its_argument():
    w, v = leaf(normal(0, 3)), normal(1, 3)
    product = hvp(0.5 * w.square().sum(), w, v)
    kept = product.clone()
    v.zero_()
    assert torch.equal(product, kept) and product.abs().sum() > 0


def test_works_with_grad_mode_off():
    problem = ridge()
    with torch.no_grad():
        operator = Hessian(problem.closures()[1], problem.params)
        torch.testing.assert_close(operator.dense(), problem.hessian)


W = leaf(normal(0, 3))
V = torch.ones(3, dtype=F64)


@pytest.mark.parametrize(
    ("loss", "params", "v", "kind", "message"),
    [
        (lambda: W.sum(), [], [], ValueError, "hvp: params must hold at least one tensor; got none."),
        (lambda: W * W, W, V, ValueError, r"hvp: loss must be a scalar; got shape \(3,\)"),
        (lambda: 1.0, W, V, TypeError, "hvp: loss must return a scalar tensor; got float."),
        (3.0, W, V, TypeError, "hvp: loss must be a scalar tensor or a zero-argument closure; got float."),
        (torch.ones(()), W, V, ValueError, "hvp: loss must have a graph; got a tensor that does not require grad"),
        (lambda: W.sum(), V, V, ValueError, "hvp: params must require grad; got one that does not"),
        (
            lambda: W.sum(),
            [W, W],
            [V, V],
            ValueError,
            r"hvp: params\[1\] must be a tensor of its own; got the same as params\[0\]",
        ),
        (lambda: W.square().sum(), W, V[:2], ValueError, r"hvp: v must have shape \(3,\); got \(2,\)"),
        (lambda: W.square().sum(), W, V.float(), TypeError, "hvp: v must be float64; got float32"),
        (lambda: W.square().sum(), W, None, TypeError, "hvp: v must be a Tensor, or a list"),
        (lambda: W.square().sum(), leaf(V), V, ValueError, "hvp: loss must depend on params"),
        (
            lambda: W.square().sum(),
            torch.ones(3, dtype=torch.int64),
            V,
            TypeError,
            "hvp: params must be float32, float64",
        ),
    ],
)
def test_bad_arguments_are_refused_by_name(loss, params, v, kind, message):
    with pytest.raises(kind, match=message):
        hvp(loss, params, v)


def test_a_freed_graph_is_named():
    loss = W.pow(3).sum()
    torch.autograd.grad(loss, W)
    with pytest.raises(RuntimeError, match="hvp: loss must still have its graph; got one that was freed"):
        hvp(loss, W, V)


def test_params_changed_in_place_since_the_loss_are_named():
    w = leaf(V)
    loss = w.pow(3).sum()
    hessian = Hessian(loss, w)
    with torch.no_grad():
        w.mul_(0.5)
    with pytest.raises(RuntimeError, match=r"^hvp: loss must be computed from the params as they are; got params"):
        hvp(loss, w, V)
    with pytest.raises(RuntimeError, match=r"^Hessian: loss must be computed .* call Hessian after such a change"):
        hessian(V)
    assert torch.equal(hvp(lambda: w.pow(3).sum(), w, V), 6 * w.detach() * V)


def test_attention_without_second_derivative_is_named_and_the_way_out_works():
    q = leaf(torch.randn(1, 2, 8, 16, generator=torch.Generator().manual_seed(0)))
    fused = F.scaled_dot_product_attention(q, q, q).square().sum()
    with pytest.raises(
        RuntimeError, match=r"loss must be twice differentiable; got a fused .*attention .*SDPBackend.MATH"
    ):
        hvp(fused, q, q.detach())
    with sdpa_kernel(SDPBackend.MATH):
        product = hvp(F.scaled_dot_product_attention(q, q, q).square().sum(), q, q.detach())
    assert product.abs().max() > 0


@pytest.mark.parametrize("use", [lambda once: once(W).sum(), lambda once: (once(W) * W).sum()])
def test_once_differentiable_functions_do_not_lose_their_part_in_silence(use):
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return 2 * ctx.saved_tensors[0] * grad

    with pytest.raises(RuntimeError, match=r"twice differentiable; got an autograd\.Function marked once_diff"):
        hvp(use(Once.apply), W, V)


@pytest.fixture
def scale():
    """An operator that multiplies, of which autograd knows nothing."""
    with torch.library._scoped_library("nestopt_ext_tests_scale", "DEF") as library:
        library.define("scale(Tensor x, Tensor y) -> Tensor")
        library.impl("scale", lambda x, y: x.detach() * y.detach(), "CPU")
        yield torch.ops.nestopt_ext_tests_scale.scale


def test_operators_without_a_derivative_do_not_lose_their_part_in_silence(scale):
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, grad):
            return scale(grad, 2 * ctx.saved_tensors[0])

    message = r"{}: {} must be twice differentiable; got an operator registered without a derivative"
    for loss in (lambda: Square.apply(W).sum(), lambda: (Square.apply(W) * W).sum()):
        with pytest.raises(RuntimeError, match=message.format("hvp", "loss")):
            hvp(loss, W, V)
    with pytest.raises(RuntimeError, match=message.format("GaussNewton", "model")):
        GaussNewton(Square.apply, nn.MSELoss(), W, V, W)
    with pytest.raises(RuntimeError, match=message.format("loss_hessian", "criterion")):
        loss_hessian(lambda z, t: (Square.apply(z) * t).sum(), W, V)
    with pytest.raises(RuntimeError, match=message.format("hvp", "loss")):
        hvp(lambda: (scale(W, W) * W).sum(), W, V, mode="forward-over-reverse")


def test_compiled_modules_are_named():
    linear = nn.Linear(3, 1).double()
    compiled = torch.compile(linear, backend="aot_eager")
    loss = compiled(V).square().sum()
    with pytest.raises(RuntimeError, match=r"twice differentiable; got a module compiled by torch\.compile"):
        hvp(loss, linear.weight, torch.ones(1, 3, dtype=F64))


# ---- what an evaluation leaves behind -------------------------------------------------------------------------------


def snapshot(module):
    return [(t.clone(), t.data_ptr()) for t in (*module.parameters(), *module.buffers())]


def assert_unchanged(module, before):
    for tensor, (value, address) in zip((*module.parameters(), *module.buffers()), before, strict=True):
        assert torch.equal(tensor, value) and tensor.data_ptr() == address


class Boom(Exception):
    pass


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(4), nn.BatchNorm1d(4, momentum=None), nn.InstanceNorm1d(4, track_running_stats=True)]
)
def test_buffers_and_random_state_are_put_back(layer, fails):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), layer, nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(4, 1)).train()
    x = torch.randn(6, 3) if isinstance(layer, nn.BatchNorm1d) else torch.randn(6, 4, 3).transpose(1, 2)
    if isinstance(layer, nn.InstanceNorm1d):
        net = nn.Sequential(layer, nn.Dropout(0.5), nn.Linear(6, 1)).train()
        x = torch.randn(2, 4, 6)
    own = torch.Generator().manual_seed(5)

    def closure():
        loss = net(x).square().mean() + torch.rand((), generator=own)
        if fails:
            raise Boom
        return loss

    before, rng, own_rng = snapshot(net), torch.get_rng_state(), own.get_state()
    if fails:
        with pytest.raises(Boom):
            evaluate("f", "loss", closure)
    else:
        evaluation = evaluate("f", "loss", closure)
        assert_unchanged(net, before)
        with evaluation.differentiating():
            torch.autograd.grad(evaluation.loss, list(net.parameters()))
    assert_unchanged(net, before)
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(own.get_state(), own_rng)
    assert all(p.grad is None for p in net.parameters())


def test_the_closures_of_that_test_do_change_things_when_called_directly():
    layer = nn.BatchNorm1d(4).train()
    before = snapshot(layer)
    rng = torch.get_rng_state()
    F.dropout(layer(torch.randn(6, 4)))
    assert not torch.equal(torch.get_rng_state(), rng)
    with pytest.raises(AssertionError):
        assert_unchanged(layer, before)


def test_overlapping_and_foreach_writes_are_put_back_and_the_graph_sees_what_was_written():
    buffer = torch.arange(6, dtype=F64)
    others = [torch.ones(2, dtype=F64), torch.ones(3, dtype=F64)]
    w = leaf(torch.tensor(2.0, dtype=F64))

    def closure():
        buffer[:4].mul_(2)
        buffer[2:].add_(1)
        buffer.view(2, 3)[1] += 5
        torch._foreach_add_(others, 1.0)
        torch.add(buffer[:1], 7, out=others[0][:1])
        return (w**2 * buffer).sum() + others[1].sum()

    evaluation = evaluate("f", "loss", closure)
    assert buffer.tolist() == [0, 1, 2, 3, 4, 5]
    assert [t.tolist() for t in others] == [[1, 1], [1, 1, 1]]
    written = [0, 2, 5, 12, 10, 11]
    with evaluation.differentiating():
        (grad,) = torch.autograd.grad(evaluation.loss, w)
    assert float(grad) == 4 * sum(written)
    assert buffer.tolist() == [0, 1, 2, 3, 4, 5]


def test_evaluation_mode_after_training_mode_differentiates_the_right_statistics():
    torch.manual_seed(0)
    layer = nn.BatchNorm1d(4).double()
    x, w = torch.randn(8, 4, dtype=F64), leaf(torch.ones(4, dtype=F64))

    def closure():
        layer.train()
        layer(x)
        layer.eval()
        return (layer(x * w) ** 3).sum()

    before = snapshot(layer)
    evaluation = evaluate("f", "loss", closure)
    with evaluation.differentiating():
        (found,) = torch.autograd.grad(evaluation.loss, w)
    assert_unchanged(layer, before)
    (wanted,) = torch.autograd.grad(closure(), w)
    assert torch.equal(found, wanted)


def test_new_memory_is_not_copied():
    w = leaf(torch.ones(1000))
    evaluation = evaluate("f", "loss", lambda: F.relu(w * 2, inplace=True).mul_(3).sum())
    assert evaluation._regions == []
