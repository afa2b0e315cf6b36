"""Differentiable games: gradients and Jacobians, corrected directions, games to try them on, and loops that play."""

from . import zoo
from ._players import Game, Player, parameters
from ._watch import PlayStatus
from .directions import cgd, consensus, lola, lookahead, sga, sos
from .maps import OptimizerMap, extragradient_map, lola_map, momentum_map, sgd_map
from .jacobian import GameJacobian, game_jacobian, gradients
from .momentum import convergence_rate, converges, momentum_matrix, momentum_spectrum, small_step_converges
from .momentum_choice import MethodComparison, MomentumChoice, compare_methods, optimal_momentum
from .play import alternating, simultaneous
from .spectrum import Spectrum, spectrum
from .trajectory import Trajectory
from .zoo import bilinear, dirac_gan, ipd, matching_pennies, mix, mixed, random_subspace_ipd, small_ipd

__all__ = [
    "Game",
    "GameJacobian",
    "MethodComparison",
    "MomentumChoice",
    "PlayStatus",
    "Player",
    "Spectrum",
    "Trajectory",
    "alternating",
    "bilinear",
    "cgd",
    "compare_methods",
    "consensus",
    "convergence_rate",
    "converges",
    "dirac_gan",
    "game_jacobian",
    "gradients",
    "ipd",
    "lola",
    "lookahead",
    "matching_pennies",
    "mixed",
    "momentum_matrix",
    "momentum_spectrum",
    "optimal_momentum",
    "parameters",
    "sga",
    "simultaneous",
    "small_step_converges",
    "sos",
    "spectrum",
    "zoo",
]
