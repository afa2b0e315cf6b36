"""The loop around the hypergradient: inner steps on the params, then an outer step on the hyperparameters."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import _checkpoint, _lists
from .._checkpoint import CheckpointError
from .._json_log import JsonLog
from .._progress import ProgressBar
from .._types import MatVec, TensorList, Tensors
from ..curvature._evaluation import evaluate
from ..solvers import Neumann, Solver, Status
from ..solvers._solve import check_solver
from . import _loop_arguments as arguments
from ._batches import Batches
from ._interrupt import DeferredInterrupt
from ._problem import Variables
from ._random import RandomStates, States
from .hypergradient import ImplicitGradient, implicit_gradient

_CALLER = "BilevelLoop"
_CHECKPOINT_VERSION = 1


class LoopDiverged(RuntimeError):
    """A loss or gradient of a :class:`BilevelLoop` is not finite; the step that would have used it was not taken."""


@dataclass(frozen=True)
class LoopRecord:
    """What one outer step was like.

    ``step`` counts from 1. ``inner_loss`` and ``inner_grad_norm`` are those before the last of its inner steps, and
    ``outer_loss`` and ``hypergrad_norm`` those before its outer step, None during the warm-up; norms are Euclidean over
    all tensors, before clipping. ``status`` is how the solve ended and ``num_products`` what it took, None and 0 where
    there was none. ``seconds`` is the time that the step took.
    """

    step: int
    inner_loss: float
    inner_grad_norm: float
    outer_loss: float | None
    hypergrad_norm: float | None
    status: Status | None
    num_products: int
    seconds: float


@dataclass(frozen=True)
class _OuterStep:
    """The part of a record that only a step on the hyperparameters has."""

    outer_loss: float | None = None
    hypergrad_norm: float | None = None
    status: Status | None = None
    num_products: int = 0


class BilevelLoop:
    r"""Tunes ``hparams`` while ``params`` are trained: ``inner_steps`` steps of ``inner_optimizer`` on ``inner_loss``,
    one of ``outer_optimizer`` along the hypergradient of ``outer_loss``, and again.

    .. math:: w \leftarrow \text{inner}(w, \partial L_T / \partial w) \quad \text{N times}, \qquad
              \lambda \leftarrow \text{outer}(\lambda, dL_V / d\lambda)

    The hypergradient is that of :func:`hypergradient` at the params as they are. They follow the inner optimum without
    reaching it, so it is approximate; more ``inner_steps`` and a lower outer learning rate bring it closer.

    Args:
        outer_loss: the validation loss: a function of a batch where ``outer_batches`` are given, of nothing otherwise,
            that returns a scalar with a graph, computed from the very tensors in ``params`` and ``hparams``.
        inner_loss: the training loss, likewise, with ``inner_batches``.
        params: what is trained: a Tensor, list, tuple or dict of leaf tensors that require grad, or
            ``model.parameters()`` where all of them do.
        hparams: what is tuned: leaf tensors likewise, of any number and shape; none of them in ``params``.
        inner_optimizer: any ``torch.optim.Optimizer`` that holds the params and nothing else that requires grad, in
            any number of groups. One whose step needs a closure, LBFGS, gets one.
        outer_optimizer: one that holds the hparams, likewise, and steps without a closure.
        inner_steps: N, inner steps for each outer one.
        solver: of the inverse product, :class:`Neumann` or :class:`Identity` (K = 0, T1-T2) for instance.
        curvature: None for the Hessian of the inner loss, or a function that makes the operator anew for each
            hypergradient, of the inner batch where there are batches: ``lambda batch: GaussNewton(model, criterion,
            *batch)``.
        inner_batches, outer_batches: a DataLoader, a list, or another iterable that begins anew when it ends. Each
            inner step and each hypergradient takes one; samplers with ``set_epoch`` are told the epoch.
        warmup: outer steps at the beginning in which only the params move.
        warm_start: the solution of a solve is where the next one begins, at the price of one more product. It pays
            where outer steps are small and batches are large. A solution that cannot be trusted is not begun from.
        clip_inner, clip_outer: largest Euclidean norm of a gradient of all params, and of a hypergradient; a longer one
            is scaled down. None for no bound.
        project: called after every outer step, without grad mode, to bring the hparams back into their range in place.
        callbacks: functions of the loop and a :class:`LoopRecord`, called after every outer step; one that returns True
            ends the run. A scheduler steps in one.
        stateful: what else changes as the loop goes on, anything with ``state_dict()`` and ``load_state_dict()``: the
            model, for its running statistics, schedulers, early stopping. It is saved with the loop.
        generators: each ``torch.Generator`` that the losses draw from, besides the global ones.
        log: path of a file that gets a line of JSON for every outer step, the fields of its record, with ``event``.
        checkpoint: path of a file that the loop is saved to, before the first step, every ``checkpoint_every`` outer
            steps, and when a run ends or is interrupted. It is replaced atomically, and holds nothing that executes.
        progress: shows a bar where stderr is a terminal.

    ``step_count`` is the number of outer steps taken, ``num_failed_solves`` of how many the solve cannot be trusted (it
    diverged, broke down or met negative curvature): that is counted and recorded, and not warned of.

    The inner gradient is taken in the params alone, so nothing is added to the ``.grad`` of hparams; that holds the
    last hypergradient, clipped, and the ``.grad`` of params the last inner gradient. During a hypergradient params and
    buffers are put back bit for bit, as in :func:`hypergradient`: batch statistics are those of training alone. Random
    numbers go on as if both losses had been computed once, so that a dropout mask is the same within one hypergradient
    and another in the next. The device is waited for once in each inner step, to look at the loss before it is used.

    A run that is continued (see :meth:`resume`) takes the steps of an uninterrupted one bit for bit on one machine:
    params, hparams, optimizers, ``stateful``, the global random numbers of CPU and CUDA, ``generators``, and the
    position in the batches are saved. To find that, the epoch is begun again from the random state it began with, that
    of the loader's own generators included, and the batches that were taken are skipped; so an iterable must fix its
    order when it begins, as a DataLoader does, or have a ``state_dict`` of its own. Buffers of a model that is not in
    ``stateful``, and the generators of ``random`` and ``numpy``, are not saved.

    The first Ctrl-C during :meth:`run` ends it after the step, saved; the second acts at once. After an exception in
    the middle of a step the last checkpoint stays as it is.

    Raises TypeError or ValueError for bad arguments, before anything is modified; RuntimeError where ``log`` or
    ``checkpoint`` is there already and was not resumed; :class:`LoopDiverged` when a loss or a gradient is not finite,
    before the step that would use it; CheckpointError, a RuntimeError, when the disk refuses.

    Source: Lorraine, Vicol, Duvenaud, Optimizing millions of hyperparameters by implicit differentiation (2020),
    algorithm 1. Here both kinds of steps are those of any optimizer, and the solve may begin where the last one ended.

    >>> import torch
    >>> from nestopt_ext.solvers import Identity
    >>> w = torch.tensor(0.0, requires_grad=True)            # minimizes w^2 - 3 h w, so w = 1.5 h
    >>> h = torch.tensor(1.0, requires_grad=True)
    >>> loop = BilevelLoop(
    ...     lambda: 0.5 * w**2, lambda: w**2 - 3 * h * w, w, h,
    ...     torch.optim.SGD([w], lr=0.5), torch.optim.SGD([h], lr=0.2), solver=Identity(alpha=0.5))
    >>> first, second = loop.run(2)                          # h - 0.2 * 1.5^2 h, twice
    >>> w.item(), h.item(), round(second.hypergrad_norm, 4)
    (0.8250000476837158, 0.3024999797344208, 1.2375)
    """

    def __init__(
        self,
        outer_loss: Callable[..., Tensor],
        inner_loss: Callable[..., Tensor],
        params: Tensors | Iterable[Tensor],
        hparams: Tensors | Iterable[Tensor],
        inner_optimizer: Optimizer,
        outer_optimizer: Optimizer,
        *,
        inner_steps: int = 1,
        solver: Solver = Neumann(),  # noqa: B008  a frozen value
        curvature: Callable[..., MatVec] | None = None,
        inner_batches: Iterable[Any] | None = None,
        outer_batches: Iterable[Any] | None = None,
        warmup: int = 0,
        warm_start: bool = False,
        clip_inner: float | None = None,
        clip_outer: float | None = None,
        project: Callable[[], Any] | None = None,
        callbacks: Sequence[Callable[[BilevelLoop, LoopRecord], Any]] | Callable[[BilevelLoop, LoopRecord], Any] = (),
        stateful: Any = (),
        generators: Sequence[torch.Generator] | torch.Generator = (),
        log: str | PathLike[str] | None = None,
        checkpoint: str | PathLike[str] | None = None,
        checkpoint_every: int = 100,
        progress: bool = True,
    ) -> None:
        arguments.check_callable(_CALLER, "outer_loss", outer_loss)
        arguments.check_callable(_CALLER, "inner_loss", inner_loss)
        arguments.check_callable(_CALLER, "curvature", curvature, optional=True)
        arguments.check_callable(_CALLER, "project", project, optional=True)
        check_solver(_CALLER, solver)
        for name, value, least in (
            ("inner_steps", inner_steps, 1),
            ("warmup", warmup, 0),
            ("checkpoint_every", checkpoint_every, 1),
        ):
            arguments.check_count(_CALLER, name, value, least)
        arguments.check_clip(_CALLER, "clip_inner", clip_inner)
        arguments.check_clip(_CALLER, "clip_outer", clip_outer)
        self._variables = _checked_variables(params, hparams)
        own = self._variables
        arguments.check_optimizer(_CALLER, "inner_optimizer", inner_optimizer, ("params", own.params))
        arguments.check_optimizer(_CALLER, "outer_optimizer", outer_optimizer, ("hparams", own.hparams))
        if arguments.needs_closure(outer_optimizer):
            raise ValueError(
                f"{_CALLER}: outer_optimizer must step without a closure; got {type(outer_optimizer).__name__}."
            )
        self.inner_optimizer = inner_optimizer
        self.outer_optimizer = outer_optimizer
        self.step_count = 0
        self.num_failed_solves = 0
        self._outer_loss, self._inner_loss = outer_loss, inner_loss
        self._inner_needs_closure = arguments.needs_closure(inner_optimizer)
        self._inner_steps = inner_steps
        self._solver = solver
        self._curvature = curvature
        self._warmup = warmup
        self._warm_start = warm_start
        self._start: TensorList | None = None
        self._clip_inner, self._clip_outer = clip_inner, clip_outer
        self._project = project
        self._callbacks = arguments.check_callbacks(_CALLER, callbacks)
        self._stateful = arguments.check_stateful(_CALLER, stateful)
        self._log_path = None if log is None else Path(log)
        self._checkpoint_path = None if checkpoint is None else Path(checkpoint)
        self._checkpoint_every = checkpoint_every
        self._inner_batches = self._batches("inner_batches", inner_batches)
        self._outer_batches = self._batches("outer_batches", outer_batches)
        own_generators = arguments.check_generators(_CALLER, generators)
        sources = [b for b in (self._inner_batches, self._outer_batches) if b is not None]
        self._random = RandomStates([*own_generators, *(g for source in sources for g in source.generators)])
        self._progress = progress
        self._log: JsonLog | None = None
        self._log_bytes = 0
        self._begun = False
        self._stopping = False
        self._saved_at: int | None = None

    # ---- going on ---------------------------------------------------------------------------------------------------

    def run(self, num_steps: int) -> list[LoopRecord]:
        """Takes ``num_steps`` more outer steps, fewer where a callback ends the run, and returns their records.

        ``loop.run(total - loop.step_count)`` completes a run that may have been resumed.
        """
        arguments.check_count(_CALLER, "num_steps", num_steps, 0)
        self._stopping = False
        records: list[LoopRecord] = []
        with DeferredInterrupt() as interrupt, self._open_log():
            bar = ProgressBar(num_steps, shown=self._progress)
            try:
                while len(records) < num_steps and not self._stopping:
                    record = self.step()
                    records.append(record)
                    bar.advance(1, "" if record.outer_loss is None else f"outer loss {record.outer_loss:.4g}")
                    if interrupt.asked:
                        self._save_now()
                        raise KeyboardInterrupt
                if records:
                    self._save_now()
            finally:
                bar.close()
        return records

    def step(self) -> LoopRecord:
        """Takes one outer step, tells log and callbacks of it, and returns its record."""
        with self._open_log():
            started = time.perf_counter()
            for inner_step in range(self._inner_steps):
                inner_loss, inner_norm = self._inner_step(inner_step)
            outer = self._outer_step() if self.step_count >= self._warmup else _OuterStep()
            self.step_count += 1
            seconds = time.perf_counter() - started
            record = LoopRecord(self.step_count, inner_loss, inner_norm, **vars(outer), seconds=seconds)
            self.log_event("step", **{**asdict(record), "status": record.status and record.status.name})
            self._call_back(record)
            if self.step_count % self._checkpoint_every == 0:
                self._save_now()
        return record

    def stop(self) -> None:
        """Ends the run after the step in progress."""
        self._stopping = True

    def log_event(self, event: str, **values: Any) -> None:
        """Adds a line of JSON to the log, where there is one: ``event`` and ``values``, with null for NaN and Inf."""
        with self._open_log():
            if self._log is not None:
                self._log.write(event, **values)
                self._log_bytes = self._log.position

    def _inner_step(self, number: int) -> tuple[float, float]:
        """One step of the inner optimizer; returns the loss and the norm of the gradient before it."""
        batch = None if self._inner_batches is None else self._inner_batches.draw()
        found: list[tuple[float, float]] = []

        def gradient() -> Tensor:
            with torch.enable_grad():
                loss = evaluate(_CALLER, "inner_loss", _value(self._inner_loss, self._inner_batches, batch)).loss
                grads = torch.autograd.grad(loss, self._variables.params, allow_unused=True)
            given = [g for g in grads if g is not None]
            if not given:
                raise ValueError(f"{_CALLER}: inner_loss must depend on params; got a graph that none of them is in.")
            norm = _lists.norm(given)
            (value,), (length,) = _lists.to_host([loss, norm])
            if not math.isfinite(value) or not math.isfinite(length):
                what = "inner_loss" if not math.isfinite(value) else "the gradient of inner_loss"
                raise LoopDiverged(
                    f"{_CALLER}: {what} must be finite; got {length if math.isfinite(value) else value} in inner step"
                    f" {number + 1} of outer step {self.step_count + 1}, which was not taken."
                    " Lower the learning rate of inner_optimizer, or set clip_inner."
                )
            for p, g in zip(self._variables.params, grads, strict=True):
                p.grad = g
            _clip(self._variables.params, self._clip_inner, norm)
            found.append((value, length))
            return loss.detach()

        if self._inner_needs_closure:
            self.inner_optimizer.step(gradient)  # type: ignore[arg-type]
        else:
            gradient()
            self.inner_optimizer.step()
        return found[0]

    def _outer_step(self) -> _OuterStep:
        found = self._hypergradient()
        norm = _lists.norm(found.grads)
        (outer_loss,), (length,) = _lists.to_host([found.outer_loss, norm])
        status = None if found.solve is None else found.solve.verdict.status
        if not math.isfinite(outer_loss) or not math.isfinite(length):
            what = "outer_loss" if not math.isfinite(outer_loss) else "the hypergradient"
            raise LoopDiverged(
                f"{_CALLER}: {what} must be finite; got {length if math.isfinite(outer_loss) else outer_loss} in outer"
                f" step {self.step_count + 1}, whose hparams were not changed (solve:"
                f" {'none' if status is None else status.name}). Lower the learning rates, or alpha of the solver, or"
                " raise its damping."
            )
        failed = found.solve is not None and found.solve.verdict.is_trouble
        self.num_failed_solves += failed
        if self._warm_start and found.solve is not None:
            self._start = None if failed else found.solve.value
        for h, g in zip(self._variables.hparams, found.grads, strict=True):
            h.grad = g
        _clip(self._variables.hparams, self._clip_outer, norm)
        self.outer_optimizer.step()
        if self._project is not None:
            with torch.no_grad():
                self._project()
        return _OuterStep(outer_loss, length, status, 0 if found.solve is None else found.solve.num_products)

    def _hypergradient(self) -> ImplicitGradient:
        """The hypergradient on the next batches; random numbers go on as if both losses had been computed once.

        The hypergradient itself puts them back, so that a loss alone in drawing some would always draw the same.
        """
        outer_batch = None if self._outer_batches is None else self._outer_batches.draw()
        inner_batch = None if self._inner_batches is None else self._inner_batches.draw()
        before = self._random.get()
        left_at: list[States] = []

        def outer() -> Tensor:
            loss: Tensor = _value(self._outer_loss, self._outer_batches, outer_batch)
            left_at.append(self._random.get())
            return loss

        def curvature() -> MatVec | None:
            if self._curvature is None:
                return None
            self._random.set(left_at[0])  # what the inner loss will draw, dropout masks, the operator draws too
            operator: MatVec = _value(self._curvature, self._inner_batches, inner_batch)
            return operator

        def inner() -> Tensor:
            self._random.set(left_at[0])
            loss: Tensor = _value(self._inner_loss, self._inner_batches, inner_batch)
            left_at.append(self._random.get())
            return loss

        try:
            found = implicit_gradient(self._variables, outer, inner, self._solver, curvature, start=self._start)
        except BaseException:
            self._random.set(before)
            raise
        self._random.set(left_at[1])
        return found

    def _call_back(self, record: LoopRecord) -> None:
        """Calls all callbacks, so that the step is whole and can be saved even where one of them raises."""
        failures = [self._failure_of(callback, record) for callback in self._callbacks]
        for failure in failures:
            if failure is not None:
                self._save_now()
                raise failure

    def _failure_of(self, callback: Callable[[BilevelLoop, LoopRecord], Any], record: LoopRecord) -> Any:
        """What ``callback`` raises, or None."""
        try:
            if callback(self, record) is True:
                self.stop()
        except BaseException as error:
            return error
        return None

    # ---- saving -----------------------------------------------------------------------------------------------------

    def resume(self) -> bool:
        """Continues from the checkpoint, if it is there; returns whether it is.

        To be called before the first step, on a loop made as the saved one was. Lines that the log got after the
        checkpoint are cut off.

        Raises ValueError without a ``checkpoint``, RuntimeError after the first step, CheckpointError when the file is
        damaged or does not fit, and OSError when the log has lost lines. What belongs to the loop itself is checked
        before anything is changed; what is in ``stateful`` checks its own part.
        """
        if self._checkpoint_path is None:
            raise ValueError(f"{_CALLER}: checkpoint must be given to resume; got None.")
        if self._begun:
            raise RuntimeError(f"{_CALLER}: resume() must come before the first step; got {self.step_count} steps.")
        if not self._checkpoint_path.exists():
            return False
        file = _checkpoint.load(self._checkpoint_path, _CHECKPOINT_VERSION)
        try:
            arguments.check_keys("it", file, {"version", "loop", "log_bytes"})
            if file["log_bytes"] is not None:
                arguments.check_saved_count("log_bytes", file["log_bytes"])
            self._check_state(file["loop"])
        except ValueError as error:
            raise CheckpointError(f"{self._checkpoint_path}: does not fit this loop: {error}.") from error
        if self._log_path is not None:
            if file["log_bytes"] is None:
                self._require_absent(self._log_path)
            JsonLog.require(self._log_path, file["log_bytes"] or 0)
            JsonLog.require_whole_lines(self._log_path, file["log_bytes"] or 0)
        try:
            self.load_state_dict(file["loop"])
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            cause = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{self._checkpoint_path}: does not fit this loop: {cause}") from error
        self._log_bytes = file["log_bytes"] or 0
        JsonLog(self._log_path, self._log_bytes).close()
        self._begun = True
        self._saved_at = self.step_count
        return True

    def save(self, path: str | PathLike[str]) -> None:
        """Saves the loop to ``path`` atomically, for the ``checkpoint`` of another loop to resume from.

        Raises CheckpointError when the disk refuses, and TypeError when something in ``stateful`` cannot be saved.
        """
        if self._log is not None:
            self._log.sync()
        elif self._log_path is not None and self._log_bytes:
            with JsonLog(self._log_path, self._log_bytes) as log:
                log.sync()
        log_bytes = None if self._log_path is None else self._log_bytes
        _checkpoint.save(
            Path(path), {"version": _CHECKPOINT_VERSION, "log_bytes": log_bytes, "loop": self.state_dict()}
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that later steps depend on: tensors (not copies), numbers, text, lists and dicts."""
        stateful = [item.state_dict() for item in self._stateful]
        for i, state in enumerate(stateful):
            arguments.check_plain(_CALLER, f"stateful[{i}].state_dict()", state)
        return {
            "step_count": self.step_count,
            "num_failed_solves": self.num_failed_solves,
            "params": [p.detach() for p in self._variables.params],
            "hparams": [h.detach() for h in self._variables.hparams],
            "inner_optimizer": self.inner_optimizer.state_dict(),
            "outer_optimizer": self.outer_optimizer.state_dict(),
            "start": [] if self._start is None else self._start,
            "stateful": stateful,
            "random": self._random.get(),
            "inner_batches": None if self._inner_batches is None else self._inner_batches.state_dict(),
            "outer_batches": None if self._outer_batches is None else self._outer_batches.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave, also the random numbers.

        Raises ValueError, and changes nothing, where it does not fit; what is in ``stateful`` checks its own part.
        """
        try:
            self._check_state(state)
        except ValueError as error:
            raise ValueError(f"{_CALLER}: state_dict does not fit: {error}.") from error
        for item, saved in zip(self._stateful, state["stateful"], strict=True):
            item.load_state_dict(saved)
        own = self._variables
        with torch.no_grad():
            for tensor, value in zip((*own.params, *own.hparams), (*state["params"], *state["hparams"]), strict=True):
                tensor.copy_(value)
        self.inner_optimizer.load_state_dict(state["inner_optimizer"])
        self.outer_optimizer.load_state_dict(state["outer_optimizer"])
        pairs = zip(state["start"], own.params, strict=False)
        self._start = [start.to(p.device, copy=True) for start, p in pairs] or None
        for batches, saved in (
            (self._inner_batches, state["inner_batches"]),
            (self._outer_batches, state["outer_batches"]),
        ):
            if batches is not None:
                batches.load_state_dict(saved)
        self._random.set(state["random"])
        self.step_count, self.num_failed_solves = state["step_count"], state["num_failed_solves"]

    def _check_state(self, state: Any) -> None:
        arguments.check_keys("it", state, _STATE_KEYS)
        for name in ("step_count", "num_failed_solves"):
            arguments.check_saved_count(name, state[name])
        own = self._variables
        arguments.check_saved_tensors("params", state["params"], own.params)
        arguments.check_saved_tensors("hparams", state["hparams"], own.hparams)
        if state["start"] != []:
            arguments.check_saved_tensors("start", state["start"], own.params)
        arguments.check_saved_optimizer("inner_optimizer", state["inner_optimizer"], self.inner_optimizer)
        arguments.check_saved_optimizer("outer_optimizer", state["outer_optimizer"], self.outer_optimizer)
        if not isinstance(state["stateful"], list) or len(state["stateful"]) != len(self._stateful):
            raise ValueError(f"stateful must be a list of {len(self._stateful)}")
        self._random.check("random", state["random"])
        for name, batches in (("inner_batches", self._inner_batches), ("outer_batches", self._outer_batches)):
            if batches is not None:
                batches.check(state[name])
            elif state[name] is not None:
                raise ValueError(f"{name} must be given, as in the loop that was saved")

    def _save_now(self) -> None:
        """Brings the checkpoint up to date, where there is one."""
        if self._checkpoint_path is not None and self._saved_at != self.step_count:
            self.save(self._checkpoint_path)
            self._saved_at = self.step_count

    @contextlib.contextmanager
    def _open_log(self) -> Iterator[None]:
        """The files of the loop, begun where they are not; the log is open inside and let go of by the outermost."""
        self._begin()
        if self._log_path is None or self._log is not None:
            yield
            return
        self._log = JsonLog(self._log_path, self._log_bytes)
        try:
            yield
        finally:
            self._log.close()
            self._log = None

    def _begin(self) -> None:
        """Before the first step: nothing that is there is replaced, and there is something to resume from."""
        if self._begun:
            return
        for path in (self._checkpoint_path, self._log_path):
            if path is not None:
                self._require_absent(path)
        self._save_now()
        self._begun = True

    def _require_absent(self, path: Path) -> None:
        if path.exists():
            raise RuntimeError(
                f"{_CALLER}: {path} must not be there when a run begins; got a file. Call resume() before the first"
                " step to continue its run, or give another path."
            )

    def _batches(self, name: str, source: Any) -> Batches | None:
        if source is None:
            return None
        return Batches(_CALLER, name, source, resumable=self._checkpoint_path is not None)


_STATE_KEYS = {
    "step_count", "num_failed_solves", "params", "hparams", "inner_optimizer", "outer_optimizer", "start", "stateful",
    "random", "inner_batches", "outer_batches",
}  # fmt: skip


def _checked_variables(params: Any, hparams: Any) -> Variables:
    """The params and hparams as lists, so that an iterator is read once; all of them leaves that require grad."""
    variables = Variables(_CALLER, params, hparams, all_hparams=True)
    arguments.check_leaves(_CALLER, variables.structure.labels("params"), variables.params)
    arguments.check_leaves(_CALLER, [f"hparams[{i}]" for i in range(len(variables.hparams))], variables.hparams)
    return variables


def _value(function: Callable[..., Any], batches: Batches | None, batch: Any) -> Any:
    return function() if batches is None else function(batch)


def _clip(tensors: TensorList, bound: float | None, norm: Tensor) -> None:
    if bound is not None:
        torch.nn.utils.clip_grads_with_norm_(tensors, bound, norm)
