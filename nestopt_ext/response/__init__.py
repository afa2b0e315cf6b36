"""Response models: networks whose weights are functions of hyperparameters."""

from ._sample import Sample, current_sample
from .conv import DeltaStnConv1d, DeltaStnConv2d, DeltaStnConv3d, StnConv1d, StnConv2d, StnConv3d
from .embedding import DeltaStnEmbedding, StnEmbedding
from .hyper_parameters import HyperParameters
from .linear import DeltaStnLinear, StnLinear
from .lstm import DeltaStnLSTM, StnLSTM
from .model import StnModel

__all__ = [
    "DeltaStnConv1d",
    "DeltaStnConv2d",
    "DeltaStnConv3d",
    "DeltaStnEmbedding",
    "DeltaStnLSTM",
    "DeltaStnLinear",
    "HyperParameters",
    "Sample",
    "StnConv1d",
    "StnConv2d",
    "StnConv3d",
    "StnEmbedding",
    "StnLSTM",
    "StnLinear",
    "StnModel",
    "current_sample",
]
