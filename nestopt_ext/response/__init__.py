"""Response models: networks whose weights are functions of hyperparameters."""

from ._sample import Sample, current_sample
from .conv import DeltaStnConv1d, DeltaStnConv2d, DeltaStnConv3d, StnConv1d, StnConv2d, StnConv3d
from .dropout import StnChannelDropout, StnDropout, StnVariationalDropout
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
    "StnChannelDropout",
    "StnConv1d",
    "StnConv2d",
    "StnConv3d",
    "StnDropout",
    "StnEmbedding",
    "StnLSTM",
    "StnLinear",
    "StnModel",
    "StnVariationalDropout",
    "current_sample",
]
