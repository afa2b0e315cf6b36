"""ComplexAdam: its numbers, what it shares with torch.optim.Adam, and everything an optimizer is expected to do."""

import cmath
import copy
import gc
import math
import pickle
import warnings
import weakref

import numpy as np
import pytest
import torch
from helpers import FLOATING, LAYOUTS, Memory, all_same_bits, name_of, opmath, product, same_bits
from optimizers import IMPLEMENTATIONS, assert_all_close, from_file, make_params, run, set_grads, snapshot
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import Parameter
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, CyclicLR, LambdaLR, OneCycleLR, StepLR

from nestopt_ext import ComplexAdam, _ops, effective_lr

implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
BETA = cmath.rect(0.8, 0.7)
BETAS = (BETA, 0.95)
MOMENTS = ("exp_avg", "exp_avg_imag", "exp_avg_sq")
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


# ---- numbers --------------------------------------------------------------------------------------------------------

OPTIONS = product(
    weight_decay=[0, 0.1], decoupled_weight_decay=[False, True], amsgrad=[False, True], maximize=[False, True]
)
options_ = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
THEIRS = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


@implementations
@pytest.mark.parametrize("theirs", THEIRS)
@options_
def test_the_corrected_real_form_is_torch_adam(options, theirs, implementation):
    params, twin = make_params(), make_params()
    adam = Adam(twin, lr=0.1, betas=(0.8, 0.95), eps=1e-3, **THEIRS[theirs], **options)
    optimizer = ComplexAdam(
        params, lr=0.1, betas=(0.8, 0.95), eps=1e-3, bias_correction=True, **implementation, **options
    )
    for i in range(6):
        for ps in (params, twin):
            set_grads(ps, i)
            if i < 2:
                ps[1].grad = None  # its first gradient comes later
            if i == 4:
                ps[2].grad = None
        adam.step()
        optimizer.step()
        assert_all_close(params, twin, **CLOSE)
    for p, q in zip(params, twin, strict=True):
        assert set(optimizer.state[p]) == set(adam.state[q])
        for name, value in adam.state[q].items():
            torch.testing.assert_close(optimizer.state[p][name], value, check_dtype=False, **CLOSE)


@implementations
@pytest.mark.parametrize("counterpart", [Adam, AdamW], ids=lambda c: c.__name__)
def test_groups_with_different_settings_are_those_of_torch(counterpart, implementation):
    def groups(params):
        return [
            {"params": params[:1], "lr": 0.2},
            {"params": params[1:2], "betas": (0.5, 0.9), "eps": 1e-2},
            {"params": params[2:3], "weight_decay": 0.3, "amsgrad": True},
            {"params": params[3:], "maximize": True, "weight_decay": 0.0},
        ]

    params, twin = make_params(), make_params()
    adam = counterpart(groups(twin), lr=0.05, weight_decay=0.1)
    decoupled = counterpart is AdamW
    optimizer = ComplexAdam(
        groups(params),
        lr=0.05,
        betas=(0.9, 0.999),
        weight_decay=0.1,
        decoupled_weight_decay=decoupled,
        bias_correction=True,
        **implementation,
    )
    for i in range(6):
        run(adam, twin, 1, i)
        run(optimizer, params, 1, i)
        assert_all_close(params, twin, **CLOSE)


@implementations
def test_float32_is_torch_adam_to_rounding(implementation):
    params, twin = make_params(dtype=torch.float32), make_params(dtype=torch.float32)
    optimizer = ComplexAdam(params, lr=0.1, betas=(0.9, 0.999), bias_correction=True, **implementation)
    run(Adam(twin, lr=0.1), twin)
    run(optimizer, params)
    assert_all_close(params, twin)


def recurrence(params, grads, lr, beta1, beta2, eps, *, weight_decay, decoupled_weight_decay, amsgrad, maximize):
    """The definition, in Python's complex arithmetic, element by element; grads[k] may hold None."""
    found, moments = [], []
    for p, own in zip(params, grads, strict=True):
        values, state = [], []
        for j, w in enumerate(p.reshape(-1).tolist()):
            m, v, v_max, t = 0j, 0.0, 0.0, 0
            for grad in own:
                if grad is None:
                    continue
                t += 1
                g = grad.reshape(-1)[j].item() * (-1 if maximize else 1)
                if decoupled_weight_decay:
                    w -= lr * weight_decay * w
                else:
                    g += weight_decay * w
                m = beta1 * m + g
                v = beta2 * v + (1 - beta2) * g * g
                v_max = max(v_max, v)
                w -= lr * m.real / (math.sqrt((v_max if amsgrad else v) / (1 - beta2**t)) + eps)
            values.append(w)
            state.append((m, v, v_max))
        found.append(torch.tensor(values, dtype=torch.float64).reshape(p.shape))
        m, v, v_max = zip(*state, strict=True) if state else ([], [], [])
        moments.append(
            (torch.tensor(m, dtype=torch.complex128), *(torch.tensor(c, dtype=torch.float64) for c in (v, v_max)))
        )
    return found, moments


@implementations
@pytest.mark.parametrize("layout", [None, LAYOUTS["every_other"]], ids=["contiguous", "strided"])
@options_
def test_complex_momentum_is_a_complex_recurrence(options, layout, implementation):
    params = make_params(layout=layout)
    start = [p.detach().clone() for p in params]
    optimizer = ComplexAdam(params, lr=0.1, betas=BETAS, eps=1e-3, **implementation, **options)
    grads = [[] for _ in params]
    for i in range(6):
        set_grads(params, i)
        if i in (0, 3):
            params[3].grad = None
        for own, p in zip(grads, params, strict=True):
            own.append(p.grad)
        optimizer.step()
    wanted, moments = recurrence(start, grads, 0.1, *BETAS, 1e-3, **options)
    assert_all_close(params, wanted, **CLOSE)
    for p, (m, v, v_max) in zip(params, moments, strict=True):
        state = optimizer.state[p]
        torch.testing.assert_close(state["exp_avg"].reshape(-1), m.real, **CLOSE)
        torch.testing.assert_close(state["exp_avg_imag"].reshape(-1), m.imag, **CLOSE)
        torch.testing.assert_close(state["exp_avg_sq"].reshape(-1), v, **CLOSE)
        if options["amsgrad"]:
            torch.testing.assert_close(state["max_exp_avg_sq"].reshape(-1), v_max, **CLOSE)
        assert state["step"].item() == (4 if p is params[3] else 6)


@implementations
def test_a_real_momentum_without_correction_is_a_sum(implementation):
    params = make_params()
    start = [p.detach().clone() for p in params]
    optimizer = ComplexAdam(params, lr=0.1, betas=(-0.5, 0.95), **implementation)
    grads = [[] for _ in params]
    for i in range(5):
        set_grads(params, i)
        for own, p in zip(grads, params, strict=True):
            own.append(p.grad)
        optimizer.step()
    wanted, _ = recurrence(start, grads, 0.1, -0.5, 0.95, 1e-8, **OPTIONS[0])
    assert_all_close(params, wanted, **CLOSE)
    assert all("exp_avg_imag" not in s for s in optimizer.state.values())


@pytest.mark.parametrize("dtype", FLOATING, ids=name_of)
def test_implementations_agree_to_rounding(dtype):
    results = []
    for implementation in IMPLEMENTATIONS.values():
        params = make_params(dtype=dtype)
        optimizer = ComplexAdam(params, lr=0.05, betas=BETAS, weight_decay=0.01, amsgrad=True, **implementation)
        results.append(run(optimizer, params))
        for state in optimizer.state.values():
            assert state["step"].dtype == torch.float32
            assert {state[name].dtype for name in (*MOMENTS, "max_exp_avg_sq")} == {opmath(dtype)}
    for other in results[1:]:
        assert_all_close(results[0], other)


@implementations
def test_constant_gradient_has_a_closed_form(implementation):
    """With gradient c: sqrt(v_hat) = |c| and m_k = c (1 - b^k)/(1 - b), so p_n = p_0 - lr sign(c) Re sum_k m_k/c."""
    p = Parameter(torch.tensor([2.0, 2.0], dtype=torch.float64))
    optimizer = ComplexAdam([p], lr=0.1, betas=(BETA, 0.999), eps=0, **implementation)
    n = 40
    for _ in range(n):
        p.grad = torch.tensor([3.0, -0.01], dtype=torch.float64)
        optimizer.step()
    total = ((n - BETA * (1 - BETA**n) / (1 - BETA)) / (1 - BETA)).real
    torch.testing.assert_close(p.detach(), torch.tensor([2 - 0.1 * total, 2 + 0.1 * total], dtype=torch.float64))


@implementations
def test_an_angle_and_its_negative_give_the_same_parameters(implementation):
    found = []
    for beta in (BETA, BETA.conjugate()):
        params = make_params()
        found.append(run(ComplexAdam(params, lr=0.1, betas=(beta, 0.95), weight_decay=0.1, **implementation), params))
    assert_all_close(*found, rtol=1e-14, atol=1e-14)


START = (1.0, 0.5)  # of the game min_x max_y xy


def play(steps, lr, beta, implementation):
    """The distances from the equilibrium after each of the simultaneous steps."""
    x, y = (Parameter(torch.tensor(value, dtype=torch.float64)) for value in START)
    optimizer = ComplexAdam(
        [{"params": [x]}, {"params": [y], "maximize": True}], lr=lr, betas=(beta, 0.999), **implementation
    )
    distances = []
    for _ in range(steps):
        optimizer.zero_grad()
        (x * y).backward()
        optimizer.step()
        distances.append(math.hypot(x.item(), y.item()))
    return distances


def play_averaged(steps, lr, beta):
    """The same with m <- beta m + (1 - beta) g, which looks like Adam and is another filter."""
    p, m, v = list(START), [0j, 0j], [0.0, 0.0]
    distances = []
    for t in range(1, steps + 1):
        for k, g in enumerate((p[1], -p[0])):
            m[k] = beta * m[k] + (1 - beta) * g
            v[k] = 0.999 * v[k] + 0.001 * g * g
        for k in range(2):
            p[k] -= lr * m[k].real / (math.sqrt(v[k] / (1 - 0.999**t)) + 1e-8)
        distances.append(math.hypot(*p))
    return distances


@pytest.mark.parametrize("implementation", [{}, IMPLEMENTATIONS["loop"]], ids=["default", "loop"])
@pytest.mark.parametrize("modulus", [0.8, 0.9])
def test_a_bilinear_game_contracts_with_the_sum_and_not_with_the_average(modulus, implementation):
    beta, start = cmath.rect(modulus, math.pi / 8), math.hypot(*START)
    assert min(play(1000, 0.02, beta, implementation)) < 1e-3 * start
    averaged = play_averaged(2000, 0.02, beta)
    assert min(averaged) > 0.5 * start and averaged[1999] > averaged[999] > averaged[499]
    real = play(300, 0.02, modulus, implementation)
    assert real[-1] > 5 * start


@implementations
def test_zero_gradients_move_nothing_and_a_nan_is_not_hidden(implementation):
    p, q = (Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64)) for _ in range(2))
    optimizer = ComplexAdam([{"params": [p]}, {"params": [q], "eps": 0.0}], lr=0.1, betas=BETAS, **implementation)
    for _ in range(3):
        p.grad, q.grad = torch.zeros_like(p), torch.tensor([1.0, 0.0], dtype=torch.float64)
        optimizer.step()
    assert torch.equal(p.detach(), torch.tensor([1.0, -2.0], dtype=torch.float64))
    assert q[0].isfinite() and q[1].isnan()  # 0/0 without eps, as in torch.optim.Adam


@implementations
def test_a_nan_gradient_reaches_the_parameter(implementation):
    p = Parameter(torch.ones(2))
    optimizer = ComplexAdam([p], lr=0.1, betas=BETAS, amsgrad=True, **implementation)
    for i in range(3):
        p.grad = torch.tensor([1.0, float("nan") if i == 1 else 1.0])
        optimizer.step()
    assert p[0].isfinite() and p[1].isnan()


# ---- rescale_lr -----------------------------------------------------------------------------------------------------


@implementations
@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("decoupled", [False, True])
def test_rescaled_steps_are_those_of_a_smaller_lr(decoupled, as_tensor, implementation):
    """Also the weight decay that is taken off directly is that of the lr that was given."""
    gain = effective_lr(1.0, BETA)
    lr = torch.tensor(0.1, dtype=torch.float64) if as_tensor else 0.1
    shared = {"betas": BETAS, "decoupled_weight_decay": decoupled, **implementation}
    params, twin = make_params(), make_params()
    ours = ComplexAdam(params, lr=lr, weight_decay=0.2, rescale_lr=True, **shared)
    theirs = ComplexAdam(twin, lr=0.1 / gain, weight_decay=0.2 * (gain if decoupled else 1), **shared)
    assert_all_close(run(ours, params), run(theirs, twin), **CLOSE)


@implementations
@pytest.mark.parametrize("beta", [0.0, 0.9, -0.5, BETA, cmath.rect(0.9, math.pi / 8)], ids=str)
def test_rescaled_steps_have_the_length_of_lr_in_the_long_run(beta, implementation):
    p = Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = ComplexAdam([p], lr=0.25, betas=(beta, 0.999), eps=0, rescale_lr=True, **implementation)
    for _ in range(400):
        before = p.item()
        p.grad = torch.full_like(p, -3.0)
        optimizer.step()
    assert p.item() - before == pytest.approx(0.25, rel=1e-11)


# ---- groups, parameters, gradients ----------------------------------------------------------------------------------


@implementations
def test_groups_have_their_own_hyperparameters(implementation):
    own = [{}, {"lr": 0.5}, {"betas": (0.3, 0.9), "bias_correction": True}, {"betas": (0.0, 0.5), "amsgrad": True}]
    params = make_params([(3,)] * 4)
    shared = {"lr": 0.1, "betas": BETAS}
    optimizer = ComplexAdam(
        [{"params": [p], **o} for p, o in zip(params[:3], own, strict=False)], **shared, **implementation
    )
    run(optimizer, params[:3], 2)
    optimizer.add_param_group({"params": [params[3]], **own[3]})
    run(optimizer, params, 3, first=2)
    for k, (p, o) in enumerate(zip(make_params([(3,)] * 4), own, strict=True)):
        alone = ComplexAdam([p], **{**shared, **o}, **IMPLEMENTATIONS["loop"])
        for i in range(0 if k < 3 else 2, 5):
            everyone = make_params([(3,)] * 4)
            set_grads(everyone, i)
            p.grad = everyone[k].grad
            alone.step()
        torch.testing.assert_close(p, params[k], rtol=1e-13, atol=1e-13)


@implementations
def test_missing_late_frozen_and_thawed_gradients(implementation):
    """Each parameter counts its own steps."""
    params, twin = make_params([(3,)] * 3), make_params([(3,)] * 3)
    optimizer = ComplexAdam(params, lr=0.1, betas=BETAS, **implementation)
    alone = [ComplexAdam([p], lr=0.1, betas=BETAS, **IMPLEMENTATIONS["loop"]) for p in twin]
    present = [[True, False, True], [True, True, False], [False, False, False], [True, True, True]]
    for i, row in enumerate(present):
        for group in (params, twin):
            set_grads(group, i)
            for p, there in zip(group, row, strict=True):
                p.grad = p.grad if there else None
        optimizer.step()
        for one in alone:
            one.step()
    assert_all_close(params, twin, rtol=1e-13, atol=1e-13)
    assert [optimizer.state[p]["step"].item() for p in params] == [3, 2, 2]


@implementations
def test_no_gradients_at_all(implementation):
    params = make_params()
    optimizer = ComplexAdam(params, **implementation)
    before = snapshot(optimizer)
    assert optimizer.step() is None
    assert before.unchanged()
    assert not optimizer.state
    with pytest.raises(ValueError, match="empty parameter list"):
        ComplexAdam([], **implementation)


@implementations
def test_mixed_dtypes_in_one_group(implementation):
    params = [Parameter(torch.full((5,), 1.5, dtype=d)) for d in (*FLOATING, torch.float32)]
    optimizer = ComplexAdam(params, lr=0.5, betas=(0.5j, 0.75), eps=0, **implementation)
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    for p in params:
        torch.testing.assert_close(p.detach(), torch.full_like(p, 1.5 - 0.5 * (1 + 1 + 0.75)))


@implementations
@pytest.mark.parametrize("amsgrad", [False, True])
def test_complex_parameters_are_pairs_of_reals(amsgrad, implementation):
    values = torch.randn(4, 3, dtype=torch.complex128)
    p, pair = Parameter(values.clone()), Parameter(torch.view_as_real(values).clone())
    shared = {"lr": 0.1, "betas": BETAS, "weight_decay": 0.1, "amsgrad": amsgrad, **implementation}
    ours, theirs = (ComplexAdam([q], **shared) for q in (p, pair))
    for i in range(4):
        grad = torch.randn(4, 3, dtype=torch.complex128, generator=torch.Generator().manual_seed(i))
        p.grad = grad.conj().resolve_conj().conj() if i % 2 else grad  # every second one lazily conjugated
        pair.grad = torch.view_as_real(grad)
        ours.step()
        theirs.step()
    assert same_bits(torch.view_as_real(p.detach()), pair.detach())
    again = Parameter(p.detach().clone())
    restored = ComplexAdam([again], **shared)
    restored.load_state_dict(from_file(ours.state_dict()))
    for name in MOMENTS:
        assert same_bits(torch.view_as_real(restored.state[again][name]), torch.view_as_real(ours.state[p][name]))


@implementations
def test_complex_parameters_are_those_of_torch_adam(implementation):
    values = torch.randn(3, 2, dtype=torch.complex128)
    p, q = Parameter(values.clone()), Parameter(values.clone())
    adam = Adam([q], lr=0.1, amsgrad=True, weight_decay=0.1)
    ours = ComplexAdam(
        [p], lr=0.1, betas=(0.9, 0.999), amsgrad=True, weight_decay=0.1, bias_correction=True, **implementation
    )
    for i in range(4):
        grad = torch.randn(3, 2, dtype=torch.complex128, generator=torch.Generator().manual_seed(i))
        p.grad, q.grad = grad.clone(), grad.clone()
        ours.step()
        adam.step()
    torch.testing.assert_close(p, q, **CLOSE)


@implementations
def test_gradients_in_another_layout(implementation):
    p, twin = make_params([(2, 3, 4, 5)]), make_params([(2, 3, 4, 5)])
    p[0].data = p[0].data.to(memory_format=torch.channels_last)
    for q, layout in ((p, LAYOUTS["permuted"]), (twin, LAYOUTS["contiguous"])):
        optimizer = ComplexAdam(q, lr=0.1, betas=BETAS, **implementation)
        for i in range(3):
            set_grads(q, i)
            q[0].grad = layout(q[0].grad)
            optimizer.step()
    assert_all_close(p, twin, rtol=1e-13, atol=1e-13)


@implementations
def test_strided_parameters_leave_their_neighbours_alone(implementation):
    base = torch.randn(40, 6, dtype=torch.float64)
    before = base.clone()
    params = [Parameter(base[:, 1]), Parameter(base[::2, 3:5])]
    run(ComplexAdam(params, lr=0.1, betas=BETAS, **implementation), params)
    touched = torch.zeros_like(base, dtype=torch.bool)
    touched[:, 1] = touched[::2, 3:5] = True
    assert torch.equal(base[~touched], before[~touched])
    assert not (base[touched] == before[touched]).any()


@implementations
def test_sparse_gradients_are_refused_by_name(implementation):
    dense, embedding = Parameter(torch.ones(3)), torch.nn.Embedding(5, 2, sparse=True)
    optimizer = ComplexAdam([dense, embedding.weight], **implementation)
    dense.grad = torch.ones(3)
    embedding(torch.tensor([1, 2])).sum().backward()
    before = snapshot(optimizer)
    with pytest.raises(
        TypeError, match=r"ComplexAdam: the gradient of params\[1\] must be dense; got torch.sparse_coo"
    ):
        optimizer.step()
    assert before.unchanged()


def test_parameters_that_share_memory_are_refused():
    base = torch.ones(10)
    params = [Parameter(base[:6]), Parameter(base[4:])]
    optimizer = ComplexAdam(params, fused=True)
    set_grads(params, 0)
    with pytest.raises(ValueError, match=r"complex_adam_step_: params\[0\] must not share memory with params\[1\]"):
        optimizer.step()
    assert torch.equal(base, torch.ones(10))


# ---- hyperparameters ------------------------------------------------------------------------------------------------

BAD = [
    ({"betas": 0.9}, TypeError, "betas must be a pair of numbers; got 0.9"),
    ({"betas": (0.9,)}, TypeError, r"betas must be a pair of numbers; got \(0.9,\)"),
    ({"betas": None}, TypeError, "betas must be a pair of numbers; got None"),
    ({"betas": (1.0, 0.9)}, ValueError, r"betas\[0\] must have modulus below 1; got 1.0"),
    ({"betas": (cmath.rect(1.1, 0.3), 0.9)}, ValueError, r"betas\[0\] must have modulus below 1"),
    ({"betas": (float("nan"), 0.9)}, ValueError, r"betas\[0\] must have modulus below 1; got nan"),
    ({"betas": ("0.9", 0.9)}, TypeError, r"betas\[0\] must be a real or complex number; got '0.9'"),
    ({"betas": (torch.tensor(0.9), 0.9)}, TypeError, r"betas\[0\] must be a real or complex number; got tensor"),
    ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must be below 1; got 1.0"),
    ({"betas": (0.9, -0.1)}, ValueError, r"betas\[1\] must be finite and >= 0; got -0.1"),
    ({"betas": (0.9, float("nan"))}, ValueError, r"betas\[1\] must be finite and >= 0; got nan"),
    ({"betas": (0.9, 0.5j)}, TypeError, r"betas\[1\] must be a number; got 0.5j"),
    ({"betas": (0.9, True)}, TypeError, r"betas\[1\] must be a number; got True"),
    ({"lr": -0.1}, ValueError, "lr must be finite and >= 0; got -0.1"),
    ({"lr": float("nan")}, ValueError, "lr must be finite and >= 0; got nan"),
    ({"lr": "0.1"}, TypeError, "lr must be a number or a tensor; got '0.1'"),
    ({"lr": torch.ones(2)}, ValueError, "lr must be a float32 or float64 tensor of one element"),
    ({"lr": torch.tensor(-1.0)}, ValueError, "lr must be finite and >= 0; got -1.0"),
    ({"eps": -1e-8}, ValueError, "eps must be finite and >= 0; got -1e-08"),
    ({"eps": float("inf")}, ValueError, "eps must be finite and >= 0; got inf"),
    ({"eps": None}, TypeError, "eps must be a number; got None"),
    ({"weight_decay": -0.1}, ValueError, "weight_decay must be finite and >= 0; got -0.1"),
    ({"weight_decay": "0"}, TypeError, "weight_decay must be a number; got '0'"),
    ({"amsgrad": "no"}, TypeError, "amsgrad must be True or False; got 'no'"),
    ({"bias_correction": 1}, TypeError, "bias_correction must be True or False; got 1"),
    ({"rescale_lr": None}, TypeError, "rescale_lr must be True or False; got None"),
    ({"capturable": "yes"}, TypeError, "capturable must be True or False; got 'yes'"),
    ({"foreach": "no"}, TypeError, "foreach must be True, False or None; got 'no'"),
    ({"fused": 0}, TypeError, "fused must be True, False or None; got 0"),
    (
        {"bias_correction": True, "betas": BETAS},
        ValueError,
        r"betas\[0\] must be real with bias_correction=True; got \(0.6.*leave bias_correction off; rescale_lr=True",
    ),
    (
        {"bias_correction": True, "rescale_lr": True, "betas": (0.9, 0.9)},
        ValueError,
        "rescale_lr must be False with bias_correction=True; got True",
    ),
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
    with pytest.raises(kind, match=f"^ComplexAdam: {message}"):
        ComplexAdam(params, **bad)
    with pytest.raises(kind, match=f"^ComplexAdam: {message}"):
        ComplexAdam([{"params": params, **bad}])
    optimizer = ComplexAdam(params[:1])
    with pytest.raises(kind, match=f"^ComplexAdam: {message}"):
        optimizer.add_param_group({"params": params[1:], **bad})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("implementation", [{}, IMPLEMENTATIONS["foreach"]], ids=["default", "foreach"])
@bad_hyperparameters
def test_hyperparameters_spoiled_later_are_refused_and_nothing_moves(bad, kind, message, implementation):
    params = make_params()
    optimizer = ComplexAdam([{"params": params[:2]}, {"params": params[2:]}], **implementation)
    run(optimizer, params, 2)
    set_grads(params, 3)
    before = snapshot(optimizer)
    optimizer.param_groups[1].update(bad)
    with pytest.raises(kind, match=f"^ComplexAdam: {message}"):
        optimizer.step()
    assert before.unchanged()


def test_numbers_of_numpy_count_as_numbers_and_survive_a_safe_checkpoint():
    found = []
    for real, cplx in ((float, complex), (np.float64, np.complex128)):
        params = make_params()
        optimizer = ComplexAdam(
            params, lr=real(0.125), betas=[cplx(0.5j), real(0.75)], eps=real(1e-3), weight_decay=real(0.5)
        )
        found.append(run(optimizer, params))
        group = from_file(optimizer.state_dict())["param_groups"][0]
        assert (group["lr"], group["eps"], group["weight_decay"]) == (0.125, 1e-3, 0.5)
        assert group["betas"] == ((0.0, 0.5), 0.75)
    assert all_same_bits(*found)


@implementations
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_lr_as_a_tensor_changed_in_place(dtype, shape, implementation):
    lr, params, twin = torch.full(shape, 0.5, dtype=dtype), make_params(), make_params()
    shared = {"betas": BETAS, "weight_decay": 0.1, "decoupled_weight_decay": True, **implementation}
    ours, theirs = ComplexAdam(params, lr=lr, **shared), ComplexAdam(twin, lr=0.5, **shared)
    for i in range(4):
        run(ours, params, 1, i)
        run(theirs, twin, 1, i)
        lr.mul_(0.5)
        theirs.param_groups[0]["lr"] *= 0.5
    assert_all_close(params, twin, rtol=1e-13, atol=1e-13)
    assert ours.param_groups[0]["lr"] is lr
    lr.fill_(float("nan"))
    before = snapshot(ours)
    with pytest.raises(ValueError, match=r"^ComplexAdam: lr must be finite and >= 0; got nan"):
        ours.step()
    assert before.unchanged()


@implementations
def test_betas_set_as_a_list_cannot_change_unseen(implementation):
    params = make_params()
    optimizer = ComplexAdam(params, **implementation)
    optimizer.param_groups[0]["betas"] = [0.5, 0.9]
    run(optimizer, params, 1)
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.9)


def test_is_a_torch_optimizer():
    optimizer = ComplexAdam(make_params(), lr=0.25)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.defaults == {
        "lr": 0.25,
        "betas": (cmath.rect(0.8, math.pi / 8), 0.999),
        "eps": 1e-8,
        "weight_decay": 0,
        "amsgrad": False,
        "decoupled_weight_decay": False,
        "bias_correction": False,
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
        "fused": None,
        "rescale_lr": False,
    }
    assert set(optimizer.defaults) - set(Adam(make_params()).defaults) == {"bias_correction", "rescale_lr"}
    assert repr(optimizer).startswith("ComplexAdam (") and "betas: ((0.73" in repr(optimizer)
    positional = ComplexAdam(make_params(), 0.1, (0.5, 0.25), 1e-3, 0.125, True)
    names = ("lr", "betas", "eps", "weight_decay", "amsgrad")
    assert [positional.defaults[k] for k in names] == [0.1, (0.5, 0.25), 1e-3, 0.125, True]


# ---- state ----------------------------------------------------------------------------------------------------------


@implementations
@pytest.mark.parametrize("dtype", FLOATING, ids=name_of)
@pytest.mark.parametrize("betas", [(0.9, 0.95), BETAS], ids=["real", "complex"])
def test_resume_is_exact(betas, dtype, implementation):
    params = make_params(dtype=dtype)
    optimizer = ComplexAdam(params, lr=0.1, betas=betas, amsgrad=True, **implementation)
    run(optimizer, params, 3)
    checkpoint, kept = from_file(optimizer.state_dict()), [p.detach().clone() for p in params]
    straight = run(optimizer, params, 3, first=3)
    again = [Parameter(p) for p in kept]
    restored = ComplexAdam(again, lr=0.7, betas=(0.1, 0.2), **implementation)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restored.load_state_dict(checkpoint)
    assert restored.param_groups[0]["betas"] == betas and restored.param_groups[0]["lr"] == 0.1
    assert all_same_bits(straight, run(restored, again, 3, first=3))


@implementations
@pytest.mark.parametrize("own", THEIRS.values(), ids=THEIRS)
@pytest.mark.parametrize("counterpart", [Adam, AdamW], ids=lambda c: c.__name__)
def test_a_checkpoint_of_torch_goes_on_with_its_numbers(counterpart, own, implementation):
    theirs = make_params()
    adam = counterpart(theirs, lr=0.1, betas=(0.8, 0.9), weight_decay=0.1, amsgrad=True, **own)
    run(adam, theirs, 3)
    ours = [Parameter(p.detach().clone()) for p in theirs]
    optimizer = ComplexAdam(ours, **implementation)
    optimizer.load_state_dict(from_file(adam.state_dict()))
    assert optimizer.param_groups[0]["bias_correction"] and not optimizer.param_groups[0]["rescale_lr"]
    optimizer.param_groups[0].update({"foreach": None, "fused": None, **implementation})
    for i in range(3, 6):
        run(adam, theirs, 1, i)
        run(optimizer, ours, 1, i)
        assert_all_close(ours, theirs, **CLOSE)


def test_an_old_checkpoint_of_torch_says_less():
    """Steps were numbers once, and AdamW did not say that it was not Adam: then our own setting counts."""
    theirs = make_params()
    adam = AdamW(theirs, lr=0.1, weight_decay=0.1)
    run(adam, theirs, 3)
    checkpoint = from_file(adam.state_dict())
    for state in checkpoint["state"].values():
        state["step"] = int(state["step"])
    for name in (*(set(checkpoint["param_groups"][0]) - {"params", "lr", "betas", "eps", "weight_decay", "amsgrad"}),):
        del checkpoint["param_groups"][0][name]
    ours = [Parameter(p.detach().clone()) for p in theirs]
    optimizer = ComplexAdam(ours, decoupled_weight_decay=True)
    optimizer.load_state_dict(checkpoint)
    run(adam, theirs, 2, 3)
    run(optimizer, ours, 2, 3)
    assert_all_close(ours, theirs, **CLOSE)


@implementations
@pytest.mark.parametrize("when", ["step", "state_dict", "pickle"])
def test_from_adam_to_a_sum_and_back(when, implementation):
    """After the same gradients the sum is the average over 1 - beta; so the form may change in the middle of a run."""
    shared = {"lr": 0.1, "betas": (0.75, 0.9), **implementation}
    forms = {"average": {"bias_correction": True}, "sum": {"bias_correction": False}}
    runs = {}
    for name, form in forms.items():
        params = [Parameter(torch.ones(3, dtype=torch.float64))]
        runs[name] = (ComplexAdam(params, **shared, **form), params)
        run(*runs[name], 4)
    for optimizer, other in ((runs["average"][0], runs["sum"]), (runs["sum"][0], runs["average"])):
        optimizer, wanted = copy.deepcopy(optimizer), other[0].state[other[1][0]]
        group = optimizer.param_groups[0]
        group["bias_correction"] = not group["bias_correction"]
        if when == "step":
            moments = wanted["exp_avg"] * 0.75 + torch.ones(3) * (0.25 if group["bias_correction"] else 1)
            group["params"][0].grad = torch.ones(3, dtype=torch.float64)
            optimizer.step()
        else:
            moments = wanted["exp_avg"]
            if when == "pickle":
                optimizer = pickle.loads(pickle.dumps(optimizer))
            checkpoint = optimizer.state_dict()
            found = checkpoint["state"][0]
        found = optimizer.state[optimizer.param_groups[0]["params"][0]]
        torch.testing.assert_close(found["exp_avg"], moments, **CLOSE)
        torch.testing.assert_close(optimizer.state_dict()["state"][0]["exp_avg"], moments, **CLOSE)  # once, not twice


@implementations
def test_the_form_stays_when_another_group_is_taken_away(implementation):
    params = make_params([(3,), (3,)])
    groups = [{"params": params[:1], "bias_correction": True}, {"params": params[1:]}]
    optimizer = ComplexAdam(groups, betas=(0.5, 0.9), **implementation)
    for _ in range(2):
        params[1].grad = torch.ones_like(params[1])
        optimizer.step()
        del optimizer.param_groups[:-1]
    torch.testing.assert_close(optimizer.state[params[1]]["exp_avg"], torch.full_like(params[1], 1.5).detach())


@implementations
def test_a_run_of_adam_goes_on_with_complex_momentum(implementation):
    theirs = make_params()
    adam = Adam(theirs, lr=0.1)
    run(adam, theirs, 3)
    ours = [Parameter(p.detach().clone()) for p in theirs]
    optimizer = ComplexAdam(ours, **implementation)
    optimizer.load_state_dict(from_file(adam.state_dict()))
    optimizer.param_groups[0].update(betas=(BETA, 0.999), bias_correction=False, rescale_lr=True)
    run(optimizer, ours, 1, 3)
    set_grads(theirs, 3)
    for p, q in zip(ours, theirs, strict=True):
        m = BETA * adam.state[q]["exp_avg"].to(torch.complex128) / (1 - 0.9) + q.grad
        v = 0.999 * adam.state[q]["exp_avg_sq"] + 0.001 * q.grad.square()
        step = 0.1 / effective_lr(1.0, BETA) * m.real / ((v / (1 - 0.999**4)).sqrt() + 1e-8)
        torch.testing.assert_close(p.detach(), q.detach() - step, **CLOSE)
        torch.testing.assert_close(optimizer.state[p]["exp_avg_imag"], m.imag, **CLOSE)


@pytest.mark.parametrize("betas", [((0.25, -0.5), 0.75), [[0.25, -0.5], 0.75], (0.25 - 0.5j, 0.75)], ids=str)
def test_a_complex_momentum_is_a_pair_of_numbers_in_a_checkpoint(betas):
    optimizer = ComplexAdam(make_params(), betas=(0.9, 0.5))
    checkpoint = optimizer.state_dict()
    assert checkpoint["param_groups"][0]["betas"] == (0.9, 0.5)
    checkpoint["param_groups"][0]["betas"] = betas
    optimizer.load_state_dict(checkpoint)
    assert optimizer.param_groups[0]["betas"] == (0.25 - 0.5j, 0.75)
    assert optimizer.state_dict()["param_groups"][0]["betas"] == ((0.25, -0.5), 0.75)


def test_a_checkpoint_of_another_optimizer_is_refused():
    params = make_params()
    sgd = SGD(params, lr=0.1, momentum=0.9)
    run(sgd, params, 1)
    optimizer = ComplexAdam(make_params())
    with pytest.raises(ValueError, match=r"param_groups\[0\] must hold lr, betas, eps, weight_decay; got no betas"):
        optimizer.load_state_dict(sgd.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_float32_buffers_beside_16_bit_parameters_survive_loading(dtype):
    params = make_params(dtype=dtype)
    optimizer = ComplexAdam(params, betas=BETAS)
    run(optimizer, params, 3)
    restored = ComplexAdam(make_params(dtype=dtype))
    restored.load_state_dict(from_file(optimizer.state_dict()))
    for a, b in zip(optimizer.state.values(), restored.state.values(), strict=True):
        assert all(b[n].dtype == torch.float32 and same_bits(a[n], b[n]) for n in (*MOMENTS, "step"))


def test_a_checkpoint_loads_into_another_dtype():
    params = make_params(dtype=torch.float64)
    optimizer = ComplexAdam(params, betas=BETAS)
    run(optimizer, params, 2)
    for dtype in FLOATING:
        other = make_params(dtype=dtype)
        restored = ComplexAdam(other)
        restored.load_state_dict(from_file(optimizer.state_dict()))
        for a, b in zip(optimizer.state.values(), restored.state.values(), strict=True):
            assert all(same_bits(a[n].to(opmath(dtype)), b[n]) for n in MOMENTS)
            assert b["step"].dtype == torch.float32 and b["step"].item() == 2
        run(restored, other, 1)


def test_loading_copies():
    params, twin = make_params(), make_params()
    optimizer, other = ComplexAdam(params), ComplexAdam(twin)
    run(optimizer, params, 2)
    other.load_state_dict(optimizer.state_dict())
    before = snapshot(optimizer)
    run(other, twin, 2)
    assert before.unchanged()
    assert not {t.data_ptr() for s in optimizer.state.values() for t in s.values() if t.numel()} & {
        t.data_ptr() for s in other.state.values() for t in s.values() if t.numel()
    }


def put(name, value):
    return lambda c: c["state"][1].__setitem__(name, value)


def take(*names):
    return lambda c: [c["state"][1].pop(name) for name in names]


def at(name):
    return rf"ComplexAdam.load_state_dict: state\[1\]\['{name}'\] must "


HOSTILE = {
    "short": (put("exp_avg", torch.ones(2)), ValueError, at("exp_avg") + r"have the shape of its parameter \(3,\)"),
    "sq-short": (put("exp_avg_sq", torch.ones(1)), ValueError, at("exp_avg_sq") + "have the shape"),
    "imag-int": (
        put("exp_avg_imag", torch.ones(3, dtype=torch.int64)),
        TypeError,
        at("exp_avg_imag") + "be of floating dtype; got torch.int64",
    ),
    "max-text": (put("max_exp_avg_sq", "abc"), TypeError, at("max_exp_avg_sq") + "be a tensor; got 'abc'"),
    "meta": (put("exp_avg", torch.ones(3, device="meta")), TypeError, at("exp_avg") + "be a dense tensor with data"),
    "no-avg": (take("exp_avg"), ValueError, r"must come with 'exp_avg'; got none"),
    "no-sq": (take("exp_avg_sq"), ValueError, at("exp_avg") + "come with 'exp_avg_sq'; got none"),
    "no-step": (take("step"), ValueError, at("exp_avg") + "come with 'step'; got none"),
    "step-none": (put("step", None), ValueError, at("exp_avg") + "come with 'step'; got none"),
    "step-alone": (take(*MOMENTS), ValueError, at("step") + "come with 'exp_avg'; got none"),
    "step-text": (put("step", "3"), TypeError, at("step") + "be a tensor; got '3'"),
    "step-vector": (put("step", torch.ones(2)), ValueError, at("step") + "be a number or a real tensor of one element"),
    "step-nan": (put("step", torch.tensor(float("nan"))), ValueError, at("step") + "be a count of steps.*; got nan"),
    "step-negative": (put("step", -1), ValueError, at("step") + "be a count of steps.*; got -1"),
    "step-complex": (put("step", torch.tensor(1j)), ValueError, at("step") + "be a number or a real tensor"),
    "no-betas": (lambda c: c["param_groups"][0].pop("betas"), ValueError, r"param_groups\[0\] must hold lr, betas"),
    "bad-betas": (
        lambda c: c["param_groups"][0].update(betas=(2.0, 0.9)),
        ValueError,
        r"ComplexAdam.load_state_dict: betas\[0\] must have modulus below 1",
    ),
    "correct-complex": (
        lambda c: c["param_groups"][0].update(bias_correction=True),
        ValueError,
        r"ComplexAdam.load_state_dict: betas\[0\] must be real with bias_correction=True",
    ),
    "text-flag": (
        lambda c: c["param_groups"][0].update(amsgrad="no"),
        TypeError,
        "ComplexAdam.load_state_dict: amsgrad must be True or False; got 'no'",
    ),
    "no-state": (lambda c: c.pop("state"), TypeError, r"state_dict\['state'\] must be a dict; got NoneType"),
    "missing-group": (lambda c: c.__setitem__("param_groups", []), ValueError, "different number of parameter groups"),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_hostile_checkpoints_are_refused_and_the_optimizer_is_unchanged(fault):
    spoil, kind, message = HOSTILE[fault]
    params = make_params()
    optimizer = ComplexAdam(params, betas=BETAS)
    run(optimizer, params, 2)
    checkpoint = from_file(optimizer.state_dict())
    spoil(checkpoint)
    before, states = snapshot(optimizer), [dict(s) for s in optimizer.state.values()]
    groups = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    with pytest.raises(kind, match=message):
        optimizer.load_state_dict(checkpoint)
    assert before.unchanged()
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == groups
    assert all(a[n] is b[n] for a, b in zip(states, optimizer.state.values(), strict=True) for n in (*MOMENTS, "step"))
    run(optimizer, params, 1)


@implementations
@pytest.mark.parametrize("name", MOMENTS)
@pytest.mark.parametrize(
    ("value", "got"),
    [
        (torch.ones(2), r"torch.float32 of shape \(2,\) on cpu"),
        (torch.ones(3, dtype=torch.float16), r"torch.float16 of shape \(3,\) on cpu"),
        (torch.ones(3, device="meta"), r"torch.float32 of shape \(3,\) on meta"),
    ],
    ids=["short", "half", "meta"],
)
def test_state_spoiled_behind_the_optimizer_is_refused(value, got, name, implementation):
    params = make_params([(3,)] * 3, dtype=torch.float32)
    optimizer = ComplexAdam(params, betas=BETAS, **implementation)
    run(optimizer, params, 1)
    before = snapshot(optimizer)
    optimizer.state[params[1]][name] = value
    set_grads(params, 1)
    wanted = rf"^ComplexAdam: {name} of params\[1\] must be torch.float32 of shape \(3,\) on cpu; got {got}"
    with pytest.raises(ValueError, match=wanted):
        optimizer.step()
    assert before.unchanged()


@implementations
@pytest.mark.parametrize("value", [torch.ones(2), torch.tensor(1), torch.tensor(1.0).half()], ids=str)
def test_a_spoiled_step_is_refused(value, implementation):
    params = make_params([(3,)] * 2)
    optimizer = ComplexAdam(params, **implementation)
    run(optimizer, params, 1)
    before = snapshot(optimizer)
    optimizer.state[params[1]]["step"] = value
    with pytest.raises(
        ValueError, match=r"^ComplexAdam: step of params\[1\] must be a float32 or float64 tensor of one"
    ):
        optimizer.step()
    assert before.unchanged()


@implementations
def test_deepcopy_and_pickle_make_independent_copies(implementation):
    model = torch.nn.Linear(3, 2).double()
    optimizer = ComplexAdam(model.parameters(), lr=0.1, **implementation)
    params = list(model.parameters())
    run(optimizer, params, 2)
    copies = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    before = snapshot(optimizer)
    found = []
    for other_model, other in copies:
        assert type(other) is ComplexAdam and other.param_groups[0]["betas"] == optimizer.param_groups[0]["betas"]
        found.append(run(other, list(other_model.parameters()), 2, first=2))
    assert before.unchanged()
    straight = run(optimizer, params, 2, first=2)
    assert all(all_same_bits(straight, f) for f in found)


def test_state_dict_is_plain_and_the_same_for_every_implementation():
    for options, names in (
        ({"betas": (0.5, 0.9)}, ["exp_avg", "exp_avg_sq", "step"]),
        ({"betas": BETAS, "amsgrad": True}, ["exp_avg", "exp_avg_imag", "exp_avg_sq", "max_exp_avg_sq", "step"]),
    ):
        for implementation in IMPLEMENTATIONS.values():
            params = make_params()
            optimizer = ComplexAdam(params, **options, **implementation)
            run(optimizer, params, 2)
            state = optimizer.state_dict()["state"]
            assert [sorted(s) for s in state.values()] == [names] * len(params)
            tensors = [t for s in state.values() for t in s.values()]
            assert all(type(t) is torch.Tensor and not t.requires_grad and t.grad_fn is None for t in tensors)


@implementations
def test_momentum_may_change_between_real_and_complex(implementation):
    """The imaginary part turns with the real one, as parts of one complex moment; amsgrad may come later."""
    params, twin = make_params(), make_params()
    optimizer = ComplexAdam(params, lr=0.1, betas=(0.5, 0.9), **implementation)
    wanted = [p.detach().clone() for p in twin]
    m = [torch.zeros(p.shape, dtype=torch.complex128) for p in twin]
    v = [torch.zeros_like(p) for p in wanted]
    v_max = [torch.zeros_like(p) for p in wanted]
    for i, beta in enumerate([0.5, 0.5, BETA, BETA, -0.3, -0.3, BETA, 0.0, 0.5]):
        optimizer.param_groups[0].update(betas=(beta, 0.9), amsgrad=i > 4)
        run(optimizer, params, 1, first=i)
        set_grads(twin, i)
        for k, p in enumerate(twin):
            m[k] = beta * m[k] + p.grad
            v[k] = 0.9 * v[k] + 0.1 * p.grad.square()
            if i > 4:
                v_max[k] = torch.maximum(v_max[k], v[k])
            second = v_max[k] if i > 4 else v[k]
            wanted[k] -= 0.1 * m[k].real / ((second / (1 - 0.9 ** (i + 1))).sqrt() + 1e-8)
        assert_all_close(params, wanted, **CLOSE)


# ---- where the count of steps lies ----------------------------------------------------------------------------------


@implementations
def test_one_group_on_two_devices(implementation):
    """Also where the host counts the steps of all."""
    p, other = Parameter(torch.ones(3)), Parameter(torch.ones(3, device="meta"))
    twin = Parameter(torch.ones(3))
    optimizer, alone = ComplexAdam([p, other], **implementation), ComplexAdam([twin], **implementation)
    for i in range(3):
        set_grads([p], i)
        set_grads([twin], i)
        other.grad = torch.ones_like(other)
        optimizer.step()
        alone.step()
    assert same_bits(p.detach(), twin.detach())


@pytest.mark.gpu
@pytest.mark.parametrize("capturable", [False, True])
@implementations
def test_the_step_lies_on_the_host_unless_the_device_reads_it(implementation, capturable):
    params = [Parameter(p.detach().cuda()) for p in make_params()]
    optimizer = ComplexAdam(params, lr=0.1, betas=BETAS, capturable=capturable, **implementation)
    run(optimizer, params, 2)
    fused = _ops.is_native("complex_adam_step_", "cuda") if implementation == {} else "fused" in implementation
    fused = fused and implementation.get("fused", True)
    wanted = "cuda" if capturable or fused else "cpu"
    assert {s["step"].device.type for s in optimizer.state.values()} == {wanted}
    for other in (Adam(params, fused=True), Adam(params)):
        run(other, params, 1)
        checkpoint = {
            **from_file(other.state_dict()),
            "param_groups": from_file(optimizer.state_dict())["param_groups"],
        }
        optimizer.load_state_dict(checkpoint)
        assert {s["step"].device.type for s in optimizer.state.values()} == {wanted}
        run(optimizer, params, 1)


@pytest.mark.gpu
def test_the_step_follows_the_implementation():
    params = [Parameter(p.detach().cuda()) for p in make_params()]
    twin = [Parameter(p.detach().clone()) for p in params]
    optimizer, plain = ComplexAdam(params, lr=0.1, betas=BETAS), ComplexAdam(twin, lr=0.1, betas=BETAS, fused=True)
    for i, implementation in enumerate([*IMPLEMENTATIONS.values()] * 2):
        optimizer.param_groups[0].update({"foreach": None, "fused": None, **implementation})
        run(optimizer, params, 1, i)
        run(plain, twin, 1, i)
    assert_all_close(params, twin, **CLOSE)


@pytest.mark.gpu
@implementations
def test_a_captured_step_is_the_step(implementation):
    params, twin = ([Parameter(p.detach().cuda()) for p in make_params()] for _ in range(2))
    lr = torch.tensor(0.1, dtype=torch.float64, device="cuda")
    shared = {"betas": BETAS, "amsgrad": True, "weight_decay": 0.1}
    ours = ComplexAdam(params, lr=lr, capturable=True, **shared, **implementation)
    theirs = ComplexAdam(twin, lr=0.1, **shared, **IMPLEMENTATIONS["loop"])
    grads = [torch.zeros_like(p) for p in params]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        set_grads(twin, 0)
        for g, q in zip(grads, twin, strict=True):
            g.copy_(q.grad)
        ours.step()
    torch.cuda.current_stream().wait_stream(stream)
    theirs.step()
    with torch.cuda.graph(graph):
        ours.step()
    for i in range(1, 6):
        lr.fill_(0.1 / i)
        theirs.param_groups[0]["lr"] = 0.1 / i
        set_grads(twin, i)
        for g, q in zip(grads, twin, strict=True):
            g.copy_(q.grad)
        graph.replay()
        theirs.step()
        assert_all_close(params, twin, **CLOSE)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", [{}, {"foreach": True}], ids=["default", "foreach"])
def test_a_capturable_step_never_waits_for_the_device(implementation):
    params = [Parameter(p.detach().cuda()) for p in make_params()]
    lr = torch.tensor(0.1, device="cuda")
    optimizer = ComplexAdam(params, lr=lr, betas=BETAS, capturable=True, **implementation)
    run(optimizer, params, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_capture_that_would_repeat_one_step_is_refused():
    params = [Parameter(p.detach().cuda()) for p in make_params()]
    optimizer = ComplexAdam(params, lr=0.1, betas=BETAS, foreach=True)
    run(optimizer, params, 1)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="ComplexAdam: capturable must be True"), torch.cuda.graph(graph):
        optimizer.step()


@implementations
def test_capturable_steps_on_the_cpu_are_the_same(implementation):
    found = []
    for capturable in (False, True):
        params = make_params()
        optimizer = ComplexAdam(params, lr=0.1, betas=BETAS, capturable=capturable, **implementation)
        found.append(run(optimizer, params))
    assert_all_close(*found, **CLOSE)


# ---- closures, hooks, schedulers ------------------------------------------------------------------------------------


@implementations
def test_closure_runs_with_gradients_and_its_value_is_returned(implementation):
    p = Parameter(torch.tensor([2.0]))
    optimizer = ComplexAdam([p], lr=0.25, betas=(0.5, 0.9), eps=0, **implementation)
    modes = []

    def closure():
        modes.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert float(optimizer.step(closure)) == 4.0
    assert modes == [True] and p.item() == pytest.approx(1.75)


SCHEDULERS = {
    "step": lambda o: StepLR(o, 2, 0.5),
    "cosine": lambda o: CosineAnnealingLR(o, 6),
    "lambda": lambda o: LambdaLR(o, lambda i: 1 / (1 + i)),
    "one-cycle": lambda o: OneCycleLR(o, max_lr=0.2, total_steps=8, base_momentum=0.5, max_momentum=0.9),
    "cyclic": lambda o: CyclicLR(o, 0.01, 0.1, step_size_up=3, base_momentum=0.5, max_momentum=0.9),
}


@implementations
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_move_it_as_they_move_torch_adam(scheduler, implementation):
    theirs, ours = make_params(), make_params()
    adam = Adam(theirs, lr=0.1)
    optimizer = ComplexAdam(ours, lr=0.1, betas=(0.9, 0.999), bias_correction=True, **implementation)
    plans = [SCHEDULERS[scheduler](o) for o in (adam, optimizer)]
    for i in range(7):
        run(adam, theirs, 1, i)
        run(optimizer, ours, 1, i)
        for plan in plans:
            plan.step()
        assert adam.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
        assert adam.param_groups[0]["betas"] == optimizer.param_groups[0]["betas"]
    assert_all_close(ours, theirs, **CLOSE)


@implementations
@pytest.mark.parametrize("scheduler", ["one-cycle", "cyclic"])
@pytest.mark.parametrize("reload", [False, True], ids=["", "reload"])
def test_a_cycled_momentum_keeps_its_angle(reload, scheduler, implementation):
    """Each group its own; also over a checkpoint taken just after the scheduler has set a real one."""
    angles = (0.7, -0.2)
    params = make_params([(3,), (2,)])
    groups = [{"params": [p], "betas": (cmath.rect(0.8, a), 0.95)} for p, a in zip(params, angles, strict=True)]
    optimizer = ComplexAdam(groups, lr=0.1, **implementation)
    plan = SCHEDULERS[scheduler](optimizer)
    moduli = Adam(make_params([(1,), (1,)]), lr=0.1)
    real_plan = SCHEDULERS[scheduler](moduli)
    twin = make_params([(3,), (2,)])
    by_hand = [ComplexAdam([p], **IMPLEMENTATIONS["loop"]) for p in twin]
    for i in range(6):
        set_grads(params, i)
        set_grads(twin, i)
        if reload and i == 3:
            checkpoint = from_file(optimizer.state_dict())
            optimizer = ComplexAdam([{"params": [p]} for p in params], **implementation)
            optimizer.load_state_dict(checkpoint)
            plan.optimizer = optimizer
        optimizer.step()
        scheduled = moduli.param_groups[0]
        for one, angle in zip(by_hand, angles, strict=True):
            one.param_groups[0].update(lr=scheduled["lr"], betas=(cmath.rect(scheduled["betas"][0], angle), 0.95))
            one.step()
        assert_all_close(params, twin, **CLOSE)
        moduli.step()
        plan.step()
        real_plan.step()


def test_a_momentum_set_by_hand_is_what_it_says():
    """Without a scheduler that cycles it, a real momentum is a real momentum, also after a complex one."""
    params, twin = make_params(), make_params()
    optimizer, plain = ComplexAdam(params, lr=0.1, betas=BETAS), ComplexAdam(twin, lr=0.1, betas=(0.5, 0.95))
    StepLR(optimizer, 2)
    OneCycleLR(optimizer, max_lr=0.1, total_steps=8, div_factor=1, cycle_momentum=False)
    optimizer.param_groups[0]["betas"] = (0.5, 0.95)
    assert_all_close(run(optimizer, params), run(plain, twin), rtol=0, atol=0)
    assert all("exp_avg_imag" not in s for s in optimizer.state.values())


# ---- mixed precision ------------------------------------------------------------------------------------------------


@implementations
@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale"])
@pytest.mark.parametrize("bad_step", [0, 2], ids=["first", "later"])
def test_grad_scaler_skips_a_step_as_if_it_had_not_been(bad_step, unscale, implementation):
    params, twin = make_params(dtype=torch.float32), make_params(dtype=torch.float32)
    optimizer = ComplexAdam(params, lr=0.1, betas=BETAS, **implementation)
    plain = ComplexAdam(twin, lr=0.1, betas=BETAS, **implementation)
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
            assert_all_close(params, twin)
    assert scaler.get_scale() == 512.0
    assert not hasattr(optimizer, "found_inf") and not hasattr(optimizer, "grad_scale")
    for p, q in zip(params, twin, strict=True):
        assert optimizer.state[p]["step"].item() == plain.state[q]["step"].item() == 4
        for name in MOMENTS:
            torch.testing.assert_close(optimizer.state[p][name], plain.state[q][name])


def test_a_scale_set_by_hand_reaches_the_fused_step():
    params, twin = make_params(), make_params()
    optimizer, plain = ComplexAdam(params, betas=BETAS, fused=True), ComplexAdam(twin, betas=BETAS, fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    for i in range(3):
        set_grads(params, i)
        for p in params:
            p.grad *= 8
        optimizer.step()
    assert_all_close(params, run(plain, twin, 3), **CLOSE)
    optimizer.found_inf.fill_(1.0)
    before = [t.clone() for t in snapshot(optimizer).tensors]
    optimizer.step()
    assert all_same_bits(before, snapshot(optimizer).tensors)


# ---- differentiable -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"betas": BETAS},
        {"betas": BETAS, "weight_decay": 0.1, "maximize": True},
        {"betas": BETAS, "rescale_lr": True, "weight_decay": 0.1, "decoupled_weight_decay": True},
        {"betas": (0.9, 0.95), "bias_correction": True, "weight_decay": 0.1},
        {"betas": (0.9, 0.95), "bias_correction": True, "amsgrad": True},
    ],
    ids=str,
)
def test_differentiable_steps(options):
    """Derivatives of three steps in the initial parameter, each gradient and the lr."""

    def steps(p, lr, *grads):
        p = p.clone()
        optimizer = ComplexAdam([p], lr=lr, differentiable=True, **options)
        for g in grads:
            p.grad = g * g + 0.5  # nonlinear, so that second derivatives are there
            optimizer.step()
        state = optimizer.state[p]
        return (p, *(state[n] for n in (*MOMENTS, "max_exp_avg_sq") if n in state))

    new = lambda *s: torch.rand(*s, dtype=torch.float64).add_(0.5).requires_grad_()  # noqa: E731
    inputs = (new(3), torch.tensor(0.3, dtype=torch.float64, requires_grad=True), new(3), new(3), new(3))
    assert torch.autograd.gradcheck(steps, inputs)
    assert torch.autograd.gradgradcheck(steps, inputs)


@implementations
def test_autograd_is_told_and_gradients_are_only_read(implementation):
    params = make_params([(3,), (2, 2)])
    optimizer = ComplexAdam(params, betas=BETAS, weight_decay=0.1, maximize=True, amsgrad=True, **implementation)
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
    assert all(p.is_leaf and p.requires_grad for p in params)
    assert all(not t.requires_grad for s in optimizer.state.values() for t in s.values())


# ---- compiled -------------------------------------------------------------------------------------------------------


@implementations
@pytest.mark.parametrize(
    "options",
    [{"betas": BETAS}, {"betas": (0.9, 0.95), "bias_correction": True, "amsgrad": True}],
    ids=["complex", "real"],
)
def test_compiled_step(options, implementation):
    """One graph for the first step, which makes the state, and one for all others, whatever the lr tensor holds."""
    torch.compiler.reset()
    params, twin = make_params([(3,), (4, 5)]), make_params([(3,), (4, 5)])
    lr = torch.tensor(0.1)
    shared = {"lr": lr, "weight_decay": 0.1, **options, **implementation}
    ours, theirs = ComplexAdam(params, **shared), ComplexAdam(twin, **shared)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours.step, backend=counter, fullgraph=True)
    for i in range(5):
        lr.fill_(0.1 / (1 + i))
        set_grads(params, i)
        compiled()
        run(theirs, twin, 1, i)
        assert_all_close(params, twin, rtol=1e-7, atol=1e-9)
    assert counter.frame_count == 2
    assert all(s["step"].item() == 5 for s in ours.state.values())


def test_a_compiled_step_under_a_scheduler_that_cycles_the_momentum():
    torch.compiler.reset()
    params, twin = make_params([(3,)]), make_params([(3,)])
    ours, theirs = (ComplexAdam(p, lr=torch.tensor(0.1), betas=BETAS) for p in (params, twin))
    plans = [OneCycleLR(o, max_lr=0.2, total_steps=8) for o in (ours, theirs)]
    compiled = torch.compile(ours.step, backend="aot_eager")
    for i in range(4):
        set_grads(params, i)
        compiled()
        run(theirs, twin, 1, i)
        assert_all_close(params, twin, rtol=1e-7, atol=1e-9)
        for plan in plans:
            plan.step()
    assert ours.state[params[0]]["exp_avg_imag"].abs().min() > 0


@pytest.mark.parametrize("implementation", ["loop", "foreach", "fused"])
def test_the_form_may_change_between_compiled_steps(implementation):
    torch.compiler.reset()
    params, twin = make_params([(3,)]), make_params([(3,)])
    shared = {"lr": torch.tensor(0.1), "betas": (0.9, 0.99), "bias_correction": True, **IMPLEMENTATIONS[implementation]}
    ours, theirs = ComplexAdam(params, **shared), ComplexAdam(twin, **shared)
    compiled = torch.compile(ours.step, backend="aot_eager")
    for i in range(6):
        if i in (2, 4):
            for o in (ours, theirs):
                turned = {"betas": BETAS, "rescale_lr": True} if i == 2 else {"betas": (0.8, 0.9), "rescale_lr": False}
                o.param_groups[0].update(bias_correction=i == 4, **turned)
        set_grads(params, i)
        compiled()
        run(theirs, twin, 1, i)
        assert_all_close(params, twin, rtol=1e-7, atol=1e-9)


# ---- resources ------------------------------------------------------------------------------------------------------


@implementations
def test_no_growth_over_300_steps(implementation):
    model = torch.nn.Linear(6, 3)
    optimizer = ComplexAdam(model.parameters(), lr=0.01, **implementation)
    x = torch.randn(4, 6)

    def train(steps):
        for i in range(steps):
            optimizer.param_groups[0]["lr"] = 0.01 / (1 + i)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    assert train(300) <= train(30) + 16  # the lr of the last few steps


@implementations
def test_nothing_keeps_the_parameters_alive(implementation):
    params = make_params()
    optimizer = ComplexAdam(params, lr=0.1, **implementation)
    run(optimizer, params, 2)
    alive = (
        [weakref.ref(p) for p in params]
        + [weakref.ref(optimizer)]
        + [weakref.ref(t) for s in optimizer.state.values() for t in s.values()]
    )
    del params, optimizer
    gc.collect()
    assert [r() for r in alive] == [None] * len(alive)


def test_default_is_the_fused_kernel_where_it_is_native(monkeypatch):
    if not _ops.is_native("complex_adam_step_", "cpu"):
        pytest.skip("needs the native kernel")
    calls = []
    original = _ops.complex_adam_step_
    monkeypatch.setattr(_ops, "complex_adam_step_", lambda *a, **k: (calls.append(len(a[0])), original(*a, **k)))
    params = make_params()
    for implementation, wanted in (
        ({}, [5, 5]),
        ({"fused": True}, [5, 5]),
        ({"foreach": True}, []),
        ({"fused": False}, []),
        ({"foreach": False}, []),
    ):
        calls.clear()
        run(ComplexAdam(params, lr=0.1, **implementation), params, 2)
        assert calls == wanted, implementation


def test_trains_a_network():
    torch.manual_seed(0)
    x = torch.randn(128, 5)
    y = torch.sin(x @ torch.randn(5, 1))
    model = torch.nn.Sequential(torch.nn.Linear(5, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    optimizer = ComplexAdam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.15 * losses[0]
