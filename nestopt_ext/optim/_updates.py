"""The arithmetic of the optimizers for games, on aligned lists of tensors of one device and one dtype.

Every list is real (a complex tensor comes as pairs) and, but for the gradients as the caller holds them, in the dtype
in which the arithmetic is done: float32 beside 16-bit parameters, else that of the parameters. A list of one tensor is
the loop over tensors, a longer one the ``torch._foreach_*`` kernels; the numbers are the same.
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor

from .._reference import opmath


def widened(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in the dtype of their arithmetic: themselves, unless they are of 16 bits."""
    return [t.to(opmath(t.dtype)) for t in tensors]


def gradients(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None = None,
) -> list[Tensor]:
    """``(-1 if maximize) * grad / grad_scale + weight_decay * param``; the gradients themselves are only read."""
    found = widened(grads)
    if grad_scale is not None:
        inverse = grad_scale.double().reciprocal().to(device=found[0].device, dtype=found[0].dtype)
        found = list(torch._foreach_mul(found, inverse))
    if maximize:
        found = list(torch._foreach_neg(found))
    if weight_decay != 0:
        found = list(torch._foreach_add(found, widened(params), alpha=weight_decay))
    return found


def move_(weights: list[Tensor], directions: list[Tensor], factor: float | Tensor) -> None:
    """``weights += factor * directions``."""
    if isinstance(factor, Tensor):
        beside = factor.to(device=weights[0].device, dtype=weights[0].dtype)
        torch._foreach_add_(weights, list(torch._foreach_mul(directions, beside)))
    else:
        torch._foreach_add_(weights, directions, alpha=factor)


def copy_(targets: list[Tensor], sources: list[Tensor]) -> None:
    """``targets = sources``, rounded to the dtype of the targets."""
    if type(sources[0]) is Tensor:
        torch._foreach_copy_(targets, sources)
    else:  # distributed tensors know every foreach kernel used here but this one
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)


@dataclass(frozen=True)
class Moments:
    r"""Adam's running averages of the gradient and of its square, and the direction they give.

    .. math::
        d = \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \text{eps}}

    with the largest :math:`v` so far for :math:`v` where ``max_exp_avg_sqs`` is not empty. ``steps`` holds :math:`t`,
    one number per tensor, because a tensor whose gradient was missing is behind the others.
    """

    steps: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor] = field(default_factory=list)
    _: KW_ONLY
    betas: tuple[float, float]
    eps: float

    def update_(self, grads: list[Tensor]) -> None:
        """Takes one more gradient in."""
        beta1, beta2 = self.betas
        torch._foreach_add_(self.steps, 1)
        torch._foreach_lerp_(self.exp_avgs, grads, 1 - beta1)
        torch._foreach_mul_(self.exp_avg_sqs, beta2)
        torch._foreach_addcmul_(self.exp_avg_sqs, grads, grads, 1 - beta2)
        if self.max_exp_avg_sqs:
            torch._foreach_maximum_(self.max_exp_avg_sqs, self.exp_avg_sqs)

    def move_(self, weights: list[Tensor], factor: float | Tensor) -> None:
        """``weights += factor * d``; at least one gradient must have been taken in."""
        beta1, beta2 = self.betas
        averages = self.max_exp_avg_sqs or self.exp_avg_sqs
        denominators = list(torch._foreach_sqrt(averages))
        if torch.compiler.is_compiling() or isinstance(factor, Tensor):
            # Nothing is read back to the host: the count stays a tensor, so that the next one needs no new graph.
            def beside(number: Tensor, like: Tensor) -> Tensor:
                return number.to(device=like.device, dtype=like.dtype)

            counts = [step.double() for step in self.steps]
            roots = [beside((1 - beta2**t).sqrt(), w) for t, w in zip(counts, weights, strict=True)]
            factors = [beside(factor / (1 - beta1**t), w) for t, w in zip(counts, weights, strict=True)]
            torch._foreach_div_(denominators, roots)
            torch._foreach_add_(denominators, self.eps)
            directions = list(torch._foreach_div(self.exp_avgs, denominators))
            torch._foreach_mul_(directions, factors)
            torch._foreach_add_(weights, directions)
        else:
            counts_now = [step.item() for step in self.steps]
            torch._foreach_div_(denominators, [(1 - beta2**t) ** 0.5 for t in counts_now])
            torch._foreach_add_(denominators, self.eps)
            torch._foreach_addcdiv_(weights, self.exp_avgs, denominators, [factor / (1 - beta1**t) for t in counts_now])
