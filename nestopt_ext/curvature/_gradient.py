"""The first gradient of a loss, kept with its graph: Hessian products and mixed products are its derivatives."""

import functools
import re
import sys
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from .. import _lists
from .._types import Loss, TensorList
from ._evaluation import evaluate
from ._replay import Replay
from ._series import sum_by_products
from ._vjp import backward, vjp, vjps

_ELEMENTARY = "Write that operation with elementary ones, or use a curvature that needs first derivatives only."

#: What PyTorch says where it has no second derivative, what to call it, and the way out; the first that fits is said.
_NO_SECOND_DERIVATIVE = (
    (
        "scaled_dot_product",
        "a fused scaled-dot-product attention",
        "Run the forward pass under torch.nn.attention.sdpa_kernel(SDPBackend.MATH).",
    ),
    (
        "flash_attention",
        "a fused attention",
        "Run the forward pass under torch.nn.attention.sdpa_kernel(SDPBackend.MATH).",
    ),
    (
        "efficient_attention",
        "a fused attention",
        "Run the forward pass under torch.nn.attention.sdpa_kernel(SDPBackend.MATH).",
    ),
    (
        "flex_attention",
        "flex_attention",
        "Write the attention out, or use scaled_dot_product_attention under sdpa_kernel(SDPBackend.MATH).",
    ),
    (
        "aot_autograd",
        "a module compiled by torch.compile",
        "Pass the module before compilation, or run it under torch.compiler.set_stance('force_eager').",
    ),
    (
        "cudnn_rnn",
        "a cuDNN RNN",
        "Run the forward pass under torch.backends.cudnn.flags(enabled=False).",
    ),
    (
        "mkldnn_rnn",
        "an RNN of oneDNN",
        "Run the forward pass under torch.backends.mkldnn.flags(enabled=False).",
    ),
    (
        "use_reentrant=True",
        "a reentrant checkpoint, which does not know torch.autograd.grad",
        "Pass use_reentrant=False to torch.utils.checkpoint.checkpoint.",
    ),
    (
        "weight_norm_interface",
        "torch's weight_norm, whose second derivative in the direction takes the norm for a constant",
        "Register a parametrization of one's own that returns g * v / v.norm(...).",
    ),
    (
        "once_differentiable",
        "an autograd.Function marked once_differentiable",
        "Write its backward with differentiable operations.",
    ),
    (
        "no autograd formula was registered",
        "a custom operator without a formula for its derivative",
        "Give it one by register_autograd, with a backward of differentiable operations.",
    ),
    (
        "autograd kernel was not registered",
        "an operator registered without a derivative, which would be left out",
        "Give it, and what its backward calls, a formula by torch.library.register_autograd, or detach its result.",
    ),
    (
        "SparseTensorImpl",
        "an embedding with sparse gradients",
        "Make it with sparse=False.",
    ),
    (
        "_embedding_bag",
        "an embedding bag",
        "Take the sum or mean of torch.nn.functional.embedding.",
    ),
    (
        "ctc_loss",
        "the CTC loss",
        "Write it with elementary operations, or use a curvature that needs first derivatives only.",
    ),
    (
        "cdist_backward",
        "torch.cdist",
        "Take (x.unsqueeze(-2) - y.unsqueeze(-3)).norm(dim=-1), or compute_mode='use_mm_for_euclid_dist'.",
    ),
    (
        "hardsigmoid_backward",
        "hardsigmoid",
        "Write it as torch.nn.functional.relu6(x + 3) / 6.",
    ),
    (
        "implement the jvp function",
        "an autograd.Function without a jvp, or a module compiled by torch.compile",
        "Use mode='double-backward', or pass the module before compilation.",
    ),
    (
        "forward AD",
        "an operation without a forward-mode derivative",
        "Use mode='double-backward'.",
    ),
    (
        "forward gradient",
        "an operation without a forward-mode derivative",
        "Use mode='double-backward'.",
    ),
    (
        "is not implemented",
        "an operation without one",
        _ELEMENTARY,
    ),
)

#: Nodes of a graph of gradients that stand for a derivative which is not there, and what is raised for them.
_ERROR_NODES = {
    "torch::autograd::Error": "trying to differentiate twice a function that was marked with @once_differentiable",
    "torch::autograd::WarnNotImplemented": "an autograd kernel was not registered",
}

#: Nodes whose backward pass, differentiated in their first input, is wrong and not refused by PyTorch.
_WRONG_NODES = ("WeightNormInterfaceBackward",)

#: The types of nodes of PyTorch's own operations.
_OWN_NODE = re.compile(r"[A-Z]\w*Backward\d+|AccumulateGrad|CopySlices")


class named_faults:
    """Says whose loss it was, and what to do, when PyTorch cannot differentiate it.

    A class, since entering a generator takes as long as some of what is done inside.
    """

    __slots__ = ("_caller", "_name")

    def __init__(self, caller: str, name: str) -> None:
        self._caller = caller
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):  # NotImplementedError among them
            text = _named(self._caller, self._name, str(error))
            if text is not None:
                raise RuntimeError(text) from error


def _named(caller: str, name: str, text: str) -> str | None:
    """What to say in place of PyTorch's ``text``, None to leave it as it is."""
    if "backward through the graph a second time" in text:
        return (
            f"{caller}: {name} must still have its graph; got one that was freed by an earlier backward pass."
            " Keep it with retain_graph=True, or pass a closure."
        )
    if "modified by an inplace operation" in text:
        return (
            f"{caller}: {name} must be computed from the params as they are; got params, or another tensor it uses,"
            f" changed in place since. Compute it and call {caller} after such a change (an optimizer step is one),"
            " or pass a closure."
        )
    cause = text.partition("\n")[0]
    for sign, operation, remedy in _NO_SECOND_DERIVATIVE:
        if sign in text:
            return f"{caller}: {name} must be twice differentiable; got {operation} (PyTorch: {cause}). {remedy}"
    return None


def check_params(caller: str, name: str, labels: Sequence[str], tensors: Sequence[Tensor]) -> None:
    """Tensors that can be differentiated with respect to: at least one, floating, requiring grad, none twice."""
    if not tensors:
        raise ValueError(f"{caller}: {name} must hold at least one tensor; got none.")
    distributed = _dtensor_types()
    for label, tensor in zip(labels, tensors, strict=True):
        if isinstance(tensor, distributed):
            raise TypeError(
                f"{caller}: {label} must be a plain tensor; got a DTensor. A module under FSDP computes with gathered"
                " copies, which torch.autograd.grad does not connect to it. Pass the params of a module that is not"
                " sharded, or that DistributedDataParallel wraps."
            )
    _lists.check_floating(caller, labels, tensors)
    first: dict[int, str] = {}
    for label, tensor in zip(labels, tensors, strict=True):
        if not tensor.requires_grad:
            raise ValueError(
                f"{caller}: {label} must require grad; got one that does not. Call .requires_grad_() on it."
            )
        if id(tensor) in first:
            raise ValueError(
                f"{caller}: {label} must be a tensor of its own; got the same as {first[id(tensor)]}. Pass it once."
            )
        first[id(tensor)] = label


def _dtensor_types() -> tuple[type, ...]:
    """The class of distributed tensors, if anything has loaded it: without it there are none."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return () if kind is None else (kind,)


def _refuse_error_nodes(tensors: Sequence[Tensor]) -> None:
    """Raises what the error nodes in the graph of ``tensors`` stand for.

    Such a node has no edge to the params, so autograd would not visit it, or would only warn, and would leave out its
    part of the product.
    """
    for node in _nodes([t.grad_fn for t in tensors]):
        if message := _ERROR_NODES.get(node.name()):
            raise RuntimeError(message)


def _nodes(roots: Sequence[Node | None]) -> set[Node]:
    """All nodes of the graphs of ``roots``."""
    seen = {root for root in roots if root is not None}
    waiting = list(seen)
    for node in waiting:  # which grows meanwhile
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return seen


def _is_foreign(kind: type) -> bool:
    """Whether nodes of this type are of an operation that is not PyTorch's own: in Python, or in an extension."""
    if issubclass(kind, torch.autograd.function.BackwardCFunction):
        return True
    return _OWN_NODE.fullmatch(kind.__name__) is None


#: Types of nodes that are neither foreign nor wrong. They are PyTorch's own, and as long-lived as the process.
_USUAL: set[type] = set()


def _unusual(nodes: set[Node]) -> list[Node]:
    """The nodes that are foreign, or wrong."""
    for kind in set(map(type, nodes)) - _USUAL:
        if not _is_foreign(kind) and not kind.__name__.startswith(_WRONG_NODES):
            _USUAL.add(kind)
    return [node for node in nodes if type(node) not in _USUAL]


class WrongNodes:
    """The nodes in the graph of a loss whose gradient PyTorch differentiates wrongly in their first input."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self._found = [node for node in nodes if type(node).__name__.startswith(_WRONG_NODES)]

    def refuse(self, inputs: TensorList) -> None:
        """Raises where the gradient is about to be differentiated in tensors that such a first input depends on."""
        if self._found:
            behind = _nodes([node.next_functions[0][0] for node in self._found])
            if any(get_gradient_edge(t).node in behind for t in inputs):
                raise RuntimeError(f"weight_norm_interface: the derivative of {self._found[0].name()} is wrong")


def refuse_wrong_nodes(loss: Tensor, inputs: TensorList) -> None:
    """Raises where PyTorch would give a wrong derivative of the gradient of ``loss`` in ``inputs``."""
    WrongNodes(_nodes([loss.grad_fn])).refuse(inputs)


class Gradient:
    """The gradient of a scalar loss in ``params``, ready to be differentiated again and again."""

    def __init__(self, caller: str, name: str, loss: Loss, params: TensorList) -> None:
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"{caller}: {name} must be differentiated outside torch.inference_mode(), under which gradients have no"
                " graph. Leave it, or use torch.no_grad()."
            )
        self._params = params
        self._evaluation = evaluate(caller, name, loss)
        value = self._evaluation.loss
        self._faults = named_faults(caller, name)
        with torch.enable_grad(), self._evaluation.differentiating(), self._faults:
            # A seed that requires grad makes every once_differentiable function leave its error node in the graph. None
            # of PyTorch's own operations is one, and the seed would only make the graph larger.
            unusual = _unusual(_nodes([value.grad_fn]))
            foreign = any(_is_foreign(type(node)) for node in unusual)
            grads = backward([value], params, [torch.ones_like(value, requires_grad=foreign)], create_graph=True)
            if foreign:
                _refuse_error_nodes([value, *(g for g in grads if g is not None)])
        self._wrong_nodes = WrongNodes(unusual)
        if all(g is None for g in grads):
            raise ValueError(
                f"{caller}: {name} must depend on params; got a graph that none of the {len(params)} tensors is in."
            )
        self._live = [i for i, g in enumerate(grads) if g is not None and g.requires_grad]
        self._grads = [g for g in grads if g is not None and g.requires_grad]
        # Without self, a cycle through which would keep the graph alive.
        self._replay = Replay(functools.partial(_product, self._grads, self._live, params), params)

    def expect(self, num_products: int) -> None:
        """Says that so many products are about to come, which may be worth a preparation."""
        self._replay.expect(num_products)

    def product(self, v: TensorList) -> TensorList:
        """The Hessian times ``v``, a list like the params; shares no memory with ``v``."""
        with self._evaluation.differentiating(), self._faults:
            self._wrong_nodes.refuse(self._params)
            return self._replay(v)

    def neumann_sum(
        self, v: TensorList, num_terms: int, alpha: Tensor, damping: float
    ) -> tuple[TensorList, Tensor] | None:
        """Alpha sum_j (I - alpha (H + damping I))^j v over j = 0 .. num_terms, and the squared norms of the terms.

        None where the params are on several devices, or of 16 bits.
        """
        if len({p.device for p in self._params}) > 1 or any(p.dtype.itemsize == 2 for p in self._params):
            return None
        self._replay.expect(num_terms)
        with self._evaluation.differentiating(), self._faults, torch.no_grad():
            self._wrong_nodes.refuse(self._params)
            found = self._replay.neumann_sum(v, num_terms, alpha, damping)
            if found is None:
                term = [t.clone() for t in v]
                product = functools.partial(_read_product, self._grads, self._live, self._params, term)
                found = sum_by_products(term, product, num_terms, alpha, damping)
            return found

    def products(self, v: TensorList) -> TensorList:
        """The Hessian times k lists, [k, *shape] for each param."""
        if not self._live:
            return _lists.zeros_like(v)
        with self._evaluation.differentiating(), self._faults:
            self._wrong_nodes.refuse(self._params)
            return vjps(self._grads, self._params, [v[i] for i in self._live])

    def mixed(self, hparams: TensorList, v: TensorList) -> list[Tensor | None]:
        """``v`` times the derivative of the gradient in ``hparams``; None where the gradient does not depend on one."""
        if not self._live:
            return [None] * len(hparams)
        cotangents = [v[i] for i in self._live]
        with self._evaluation.differentiating(), self._faults:
            self._wrong_nodes.refuse(hparams)
            return list(backward(self._grads, hparams, cotangents))

    def uses(self, hparams: TensorList) -> bool:
        """Whether any of ``hparams`` is in the graph of the loss itself."""
        with self._evaluation.differentiating(), self._faults:
            grads = torch.autograd.grad(self._evaluation.loss, hparams, retain_graph=True, allow_unused=True)
        return any(g is not None for g in grads)


def _product(grads: TensorList, live: list[int], params: TensorList, v: TensorList) -> TensorList:
    """The product by autograd, with those gradients that have a derivative."""
    return vjp(grads, params, [v[i] for i in live]) if live else _lists.zeros_like(params)


def _read_product(grads: TensorList, live: list[int], params: TensorList, v: TensorList) -> TensorList:
    """The same product, to be read only: its tensors may share memory with each other, but not with ``v``."""
    if not live:
        return _lists.zeros_like(params)
    found = backward(grads, params, [v[i] for i in live])
    return _lists.unshare([torch.zeros_like(p) if f is None else f for f, p in zip(found, params, strict=True)], v)
