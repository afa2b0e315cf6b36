"""ComplexSGD: its numbers, and everything a torch.optim.Optimizer is expected to do."""

import cmath
import copy
import gc
import io
import math
import multiprocessing
import pickle
import threading
import warnings
import weakref

import numpy as np
import pytest
import torch
from helpers import FLOATING, LAYOUTS, Memory, all_same_bits, name_of, opmath, product, same_bits
from optimizers import IMPLEMENTATIONS, from_file, make_params, run, set_grads, snapshot
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import Parameter
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, CyclicLR, LambdaLR, OneCycleLR, StepLR

from nestopt_ext import ComplexSGD, _ops, effective_lr

implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
MOMENTUM = cmath.rect(0.8, 0.7)
BUFFERS = ("momentum_buffer", "momentum_buffer_imag")


# ---- numbers --------------------------------------------------------------------------------------------------------


def torch_sgd(params, **options):
    """torch.optim.SGD, also with a negative momentum, which its constructor refuses."""
    sgd = SGD(params, **{**options, "momentum": abs(options["momentum"])})
    sgd.param_groups[0]["momentum"] = options["momentum"]
    return sgd


def valid(o):
    return not o["nesterov"] or (o["momentum"] != 0 and o["dampening"] == 0)


SGD_OPTIONS = [
    o
    for o in product(
        momentum=[0.0, 0.9, -0.5],
        dampening=[0, 0.3],
        weight_decay=[0, 0.1],
        nesterov=[False, True],
        maximize=[False, True],
    )
    if valid(o)
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("options", SGD_OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_real_momentum_is_torch_sgd_bit_for_bit(options, dtype):
    theirs, ours = make_params(dtype=dtype), make_params(dtype=dtype)
    sgd = torch_sgd(theirs, lr=0.1, foreach=False, **options)
    optimizer = ComplexSGD(ours, lr=0.1, **IMPLEMENTATIONS["loop"], **options)
    for i in range(6):
        for params in (theirs, ours):
            set_grads(params, i)
            if i < 2:
                params[1].grad = None  # its first gradient comes later
            if i == 4:
                params[2].grad = None
        sgd.step()
        optimizer.step()
        assert all_same_bits(theirs, ours)
    if options["momentum"]:
        assert all_same_bits(
            [sgd.state[p]["momentum_buffer"] for p in theirs], [optimizer.state[p]["momentum_buffer"] for p in ours]
        )
    assert all("momentum_buffer_imag" not in s for s in optimizer.state.values())


@implementations
@pytest.mark.parametrize("options", SGD_OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_real_momentum_is_torch_sgd_in_every_implementation(options, implementation):
    theirs, ours = make_params(), make_params()
    sgd = torch_sgd(theirs, lr=0.1, **options)
    optimizer = ComplexSGD(ours, lr=0.1, **implementation, **options)
    for i in range(5):
        for params in (theirs, ours):
            set_grads(params, i)
            if i < 2:
                params[1].grad = None
        sgd.step()
        optimizer.step()
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


COMPLEX_OPTIONS = [
    o
    for o in product(
        momentum=[MOMENTUM], dampening=[0, 0.3], weight_decay=[0, 0.1], nesterov=[False, True], maximize=[False, True]
    )
    if valid(o)
]


@implementations
@pytest.mark.parametrize("layout", [None, LAYOUTS["every_other"]], ids=["contiguous", "strided"])
@pytest.mark.parametrize("options", COMPLEX_OPTIONS, ids=lambda o: "-".join(str(v) for v in list(o.values())[1:]))
def test_complex_momentum_is_a_complex_recurrence(options, layout, implementation):
    params = make_params(layout=layout)
    optimizer = ComplexSGD(params, lr=0.1, **implementation, **options)
    wanted = [p.detach().clone() for p in params]
    buffers = [None] * len(params)
    for i in range(8):
        set_grads(params, i)
        params[3].grad = None if i == 0 else params[3].grad
        for k, p in enumerate(params):
            if p.grad is None:
                continue
            g = (-p.grad if options["maximize"] else p.grad) + options["weight_decay"] * wanted[k]
            b = g.to(torch.complex128) if buffers[k] is None else MOMENTUM * buffers[k] + (1 - options["dampening"]) * g
            buffers[k] = b
            move = g + (MOMENTUM * b).real if options["nesterov"] else b.real
            wanted[k] = wanted[k] - 0.1 * move
        optimizer.step()
        for p, w in zip(params, wanted, strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-12)
    for p, b in zip(params, buffers, strict=True):
        torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], b.real, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(optimizer.state[p]["momentum_buffer_imag"], b.imag, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", FLOATING, ids=name_of)
def test_implementations_agree_to_rounding(dtype):
    results = []
    for implementation in IMPLEMENTATIONS.values():
        params = make_params(dtype=dtype)
        optimizer = ComplexSGD(params, lr=0.05, momentum=MOMENTUM, weight_decay=0.01, **implementation)
        results.append(run(optimizer, params))
        assert {t.dtype for s in optimizer.state.values() for t in s.values()} == {opmath(dtype)}
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b)


@implementations
def test_constant_gradient_has_a_closed_form(implementation):
    """With gradient 1: b_k = (1 - m^k)/(1 - m), so p_n = p_0 - lr Re sum_k b_k."""
    p = Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = ComplexSGD([p], lr=0.1, momentum=MOMENTUM, **implementation)
    n = 40
    for _ in range(n):
        p.grad = torch.ones_like(p)
        optimizer.step()
    m = MOMENTUM
    total = (n - m * (1 - m**n) / (1 - m)) / (1 - m)
    assert p.item() == pytest.approx(2 - 0.1 * total.real, rel=1e-13)


@implementations
def test_an_angle_and_its_negative_give_the_same_parameters(implementation):
    found = []
    for momentum in (MOMENTUM, MOMENTUM.conjugate()):
        params = make_params()
        found.append(run(ComplexSGD(params, lr=0.1, momentum=momentum, weight_decay=0.1, **implementation), params))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


def play(momentum, lr, steps, implementation):
    """Simultaneous steps on min_x max_y xy; returns the first step within 1e-6 of the end, and the last distance."""
    x, y = (Parameter(torch.tensor(math.sqrt(0.5), dtype=torch.float64)) for _ in range(2))
    optimizer = ComplexSGD(
        [{"params": [x]}, {"params": [y], "maximize": True}], lr=lr, momentum=momentum, **implementation
    )
    reached = None
    for i in range(1, steps + 1):
        optimizer.zero_grad()
        (x * y).backward()
        optimizer.step()
        distance = math.hypot(x.item(), y.item())
        if distance < 1e-6 and reached is None:
            reached = i
    return reached, distance


@pytest.mark.parametrize("implementation", [{}, IMPLEMENTATIONS["loop"]], ids=["default", "loop"])
def test_a_bilinear_game_converges_only_with_complex_momentum(implementation):
    reached, _ = play(cmath.rect(0.9, math.pi / 8), 0.059, 760, implementation)
    assert reached is not None and 600 <= reached <= 750
    assert play(0.9, 0.059, 300, implementation)[1] > 100
    assert play(-0.9, 0.059, 300, implementation)[1] > 1
    assert play(0.0, 0.059, 300, implementation)[1] > 1


def test_the_rate_in_the_game_is_that_of_the_linear_theory():
    """The spectral radius of the iteration is the largest root of a cubic."""
    lr, m = 0.059, cmath.rect(0.9, math.pi / 8)
    radius = max(
        abs(np.roots([1, -(1 + 2 * m.real - lr * 1j), abs(m) ** 2 + 2 * m.real - lr * 1j * m.real, -(abs(m) ** 2)]))
    )
    near, far = play(m, lr, 400, {})[1], play(m, lr, 800, {})[1]
    assert (far / near) ** (1 / 400) == pytest.approx(radius, abs=5e-4)


@implementations
@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize(
    "options",
    [{}, {"dampening": 0.3, "weight_decay": 0.1}, {"nesterov": True}, {"momentum": 0.9}, {"momentum": 0.0}],
    ids=str,
)
def test_rescaled_steps_have_the_length_of_lr_in_the_long_run(options, as_tensor, implementation):
    """They are those of a smaller lr, and under a constant gradient those of plain gradient descent with lr."""
    options = {"momentum": MOMENTUM, **options}
    gain = effective_lr(1.0, options["momentum"]) * (1 - options.get("dampening", 0.0) * (options["momentum"] != 0))
    lr = torch.tensor(0.25, dtype=torch.float64) if as_tensor else 0.25
    params, twin = make_params(), make_params()
    ours = ComplexSGD(params, lr=lr, rescale_lr=True, **options, **implementation)
    theirs = ComplexSGD(twin, lr=0.25 / gain, **options, **implementation)
    for a, b in zip(run(ours, params), run(theirs, twin), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)
    p = Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = ComplexSGD([p], lr=lr, rescale_lr=True, **{**options, "weight_decay": 0}, **implementation)
    for _ in range(400):
        before = p.item()
        p.grad = torch.full_like(p, -1.0)
        optimizer.step()
    assert p.item() - before == pytest.approx(0.25, rel=1e-11)


# ---- groups, parameters, gradients ----------------------------------------------------------------------------------


@implementations
def test_groups_have_their_own_hyperparameters(implementation):
    params = make_params([(3,)] * 4)
    own = [{}, {"lr": 0.5}, {"momentum": 0.3}, {"momentum": 0.0, "weight_decay": 0.1}]
    optimizer = ComplexSGD(
        [{"params": [p], **o} for p, o in zip(params[:3], own, strict=False)],
        lr=0.1,
        momentum=MOMENTUM,
        **implementation,
    )
    run(optimizer, params, 2)
    optimizer.add_param_group({"params": [params[3]], **own[3]})
    run(optimizer, params, 3, first=2)
    for k, (p, o) in enumerate(zip(make_params([(3,)] * 4), own, strict=True)):
        alone = ComplexSGD([p], **{"lr": 0.1, "momentum": MOMENTUM, **o}, **IMPLEMENTATIONS["loop"])
        for i in range(0 if k < 3 else 2, 5):
            everyone = make_params([(3,)] * 4)
            set_grads(everyone, i)
            p.grad = everyone[k].grad
            alone.step()
        torch.testing.assert_close(p, params[k], rtol=1e-14, atol=1e-14)


@implementations
def test_missing_late_frozen_and_thawed_gradients(implementation):
    params, twin = make_params([(3,)] * 3), make_params([(3,)] * 3)
    optimizer = ComplexSGD(params, lr=0.1, momentum=MOMENTUM, **implementation)
    alone = [ComplexSGD([p], lr=0.1, momentum=MOMENTUM, **IMPLEMENTATIONS["loop"]) for p in twin]
    present = [[True, False, True], [True, True, False], [False, False, False], [True, True, True]]
    for i, row in enumerate(present):
        for group in (params, twin):
            set_grads(group, i)
            for p, there in zip(group, row, strict=True):
                p.grad = p.grad if there else None
        optimizer.step()
        for one in alone:
            one.step()
    for a, b in zip(params, twin, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


@implementations
def test_no_gradients_at_all(implementation):
    params = make_params()
    optimizer = ComplexSGD(params, **implementation)
    before = snapshot(optimizer)
    assert optimizer.step() is None
    assert before.unchanged()
    assert not optimizer.state


@implementations
def test_mixed_dtypes_in_one_group(implementation):
    params = [Parameter(torch.full((5,), 1.5, dtype=d)) for d in (*FLOATING, torch.float32, torch.complex64)]
    optimizer = ComplexSGD(params, lr=0.5, momentum=0.5j, **implementation)
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    for p in params:
        assert torch.equal(p.detach(), torch.full_like(p, 1.5 - 0.5 * (1 + 1 + 0.75)))


@implementations
def test_complex_parameters_are_pairs_of_reals(implementation):
    values = torch.randn(4, 3, dtype=torch.complex128)
    p, pair = Parameter(values.clone()), Parameter(torch.view_as_real(values).clone())
    ours, theirs = (ComplexSGD([q], lr=0.1, momentum=MOMENTUM, weight_decay=0.1, **implementation) for q in (p, pair))
    for i in range(4):
        grad = torch.randn(4, 3, dtype=torch.complex128, generator=torch.Generator().manual_seed(i))
        p.grad = grad.conj().resolve_conj().conj() if i % 2 else grad  # every second one lazily conjugated
        pair.grad = torch.view_as_real(grad)
        ours.step()
        theirs.step()
    assert same_bits(torch.view_as_real(p.detach()), pair.detach())
    restored = ComplexSGD(
        [Parameter(p.detach().clone())], lr=0.1, momentum=MOMENTUM, weight_decay=0.1, **implementation
    )
    restored.load_state_dict(from_file(ours.state_dict()))
    assert all(
        same_bits(
            torch.view_as_real(restored.state[restored.param_groups[0]["params"][0]][n]),
            torch.view_as_real(ours.state[p][n]),
        )
        for n in BUFFERS
    )


@implementations
def test_gradients_in_another_layout(implementation):
    p, twin = (
        Parameter(torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
        for _ in range(2)
    )
    p.data = p.data.to(memory_format=torch.channels_last)
    for q, layout in ((p, LAYOUTS["permuted"]), (twin, LAYOUTS["contiguous"])):
        optimizer = ComplexSGD([q], lr=0.1, momentum=MOMENTUM, **implementation)
        for i in range(3):
            set_grads([q], i)
            q.grad = layout(q.grad)
            optimizer.step()
    torch.testing.assert_close(p, twin, rtol=1e-14, atol=1e-14)


@implementations
def test_strided_parameters_leave_their_neighbours_alone(implementation):
    base = torch.randn(40, 6, dtype=torch.float64)
    before = base.clone()
    params = [Parameter(base[:, 1]), Parameter(base[::2, 3:5])]
    run(ComplexSGD(params, lr=0.1, momentum=MOMENTUM, **implementation), params)
    touched = torch.zeros_like(base, dtype=torch.bool)
    touched[:, 1] = touched[::2, 3:5] = True
    assert torch.equal(base[~touched], before[~touched])
    assert not (base[touched] == before[touched]).any()


@implementations
def test_tied_parameters_move_once(implementation):
    linear = torch.nn.Linear(3, 3, bias=False)
    model = torch.nn.Sequential(linear, linear)
    optimizer = ComplexSGD(model.parameters(), lr=1.0, momentum=0.0, **implementation)
    before = linear.weight.detach().clone()
    linear.weight.grad = torch.ones_like(linear.weight)
    optimizer.step()
    assert torch.equal(linear.weight.detach(), before - 1.0)


def test_a_parameter_given_twice():
    p = Parameter(torch.ones(2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        ComplexSGD([p, p])
    with pytest.raises(ValueError, match="more than one parameter group"):
        ComplexSGD([{"params": [p]}, {"params": [p]}])
    with pytest.raises(ValueError, match="empty parameter list"):
        ComplexSGD([])


@pytest.mark.parametrize("implementation", [{}, {"fused": True}], ids=["default", "fused"])
def test_parameters_that_share_memory_are_refused(implementation, native):
    """Two names for one memory would be moved twice, by threads that race."""
    base = torch.ones(10)
    params = [Parameter(base[:6]), Parameter(base[4:])]
    optimizer = ComplexSGD(params, **implementation)
    set_grads(params, 0)
    with pytest.raises(ValueError, match=r"complex_sgd_step_: params\[0\] must not share memory with params\[1\]"):
        optimizer.step()
    assert torch.equal(base, torch.ones(10))


@implementations
def test_sparse_gradients_are_refused_by_name(implementation):
    dense, embedding = Parameter(torch.ones(3)), torch.nn.Embedding(5, 2, sparse=True)
    optimizer = ComplexSGD([dense, embedding.weight], **implementation)
    dense.grad = torch.ones(3)
    embedding(torch.tensor([1, 2])).sum().backward()
    before = snapshot(optimizer)
    with pytest.raises(
        TypeError,
        match=r"ComplexSGD: the gradient of params\[1\] must be dense; got torch.sparse_coo. Use sparse=False",
    ):
        optimizer.step()
    assert before.unchanged()


@implementations
def test_an_expanded_parameter_is_refused_before_anything_moves(implementation):
    params = [Parameter(torch.ones(3)), torch.ones(1).expand(3).requires_grad_()]
    optimizer = ComplexSGD(params, **implementation)
    set_grads(params, 0)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"params\[1\] must not overlap itself"):
        optimizer.step()
    assert before.unchanged()


@implementations
def test_a_gradient_of_another_size_is_refused(implementation):
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(4))]
    optimizer = ComplexSGD(params, **implementation)
    run(optimizer, params, 1)
    set_grads(params, 1)
    params[1].data = torch.ones(6)
    before = snapshot(optimizer)
    with pytest.raises(
        ValueError,
        match=r"ComplexSGD: the gradient of params\[1\] must have its shape \(6,\) and dtype torch.float32; got \(4,\)",
    ):
        optimizer.step()
    assert before.unchanged()


# ---- hyperparameters ------------------------------------------------------------------------------------------------

BAD = [
    ({"momentum": 1.0}, ValueError, "momentum must have modulus below 1; got 1.0"),
    ({"momentum": -1}, ValueError, "momentum must have modulus below 1; got -1"),
    ({"momentum": cmath.rect(1.1, 0.3)}, ValueError, "momentum must have modulus below 1"),
    ({"momentum": float("nan")}, ValueError, "momentum must have modulus below 1; got nan"),
    ({"momentum": complex(0, float("nan"))}, ValueError, "momentum must have modulus below 1"),
    ({"momentum": float("inf")}, ValueError, "momentum must have modulus below 1; got inf"),
    ({"momentum": True}, TypeError, "momentum must be a real or complex number; got True"),
    ({"momentum": "0.9"}, TypeError, "momentum must be a real or complex number; got '0.9'"),
    ({"momentum": None}, TypeError, "momentum must be a real or complex number; got None"),
    ({"momentum": torch.tensor(0.9)}, TypeError, "momentum must be a real or complex number; got tensor"),
    ({"lr": -0.1}, ValueError, "lr must be finite and >= 0; got -0.1"),
    ({"lr": float("nan")}, ValueError, "lr must be finite and >= 0; got nan"),
    ({"lr": float("inf")}, ValueError, "lr must be finite and >= 0; got inf"),
    ({"lr": True}, TypeError, "lr must be a number or a tensor; got True"),
    ({"lr": "0.1"}, TypeError, "lr must be a number or a tensor; got '0.1'"),
    ({"lr": None}, TypeError, "lr must be a number or a tensor; got None"),
    ({"lr": 0.1j}, TypeError, "lr must be a number or a tensor; got 0.1j"),
    (
        {"lr": torch.ones(2)},
        ValueError,
        r"lr must be a float32 or float64 tensor of one element; got shape \(2,\) of float32",
    ),
    (
        {"lr": torch.tensor(1)},
        ValueError,
        r"lr must be a float32 or float64 tensor of one element; got shape \(\) of int64",
    ),
    ({"lr": torch.tensor(float("nan"))}, ValueError, "lr must be finite and >= 0; got nan"),
    ({"lr": torch.tensor(-1.0)}, ValueError, "lr must be finite and >= 0; got -1.0"),
    ({"weight_decay": -0.1}, ValueError, "weight_decay must be finite and >= 0; got -0.1"),
    ({"weight_decay": float("nan")}, ValueError, "weight_decay must be finite and >= 0; got nan"),
    ({"weight_decay": "0"}, TypeError, "weight_decay must be a number; got '0'"),
    ({"weight_decay": torch.tensor(0.1)}, TypeError, "weight_decay must be a number; got tensor"),
    ({"dampening": float("inf")}, ValueError, "dampening must be finite; got inf"),
    ({"dampening": 0.5j}, TypeError, "dampening must be a number; got 0.5j"),
    ({"dampening": True}, TypeError, "dampening must be a number; got True"),
    ({"rescale_lr": "no"}, TypeError, "rescale_lr must be True or False; got 'no'"),
    ({"foreach": "no"}, TypeError, "foreach must be True, False or None; got 'no'"),
    ({"rescale_lr": True, "dampening": 1.0}, ValueError, "dampening must be below 1 with rescale_lr; got 1.0"),
    ({"nesterov": True, "momentum": 0.0}, ValueError, "nesterov must come with a momentum and zero dampening"),
    ({"nesterov": True, "momentum": 0j}, ValueError, "nesterov must come with a momentum and zero dampening"),
    ({"nesterov": True, "dampening": 0.1}, ValueError, "nesterov must come with a momentum and zero dampening"),
    (
        {"foreach": True, "fused": True},
        ValueError,
        "at most one of foreach, fused and differentiable must be True; got foreach and fused",
    ),
    (
        {"differentiable": True, "fused": True},
        ValueError,
        "at most one of foreach, fused and differentiable must be True",
    ),
]
bad_hyperparameters = pytest.mark.parametrize(("bad", "kind", "message"), BAD, ids=[str(b[0]) for b in BAD])


@bad_hyperparameters
def test_bad_hyperparameters_are_refused(bad, kind, message):
    params = make_params()
    with pytest.raises(kind, match=f"^ComplexSGD: {message}"):
        ComplexSGD(params, **bad)
    with pytest.raises(kind, match=f"^ComplexSGD: {message}"):
        ComplexSGD([{"params": params, **bad}])
    optimizer = ComplexSGD(params[:1])
    with pytest.raises(kind, match=f"^ComplexSGD: {message}"):
        optimizer.add_param_group({"params": params[1:], **bad})
    assert len(optimizer.param_groups) == 1


@implementations
@bad_hyperparameters
def test_hyperparameters_spoiled_later_are_refused_and_nothing_moves(bad, kind, message, implementation):
    params = make_params()
    optimizer = ComplexSGD([{"params": params[:2]}, {"params": params[2:]}], **implementation)
    run(optimizer, params, 2)
    set_grads(params, 3)
    before = snapshot(optimizer)
    optimizer.param_groups[1].update(bad)
    with pytest.raises(kind, match=f"^ComplexSGD: {message}"):
        optimizer.step()
    assert before.unchanged()


@implementations
def test_an_lr_tensor_spoiled_in_place_is_refused(implementation):
    params = make_params()
    lr = torch.tensor(0.1)
    optimizer = ComplexSGD([{"params": params[:2]}, {"params": params[2:], "lr": lr}], **implementation)
    run(optimizer, params, 2)
    lr.fill_(float("nan"))
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"^ComplexSGD: lr must be finite and >= 0; got nan"):
        optimizer.step()
    assert before.unchanged()


@implementations
def test_numbers_of_numpy_count_as_numbers(implementation):
    found = []
    for kind in (float, np.float64):
        params = make_params()
        optimizer = ComplexSGD(
            params, lr=kind(0.125), momentum=kind(0.5), dampening=kind(0.25), weight_decay=kind(0.5), **implementation
        )
        found.append(run(optimizer, params))
    params = make_params()
    optimizer = ComplexSGD(
        params,
        lr=np.float32(0.125),
        momentum=np.complex64(0.5),
        dampening=np.float32(0.25),
        weight_decay=np.int64(1) / 2,
        **implementation,
    )
    found.append(run(optimizer, params))
    assert all_same_bits(found[0], found[1])
    assert all_same_bits(found[0], found[2])


@implementations
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_lr_as_a_tensor_changed_in_place(dtype, shape, implementation):
    lr, params, twin = torch.full(shape, 0.5, dtype=dtype), make_params(), make_params()
    ours = ComplexSGD(params, lr=lr, momentum=MOMENTUM, **implementation)
    theirs = ComplexSGD(twin, lr=0.5, momentum=MOMENTUM, **implementation)
    for i in range(4):
        run(ours, params, 1, i)
        run(theirs, twin, 1, i)
        lr.mul_(0.5)
        theirs.param_groups[0]["lr"] *= 0.5
    for a, b in zip(params, twin, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)
    assert ours.param_groups[0]["lr"] is lr


def test_is_a_torch_optimizer():
    optimizer = ComplexSGD(make_params(), lr=0.25)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.defaults == {
        "lr": 0.25,
        "momentum": cmath.rect(0.9, math.pi / 8),
        "dampening": 0,
        "weight_decay": 0,
        "nesterov": False,
        "maximize": False,
        "foreach": None,
        "differentiable": False,
        "fused": None,
        "rescale_lr": False,
    }
    assert set(optimizer.defaults) - set(SGD(make_params(), lr=0.1).defaults) == {"rescale_lr"}
    assert repr(optimizer).startswith("ComplexSGD (") and "momentum: (0.83" in repr(optimizer)
    positional = ComplexSGD(make_params(), 0.1, 0.5, 0.25, 0.125, False)
    assert [positional.defaults[k] for k in ("lr", "momentum", "dampening", "weight_decay")] == [0.1, 0.5, 0.25, 0.125]


# ---- state ----------------------------------------------------------------------------------------------------------


@implementations
@pytest.mark.parametrize("dtype", FLOATING, ids=name_of)
@pytest.mark.parametrize("momentum", [0.9, MOMENTUM], ids=["real", "complex"])
def test_resume_is_exact(momentum, dtype, implementation):
    params = make_params(dtype=dtype)
    optimizer = ComplexSGD(params, lr=0.1, momentum=momentum, **implementation)
    run(optimizer, params, 3)
    checkpoint, kept = from_file(optimizer.state_dict()), [p.detach().clone() for p in params]
    straight = run(optimizer, params, 3, first=3)
    again = [Parameter(p) for p in kept]
    restored = ComplexSGD(again, lr=0.7, momentum=0.1, **implementation)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restored.load_state_dict(checkpoint)
    assert restored.param_groups[0]["momentum"] == momentum and restored.param_groups[0]["lr"] == 0.1
    assert all_same_bits(straight, run(restored, again, 3, first=3))


def test_checkpoint_of_torch_sgd_loads_and_goes_on_with_its_numbers():
    theirs, ours = make_params(), make_params()
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
    sgd = SGD(theirs, foreach=False, **options)
    for params in (theirs,):
        run(sgd, params, 3)
    for p, q in zip(ours, theirs, strict=True):
        p.data.copy_(q)
    optimizer = ComplexSGD(ours, **IMPLEMENTATIONS["loop"])
    optimizer.load_state_dict(from_file(sgd.state_dict()))
    optimizer.param_groups[0]["foreach"] = False
    assert all_same_bits(run(sgd, theirs, 3, 3), run(optimizer, ours, 3, 3))


def test_checkpoint_of_torch_sgd_goes_on_with_complex_momentum():
    """The imaginary part starts at zero, beside the buffer that was loaded."""
    theirs = make_params()
    sgd = SGD(theirs, lr=0.1, momentum=0.9)
    run(sgd, theirs, 2)
    p = [Parameter(q.detach().clone()) for q in theirs]
    optimizer = ComplexSGD(p, lr=0.1)
    optimizer.load_state_dict(from_file(sgd.state_dict()))
    optimizer.param_groups[0]["momentum"] = MOMENTUM
    run(optimizer, p, 1, 2)
    for q, t in zip(p, theirs, strict=True):
        buffer = sgd.state[t]["momentum_buffer"]
        set_grads(theirs, 2)
        torch.testing.assert_close(optimizer.state[q]["momentum_buffer"], MOMENTUM.real * buffer + t.grad)
        torch.testing.assert_close(optimizer.state[q]["momentum_buffer_imag"], MOMENTUM.imag * buffer)


def test_none_buffers_of_old_checkpoints_count_as_absent():
    params, twin = make_params(), make_params()
    optimizer = ComplexSGD(params, lr=0.1, momentum=0.5)
    checkpoint = optimizer.state_dict()
    checkpoint["state"] = {i: dict.fromkeys(BUFFERS) for i in range(len(params))}
    optimizer.load_state_dict(checkpoint)
    assert all_same_bits(run(optimizer, params, 2), run(ComplexSGD(twin, lr=0.1, momentum=0.5), twin, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_float32_buffers_beside_16_bit_parameters_survive_loading(dtype):
    params = make_params(dtype=dtype)
    optimizer = ComplexSGD(params, momentum=MOMENTUM)
    run(optimizer, params, 3)
    restored = ComplexSGD(make_params(dtype=dtype))
    restored.load_state_dict(from_file(optimizer.state_dict()))
    for a, b in zip(optimizer.state.values(), restored.state.values(), strict=True):
        assert all(b[n].dtype == torch.float32 and same_bits(a[n], b[n]) for n in BUFFERS)


def test_a_checkpoint_loads_into_another_dtype():
    params = make_params(dtype=torch.float64)
    optimizer = ComplexSGD(params, momentum=MOMENTUM)
    run(optimizer, params, 2)
    for dtype in FLOATING:
        other = make_params(dtype=dtype)
        restored = ComplexSGD(other)
        restored.load_state_dict(from_file(optimizer.state_dict()))
        for a, b in zip(optimizer.state.values(), restored.state.values(), strict=True):
            assert all(same_bits(a[n].to(opmath(dtype)), b[n]) for n in BUFFERS)
        run(restored, other, 1)


@pytest.mark.gpu
def test_a_checkpoint_loads_onto_another_device():
    params = make_params()
    optimizer = ComplexSGD(params, momentum=MOMENTUM)
    run(optimizer, params, 2)
    other = [Parameter(p.detach().cuda()) for p in params]
    restored = ComplexSGD(other)
    restored.load_state_dict(from_file(optimizer.state_dict()))
    assert all(t.is_cuda for s in restored.state.values() for t in s.values())


def test_loading_copies():
    params, twin = make_params(), make_params()
    optimizer, other = ComplexSGD(params), ComplexSGD(twin)
    run(optimizer, params, 2)
    other.load_state_dict(optimizer.state_dict())
    before = snapshot(optimizer)
    run(other, twin, 2)
    assert before.unchanged()
    assert not {t.data_ptr() for s in optimizer.state.values() for t in s.values() if t.numel()} & {
        t.data_ptr() for s in other.state.values() for t in s.values() if t.numel()
    }


def set_buffer(value, name="momentum_buffer"):
    return lambda c: c["state"][1].__setitem__(name, value)


def freed():
    buffer = torch.ones(3)
    buffer.untyped_storage().resize_(0)
    return buffer


WHERE = r"ComplexSGD.load_state_dict: state\[1\]\['momentum_buffer'\] must "
HOSTILE = {
    "short": (set_buffer(torch.ones(2)), ValueError, WHERE + r"have the shape of its parameter \(3,\); got \(2,\)"),
    "long": (set_buffer(torch.ones(4)), ValueError, WHERE + "have the shape"),
    "one-element": (set_buffer(torch.ones(1)), ValueError, WHERE + "have the shape"),
    "0-dim": (set_buffer(torch.tensor(1.0)), ValueError, WHERE + "have the shape"),
    "number": (set_buffer(1.0), TypeError, WHERE + "be a tensor; got 1.0"),
    "text": (set_buffer("abc"), TypeError, WHERE + "be a tensor; got 'abc'"),
    "list": (set_buffer([1.0, 2.0, 3.0]), TypeError, WHERE + "be a tensor"),
    "int": (set_buffer(torch.ones(3, dtype=torch.int64)), TypeError, WHERE + "be of floating dtype; got torch.int64"),
    "complex": (
        set_buffer(torch.ones(3, dtype=torch.complex64)),
        TypeError,
        WHERE + "be of floating dtype; got torch.complex64",
    ),
    "meta": (set_buffer(torch.ones(3, device="meta")), TypeError, WHERE + "be a dense tensor with data"),
    "sparse": (set_buffer(torch.ones(3).to_sparse()), TypeError, WHERE + "be a dense tensor with data"),
    "imag-short": (
        set_buffer(torch.ones(2), BUFFERS[1]),
        ValueError,
        r"state\[1\]\['momentum_buffer_imag'\] must have the shape",
    ),
    "freed": (set_buffer(freed()), ValueError, WHERE + "have storage for its elements"),
    "imag-alone": (
        lambda c: c["state"][1].pop("momentum_buffer"),
        ValueError,
        r"state\[1\]\['momentum_buffer_imag'\] must come with 'momentum_buffer'; got none",
    ),
    "no-state": (lambda c: c.pop("state"), TypeError, r"state_dict\['state'\] must be a dict; got NoneType"),
    "no-groups": (lambda c: c.pop("param_groups"), TypeError, r"state_dict\['param_groups'\] must be a list"),
    "state-list": (lambda c: c.update(state=[1]), TypeError, r"state_dict\['state'\] must be a dict; got list"),
    "state-none": (lambda c: c["state"].update({0: None}), TypeError, r"state\[0\] must be a dict; got NoneType"),
    "group-number": (lambda c: c.update(param_groups=[3]), TypeError, r"param_groups\[0\] must be a dict with a list"),
    "nested-ids": (
        lambda c: c["param_groups"][0].update(params=[[0]]),
        TypeError,
        r"param_groups\[0\] must be a dict with a list",
    ),
    "text-flag": (
        lambda c: c["param_groups"][0].update(nesterov="no"),
        TypeError,
        "ComplexSGD.load_state_dict: nesterov must be True or False; got 'no'",
    ),
    "missing-group": (lambda c: c.__setitem__("param_groups", []), ValueError, "different number of parameter groups"),
    "extra-group": (
        lambda c: c["param_groups"].append(c["param_groups"][0]),
        ValueError,
        "different number of parameter groups",
    ),
    "fewer-params": (
        lambda c: c["param_groups"][0]["params"].pop(),
        ValueError,
        "doesn't match the size of optimizer's group",
    ),
    "more-params": (
        lambda c: c["param_groups"][0]["params"].append(9),
        ValueError,
        "doesn't match the size of optimizer's group",
    ),
    "no-momentum": (
        lambda c: c["param_groups"][0].pop("momentum"),
        ValueError,
        r"param_groups\[0\] must hold lr, momentum, dampening, weight_decay; got no momentum. It is the checkpoint",
    ),
    "text-momentum": (
        lambda c: c["param_groups"][0].update(momentum=("0.5", 0.5)),
        TypeError,
        "ComplexSGD.load_state_dict: momentum must be a real or complex number",
    ),
    "large-momentum": (
        lambda c: c["param_groups"][0].update(momentum=[1.0, 0.5]),
        ValueError,
        "ComplexSGD.load_state_dict: momentum must have modulus below 1",
    ),
    "bad-momentum": (
        lambda c: c["param_groups"][0].update(momentum=2.0),
        ValueError,
        "ComplexSGD.load_state_dict: momentum must have modulus below 1",
    ),
    "bad-lr": (
        lambda c: c["param_groups"][0].update(lr="fast"),
        TypeError,
        "ComplexSGD.load_state_dict: lr must be a number",
    ),
    "nan-decay": (
        lambda c: c["param_groups"][0].update(weight_decay=float("nan")),
        ValueError,
        "ComplexSGD.load_state_dict: weight_decay must be finite",
    ),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_hostile_checkpoints_are_refused_and_the_optimizer_is_unchanged(fault):
    spoil, kind, message = HOSTILE[fault]
    params = make_params()
    optimizer = ComplexSGD(params, momentum=MOMENTUM)
    run(optimizer, params, 2)
    checkpoint = from_file(optimizer.state_dict())
    spoil(checkpoint)
    before, groups = (
        snapshot(optimizer),
        copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]),
    )
    states = [dict(s) for s in optimizer.state.values()]
    with pytest.raises(kind, match=message):
        optimizer.load_state_dict(checkpoint)
    assert before.unchanged()
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == groups
    assert all(a[n] is b[n] for a, b in zip(states, optimizer.state.values(), strict=True) for n in BUFFERS)
    run(optimizer, params, 1)


@implementations
@pytest.mark.parametrize("name", BUFFERS)
@pytest.mark.parametrize(
    ("value", "got"),
    [
        (torch.ones(2), r"torch.float32 of shape \(2,\) on cpu"),
        (torch.ones(()), r"torch.float32 of shape \(\) on cpu"),
        (torch.ones(3, dtype=torch.float16), r"torch.float16 of shape \(3,\) on cpu"),
        (torch.ones(3, device="meta"), r"torch.float32 of shape \(3,\) on meta"),
    ],
    ids=["short", "0-dim", "half", "meta"],
)
def test_state_spoiled_behind_the_optimizer_is_refused(value, got, name, implementation):
    params = make_params([(3,)] * 3, dtype=torch.float32)
    optimizer = ComplexSGD(params, momentum=MOMENTUM, **implementation)
    run(optimizer, params, 1)
    before = snapshot(optimizer)
    optimizer.state[params[1]][name] = value
    set_grads(params, 1)
    with pytest.raises(
        ValueError, match=rf"^ComplexSGD: {name} of params\[1\] must be torch.float32 of shape \(3,\) on cpu; got {got}"
    ):
        optimizer.step()
    assert before.unchanged()


@implementations
def test_deepcopy_and_pickle_make_independent_copies(implementation):
    model = torch.nn.Linear(3, 2).double()
    optimizer = ComplexSGD(model.parameters(), lr=0.1, **implementation)
    params = list(model.parameters())
    run(optimizer, params, 2)
    copies = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    file = io.BytesIO()
    torch.save((model, optimizer), file)
    file.seek(0)
    copies.append(torch.load(file, weights_only=False))
    before = snapshot(optimizer)
    found = []
    for other_model, other in copies:
        assert type(other) is ComplexSGD and other.param_groups[0]["momentum"] == optimizer.param_groups[0]["momentum"]
        found.append(run(other, list(other_model.parameters()), 2, first=2))
    assert before.unchanged()
    straight = run(optimizer, params, 2, first=2)
    assert all(all_same_bits(straight, f) for f in found)


def test_state_dict_is_plain_and_the_same_for_every_implementation():
    for momentum, names in ((0.0, []), (0.5, ["momentum_buffer"]), (MOMENTUM, list(BUFFERS))):
        for implementation in IMPLEMENTATIONS.values():
            params = make_params()
            optimizer = ComplexSGD(params, momentum=momentum, **implementation)
            run(optimizer, params, 2)
            state = optimizer.state_dict()["state"]
            assert [sorted(s) for s in state.values()] == ([sorted(names)] * len(params) if names else [])
            assert all(
                type(t) is torch.Tensor and not t.requires_grad and t.grad_fn is None
                for s in state.values()
                for t in s.values()
            )


@implementations
def test_momentum_may_change_between_real_and_complex(implementation):
    """The imaginary buffer turns with the real one, as parts of one complex buffer."""
    params, twin = make_params(), make_params()
    optimizer = ComplexSGD(params, lr=0.1, momentum=0.5, **implementation)
    wanted, buffer = [p.detach().clone() for p in twin], [torch.zeros(p.shape, dtype=torch.complex128) for p in twin]
    for i, momentum in enumerate([0.5, 0.5, MOMENTUM, MOMENTUM, -0.3, -0.3, MOMENTUM, 0.0, 0.5]):
        optimizer.param_groups[0]["momentum"] = momentum
        run(optimizer, params, 1, first=i)
        set_grads(twin, i)
        for k, p in enumerate(twin):
            if momentum == 0:
                wanted[k] -= 0.1 * p.grad  # the buffers are left as they are
                continue
            buffer[k] = momentum * buffer[k] + p.grad
            wanted[k] -= 0.1 * buffer[k].real
        for a, b in zip(params, wanted, strict=True):
            torch.testing.assert_close(a.detach(), b, rtol=1e-12, atol=1e-12)


# ---- closures, hooks, schedulers, averaging -------------------------------------------------------------------------


@implementations
def test_closure_runs_with_gradients_and_its_value_is_returned(implementation):
    p = Parameter(torch.tensor([2.0]))
    optimizer = ComplexSGD([p], lr=0.25, momentum=0.5, **implementation)
    modes = []

    def closure():
        modes.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert float(optimizer.step(closure)) == 4.0
        assert not torch.is_grad_enabled()
    assert modes == [True] and p.item() == 1.0
    assert not p.grad.requires_grad


def test_hooks_run_in_order():
    p = Parameter(torch.ones(1))
    optimizer = ComplexSGD([p], lr=0.1)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    optimizer.register_state_dict_pre_hook(lambda *_: seen.append("state_dict pre"))
    optimizer.register_state_dict_post_hook(lambda *_: seen.append("state_dict post"))
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("load post"))

    def rename(_, state_dict):
        seen.append("load pre")
        return {**state_dict, "param_groups": [{**g, "lr": 0.75} for g in state_dict["param_groups"]]}

    handle = optimizer.register_load_state_dict_pre_hook(rename)
    optimizer.step(lambda: seen.append("closure"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["pre", "closure", "post", "state_dict pre", "state_dict post", "load pre", "load post"]
    assert optimizer.param_groups[0]["lr"] == 0.75  # the checks saw, and loaded, what the hook made
    handle.remove()
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 0


def test_a_loading_hook_cannot_slip_past_the_checks():
    p = Parameter(torch.ones(3))
    optimizer = ComplexSGD([p])
    optimizer.register_load_state_dict_pre_hook(lambda _, s: {**s, "state": {0: {"momentum_buffer": torch.ones(2)}}})
    with pytest.raises(ValueError, match="must have the shape of its parameter"):
        optimizer.load_state_dict(optimizer.state_dict())
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1


SCHEDULERS = {
    "step": lambda o: StepLR(o, 2, 0.5),
    "cosine": lambda o: CosineAnnealingLR(o, 6),
    "lambda": lambda o: LambdaLR(o, lambda i: 1 / (1 + i)),
    "one-cycle": lambda o: OneCycleLR(o, max_lr=0.2, total_steps=8, base_momentum=0.5, max_momentum=0.9),
    "cyclic": lambda o: CyclicLR(o, 0.01, 0.1, step_size_up=3, base_momentum=0.0, max_momentum=0.9),
}


@implementations
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_move_it_as_they_move_torch_sgd(scheduler, implementation):
    theirs, ours = make_params(), make_params()
    sgd, optimizer = SGD(theirs, lr=0.1, momentum=0.9), ComplexSGD(ours, lr=0.1, momentum=0.9, **implementation)
    plans = [SCHEDULERS[scheduler](o) for o in (sgd, optimizer)]
    for i in range(7):
        run(sgd, theirs, 1, i)
        run(optimizer, ours, 1, i)
        for plan in plans:
            plan.step()
        assert sgd.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
        assert sgd.param_groups[0]["momentum"] == optimizer.param_groups[0]["momentum"]
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


@implementations
@pytest.mark.parametrize("scheduler", ["one-cycle", "cyclic"])
@pytest.mark.parametrize("copied", [None, "checkpoint", "pickle"], ids=["", "checkpoint", "pickle"])
def test_a_cycled_momentum_keeps_its_angle(copied, scheduler, implementation):
    """Each group its own; also over a copy taken just after the scheduler has set a real one, and over a zero."""
    directions = (cmath.rect(1, 0.7), cmath.rect(1, -0.2), 1.0, -1.0)
    params, twin = make_params([(3,)] * 4), make_params([(3,)] * 4)
    groups = [{"params": [p], "momentum": 0.8 * d} for p, d in zip(params, directions, strict=True)]
    optimizer = ComplexSGD(groups, lr=0.1, **implementation)
    plan = SCHEDULERS[scheduler](optimizer)
    real = SGD(make_params([(1,)] * 4), lr=0.1, momentum=0.8)
    real_plan = SCHEDULERS[scheduler](real)
    by_hand = [
        ComplexSGD([p], momentum=0.5 * d, **IMPLEMENTATIONS["loop"]) for p, d in zip(twin, directions, strict=True)
    ]
    for i in range(7):
        if copied and i == 2:
            plan.optimizer = None
            if copied == "pickle":
                optimizer, params = pickle.loads(pickle.dumps((optimizer, params)))
            else:
                checkpoint = from_file(optimizer.state_dict())
                optimizer = ComplexSGD([{"params": [p]} for p in params], **implementation)
                optimizer.load_state_dict(checkpoint)
            plan.optimizer = optimizer
        set_grads(params, i)
        set_grads(twin, i)
        optimizer.step()
        modulus = real.param_groups[0]["momentum"]
        for one, direction in zip(by_hand, directions, strict=True):
            one.param_groups[0].update(lr=real.param_groups[0]["lr"], momentum=modulus * direction)
            one.step()
        for a, b in zip(params, twin, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
        assert optimizer.param_groups[2]["momentum"] == modulus and optimizer.param_groups[3]["momentum"] == -modulus
        real.step()
        real_plan.step()
        plan.step()


def test_a_cycled_momentum_keeps_its_angle_when_a_group_is_added():
    params = make_params([(3,)] * 2)
    optimizer = ComplexSGD(params[:1], lr=0.1, momentum=MOMENTUM)
    SCHEDULERS["one-cycle"](optimizer)
    optimizer.add_param_group({"params": params[1:], "momentum": 0.5})
    run(optimizer, params, 1)
    assert optimizer.param_groups[0]["momentum"] == pytest.approx(cmath.rect(0.9, 0.7))
    assert optimizer.param_groups[1]["momentum"] == 0.5


def test_a_momentum_set_by_hand_is_what_it_says():
    """Without a scheduler that cycles it, a real momentum is a real momentum, also after a complex one."""
    params, twin = make_params(), make_params()
    optimizer, plain = ComplexSGD(params, lr=0.1, momentum=MOMENTUM), ComplexSGD(twin, lr=0.1, momentum=0.5)
    OneCycleLR(optimizer, max_lr=0.1, total_steps=8, div_factor=1, cycle_momentum=False)
    optimizer.param_groups[0]["momentum"] = 0.5
    assert all_same_bits(run(optimizer, params), run(plain, twin))


def test_complex_bounds_of_a_scheduler_are_taken_as_they_are():
    p = make_params([(3,)])
    optimizer = ComplexSGD(p, lr=0.1, momentum=MOMENTUM)
    low, high = cmath.rect(0.5, 0.1), cmath.rect(0.9, 0.5)
    OneCycleLR(optimizer, max_lr=0.2, total_steps=8, base_momentum=low, max_momentum=high)
    run(optimizer, p, 1)
    assert optimizer.param_groups[0]["momentum"] == pytest.approx(high, rel=1e-15)


def test_averaged_models():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = ComplexSGD(model.parameters(), lr=0.1)
    swa = torch.optim.swa_utils.AveragedModel(model)
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    mean, moving = torch.zeros(1, 3), None
    for i in range(4):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()
        swa.update_parameters(model)
        ema.update_parameters(model)
        weight = model.weight.detach()
        mean = mean + weight / 4
        moving = weight.clone() if i == 0 else 0.5 * moving + 0.5 * weight
    torch.testing.assert_close(swa.module.weight.detach(), mean)
    torch.testing.assert_close(ema.module.weight.detach(), moving)


# ---- mixed precision ------------------------------------------------------------------------------------------------


@implementations
@pytest.mark.parametrize("dampening", [0.0, 0.5])
@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale"])
@pytest.mark.parametrize("bad_step", [0, 2], ids=["first", "later"])
def test_grad_scaler_skips_a_step_as_if_it_had_not_been(bad_step, unscale, dampening, implementation):
    params, twin = make_params(dtype=torch.float32), make_params(dtype=torch.float32)
    optimizer = ComplexSGD(params, lr=0.1, momentum=MOMENTUM, dampening=dampening, **implementation)
    plain = ComplexSGD(twin, lr=0.1, momentum=MOMENTUM, dampening=dampening, **implementation)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for i in range(5):
        scaler.scale(torch.zeros(()))  # makes the scale
        set_grads(params, i)
        for p in params:
            p.grad *= scaler.get_scale()
        if i == bad_step:
            params[2].grad[0, 0] = float("inf")
        before = [p.detach().clone() for p in params]
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if i == bad_step:
            assert all_same_bits(before, params)
        else:
            run(plain, twin, 1, i)
            for a, b in zip(params, twin, strict=True):
                torch.testing.assert_close(a, b)
    assert scaler.get_scale() == 512.0
    assert not hasattr(optimizer, "found_inf") and not hasattr(optimizer, "grad_scale")
    for p, q in zip(params, twin, strict=True):
        for name in BUFFERS:
            torch.testing.assert_close(optimizer.state[p][name], plain.state[q][name])


# ---- differentiable -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": MOMENTUM},
        {"momentum": MOMENTUM, "dampening": 0.3, "weight_decay": 0.1},
        {"momentum": MOMENTUM, "nesterov": True},
        {"momentum": 0.9, "maximize": True},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"momentum": 0.0},
    ],
    ids=str,
)
def test_differentiable_steps(options):
    """Derivatives of three steps in the initial parameter, each gradient and the lr."""

    def steps(p, lr, *grads):
        p = p.clone()
        optimizer = ComplexSGD([p], lr=lr, differentiable=True, **options)
        for g in grads:
            p.grad = g * g  # nonlinear, so that second derivatives are there
            optimizer.step()
        state = optimizer.state[p] if options["momentum"] else {}
        return (p, *(state[n] for n in BUFFERS if n in state))

    new = lambda *s: torch.randn(*s, dtype=torch.float64, requires_grad=True)  # noqa: E731
    inputs = (new(3), torch.tensor(0.3, dtype=torch.float64, requires_grad=True), new(3), new(3), new(3))
    assert torch.autograd.gradcheck(steps, inputs)
    assert torch.autograd.gradgradcheck(steps, inputs)


@implementations
def test_a_step_leaves_no_graph(implementation):
    params = make_params()
    optimizer = ComplexSGD(params, momentum=MOMENTUM, **implementation)
    for _ in range(2):
        for p in params:
            p.grad = (p * 2).detach().requires_grad_() * 3
        optimizer.step()
    assert all(p.is_leaf and p.requires_grad and p.grad_fn is None for p in params)
    assert all(not t.requires_grad for s in optimizer.state.values() for t in s.values())


@implementations
def test_autograd_is_told_and_gradients_are_only_read(implementation):
    params = make_params([(3,), (2, 2)])
    optimizer = ComplexSGD(params, momentum=MOMENTUM, weight_decay=0.1, maximize=True, nesterov=True, **implementation)
    for i in range(2):
        set_grads(params, i)
        grads = Memory([p.grad for p in params])
        versions = [p._version for p in params]
        loss = sum(p.square().sum() for p in params)
        optimizer.step()
        assert grads.unchanged()
        assert all(p._version > v for p, v in zip(params, versions, strict=True))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# ---- compiled -------------------------------------------------------------------------------------------------------


@implementations
@pytest.mark.parametrize("momentum", [0.9, MOMENTUM], ids=["real", "complex"])
def test_compiled_step(momentum, implementation):
    """One graph for the first step, which makes the buffers, and one for all others, whatever the lr tensor holds."""
    torch.compiler.reset()
    params, twin = make_params([(3,), (4, 5)]), make_params([(3,), (4, 5)])
    lr = torch.tensor(0.1)
    ours, theirs = (ComplexSGD(p, lr=lr, momentum=momentum, weight_decay=0.1, **implementation) for p in (params, twin))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours.step, backend=counter, fullgraph=True)
    for i in range(5):
        lr.fill_(0.1 / (1 + i))
        set_grads(params, i)
        compiled()
        run(theirs, twin, 1, i)
        for a, b in zip(params, twin, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    "implementation", [IMPLEMENTATIONS["loop"], IMPLEMENTATIONS["foreach"]], ids=["loop", "foreach"]
)
def test_compiled_step_on_a_gradient_that_is_a_matrix_product(implementation):
    """Inductor turns a sum with a matrix product into one kernel, and may lose the factor in it."""
    torch.compiler.reset()
    x, y = torch.randn(16, 8, dtype=torch.float64), torch.randn(16, 4, dtype=torch.float64)
    settings = [{}, {"dampening": 0.5}, {"weight_decay": 0.3}, {"nesterov": True}]
    params, twin = (make_params([(8, 4)] * len(settings)) for _ in range(2))
    ours, theirs = (
        [ComplexSGD([p], lr=0.01, **s, **implementation) for p, s in zip(group, settings, strict=True)]
        for group in (params, twin)
    )

    def train(params, optimizers):
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = x.T @ (x @ param.detach() - y)
            optimizer.step()
            param.grad = None

    compiled = torch.compile(train)
    for _ in range(3):
        compiled(params, ours)
        train(twin, theirs)
    torch.testing.assert_close(params, twin)


def test_compiled_training_loop_is_one_graph():
    torch.compiler.reset()
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    twin = copy.deepcopy(model)
    lr = torch.tensor(0.1)
    ours, theirs = (ComplexSGD(m.parameters(), lr=lr) for m in (model, twin))

    def train(model, optimizer, x):
        loss = model(x).square().mean()
        for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
            p.grad = g
        optimizer.step()
        return loss.detach()

    x = torch.randn(6, 3)
    train(model, ours, x)
    train(twin, theirs, x)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: train(model, ours, x), backend=counter)
    for i in range(4):
        lr.fill_(0.1 / (1 + i))
        torch.testing.assert_close(compiled(x), train(twin, theirs, x))
    graphs = counter.frame_count
    for _ in range(3):
        lr.mul_(0.9)
        torch.testing.assert_close(compiled(x), train(twin, theirs, x))
    assert counter.frame_count == graphs  # nothing is compiled again


# ---- resources ------------------------------------------------------------------------------------------------------


@implementations
def test_no_growth_over_300_steps(implementation):
    model = torch.nn.Linear(6, 3)
    optimizer = ComplexSGD(model.parameters(), lr=0.01, **implementation)
    x = torch.randn(4, 6)

    def train(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()), len(gc.get_objects())

    tensors, objects = train(10)
    more_tensors, more_objects = train(300)
    assert more_tensors <= tensors
    assert more_objects <= objects + 50
    assert all(t.grad_fn is None for s in optimizer.state.values() for t in s.values())


@implementations
def test_nothing_keeps_the_parameters_alive(implementation):
    params = make_params()
    optimizer = ComplexSGD(params, lr=0.1, **implementation)
    run(optimizer, params, 2)
    alive = (
        [weakref.ref(p) for p in params]
        + [weakref.ref(optimizer)]
        + [weakref.ref(t) for s in optimizer.state.values() for t in s.values()]
    )
    del params, optimizer
    gc.collect()
    assert [r() for r in alive] == [None] * len(alive)


@implementations
def test_two_optimizers_in_two_threads(implementation):
    def work(seed):
        params = make_params([(3,), (40000,), (5, 5)], seed=seed)
        return run(ComplexSGD(params, lr=0.1, momentum=MOMENTUM, **implementation), params, 20)

    wanted = [work(seed) for seed in (1, 2)]
    found = [None, None]

    def keep(k):
        found[k] = work(k + 1)

    threads = [threading.Thread(target=keep, args=(k,)) for k in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert all(all_same_bits(w, f) for w, f in zip(wanted, found, strict=True))


def child(queue):
    torch.set_num_threads(1)  # torch's own pool does not survive a fork
    params = make_params([(3,), (40000,)])
    queue.put([p.sum().item() for p in run(ComplexSGD(params, lr=0.1, momentum=MOMENTUM), params, 3)])


def test_in_a_forked_child_after_use():
    params = make_params([(3,), (40000,)])
    wanted = [p.sum().item() for p in run(ComplexSGD(params, lr=0.1, momentum=MOMENTUM), params, 3)]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        process = context.Process(target=child, args=(queue,))
        process.start()
    try:
        assert queue.get(timeout=60) == pytest.approx(wanted, rel=1e-12)
    finally:
        process.join(10)
        if process.is_alive():
            process.kill()
    assert process.exitcode == 0


def test_default_is_the_fused_kernel_where_it_is_native(native, monkeypatch):
    calls = []
    original = _ops.complex_sgd_step_
    monkeypatch.setattr(_ops, "complex_sgd_step_", lambda *a, **k: (calls.append(len(a[0])), original(*a, **k)))
    params = make_params()
    for implementation, wanted in (
        ({}, [5, 5]),
        ({"fused": True}, [5, 5]),
        ({"foreach": True}, []),
        ({"fused": False}, []),
        ({"foreach": False}, []),
    ):
        calls.clear()
        run(ComplexSGD(params, lr=0.1, **implementation), params, 2)
        assert calls == wanted, implementation


def test_trains_a_network():
    torch.manual_seed(0)
    x = torch.randn(128, 5)
    y = torch.sin(x @ torch.randn(5, 1))
    model = torch.nn.Sequential(torch.nn.Linear(5, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    optimizer = ComplexSGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.15 * losses[0]


def test_a_fault_in_a_late_parameter_is_found_before_the_others_move():
    base = torch.ones(6)
    params = [Parameter(torch.ones(2)), Parameter(base[:4]), Parameter(base[2:])]
    # dampening, so that a first step is another call
    optimizer = ComplexSGD(params, momentum=MOMENTUM, dampening=0.5, fused=True)
    params[0].grad = torch.ones(2)
    optimizer.step()
    for p in params:
        p.grad = torch.ones_like(p)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"params\[0\] must not share memory with params\[1\]"):
        optimizer.step()
    assert before.unchanged()


@implementations
def test_messages_name_the_group(implementation):
    params = make_params([(3,), (3,)])
    optimizer = ComplexSGD([{"params": [params[0]]}, {"params": [params[1]]}], momentum=MOMENTUM, **implementation)
    params[1].grad = torch.sparse_coo_tensor([[0]], [1.0], (3,), dtype=torch.float64)
    with pytest.raises(TypeError, match=r"param_groups\[1\]\['params'\]\[0\]"):
        optimizer.step()


@implementations
def test_a_gradient_of_another_dtype_is_refused(implementation):
    p = Parameter(torch.ones(3, dtype=torch.float64))
    p.grad = torch.ones(3, dtype=torch.float64)
    p.data = p.data.float()
    optimizer = ComplexSGD([p], **implementation)
    with pytest.raises(
        ValueError, match=r"the gradient of params\[0\] must have its shape \(3,\) and dtype torch.float32"
    ):
        optimizer.step()


def test_numbers_of_numpy_survive_a_safe_checkpoint(tmp_path):
    np = pytest.importorskip("numpy")
    params = make_params([(3,)])
    optimizer = ComplexSGD(params, lr=np.float64(0.1), momentum=np.complex128(0.5j), weight_decay=np.float32(0.5))
    optimizer.add_param_group({"params": make_params([(2,)]), "momentum": np.float64(0.5)})
    torch.save(optimizer.state_dict(), tmp_path / "c.pt")
    groups = torch.load(tmp_path / "c.pt", weights_only=True)["param_groups"]
    assert (groups[0]["lr"], groups[0]["momentum"], groups[0]["weight_decay"]) == (0.1, (0.0, 0.5), 0.5)
    assert groups[1]["momentum"] == 0.5


def test_a_complex_momentum_is_a_pair_of_numbers_in_a_checkpoint():
    """Some formats know no complex numbers, and no tuples."""
    params = make_params([(3,)] * 2)
    groups = [{"params": params[:1], "momentum": MOMENTUM}, {"params": params[1:], "momentum": -0.5}]
    optimizer = ComplexSGD(groups)
    checkpoint = optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(lambda _, s: seen.append(s["param_groups"][0]["momentum"]))
    assert [g["momentum"] for g in checkpoint["param_groups"]] == [(MOMENTUM.real, MOMENTUM.imag), -0.5]
    assert [g["momentum"] for g in optimizer.param_groups] == [MOMENTUM, -0.5]
    for momentum in ((0.25, -0.5), [0.25, -0.5], 0.25 - 0.5j):
        seen = []
        checkpoint["param_groups"][0]["momentum"] = momentum
        optimizer.load_state_dict(checkpoint)
        assert optimizer.param_groups[0]["momentum"] == 0.25 - 0.5j
        assert seen == [momentum] and checkpoint["param_groups"][0]["momentum"] is momentum


@implementations
def test_the_default_device_is_not_where_the_scalars_go(implementation):
    params = make_params([(3,)])
    optimizer = ComplexSGD(params, momentum=MOMENTUM, **implementation)
    torch.set_default_device("meta")
    try:
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    finally:
        torch.set_default_device(None)
    assert all(p.isfinite().all() for p in params)
