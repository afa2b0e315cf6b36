"""stn_gate_ and stn_gate_backward_ against extended precision: dtypes, layouts, sizes, and what is refused."""

import numpy as np
import pytest
import torch
from helpers import (
    FLOATING,
    LAYOUTS,
    Memory,
    assert_refused,
    contiguous,
    exact,
    expanded,
    freed,
    name_of,
    of_inference_mode,
    opmath,
    same_bits,
)
from torch._dynamo.testing import CompileCounterWithBackend

from nestopt_ext import _ops, _reference

INF, NAN = float("inf"), float("nan")
#: dtypes of the data and of gates and biases
PAIRS = [(d, d) for d in FLOATING] + [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
PAIR_IDS = [f"{name_of(x)}-{name_of(g)}" for x, g in PAIRS]
#: shape, batch_dim, channel_dim: linear layers on vectors and sequences, convolutions, and around blocks and strips.
CASES = [
    ((1, 1), 0, 1),
    ((6, 5), 0, 1),
    ((3, 1025), 0, 1),
    ((4, 6, 5), 1, 2),
    ((3, 70, 33), 0, 2),
    ((2, 3, 4, 5), 1, 3),
    ((2, 7, 3, 3), 0, 1),
    ((3, 5, 6, 6), 0, 1),
    ((2, 3, 1100), 0, 1),
    ((2, 40, 1), 0, 1),
    ((2, 3, 2, 5, 7), 1, 3),
    ((2, 300, 4), 0, 1),
]


class Problem:
    """Arguments of both ops; what is written is poisoned."""

    def __init__(self, shape, batch_dim, channel_dim, pair=PAIRS[0], device="cpu", layout=contiguous):
        self.dims = {"batch_dim": batch_dim, "channel_dim": channel_dim}
        self.shape, self.channel_dim = shape, channel_dim
        self.examples, self.channels = shape[batch_dim], shape[channel_dim]
        data, coefficients = pair

        def randn(*size, dtype=data):
            return torch.randn(size, dtype=torch.float64).to(device, dtype)

        self.stacked_shape = tuple(2 * s if d == channel_dim else s for d, s in enumerate(shape))
        self.plain, self.response, self.grad, self.out = (layout(randn(*shape)) for _ in range(4))
        self.gates = randn(self.examples, 2 * self.channels, dtype=coefficients)
        self.bias, self.response_bias = (randn(self.channels, dtype=coefficients) for _ in range(2))
        self.sums = torch.full((self.examples, 2 * self.channels), NAN, dtype=opmath(data), device=device)
        self.shared = torch.full((2, self.channels), NAN, dtype=opmath(data), device=device)
        self.grads = layout(torch.full(self.stacked_shape, NAN, dtype=data, device=device))
        self.out.fill_(NAN)

    def spread(self, rows):
        shape = [1] * len(self.shape)
        shape[self.dims["batch_dim"]], shape[self.channel_dim] = rows.shape
        return rows.reshape(shape)

    @property
    def forward_arguments(self):
        return self.out, self.plain, self.response, self.gates, self.bias, self.response_bias

    @property
    def backward_arguments(self):
        return self.sums, self.grads, self.shared, self.grad, self.response, self.gates, self.response_bias

    def check_forward(self):
        """Judges a call: numbers, and memory that was not to be touched."""
        memory = Memory(t for t in self.forward_arguments if t is not None)
        _ops.stn_gate_(*self.forward_arguments, **self.dims)
        assert memory.changed_only([self.out])
        gates = exact(self.gates)
        w, b = gates[:, : self.channels], gates[:, self.channels :]
        terms = [self.spread(w) * exact(self.response)]
        if self.plain is not None:
            terms.append(exact(self.plain))
        if self.bias is not None:
            terms.append(self.spread(exact(self.bias)[None]))
        if self.response_bias is not None:
            terms.append(self.spread(b * exact(self.response_bias)))
        assert_close(self.out, sum(terms), sum(map(np.abs, terms)), 0)

    def check_backward(self):
        arguments = self.backward_arguments
        memory = Memory(t for t in arguments if t is not None)
        _ops.stn_gate_backward_(*arguments, **self.dims)
        assert memory.changed_only([t for t in (self.sums, self.grads, self.shared) if t is not None])
        g, r = exact(self.grad), exact(self.response)
        positions = tuple(d for d in range(g.ndim) if d not in self.dims.values())
        terms = [g * r, g]
        (products, grads), sizes = [t.sum(positions) for t in terms], [np.abs(t).sum(positions) for t in terms]
        some = 16 if self.grad.dtype != torch.float64 else 64
        of_response, of_shift = self.sums.chunk(2, 1)
        assert_close(of_response, products, sizes[0], some)
        if self.response_bias is None:
            assert_close(of_shift, grads, sizes[1], some)
        else:
            factor = exact(self.response_bias)
            assert_close(of_shift, grads * factor, sizes[1] * np.abs(factor), some)
        if self.shared is not None:
            assert_close(self.shared[0], grads.sum(0), sizes[1].sum(0), some)
            gates = exact(self.gates)[:, self.channels :] if self.response_bias is not None else np.zeros_like(grads)
            assert_close(self.shared[1], (gates * grads).sum(0), (np.abs(gates) * sizes[1]).sum(0), some)
        if self.grads is None:
            return
        scaled = self.spread(exact(self.gates)[:, : self.channels]) * g
        if self.grads.shape != self.grad.shape:
            copied = self.grads.narrow(self.channel_dim, 0, self.channels)
            assert same_bits(copied, self.grad)
            assert_close(self.grads.narrow(self.channel_dim, self.channels, self.channels), scaled, np.abs(scaled), 0)
        else:
            assert_close(self.grads, scaled, np.abs(scaled), 0)


def assert_close(found, want, size, sums):
    """To a few roundings of the arithmetic on terms of this ``size``, some more for ``sums``, and one of the result."""
    dtype = found.dtype
    eps = torch.finfo(opmath(dtype)).eps * (2 + sums / 4)
    stored = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0
    smallest = 2.0**-24 if dtype == torch.float16 else 2.0**-126
    error = np.abs(exact(found) - want)
    assert (error <= eps * size + stored * np.abs(want) + smallest).all()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids=PAIR_IDS)
def test_right_to_a_few_roundings(pair, case, device):
    problem = Problem(*case, pair, device)
    problem.check_forward()
    problem.check_backward()


@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[6]], ids=str)
def test_arguments_left_out(case, device):
    for absent in ("plain", "bias", "response_bias"):
        problem = Problem(*case, device=device)
        setattr(problem, absent, None)
        problem.check_forward()
    problem = Problem(*case, device=device)
    problem.plain = problem.bias = problem.response_bias = None
    problem.gates = problem.gates[:, : problem.channels].clone()
    problem.check_forward()
    problem.check_backward()
    problem = Problem(*case, device=device)
    problem.grads = torch.full_like(problem.grad, NAN)
    problem.check_backward()
    for absent in (("response_bias",), ("response_bias", "shared"), ("response_bias", "shared", "grads", "gates")):
        problem = Problem(*case, device=device)
        for name in absent:
            setattr(problem, name, None)
        problem.check_backward()
    problem = Problem(*case, device=device)
    problem.grads = None
    problem.check_backward()


def test_known_numbers(device):
    """Two examples, one channel, two positions."""
    x = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]], device=device)
    gates = torch.tensor([[10.0, 100.0], [-1.0, 0.5]], device=device)
    out, bias = torch.empty_like(x), torch.tensor([1000.0], device=device)
    _ops.stn_gate_(out, x, x, gates, bias, torch.tensor([4.0], device=device), batch_dim=0, channel_dim=1)
    assert out.tolist() == [[[1411.0, 1422.0]], [[1002.0, 1002.0]]]
    sums, grads, shared = (torch.empty(shape, device=device) for shape in ((2, 2), (2, 2, 2), (2, 1)))
    response_bias = torch.tensor([4.0], device=device)
    _ops.stn_gate_backward_(sums, grads, shared, 2 * x, x, gates, response_bias, batch_dim=0, channel_dim=1)
    assert sums.tolist() == [[10.0, 24.0], [50.0, 56.0]]
    assert shared.tolist() == [[20.0], [607.0]]
    assert grads.tolist() == [[[2.0, 4.0], [20.0, 40.0]], [[6.0, 8.0], [-6.0, -8.0]]]


@pytest.mark.parametrize("pair", PAIRS, ids=PAIR_IDS)
def test_long_sums_are_as_good_as_short_ones(pair, device):
    """More positions than a piece has, in both layouts: sums that a plain loop of float32 would lose digits of."""
    for case in [((1, 9000, 3), 0, 2), ((5000, 2, 3), 0, 2), ((1, 2, 40_000), 0, 1)]:
        if case[0][0] == 5000:
            case = (case[0], 1, 2)
        problem = Problem(*case, pair, device)
        problem.grad = problem.grad.abs() + 1
        problem.check_backward()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 3, 0), (0, 2, 3, 4)], ids=str)
def test_nothing(shape, device):
    problem = Problem(shape, 0, 1, device=device)
    problem.check_forward()
    problem.check_backward()
    assert (problem.sums == 0).all() and (problem.shared == 0).all()


@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[6]], ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids=PAIR_IDS)
def test_what_is_not_finite_shows_and_stays_where_it_is(pair, case, device):
    problem = Problem(*case, pair, device)
    last = (slice(None),) * (len(problem.shape) - 1) + (-1,)
    problem.response[last] = NAN
    problem.gates[0, 0] = INF
    clean = Problem(*case, pair, device)
    _ops.stn_gate_(*problem.forward_arguments, **problem.dims)
    assert problem.out[last].isnan().all()
    assert (
        problem.out.isfinite().sum()
        >= problem.out.numel()
        - problem.out[last].numel()
        - problem.out.select(problem.dims["batch_dim"], 0).select(problem.channel_dim - 1, 0).numel()
    )
    clean.grad[last] = NAN
    _ops.stn_gate_backward_(*clean.backward_arguments, **clean.dims)
    assert clean.sums.isnan().any() and clean.grads[last].isnan().all() and clean.grads[..., 0].isfinite().all()


@pytest.mark.parametrize("grad_layout", [*LAYOUTS.values(), expanded], ids=lambda f: f.__name__)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda f: f.__name__)
def test_layouts(layout, grad_layout, device):
    for case in (CASES[1], CASES[3], CASES[6], CASES[10]):
        problem = Problem(*case, device=device, layout=layout)
        problem.plain, problem.grad = grad_layout(problem.plain), grad_layout(problem.grad)
        problem.check_forward()
        problem.check_backward()


@pytest.mark.parametrize("layout", [contiguous, LAYOUTS["channels_last"]], ids=lambda f: f.__name__)
def test_halves_of_one_tensor_are_walked_where_they_lie(layout, native):
    """No memory is asked for."""
    for case in (CASES[1], CASES[3], CASES[6]) if layout is contiguous else (CASES[6], CASES[7]):
        problem = Problem(*case)
        stacked = layout(torch.randn(problem.stacked_shape))
        problem.plain, problem.response = stacked.chunk(2, problem.channel_dim)
        problem.grad, problem.out, problem.grads = map(layout, (problem.grad, problem.out, problem.grads))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            _ops.stn_gate_(*problem.forward_arguments, **problem.dims)
            _ops.stn_gate_backward_(*problem.backward_arguments, **problem.dims)
        assert max((abs(e.self_cpu_memory_usage) for e in profile.events()), default=0) == 0
        problem.check_forward()
        problem.check_backward()


def test_gates_of_any_strides(device):
    for case in (CASES[1], CASES[6]):
        for layout in (*LAYOUTS.values(), expanded):
            problem = Problem(*case, device=device)
            problem.gates = layout(problem.gates)
            problem.bias, problem.response_bias = (layout(t)[: problem.channels] for t in (problem.bias, problem.bias))
            if layout is not expanded:
                problem.sums, problem.shared = layout(problem.sums), layout(problem.shared)
            problem.check_forward()
            problem.check_backward()


@pytest.mark.parametrize("pair", PAIRS, ids=PAIR_IDS)
def test_strided_equals_contiguous_bit_for_bit(pair, native):
    for case in (CASES[3], CASES[6]):
        results = []
        for layout in LAYOUTS.values():
            torch.manual_seed(3)
            problem = Problem(*case, pair, layout=layout)
            _ops.stn_gate_(*problem.forward_arguments, **problem.dims)
            _ops.stn_gate_backward_(*problem.backward_arguments, **problem.dims)
            results.append((problem.out, problem.grads))
        assert all(same_bits(a, b) for other in results for a, b in zip(results[0], other, strict=True))


def test_the_same_bits_on_any_number_of_threads(native):
    results = []
    for threads in (1, 2, 5, 1):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        results.append([])
        for case in [((64, 1200), 0, 1), ((1, 9000, 40), 0, 2), ((6, 20, 5000), 0, 1), ((64, 300, 2, 2), 0, 1)]:
            problem = Problem(*case)
            _ops.stn_gate_(*problem.forward_arguments, **problem.dims)
            _ops.stn_gate_backward_(*problem.backward_arguments, **problem.dims)
            results[-1] += [problem.out, problem.sums, problem.grads, problem.shared]
    assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


# ---- hostile arguments ----------------------------------------------------------------------------------------------


GRAD = "must not require grad while grad mode is on; got one that does. Call under torch.no_grad()."
FORWARD = {
    "out": torch.zeros(6, 4),
    "plain": torch.zeros(6, 4),
    "response": torch.zeros(6, 4),
    "gates": torch.zeros(6, 8),
    "bias": torch.zeros(4),
    "response_bias": torch.zeros(4),
    "batch_dim": 0,
    "channel_dim": 1,
}
BACKWARD = {
    "sums": torch.zeros(6, 8),
    "grads": torch.zeros(6, 8),
    "shared": torch.zeros(2, 4),
    "grad": torch.zeros(6, 4),
    "response": torch.zeros(6, 4),
    "gates": torch.zeros(6, 8),
    "response_bias": torch.zeros(4),
    "batch_dim": 0,
    "channel_dim": 1,
}


def _with(arguments, **changed):
    values = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    return {**values, **changed}


def _overlapping():
    base = torch.zeros(40)
    return _with(FORWARD, out=base[:24].view(6, 4), response=base[8:32].view(6, 4))


def _freed():
    return _with(FORWARD, plain=freed(6, 4))


def forward(**changed):
    return lambda: _with(FORWARD, **changed)


def backward(**changed):
    return lambda: _with(BACKWARD, **changed)


ROWS = "have a row for each example, 6"
HOSTILE = {
    "out of integers": (
        forward(out=torch.zeros(6, 4, dtype=torch.int64)),
        TypeError,
        "out must be float32, float64, bfloat16 or float16; got int64.",
    ),
    "out of one dimension": (
        forward(out=torch.zeros(4)),
        ValueError,
        "out must have a dimension of examples and one of channels; got shape (4,).",
    ),
    "out expanded": (
        forward(out=torch.zeros(1, 4).expand(6, 4)),
        ValueError,
        "out must not overlap itself; got shape (6, 4) with strides (0, 1). Pass a clone.",
    ),
    "out that requires grad": (forward(out=torch.zeros(6, 4, requires_grad=True)), ValueError, f"out {GRAD}"),
    "out of inference mode": (
        lambda: _with(FORWARD, out=of_inference_mode(6, 4)),
        ValueError,
        "out must not be an inference tensor outside inference mode; got one. Pass a clone.",
    ),
    "plain that requires grad": (forward(plain=torch.zeros(6, 4, requires_grad=True)), ValueError, f"plain {GRAD}"),
    "gates that require grad": (forward(gates=torch.zeros(6, 8, requires_grad=True)), ValueError, f"gates {GRAD}"),
    "bias that requires grad": (forward(bias=torch.zeros(4, requires_grad=True)), ValueError, f"bias {GRAD}"),
    "plain of another shape": (
        forward(plain=torch.zeros(4, 6)),
        ValueError,
        "plain must have the shape of out (6, 4); got (4, 6).",
    ),
    "response of another dtype": (
        forward(response=torch.zeros(6, 4, dtype=torch.float64)),
        TypeError,
        "response must be float32 beside out of float32; got float64.",
    ),
    "response elsewhere": (
        forward(response=torch.zeros(6, 4, device="meta")),
        ValueError,
        "response must be on cpu, the device of out; got meta.",
    ),
    "response sparse": (
        lambda: _with(FORWARD, response=torch.zeros(6, 4).to_sparse()),
        TypeError,
        "response must be a strided (dense) tensor; got sparse_coo. Call .to_dense() on it.",
    ),
    "gates wider than the data": (
        forward(gates=torch.zeros(6, 8, dtype=torch.float64)),
        TypeError,
        "gates must be float32 beside out of float32; got float64.",
    ),
    "gates of one dimension": (
        forward(gates=torch.zeros(8)),
        ValueError,
        "gates must have 2 dimensions, examples and channels; got shape (8,).",
    ),
    "gates of one row": (
        forward(gates=torch.zeros(1, 8)),
        ValueError,
        f"gates must {ROWS}; got shape (1, 8).",
    ),
    "gates of the response alone": (
        forward(gates=torch.zeros(6, 4)),
        ValueError,
        "gates must have two columns for each channel, 8; got shape (6, 4).",
    ),
    "gates of other columns": (
        forward(gates=torch.zeros(6, 5), response_bias=None),
        ValueError,
        "gates must have a column or two for each channel, 4 or 8; got shape (6, 5).",
    ),
    "bias of other channels": (
        forward(bias=torch.zeros(5)),
        ValueError,
        "bias must have a number for each channel, 4; got shape (5,).",
    ),
    "response bias of two dimensions": (
        forward(response_bias=torch.zeros(1, 4)),
        ValueError,
        "response_bias must have a number for each channel, 4; got shape (1, 4).",
    ),
    "a batch_dim from the end": (
        forward(batch_dim=-2),
        ValueError,
        "batch_dim must be a dimension counted from 0; got -2.",
    ),
    "channels before examples": (
        forward(batch_dim=1, channel_dim=0),
        ValueError,
        "channel_dim must be a dimension after batch_dim; got 0.",
    ),
    "shared memory": (
        _overlapping,
        ValueError,
        "out must not share memory with response; got overlapping tensors. Pass a clone.",
    ),
    "freed memory": (
        _freed,
        ValueError,
        "plain must have storage for its elements; got a storage of 8 bytes."
        " It was resized or freed behind the tensor.",
    ),
    "sums of 16 bits": (
        backward(sums=torch.zeros(6, 8, dtype=torch.float16)),
        TypeError,
        "sums must be float32 or float64; got float16.",
    ),
    "sums of other columns": (
        backward(sums=torch.zeros(6, 4)),
        ValueError,
        "sums must have a row for each example and two columns for each channel, 6 and 8; got shape (6, 4).",
    ),
    "grad wider than the sums": (
        backward(grad=torch.zeros(6, 4, dtype=torch.float64)),
        TypeError,
        "grad must be float32, bfloat16 or float16 beside sums of float32; got float64.",
    ),
    "grad that requires grad": (backward(grad=torch.zeros(6, 4, requires_grad=True)), ValueError, f"grad {GRAD}"),
    "response of a shape of its own": (
        backward(response=torch.zeros(6, 3)),
        ValueError,
        "response must have the shape of grad; got shape (6, 3).",
    ),
    "gates of other examples": (backward(gates=torch.zeros(5, 8)), ValueError, f"gates must {ROWS}; got shape (5, 8)."),
    "grads of another dtype": (
        backward(grads=torch.zeros(6, 8, dtype=torch.float64)),
        TypeError,
        "grads must be float32 beside grad of float32; got float64.",
    ),
    "grads of other channels": (
        backward(grads=torch.zeros(6, 12)),
        ValueError,
        "grads must have the shape of grad, or that with twice the channels; got shape (6, 12).",
    ),
    "grads expanded": (
        backward(grads=torch.zeros(1, 8).expand(6, 8)),
        ValueError,
        "grads must not overlap itself; got shape (6, 8) with strides (0, 1). Pass a clone.",
    ),
    "shared of another dtype": (
        backward(shared=torch.zeros(2, 4, dtype=torch.float64)),
        TypeError,
        "shared must be float32 beside sums of float32; got float64.",
    ),
    "shared of one row": (
        backward(shared=torch.zeros(1, 4)),
        ValueError,
        "shared must have two rows of a number for each channel, 4; got shape (1, 4).",
    ),
    "response bias for no one": (
        backward(shared=None),
        ValueError,
        "response_bias must be None without gates and shared; got shape (4,).",
    ),
    "response bias beside gates of the response alone": (
        backward(gates=torch.zeros(6, 4)),
        ValueError,
        "gates must have two columns for each channel, 8; got shape (6, 4).",
    ),
    "response bias of more channels": (
        backward(response_bias=torch.zeros(5)),
        ValueError,
        "response_bias must have a number for each channel, 4; got shape (5,).",
    ),
    "grads without gates": (
        backward(gates=None, response_bias=None),
        ValueError,
        "grads must be None without gates; got shape (6, 8).",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("module", [_ops, torch.ops.nestopt_ext], ids=["typed", "op"])
def test_refused_by_name_and_nothing_is_modified(module, name):
    make, kind, message = HOSTILE[name]
    arguments = make()
    op = "stn_gate_" if "out" in arguments else "stn_gate_backward_"
    tensors = [t for t in arguments.values() if isinstance(t, torch.Tensor)]
    assert_refused(lambda: getattr(module, op)(**arguments), tensors, kind, f"{op}: {message}")


@pytest.mark.parametrize(("op", "name"), [("stn_gate_", n) for n in ("out", "response", "gates")])
def test_none_is_no_tensor(op, name):
    with pytest.raises((TypeError, NotImplementedError)):
        getattr(_ops, op)(**_with(FORWARD, **{name: None}))


def test_a_tangent_is_refused():
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.zeros(6, 4), torch.ones(6, 4))
        with pytest.raises(ValueError, match="stn_gate_: response must not carry a forward-mode tangent"):
            _ops.stn_gate_(**_with(FORWARD, response=dual))
        with pytest.raises(ValueError, match="stn_gate_backward_: grad must not carry a forward-mode tangent"):
            _ops.stn_gate_backward_(**_with(BACKWARD, grad=dual))


# ---- the dispatcher -------------------------------------------------------------------------------------------------


def test_autograd_is_told_of_the_write(device):
    for layout in (contiguous, LAYOUTS["every_other"]):
        problem = Problem(*CASES[6], device=device, layout=layout)
        _, *read = problem.forward_arguments
        written = (problem.out, problem.sums, problem.grads, problem.shared)
        before = [t._version for t in (*read, problem.grad)], [t._version for t in written]
        _ops.stn_gate_(*problem.forward_arguments, **problem.dims)
        _ops.stn_gate_backward_(*problem.backward_arguments, **problem.dims)
        assert [t._version for t in (*read, problem.grad)] == before[0]
        assert all(t._version > v for t, v in zip(written, before[1], strict=True))


def test_copy_on_write(native):
    problem = Problem(*CASES[1])
    base = problem.plain
    problem.out, problem.plain = torch._lazy_clone(base), torch._lazy_clone(base)
    _ops.stn_gate_(*problem.forward_arguments, **problem.dims)
    assert same_bits(base, problem.plain) and not torch.equal(base, problem.out)


def test_in_inference_mode_and_without_grad(device):
    with torch.inference_mode():
        problem = Problem(*CASES[6], device=device)
        problem.check_forward()
        problem.check_backward()
    with torch.no_grad():
        problem = Problem(*CASES[6], device=device)
        problem.response.requires_grad_()
        problem.check_forward()
        problem.check_backward()


@pytest.mark.parametrize("pair", PAIRS, ids=PAIR_IDS)
def test_opcheck(pair, device):
    ops = torch.ops.nestopt_ext
    problem = Problem(*CASES[3], pair, device, LAYOUTS["permuted"])
    for t in (problem.out, problem.sums, problem.grads, problem.shared):
        t.zero_()
    torch.library.opcheck(ops.stn_gate_.default, problem.forward_arguments, problem.dims)
    torch.library.opcheck(ops.stn_gate_backward_.default, problem.backward_arguments, problem.dims)
    out, _, response, gates, _, _ = problem.forward_arguments
    torch.library.opcheck(ops.stn_gate_.default, (out, None, response, gates, None, None), problem.dims)
    sums, grad, response = problem.sums, problem.grad, problem.response
    arguments = (sums, None, None, grad, response, None, None)
    torch.library.opcheck(ops.stn_gate_backward_.default, arguments, problem.dims)


def test_compiled_is_one_graph(device):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(plain, response, gates, bias, response_bias, grad):
        out, sums = torch.zeros_like(plain * 2), torch.zeros_like(gates * 2)
        _ops.stn_gate_(out, plain, response, gates, bias, response_bias, batch_dim=0, channel_dim=1)
        _ops.stn_gate_backward_(sums, None, None, grad, response, gates, None, batch_dim=0, channel_dim=1)
        return out + 1, sums

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for _ in range(3):
        problem = Problem(*CASES[6], device=device)
        arguments = (*problem.forward_arguments[1:], problem.grad)
        assert all(same_bits(a, b) for a, b in zip(compiled(*arguments), step(*arguments), strict=True))
    assert counter.frame_count == 1


def test_fuzz():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @hypothesis.given(st.data(), st.lists(st.integers(1, 5), min_size=2, max_size=5), st.sampled_from(PAIRS))
    def run(data, shape, pair):
        batch_dim = data.draw(st.integers(0, len(shape) - 2))
        channel_dim = data.draw(st.integers(batch_dim + 1, len(shape) - 1))
        layouts = st.sampled_from(list(LAYOUTS.values()))
        problem = Problem(tuple(shape), batch_dim, channel_dim, pair, layout=data.draw(layouts))
        problem.plain, problem.grad = data.draw(layouts)(problem.plain), data.draw(layouts)(problem.grad)
        problem.check_forward()
        problem.check_backward()

    run()


def test_the_reference_is_what_one_would_write(device):
    problem = Problem(*CASES[6], (torch.float64, torch.float64), device)
    plain, response, gates, bias, response_bias = problem.forward_arguments[1:]
    w, b = gates[:, :7, None, None], gates[:, 7:, None, None]
    want = plain + bias[:, None, None] + w * response + b * response_bias[:, None, None]
    torch.testing.assert_close(_reference.stn_gate(plain, response, gates, bias, response_bias, 0, 1), want)
    sums = _reference.stn_gate_sums(problem.grad, response, 0, 1)
    want = torch.cat([(problem.grad * response).sum((2, 3)), problem.grad.sum((2, 3))], 1)
    torch.testing.assert_close(sums, want)


@pytest.mark.big_memory
def test_more_elements_than_32_bits_count(device):
    shape = (1, 2**31 + 64)
    x = torch.zeros(shape, dtype=torch.float16, device=device)
    x[0, -1] = 3.0
    gates = torch.full((1, 1), 2.0, dtype=torch.float16, device=device).expand(1, shape[1])
    out = torch.empty_like(x)
    _ops.stn_gate_(out, x, x, gates, None, None, batch_dim=0, channel_dim=1)
    assert out[0, -1] == 9.0 and (out[0, :-1] == 0).all()
