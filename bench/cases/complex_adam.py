"""Cases of complex_adam_step_: optimizer steps, and the bare op, against torch.optim.Adam and complex arithmetic."""

import cmath
import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nestopt_ext import ComplexAdam, _ops, _reference

from .. import registry
from ..registry import BASELINE, OURS, Case, Contestant, Field, Goal, Setting
from . import _inputs

LR = 0.1  # large enough for a wrong update to show in every dtype
REAL = 0.9
COMPLEX = cmath.rect(0.8, math.pi / 8)
BETA2 = 0.999
EPS = 1e-8

Expected = Callable[[int], Sequence[Tensor]]


def _expected(problem: _inputs.Problem, beta1: complex) -> Expected:
    """Params, first (real part) and second moments after some steps of the reference in float64.

    A real momentum is averaged and corrected, as in ``torch.optim.Adam``.
    """

    @functools.cache
    def after(num_steps: int) -> Sequence[Tensor]:
        params, grads = ([t.double() for t in tensors] for tensors in (problem.params, problem.grads))
        avgs, imag, sqs = ([torch.zeros_like(p) for p in params] for _ in range(3))
        steps = [torch.zeros((), device=p.device) for p in params]
        for _ in range(num_steps):
            _reference.complex_adam_step_(
                params,
                grads,
                avgs,
                imag if beta1.imag else [],
                sqs,
                [],
                steps,
                LR,
                beta1=beta1.real,
                beta1_imag=beta1.imag,
                beta2=BETA2,
                eps=EPS,
                bias_correction=beta1.imag == 0,
            )
        return [*params, *avgs, *sqs]

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
    ours = isinstance(optimizer, ComplexAdam)
    num_buffers = 3 if isinstance(optimizer.defaults["betas"][0], complex) else 2

    def written() -> list[Tensor]:
        moments = [optimizer.state[p][key] for key in ("exp_avg", "exp_avg_sq") for p in params]
        return [*params, *moments]

    moved = problem.traffic(num_buffers, None if ours else problem.params_bytes)
    return Contestant(name, role, optimizer.step, moved, written, expected)


def _optimizers(problem: _inputs.Problem, expected: Expected, expected_real: Expected) -> list[Contestant]:
    """Ours, and the optimizers that a user would compare it with."""
    own_buffers = problem.params[0].dtype == problem.math
    kept = "" if own_buffers else f", {str(problem.params[0].dtype).removeprefix('torch.')} state"

    def ours(name: str, role: str, beta1: complex, foreach: bool) -> Contestant:
        return _optimizer(
            problem,
            name,
            role,
            lambda p: ComplexAdam(
                p, LR, (beta1, BETA2), EPS, bias_correction=beta1.imag == 0, foreach=foreach, fused=not foreach
            ),
            expected if beta1 == COMPLEX else expected_real,
        )

    def adam(name: str, foreach: bool, fused: bool) -> Contestant:
        return _optimizer(
            problem,
            f"{name}{kept}",
            BASELINE,
            lambda p: torch.optim.Adam(p, LR, (REAL, BETA2), EPS, foreach=foreach, fused=fused),
            expected_real,
        )

    return [
        ours("ComplexAdam fused", OURS, COMPLEX, False),
        adam("Adam fused", False, True),
        adam("Adam foreach", True, False),
        adam("Adam loop", False, False),
        ours("ComplexAdam foreach", BASELINE, COMPLEX, True),
        ours("ComplexAdam fused, real momentum", BASELINE, REAL, False),
    ]


def _eager_complex(problem: _inputs.Problem, expected: Expected) -> Contestant:
    """A complex64 moment. Adding g to its real part saves the complex copy of g that ``moment + g`` makes."""
    params, grads = problem.copies()
    moments = [torch.zeros_like(p, dtype=torch.complex64) for p in params]
    sqs = problem.buffers()
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        root = math.sqrt(1 - BETA2**count)
        for p, g, m, v in zip(params, grads, moments, sqs, strict=True):
            m.mul_(COMPLEX)
            real = m.real
            real.add_(g)
            v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
            p.add_(real / (v.sqrt() / root).add_(EPS), alpha=-LR)

    return Contestant(
        "eager complex64",
        BASELINE,
        step,
        problem.traffic(3),
        lambda: [*params, *(m.real for m in moments), *sqs],
        expected,
    )


def _eager_pair(problem: _inputs.Problem, expected: Expected) -> Contestant:
    """Real tensors and a scratch tensor that is kept: the fewest passes over memory that eager calls allow."""
    params, grads = problem.copies()
    real, imag, sqs = problem.buffers(), problem.buffers(), problem.buffers()
    scratch = [torch.empty_like(p) for p in params]
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        root = math.sqrt(1 - BETA2**count)
        for p, g, m, c, v, s in zip(params, grads, real, imag, sqs, scratch, strict=True):
            torch.mul(m, COMPLEX.imag, out=s)
            torch.add(g, m, alpha=COMPLEX.real, out=m)
            m.add_(c, alpha=-COMPLEX.imag)
            torch.add(s, c, alpha=COMPLEX.real, out=c)
            v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
            torch.sqrt(v, out=s)
            s.add_(EPS * root)
            p.addcdiv_(m, s, value=-LR * root)

    return Contestant(
        "eager real+imag, kept scratch", BASELINE, step, problem.traffic(3), lambda: [*params, *real, *sqs], expected
    )


def _compiled(problem: _inputs.Problem, expected: Expected) -> Contestant:
    """The same arithmetic fused by torch.compile."""
    params, grads = problem.copies()
    real, imag, sqs = problem.buffers(), problem.buffers(), problem.buffers()
    steps = torch.zeros((), device=params[0].device)  # Inductor loses what is added to one of float64
    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=False)
    def update(
        params: list[Tensor],
        grads: list[Tensor],
        real: list[Tensor],
        imag: list[Tensor],
        sqs: list[Tensor],
        steps: Tensor,
    ) -> None:
        steps.add_(1)
        root = (1 - BETA2 ** steps.double()).sqrt().float()
        for p, g, m, c, v in zip(params, grads, real, imag, sqs, strict=True):
            new = COMPLEX.real * m - COMPLEX.imag * c + g
            sq = BETA2 * v + (1 - BETA2) * g * g
            c.copy_(COMPLEX.imag * m + COMPLEX.real * c)
            m.copy_(new)
            v.copy_(sq)
            p.copy_(p - LR * new / (sq.sqrt() / root + EPS))

    return Contestant(
        "torch.compile",
        BASELINE,
        lambda: update(params, grads, real, imag, sqs, steps),
        problem.traffic(3),
        lambda: [*params, *real, *sqs],
        expected,
    )


def _bare(problem: _inputs.Problem, expected: Expected, expected_real: Expected) -> list[Contestant]:
    """The ops below the optimizers, on lists made beforehand."""

    def counts() -> list[Tensor]:
        return [torch.zeros((), device=p.device) for p in problem.params]

    params, grads = problem.copies()
    avgs, imag, sqs, steps = problem.buffers(), problem.buffers(), problem.buffers(), counts()
    lr = torch.tensor(LR, dtype=torch.float64)
    theirs, their_grads = problem.copies()
    their_avgs, their_sqs, their_steps = problem.buffers(), problem.buffers(), counts()

    def torch_step() -> None:
        torch._foreach_add_(their_steps, 1)
        torch._fused_adam_(
            theirs,
            their_grads,
            their_avgs,
            their_sqs,
            [],
            their_steps,
            lr=LR,
            beta1=REAL,
            beta2=BETA2,
            weight_decay=0.0,
            eps=EPS,
            amsgrad=False,
            maximize=False,
        )

    return [
        Contestant(
            "complex_adam_step_",
            OURS,
            lambda: _ops.complex_adam_step_(
                params, grads, avgs, imag, sqs, [], steps, lr, beta1=COMPLEX, beta2=BETA2, eps=EPS
            ),
            problem.traffic(3),
            lambda: [*params, *avgs, *sqs],
            expected,
        ),
        Contestant(
            "torch._fused_adam_",
            BASELINE,
            torch_step,
            problem.traffic(2),
            lambda: [*theirs, *their_avgs, *their_sqs],
            expected_real,
        ),
    ]


# ---- cases ----------------------------------------------------------------------------------------------------------


def _steps(
    shapes: Callable[[Setting], list[_inputs.Shape]], dtype: torch.dtype = torch.float32, *, compiled: bool = False
) -> Callable[[Setting], Field]:
    def build(setting: Setting) -> Field:
        problem = _inputs.Problem(setting, shapes(setting), dtype)
        expected, expected_real = _expected(problem, COMPLEX), _expected(problem, REAL)
        contestants = _optimizers(problem, expected, expected_real)
        left_out = {}
        if dtype == problem.math:
            contestants += [_eager_complex(problem, expected), _eager_pair(problem, expected)]
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


_BYTES = "9 words an element against 7: 1.29x is the ratio of bytes"
_NO_TEMPORARY = Goal(None, 0.01, "no temporary of parameter size")

registry.add(
    Case(
        "complex_adam/large",
        "ComplexAdam.step() on one fp32 tensor of 30 M",
        _steps(_inputs.one_large, compiled=True),
        (
            Goal("Adam fused", 1.35, _BYTES),
            Goal("eager complex64", 1 / 2, "2x faster than eager complex arithmetic"),
            Goal("eager real+imag, kept scratch", 1 / 2, "2x faster than the best eager form"),
            _NO_TEMPORARY,
        ),
    )
)
registry.add(
    Case(
        "complex_adam/resnet50",
        "ComplexAdam.step() on the 161 tensors of ResNet-50",
        _steps(_inputs.resnet50),
        (Goal("Adam fused", 1.35, _BYTES), _NO_TEMPORARY),
    )
)
registry.add(
    Case(
        "complex_adam/small-many",
        "ComplexAdam.step() on 300 fp32 tensors of 1 000",
        _steps(_inputs.many_small),
        (Goal("Adam fused", 0.8, "host overhead below that of torch"),),
    )
)
registry.add(
    Case("complex_adam/small-many-op", "complex_adam_step_ on 300 fp32 tensors of 1 000, no optimizer", _build_bare)
)
registry.add(
    Case(
        "complex_adam/large-bf16",
        "ComplexAdam.step() on one bf16 tensor of 30 M with fp32 state",
        _steps(_inputs.one_large, torch.bfloat16, compiled=True),
        (_NO_TEMPORARY,),
    )
)
