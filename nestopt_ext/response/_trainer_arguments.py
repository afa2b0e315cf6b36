"""What trainers require of their arguments, and of a state that they are to take over."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import _lists
from ..hypergrad import _loop_arguments as arguments
from ._layer import StnLayer
from ._trainer_step import TrainerDiverged
from .model import StnModel


def check_model(caller: str, model: Any, centred: bool) -> None:
    wanted, remedy = ("centred", "to_delta_stn") if centred else ("not centred", "to_stn")
    if not isinstance(model, StnModel):
        raise TypeError(f"{caller}: model must be a StnModel; got {_lists.value_name(model)}. Make one by {remedy}.")
    if model.centred != centred:
        raise ValueError(f"{caller}: model must be {wanted}; got centred={model.centred}. Make it by {remedy}.")
    if not any(True for _ in model.response_parameters()):
        raise ValueError(f"{caller}: model must have response layers; got none. Make it by to_stn or to_delta_stn.")


def check_metrics(caller: str, metrics: Any) -> None:
    if not isinstance(metrics, Mapping):
        raise TypeError(f"{caller}: metrics must be a dict of functions; got {_lists.value_name(metrics)}.")
    if "loss" in metrics:
        raise ValueError(f"{caller}: metrics must have names besides 'loss'; got 'loss'. That is valid_criterion's.")
    for name, metric in metrics.items():
        arguments.check_callable(caller, f"metrics[{name!r}]", metric)


def check_regularizers(caller: str, regularizers: Any) -> list[Callable[..., Tensor]]:
    if callable(regularizers):
        regularizers = [regularizers]
    if not isinstance(regularizers, Sequence):
        raise TypeError(f"{caller}: regularizers must be a list of them; got {_lists.value_name(regularizers)}.")
    for i, regularizer in enumerate(regularizers):
        arguments.check_callable(caller, f"regularizers[{i}]", regularizer)
    return list(regularizers)


def check_entropy_weight(caller: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{caller}: entropy_weight must be a number; got {value!r}.")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{caller}: entropy_weight must be finite and >= 0; got {value}.")


def check_batches(caller: str, name: str, source: Any) -> Any:
    """What is evaluated after every epoch, while a step's own pass over it may be under way."""
    if not hasattr(source, "__iter__") or hasattr(source, "__next__"):
        raise TypeError(
            f"{caller}: {name} must be an iterable that can begin again; got {_lists.value_name(source)}."
            " Pass a DataLoader, or a list."
        )
    if hasattr(source, "load_state_dict"):
        raise TypeError(
            f"{caller}: {name} must allow two passes at a time; got {_lists.value_name(source)}, which has one"
            " position. Pass a DataLoader, or a list."
        )
    if getattr(source, "persistent_workers", False):
        raise ValueError(
            f"{caller}: {name} must allow two passes at a time; got a DataLoader with persistent_workers=True, which"
            " begins anew for all when one begins. Pass persistent_workers=False."
        )
    return source


def check_examples(caller: str, count: int) -> int:
    """The number of examples in a batch; a mean over none is NaN."""
    if not count:
        raise ValueError(
            f"{caller}: a batch must hold at least one example; got an empty one. Leave it out of the batches, or set"
            " drop_last=True where a DataLoader makes it."
        )
    return count


def batch_dim_of(caller: str, model: StnModel, given: int | None) -> int:
    """The dimension of a batch that counts examples: as given, or that of the response layers."""
    if given is not None:
        arguments.check_count(caller, "batch_dim", given, 0)
        return given
    found = {layer.batch_dim for layer in model.modules() if isinstance(layer, StnLayer)}
    if len(found) > 1:
        raise ValueError(
            f"{caller}: batch_dim must be given where response layers differ in theirs; got {sorted(found)}."
        )
    return found.pop()


def generator_for(caller: str, model: StnModel, given: Any) -> torch.Generator:
    """Where perturbations are drawn from: as given, or one of its own that torch.manual_seed decides about."""
    device = model.hparams.unconstrained.device
    if given is None:
        return torch.Generator(device).manual_seed(int(torch.randint(2**62, ())))
    (generator,) = arguments.check_generators(caller, given)
    if generator.device.type != device.type:
        raise ValueError(
            f"{caller}: generator must be on the device of the model, {device}; got one on {generator.device}."
        )
    return generator


def made_optimizer(caller: str, name: str, factory: Any, params: list[nn.Parameter]) -> Optimizer:
    """The optimizer that ``factory`` makes of ``params``."""
    if isinstance(factory, Optimizer) or not callable(factory):
        raise TypeError(
            f"{caller}: {name} must be a function of the parameters; got {_lists.value_name(factory)}."
            " Pass `lambda params: torch.optim.SGD(params, lr=0.01)`."
        )
    if not params:
        raise ValueError(f"{caller}: {name} must have parameters to train; got none that requires grad.")
    optimizer: Optimizer = factory(params)
    arguments.check_optimizer(caller, name, optimizer, (f"the parameters that {name} was given", params))
    if arguments.needs_closure(optimizer):
        raise ValueError(f"{caller}: {name} must step without a closure; got {type(optimizer).__name__}.")
    return optimizer


def made_schedulers(caller: str, pairs: Iterable[tuple[Optimizer, Any]]) -> list[Any]:
    """What each factory makes of its optimizer; None makes nothing."""
    found = [factory(optimizer) for optimizer, factory in pairs if factory is not None]
    for scheduler in found:
        if not all(callable(getattr(scheduler, name, None)) for name in ("step", "state_dict", "load_state_dict")):
            raise TypeError(
                f"{caller}: scheduler must make a torch scheduler of an optimizer; got {_lists.value_name(scheduler)}."
            )
    return found


def check_evaluation(caller: str, epoch: int, loss: float) -> None:
    if not math.isfinite(loss):
        raise TrainerDiverged(
            f"{caller}: the validation loss after epoch {epoch} must be finite; got {loss}."
            " Lower the learning rates, or set max_norm."
        )


# ---- states: each raises ValueError, with the place and the rule, before anything is changed -------------------------


def check_state(state: Any, like: Mapping[str, Any], optimizers: Mapping[str, Optimizer]) -> None:
    """Requires of ``state`` the structure of ``like``, the state of this trainer, and its options."""
    arguments.check_keys("it", state, set(like))
    for name in ("epoch", "step_count", "since_valid"):
        arguments.check_saved_count(name, state[name])
    _check_tensors("model", state["model"], like["model"])
    _check_options(state["options"], like["options"])
    best = state["best_epoch"]
    if best is not None and (type(best) is not int or not 0 < best <= len(state["history"])):
        raise ValueError(f"best_epoch must be an epoch of the history; got {best!r}"[:120])
    if (best is None) != (state["best_state"] is None):
        raise ValueError("best_state must be there if and only if best_epoch is")
    if best is not None:
        _check_tensors("best_state", state["best_state"], like["model"])
    arguments.check_keys("optimizers", state["optimizers"], set(optimizers))
    for name, optimizer in optimizers.items():
        arguments.check_saved_optimizer(name, state["optimizers"][name], optimizer)
    schedulers = state["schedulers"]
    if not isinstance(schedulers, list) or len(schedulers) != len(like["schedulers"]):
        raise ValueError(f"schedulers must be a list of {len(like['schedulers'])}")
    if not isinstance(state["history"], list) or len(state["history"]) != state["epoch"]:
        raise ValueError("history must be a list of a record for each epoch")
    fields = {"epoch", "step", "losses", "valid", "test", "values", "scales", "seconds"}
    for i, record in enumerate(state["history"]):
        arguments.check_keys(f"history[{i}]", record, fields)
    if not isinstance(state["sums"], dict) or type(state["seconds"]) is not float:
        raise ValueError("sums must be a dict, and seconds a number")


def _check_options(saved: Any, current: Mapping[str, Any]) -> None:
    arguments.check_keys("options", saved, set(current))
    for name, value in current.items():
        if saved[name] != value:
            got = repr(saved[name])[:40]
            raise ValueError(f"it was made with {name} {got}, and this trainer has {value}. Resume with {name} {got}")


def _check_tensors(name: str, saved: Any, like: Mapping[str, Any]) -> None:
    arguments.check_keys(name, saved, set(like))
    for key, other in like.items():
        if isinstance(other, Tensor):
            arguments.check_saved_tensors(f"{name}[{key!r}]", [saved[key]], [other])
