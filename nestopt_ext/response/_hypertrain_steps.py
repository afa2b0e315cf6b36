"""One step of a hypernetwork on the training loss, and one of the hyperparameters on the validation loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import _lists
from ..hypergrad import _loop_arguments as arguments
from ..hypergrad._batches import Batches
from ..hypergrad.loop import LoopDiverged
from ._sample import Sample, using_sample
from .hyper_parameters import HyperParameters
from .hypernetwork import Hypernetwork

#: An optimizer, what makes one of the tensors it is to step, or None for that of the source.
OptimizerArgument: TypeAlias = Optimizer | Callable[[list[Tensor]], Optimizer] | None
#: An iterable that begins anew when it ends, or a function that returns the next batch.
BatchSource: TypeAlias = Iterable[Any] | Callable[[], Any]


class Point:
    """The hyperparameters as the losses see them: a vector, or named values in natural units."""

    def __init__(self, caller: str, hypernet: Any, hparams: Any) -> None:
        if not isinstance(hypernet, Hypernetwork):
            raise TypeError(f"{caller}: hypernet must be a Hypernetwork; got {_lists.value_name(hypernet)}.")
        self.named = hparams if isinstance(hparams, HyperParameters) else None
        h = hparams.unconstrained if isinstance(hparams, HyperParameters) else hparams
        if not isinstance(h, Tensor):
            raise TypeError(f"{caller}: hparams must be a Tensor or HyperParameters; got {_lists.value_name(h)}.")
        like = hypernet.output.bias.new_empty(()).expand(hypernet.num_hparams)
        _lists.check_like(caller, ["hparams"], [h], [like])
        if not h.is_leaf or not h.requires_grad:
            raise ValueError(
                f"{caller}: hparams must be a leaf that requires grad; got another. Call .requires_grad_()."
            )
        self.vector = h

    def now(self) -> Tensor | dict[str, Tensor]:
        """The current values, copied to the CPU."""
        values = self._seen(self.vector.detach())
        if isinstance(values, Tensor):
            return values.to("cpu", copy=True)
        return {name: value.to("cpu", copy=True) for name, value in values.items()}

    def evaluate(self, loss: Callable[..., Any], params: dict[str, Tensor], h: Tensor, batch: tuple[Any, ...]) -> Any:
        """``loss`` at one point, within the sample that dropouts and augmentations of this room read."""
        values = self._seen(h)
        if isinstance(values, Tensor):
            return loss(params, values, *batch)
        with using_sample(Sample(None, {name: value.detach().unsqueeze(0) for name, value in values.items()})):
            return loss(params, values, *batch)

    def _seen(self, h: Tensor) -> Tensor | dict[str, Tensor]:
        return h if self.named is None else self.named.natural(h)


@dataclass(frozen=True)
class Level:
    """One of the two levels: a loss, its batches, what is moved along its gradient, and the optimizer of that."""

    caller: str
    loss_name: str
    loss: Callable[..., Any]
    next_batch: Callable[[], Any] | None
    moved: list[Tensor]
    optimizer_name: str
    optimizer: Optimizer

    def batch(self) -> tuple[Any, ...]:
        """What the loss gets besides params and h."""
        return () if self.next_batch is None else (self.next_batch(),)

    def checked(self, loss: Any) -> Tensor:
        """``loss`` as a scalar."""
        if not isinstance(loss, Tensor):
            raise TypeError(f"{self.caller}: {self.loss_name} must return a Tensor; got {_lists.value_name(loss)}.")
        if loss.numel() != 1:
            got = _lists.shape_name(loss.shape)
            raise ValueError(f"{self.caller}: {self.loss_name} must return a scalar; got shape {got}. Take its mean.")
        return loss.reshape(())

    def descend(self, loss: Tensor) -> float:
        """Steps along the gradient if it and the loss are finite; returns the loss."""
        grads = torch.autograd.grad(loss, self.moved, allow_unused=True) if loss.requires_grad else [None]
        given = [g for g in grads if g is not None]
        if not given:
            raise ValueError(f"{self.caller}: {self.loss_name} must depend on params; got one with no graph to them.")
        (value,), (norm,) = _lists.to_host([loss, _lists.norm(given)])
        if not math.isfinite(value) or not math.isfinite(norm):
            what = self.loss_name if not math.isfinite(value) else f"the gradient of {self.loss_name}"
            raise LoopDiverged(
                f"{self.caller}: {what} must be finite; got {norm if math.isfinite(value) else value}. The step of"
                f" {self.optimizer_name} was not taken. Lower the learning rates, or look at the loss where the"
                " hyperparameters are."
            )
        for p, g in zip(self.moved, grads, strict=True):
            p.grad = g
        self.optimizer.step()
        return value


def level(
    caller: str,
    side: Literal["train", "valid"],
    loss: Callable[..., Any],
    batches: BatchSource | None,
    moved: tuple[str, Sequence[Tensor]],
    optimizer: OptimizerArgument,
    default: Callable[[list[Tensor]], Optimizer],
) -> Level:
    """Checks what a level is made of; ``moved`` are tensors with what to call them."""
    arguments.check_callable(caller, f"{side}_loss", loss)
    optimizer_name = "optimizer" if side == "train" else "hyper_optimizer"
    made = _made(caller, optimizer_name, optimizer, default, moved)
    next_batch = _next_batch(caller, f"{side}_batches", batches)
    return Level(caller, f"{side}_loss", loss, next_batch, list(moved[1]), optimizer_name, made)


def train(level: Level, hypernet: Hypernetwork, point: Point, points: Tensor, *, vectorize: bool) -> float:
    """One step of the hypernetwork with the points [M, n]; returns the mean loss before it."""
    batch = level.batch()

    def at(params: dict[str, Tensor], h: Tensor) -> Tensor:
        return level.checked(point.evaluate(level.loss, params, h, batch))

    with torch.enable_grad():
        if len(points) == 1:
            loss = at(hypernet(points[0]), points[0])
        elif vectorize:
            loss = _at_once(level.caller, at, hypernet(points), points).mean()
        else:
            loss = torch.stack([at(hypernet(h), h) for h in points]).mean()
        return level.descend(loss)


def _at_once(caller: str, loss: Callable[..., Tensor], params: dict[str, Tensor], points: Tensor) -> Tensor:
    """The loss of each point, [M]."""
    try:
        losses: Tensor = torch.func.vmap(loss, randomness="different")(params, points)
    except RuntimeError as error:
        raise RuntimeError(
            f"{caller}: train_loss must go through torch.func.vmap, all points at once; it raised: {error}"
            " Pass vectorize=False to take them one by one."
        ) from error
    return losses


def tune(level: Level, hypernet: Hypernetwork, point: Point) -> float:
    """One step of the hyperparameters through the hypernetwork; returns the loss before it."""
    with torch.enable_grad():
        h = point.vector
        return level.descend(level.checked(point.evaluate(level.loss, hypernet(h), h, level.batch())))


# ---- arguments ------------------------------------------------------------------------------------------------------


def sampler(caller: str, point: Point, sample: Any) -> Callable[[int], Tensor]:
    """Draws points from the range of the hyperparameters."""
    if sample is None and point.named is None:
        raise TypeError(
            f"{caller}: sample must be given where hparams is a Tensor; got None."
            " Pass a function of a number that returns as many points: lambda count: 1.5**0.5 * torch.randn(count, n)."
        )
    arguments.check_callable(caller, "sample", sample, optional=True)

    def draw(count: int) -> Tensor:
        with torch.no_grad():
            points = point.named.perturbed(count) if sample is None and point.named is not None else sample(count)
        if not isinstance(points, Tensor):
            raise TypeError(f"{caller}: sample must return a Tensor; got {_lists.value_name(points)}.")
        like = point.vector.expand(count, -1)
        _lists.check_like(caller, [f"sample({count})"], [points], [like])
        return points.detach()

    return draw


def neighbours(caller: str, point: Point, sigma: Any) -> Callable[[int], Tensor]:
    """Draws points about the current hyperparameters."""
    h, named = point.vector, point.named
    if sigma is None and named is not None:
        return lambda count: named.perturbed(count).detach()
    scale = torch.as_tensor(0.3 if sigma is None else sigma, device=h.device, dtype=h.dtype).detach()
    if scale.shape not in ((), h.shape):
        raise ValueError(f"{caller}: sigma must be a number or have shape ({len(h)},); got {tuple(scale.shape)}.")
    if not bool((scale.isfinite() & (scale >= 0)).all()):
        raise ValueError(f"{caller}: sigma must be finite and >= 0; got {sigma}.")
    if not bool(scale.any()):
        return lambda count: h.detach().unsqueeze(0)  # more points would be the same one again

    def near(count: int) -> Tensor:
        return torch.addcmul(h.detach(), scale, torch.randn(count, len(h), device=h.device, dtype=h.dtype))

    return near


def _next_batch(caller: str, name: str, batches: Any) -> Callable[[], Any] | None:
    if batches is None or (callable(batches) and not hasattr(batches, "__iter__")):
        return batches  # type: ignore[no-any-return]
    return Batches(caller, name, batches, resumable=False).draw


def _made(
    caller: str,
    name: str,
    given: OptimizerArgument,
    default: Callable[[list[Tensor]], Optimizer],
    owned: tuple[str, Sequence[Tensor]],
) -> Optimizer:
    made = given
    if not isinstance(given, Optimizer):
        make = default if given is None else given
        arguments.check_callable(caller, name, make)
        made = make(list(owned[1]))
    arguments.check_optimizer(caller, name, made, owned)
    assert isinstance(made, Optimizer)
    if arguments.needs_closure(made):
        raise ValueError(f"{caller}: {name} must step without a closure; got {type(made).__name__}.")
    return made
