"""Optimizers: drop-in ``torch.optim.Optimizer`` subclasses."""

from .complex_adam import ComplexAdam
from .complex_sgd import ComplexSGD
from .effective_lr import effective_lr
from .extragradient import ExtraAdam, ExtraSGD
from .optimistic import OptimisticAdam, OptimisticSGD

__all__ = ["ComplexAdam", "ComplexSGD", "ExtraAdam", "ExtraSGD", "OptimisticAdam", "OptimisticSGD", "effective_lr"]
