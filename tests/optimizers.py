"""The optimizers and their implementations, and what their tests do with them: parameters, gradients, steps, files."""

import cmath
import io
from dataclasses import dataclass, field

import torch
from helpers import Memory
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
SHAPES = [(), (3,), (4, 5), (2, 3, 4, 2), (0,)]


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


def make_params(shapes=SHAPES, dtype=torch.float64, device="cpu", seed=0, layout=None):
    gen = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    values = [torch.randn(s, dtype=wide, generator=gen).to(device=device, dtype=dtype) for s in shapes]
    return [Parameter(layout(v) if layout else v) for v in values]


def run(optimizer, params, steps=5, first=0):
    """Steps with the gradients of these numbers; returns copies of the parameters."""
    for i in range(first, first + steps):
        set_grads(params, i)
        optimizer.step()
    return [p.detach().clone() for p in params]


def snapshot(optimizer):
    """The parameters and every tensor of the state."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return Memory(params + [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)])


def from_file(saved):
    """What is left of it by a file and a safe reader."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_all_close(found, wanted, **tolerances):
    found, wanted = list(found), list(wanted)
    assert len(found) == len(wanted) > 0
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f.detach(), w.detach(), **tolerances)
