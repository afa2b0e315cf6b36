"""What the trainers of response models share: the schedule, the validation step, evaluation, state and `fit`."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from .. import _lists
from ..hypergrad import _loop_arguments as arguments
from ..hypergrad._batches import END, Batches
from ..hypergrad._random import RandomStates
from . import _fit
from ._trainer_arguments import (
    batch_dim_of,
    check_batches,
    check_entropy_weight,
    check_evaluation,
    check_examples,
    check_metrics,
    check_model,
    check_regularizers,
    check_state,
    generator_for,
    made_optimizer,
    made_schedulers,
)
from ._trainer_step import buffers_restored, descend, evaluating, frozen
from .model import StnModel

#: (model, batch, carry) -> (outputs, targets, carry); what is carried reaches the next batch.
Forward: TypeAlias = Callable[[StnModel, Any, Any], tuple[Any, Any, Any]]
Criterion: TypeAlias = Callable[[Any, Any], Tensor]
Regularizer: TypeAlias = Callable[[StnModel, Any], Tensor]
OptimizerFactory: TypeAlias = Callable[[list[nn.Parameter]], Optimizer]
SchedulerFactory: TypeAlias = Callable[[Optimizer], Any]


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch was like.

    ``epoch`` counts from 1 and ``step`` training batches since the first one. ``losses`` are means over the steps of
    the epoch: ``train_loss``, ``response_loss`` where the response has an objective of its own, ``hyper_loss`` and
    ``entropy`` of the validation steps. ``valid`` and ``test`` are those of :meth:`ResponseTrainer.evaluate` at the
    end of it. ``values`` and ``scales`` are the hyperparameters then: values in natural units, standard deviations
    of perturbations in unconstrained units. ``seconds`` is the time that all steps so far took, evaluations left out.
    """

    epoch: int
    step: int
    losses: dict[str, float]
    valid: dict[str, float]
    test: dict[str, float]
    values: dict[str, Any]
    scales: dict[str, Any]
    seconds: float

    @property
    def valid_loss(self) -> float:
        """What early stopping looks at."""
        return self.valid["loss"]


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Share of examples whose largest output, along dimension 1, is that of the target class.

    >>> accuracy(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0])).item()
    0.5
    """
    return (outputs.argmax(1) == targets).double().mean()


class ResponseTrainer:
    """The schedule of two optimizations; `StnTrainer` and `DeltaStnTrainer` say what a training step is."""

    def __init__(
        self,
        model: StnModel,
        criterion: Criterion,
        train_batches: Iterable[Any],
        valid_batches: Iterable[Any],
        *,
        valid_criterion: Criterion | None = None,
        test_batches: Iterable[Any] | None = None,
        metrics: Mapping[str, Callable[[Any, Any], Tensor]] | None = None,
        augment: Callable[[Any], Any] | None = None,
        regularizers: Sequence[Regularizer] = (),
        forward: Forward | None = None,
        optimizer: OptimizerFactory | None = None,
        hyper_optimizer: OptimizerFactory | None = None,
        scale_optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
        hyper_scheduler: SchedulerFactory | None = None,
        warmup_epochs: int = 5,
        train_steps: int = 2,
        valid_steps: int = 1,
        entropy_weight: float = 1e-3,
        tune_scales: bool = True,
        max_norm: float | None = None,
        batch_dim: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        caller = self._caller = type(self).__name__
        check_model(caller, model, self._centred)
        for name, function, optional in (
            ("criterion", criterion, False),
            ("valid_criterion", valid_criterion, True),
            ("augment", augment, True),
            ("forward", forward, True),
            ("scheduler", scheduler, True),
            ("hyper_scheduler", hyper_scheduler, True),
        ):
            arguments.check_callable(caller, name, function, optional=optional)
        for name, value, least in (
            ("warmup_epochs", warmup_epochs, 0), ("train_steps", train_steps, 1), ("valid_steps", valid_steps, 0),
        ):  # fmt: skip
            arguments.check_count(caller, name, value, least)
        arguments.check_clip(caller, "max_norm", max_norm)
        check_metrics(caller, metrics or {})
        check_entropy_weight(caller, entropy_weight)
        self.model = model
        self._modules = list(model.modules())  # walking over them takes as long as a small layer
        self._criterion, self._valid_criterion = criterion, valid_criterion or criterion
        self._metrics = dict(metrics or {})
        self._augment, self._regularizers = augment, check_regularizers(caller, regularizers)
        self._forward = forward
        self._warmup_epochs, self._train_steps, self._valid_steps = warmup_epochs, train_steps, valid_steps
        self._entropy_weight, self._tune_scales = float(entropy_weight), tune_scales
        self._max_norm = max_norm
        self._batch_dim = batch_dim_of(caller, model, batch_dim)
        self._train = Batches(caller, "train_batches", train_batches, resumable=False)
        self._valid = Batches(caller, "valid_batches", valid_batches, resumable=False)
        for batches in (self._train, self._valid):
            batches.require_restart()
        self._valid_batches = check_batches(caller, "valid_batches", valid_batches)
        self._test_batches = None if test_batches is None else check_batches(caller, "test_batches", test_batches)
        self._generator = generator_for(caller, model, generator)
        self._random = RandomStates([self._generator, *self._train.generators, *self._valid.generators])
        #: By name: those of the weights, ``hyper_optimizer`` and, where it is apart, ``scale_optimizer``.
        self.optimizers: dict[str, Optimizer] = {}
        self._params: dict[str, list[nn.Parameter]] = {}
        for name, (params, factory) in self._weights(optimizer or sgd).items():
            self._params[name] = [p for p in params if p.requires_grad]
            self.optimizers[name] = made_optimizer(caller, name, factory, self._params[name])
        self._make_hyper_optimizers(hyper_optimizer or self._default_hyper_optimizer, scale_optimizer)
        #: What steps at the end of every epoch; more of torch's schedulers may be appended before the first.
        self.schedulers: list[Any] = made_schedulers(
            caller,
            ((o, scheduler if name in self._params else hyper_scheduler) for name, o in self.optimizers.items()),
        )
        self.epoch = 0
        self.step_count = 0
        self.history: list[EpochRecord] = []
        #: The record of the epoch with the lowest validation loss, and the model's state then.
        self.best: EpochRecord | None = None
        self.best_state: dict[str, Any] | None = None
        self._since_valid = 0
        self._carry: Any = None
        self._valid_carry: Any = None
        self._sums: dict[str, list[float]] = {}
        self._seconds = 0.0
        self._files = _fit.Files()

    #: Whether the model's gates are those of h - h0.
    _centred: bool

    def _weights(self, optimizer: OptimizerFactory) -> dict[str, tuple[Iterable[nn.Parameter], OptimizerFactory]]:
        """What each of the weights' optimizers steps, and what makes it; ``optimizer`` is that of the first one."""
        raise NotImplementedError

    def _default_hyper_optimizer(self, params: list[nn.Parameter]) -> Optimizer:
        raise NotImplementedError

    def _options(self) -> dict[str, Any]:
        """What is neither in the model nor in an optimizer, and decides what a step is."""
        return {
            "warmup_epochs": self._warmup_epochs,
            "train_steps": self._train_steps,
            "valid_steps": self._valid_steps,
            "entropy_weight": self._entropy_weight,
            "tune_scales": self._tune_scales,
            "max_norm": self._max_norm,
            "batch_dim": self._batch_dim,
        }

    def _make_hyper_optimizers(self, hyper: OptimizerFactory, scale: OptimizerFactory | None) -> None:
        hparams = self.model.hparams
        tuned = [hparams.unconstrained]
        if self._tune_scales and scale is not None:
            self.optimizers["scale_optimizer"] = made_optimizer(
                self._caller, "scale_optimizer", scale, [hparams.raw_scale]
            )
        elif self._tune_scales:
            tuned.append(hparams.raw_scale)
        elif scale is not None:
            raise ValueError(
                f"{self._caller}: scale_optimizer must be None where scales are not tuned; got one."
                " Pass tune_scales=True."
            )
        self.optimizers["hyper_optimizer"] = made_optimizer(self._caller, "hyper_optimizer", hyper, tuned)

    # ---- steps ------------------------------------------------------------------------------------------------------

    def train_step(self, batch: Any) -> dict[str, float]:
        """Trains the weights on one batch, by the hyperparameters as they are; returns the losses before it."""
        raise NotImplementedError

    def valid_step(self, batch: Any) -> dict[str, float]:
        r"""Tunes the hyperparameters on one validation batch; returns ``hyper_loss`` and ``entropy`` before it.

        One step of the hyper optimizer, and of that of the scales, on

        .. math:: \frac1B \sum_b L_V(w(h_b')) - \tau \sum_i \log(\sigma_i \sqrt{2 \pi e}), \qquad h_b' = h + \sigma \epsilon_b

        or on :math:`L_V(w(h))` where scales are not tuned. The model is in evaluation mode, inputs are not augmented and
        regularizers are left out, so the one way from the loss to h leads through the gates. No weight moves.
        """  # noqa: E501
        batch = self._on_device(batch)
        hparams = self.model.hparams
        size = self._batch_size(batch)
        h = hparams.perturbed(size, self._generator) if self._tune_scales else hparams.unconstrained.unsqueeze(0)
        with self._evaluating(), frozen(self.model.module.parameters()), self.model.at(h):
            outputs, targets, carry = self._outputs(batch, self._valid_carry)
            loss = self._checked(self._valid_criterion(outputs, targets), "valid_criterion")
            if not loss.requires_grad:  # the entropy has a gradient all the same, and would tune the scales of nothing
                raise ValueError(
                    f"{self._caller}: the validation loss must depend on the hyperparameters; got one without a graph"
                    " to them. Call the layers that respond, instead of reading their weights, and detach nothing."
                )
            entropy = hparams.entropy().to(loss)
            objective = loss - self._entropy_weight * entropy if self._tune_scales else loss
            params = [hparams.unconstrained, *([hparams.raw_scale] if self._tune_scales else [])]
            optimizers = [o for name, o in self.optimizers.items() if name not in self._params]
            descend(self._caller, "the validation loss", objective, params, optimizers)
        self._valid_carry = detached(carry)
        (value,), (nats,) = _lists.to_host([loss, entropy])
        return {"hyper_loss": value, "entropy": nats}

    def _weights_step(self, batch: Any, sample: contextlib.AbstractContextManager[Any]) -> tuple[float, Any]:
        """One step of ``optimizer`` at ``sample``; returns the training loss before it, and what is carried on.

        Its gradient is taken inside of the sample, where checkpointed regions are computed again. What the pass wrote
        to buffers is taken back where the step is refused.
        """
        if not all(module.training for module in self._modules):
            self.model.train()
        with buffers_restored(self._modules, on_failure_only=True), sample:
            loss, carry = self._fitting_loss(batch, self._carry)
            value = self._descend("the training loss", "optimizer", loss)
        return value, detached(carry)

    def _fitting_loss(self, batch: Any, carry: Any) -> tuple[Tensor, Any]:
        """The training loss of a batch with its augmentation and regularizers, for the current sample."""
        outputs, targets, carry = self._outputs(self._augmented(batch), carry)
        loss = self._checked(self._criterion(outputs, targets), "criterion")
        for i, regularizer in enumerate(self._regularizers):
            loss = loss + self._checked(regularizer(self.model, outputs), f"regularizers[{i}]")
        return loss, carry

    def _perturbed(self, batch: Any) -> Tensor:
        """A point of hyperparameter space for each example, without graph."""
        with torch.no_grad():
            return self.model.hparams.perturbed(self._batch_size(batch), self._generator)

    def _descend(self, name: str, optimizer: str, loss: Tensor) -> float:
        params = self._params[optimizer]
        return descend(self._caller, name, loss, params, [self.optimizers[optimizer]], self._max_norm)

    def _outputs(self, batch: Any, carry: Any) -> tuple[Any, Any, Any]:
        if self._forward is not None:
            return self._forward(self.model, batch, carry)
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            got = f"{len(batch)} parts" if isinstance(batch, tuple | list) else type(batch).__name__
            raise TypeError(
                f"{self._caller}: a batch must be a pair (x, y); got {got}. Say in forward=... what to do with it."
            )
        return self.model(batch[0]), batch[1], None

    def _augmented(self, batch: Any) -> Any:
        if self._augment is None:
            return batch
        if not isinstance(batch, tuple | list) or not batch:
            raise TypeError(
                f"{self._caller}: a batch must be a tuple that begins with the inputs, to be augmented; got"
                f" {type(batch).__name__}. Augment in forward=... instead."
            )
        return (self._augment(batch[0]), *batch[1:])

    def _checked(self, loss: Any, name: str) -> Tensor:
        if not isinstance(loss, Tensor) or loss.dim():
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"{self._caller}: {name} must return a scalar Tensor, a mean loss; got {got}.")
        return loss

    def _evaluating(self) -> contextlib.AbstractContextManager[None]:
        """Evaluation mode of the model, and of a criterion that has one."""
        criterion = self._valid_criterion
        return evaluating(self.model, *([criterion] if isinstance(criterion, nn.Module) else []))

    def _on_device(self, batch: Any) -> Any:
        device = self.model.hparams.unconstrained.device
        return pytree.tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), batch)

    def _batch_size(self, batch: Any) -> int:
        for leaf in pytree.tree_leaves(batch):
            if isinstance(leaf, Tensor) and leaf.dim() > self._batch_dim:
                return check_examples(self._caller, leaf.size(self._batch_dim))
        raise ValueError(
            f"{self._caller}: a batch must hold a tensor with a dimension {self._batch_dim}, that of its examples;"
            " got none."
        )

    # ---- going on ---------------------------------------------------------------------------------------------------

    def advance(self) -> EpochRecord | None:
        """Takes the next training step and the validation steps due after it; returns a record at an epoch's end.

        After ``warmup_epochs``, ``valid_steps`` batches of the validation part follow ``train_steps`` of the training
        part. That count goes on over epochs, and the validation part begins anew whenever it ends.

        Raises TrainerDiverged where a loss is not finite.
        """
        started = time.perf_counter()
        batch = self._train.draw_or_end()
        if batch is END:
            return self._end_epoch()
        self._note(self.train_step(batch))
        self.step_count += 1
        if self.epoch >= self._warmup_epochs:
            self._since_valid += 1
        if self._since_valid == self._train_steps:
            self._since_valid = 0
            for _ in range(self._valid_steps):
                self._note(self.valid_step(self._next_valid()))
        self._seconds += time.perf_counter() - started
        return None

    def _next_valid(self) -> Any:
        batch = self._valid.draw_or_end()
        if batch is END:
            self._valid_carry = None
            batch = self._valid.draw_or_end()
        return batch

    def _note(self, losses: Mapping[str, float]) -> None:
        for name, loss in losses.items():
            total = self._sums.setdefault(name, [0.0, 0])
            total[0] += loss
            total[1] += 1

    def _end_epoch(self) -> EpochRecord:
        self.epoch += 1
        self._carry = None
        record = self._record()
        self._sums = {}
        check_evaluation(self._caller, record.epoch, record.valid_loss)
        self.history.append(record)
        if self.best is None or record.valid_loss < self.best.valid_loss:
            self.best = record
            self.best_state = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), dict(self.model.state_dict()))
        self._step_schedulers(record.valid_loss)
        return record

    def _step_schedulers(self, valid_loss: float) -> None:
        with warnings.catch_warnings():
            # The hyper optimizer rests during the warm-up, and any does where a run goes on at the end of an epoch.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            for scheduler in self.schedulers:
                if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                    scheduler.step(valid_loss)
                else:
                    scheduler.step()

    def _record(self) -> EpochRecord:
        row = self.model.hparams.record(self.step_count)
        return EpochRecord(
            self.epoch,
            self.step_count,
            {name: total / count for name, (total, count) in self._sums.items()},
            self.evaluate(self._valid_batches),
            {} if self._test_batches is None else self.evaluate(self._test_batches),
            row["values"],
            row["scales"],
            self._seconds,
        )

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Any]) -> dict[str, float]:
        """Mean of ``valid_criterion`` as ``loss``, and of ``metrics``, at the current hyperparameters.

        In evaluation mode, without augmentation and regularizers; a batch weighs as much as it has targets. Random
        numbers are left where they stood. What is carried starts as None.
        """
        sums: dict[str, Tensor] = {}
        weight, carry = 0, None
        before = self._random.get()
        try:
            with self._evaluating(), self.model.at_centre():
                for batch in batches:
                    outputs, targets, carry = self._outputs(self._on_device(batch), carry)
                    size = targets.numel() if isinstance(targets, Tensor) else self._batch_size(batch)
                    check_examples(self._caller, size)
                    found = {"loss": self._checked(self._valid_criterion(outputs, targets), "valid_criterion")}
                    for name, metric in self._metrics.items():
                        found[name] = self._checked(metric(outputs, targets), f"metrics[{name!r}]")
                    for name, value in found.items():
                        term = value.double() * size
                        sums[name] = sums[name] + term if name in sums else term
                    weight += size
        finally:
            self._random.set(before)
        if not weight:
            raise ValueError(f"{self._caller}.evaluate: batches must hold at least one target; got none.")
        return {name: value.item() / weight for name, value in sums.items()}

    def fit(
        self,
        epochs: int,
        *,
        output: str | PathLike[str] | None = None,
        resume: bool = False,
        patience: int | None = None,
        should_stop: Callable[[], bool] | None = None,
        on_epoch: Callable[[EpochRecord], Any] | None = None,
        checkpoint_every: int = 1,
        progress: bool = True,
    ) -> _fit.FitResult:
        """Trains and tunes until ``epochs`` epochs are done in all, those of earlier calls included.

        Args:
            epochs: how many.
            output: a folder, made if need be: ``log.jsonl`` gets a line for every epoch, the fields of its record;
                ``checkpoint.pt`` holds everything that the run depends on, and ``best.pt`` the state of the model at
                its lowest validation loss, for ``model.load_state_dict``. Files are replaced atomically, and hold
                nothing that executes.
            resume: continue from ``checkpoint.pt`` where it is there. The run is then the uninterrupted one bit for
                bit, on one machine.
            patience: stop after so many epochs without a lower validation loss; None for never.
            should_stop: asked after every training batch; True ends the run there, saved, within the epoch.
            on_epoch: called with the record of every epoch, after it was saved.
            checkpoint_every: epochs between two checkpoints; there is one at the end in any case.
            progress: shows a bar where stderr is a terminal.

        The first Ctrl-C ends the run after the step, saved; the second acts at once. The model is left as the last
        step made it: see :meth:`load_best`.

        Raises TrainerDiverged where a loss is not finite (the last checkpoint stays), RuntimeError where ``output``
        holds another run and ``resume`` is False, CheckpointError where a file is damaged or does not fit.
        """
        if 0 < epochs <= self._warmup_epochs:
            warnings.warn(
                f"{self._caller}.fit: epochs must be more than warmup_epochs={self._warmup_epochs} for hyperparameters"
                f" to move; got {epochs}. They stay where they are.",
                RuntimeWarning,
                stacklevel=2,
            )
        if output is not None:
            self._train.require_position()
        plan = _fit.Plan(self._caller, epochs, output, resume, patience, should_stop, on_epoch, checkpoint_every)
        return _fit.run(self, self._files, plan, progress)

    def load_best(self) -> None:
        """Puts the model back to the epoch with the lowest validation loss. RuntimeError before the first one."""
        if self.best_state is None:
            raise RuntimeError(f"{self._caller}.load_best: must come after an epoch; got none so far.")
        self.model.load_state_dict(self.best_state)

    # ---- saving -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that later steps depend on: tensors (not copies), numbers, text, lists and dicts.

        Raises ValueError where ``train_batches`` is a DataLoader with ``persistent_workers=True``, whose place in an
        epoch cannot be found again.
        """
        self._train.require_position()
        state = {
            "options": self._options(),
            "epoch": self.epoch,
            "step_count": self.step_count,
            "since_valid": self._since_valid,
            "seconds": self._seconds,
            "sums": {name: list(total) for name, total in self._sums.items()},
            "history": [asdict(record) for record in self.history],
            "best_epoch": None if self.best is None else self.best.epoch,
            "best_state": self.best_state,
            "model": dict(self.model.state_dict()),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "carry": self._carry,
            "valid_carry": self._valid_carry,
            "random": self._random.get(),
            "train_batches": self._train.state_dict(),
            "valid_batches": self._valid.state_dict(),
        }
        for name in ("carry", "valid_carry", "model", "schedulers", "optimizers"):
            arguments.check_plain(self._caller, name, state[name])
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave, also the random numbers.

        Raises ValueError, and changes nothing, where it does not fit, or was made with other options than those of this
        trainer: schedule, ``entropy_weight``, ``tune_scales``, ``max_norm``, ``batch_dim``, ``linearize``.
        """
        try:
            check_state(state, self.state_dict(), self.optimizers)
            self._train.check(state["train_batches"])
            self._valid.check(state["valid_batches"])
            self._random.check("random", state["random"])
        except ValueError as error:
            raise ValueError(f"{self._caller}: state_dict does not fit: {error}.") from error
        self.model.load_state_dict(state["model"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        for scheduler, saved in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        self.epoch, self.step_count = state["epoch"], state["step_count"]
        self._since_valid, self._seconds = state["since_valid"], state["seconds"]
        self._sums = {name: list(total) for name, total in state["sums"].items()}
        self.history = [EpochRecord(**record) for record in state["history"]]
        self.best = None if state["best_epoch"] is None else self.history[state["best_epoch"] - 1]
        self.best_state = self._copied(state["best_state"])
        self._carry, self._valid_carry = self._copied(state["carry"]), self._copied(state["valid_carry"])
        self._train.load_state_dict(state["train_batches"])
        self._valid.load_state_dict(state["valid_batches"])
        self._random.set(state["random"])

    def _copied(self, value: Any) -> Any:
        """The same with tensors of its own, on the model's device."""
        device = self.model.hparams.unconstrained.device
        return pytree.tree_map_only(Tensor, lambda t: t.detach().to(device, copy=True), value)


def sgd(params: list[nn.Parameter]) -> Optimizer:
    """What trains weights where no optimizer is given."""
    return torch.optim.SGD(params, lr=0.01, momentum=0.9)


def detached(carry: Any) -> Any:
    """The same without graph."""
    return None if carry is None else pytree.tree_map_only(Tensor, Tensor.detach, carry)
