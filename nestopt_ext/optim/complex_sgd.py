"""SGD with complex momentum."""

import cmath
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ._arguments import check_flags, check_implementation, check_lr, check_momentum, check_real
from ._base import ComplexMomentumOptimizer, State
from ._checkpoint import Group
from .effective_lr import long_run_gain


class ComplexSGD(ComplexMomentumOptimizer):
    r"""SGD whose momentum coefficient may be complex; a drop-in replacement for :class:`torch.optim.SGD`.

    With gradient :math:`g` and a buffer :math:`b` that starts as :math:`g` on the first step of each parameter:

    .. math::
        g &\leftarrow \nabla f(p) + \text{weight\_decay} \cdot p \\
        b &\leftarrow \text{momentum} \cdot b + (1 - \text{dampening}) \cdot g \\
        p &\leftarrow p - \text{lr} \cdot \operatorname{Re}(b)
            \qquad\text{(with nesterov: } g + \operatorname{Re}(\text{momentum} \cdot b)\text{)}

    A real momentum is the heavy ball, with the numbers of :class:`torch.optim.SGD`; a negative one damps rotations. A
    complex one does both: it converges where two players pull in circles and still speeds up where they agree. The
    angle changes the size of the step: an lr with momentum ``m`` moves like plain gradient descent with
    ``lr * Re(1 / (1 - m))`` (see :func:`effective_lr`), which is 10 lr for 0.9 and 1.15 lr for the default: tune lr
    with the angle, or pass ``rescale_lr=True``. An angle and its negative give the same parameters.

    Args:
        params: tensors, named tensors or groups, as every torch optimizer takes them. Complex parameters count as pairs
            of real ones.
        lr: step size, >= 0; a tensor of one element may be changed in place without recompiling a compiled step.
        momentum: real or complex, of modulus below 1; ``cmath.rect(0.9, math.pi / 8)`` makes one of a modulus
            and an angle in radians.
        dampening: the gradient enters the buffer times ``1 - dampening``, from the second step on.
        weight_decay: added to the gradient times the parameter, >= 0.
        nesterov: look ahead along the buffer; needs a momentum and zero dampening.
        maximize: ascend.
        foreach: ``torch._foreach_*`` kernels over whole lists.
        differentiable: let autograd see the step; for parameters that are not leaves.
        fused: one call of the op ``complex_sgd_step_`` for all tensors. With ``fused`` and ``foreach`` both None the
            fused kernel is taken where it is native, else foreach.
        rescale_lr: take lr for the effective one, that of plain gradient descent: the step is made with
            ``lr / ((1 - dampening) * Re(1 / (1 - momentum)))``, so that a change of the momentum leaves the length of
            the way under a constant gradient as it is.

    Schedulers that cycle the momentum (``OneCycleLR``, ``CyclicLR``) set a real one in the group. While the
    bounds of such a scheduler lie there (``base_momentum``), a real momentum above 0 is the modulus, and the angle
    stays.

    Modifies: the parameters and, per parameter, the state ``momentum_buffer`` (real part) and
    ``momentum_buffer_imag`` (imaginary part, absent while the momentum is real): two real tensors of the shape of the
    parameter, float32 beside 16-bit parameters. Gradients are only read. A checkpoint of :class:`torch.optim.SGD` loads
    as it is.

    Raises:
        ValueError, TypeError: for a bad hyperparameter, before anything is modified; for a sparse gradient, a state
            that does not fit or, in the fused form, tensors that overlap, before anything of that group is modified.

    Source: Lorraine, Acuna, Vicol, Duvenaud, "Complex Momentum for Optimization in Games", 2022, whose buffer has the
    opposite sign and no dampening.

    >>> import torch, nestopt_ext as nx
    >>> p = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    >>> optimizer = nx.ComplexSGD([p], lr=0.1, momentum=0.5j)
    >>> for _ in range(3):      # gradient 1: b = 1, 1 + 0.5i, 0.75 + 0.5i
    ...     p.grad = torch.ones_like(p)
    ...     optimizer.step()
    >>> round(p.item(), 12)     # 1 - 0.1 * (1 + 1 + 0.75)
    0.725
    """

    _OP = "complex_sgd_step_"
    _BETA = "momentum"
    _STATE = ("momentum_buffer", "momentum_buffer_imag")
    _IMAG = "momentum_buffer_imag"
    _NEEDS: ClassVar[Mapping[str, tuple[str, ...]]] = {"momentum_buffer_imag": ("momentum_buffer",)}
    _NUMBERS = ("lr", "momentum", "dampening", "weight_decay")
    _LATER: ClassVar[Mapping[str, Any]] = {
        "nesterov": False,
        "maximize": False,
        "foreach": None,
        "differentiable": False,
        "fused": None,
        "rescale_lr": False,
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: complex = cmath.rect(0.9, math.pi / 8),
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        rescale_lr: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
            "rescale_lr": rescale_lr,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: Group, owner: str) -> None:
        check_lr(owner, group["lr"])
        check_momentum(owner, "momentum", group["momentum"])
        check_flags(owner, group, ("nesterov", "maximize", "differentiable", "rescale_lr"))
        check_real(owner, "dampening", group["dampening"])
        check_real(owner, "weight_decay", group["weight_decay"], minimum=0.0)
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ValueError(
                f"{owner}: nesterov must come with a momentum and zero dampening;"
                f" got momentum {group['momentum']} and dampening {group['dampening']}."
            )
        if group["rescale_lr"] and group["dampening"] >= 1:
            raise ValueError(f"{owner}: dampening must be below 1 with rescale_lr; got {group['dampening']}.")
        check_implementation(owner, group)

    def _beta(self, group: Group) -> Any:
        return group["momentum"]

    def _set_beta(self, group: Group, beta: Any) -> None:
        group["momentum"] = beta

    def _needed(self, group: Group, state: State) -> tuple[str, ...]:
        if group["momentum"] == 0:
            return ()
        return self._STATE if group["momentum"].imag != 0 or self._IMAG in state else self._STATE[:1]

    def _options(self, group: Group, first: bool) -> dict[str, Any]:
        return {
            "momentum": group["momentum"],
            # With an empty buffer and no dampening, the first step leaves the gradient in the buffer.
            "dampening": 0 if first else group["dampening"],
            "weight_decay": group["weight_decay"],
            "nesterov": group["nesterov"],
            "maximize": group["maximize"],
        }

    def _first_is_different(self, group: Group) -> bool:
        return bool(group["momentum"] != 0 and group["dampening"] != 0)

    def _gain(self, group: Group) -> float:
        momentum = group["momentum"]
        return float((1 - group["dampening"]) * long_run_gain(momentum)) if momentum != 0 else 1.0
