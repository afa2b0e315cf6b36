"""The optimizers and their implementations, as the tests of what surrounds them go through them."""

import cmath
from dataclasses import dataclass, field

import torch
from torch.nn import Parameter

from nestopt_ext import ComplexAdam, ComplexSGD

TURNING = cmath.rect(0.8, 0.7)


@dataclass(frozen=True)
class Configuration:
    """An optimizer and its hyperparameters."""

    name: str
    optimizer: type
    hyperparameters: dict = field(default_factory=dict)

    def __call__(self, params, **others):
        return self.optimizer(params, **{**self.hyperparameters, **others})

    def __repr__(self):
        return self.name


CONFIGURATIONS = [
    Configuration("ComplexSGD", ComplexSGD, {"lr": 0.05, "momentum": TURNING, "weight_decay": 0.1}),
    Configuration("ComplexSGD-real", ComplexSGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    Configuration("ComplexAdam", ComplexAdam, {"lr": 0.01, "betas": (TURNING, 0.99), "weight_decay": 0.1}),
    Configuration(
        "ComplexAdam-real",
        ComplexAdam,
        {
            "lr": 0.01,
            "betas": (0.9, 0.99),
            "weight_decay": 0.1,
            "bias_correction": True,
            "amsgrad": True,
            "decoupled_weight_decay": True,
        },
    ),
]

IMPLEMENTATIONS = {
    "loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "default": {},
}


def state_tensors(optimizer):
    """Every tensor of the state, in a fixed order."""
    return [
        optimizer.state[p][name]
        for group in optimizer.param_groups
        for p in group["params"]
        for name in sorted(optimizer.state.get(p, {}))
    ]


def set_grads(params, seed):
    """The same gradients for the same seed, whatever the dtype and layout."""
    gen = torch.Generator().manual_seed(1000 + seed)
    for p in params:
        dtype = torch.complex128 if p.is_complex() else torch.float64
        p.grad = torch.randn(p.shape, dtype=dtype, generator=gen).to(device=p.device, dtype=p.dtype)


def make_params(shapes, dtype=torch.float64, device="cpu", seed=0):
    gen = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return [Parameter(torch.randn(s, dtype=wide, generator=gen).to(device=device, dtype=dtype)) for s in shapes]


def assert_all_close(found, wanted, **tolerances):
    found, wanted = list(found), list(wanted)
    assert len(found) == len(wanted) > 0
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f.detach(), w.detach(), **tolerances)
