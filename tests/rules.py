"""What every rule of a recording is held to, for a model of torch functions and one batch."""

import warnings
from contextlib import nullcontext, suppress

import torch
from torch import nn
from torch.func import functional_call, jvp, vjp, vmap

from nestopt_ext.curvature import linearize
from nestopt_ext.curvature._evaluation import Replay
from nestopt_ext.curvature._model import Model
from nestopt_ext.curvature._recording import recorded
from nestopt_ext.curvature._tangent_kernel import TangentKernel
from nestopt_ext.curvature._tape import MixesExamples


class Wrapped(nn.Module):
    """A function of params, as a module: ``f(x, *params)``."""

    def __init__(self, f, *params):
        super().__init__()
        self.f = f
        self.params = nn.ParameterList([nn.Parameter(p) for p in params])

    def forward(self, x):
        return self.f(x, *self.params)


def tangents(params, seed=11):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, dtype=torch.float64, generator=generator).to(p) for n, p in params.items()}


def close(actual, expected, rtol):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    scale = expected.abs().max().clamp(min=1e-30)
    assert float((actual - expected).abs().max() / scale) <= rtol


def check_rule(model, inputs, *, rtol=1e-12, opaque=()):
    """Products equal those of torch.func in value; they modify nothing, can be accumulated, and come k at once.

    The model must be recorded in full, but for functions named in ``opaque``. Random numbers (dropout) are drawn from a
    fixed seed, so models may hold them.
    """
    params = {n: p.detach().clone() for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    args = inputs if isinstance(inputs, tuple) else (inputs,)

    def outputs(p):
        torch.manual_seed(0)
        return functional_call(model, ({**p, **{n: b.clone() for n, b in buffers.items()}}), args)

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if opaque else "error")
        jacobian = linearize(model, inputs)
    assert jacobian.reason is None and set(jacobian.opaque) == set(opaque), (jacobian.reason, jacobian.opaque)
    v = tangents(params)
    expected_z, expected_jvp = jvp(outputs, (params,), (v,))
    close(jacobian.outputs, expected_z, rtol)
    before = {n: t.clone() for n, t in v.items()}
    close(jacobian.jvp(v), expected_jvp, rtol)
    u = tangents({"u": expected_z})["u"]
    _, pull = vjp(outputs, params)
    expected_vjp = pull(u)[0]
    u_before = u.clone()
    found = jacobian.vjp(u)
    for n in params:
        close(found[n], expected_vjp[n], rtol)
        found[n].fill_(float("nan"))  # memory of its own
    into = {n: t.clone() for n, t in v.items()}
    jacobian.add_vjp_(u, into, alpha=-0.5)
    for n in params:
        close(into[n], v[n] - 0.5 * expected_vjp[n], 4 * rtol)
        assert torch.equal(v[n], before[n])
    assert torch.equal(u, u_before)
    many_v = [torch.stack([t, -2 * t]) for t in v.values()]
    many = jacobian._jacobian.forwards(many_v)
    close(many[1], -2 * expected_jvp, rtol)
    many_u = jacobian._jacobian.backwards(torch.stack([u, -2 * u]))
    for t, n in zip(many_u, params, strict=True):
        close(t[1], -2 * expected_vjp[n], rtol)
    check_kernel(jacobian._jacobian, u, rtol)
    for n, b in model.named_buffers():
        assert torch.equal(b, buffers[n])
    for n, p in model.named_parameters():
        assert torch.equal(p, params[n]) and p.grad is None


def check_kernel(recording, u, rtol):
    """J J' in one go is J of J', whether a layer goes by its gradient or by what is kept for many products."""
    before = u.clone()
    expected = recording.forward(recording.backward(u))
    for num_uses in (1, 1000):
        with recording.reading():
            kernel = TangentKernel(recording.tape, num_uses)
            for _ in range(2):
                found = kernel.product(u)
                close(found, expected, 4 * rtol)
                assert found.untyped_storage().data_ptr() != u.untyped_storage().data_ptr()
        found.fill_(float("nan"))  # memory of its own
    assert torch.equal(u, before)


def check_mixes(model, x):
    """Examples are refused to be taken apart, although the model is recorded in full."""
    with Replay().run() as call:
        _, recording = recorded("test", Model("test", model), x, list(model.parameters()), call)
    tape = recording.tape
    assert not tape.opaque
    try:
        found = example_dims(tape, len(x))[tape.output_slot]
    except MixesExamples:
        return
    assert found != 0


def example_dims(tape, batch):
    """For each slot, the dimension that runs over examples; what depends on data alone may mix them."""
    dims = dict.fromkeys(range(tape.num_params))
    dims.update((var.slot, 0) for var in tape.data)
    for node in tape.all_nodes:
        with nullcontext() if node.wanted else suppress(MixesExamples):
            dims[node.output] = None
            dims[node.output] = node.batch_dim([None if s < 0 else dims[s] for s in node.slots], batch)
    return dims


def rows_of(part):
    return part.rows if hasattr(part, "rows") else torch.einsum("btgo,btgi->bgoi", part.left, part.right)


def check_example_gradients(model, x, *, rtol=1e-12):
    """The gradients of each param for each example, from one backward pass, equal those of each example's outputs."""
    named = dict(model.named_parameters())
    params = {n: p.detach() for n, p in named.items()}
    batch = len(x)
    torch.manual_seed(0)
    with Replay().run() as call:
        outputs, recording = recorded("test", Model("test", model), x, list(named.values()), call)
    tape = recording.tape
    u = tangents({"u": outputs})["u"]
    dims = example_dims(tape, batch)
    assert dims[tape.output_slot] == 0
    found = {}  # of what depends on params alone: for each example, [B, *shape]
    cotangents = {tape.output_slot: u}
    for node in reversed(tape.nodes):
        of_slots = [None if s < 0 else dims[s] for s in node.slots]
        for i in node.wanted:
            slot = node.slots[i]
            if dims[node.output] is None:
                part = vmap(lambda c, node=node, i=i: node.vjp(i, c, None))(found[node.output])
            elif dims[slot] is None:
                part = rows_of(node.example_gradients(i, cotangents[node.output], of_slots, batch))
                part = part.reshape(batch, *node.vjp(i, cotangents[node.output], None).shape)
            else:
                part = node.vjp(i, cotangents[node.output], None)
            into = cotangents if dims[slot] is not None else found
            into[slot] = part if slot not in into else into[slot] + part

    def whole(p):
        torch.manual_seed(0)
        return functional_call(model, p, (x,))

    apart = torch.eye(batch, dtype=u.dtype).view(batch, batch, 1) * u.reshape(batch, -1)
    expected = vmap(vjp(whole, params)[1])(apart.view(batch, *u.shape))[0]
    for slot, name in enumerate(named):
        close(found.get(slot, torch.zeros_like(expected[name])), expected[name], rtol)
