"""Experiments on games: how fast momentum, real, negative and complex, finds solutions, beside its rivals.

`bilinear` (``python -m nestopt_ext games bilinear``) turns the momentum from the heavy ball to negative momentum on a
game of pure rotation, `sweep` turns the game from cooperative to adversarial, `dirac` shows the paths of the smallest
GAN, `spectra` the eigenvalues behind all of it, and `mixture` trains GANs on a ring of Gaussians with a grid of
momenta.

What to expect, with the default settings (gradient evaluations to 1e-6 of the first distance, everything tuned on the
same grid; seed 0, and the first and last level of the sweep move by less than a tenth over seeds 0 to 2):

==============================  =================  =====================  =====================  ====================
method                          one rotation       rotations 0.1 to 1     cooperative, 0.1 to 1  mixed, max G 0.9
==============================  =================  =====================  =====================  ====================
gradient descent                diverges           diverges               76                     6 824
real momentum                   diverges           diverges               24                     8 168
complex momentum                135                20 726                 24                     1 509
optimistic                      64                 8 465                  228                    1 621
extragradient                   194                5 560                  350                    1 916
negative momentum, alternating  30                 4 665                  86                     742
complex momentum, alternating   21                 3 042                  24                     607
==============================  =================  =====================  =====================  ====================

So with simultaneous updates complex momentum is the one that is as fast as the heavy ball where players agree and still
converges where they only rotate; on slow rotations alone optimistic steps and extragradient are 2.4 and 3.7 times
faster. Where players may take turns it is the fastest of all. Its best momentum is never the recommended
0.9 exp(i pi/8), which needs 674, 47 917, 303 and 11 588 gradients in the four columns.
"""

from .adversarialness import SweepConfig, SweepResult, sweep
from .bilinear import BilinearConfig, BilinearResult, bilinear
from .dirac import DiracConfig, DiracResult, dirac
from .mixture import mixture
from .mixture_config import MixtureConfig
from .mixture_results import MixtureResult
from .spectra import SpectraConfig, SpectraResult, spectra

__all__ = [
    "BilinearConfig",
    "BilinearResult",
    "DiracConfig",
    "DiracResult",
    "MixtureConfig",
    "MixtureResult",
    "SpectraConfig",
    "SpectraResult",
    "SweepConfig",
    "SweepResult",
    "bilinear",
    "dirac",
    "mixture",
    "spectra",
    "sweep",
]
