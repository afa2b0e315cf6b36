"""What the recording of a model knows: a rule for each torch function, grouped by what it does."""

from . import activations, arithmetic, linear, matmul, shapes

__all__ = ["activations", "arithmetic", "linear", "matmul", "shapes"]
