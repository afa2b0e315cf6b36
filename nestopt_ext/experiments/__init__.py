"""Published experiments, and what the command line runs: `tune` on real data, and `nestopt_ext.experiments.games`.

`tune` (``python -m nestopt_ext tune``) has one hyperparameter for every weight of a network, or for every training
example, and moves them by implicit differentiation. What to expect of it: mean and standard deviation of the test part
over seeds 0 to 7 (``--seed``), with the default settings on the digits, and with ``--hparams per-example-weight
--label-noise 0.4`` in the second table; "early" is the step of lowest validation loss.

One decay per weight: 300 training, 300 validation and 1197 test examples, 4 810 hyperparameters.

====================================  =============  ==============  =============
method                                test loss      test accuracy   early
====================================  =============  ==============  =============
no decay                              0.275 (0.054)  94.1 % (0.7)    93.8 % (1.0)
one global decay, 20 random trials    0.172 (0.019)  94.7 % (0.5)    94.6 % (0.4)
one decay per weight, implicit        0.137 (0.023)  96.0 % (0.7)    96.0 % (0.7)
the global decay on train + valid     0.121 (0.018)  96.5 % (0.5)
====================================  =============  ==============  =============

It beats the best global decay in 8 of 8 seeds, in loss and in accuracy, in a fraction of the search's time. (The
settings were chosen on seeds 0 to 2; 3 to 7 agree.) Two things temper that. So many decays can carry the content of the
validation examples into the weights: the validation loss ends at 0.011, far below the test loss, and is no estimate of
it. And training on the validation examples outright, once a global decay is known, is as good or slightly better; that
row of the table is there to say so.

One weight per example: 800 training examples of which 320 have a wrong label, 200 validation examples with right labels
(the method needs such a clean set, here of a fifth of the size), 797 test examples.

====================================  =============  ==============  =============
method                                test loss      test accuracy   early
====================================  =============  ==============  =============
no decay                              2.396 (0.247)  57.4 % (2.8)    86.8 % (3.4)
one global decay, 20 random trials    0.781 (0.036)  88.3 % (2.8)    88.5 % (2.5)
one weight per example, implicit      0.185 (0.027)  95.2 % (0.9)    95.2 % (0.9)
the global decay on train + valid     0.618 (0.034)  93.7 % (1.9)
====================================  =============  ==============  =============

It beats the best global decay by 4 to 11 points in 8 of 8 seeds, and training on the clean examples too in 6 of 8. The
learned weights tell right from wrong labels with an AUC of 0.945 to 0.965.

It is not so everywhere. On Fashion-MNIST (seed 0, defaults, 5 trials) the decays overfit the validation part: test loss
0.627 against 0.571 of the best global decay, at equal accuracy (81.4 and 81.5 %); on MNIST (4 trials) they win: 0.209
against 0.253, 93.7 and 92.5 %. With example weights on Fashion-MNIST 1 500 steps are few: 73.5 % against 69.2 %, but
uniform weights stopped early reach 74.9 % (4 trials).

The inner optimum is followed, not reached; see `nestopt_ext.experiments.training` for what is approximate in that.
"""

from .config import ConfigError, TuneConfig
from .results import MethodResult
from .tune import TuneResult, tune

__all__ = ["ConfigError", "MethodResult", "TuneConfig", "TuneResult", "tune"]
