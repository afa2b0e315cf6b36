"""Differentiable games: gradients and Jacobians, corrected directions, games to try them on, and loops that play."""

from . import zoo
from ._players import Game, Player, parameters
from ._watch import PlayStatus
from .archive import Archive, Bifurcation, Branch, BranchStatus, Solution
from .directions import cgd, consensus, lola, lookahead, sga, sos
from .eigen_ridges import EigenRidges
from .eigenspaces import Eigenspace, eigenspace, track
from .jacobian import GameJacobian, game_jacobian, gradients
from .lyapunov import MaxLyapunovExponent, lyapunov_exponents, max_lyapunov_exponent
from .lyapunov_branches import LyapunovBranches
from .lyapunov_start import LyapunovStart, max_lyapunov_start
from .map_jacobian import (
    Eigenpairs,
    MapJacobian,
    SingularPairs,
    leading_eigenpairs,
    leading_singular_pairs,
    map_jacobian,
)
from .maps import OptimizerMap, extragradient_map, lola_map, momentum_map, sgd_map
from .momentum import convergence_rate, converges, momentum_matrix, momentum_spectrum, small_step_converges
from .momentum_choice import MethodComparison, MomentumChoice, compare_methods, optimal_momentum
from .play import alternating, simultaneous
from .ride_plots import plot_phase_portrait, plot_ride_tree
from .ridge_rider import ridge_rider
from .spectrum import Spectrum, spectrum
from .trajectory import Trajectory
from .zoo import bilinear, dirac_gan, ipd, matching_pennies, mix, mixed, random_subspace_ipd, small_ipd

__all__ = [
    "Archive",
    "Bifurcation",
    "Branch",
    "BranchStatus",
    "EigenRidges",
    "Eigenpairs",
    "Eigenspace",
    "Game",
    "GameJacobian",
    "LyapunovBranches",
    "LyapunovStart",
    "MapJacobian",
    "MaxLyapunovExponent",
    "MethodComparison",
    "MomentumChoice",
    "OptimizerMap",
    "PlayStatus",
    "Player",
    "SingularPairs",
    "Solution",
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
    "eigenspace",
    "extragradient_map",
    "game_jacobian",
    "gradients",
    "ipd",
    "leading_eigenpairs",
    "leading_singular_pairs",
    "lola",
    "lola_map",
    "lookahead",
    "lyapunov_exponents",
    "map_jacobian",
    "matching_pennies",
    "max_lyapunov_exponent",
    "max_lyapunov_start",
    "mix",
    "mixed",
    "momentum_map",
    "momentum_matrix",
    "momentum_spectrum",
    "optimal_momentum",
    "parameters",
    "plot_phase_portrait",
    "plot_ride_tree",
    "random_subspace_ipd",
    "ridge_rider",
    "sga",
    "sgd_map",
    "simultaneous",
    "small_ipd",
    "small_step_converges",
    "sos",
    "spectrum",
    "track",
    "zoo",
]
