"""stn_gate as a function: every form of its arguments, every order of derivative, and every way to ask for one."""

import copy
import re

import pytest
import torch
from helpers import Memory
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap

from nestopt_ext._functions import stn_gate

#: shape, batch_dim, channel_dim
CASES = [((3, 2), 0, 1), ((2, 3, 2), 1, 2), ((3, 2, 2), 0, 1)]


def plain_gate(plain, response, gates, bias=None, response_bias=None, *, batch_dim=0, channel_dim=-1):
    """The same in PyTorch's own operations."""
    if response is None:
        plain, response = plain.chunk(2, channel_dim)
    channels = response.shape[channel_dim]
    channel_dim %= response.dim()

    def spread(rows):
        shape = [1] * response.dim()
        shape[batch_dim], shape[channel_dim] = rows.shape
        return rows.reshape(shape)

    out = spread(gates[:, :channels]) * response
    if plain is not None:
        out = out + plain
    if bias is not None:
        out = out + spread(bias[None])
    if response_bias is not None:
        out = out + spread(gates[:, channels:] * response_bias)
    return out


def make(shape, batch_dim, channel_dim, *, stacked=True, rows=None, device="cpu", dtype=torch.float64):
    """Leaves that require grad: plain, response (None if stacked), gates, bias and response_bias."""
    examples, channels = shape[batch_dim], shape[channel_dim]
    wide = tuple(2 * s if d == channel_dim else s for d, s in enumerate(shape))

    def leaf(*size):
        return torch.randn(size, dtype=dtype, device=device, requires_grad=True)

    data = (leaf(*wide), None) if stacked else (leaf(*shape), leaf(*shape))
    return [*data, leaf(rows or examples, 2 * channels), leaf(channels), leaf(channels)]


def leaves_of(function, arguments, **options):
    """The function of the arguments that are tensors, and these."""
    at = [i for i, t in enumerate(arguments) if t is not None]

    def of_leaves(*leaves):
        values = [None] * len(arguments)
        for i, t in zip(at, leaves, strict=True):
            values[i] = t
        return function(*values, **options)

    return of_leaves, [arguments[i] for i in at]


@pytest.mark.parametrize("absent", [(), (0,), (3,), (3, 4)], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_derivatives(case, stacked, rows, absent, device):
    if stacked and 0 in absent:
        pytest.skip("plain is there if it is both")
    if absent and case is not CASES[2]:
        pytest.skip("the layout makes no difference")
    arguments = make(*case, stacked=stacked, rows=rows, device=device)
    for i in absent:
        arguments[i] = None
    dims = {"batch_dim": case[1], "channel_dim": case[2]}
    function, leaves = leaves_of(stn_gate, arguments, **dims)
    torch.testing.assert_close(function(*leaves), plain_gate(*arguments, **dims), rtol=1e-13, atol=1e-14)
    assert gradcheck(
        function,
        leaves,
        fast_mode=bool(absent),
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )
    batched = case is CASES[0] and rows == 3
    assert gradgradcheck(function, leaves, fast_mode=True, check_fwd_over_rev=True, check_batched_grad=batched)


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("stacked", [True, False])
def test_one_derivative_alone(stacked, number, device):
    """The others are not asked for: reverse and forward."""
    arguments = make(*CASES[2], stacked=stacked, device=device)
    if arguments[number] is None:
        pytest.skip("stacked")
    dims = {"batch_dim": 0, "channel_dim": 1}
    for i, t in enumerate(arguments):
        if t is not None:
            t.requires_grad_(i == number)

    def of_one(function):
        return lambda t: function(*[t if i == number else a for i, a in enumerate(arguments)], **dims)

    assert gradcheck(of_one(stn_gate), arguments[number], check_forward_ad=True, check_batched_grad=True)
    found, want = (jacrev(of_one(f))(arguments[number].detach()) for f in (stn_gate, plain_gate))
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_higher_derivatives(order, device):
    """Along one line, by reverse mode alone and by forward over reverse."""
    values = []
    for function in (stn_gate, plain_gate):
        torch.manual_seed(1)
        arguments = [t if t is None else t.detach() for t in make(*CASES[1], device=device)]

        def along(s, function=function, arguments=arguments):
            plain, _, gates, bias, response_bias = arguments
            moved = (plain * (1 + s), None, gates + s * s, bias - s, response_bias * (2 - s))
            return (function(*moved, batch_dim=1, channel_dim=2) ** 3).sum()

        derivative, mixed = along, along
        for _ in range(order):
            derivative = grad(derivative)
        for _ in range(order - 1):
            mixed = grad(mixed)
        s = torch.tensor(0.3, dtype=torch.float64, device=device)
        values.append((derivative(s), jvp(mixed, (s,), (torch.ones_like(s),))[1]))
    assert values[0][0].abs() > 1e-3
    torch.testing.assert_close(values[0], values[1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(*values[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("biases", ["both", "bias", "none", "none, and no gates of them"])
@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_fused_gradient_equals_the_one_that_can_be_differentiated(case, stacked, biases, device):
    for rows in (1, None):
        arguments = make(*case, stacked=stacked, rows=rows, device=device)
        if biases != "both":
            arguments[4] = None
        if biases.startswith("none"):
            arguments[3] = None
        if biases.endswith("gates of them"):
            arguments[2] = torch.randn_like(arguments[2].chunk(2, 1)[0], requires_grad=True)
        leaves = [t for t in arguments if t is not None]
        out = stn_gate(*arguments, batch_dim=case[1], channel_dim=case[2])
        direction = torch.randn_like(out)
        fused = torch.autograd.grad(out, leaves, direction, retain_graph=True)
        composed = torch.autograd.grad(out, leaves, direction, create_graph=True)
        torch.testing.assert_close(fused, composed, rtol=1e-12, atol=1e-13)
        want = plain_gate(*arguments, batch_dim=case[1], channel_dim=case[2])
        torch.testing.assert_close(fused, torch.autograd.grad(want, leaves, direction), rtol=1e-12, atol=1e-13)
        assert not any(t.requires_grad for t in fused) and composed[-1].requires_grad


@pytest.mark.parametrize("stacked", [True, False])
def test_tangents_that_require_grad_inside_a_dual_level(stacked, device):
    """What linearized layers do: the function is called on tangents, whose graph leads to weights, and joined."""
    arguments = make(*CASES[0], stacked=stacked, device=device)
    leaves = [t for t in arguments if t is not None]
    results = []
    for function in (stn_gate, plain_gate):
        with forward_ad.dual_level():
            tangent = function(*arguments)
            dual = forward_ad.make_dual(torch.ones_like(tangent).detach(), tangent)
            primal, tangent = forward_ad.unpack_dual(dual.tanh())
            loss = ((primal + tangent) ** 3).sum()
            inside = torch.autograd.grad(loss, leaves, create_graph=True)
        outside = torch.autograd.grad(loss, leaves, create_graph=True)
        torch.testing.assert_close(inside, outside, rtol=1e-12, atol=1e-13)
        second = torch.autograd.grad(sum((t**2).sum() for t in outside), leaves)
        results.append((outside, second))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-11)


def test_duals_of_which_the_gradient_is_taken_without_a_graph(device):
    """Forward over reverse with grad mode off in the backward pass: no tangent is dropped on the way."""
    arguments = [t.detach() if t is not None else None for t in make(*CASES[2], device=device)]
    found = []
    for function in (stn_gate, plain_gate):
        torch.manual_seed(2)
        with forward_ad.dual_level():
            duals = [
                None if t is None else forward_ad.make_dual(t.clone().requires_grad_(), torch.randn_like(t))
                for t in arguments
            ]
            out = function(*duals, batch_dim=0, channel_dim=1)
            gradients = torch.autograd.grad((out**2).sum(), [t for t in duals if t is not None])
            found.append([forward_ad.unpack_dual(g).tangent for g in gradients])
    assert all(t is not None and t.abs().max() > 0 for t in found[0])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "in_dims",
    [(0, None, None, None), (2, None, None, None), (None, 1, None, None), (0, 0, 0, 0), (None, None, None, 1)],
    ids=str,
)
def test_under_vmap(in_dims, device):
    shapes = ((3, 4, 2), (3, 4), (2,), (2,))
    arguments = [
        torch.randn((*s[:dim], 5, *s[dim:]) if dim is not None else s, dtype=torch.float64, device=device)
        for s, dim in zip(shapes, in_dims, strict=True)
    ]
    found, want = (
        vmap(lambda x, *rest, f=f: f(x, None, *rest, batch_dim=0, channel_dim=1), in_dims)(*arguments)
        for f in (stn_gate, plain_gate)
    )
    torch.testing.assert_close(found, want, rtol=1e-13, atol=1e-14)


def test_under_the_transforms_of_torch_func(device):
    arguments = [t.detach() for t in make(*CASES[1], stacked=False, device=device)]

    def of(function):
        return lambda *tensors: function(*tensors, batch_dim=1, channel_dim=2).sin()

    for argnum in range(5):
        nested = [
            transform(of(function), argnum)(*arguments)
            for transform in (jacrev, jacfwd)
            for function in (stn_gate, plain_gate)
        ]
        for other in nested[1:]:
            torch.testing.assert_close(nested[0], other, rtol=1e-11, atol=1e-12)

    def square(function):
        return lambda *tensors: of(function)(*tensors).square().sum()

    for transform in (lambda f, a: jacfwd(grad(f, a), a), lambda f, a: jacrev(jacrev(f, a), a)):
        for argnums in ((1, 2), (2, 4)):
            found, want = (transform(square(f), argnums)(*arguments) for f in (stn_gate, plain_gate))
            torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-11)
    batch = [torch.stack([t, 2 * t]) for t in arguments]
    found, want = (vmap(grad(square(f), (0, 1, 2, 3, 4)))(*batch) for f in (stn_gate, plain_gate))
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-11)


def test_in_a_module_under_functional_call(device):
    """A jacobian in the weights of a layer."""
    linear = torch.nn.Linear(3, 4, dtype=torch.float64, device=device)
    x, gates = (torch.randn(2, n, dtype=torch.float64, device=device) for n in (3, 4))
    weights = {k: v.detach() for k, v in linear.named_parameters()}
    found, want = (
        jacrev(lambda w, f=f: f(functional_call(linear, w, (x,)), None, gates[:, :2]))(weights)
        for f in (stn_gate, plain_gate)
    )
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shape", [(0, 2), (3, 0), (2, 3, 0), (0, 2, 0)], ids=str)
@pytest.mark.parametrize("stacked", [True, False])
def test_nothing(shape, stacked, device):
    arguments = make(shape, 0, 1, stacked=stacked, device=device)
    out = stn_gate(*arguments, batch_dim=0, channel_dim=1)
    assert out.shape == shape
    leaves = [t for t in arguments if t is not None]
    first = torch.autograd.grad(out.sum(), leaves, create_graph=True)
    assert [t.shape for t in first] == [t.shape for t in leaves] and all((t == 0).all() for t in first)
    # A scalar that depends on all of them, which are linear in one another.
    second = torch.autograd.grad(sum((t**2).sum() for t in first), leaves, allow_unused=True)
    assert all(t is None or (t == 0).all() for t in second)


@pytest.mark.parametrize("coefficients", ["same", torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stacked", [True, False])
def test_16_bits(stacked, dtype, coefficients, device):
    """Results and gradients have the dtype of what they belong to, and are right to its precision."""
    arguments = [t if t is None else t.detach() for t in make((5, 3, 4), 0, 1, stacked=stacked, device=device)]
    kinds = [dtype, dtype, *[dtype if coefficients == "same" else coefficients] * 3]
    mine = [t if t is None else t.to(d).requires_grad_() for t, d in zip(arguments, kinds, strict=True)]
    exact = [t if t is None else t.detach().double().requires_grad_() for t in mine]
    found, want = (f(*a, batch_dim=0, channel_dim=1) for f, a in ((stn_gate, mine), (plain_gate, exact)))
    direction = torch.randn(5, 3, 4, device=device).to(dtype)
    found.backward(direction)
    want.backward(direction.double())
    assert found.dtype == dtype
    for a, b, leaf in [(found, want, found)] + [
        (a.grad, b.grad, a) for a, b in zip(mine, exact, strict=True) if a is not None
    ]:
        assert a.dtype == leaf.dtype
        eps = torch.finfo(a.dtype).eps
        torch.testing.assert_close(a.double(), b, rtol=0, atol=8 * eps * b.abs().max().item())


def test_under_autocast(device):
    """Products and gates of 16 bits beside biases of float32, as a layer makes them."""
    linear = torch.nn.Linear(3, 4, device=device)
    bias, response_bias = (torch.randn(2, device=device, requires_grad=True) for _ in range(2))
    with torch.autocast(device.type, torch.bfloat16):
        stacked, gates = (linear(torch.randn(5, 3, device=device)) for _ in range(2))
        out = stn_gate(stacked, None, gates, bias, response_bias)
    assert out.dtype == stacked.dtype == torch.bfloat16
    out.float().sum().backward()
    assert {t.grad.dtype for t in (linear.weight, bias, response_bias)} == {torch.float32}


@pytest.mark.parametrize("stacked", [True, False])
def test_memory_formats_are_kept(stacked, device):
    """Of a convolution: the result and its gradients lie as the products do."""
    arguments = make((2, 3, 4, 5), 0, 1, stacked=stacked, device=device)
    data = [t.detach().to(memory_format=torch.channels_last) for t in arguments[:2] if t is not None]
    data = [t.requires_grad_() for t in data]
    lying = [*data, *[None] * (2 - len(data)), *arguments[2:]]
    out, want = (f(*a, batch_dim=0, channel_dim=1) for f, a in ((stn_gate, lying), (plain_gate, arguments)))
    torch.testing.assert_close(out, want, rtol=1e-13, atol=1e-14)
    direction = torch.randn_like(out)
    assert out.is_contiguous(memory_format=torch.channels_last)
    found = torch.autograd.grad(out, data, direction)
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in found)
    torch.testing.assert_close(found, torch.autograd.grad(want, arguments[: len(data)], direction))


def test_any_strides(device):
    plain, response, *rest = (t.detach() for t in make((3, 4, 5, 2), 0, 3, stacked=False, device=device))
    want = stn_gate(plain, response, *rest)
    odd = [t.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2) for t in (plain, response)]
    torch.testing.assert_close(stn_gate(*odd, *rest), want, rtol=0, atol=0)
    same = response[:, :1].expand(3, 4, 5, 2).requires_grad_()
    out = stn_gate(plain, same, *rest)
    torch.testing.assert_close(out, plain_gate(plain, same, *rest), rtol=1e-13, atol=1e-14)
    found, want = (torch.autograd.grad(f(plain, same, *rest).sum(), same)[0] for f in (stn_gate, plain_gate))
    torch.testing.assert_close(found, want)


def test_arguments_are_only_read(device):
    arguments = [t.detach() for t in make(*CASES[2], stacked=False, device=device)]
    memory = Memory(arguments)
    out = stn_gate(*arguments, batch_dim=0, channel_dim=1)
    assert memory.unchanged()
    assert out.data_ptr() not in {t.data_ptr() for t in arguments}


def test_backward_twice_gives_the_same(device):
    """Memory that gradients are made in belongs to one pass."""
    arguments = make(*CASES[2], device=device)
    leaves = [t for t in arguments if t is not None]
    out = stn_gate(*arguments, batch_dim=0, channel_dim=1)
    first = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    kept = copy.deepcopy(first)
    second = torch.autograd.grad(out.sum(), leaves)
    torch.testing.assert_close(first, kept, rtol=0, atol=0)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_what_it_keeps_for_backward(device):
    """The products, gates and response bias that were given, and nothing of their size beside."""
    arguments = make((64, 32), 0, 1, device=device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        stn_gate(*arguments)
    assert {t.untyped_storage().data_ptr() for t in kept} == {
        arguments[i].untyped_storage().data_ptr() for i in (0, 2, 4)
    }


def test_compiled_it_is_part_of_the_graph(device):
    torch.compiler.reset()
    arguments = make((4, 3), 0, 1, device=device)
    compiled = torch.compile(lambda *a: stn_gate(*a).sum(), backend="aot_eager", fullgraph=True)
    leaves = [t for t in arguments if t is not None]
    found, want = (torch.autograd.grad(f(*arguments).sum(), leaves) for f in (compiled, plain_gate))
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-13)


def zeros(*shapes):
    return [None if s is None else torch.zeros(s) for s in shapes]


@pytest.mark.parametrize(
    ("arguments", "dims", "message"),
    [
        (zeros((3, 5), None, (3, 4)), {}, "plain must have an even number of channels without response, both stacked"),
        (zeros((3, 5), (3, 4), (3, 4)), {}, "plain must have the shape of response (3, 4); got (3, 5)."),
        (zeros((3, 4), None, (2, 4)), {}, "gates must have 1 or 3 rows and 2 or 4 columns; got shape (2, 4)."),
        (zeros((3, 4), None, (3, 3)), {}, "gates must have 1 or 3 rows and 2 or 4 columns; got shape (3, 3)."),
        (zeros((3, 4), None, (4,)), {}, "gates must have 1 or 3 rows and 2 or 4 columns; got shape (4,)."),
        (
            zeros((3, 4), None, (3, 2), None, (2,)),
            {},
            "gates must have 1 or 3 rows and 4 columns; got shape (3, 2).",
        ),
        (zeros((3, 4), None, (3, 4), (4,)), {}, "bias must have a number for each channel, shape (2,); got (4,)."),
        (
            zeros((3, 4), None, (3, 4), None, (2, 1)),
            {},
            "response_bias must have a number for each channel, shape (2,); got (2, 1).",
        ),
        (zeros((3, 4), None, (3, 4)), {"batch_dim": 2}, "batch_dim must be a dimension of 2; got 2."),
        (
            zeros((3, 4), None, (3, 4)),
            {"channel_dim": 0},
            "channel_dim must be a dimension of 2 after batch_dim; got 0.",
        ),
        (zeros((), None, (3, 4)), {}, "batch_dim must be a dimension of 0; got 0."),
    ],
    ids=str,
)
def test_wrong_shapes(arguments, dims, message):
    with pytest.raises(ValueError, match=f"^stn_gate: {re.escape(message)}"):
        stn_gate(*arguments, **dims)


def test_wrong_types():
    with pytest.raises(TypeError, match=r"^stn_gate: plain must be a tensor without response; got None\.$"):
        stn_gate(None, None, torch.zeros(3, 4))
    with pytest.raises(TypeError, match="gates must be float32 beside out of float32; got float64"):
        stn_gate(torch.zeros(3, 4), None, torch.zeros(3, 4, dtype=torch.float64))
    with pytest.raises(TypeError, match="float32, float64, bfloat16 or float16; got int64"):
        stn_gate(torch.zeros(3, 4).long(), None, torch.zeros(3, 4))
