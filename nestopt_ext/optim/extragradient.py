"""Extragradient: the gradient that moves the parameters is the one found a step ahead."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ._arguments import check_flags
from ._list_optimizer import ADAM_STATE, Batch, ListOptimizer, check_adam
from ._state import check_saved, saved_states
from ._updates import move_

_SAVED = "extrapolated_from"


class _Extragradient(ListOptimizer):
    """Two half steps by a direction that a subclass knows: away from the saved point, and from it again."""

    # torch.amp.GradScaler then calls `step` also where it would have skipped it, so that the saved point comes back.
    _step_supports_amp_scaling = True

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        # In the groups, the one place besides the state that checkpoints, copies and pickles hold.
        super().__init__(params, {**defaults, "extrapolated": False})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group after checking its hyperparameters; see :meth:`torch.optim.Optimizer.add_param_group`.

        Between the half steps, the parameters of the new group count as having had no gradient in the first one.
        """
        if isinstance(param_group, dict):
            param_group["extrapolated"] = self._extrapolated()
        super().add_param_group(param_group)

    def extrapolate(self) -> None:
        """The first half step: saves the parameters that have a gradient, and moves them along it.

        Modifies: the parameters and the state. Take the gradients there, then call :meth:`step`. What is written to a
        saved parameter in between is lost when :meth:`step` or :meth:`restore` brings the saved point back.

        Raises:
            RuntimeError: if the parameters are extrapolated already.
            ValueError, TypeError: as :meth:`step` does, before anything is modified.
        """
        self._require("extrapolate", False)
        with torch.no_grad():
            for batch in self._batches():
                for param in batch.owners:
                    if _SAVED not in self.state[param]:  # as it is in the second place of a parameter named twice
                        self.state[param][_SAVED] = param.clone()
                self._descend(batch, batch.gradients())
        self._set_extrapolated(True)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The second half step: brings the saved point back and moves it along the gradient found a step ahead.

        A parameter with a gradient in the first half step alone ends at its saved point; one with a gradient in the
        second alone takes a plain step.

        Args:
            closure: evaluates the loss again, with gradients, and returns it. With it the whole step is made: the
                closure is called, :meth:`extrapolate`, called again, and the second half step taken. If the second call
                raises, the saved point is brought back.

        Returns:
            What the first call of ``closure`` returned, the loss before the step; else None.

        Raises:
            RuntimeError: without ``closure`` if :meth:`extrapolate` was not called before; with it, if it was.
            ValueError, TypeError: for a hyperparameter that was spoiled, a sparse gradient, or a gradient or state that
                does not fit its parameter, before anything is modified.
        """
        if closure is None:
            self._require("step", True)
            self._second_half()
            return None
        self._require("step(closure)", False)
        with torch.enable_grad():
            loss = closure()
        self.extrapolate()
        try:
            with torch.enable_grad():
                closure()
            self._second_half()
        finally:
            if self._extrapolated():
                self.restore()
        return loss

    def restore(self) -> None:
        """Brings the saved point back without a step, for a step that is given up between its halves.

        What the first half did to the state stays: in :class:`ExtraAdam`, that its gradient was taken in.

        Raises:
            RuntimeError: if the parameters are not extrapolated.
        """
        self._require("restore", True)
        with torch.no_grad():
            for group in self.param_groups:
                self._bring_back(group["params"])
        self._set_extrapolated(False)

    def _second_half(self) -> None:
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is None or not bool(found_inf != 0):
            grad_scale: Tensor | None = getattr(self, "grad_scale", None)
            with torch.no_grad():
                for batch in self._batches():
                    grads = batch.gradients(grad_scale)  # at the extrapolated point, which weight decay sees too
                    self._bring_back(batch.owners)
                    self._descend(batch, grads)
        self.restore()

    def _bring_back(self, params: Iterable[Tensor]) -> None:
        for param in params:
            state = self.state.get(param, {})
            if _SAVED in state:
                param.copy_(state.pop(_SAVED))
                if not state:  # a step leaves nothing behind where there was nothing before
                    del self.state[param]

    def _descend(self, batch: Batch, grads: list[Tensor]) -> None:
        """Moves the parameters of the batch where they are, by what the gradients say."""
        raise NotImplementedError

    # ---- between the halves ----

    def _extrapolated(self) -> bool:
        return any(group["extrapolated"] for group in self.param_groups)

    def _set_extrapolated(self, value: bool) -> None:
        for group in self.param_groups:
            group["extrapolated"] = value

    def _require(self, method: str, wanted: bool) -> None:
        if self._extrapolated() == wanted:
            return
        owner = type(self).__name__
        if wanted:
            raise RuntimeError(
                f"{owner}.{method}: the parameters must be extrapolated; got no call of extrapolate() before. Call"
                " extrapolate() with the gradients here, take the gradients there, then step(); or step(closure)."
            )
        raise RuntimeError(
            f"{owner}.{method}: the parameters must not be extrapolated yet; got a second call before step()."
            " Call step() with the gradients taken there, or restore() to give the first half step up."
        )

    def _check_group(self, group: Mapping[str, Any], owner: str) -> None:
        super()._check_group(group, owner)
        check_flags(owner, group, ("extrapolated",))

    def _check_state(self, owner: str, label: str, state: dict[str, Any], param: Tensor) -> None:
        super()._check_state(owner, label, state, param)
        saved = state.get(_SAVED, param)
        if (saved.shape, saved.dtype, saved.device) != (param.shape, param.dtype, param.device):
            raise ValueError(
                f"{owner}: {label} must be as it was when it was extrapolated, {saved.dtype} of shape"
                f" {tuple(saved.shape)} on {saved.device}; got {param.dtype} of shape {tuple(param.shape)} on"
                f" {param.device}. Call restore() before changing .data."
            )

    def _checked_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        state_dict = super()._checked_state_dict(state_dict)
        owner = f"{type(self).__name__}.load_state_dict"
        found = [group.get("extrapolated", False) for group in state_dict["param_groups"]]
        if len(set(found)) > 1:
            raise ValueError(f"{owner}: extrapolated must be the same in all param_groups; got {found}.")
        for param, key, saved in saved_states(self.param_groups, state_dict):
            if saved.get(_SAVED) is not None:
                check_saved(owner, key, _SAVED, saved[_SAVED], param)
                if not found[0]:
                    raise ValueError(
                        f"{owner}: state[{key!r}] must hold {_SAVED} only while the groups are extrapolated;"
                        " got one while they are not."
                    )
        return state_dict

    def _restore(self, state_dict: dict[str, Any]) -> None:
        super()._restore(state_dict)
        for param, _, saved in saved_states(self.param_groups, state_dict):
            if saved.get(_SAVED) is not None:
                self.state[param][_SAVED] = torch.empty_like(param, requires_grad=False).copy_(saved[_SAVED].detach())


class ExtraSGD(_Extragradient):
    r"""Extragradient descent: each step follows the gradient found one plain step ahead.

    .. math::
        w' &= w - \text{lr} \cdot g(w)  \qquad\text{(extrapolate)} \\
        w &\leftarrow w - \text{lr} \cdot g(w')  \qquad\text{(step)}

    with :math:`g(w) = \nabla f(w) + \text{weight\_decay} \cdot w`, so weight decay is that of the point where the
    gradient was taken, as if it were part of the loss. Both half steps have the same lr. On a linear field :math:`g(w)
    = J w` one step is :math:`I - \text{lr} J + \text{lr}^2 J^2`: a player pair that turns around its equilibrium,
    :math:`J` with eigenvalues :math:`\pm i`, comes nearer by a factor of up to :math:`\sqrt{3}/2` per step (at lr
    :math:`1/\sqrt 2`), where plain descent moves away at every lr. There is no momentum.

    A step takes two gradients. In a loop of one's own::

        loss(model).backward(); optimizer.extrapolate()
        optimizer.zero_grad(); loss(model).backward(); optimizer.step()

    or ``optimizer.step(closure)``, which does all of it. In a game **all** players extrapolate before any takes its
    second gradient, so players with an optimizer each call ``extrapolate`` and ``step`` themselves; one optimizer with
    a group per player may take a closure. With :class:`torch.amp.GradScaler`: ``scaler.unscale_(optimizer)``,
    ``optimizer.extrapolate()``, ``scaler.update()``, then ``scaler.step(optimizer)`` and ``scaler.update()`` for the
    second half; where the second gradient overflowed the saved point comes back, and the step is not taken.

    Args:
        params: tensors, named tensors or groups, as every torch optimizer takes them. Complex parameters count as pairs
            of real ones.
        lr: step size, >= 0; a tensor of one element may be changed in place without recompiling a compiled step.
        weight_decay: added to the gradient times the parameter, >= 0.
        maximize: ascend.
        foreach: ``torch._foreach_*`` kernels over whole lists (None and True), or one tensor after the other, which
            needs temporaries of one tensor only (False). The numbers are the same.

    Modifies: the parameters; between the half steps the state ``extrapolated_from``, a copy of the parameter, and the
    entry ``extrapolated`` of the groups, so that a checkpoint from between them resumes exactly. Gradients are only
    read.

    Raises:
        ValueError, TypeError: for a bad hyperparameter, before anything is modified; see :meth:`extrapolate` and
            :meth:`step` for those of a step.

    Source: Korpelevich, "The extragradient method for finding saddle points and other problems", 1976; Gidel, Berard,
    Vignoud, Vincent, Lacoste-Julien, "A Variational Inequality Perspective on Generative Adversarial Networks", 2019,
    algorithm 2, here without the averaging of its iterates (``torch.optim.swa_utils.AveragedModel`` does that).

    >>> import torch, nestopt_ext as nx
    >>> w = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    >>> optimizer = nx.ExtraSGD([w], lr=0.5)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = w.square().sum() / 2
    ...     loss.backward()
    ...     return loss
    >>> optimizer.step(closure).item()
    0.5
    >>> w.item()        # 1 - lr + lr^2
    0.75
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        weight_decay: float = 0,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "maximize": maximize, "foreach": foreach})

    def _descend(self, batch: Batch, grads: list[Tensor]) -> None:
        weights = batch.weights()
        move_(weights, grads, -batch.lr)
        batch.write(weights)


class ExtraAdam(_Extragradient):
    r"""Extragradient with Adam's direction in both half steps.

    .. math::
        w' &= w - \text{lr} \cdot d(g(w))  \qquad\text{(extrapolate)} \\
        w &\leftarrow w - \text{lr} \cdot d(g(w'))  \qquad\text{(step)}

    where :math:`d` is :class:`torch.optim.Adam`'s direction with bias correction. There is one state, and both half
    steps update it: after :math:`n` steps it has taken in :math:`2n` gradients, and ``step`` is :math:`2n`. How a step
    is made, alone, in games and with a gradient scaler, is as in :class:`ExtraSGD`; but a first gradient that is not
    finite would stay in the averages, so where a scale may overflow, look at it before ``extrapolate``, and if it did,
    call ``scaler.update()`` and leave that step out.

    Args:
        params: tensors, named tensors or groups, as every torch optimizer takes them. Complex parameters count as pairs
            of real ones.
        lr: step size, >= 0; a tensor of one element may be changed in place without recompiling a compiled step.
        betas: how much of the average of the gradient, and of its square, is kept at each half step; in [0, 1).
        eps: added to the denominator, >= 0.
        weight_decay: added to the gradient times the parameter, >= 0.
        amsgrad: divide by the largest average of the square so far.
        maximize: ascend.
        foreach: ``torch._foreach_*`` kernels over whole lists (None and True), or one tensor after the other, which
            needs temporaries of one tensor only (False). The numbers are the same.

    Modifies: the parameters and, per parameter, the state of :class:`torch.optim.Adam`: ``step``, ``exp_avg``,
    ``exp_avg_sq`` and with amsgrad ``max_exp_avg_sq``, float32 beside 16-bit parameters; between the half steps also
    ``extrapolated_from``, and ``extrapolated`` in the groups. Gradients are only read. A checkpoint of Adam loads as it
    is.

    Raises:
        ValueError, TypeError: for a bad hyperparameter, before anything is modified; see :meth:`extrapolate` and
            :meth:`step` for those of a step.

    Source: Gidel, Berard, Vignoud, Vincent, Lacoste-Julien, "A Variational Inequality Perspective on Generative
    Adversarial Networks", 2019, algorithm 4, here without the averaging of its iterates.

    >>> import torch, nestopt_ext as nx
    >>> w = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    >>> optimizer = nx.ExtraAdam([w], lr=0.25, eps=0.0)
    >>> w.grad = torch.full_like(w, 3.0)    # every direction is 1
    >>> optimizer.extrapolate()
    >>> round(w.item(), 12)
    0.75
    >>> optimizer.step()                    # from the saved point, 1
    >>> round(w.item(), 12), optimizer.state[w]["step"].item()
    (0.75, 2.0)
    """

    _STATE = ADAM_STATE
    _TOGETHER = ADAM_STATE[:3]

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: Mapping[str, Any], owner: str) -> None:
        super()._check_group(group, owner)
        check_adam(owner, group)

    def _descend(self, batch: Batch, grads: list[Tensor]) -> None:
        weights, moments = batch.weights(), batch.moments()
        moments.update_(grads)
        moments.move_(weights, -batch.lr)
        batch.write(weights)
