"""Cases of complex_sgd_step_: optimizer steps, and the bare op, against torch.optim.SGD and complex arithmetic."""

import cmath
import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nestopt_ext import ComplexSGD, _ops, _reference

from .. import registry
from ..registry import BASELINE, OURS, Case, Contestant, Field, Goal, Setting
from . import _inputs

LR = 0.1  # large enough for a wrong update to show in every dtype
REAL = 0.9
COMPLEX = cmath.rect(0.9, math.pi / 8)

Expected = Callable[[int], Sequence[Tensor]]


def _expected(problem: _inputs.Problem, momentum: complex) -> Expected:
    """Params and real buffers after some steps of the reference in float64."""

    @functools.cache
    def after(num_steps: int) -> Sequence[Tensor]:
        params, grads = ([t.double() for t in tensors] for tensors in (problem.params, problem.grads))
        buffers, imag = ([torch.zeros_like(p) for p in params] for _ in range(2))
        for _ in range(num_steps):
            _reference.complex_sgd_step_(
                params, grads, buffers, imag, LR, momentum=momentum.real, momentum_imag=momentum.imag
            )
        return [*params, *buffers]

    return after


# ---- contestants ----------------------------------------------------------------------------------------------------


def _optimizer(
    problem: _inputs.Problem,
    name: str,
    role: str,
    make: Callable[[list[Tensor]], torch.optim.Optimizer],
    expected: Expected,
) -> Contestant:
    params = problem.parameters()
    optimizer = make(params)
    ours = isinstance(optimizer, ComplexSGD)
    num_buffers = 2 if ours and isinstance(optimizer.defaults["momentum"], complex) else 1

    def written() -> list[Tensor]:
        return [*params, *(optimizer.state[p]["momentum_buffer"] for p in params)]

    moved = problem.traffic(num_buffers, None if ours else problem.params_bytes)
    return Contestant(name, role, optimizer.step, moved, written, expected)


def _optimizers(problem: _inputs.Problem, expected: Expected, expected_real: Expected) -> list[Contestant]:
    """Ours, and the optimizers that a user would compare it with."""
    own_buffers = problem.params[0].dtype == problem.math
    kept = "" if own_buffers else f", {str(problem.params[0].dtype).removeprefix('torch.')} buffer"

    def ours(name: str, role: str, momentum: complex, foreach: bool) -> Contestant:
        return _optimizer(
            problem,
            name,
            role,
            lambda p: ComplexSGD(p, LR, momentum, foreach=foreach, fused=not foreach),
            expected if momentum == COMPLEX else expected_real,
        )

    def sgd(name: str, foreach: bool, fused: bool) -> Contestant:
        return _optimizer(
            problem,
            f"{name}{kept}",
            BASELINE,
            lambda p: torch.optim.SGD(p, LR, REAL, foreach=foreach, fused=fused),
            expected_real,
        )

    return [
        ours("ComplexSGD fused", OURS, COMPLEX, False),
        sgd("SGD fused", False, True),
        sgd("SGD foreach", True, False),
        sgd("SGD loop", False, False),
        ours("ComplexSGD foreach", BASELINE, COMPLEX, True),
        ours("ComplexSGD fused, real momentum", BASELINE, REAL, False),
    ]


def _eager_complex(problem: _inputs.Problem, expected: Expected) -> Contestant:
    """A complex64 buffer. Adding g to its real part saves the complex copy of g that ``buf + g`` makes."""
    params, grads = problem.copies()
    buffers = [torch.zeros_like(p, dtype=torch.complex64) for p in params]

    def step() -> None:
        for p, g, buf in zip(params, grads, buffers, strict=True):
            buf.mul_(COMPLEX)
            real = buf.real
            real.add_(g)
            p.add_(real, alpha=-LR)

    return Contestant(
        "eager complex64", BASELINE, step, problem.traffic(2), lambda: [*params, *(b.real for b in buffers)], expected
    )


def _eager_pair(problem: _inputs.Problem, expected: Expected) -> Contestant:
    """Two real buffers and a scratch tensor that is kept: the fewest passes over memory that eager calls allow."""
    params, grads = problem.copies()
    real, imag = problem.buffers(), problem.buffers()
    scratch = [torch.empty_like(p) for p in params]

    def step() -> None:
        for p, g, b, c, s in zip(params, grads, real, imag, scratch, strict=True):
            torch.mul(b, COMPLEX.imag, out=s)
            torch.add(g, b, alpha=COMPLEX.real, out=b)
            b.add_(c, alpha=-COMPLEX.imag)
            torch.add(s, c, alpha=COMPLEX.real, out=c)
            p.add_(b, alpha=-LR)

    return Contestant(
        "eager real+imag, kept scratch", BASELINE, step, problem.traffic(2), lambda: [*params, *real], expected
    )


def _compiled(problem: _inputs.Problem, expected: Expected) -> Contestant:
    """The same arithmetic fused by torch.compile."""
    params, grads = problem.copies()
    real, imag = problem.buffers(), problem.buffers()
    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=False)
    def update(params: list[Tensor], grads: list[Tensor], real: list[Tensor], imag: list[Tensor]) -> None:
        for p, g, b, c in zip(params, grads, real, imag, strict=True):
            new = COMPLEX.real * b - COMPLEX.imag * c + g
            c.copy_(COMPLEX.imag * b + COMPLEX.real * c)
            b.copy_(new)
            p.copy_(p - LR * new)

    return Contestant(
        "torch.compile",
        BASELINE,
        lambda: update(params, grads, real, imag),
        problem.traffic(2),
        lambda: [*params, *real],
        expected,
    )


def _bare(problem: _inputs.Problem, expected: Expected, expected_real: Expected) -> list[Contestant]:
    """The ops below the optimizers, on lists made beforehand."""
    params, grads = problem.copies()
    real, imag = problem.buffers(), problem.buffers()
    lr = torch.tensor(LR, dtype=torch.float64)
    theirs, their_grads = problem.copies()
    theirs_real = problem.buffers()

    def torch_step() -> None:
        torch._fused_sgd_(
            theirs,
            their_grads,
            theirs_real,
            weight_decay=0.0,
            momentum=REAL,
            lr=LR,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )

    return [
        Contestant(
            "complex_sgd_step_",
            OURS,
            lambda: _ops.complex_sgd_step_(params, grads, real, imag, lr, momentum=COMPLEX),
            problem.traffic(2),
            lambda: [*params, *real],
            expected,
        ),
        Contestant(
            "torch._fused_sgd_",
            BASELINE,
            torch_step,
            problem.traffic(1),
            lambda: [*theirs, *theirs_real],
            expected_real,
        ),
    ]


# ---- cases ----------------------------------------------------------------------------------------------------------


def _steps(
    shapes: Callable[[Setting], list[_inputs.Shape]],
    dtype: torch.dtype = torch.float32,
    *,
    channels_last: bool = False,
    compiled: bool = False,
) -> Callable[[Setting], Field]:
    def build(setting: Setting) -> Field:
        problem = _inputs.Problem(setting, shapes(setting), dtype, channels_last)
        expected, expected_real = _expected(problem, COMPLEX), _expected(problem, REAL)
        contestants = _optimizers(problem, expected, expected_real)
        contestants.append(_eager_complex(problem, expected))
        left_out = {}
        if dtype == problem.math:
            contestants.append(_eager_pair(problem, expected))
        if not compiled:
            left_out["torch.compile"] = "takes minutes to compile a step over so many tensors"
        elif setting.quick:
            left_out["torch.compile"] = "--quick"
        else:
            contestants.append(_compiled(problem, expected))
        return problem.field(contestants, left_out)

    return build


def _build_bare(setting: Setting) -> Field:
    problem = _inputs.Problem(setting, _inputs.many_small(setting), torch.float32)
    return problem.field(_bare(problem, _expected(problem, COMPLEX), _expected(problem, REAL)), {})


_BYTES = "7 words an element against 5: 1.40x is the ratio of bytes"
_NO_TEMPORARY = Goal(None, 0.01, "no temporary of parameter size")

registry.add(
    Case(
        "complex_sgd/large",
        "ComplexSGD.step() on one fp32 tensor of 30 M",
        _steps(_inputs.one_large, compiled=True),
        (
            Goal("SGD fused", 1.45, _BYTES),
            Goal("eager complex64", 1 / 2, "2x faster than eager complex arithmetic"),
            Goal("eager real+imag, kept scratch", 1 / 2, "2x faster than the best eager form"),
            _NO_TEMPORARY,
        ),
    )
)
registry.add(
    Case(
        "complex_sgd/resnet50",
        "ComplexSGD.step() on the 161 tensors of ResNet-50",
        _steps(_inputs.resnet50),
        (Goal("SGD fused", 1.45, _BYTES), _NO_TEMPORARY),
    )
)
registry.add(
    Case(
        "complex_sgd/small-many",
        "ComplexSGD.step() on 300 fp32 tensors of 1 000",
        _steps(_inputs.many_small),
        (Goal("SGD fused", 0.8, "host overhead below that of torch"),),
    )
)
registry.add(
    Case("complex_sgd/small-many-op", "complex_sgd_step_ on 300 fp32 tensors of 1 000, no optimizer", _build_bare)
)
registry.add(
    Case(
        "complex_sgd/large-bf16",
        "ComplexSGD.step() on one bf16 tensor of 30 M with fp32 buffers",
        _steps(_inputs.one_large, torch.bfloat16, compiled=True),
        (_NO_TEMPORARY,),
    )
)
registry.add(
    Case(
        "complex_sgd/channels-last",
        "ComplexSGD.step() on channels-last 3x3 and 7x7 weights with contiguous gradients",
        _steps(_inputs.resnet50_convolutions, channels_last=True),
        (_NO_TEMPORARY,),
    )
)
