"""What the recording of a model knows: a rule for each torch function, grouped by what it does."""

from . import (
    activations,
    arithmetic,
    attention,
    casts,
    einsum,
    embedding,
    indexing,
    joining,
    linear,
    matmul,
    reductions,
    repeats,
    shapes,
    softmax,
)

__all__ = [
    "activations",
    "arithmetic",
    "attention",
    "casts",
    "einsum",
    "embedding",
    "indexing",
    "joining",
    "linear",
    "matmul",
    "reductions",
    "repeats",
    "shapes",
    "softmax",
]
