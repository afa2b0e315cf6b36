"""Ridge Rider: branches along eigenvectors of negative curvature, which are followed as they turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..optim._arguments import check_real
from ._linearized import Step, check_step
from .spectrum import _check_count

_CALLER = "EigenRidges"


@dataclass(frozen=True, kw_only=True)
class EigenRidges:
    r"""Ridge Rider as a method of :func:`ridge_rider`, whose problem is then a loss or a game.

    The ridges of a point are the eigenvectors e of the Hessian whose eigenvalue :math:`\lambda` is negative, in both
    directions. A ride repeats :math:`w \leftarrow w + \text{step} \cdot e`, and takes for the next (:math:`\lambda`, e)
    the eigenpair of the Hessian at w that overlaps most with e, its sign kept, until :math:`\lambda \ge 0`, or the
    overlap is below ``min_overlap``, or ``max_steps`` are taken. Where curvature is negative still, the ridges of that
    point are the next branches; elsewhere the ride has found a solution, which ``finish`` leads to its very bottom.
    Begin at a saddle that keeps as many of the problem's symmetries as may be. Near a saddle the loss falls along a
    ridge; away from one, one of its two directions climbs, and a loss with negative curvature all the way up wants
    bounds, such as ``max_depth``.

    For a game of several players the Hessian is the Jacobian J of the simultaneous gradient, and negative means a
    negative real part. A complex pair :math:`u \pm i q` has two ridges, u and what q has beside u; its plane is
    followed as one, with its basis turned as little as may be.

    Args:
        step: length of a step along the ridge, > 0.
        max_steps: steps of one ride along a ridge.
        num_directions: the most ridges of a point, those of most negative curvature; where one of each group is ridden,
            groups count. None is all, for which a problem may have up to 64 parameters.
        min_curvature: :math:`\lambda < -` this makes a ridge, and an end with one is no solution yet. It is to be above
            what rounding makes of 0, in float32 above all. A network has some nearly everywhere: there take the order
            of the start's, which ``Bifurcation.values`` holds, so that ``finish`` leads on from where less is left.
        min_overlap: in (0, 1], below which the ridge is lost: the cosine of the angle between e and the eigenspace, of
            equal eigenvalues, where it is found again. For planes see :func:`track`.
        repeated: "one" rides one ridge of each group of equal eigenvalues, which symmetries cause; "all" rides the
            orthonormal ones that the decomposition gives, whose directions within the group are arbitrary.
        finish: a learning rate for gradient descent, or a map of parameters [N, P], such as ``sgd_map(game, lr)``; None
            to leave solutions where the ride ends. An end that turns out to be a saddle is branched at.
        finish_steps: the most steps of it.
        tolerance: it has converged when a step is not longer than this.
        num_products: beyond 64 parameters, Hessian-vector products for each step of a ride.
        search_products: beyond 64 parameters, the most of them to find the ridges of a point, and as many to tell
            whether an end is a minimum.

    Up to 64 parameters, Hessians are formed and decomposed, those of all branches at once. Beyond, products alone are
    taken: ridges are found by Lanczos' method with restarts, one of each group, and followed by a Rayleigh-Ritz
    approximation from the Krylov space of ``num_products`` vectors that begins at e. A ridge that is not found to full
    precision has negative curvature all the same, and is ridden. For games of several players, and for all ridges of a
    group, Arnoldi's method is used (:func:`spectrum`); it warns of rough ones.

    Whether an end is a minimum is told by its lowest eigenvalue: exactly, where the problem has no more than 64 or
    ``search_products`` parameters; beyond, by bounds from Lanczos' method (Kuczynski and Wozniakowski 1992), the lower
    of which may fail in 2 of 1000 cases at most. After k products they are :math:`(\ln(1648 \sqrt P) / (2 k - 1))^2` of
    the width of the spectrum apart, about: 0.0007 for 200 products and 1000 parameters. An end that may be a minimum
    counts as one, and ``Branch.curvature`` holds the bounds: it is one for certain where the lower is not below
    ``-min_curvature``, and undecided elsewhere. For games of several players Arnoldi's method looks for the eigenvalue,
    and the lower bound is -inf where it is not found.

    Raises TypeError or ValueError for bad arguments.

    Source: Parker-Holder et al., Ridge Rider: finding diverse solutions by following eigenvectors of the Hessian
    (2020). Theirs follows a ridge in large problems by descent on :math:`|H e / \lambda - e|^2` in e and
    :math:`\lambda`. The group of equal eigenvalues as one space, games, complex pairs and the second look at finished
    points are ours.
    """

    step: float = 0.01
    max_steps: int = 1000
    num_directions: int | None = None
    min_curvature: float = 1e-6
    min_overlap: float = 0.5
    repeated: Literal["one", "all"] = "one"
    finish: float | Step | None = None
    finish_steps: int = 1000
    tolerance: float = 1e-8
    num_products: int = 10
    search_products: int = 200

    def __post_init__(self) -> None:
        for name in ("max_steps", "finish_steps"):
            _check_count(_CALLER, name, getattr(self, name), 1)
        _check_count(_CALLER, "num_products", self.num_products, 2)
        _check_count(_CALLER, "search_products", self.search_products, 2)
        if self.num_directions is not None:
            _check_count(_CALLER, "num_directions", self.num_directions, 1)
        for name in ("step", "min_curvature", "min_overlap", "tolerance"):
            check_real(_CALLER, name, getattr(self, name), minimum=0.0)
        if self.step == 0:
            raise ValueError(f"{_CALLER}: step must be > 0; got {self.step}.")
        if not 0 < self.min_overlap <= 1:
            raise ValueError(f"{_CALLER}: min_overlap must be in (0, 1]; got {self.min_overlap}.")
        if self.repeated not in ("one", "all"):
            raise ValueError(f"{_CALLER}: repeated must be one or all; got {self.repeated!r}.")
        if self.finish is not None and not callable(self.finish):
            check_real(_CALLER, "finish", self.finish)
            if self.finish <= 0:
                raise ValueError(f"{_CALLER}: finish must be > 0 for a learning rate; got {self.finish}.")
        elif self.finish is not None:
            check_step(_CALLER, self.finish)
