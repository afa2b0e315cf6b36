"""Hyperparameters tuned while a network trains, beside searches, on one problem and within one budget.

`self_tune` (``python -m nestopt_ext self-tune``) gives every method the same `SelfTuningProblem`: the same split, the
same network from the same start, the same hyperparameters from the same start, the same optimizers. ``delta-stn``,
``centred``, ``stn``, ``hypernet`` and ``ift`` move the hyperparameters during one training, ``fixed`` leaves them where
they start; ``random``, ``tpe``, ``gp`` and ``grid`` train anew at every point they try. All are told apart by the
lowest validation loss on their way (early stopping). Time is that of training steps: with a budget in seconds the
machine should have nothing else to do.

What to expect on the digits with ``--budget 150 --epochs 30``: 150 epochs for each method, five trainings of 30 for a
search. Mean and standard deviation over seeds 0 to 3; three dropout rates, 300 training, 300 validation and 1197 test
examples.

===========================  ===============  =============  =============
method                       validation loss  test loss      test accuracy
===========================  ===============  =============  =============
Delta-STN                    0.123 (0.062)    0.141 (0.032)  95.6 % (1.1)
centred STN, not linearized  0.118 (0.062)    0.144 (0.025)  95.6 % (0.6)
STN                          0.110 (0.053)    0.138 (0.020)  95.7 % (0.7)
linear hypernetwork, local   0.117 (0.050)    0.149 (0.006)  95.5 % (0.2)
implicit differentiation     0.151 (0.058)    0.160 (0.021)  94.5 % (0.7)
start values, not tuned      0.148 (0.073)    0.181 (0.023)  94.9 % (0.6)
random search                0.189 (0.046)    0.198 (0.050)  94.0 % (1.4)
===========================  ===============  =============  =============

The first four cannot be told apart there: which is first changes with the seed, and each of them has a lower test loss
than the start values in 4 of 4 seeds. They take 2 to 6 times as long as plain training, so that in equal time a search
has as many more trainings. TPE draws its first ten points at random.

Networks, schedules and ranges are those of Bae and Grosse, Delta-STN (NeurIPS 2020), and of MacKay et al., Self-Tuning
Networks (ICLR 2019), with these differences: one optimizer of hyperparameters, RMSprop, for every method; batch
normalization in VGG16; the places of ResNet-18's dropouts; searches that stay below a dropout rate of 0.75; and for the
LSTM a learning rate that stays, where the authors cut it when the validation loss does.
"""

from .config import METHODS, Budget, SelfTuneConfig
from .problem import SelfTuningProblem
from .results import MethodResult
from .run import SelfTuneError, SelfTuneResult, make_problem, self_tune

__all__ = [
    "METHODS",
    "Budget",
    "MethodResult",
    "SelfTuneConfig",
    "SelfTuneError",
    "SelfTuneResult",
    "SelfTuningProblem",
    "make_problem",
    "self_tune",
]
