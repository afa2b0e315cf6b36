"""Linear and convolution layers as matrix products: which rows go in, which come out, and where the params sit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _lists
from .._types import TensorList

#: The layers with Kronecker factors; a subclass counts only while it inherits what computes the output.
SUPPORTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_supported(module: nn.Module) -> bool:
    for kind in SUPPORTED:
        if isinstance(module, kind):
            convolves = getattr(type(module), "_conv_forward", None) is getattr(kind, "_conv_forward", None)
            return type(module).forward is kind.forward and convolves
    return False


@dataclass(frozen=True)
class Layer:
    """A layer as ``groups`` matrices [m, n] side by side; the bias, if it is among the params, is the last column.

    ``weight`` and ``bias`` are places in the flat list of params, None for a param that is not in it.
    """

    name: str
    module: nn.Module
    groups: int
    weight: int | None
    bias: int | None

    @property
    def places(self) -> list[int]:
        return [place for place in (self.weight, self.bias) if place is not None]

    def matrix(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """[k, groups, m, n] from [k, *shape] for each param of the flat list."""
        parts = []
        if self.weight is not None:
            t = tensors[self.weight]
            parts.append(t.reshape(t.shape[0], self.groups, t.shape[1] // self.groups, math.prod(t.shape[2:])))
        if self.bias is not None:
            t = tensors[self.bias]
            parts.append(t.reshape(t.shape[0], self.groups, t.shape[1] // self.groups, 1))
        return torch.cat([part.to(dtype) for part in parts], -1)

    def put(self, matrix: Tensor, into: TensorList, like: Sequence[Tensor]) -> None:
        """Undoes :meth:`matrix`: writes new tensors [k, *shape] to the places of this layer."""
        for place, part in zip(self.places, self._split(matrix), strict=True):
            into[place] = part.reshape(matrix.shape[0], *like[place].shape).to(like[place].dtype)

    def _split(self, matrix: Tensor) -> list[Tensor]:
        if self.weight is None or self.bias is None:
            return [matrix]
        return [matrix[..., :-1], matrix[..., -1:]]

    def input_rows(self, x: Tensor) -> Tensor:
        """What each row of the output is a linear function of, [groups, rows, n]."""
        if self.weight is None:
            return x.new_ones((self.groups, 1, 1))  # the moment of a constant does not depend on the number of rows
        linear = isinstance(self.module, nn.Linear)
        rows = x.reshape(1, -1, x.shape[-1]) if linear else _patches(self.module, x)  # type: ignore[arg-type]
        return rows if self.bias is None else F.pad(rows, (0, 1), value=1.0)

    def output_rows(self, d: Tensor) -> Tensor:
        """The same rows of what flows back to the output, [groups, rows, m]."""
        if isinstance(self.module, nn.Linear):
            return d.reshape(1, -1, d.shape[-1])
        d = d.reshape(d.shape[0], self.groups, d.shape[1] // self.groups, -1)  # [N, g, m, positions]
        return d.permute(1, 0, 3, 2).flatten(1, 2)

    def check_batched(self, caller: str, x: Tensor) -> None:
        """Without a batch dimension nothing says which outputs belong to one example."""
        wanted = 2 if isinstance(self.module, nn.Linear) else self.module.weight.dim()  # type: ignore[operator,union-attr]
        if x.dim() < wanted:  # type: ignore[operator]
            raise ValueError(
                f"{caller}: inputs must have a batch dimension; layer {self.name!r} got shape"
                f" {_lists.shape_name(x.shape)}. Pass inputs.unsqueeze(0) and targets.unsqueeze(0)."
            )


def _patches(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """[groups, N * positions, channels / groups * kernel] from [N, channels, *sizes]."""
    spatial = len(conv.kernel_size)
    margins: list[int] = []
    for i in reversed(range(spatial)):  # F.pad takes the last dimension first
        if conv.padding == "same":
            total = conv.dilation[i] * (conv.kernel_size[i] - 1)
            margins += [total // 2, total - total // 2]
        else:
            width = 0 if isinstance(conv.padding, str) else int(conv.padding[i])
            margins += [width, width]
    x = F.pad(x, margins, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)
    for i, (size, step, gap) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)):
        x = x.unfold(2 + i, gap * (size - 1) + 1, step)[..., ::gap]
    x = x.reshape(x.shape[0], conv.groups, -1, *x.shape[2:])  # [N, g, c, *positions, *kernel]
    order = [1, 0, *range(3, 3 + spatial), 2, *range(3 + spatial, 3 + 2 * spatial)]
    return x.permute(order).reshape(conv.groups, -1, x.shape[2] * math.prod(conv.kernel_size))
