"""What the tests of one optimizer do with it: parameters, gradients, steps, and checkpoints that were in a file."""

import io

import torch
from helpers import Memory
from torch.nn import Parameter

IMPLEMENTATIONS = {
    "default": {},
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "single": {"foreach": False, "fused": False},
}
SHAPES = [(), (3,), (4, 5), (2, 3, 4, 2), (0,)]


def make_params(shapes=SHAPES, dtype=torch.float64, seed=0, layout=None):
    gen = torch.Generator().manual_seed(seed)
    values = [torch.randn(s, dtype=torch.float64, generator=gen).to(dtype) for s in shapes]
    return [Parameter(layout(v) if layout else v) for v in values]


def set_grads(params, seed):
    gen = torch.Generator().manual_seed(1000 + seed)
    for p in params:
        p.grad = torch.randn(p.shape, dtype=torch.float64, generator=gen).to(device=p.device, dtype=p.dtype)


def run(optimizer, params, steps=5, first=0):
    for i in range(first, first + steps):
        set_grads(params, i)
        optimizer.step()
    return [p.detach().clone() for p in params]


def snapshot(optimizer):
    """The parameters and every tensor of the state."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return Memory(params + [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)])


def saved(optimizer):
    """The state as it comes back from a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)
