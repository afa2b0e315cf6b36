"""Names for the types that pass between the rooms."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, TypeVar

from torch import Tensor

#: What a user may hand in wherever "tensors" are asked for; what comes back has the same structure.
Tensors: TypeAlias = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
#: The same, where the structure that comes back is the structure that went in.
SameTensors = TypeVar("SameTensors", bound=Tensors)
TensorList: TypeAlias = list[Tensor]
#: A linear map on tensors: takes and returns the structure it is given.
MatVec: TypeAlias = Callable[..., Tensors]
#: A scalar with a graph, or a zero-argument function that returns one.
Loss: TypeAlias = Tensor | Callable[[], Tensor]
