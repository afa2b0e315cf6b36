"""Adam with complex momentum."""

import cmath
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT

from ._arguments import check_betas, check_flags, check_implementation, check_lr, check_real
from ._base import Batch, ComplexMomentumOptimizer, State
from ._checkpoint import Group
from ._state import STEP
from .effective_lr import long_run_gain

_FIRST_MOMENT = ("exp_avg", "exp_avg_imag")
_FLAGS = (
    "amsgrad",
    "decoupled_weight_decay",
    "bias_correction",
    "maximize",
    "capturable",
    "differentiable",
    "rescale_lr",
)


class ComplexAdam(ComplexMomentumOptimizer):
    r"""Adam whose momentum coefficient ``betas[0]`` may be complex.

    With gradient :math:`g`, first moment :math:`m` and second moment :math:`v`, both zero at first, at step :math:`t`:

    .. math::
        g &\leftarrow \nabla f(p) + \text{weight\_decay} \cdot p \\
        m &\leftarrow \beta_1 m + g \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        p &\leftarrow p - \text{lr} \cdot \operatorname{Re}(m) \,/\,
            \bigl(\sqrt{v / (1 - \beta_2^t)} + \text{eps}\bigr)

    The momentum is a sum, not an average, and is not corrected for its start: an average, with the factor
    :math:`1 - \beta_1`, does not converge in games where this does. So the lr of Adam is too large here: under a
    constant gradient a step tends to ``lr * Re(1 / (1 - betas[0]))`` (see :func:`effective_lr`), which is 1.61 lr for
    the default and 10 lr for 0.9. ``rescale_lr=True`` divides by that.

    ``bias_correction=True`` is the averaged and corrected form, :math:`m \leftarrow \beta_1 m + (1 - \beta_1) g` and
    :math:`m / (1 - \beta_1^t)` in the step: with a real momentum the numbers of :class:`torch.optim.Adam`, and those of
    :class:`torch.optim.AdamW` with ``decoupled_weight_decay``. It is refused with a complex momentum.

    Args:
        params: tensors, named tensors or groups, as every torch optimizer takes them. Complex parameters count as pairs
            of real ones.
        lr: step size, >= 0; a tensor of one element may be changed in place without recompiling a compiled step.
        betas: the momentum, real or complex, of modulus below 1 (``cmath.rect(modulus, angle)`` makes one from polar
            form), and the decay of the second moment, a number in [0, 1).
        eps: added to the denominator, >= 0.
        weight_decay: added to the gradient times the parameter, >= 0.
        amsgrad: divide by the largest second moment so far.
        decoupled_weight_decay: instead, take ``lr * weight_decay`` times the parameter off it before the step; lr is
            here the one that is given, also with ``rescale_lr``.
        bias_correction: the form of :class:`torch.optim.Adam`; see above.
        maximize: ascend.
        foreach: ``torch._foreach_*`` kernels over whole lists.
        capturable: keep the count of steps beside the parameter, so that the host reads nothing from the device and
            the step can be captured in a CUDA graph. The fused form always does.
        differentiable: let autograd see the step; for parameters that are not leaves.
        fused: one call of the op ``complex_adam_step_`` for all tensors. With ``fused`` and ``foreach`` both None the
            fused kernel is taken where it is native, else foreach.
        rescale_lr: take lr for the effective one: the step is made with ``lr / Re(1 / (1 - betas[0]))``, so that a
            change of the momentum leaves the long-run step as it is. Not for ``bias_correction``, whose average needs
            no such factor.

    Schedulers that cycle the momentum (``OneCycleLR``, ``CyclicLR``) set a real one in the group. While the
    bounds of such a scheduler lie there (``base_momentum``), a real momentum above 0 is the modulus, and the angle
    stays.

    Modifies: the parameters and, per parameter, the state ``step`` (a tensor of one element: on the CPU, or beside the
    parameter where the step is fused or capturable), ``exp_avg`` and ``exp_avg_imag`` (real and imaginary part of the
    first moment, the latter absent while the momentum is real), ``exp_avg_sq`` and, with amsgrad, ``max_exp_avg_sq``:
    real tensors of the shape of the parameter, float32 beside 16-bit parameters. Gradients are only read.

    A checkpoint of :class:`torch.optim.Adam` or :class:`torch.optim.AdamW` loads and goes on with their numbers: as it
    brings its own hyperparameters, so it brings ``bias_correction=True``. To go on from there with a complex momentum
    and steps of the same length, set ``param_groups[...].update(betas=..., bias_correction=False, rescale_lr=True)``;
    whenever ``bias_correction`` is set to the other value, ``exp_avg`` is rescaled from average to sum, or back.

    Raises:
        ValueError, TypeError: for a bad hyperparameter, before anything is modified; for a sparse gradient, a state
            that does not fit or, in the fused form, tensors that overlap, before anything of that group is modified.
        RuntimeError: for the capture in a CUDA graph of a step that is neither fused nor capturable.

    Source: Lorraine, Acuna, Vicol, Duvenaud, "Complex Momentum for Optimization in Games", 2022, whose moment has the
    opposite sign.

    >>> import torch, nestopt_ext as nx
    >>> p = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    >>> optimizer = nx.ComplexAdam([p], lr=0.1, betas=(0.5j, 0.999), eps=0)
    >>> for _ in range(3):      # gradient 2: v / (1 - 0.999^t) = 4, m = 2, 2 + i, 1.5 + i
    ...     p.grad = torch.full_like(p, 2.0)
    ...     optimizer.step()
    >>> round(p.item(), 12)     # 1 - 0.1 * (2 + 2 + 1.5) / 2
    0.725
    """

    _OP = "complex_adam_step_"
    _BETA = "beta1"
    _STATE = ("exp_avg", "exp_avg_imag", "exp_avg_sq", "max_exp_avg_sq", STEP)
    _IMAG = "exp_avg_imag"
    _NEEDS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "exp_avg": ("exp_avg_sq", STEP),
        "exp_avg_imag": ("exp_avg",),
        "exp_avg_sq": ("exp_avg", STEP),
        "max_exp_avg_sq": ("exp_avg_sq",),
        STEP: ("exp_avg", "exp_avg_sq"),
    }
    _NUMBERS = ("lr", "betas", "eps", "weight_decay")
    _LATER: ClassVar[Mapping[str, Any]] = {
        "amsgrad": False,
        "bias_correction": True,  # it is a checkpoint of torch.optim.Adam
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
        "fused": None,
        "rescale_lr": False,
    }

    # By the id of the group: is exp_avg an average? and what the sum is times that
    _forms: Mapping[int, tuple[bool, float]] = {}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[complex, float] = (cmath.rect(0.8, math.pi / 8), 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        bias_correction: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        rescale_lr: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "decoupled_weight_decay": decoupled_weight_decay,
            "bias_correction": bias_correction,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "rescale_lr": rescale_lr,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: Group, owner: str) -> None:
        check_lr(owner, group["lr"])
        check_betas(owner, group["betas"])
        check_real(owner, "eps", group["eps"], minimum=0.0)
        check_real(owner, "weight_decay", group["weight_decay"], minimum=0.0)
        check_flags(owner, group, _FLAGS)
        if group["bias_correction"] and group["betas"][0].imag != 0:
            raise ValueError(
                f"{owner}: betas[0] must be real with bias_correction=True; got {group['betas'][0]}. A complex average"
                " does not converge where the sum does: leave bias_correction off; rescale_lr=True keeps the step size."
            )
        if group["bias_correction"] and group["rescale_lr"]:
            raise ValueError(
                f"{owner}: rescale_lr must be False with bias_correction=True; got True."
                " The average does not change the length of the step: there is nothing to rescale."
            )
        check_implementation(owner, group)

    def _beta(self, group: Group) -> Any:
        betas = group["betas"]
        return betas[0] if isinstance(betas, tuple | list) and len(betas) == 2 else None

    def _set_beta(self, group: Group, beta: Any) -> None:
        group["betas"] = (beta, *group["betas"][1:])

    def _needed(self, group: Group, state: State) -> tuple[str, ...]:
        names = ["exp_avg"]
        if group["betas"][0].imag != 0 or self._IMAG in state:
            names.append(self._IMAG)
        names.append("exp_avg_sq")
        if group["amsgrad"]:
            names.append("max_exp_avg_sq")
        return (*names, STEP)

    def _options(self, group: Group, first: bool) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        decay = group["weight_decay"]
        if group["rescale_lr"] and group["decoupled_weight_decay"]:
            decay = decay * self._gain(group)  # the op takes off its own lr times this
        return {
            "beta1": beta1,
            "beta2": beta2,
            "eps": group["eps"],
            "weight_decay": decay,
            "decoupled_weight_decay": group["decoupled_weight_decay"],
            "bias_correction": group["bias_correction"],
            "maximize": group["maximize"],
        }

    def _gain(self, group: Group) -> float:
        return long_run_gain(group["betas"][0])

    def _step_device(self, group: Group, param: Tensor) -> torch.device:
        beside = group["capturable"] or self._implementation(group, param.device) == "fused"
        return param.device if beside else torch.device("cpu")

    def _update(self, group: Group, batch: Batch) -> None:
        device = batch.params[0].device
        reads_steps = not group["capturable"] and self._implementation(group, device) != "fused"
        if (
            reads_steps
            and device.type == "cuda"
            and not torch.compiler.is_compiling()
            and torch.cuda.is_current_stream_capturing()
        ):
            raise RuntimeError(
                "ComplexAdam: capturable must be True for a step that is captured in a CUDA graph and not fused;"
                " got False. The host would read the count of steps, and the graph repeat that step for ever."
            )
        super()._update(group, batch)

    def _remember(self) -> None:
        super()._remember()
        self._remember_forms()

    def _remember_forms(self) -> None:
        self._forms = {
            id(group): (group["bias_correction"], long_run_gain(self._beta(group))) for group in self.param_groups
        }

    def _form_changed(self, group: Group) -> bool:
        form = self._forms.get(id(group))
        return form is not None and form[0] != group["bias_correction"]

    def _settle(self) -> None:
        super()._settle()
        if any(map(self._form_changed, self.param_groups)):
            self._change_forms()

    @_disable_dynamo  # compiled, it would be done again in every later step
    def _change_forms(self) -> None:
        """Rescales the first moments of groups whose ``bias_correction`` was set to the other value."""
        for group in filter(self._form_changed, self.param_groups):
            averaged, gain = self._forms[id(group)]
            # After the same gradients the sum is the average times this, exactly so with a real momentum.
            factor = gain if averaged else 1 / gain
            for state in [self.state[p] for p in group["params"] if p in self.state]:
                state.update({name: state[name] * factor for name in _FIRST_MOMENT if name in state})
        self._remember_forms()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # An old checkpoint of AdamW does not say that it is one.
        decoupled = {**self.__dict__, **state}["defaults"].get("decoupled_weight_decay", False)
        for group in state["param_groups"]:
            group.setdefault("decoupled_weight_decay", decoupled)
        super().__setstate__(state)
        for tensors in self.state.values():
            if STEP in tensors and not isinstance(tensors[STEP], Tensor):
                tensors[STEP] = torch.tensor(float(tensors[STEP]), dtype=torch.float32, device="cpu")
