"""The cases, one file per op family; importing this package registers them all."""

from . import captured as captured
from . import complex_adam as complex_adam
from . import complex_sgd as complex_sgd
from . import curvature_product as curvature_product
from . import curvature_solve as curvature_solve
from . import curvature_step as curvature_step
from . import dual_series as dual_series
from . import hadamard_gram as hadamard_gram
from . import hypergradient as hypergradient
from . import lyapunov as lyapunov
from . import neumann as neumann
from . import rank_one_update as rank_one_update
from . import response_layers as response_layers
from . import row_dot as row_dot
from . import softmax_hessian as softmax_hessian
from . import stn_gate as stn_gate
