"""Response models: networks whose weights are functions of hyperparameters."""

from ._hypertrain_records import HypertrainRecord, HypertrainResult
from ._sample import Sample, current_sample
from .hyper_parameters import HyperParameters
from .hypernetwork import Hypernetwork
from .hypertrain import global_hypertrain, local_hypertrain
from .linear import DeltaStnLinear, StnLinear
from .model import StnModel

__all__ = [
    "DeltaStnLinear",
    "HyperParameters",
    "Hypernetwork",
    "HypertrainRecord",
    "HypertrainResult",
    "Sample",
    "StnLinear",
    "StnModel",
    "current_sample",
    "global_hypertrain",
    "local_hypertrain",
]
