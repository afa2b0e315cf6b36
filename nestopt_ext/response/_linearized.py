"""Calls a module with dual numbers, and adds up primal and tangent of what it returns."""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ._layer import split

#: What torch says where a tangent could not be carried on, and the operation it names.
_NO_DERIVATIVE = re.compile(r"forward AD with (\S+)|(custom (?:autograd\.)?Function)|forward (?:mode )?AD")
_PLAIN_DATA = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def linearized_call(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, watched: bool) -> Any:
    """What ``module`` returns, primal plus tangent in place of each tensor.

    ``watched`` looks at each operation for tangents that are lost in silence, which takes time. What torch.compile made
    runs as it was written: compiled code loses tangents too.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled then, and its import takes a second
        return _linearized_call(module, args, kwargs, watched)
    return _as_written()(module, args, kwargs, watched)


@functools.cache
def _as_written() -> Callable[..., Any]:
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def call(*args: Any) -> Any:
        with torch.compiler.set_stance("force_eager"):
            return _linearized_call(*args)

    return call  # type: ignore[no-any-return]


def _linearized_call(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], watched: bool) -> Any:
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "StnModel: a linearized answer must be asked for outside of torch.inference_mode(), which drops tangents."
            " Use torch.no_grad()."
        )
    if forward_ad._current_level >= 0:
        raise RuntimeError(
            "StnModel: a linearized answer must not be asked for inside of forward-mode differentiation"
            " (torch.func.jvp, forward_ad.dual_level), which PyTorch does not nest. Use linearized=False there."
        )
    watch = _TangentWatch() if watched else contextlib.nullcontext()
    with forward_ad.dual_level(), without_fast_paths(), sdpa_kernel(SDPBackend.MATH), _named_faults(), watch:
        return pytree.tree_map(_summed, module(*args, **kwargs))


@contextlib.contextmanager
def without_fast_paths() -> Iterator[None]:
    """While open, torch's transformer layers call their parts; in evaluation they would read their weights instead.

    The fused call has no forward-mode derivative, and knows nothing of weights that respond.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextlib.contextmanager
def _named_faults() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        found = _NO_DERIVATIVE.search(str(error))
        if found is None or str(error).startswith(("StnModel", "StnLayer")):
            raise
        operation = found[1] or "an autograd.Function without a jvp" if found[1] or found[2] else "an operation"
        raise _refusal(operation) from error


def _refusal(operation: str) -> RuntimeError:
    return RuntimeError(
        f"StnModel: a linearized answer must be made of operations with a forward-mode derivative; got {operation}."
        " Train with linearize=False (linearized=False in StnModel.at), or replace it."
    )


#: Their tangents are right, and take statistics of the primal for constants when they are differentiated.
_HALF_DIFFERENTIABLE = (F.layer_norm, F.batch_norm, F.instance_norm)


class _TangentWatch(TorchFunctionMode):
    """Refuses operators of other libraries that return no tangent, and warns of those with wrong second derivatives.

    One whose derivative is attached by torch.library.register_autograd has a tangent of zero where nothing requires
    grad, without a word.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        foreign = isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket)
        if foreign and _has_tangent((args, kwargs)) and _has_tangent(out) is False:
            raise _refusal(str(func))
        if func in _HALF_DIFFERENTIABLE and kwargs.get("training", True) and _leads_on(args[0]):
            warnings.warn(
                f"StnModel: PyTorch's tangent of {func.__name__} has wrong gradients to its primal: those of a"
                " linearized answer are right for response weights and wrong for general ones. Set requires_grad of the"
                " general parameters to False, as DeltaStnTrainer does.",
                UserWarning,
                stacklevel=2,
            )
        return out


def _leads_on(x: Tensor) -> bool:
    """Whether ``x`` has a tangent, and a gradient would go to its primal."""
    primal, tangent = split(x)
    return tangent is not None and primal.requires_grad and torch.is_grad_enabled()


def _has_tangent(tree: Any) -> bool | None:
    """Whether a tensor in ``tree`` has a tangent; None where none is of a kind that could."""
    tensors = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return any(split(tensor)[1] is not None for tensor in tensors) if tensors else None


def _summed(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        primal, tangent = split(leaf)
        return primal if tangent is None else primal + tangent
    if isinstance(leaf, _PLAIN_DATA):
        return leaf
    raise TypeError(
        "StnModel: a linearized answer must hold tensors in tuples, lists and dicts;"
        f" got {type(leaf).__name__}, whose tensors would lose their tangents. Return its tensors, or tell"
        " torch.utils._pytree.register_pytree_node how to take it apart."
    )
