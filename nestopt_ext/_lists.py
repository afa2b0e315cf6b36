"""Tensors however a caller holds them, as one flat list: structure, checks and algebra.

Every public function accepts a Tensor, a list, a tuple or a dict of tensors (and, where it only reads them, any
iterable such as ``model.parameters()``), works on a flat list, and packs what it returns the way it came.
"""

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ._types import TensorList

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


# ---- words for messages ---------------------------------------------------------------------------------------------


def dtype_name(dtype: torch.dtype | torch.layout) -> str:
    return str(dtype).removeprefix("torch.")


def shape_name(shape: Sequence[int]) -> str:
    return str(tuple(shape))


def value_name(value: object) -> str:
    """What a message says it got: None as it is, anything else by its type."""
    return "None" if value is None else type(value).__name__


# ---- structure ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Structure:
    """How a flat list is packed: the container to rebuild, and the name of each element in a message."""

    suffixes: tuple[str, ...]
    keys: tuple[str, ...] | None
    single: bool
    pack: Callable[[Sequence[Tensor]], Any]

    def labels(self, name: str) -> list[str]:
        """``w`` alone, ``w[0], w[1]`` in a sequence, ``w['bias']`` in a mapping."""
        return [name + suffix for suffix in self.suffixes]

    def match(self, caller: str, name: str, value: object, *, returned: bool = False) -> TensorList:
        """The tensors of ``value`` in the order of this structure; raises unless ``value`` holds the same elements.

        List and tuple count as one kind, because ``torch.autograd.grad`` turns every sequence into a tuple.
        ``returned`` says that ``value`` is what a caller's function returned, not an argument.
        """
        alike = self._alike(value)
        if alike is not None:
            return alike
        flat, structure = flatten(caller, name, value)
        if self.single != structure.single:
            wanted = "a Tensor" if self.single else "a sequence or dict of tensors"
            verb = "Return" if returned else "Pass"
            remedy = f" {verb} its only element." if self.single and len(flat) == 1 else ""
            raise TypeError(f"{caller}: {name} must be {wanted}; got {value_name(value)}.{remedy}")
        if (self.keys is None) != (structure.keys is None):
            wanted = "a list or tuple" if self.keys is None else "a dict"
            raise TypeError(f"{caller}: {name} must be {wanted} of tensors; got {value_name(value)}.")
        if self.keys is not None and structure.keys is not None:
            if set(self.keys) != set(structure.keys):
                raise ValueError(f"{caller}: {name} must have the keys {list(self.keys)}; got {list(structure.keys)}.")
            by_key = dict(zip(structure.keys, flat, strict=True))
            return [by_key[key] for key in self.keys]
        if len(flat) != len(self.suffixes):
            raise ValueError(f"{caller}: {name} must have {len(self.suffixes)} tensors; got {len(flat)}.")
        return flat

    def _alike(self, value: object) -> TensorList | None:
        """The tensors of a value of the plainest kind, without making words for a message."""
        if self.single:
            return [value] if isinstance(value, Tensor) else None
        if self.keys is not None:
            found = list(value.values()) if type(value) is dict and tuple(value) == self.keys else None
        else:
            plain = isinstance(value, list | tuple) and len(value) == len(self.suffixes)
            found = list(value) if plain else None  # type: ignore[call-overload]
        return found if found is not None and all(isinstance(t, Tensor) for t in found) else None


def flatten(caller: str, name: str, tensors: object) -> tuple[TensorList, Structure]:
    """The tensors as a list, with the structure that packs them again; TypeError for anything that is not tensors."""
    if isinstance(tensors, Tensor):
        return [tensors], Structure(("",), None, True, lambda flat: flat[0])
    if isinstance(tensors, list | tuple):  # first, since the checks of the rest take longer
        flat = list(tensors)
        structure = Structure(_positions(len(flat)), None, False, _pack_sequence(tensors))
    elif isinstance(tensors, torch.nn.ParameterDict):
        return flatten(caller, name, dict(tensors.items()))
    elif isinstance(tensors, Mapping):
        keys = tuple(tensors)
        structure = Structure(tuple(f"[{key!r}]" for key in keys), keys, False, _pack_mapping(tensors, keys))
        flat = list(tensors.values())
    elif isinstance(tensors, Iterable) and not isinstance(tensors, str | bytes):
        flat = list(tensors)
        structure = Structure(_positions(len(flat)), None, False, _pack_sequence(tensors))
    else:
        remedy = (
            " Pass its parameters: dict(module.named_parameters())." if isinstance(tensors, torch.nn.Module) else ""
        )
        got = value_name(tensors)
        raise TypeError(f"{caller}: {name} must be a Tensor, or a list, tuple or dict of tensors; got {got}.{remedy}")
    for suffix, tensor in zip(structure.suffixes, flat, strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{caller}: {name}{suffix} must be a Tensor; got {value_name(tensor)}.")
    return flat, structure


@functools.lru_cache
def _positions(count: int) -> tuple[str, ...]:
    return tuple(f"[{i}]" for i in range(count))


def _pack_mapping(like: Mapping[str, Tensor], keys: tuple[str, ...]) -> Callable[[Sequence[Tensor]], Any]:
    kind: type[dict[str, Tensor]] = OrderedDict if isinstance(like, OrderedDict) else dict
    return lambda flat: kind(zip(keys, flat, strict=True))


def _pack_sequence(like: object) -> Callable[[Sequence[Tensor]], Any]:
    if not isinstance(like, tuple):
        return list
    if hasattr(like, "_fields"):
        named = cast(Callable[..., Any], type(like))
        return lambda flat: named(*flat)
    return tuple


# ---- checks ---------------------------------------------------------------------------------------------------------


def check_floating(caller: str, labels: Sequence[str], tensors: Sequence[Tensor]) -> None:
    """Every tensor is dense and of a real floating dtype."""
    for label, tensor in zip(labels, tensors, strict=True):
        _check_strided(caller, label, tensor)
        if tensor.dtype not in FLOATING:
            raise TypeError(
                f"{caller}: {label} must be float32, float64, bfloat16 or float16; got {dtype_name(tensor.dtype)}."
            )


def check_like(caller: str, labels: Sequence[str], tensors: Sequence[Tensor], like: Sequence[Tensor]) -> None:
    """Every tensor is dense and has the shape, dtype and device of its partner in ``like``."""
    for label, tensor, other in zip(labels, tensors, like, strict=True):
        _check_strided(caller, label, tensor)
        if tensor.shape != other.shape:
            raise ValueError(
                f"{caller}: {label} must have shape {shape_name(other.shape)}; got {shape_name(tensor.shape)}."
            )
        if tensor.dtype != other.dtype:
            raise TypeError(f"{caller}: {label} must be {dtype_name(other.dtype)}; got {dtype_name(tensor.dtype)}.")
        if tensor.device != other.device:
            raise ValueError(f"{caller}: {label} must be on {other.device}; got {tensor.device}.")


def all_like(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> bool:
    """Whether :func:`check_like` would pass, without the words for the other case."""
    return all(
        t.shape == o.shape and t.dtype == o.dtype and t.device == o.device and t.layout == torch.strided
        for t, o in zip(tensors, like, strict=True)
    )


def _check_strided(caller: str, label: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided:
        got = dtype_name(tensor.layout)
        raise TypeError(f"{caller}: {label} must be a strided (dense) tensor; got {got}. Call .to_dense() on it.")


# ---- memory ---------------------------------------------------------------------------------------------------------


def by_device(tensors: Sequence[Tensor]) -> dict[torch.device, list[int]]:
    """The positions of the tensors on each device, in order."""
    groups: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(tensors):
        groups.setdefault(tensor.device, []).append(i)
    return groups


def unshare(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> TensorList:
    """The tensors without graph, cloned where they live in the memory of one of ``others``."""
    taken = {_address(t) for t in others}
    return [t.detach().clone() if _address(t) in taken and t.numel() else t.detach() for t in tensors]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()  # of another device it is another; 0, where there is nothing to share


def to_host(tensors: Sequence[Tensor]) -> list[list[float]]:
    """The values of small tensors as Python numbers, with one copy (one wait) per device for all of them."""
    if len(tensors) == 1:
        return [tensors[0].detach().reshape(-1).tolist()]
    values: list[list[float]] = [[] for _ in tensors]
    for device, positions in by_device(tensors).items():
        group = [tensors[i].detach().reshape(-1).to(scalar_dtype(device)) for i in positions]
        numbers = torch.cat(group).tolist()
        start = 0
        for i, part in zip(positions, group, strict=True):
            values[i] = numbers[start : start + part.numel()]
            start += part.numel()
    return values


def scalar_dtype(device: torch.device) -> torch.dtype:
    """The widest dtype in which a device can hold a scalar."""
    return torch.float32 if device.type == "mps" else torch.float64


# ---- algebra --------------------------------------------------------------------------------------------------------


def zeros_like(tensors: Sequence[Tensor]) -> TensorList:
    return [torch.zeros_like(t, memory_format=torch.preserve_format) for t in tensors]


def numel(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() for t in tensors)


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """The inner product of two lists of equal shapes, a 0-dim tensor on the device of the first element."""
    return _total([torch.dot(x.reshape(-1), y.reshape(-1)) for x, y in zip(a, b, strict=True)])


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm over the whole list, a 0-dim tensor on the device of the first element; never waits for it."""
    parts: TensorList = []
    for positions in by_device(tensors).values():
        group = [tensors[i].detach() for i in positions]
        norms = torch._foreach_norm(group, dtype=scalar_dtype(group[0].device))
        parts.append(torch.linalg.vector_norm(torch.stack(norms)))
    if len(parts) == 1:
        return parts[0]
    return _total([p.square() for p in parts]).sqrt()


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of each of k lists, [k, *shape] for each tensor; [k] on the device of the first one."""
    parts = [torch.linalg.vector_norm(rows(t.detach()), dim=1, dtype=scalar_dtype(t.device)).square() for t in tensors]
    return _total(parts).sqrt()


def rows(tensor: Tensor) -> Tensor:
    """A tensor [k, *shape] as a matrix with k rows."""
    return tensor.flatten(1) if tensor.dim() > 1 else tensor.unsqueeze(1)


def max_abs(tensors: Sequence[Tensor]) -> TensorList:
    """The largest magnitude on each device, NaN where there is one; no temporary of the size of the list."""
    filled = [t.detach() for t in tensors if t.numel()]
    peaks: TensorList = []
    for device, positions in by_device(filled).items():
        if device.type == "cpu":  # where the norm takes an element at a time
            ends = [torch.aminmax(filled[i]) for i in positions]
            norms = [torch.maximum(-end.min, end.max) for end in ends]
        else:
            norms = list(torch._foreach_norm([filled[i] for i in positions], float("inf")))
        peaks.append(torch.stack([n.to(torch.float32) if n.dtype in FLOATING[2:] else n for n in norms]).amax())
    return peaks


def _total(parts: Sequence[Tensor]) -> Tensor:
    if not parts:
        return torch.zeros((), device="cpu")
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(device=total.device, dtype=total.dtype)
    return total
