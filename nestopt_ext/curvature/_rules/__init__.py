"""What the recording of a model knows: a rule for each torch function, grouped by what it does."""

from . import activations, arithmetic, attention, einsum, embedding, linear, matmul, reductions, shapes

__all__ = ["activations", "arithmetic", "attention", "einsum", "embedding", "linear", "matmul", "reductions", "shapes"]
