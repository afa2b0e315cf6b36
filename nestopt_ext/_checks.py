"""What an op requires of its arguments; the Python mirror of ``csrc/ops/checks.h``, with the same messages.

It serves the reference kernels (which see real tensors) and the fake kernels (which see tensors without memory, so the
rules about storage and aliasing are left out there). Nothing is modified before every rule holds.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.autograd import forward_ad

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
REAL = (torch.float32, torch.float64)


def _name(dtype: torch.dtype | torch.layout) -> str:
    return str(dtype).removeprefix("torch.")


def _tuple(shape: Sequence[int]) -> str:
    sizes = ", ".join(str(s) for s in shape)
    return f"({sizes},)" if len(shape) == 1 else f"({sizes})"


def _shape(t: Tensor) -> str:
    return _tuple(t.shape)


def _either(dtypes: Sequence[torch.dtype]) -> str:
    names = [_name(d) for d in dtypes]
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " or " + names[-1]


def _has_memory(t: Tensor) -> bool:
    return not is_fake(t) and t.device.type != "meta" and not torch._is_functional_tensor(t)


def finite(op: str, **scalars: float) -> None:
    for name, value in scalars.items():
        if not math.isfinite(value):
            raise ValueError(f"{op}: {name} must be finite; got {value}.")


def require(op: str, name: str, value: float, holds: bool, rule: str, remedy: str = "") -> None:
    if not holds:
        raise ValueError(f"{op}: {name} must {rule}; got {value:g}.{remedy and ' '}{remedy}")


class _Span(NamedTuple):
    """The bytes of one tensor."""

    begin: int
    end: int
    only_read: bool
    place: int  # among the arguments
    label: str
    tensor: Tensor


def _extent(t: Tensor) -> int:
    """Bytes from the first element to the end of the last; ``t`` is not empty."""
    return (1 + sum((s - 1) * st for s, st in zip(t.shape, t.stride(), strict=True))) * t.element_size()


def holds_its_elements(t: Tensor) -> bool:
    """False if the storage was resized or freed behind the tensor, so that touching it would touch foreign memory."""
    return t.numel() == 0 or t.storage_offset() * t.element_size() + _extent(t) <= t.untyped_storage().nbytes()


def _labelled(name: str, tensors: Tensor | Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    """The tensors of an argument with their names in messages; of a list, or of one tensor."""
    if isinstance(tensors, list | tuple):
        return [(f"{name}[{i}]", t) for i, t in enumerate(tensors)]
    return [(name, tensors)]  # type: ignore[list-item]


class ListCheck:
    """Checks one call of one op: lists of tensors, or single ones, against a leading one, then memory across all."""

    def __init__(self, op: str) -> None:
        self.op = op
        self._items: list[tuple[str, Tensor, bool]] = []  # label, tensor, whether it is written
        self._finite: list[tuple[str, Tensor]] = []

    def leading(self, name: str, tensors: Tensor | Sequence[Tensor], dtypes: Sequence[torch.dtype] = FLOATING) -> None:
        """The list, or the one tensor, that fixes count, shapes and device; it is written to."""
        labelled = _labelled(name, tensors)
        for label, t in labelled:
            self._strided(label, t)
            device = labelled[0][1].device
            if t.dtype not in dtypes:
                raise TypeError(f"{self.op}: {label} must be {_either(dtypes)}; got {_name(t.dtype)}.")
            if t.device != device:
                raise ValueError(
                    f"{self.op}: {label} must be on {device}, the device of {name}[0]; got {t.device}."
                    " Call once per device."
                )
            self._may_write(label, t)

    def following(
        self,
        name: str,
        tensors: Tensor | Sequence[Tensor],
        like: tuple[str, Tensor | Sequence[Tensor]],
        dtypes: Mapping[torch.dtype, tuple[torch.dtype, ...]],
        *,
        written: bool,
    ) -> None:
        """What follows the leading list or tensor; ``dtypes`` maps the leading dtype to those allowed here."""
        labelled, leaders = _labelled(name, tensors), _labelled(*like)
        if len(labelled) != len(leaders):
            raise ValueError(
                f"{self.op}: {name} must have the length of {like[0]}, {len(leaders)}; got {len(labelled)}."
            )
        for (label, t), (other, lead) in zip(labelled, leaders, strict=True):
            self._strided(label, t)
            if t.device != lead.device:
                raise ValueError(f"{self.op}: {label} must be on {lead.device}, the device of {other}; got {t.device}.")
            if t.dtype not in dtypes[lead.dtype]:
                wanted = _either(dtypes[lead.dtype])
                raise TypeError(
                    f"{self.op}: {label} must be {wanted} beside {other} of {_name(lead.dtype)}; got {_name(t.dtype)}."
                )
            if t.shape != lead.shape:
                raise ValueError(f"{self.op}: {label} must have the shape of {other} {_shape(lead)}; got {_shape(t)}.")
            if written:
                self._may_write(label, t)
            else:
                self._items.append((label, t, False))

    def following_or_empty(
        self,
        name: str,
        tensors: Sequence[Tensor],
        like: tuple[str, Sequence[Tensor]],
        dtypes: Mapping[torch.dtype, tuple[torch.dtype, ...]],
        *,
        needed: bool,
        needed_while: str,
    ) -> None:
        """A written list that follows the leading one, and may be empty unless it is ``needed``."""
        leader, leaders = like
        if leaders and not tensors and needed:
            raise ValueError(
                f"{self.op}: {name} must have the length of {leader}, {len(leaders)}, while {needed_while}; got 0."
            )
        if tensors:
            self.following(name, tensors, like, dtypes, written=True)

    def rank(self, name: str, t: Tensor, dims: int, meaning: str) -> None:
        """``t`` has this number of dimensions, which mean something."""
        self._strided(name, t)
        if t.dim() != dims:
            noun = "dimension" if dims == 1 else "dimensions"
            raise ValueError(f"{self.op}: {name} must have {dims} {noun}, {meaning}; got shape {_shape(t)}.")

    def vector(self, name: str, t: Tensor, like: tuple[str, Tensor], meaning: str) -> None:
        """A written tensor of one dimension, not empty, beside the leading tensor and of its dtype."""
        leader, lead = like
        self._strided(name, t)
        if t.device != lead.device:
            raise ValueError(f"{self.op}: {name} must be on {lead.device}, the device of {leader}; got {t.device}.")
        if t.dtype != lead.dtype:
            wanted = _name(lead.dtype)
            raise TypeError(f"{self.op}: {name} must be {wanted} beside {leader} of {wanted}; got {_name(t.dtype)}.")
        if t.dim() != 1 or t.shape[0] == 0:
            raise ValueError(
                f"{self.op}: {name} must have one dimension and an element at least, {meaning}; got shape {_shape(t)}."
            )
        self._may_write(name, t)

    def shape(self, name: str, t: Tensor, holds: bool, rule: str) -> None:
        """The shape of ``t`` obeys a rule of the op's own."""
        if not holds:
            raise ValueError(f"{self.op}: {name} must {rule}; got shape {_shape(t)}.")

    def operand(
        self,
        name: str,
        t: Tensor,
        like: tuple[str, Tensor],
        dtypes: Mapping[torch.dtype, tuple[torch.dtype, ...]],
        *,
        written: bool = False,
    ) -> None:
        """A tensor of a shape of its own beside another one, whose dtype tells those allowed here."""
        other, lead = like
        self._strided(name, t)
        if t.device != lead.device:
            raise ValueError(f"{self.op}: {name} must be on {lead.device}, the device of {other}; got {t.device}.")
        if t.dtype not in dtypes[lead.dtype]:
            raise TypeError(
                f"{self.op}: {name} must be {_either(dtypes[lead.dtype])} beside {other} of {_name(lead.dtype)};"
                f" got {_name(t.dtype)}."
            )
        if written:
            self._may_write(name, t)
        else:
            self._items.append((name, t, False))

    def row_numbers(self, name: str, t: Tensor, like: tuple[str, Tensor]) -> None:
        """A number, float32 or float64, for each row of the leading tensor; only read."""
        self.shaped(name, t, like, like[1].shape[:1], f"a number for each row of {like[0]}")

    def shaped(self, name: str, t: Tensor, like: tuple[str, Tensor], shape: Sequence[int], meaning: str) -> None:
        """Numbers, float32 or float64, beside the leading tensor and of another shape, which means something; only
        read.
        """
        leader, lead = like
        self._strided(name, t)
        if t.dtype not in REAL:
            raise TypeError(f"{self.op}: {name} must be {_either(REAL)}; got {_name(t.dtype)}.")
        if t.device != lead.device:
            raise ValueError(f"{self.op}: {name} must be on {lead.device}, the device of {leader}; got {t.device}.")
        if t.shape != torch.Size(shape):
            raise ValueError(f"{self.op}: {name} must have {meaning}, shape {_tuple(shape)}; got {_shape(t)}.")
        self._items.append((name, t, False))

    def scalars(self, name: str, tensors: Sequence[Tensor], like: tuple[str, Sequence[Tensor]]) -> None:
        """A written list of one number, float32 or float64, beside each tensor of the leading list."""
        leader, leaders = like
        if len(tensors) != len(leaders):
            raise ValueError(f"{self.op}: {name} must have the length of {leader}, {len(leaders)}; got {len(tensors)}.")
        for i, (t, lead) in enumerate(zip(tensors, leaders, strict=True)):
            label = f"{name}[{i}]"
            self._number(label, t)
            if t.device != lead.device:
                raise ValueError(
                    f"{self.op}: {label} must be on {lead.device}, the device of {leader}[{i}]; got {t.device}."
                )
            self._may_write(label, t)

    def scalar(
        self,
        name: str,
        t: Tensor,
        leaders: Sequence[Tensor],
        *,
        written: bool = False,
        on_cpu: bool = True,
        finite: bool = True,
    ) -> None:
        """A tensor of one element, float32 or float64, on the CPU (``on_cpu``) or beside the leading list. On the CPU
        one that is only read must be ``finite``.
        """
        self._number(name, t)
        device = leaders[0].device if leaders else t.device
        if t.device != device and not (on_cpu and t.device.type == "cpu"):
            where = f"cpu or {device}" if on_cpu and device.type != "cpu" else str(device)
            raise ValueError(f"{self.op}: {name} must be on {where}; got {t.device}.")
        if written:
            self._may_write(name, t)
        else:
            self._items.append((name, t, False))
            if on_cpu and finite:
                self._finite.append((name, t))

    def memory(self) -> None:
        """Storage is large enough, and nothing that is written shares memory with anything else; scalars are finite."""
        if all(_has_memory(t) for _, t, _ in self._items):
            self._storage()
        for name, t in self._finite:
            if t.device.type == "cpu" and _has_memory(t) and not math.isfinite(t.item()):
                raise ValueError(f"{self.op}: {name} must be finite; got {t.item()}.")

    def _storage(self) -> None:
        spans: list[_Span] = []
        for label, t, written in self._items:
            if t.numel() == 0:
                continue
            if not holds_its_elements(t):
                raise ValueError(
                    f"{self.op}: {label} must have storage for its elements; got a storage of"
                    f" {t.untyped_storage().nbytes()} bytes. It was resized or freed behind the tensor."
                )
            extent = _extent(t)
            if t.data_ptr() % t.element_size():
                raise ValueError(
                    f"{self.op}: {label} must be aligned to its element size, {t.element_size()} bytes;"
                    f" got an address that is {t.data_ptr() % t.element_size()} past it. Pass a clone."
                )
            spans.append(_Span(t.data_ptr(), t.data_ptr() + extent, not written, len(spans), label, t))
        spans.sort(key=lambda span: span.begin)
        cluster: list[_Span] = []
        end = 0
        for span in spans:
            if span.begin >= end and cluster:
                self._no_sharing(cluster)
                cluster = []
            cluster.append(span)
            end = max(end, span.end)
        self._no_sharing(cluster)

    def _no_sharing(self, cluster: list["_Span"]) -> None:
        """Exact test on tensors whose address ranges overlap: marks every byte that is written, then looks for it."""
        start = cluster[0].begin if cluster else 0
        cluster.sort(key=lambda span: (span.only_read, span.place))
        if len(cluster) < 2 or cluster[0].only_read:
            return
        owner = torch.zeros(max(span.end for span in cluster) - start, dtype=torch.int32, device="cpu")
        for number, span in enumerate(cluster, 1):
            size = span.tensor.element_size()
            strides = [st * size for st in span.tensor.stride()] + [1]
            view = owner.as_strided([*span.tensor.shape, size], strides, span.begin - start)
            if taken := int(view.max()):
                raise ValueError(
                    f"{self.op}: {cluster[taken - 1].label} must not share memory with {span.label};"
                    " got overlapping tensors. Pass a clone."
                )
            if not span.only_read:
                view.fill_(number)

    def _number(self, label: str, t: Tensor) -> None:
        self._strided(label, t)
        if t.dtype not in REAL:
            raise TypeError(f"{self.op}: {label} must be {_either(REAL)}; got {_name(t.dtype)}.")
        if t.numel() != 1:
            raise ValueError(f"{self.op}: {label} must have one element; got shape {_shape(t)}.")

    def _strided(self, label: str, t: Tensor | None) -> None:
        if t is None:  # the dispatcher takes None for a tensor
            raise TypeError(f"{self.op}: {label} must be a tensor; got None.")
        if t.layout != torch.strided:
            raise TypeError(
                f"{self.op}: {label} must be a strided (dense) tensor; got {_name(t.layout)}. Call .to_dense() on it."
            )

    def _may_write(self, label: str, t: Tensor) -> None:
        if torch.is_grad_enabled() and t.requires_grad:
            raise ValueError(
                f"{self.op}: {label} must not require grad while grad mode is on; got one that does."
                " Call under torch.no_grad()."
            )
        if _has_memory(t) and _overlaps_itself(t):
            raise ValueError(
                f"{self.op}: {label} must not overlap itself; got shape {_shape(t)} with strides {tuple(t.stride())}."
                " Pass a clone."
            )
        if t.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(
                f"{self.op}: {label} must not be an inference tensor outside inference mode; got one. Pass a clone."
            )
        self._items.append((label, t, True))


def _overlaps_itself(t: Tensor) -> bool:
    """True unless each stride steps over all the memory that the smaller strides reach."""
    reach = 0
    for stride, size in sorted((st, s) for s, st in zip(t.shape, t.stride(), strict=True) if s > 1):
        if stride <= reach:
            return t.numel() > 0
        reach += stride * (size - 1)
    return False


def no_derivative(op: str, arguments: Mapping[str, object]) -> None:
    """Refuses tensors, alone or in lists, of which autograd would want the derivative of an op that has none."""
    for name, value in arguments.items():
        tensors = [value] if isinstance(value, Tensor) else value if isinstance(value, list | tuple) else []
        for i, t in enumerate(tensors):
            label = name if isinstance(value, Tensor) else f"{name}[{i}]"
            if t.requires_grad:
                raise ValueError(
                    f"{op}: {label} must not require grad while grad mode is on; got one that does."
                    " Call under torch.no_grad()."
                )
            if _has_tangent(t):
                raise ValueError(f"{op}: {label} must not carry a forward-mode tangent; got one that does. Detach it.")


def _has_tangent(t: Tensor) -> bool:
    if forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(t, level=0).tangent is not None  # type: ignore[no-untyped-call]
