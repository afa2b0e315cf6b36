"""complex_sgd_step_ against a recurrence in extended precision, in every layout, dtype and role of its arguments."""

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
    same_bits,
)
from torch._dynamo.testing import CompileCounterWithBackend

from nestopt_ext import _ops, _reference

MOMENTUMS = {"none": 0.0, "real": 0.9, "complex": cmath.rect(0.9, 0.4), "real_with_imag_buffer": -0.5}
OPTIONS = [
    {},
    {"dampening": 0.3, "weight_decay": 0.05},
    {"nesterov": True, "weight_decay": 0.05},
    {"maximize": True, "grad_scale": 7.3},
    {"maximize": True, "nesterov": True, "weight_decay": 0.01, "grad_scale": 1024.0},
]


def make(shapes, dtypes, momentum="complex", device="cpu", layouts=(contiguous,) * 4):
    """Lists of params, grads, buffers and imaginary buffers, with random values, each in its layout."""
    lists = random_lists(shapes, [(d, d, opmath(d), opmath(d)) for d in dtypes], layouts, device)
    if momentum == "none":
        lists[2:] = [], []
    elif momentum == "real":
        lists[3] = []
    return lists


def recurrence(lists, lr, momentum, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False, grad_scale=1.0):
    """One step, written out in extended complex precision. Returns new params, buffers and imaginary buffers."""
    out = ([], [], [])
    beta = np.clongdouble(momentum)
    for i, (p, g) in enumerate(zip(map(exact, lists[0]), map(exact, lists[1]), strict=True)):
        d = (-g if maximize else g) / np.longdouble(grad_scale) + np.longdouble(weight_decay) * p
        real = exact(lists[2][i]) if lists[2] else np.zeros_like(p)
        imag = exact(lists[3][i]) if lists[3] else np.zeros_like(p)
        b = beta * (real + 1j * imag) + (1 - np.longdouble(dampening)) * d if lists[2] else d + 0j
        move = d + (beta * b).real if nesterov and lists[2] else b.real
        out[0].append(p - np.longdouble(lr) * move)
        if lists[2]:
            out[1].append(b.real)
        if lists[3]:
            out[2].append(b.imag)
    return out


def step(lists, lr=0.1, grad_scale=None, function=None, **scalars):
    """Calls the op; ``lr`` and ``grad_scale`` may be numbers."""
    grad_scale = as_number(grad_scale, lists[0][0].device)
    (function or _ops.complex_sgd_step_)(*lists, as_number(lr), grad_scale=grad_scale, **scalars)


def reference_step(lists, momentum, **scalars):
    def run(*args, **kwargs):
        _reference.complex_sgd_step_(*args, momentum=momentum.real, momentum_imag=momentum.imag, **kwargs)

    step(lists, function=run, **scalars)


def check(lists, momentum, **scalars):
    """Takes a step on ``lists`` and judges it: numbers, and memory that was not to be touched."""
    # To float32 params the reference and the kernel see the lr in float32; the recurrence sees it as given.
    twin = [[contiguous(t) for t in list_] for list_ in lists]
    truth = recurrence(lists, scalars.get("lr", 0.1), momentum, **{k: v for k, v in scalars.items() if k != "lr"})
    memory = Memory(t for list_ in lists for t in list_)
    step(lists, momentum=momentum, **scalars)
    reference_step(twin, momentum, **scalars)
    for found, reference, wanted in zip((lists[0], *lists[2:]), (twin[0], *twin[2:]), truth, strict=True):
        assert_as_good_as(found, reference, wanted)
    assert memory.changed_only([*lists[0], *lists[2], *lists[3]])


@pytest.mark.parametrize("dtype", FLOATING, ids=name_of)
@pytest.mark.parametrize("momentum", MOMENTUMS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_equals_the_recurrence(dtype, momentum, options, device):
    lists = make(SHAPES, [dtype], momentum, device)
    check(lists, MOMENTUMS[momentum], **options)
    check(lists, MOMENTUMS[momentum], **options)  # from a state that the op has written


def test_mixed_dtypes_in_one_list(device):
    for momentum in MOMENTUMS:
        check(make(SHAPES * 2, [*FLOATING, torch.float32], momentum, device), MOMENTUMS[momentum], weight_decay=0.1)


def test_a_step_of_known_numbers(device):
    """b = (1 + 2i)(3 + 4i)/10 + 0.5 * 8 = 3.5 + i; p = 10 - 0.5 * 3.5."""
    for dtype in FLOATING:
        p, g = torch.tensor([10.0], dtype=dtype, device=device), torch.tensor([8.0], dtype=dtype, device=device)
        b, c = (torch.tensor([x], dtype=opmath(dtype), device=device) for x in (3.0, 4.0))
        step([[p], [g], [b], [c]], lr=0.5, momentum=0.1 + 0.2j, dampening=0.5)
        assert p.item() == 8.25
        assert b.item() == pytest.approx(3.5, rel=1e-6)
        assert c.item() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("grad_layout", [*LAYOUTS.values(), expanded], ids=lambda f: f.__name__)
@pytest.mark.parametrize("param_layout", LAYOUTS.values(), ids=lambda f: f.__name__)
def test_layouts(param_layout, grad_layout, dtype, device):
    shapes = [(4, 6, 5, 3), (3, 33, 17, 13), (5, 2), (7,), (), (0, 3)]
    for layouts in (
        (param_layout, grad_layout, param_layout, param_layout),
        (param_layout, grad_layout, contiguous, LAYOUTS["permuted"]),
    ):
        check(make(shapes, [dtype], "complex", device, layouts), MOMENTUMS["complex"], weight_decay=0.1, nesterov=True)
    check(
        make(
            shapes,
            [dtype],
            "real",
            device,
            (param_layout, grad_layout, grad_layout if grad_layout is not expanded else contiguous, contiguous),
        ),
        0.9,
    )
    check(
        make(shapes, [dtype], "none", device, (param_layout, grad_layout, contiguous, contiguous)), 0.0, maximize=True
    )


@pytest.mark.parametrize("dims", [9, 11])
def test_more_dimensions_than_a_kernel_walks(dims, device):
    """No two of the dimensions can be joined."""

    def scattered(values):
        wide = values.new_full((3,) * dims, 7.0)
        return wide[(slice(0, 2),) * dims].copy_(values)

    def reversed_(values):
        return scattered(values.permute(*reversed(range(dims)))).permute(*reversed(range(dims)))

    check(
        make([(2,) * dims], [torch.float32], "complex", device, (scattered, contiguous, reversed_, scattered)),
        0.5 + 0.1j,
    )


def test_strided_equals_contiguous_bit_for_bit(native):
    for dtype in FLOATING:
        for momentum in MOMENTUMS:
            lists = make([(3, 33, 17, 13), (9, 5, 2, 2)], [dtype], momentum)
            strided = [[LAYOUTS["every_other"](t) for t in list_] for list_ in lists]
            for list_ in (lists, strided):
                step(list_, momentum=MOMENTUMS[momentum], weight_decay=0.1)
            assert all(all_same_bits(a, b) for a, b in zip(lists, strided, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name_of)
def test_interleaved_views_of_one_storage(dtype, device):
    """Odd and even columns are two parameters; in float32 the buffers lie between them as well."""
    base = torch.randn(4001, 4, dtype=torch.float64).to(device=device, dtype=dtype)
    grads = torch.randn(4001, 2, dtype=torch.float64).to(device=device, dtype=dtype)
    if dtype == torch.float32:
        lists = [[base[:, 0]], [grads[:, 1]], [base[:, 2]], [base[:, 3]]]
    else:
        buffers = torch.randn(4001, 4, device=device)
        lists = [
            [base[:, 0], base[:, 2]],
            [grads[:, 0], base[:, 1]],
            [buffers[:, 1], buffers[:, 0]],
            [buffers[:, 3], buffers[:, 2]],
        ]
    check(lists, 0.7 + 0.1j)


def test_views_that_touch_in_one_flat_buffer(device):
    sizes = [5, 16384, 3, 0, 1, 20001]
    flat = [torch.randn(sum(sizes) + 1, device=device)[1:] for _ in range(4)]
    check([list(f.split(sizes)) for f in flat], 0.7 + 0.1j)
    one = torch.randn(4 * 1001, device=device)
    check([[t] for t in one.split(1001)], 0.7 + 0.1j)


def test_thousands_of_tensors(device):
    shapes = [((), (1,), (2, 2), (0,), (9,))[i % 5] for i in range(4500)]
    check(make(shapes, [torch.float32, torch.bfloat16, torch.float64], "complex", device), 0.8 + 0.2j, weight_decay=0.1)


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
        step(lists, lr=lr, momentum=0.5 + 0.1j)
        results.append(lists[0])
    assert all_same_bits(results[0], results[1])
    assert all_same_bits(results[0], results[2])


def test_lr_of_full_precision_moves_double_params():
    p = torch.zeros(1, dtype=torch.float64)
    step([[p], [torch.ones_like(p)], [], []], lr=0.1, momentum=0.0)
    assert p.item() == -0.1
    step([[p], [torch.ones_like(p)], [], []], lr=torch.tensor(0.1), momentum=0.0)
    assert p.item() == -0.1 - float(np.float32(0.1))


@pytest.mark.parametrize(
    "flag", [torch.tensor(1.0), torch.tensor([1.0], dtype=torch.float64), torch.tensor(float("nan"))], ids=str
)
def test_found_inf_keeps_everything(flag, device):
    lists = make(SHAPES, FLOATING, "complex", device)
    lists[1][4][0] = float("inf")
    memory = Memory(t for list_ in lists for t in list_)
    step(lists, momentum=0.5 + 0.1j, found_inf=flag.to(device), grad_scale=2.0, weight_decay=0.1)
    assert memory.changed_only([])


def test_found_inf_of_zero_takes_the_step(device):
    lists = make(SHAPES, FLOATING, "complex", device)
    twin = [[t.clone() for t in list_] for list_ in lists]
    step(lists, momentum=0.5 + 0.1j, found_inf=torch.zeros(1, device=device))
    step(twin, momentum=0.5 + 0.1j)
    assert all(all_same_bits(a, b) for a, b in zip(lists, twin, strict=True))


def test_special_values_pass_through():
    """Infinities and NaN go where the formula sends them; the numbers beside them stay right."""
    for dtype in FLOATING:
        values = torch.tensor([1.0, float("inf"), float("nan"), -float("inf"), 2.0, -0.0], dtype=dtype)
        p = torch.zeros_like(values)
        step([[p], [values.clone()], [], []], lr=1.0, momentum=0.0)
        assert torch.equal(p.nan_to_num(nan=77.0), (-values).nan_to_num(nan=77.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_every_16_bit_number_is_read_and_rounded_as_torch_does(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    p, zero = every.clone(), torch.zeros_like(every)
    step([[p], [zero], [], []], lr=1.0, momentum=0.0)  # p - 0
    finite = every.isfinite() & (every != 0)
    assert same_bits(p[finite], every[finite])
    assert torch.equal(p.isnan(), every.isnan())
    # Halves of, and sums with, neighbours: results that must be rounded, ties and subnormal numbers among them.
    for shift in (1, 2, 3, 1000):
        p, g = every.clone(), every.roll(shift)
        step([[p], [g], [], []], lr=0.5, momentum=0.0)
        wanted = (every.float() - 0.5 * every.roll(shift).float()).to(dtype)
        assert torch.equal(p.nan_to_num(nan=77.0), wanted.nan_to_num(nan=77.0))


def test_the_same_bits_on_any_number_of_threads():
    results = []
    for threads in (1, 2, 5, 1):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        lists = make([*SHAPES, (70000,), (1,), (300, 301)], FLOATING)
        lists[0][5] = LAYOUTS["every_other"](lists[0][5])
        step(lists, momentum=0.5 + 0.1j, weight_decay=0.1, nesterov=True)
        results.append([t for list_ in lists for t in list_])
    assert all(all_same_bits(results[0], other) for other in results[1:])


def test_autograd_is_told_of_every_write(device):
    lists = make([(3,), (0,), (2, 2)], [torch.float32], device=device)
    before = [[t._version for t in list_] for list_ in lists]
    step(lists, momentum=0.5 + 0.1j)
    for k, list_ in enumerate(lists):
        for t, version in zip(list_, before[k], strict=True):
            assert (t._version == version) if k == 1 else (t._version > version)


def test_a_stale_graph_is_refused(device):
    p = torch.ones(3, device=device, requires_grad=True)
    loss = p.square().sum()
    with torch.no_grad():
        step([[p], [torch.ones_like(p)], [], []], momentum=0.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_with_a_graph_leave_no_graph_on_the_params(device):
    p, b = torch.ones(3, device=device), torch.zeros(3, device=device)
    g = torch.ones(3, device=device, requires_grad=True) * 2
    with torch.no_grad():
        step([[p], [g], [b], []], momentum=0.5)
    assert not p.requires_grad and not b.requires_grad and p.grad_fn is None
    assert p.tolist() == pytest.approx([0.8] * 3)


def test_in_inference_mode(device):
    with torch.inference_mode():
        lists = make([(5,), (2, 3)], FLOATING, device=device)
        check(lists, 0.5 + 0.1j)
    with torch.inference_mode():
        grads = [torch.ones(3, device=device)]
    p = torch.zeros(3, device=device)
    step([[p], grads, [], []], lr=1.0, momentum=0.0)
    assert p.tolist() == [-1.0] * 3


def test_params_that_require_grad_and_their_views(device):
    leaf = torch.ones(4, 3, device=device, requires_grad=True)
    with torch.no_grad():
        step([[leaf[1:3]], [torch.ones(2, 3, device=device)], [], []], lr=1.0, momentum=0.0)
    assert leaf.sum(1).tolist() == [3.0, 0.0, 0.0, 3.0]
    assert leaf.is_leaf and leaf.requires_grad


def test_copy_on_write_grads_and_params():
    base = torch.ones(100)
    lazy, other = torch._lazy_clone(base), torch._lazy_clone(base)
    step([[lazy], [other], [], []], lr=0.5, momentum=0.0)
    assert float(lazy.sum()) == 50.0
    assert float(base.sum()) == 100.0 and float(other.sum()) == 100.0


def test_tensor_subclasses_are_updated():
    class Named(torch.Tensor):
        pass

    p = torch.ones(3).as_subclass(Named)
    step([[p], [torch.ones(3)], [], []], lr=0.5, momentum=0.0)
    assert torch.equal(p.as_subclass(torch.Tensor), torch.full((3,), 0.5))
    parameter = torch.nn.Parameter(torch.ones(3))
    with torch.no_grad():
        step([[parameter], [torch.ones(3)], [], []], lr=0.5, momentum=0.0)
    assert parameter.tolist() == [0.5] * 3


def test_no_memory_beside_the_state(native):
    lists = make([(1000, 1000), (300, 301)], [torch.float32, torch.bfloat16])
    lists[0][1] = LAYOUTS["every_other"](lists[0][1])
    lr = torch.tensor(0.1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(lists, lr=lr, momentum=0.5 + 0.1j, weight_decay=0.1)
    assert max((abs(e.self_cpu_memory_usage) for e in profile.events()), default=0) < 1024


def test_no_growth_and_nothing_kept():
    lists = make([(10,)] * 20, [torch.float32])
    for _ in range(3):
        step(lists, momentum=0.5 + 0.1j)
    gc.collect()
    tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    for _ in range(50):
        step(lists, momentum=0.5 + 0.1j)
    gc.collect()
    assert sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()) <= tensors


@pytest.mark.parametrize("sample", product(momentum=list(MOMENTUMS), scaled=[False, True]), ids=str)
def test_opcheck(sample, device):
    lists = make(
        [(3, 2), (), (0,), (5,)],
        [torch.float32, torch.bfloat16],
        sample["momentum"],
        device,
        (LAYOUTS["permuted"], contiguous, contiguous, contiguous),
    )
    momentum = MOMENTUMS[sample["momentum"]]
    optional = (
        {"grad_scale": torch.tensor(2.0, device=device), "found_inf": torch.zeros((), device=device)}
        if sample["scaled"]
        else {}
    )
    kwargs = dict(momentum=momentum.real, momentum_imag=momentum.imag, weight_decay=0.1, **optional)
    lr = torch.full((1,) if sample["scaled"] else (), 0.1)
    torch.library.opcheck(torch.ops.nestopt_ext.complex_sgd_step_.default, (*lists, lr), kwargs)


def test_fake_and_meta_tensors_are_checked_and_left_alone():
    lists = [[t.to("meta") for t in list_] for list_ in make([(3,), (2, 2)], [torch.float32, torch.float16])]
    step(lists, momentum=0.5 + 0.1j)
    step(lists, lr=torch.tensor(0.1, device="meta"), momentum=0.5 + 0.1j)
    with torch._subclasses.FakeTensorMode():
        step(make([(3,), (2, 2)], FLOATING), momentum=0.5 + 0.1j)
        lists = make([(3,), (2, 2)], FLOATING)
        lists[2][1] = torch.zeros(3, dtype=torch.float64)
        with pytest.raises(
            ValueError,
            match=r"complex_sgd_step_: momentum_buffers\[1\] must have the shape of params\[1\] \(2, 2\); got \(3,\)",
        ):
            step(lists, momentum=0.5 + 0.1j)


def loss_of(params, x):
    return (torch.tanh(x @ params[0] + params[1]) @ params[2]).square().mean()


def training_step(params, buffers, imag, x, lr):
    grads = torch.func.grad(loss_of)(params, x)
    _ops.complex_sgd_step_(params, grads, buffers, imag, lr, momentum=0.8 + 0.3j, weight_decay=0.01)
    return loss_of(params, x)


def compare_compiled(compiled, frames, device):
    torch.manual_seed(0)
    shapes = [(3, 8), (8,), (8, 2)]
    params = [torch.randn(s, device=device) for s in shapes]
    lists = [params, [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]]
    twin = [[t.clone() for t in list_] for list_ in lists]
    for i in range(5):
        x, lr = torch.randn(6, 3, device=device), torch.tensor(0.1 / (i + 1))
        loss = compiled(*lists, x, lr)
        torch.testing.assert_close(loss, training_step(*twin, x, lr))
    for a, b in zip(*(itertools.chain(*both) for both in (lists, twin)), strict=True):
        torch.testing.assert_close(a, b)
    assert frames() == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_training_step_is_one_graph(backend, device):
    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend)
    compare_compiled(torch.compile(training_step, backend=counter, fullgraph=True), lambda: counter.frame_count, device)


def test_exported_as_one_node():
    class Step(torch.nn.Module):
        def forward(self, p, g, b, lr):
            _ops.complex_sgd_step_([p], [g], [b], [], lr, momentum=0.5)
            return p

    arguments = (torch.ones(3), torch.ones(3), torch.zeros(3), torch.tensor(0.5))
    program = torch.export.export(Step(), arguments)
    assert "nestopt_ext.complex_sgd_step_" in str(program.graph)
    assert program.module()(torch.ones(3), torch.ones(3), torch.zeros(3), torch.tensor(0.5)).tolist() == [0.5] * 3


def test_fuzz():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    layouts = st.sampled_from([*LAYOUTS.values()])
    shapes = st.lists(st.sampled_from([0, 1, 2, 3, 5, 17, 40]), max_size=4).map(tuple)
    tensors = st.lists(
        st.tuples(shapes, st.sampled_from(FLOATING), st.tuples(layouts, layouts | st.just(expanded), layouts, layouts)),
        min_size=1,
        max_size=5,
    )

    @hypothesis.settings(max_examples=80, deadline=None, derandomize=True, database=None)
    @hypothesis.given(tensors, st.sampled_from(list(MOMENTUMS)), st.sampled_from(OPTIONS))
    def run(tensors, momentum, options):
        lists = [[], [], [], []]
        for shape, dtype, layout in tensors:
            for list_, new in zip(lists, make([shape], [dtype], momentum, "cpu", layout), strict=True):
                list_ += new
        check(lists, MOMENTUMS[momentum], **options)

    run()


@pytest.mark.big_memory
def test_more_elements_than_32_bits_count(device):
    """2^31 + 64 elements as arrays, then as every other element of as many."""
    n = 2**31 + 64
    p = torch.zeros(n, dtype=torch.float16, device=device)
    g = torch.ones(1, dtype=torch.float16, device=device).expand(n)
    step([[p], [g], [], []], lr=0.5, momentum=0.0)
    assert all(bool((part == -0.5).all()) for part in p.split(2**28))
    g = torch.zeros(n, dtype=torch.float16, device=device)
    g[-1] = 1.0
    step([[p], [g], [], []], lr=0.5, momentum=0.0)
    assert p[-1].item() == -1.0 and p[-2].item() == -0.5 and p[0].item() == -0.5
    half = torch.tensor([1.0], dtype=torch.float16, device=device)
    step([[p[::2], p[1::2]], [half.expand(n // 2), -half.expand(n // 2)], [], []], lr=0.25, momentum=0.0)
    assert p[-4:].tolist() == [-0.75, -0.25, -0.75, -0.75] and p[:2].tolist() == [-0.75, -0.25]
