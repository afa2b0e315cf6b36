"""complex_adam_step_ against a recurrence in extended precision, in every layout, dtype and role of its arguments."""

import cmath
import gc
import itertools

import numpy as np
import pytest
import torch
from helpers import (
    FLOATING,
    LAYOUTS,
    SHAPES,
    Memory,
    all_same_bits,
    as_number,
    assert_as_good_as,
    contiguous,
    exact,
    expanded,
    name_of,
    opmath,
    product,
    random_lists,
)
from torch._dynamo.testing import CompileCounterWithBackend

from nestopt_ext import _ops, _reference

#: Places of the lists.
PARAMS, GRADS, AVGS, IMAG, SQS, MAXS, STEPS = range(7)
COMPLEX = cmath.rect(0.8, 0.4)
#: Which averages there are, and beta1.
AVERAGES = {
    "real": (0.9, False, False),
    "real_amsgrad": (-0.5, False, True),
    "complex": (COMPLEX, True, False),
    "complex_amsgrad": (COMPLEX, True, True),
    "real_with_imag": (0.7, True, False),
}
OPTIONS = [
    {},
    {"weight_decay": 0.05, "beta2": 0.9, "eps": 1e-3},
    {"weight_decay": 0.05, "decoupled_weight_decay": True},
    {"maximize": True, "grad_scale": 7.3, "eps": 0.0},
    {
        "maximize": True,
        "weight_decay": 0.01,
        "decoupled_weight_decay": True,
        "grad_scale": 0.3,
        "beta2": 0.0,
        "eps": 0.5,
    },
]


def make(shapes, dtypes, averages="complex", device="cpu", layouts=(contiguous,) * 6):
    """The seven lists, with random values, each in its layout; every tensor has a step of its own.

    The squares are away from 0, so that no step is far larger than its param, and rounding shows in either.
    """
    rows = [(d, d, *[opmath(d)] * 4) for d in dtypes]
    lists = random_lists(shapes, rows, layouts, device)
    for list_ in (lists[SQS], lists[MAXS]):
        for t in list_:
            t.abs_().add_(0.25)
    _, is_complex, amsgrad = AVERAGES[averages]
    if not is_complex:
        lists[IMAG] = []
    if not amsgrad:
        lists[MAXS] = []
    forms = [((), torch.float32), ((1,), torch.float64), ((1, 1), torch.float32)]
    steps = []
    for i in range(len(shapes)):
        shape, dtype = forms[i % 3]
        steps.append(torch.full(shape, float(i // 2 % 5 * 7), dtype=dtype, device=device))
    return [*lists, steps]


def recurrence(
    lists,
    *,
    lr=0.1,
    beta1=COMPLEX,
    beta2=0.999,
    eps=1e-8,
    weight_decay=0.0,
    decoupled_weight_decay=False,
    bias_correction=False,
    maximize=False,
    grad_scale=1.0,
):
    """One step, written out in extended complex precision. Returns what the lists will hold, but for the gradients."""
    wide = np.longdouble
    beta = np.clongdouble(beta1)
    out = [[] for _ in lists]
    for i in range(len(lists[PARAMS])):
        p, g, m, v = (exact(lists[k][i]) for k in (PARAMS, GRADS, AVGS, SQS))
        imag = exact(lists[IMAG][i]) if lists[IMAG] else np.zeros_like(p)
        t = lists[STEPS][i].double().item() + 1
        g = (-g if maximize else g) / wide(grad_scale)
        if decoupled_weight_decay:
            p = p - wide(lr) * wide(weight_decay) * p
        else:
            g = g + (wide(weight_decay) * p if weight_decay else 0)
        # In parts, since a product with 1j makes a NaN of an infinity.
        real = beta.real * m - beta.imag * imag + (1 - beta.real if bias_correction else 1) * g
        imag = beta.imag * m + beta.real * imag
        v = wide(beta2) * v + (1 - wide(beta2)) * g**2
        largest = np.maximum(exact(lists[MAXS][i]), v) if lists[MAXS] else v
        rate = wide(lr) / (1 - beta.real**t) if bias_correction else wide(lr)
        p = p - rate * real / (np.sqrt(largest) / np.sqrt(1 - wide(beta2) ** t) + wide(eps))
        for k, value in ((PARAMS, p), (AVGS, real), (IMAG, imag), (SQS, v), (MAXS, largest)):
            if lists[k]:
                out[k].append(value)
        out[STEPS].append(np.full(tuple(lists[STEPS][i].shape), t, dtype=wide))
    return out


def step(lists, lr=0.1, grad_scale=None, function=None, **scalars):
    """Calls the op; ``lr`` and ``grad_scale`` may be numbers."""
    grad_scale = as_number(grad_scale, lists[PARAMS][0].device)
    (function or _ops.complex_adam_step_)(*lists, as_number(lr), grad_scale=grad_scale, **scalars)


def reference_step(*lists, beta1, **scalars):
    with torch.no_grad():
        _reference.complex_adam_step_(*lists, beta1=beta1.real, beta1_imag=beta1.imag, **scalars)


def check(lists, beta1=COMPLEX, **scalars):
    """Takes a step on ``lists`` and judges it: numbers, and memory that was not to be touched."""
    twin = [[contiguous(t) for t in list_] for list_ in lists]
    truth = recurrence(lists, beta1=beta1, **scalars)
    memory = Memory(t for list_ in lists for t in list_)
    step(lists, beta1=beta1, **scalars)
    step(twin, beta1=beta1, function=reference_step, **scalars)
    written = [k for k in range(7) if k != GRADS]
    for k in written:
        assert_as_good_as(lists[k], twin[k], truth[k])
    assert all_same_bits(lists[STEPS], twin[STEPS])
    assert memory.changed_only([t for k in written for t in lists[k]])


#: The arithmetic on 16 bits is that of float32.
CASES = [(d, o) for d in FLOATING for o in (OPTIONS if d.itemsize > 2 else OPTIONS[::4])]


@pytest.mark.parametrize(("dtype", "options"), CASES, ids=lambda x: "-".join(x) if isinstance(x, dict) else name_of(x))
@pytest.mark.parametrize("averages", AVERAGES)
def test_equals_the_recurrence(dtype, averages, options, device):
    lists = make(SHAPES, [dtype], averages, device)
    beta1 = AVERAGES[averages][0]
    check(lists, beta1, **options)
    check(lists, beta1, **options)  # from a state that the op has written
    if beta1.imag == 0:
        check(lists, beta1, bias_correction=True, **options)


def test_mixed_dtypes_in_one_list(device):
    for averages, (beta1, _, _) in AVERAGES.items():
        check(make(SHAPES * 2, [*FLOATING, torch.float32], averages, device), beta1, weight_decay=0.1)


def test_a_step_of_known_numbers(device):
    """m = (1 + 2i)(3 + 4i)/10 + 8 = 7.5 + i; v = 0.25 * 8^2 = 16; its root over that of 1 - 0.75 is 8;
    p = 10 - 0.5 * 7.5 / (8 + 2)."""
    for dtype in FLOATING:
        p, g = torch.tensor([10.0], dtype=dtype, device=device), torch.tensor([8.0], dtype=dtype, device=device)
        m, c, v = (torch.tensor([x], dtype=opmath(dtype), device=device) for x in (3.0, 4.0, 0.0))
        t = torch.zeros((), device=device)
        step([[p], [g], [m], [c], [v], [], [t]], lr=0.5, beta1=0.1 + 0.2j, beta2=0.75, eps=2.0)
        assert p.item() == pytest.approx(9.625, rel=1e-6)
        assert m.item() == pytest.approx(7.5, rel=1e-6)
        assert c.item() == pytest.approx(1.0, rel=1e-6)
        assert v.item() == 16.0 and t.item() == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_every_element_is_right_to_a_few_roundings(dtype, device):
    """From p = 0 and with m = g the new p is the step. Each factor, operation and constant rounds once: 4 for v, which
    the root halves, and 7 more from there on."""
    n = 100_000
    lists = make([(n,)], [dtype], "real", device)
    lists[PARAMS][0].zero_()
    lists[GRADS][0].mul_(torch.logspace(-6, 6, n, device=device))
    lists[SQS][0].mul_(torch.logspace(-12, 12, n, device=device))
    truth = recurrence(lists, lr=0.3, beta1=0.0, beta2=0.5)[PARAMS][0]
    step(lists, lr=0.3, beta1=0.0, beta2=0.5)
    error = np.abs(exact(lists[PARAMS][0]) - truth) / np.abs(truth)
    assert error.max() <= 9.1 * torch.finfo(dtype).eps / 2


@pytest.mark.parametrize(
    "option", product(amsgrad=[False, True], decoupled=[False, True], maximize=[False, True], lr=[1e-3, 0.1]), ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_a_corrected_real_momentum_is_adam(option, dtype, device):
    """Ten steps; each rounds a handful of times, by half an ulp of numbers up to 4."""
    p = torch.randn(50, 3, dtype=dtype, device=device)
    lists = [[p.clone()], None, *([torch.zeros_like(p)] for _ in range(4)), [torch.zeros((), device=device)]]
    lists[IMAG] = []
    if not option["amsgrad"]:
        lists[MAXS] = []
    make_theirs = torch.optim.AdamW if option["decoupled"] else torch.optim.Adam
    leaf = p.clone().requires_grad_()
    theirs = make_theirs(
        [leaf],
        lr=option["lr"],
        betas=(0.8, 0.99),
        weight_decay=0.1,
        amsgrad=option["amsgrad"],
        maximize=option["maximize"],
        foreach=False,
    )
    for i in range(10):
        leaf.grad = torch.randn_like(p) * (1 + i % 3)
        lists[GRADS] = [leaf.grad.clone()]
        step(
            lists,
            lr=option["lr"],
            beta1=0.8,
            beta2=0.99,
            weight_decay=0.1,
            decoupled_weight_decay=option["decoupled"],
            bias_correction=True,
            maximize=option["maximize"],
        )
        theirs.step()
    state = theirs.state[leaf]
    bound = {"rtol": 30 * torch.finfo(dtype).eps, "atol": 30 * torch.finfo(dtype).eps}
    torch.testing.assert_close(lists[PARAMS][0], leaf.detach(), **bound)
    torch.testing.assert_close(lists[AVGS][0], state["exp_avg"], **bound)
    torch.testing.assert_close(lists[SQS][0], state["exp_avg_sq"], **bound)
    if option["amsgrad"]:
        torch.testing.assert_close(lists[MAXS][0], state["max_exp_avg_sq"], **bound)
    assert lists[STEPS][0] == state["step"] == 10


def test_every_tensor_counts_its_own_steps(device):
    """Also one without elements, and in a list where neighbours have the same step or not."""
    shapes = [(3,), (0,), (2,), (4,), (1,)]
    lists = make(shapes, [torch.float32, torch.float64, torch.bfloat16], "real", device)
    lists[STEPS] = [torch.tensor(float(t), device=device) for t in (0, 5, 5, 0, 1000)]
    check(lists, 0.9, bias_correction=True)
    assert [t.item() for t in lists[STEPS]] == [1, 6, 6, 1, 1001]


def test_steps_of_double_precision_count_beyond_float(device):
    lists = make([(3,)], [torch.float32], "real", device)
    lists[STEPS] = [torch.tensor(2.0**24, dtype=torch.float64, device=device)]
    step(lists, beta1=0.9)
    assert lists[STEPS][0].item() == 2**24 + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("grad_layout", [*LAYOUTS.values(), expanded], ids=lambda f: f.__name__)
@pytest.mark.parametrize("param_layout", LAYOUTS.values(), ids=lambda f: f.__name__)
def test_layouts(param_layout, grad_layout, dtype, device):
    shapes = [(4, 6, 5, 3), (3, 33, 17, 13), (5, 2), (7,), (), (0, 3)]
    scattered = (contiguous, LAYOUTS["permuted"], LAYOUTS["every_other"], param_layout)
    # Where both are alike for every set of operands, else for all of them at once.
    for averages in AVERAGES if param_layout is grad_layout else ("complex_amsgrad",):
        for layouts in ((param_layout, grad_layout, *[param_layout] * 4), (param_layout, grad_layout, *scattered)):
            check(make(shapes, [dtype], averages, device, layouts), AVERAGES[averages][0], weight_decay=0.1)


@pytest.mark.parametrize("dims", [9, 11])
def test_more_dimensions_than_a_kernel_walks(dims, device):
    """No two of the dimensions can be joined, so the tensor is cut; all parts have its step."""

    def scattered(values):
        wide = values.new_full((3,) * dims, 7.0)
        return wide[(slice(0, 2),) * dims].copy_(values)

    def reversed_(values):
        return scattered(values.permute(*reversed(range(dims)))).permute(*reversed(range(dims)))

    layouts = (scattered, contiguous, reversed_, scattered, contiguous, reversed_)
    check(make([(2,) * dims] * 3, [torch.float32], "complex_amsgrad", device, layouts))


def test_strided_equals_contiguous_bit_for_bit(native):
    for dtype in FLOATING:
        for averages, (beta1, _, _) in AVERAGES.items():
            lists = make([(3, 33, 17, 13), (9, 5, 2, 2)], [dtype], averages)
            strided = [[LAYOUTS["every_other"](t) for t in list_] for list_ in lists[:STEPS]]
            strided.append([t.clone() for t in lists[STEPS]])
            for list_ in (lists, strided):
                step(list_, beta1=beta1, weight_decay=0.1)
            assert all(all_same_bits(a, b) for a, b in zip(lists, strided, strict=True))


def test_views_of_one_storage(device):
    """Every list, the steps too, lies in one buffer: as interleaved columns, then as slices that touch."""
    base = torch.randn(4001, 7, device=device).abs_()
    check([[base[:, k]] for k in range(6)] + [[base[0, 6]]])
    flat = torch.randn(6 * 1001 + 2, device=device).abs_()
    parts = flat.split([1001] * 6 + [1, 1])
    check([[t] for t in parts[:7]])


def test_thousands_of_tensors(device):
    shapes = [((), (1,), (2, 2), (0,), (9,))[i % 5] for i in range(3500)]
    dtypes = [torch.float32, torch.bfloat16, torch.float64]
    check(make(shapes, dtypes, "complex_amsgrad", device), weight_decay=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_lr_of_any_shape_of_one_element(dtype, device):
    results = []
    for lr in (
        torch.tensor(0.1, dtype=dtype),
        torch.tensor([0.1], dtype=dtype),
        torch.tensor([[0.1]], dtype=dtype, device=device),
    ):
        torch.manual_seed(0)
        lists = make(SHAPES, [torch.float32, torch.bfloat16], "complex", device)
        step(lists, lr=lr, beta1=COMPLEX, weight_decay=0.1, decoupled_weight_decay=True)
        results.append(lists[PARAMS])
    assert all_same_bits(results[0], results[1])
    assert all_same_bits(results[0], results[2])


def test_numbers_keep_full_precision_for_double_params():
    p, g = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    lists = [[p], [g], [torch.zeros_like(p)], [], [torch.zeros_like(p)], [], [torch.zeros(())]]
    step(lists, lr=0.1, beta1=0.0, beta2=0.0, eps=0.0)
    assert p.item() == -0.1
    step(lists, lr=torch.tensor(0.1), beta1=0.0, beta2=0.0, eps=0.0)
    assert p.item() == -0.1 - float(np.float32(0.1))


@pytest.mark.parametrize(
    "flag", [torch.tensor(1.0), torch.tensor([1.0], dtype=torch.float64), torch.tensor(float("nan"))], ids=str
)
def test_found_inf_keeps_everything(flag, device):
    lists = make(SHAPES, FLOATING, "complex_amsgrad", device)
    lists[GRADS][4][0] = float("inf")
    memory = Memory(t for list_ in lists for t in list_)
    step(lists, beta1=COMPLEX, found_inf=flag.to(device), grad_scale=2.0, weight_decay=0.1)
    assert memory.changed_only([])


def test_found_inf_of_zero_takes_the_step(device):
    lists = make(SHAPES, FLOATING, "complex_amsgrad", device)
    twin = [[t.clone() for t in list_] for list_ in lists]
    step(lists, beta1=COMPLEX, found_inf=torch.zeros(1, device=device))
    step(twin, beta1=COMPLEX)
    assert all(all_same_bits(a, b) for a, b in zip(lists, twin, strict=True))


@pytest.mark.parametrize("averages", AVERAGES)
def test_special_values_go_where_the_formula_sends_them(averages, device):
    """NaN and infinity in each list in turn: the same elements are NaN, or infinite, as in the recurrence; the others
    stay right. The maximum keeps a NaN of either side."""
    beta1 = AVERAGES[averages][0]
    for dtype in FLOATING:
        for spoiled in (PARAMS, GRADS, AVGS, IMAG, SQS, MAXS):
            lists = make([(40,)], [dtype], averages, device)
            if not lists[spoiled]:
                continue
            lists[spoiled][0][3] = float("nan")
            lists[spoiled][0][17] = float("inf")
            with np.errstate(invalid="ignore"):
                truth = recurrence(lists, beta1=beta1)
            step(lists, beta1=beta1)
            for k in (PARAMS, AVGS, IMAG, SQS, MAXS):
                for found, wanted in zip(lists[k], truth[k], strict=True):
                    assert np.array_equal(np.isnan(exact(found)), np.isnan(wanted)), (dtype, spoiled, k)
                    fits = np.isclose(exact(found).astype(float), wanted.astype(float), rtol=2e-2, equal_nan=True)
                    assert fits.all(), (dtype, spoiled, k)


def test_no_weight_decay_leaves_an_infinite_param_out_of_the_averages(device):
    lists = make([(5,)], [torch.float32], "complex_amsgrad", device)
    lists[PARAMS][0].fill_(float("inf"))
    step(lists, beta1=COMPLEX)
    assert all(bool(lists[k][0].isfinite().all()) for k in (AVGS, IMAG, SQS, MAXS))


def test_zero_over_zero_is_not_hidden(device):
    """Without eps a gradient that was always zero has no direction, as in torch.optim.Adam."""
    lists = [[torch.zeros(3, device=device)] for _ in range(3)]
    lists = [*lists, [], [torch.zeros(3, device=device)], [], [torch.zeros((), device=device)]]
    step(lists, beta1=0.9, eps=0.0)
    assert bool(lists[PARAMS][0].isnan().all())
    lists[PARAMS][0].zero_()
    step(lists, beta1=0.9)
    assert lists[PARAMS][0].tolist() == [0.0] * 3


def test_the_same_bits_on_any_number_of_threads():
    results = []
    for threads in (1, 2, 5, 1):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        lists = make([*SHAPES, (70000,), (1,), (300, 301)], FLOATING, "complex_amsgrad")
        lists[PARAMS][5] = LAYOUTS["every_other"](lists[PARAMS][5])
        step(lists, beta1=COMPLEX, weight_decay=0.1)
        results.append([t for list_ in lists for t in list_])
    assert all(all_same_bits(results[0], other) for other in results[1:])


def test_autograd_is_told_of_every_write(device):
    lists = make([(3,), (0,), (2, 2)], [torch.float32], "complex_amsgrad", device)
    before = [[t._version for t in list_] for list_ in lists]
    step(lists, beta1=COMPLEX)
    for k, list_ in enumerate(lists):
        for t, version in zip(list_, before[k], strict=True):
            assert (t._version == version) if k == GRADS else (t._version > version)


def test_gradients_with_a_graph_leave_no_graph_behind(device):
    lists = make([(3,)], [torch.float32], "complex_amsgrad", device)
    lists[GRADS] = [torch.ones(3, device=device, requires_grad=True) * 2]
    with torch.no_grad():
        step(lists, beta1=COMPLEX)
    assert not any(t.requires_grad for k, list_ in enumerate(lists) if k != GRADS for t in list_)


def test_in_inference_mode(device):
    with torch.inference_mode():
        check(make([(5,), (2, 3)], FLOATING, "complex_amsgrad", device))


def test_copy_on_write_lists():
    base = torch.ones(100)
    lists = [[torch._lazy_clone(base)] for _ in range(6)] + [[torch._lazy_clone(torch.zeros(()))]]
    step(lists, lr=0.5, beta1=COMPLEX)
    assert float(base.sum()) == 100.0 and float(lists[GRADS][0].sum()) == 100.0
    assert float(lists[PARAMS][0].sum()) < 100.0 and lists[STEPS][0] == 1


def test_no_memory_beside_the_state(native):
    lists = make([(1000, 1000), (300, 301)], [torch.float32, torch.bfloat16], "complex_amsgrad")
    lists[PARAMS][1] = LAYOUTS["every_other"](lists[PARAMS][1])
    lr = torch.tensor(0.1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(lists, lr=lr, beta1=COMPLEX, weight_decay=0.1)
    assert max((abs(e.self_cpu_memory_usage) for e in profile.events()), default=0) < 1024


def test_no_growth_and_nothing_kept():
    lists = make([(10,)] * 20, [torch.float32], "complex_amsgrad")
    for _ in range(3):
        step(lists, beta1=COMPLEX)
    gc.collect()
    tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    for _ in range(50):
        step(lists, beta1=COMPLEX)
    gc.collect()
    assert sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()) <= tensors


@pytest.mark.parametrize("sample", product(averages=list(AVERAGES), scaled=[False, True]), ids=str)
def test_opcheck(sample, device):
    layouts = (LAYOUTS["permuted"], *[contiguous] * 5)
    lists = make([(3, 2), (), (0,), (5,)], [torch.float32, torch.half], sample["averages"], device, layouts)
    beta1 = AVERAGES[sample["averages"]][0]
    optional = (
        {"grad_scale": torch.tensor(2.0, device=device), "found_inf": torch.zeros((), device=device)}
        if sample["scaled"]
        else {}
    )
    kwargs = dict(beta1=beta1.real, beta1_imag=beta1.imag, weight_decay=0.1, **optional)
    lr = torch.full((1,) if sample["scaled"] else (), 0.1)
    torch.library.opcheck(torch.ops.nestopt_ext.complex_adam_step_.default, (*lists, lr), kwargs)


def test_fake_and_meta_tensors_are_checked_and_left_alone():
    lists = [[t.to("meta") for t in list_] for list_ in make([(3,), (2, 2)], [torch.float32, torch.float16])]
    step(lists, beta1=COMPLEX)
    step(lists, lr=torch.tensor(0.1, device="meta"), beta1=COMPLEX)
    with torch._subclasses.FakeTensorMode():
        step(make([(3,), (2, 2)], FLOATING), beta1=COMPLEX)
        lists = make([(3,), (2, 2)], FLOATING)
        lists[STEPS][1] = torch.zeros(2)
        with pytest.raises(
            ValueError, match=r"complex_adam_step_: steps\[1\] must have one element; got shape \(2,\)\."
        ):
            step(lists, beta1=COMPLEX)


# ---- the definition under autograd and torch.compile ----------------------------------------------------------------


@pytest.mark.parametrize(
    "option",
    product(amsgrad=[False, True], decoupled_weight_decay=[False, True], bias_correction=[False, True]),
    ids=str,
)
def test_the_definition_is_differentiable(option):
    """Three steps whose gradients depend on the params, with respect to the first params, the gradients and lr."""
    option = dict(option)
    amsgrad = option.pop("amsgrad")
    beta1 = 0.6 if option["bias_correction"] else 0.6 + 0.3j

    def run(p, slope, lr):
        q = p.clone()
        lists = [[q], None, *([torch.full_like(p, x)] for x in (0.1, 0.2, 0.3, 0.4)), [torch.zeros(())]]
        if not amsgrad:
            lists[MAXS] = []
        for _ in range(3):
            lists[GRADS] = [slope * q.clone()]
            _reference.complex_adam_step_(
                *lists, lr, beta1=beta1.real, beta1_imag=beta1.imag, beta2=0.9, weight_decay=0.1, **option
            )
        return q

    arguments = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    arguments.append(torch.tensor(0.1, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(run, arguments, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, arguments)


def loss_of(params, x):
    return (torch.tanh(x @ params[0] + params[1]) @ params[2]).square().mean()


def step_by_the_op(params, grads, *rest):
    _ops.complex_adam_step_(params, grads, *rest, beta1=COMPLEX, weight_decay=0.01)


def step_by_definition(params, grads, *rest):
    _reference.complex_adam_step_(params, grads, *rest, beta1=COMPLEX.real, beta1_imag=COMPLEX.imag, weight_decay=0.01)


@pytest.mark.parametrize("update", [step_by_the_op, step_by_definition], ids=lambda f: f.__name__)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_training_step_is_one_graph(backend, update, device):
    """The steps and lr change from call to call and recompile nothing."""

    def training_step(params, rest, x, lr):
        update(params, torch.func.grad(loss_of)(params, x), *rest, lr)
        return loss_of(params, x)

    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(training_step, backend=counter, fullgraph=True)
    params = [torch.randn(s, device=device) for s in [(3, 8), (8,), (8, 2)]]
    rest = [[torch.zeros_like(p) for p in params] for _ in range(4)] + [
        [torch.zeros((), device=device) for _ in params]
    ]
    twin, twin_rest = [t.clone() for t in params], [[t.clone() for t in list_] for list_ in rest]
    with torch.no_grad():
        for i in range(5):
            x, lr = torch.randn(6, 3, device=device), torch.tensor(0.1 / (i + 1), device=device)
            loss = compiled(params, rest, x, lr)
            torch.testing.assert_close(loss, training_step(twin, twin_rest, x, lr))
    for a, b in zip([*params, *itertools.chain(*rest)], [*twin, *itertools.chain(*twin_rest)], strict=True):
        torch.testing.assert_close(a, b)
    assert rest[-1][0] == 5 and counter.frame_count == 1


def test_exported_as_one_node():
    class Step(torch.nn.Module):
        def forward(self, p, g, m, v, t, lr):
            _ops.complex_adam_step_([p], [g], [m], [], [v], [], [t], lr, beta1=0.5, beta2=0.0, eps=0.0)
            return p

    def arguments():
        return *(torch.full((3,), x) for x in (1.0, 2.0, 0.0, 0.0)), torch.zeros(()), torch.tensor(0.5)

    program = torch.export.export(Step(), arguments())
    assert "nestopt_ext.complex_adam_step_" in str(program.graph)
    assert program.module()(*arguments()).tolist() == [0.5] * 3


def test_fuzz():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    layouts = st.sampled_from([*LAYOUTS.values()])
    shapes = st.lists(st.sampled_from([0, 1, 2, 3, 5, 17, 40]), max_size=4).map(tuple)
    per_list = st.tuples(layouts, layouts | st.just(expanded), *[layouts] * 4)
    tensors = st.lists(st.tuples(shapes, st.sampled_from(FLOATING), per_list), min_size=1, max_size=5)

    @hypothesis.settings(max_examples=80, deadline=None, derandomize=True, database=None)
    @hypothesis.given(tensors, st.sampled_from(list(AVERAGES)), st.sampled_from(OPTIONS))
    def run(tensors, averages, options):
        lists = [[] for _ in range(7)]
        for shape, dtype, layout in tensors:
            for list_, new in zip(lists, make([shape], [dtype], averages, "cpu", layout), strict=True):
                list_ += new
        check(lists, AVERAGES[averages][0], **options)

    run()
