"""What the optimizers for games share as optimizers: hyperparameters, state, checkpoints, and the walk over groups."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from ._arguments import check_betas, check_flags, check_lr, check_real, plain_numbers
from ._checkpoint import CheckpointedOptimizer
from ._state import STEP, as_real, check_gradient, check_state, new_buffer, new_step
from ._updates import Moments, copy_, gradients, widened

ADAM_STATE = (STEP, "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_CPU = torch.device("cpu")  # where steps are counted, so that no device is waited for


class ListOptimizer(CheckpointedOptimizer):
    """An optimizer whose step is made of whole batches of tensors.

    A step has two parts: :meth:`_batches` looks at every group, parameter, gradient and state and raises before
    anything is modified; then a subclass moves batch after batch.
    """

    _STATE: ClassVar[tuple[str, ...]] = ()  # what `_state.py` makes and checks: buffers like the parameter, the count
    _TOGETHER: ClassVar[tuple[str, ...]] = ()  # those of a saved state that make no sense alone
    _NUMBERS = ()

    @property
    def _LATER(self) -> dict[str, Any]:  # type: ignore[override]  # a checkpoint may lack any hyperparameter
        return {name: value for name, value in self.defaults.items() if name != "differentiable"}  # torch's own

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        plain_numbers(defaults, defaults)
        self._check_group(defaults, type(self).__name__)
        super().__init__(params, defaults)

    def _check_group(self, group: Mapping[str, Any], owner: str) -> None:
        """Raises for a bad hyperparameter."""
        check_lr(owner, group["lr"])
        check_real(owner, "weight_decay", group["weight_decay"], minimum=0.0)
        check_flags(owner, group, ("maximize",))
        if group["foreach"] is not None:
            check_flags(owner, group, ("foreach",))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group after checking its hyperparameters; see :meth:`torch.optim.Optimizer.add_param_group`."""
        if isinstance(param_group, dict):
            plain_numbers(param_group, self.defaults)
            self._check_group({**self.defaults, **param_group}, type(self).__name__)
        super().add_param_group(param_group)

    # ---- the walk over groups ---------------------------------------------------------------------------------------

    def _batches(self) -> "list[Batch]":
        """The parameters that have a gradient, in batches alike in group, device, dtype and whether they were moved."""
        owner = type(self).__name__
        batches: list[Batch] = []
        for number, group in enumerate(self.param_groups):
            if not torch.compiler.is_compiling():
                self._check_group(group, owner)
            alike: dict[Any, Batch] = {}
            for index, param in enumerate(group["params"]):
                if param.grad is None:
                    continue
                several = len(self.param_groups) > 1
                label = f"param_groups[{number}]['params'][{index}]" if several else f"params[{index}]"
                check_gradient(owner, label, param, param.grad)
                state = self.state.get(param, {})
                self._check_state(owner, label, state, param)
                moved = self._was_moved(state)
                key = index if group["foreach"] is False else (param.device, param.dtype, moved)
                if key not in alike:
                    alike[key] = Batch(self, group, moved)
                alike[key].owners.append(param)
            batches.extend(alike.values())
        return batches

    def _check_state(self, owner: str, label: str, state: dict[str, Any], param: Tensor) -> None:
        for name in self._STATE:
            if name in state:
                check_state(owner, name, label, state[name], param)

    def _was_moved(self, state: dict[str, Any]) -> bool:
        """Whether the state holds the direction of an earlier step; parameters of one batch agree in it."""
        return False

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def _step_device(self, group: dict[str, Any], param: Tensor) -> torch.device:
        return _CPU

    def _check_saved_state(self, owner: str, param: Tensor, key: Any, saved: Mapping[str, Any]) -> None:
        super()._check_saved_state(owner, param, key, saved)
        missing = [name for name in self._TOGETHER if saved.get(name) is None]
        if missing and len(missing) < len(self._TOGETHER):
            raise ValueError(
                f"{owner}: state[{key!r}] must hold {', '.join(self._TOGETHER)} together; got no {missing[0]}."
            )


@dataclass
class Batch:
    """Parameters of one group that are moved together."""

    optimizer: Optimizer
    group: dict[str, Any]
    moved: bool
    owners: list[Tensor] = field(default_factory=list)

    @property
    def lr(self) -> float | Tensor:
        """A number wherever reading it neither waits for a device nor binds a compiled graph to it."""
        lr: float | Tensor = self.group["lr"]
        if not isinstance(lr, Tensor):
            return lr
        if torch.compiler.is_compiling() or lr.device.type != "cpu":
            return lr.detach().reshape(())
        return lr.item()

    @property
    def params(self) -> list[Tensor]:
        """The parameters; a complex one as pairs, as everywhere here."""
        return [as_real(param) for param in self.owners]

    def weights(self) -> list[Tensor]:
        """The parameters to be moved, in the dtype of their arithmetic; then :meth:`write` them."""
        return widened(self.params)

    def write(self, weights: list[Tensor]) -> None:
        """Rounds the weights back to 16-bit parameters; others were moved in place."""
        if weights[0].dtype != self.params[0].dtype:
            copy_(self.params, weights)

    def gradients(self, grad_scale: Tensor | None = None) -> list[Tensor]:
        """What the parameters descend by; may be the gradients themselves, so only to be read."""
        return gradients(
            self.params,
            [as_real(param.grad.resolve_conj()) for param in self.owners if param.grad is not None],
            weight_decay=self.group["weight_decay"],
            maximize=self.group["maximize"],
            grad_scale=grad_scale,
        )

    def buffers(self, name: str) -> list[Tensor]:
        """The state of that name; zeros, kept from now on, where there was none."""
        for param in self.owners:
            if name not in self.optimizer.state[param]:
                self.optimizer.state[param][name] = new_step(_CPU) if name == STEP else new_buffer(param)
        return [as_real(self.optimizer.state[param][name]) for param in self.owners]

    def moments(self) -> Moments:
        """Adam's state."""
        *names, largest = ADAM_STATE
        lists = [self.buffers(name) for name in names]
        if self.group["amsgrad"]:
            for param in self.owners:
                state = self.optimizer.state[param]
                if largest not in state:  # the largest known so far, should amsgrad begin in the middle of a run
                    state[largest] = state["exp_avg_sq"].clone()
            lists.append(self.buffers(largest))
        return Moments(*lists, betas=self.group["betas"], eps=self.group["eps"])


def check_adam(owner: str, group: Mapping[str, Any]) -> None:
    """The hyperparameters of Adam's direction."""
    check_betas(owner, group["betas"])
    check_real(owner, "betas[0]", group["betas"][0], minimum=0.0)
    check_real(owner, "eps", group["eps"], minimum=0.0)
    check_flags(owner, group, ("amsgrad",))
