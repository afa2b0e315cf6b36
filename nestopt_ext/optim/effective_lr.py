"""How far an lr goes in the long run under a real or complex momentum."""

from typing import TypeVar

from torch import Tensor

from ._arguments import check_lr, check_momentum

Lr = TypeVar("Lr", float, Tensor)


def long_run_gain(beta: complex) -> float:
    """What a constant gradient of 1 leaves in the real part of the buffer: Re 1/(1 - beta), above 1/2."""
    return float((1 / (1 - beta)).real)


def effective_lr(lr: Lr, beta: complex) -> Lr:
    r"""The lr at which plain gradient descent moves as far, in the long run, as momentum :math:`\beta` with ``lr``.

    Under a constant gradient the buffer :math:`b \leftarrow \beta b + g` tends to :math:`g / (1 - \beta)`, so a step
    :math:`\text{lr} \cdot \operatorname{Re}(b)` tends to that of

    .. math::
        \text{lr} \cdot \operatorname{Re} \frac{1}{1 - \beta}
            = \text{lr} \cdot \frac{1 - \operatorname{Re} \beta}{|1 - \beta|^2}

    The angle of a momentum changes this about tenfold: at modulus 0.9 from 10 lr (angle 0) to 1.15 lr (pi/8) and
    0.53 lr (pi). To keep the step while the angle changes, divide by it, or pass ``rescale_lr=True`` to
    :class:`ComplexSGD` or :class:`ComplexAdam`. Nesterov momentum has the same value; a dampening multiplies it by
    ``1 - dampening``.

    Args:
        lr: a number >= 0, or a float32/float64 tensor of one element, whose derivative is kept.
        beta: the momentum, real or complex, of modulus below 1.

    Returns:
        A number, or a tensor like ``lr``. Nothing is modified.

    Raises:
        ValueError, TypeError: for a negative or non-finite lr, or a momentum of modulus 1 or more.

    Source: Lorraine, Acuna, Vicol, Duvenaud, "Complex Momentum for Optimization in Games", 2022; the closed form is the
    geometric series of its buffer.

    >>> import nestopt_ext as nx
    >>> round(nx.effective_lr(0.1, 0.75), 12)           # 0.1 / (1 - 0.75)
    0.4
    >>> round(nx.effective_lr(0.1, 0.5 + 0.5j), 12)     # 1 / (0.5 - 0.5i) = 1 + i
    0.1
    """
    check_lr("effective_lr", lr)
    check_momentum("effective_lr", "beta", beta)
    return lr * long_run_gain(beta)
