import copy
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import F64, flat, normal, values
from helpers import same_bits
from torch import nn
from torch.utils.checkpoint import checkpoint

from nestopt_ext.curvature import KFAC


def labels(seed, classes, *shape):
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def mlp(*sizes, seed=0, bias=True, between=nn.Tanh):
    torch.manual_seed(seed)
    parts = []
    for a, b in itertools.pairwise(sizes):
        parts += [nn.Linear(a, b, bias=bias), between()]
    return nn.Sequential(*parts[:-1]).double()


def gauss_newton(model, criterion, inputs, targets, params):
    """J' H J with everything dense: the definition."""
    outputs = model(inputs)
    rows = [torch.autograd.grad(o, params, retain_graph=True) for o in outputs.reshape(-1)]
    jacobian = torch.stack([flat(row) for row in rows])
    at = outputs.detach()
    hessian = torch.autograd.functional.hessian(lambda f: criterion(f.reshape(at.shape), targets), at.reshape(-1))
    return jacobian.T @ hessian @ jacobian


def factors(model, criterion, inputs, targets, layers):
    """A and G from their definition: patches by pushing unit vectors through the layer, roots by eigenvectors."""
    captured = {}

    def keep(layer, args, output):
        captured[layer] = (args[0].detach(), output)

    handles = [layer.register_forward_hook(keep) for layer in layers]
    outputs = model(inputs)
    for handle in handles:
        handle.remove()
    at = outputs.detach()
    hessian = torch.autograd.functional.hessian(lambda f: criterion(f.reshape(at.shape), targets), at.reshape(-1))
    size = at[0].numel()
    result = []
    for layer in layers:
        x, z = captured[layer]
        g = 0
        for n in range(len(at)):
            own = slice(n * size, (n + 1) * size)
            eigenvalues, vectors = torch.linalg.eigh(hessian[own, own])
            for value, vector in zip(eigenvalues, vectors.T, strict=True):
                (d,) = torch.autograd.grad(
                    outputs[n].reshape(-1), z, value.clamp(min=0).sqrt() * vector, retain_graph=True
                )
                d = d.movedim(1, -1) if not isinstance(layer, nn.Linear) else d
                d = d.reshape(-1, d.shape[-1])
                g = g + d.T @ d
        # z is linear in the weight, so its derivative in the weights of one output channel is the input row.
        rows, groups = [], getattr(layer, "groups", 1)
        bias = layer.bias is not None
        for group in range(groups):
            channel = group * (layer.weight.shape[0] // groups)
            columns = []
            for unit in torch.eye(layer.weight[0].numel(), dtype=F64):
                probe = copy.deepcopy(layer)
                probe.weight.data.zero_()
                probe.weight.data[channel] = unit.reshape(layer.weight.shape[1:])
                if bias:
                    probe.bias.data.zero_()
                out = probe(x).detach()
                out = out if isinstance(layer, nn.Linear) else out.movedim(1, -1)
                columns.append(out.reshape(-1, out.shape[-1])[:, channel])
            if bias:
                columns.append(torch.ones_like(columns[0]))
            rows.append(torch.stack(columns, 1))
        result.append(([r.T @ r / len(r) for r in rows], g.detach()))
    return result


def assembled(layers, pairs, damping):
    """The dense matrix for params in the order weight, bias, weight, bias, ..."""
    blocks = []
    for layer, (a_groups, g) in zip(layers, pairs, strict=True):
        out, width = layer.weight.shape[0], layer.weight[0].numel()
        per, n = out // len(a_groups), len(a_groups[0])
        block = torch.zeros(out * n, out * n, dtype=F64)
        for j, a in enumerate(a_groups):
            own = slice(j * per * n, (j + 1) * per * n)
            mine = slice(j * per, (j + 1) * per)
            block[own, own] = torch.kron(g[mine, mine], a)
        cell = torch.arange(out * n).reshape(out, n)
        order = torch.cat([cell[:, :width].reshape(-1), cell[:, width:].reshape(-1)])
        blocks.append(block[order][:, order])
    matrix = torch.block_diag(*blocks)
    return matrix + damping * torch.eye(len(matrix), dtype=F64)


def assert_close(found, wanted, bound=1e-12):
    assert float((found - wanted).abs().max()) <= bound * float(wanted.abs().max())


# ---- where it is exact ----------------------------------------------------------------------------------------------

POSITIVE = torch.tensor([0.5, 1.0, 3.0], dtype=F64)
UNIFORM = nn.functional.one_hot(labels(5, 3, 6), 3).double() * 0.4 + 0.2
CRITERIA = {
    "mse": (nn.MSELoss(), normal(9, 6, 3)),
    "mse sum": (nn.MSELoss(reduction="sum"), normal(9, 6, 3)),
    "mse function": (F.mse_loss, normal(9, 6, 3)),
    "ce": (nn.CrossEntropyLoss(), labels(5, 3, 6)),
    "ce sum": (nn.CrossEntropyLoss(reduction="sum"), labels(5, 3, 6)),
    "ce function": (F.cross_entropy, labels(5, 3, 6)),
    "ce probabilities": (nn.CrossEntropyLoss(), UNIFORM),
    "ce everything": (
        nn.CrossEntropyLoss(weight=POSITIVE, ignore_index=1, label_smoothing=0.2),
        torch.tensor([0, 1, 2, 2, 1, 0]),
    ),
    "ce weighted probabilities": (nn.CrossEntropyLoss(weight=POSITIVE, label_smoothing=0.1), UNIFORM),
    "bce": (nn.BCEWithLogitsLoss(), UNIFORM.round()),
    "bce function": (F.binary_cross_entropy_with_logits, UNIFORM),
    "bce everything": (nn.BCEWithLogitsLoss(weight=POSITIVE, pos_weight=2 * POSITIVE, reduction="sum"), UNIFORM),
    "poisson": (nn.PoissonNLLLoss(), UNIFORM),
    "huber": (nn.HuberLoss(delta=0.7), normal(9, 6, 3)),
    "own": (lambda f, y: (f - y).square().sum(1).square().mean(), normal(9, 6, 3)),
    "partial": (functools.partial(F.cross_entropy, label_smoothing=0.1), labels(5, 3, 6)),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_one_example_through_linear_layers_is_exact_in_each_block(name):
    criterion, targets = CRITERIA[name]
    targets = targets[:1]
    net = mlp(4, 5, 3, between=nn.Identity)
    params, x = list(net.parameters()), normal(1, 1, 4)
    wanted = gauss_newton(net, criterion, x, targets, params)
    wanted[:25, 25:] = wanted[25:, :25] = 0
    found = KFAC(net, criterion, x, targets, damping=0.0).dense()
    assert_close(found, wanted, 1e-10)
    assert wanted.abs().max() > 0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(7, 4), (3, 5, 4)])
def test_one_layer_with_a_squared_error_is_exact(shape, reduction):
    layer = nn.Linear(4, 3).double()
    criterion, x, y = nn.MSELoss(reduction=reduction), normal(1, *shape), normal(2, *shape[:-1], 3)
    wanted = gauss_newton(layer, criterion, x, y, list(layer.parameters()))
    assert_close(KFAC(layer, criterion, x, y, damping=0.0).dense(), wanted)


@pytest.mark.parametrize("name", CRITERIA)
def test_factors_are_those_of_the_definition(name):
    criterion, targets = CRITERIA[name]
    net, x = mlp(4, 5, 3), normal(1, 6, 4)
    layers = [net[0], net[2]]
    wanted = assembled(layers, factors(net, criterion, x, targets, layers), 0.3)
    assert_close(KFAC(net, criterion, x, targets, damping=0.3).dense(), wanted, 1e-10)


def test_outputs_of_several_positions_have_no_cross_terms():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)).cumsum(1)).movedim(-1, 1)

    torch.manual_seed(0)
    net = Mixed().double()
    x, y = normal(1, 2, 5, 4), labels(2, 3, 2, 5)
    layers = [net.a, net.b]
    wanted = assembled(layers, factors(net, nn.CrossEntropyLoss(), x, y, layers), 0.1)
    assert_close(KFAC(net, nn.CrossEntropyLoss(), x, y, damping=0.1).dense(), wanted)


CONVOLUTIONS = {
    "plain": (nn.Conv2d, (4, 6, 3), {}),
    "no bias": (nn.Conv2d, (4, 6, 3), {"bias": False}),
    "stride": (nn.Conv2d, (4, 6, (3, 2)), {"stride": (2, 1), "padding": (1, 0)}),
    "dilation": (nn.Conv2d, (4, 6, (2, 3)), {"dilation": (2, 1), "padding": 2}),
    "same": (nn.Conv2d, (4, 6, (2, 3)), {"padding": "same", "dilation": (1, 2)}),
    "valid": (nn.Conv2d, (4, 6, 2), {"padding": "valid"}),
    "reflect": (nn.Conv2d, (4, 6, 3), {"padding": (1, 2), "padding_mode": "reflect"}),
    "replicate": (nn.Conv2d, (4, 6, 3), {"padding": 1, "padding_mode": "replicate", "stride": 2}),
    "circular": (nn.Conv2d, (4, 6, 4), {"padding": "same", "padding_mode": "circular"}),
    "groups": (nn.Conv2d, (4, 6, 2), {"groups": 2, "padding": 1}),
    "depthwise": (nn.Conv2d, (4, 4, 3), {"groups": 4, "bias": False}),
    "1d": (nn.Conv1d, (4, 6, 3), {"padding": 2, "dilation": 2}),
    "1d circular": (nn.Conv1d, (4, 6, 3), {"padding": 1, "padding_mode": "circular"}),
    "3d": (nn.Conv3d, (2, 4, (1, 2, 3)), {"stride": (2, 1, 1), "padding": (0, 1, 1), "groups": 2}),
}


def pooled(conv):
    """A classifier around a convolution."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Identity(),
        conv,
        nn.ReLU(inplace=True),
        nn.Flatten(2),
        nn.AdaptiveAvgPool1d(2),
        nn.Flatten(),
        nn.LazyLinear(3),
    ).double()


def conv_problem(name):
    kind, sizes, options = CONVOLUTIONS[name]
    torch.manual_seed(0)
    net = pooled(kind(*sizes, **options))
    spatial = {nn.Conv1d: (9,), nn.Conv2d: (5, 6), nn.Conv3d: (3, 3, 4)}[kind]
    x = normal(1, 3, sizes[0], *spatial)
    net(x)
    return net, x, labels(2, 3, 3)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_have_the_factors_of_the_definition(name):
    net, x, y = conv_problem(name)
    layers = [net[1], net[6]]
    out_of_place = copy.deepcopy(net)
    out_of_place[2] = nn.ReLU()
    same = [out_of_place[1], out_of_place[6]]
    wanted = assembled(same, factors(out_of_place, nn.CrossEntropyLoss(), x, y, same), 0.1)
    assert_close(KFAC(net, nn.CrossEntropyLoss(), x, y, damping=0.1).dense(), wanted)
    assert [type(layer) for layer in layers] == [type(layer) for layer in same]


# ---- products, inverse, diagonal, dense -----------------------------------------------------------------------------


def small(fisher="type-2", **options):
    net = nn.Sequential(mlp(4, 5, 6), nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2, groups=2).double(), nn.Flatten())
    return net, KFAC(net, nn.CrossEntropyLoss(), normal(1, 20, 4), labels(2, 8, 20), fisher=fisher, **options)


@pytest.mark.parametrize("fisher", ["type-2", "mc", "empirical"])
def test_products_inverse_and_diagonal_agree_with_the_dense_matrix(fisher):
    net, kfac = small(fisher, damping=1e-2)
    matrix, shapes = kfac.dense(), [p.shape for p in net.parameters()]
    v = [normal(i, 3, *shape) for i, shape in enumerate(shapes)]
    columns = torch.cat([t.reshape(3, -1) for t in v], 1).T
    for found, wanted in (
        (kfac.flat_products(v), matrix @ columns),
        (kfac.flat_inverse(v, 0.0), torch.linalg.solve(matrix, columns)),
        (kfac.flat_inverse(v, 0.5), torch.linalg.solve(matrix + 0.5 * torch.eye(len(matrix), dtype=F64), columns)),
    ):
        assert [t.shape for t in found] == [t.shape for t in v]
        assert_close(torch.cat([t.reshape(3, -1) for t in found], 1).T, wanted, 1e-9)
    one = [t[1] for t in v]
    assert_close(flat(kfac(one)), matrix @ columns[:, 1])
    assert_close(flat(kfac.inverse(one)), torch.linalg.solve(matrix, columns[:, 1]), 1e-9)
    assert_close(flat(kfac.inverse(kfac(one))), flat(one), 1e-9)
    assert_close(flat(kfac.diagonal()), matrix.diagonal())
    assert_close(super(KFAC, kfac).dense(), matrix)
    assert_close(flat(super(KFAC, kfac).diagonal()), matrix.diagonal())
    assert_close(kfac.largest_eigenvalue(), torch.linalg.eigvalsh(matrix)[-1])
    assert torch.equal(matrix, matrix.T) and torch.linalg.eigvalsh(matrix)[0] > 0.99e-2


def test_blocks_only_within_layers_and_groups():
    matrix = small(damping=0.0)[1].dense()
    first, second = slice(0, 25), slice(25, 61)
    assert matrix[first, second].abs().max() == 0 and matrix[first, 61:].abs().max() == 0
    assert matrix[first, first].abs().min() > 0 and matrix[:20, 20:25].abs().max() > 0
    conv = matrix[61:, 61:]  # weight [4, 1, 2], bias [4]; channels 0 and 1 are a group
    assert conv[:4, 4:8].abs().max() == 0 and conv[:4, :4].abs().min() > 0 and conv[:4, 8:10].abs().min() > 0


def test_damping_is_added_once_and_more_can_be_added():
    net, plain = small(damping=0.0)
    args = (net, nn.CrossEntropyLoss(), normal(1, 20, 4), labels(2, 8, 20))
    damped = KFAC(*args, damping=0.25)
    matrix = plain.dense()
    assert_close(damped.dense(), matrix + 0.25 * torch.eye(len(matrix), dtype=F64))
    v = [normal(i, *p.shape) for i, p in enumerate(net.parameters())]
    wanted = flat(KFAC(*args, damping=0.5).inverse(v))
    assert_close(flat(damped.damped(0.25).flat_inverse([t.unsqueeze(0) for t in v], 0.0)), wanted)
    assert_close((2 * damped + plain).dense(), 3 * matrix + 0.5 * torch.eye(len(matrix), dtype=F64))


def test_negligible_eigenvalues_count_as_zero():
    layer = nn.Linear(3, 1, bias=False).double()
    x = torch.diag(torch.tensor([1.0, 1e-4, 1e-6], dtype=F64))
    kfac = KFAC(layer, nn.MSELoss(reduction="sum"), x, torch.zeros(3, 1, dtype=F64), damping=1e-20)
    # A = diag(1, 1e-8, 1e-12) / 3 and G = 2 * 3: the last is below 1e-10 of the first.
    found = kfac.inverse([torch.ones(1, 3, dtype=F64)])[0][0]
    torch.testing.assert_close(found, torch.tensor([0.5, 0.5e8, 1e20], dtype=F64), rtol=1e-10, atol=0)


def test_a_singular_inverse_without_damping_is_refused():
    layer = nn.Linear(3, 2).double()
    kfac = KFAC(layer, nn.MSELoss(), normal(0, 2, 3), normal(1, 2, 2), damping=0.0)
    v = [normal(2, 2, 3), normal(3, 2)]
    with pytest.raises(RuntimeError, match=r"^KFAC: damping must be > 0 for an inverse of singular factors; got 0\."):
        kfac.inverse(v)
    solved = kfac.flat_inverse([t.unsqueeze(0) for t in v], 0.1)
    matrix = kfac.dense() + 0.1 * torch.eye(8, dtype=F64)
    assert_close(flat(solved), torch.linalg.solve(matrix, flat(v)), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_accumulate_in_float32(dtype):
    net, x, y = mlp(4, 5, 3).to(dtype), normal(1, 6, 4).to(dtype), labels(5, 3, 6)
    kfac = KFAC(net, nn.CrossEntropyLoss(), x, y)
    wide = copy.deepcopy(net).double()
    wanted = KFAC(wide, nn.CrossEntropyLoss(), x.double(), y).dense()
    assert_close(kfac.dense().double(), wanted, 16 * torch.finfo(dtype).eps)
    product = kfac([torch.ones_like(p) for p in net.parameters()])
    assert all(t.dtype == dtype and not t.requires_grad for t in product)
    assert kfac._moments[0][0].dtype == torch.float32


# ---- which params, in which structure -------------------------------------------------------------------------------


def test_params_by_pattern_by_tensor_and_in_any_order():
    net, whole = small()
    assert isinstance(whole(list(net.parameters())), list)
    args = (net, nn.CrossEntropyLoss(), normal(1, 20, 4), labels(2, 8, 20))
    named = KFAC(*args, params=["0.2.weight", "2.*"])
    v = {"0.2.weight": normal(0, 6, 5), "2.weight": normal(1, 4, 1, 2), "2.bias": normal(2, 4)}
    assert set(named(v)) == set(named.inverse(v)) == set(named.diagonal()) == set(v)
    full = whole.dense()
    keep = torch.cat([torch.arange(25, 55), torch.arange(61, 73)])  # the bias of 0.2 left out
    assert_close(named.dense(), full[keep][:, keep])
    turned = KFAC(*args, params=(net[2].bias, net[0][2].weight, net[2].weight))
    order = torch.cat([torch.arange(38, 42), torch.arange(0, 38)])
    assert_close(turned.dense(), named.dense()[order][:, order])
    only = KFAC(*args, params="0.2.bias")
    assert_close(only.dense(), full[55:61, 55:61])
    assert_close((named + turned).dense(), 2 * named.dense())


def test_frozen_params_are_not_covered():
    net, whole = small()
    net[0][0].requires_grad_(False)
    kfac = KFAC(net, nn.CrossEntropyLoss(), normal(1, 20, 4), labels(2, 8, 20))
    assert_close(kfac.dense(), whole.dense()[25:, 25:])


def test_inputs_may_be_a_tuple_or_a_dict_and_layers_called_by_keyword():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2).double()

        def forward(self, a, b):
            return self.layer(input=a * b)

    net, a, b, y = Two(), normal(0, 5, 4), normal(1, 5, 4), normal(2, 5, 2)
    wanted = KFAC(net.layer, nn.MSELoss(), a * b, y).dense()
    assert torch.equal(KFAC(net, nn.MSELoss(), (a, b), y).dense(), wanted)
    assert torch.equal(KFAC(net, nn.MSELoss(), {"b": b, "a": a}, y).dense(), wanted)


# ---- sampled and given targets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mse", "ce", "ce everything", "bce", "bce everything"])
def test_many_draws_approach_the_exact_root(name):
    criterion, targets = CRITERIA[name]
    net, x, many = mlp(4, 3, 3), normal(1, 6, 4), 4000
    weight = getattr(criterion, "weight", None)
    assert weight is None or len(weight) == 3
    exact = KFAC(net, criterion, x.repeat(many, 1), targets.repeat(many, *[1] * (targets.dim() - 1)))
    drawn = KFAC(net, criterion, x.repeat(many, 1), targets.repeat(many, *[1] * (targets.dim() - 1)), fisher="mc")
    for (a, g), (b, h) in zip(exact._moments, drawn._moments, strict=True):
        assert torch.equal(a, b) and not torch.equal(g, h)
        assert float((g - h).norm() / g.norm()) < 5 / (6 * many) ** 0.5


def test_draws_are_fixed_by_the_seed_and_go_on_in_updates():
    net, x, y = mlp(4, 5, 3), normal(1, 6, 4), labels(5, 3, 6)

    def made(seed):
        return KFAC(net, nn.CrossEntropyLoss(), x, y, fisher="mc", seed=seed)

    first, again, other = made(0), made(0), made(1)
    assert torch.equal(first.dense(), again.dense()) and not torch.equal(first.dense(), other.dense())
    start = first.dense()
    first.update(x, y, decay=0.0)
    assert not torch.equal(first.dense(), start)
    with pytest.raises(ValueError, match=r"^KFAC.update: outputs of the model must be finite; got NaN or Inf"):
        again.update(x * float("nan"), y)
    again.update(x, y, decay=0.0)
    assert torch.equal(first.dense(), again.dense())


@pytest.mark.parametrize("name", ["ce", "ce sum", "ce probabilities", "bce", "mse"])
def test_given_targets_are_outer_products_of_gradients(name):
    criterion, targets = CRITERIA[name]
    layer, x = nn.Linear(4, 3).double(), normal(1, 6, 4)
    g = 0
    outputs = layer(x).detach().requires_grad_()
    (d,) = torch.autograd.grad(criterion(outputs, targets), outputs)
    terms = {"ce sum": 1, "ce": 6, "ce probabilities": 6}.get(name, 18)  # over how many the criterion averages
    g = terms * d.T @ d
    kfac = KFAC(layer, criterion, x, targets, "weight", 0.0, fisher="empirical")
    assert_close(kfac.dense(), torch.kron(g, x.T @ x / 6))


# ---- running averages -----------------------------------------------------------------------------------------------


def test_updates_average_the_factors_and_renew_the_inverse():
    net, criterion, y = mlp(4, 3), nn.MSELoss(), normal(3, 6, 3)
    old, new = normal(1, 6, 4), normal(2, 6, 4)
    kfac, other = KFAC(net, criterion, old, y), KFAC(net, criterion, new, y)
    v = [normal(4, 3, 4), normal(5, 3)]
    stale, before = flat(kfac.inverse(v)), [(a.clone(), g.clone()) for a, g in kfac._moments]
    kfac.update(new, y)
    for (a, g), (a0, g0), (a1, g1) in zip(kfac._moments, before, other._moments, strict=True):
        assert_close(a, 0.95 * a0 + 0.05 * a1)
        assert_close(g, 0.95 * g0 + 0.05 * g1)
    fresh = flat(kfac.inverse(v))
    assert not torch.equal(fresh, stale)
    assert_close(fresh, torch.linalg.solve(kfac.dense(), flat(v)), 1e-10)
    kfac.update(new, y, decay=0.0)
    assert_close(kfac.dense(), other.dense())
    kept = kfac.dense()
    with pytest.raises(ValueError, match="finite values; got NaN or Inf in the factors of layer '0'"):
        kfac.update(new * 1e200, y)
    assert torch.equal(kfac.dense(), kept)
    with pytest.raises(ValueError, match=r"KFAC.update: decay must be in \[0, 1\]; got 1.5"):
        kfac.update(new, y, decay=1.5)


# ---- what is left behind --------------------------------------------------------------------------------------------


class Boom(Exception):
    pass


class Bomb(nn.Module):
    def forward(self, x):
        raise Boom


def hooks(net):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in net.modules())


@pytest.mark.parametrize("fails", [None, "forward", "criterion"])
def test_nothing_is_left_behind(fails):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(5, 3))
    if fails == "forward":
        net.append(Bomb())
    net[0].weight.grad = torch.ones(5, 4)

    def criterion(f, y):
        if fails == "criterion":
            raise Boom
        return F.cross_entropy(f + torch.randn(3), y)

    tensors = [*net.parameters(), *net.buffers(), net[0].weight.grad]
    before, versions, rng = [t.clone() for t in tensors], [p._version for p in net.parameters()], torch.get_rng_state()
    args = (
        net,
        criterion,
        torch.randn(6, 4, generator=torch.Generator().manual_seed(0)),
        labels(5, 3, 6),
        ["0.*", "4.*"],
    )
    if fails:
        with pytest.raises(Boom):
            KFAC(*args)
    else:
        kfac = KFAC(*args)
        kfac.update(*args[2:4])
        kfac.inverse(kfac({n: p.detach() for n, p in net.named_parameters() if n[0] in "04"}))
    assert all(map(same_bits, tensors, before)) and [p._version for p in net.parameters()] == versions
    assert torch.equal(torch.get_rng_state(), rng)
    assert hooks(net) == 0 and net[4].weight.grad is None and net.training


def test_the_mode_of_the_model_is_used_as_it_is():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    args = (net, nn.CrossEntropyLoss(), normal(1, 6, 4), labels(5, 3, 6))
    rng = torch.get_rng_state()
    train = KFAC(*args).dense()
    torch.set_rng_state(rng)
    net(args[2])  # draws the same mask
    assert torch.equal(KFAC(*args).dense(), train) is False
    torch.set_rng_state(rng)
    assert torch.equal(KFAC(*args).dense(), train)
    evaluated = KFAC(net.eval(), *args[1:]).dense()
    assert_close(evaluated, KFAC(nn.Sequential(net[0], nn.Identity(), net[2]), *args[1:]).dense())
    assert not torch.equal(evaluated, train)


def test_works_with_grad_mode_off_and_under_autocast():
    net, x, y = mlp(4, 5, 3).float(), normal(1, 6, 4).float(), labels(5, 3, 6)
    with torch.no_grad():
        plain = KFAC(net, nn.CrossEntropyLoss(), x, y)
    assert torch.equal(plain.dense(), KFAC(net, nn.CrossEntropyLoss(), x, y).dense())
    v = [torch.ones_like(p) for p in net.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        product = plain(v)
        mixed = KFAC(net, nn.CrossEntropyLoss(), x, y)
    assert torch.equal(flat(product), flat(plain(v)))
    assert_close(mixed.dense(), plain.dense(), 16 * torch.finfo(torch.bfloat16).eps)


def test_views_changed_in_place_and_hooks_of_the_user_do_not_mislead():
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)).double()
    safe = nn.Sequential(net[0], nn.ReLU(), net[2])
    x, y = normal(1, 2, 6, 4), normal(2, 2, 6, 3)
    wanted = KFAC(safe, nn.MSELoss(), x, y).dense()
    assert torch.equal(KFAC(net, nn.MSELoss(), x, y).dense(), wanted)
    doubling = net[0].register_forward_hook(lambda m, a, out: 2 * out)
    found = KFAC(net, nn.MSELoss(), x, y)
    doubling.remove()
    doubled = nn.Sequential(net[0], Twice(), nn.ReLU(), net[2])
    assert torch.equal(found.dense(), KFAC(doubled, nn.MSELoss(), x, y).dense())


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


class Recomputed(nn.Module):
    def __init__(self, inner, reentrant):
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


def test_checkpointed_layers_give_the_same():
    net, x, y = mlp(4, 5, 5, 3), normal(1, 6, 4), labels(5, 3, 6)
    wanted = KFAC(net, nn.CrossEntropyLoss(), x, y).dense()
    recomputed = nn.Sequential(Recomputed(net[:3], False), *net[3:])
    assert torch.equal(KFAC(recomputed, nn.CrossEntropyLoss(), x, y).dense(), wanted)
    reentrant = nn.Sequential(Recomputed(net[:3], True), *net[3:])
    with pytest.raises(ValueError, match=r"run layer '0\.inner\.0' with grad mode on; .* a reentrant checkpoint"):
        KFAC(reentrant, nn.CrossEntropyLoss(), x.requires_grad_(), y)


def test_compiled_and_wrapped_modules_are_looked_into():
    net, x, y = mlp(4, 5, 3), normal(1, 6, 4), labels(5, 3, 6)
    wanted = KFAC(net, nn.CrossEntropyLoss(), x, y).dense()
    inner = nn.Sequential(torch.compile(net[:2], backend="eager"), net[2])
    in_place = copy.deepcopy(net)
    in_place.compile(backend="eager")
    for wrapped in (torch.compile(net, backend="eager"), nn.DataParallel(net), inner, in_place):
        assert torch.equal(KFAC(wrapped, nn.CrossEntropyLoss(), x, y).dense(), wanted)


# ---- what is refused ------------------------------------------------------------------------------------------------


class Twofold(nn.Module):
    """One layer called twice, or called and its weight used besides, or called for nothing, or not called."""

    def __init__(self, how):
        super().__init__()
        self.how, self.layer, self.last = how, nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        if self.how == "idle":
            return self.last(x)
        out = self.layer(x)
        if self.how == "called":
            return self.last(self.layer(out))
        if self.how == "weight":
            return self.last(out @ self.layer.weight)
        return self.last(x)


def tied():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    return net


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Attending(nn.Module):
    """The output layer of attention is a Linear whose weight is used without calling it."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(3, 1)

    def forward(self, x):
        return self.attention(x, x, x)[0]


LINEAR = nn.Linear(3, 3)
X, Y = torch.ones(4, 3), torch.zeros(4, 3)
NORMED = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))


@pytest.mark.parametrize(
    ("model", "options", "kind", "message"),
    [
        (lambda x: x, {}, TypeError, "KFAC: model must be a torch.nn.Module; got function."),
        (LINEAR, {"criterion": 3}, TypeError, "KFAC: criterion must be callable; got int."),
        (LINEAR, {"damping": -1.0}, ValueError, "KFAC: damping must be finite and >= 0; got -1.0."),
        (LINEAR, {"damping": "1"}, TypeError, "KFAC: damping must be a number; got '1'."),
        (LINEAR, {"fisher": "exact"}, ValueError, "KFAC: fisher must be 'type-2', 'mc' or 'empirical'; got 'exact'."),
        (LINEAR, {"seed": 0.5}, TypeError, "KFAC: seed must be an int; got 0.5."),
        (
            LINEAR,
            {"criterion": nn.HuberLoss(), "fisher": "mc"},
            ValueError,
            r"KFAC: criterion must be CrossEntropyLoss, .* for fisher='mc'; got HuberLoss, .* Use fisher='type-2'.",
        ),
        (
            LINEAR,
            {"criterion": nn.MSELoss(reduction="none")},
            ValueError,
            "KFAC: criterion must be a scalar; got shape",
        ),
        (
            LINEAR,
            {"criterion": lambda f, y: f.sum(0).square().sum()},
            ValueError,
            "KFAC: criterion must be a sum or mean over dimension 0 of the outputs; got one that couples",
        ),
        (
            LINEAR,
            {"criterion": lambda f, y: -f.square().sum()},
            ValueError,
            "KFAC: criterion must be convex in the outputs of the model; got .* eigenvalue -2",
        ),
        (
            LINEAR,
            {"targets": Y[:, :1]},
            ValueError,
            r"KFAC: targets must have the shape of the outputs .*; got \(4, 1\)",
        ),
        (
            LINEAR,
            {"inputs": X[0], "targets": Y[0]},
            ValueError,
            r"KFAC: inputs must have a batch dimension; layer '' got shape \(3,\).",
        ),
        (
            LINEAR,
            {"inputs": X[:0], "targets": Y[:0]},
            ValueError,
            r"outputs of the model must be \[N, ...\] with N >= 1",
        ),
        (
            nn.Sequential(LINEAR, nn.Flatten(0), nn.Unflatten(0, (6, 2))),
            {"targets": torch.zeros(6, 2)},
            ValueError,
            r"one entry along dimension 0 for each of the 4 inputs; got shape \(6, 2\).*fisher='mc'",
        ),
        (
            nn.LSTM(3, 3),
            {"params": None},
            ValueError,
            r"got weight_ih_l0 \(LSTM\), .*bias_hh_l0 \(LSTM\)\. Pass params",
        ),
        (
            NORMED,
            {},
            ValueError,
            r"Linear, Conv1d, Conv2d or Conv3d layers; got 1.weight \(LayerNorm\), 1.bias \(LayerN",
        ),
        (nn.Embedding(3, 3), {}, ValueError, r"got weight \(Embedding\)"),
        (nn.ConvTranspose1d(3, 3, 1), {}, ValueError, r"got weight \(ConvTranspose1d\)"),
        (Scaled(3, 3), {}, ValueError, r"got weight \(Scaled\), bias \(Scaled\)"),
        (
            nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
            {},
            ValueError,
            r"got .*parametrizations\.weight\.original0 \(ParametrizationList\)",
        ),
        (
            NORMED,
            {"params": ["0.*", "nope"]},
            ValueError,
            r"params\[1\] must name, or match, .*; got 'nope'. The names",
        ),
        (
            NORMED,
            {"params": [torch.ones(3, requires_grad=True)]},
            ValueError,
            "params must be parameters of model; got 1",
        ),
        (NORMED, {"params": []}, ValueError, "params must hold at least one tensor; got none"),
        (nn.LazyLinear(3), {}, TypeError, r"params\[0\] must be a plain tensor; got UninitializedParameter"),
        (tied(), {}, ValueError, r"params must belong to one layer each; got 0.weight = 1.weight, shared"),
        (Twofold("called"), {}, ValueError, "got layer 'layer', called 2 times"),
        (Twofold("idle"), {}, ValueError, "got layer 'layer', not called"),
        (Twofold("weight"), {}, ValueError, "used once in the forward pass; got layer.weight, used 2 times"),
        (Twofold("wasted"), {}, ValueError, "got layer 'layer', whose result is not used"),
        (nn.Sequential(LINEAR, nn.LSTM(3, 3)), {"params": "0.*"}, TypeError, "model must return a tensor; got tuple"),
        (
            Attending(),
            {"params": "attention.out_proj.*"},
            ValueError,
            "got layer 'attention.out_proj', not called",
        ),
        (LINEAR, {"inputs": X / 0}, ValueError, "KFAC: outputs of the model must be finite; got NaN or Inf"),
        (LINEAR, {"inputs": X * 1e30}, ValueError, "finite values; got NaN or Inf in the factors of layer ''"),
        (
            LINEAR,
            {"criterion": nn.CrossEntropyLoss(), "targets": torch.full((4,), -100)},
            ValueError,
            "that not all targets are ignored",
        ),
    ],
)
def test_bad_arguments_are_refused_by_name(model, options, kind, message):
    arguments = {"criterion": nn.MSELoss(), "inputs": X, "targets": Y, **options}
    before = hooks(model) if isinstance(model, nn.Module) else 0
    with pytest.raises(kind, match=message):
        KFAC(model, **arguments)
    if isinstance(model, nn.Module):
        assert hooks(model) == before


def test_vectors_are_checked():
    kfac = KFAC(LINEAR, nn.MSELoss(), X, Y)
    with pytest.raises(ValueError, match=r"KFAC.inverse: v\[1\] must have shape \(3,\); got \(2,\)"):
        kfac.inverse([torch.ones(3, 3), torch.ones(2)])
    with pytest.raises(ValueError, match="KFAC: v must have 2 tensors; got 1"):
        kfac([torch.ones(3, 3)])


# ---- another implementation -----------------------------------------------------------------------------------------

PEERS = {
    "mlp ce": (lambda: mlp(4, 5, 3), (8, 4), nn.CrossEntropyLoss(), lambda: labels(2, 3, 8)),
    "mlp ce sum": (lambda: mlp(4, 5, 3), (8, 4), nn.CrossEntropyLoss(reduction="sum"), lambda: labels(2, 3, 8)),
    "mlp mse": (lambda: mlp(4, 5, 3), (8, 4), nn.MSELoss(), lambda: normal(2, 8, 3)),
    "mlp mse sum": (lambda: mlp(4, 5, 3), (8, 4), nn.MSELoss(reduction="sum"), lambda: normal(2, 8, 3)),
    "mlp bce": (lambda: mlp(4, 5, 3), (8, 4), nn.BCEWithLogitsLoss(), lambda: labels(2, 2, 8, 3).double()),
    "words mse": (lambda: mlp(4, 5, 3), (8, 6, 4), nn.MSELoss(), lambda: normal(2, 8, 6, 3)),
    **{
        f"conv {name}": (
            lambda name=name: conv_problem(name)[0],
            (8, 4, 5, 6),
            nn.CrossEntropyLoss(),
            lambda: labels(2, 3, 8),
        )
        for name in ("plain", "no bias", "stride", "dilation", "valid")
    },
}


@pytest.mark.parametrize("fisher", ["type-2", "empirical", "mc"])  # both draw the same labels from one seed
@pytest.mark.parametrize("name", PEERS)
def test_agrees_with_curvlinops(name, fisher):
    curvlinops = pytest.importorskip("curvlinops", exc_type=ImportError)
    make, shape, criterion, targets = PEERS[name]
    net, x, y = make(), normal(1, *shape), targets()
    params = list(net.parameters())
    theirs = curvlinops.KFACLinearOperator(
        net,
        criterion,
        params,
        [(x, y)],
        seed=3,
        fisher_type=fisher,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    found = KFAC(net, criterion, x, y, damping=0.0, fisher=fisher, seed=3).dense()
    assert_close(found, theirs @ torch.eye(len(found), dtype=F64), 1e-10)
    assert values(params)[0].grad is None
