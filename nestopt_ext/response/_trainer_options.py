"""The keyword arguments that all trainers take, for those that add some of their own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .trainer import Criterion, Forward, OptimizerFactory, Regularizer, SchedulerFactory

Function = TypeVar("Function", bound=Callable[..., Any])


class TrainerOptions(TypedDict, total=False):
    """Those of `ResponseTrainer`, which says what is taken where one is left out."""

    valid_criterion: Criterion | None
    test_batches: Iterable[Any] | None
    metrics: Mapping[str, Callable[[Any, Any], Tensor]] | None
    augment: Callable[[Any], Any] | None
    regularizers: Sequence[Regularizer]
    forward: Forward | None
    optimizer: OptimizerFactory | None
    hyper_optimizer: OptimizerFactory | None
    scale_optimizer: OptimizerFactory | None
    scheduler: SchedulerFactory | None
    hyper_scheduler: SchedulerFactory | None
    warmup_epochs: int
    valid_steps: int
    entropy_weight: float
    tune_scales: bool
    max_norm: float | None
    batch_dim: int | None
    generator: torch.Generator | None


def with_options_of(base: Callable[..., Any]) -> Callable[[Function], Function]:
    """Shows a function, whose ``**options`` go to ``base``, with the keyword arguments of ``base`` in their place."""

    def shown(function: Function) -> Function:
        signature = inspect.signature(function)
        own = {name: p for name, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD}
        given = {n: p for n, p in inspect.signature(base).parameters.items() if n not in own}
        function.__signature__ = signature.replace(parameters=[*own.values(), *given.values()])  # type: ignore[attr-defined]
        return function

    return shown
