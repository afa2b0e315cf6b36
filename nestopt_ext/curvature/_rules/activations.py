"""Functions of one number, applied to each element: their derivative is a factor that is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._tape import OUT_OF_PLACE, Node, Operand, accumulated, rule, value_of

# Klambauer et al., Self-normalizing neural networks (2017).
_SELU_ALPHA = 1.6732632423543772
_SELU_SCALE = 1.0507009873554805


class Factor(Node):
    """A product with a fixed factor for each element, of the operand's shape."""

    def __init__(self, x: Operand, factor: Tensor) -> None:
        super().__init__(x)
        self.factor = factor

    def jvp(self, tangents: Sequence[Tensor | None]) -> Tensor:
        assert tangents[0] is not None
        return tangents[0] * self.factor

    def vjp(self, i: int, cotangent: Tensor, into: Tensor | None) -> Tensor:
        return cotangent * self.factor if into is None else into.addcmul_(cotangent, self.factor)

    def batch_dim(self, dims: Sequence[int | None], batch: int) -> int | None:
        """As it was."""
        return dims[0]


class Rectifier(Node):
    """The larger of x and 0. What it gave says where its derivative is 1, and the next layer keeps that anyway."""

    def __init__(self, x: Operand, value: Tensor) -> None:
        super().__init__(x)
        self.value = value

    def jvp(self, tangents: Sequence[Tensor | None]) -> Tensor:
        return self._passed(tangents[0])

    def vjp(self, i: int, cotangent: Tensor, into: Tensor | None) -> Tensor:
        return accumulated(self._passed(cotangent), into)

    def _passed(self, t: Tensor | None) -> Tensor:
        result: Tensor = torch.ops.aten.threshold_backward.default(t, self.value, 0)
        return result

    def batch_dim(self, dims: Sequence[int | None], batch: int) -> int | None:
        """As it was."""
        return dims[0]


class FromValue(Node):
    """A function whose derivative follows from what it gave, which the next layer keeps anyway.

    ``derivative`` multiplies with it: the function of a cotangent and the value that is PyTorch's own backward pass.
    """

    def __init__(self, x: Operand, value: Tensor, derivative: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(x)
        self.value = value
        self._derivative = derivative

    def jvp(self, tangents: Sequence[Tensor | None]) -> Tensor:
        assert tangents[0] is not None
        return self._derivative(tangents[0], self.value)

    def vjp(self, i: int, cotangent: Tensor, into: Tensor | None) -> Tensor:
        return accumulated(self._derivative(cotangent, self.value), into)

    def batch_dim(self, dims: Sequence[int | None], batch: int) -> int | None:
        """As it was."""
        return dims[0]


@rule(F.relu, torch.relu, Tensor.relu, inplace_position=1)
def relu(input: Operand, inplace: bool = False) -> Any:
    value = torch.relu(value_of(input))
    return Rectifier(input, value), value


@rule(F.leaky_relu, inplace_position=2)
def leaky_relu(input: Operand, negative_slope: float = 0.01, inplace: bool = False) -> Any:
    x = value_of(input)
    factor = torch.where(x > 0, x.new_ones(()), x.new_full((), negative_slope))
    return Factor(input, factor), F.leaky_relu(x, negative_slope)


@rule(F.elu, inplace_position=2)
def elu(input: Operand, alpha: float = 1.0, inplace: bool = False) -> Any:
    x = value_of(input)
    return Factor(input, torch.where(x > 0, torch.ones_like(x), alpha * x.exp())), F.elu(x, alpha)


@rule(F.celu, inplace_position=2)
def celu(input: Operand, alpha: float = 1.0, inplace: bool = False) -> Any:
    x = value_of(input)
    return Factor(input, torch.where(x > 0, torch.ones_like(x), (x / alpha).exp())), F.celu(x, alpha)


@rule(F.selu, inplace_position=1)
def selu(input: Operand, inplace: bool = False) -> Any:
    x = value_of(input)
    factor = torch.where(x > 0, torch.full_like(x, _SELU_SCALE), _SELU_SCALE * _SELU_ALPHA * x.exp())
    return Factor(input, factor), F.selu(x)


@rule(F.hardtanh, inplace_position=3)
def hardtanh(input: Operand, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Any:
    x = value_of(input)
    return Factor(input, ((x > min_val) & (x < max_val)).to(x.dtype)), F.hardtanh(x, min_val, max_val)


@rule(F.relu6, inplace_position=1)
def relu6(input: Operand, inplace: bool = False) -> Any:
    return hardtanh(input, 0.0, 6.0)


@rule(F.hardswish, inplace_position=1)
def hardswish(input: Operand, inplace: bool = False) -> Any:
    x = value_of(input)
    return Factor(input, torch.ops.aten.hardswish_backward(torch.ones_like(x), x)), F.hardswish(x)


@rule(F.mish, inplace_position=1)
def mish(input: Operand, inplace: bool = False) -> Any:
    x = value_of(input)
    t = F.softplus(x).tanh()
    return Factor(input, t + x * (1 - t * t) * x.sigmoid()), F.mish(x)


@rule(F.logsigmoid)
def logsigmoid(input: Operand) -> Any:
    x = value_of(input)
    return Factor(input, (-x).sigmoid()), F.logsigmoid(x)


@rule(F.softsign)
def softsign(input: Operand) -> Any:
    x = value_of(input)
    return Factor(input, (1 + x.abs()).pow(-2)), F.softsign(x)


@rule(F.gelu)
def gelu(input: Operand, approximate: str = "none") -> Any:
    x = value_of(input)
    return Factor(input, torch.ops.aten.gelu_backward(torch.ones_like(x), x, approximate=approximate)), F.gelu(
        x, approximate=approximate
    )


@rule(F.silu, inplace_position=1)
def silu(input: Operand, inplace: bool = False) -> Any:
    x = value_of(input)
    return Factor(input, torch.ops.aten.silu_backward(torch.ones_like(x), x)), F.silu(x)


@rule(F.softplus)
def softplus(input: Operand, beta: float = 1.0, threshold: float = 20.0) -> Any:
    x = value_of(input)
    factor = torch.where(x * beta > threshold, 1.0, torch.sigmoid(x * beta)).to(x.dtype)
    return Factor(input, factor), F.softplus(x, beta, threshold)


@rule(torch.tanh, Tensor.tanh, F.tanh)
def tanh(input: Operand) -> Any:
    value = value_of(input).tanh()
    return FromValue(input, value, torch.ops.aten.tanh_backward.default), value


@rule(torch.sigmoid, Tensor.sigmoid, F.sigmoid)
def sigmoid(input: Operand) -> Any:
    value = value_of(input).sigmoid()
    return FromValue(input, value, torch.ops.aten.sigmoid_backward.default), value


@rule(torch.exp, Tensor.exp)
def exp(input: Operand) -> Any:
    value = value_of(input).exp()
    return Factor(input, value), value


@rule(torch.log, Tensor.log)
def log(input: Operand) -> Any:
    x = value_of(input)
    return Factor(input, 1 / x), x.log()


@rule(torch.sqrt, Tensor.sqrt)
def sqrt(input: Operand) -> Any:
    value = value_of(input).sqrt()
    return Factor(input, 0.5 / value), value


@rule(torch.rsqrt, Tensor.rsqrt)
def rsqrt(input: Operand) -> Any:
    value = value_of(input).rsqrt()
    return Factor(input, -0.5 * value * value * value), value


@rule(torch.square, Tensor.square)
def square(input: Operand) -> Any:
    x = value_of(input)
    return Factor(input, 2 * x), x.square()


@rule(torch.sin, Tensor.sin)
def sin(input: Operand) -> Any:
    x = value_of(input)
    return Factor(input, x.cos()), x.sin()


@rule(torch.cos, Tensor.cos)
def cos(input: Operand) -> Any:
    x = value_of(input)
    return Factor(input, -x.sin()), x.cos()


@rule(torch.abs, Tensor.abs, Tensor.__abs__)
def absolute(input: Operand) -> Any:
    x = value_of(input)
    return Factor(input, x.sign()), x.abs()


@rule(torch.erf, Tensor.erf)
def erf(input: Operand) -> Any:
    x = value_of(input)
    return Factor(input, 2 / math.sqrt(math.pi) * torch.exp(-x * x)), x.erf()


OUT_OF_PLACE.update(
    {
        torch.relu_: torch.relu,
        Tensor.relu_: torch.relu,
        Tensor.tanh_: torch.tanh,
        torch.tanh_: torch.tanh,
        Tensor.sigmoid_: torch.sigmoid,
        torch.sigmoid_: torch.sigmoid,
        Tensor.exp_: torch.exp,
        Tensor.sqrt_: torch.sqrt,
        Tensor.square_: torch.square,
    }
)
