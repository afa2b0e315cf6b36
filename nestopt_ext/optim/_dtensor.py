"""Distributed tensors (``DTensor``): elementwise arithmetic is done by each process on the shards it holds."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def call_on_shards(op: Callable[..., None], lists: Sequence[Sequence[Tensor]], *args: Any, **kwargs: Any) -> None:
    """Calls the elementwise ``op(*lists, *args, **kwargs)`` on what this process holds of each tensor.

    ``lists`` begins with the parameters and their gradients, which are only read; every other list is empty or has one
    tensor for each parameter, and may be written. Plain tensors are passed on as they are. A gradient that is spread
    otherwise than its parameter is brought to lie as the parameter does, as PyTorch's own operators would do.

    Raises:
        ValueError: for a parameter or state that is a pending sum (placement ``Partial``), whose elements no process
            knows, or a state that is spread otherwise than its parameter. Nothing has been written then.
    """
    shards = local_shards(lists)
    op(*shards, *args, **kwargs)
    if shards is not lists:  # the op told autograd of the shards alone
        written = [t for k, list_ in enumerate(lists) if k != 1 for t in list_]
        torch.autograd.graph.increment_version([t for t in written if isinstance(t, _dtensor_type())])


def local_shards(lists: Sequence[Sequence[Tensor]]) -> Sequence[Sequence[Tensor]]:
    """What this process holds of each tensor, for :func:`call_on_shards`; ``lists`` itself where nothing is spread."""
    kind = _dtensor_type()
    if kind is None or not any(issubclass(t, kind) for t in set(map(type, lists[0]))):
        return lists
    params, grads, *states = lists
    for list_ in (params, *states):
        for i, (t, param) in enumerate(zip(list_, params, strict=False)):
            if isinstance(t, kind):
                _check_placements(f"{'params' if list_ is params else 'the state of params'}[{i}]", t, param)
    return [
        [_shard(t, kind) for t in params],
        [_shard(_beside(t, p, kind), kind) for t, p in zip(grads, params, strict=True)],
        *([_shard(t, kind) for t in state] for state in states),
    ]


def _dtensor_type() -> Any:
    """The class, if anything has loaded it: without it there are none, and loading it takes its time."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def _check_placements(label: str, t: Any, param: Any) -> None:
    """A tensor to be written must consist of elements, and lie beside its parameter."""
    if any(placement.is_partial() for placement in t.placements):
        raise ValueError(
            f"step: {label} must be sharded or replicated; got placements {t.placements}, a sum that is pending."
            " Call .redistribute() on the parameter."
        )
    if not _same_spread(t, param):
        raise ValueError(
            f"step: {label} must be spread as the parameter is; got placements {t.placements} on {t.device_mesh}."
            " Make a new optimizer after moving parameters."
        )


def _beside(grad: Any, param: Any, kind: Any) -> Any:
    """The gradient, spread as its parameter is: a collective operation if it was not."""
    if not isinstance(grad, kind) or not isinstance(param, kind) or _same_spread(grad, param):
        return grad
    return grad.redistribute(param.device_mesh, param.placements)


def _same_spread(t: Any, other: Any) -> bool:
    return bool(t.device_mesh == getattr(other, "device_mesh", None) and t.placements == other.placements)


def _shard(t: Any, kind: Any) -> Tensor:
    return t.to_local() if isinstance(t, kind) else t  # type: ignore[no-any-return]
