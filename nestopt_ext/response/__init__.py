"""Response models: networks whose weights are functions of hyperparameters."""

from ._sample import Sample, current_sample
from .activation import ActivationRegularization
from .augmentation import Affine, ColorJitter, Cutout, GaussianNoise, InputScale
from .dropout import StnChannelDropout, StnDropout, StnVariationalDropout
from .hyper_parameters import HyperParameters
from .label_smoothing import LabelSmoothing
from .linear import DeltaStnLinear, StnLinear
from .model import StnModel
from .weight_decay import WeightDecay

__all__ = [
    "ActivationRegularization",
    "Affine",
    "ColorJitter",
    "Cutout",
    "DeltaStnLinear",
    "GaussianNoise",
    "HyperParameters",
    "InputScale",
    "LabelSmoothing",
    "Sample",
    "StnChannelDropout",
    "StnDropout",
    "StnLinear",
    "StnModel",
    "StnVariationalDropout",
    "WeightDecay",
    "current_sample",
]
