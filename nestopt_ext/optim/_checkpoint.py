"""Checkpoints: what an optimizer saves, and how it loads, with every check before anything is changed."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from ._arguments import plain_numbers
from ._state import check_saved, check_state_dict, restored, saved_states

Group = dict[str, Any]


class CheckpointedOptimizer(Optimizer):
    """An optimizer that checks the checkpoints it loads, and copies their tensors into state of its own kind."""

    _STATE: ClassVar[tuple[str, ...]]  # names of the state
    _NEEDS: ClassVar[Mapping[str, tuple[str, ...]]] = {}  # what a saved state must hold beside a name
    _NUMBERS: ClassVar[tuple[str, ...]]  # hyperparameters that every checkpoint holds
    _LATER: ClassVar[Mapping[str, Any]]  # those that older checkpoints lack, and what that stands for

    def _check_group(self, group: Group, owner: str) -> None:
        """Raises for a bad hyperparameter."""
        raise NotImplementedError

    def _encode(self, group: Group) -> None:
        """Puts in place, for a file, what not every format of checkpoints knows."""

    def _decode(self, group: Group) -> None:
        """Undoes :meth:`_encode`."""

    def _settle(self) -> None:
        """Brings groups and state in line with what was set since the last look."""

    def _remember(self) -> None:
        """Keeps what :meth:`_settle` will have to know."""

    def _step_device(self, group: Group, param: Tensor) -> torch.device:
        """Where the count of steps is kept, if there is one."""
        return param.device

    # ---- copies -----------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        loading = self.__dict__.pop("_loading", None)
        super().__setstate__(state)
        for group in (self.defaults, *self.param_groups):
            for name, value in self._LATER.items():
                group.setdefault(name, value)
        for group in self.param_groups:
            plain_numbers(group, self._NUMBERS)  # some formats make a list of a tuple
        self._remember()
        if loading is not None:
            self._restore(loading)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state as a dict; see :meth:`torch.optim.Optimizer.state_dict`.

        It holds tensors, numbers, texts and None only: a complex momentum is there a pair of numbers.
        """

        def encode(_: Optimizer, state_dict: dict[str, Any]) -> None:
            for group in state_dict["param_groups"]:
                plain_numbers(group, self._NUMBERS)
                self._encode(group)

        self._settle()
        hook = self.register_state_dict_post_hook(encode, prepend=True)  # others see what is saved
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class or of its counterpart in ``torch.optim``; its tensors are copied.

        Other than :meth:`torch.optim.Optimizer.load_state_dict` it checks hyperparameters and state before anything
        changes, and keeps float32 buffers beside 16-bit parameters.
        """

        def check(_: Optimizer, final: dict[str, Any]) -> dict[str, Any]:
            self._loading = self._checked_state_dict(final)
            return self._loading

        hook = self.register_load_state_dict_pre_hook(check)  # the last to run: it sees what will be loaded
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
            self.__dict__.pop("_loading", None)

    def _checked_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The checkpoint with its groups decoded; raises for whatever in it is not as it should be."""
        owner = f"{type(self).__name__}.load_state_dict"
        check_state_dict(owner, state_dict)
        groups = [dict(group) for group in state_dict["param_groups"]]
        for i, group in enumerate(groups):
            missing = [name for name in self._NUMBERS if name not in group]
            if missing:
                raise ValueError(
                    f"{owner}: param_groups[{i}] must hold {', '.join(self._NUMBERS)}; got no {missing[0]}."
                    " It is the checkpoint of another kind of optimizer."
                )
            self._decode(group)
            self._check_group({**self._LATER, **group}, owner)
        state_dict = {**state_dict, "param_groups": groups}
        for param, key, saved in saved_states(self.param_groups, state_dict):
            self._check_saved_state(owner, param, key, saved)
        return state_dict

    def _check_saved_state(self, owner: str, param: Tensor, key: Any, saved: Mapping[str, Any]) -> None:
        """Raises for a saved state that does not fit its parameter or lacks a part."""
        held = [name for name in self._STATE if saved.get(name) is not None]
        for name in held:
            check_saved(owner, key, name, saved[name], param)
            lacking = [other for other in self._NEEDS.get(name, ()) if other not in held]
            if lacking:
                raise ValueError(f"{owner}: state[{key!r}][{name!r}] must come with {lacking[0]!r}; got none.")

    def _restore(self, state_dict: dict[str, Any]) -> None:
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        for param, _, saved in saved_states(self.param_groups, state_dict):
            device = self._step_device(groups[id(param)], param)
            for name in self._STATE:
                if saved.get(name) is not None:
                    self.state[param][name] = restored(name, saved[name], param, device)
                else:
                    self.state[param].pop(name, None)
