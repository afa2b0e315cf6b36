"""The optimizers in torch's own test machinery: entries of its table, and the checks it makes of each entry.

``OptimizerInfo`` tells what an optimizer supports and with which arguments to try it; ``optims`` makes one test per
optimizer, device and dtype. The loop over tensors is what the other implementations are compared with.
"""

import copy
import gc
import io
import sys
from functools import partial

import pytest
import torch
from optimizers import TURNING
from torch.nn import Parameter
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    ExponentialLR,
    LinearLR,
    PolynomialLR,
    ReduceLROnPlateau,
    StepLR,
)
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from nestopt_ext import ComplexAdam, ComplexSGD, ExtraAdam, ExtraSGD, OptimisticAdam, OptimisticSGD, _ops

with pytest.MonkeyPatch.context() as patch:
    # Importing it would forbid to set backend flags, and change how many examples hypothesis tries, in all other tests.
    patch.setitem(sys.modules, "hypothesis", None)
    patch.setattr(torch.backends, "disable_global_flags", lambda: None)
    try:
        from torch.testing._internal.common_device_type import instantiate_device_type_tests, largeTensorTest, onlyCUDA
        from torch.testing._internal.common_optimizers import (
            ErrorOptimizerInput,
            OptimizerErrorEnum,
            OptimizerInfo,
            OptimizerInput,
            TensorTracker,
            _get_optim_inputs_including_global_cliquey_kwargs,
            get_error_inputs_for_all_optims,
            optim_db,
            optims,
        )
        from torch.testing._internal.common_utils import TestCase, parametrize
    except ImportError as error:
        reason = f"needs PyTorch's testing package (torch.testing._internal): {error}"
        pytest.skip(reason, allow_module_level=True)

FLOATING = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# ---- the table ------------------------------------------------------------------------------------------------------


def _inputs(**named):
    """Fresh arguments at each call: a tensor lr is changed in place by schedulers."""

    def make(device, dtype=None):
        return [
            OptimizerInput(
                params=None,
                kwargs={name: value() if callable(value) else value for name, value in kwargs.items()},
                desc=desc,
            )
            for desc, kwargs in named.items()
        ]

    return make


def _lr():
    return torch.tensor(0.001, dtype=torch.float32)


def _errors(*bad):
    """What every optimizer of torch refuses, in its words but for that of the lr, and ``bad`` arguments of our own."""

    def make(device, dtype):
        common = get_error_inputs_for_all_optims(device, dtype)
        for error in common:
            if error.error_regex == "Tensor lr must be 1-element":
                error.error_regex = "lr must be a float32 or float64 tensor of one element"
        return [
            *common,
            *(
                ErrorOptimizerInput(OptimizerInput(params=None, kwargs=kwargs), error_type=kind, error_regex=message)
                for kwargs, kind, message in (*_BAD_FOR_ALL, *bad)
            ),
        ]

    return make


_BAD_FOR_ALL = [
    ({"lr": -1e-2}, ValueError, "lr must be finite and >= 0; got -0.01"),
    ({"lr": float("nan")}, ValueError, "lr must be finite and >= 0; got nan"),
    ({"lr": "fast"}, TypeError, "lr must be a number or a tensor; got 'fast'"),
    ({"weight_decay": -1}, ValueError, "weight_decay must be finite and >= 0; got -1"),
    ({"maximize": "no"}, TypeError, "maximize must be True or False; got 'no'"),
]
_BAD_FOR_ADAM = [
    ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must be below 1; got 1.0"),
    ({"betas": (0.9, -0.1)}, ValueError, r"betas\[1\] must be finite and >= 0; got -0.1"),
    ({"betas": 0.9}, TypeError, "betas must be"),
    ({"eps": -1.0}, ValueError, "eps must be finite and >= 0; got -1.0"),
]
_ONE_IMPLEMENTATION = ({"foreach": True, "fused": True}, ValueError, "at most one of foreach, fused and differentiable")

_SCHEDULERS = (
    [lambda o: StepLR(o, gamma=0.9, step_size=10)],
    [lambda o: LinearLR(o, start_factor=0.4, end_factor=0.8, total_iters=4)],
    [lambda o: StepLR(o, gamma=0.9, step_size=10), lambda o: ExponentialLR(o, gamma=0.99), ReduceLROnPlateau],
    [lambda o: ConstantLR(o, factor=0.4, total_iters=4)],
    [lambda o: PolynomialLR(o, power=0.9, total_iters=4)],
    [lambda o: CosineAnnealingLR(o, T_max=30)],
)
_COMPLEX = {
    "scheduler_inputs": _SCHEDULERS,
    "supported_impls": ("foreach", "differentiable", "fused"),
    "supports_fused_on": ("cpu", "cuda"),
}
_FOR_GAMES = {"scheduler_inputs": _SCHEDULERS, "supported_impls": ("foreach",)}

INFOS = [
    OptimizerInfo(
        ComplexSGD,
        optim_inputs_func=_inputs(
            **{
                "default": {},
                "lr": {"lr": 1e-2},
                "tensor lr": {"lr": _lr},
                "weight_decay": {"weight_decay": 0.5},
                "no momentum": {"momentum": 0.0},
                "real momentum": {"momentum": 0.9},
                "negative momentum": {"momentum": -0.5},
                "imaginary momentum": {"momentum": 0.8j},
                "complex momentum, maximize": {"momentum": TURNING, "weight_decay": 0.1, "maximize": True},
                "complex momentum, dampening": {"momentum": TURNING, "dampening": 0.5},
                "complex momentum, nesterov": {"momentum": TURNING, "nesterov": True, "weight_decay": 0.1},
                "real momentum, nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
                "rescale_lr": {"rescale_lr": True},
                "tensor lr, rescale_lr": {"lr": _lr, "momentum": TURNING, "dampening": 0.5, "rescale_lr": True},
            }
        ),
        optim_error_inputs_func=_errors(
            _ONE_IMPLEMENTATION,
            ({"momentum": 1.0}, ValueError, "momentum must have modulus below 1; got 1.0"),
            ({"momentum": 0.8 + 0.7j}, ValueError, "momentum must have modulus below 1"),
            ({"nesterov": True, "momentum": 0.0}, ValueError, "nesterov must come with a momentum and zero dampening"),
        ),
        not_og_supported_flags=("foreach", "differentiable", "fused", "maximize", "rescale_lr"),
        **_COMPLEX,
    ),
    OptimizerInfo(
        ComplexAdam,
        optim_inputs_func=_inputs(
            **{
                "default": {},
                "lr": {"lr": 1e-2},
                "tensor lr": {"lr": _lr},
                "weight_decay": {"weight_decay": 0.1},
                "maximize": {"weight_decay": 0.1, "maximize": True},
                "amsgrad": {"weight_decay": 0.1, "amsgrad": True},
                "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
                "real betas": {"betas": (0.9, 0.99)},
                "negative beta": {"betas": (-0.5, 0.99)},
                "imaginary beta": {"betas": (0.8j, 0.99), "eps": 1e-6},
                "bias_correction": {"betas": (0.9, 0.99), "bias_correction": True},
                "AdamW": {
                    "betas": (0.9, 0.99),
                    "bias_correction": True,
                    "weight_decay": 0.1,
                    "decoupled_weight_decay": True,
                    "amsgrad": True,
                },
                "rescale_lr": {"rescale_lr": True, "weight_decay": 0.1, "decoupled_weight_decay": True},
                "capturable": {"capturable": True},
                "capturable, amsgrad, tensor lr": {"capturable": True, "amsgrad": True, "lr": _lr},
            }
        ),
        optim_error_inputs_func=_errors(
            *_BAD_FOR_ADAM,
            _ONE_IMPLEMENTATION,
            ({"betas": (1.0, 0.9)}, ValueError, r"betas\[0\] must have modulus below 1; got 1.0"),
            ({"bias_correction": True}, ValueError, r"betas\[0\] must be real with bias_correction=True"),
        ),
        not_og_supported_flags=("foreach", "differentiable", "fused", "maximize", "capturable", "rescale_lr"),
        has_capturable_arg=True,
        **_COMPLEX,
    ),
    OptimizerInfo(
        OptimisticSGD,
        optim_inputs_func=_inputs(
            **{
                "default": {},
                "tensor lr": {"lr": _lr},
                "optimism": {"optimism": 0.5, "plain_first_step": True},
                "maximize": {"weight_decay": 0.1, "maximize": True},
            }
        ),
        optim_error_inputs_func=_errors(({"optimism": -1.0}, ValueError, "optimism must be finite and >= 0; got -1.0")),
        not_og_supported_flags=("foreach", "maximize"),
        **_FOR_GAMES,
    ),
    OptimizerInfo(
        OptimisticAdam,
        optim_inputs_func=_inputs(
            **{
                "default": {},
                "tensor lr": {"lr": _lr},
                "amsgrad": {"weight_decay": 0.1, "amsgrad": True},
                "maximize": {"weight_decay": 0.1, "maximize": True},
            }
        ),
        optim_error_inputs_func=_errors(*_BAD_FOR_ADAM),
        not_og_supported_flags=("foreach", "maximize"),
        **_FOR_GAMES,
    ),
    OptimizerInfo(
        ExtraSGD,
        optim_inputs_func=_inputs(
            **{"default": {}, "tensor lr": {"lr": _lr}, "maximize": {"weight_decay": 0.1, "maximize": True}}
        ),
        optim_error_inputs_func=_errors(),
        step_requires_closure=True,
        not_og_supported_flags=("foreach", "maximize"),
        **_FOR_GAMES,
    ),
    OptimizerInfo(
        ExtraAdam,
        optim_inputs_func=_inputs(
            **{
                "default": {},
                "tensor lr": {"lr": _lr},
                "amsgrad": {"weight_decay": 0.1, "amsgrad": True},
                "maximize": {"weight_decay": 0.1, "maximize": True},
            }
        ),
        optim_error_inputs_func=_errors(*_BAD_FOR_ADAM),
        step_requires_closure=True,
        not_og_supported_flags=("foreach", "maximize"),
        **_FOR_GAMES,
    ),
]
COMPLEX_INFOS = INFOS[:2]
ONE_GRADIENT = [info for info in INFOS if not info.step_requires_closure]


def every_input(device, info, *, differentiable=False):
    """All arguments of an optimizer, times all of its implementations."""
    skip = () if differentiable else ("differentiable",)
    return _get_optim_inputs_including_global_cliquey_kwargs(device, None, info, skip=skip)


def loop(info):
    """Asks for the loop over tensors."""
    return {name: False for name in ("foreach", "fused", "differentiable") if name in info.supported_impls}


# ---- problems -------------------------------------------------------------------------------------------------------


def network(device, dtype):
    torch.manual_seed(1)
    layers = [torch.nn.Linear(2, 3), torch.nn.Sigmoid(), torch.nn.Linear(3, 1), torch.nn.Sigmoid()]
    return torch.nn.Sequential(*layers).to(device=device, dtype=dtype)


class Line:
    """Least squares in a matrix and a vector; the vector may get no gradient, and both may be strided views."""

    def __init__(self, device, dtype=torch.float32, contiguous=True):
        def new(*shape):
            if contiguous:
                return Parameter(torch.randn(shape, device=device, dtype=dtype))
            return Parameter(torch.randn((*shape, 2), device=device, dtype=dtype)[..., 0])

        self.weight, self.bias = new(4, 5), new(4)
        self.input = torch.randn(5, device=device, dtype=dtype)

    @property
    def params(self):
        return [self.weight, self.bias]

    def copy(self):
        other = copy.copy(self)
        other.weight, other.bias = (Parameter(p.detach().clone()) for p in self.params)
        return other

    def closure(self, optimizer):
        def evaluate():
            optimizer.zero_grad()
            loss = (self.weight.mv(self.input) + self.bias).square().sum()
            loss.backward()
            return loss

        return evaluate


def take_step(info, optimizer, closure):
    """By a closure where the optimizer needs one, else from gradients that are there."""
    if info.step_requires_closure:
        return optimizer.step(closure)
    loss = closure()
    optimizer.step()
    return loss


def schedule(schedulers, loss):
    for scheduler in schedulers:
        scheduler.step(*([loss] if isinstance(scheduler, ReduceLROnPlateau) else []))


def rosenbrock(x, y):
    return ((1 - x).square() + 100 * (y - x.square()).square()).abs()


# ---- the checks -----------------------------------------------------------------------------------------------------


class TestOptimizers(TestCase):
    def assertWentTheRightWay(self, kwargs, before, after):
        if kwargs.get("maximize", False):
            self.assertGreater(after, before)
        else:
            self.assertLess(after, before)

    # ---- arguments ----

    @optims(INFOS)
    def test_the_table_leaves_the_implementation_open(self, device, dtype, optim_info):
        for given in optim_info.optim_inputs_func(device):
            self.assertFalse({"foreach", "fused", "differentiable"} & set(given.kwargs))

    @optims(INFOS)
    def test_errors(self, device, dtype, optim_info):
        for error in optim_info.optim_error_inputs_func(device=device, dtype=dtype):
            given = error.optimizer_error_input
            self.assertIs(error.error_on, OptimizerErrorEnum.CONSTRUCTION_ERROR)
            with self.subTest(given.desc or str(given.kwargs)):
                params = (
                    [Parameter(torch.ones(2, device=device, dtype=dtype))] if given.params is None else given.params
                )
                is_warning = issubclass(error.error_type, Warning)
                expect = self.assertWarnsRegex if is_warning else self.assertRaisesRegex
                with expect(error.error_type, error.error_regex):
                    optim_info.optim_cls(params, **given.kwargs)

    @optims(INFOS)
    def test_repr_names_every_hyperparameter(self, device, dtype, optim_info):
        for given in every_input(device, optim_info, differentiable=True):
            optimizer = optim_info.optim_cls([Parameter(torch.ones(2, device=device))], **given.kwargs)
            text = repr(optimizer)
            self.assertTrue(text.startswith(f"{optim_info.name} ("))
            self.assertTrue(all(f"{name}: " in text for name in optimizer.defaults))

    # ---- the loop over tensors goes where it should ----

    @parametrize("contiguous", [True, False])
    @parametrize("scheduled", [True, False])
    @optims(INFOS)
    def test_the_loop_goes_the_right_way(self, device, dtype, optim_info, contiguous, scheduled):
        for makers in optim_info.scheduler_inputs if scheduled else [[]]:
            for given in optim_info.optim_inputs_func(device):
                with self.subTest(given.desc):
                    line = Line(device, dtype, contiguous)
                    optimizer = optim_info.optim_cls(line.params, **given.kwargs, **loop(optim_info))
                    schedulers = [make(optimizer) for make in makers]
                    closure = line.closure(optimizer)
                    before = closure().item()
                    for _ in range(20):
                        schedule(schedulers, take_step(optim_info, optimizer, closure))
                    self.assertWentTheRightWay(given.kwargs, before, closure().item())

    @optims(INFOS)
    def test_groups_with_schedulers_go_the_right_way(self, device, dtype, optim_info):
        for makers in optim_info.scheduler_inputs:
            line = Line(device, dtype)
            optimizer = optim_info.optim_cls([{"params": [line.weight]}, {"params": [line.bias], "lr": 0.01}])
            schedulers = [make(optimizer) for make in makers]
            closure = line.closure(optimizer)
            before = closure().item()
            for _ in range(20):
                schedule(schedulers, take_step(optim_info, optimizer, closure))
            self.assertLess(closure().item(), before)

    @optims(INFOS)
    def test_weight_decay_of_a_group(self, device, dtype, optim_info):
        """A group without weight decay moves as it would alone."""
        for given in every_input(device, optim_info):
            with self.subTest(given.desc):
                line = Line(device, dtype)
                twin = line.copy()
                bias = {"params": [line.bias], **given.kwargs, "weight_decay": 0.0}
                optimizer = optim_info.optim_cls([{"params": [line.weight], **given.kwargs}, bias])
                others = [
                    optim_info.optim_cls([twin.weight], **given.kwargs),
                    optim_info.optim_cls([twin.bias], **{**given.kwargs, "weight_decay": 0.0}),
                ]
                closure, twin_closure = line.closure(optimizer), twin.closure(others[0])
                before = closure().item()
                for _ in range(20):
                    take_step(optim_info, optimizer, closure)
                    others[1].zero_grad()
                    if optim_info.step_requires_closure:
                        continue  # two optimizers cannot share the two halves of a step
                    twin_closure()
                    for other in others:
                        other.step()
                self.assertWentTheRightWay(given.kwargs, before, closure().item())
                if not optim_info.step_requires_closure:
                    self.assertEqual(line.params, twin.params)

    @optims(INFOS)
    def test_lr_of_a_group(self, device, dtype, optim_info):
        for given in every_input(device, optim_info):
            with self.subTest(given.desc):
                line, still = Line(device, dtype), Parameter(torch.randn(2, device=device, dtype=dtype))
                still_before = still.detach().clone()
                moving = {"lr": 1e-3, **given.kwargs, "params": line.params}
                optimizer = optim_info.optim_cls([moving, {"params": [still]}], lr=0.0)

                def evaluate(optimizer=optimizer, line=line, still=still):
                    loss = line.closure(optimizer)()
                    still.grad = torch.rand_like(still)
                    return loss

                before = evaluate().item()
                for _ in range(20):
                    take_step(optim_info, optimizer, evaluate)
                self.assertWentTheRightWay(given.kwargs, before, evaluate().item())
                self.assertEqual(still, still_before, rtol=0, atol=0)

    @optims(INFOS)
    def test_lr_as_a_tensor(self, device, dtype, optim_info):
        """Also when it is changed in place, and for a CPU lr beside parameters on a device."""
        for given in every_input(device, optim_info):
            for place in {"cpu", torch.device(device).type}:
                with self.subTest(f"{given.desc} on {place}"):
                    line = Line(device, dtype)
                    twin = line.copy()
                    lr = torch.tensor(1e-3, device=place)
                    kwargs = {name: value for name, value in given.kwargs.items() if name != "lr"}
                    optimizers = [
                        optim_info.optim_cls(line.params, lr=1e-3, **kwargs),
                        optim_info.optim_cls(twin.params, lr=lr, **kwargs),
                    ]
                    for _ in range(5):
                        for one, optimizer in zip((line, twin), optimizers, strict=True):
                            take_step(optim_info, optimizer, one.closure(optimizer))
                        self.assertEqual(line.params, twin.params)
                        lr.mul_(0.5)
                        optimizers[0].param_groups[0]["lr"] *= 0.5
                    self.assertIs(optimizers[1].param_groups[0]["lr"], lr)

    # ---- complex parameters ----

    @optims(INFOS, dtypes=[torch.complex64])
    def test_complex_parameters_are_pairs_of_reals(self, device, dtype, optim_info):
        shapes = [((3, 2), dtype), ((4,), dtype), ((), dtype), ((3, 2), torch.float32)]
        for given in every_input(device, optim_info):
            with self.subTest(given.desc):
                params = [torch.randn(s, device=device, dtype=d, requires_grad=True) for s, d in shapes]
                pairs = [as_real(p.detach()).clone().requires_grad_() for p in params]
                optimizer = optim_info.optim_cls(params, **given.kwargs)
                real_optimizer = optim_info.optim_cls(pairs, **given.kwargs)
                for _ in range(3):
                    both = [[torch.randn_like(p) for p in params] for _ in range(2)]  # of the two halves of a step

                    def evaluate(params, grads, change):
                        for p, grad in zip(params, next(grads), strict=True):
                            p.grad = change(grad)

                    take_step(optim_info, optimizer, partial(evaluate, params, iter(both), lambda g: g))
                    take_step(optim_info, real_optimizer, partial(evaluate, pairs, iter(both), as_real))
                    self.assertEqual([as_real(p.detach()) for p in params], [p.detach() for p in pairs], rtol=0, atol=0)

    @optims(ONE_GRADIENT, dtypes=[torch.complex64])
    def test_a_complex_function_of_two_variables(self, device, dtype, optim_info):
        """The same loss of complex parameters and of their real and imaginary parts as parameters of their own."""
        for given in every_input(device, optim_info):
            with self.subTest(given.desc):
                z = torch.randn(2, device=device, dtype=dtype, requires_grad=True)
                parts = [part.detach().clone().requires_grad_() for part in (z.real, z.imag)]
                optimizers = [optim_info.optim_cls([z], **given.kwargs), optim_info.optim_cls(parts, **given.kwargs)]
                tracker = TensorTracker()
                for _ in range(3):
                    for optimizer in optimizers:
                        optimizer.zero_grad()
                    rosenbrock(*z).backward()
                    for t in (z.real, z.imag, z.grad.real, z.grad.imag):
                        tracker.add(t)
                    for part in parts:
                        tracker.pop_check_set(part, self)
                    rosenbrock(*torch.complex(*parts)).backward()
                    for part in parts:
                        tracker.pop_check_set(part.grad, self)
                    for optimizer in optimizers:
                        optimizer.step()
                self.assertTrue(tracker.all_popped())
                self.assertEqual([z.real, z.imag], parts)

    # ---- implementations ----

    def assertSameTraining(self, info, models, inputs, optimizers):
        """Seven steps side by side, brought together after each so that roundings do not add up.

        In the third there is no gradient at all; then a layer is frozen for two steps.
        """
        tracker = TensorTracker()
        for i in range(7):
            for model, x, optimizer in zip(models, inputs, optimizers, strict=True):
                model[2].requires_grad_(i not in (3, 4))

                def evaluate(model=model, x=x, optimizer=optimizer, step=i):
                    optimizer.zero_grad()
                    if step != 2:
                        model(x).sum().backward()

                take_step(info, optimizer, evaluate)
            for first, second in zip(*(o.param_groups[0]["params"] for o in optimizers), strict=True):
                tracker.add(first)
                tracker.pop_check_set(second, self)
                state, other = (o.state.get(p, {}) for o, p in zip(optimizers, (first, second), strict=True))
                self.assertEqual(set(state), set(other))
                for name, value in state.items():
                    tracker.add(value)
                    tracker.pop_check_set(other[name], self)
        self.assertTrue(tracker.all_popped())

    def assertMatchesLoop(self, device, dtype, info, implementation):
        x = torch.arange(1, 7, dtype=dtype, device=device).reshape(3, 2) / 10
        for given in info.optim_inputs_func(device, dtype):
            with self.subTest(given.desc):
                models, optimizers = [], []
                for wanted in (False, True):
                    model = network(device, dtype)
                    others = [torch.ones((), device=device, dtype=dtype), torch.ones(0, 3, device=device, dtype=dtype)]
                    for p in others:
                        p.requires_grad_().grad = torch.full_like(p, 0.5)
                    params = [*model.parameters(), *others]
                    kwargs = {**given.kwargs, **loop(info), implementation: wanted}
                    optimizers.append(info.optim_cls(params, **kwargs))
                    models.append(model)
                self.assertSameTraining(info, models, [x, x], optimizers)

    @optims([i for i in INFOS if "foreach" in i.supported_impls], dtypes=FLOATING)
    def test_foreach_matches_the_loop(self, device, dtype, optim_info):
        self.assertMatchesLoop(device, dtype, optim_info, "foreach")

    @optims(COMPLEX_INFOS, dtypes=FLOATING)
    def test_fused_matches_the_loop(self, device, dtype, optim_info):
        self.assertMatchesLoop(device, dtype, optim_info, "fused")

    @parametrize("default_dtype", [torch.float64, torch.float16])
    @parametrize("implementation", ["foreach", "fused"])
    @optims(COMPLEX_INFOS, dtypes=[torch.float64])
    def test_with_another_default_dtype(self, device, dtype, optim_info, implementation, default_dtype):
        before = torch.get_default_dtype()
        torch.set_default_dtype(default_dtype)
        try:
            self.assertMatchesLoop(device, dtype, optim_info, implementation)
        finally:
            torch.set_default_dtype(before)

    @onlyCUDA
    @optims(COMPLEX_INFOS, dtypes=FLOATING)
    def test_fused_on_the_cpu_matches_cuda(self, device, dtype, optim_info):
        for given in optim_info.optim_inputs_func("cpu"):
            with self.subTest(given.desc):
                places = ("cpu", device)
                models = [network(place, dtype) for place in places]
                inputs = [(torch.arange(1, 7).reshape(3, 2) / 10).to(device=place, dtype=dtype) for place in places]
                optimizers = [optim_info.optim_cls(m.parameters(), fused=True, **given.kwargs) for m in models]
                self.assertSameTraining(optim_info, models, inputs, optimizers)

    @optims(ONE_GRADIENT)
    def test_mixed_dtypes_and_devices(self, device, dtype, optim_info):
        """One group with every dtype, on every device there is; a parameter of integers has no gradient."""
        places = {"cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))} if "cuda" in device else {device}
        kinds = [(p, d) for p in sorted(places) for d in (*FLOATING, torch.complex64)]
        values = [torch.randn(2, 3).to(device=place, dtype=kind) for place, kind in kinds]
        grads = [[torch.randn(2, 3).to(v) for v in values] for _ in range(4)]
        integers = torch.randint(9, (2, 3), device=device)
        for given in optim_info.optim_inputs_func(device):
            found = []
            for implementation in ({}, *({name: True} for name in optim_info.supported_impls if name[0] == "f")):
                params = [*map(torch.clone, values), integers.clone()]
                kwargs = copy.deepcopy(given.kwargs)
                kwargs.update(implementation or loop(optim_info))
                with self.subTest(f"{given.desc} {implementation}"):
                    optimizer = optim_info.optim_cls(params, **kwargs)
                    for step in grads:
                        for p, grad in zip(params, step, strict=False):
                            p.grad = grad.clone()
                        optimizer.step()
                    found.append(params)
                    for p, wanted in zip(params, found[0], strict=True):
                        tolerances = torch.testing._comparison.get_tolerances(wanted, p, rtol=None, atol=None)
                        self.assertEqual(p, wanted, rtol=5 * tolerances[0], atol=5 * tolerances[1])

    @parametrize("implementation", ["foreach", "fused", "loop"])
    @optims([i for i in INFOS if i.has_capturable_arg])
    def test_capturable_does_not_change_the_numbers(self, device, dtype, optim_info, implementation):
        for given in optim_info.optim_inputs_func(device):
            with self.subTest(given.desc):
                line = Line(device, dtype)
                twin = line.copy()
                flags = {**loop(optim_info), implementation: True} if implementation != "loop" else loop(optim_info)
                optimizers = [
                    optim_info.optim_cls(one.params, **{**given.kwargs, **flags, "capturable": capturable})
                    for one, capturable in ((line, False), (twin, True))
                ]
                for _ in range(5):
                    for one, optimizer in zip((line, twin), optimizers, strict=True):
                        take_step(optim_info, optimizer, one.closure(optimizer))
                self.assertEqual(line.params, twin.params)

    @onlyCUDA
    @optims(COMPLEX_INFOS)
    def test_fused_is_the_default_where_it_is_native(self, device, dtype, optim_info):
        self.assertTrue(_ops.is_native(optim_info.optim_cls._OP, "cuda"))
        p = Parameter(torch.ones(3, device=device))
        optimizer = optim_info.optim_cls([p])
        p.grad = torch.ones_like(p)
        with torch.profiler.profile() as profile:
            optimizer.step()
        self.assertIn(f"nestopt_ext::{optim_info.optim_cls._OP}", {event.key for event in profile.key_averages()})

    @onlyCUDA
    @optims(INFOS)
    def test_peak_memory_of_foreach(self, device, dtype, optim_info):
        """At most three temporaries of the size of the parameters more than the loop, which needs those of one."""
        number, shape = 10, (16, 8)
        for given in optim_info.optim_inputs_func(device):
            with self.subTest(given.desc):
                peaks = []
                for wanted in (False, True):
                    params = [torch.rand(shape, device=device, dtype=dtype) for _ in range(number)]
                    kwargs = {**given.kwargs, **loop(optim_info), "foreach": wanted}
                    optimizer = optim_info.optim_cls(params, **kwargs)

                    def evaluate(params=params):
                        for p in params:
                            p.grad = torch.ones_like(p) if p.grad is None else p.grad

                    take_step(optim_info, optimizer, evaluate)
                    gc.collect()
                    torch.cuda.reset_peak_memory_stats()
                    take_step(optim_info, optimizer, evaluate)
                    peaks.append(torch.cuda.max_memory_allocated())
                    del params, optimizer, evaluate
                    gc.collect()
                self.assertLessEqual(peaks[1], peaks[0] + 3 * number * 512)

    @onlyCUDA
    @parametrize("implementation", ["foreach", "fused"])
    @largeTensorTest("72GB", "cuda")
    @optims(COMPLEX_INFOS, dtypes=[torch.float16])
    def test_more_than_32_bits_of_elements(self, device, dtype, optim_info, implementation):
        p = torch.ones(2**32 + 8, device=device, dtype=dtype)
        p.grad = torch.zeros_like(p)
        p.grad[-1] = 1.0
        optimizer = optim_info.optim_cls([p], lr=0.5, **{implementation: True})
        optimizer.step()
        self.assertEqual(p[-1].item(), 0.5)
        self.assertEqual(p[:-1].min().item(), 1.0)

    @optims(COMPLEX_INFOS)
    def test_parameters_on_meta(self, device, dtype, optim_info):
        """A dry run: it tells the shapes and dtypes of the state, in every implementation."""
        for given in every_input(device, optim_info):
            with self.subTest(given.desc):
                states = []
                for place in ("meta", device):
                    p = torch.ones(3, 2, device=place, dtype=dtype)
                    p.grad = torch.ones_like(p)
                    optimizer = optim_info.optim_cls([p], **given.kwargs)
                    optimizer.step()
                    states.append(optimizer.state[p])
                    shaped = [t for t in optimizer.state[p].values() if t.shape == p.shape]
                    self.assertTrue(all(t.device == p.device for t in shaped))
                found = [{name: (t.shape, t.dtype) for name, t in state.items()} for state in states]
                self.assertEqual(*found)

    @optims(COMPLEX_INFOS)
    def test_found_inf_skips_the_whole_step(self, device, dtype, optim_info):
        """Parameters, buffers and the count of steps, on the first step and later."""
        for given in every_input(device, optim_info):
            for scaled in (False, True):
                with self.subTest(f"{given.desc} scaled={scaled}"):
                    params = [torch.ones(3, device=device, dtype=dtype) for _ in range(2)]
                    twins = [torch.ones(3, device=device, dtype=dtype) for _ in range(2)]
                    optimizer, plain = (
                        optim_info.optim_cls(ps, **copy.deepcopy(given.kwargs)) for ps in (params, twins)
                    )
                    for i, skipped in enumerate([1.0, 0.0, 1.0, 0.0]):
                        for p, q in zip(params, twins, strict=True):
                            q.grad = torch.full_like(q, 0.5 + i)
                            p.grad = q.grad * 4 if scaled else q.grad.clone()
                        optimizer.grad_scale = torch.full((), 4.0, device=device) if scaled else None
                        optimizer.found_inf = torch.tensor(skipped, device=device)
                        optimizer.step()
                        if not skipped:
                            plain.step()
                        self.assertEqual(params, twins)
                    for p, q in zip(params, twins, strict=True):
                        self.assertEqual(optimizer.state[p], plain.state[q])

    @onlyCUDA
    @parametrize("flag", ["fused", "capturable"])
    @optims(COMPLEX_INFOS)
    def test_state_saved_on_the_cpu_goes_on_on_cuda(self, device, dtype, optim_info, flag):
        if flag == "capturable" and not optim_info.has_capturable_arg:
            self.skipTest(f"{optim_info.name} has no capturable")
        for given in optim_info.optim_inputs_func("cpu"):
            with self.subTest(given.desc):
                line = Line("cpu", dtype)
                optimizer = optim_info.optim_cls(line.params, **given.kwargs)
                take_step(optim_info, optimizer, line.closure(optimizer))
                saved = copy.deepcopy(optimizer.state_dict())
                saved["param_groups"][0][flag] = True
                moved = copy.copy(line)
                moved.input = line.input.to(device)
                moved.weight, moved.bias = (Parameter(p.detach().to(device)) for p in line.params)
                other = optim_info.optim_cls(moved.params, **{**given.kwargs, flag: True})
                other.load_state_dict(saved)
                for one, o in ((line, optimizer), (moved, other)):
                    take_step(optim_info, o, one.closure(o))
                self.assertEqual([p.cpu() for p in moved.params], line.params)

    # ---- gradients ----

    @optims(INFOS)
    def test_no_gradients_no_step(self, device, dtype, optim_info):
        for given in every_input(device, optim_info, differentiable=True):
            with self.subTest(given.desc):
                params = [torch.randn(2, 3, device=device, dtype=dtype) for _ in range(2)]
                before = [p.clone() for p in params]
                optimizer = optim_info.optim_cls(params, **given.kwargs)
                optimizer.step(lambda: torch.ones(1))
                self.assertEqual(params, before, rtol=0, atol=0)
                self.assertEqual(sum(map(len, optimizer.state.values())), 0)

    @optims(INFOS)
    def test_zero_gradients_leave_parameters_as_they_are(self, device, dtype, optim_info):
        for given in every_input(device, optim_info, differentiable=True):
            if given.kwargs.get("weight_decay", 0) != 0:
                continue
            with self.subTest(given.desc):
                p = torch.randn(5, 1, device=device, dtype=dtype, requires_grad=True)
                params = [p.clone() if given.kwargs.get("differentiable") else p]
                before = p.detach().clone()
                params[0].grad = torch.zeros_like(params[0])
                optim_info.optim_cls(params, **given.kwargs).step(lambda: torch.ones(1))
                self.assertEqual(params[0].detach(), before, rtol=0, atol=0)

    @optims(INFOS)
    def test_gradients_are_only_read_and_grad_modes_kept(self, device, dtype, optim_info):
        for given in every_input(device, optim_info):
            for mode in (True, False):
                with self.subTest(f"{given.desc} grad={mode}"):
                    line = Line(device, dtype)
                    optimizer = optim_info.optim_cls(line.params, **given.kwargs)
                    seen = []

                    def evaluate(line=line, seen=seen):
                        seen.append(torch.is_grad_enabled())
                        for p in line.params:
                            p.grad = torch.full_like(p, 0.5)
                        return torch.ones(())

                    with torch.set_grad_enabled(mode):
                        for _ in range(3):
                            optimizer.step(evaluate)
                        self.assertEqual(torch.is_grad_enabled(), mode)
                    self.assertTrue(all(seen))
                    for p in line.params:
                        self.assertEqual(p.grad, torch.full_like(p, 0.5), rtol=0, atol=0)
                        self.assertTrue(p.is_leaf and p.requires_grad)
                    tensors = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
                    self.assertFalse(any(t.requires_grad for t in tensors))

    @optims(INFOS)
    def test_a_step_makes_state(self, device, dtype, optim_info):
        stateless = {("ComplexSGD", "no momentum")}
        for given in optim_info.optim_inputs_func(device):
            line = Line(device, dtype)
            optimizer = optim_info.optim_cls(line.params, **given.kwargs)
            take_step(optim_info, optimizer, line.closure(optimizer))
            if optim_info.name == "ExtraSGD" or (optim_info.name, given.desc) in stateless:
                self.assertEqual(sum(map(len, optimizer.state.values())), 0)
            else:
                self.assertTrue(all(len(optimizer.state[p]) > 0 for p in line.params))

    @optims(COMPLEX_INFOS, dtypes=[torch.float64])
    def test_differentiable(self, device, dtype, optim_info):
        """Derivatives of two steps in the parameter, the gradients, and an lr that is a tensor."""
        for given in optim_info.optim_inputs_func(device):
            with self.subTest(given.desc):
                kwargs = {name: value for name, value in given.kwargs.items() if name != "lr"}

                def steps(p, lr, *grads, kwargs=kwargs):
                    p = p.clone()
                    optimizer = optim_info.optim_cls([p], lr=lr, differentiable=True, **kwargs)
                    for grad in grads:
                        p.grad = grad
                        optimizer.step()
                    state = [v for name, v in sorted(optimizer.state[p].items()) if name != "step"]
                    return (p, *(s for s in state if s.requires_grad))

                values = [torch.rand(3, device=device, dtype=dtype) + 0.5 for _ in range(3)]
                lr = torch.tensor(0.3, device=device, dtype=dtype)
                inputs = [t.requires_grad_() for t in (values[0], lr, *values[1:])]
                self.assertTrue(torch.autograd.gradcheck(steps, inputs))

    @parametrize("implementation", ["foreach", "fused", "loop"])
    @optims(COMPLEX_INFOS)
    def test_a_compiled_step_matches_eager(self, device, dtype, optim_info, implementation):
        """With a closure where the step is fused; the graph may break there, but the numbers are the same."""
        flags = {**loop(optim_info), implementation: True} if implementation != "loop" else loop(optim_info)
        for given in optim_info.optim_inputs_func(device):
            if given.desc not in ("tensor lr", "complex momentum, nesterov", "AdamW"):
                continue
            with self.subTest(given.desc):
                torch.compiler.reset()
                line = Line(device, dtype)
                twin = line.copy()
                optimizers = [
                    optim_info.optim_cls(one.params, **copy.deepcopy(given.kwargs), **flags) for one in (line, twin)
                ]
                steps = [optimizers[0].step, torch.compile(optimizers[1].step, backend="eager")]
                for _ in range(3):
                    for one, optimizer, step in zip((line, twin), optimizers, steps, strict=True):
                        evaluate = one.closure(optimizer)
                        if implementation == "fused":
                            step(evaluate)
                        else:
                            evaluate()
                            step()
                    self.assertEqual(line.params, twin.params)
                for p, q in zip(line.params, twin.params, strict=True):
                    self.assertEqual(optimizers[0].state[p], optimizers[1].state[q])

    # ---- state ----

    @parametrize("named", [(False, False), (True, False), (False, True), (True, True)])
    @optims(INFOS)
    def test_state_dict_goes_on_exactly(self, device, dtype, optim_info, named):
        """With or without names on either side; equal parameters have equal state dicts."""
        names = ["weight", "bias"]
        for given in every_input(device, optim_info):
            with self.subTest(given.desc):
                line = Line(device, dtype)
                params = list(zip(names, line.params, strict=True)) if named[0] else line.params
                optimizer = optim_info.optim_cls(params, **given.kwargs)
                for _ in range(4):
                    take_step(optim_info, optimizer, line.closure(optimizer))
                twin = line.copy()
                params = list(zip(names, twin.params, strict=True)) if named[1] else twin.params
                other = optim_info.optim_cls(params, **{**given.kwargs, "lr": 0.7})
                saved = copy.deepcopy(optimizer.state_dict())
                kept = copy.deepcopy(saved)
                other.load_state_dict(saved)
                self.assertEqual(saved, kept)
                for _ in range(4):
                    for one, o in ((line, optimizer), (twin, other)):
                        take_step(optim_info, o, one.closure(o))
                    self.assertEqual(line.params, twin.params, rtol=0, atol=0)
                states = [copy.deepcopy(o.state_dict()) for o in (optimizer, other)]
                if any(named):
                    self.assertEqual(states[1]["param_groups"][0]["param_names"], names)
                for state in states:
                    state["param_groups"][0].pop("param_names", None)
                self.assertEqual(*states)
                other.param_groups.extend(other.param_groups)  # a parameter that comes again has its number again
                again = other.state_dict()["param_groups"]
                self.assertEqual(again[0]["params"], again[1]["params"])

    @optims(INFOS)
    def test_saved_and_loaded_with_weights_only(self, device, dtype, optim_info):
        for given in every_input(device, optim_info):
            with self.subTest(given.desc):
                line = Line(device, dtype)
                optimizer = optim_info.optim_cls(line.params, **given.kwargs)
                for _ in range(3):
                    take_step(optim_info, optimizer, line.closure(optimizer))
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                self.assertEqual(torch.load(file, weights_only=True), optimizer.state_dict())

    @optims(INFOS)
    def test_state_dict_from_before_a_flag_was_there(self, device, dtype, optim_info):
        for given in every_input(device, optim_info):
            with self.subTest(given.desc):
                line = Line(device, dtype)
                optimizer = optim_info.optim_cls(line.params, **given.kwargs)
                for _ in range(3):
                    take_step(optim_info, optimizer, line.closure(optimizer))
                old, names = copy.deepcopy(optimizer.state_dict()), set(optimizer.param_groups[0])
                for flag in optim_info.not_og_supported_flags:
                    old["param_groups"][0].pop(flag, None)
                optimizer.load_state_dict(old)
                take_step(optim_info, optimizer, line.closure(optimizer))
                self.assertEqual(set(optimizer.param_groups[0]), names)

    @optims(INFOS)
    def test_a_count_of_steps_that_is_a_number(self, device, dtype, optim_info):
        for given in every_input(device, optim_info):
            with self.subTest(given.desc):
                line = Line(device, dtype)
                optimizer = optim_info.optim_cls(line.params, **given.kwargs)
                for _ in range(3):
                    take_step(optim_info, optimizer, line.closure(optimizer))
                saved = copy.deepcopy(optimizer.state_dict())
                for state in saved["state"].values():
                    if "step" in state:
                        state["step"] = state["step"].item()
                twin = line.copy()
                other = optim_info.optim_cls(twin.params, **given.kwargs)
                other.load_state_dict(saved)
                for one, o in ((line, optimizer), (twin, other)):
                    take_step(optim_info, o, one.closure(o))
                self.assertEqual(line.params, twin.params, rtol=0, atol=0)

    @onlyCUDA
    @optims(INFOS)
    def test_state_dict_of_the_cpu_on_cuda(self, device, dtype, optim_info):
        for given in every_input("cpu", optim_info):
            with self.subTest(given.desc):
                line = Line("cpu", dtype)
                optimizer = optim_info.optim_cls(line.params, **given.kwargs)
                for _ in range(3):
                    take_step(optim_info, optimizer, line.closure(optimizer))
                moved = copy.copy(line)
                moved.input = line.input.to(device)
                moved.weight, moved.bias = (Parameter(p.detach().to(device)) for p in line.params)
                other = optim_info.optim_cls(moved.params, **given.kwargs)
                saved = copy.deepcopy(optimizer.state_dict())
                kept = copy.deepcopy(saved)
                other.load_state_dict(saved)
                self.assertEqual(saved, kept)
                for state in other.state.values():
                    for name, value in state.items():
                        if name != "step":
                            self.assertEqual(value.device.type, "cuda")
                for _ in range(3):
                    for one, o in ((line, optimizer), (moved, other)):
                        take_step(optim_info, o, one.closure(o))
                    self.assertEqual([p.cpu() for p in moved.params], line.params)

    @optims(INFOS)
    def test_deepcopy_and_pickle(self, device, dtype, optim_info):
        """A copy has all public attributes, and goes on alone as the original does."""
        for given in every_input(device, optim_info):
            with self.subTest(given.desc):
                line = Line(device, dtype)
                optimizer = optim_info.optim_cls(line.params, **given.kwargs)
                for _ in range(3):
                    take_step(optim_info, optimizer, line.closure(optimizer))
                file = io.BytesIO()
                torch.save((line, optimizer), file)
                file.seek(0)
                copies = [copy.deepcopy((line, optimizer)), torch.load(file, weights_only=False)]
                take_step(optim_info, optimizer, line.closure(optimizer))
                for twin, other in copies:
                    public = [{name for name in vars(o) if not name.startswith("_")} for o in (optimizer, other)]
                    self.assertEqual(*public)
                    take_step(optim_info, other, twin.closure(other))
                    self.assertEqual(line.params, twin.params, rtol=0, atol=0)

    # ---- hooks ----

    @optims(INFOS)
    def test_step_hooks(self, device, dtype, optim_info):
        """Around every step: the global ones first and last, those of the optimizer between; none once removed."""
        seen = []

        def note(number):
            return lambda optimizer, args, kwargs: seen.append(number)

        for given in every_input(device, optim_info, differentiable=True):
            with self.subTest(given.desc):
                params = [torch.ones(2, device=device, dtype=dtype)]
                optimizer, other = optim_info.optim_cls(params, **given.kwargs), torch.optim.SGD(params)
                handles = [
                    register_optimizer_step_pre_hook(note(0)),
                    register_optimizer_step_post_hook(note(5)),
                    *(o.register_step_pre_hook(note(1)) for o in (optimizer, other)),
                    *(o.register_step_post_hook(note(2)) for o in (optimizer, other)),
                ]
                try:
                    for o, calls in ((optimizer, 1), (other, 2), (optimizer, 3)):
                        o.step(lambda: 1)
                        self.assertEqual(seen, [0, 1, 2, 5] * calls)
                finally:
                    for handle in handles:
                        handle.remove()
                optimizer.step(lambda: 1)
                self.assertEqual(seen, [0, 1, 2, 5] * 3)
                seen.clear()

    @optims(INFOS)
    def test_state_dict_hooks(self, device, dtype, optim_info):
        for given in every_input(device, optim_info, differentiable=True):
            with self.subTest(given.desc):
                optimizer = optim_info.optim_cls([torch.ones(2, device=device, dtype=dtype)], **given.kwargs)
                optimizer.register_state_dict_post_hook(
                    lambda _, saved: {**saved, "note": saved["state"].pop("note", None)}
                )
                self.assertIsNone(optimizer.state_dict()["note"])
                optimizer.register_state_dict_pre_hook(lambda o: o.state.__setitem__("note", 1))
                saved = optimizer.state_dict()
                self.assertEqual(saved["note"], 1)
                self.assertNotIn("note", saved["state"])

    @optims(INFOS)
    def test_load_state_dict_hooks(self, device, dtype, optim_info):
        """In order, or put before the others; one that returns a state dict replaces it."""

        def in_place(optimizer, saved):
            saved["param_groups"][0]["lr"] = 0.002

        def anew(optimizer, saved):
            saved = copy.deepcopy(saved)
            saved["param_groups"][0]["lr"] = 0.003
            return saved

        for given in every_input(device, optim_info, differentiable=True):
            with self.subTest(given.desc):
                optimizer = optim_info.optim_cls([torch.ones(2, device=device, dtype=dtype)], **given.kwargs)
                saved = optimizer.state_dict()
                seen = []
                optimizer.register_load_state_dict_post_hook(lambda o, seen=seen: seen.append(o.param_groups[0]["lr"]))
                optimizer.register_load_state_dict_pre_hook(in_place)
                optimizer.load_state_dict(saved)
                optimizer.register_load_state_dict_pre_hook(anew, prepend=True)
                optimizer.load_state_dict(saved)
                optimizer.register_load_state_dict_pre_hook(anew)
                optimizer.load_state_dict(saved)
                self.assertEqual(seen, [0.002, 0.002, 0.003])

    @optims(INFOS)
    def test_stands_beside_torchs_own_in_the_table(self, device, dtype, optim_info):
        """An entry says all that the entries of torch do, and no class is entered twice."""
        self.assertNotIn(optim_info.optim_cls, [info.optim_cls for info in optim_db])
        self.assertEqual(set(vars(optim_info)), set(vars(optim_db[0])))
        self.assertTrue(issubclass(optim_info.optim_cls, torch.optim.Optimizer))


def as_real(tensor):
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


instantiate_device_type_tests(TestOptimizers, globals(), only_for=("cpu", "cuda"))
