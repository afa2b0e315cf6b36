"""Response models: networks whose weights are functions of hyperparameters."""

from ._sample import Sample, current_sample
from .dropout import StnChannelDropout, StnDropout, StnVariationalDropout
from .hyper_parameters import HyperParameters
from .linear import DeltaStnLinear, StnLinear
from .model import StnModel

__all__ = [
    "DeltaStnLinear",
    "HyperParameters",
    "Sample",
    "StnChannelDropout",
    "StnDropout",
    "StnLinear",
    "StnModel",
    "StnVariationalDropout",
    "current_sample",
]
