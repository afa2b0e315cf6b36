"""The data of one step: its tensors in a row, memory that stays for them, and what tells one kind of data from another.

Data come as the arguments of a loss, in any nesting of tuples, lists and dicts; what is not a tensor is a constant.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from .. import _lists
from .._types import TensorList


class Batch:
    """The data of the inner and of the outer loss."""

    def __init__(self, caller: str, inner_data: Any, outer_data: Any) -> None:
        self._leaves, self._spec = _pytree.tree_flatten((_arguments(inner_data), _arguments(outer_data)))
        self._places = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        for i in self._places:
            if self._leaves[i].requires_grad:
                raise ValueError(
                    f"{caller}: inner_data and outer_data must not require grad; got a tensor of shape"
                    f" {_lists.shape_name(self._leaves[i].shape)} that does. Data to be differentiated in are hparams:"
                    " let the losses close over them."
                )
        for leaf in self._leaves:
            if not isinstance(leaf, Hashable):
                raise TypeError(
                    f"{caller}: inner_data and outer_data must be made of tensors and of constants that can be hashed;"
                    f" got {_lists.value_name(leaf)}. Convert it with torch.as_tensor."
                )

    @property
    def tensors(self) -> TensorList:
        return [self._leaves[i] for i in self._places]

    def arguments(self) -> tuple[Sequence[Any], Sequence[Any]]:
        """The arguments of the inner and of the outer loss."""
        return self._packed(self._leaves)

    def kind(self) -> Hashable:
        """Equal for data that differ in the values of their tensors alone."""
        leaves = [(type(t), t) if not isinstance(t, Tensor) else layout(t) for t in self._leaves]
        return self._spec, tuple(leaves)

    def staying(self) -> tuple[TensorList, tuple[Sequence[Any], Sequence[Any]]]:
        """A copy of the tensors in memory of their own, and the arguments made of it."""
        copies = [t.detach().clone() for t in self.tensors]
        leaves = list(self._leaves)
        for i, copy in zip(self._places, copies, strict=True):
            leaves[i] = copy
        return copies, self._packed(leaves)

    def _packed(self, leaves: list[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        inner, outer = _pytree.tree_unflatten(leaves, self._spec)
        return inner, outer


def layout(tensor: Tensor) -> Hashable:
    """All that an operator may choose its way by, beside the values."""
    strides = tensor.stride() if tensor.layout == torch.strided else None
    return type(tensor), tensor.shape, strides, tensor.dtype, tensor.device, tensor.layout


def place(tensor: Tensor) -> Hashable:
    """The layout, and where the memory is."""
    return layout(tensor), tensor.data_ptr() if tensor.layout == torch.strided else id(tensor)


def surroundings() -> Hashable:
    """The switches of PyTorch that decide how an operator computes."""
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return (
        tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.allow_tf32,
        torch.is_anomaly_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
    )


def _arguments(data: Any) -> tuple[Any, ...]:
    """A tuple or list holds the arguments of a loss; anything else is the only one."""
    return tuple(data) if isinstance(data, tuple | list) else (data,)
