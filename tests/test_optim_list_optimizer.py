"""What ExtraSGD, ExtraAdam, OptimisticSGD and OptimisticAdam must do as every torch.optim.Optimizer does."""

import copy
import gc
import inspect
import io
import pickle
import weakref

import numpy as np
import pytest
import torch
from helpers import FLOATING, LAYOUTS, Memory, all_same_bits, name_of, opmath, same_bits
from optimizers import assert_all_close, make_params, set_grads, state_tensors
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import Parameter
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, StepLR

import nestopt_ext
from nestopt_ext import ExtraAdam, ExtraSGD, OptimisticAdam, OptimisticSGD

SHAPES = [(), (3,), (4, 5), (2, 3, 4, 2), (0,)]
CLASSES = [ExtraSGD, ExtraAdam, OptimisticSGD, OptimisticAdam]
classes = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
adams = pytest.mark.parametrize("cls", [ExtraAdam, OptimisticAdam], ids=lambda cls: cls.__name__)
implementations = pytest.mark.parametrize("foreach", [None, True, False], ids=["default", "foreach", "loop"])


def run(optimizer, params, steps=4, first=0):
    for i in range(first, first + steps):
        set_grads(params, 2 * i)
        if hasattr(optimizer, "extrapolate"):
            optimizer.extrapolate()
            set_grads(params, 2 * i + 1)
        optimizer.step()
    return [p.detach().clone() for p in params]


def advance(optimizer):
    """What takes the gradients first."""
    (optimizer.extrapolate if hasattr(optimizer, "extrapolate") else optimizer.step)()


def snapshot(optimizer):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return Memory(params + state_tensors(optimizer))


def saved(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def plain(tensors):
    return [torch.view_as_real(t.detach()) if t.is_complex() else t.detach() for t in tensors]


# ---- face -----------------------------------------------------------------------------------------------------------


@classes
def test_is_a_torch_optimizer(cls):
    optimizer = cls(make_params(SHAPES), lr=0.25)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert getattr(nestopt_ext, cls.__name__) is cls and cls.__name__ in nestopt_ext.__all__
    arguments = inspect.signature(cls).parameters
    hyperparameters = {name: p.default for name, p in arguments.items() if name != "params"}
    assert optimizer.defaults.items() >= {**hyperparameters, "lr": 0.25}.items()
    assert hyperparameters["lr"] == 1e-3
    assert repr(optimizer).startswith(f"{cls.__name__} (") and "lr: 0.25" in repr(optimizer)
    theirs = inspect.signature(Adam if "betas" in arguments else SGD).parameters
    positional = [n for n, p in arguments.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == list(theirs)[: len(positional)]
    assert all(theirs[n].default == arguments[n].default for n in positional)


@classes
def test_parameters_that_cannot_be_optimized(cls):
    p = Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="empty parameter list"):
        cls([])
    with pytest.raises(ValueError, match="more than one parameter group"):
        cls([{"params": [p]}, {"params": [p]}])
    with pytest.raises(ValueError, match="non-leaf"):
        cls([p * 2])


@classes
def test_named_parameters(cls):
    model = torch.nn.Linear(3, 2)
    optimizer = cls(model.named_parameters(), lr=0.1)
    run(optimizer, list(model.parameters()), 2)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


# ---- hyperparameters ------------------------------------------------------------------------------------------------

BAD = [
    ({"lr": -0.1}, ValueError, "lr must be finite and >= 0; got -0.1"),
    ({"lr": float("nan")}, ValueError, "lr must be finite and >= 0; got nan"),
    ({"lr": True}, TypeError, "lr must be a number or a tensor; got True"),
    ({"lr": "0.1"}, TypeError, "lr must be a number or a tensor; got '0.1'"),
    ({"lr": torch.ones(2)}, ValueError, "lr must be a float32 or float64 tensor of one element"),
    ({"lr": torch.tensor(-1.0)}, ValueError, "lr must be finite and >= 0; got -1.0"),
    ({"weight_decay": -0.1}, ValueError, "weight_decay must be finite and >= 0; got -0.1"),
    ({"weight_decay": float("nan")}, ValueError, "weight_decay must be finite and >= 0; got nan"),
    ({"weight_decay": torch.tensor(0.1)}, TypeError, "weight_decay must be a number; got tensor"),
    ({"maximize": "no"}, TypeError, "maximize must be True or False; got 'no'"),
    ({"maximize": None}, TypeError, "maximize must be True or False; got None"),
    ({"foreach": 1}, TypeError, "foreach must be True or False; got 1"),
]
BAD_ADAM = [
    ({"betas": 0.9}, TypeError, "betas must be a pair of numbers; got 0.9"),
    ({"betas": (0.9,)}, TypeError, r"betas must be a pair of numbers; got \(0.9,\)"),
    ({"betas": (1.0, 0.9)}, ValueError, r"betas\[0\] must have modulus below 1; got 1.0"),
    ({"betas": (-0.5, 0.9)}, ValueError, r"betas\[0\] must be finite and >= 0; got -0.5"),
    ({"betas": (0.5j, 0.9)}, TypeError, r"betas\[0\] must be a number; got 0.5j"),
    ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must be below 1; got 1.0"),
    ({"betas": (0.9, -0.1)}, ValueError, r"betas\[1\] must be finite and >= 0; got -0.1"),
    ({"betas": (0.9, float("nan"))}, ValueError, r"betas\[1\] must be finite and >= 0; got nan"),
    ({"eps": -1e-8}, ValueError, "eps must be finite and >= 0; got -1e-08"),
    ({"eps": None}, TypeError, "eps must be a number; got None"),
    ({"amsgrad": "yes"}, TypeError, "amsgrad must be True or False; got 'yes'"),
]
BAD_OPTIMISTIC = [
    ({"optimism": -1}, ValueError, "optimism must be finite and >= 0; got -1"),
    ({"optimism": float("inf")}, ValueError, "optimism must be finite and >= 0; got inf"),
    ({"optimism": "1"}, TypeError, "optimism must be a number; got '1'"),
    ({"plain_first_step": 0}, TypeError, "plain_first_step must be True or False; got 0"),
]
CASES = [
    pytest.param(cls, *case, id=f"{cls.__name__}-{case[0]}")
    for cls, cases in (
        (ExtraSGD, BAD),
        (ExtraAdam, BAD + BAD_ADAM),
        (OptimisticSGD, BAD + BAD_OPTIMISTIC),
        (OptimisticAdam, BAD + BAD_ADAM + BAD_OPTIMISTIC),
    )
    for case in cases
]


@pytest.mark.parametrize(("cls", "bad", "kind", "message"), CASES)
def test_bad_hyperparameters_are_refused_whenever_they_come(cls, bad, kind, message):
    message = f"^{cls.__name__}: {message}"
    params = make_params(SHAPES)
    with pytest.raises(kind, match=message):
        cls(params, **bad)
    with pytest.raises(kind, match=message):
        cls([{"params": params, **bad}])
    optimizer = cls(params[:2])
    with pytest.raises(kind, match=message):
        optimizer.add_param_group({"params": params[2:], **bad})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": params[2:]})
    run(optimizer, params, 2)
    set_grads(params, 9)
    before = snapshot(optimizer)
    optimizer.param_groups[1].update(bad)
    with pytest.raises(kind, match=message):
        advance(optimizer)
    assert before.unchanged()
    checkpoint = optimizer.state_dict()
    with pytest.raises(kind, match=f"^{cls.__name__}.load_state_dict: {message[len(cls.__name__) + 3 :]}"):
        cls([{"params": params[:2]}, {"params": params[2:]}]).load_state_dict(checkpoint)


@classes
def test_a_momentum_is_not_taken_for_something_else(cls):
    """Where torch's SGD takes its momentum, these take nothing."""
    if "betas" not in inspect.signature(cls).parameters:
        with pytest.raises(TypeError, match="positional"):
            cls(make_params(SHAPES), 0.1, 0.9)


@classes
@implementations
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_lr_as_a_tensor_changed_in_place(dtype, shape, foreach, cls):
    lr, params, twin = torch.full(shape, 0.5, dtype=dtype), make_params(SHAPES), make_params(SHAPES)
    ours, theirs = cls(params, lr=lr, foreach=foreach), cls(twin, lr=0.5, foreach=foreach)
    for i in range(4):
        assert all_same_bits(run(ours, params, 1, i), run(theirs, twin, 1, i))
        lr.mul_(0.5)
        theirs.param_groups[0]["lr"] *= 0.5
    assert ours.param_groups[0]["lr"] is lr
    lr.fill_(float("nan"))
    before = snapshot(ours)
    set_grads(params, 0)
    with pytest.raises(ValueError, match=rf"^{cls.__name__}: lr must be finite and >= 0; got nan"):
        advance(ours)
    assert before.unchanged()


@classes
def test_numbers_of_numpy_count_as_numbers(cls):
    found = []
    for kind in (float, np.float64, np.float32):
        params = make_params(SHAPES)
        options = {"lr": kind(0.125), "weight_decay": kind(0.5)}
        if "betas" in inspect.signature(cls).parameters:
            options["betas"] = (kind(0.5), kind(0.75))
        optimizer = cls(params[:2], **options)
        optimizer.add_param_group({"params": params[2:], **options})
        found.append(run(optimizer, params))
        saved(optimizer)  # which refuses NumPy's scalars
    assert all_same_bits(found[0], found[1]) and all_same_bits(found[0], found[2])


@classes
@implementations
def test_groups_have_their_own_hyperparameters(foreach, cls):
    params, twin = make_params([(3,)] * 3), make_params([(3,)] * 3)
    own = [{}, {"lr": 0.5, "maximize": True}, {"weight_decay": 0.3}]
    optimizer = cls([{"params": [p], **o} for p, o in zip(params, own, strict=True)], lr=0.1, foreach=foreach)
    alone = [cls([p], **{"lr": 0.1, **o}, foreach=False) for p, o in zip(twin, own, strict=True)]
    run(optimizer, params)
    for i in range(4):
        for half in (0, 1) if hasattr(optimizer, "extrapolate") else (0,):
            set_grads(twin, 2 * i + half)
            for one in alone:
                (one.step if half or not hasattr(one, "extrapolate") else one.extrapolate)()
    assert all_same_bits(params, twin)


# ---- numbers common to all ------------------------------------------------------------------------------------------


@classes
@pytest.mark.parametrize("dtype", [*FLOATING, torch.complex64, torch.complex128], ids=name_of)
def test_foreach_is_the_loop_bit_for_bit(dtype, cls):
    found = []
    for foreach in (None, True, False):
        params = make_params(SHAPES, dtype)
        optimizer = cls(params, lr=0.05, weight_decay=0.1, maximize=True, foreach=foreach)
        for i in range(5):
            run(optimizer, params[1:] if i < 2 else params, 1, i)  # one parameter comes later
        found.append((plain(params), plain(state_tensors(optimizer))))
    for params, state in found[1:]:
        assert all_same_bits(params, found[0][0])
        assert all_same_bits(state, found[0][1])


@classes
@pytest.mark.parametrize("dtype", FLOATING, ids=name_of)
def test_state_has_the_dtype_of_the_arithmetic(dtype, cls):
    params = make_params(SHAPES, dtype)
    optimizer = cls(params)
    run(optimizer, params)
    for p in params:
        for name, value in optimizer.state[p].items():
            wanted = (torch.float32, ()) if name == "step" else (opmath(dtype), p.shape)
            assert (value.dtype, value.shape) == wanted and not value.requires_grad


@classes
@implementations
def test_complex_parameters_are_pairs_of_reals(foreach, cls):
    values = torch.randn(4, 3, dtype=torch.complex128)
    p, pair = Parameter(values.clone()), Parameter(torch.view_as_real(values).clone())
    ours, theirs = (cls([q], lr=0.1, weight_decay=0.1, foreach=foreach) for q in (p, pair))
    for i in range(6):
        grad = torch.randn(4, 3, dtype=torch.complex128, generator=torch.Generator().manual_seed(i))
        p.grad = grad.conj().resolve_conj().conj() if i % 2 else grad  # every second one lazily conjugated
        pair.grad = torch.view_as_real(grad)
        for one in (ours, theirs):
            (one.extrapolate if hasattr(one, "extrapolate") and i % 2 == 0 else one.step)()
    assert same_bits(torch.view_as_real(p.detach()), pair.detach())


@classes
@implementations
def test_mixed_dtypes_in_one_group(foreach, cls):
    dtypes = (*FLOATING, torch.float32, torch.complex64)
    params = [Parameter(torch.full((5,), 1.5, dtype=d)) for d in dtypes]
    optimizer = cls(params, lr=0.5, foreach=foreach)
    for _ in range(2):
        for half in ("extrapolate", "step"):
            if hasattr(optimizer, half):
                for p in params:
                    p.grad = torch.ones_like(p)
                getattr(optimizer, half)()
    moved = {ExtraSGD: 2, OptimisticSGD: 3, ExtraAdam: 2, OptimisticAdam: 3}[cls]
    for p in params:
        found = p.detach().real.double()
        torch.testing.assert_close(found, torch.full_like(found, 1.5 - 0.5 * moved), rtol=1e-6, atol=1e-6)


@classes
@implementations
def test_gradients_and_parameters_in_other_layouts(foreach, cls):
    p, twin = make_params([(2, 3, 4, 5)])[0], make_params([(2, 3, 4, 5)])[0]
    p.data = p.data.to(memory_format=torch.channels_last)
    base = torch.randn(40, 6, dtype=torch.float64)
    before = base.clone()
    strided = [Parameter(base[:, 1]), Parameter(base[::2, 3:5])]
    optimizer = cls([p, *strided], lr=0.1, foreach=foreach)
    other = cls([twin], lr=0.1, foreach=foreach)
    for i in range(6):
        half = "extrapolate" if hasattr(optimizer, "extrapolate") and i % 2 == 0 else "step"
        set_grads([p, *strided], i)
        set_grads([twin], i)
        p.grad = LAYOUTS["permuted"](p.grad)
        getattr(optimizer, half)()
        getattr(other, half)()
    torch.testing.assert_close(p, twin, rtol=1e-14, atol=1e-14)
    touched = torch.zeros_like(base, dtype=torch.bool)
    touched[:, 1] = touched[::2, 3:5] = True
    assert torch.equal(base[~touched], before[~touched])
    assert not (base[touched] == before[touched]).any()


@classes
@implementations
def test_autograd_is_told_and_gradients_are_only_read(foreach, cls):
    params = make_params([(3,), (2, 2)])
    optimizer = cls(params, weight_decay=0.1, maximize=True, foreach=foreach)
    for i in range(4):
        set_grads(params, i)
        grads, versions = Memory([p.grad for p in params]), [p._version for p in params]
        loss = sum(p.square().sum() for p in params)
        (optimizer.extrapolate if hasattr(optimizer, "extrapolate") and i % 2 == 0 else optimizer.step)()
        assert grads.unchanged()
        assert all(p._version > v for p, v in zip(params, versions, strict=True))
        assert all(p.is_leaf and p.requires_grad and p.grad_fn is None for p in params)
        assert all(not t.requires_grad and t.grad_fn is None for t in state_tensors(optimizer))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# ---- refused before anything moves ----------------------------------------------------------------------------------


def spoiled(name):
    """Parameters with gradients, the last of which is spoiled, and what is said of it."""
    params = make_params([(3,), (4,)], torch.float32)
    set_grads(params, 0)
    if name == "sparse":
        params[1].grad = params[1].grad.to_sparse()
        return params, TypeError, "the gradient of {} must be dense; got torch.sparse_coo. Use sparse=False"
    if name == "size":
        params[1].data = torch.ones(6)
        return params, ValueError, r"the gradient of {} must have its shape \(6,\) and dtype torch.float32; got \(4,\)"
    if name == "dtype":
        params[1].data = torch.ones(4, dtype=torch.float64)
        return params, ValueError, r"the gradient of {} must have its shape \(4,\) and dtype torch.float64"
    params[1] = torch.ones(1).expand(4).requires_grad_()
    params[1].grad = torch.ones(4)
    return params, ValueError, "{} must not overlap itself"


@classes
@implementations
@pytest.mark.parametrize("name", ["sparse", "size", "dtype", "expanded"])
def test_gradients_and_parameters_that_do_not_fit_are_refused_by_name(name, foreach, cls):
    for several in (False, True):
        params, kind, message = spoiled(name)
        groups = [{"params": [p]} for p in params] if several else params
        label = r"param_groups\[1\]\['params'\]\[0\]" if several else r"params\[1\]"
        optimizer = cls(groups, foreach=foreach)
        before = snapshot(optimizer)
        with pytest.raises(kind, match=f"^{cls.__name__}: " + message.replace("{}", label)):
            advance(optimizer)
        assert before.unchanged() and not optimizer.state


@pytest.mark.parametrize(
    ("cls", "name"), [(ExtraAdam, "exp_avg_sq"), (OptimisticSGD, "previous_direction"), (OptimisticAdam, "exp_avg")]
)
@pytest.mark.parametrize("value", [torch.ones(2), torch.ones(3, dtype=torch.float16), torch.ones(3, device="meta")])
def test_state_spoiled_behind_the_optimizer_is_refused(value, cls, name):
    params = make_params([(3,)] * 3, torch.float32)
    optimizer = cls(params)
    run(optimizer, params, 1)
    before = snapshot(optimizer)
    optimizer.state[params[1]][name] = value
    set_grads(params, 1)
    with pytest.raises(
        ValueError, match=rf"^{cls.__name__}: {name} of params\[1\] must be torch.float32 of shape \(3,\)"
    ):
        advance(optimizer)
    assert before.unchanged()


# ---- state ----------------------------------------------------------------------------------------------------------


@classes
@implementations
@pytest.mark.parametrize("dtype", [*FLOATING, torch.complex64], ids=name_of)
def test_resume_is_exact(dtype, foreach, cls):
    params = make_params(SHAPES, dtype)
    optimizer = cls(params, lr=0.1, weight_decay=0.1, foreach=foreach)
    run(optimizer, params, 3)
    checkpoint, kept = saved(optimizer), [p.detach().clone() for p in params]
    straight = run(optimizer, params, 3, first=3)
    again = [Parameter(p) for p in kept]
    restored = cls(again, lr=0.7)
    restored.load_state_dict(checkpoint)
    assert restored.param_groups[0]["lr"] == 0.1
    assert all_same_bits(plain(straight), plain(run(restored, again, 3, first=3)))


@classes
def test_loading_copies(cls):
    params, twin = make_params(SHAPES), make_params(SHAPES)
    optimizer, other = cls(params), cls(twin)
    run(optimizer, params, 2)
    other.load_state_dict(optimizer.state_dict())
    before = snapshot(optimizer)
    run(other, twin, 2)
    assert before.unchanged()


@classes
def test_a_checkpoint_loads_into_another_dtype(cls):
    params = make_params(SHAPES)
    optimizer = cls(params)
    run(optimizer, params, 2)
    for dtype in FLOATING:
        other = make_params(SHAPES, dtype)
        restored = cls(other)
        restored.load_state_dict(saved(optimizer))
        for a, b in zip(optimizer.state.values(), restored.state.values(), strict=True):
            assert all(same_bits(a[n] if n == "step" else a[n].to(opmath(dtype)), b[n]) for n in a)
        run(restored, other, 1)


@classes
def test_deepcopy_and_pickle_make_independent_copies(cls):
    model = torch.nn.Linear(3, 2).double()
    params = list(model.parameters())
    optimizer = cls(params, lr=0.1)
    run(optimizer, params, 2)
    copies = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    before = snapshot(optimizer)
    found = [run(other, list(other_model.parameters()), 2, first=2) for other_model, other in copies]
    assert before.unchanged()
    straight = run(optimizer, params, 2, first=2)
    assert all(all_same_bits(straight, f) for f in found)


NAMES = {
    ExtraSGD: set(),
    ExtraAdam: {"step", "exp_avg", "exp_avg_sq"},
    OptimisticSGD: {"previous_direction"},
    OptimisticAdam: {"step", "exp_avg", "exp_avg_sq"},
}


@classes
@implementations
def test_state_dict_is_plain(foreach, cls):
    params = make_params(SHAPES)
    optimizer = cls(params, foreach=foreach)
    run(optimizer, params, 2)
    state = optimizer.state_dict()["state"]
    assert [set(s) for s in state.values()] == ([NAMES[cls]] * len(params) if NAMES[cls] else [])
    assert all(type(t) is torch.Tensor for s in state.values() for t in s.values())


HOSTILE = {
    "short": ("exp_avg", torch.ones(2), ValueError, r"\['exp_avg'\] must have the shape of its parameter \(3,\)"),
    "text": ("exp_avg_sq", "abc", TypeError, r"\['exp_avg_sq'\] must be a tensor; got 'abc'"),
    "alone": ("exp_avg", None, ValueError, " must hold step, exp_avg, exp_avg_sq together; got no exp_avg"),
    "no-count": ("step", None, ValueError, " must hold step, exp_avg, exp_avg_sq together; got no step"),
    "nan-count": ("step", torch.tensor(float("nan")), ValueError, r"\['step'\] must be a count of steps"),
    "negative-count": ("step", -1, ValueError, r"\['step'\] must be a count of steps"),
}


@adams
@pytest.mark.parametrize("fault", HOSTILE)
def test_hostile_checkpoints_are_refused_and_nothing_changes(fault, cls):
    name, value, kind, message = HOSTILE[fault]
    params = make_params(SHAPES)
    optimizer = cls(params)
    run(optimizer, params, 2)
    checkpoint = saved(optimizer)
    checkpoint["state"][1][name] = value
    before = snapshot(optimizer)
    with pytest.raises(kind, match=rf"^{cls.__name__}.load_state_dict: state\[1\]{message}"):
        optimizer.load_state_dict(checkpoint)
    assert before.unchanged()
    run(optimizer, params, 1)


@adams
def test_a_count_that_is_a_plain_number_loads(cls):
    params, twin = make_params(SHAPES), make_params(SHAPES)
    optimizer, other = cls(params), cls(twin)
    run(optimizer, params, 2)
    checkpoint = saved(optimizer)
    for state in checkpoint["state"].values():
        state["step"] = int(state["step"])
    for p, q in zip(twin, params, strict=True):
        p.data.copy_(q)
    other.load_state_dict(checkpoint)
    assert all_same_bits(run(optimizer, params, 2, 2), run(other, twin, 2, 2))


# ---- closures, hooks, schedulers, scaling ---------------------------------------------------------------------------


@classes
def test_closure_runs_with_gradients_and_its_first_value_is_returned(cls):
    p = Parameter(torch.tensor([2.0]))
    optimizer = cls([p], lr=0.25)
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
    assert modes == [True] * (2 if hasattr(optimizer, "extrapolate") else 1)
    assert p.item() < 2.0


@classes
def test_hooks_run_around_a_step_and_a_load(cls):
    p = Parameter(torch.ones(1))
    optimizer = cls([p], lr=0.1)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("load post"))
    handle = optimizer.register_load_state_dict_pre_hook(
        lambda _, s: {**s, "param_groups": [{**g, "lr": 0.75} for g in s["param_groups"]]}
    )
    optimizer.step(lambda: seen.append("closure"))
    optimizer.load_state_dict(optimizer.state_dict())
    closures = ["closure"] * (2 if hasattr(optimizer, "extrapolate") else 1)
    assert seen == ["pre", *closures, "post", "load post"]
    assert optimizer.param_groups[0]["lr"] == 0.75
    handle.remove()
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 0


SCHEDULERS = {
    "step": lambda o: StepLR(o, 2, 0.5),
    "cosine": lambda o: CosineAnnealingLR(o, 6),
    "lambda": lambda o: LambdaLR(o, lambda i: 1 / (1 + i)),
    "one-cycle": lambda o: OneCycleLR(o, max_lr=0.2, total_steps=8, cycle_momentum="betas" in o.defaults),
}


@classes
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.filterwarnings("error:Detected call of `lr_scheduler.step")
def test_schedulers_set_what_the_step_uses(scheduler, cls):
    params, twin, theirs = (make_params(SHAPES) for _ in range(3))
    optimizer, by_hand = cls(params, lr=0.1), cls(twin, lr=0.1)
    reference = (Adam if "betas" in optimizer.defaults else SGD)(theirs, lr=0.1)
    plan, wanted = SCHEDULERS[scheduler](optimizer), SCHEDULERS[scheduler](reference)
    for i in range(7):
        group = reference.param_groups[0]
        by_hand.param_groups[0]["lr"] = float(group["lr"])
        if "betas" in group:
            by_hand.param_groups[0]["betas"] = group["betas"]
        assert all_same_bits(run(optimizer, params, 1, i), run(by_hand, twin, 1, i))
        set_grads(theirs, 0)
        reference.step()
        plan.step()
        wanted.step()
        assert optimizer.param_groups[0]["lr"] == reference.param_groups[0]["lr"]


@pytest.mark.parametrize("cls", [OptimisticSGD, OptimisticAdam], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("bad_step", [0, 2], ids=["first", "later"])
def test_grad_scaler_skips_a_step_as_if_it_had_not_been(bad_step, cls):
    params, twin = make_params(SHAPES, torch.float32), make_params(SHAPES, torch.float32)
    optimizer, other = cls(params, lr=0.1), cls(twin, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for i in range(5):
        scaler.scale(torch.zeros(()))  # makes the scale
        set_grads(params, i)
        set_grads(twin, i)
        for p in params:
            p.grad *= scaler.get_scale()
        if i == bad_step:
            params[2].grad[0, 0] = float("inf")
        else:
            other.step()
        scaler.step(optimizer)
        scaler.update()
        assert all_same_bits(params, twin)  # a power of two scales without rounding
        assert all_same_bits(state_tensors(optimizer), state_tensors(other))
    assert scaler.get_scale() == 512.0


# ---- compiled -------------------------------------------------------------------------------------------------------


@classes
@pytest.mark.parametrize("foreach", [None, False], ids=["default", "loop"])
def test_compiled_steps(foreach, cls):
    """Nothing is compiled again after the second step, whatever the lr tensor and the count of steps hold."""
    torch.compiler.reset()
    params, twin = make_params([(3,), (), (4, 5)]), make_params([(3,), (), (4, 5)])
    lr = torch.tensor(0.1)
    ours, theirs = (cls(p, lr=lr, weight_decay=0.1, foreach=foreach) for p in (params, twin))
    counter = CompileCounterWithBackend("aot_eager")
    halves = [name for name in ("extrapolate", "step") if hasattr(cls, name)]
    compiled = {name: torch.compile(getattr(ours, name), backend=counter, fullgraph=True) for name in halves}
    frames = []
    for i in range(6):
        lr.fill_(0.1 / (1 + i))
        for k, name in enumerate(halves):
            for group in (params, twin):
                set_grads(group, 2 * i + k)
            compiled[name]()
            getattr(theirs, name)()
            assert_all_close(params, twin, rtol=1e-7, atol=1e-9)
        frames.append(counter.frame_count)
    assert frames[1:] == [frames[1]] * 5


# ---- resources ------------------------------------------------------------------------------------------------------


@classes
def test_no_growth_over_200_steps(cls):
    params = make_params(SHAPES)
    optimizer = cls(params, lr=0.01)

    def train(steps):
        run(optimizer, params, steps)
        gc.collect()
        return len(gc.get_objects())

    before = train(10)
    assert train(200) <= before + 50


@classes
def test_nothing_keeps_the_parameters_alive(cls):
    params = make_params(SHAPES)
    optimizer = cls(params, lr=0.1)
    run(optimizer, params, 2)
    alive = [weakref.ref(o) for o in (*params, optimizer, *state_tensors(optimizer))]
    del params, optimizer
    gc.collect()
    assert [r() for r in alive] == [None] * len(alive)


@classes
def test_trains_a_network(cls):
    torch.manual_seed(0)
    x = torch.randn(128, 5)
    y = torch.sin(x @ torch.randn(5, 1))
    model = torch.nn.Sequential(torch.nn.Linear(5, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    optimizer = cls(model.parameters(), lr=0.01 if "Adam" in cls.__name__ else 0.1)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(200)]
    assert losses[-1] < 0.25 * losses[0]


@classes
@pytest.mark.gpu
def test_on_a_gpu_the_numbers_are_those_of_the_cpu(cls):
    for lr in (0.1, torch.tensor(0.1), torch.tensor(0.1, device="cuda")):
        params, twin = make_params(SHAPES), make_params(SHAPES, device="cuda")
        options = {"weight_decay": 0.1}
        wanted = run(cls(params, lr=float(lr), **options), params)
        optimizer = cls(twin, lr=lr, **options)
        found = run(optimizer, twin)
        assert_all_close([f.cpu() for f in found], wanted, rtol=1e-6, atol=1e-8)
        other = make_params(SHAPES, device="cuda")
        restored = cls(other)
        restored.load_state_dict(saved(optimizer))
        run(restored, other, 1)
