"""SGD with complex momentum."""

import cmath
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Complex, Real
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from .. import _ops
from .._checks import holds_its_elements
from .._reference import complex_sgd_step_ as single_tensor
from .._reference import opmath
from ._arguments import check_flags, check_implementation, check_lr, check_momentum, check_real

_BUFFERS = ("momentum_buffer", "momentum_buffer_imag")


class ComplexSGD(Optimizer):
    r"""SGD whose momentum coefficient may be complex; a drop-in replacement for :class:`torch.optim.SGD`.

    With gradient :math:`g` and a buffer :math:`b` that starts as :math:`g` on the first step of each parameter:

    .. math::
        g &\leftarrow \nabla f(p) + \text{weight\_decay} \cdot p \\
        b &\leftarrow \text{momentum} \cdot b + (1 - \text{dampening}) \cdot g \\
        p &\leftarrow p - \text{lr} \cdot \operatorname{Re}(b)
            \qquad\text{(with nesterov: } g + \operatorname{Re}(\text{momentum} \cdot b)\text{)}

    A real momentum is the heavy ball, with the numbers of :class:`torch.optim.SGD`; a negative one damps rotations. A
    complex one does both: it converges where two players pull in circles and still speeds up where they agree. The
    angle changes the size of the step: an lr with momentum ``m`` moves like plain gradient descent with
    ``lr * Re(1 / (1 - m))``, which is 10 lr for 0.9 and 1.15 lr for the default, so tune or rescale lr with the angle.
    An angle and its negative give the same parameters.

    Args:
        params: tensors, named tensors or groups, as every torch optimizer takes them. Complex parameters count as pairs
            of real ones.
        lr: step size, >= 0; a tensor of one element may be changed in place without recompiling a compiled step.
        momentum: real or complex, of modulus below 1; ``cmath.rect(modulus, angle)`` makes one from polar form.
        dampening: the gradient enters the buffer times ``1 - dampening``, from the second step on.
        weight_decay: added to the gradient times the parameter, >= 0.
        nesterov: look ahead along the buffer; needs a momentum and zero dampening.
        maximize: ascend.
        foreach: ``torch._foreach_*`` kernels over whole lists.
        differentiable: let autograd see the step; for parameters that are not leaves.
        fused: one call of the op ``complex_sgd_step_`` for all tensors. With ``fused`` and ``foreach`` both None the
            fused kernel is taken where it is native, else foreach.

    Modifies: the parameters and, per parameter, the state ``momentum_buffer`` (real part) and
    ``momentum_buffer_imag`` (imaginary part, absent while the momentum is real): two real tensors of the shape of the
    parameter, float32 beside 16-bit parameters. Gradients are only read. A checkpoint of :class:`torch.optim.SGD` loads
    as it is.

    Raises:
        ValueError, TypeError: for a bad hyperparameter, before anything is modified; for a sparse gradient, a state
            that does not fit or, in the fused form, tensors that overlap, before anything of that group is modified.

    Source: Lorraine, Acuna, Vicol, Duvenaud, "Complex Momentum for Optimization in Games", 2022, whose buffer has the
    opposite sign and no dampening.

    >>> import torch, nestopt_ext as nx
    >>> p = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    >>> optimizer = nx.ComplexSGD([p], lr=0.1, momentum=0.5j)
    >>> for _ in range(3):      # gradient 1: b = 1, 1 + 0.5i, 0.75 + 0.5i
    ...     p.grad = torch.ones_like(p)
    ...     optimizer.step()
    >>> round(p.item(), 12)     # 1 - 0.1 * (1 + 1 + 0.75)
    0.725
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: complex = cmath.rect(0.9, math.pi / 8),
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        _plain_numbers(defaults)
        _check_group(defaults)
        super().__init__(params, defaults)
        # GradScaler then hands over its scale and its verdict instead of reading the verdict back to the host.
        self._step_supports_amp_scaling = any(_implementation(group, True) == "fused" for group in self.param_groups)

    def __setstate__(self, state: dict[str, Any]) -> None:
        loading = self.__dict__.pop("_loading", None)
        super().__setstate__(state)
        for group in self.param_groups:
            for name in ("nesterov", "maximize", "differentiable"):
                group.setdefault(name, False)
            for name in ("foreach", "fused"):
                group.setdefault(name, None)
        if loading is not None:
            self._restore_buffers(loading)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group after checking its hyperparameters; see :meth:`torch.optim.Optimizer.add_param_group`."""
        if isinstance(param_group, dict):
            _plain_numbers(param_group)
            _check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class or of :class:`torch.optim.SGD`; its buffers are copied.

        Other than :meth:`torch.optim.Optimizer.load_state_dict` it checks the buffers before anything changes, and
        keeps float32 buffers beside 16-bit parameters.
        """

        def check(_: Optimizer, final: dict[str, Any]) -> None:
            self._check_loaded(final)
            self._loading = final

        hook = self.register_load_state_dict_pre_hook(check)  # the last to run: it sees what will be loaded
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
            self.__dict__.pop("_loading", None)

    def _loaded_buffers(self, state_dict: dict[str, Any]) -> Iterator[tuple[Tensor, Any, str, Any]]:
        """Pairs each parameter with its saved id, and the name and value of each of its saved buffers."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            for param, key in zip(group["params"], saved["params"], strict=False):
                for name in _BUFFERS:
                    if name in state_dict["state"].get(key, {}):
                        yield param, key, name, state_dict["state"][key][name]

    def _check_loaded(self, state_dict: dict[str, Any]) -> None:
        owner = "ComplexSGD.load_state_dict"
        _check_structure(owner, state_dict)
        for group in state_dict["param_groups"]:
            _check_group({**self.defaults, **group}, owner)
        for param, key, name, value in self._loaded_buffers(state_dict):
            label = f"{owner}: state[{key!r}][{name!r}]"
            if name == "momentum_buffer_imag" and state_dict["state"][key].get("momentum_buffer") is None:
                raise ValueError(f"{label} must come with its real part 'momentum_buffer'; got none.")
            if value is None and name == "momentum_buffer":
                continue
            if not isinstance(value, Tensor):
                raise TypeError(f"{label} must be a tensor; got {value!r:.80}.")
            if value.layout != torch.strided or value.device.type == "meta":
                raise TypeError(f"{label} must be a dense tensor with data; got {value.layout} on {value.device}.")
            if not (value.is_floating_point() or (param.is_complex() and value.is_complex())):
                raise TypeError(f"{label} must be of floating dtype; got {value.dtype}.")
            if value.shape != param.shape:
                raise ValueError(
                    f"{label} must have the shape of its parameter {tuple(param.shape)}; got {tuple(value.shape)}."
                )
            if not holds_its_elements(value):
                raise ValueError(
                    f"{label} must have storage for its elements; got a storage that was resized or freed."
                )

    def _restore_buffers(self, state_dict: dict[str, Any]) -> None:
        for param, _, name, value in self._loaded_buffers(state_dict):
            if value is None:
                self.state[param].pop(name, None)
            else:
                self.state[param][name] = _new_buffer(param).copy_(value.detach())

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step.

        Args:
            closure: evaluates the loss again, with gradients, and returns it.

        Returns:
            What ``closure`` returned, else None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not torch.compiler.is_compiling():
            self._check_groups()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            start = 0
            for group in self.param_groups:
                self._step_group(group, start)
                start += len(group["params"])
        return loss

    def _check_groups(self) -> None:
        """Hyperparameters may have been set to anything since the last step; looks again at those that were."""
        found = list(itertools.chain.from_iterable(group.values() for group in self.param_groups))
        known = self.__dict__.get("_checked", ())
        if len(known) != len(found) or not all(map(operator.is_, found, known)):
            for group in self.param_groups:
                _check_group(group)
            self._checked = found
        else:
            for group in self.param_groups:
                if isinstance(group["lr"], Tensor):  # its value may have changed in place
                    check_lr("ComplexSGD", group["lr"])

    def _step_group(self, group: dict[str, Any], start: int) -> None:
        if not torch.compiler.is_compiling() and _implementation(group, True) == "fused":
            try:
                if self._step_whole_group(group, start):
                    return
            except (TypeError, ValueError):
                # Refused before anything was written. Complex parameters and several devices are taken apart below;
                # what is still refused is the caller's to hear.
                pass
        batches = list(self._batches(group))
        if len(batches) > 1 and not torch.compiler.is_compiling():
            for batch in batches:  # none may be written to before all are known to be right
                self._check_batch(group, batch)
        for batch in batches:
            self._update(group, batch)
            for state, new in zip(batch.states, batch.new_state, strict=True):
                state.update(new)

    def _step_whole_group(self, group: dict[str, Any], start: int) -> bool:
        """One call for the whole group, in the usual case that no state is missing; False if it is not that case.

        Kept to what C-level loops can do: with many small parameters the host is busy here for most of a step.
        ``start`` is the number of states before those of this group, if states lie in the order of the parameters.
        """
        params = group["params"]
        grads = [grad for p in params if (grad := p.grad) is not None]
        if not grads:
            return True
        if len(grads) != len(params):
            params = [p for p in params if p.grad is not None]
        if not _ops.is_native("complex_sgd_step_", params[0].device.type):
            return False
        momentum = group["momentum"]
        buffers: list[Tensor] = []
        buffers_imag: list[Tensor] = []
        if momentum != 0:
            states = self._states_of(params, start)
            try:
                buffers = [state["momentum_buffer"] for state in states]
                if momentum.imag != 0:
                    buffers_imag = [state["momentum_buffer_imag"] for state in states]
                elif any("momentum_buffer_imag" in state for state in states):
                    return False
            except KeyError:
                return False
        self._call_fused(group, (params, grads, buffers, buffers_imag), group["dampening"], None)
        return True

    def _states_of(self, params: list[Tensor], start: int) -> list[dict[str, Any]]:
        """The states of ``params``; walking them, in the order they usually lie in, is far quicker than hashing."""
        stop = start + len(params)
        if len(self.state) >= stop and all(map(operator.is_, params, itertools.islice(self.state, start, stop))):
            return list(itertools.islice(self.state.values(), start, stop))
        return [self.state[p] for p in params]

    def _call_fused(
        self,
        group: dict[str, Any],
        lists: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]],
        dampening: float,
        device: torch.device | None,
    ) -> None:
        """Calls the op; scalars are brought to ``device`` if it is given."""
        lr, momentum = group["lr"], group["momentum"]
        if not isinstance(lr, Tensor):
            lr = self._as_tensor(lr)
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if device is not None:
            grad_scale, found_inf = _beside(grad_scale, device), _beside(found_inf, device)
            if lr.device.type != "cpu":
                lr = lr.to(device)
        _ops.complex_sgd_step_(
            *lists,
            lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            grad_scale=grad_scale,
            found_inf=found_inf,
        )

    def _as_tensor(self, lr: float) -> Tensor:
        """The number as a tensor, kept until it changes: making one costs as much as a hundred small parameters."""
        known: tuple[float, Tensor] | None = self.__dict__.get("_lr_tensor")
        if known is not None and known[0] == lr:
            return known[1]
        tensor = torch.tensor(lr, dtype=torch.float64, device="cpu")
        if type(tensor) is Tensor:  # not one of a tracing mode
            self._lr_tensor = (lr, tensor)
        return tensor

    def _batches(self, group: dict[str, Any]) -> "Iterator[_Batch]":
        """Splits a group into batches that are alike in device, buffers and whether they take their first step."""
        momentum = group["momentum"]
        skip_first = group["dampening"] != 0 and _is_set(getattr(self, "found_inf", None))
        batches: dict[Any, _Batch] = {}
        for index, param in enumerate(group["params"]):
            grad = param.grad
            if grad is None:
                continue
            label = self._label(group, index)
            if grad.layout != torch.strided:
                raise TypeError(
                    f"ComplexSGD: the gradient of {label} must be dense; got {grad.layout}."
                    " Use sparse=False in the embedding, or call .to_dense() on the gradient."
                )
            if (grad.shape, grad.dtype) != (param.shape, param.dtype):
                raise ValueError(
                    f"ComplexSGD: the gradient of {label} must have its shape {tuple(param.shape)} and dtype"
                    f" {param.dtype}; got {tuple(grad.shape)} and {grad.dtype}. Set .grad anew after changing .data."
                )
            if not torch.compiler.is_compiling() and torch._debug_has_internal_overlap(param) == 1:
                raise ValueError(
                    f"ComplexSGD: {label} must not overlap itself; got shape {tuple(param.shape)} with strides"
                    f" {param.stride()}. Pass a clone."
                )
            state = self.state[param] if momentum != 0 else {}
            first = momentum != 0 and state.get("momentum_buffer") is None
            if first and skip_first:
                continue
            new: dict[str, Tensor] = {}
            if first:
                new["momentum_buffer"] = _new_buffer(param)
            if momentum.imag != 0 and "momentum_buffer_imag" not in state:
                new["momentum_buffer_imag"] = _new_buffer(param)
            now = {**state, **new}
            buffers = [now[name] for name in _BUFFERS if momentum != 0 and name in now]
            for name, buffer in zip(_BUFFERS, buffers, strict=False):
                _check_buffer(f"{name} of {label}", buffer, param)
            key = (param.device, len(buffers), first)
            if key not in batches:
                # With an empty buffer and no dampening, the first step leaves the gradient in the buffer.
                batches[key] = _Batch([], [], [], [], dampening=0 if first else group["dampening"])
            batches[key].append(param, grad, buffers, state, new)
        yield from batches.values()

    def _label(self, group: dict[str, Any], index: int) -> str:
        """What messages call a parameter."""
        if len(self.param_groups) == 1:
            return f"params[{index}]"
        number = next(i for i, other in enumerate(self.param_groups) if other is group)
        return f"param_groups[{number}]['params'][{index}]"

    def _check_batch(self, group: dict[str, Any], batch: "_Batch") -> None:
        """What the op would check, without a step."""
        _ops.check_complex_sgd_step(
            *(batch.params, batch.grads, batch.buffers, batch.buffers_imag),
            torch.zeros((), device="cpu"),
            momentum=group["momentum"].real,
            momentum_imag=group["momentum"].imag,
        )

    def _update(self, group: dict[str, Any], batch: "_Batch") -> None:
        lists = (batch.params, batch.grads, batch.buffers, batch.buffers_imag)
        device = batch.params[0].device
        implementation = _implementation(group, _ops.is_native("complex_sgd_step_", device.type))
        scaled = getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None
        if implementation == "fused" or scaled:
            self._call_fused(group, lists, batch.dampening, device)
            return
        lr, momentum = group["lr"], group["momentum"]
        if isinstance(lr, Tensor) and not (lr.requires_grad or torch.compiler.is_compiling()):
            lr = lr.item()
        elif isinstance(lr, Tensor):
            lr = lr.reshape(())
        run = foreach if implementation == "foreach" else single_tensor
        run(
            *lists,
            lr,
            momentum=momentum.real,
            momentum_imag=momentum.imag,
            dampening=batch.dampening,
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )


@dataclass
class _Batch:
    """Aligned lists for one call; the buffer lists are empty where there are none."""

    params: list[Tensor]
    grads: list[Tensor]
    buffers: list[Tensor]
    buffers_imag: list[Tensor]
    dampening: float
    states: list[dict[str, Any]] = field(default_factory=list)
    new_state: list[dict[str, Tensor]] = field(default_factory=list)

    def append(
        self, param: Tensor, grad: Tensor, buffers: list[Tensor], state: dict[str, Any], new: dict[str, Tensor]
    ) -> None:
        """Adds one parameter; a complex one as a real tensor of pairs."""
        as_real = torch.view_as_real if param.is_complex() else lambda t: t
        self.params.append(as_real(param))
        self.grads.append(as_real(grad.resolve_conj()))
        for one, list_ in zip(buffers, (self.buffers, self.buffers_imag), strict=False):
            list_.append(as_real(one))
        self.states.append(state)
        self.new_state.append(new)


def foreach(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    buffers_imag: list[Tensor],
    lr: float | Tensor,
    *,
    momentum: float,
    momentum_imag: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    """The step of :func:`nestopt_ext._reference.complex_sgd_step_` in ``torch._foreach_*`` kernels."""
    scalars = {
        "momentum": momentum,
        "momentum_imag": momentum_imag,
        "dampening": dampening,
        "weight_decay": weight_decay,
        "nesterov": nesterov,
        "maximize": maximize,
    }
    groups: dict[torch.dtype, list[int]] = {}
    for i, param in enumerate(params):
        groups.setdefault(param.dtype, []).append(i)
    for dtype, indices in groups.items():
        p, g, b, c = ([list_[i] for i in indices] if list_ else [] for list_ in (params, grads, buffers, buffers_imag))
        if opmath(dtype) != dtype:  # there is no foreach kernel that mixes dtypes
            single_tensor(p, g, b, c, lr, **scalars)  # type: ignore[arg-type]
            continue
        if maximize:
            g = list(torch._foreach_neg(g))
        if weight_decay != 0:
            g = list(torch._foreach_add(g, p, alpha=weight_decay))
        step = g
        if b:
            rotated = torch._foreach_mul(b, momentum_imag) if c else ()
            torch._foreach_mul_(b, momentum)
            if c:
                torch._foreach_add_(b, c, alpha=-momentum_imag)
            torch._foreach_add_(b, g, alpha=1 - dampening)
            if c:
                torch._foreach_mul_(c, momentum)
                torch._foreach_add_(c, list(rotated))
            step = b
            if nesterov:
                step = list(torch._foreach_add(g, b, alpha=momentum))
                if c:
                    torch._foreach_add_(step, c, alpha=-momentum_imag)
        if isinstance(lr, Tensor):
            torch._foreach_add_(p, list(torch._foreach_mul(step, -lr)))
        else:
            torch._foreach_add_(p, step, alpha=-lr)


def _plain_numbers(group: dict[str, Any]) -> None:
    """Makes numbers of NumPy and others Python's own, which checkpoints can hold."""
    for name in ("lr", "momentum", "dampening", "weight_decay"):
        value = group.get(name)
        if isinstance(value, Complex) and not isinstance(value, bool | int):
            group[name] = float(value) if isinstance(value, Real) else complex(value)


def _check_structure(owner: str, state_dict: object) -> None:
    """A checkpoint may come from anywhere: nothing is taken to be what it should be."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"{owner}: state_dict must be a dict; got {type(state_dict).__name__}.")
    state, groups = state_dict.get("state"), state_dict.get("param_groups")
    if not isinstance(state, Mapping):
        raise TypeError(f"{owner}: state_dict['state'] must be a dict; got {type(state).__name__}.")
    for key, value in state.items():
        if not isinstance(value, Mapping):
            raise TypeError(f"{owner}: state[{key!r}] must be a dict; got {type(value).__name__}.")
    if not isinstance(groups, list):
        raise TypeError(f"{owner}: state_dict['param_groups'] must be a list; got {type(groups).__name__}.")
    for i, group in enumerate(groups):
        ids = group.get("params") if isinstance(group, Mapping) else None
        if not isinstance(ids, list) or not all(isinstance(key, int | str) for key in ids):
            raise TypeError(
                f"{owner}: param_groups[{i}] must be a dict with a list 'params' of ids; got {group!r:.80}."
            )


def _check_group(group: dict[str, Any], owner: str = "ComplexSGD") -> None:
    check_lr(owner, group["lr"])
    check_momentum(owner, "momentum", group["momentum"])
    check_flags(owner, group, ("nesterov", "maximize", "differentiable"))
    check_real(owner, "dampening", group["dampening"])
    check_real(owner, "weight_decay", group["weight_decay"], minimum=0.0)
    if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
        raise ValueError(
            f"{owner}: nesterov must come with a momentum and zero dampening;"
            f" got momentum {group['momentum']} and dampening {group['dampening']}."
        )
    check_implementation(owner, {name: group.get(name) for name in ("foreach", "fused", "differentiable")})


def _check_buffer(label: str, buffer: Tensor, param: Tensor) -> None:
    wanted = (param.shape, opmath(param.dtype), param.device)
    if (buffer.shape, buffer.dtype, buffer.device) != wanted:
        raise ValueError(
            f"ComplexSGD: {label} must be {wanted[1]} of shape {tuple(wanted[0])} on {wanted[2]};"
            f" got {buffer.dtype} of shape {tuple(buffer.shape)} on {buffer.device}."
            " Make a new optimizer after changing .data."
        )


def _implementation(group: dict[str, Any], native: bool) -> str:
    if group["differentiable"]:
        return "single_tensor"
    if group["fused"] or (group["fused"] is None and group["foreach"] is None and native):
        return "fused"
    return "foreach" if group["foreach"] or (group["foreach"] is None and group["fused"] is None) else "single_tensor"


def _new_buffer(param: Tensor) -> Tensor:
    return torch.zeros_like(param, dtype=opmath(param.dtype), requires_grad=False, memory_format=torch.preserve_format)


def _beside(scalar: Tensor | None, device: torch.device) -> Tensor | None:
    return scalar if scalar is None or scalar.device == device else scalar.to(device, non_blocking=True)


def _is_set(found_inf: Tensor | None) -> bool:
    return found_inf is not None and bool(found_inf != 0)
