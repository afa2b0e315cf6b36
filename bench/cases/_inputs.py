"""Inputs and yardsticks that the cases share."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from nestopt_ext import _reference

from ..registry import YARDSTICK, Contestant, Field, Setting

Shape = tuple[int, ...]


def one_large(setting: Setting) -> list[Shape]:
    """One tensor that is much larger than any cache: 30 M elements."""
    return [(2_000_000 if setting.quick else 30_000_000,)]


def many_small(setting: Setting) -> list[Shape]:
    """300 tensors of 1 000 elements, where the time goes into everything but the arithmetic."""
    return [(1_000,)] * 300


def resnet50(setting: Setting) -> list[Shape]:
    """The 161 parameters of ResNet-50, 25.6 M elements; an eighth of its width in a quick run."""
    base = 8 if setting.quick else 64
    shapes: list[Shape] = [(base, 3, 7, 7), (base,), (base,)]
    channels = base
    for stage, num_blocks in enumerate((3, 4, 6, 3)):
        width = base << stage
        for block in range(num_blocks):
            convolutions = [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                convolutions.append((4 * width, channels, 1, 1))
            for conv in convolutions:
                shapes += [conv, (conv[0],), (conv[0],)]
            channels = 4 * width
    return [*shapes, (1_000, channels), (1_000,)]


def resnet50_convolutions(setting: Setting) -> list[Shape]:
    """The weights of ResNet-50 for which channels-last is another order of the elements."""
    return [shape for shape in resnet50(setting) if len(shape) == 4 and shape[2] > 1]


def normal(shapes: Iterable[Shape], setting: Setting, seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Normal random tensors, the same ones on every call."""
    generator = torch.Generator(setting.device).manual_seed(seed)
    return [torch.randn(shape, device=setting.device, generator=generator).to(dtype) for shape in shapes]


def num_bytes(*lists: Iterable[Tensor]) -> int:
    """Bytes of all elements of the lists."""
    return sum(t.numel() * t.element_size() for tensors in lists for t in tensors)


class Problem:
    """Params and gradients of an optimizer's case; every contestant takes copies of its own."""

    def __init__(
        self, setting: Setting, shapes: Iterable[Shape], dtype: torch.dtype, channels_last: bool = False
    ) -> None:
        self.setting = setting
        self.params = normal(shapes, setting, 0, dtype)
        self.grads = normal(shapes, setting, 1, dtype)
        if channels_last:
            self.params = [p.contiguous(memory_format=torch.channels_last) for p in self.params]
        self.math = _reference.opmath(dtype)
        self.params_bytes = num_bytes(self.params)
        self.buffer_bytes = sum(p.numel() for p in self.params) * self.math.itemsize

    def copies(self) -> tuple[list[Tensor], list[Tensor]]:
        params, grads = ([t.clone() for t in tensors] for tensors in (self.params, self.grads))
        return params, grads

    def parameters(self) -> list[Tensor]:
        params, grads = self.copies()
        leaves: list[Tensor] = [torch.nn.Parameter(p) for p in params]
        for leaf, grad in zip(leaves, grads, strict=True):
            leaf.grad = grad
        return leaves

    def buffers(self) -> list[Tensor]:
        return [torch.zeros_like(p, dtype=self.math) for p in self.params]

    def traffic(self, num_buffers: int, buffer_bytes: int | None = None) -> int:
        """Params read and written, gradients read, each buffer read and written."""
        return 3 * self.params_bytes + 2 * num_buffers * (self.buffer_bytes if buffer_bytes is None else buffer_bytes)

    def field(self, contestants: list[Contestant], left_out: dict[str, str]) -> Field:
        yardsticks = [make(contestants[0].bytes_moved, self.setting) for make in (copy, triad)]
        count = sum(p.numel() for p in self.params)
        return Field([*contestants, *yardsticks], len(self.params), count, self.params_bytes, left_out)


def copy(moved: int, setting: Setting) -> Contestant:
    """``a = b``: one word read, one written."""
    a, b = (torch.zeros(moved // 8, device=setting.device) for _ in range(2))
    return Contestant("copy", YARDSTICK, lambda: a.copy_(b), num_bytes([a, b]))


def triad(moved: int, setting: Setting) -> Contestant:
    """``a += s * b``: two words read, one written, and the word written is one that was read, as in the ops."""
    a, b = (torch.zeros(moved // 12, device=setting.device) for _ in range(2))
    return Contestant("triad a += s*b", YARDSTICK, lambda: a.add_(b, alpha=0.5), 3 * num_bytes([a]))


def triad_out(moved: int, setting: Setting) -> Contestant:
    """``a = b + s * c``: on a CPU the lines of a are read before they are overwritten, which the count leaves out."""
    a, b, c = (torch.zeros(moved // 12, device=setting.device) for _ in range(3))
    step: Callable[[], object] = lambda: torch.add(b, c, alpha=0.5, out=a)  # noqa: E731
    return Contestant("triad torch.add(out=)", YARDSTICK, step, 3 * num_bytes([a]))
