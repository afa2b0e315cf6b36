"""GaussNewton, EmpiricalFisher and ggnvp against matrices written out with autograd."""

import functools
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from cases import F64, flat, generator, leaf, normal, relative_error
from solver_cases import matrix_of
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

from nestopt_ext.curvature import (
    Diagonal,
    EmpiricalFisher,
    GaussNewton,
    Hessian,
    ggnvp,
    loss_hessian,
)


def classes(seed, *shape, high=3):
    return torch.randint(high, shape, generator=generator(seed))


def seeded(seed, make):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().double()


class Attention(nn.Module):
    """A transformer block on tokens, with logits for each position: [B, C, T]."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.block = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, activation="gelu")
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        with sdpa_kernel(SDPBackend.MATH):
            return self.head(self.block(self.embed(tokens))).transpose(1, 2)


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))


def cnn():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.SiLU(), nn.Flatten(), nn.Linear(8, 3)).eval()


MODELS = {
    "logistic": (lambda: nn.Linear(4, 3), normal(0, 6, 4), classes(1, 6)),
    "mlp": (mlp, normal(0, 6, 4), classes(1, 6)),
    "cnn": (cnn, normal(0, 6, 1, 4, 4), classes(1, 6)),
    "attention": (Attention, classes(0, 3, 4, high=6), classes(1, 3, 4)),
}


def one_hot(targets):
    return F.one_hot(targets, 3).movedim(-1, 1).double() if targets.dim() > 1 else F.one_hot(targets, 3).double()


def jacobian(model, inputs):
    """J as a matrix, [outputs, params], and the outputs' shape."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    found = jacrev(lambda p: functional_call(model, p, (inputs,)))(params)
    outputs = model(inputs)
    return torch.cat([found[name].reshape(outputs.numel(), -1) for name in params], dim=1), outputs.detach()


def dense_ggn(model, criterion, inputs, *targets):
    j, z = jacobian(model, inputs)
    h = torch.autograd.functional.hessian(lambda z: criterion(z, *targets), z).reshape(z.numel(), z.numel())
    return j.T @ h @ j


def per_example_gradients(model, terms):
    """The gradients of a list of scalars, as rows."""
    params = list(model.parameters())
    return torch.stack([flat(torch.autograd.grad(t, params, retain_graph=True)) for t in terms])


def assert_equal(found, wanted, tolerance=1e-12):
    assert float((found - wanted).norm()) <= tolerance * float(wanted.norm())


def like(operator, seed):
    return {name: normal(seed + i, *p.shape) for i, (name, p) in enumerate(operator.items())}


# ---- against matrices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", MODELS)
def test_gauss_newton_is_the_matrix_between_jacobians(name, reduction):
    make, inputs, targets = MODELS[name]
    model = seeded(0, make)
    for criterion, target in (
        (nn.CrossEntropyLoss(reduction=reduction), targets),
        (nn.MSELoss(reduction=reduction), one_hot(targets)),
        (lambda z, t: (z - t).pow(4).mean(), one_hot(targets)),
    ):
        wanted = dense_ggn(model, criterion, inputs, target)
        ggn = GaussNewton(model, criterion, inputs, target)
        assert_equal(ggn.dense(), wanted, 1e-10)
        v = like(dict(model.named_parameters()), 7)
        product = ggn(v)
        assert list(product) == list(v)
        assert_equal(flat(product), wanted @ flat(v), 1e-10)
        found = ggn.flat_low_rank()
        assert_equal(matrix_of(found), wanted, 1e-10)
        assert torch.linalg.eigvalsh(wanted)[0] > -1e-12


def test_gauss_newton_of_a_linear_model_is_the_hessian():
    model, x, y = seeded(0, lambda: nn.Linear(4, 3)), normal(0, 8, 4), classes(1, 8)
    params = dict(model.named_parameters())
    for criterion in (nn.CrossEntropyLoss(label_smoothing=0.1), nn.CrossEntropyLoss(reduction="sum")):
        hessian = Hessian(lambda criterion=criterion: criterion(model(x), y), params)
        assert_equal(GaussNewton(model, criterion, x, y).dense(), hessian.dense(), 1e-10)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", MODELS)
def test_empirical_fisher_is_the_sum_of_outer_products(name, reduction):
    make, inputs, targets = MODELS[name]
    model = seeded(0, make)
    z = model(inputs)
    hot = one_hot(targets)
    rows, tokens = z.movedim(1, -1).reshape(-1, 3), targets.reshape(-1)
    cross_entropies = [F.cross_entropy(row, t) for row, t in zip(rows, tokens, strict=True)]
    squares = [(z[n] - hot[n]).square().sum() for n in range(len(z))]
    means = [(z[n] - hot[n]).pow(4).mean() for n in range(len(z))]
    for criterion, target, terms, count in (
        (nn.CrossEntropyLoss(reduction=reduction), targets, cross_entropies, len(tokens)),
        (nn.MSELoss(reduction=reduction), hot, squares, z.numel()),
        (lambda z, t: (z - t).pow(4).mean(), hot, means, None),
    ):
        g = per_example_gradients(model, terms)
        c = 1 / len(z) if count is None else 1 / count if reduction == "mean" else 1.0
        wanted = c * g.T @ g
        fisher = EmpiricalFisher(model, criterion, inputs, target)
        assert_equal(fisher.dense(), wanted, 1e-10)
        v = like(dict(model.named_parameters()), 7)
        assert_equal(flat(fisher(v)), wanted @ flat(v), 1e-10)
        found = fisher.flat_low_rank()
        assert_equal(matrix_of(found), c * g.T @ g, 1e-10)
        assert_equal(found.weights, torch.full((len(g),), c, dtype=F64))


def test_empirical_fisher_carries_class_weights_and_leaves_out_ignored_rows():
    model, x = seeded(0, mlp), normal(0, 6, 4)
    y = torch.tensor([0, 1, -100, 2, -100, 1])
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=F64)
    kept = y >= 0
    terms = [weight[t] * F.cross_entropy(z, t) for z, t in zip(model(x)[kept], y[kept], strict=True)]
    g = per_example_gradients(model, terms)
    wanted = g.T @ g / weight[y[kept]].sum()
    assert_equal(EmpiricalFisher(model, nn.CrossEntropyLoss(weight), x, y).dense(), wanted, 1e-10)


@pytest.mark.parametrize("microbatch", [None, 4])
@pytest.mark.parametrize("operator", [GaussNewton, EmpiricalFisher])
def test_a_batch_that_is_all_ignored_has_no_curvature(operator, microbatch):
    model = seeded(0, mlp)
    nothing = operator(
        model, nn.CrossEntropyLoss(), normal(0, 6, 4), torch.full((6,), -100), microbatch=microbatch
    ).dense()
    assert torch.equal(nothing, torch.zeros_like(nothing))


def test_the_fisher_in_expectation_is_gauss_newton():
    """Summed over all classes with their probabilities, the outer products are the GGN of the cross-entropy."""
    model, x = seeded(0, mlp), normal(0, 1, 4)
    p = model(x)[0].softmax(-1).detach()
    total = sum(
        p[c] * EmpiricalFisher(model, nn.CrossEntropyLoss(), x, torch.tensor([c])).dense() for c in range(len(p))
    )
    assert_equal(GaussNewton(model, nn.CrossEntropyLoss(), x, torch.tensor([0])).dense(), total, 1e-10)


# ---- ggnvp ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("closed", [False, True])
def test_ggnvp_on_tensors_at_hand(closed):
    model, x, y = seeded(0, mlp), normal(0, 6, 4), classes(1, 6)
    criterion = nn.CrossEntropyLoss()
    params = list(model.parameters())
    unused = leaf(normal(9, 2))
    z = model(x)
    loss = loss_hessian(criterion, z, y) if closed else criterion(z, y) + sum(p.square().sum() for p in params)
    v = [normal(i, *p.shape) for i, p in enumerate(params)]
    *found, nothing = ggnvp(loss, z, [*params, unused], [*v, normal(0, 2)])
    assert_equal(flat(found), dense_ggn(model, criterion, x, y) @ flat(v), 1e-10)
    assert torch.equal(nothing, torch.zeros(2, dtype=F64))
    assert not any(t.requires_grad for t in found) and all(p.grad is None for p in params)
    ggnvp(loss, z, params, v)
    torch.autograd.grad(z.sum(), params)


W = leaf(normal(0, 3))


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (
            lambda: ((W**2).sum(), W * 2, W, W),
            ValueError,
            "loss must be computed from outputs; got a loss that does not",
        ),
        (lambda: ((W**2), W * 2, W, W), ValueError, r"loss must be a scalar; got shape \(3,\)"),
        (lambda: (3.0, W * 2, W, W), TypeError, "loss must be a scalar tensor or a LossHessian; got float"),
        (lambda: (W.sum(), 1.0, W, W), TypeError, "outputs must be a Tensor; got float"),
        (lambda: (W.sum(), W.detach(), W, W), ValueError, "outputs must have a graph"),
        (lambda: ((z := leaf(W) * 2).sum(), z, W, W), ValueError, "outputs must depend on params"),
        (lambda: ((z := W * 2).sum(), z, W, W[:2]), ValueError, r"v must have shape \(3,\); got \(2,\)"),
        (
            lambda: (loss_hessian(nn.MSELoss(), normal(0, 2), normal(1, 2)), W * 2, W, W),
            ValueError,
            r"outputs must have shape \(2,\); got \(3,\)",
        ),
    ],
)
def test_ggnvp_refuses_bad_arguments_by_name(arguments, kind, message):
    with pytest.raises(kind, match=f"ggnvp: {message}"):
        ggnvp(*arguments())


# ---- params, inputs, wrappers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", [GaussNewton, EmpiricalFisher])
def test_params_by_name_are_blocks_of_the_whole(operator):
    model, x, y = seeded(0, mlp), normal(0, 6, 4), classes(1, 6)
    model[2].weight.requires_grad_(False)
    whole = operator(model, nn.CrossEntropyLoss(), x, y)
    assert list(whole({n: p.detach() for n, p in model.named_parameters() if p.requires_grad})) == [
        "0.weight",
        "0.bias",
        "2.bias",
        "4.weight",
        "4.bias",
    ]
    dense = whole.dense()
    for names, block in (
        (["0.weight"], slice(0, 20)),
        ("0.*", slice(0, 25)),
        (["4.bias", "4.weight"], slice(30, 48)),
        (["2.*"], slice(25, 30)),
    ):
        part = operator(model, nn.CrossEntropyLoss(), x, y, names)
        assert_equal(part.dense(), dense[block, block])
    tensors = operator(model, nn.CrossEntropyLoss(), x, y, [model[4].bias, model[4].weight])
    assert isinstance(tensors([torch.ones_like(model[4].bias), torch.ones_like(model[4].weight)]), list)


def test_inputs_may_be_one_several_or_named_and_models_any_callable():
    model, x, y = seeded(0, mlp), normal(0, 6, 4), classes(1, 6)
    params = dict(model.named_parameters())
    wanted = GaussNewton(model, nn.CrossEntropyLoss(), x, y).dense()

    def half(a, b=None):
        return model(a if b is None else a + b)

    for inputs in (x, (x / 2, x / 2), [x / 2, x / 2], {"a": x / 2, "b": x / 2}):
        assert_equal(GaussNewton(half, nn.CrossEntropyLoss(), inputs, y, params).dense(), wanted)
        assert_equal(GaussNewton(half, nn.CrossEntropyLoss(), inputs, y, params, microbatch=4).dense(), wanted)
    var = torch.rand(6, 3, dtype=F64, generator=generator(3)) + 0.1
    target = normal(4, 6, 3)
    wanted = dense_ggn(model, nn.GaussianNLLLoss(), x, target, var)
    for microbatch in (None, 4):
        found = GaussNewton(model, nn.GaussianNLLLoss(), x, (target, var), microbatch=microbatch)
        assert_equal(found.dense(), wanted)


def test_wrapped_and_compiled_modules_are_unwrapped():
    x, y = normal(0, 6, 4), classes(1, 6)
    plain = seeded(0, mlp)
    wanted = GaussNewton(plain, nn.CrossEntropyLoss(), x, y)
    compiled = torch.compile(plain, backend="aot_eager")
    inside = seeded(0, mlp)
    inside[0] = torch.compile(inside[0], backend="aot_eager")
    in_place = seeded(0, mlp)
    in_place.compile(backend="aot_eager")
    function = torch.compile(lambda x: plain(x), backend="aot_eager")
    for model in (compiled, nn.DataParallel(plain), nn.DataParallel(compiled), inside, in_place):
        found = GaussNewton(model, nn.CrossEntropyLoss(), x, y)
        assert_equal(found.dense(), wanted.dense())
    assert list(wanted(like(dict(plain.named_parameters()), 3))) == [name for name, _ in plain.named_parameters()]
    assert_equal(GaussNewton(function, nn.CrossEntropyLoss(), x, y, list(plain.parameters())).dense(), wanted.dense())


def test_sums_with_regularizers():
    model, x, y = seeded(0, mlp), normal(0, 6, 4), classes(1, 6)
    params = dict(model.named_parameters())
    ggn = GaussNewton(model, nn.CrossEntropyLoss(), x, y)
    decays = {n: p.detach().square() for n, p in params.items()}
    total = (
        ggn + Diagonal(decays, params) + Hessian(lambda: 0.5 * sum(p.square().sum() for p in params.values()), params)
    )
    wanted = ggn.dense() + torch.diag(flat(decays)) + torch.eye(len(flat(params)), dtype=F64)
    assert_equal(total.dense(), wanted)


def test_products_are_memory_of_their_own():
    """Autograd gives both sides of a sum the same gradient, and the terms of a reduction an expanded one."""
    a, b = leaf(normal(0, 3)), leaf(normal(1, 3))
    for operator in (
        Hessian(lambda: (a + b).pow(3).sum(), [a, b]),
        Hessian(lambda: (a.sum() + b.sum()) ** 2, [a, b]),
        GaussNewton(
            lambda x: ((a + b) @ x)[None], lambda z, t: (z - t).square().mean(), normal(2, 3), normal(3, 1), [a, b]
        ),
        GaussNewton(lambda x: (a + b).sum(0, True) * x, nn.MSELoss(), normal(2, 1), normal(3, 1), [a, b]),
    ):
        v = [normal(4, 3), normal(5, 3)]
        product, damped = operator.flat_product(v), operator.damped(2.0).flat_product(v)
        assert_equal(flat(damped), flat(product) + 2 * flat(v))
        rows = [t.unsqueeze(0) for t in v]
        assert_equal(flat(operator.damped(2.0).flat_products(rows)), flat(product) + 2 * flat(v))
        for t in product:
            t.fill_(0)
        assert product[0].data_ptr() != product[1].data_ptr()


# ---- microbatches ---------------------------------------------------------------------------------------------------

IGNORED = torch.tensor([0, -100, 2, 1, -100, 2, 0])
CLASS_WEIGHT = torch.tensor([1.0, 2.0, 0.5], dtype=F64)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("operator", [GaussNewton, EmpiricalFisher])
def test_microbatches_give_the_numbers_of_the_whole_batch(operator, reduction):
    model, x = seeded(0, mlp), normal(0, 7, 4)
    y = normal(1, 7, 3)

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.reduction = reduction

        def forward(self, z, t):
            terms = (z - t).pow(4).sum(1)
            return terms.mean() if reduction == "mean" else terms.sum()

    for criterion, targets in (
        (nn.CrossEntropyLoss(reduction=reduction), classes(1, 7)),
        (nn.CrossEntropyLoss(CLASS_WEIGHT, label_smoothing=0.1, reduction=reduction), IGNORED),
        (nn.CrossEntropyLoss(CLASS_WEIGHT, reduction=reduction), normal(2, 7, 3).softmax(1)),
        (nn.MSELoss(reduction=reduction), y),
        (nn.BCEWithLogitsLoss(CLASS_WEIGHT, reduction=reduction), y.sigmoid()),
        (Own(), y),
    ):
        whole = operator(model, criterion, x, targets)
        wanted, v = whole.dense(), like(dict(model.named_parameters()), 5)
        for microbatch in (1, 3, 7, 100):
            parts = operator(model, criterion, x, targets, microbatch=microbatch)
            assert_equal(flat(parts(v)), wanted @ flat(v), 1e-12)
        assert_equal(parts.dense(), wanted, 1e-12)
        low, wanted_low = parts.flat_low_rank(), whole.flat_low_rank()
        assert len(low.weights) == len(wanted_low.weights)
        assert_equal(matrix_of(low), matrix_of(wanted_low))


def test_one_microbatch_is_alive_at_a_time():
    alive, most = weakref.WeakSet(), 0

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.kept = Kept()
            alive.add(ctx.kept)
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            nonlocal most
            most = max(most, len(alive))
            return grad * 1

    class Kept:
        pass

    model = seeded(0, mlp)
    ggn = GaussNewton(
        lambda x: Counted.apply(model(x)),
        nn.CrossEntropyLoss(),
        normal(0, 8, 4),
        classes(1, 8),
        list(model.parameters()),
        microbatch=2,
    )
    ggn([torch.ones_like(p) for p in model.parameters()])
    gc.collect()
    assert most == 1 and not alive


# ---- what is frozen, what is put back -------------------------------------------------------------------------------


def dropout_net():
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize("microbatch", [None, 2])
@pytest.mark.parametrize("operator", [GaussNewton, EmpiricalFisher])
def test_dropout_masks_are_frozen_and_random_state_is_put_back(operator, microbatch):
    model, x, y = seeded(0, dropout_net), normal(0, 6, 4), classes(1, 6)
    torch.manual_seed(3)
    rng = torch.get_rng_state()
    frozen = operator(model, nn.CrossEntropyLoss(), x, y, microbatch=microbatch)
    v = like(dict(model.named_parameters()), 5)
    first = flat(frozen(v))
    assert torch.equal(torch.get_rng_state(), rng)
    torch.rand(7)
    rng = torch.get_rng_state()
    assert torch.equal(flat(frozen(v)), first)
    assert torch.equal(torch.get_rng_state(), rng)
    dense = frozen.dense()
    assert_equal(dense, dense.T)
    assert relative_error(operator(model, nn.CrossEntropyLoss(), x, y, microbatch=microbatch)(v), first) > 1e-3


def test_the_masks_of_microbatches_differ_and_a_generator_of_ones_own_is_replayed():
    own, drawn = torch.Generator().manual_seed(5), []
    model = seeded(0, lambda: nn.Linear(4, 3))

    def noisy(x):
        noise = torch.rand(x.shape, dtype=F64, generator=own)
        drawn.append(noise)
        return model(x * noise)

    ggn = GaussNewton(noisy, nn.MSELoss(), normal(0, 4, 4), normal(1, 4, 3), list(model.parameters()), microbatch=2)
    v = [torch.ones_like(p) for p in model.parameters()]
    state = own.get_state()
    first = ggn(v)
    assert torch.equal(own.get_state(), state)
    assert not torch.equal(drawn[-1], drawn[-2])
    torch.rand(3, generator=own)
    state = own.get_state()
    assert torch.equal(flat(ggn(v)), flat(first))
    assert torch.equal(own.get_state(), state)


class Boom(Exception):
    pass


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("microbatch", [None, 3])
@pytest.mark.parametrize("operator", [GaussNewton, EmpiricalFisher])
def test_nothing_is_left_behind(operator, microbatch, fails):
    calls = 0

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = nn.Linear(4, 3), nn.BatchNorm1d(3)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            nonlocal calls
            calls += 1
            self.count += 1
            x = F.dropout(self.norm(self.first(x)))
            if fails and calls > (microbatch is not None) * 2:
                raise Boom
            return x

    net = seeded(0, Net)
    if microbatch is not None:
        net.norm.eval()
    x, y = normal(0, 6, 4), classes(1, 6)
    state = [*net.parameters(), *net.buffers()]
    before = [(t.clone(), t.data_ptr(), t._version) for t in state]
    rng = torch.get_rng_state()
    v = {n: torch.ones_like(p) for n, p in net.named_parameters()}
    if fails:
        with pytest.raises(Boom):
            operator(net, nn.CrossEntropyLoss(), x, y, microbatch=microbatch)(v)
    else:
        operator(net, nn.CrossEntropyLoss(), x, y, microbatch=microbatch)(v)
    for t, (value, address, version) in zip(state, before, strict=True):
        assert torch.equal(t, value) and t.data_ptr() == address
        assert t._version == version or not t.requires_grad
        assert t.grad is None
    assert torch.equal(torch.get_rng_state(), rng)


def test_batch_statistics_of_training_mode_are_differentiated():
    model = seeded(0, lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))).train()
    x, y = normal(0, 6, 4), classes(1, 6)
    found = GaussNewton(model, nn.CrossEntropyLoss(), x, y).dense()
    still = [b.clone() for b in model.buffers()]

    def outputs(params):
        return functional_call(model, {**params, **{n: b.clone() for n, b in model.named_buffers()}}, (x,))

    params = {n: p.detach() for n, p in model.named_parameters()}
    parts = jacrev(outputs)(params)
    j = torch.cat([parts[n].reshape(18, -1) for n in params], dim=1)
    z = outputs(params)
    h = torch.autograd.functional.hessian(lambda z: F.cross_entropy(z, y), z).reshape(18, 18)
    assert_equal(found, j.T @ h @ j, 1e-10)
    assert all(torch.equal(a, b) for a, b in zip(still, model.buffers(), strict=True))


def test_params_changed_since_are_named():
    model, x, y = seeded(0, mlp), normal(0, 6, 4), classes(1, 6)
    kept = GaussNewton(model, nn.CrossEntropyLoss(), x, y)
    again = GaussNewton(model, nn.CrossEntropyLoss(), x, y, microbatch=2)
    with torch.no_grad():
        model[2].weight.mul_(0.5)
    v = like(dict(model.named_parameters()), 5)
    with pytest.raises(RuntimeError, match=r"^GaussNewton: model must be computed from the params as they are"):
        kept(v)
    assert_equal(flat(again(v)), flat(GaussNewton(model, nn.CrossEntropyLoss(), x, y)(v)))


# ---- what PyTorch cannot do, and what callers get wrong -------------------------------------------------------------


def test_fused_attention_is_taken_by_its_formula():
    q, x = leaf(normal(0, 1, 2, 8, 16)), normal(1, 3, 2, 8, 16)
    y, v = torch.zeros_like(x), normal(2, 1, 2, 8, 16)

    def product():
        operator = GaussNewton(
            lambda x: F.scaled_dot_product_attention(x * q, x, x, is_causal=True), nn.MSELoss(), x, y, q
        )
        return operator(v)

    found = product()
    with sdpa_kernel(SDPBackend.MATH):
        z = F.scaled_dot_product_attention(x * q, x, x, is_causal=True)
        assert_equal(found, ggnvp(F.mse_loss(z, y), z, q, v))
        assert_equal(found, product())
    assert float(found.norm()) > 0


def test_attention_without_second_derivative_is_named():
    q = leaf(normal(0, 1, 2, 8, 16).float())
    z = F.scaled_dot_product_attention(q, q, q)
    with pytest.raises(RuntimeError, match=r"^ggnvp: outputs must be twice differentiable; got a fused .*MATH"):
        ggnvp(z.square().mean(), z, q, torch.ones_like(q))

    def unrecordable(x):  # memory that others share is written
        keys = q * 1
        keys[0].mul_(2)
        return F.scaled_dot_product_attention(x, keys, q)

    with pytest.raises(RuntimeError, match=r"^GaussNewton: model must be twice differentiable; got a fused .*MATH"):
        GaussNewton(unrecordable, nn.MSELoss(), q.detach(), q.detach(), q)(torch.ones_like(q))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def test_once_differentiable_functions_are_named():
    model, x, y = seeded(0, mlp), normal(0, 6, 4), normal(1, 6, 3)
    params = list(model.parameters())
    for f in (lambda x: Once.apply(model(x)), lambda x: Once.apply(model(x)) * model(x)):
        with pytest.raises(RuntimeError, match=r"^GaussNewton: model must be twice .*once_differentiable"):
            GaussNewton(f, nn.MSELoss(), x, y, params)
    with pytest.raises(RuntimeError, match=r"^GaussNewton: criterion must be twice .*once_differentiable"):
        GaussNewton(model, lambda z, t: Once.apply(z).sum(), x, y)


X, Y = normal(0, 6, 4), classes(1, 6)
NET = seeded(0, mlp)
CE = nn.CrossEntropyLoss()


@pytest.mark.parametrize("operator", [GaussNewton, EmpiricalFisher])
@pytest.mark.parametrize(
    ("arguments", "options", "kind", "message"),
    [
        ((3, CE, X, Y), {}, TypeError, "model must be a module or a callable; got int"),
        ((NET, 3, X, Y), {}, TypeError, "criterion must be a callable"),
        ((NET, nn.MSELoss(reduction="none"), X, Y), {}, ValueError, "criterion must have reduction 'mean' or 'sum'"),
        ((lambda x: x, CE, X, Y), {}, TypeError, "params must be tensors where model is not a module; got None"),
        (
            (NET, CE, X, Y, ["1.weight"]),
            {},
            ValueError,
            r"params\[0\] must match the name .*; got '1.weight'. The model",
        ),
        ((NET, CE, X, Y, []), {}, ValueError, "params must hold at least one tensor"),
        ((NET, CE, X, Y, [X]), {}, ValueError, r"params\[0\] must require grad"),
        ((NET, CE, X, Y, [leaf(X)]), {}, ValueError, "model must depend on params"),
        ((lambda x: (NET(x), 1), CE, X, Y, [NET[0].weight]), {}, TypeError, "model must return one tensor; got tuple"),
        ((lambda x: x, CE, X, Y, [NET[0].weight]), {}, ValueError, "model must return outputs that depend on params"),
        (
            (lambda x: Y, CE, X, Y, [NET[0].weight]),
            {},
            TypeError,
            "model must return a dense tensor of a real floating",
        ),
        ((NET, CE, X, Y), {"microbatch": 0}, ValueError, "microbatch must be at least 1; got 0"),
        ((NET, CE, X, Y), {"microbatch": 1.5}, TypeError, "microbatch must be None or an int; got 1.5"),
        ((NET, CE, X, Y[:4]), {"microbatch": 2}, ValueError, r"inputs and targets must be tensors .*; got \[6, 4\]"),
        ((seeded(0, cnn).train(), CE, normal(0, 6, 1, 4, 4), Y), {"microbatch": 2}, ValueError, "normalizes over its"),
        (
            (NET, nn.BCEWithLogitsLoss(torch.ones(6, 1)), X, normal(1, 6, 3).sigmoid()),
            {"microbatch": 2},
            ValueError,
            "microbatch must be None where the criterion has a weight for each example",
        ),
    ],
)
def test_bad_arguments_are_refused_by_name(operator, arguments, options, kind, message):
    with pytest.raises(kind, match=f"^{operator.__name__}: .*{message}"):
        operator(*arguments, **options)


def test_a_model_without_trainable_params_is_refused():
    model = seeded(0, mlp).requires_grad_(False)
    with pytest.raises(ValueError, match="model must have a parameter that requires grad"):
        GaussNewton(model, CE, X, Y)
    with pytest.raises(ValueError, match=r"params\[0\] must match"):
        GaussNewton(model, CE, X, Y, ["*"])
    with pytest.raises(ValueError, match=r"params\['0.weight'\] must require grad"):
        GaussNewton(model, CE, X, Y, ["0.weight"])


def test_works_with_grad_mode_off_and_in_single_precision():
    model = seeded(0, mlp)
    wanted = GaussNewton(model, CE, X, Y).dense()
    model = model.float()
    with torch.no_grad():
        found = GaussNewton(model, CE, X.float(), Y)
        assert_equal(found.dense().double(), wanted, 1e-5)
        assert_equal(GaussNewton(model, CE, X.float(), Y, microbatch=2).dense().double(), wanted, 1e-5)


# ---- parts of a batch under criteria that are not known in closed form ----------------------------------------------


class _Positions(nn.Module):
    """Outputs [B * T, C] for inputs [B, T], as language models have them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 4).double()
        self.head = nn.Linear(4, 7).double()

    def forward(self, tokens):
        return self.head(torch.tanh(self.table(tokens))).reshape(-1, 7)


@pytest.mark.parametrize("microbatch", [1, 3, 4])
def test_parts_count_by_examples_and_not_by_rows_of_the_outputs(microbatch):
    model, tokens = _Positions(), torch.arange(12).reshape(4, 3) % 7
    v = {name: normal(i, *p.shape) for i, (name, p) in enumerate(model.named_parameters())}

    def criterion(outputs, targets):
        return F.cross_entropy(outputs, targets.reshape(-1))

    whole = GaussNewton(model, criterion, tokens, tokens)(v)
    assert relative_error(GaussNewton(model, criterion, tokens, tokens, microbatch=microbatch)(v), whole) < 1e-12


@pytest.mark.parametrize("microbatch", [None, 2])
@pytest.mark.parametrize("kind", [GaussNewton, EmpiricalFisher])
def test_the_reduction_of_a_partial_is_seen(kind, microbatch):
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2).double(), normal(1, 6, 3), normal(2, 6, 2)
    v = {name: normal(i, *p.shape) for i, (name, p) in enumerate(model.named_parameters())}
    by_module = kind(model, nn.HuberLoss(reduction="sum"), x, y)(v)
    by_partial = kind(model, functools.partial(F.huber_loss, reduction="sum"), x, y, microbatch=microbatch)(v)
    assert relative_error(by_partial, by_module) < 1e-12
    with pytest.raises(ValueError, match="criterion must have reduction 'mean' or 'sum'; got 'none'"):
        kind(model, functools.partial(F.huber_loss, reduction="none"), x, y)
