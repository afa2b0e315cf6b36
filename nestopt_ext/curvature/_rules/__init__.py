"""What the recording of a model knows: a rule for each torch function, grouped by what it does."""

from . import activations, batch_norm, conv, dropout, linear, norm, padding, pooling

__all__ = ["activations", "batch_norm", "conv", "dropout", "linear", "norm", "padding", "pooling"]
