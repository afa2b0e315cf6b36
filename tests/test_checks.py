"""Hostile arguments to every op: refused by name, with one message on every route, and nothing is modified.

Each row of the table spoils one argument of a valid call. It goes through the typed function of ``_ops``, through
``torch.ops`` and through the checks of the reference path, which must all say the same.
"""

import contextlib
import math
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from helpers import LAYOUTS, Memory, run_python, storage_bytes
from torch.testing._internal.two_tensor import TwoTensor

from nestopt_ext import _ops

NAN, INF = float("nan"), float("inf")
COUNT = 20  # tensors in a list; the faults are in the middle of it
BAD = 11
SHAPE = (6, 4)


@dataclass(frozen=True)
class Op:
    """What the table needs to know of an op.

    ``follow`` maps the other lists to whether they are written; ``optional`` are those that may be empty; ``counters``
    are lists of one number beside each tensor.
    """

    name: str
    leading: str
    follow: dict
    scalar: str  # a tensor argument that must be finite
    numbers: tuple
    beside: tuple  # optional tensor arguments on the device of the leading list
    counters: tuple = ()
    optional: tuple = ()

    @property
    def lists(self):
        return [self.leading, *self.follow]

    @property
    def written(self):
        return [self.leading, *(name for name, written in self.follow.items() if written)]

    def arguments(self, dtype=torch.float32):
        arguments = {name: [torch.rand(SHAPE, dtype=dtype) for _ in range(COUNT)] for name in self.lists}
        arguments.update({name: [torch.ones(()) for _ in range(COUNT)] for name in self.counters})
        return {**arguments, self.scalar: torch.tensor(0.1), **dict.fromkeys(self.numbers, 0.25)}


SGD = Op(
    "complex_sgd_step_",
    "params",
    {"grads": False, "momentum_buffers": True, "momentum_buffers_imag": True},
    "lr",
    ("momentum", "momentum_imag", "dampening", "weight_decay"),
    ("grad_scale", "found_inf"),
)
ADAM = Op(
    "complex_adam_step_",
    "params",
    {"grads": False, "exp_avgs": True, "exp_avgs_imag": True, "exp_avg_sqs": True, "max_exp_avg_sqs": True},
    "lr",
    ("beta1", "beta1_imag", "beta2", "eps", "weight_decay"),
    ("grad_scale", "found_inf"),
    counters=("steps",),
    optional=("max_exp_avg_sqs",),
)
NEUMANN = Op("neumann_step_", "v", {"p": True, "av": False}, "alpha", ("damping",), ("sq_norm",), optional=("av",))
OPS = [ADAM, SGD, NEUMANN]


def wrapper(op, arguments):
    arguments = dict(arguments)
    for name in ("momentum", "beta1"):
        if name in arguments:
            arguments[name] = complex(arguments[name], arguments.pop(f"{name}_imag"))
    getattr(_ops, op.name)(**arguments)


def direct(op, arguments):
    getattr(torch.ops.nestopt_ext, op.name)(**arguments)


def reference_check(op, arguments):
    getattr(_ops, "check_" + op.name.removesuffix("_"))(**arguments)


ROUTES = [wrapper, direct, reference_check]


def tensors_of(arguments):
    """Every plain tensor among the arguments."""
    values = [t for value in arguments.values() for t in (value if isinstance(value, list) else [value])]
    return [
        t
        for t in values
        if type(t) in (torch.Tensor, torch.nn.Parameter)
        and t.layout == torch.strided
        and t.device.type == "cpu"
        and not t.is_quantized
    ]


@dataclass(frozen=True)
class Row:
    name: str
    op: Op
    spoil: object  # changes the arguments in place
    kind: type
    message: str
    crash: bool = False  # touches memory that is not there; also run where a signal would be seen

    def __str__(self):
        return f"{self.op.name}-{self.name}"


ROWS = []


def row(name, op, kind, message, crash=False):
    def register(spoil):
        ROWS.append(Row(name, op, spoil, kind, f"{op.name}: {message}", crash))

    return register


def shape_text(shape):
    return str(tuple(shape))


def put(argument, value):
    """Spoils one element of a list, or an argument that is no list."""

    def spoil(arguments):
        new = value(arguments) if callable(value) else value
        if isinstance(arguments.get(argument), list):
            arguments[argument][BAD] = new
        else:
            arguments[argument] = new

    return spoil


def freed():
    t = torch.randn(SHAPE)
    t.untyped_storage().resize_(0)
    return t


def shrunk():
    t = torch.randn(SHAPE)
    t.untyped_storage().resize_(20)
    return t


def off_by_one_byte(shape=SHAPE):
    data = bytearray(4 * math.prod(shape) + 1)
    return torch.frombuffer(data, dtype=torch.float32, offset=1, count=math.prod(shape)).view(shape)


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(SHAPE), 0.1, 0, torch.quint8)


def csr():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ones(SHAPE).to_sparse_csr()


def inference_tensor():
    with torch.inference_mode():
        return torch.ones(SHAPE)


FLOATS = "float32, float64, bfloat16 or float16"
FREED = "must have storage for its elements; got a storage of {} bytes. It was resized or freed behind the tensor."
DENSE = "must be a strided (dense) tensor; got {}. Call .to_dense() on it."

for op in OPS:
    lead = f"{op.leading}[{BAD}]"
    for name in op.lists:
        label = f"{name}[{BAD}]"
        beside = f" beside {lead} of float32" if name != op.leading else ""
        wanted = {op.leading: FLOATS, "av": "float32, bfloat16 or float16"}.get(name, "float32")
        for dtype in (torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e5m2):
            row(f"{name}-{dtype}", op, TypeError, f"{label} must be {wanted}{beside}; got {str(dtype)[6:]}.")(
                put(name, torch.ones(SHAPE).to(dtype))
            )
        row(f"{name}-quantized", op, TypeError, f"{label} must be {wanted}{beside}; got quint8.")(
            put(name, lambda a: quantized())
        )
        if name != op.leading:
            row(f"{name}-double", op, TypeError, f"{label} must be {wanted}{beside}; got float64.")(
                put(name, torch.ones(SHAPE, dtype=torch.float64))
            )
            for shape in ((4, 6), (6, 3), (6, 5), (24,), (), (0,), (1, 1), (6, 4, 1)):
                row(
                    f"{name}-shape{shape}",
                    op,
                    ValueError,
                    f"{label} must have the shape of {lead} {SHAPE}; got {shape_text(shape)}.",
                )(put(name, lambda a, shape=shape: torch.ones(shape)))
            row(f"{name}-meta", op, ValueError, f"{label} must be on cpu, the device of {lead}; got meta.")(
                put(name, torch.ones(SHAPE, device="meta"))
            )

            def shorten(arguments, name=name):
                arguments[name].pop()

            def lengthen(arguments, name=name):
                arguments[name].append(torch.ones(SHAPE))

            def empty(arguments, name=name):
                arguments[name] = []

            for got, spoil in ((COUNT - 1, shorten), (COUNT + 1, lengthen)):
                row(
                    f"{name}-{got}", op, ValueError, f"{name} must have the length of {op.leading}, {COUNT}; got {got}."
                )(spoil)
            why = {
                "momentum_buffers": ", while momentum is not zero",
                "momentum_buffers_imag": ", while momentum_imag is not zero",
                "exp_avgs_imag": ", while beta1_imag is not zero",
            }.get(name, "")
            if name not in op.optional:
                message = f"{name} must have the length of {op.leading}, {COUNT}{why}; got 0."
                row(f"{name}-none", op, ValueError, message)(empty)
        else:
            row(
                f"{name}-meta",
                op,
                ValueError,
                f"{label} must be on cpu, the device of {name}[0]; got meta. Call once per device.",
            )(put(name, torch.ones(SHAPE, device="meta")))
        row(f"{name}-sparse", op, TypeError, f"{label} {DENSE.format('sparse_coo')}")(
            put(name, lambda a: torch.ones(SHAPE).to_sparse())
        )
        row(f"{name}-csr", op, TypeError, f"{label} {DENSE.format('sparse_csr')}")(put(name, lambda a: csr()))
        row(f"{name}-mkldnn", op, TypeError, f"{label} {DENSE.format('_mkldnn')}")(
            put(name, lambda a: torch.ones(SHAPE).to_mkldnn())
        )
        row(f"{name}-freed", op, ValueError, f"{label} {FREED.format(0)}", True)(put(name, lambda a: freed()))
        row(f"{name}-shrunk", op, ValueError, f"{label} {FREED.format(20)}", True)(put(name, lambda a: shrunk()))
        row(
            f"{name}-misaligned",
            op,
            ValueError,
            f"{label} must be aligned to its element size, 4 bytes; got an address that is 1 past it. Pass a clone.",
            True,
        )(put(name, lambda a: off_by_one_byte()))

    for name in op.written:
        label = f"{name}[{BAD}]"
        row(
            f"{name}-requires-grad",
            op,
            ValueError,
            f"{label} must not require grad while grad mode is on; got one that does. Call under torch.no_grad().",
        )(put(name, lambda a: torch.ones(SHAPE, requires_grad=True)))
        row(
            f"{name}-inference",
            op,
            ValueError,
            f"{label} must not be an inference tensor outside inference mode; got one. Pass a clone.",
        )(put(name, lambda a: inference_tensor()))
        for kind, strides in (
            ("expanded", (0, 1)),
            ("sliding", (1, 1)),
            ("one-cell", (0, 0)),
            ("overlapping-rows", (3, 1)),
        ):
            row(
                f"{name}-{kind}",
                op,
                ValueError,
                f"{label} must not overlap itself; got shape {SHAPE} with strides {strides}. Pass a clone.",
                True,
            )(put(name, lambda a, strides=strides: torch.randn(64).as_strided(SHAPE, strides)))
        shares = "must not share memory with {}; got overlapping tensors. Pass a clone."

        def twice(arguments, name=name):
            arguments[name][BAD] = arguments[name][3]

        def partly(arguments, name=name):
            flat = torch.randn(40)
            arguments[name][3], arguments[name][BAD] = flat[:24].view(SHAPE), flat[16:].view(SHAPE)

        def one_element(arguments, name=name):
            flat = torch.randn(47)
            arguments[name][3], arguments[name][BAD] = flat[:24].view(SHAPE), flat[23:].view(SHAPE)

        def from_numpy_twice(arguments, name=name):
            array = np.ones(SHAPE, dtype=np.float32)
            arguments[name][3], arguments[name][BAD] = torch.from_numpy(array), torch.from_numpy(array)

        def one_column(arguments, name=name):
            base = torch.randn(6, 8)
            arguments[name][3], arguments[name][BAD] = base[:, ::2], base[:, 2:6]

        for kind, spoil in (
            ("twice", twice),
            ("partly", partly),
            ("one-element", one_element),
            ("numpy", from_numpy_twice),
            ("one-column", one_column),
        ):
            row(f"{name}-{kind}", op, ValueError, f"{name}[3] {shares.format(label)}")(spoil)
        for other in op.lists:
            if other in op.written and op.lists.index(other) <= op.lists.index(name):
                continue

            def alias(arguments, name=name, other=other):
                arguments[other][4] = arguments[name][BAD]

            def overlap(arguments, name=name, other=other):
                flat = torch.randn(25)
                arguments[name][BAD], arguments[other][BAD] = flat[:24].view(SHAPE), flat[1:].view(SHAPE)

            def transposed(arguments, name=name, other=other):
                arguments[other][BAD] = arguments[name][BAD].reshape(4, 6).t()

            row(f"{name}-is-{other}", op, ValueError, f"{label} {shares.format(f'{other}[4]')}")(alias)
            row(f"{name}-overlaps-{other}", op, ValueError, f"{label} {shares.format(f'{other}[{BAD}]')}")(overlap)
            row(f"{name}-transposed-{other}", op, ValueError, f"{label} {shares.format(f'{other}[{BAD}]')}")(transposed)

        def scalar_inside(arguments, name=name, scalar=op.scalar):
            arguments[scalar] = arguments[name][BAD].view(-1)[5]

        row(f"{name}-holds-{op.scalar}", op, ValueError, f"{label} {shares.format(op.scalar)}")(scalar_inside)

    for name in op.counters:
        label = f"{name}[{BAD}]"
        for dtype in (torch.float16, torch.bfloat16, torch.int64, torch.complex64, torch.bool):
            row(f"{name}-{dtype}", op, TypeError, f"{label} must be float32 or float64; got {str(dtype)[6:]}.")(
                put(name, torch.ones((), dtype=dtype))
            )
        for shape in ((2,), (0,), (1, 3), SHAPE):
            row(
                f"{name}-shape{shape}", op, ValueError, f"{label} must have one element; got shape {shape_text(shape)}."
            )(put(name, torch.ones(shape)))
        row(f"{name}-sparse", op, TypeError, f"{label} {DENSE.format('sparse_coo')}")(
            put(name, lambda a: torch.ones(1).to_sparse())
        )
        row(f"{name}-meta", op, ValueError, f"{label} must be on cpu, the device of {lead}; got meta.")(
            put(name, torch.ones((), device="meta"))
        )

        def freed_counter(a):
            t = torch.ones(())
            t.untyped_storage().resize_(0)
            return t

        row(f"{name}-freed", op, ValueError, f"{label} {FREED.format(0)}", True)(put(name, freed_counter))
        row(
            f"{name}-misaligned",
            op,
            ValueError,
            f"{label} must be aligned to its element size, 4 bytes; got an address that is 1 past it. Pass a clone.",
            True,
        )(put(name, lambda a: off_by_one_byte((1,))))
        for got in (0, COUNT - 1):
            row(f"{name}-{got}", op, ValueError, f"{name} must have the length of {op.leading}, {COUNT}; got {got}.")(
                lambda a, name=name, got=got: a.update({name: a[name][:got]})
            )
        row(
            f"{name}-requires-grad",
            op,
            ValueError,
            f"{label} must not require grad while grad mode is on; got one that does. Call under torch.no_grad().",
        )(put(name, lambda a: torch.ones((), requires_grad=True)))
        row(f"{name}-twice", op, ValueError, f"{name}[3] {shares.format(label)}")(
            lambda a, name=name: a[name].__setitem__(BAD, a[name][3])
        )
        for other in op.lists:
            first, second = (f"{other}[{BAD}]", label) if other in op.written else (label, f"{other}[{BAD}]")
            row(f"{name}-in-{other}", op, ValueError, f"{first} {shares.format(second)}")(
                lambda a, name=name, other=other: a[name].__setitem__(BAD, a[other][BAD].view(-1)[5])
            )
        row(f"{name}-is-{op.scalar}", op, ValueError, f"{label} {shares.format(op.scalar)}")(
            lambda a, name=name, scalar=op.scalar: a[name].__setitem__(BAD, a[scalar])
        )

    for name in (op.scalar, *op.beside):
        for dtype in (torch.float16, torch.int64, torch.complex64, torch.bool):
            row(f"{name}-{dtype}", op, TypeError, f"{name} must be float32 or float64; got {str(dtype)[6:]}.")(
                put(name, torch.ones((), dtype=dtype))
            )
        for shape in ((2,), (0,), (1, 3)):
            row(
                f"{name}-shape{shape}", op, ValueError, f"{name} must have one element; got shape {shape_text(shape)}."
            )(put(name, torch.ones(shape)))
        row(f"{name}-sparse", op, TypeError, f"{name} {DENSE.format('sparse_coo')}")(
            put(name, lambda a: torch.ones(1).to_sparse())
        )
        row(f"{name}-meta", op, ValueError, f"{name} must be on cpu; got meta.")(
            put(name, torch.ones((), device="meta"))
        )

        def scalar_freed(a):
            t = torch.ones(())
            t.untyped_storage().resize_(0)
            return t

        row(f"{name}-freed", op, ValueError, f"{name} {FREED.format(0)}", True)(put(name, scalar_freed))
        row(
            f"{name}-misaligned",
            op,
            ValueError,
            f"{name} must be aligned to its element size, 4 bytes; got an address that is 1 past it. Pass a clone.",
            True,
        )(put(name, lambda a: off_by_one_byte((1,))))
    row(f"{op.scalar}-none", op, TypeError, f"{op.scalar} must be a tensor; got None.")(put(op.scalar, lambda a: None))
    for value in (NAN, INF, -INF):
        row(f"{op.scalar}-{value}", op, ValueError, f"{op.scalar} must be finite; got {value}.")(
            put(op.scalar, torch.tensor(value, dtype=torch.float64))
        )
        for name in op.numbers:
            row(f"{name}-{value}", op, ValueError, f"{name} must be finite; got {value}.")(put(name, value))
    row(f"{op.numbers[0]}-minus-nan", op, ValueError, f"{op.numbers[0]} must be finite; got nan.")(
        put(op.numbers[0], math.copysign(NAN, -1.0))
    )
    row("count-of-leading", op, ValueError, f"{op.lists[1]} must have the length of {op.leading}, 0; got {COUNT}.")(
        lambda a, name=op.leading: a.update({name: []})
    )

for change, message in (
    ({"beta1": 1.0, "beta1_imag": 0.0}, "beta1 must have a modulus below 1; got 1."),
    ({"beta1": 0.8, "beta1_imag": -0.9}, "beta1 must have a modulus below 1; got 1.20416."),
    ({"beta2": 1.0}, "beta2 must be in [0, 1); got 1."),
    ({"beta2": -1e-9}, "beta2 must be in [0, 1); got -1e-09."),
    ({"eps": -0.5}, "eps must not be negative; got -0.5."),
    (
        {"bias_correction": True},
        "beta1_imag must be zero with bias_correction; got 0.25."
        " A complex average does not converge where this momentum does: leave bias_correction off.",
    ),
):
    row("-".join(f"{k}={v}" for k, v in change.items()), ADAM, ValueError, message)(lambda a, c=change: a.update(c))
row(
    "half-average",
    ADAM,
    TypeError,
    f"exp_avg_sqs[{BAD}] must be float32 beside params[{BAD}] of float16; got float16.",
)(
    lambda a: [
        *[put(name, torch.ones(SHAPE).half())(a) for name in ("params", "grads", "exp_avg_sqs")],
        *[put(name, torch.ones(SHAPE))(a) for name in ("exp_avgs", "exp_avgs_imag")],
    ]
)
row(
    "sq_norm-in-p",
    NEUMANN,
    ValueError,
    f"p[{BAD}] must not share memory with sq_norm; got overlapping tensors. Pass a clone.",
)(lambda a: a.update(sq_norm=a["p"][BAD].view(-1)[5]))
row(
    "sq_norm-is-alpha",
    NEUMANN,
    ValueError,
    "sq_norm must not share memory with alpha; got overlapping tensors. Pass a clone.",
)(lambda a: a.update(sq_norm=a["alpha"]))
row(
    "found_inf-in-buffer",
    SGD,
    ValueError,
    f"momentum_buffers[{BAD}] must not share memory with found_inf; got overlapping tensors. Pass a clone.",
)(lambda a: a.update(found_inf=a["momentum_buffers"][BAD].view(-1)[5:6]))
row(
    "imag-alone",
    SGD,
    ValueError,
    f"momentum_buffers must have the length of params, {COUNT}, while momentum is not zero; got 0.",
)(lambda a: a.update(momentum=0.0, momentum_imag=0.0, momentum_buffers=[]))
row("half-beside-double", NEUMANN, TypeError, f"av[{BAD}] must be float64 beside v[{BAD}] of float64; got bfloat16.")(
    lambda a: (
        put("v", torch.ones(SHAPE).double())(a),
        put("p", torch.ones(SHAPE).double())(a),
        put("av", torch.ones(SHAPE).bfloat16())(a),
    )
)
row(
    "half-buffer",
    SGD,
    TypeError,
    f"momentum_buffers[{BAD}] must be float32 beside params[{BAD}] of bfloat16; got bfloat16.",
)(lambda a: [put(name, torch.ones(SHAPE).bfloat16())(a) for name in ("params", "grads", "momentum_buffers")])


def test_the_table_has_no_row_twice():
    assert len({str(r) for r in ROWS}) == len(ROWS) > 300


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("route", ROUTES, ids=lambda f: f.__name__)
def test_the_call_that_the_table_spoils_is_valid(op, route):
    route(op, op.arguments())


@pytest.mark.parametrize("bad", ROWS, ids=str)
def test_refused_by_name_and_nothing_is_modified(bad):
    for route in ROUTES:
        arguments = bad.op.arguments()
        bad.spoil(arguments)
        memory = Memory(tensors_of(arguments))
        with pytest.raises(bad.kind) as caught:
            route(bad.op, arguments)
        assert str(caught.value) == bad.message, route.__name__
        assert type(caught.value) is bad.kind
        assert memory.unchanged(), route.__name__


def in_this_process():
    """Runs the rows that touch memory which is not there; called in a process of its own."""
    for bad in [r for r in ROWS if r.crash]:
        for route in ROUTES:
            arguments = bad.op.arguments()
            bad.spoil(arguments)
            print(bad, route.__name__, flush=True)
            try:
                route(bad.op, arguments)
            except bad.kind:
                continue
            raise AssertionError(f"{bad} was not refused")
    print("all refused")


@pytest.mark.parametrize("disable_native", ["0", "1"], ids=["native", "reference"])
def test_no_row_kills_the_process(disable_native):
    done = run_python("import test_checks; test_checks.in_this_process()", NESTOPT_DISABLE_NATIVE=disable_native)
    assert done.returncode == 0 and done.stdout.endswith("all refused\n"), (done.stdout[-200:], done.stderr[-1000:])


# ---- arguments that torch refuses before an op sees them ------------------------------------------------------------


def nested(a, name):
    a[name][BAD] = [a[name][BAD]]


TORCH_REFUSES = {
    "none": lambda a, name: a[name].__setitem__(BAD, None),
    "number": lambda a, name: a[name].__setitem__(BAD, 1.0),
    "nested": nested,
    "tensor-for-list": lambda a, name: a.__setitem__(name, 5),
    "text": lambda a, name: a.__setitem__(name, "abc"),
    "none-for-list": lambda a, name: a.__setitem__(name, None),
}


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("fault", TORCH_REFUSES)
def test_what_is_no_list_of_tensors(op, fault):
    for name in (*op.lists, *op.counters):
        for route in (wrapper, direct):
            arguments = op.arguments()
            memory = Memory(tensors_of(arguments))
            TORCH_REFUSES[fault](arguments, name)
            with pytest.raises((RuntimeError, TypeError), match=name) as caught:
                route(op, arguments)
            assert op.name in str(caught.value)
            assert memory.unchanged()


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_missing_unknown_and_wrong_scalars(op):
    for name in op.numbers:
        for value in ("text", None, torch.ones(2), [0.1]):
            arguments = op.arguments()
            memory = Memory(tensors_of(arguments))
            with pytest.raises((RuntimeError, TypeError), match=name):
                direct(op, {**arguments, name: value})
            assert memory.unchanged()
    for change in ({"colour": 1}, {op.scalar: "text"}):
        with pytest.raises((RuntimeError, TypeError), match=next(iter(change))):
            direct(op, {**op.arguments(), **change})


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("route", ROUTES, ids=lambda f: f.__name__)
def test_empty_lists_do_nothing(op, route):
    arguments = {name: [] if isinstance(value, list) else value for name, value in op.arguments().items()}
    route(op, arguments)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_lazily_negated_tensors(op):
    """Written, they are refused; read, they count as what they show."""
    for name in op.written:
        for route in (wrapper, direct):
            arguments = op.arguments()
            base = arguments[name][BAD]
            arguments[name][BAD] = torch._neg_view(base)
            memory = Memory([*tensors_of(arguments), base])
            with pytest.raises(RuntimeError, match="negat"):
                route(op, arguments)
            assert memory.unchanged()
    read = next(name for name in op.follow if name not in op.written)
    arguments, twin = op.arguments(), op.arguments()
    for name in (*op.lists, *op.counters):
        twin[name] = [t.clone() for t in arguments[name]]
    twin[read][BAD] = -arguments[read][BAD]
    arguments[read][BAD] = torch._neg_view(arguments[read][BAD])
    direct(op, arguments)
    direct(op, twin)
    assert torch.equal(arguments[op.leading][BAD], twin[op.leading][BAD])


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_under_vmap(op):
    arguments = op.arguments()

    def call(*leading):
        direct(op, {**arguments, op.leading: list(leading)})

    batched = [torch.ones(3, *SHAPE) for _ in range(COUNT)]
    memory = Memory(batched)
    with pytest.raises(RuntimeError, match=op.name):
        torch.func.vmap(call)(*batched)
    assert memory.unchanged()


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_wrapper_subclasses_dispatch_to_what_they_wrap(op):
    arguments, inner = op.arguments(), op.arguments()
    for name in (*op.lists, *op.counters):
        inner[name] = [t.clone() for t in arguments[name]]
        arguments[name] = [TwoTensor(t, t.clone()) for t in arguments[name]]
    direct(op, arguments)
    direct(op, inner)
    for found, wanted in zip(arguments[op.leading], inner[op.leading], strict=True):
        assert torch.equal(found.a, wanted) and torch.equal(found.b, wanted)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_nested_tensors_are_refused(op):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for layout in (torch.strided, torch.jagged):
            ragged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
            for name in op.lists:
                arguments = op.arguments()
                memory = Memory(tensors_of(arguments))
                arguments[name][BAD] = ragged
                with pytest.raises((NotImplementedError, RuntimeError, TypeError, ValueError), match=op.name):
                    direct(op, arguments)
                assert memory.unchanged()


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_legal_roles_are_not_refused(op):
    """What looks hostile and is not."""
    plain = op.arguments()
    read = [name for name in op.follow if name not in op.written]

    def many_times(a):  # one tensor that is only read, in every place
        for name in read:
            a[name] = [a[name][0]] * COUNT

    def overlapping_reads(a):
        flat = torch.randn(200)
        for name in read:
            a[name] = [flat[i : i + 24].view(SHAPE) for i in range(COUNT)]

    def expanded_reads(a):
        for name in read:
            a[name] = [torch.randn(1, 1).expand(SHAPE) for _ in range(COUNT)]

    def scalar_that_is_read(a):
        a[op.scalar] = a[read[0]][0].view(-1)[0].fill_(0.1)

    def reads_require_grad(a):
        for name in read:
            a[name] = [t.requires_grad_() for t in a[name]]

    def zero_sized_views_of_one_place(a):
        base = torch.ones(4)
        for name in op.lists:
            a[name].append(base[2:2])
        for name in op.counters:
            a[name].append(torch.ones(()))

    def size_one_with_stride_zero(a):
        for name in (*op.lists, *op.counters):
            a[name].append(torch.ones(1).expand(1, 1))

    def fortran_order(a):
        for name in op.lists:
            a[name] = [LAYOUTS["permuted"](t) for t in a[name]]

    for change in (
        many_times,
        overlapping_reads,
        expanded_reads,
        scalar_that_is_read,
        reads_require_grad,
        zero_sized_views_of_one_place,
        size_one_with_stride_zero,
        fortran_order,
    ):
        for route in ROUTES:
            arguments = {k: [t.clone() for t in v] if isinstance(v, list) else v for k, v in plain.items()}
            change(arguments)
            before = storage_bytes(arguments[op.leading][0]).clone()
            with torch.no_grad() if change is reads_require_grad else contextlib.nullcontext():
                route(op, arguments)
            if route is not reference_check:
                assert not torch.equal(before, storage_bytes(arguments[op.leading][0])), change.__name__


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_devices_are_not_mixed(op):
    for name in op.follow:
        arguments = op.arguments()
        arguments[name][BAD] = arguments[name][BAD].cuda()
        with pytest.raises(
            ValueError, match=rf"{name}\[{BAD}\] must be on cpu, the device of {op.leading}\[{BAD}\]; got cuda:0"
        ):
            direct(op, arguments)
    arguments = op.arguments()
    arguments[op.scalar] = arguments[op.scalar].cuda()
    with pytest.raises(ValueError, match=f"{op.scalar} must be on cpu; got cuda:0"):
        direct(op, arguments)


@pytest.mark.parametrize("written", [True, False])
def test_a_derivative_is_refused_and_never_dropped(written):
    x = torch.ones(3)

    def step(t):
        v, av = (t.clone(), torch.ones(3)) if written else (torch.ones(3), t)
        _ops.neumann_step_([v], [torch.zeros(3)], [av], torch.tensor(0.1))
        return v.sum()

    name = "v" if written else "av"
    with pytest.raises(ValueError, match=rf"neumann_step_: {name}\[0\] must not require grad while grad mode is on"):
        torch.func.grad(step)(x)
    with pytest.raises(ValueError, match=rf"neumann_step_: {name}\[0\] must not carry a forward-mode tangent"):
        torch.func.jvp(step, (x,), (x,))
    with pytest.raises(ValueError, match=rf"neumann_step_: {name}\[0\] must not require grad"):
        step(x.clone().requires_grad_())
    with torch.no_grad():
        assert torch.isfinite(step(x.clone().requires_grad_()))


@pytest.mark.gpu
def test_empty_lists_beside_scalars_of_another_device():
    alpha, total = torch.tensor(0.1, device="cuda"), torch.ones(())
    torch.ops.nestopt_ext.neumann_step_([], [], [], alpha)
    torch.ops.nestopt_ext.neumann_step_([], [], [], alpha, sq_norm=total)
    assert total == 0
