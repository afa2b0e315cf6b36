"""Convolutions, and their transposes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._tape import MixesExamples, Node, Operand, OuterProducts, Rows, accumulated, by_example, rule, value_of


class Convolution(Node):
    """A convolution of x [N, C, *size], or of one image [C, *size], or its transpose.

    ``uneven`` is padding behind x that has no counterpart before it, as "same" has for kernels of even extent.
    """

    gradients_are_large = True  # the patches of x

    def __init__(
        self,
        x: Operand,
        weight: Operand,
        bias: Operand | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        output_padding: Sequence[int] | None = None,
        uneven: Sequence[int] = (),
    ) -> None:
        super().__init__(x, weight, bias)
        w = value_of(weight)
        self.transposed = output_padding is not None
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.output_padding = (0,) * len(stride) if output_padding is None else output_padding
        self.uneven = list(uneven) if any(uneven) else None
        self.batched = value_of(x).dim() == w.dim()
        self.bias_sizes = None if bias is None else list(value_of(bias).shape)
        self.kernel = w.shape[2:]
        batch = self._entered(value_of(x))
        # The gradient in the one needs the other, and of itself only the shape.
        self.x = batch if 1 in self.wanted else batch.new_empty(()).expand(batch.shape)
        self.weight = w if 0 in self.wanted else w.new_empty(()).expand(w.shape)
        result = self._convolved(batch, w, value_of(bias))
        self.size = result.shape
        self.macs = (batch if self.transposed else result).numel() * w[0].numel()
        #: Taken by the rule, and not kept.
        self.result: Tensor | None = self._left(result)

    def take_result(self) -> Tensor:
        """What the convolution gave, once."""
        result, self.result = self.result, None
        assert result is not None
        return result

    def _entered(self, x: Tensor) -> Tensor:
        """A tensor like x, as the convolution itself sees it."""
        batch = x if self.batched else x.unsqueeze(0)
        return batch if self.uneven is None else F.pad(batch, self.uneven)

    def _left(self, result: Tensor) -> Tensor:
        return result if self.batched else result.squeeze(0)

    def _convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.convolution(
            x,
            weight,
            bias,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
        )

    def jvp(self, tangents: Sequence[Tensor | None]) -> Tensor:
        """The convolution with each operand replaced by its tangent in turn."""
        of_x, of_weight, of_bias = tangents
        result = None
        if of_weight is not None:
            result = self._convolved(self.x, of_weight, of_bias)
            of_bias = None
        if of_x is not None:
            moved = self._convolved(self._entered(of_x), self.weight, of_bias)
            result = moved if result is None else result.add_(moved)
        elif of_bias is not None:
            result = of_bias.view(-1, *[1] * len(self.stride)).expand(self.size).clone()
        assert result is not None
        return self._left(result)

    def vjp(self, i: int, cotangent: Tensor, into: Tensor | None) -> Tensor:
        return accumulated(self._gradients(cotangent, [i])[0], into)

    def vjps(self, cotangent: Tensor, operands: Sequence[int]) -> list[Tensor]:
        """All from one call."""
        return self._gradients(cotangent, operands)

    def _gradients(self, cotangent: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        u = cotangent if self.batched else cotangent.unsqueeze(0)
        found = torch.ops.aten.convolution_backward(
            u,
            self.x,
            self.weight,
            self.bias_sizes,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
            [i in wanted for i in range(3)],
        )
        return [self._of_input(found[i]) if i == 0 else found[i] for i in wanted]

    def _of_input(self, gradient: Tensor) -> Tensor:
        if self.uneven is not None:
            gradient = F.pad(gradient, [-p for p in self.uneven])
        return gradient if self.batched else gradient.squeeze(0)

    def batch_dim(self, dims: Sequence[int | None], batch: int) -> int | None:
        """The first, if that is where the examples are."""
        of_x, of_weight, of_bias = dims
        if of_weight is not None or of_bias is not None or (of_x is not None and (of_x != 0 or not self.batched)):
            raise MixesExamples("a convolution has examples in its weight, or sums over them")
        return of_x

    def example_gradients(
        self, i: int, cotangent: Tensor, dims: Sequence[int | None], batch: int
    ) -> OuterProducts | Rows:
        """A position of the result is one outer product: of its channels, and of the patch of x that it sees."""
        if dims[0] is None:
            raise MixesExamples("a convolution has the same input for all examples")
        if i == 2:
            channels = by_example(cotangent, 0, batch)
            return Rows(channels.sum([d for d in range(channels.dim()) if d not in (0, 2)]))
        if not self.transposed:
            return OuterProducts(self._pixels(cotangent, batch), self._patches(self.x, cotangent.shape[2:], batch))
        # Here it is x that has one pixel for each patch of the cotangent.
        left, right = self._pixels(self.x, batch), self._patches(cotangent, self.x.shape[2:], batch)
        return Rows(torch.einsum("btgo,btgi->bgoi", left, right).reshape(batch, *self.weight.shape))

    def _pixels(self, images: Tensor, batch: int) -> Tensor:
        """[N, C, *size] as [B, positions, groups, channels of a group]."""
        images = images.flatten(2).transpose(1, 2)
        return images.reshape(batch, -1, self.groups, images.shape[2] // self.groups)

    def _patches(self, images: Tensor, size: Sequence[int], batch: int) -> Tensor:
        """What the kernel covers at each of ``size`` positions: [B, positions, groups, channels * kernel]."""
        n = len(self.stride)
        around = [p for p in reversed(self.padding) for _ in range(2)]
        images = F.pad(images, around) if any(around) else images
        for d, (extent, step, apart, count) in enumerate(
            zip(self.kernel, self.stride, self.dilation, size, strict=True), start=2
        ):
            images = images.unfold(d, apart * (extent - 1) + 1, step)[..., ::apart].narrow(d, 0, count)
        patches = images.permute(0, *range(2, 2 + n), 1, *range(2 + n, 2 + 2 * n))
        features = images.shape[1] * self.kernel.numel()
        return patches.reshape(batch, -1, self.groups, features // self.groups)


def _each(value: Any, n: int) -> tuple[int, ...]:
    """A number for all n dimensions of an image, or one for each."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * n if len(values) == 1 else values


@rule(F.conv1d, F.conv2d, F.conv3d)
def conv(
    input: Operand,
    weight: Operand,
    bias: Operand | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    w = value_of(weight)
    n = w.dim() - 2
    apart = _each(dilation, n)
    uneven: list[int] = []
    if padding == "valid":
        around: tuple[int, ...] = (0,) * n
    elif padding == "same":
        if any(s != 1 for s in _each(stride, n)):
            return NotImplemented
        missing = [d * (k - 1) for d, k in zip(apart, w.shape[2:], strict=True)]
        around = tuple(m // 2 for m in missing)
        uneven = [p for m in reversed(missing) for p in (0, m % 2)]
    else:
        around = _each(padding, n)
    node = Convolution(input, weight, bias, _each(stride, n), around, apart, groups, uneven=uneven)
    return node, node.take_result()


@rule(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def conv_transpose(
    input: Operand,
    weight: Operand,
    bias: Operand | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Any:
    n = value_of(weight).dim() - 2
    node = Convolution(
        input,
        weight,
        bias,
        _each(stride, n),
        _each(padding, n),
        _each(dilation, n),
        groups,
        output_padding=_each(output_padding, n),
    )
    return node, node.take_result()
