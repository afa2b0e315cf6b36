"""Optimizers: drop-in ``torch.optim.Optimizer`` subclasses."""

from .complex_sgd import ComplexSGD

__all__ = ["ComplexSGD"]
