"""A stream of batches without end, whose position can be saved and found again."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch

from .. import _lists
from ._random import RandomStates

#: What comes after the last batch of an epoch.
END: Any = object()


class Batches:
    """One epoch of ``source`` after the other.

    The position is where the random numbers stood when the epoch began and how many batches of it were taken: to find
    it, the epoch is begun again and as many are skipped. A source that knows its own position (it has ``state_dict``
    and ``load_state_dict``, as torchdata's StatefulDataLoader does) is asked for it.
    """

    def __init__(self, caller: str, name: str, source: Any, *, resumable: bool) -> None:
        if not hasattr(source, "__iter__") or isinstance(source, torch.Tensor | dict | str):
            got = _lists.value_name(source)
            raise TypeError(f"{caller}: {name} must be a DataLoader or another iterable of batches; got {got}.")
        self._caller = caller
        self._name = name
        self._source = source
        self._keeps_position = hasattr(source, "state_dict") and hasattr(source, "load_state_dict")
        #: What the source draws from, besides the global generators.
        self.generators = _generators(source)
        self._random = RandomStates(self.generators)
        self._iterator: Iterator[Any] | None = None
        self._began: dict[str, Any] | None = None
        self._epoch = 0
        self._taken = 0
        if resumable:
            self.require_restart(", where there is a checkpoint")
            self.require_position()

    def require_restart(self, where: str = "") -> None:
        """Raises ValueError where there is one epoch in the source and no more."""
        if not self._keeps_position and isinstance(self._source, Iterator):
            raise ValueError(
                f"{self._caller}: {self._name} must be an iterable that can begin again{where}; got"
                f" {_lists.value_name(self._source)}, a one-shot iterator. Pass the DataLoader itself, or a list."
            )

    def require_position(self) -> None:
        """Raises ValueError where an epoch that is begun again need not be the same one."""
        if not self._keeps_position and getattr(self._source, "persistent_workers", False):
            raise ValueError(
                f"{self._caller}: {self._name} must start its workers anew for each epoch, where there is a checkpoint;"
                " got a DataLoader with persistent_workers=True, which draws other random numbers in its first epoch"
                " than in later ones. Pass persistent_workers=False."
            )

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made of; TypeError where the pass under way cannot be copied, as that of a DataLoader."""
        try:
            copy.copy(self._iterator)
        except (TypeError, NotImplementedError) as error:
            raise TypeError(
                f"{self._caller}: {self._name} must not be in the middle of a pass to be copied or pickled; got"
                f" {_lists.value_name(self._source)} after {self._taken} batches of one. Make another with the same"
                " arguments, and give it this one's state_dict()."
            ) from error
        return self.__dict__

    def draw(self) -> Any:
        """The next batch."""
        batch = self.draw_or_end()
        return self.draw_or_end() if batch is END else batch

    def draw_or_end(self) -> Any:
        """The next batch, or END once where an epoch is over."""
        if self._iterator is None:
            self._begin()
        batch = next(self._iterator, END)  # type: ignore[arg-type]
        if batch is not END:
            self._taken += 1
            return batch
        if self._taken == 0:
            raise ValueError(f"{self._caller}: {self._name} must hold at least one batch; got none.")
        if isinstance(self._source, Iterator):
            raise RuntimeError(
                f"{self._caller}: {self._name} must go on as long as the loop does; got an iterator that ended"
                f" after {self._taken} batches. Pass the DataLoader itself, or a list."
            )
        self._epoch, self._taken, self._iterator = self._epoch + 1, 0, None
        return END

    def state_dict(self) -> dict[str, Any]:
        """The position."""
        return {
            "epoch": self._epoch,
            "taken": self._taken,
            "began": self._began,
            "source": self._source.state_dict() if self._keeps_position else None,
        }

    def check(self, state: Any) -> None:
        """Raises ValueError unless ``state`` is a position in such a source."""
        if not isinstance(state, dict) or set(state) != {"epoch", "taken", "began", "source"}:
            raise ValueError(f"{self._name} must hold epoch, taken, began and source")
        for key in ("epoch", "taken"):
            if type(state[key]) is not int or state[key] < 0:
                raise ValueError(f"{self._name}[{key!r}] must be a whole number >= 0")
        if state["began"] is not None:
            self._random.check(f"{self._name}['began']", state["began"])
        elif state["taken"]:
            raise ValueError(f"{self._name}['began'] must be there once a batch was taken")
        if (state["source"] is not None) != self._keeps_position:
            raise ValueError(f"{self._name}['source'] must be there if and only if the source has a state_dict")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a position. Moves the random numbers, which the caller puts where they are to stand."""
        self._iterator = None
        self._epoch, self._taken, self._began = state["epoch"], state["taken"], state["began"]
        if self._keeps_position:
            self._source.load_state_dict(state["source"])
        elif self._taken:
            self._random.set(state["began"])
            self._iterator = self._epoch_of_source()
            for skipped in range(self._taken):
                if next(self._iterator, self) is self:
                    raise ValueError(
                        f"{self._name} must hold the {self._taken} batches that were taken; got {skipped}."
                        " Resume with the data of the run."
                    )

    def _begin(self) -> None:
        self._began = self._random.get()
        self._iterator = self._epoch_of_source()

    def _epoch_of_source(self) -> Iterator[Any]:
        for sampler in _samplers(self._source):
            if callable(getattr(sampler, "set_epoch", None)):
                sampler.set_epoch(self._epoch)
        return iter(self._source)


def _samplers(source: Any) -> list[Any]:
    """The samplers behind a DataLoader."""
    batch_sampler = getattr(source, "batch_sampler", None)
    return [s for s in (getattr(source, "sampler", None), getattr(batch_sampler, "sampler", None)) if s is not None]


def _generators(source: Any) -> list[torch.Generator]:
    """The generators that a DataLoader and its samplers draw from, besides the global one."""
    owners = (source, getattr(source, "batch_sampler", None), *_samplers(source))
    found = [getattr(owner, "generator", None) for owner in owners]
    return [generator for generator in found if isinstance(generator, torch.Generator)]
