"""What the recording of a model knows: a rule for each torch function, grouped by what it does."""

from . import activations, linear

__all__ = ["activations", "linear"]
