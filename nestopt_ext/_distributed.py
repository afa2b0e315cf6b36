"""Means over the processes of a group: what data-parallel losses, gradients and products are."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _reference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def check_group(caller: str, group: Any) -> None:
    """Requires None, or a group that this process is in."""
    if group is None:
        return
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        raise RuntimeError(
            f"{caller}: process_group must belong to an initialized torch.distributed; got {type(group).__name__}."
            " Call torch.distributed.init_process_group first."
        )
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(
            f"{caller}: process_group must be None or a process group; got {group!r}."
            " Pass torch.distributed.group.WORLD for all processes."
        )


def average_(tensors: Sequence[Tensor], group: "ProcessGroup") -> None:
    """Replaces each tensor by its mean over the processes, in place: the same bits in every one of them.

    All processes must call with tensors of the same shapes and dtypes. There is one collective for each device and
    dtype; the 16-bit dtypes are summed in float32.
    """
    buckets: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            buckets.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    size = torch.distributed.get_world_size(group)
    for (_, dtype), bucket in buckets.items():
        flat = torch.cat([t.detach().reshape(-1) for t in bucket]).to(_reference.opmath(dtype))
        torch.distributed.all_reduce(flat, group=group)
        flat /= size
        for tensor, mean in zip(bucket, torch.split(flat, [t.numel() for t in bucket]), strict=True):
            tensor.detach().copy_(mean.view_as(tensor))
