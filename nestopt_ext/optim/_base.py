"""What the optimizers with complex momentum share: everything but their arithmetic and their hyperparameters."""

import itertools
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import _ops, _reference
from . import _foreach
from ._arguments import check_lr, plain_numbers
from ._checkpoint import CheckpointedOptimizer, Group
from ._dtensor import call_on_shards, local_shards
from ._state import STEP, as_real, check_gradient, check_state, new_buffer, new_step

State = dict[str, Any]


class ComplexMomentumOptimizer(CheckpointedOptimizer):
    """A step for every group, by the fused op, by ``torch._foreach_*`` kernels or tensor by tensor.

    A subclass names its op and its state, and says what is written in a group; see the attributes and the methods
    that raise ``NotImplementedError``.
    """

    _OP: ClassVar[str]  # a function of _ops, _foreach and _reference
    _BETA: ClassVar[str]  # the argument of the op that may be complex
    _IMAG: ClassVar[str]  # the state that is absent while the momentum is real; _STATE is in the order of the op
    _directions: Mapping[int, complex] = {}  # of the momentum, as a number of modulus 1, by the id of the group

    def __init__(self, params: ParamsT, defaults: Group) -> None:
        plain_numbers(defaults, self._NUMBERS)
        self._check_group(defaults, type(self).__name__)
        super().__init__(params, defaults)

    # ---- of each subclass -------------------------------------------------------------------------------------------

    def _beta(self, group: Group) -> Any:
        """The momentum: real or complex, once the group is checked."""
        raise NotImplementedError

    def _set_beta(self, group: Group, beta: Any) -> None:
        raise NotImplementedError

    def _needed(self, group: Group, state: State) -> tuple[str, ...]:
        """The state a step takes, in the order of ``_STATE``."""
        raise NotImplementedError

    def _options(self, group: Group, first: bool) -> dict[str, Any]:
        """The keyword arguments of the op; ``first`` if it is the first step and that is another one."""
        raise NotImplementedError

    def _gain(self, group: Group) -> float:
        """What ``rescale_lr`` divides by."""
        raise NotImplementedError

    def _first_is_different(self, group: Group) -> bool:
        return False

    # ---- groups -----------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group after checking its hyperparameters; see :meth:`torch.optim.Optimizer.add_param_group`."""
        if isinstance(param_group, dict):
            plain_numbers(param_group, self._NUMBERS)
            self._check_group({**self.defaults, **param_group}, type(self).__name__)
        self._settle()
        super().add_param_group(param_group)
        self._remember()

    def _check_groups(self) -> None:
        """Hyperparameters may have been set to anything since the last step; looks again at those that were."""
        found = self._values()
        known = self.__dict__.get("_checked", ())
        if len(known) == len(found) and all(map(operator.is_, found, known)):
            for group in self.param_groups:
                if isinstance(group["lr"], Tensor):  # its value may have changed in place
                    check_lr(type(self).__name__, group["lr"])
            return
        for group in self.param_groups:
            plain_numbers(group, self._NUMBERS)  # a list could be changed unseen
            self._check_group(group, type(self).__name__)
        self._settle()
        self._remember()
        self._checked = self._values()

    def _values(self) -> list[Any]:
        return list(itertools.chain.from_iterable(group.values() for group in self.param_groups))

    def _remember(self) -> None:
        betas = [(id(group), self._beta(group)) for group in self.param_groups]
        known = self._directions
        self._directions = {key: beta / abs(beta) if beta != 0 else known.get(key, 1.0) for key, beta in betas}

    def _settle(self) -> None:
        """A scheduler that cycles the momentum sets a real one: that is its modulus, and the angle stays."""
        for group in self.param_groups:
            direction = self._directions.get(id(group), 1.0)
            # Such schedulers leave their bounds in the group. An average has no angle.
            if direction != 1 and "base_momentum" in group and not group.get("bias_correction", False):
                beta = self._beta(group)
                if isinstance(beta, int | float) and beta > 0:
                    self._set_beta(group, beta * direction)

    def _encode(self, group: Group) -> None:
        beta = self._beta(group)
        if isinstance(beta, complex):
            self._set_beta(group, (beta.real, beta.imag))

    def _decode(self, group: Group) -> None:
        beta = self._beta(group)
        if isinstance(beta, tuple | list) and len(beta) == 2 and all(type(part) in (int, float) for part in beta):
            self._set_beta(group, complex(*beta))

    # ---- the step ---------------------------------------------------------------------------------------------------

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
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            if torch.compiler.is_compiling():
                self._settle()
            else:
                self._check_groups()
            start = 0
            for group in self.param_groups:
                self._step_group(group, start)
                start += len(group["params"])
        return loss

    def _step_group(self, group: Group, start: int) -> None:
        if not torch.compiler.is_compiling() and implementation(group, True) == "fused":
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

    def _step_whole_group(self, group: Group, start: int) -> bool:
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
        if not _ops.is_native(self._OP, params[0].device.type):
            return False
        names = self._needed(group, {})
        states = self._states_of(params, start) if names else []
        if states:
            names = self._needed(group, states[0])  # an imaginary part outlives a complex momentum
        if names and self._IMAG not in names and any(self._IMAG in state for state in states):
            return False
        try:
            lists = [[state[name] for state in states] if name in names else [] for name in self._STATE]
        except KeyError:
            return False
        self._call_fused(group, [params, grads, *lists], False, None)
        return True

    def _states_of(self, params: list[Tensor], start: int) -> list[State]:
        """The states of ``params``; walking them, in the order they usually lie in, is far quicker than hashing."""
        stop = start + len(params)
        if len(self.state) >= stop and all(map(operator.is_, params, itertools.islice(self.state, start, stop))):
            return list(itertools.islice(self.state.values(), start, stop))
        return [self.state[p] for p in params]

    def _batches(self, group: Group) -> "Iterator[Batch]":
        """Splits a group into batches that are alike in device, state and whether they take their first step."""
        owner = type(self).__name__
        first_is_different = self._first_is_different(group)
        skip_first = first_is_different and _is_set(getattr(self, "found_inf", None))
        batches: dict[Any, Batch] = {}
        for index, param in enumerate(group["params"]):
            grad = param.grad
            if grad is None:
                continue
            label = self._label(group, index)
            check_gradient(owner, label, param, grad)
            names = self._needed(group, self.state.get(param, {}))
            state = self.state[param] if names else {}
            new = self._new_state(group, param, state, names)
            first = first_is_different and bool(names) and names[0] in new
            if first and skip_first:
                continue
            now = {name: new[name] if name in new else state[name] for name in names}
            for name, value in now.items():
                check_state(owner, name, label, value, param)
            key = (param.device, names, first)
            if key not in batches:
                batches[key] = Batch({name: [] for name in self._STATE}, first)
            batches[key].append(param, grad, now, state, new)
        yield from batches.values()

    def _new_state(self, group: Group, param: Tensor, state: State, names: tuple[str, ...]) -> dict[str, Tensor]:
        """What is missing of the state, and a count of steps that lies on the wrong device."""
        new = {name: new_buffer(param) for name in names if name != STEP and state.get(name) is None}
        if STEP in names:
            device, step = self._step_device(group, param), state.get(STEP)
            if step is None:
                new[STEP] = new_step(device)
            elif isinstance(step, Tensor) and step.device != device:
                new[STEP] = step.to(device)
        return new

    def _label(self, group: Group, index: int) -> str:
        """What messages call a parameter."""
        if len(self.param_groups) == 1:
            return f"params[{index}]"
        number = next(i for i, other in enumerate(self.param_groups) if other is group)
        return f"param_groups[{number}]['params'][{index}]"

    def _check_batch(self, group: Group, batch: "Batch") -> None:
        """What the update would check, without a step."""
        lists = local_shards(batch.lists())
        if self._implementation(group, batch.params[0].device) != "fused":
            return  # knows no other rules than those of the gradients and the state
        check = getattr(_ops, f"check_{self._OP.rstrip('_')}")
        check(*lists, torch.zeros((), device="cpu"), **self._split_options(group, batch.first))

    def _update(self, group: Group, batch: "Batch") -> None:
        device = batch.params[0].device
        chosen = self._implementation(group, device)
        if chosen == "fused":
            self._call_fused(group, batch.lists(), batch.first, device)
            return
        lr = self._lr(group)
        if isinstance(lr, Tensor):
            readable = lr.device.type == "cpu" and not (lr.requires_grad or torch.compiler.is_compiling())
            lr = lr.item() if readable else lr.reshape(())
        options = self._split_options(group, batch.first)
        if chosen == "foreach":
            call_on_shards(getattr(_foreach, self._OP), batch.lists(), lr, **options)
        else:
            getattr(_reference, self._OP)(*batch.lists(), lr, **options)

    def _implementation(self, group: Group, device: torch.device) -> str:
        """How a step is taken; gradients that are still scaled are the business of the op alone."""
        scaled = getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None
        return "fused" if scaled else implementation(group, _ops.is_native(self._OP, device.type))

    def _split_options(self, group: Group, first: bool) -> dict[str, Any]:
        """The keyword arguments of the op as its schema has them, with the momentum in two real parts."""
        options = self._options(group, first)
        beta = options[self._BETA]
        return {**options, self._BETA: beta.real, f"{self._BETA}_imag": beta.imag}

    def _call_fused(self, group: Group, lists: list[list[Tensor]], first: bool, device: torch.device | None) -> None:
        """Calls the op; scalars are brought to ``device`` if it is given."""
        lr = self._lr(group)
        if not isinstance(lr, Tensor):
            lr = self._as_tensor(lr)
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if device is not None:
            grad_scale, found_inf = _beside(grad_scale, device), _beside(found_inf, device)
            if lr.device.type != "cpu":
                lr = lr.to(device)
        op = getattr(_ops, self._OP)
        call_on_shards(op, lists, lr, **self._options(group, first), grad_scale=grad_scale, found_inf=found_inf)

    def _lr(self, group: Group) -> float | Tensor:
        """The lr of the update itself."""
        lr: float | Tensor = group["lr"]
        return lr / self._gain(group) if group["rescale_lr"] else lr

    def _as_tensor(self, lr: float) -> Tensor:
        """The number as a tensor, kept for the next step: making one costs as much as a hundred small parameters."""
        known: dict[float, Tensor] = self.__dict__.setdefault("_lr_tensors", {})
        if lr in known:
            return known[lr]
        tensor = torch.tensor(lr, dtype=torch.float64, device="cpu")
        if type(tensor) is Tensor:  # not one of a tracing mode
            if len(known) >= 16:  # a scheduler makes a new one at each step
                known.clear()
            known[lr] = tensor
        return tensor

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """GradScaler then hands over its scale and its verdict instead of reading the verdict back to the host."""
        return any(implementation(group, True) == "fused" for group in self.param_groups)


@dataclass
class Batch:
    """Aligned lists for one call; the lists of state are empty where there is none."""

    state: dict[str, list[Tensor]]
    first: bool
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    new_state: list[dict[str, Tensor]] = field(default_factory=list)

    def append(
        self, param: Tensor, grad: Tensor, now: Mapping[str, Tensor], state: State, new: dict[str, Tensor]
    ) -> None:
        """Adds one parameter; a complex one as a real tensor of pairs."""
        self.params.append(as_real(param))
        self.grads.append(as_real(grad.resolve_conj()))
        for name, value in now.items():
            self.state[name].append(as_real(value))
        self.states.append(state)
        self.new_state.append(new)

    def lists(self) -> list[list[Tensor]]:
        return [self.params, self.grads, *self.state.values()]


def implementation(group: Mapping[str, Any], native: bool) -> str:
    """What a group asks for: "fused", "foreach" or "single_tensor"."""
    if group["differentiable"]:
        return "single_tensor"
    if group["fused"] or (group["fused"] is None and group["foreach"] is None and native):
        return "fused"
    return "foreach" if group["foreach"] or (group["foreach"] is None and group["fused"] is None) else "single_tensor"


def _beside(scalar: Tensor | None, device: torch.device) -> Tensor | None:
    return scalar if scalar is None or scalar.device == device else scalar.to(device, non_blocking=True)


def _is_set(found_inf: Tensor | None) -> bool:
    return found_inf is not None and bool(found_inf != 0)
