"""Response models: networks whose weights are functions of hyperparameters."""

from ._fit import FitResult
from ._hypertrain_records import HypertrainRecord, HypertrainResult
from ._report import ConversionReport
from ._sample import Sample, current_sample, current_value, using_sample
from ._trainer_step import TrainerDiverged
from .activation import ActivationRegularization
from .augmentation import Affine, ColorJitter, Cutout, GaussianNoise, InputScale
from .conv import DeltaStnConv1d, DeltaStnConv2d, DeltaStnConv3d, StnConv1d, StnConv2d, StnConv3d
from .conversion import to_delta_stn, to_stn
from .delta_stn_trainer import DeltaStnTrainer
from .dropout import StnChannelDropout, StnDropout, StnVariationalDropout
from .embedding import DeltaStnEmbedding, StnEmbedding
from .hyper_parameters import HyperParameters
from .hypernetwork import Hypernetwork
from .hypertrain import global_hypertrain, local_hypertrain
from .label_smoothing import LabelSmoothing, smoothed_cross_entropy
from .linear import DeltaStnLinear, StnLinear
from .lstm import DeltaStnLSTM, StnLSTM
from .model import StnModel
from .plots import plot_history
from .stn_trainer import StnTrainer
from .trainer import EpochRecord, ResponseTrainer, accuracy
from .weight_decay import WeightDecay

__all__ = [
    "ActivationRegularization",
    "Affine",
    "ColorJitter",
    "ConversionReport",
    "Cutout",
    "DeltaStnConv1d",
    "DeltaStnConv2d",
    "DeltaStnConv3d",
    "DeltaStnEmbedding",
    "DeltaStnLSTM",
    "DeltaStnLinear",
    "DeltaStnTrainer",
    "EpochRecord",
    "FitResult",
    "GaussianNoise",
    "HyperParameters",
    "Hypernetwork",
    "HypertrainRecord",
    "HypertrainResult",
    "InputScale",
    "LabelSmoothing",
    "ResponseTrainer",
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
    "StnTrainer",
    "StnVariationalDropout",
    "TrainerDiverged",
    "WeightDecay",
    "accuracy",
    "current_sample",
    "current_value",
    "global_hypertrain",
    "local_hypertrain",
    "plot_history",
    "smoothed_cross_entropy",
    "to_delta_stn",
    "to_stn",
    "using_sample",
]
