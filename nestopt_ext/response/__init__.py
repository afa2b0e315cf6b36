"""Response models: networks whose weights are functions of hyperparameters."""

from ._sample import Sample, current_sample
from .conv import DeltaStnConv1d, DeltaStnConv2d, DeltaStnConv3d, StnConv1d, StnConv2d, StnConv3d
from .hyper_parameters import HyperParameters
from .linear import DeltaStnLinear, StnLinear
from .model import StnModel

__all__ = [
    "DeltaStnConv1d",
    "DeltaStnConv2d",
    "DeltaStnConv3d",
    "DeltaStnLinear",
    "HyperParameters",
    "Sample",
    "StnConv1d",
    "StnConv2d",
    "StnConv3d",
    "StnLinear",
    "StnModel",
    "current_sample",
]
