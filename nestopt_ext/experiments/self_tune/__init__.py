"""Hyperparameters tuned while a network trains, beside searches, on one problem and within one budget.

`self_tune` (``python -m nestopt_ext self-tune``) gives every method the same `SelfTuningProblem`: the same split, the
same network from the same start, the same hyperparameters from the same start, the same optimizers. ``delta-stn``,
``centred``, ``stn``, ``hypernet`` and ``ift`` move the hyperparameters during one training; ``random``, ``tpe``, ``gp``
and ``grid`` train anew at every point they try.
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
