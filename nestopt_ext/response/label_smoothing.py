"""Cross-entropy with a smoothing of its own for each example."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ._sample import current_value


def smoothed_cross_entropy(logits: Tensor, targets: Tensor, smoothing: Tensor, *, ignore_index: int = -100) -> Tensor:
    r"""The mean over examples of :math:`(1 - \epsilon_b) \mathrm{CE}(z_b, t_b) + \epsilon_b \mathrm{CE}(z_b, 1/C)`.

    ``logits`` (z) [B, C, ...]; ``targets`` (t) [B, ...] class indices, or probabilities of the shape of ``logits``;
    ``smoothing`` (:math:`\epsilon`) [B or 1]. Elements whose index is ``ignore_index`` are left out of the mean, which
    is NaN without any. It is torch's ``cross_entropy`` with ``label_smoothing``, but for each example. Returns a new
    scalar, differentiable in all but indices.

    Raises ValueError where ``smoothing`` does not fit.

    >>> import torch
    >>> z = torch.log(torch.tensor([[0.5, 0.5], [0.2, 0.8]]))
    >>> e = torch.tensor([1.0, 0.0])
    >>> f"{smoothed_cross_entropy(z, torch.tensor([0, 1]), e).exp().item():.4f}"     # (1 / (0.5 * 0.8)) ** 0.5
    '1.5811'
    """
    if smoothing.dim() != 1 or len(smoothing) not in (1, len(logits)):
        raise ValueError(
            f"smoothed_cross_entropy: smoothing must have one number for each of {len(logits)} examples, or one;"
            f" got shape {tuple(smoothing.shape)}."
        )
    log_p = logits.log_softmax(1)
    if targets.is_floating_point():
        of_target, wanted = -(targets * log_p).sum(1), None
    else:
        of_target, wanted = (
            F.nll_loss(log_p, targets, ignore_index=ignore_index, reduction="none"),
            targets != ignore_index,
        )
    epsilon = smoothing.reshape(-1, *[1] * (of_target.dim() - 1)).to(log_p.dtype)
    losses = of_target + epsilon * (-log_p.mean(1) - of_target)
    return losses.mean() if wanted is None else losses.where(wanted, 0).sum() / wanted.sum()


class LabelSmoothing(nn.Module):
    """The criterion :func:`smoothed_cross_entropy` at the smoothing that the current sample has for ``hparam``.

    In eval mode it is plain cross-entropy and needs no sample. No graph leads to the smoothing: a loss reaches the
    hyperparameter through gates only. Keep plain cross-entropy for the validation loss, or what is tuned would measure
    itself.

    Source: Szegedy et al., Rethinking the Inception Architecture (CVPR 2016), section 7, with uniform u(k).

    >>> import torch
    >>> from nestopt_ext.response import HyperParameters, StnModel
    >>> hparams = HyperParameters().add("smoothing", 0.1, low=0, high=1)
    >>> model = StnModel(nn.Identity(), hparams, centred=True)
    >>> with model.at_centre():
    ...     loss = LabelSmoothing("smoothing")(torch.eye(3), torch.arange(3))
    >>> torch.allclose(loss, nn.CrossEntropyLoss(label_smoothing=0.1)(torch.eye(3), torch.arange(3)))
    True
    """

    def __init__(self, hparam: str, *, ignore_index: int = -100) -> None:
        super().__init__()
        self.hparam = hparam
        self.ignore_index = ignore_index

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of ``logits`` [B, C, ...] at ``targets``, indices [B, ...] or probabilities [B, C, ...]."""
        smoothing = current_value(self.hparam, "LabelSmoothing").detach() if self.training else logits.new_zeros(1)
        return smoothed_cross_entropy(logits, targets, smoothing, ignore_index=self.ignore_index)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.hparam!r}, ignore_index={self.ignore_index}"
