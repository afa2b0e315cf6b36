"""Hypergradients of the same losses on ever new data, without the overhead of building them anew."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, get_args

from torch import Tensor

from .. import _lists
from .._stack import caller_depth
from .._types import MatVec, Tensors
from ..solvers import Neumann, Solver, Status
from ..solvers._solve import check_solver
from ._batch import Batch, place, surroundings
from ._choice import CaptureMode, Setup, numbers_of
from ._problem import Variables
from ._routes import Reports, Task

_CALLER = "CapturedHypergradient"


class CapturedHypergradient:
    r"""Hypergradients on one batch after the other, by a computation that is set up once and then run again.

    It holds what :func:`hypergradient` is told each time: ``outer_loss(*outer_data)`` and ``inner_loss(*inner_data)``
    return scalar tensors computed from ``params`` and ``hparams`` as they are, over which they close; ``solver`` and
    the structure of ``params`` and ``hparams`` are as there; ``curvature`` is None for the Hessian of ``inner_loss``,
    or a function that is called as ``curvature(*inner_data)`` and returns an operator or a callable. :meth:`step` gives

    .. math:: \frac{dL_V}{d\lambda} = \frac{\partial L_V}{\partial\lambda}
              - \frac{\partial L_V}{\partial w} \, A^{-1} \, \frac{\partial^2 L_T}{\partial w \, \partial\lambda^\top}

    on data, equal to ``hypergradient`` on the same data to rounding, in one of these modes:

    - "eager": by :func:`hypergradient` itself.
    - "cuda-graph": the whole step (both losses, gradients, products, updates, mixed product) is warmed up on a stream
      of its own, captured in one ``torch.cuda.CUDAGraph``, and replayed on memory into which the data are copied: one
      graph launch a step, and no wait for the device. For params, hparams and data on one CUDA device.
    - "recorded": the operators of a step are recorded below autograd, from the data to the mixed product, and run
      again. On the CPU, for float32 and float64, small problems, leaves, and the Hessian as the curvature.
    - "compiled": as recorded, with the product made by ``torch.compile``: takes a C++ compiler and up to minutes.

    "auto" captures on CUDA; on the CPU it times "eager" and "recorded" on the first data and keeps the faster one. A
    mode that cannot be had gives way to "eager", with the reason in ``reason`` and on CUDA one UserWarning; asked for
    by name, it raises RuntimeError with the reason: a loss or solver in which the host reads a value of the device
    (``.item()``, ``ConjugateGradient(check_every=1)``), random numbers drawn on the CPU, tensors on several devices,
    and whatever else CUDA refuses to capture.

    **What is run again is what PyTorch computed.** Python code of the losses runs when a step is set up and not after:
    a counter, a schedule, the training mode of a module and what NumPy computes stay as they were; call :meth:`reset`
    after such a change. Params, hparams and other tensors that the losses read may be written in place from step to
    step (an optimizer step is that). A step is set up anew when the data have other shapes, strides, dtypes, devices or
    constants, when a param or hparam has moved to other memory, and under other autocast or precision settings. The
    last ``max_captures`` set-ups are kept, the one unused for longest is dropped; with "auto", data of a kind that was
    dropped go by "eager" when they come back. The first two steps of each are
    held against :func:`hypergradient`; where they differ by more than rounding, the mode is given up for that reason.

    Random numbers are those of ``hypergradient``: each loss draws from where the global generators, and those handed to
    operators, stand at the step, and leaves them there. On CUDA that works in a graph too, with other numbers at each
    step as the generators go on.

    **No divergence is hidden.** In "cuda-graph" mode the evidence of each solve is sent to the host behind the replay
    and read once it is there, without waiting: by the next steps, or by :meth:`check`, which waits. So the
    RuntimeWarning for a series that diverged may come some steps later, and names its step. Call :meth:`check` when the
    loop ends. In the other modes it comes at once.

    Attributes, of the latest step: ``mode``; ``reason``, why it is "eager", or None; ``timings``, seconds per step of
    the modes that were timed. One step is taken at a time; threads wait for each other.

    Raises TypeError or ValueError for bad arguments, those of ``hypergradient`` at the first step.

    Method: CUDA graph capture of a whole training step, as in ``torch.cuda.graph``, for a step of implicit
    differentiation.

    >>> import torch
    >>> w = torch.tensor(1.5, requires_grad=True)            # minimizes w^2 - 2 x h w, so w = x h
    >>> h = torch.tensor(1.0, requires_grad=True)
    >>> captured = CapturedHypergradient(
    ...     lambda y: 0.5 * (w - y) ** 2, lambda x: w**2 - 2 * x * h * w, w, h, solver=Neumann(num_terms=60, alpha=0.4)
    ... )
    >>> captured.step(torch.tensor(1.5), torch.tensor(0.0))  # (w - y) dw/dh = 1.5 * 1.5
    (tensor(2.2500),)
    >>> captured.step(torch.tensor(1.5), torch.tensor(1.0))  # 0.5 * 1.5
    (tensor(0.7500),)
    >>> captured.check().name
    'max_terms'
    """

    def __init__(
        self,
        outer_loss: Callable[..., Tensor],
        inner_loss: Callable[..., Tensor],
        params: Tensors,
        hparams: Tensors,
        *,
        solver: Solver = Neumann(),  # noqa: B008  a frozen value
        curvature: Callable[..., MatVec] | None = None,
        mode: CaptureMode = "auto",
        max_captures: int = 4,
    ) -> None:
        variables = Variables(_CALLER, params, hparams, all_hparams=True)
        check_solver(_CALLER, solver)
        for name, loss in (("outer_loss", outer_loss), ("inner_loss", inner_loss)):
            if not callable(loss):
                remedy = " Pass the function that computes it from data." if isinstance(loss, Tensor) else ""
                raise TypeError(f"{_CALLER}: {name} must be a function of data; got {_lists.value_name(loss)}.{remedy}")
        if curvature is not None and not callable(curvature):
            got = _lists.value_name(curvature)
            raise TypeError(f"{_CALLER}: curvature must be None or a function of inner_data; got {got}.")
        if mode not in get_args(CaptureMode):
            raise ValueError(f"{_CALLER}: mode must be one of {', '.join(get_args(CaptureMode))}; got {mode!r}.")
        if isinstance(max_captures, bool) or not isinstance(max_captures, int) or max_captures < 1:
            raise ValueError(f"{_CALLER}: max_captures must be an int >= 1; got {max_captures!r}.")
        self._task = Task(variables, outer_loss, inner_loss, solver, curvature)
        self._asked: CaptureMode = mode
        self._most = max_captures
        self._reports = Reports(_CALLER)
        self._setups: OrderedDict[Hashable, Setup] = OrderedDict()
        self._dropped: set[Hashable] = set()
        self._overflow: Setup | None = None
        self._lock = threading.Lock()
        self._noticed = False
        self._latest: Setup | None = None
        self.step_count = 0

    @property
    def mode(self) -> CaptureMode | None:
        """How the latest step was taken; None before the first."""
        return None if self._latest is None else self._latest.mode

    @property
    def reason(self) -> str | None:
        """Why the latest step was an eager one, None where it was not or was meant to be."""
        return None if self._latest is None else self._latest.reason

    @property
    def timings(self) -> dict[str, float]:
        """Seconds per step of the modes that were timed for data as in the latest step."""
        return {} if self._latest is None else dict(self._latest.timings)

    def step(self, inner_data: Any, outer_data: Any) -> tuple[Tensor, ...]:
        """The hypergradient on data: a tuple or list holds the arguments of a loss, anything else is the only one.

        Arguments may be tensors that do not require grad, tuples, lists and dicts of them, and constants that can be
        hashed. They are only read. Returns one new tensor without graph for each of the hparams, in order.
        """
        with self._lock:
            batch = Batch(f"{_CALLER}.step", inner_data, outer_data)
            setup = self._setup(batch)
            grads = setup.step(batch, self.step_count + 1)
            self._latest = setup
            self.step_count += 1
            if setup.notice is not None and not self._noticed:
                self._noticed = True
                warnings.warn(f"{_CALLER}: {setup.notice}", UserWarning, stacklevel=caller_depth())
            return grads

    def check(self) -> Status | None:
        """Waits for the device, warns of the solves not yet spoken of, and returns how the latest one ended.

        None before the first step, and where no param is in the outer loss, so that there is nothing to solve.
        """
        with self._lock:
            for setup in self._setups.values():
                setup.settle()
            return self._reports.status

    def reset(self) -> None:
        """Drops all that was set up, and its memory; the next step runs the Python code of the losses again."""
        with self._lock:
            while self._setups:
                self._drop_oldest()
            self._dropped.clear()

    def _setup(self, batch: Batch) -> Setup:
        """The set-up for such data, the latest used last; one that is new is there before it is sure to succeed."""
        variables = self._task.variables
        own = tuple((place(t), t.requires_grad) for t in (*variables.params, *variables.hparams))
        key = batch.kind(), own, numbers_of(self._task.solver), surroundings()
        if key in self._dropped and self._asked == "auto":
            # Setting up again what was dropped, and will be dropped again, costs more than it saves.
            if self._overflow is None:
                self._overflow = Setup(_CALLER, self._task, self._reports, self._asked)
                self._overflow.stay_eager(
                    f"data came in more than max_captures = {self._most} kinds of shapes. Raise max_captures, pad, or"
                    " drop the last batch"
                )
            return self._overflow
        if key not in self._setups:
            while len(self._setups) >= self._most:
                self._dropped.add(self._drop_oldest())
            self._setups[key] = Setup(_CALLER, self._task, self._reports, self._asked)
        self._setups.move_to_end(key)
        return self._setups[key]

    def _drop_oldest(self) -> Hashable:
        key, setup = self._setups.popitem(last=False)
        setup.settle()
        return key
