"""What the recording of a model knows: a rule for each torch function, grouped by what it does."""

from . import (
    activations,
    arithmetic,
    attention,
    batch_norm,
    conv,
    dropout,
    einsum,
    embedding,
    linear,
    matmul,
    norm,
    padding,
    pooling,
    reductions,
    shapes,
)

__all__ = [
    "activations",
    "arithmetic",
    "attention",
    "batch_norm",
    "conv",
    "dropout",
    "einsum",
    "embedding",
    "linear",
    "matmul",
    "norm",
    "padding",
    "pooling",
    "reductions",
    "shapes",
]
