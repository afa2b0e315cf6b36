"""Differentiable functions, closed under differentiation."""

from torch import Tensor


def softmax_hessian(logits: Tensor, u: Tensor, row_weight: Tensor) -> Tensor:
    r"""The Hessian of weighted cross-entropies in the logits, times ``u``: :math:`w\,(\mathrm{diag}(p) - p p^\top)\,u`
    for each row, with :math:`p = \mathrm{softmax}(z)`; ``logits`` and ``u`` are [..., C], ``row_weight`` is [...].
    """
    p = logits.softmax(-1)
    centred = u - (p * u).sum(-1, keepdim=True)
    return (row_weight.unsqueeze(-1) * p * centred).to(u.dtype)
