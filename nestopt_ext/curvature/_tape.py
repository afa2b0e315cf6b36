"""A function of params, recorded while it runs once, whose derivatives are then plain tensor operations.

Each torch function that sees a param, or something computed from one, leaves a node with a rule of its own: what comes
out for tangents of its operands, and what goes back to each operand for a cotangent. So products with the Jacobian J
and with J' need neither autograd nor another forward pass, and a product with J' can be added to tensors that exist.

A recording is of the values as they were. Whatever cannot be recorded raises :class:`Unrecordable`, and the caller
goes by autograd.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from .._types import TensorList


class Unrecordable(Exception):
    """Why a function cannot be recorded."""


@dataclass(eq=False, slots=True)  # not frozen: a model makes many, and that takes three times as long
class Var:
    """A tensor of a recording: its value, without graph, and its place.

    ``active`` says whether it depends on the params; otherwise it is data, or was computed from data alone.
    """

    value: Tensor
    slot: int
    active: bool


#: What a rule is handed for a tensor argument: a constant, or a variable.
Operand = Tensor | Var


def value_of(x: Any) -> Any:
    """The tensor behind an operand; anything else as it is."""
    return x.value if isinstance(x, Var) else x


class Node:
    """One recorded function with one tensor as its result.

    Operands are numbered as they were given to ``__init__``; one that is neither variable nor tensor counts, too.
    """

    #: Whether a result may share memory with the cotangent or tangent it was made from.
    shares_memory: bool = False
    #: Whether what goes back is new memory, although a tangent may share it.
    makes_cotangent: ClassVar[bool] = False
    #: Multiplications of one application, as far as they matter; what a cost estimate counts.
    macs: int = 0
    #: Operands i and j, where an example's gradient of j is the sum over positions of the left factors of that of i.
    weight_and_bias: ClassVar[tuple[int, int] | None] = None
    #: Whether the gradients of examples take much memory of their own, so that they are better made than kept.
    gradients_are_large: ClassVar[bool] = False
    #: Rows of a table, which is a param, that the whole batch picks.
    num_picked: int = 0

    def __init__(self, *operands: Any) -> None:
        self.slots = tuple(x.slot if isinstance(x, Var) else -1 for x in operands)
        self.wanted = tuple(i for i, x in enumerate(operands) if isinstance(x, Var) and x.active)
        self.output = -1

    def jvp(self, tangents: Sequence[Tensor | None]) -> Tensor:
        """The tangent of the result, from those of the operands; at least one is not None, and None stands for zero."""
        raise NotImplementedError

    def vjp(self, i: int, cotangent: Tensor, into: Tensor | None) -> Tensor:
        """What goes back to operand ``i``; added to ``into`` in place and returned where that is given."""
        raise NotImplementedError

    def vjps(self, cotangent: Tensor, operands: Sequence[int]) -> list[Tensor]:
        """New tensors for some wanted operands, in their order; for a node that has several from one call."""
        return [self.vjp(i, cotangent, None) for i in operands]

    def through_params(self, own: Sequence[int], num_uses: int) -> ThroughParams:
        """What maps a cotangent to the tangent that it leaves, where operands ``own``, params, move along what goes
        back to them; to be called about ``num_uses`` times, with the tangents of the other operands.
        """

        def pushed(tangents: list[Tensor | None], cotangent: Tensor) -> Tensor:
            for i, gradient in zip(own, self.vjps(cotangent, own), strict=True):
                tangents[i] = gradient
            return self.jvp(tangents)

        return pushed

    def macs_through_params(self, num_uses: int) -> tuple[int, bool]:
        """Multiplications of so many calls of :meth:`through_params`, those that they share included, and whether each
        call forms gradients.
        """
        return 2 * num_uses * self.macs, True

    def batch_dim(self, dims: Sequence[int | None], batch: int) -> int | None:
        """Which dimension of the result runs over the ``batch`` examples, from those of the operands; None for none.

        That dimension may be a multiple of the number of examples, with what belongs to one next to each other. Raises
        :class:`MixesExamples` where a result would depend on several examples.
        """
        raise MixesExamples(f"{type(self).__name__.lower()} is not known to treat examples apart")

    def example_gradients(
        self, i: int, cotangent: Tensor, dims: Sequence[int | None], batch: int
    ) -> OuterProducts | Picked | Rows:
        """What goes back to operand ``i``, a param, from each of the ``batch`` examples.

        ``dims`` are as in :meth:`batch_dim`.
        """
        raise MixesExamples(f"{type(self).__name__.lower()} has no gradients for each example")


#: The tangent of a node's result from a list of those of its operands, which may be written to, and a cotangent of it.
ThroughParams = Callable[[list[Tensor | None], Tensor], Tensor]


class MixesExamples(Exception):
    """Why a model cannot be taken apart into examples."""


@dataclass(frozen=True)
class Rows:
    """The gradients of a param, one for each example: [B, *shape]."""

    rows: Tensor


@dataclass(frozen=True)
class OuterProducts:
    """Gradients of a param that are sums over T positions of outer products, for each of G groups of its rows.

    ``left`` is [B, T, G, O], from the cotangent; ``right`` is [B, T, G, I], from the operand; the param has G O I
    elements in that order.
    """

    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class Picked:
    """Gradients of a table [V, D] that are zero but in the rows that T positions pick.

    ``left`` is [B, T, D], from the cotangent; ``index`` is [B, T], whole numbers below V = ``size``. A row that several
    positions pick gets the sum.
    """

    left: Tensor
    index: Tensor
    size: int

    @property
    def rows(self) -> Tensor:
        """Written out, [B, V, D]."""
        batch, _, width = self.left.shape
        place = self.index + self.size * torch.arange(batch, device=self.index.device).unsqueeze(1)
        found = self.left.new_zeros(batch * self.size, width)
        return found.index_add(0, place.flatten(), self.left.flatten(0, 1)).view(batch, self.size, width)


def by_example(t: Tensor, dim: int, batch: int) -> Tensor:
    """The tensor as [B, r, ...], whose dimension ``dim`` runs over B examples with r entries each."""
    t = t.movedim(dim, 0) if dim else t
    return t.reshape(batch, t.shape[0] // batch, *t.shape[1:])


def accumulated(result: Tensor, into: Tensor | None) -> Tensor:
    """The result, or ``into`` with the result added."""
    if into is not None:
        into.add_(result)
        return into
    return result


Rule = Callable[..., Any]
_R = TypeVar("_R", bound=Rule)

#: Torch functions, and what records each: a function of the same signature that is given operands, and returns a node
#: and the value, several such pairs, an operand where the function gives back that very tensor, or NotImplemented where
#: it does not know the arguments.
RULES: dict[Any, Rule] = {}
#: Torch functions that are run, with the recording on, in the form that these functions write out; one that gives
#: NotImplemented does not know the arguments.
REWRITES: dict[Any, Callable[..., Any]] = {}
#: Functions that write to their first argument, and those that give the same in new memory.
OUT_OF_PLACE: dict[Any, Any] = {}


#: Where a rule is told to give its result in the memory of the first argument: the position of that option.
_INPLACE_POSITION: dict[Rule, int] = {}
#: The arguments of which a rule keeps no more than copies.
_COPIED: dict[Rule, Sequence[str]] = {}


def rule(*functions: Any, inplace_position: int | None = None, copied: Sequence[str] = ()) -> Callable[[_R], _R]:
    """Registers what records ``functions``, which may have an option ``inplace``. Arguments named in ``copied`` may be
    written to later.
    """

    def register(made: _R) -> _R:
        RULES.update(dict.fromkeys(functions, made))
        if inplace_position is not None:
            _INPLACE_POSITION[made] = inplace_position
        _COPIED[made] = copied
        return made

    return register


class Tape:
    """The recording of a function of ``params``: one output tensor, and the nodes between."""

    def __init__(
        self,
        num_params: int,
        num_slots: int,
        nodes: list[Node],
        data: list[Var],
        constants: list[tuple[Tensor, int]],
        output: Var,
        opaque: list[tuple[str, Node]],
    ) -> None:
        self.outputs = output.value
        self.nodes = _needed(nodes, output.slot)
        needed = {id(node) for node in self.nodes}
        self.opaque = tuple(dict.fromkeys(name for name, node in opaque if id(node) in needed))
        self.all_nodes = nodes
        self.data = data
        #: What else the nodes were given, and the version it has to keep.
        self.constants = constants
        self.num_params = num_params
        self._output = output.slot
        self.num_slots = num_slots
        last = {slot: k for k, node in enumerate(self.nodes) for slot in node.slots if slot >= num_params}
        dead: list[list[int]] = [[] for _ in self.nodes]
        for slot, k in last.items():
            dead[k].append(slot)
        # What each pass needs of a node, looked up once: small models spend their time on such things.
        self._forward = [(node.jvp, node.output, node.slots, ends) for node, ends in zip(self.nodes, dead, strict=True)]
        #: The slots that no node reads after this one.
        self.dead = dead
        self._backward = [pulled(node, node.wanted) for node in reversed(self.nodes)]

    @property
    def output_slot(self) -> int:
        return self._output

    def jvp(self, v: Sequence[Tensor]) -> Tensor:
        """J v, in memory of its own."""
        found: list[Tensor | None] = [None] * self.num_slots
        found[: self.num_params] = v
        found.append(None)  # what slot -1, of a constant, stands for
        for jvp, output, slots, dead in self._forward:
            found[output] = jvp([found[s] for s in slots])
            for slot in dead:
                found[slot] = None
        result = found[self._output]
        assert result is not None
        return result.clone() if not self.nodes or self.nodes[-1].shares_memory else result

    def vjp(self, u: Tensor, into: Sequence[Tensor] | None = None, *, in_place: bool = True) -> list[Tensor | None]:
        """J' u, a tensor for each param, None for zeros; added to ``into`` in place where that is given.

        ``in_place=False`` writes to no tensor at all, for transforms that do not allow it.
        """
        found: list[Tensor | None] = [None] * self.num_slots
        own = [False] * self.num_slots  # whether the memory is ours to write to
        if into is not None:
            found[: self.num_params] = into
            own[: self.num_params] = [True] * self.num_params
        if not self.nodes:  # the output is one of the params
            present = found[self._output]
            found[self._output] = u.clone() if present is None else present.add_(u)
            return found[: self.num_params]
        found[self._output] = u
        pull_back(self._backward, found, own, in_place)
        for slot in range(self.num_params):
            tensor = found[slot]
            if tensor is not None and not own[slot]:
                found[slot] = tensor.clone()
        return found[: self.num_params]


#: A node in a backward pass: its output, the operands that something goes back to, their slots, whether all from one
#: call, and whether the cotangent is kept.
Pulled = tuple[Node, int, Sequence[int], Sequence[int], bool, bool]


def pulled(node: Node, operands: Sequence[int], *, kept: bool = False) -> Pulled:
    jointly = type(node).vjps is not Node.vjps and bool(operands)
    return node, node.output, operands, [node.slots[i] for i in operands], jointly, kept


def pull_back(nodes: Sequence[Pulled], found: list[Tensor | None], own: list[bool], in_place: bool) -> None:
    """Carries the cotangents in ``found``, by slot, back through nodes; ``own`` says whose memory is ours to write to.

    Those of outputs are dropped once used unless they are to be kept.
    """
    for node, output, operands, slots, jointly, kept in nodes:
        cotangent = found[output]
        if cotangent is None:
            continue
        if not kept:
            found[output] = None
        results = node.vjps(cotangent, operands) if jointly else None
        for k, slot in enumerate(slots):
            present = found[slot]
            reused = present if own[slot] and in_place else None
            result = node.vjp(operands[k], cotangent, reused) if results is None else accumulated(results[k], reused)
            if present is None:
                own[slot] = node.makes_cotangent or not node.shares_memory
            elif reused is None:
                result, own[slot] = present + result, True
            found[slot] = result


def _needed(nodes: list[Node], output: int) -> list[Node]:
    """The nodes that depend on params and that the output depends on."""
    wanted = {output}
    kept = []
    for node in reversed(nodes):
        if node.output in wanted and node.wanted:
            wanted.update(node.slots[i] for i in node.wanted)
            kept.append(node)
    return kept[::-1]


class Recorder(TorchFunctionMode):
    """While active, records what is computed from ``params`` and from ``data``, tensors of a batch.

    The tensors that the code under it sees stand for the recorded ones: they have the values and require grad, but no
    graph.
    """

    def __init__(self, params: TensorList, data: Sequence[Tensor], opaque: OpaqueMaker) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._opaque_maker = opaque
        self._vars: dict[int, tuple[weakref.ref[Tensor], Var]] = {}
        self._num_slots = 0
        self._num_params = len(params)
        self.nodes: list[Node] = []
        self.opaque: list[tuple[str, Node]] = []
        self.data: list[Var] = []
        #: Constants that share memory with what is recorded.
        self._aliases: list[weakref.ref[Tensor]] = []
        #: Values that were handed out, and what version they had.
        self._values: list[tuple[Tensor, int]] = []
        #: The same for constants that rules were given.
        self._versions: Any = WeakIdKeyDictionary()  # type: ignore[no-untyped-call]
        #: Those of which rules keep no more than what follows from them.
        self._copied: set[int] = set()
        for p in params:
            self._bind(p, self._new(p.data, active=True))
        for t in data:
            if id(t) not in self._vars:
                self._bind(t, self._new(t.data, active=False))
                self.data.append(self._vars[id(t)][1])

    def tape(self, output: Tensor) -> Tape | None:
        """The recording that ends in ``output``; None where that does not depend on the params."""
        var = self._find(output)
        if var is None:
            if output.grad_fn is not None:
                raise Unrecordable("its output was computed past the recording")
            return None
        if not var.active:
            return None
        given = list(self._versions.items())
        if any(t._version != version for t, version in (*given, *self._values)):
            raise Unrecordable("a tensor was changed in place after it was used")
        constants = [(t, version) for t, version in given if id(t) not in self._copied]
        return Tape(self._num_params, self._num_slots, self.nodes, self.data, constants, var, self.opaque)

    # ---- what runs under the mode -----------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.multi_head_attention_forward:
            _check_slow(args, kwargs)
        if not torch.is_grad_enabled():
            self._check_unwritten(func, args, kwargs)
            return self._noted(func(*args, **kwargs))
        tensors = tensors_in((args, kwargs))
        found = [self._find(t) for t in tensors]
        if not any(found):
            return self._constant(func, args, kwargs, tensors)
        for tensor, var in zip(tensors, found, strict=True):
            _check_plain(func, tensor, var)
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._attribute(func, args, kwargs)
        if func in _ASKS:
            return self._noted(func(*args, **kwargs))
        active = any(var is not None and var.active for var in found)
        if func in REWRITES and active:
            with self:
                result = REWRITES[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
        target = args[0] if args else None
        in_place = func in OUT_OF_PLACE
        if (in_place or _writes(name, kwargs)) and not active and isinstance(target, Tensor) and not found[0]:
            return self._written(func, args, kwargs)
        if in_place:
            func = OUT_OF_PLACE[func]
        made = self._recorded(func, args, kwargs, [t for t, var in zip(tensors, found, strict=True) if var is None])
        if made is NotImplemented:
            if in_place or _writes(name, kwargs):
                raise Unrecordable(f"{name} writes in place")
            return self._unknown(func, args, kwargs, active)
        if isinstance(made, Var):
            return next(t for t, var in zip(tensors, found, strict=True) if var is made)
        if in_place or _asks_in_place(func, args, kwargs):
            return self._rebound(name, target, made)
        if isinstance(made, list):
            return tuple(self._hand_out(node, value) for node, value in made)
        return self._hand_out(*made)

    def _recorded(self, func: Any, args: Any, kwargs: Any, constants: TensorList) -> Any:
        """What the rule of ``func`` makes of the operands, among them ``constants``."""
        record = RULES.get(func)
        if record is None:
            return NotImplemented
        if autocast_is_on():  # rules compute in the dtypes of their operands
            raise Unrecordable("autocast is on")
        for t in constants:
            if self._versions.get(t, t._version) != t._version:
                raise Unrecordable(f"a tensor was changed in place before {_name(func)} used it again")
        operands = [mapped(x, self._operand) for x in args]
        named = {name: mapped(x, self._operand) for name, x in kwargs.items()}
        with torch.no_grad():
            try:
                return record(*operands, **named)
            except TypeError:
                try:
                    inspect.signature(record).bind(*operands, **named)
                except TypeError:  # an argument that the rule does not know
                    return NotImplemented
                raise
            finally:
                # What the function itself has written, running statistics, is its own business.
                for t in constants:
                    self._versions[t] = t._version
                names = _COPIED[record]
                given = inspect.signature(record).bind_partial(*args, **kwargs).arguments if names else {}
                self._copied.update(id(given[name]) for name in names if name in given)

    def _check_unwritten(self, func: Any, args: Any, kwargs: Any) -> None:
        """With grad mode off everything is a constant, but the recorded memory must stay as it is."""
        name = _name(func)
        if func in OUT_OF_PLACE or _writes(name, kwargs):
            targets = tensors_in((args[:1], kwargs))
            if any(self._find(t) is not None for t in targets):
                raise Unrecordable(f"{name} writes in place to a part of the recording")

    def _constant(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """A function that sees neither params nor data."""
        if any(t.grad_fn is not None for t in tensors):
            raise Unrecordable(f"{_name(func)} was given a tensor that was computed past the recording")
        if any(t.requires_grad for t in tensors):
            with torch.no_grad():
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _attribute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A property of a tensor."""
        result = func(*args, **kwargs)
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        var = self._find(args[0])
        if attribute in ("grad_fn", "is_leaf") and var is not None and var.active and var.slot >= self._num_params:
            raise Unrecordable(f"Tensor.{attribute} asks for a graph")
        if isinstance(result, Tensor) and attribute not in ("data", "grad"):
            transposed = _TRANSPOSES.get(attribute)
            if transposed is None:
                raise Unrecordable(f"Tensor.{attribute} has no rule")
            with self:
                return transposed(args[0])
        return self._noted(result)

    def _noted(self, result: Any) -> Any:
        """A constant, which may be a view of what is recorded."""
        self._aliases.extend(weakref.ref(t) for t in tensors_in((result,)) if t.layout == torch.strided)
        return result

    def _written(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A function that writes data to a constant: that stays one, of another value."""
        if kwargs.get("out") is not None:
            raise Unrecordable(f"{_name(func)} writes in place")
        self._check_alone(_name(func), args[0])
        with torch.no_grad():
            return func(*args, **kwargs)

    def _unknown(self, func: Any, args: Any, kwargs: Any, active: bool) -> Any:
        """A function without a rule: by autograd, for this part alone, if it sees params."""
        if func is Tensor.register_hook:
            raise Unrecordable("a tensor has a hook that sees its gradient")
        if not active:
            with torch.no_grad():
                result = func(*args, **kwargs)
            for t in tensors_in((result,)):
                if id(t) not in self._vars:
                    self._bind(t, self._var(Foreign(t.shape), t))
            return result
        variables: dict[int, Var] = {}
        for t in tensors_in((args, kwargs)):
            var = self._find(t)
            if var is not None and var.active:
                variables[var.slot] = var
        leaves = {slot: var.value.detach().requires_grad_() for slot, var in variables.items()}

        def leaf(t: Tensor) -> Tensor:
            var = self._find(t)
            return t if var is None else leaves.get(var.slot, var.value)

        with torch.enable_grad():
            result = func(*mapped(args, leaf), **mapped(kwargs, leaf))
        if any(result is leaf or result is t for t in leaves.values()):
            raise Unrecordable(f"{_name(func)} returns its argument")
        differentiable = [t for t in tensors_in((result,)) if t.requires_grad]
        if not differentiable:
            return result

        def replaced(t: Tensor) -> Tensor:
            if not t.requires_grad:
                return t
            node = self._opaque_maker(t, list(leaves.values()), list(variables.values()))
            self.opaque.append((_name(func), node))
            return self._hand_out(node, t.detach())

        return mapped(result, replaced)

    # ---- variables --------------------------------------------------------------------------------------------------

    def _find(self, tensor: Tensor) -> Var | None:
        entry = self._vars.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def _bind(self, tensor: Tensor, var: Var) -> None:
        self._vars[id(tensor)] = (weakref.ref(tensor), var)

    def _new(self, value: Tensor, active: bool) -> Var:
        self._num_slots += 1
        return Var(value, self._num_slots - 1, active)

    def _var(self, node: Node, value: Tensor) -> Var:
        """A new variable that ``node`` computes."""
        var = self._new(value, bool(node.wanted))
        node.output = var.slot
        self.nodes.append(node)
        return var

    def _operand(self, tensor: Tensor) -> Operand:
        return self._find(tensor) or tensor.data

    def _hand_out(self, node: Node, value: Tensor) -> Tensor:
        """A tensor for the code that is recorded; one version counts for it, its views, and the value."""
        tensor = value.detach()
        self._values.append((value, value._version))
        if node.wanted:
            tensor.requires_grad_()
        self._bind(tensor, self._var(node, value))
        return tensor

    def _rebound(self, name: str, target: Any, made: Any) -> Tensor:
        """``target`` with the new value, as an in-place function leaves it."""
        var = self._find(target) if isinstance(target, Tensor) else None
        if var is None or not var.active or var.slot < self._num_params:
            raise Unrecordable(f"{name} writes in place to a tensor that is not part of the recording")
        node, value = made
        if value.shape != target.shape or value.dtype != target.dtype:
            raise Unrecordable(f"{name} writes in place what has another shape or dtype")
        self._check_alone(name, target)
        # Other memory under the same tensor: what rules have kept of the old value stays.
        target.data = value.data
        self._bind(target, self._var(node, value))
        rebound: Tensor = target
        return rebound

    def _check_alone(self, name: str, target: Tensor) -> None:
        """Nothing else that is recorded may have the memory of ``target``."""
        storage = target.untyped_storage().data_ptr()
        for reference in (*(reference for reference, _ in self._vars.values()), *self._aliases):
            other = reference()
            if other is not None and other is not target and other.untyped_storage().data_ptr() == storage:
                raise Unrecordable(f"{name} writes in place to memory that another tensor shares")


#: Makes the node of a function without a rule, from its result with a graph, the leaves of that, and the operands.
OpaqueMaker = Callable[[Tensor, TensorList, list[Var]], Node]


class Foreign(Node):
    """Something computed from data in a way that is not known.

    It does not depend on params, so only its place counts: whatever uses it keeps to entry n for example n, or refuses.
    """

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self._shape = shape

    def batch_dim(self, dims: Sequence[int | None], batch: int) -> int | None:
        """The first, if it has a place for each example."""
        return 0 if self._shape and batch and self._shape[0] and self._shape[0] % batch == 0 else None


_ASKS = {
    Tensor.dim,
    Tensor.size,
    Tensor.numel,
    Tensor.stride,
    Tensor.is_floating_point,
    Tensor.is_complex,
    Tensor.is_contiguous,
    Tensor.requires_grad_,
    Tensor.data_ptr,
    Tensor.detach,
    Tensor.__len__,
    Tensor.__repr__,
    Tensor.__format__,
    Tensor.item,
    Tensor.tolist,
    Tensor.numpy,
    torch.numel,
    torch.is_floating_point,
    torch.is_complex,
    torch.is_tensor,
    torch.detach,
    torch.zeros_like,
    torch.ones_like,
    torch.empty_like,
    torch.full_like,
    torch.rand_like,
    torch.randn_like,
    Tensor.new_zeros,
    Tensor.new_ones,
    Tensor.new_empty,
    Tensor.new_full,
    Tensor.new_tensor,
}
_TRANSPOSES: dict[str, Callable[[Tensor], Tensor]] = {
    "T": lambda x: x.permute(*range(x.dim() - 1, -1, -1)),
    "mT": lambda x: x.transpose(-2, -1),
}


def _writes(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether a function writes to an argument, going by its name."""
    if kwargs.get("out") is not None:
        return True
    if name.startswith("__"):
        return name in ("__setitem__", "__set__") or (name.startswith("__i") and name not in _NOT_WRITING)
    return name.endswith("_")


_NOT_WRITING = ("__invert__", "__index__", "__int__", "__iter__", "__instancecheck__")


def _asks_in_place(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call of a function with a rule has its argument ``inplace`` set."""
    record = RULES.get(func)
    position = None if record is None else _INPLACE_POSITION.get(record)
    if position is None:
        return False
    return bool(kwargs.get("inplace", args[position] if len(args) > position else False))


def _check_plain(func: Any, tensor: Tensor, var: Var | None) -> None:
    if var is None and tensor.grad_fn is not None:
        raise Unrecordable(f"{_name(func)} was given a tensor that was computed past the recording")
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise Unrecordable(f"{_name(func)} was called under a transform of torch.func")
    if tensor.layout != torch.strided or tensor.is_complex():
        raise Unrecordable(f"{_name(func)} was given a tensor of layout {tensor.layout} and dtype {tensor.dtype}")


def _check_slow(args: Any, kwargs: Any) -> None:
    """Not where a transformer leaves out its padding, with zeros in place: it does not while any mode is active."""
    fast = kwargs.get("key_padding_mask") is not None and not kwargs.get("training", True)
    graph = torch.is_grad_enabled() and any(t.requires_grad for t in tensors_in((args, kwargs)))
    if fast and not graph:
        raise Unrecordable("a transformer without gradients may leave out its padding")


def autocast_is_on() -> bool:
    """Whether PyTorch chooses dtypes now."""
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


def without_autocast() -> AbstractContextManager[Any]:
    """While open, dtypes are those of the tensors, as when a recording was made."""
    if not autocast_is_on():
        return nullcontext()
    stack = ExitStack()
    for device_type in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device_type):
            stack.enter_context(torch.autocast(device_type, enabled=False))
    return stack


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func))


def tensors_in(values: Iterable[Any]) -> TensorList:
    """All tensors in nested tuples, lists and dicts."""
    found: TensorList = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, _SEQUENCES):
            found += tensors_in(value)
        elif isinstance(value, dict):
            found += tensors_in(value.values())
    return found


#: As a tuple: a union would be made anew for each question.
_SEQUENCES = (list, tuple)


def mapped(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Nested tuples, lists and dicts with each tensor replaced."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, list):
        return [mapped(v, function) for v in value]
    if isinstance(value, tuple):
        items = [mapped(v, function) for v in value]
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return type(value)(items) if hasattr(value, "n_fields") else tuple(items)  # what torch.max returns
    if isinstance(value, dict):
        return {k: mapped(v, function) for k, v in value.items()}
    return value
