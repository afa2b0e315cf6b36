"""Response models: networks whose weights are functions of hyperparameters."""

from ._fit import FitResult
from ._sample import Sample, current_sample
from ._trainer_step import TrainerDiverged
from .delta_stn_trainer import DeltaStnTrainer
from .dropout import StnChannelDropout, StnDropout, StnVariationalDropout
from .hyper_parameters import HyperParameters
from .linear import DeltaStnLinear, StnLinear
from .model import StnModel
from .plots import plot_history
from .stn_trainer import StnTrainer
from .trainer import EpochRecord, ResponseTrainer, accuracy

__all__ = [
    "DeltaStnLinear",
    "DeltaStnTrainer",
    "EpochRecord",
    "FitResult",
    "HyperParameters",
    "ResponseTrainer",
    "Sample",
    "StnChannelDropout",
    "StnDropout",
    "StnLinear",
    "StnModel",
    "StnTrainer",
    "StnVariationalDropout",
    "TrainerDiverged",
    "accuracy",
    "current_sample",
    "plot_history",
]
