"""Cases of stn_gate: the gates of a response layer, forward and backward, against calls of torch."""

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nestopt_ext import _functions, _reference

from .. import registry
from ..registry import BASELINE, OURS, Case, Contestant, Field, Goal, Setting
from . import _inputs

# The output of a layer from its stacked products, gates, bias and response bias.
Gate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _ours(stacked: Tensor, gates: Tensor, bias: Tensor, response_bias: Tensor) -> Tensor:
    return _functions.stn_gate(stacked, None, gates, bias, response_bias, batch_dim=0, channel_dim=1)


def _spread(rows: Tensor, like: Tensor) -> Tensor:
    """A number for each example and channel, at each position of ``like``."""
    return rows.reshape(*rows.shape, *(1,) * (like.dim() - 2))


def _as_written(stacked: Tensor, gates: Tensor, bias: Tensor, response_bias: Tensor) -> Tensor:
    plain, response = stacked.chunk(2, 1)
    weight_gates, bias_gates = gates.chunk(2, 1)
    out = plain + _spread(weight_gates, plain) * response + _spread(bias[None], plain)
    return out + _spread(bias_gates * response_bias, plain)


def _fewest_calls(stacked: Tensor, gates: Tensor, bias: Tensor, response_bias: Tensor) -> Tensor:
    """The two biases are summed up before they are spread over positions."""
    plain, response = stacked.chunk(2, 1)
    weight_gates, bias_gates = gates.chunk(2, 1)
    shift = torch.addcmul(bias, bias_gates, response_bias)
    return torch.addcmul(plain, _spread(weight_gates, plain), response) + _spread(shift, plain)


def _compiled() -> Gate:
    torch.compiler.reset()
    compiled: Gate = torch.compile(_fewest_calls, fullgraph=True, dynamic=False)
    return compiled


class _Problem:
    """Stacked products of a layer with gates for each example, all of which require grad, and a gradient to send."""

    def __init__(self, setting: Setting, shape: tuple[int, ...]) -> None:
        examples, channels, *positions = shape
        shapes = [(examples, 2 * channels, *positions), (examples, 2 * channels), (channels,), (channels,)]
        self.arguments = [t.requires_grad_() for t in _inputs.normal(shapes, setting, 0)]
        (self.direction,) = _inputs.normal([shape], setting, 1)
        self.numel = math.prod(shape)
        self.bytes = 4 * self.numel

    def forward(self, gate: Gate) -> Callable[[], Sequence[Tensor]]:
        return lambda: [gate(*self.arguments)]

    def backward(self, gate: Gate) -> Callable[[], Sequence[Tensor]]:
        """Through a graph made beforehand."""
        out = gate(*self.arguments)
        return lambda: torch.autograd.grad(out, self.arguments, self.direction, retain_graph=True)

    @functools.cached_property
    def exact(self) -> dict[str, list[Tensor]]:
        arguments = [t.detach().double().requires_grad_() for t in self.arguments]
        stacked, gates, bias, response_bias = arguments
        plain, response = stacked.chunk(2, 1)
        out = _reference.stn_gate(plain, response, gates, bias, response_bias, 0, 1)
        gradients = torch.autograd.grad(out, arguments, self.direction.double())
        return {"forward": [out.detach()], "backward": list(gradients)}


def _contestant(problem: _Problem, direction: str, name: str, role: str, gate: Gate, moved: int) -> Contestant:
    run = getattr(problem, direction)(gate)
    last: list[Sequence[Tensor]] = [()]

    def step() -> None:
        last[0] = run()

    # A sum over positions, or examples, is off by the roundings of numbers of the size of its square root.
    tolerance = 8.0 + 4 * math.sqrt(problem.numel / problem.arguments[2].numel())
    return Contestant(name, role, step, moved, lambda: last[0], lambda _: problem.exact[direction], tolerance)


def _field(direction: str, shape: tuple[int, ...]) -> Callable[[Setting], Field]:
    def build(setting: Setting) -> Field:
        problem = _Problem(setting, (max(1, shape[0] // 16), *shape[1:]) if setting.quick else shape)
        # Forward reads two halves and the gates and writes one; backward reads the gradient, the response and gates and
        # writes two halves and the gradients of gates.
        coefficients = _inputs.num_bytes([problem.arguments[1]])
        moved = 3 * problem.bytes + coefficients if direction == "forward" else 4 * problem.bytes + 2 * coefficients
        contestants = [
            _contestant(problem, direction, "stn_gate", OURS, _ours, moved),
            _contestant(problem, direction, "eager, as written", BASELINE, _as_written, moved),
            _contestant(problem, direction, "eager, fewest calls", BASELINE, _fewest_calls, moved),
        ]
        left_out = {}
        if setting.quick:
            left_out["torch.compile"] = "--quick"
        else:
            contestants.append(_contestant(problem, direction, "torch.compile", BASELINE, _compiled(), moved))
        contestants.append(_inputs.triad(moved, setting))
        return Field(contestants, 1, problem.numel, problem.bytes, left_out)

    return build


for _name, _layer, _shape in (
    ("linear-1200", "a linear layer, batch 128, 1 200 outputs", (128, 1200)),
    ("conv-192x8x8", "a convolution, batch 128, 192 channels of 8 x 8", (128, 192, 8, 8)),
):
    for _direction in ("forward", "backward"):
        _goals = [Goal("eager, as written", 1 / 1.5, "1.5x faster than the formula in eager calls")]
        if _direction == "forward":
            _goals.append(Goal(None, 1.05, "no memory beside the result"))
        registry.add(
            Case(
                f"stn_gate/{_name}-{_direction}",
                f"stn_gate of {_layer}, fp32, {_direction}",
                _field(_direction, _shape),
                tuple(_goals),
            )
        )
