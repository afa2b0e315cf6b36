"""The random numbers of a loop: where all generators that it draws from stand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

#: Where generators stand: ``cpu`` and ``cuda`` are the global ones, ``generators`` those of the caller.
States = dict[str, Any]


class RandomStates:
    """The global generators of the CPU and, once it is in use, of CUDA, and ``generators``, in their order."""

    def __init__(self, generators: Iterable[torch.Generator] = ()) -> None:
        self._generators: list[torch.Generator] = []
        for generator in generators:
            if all(generator is not known for known in self._generators):
                self._generators.append(generator)

    def get(self) -> States:
        """Where they stand; tensors on the CPU."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
        return {
            "cpu": torch.get_rng_state(),
            "cuda": cuda,
            "generators": [generator.get_state() for generator in self._generators],
        }

    def set(self, states: States) -> None:
        """Puts them where ``get`` found them; of CUDA devices as many as there are."""
        torch.set_rng_state(states["cpu"])
        if states["cuda"] and torch.cuda.is_available():
            for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
                torch.cuda.set_rng_state(state, device)
        for generator, state in zip(self._generators, states["generators"], strict=True):
            generator.set_state(state)

    def check(self, name: str, states: Any) -> None:
        """Raises ValueError unless ``states`` is what ``get`` of such generators returns."""
        if not isinstance(states, dict) or set(states) != {"cpu", "cuda", "generators"}:
            raise ValueError(f"{name} must hold cpu, cuda and generators")
        wanted = len(self._generators)
        if not isinstance(states["generators"], list) or len(states["generators"]) != wanted:
            raise ValueError(f"{name}['generators'] must be a list of {wanted}")
        if not isinstance(states["cuda"], list):
            raise ValueError(f"{name}['cuda'] must be a list")
        if not all(isinstance(s, Tensor) and s.dtype == torch.uint8 for s in (*states["cuda"], *states["generators"])):
            raise ValueError(f"{name} must be made of states of generators")
        try:
            torch.Generator().set_state(states["cpu"])
            for generator, state in zip(self._generators, states["generators"], strict=True):
                torch.Generator(generator.device).set_state(state)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"{name} must be made of states of generators: {error}") from error
