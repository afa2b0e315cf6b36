"""The best step size and momentum for a game whose Jacobian's eigenvalues are known, and what other methods reach."""

import cmath
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..optim._arguments import check_real
from ._methods import Method, alternating_roots, simultaneous_roots
from ._search import minimize
from .momentum import Eigenvalues, as_eigenvalues, check_rotations, off_axis

# Where the optimum can be, in units of the largest eigenvalue. The coefficient of the second highest power of x bounds
# a converging lr |s|: by |1 + 2A| + 3 <= 6 with simultaneous updates, by sqrt(12) with alternating ones, by less for
# the other methods.
_MAX_STEP = 6.0
_STEP_DECADES = 8
_DAMPING_DECADES = 4  # the modulus of beta goes up to 1 - 1e-4
_GRID = {"none": (129,), "real": (33, 33), "complex": (33, 17, 13)}

_CIRCLE = 64  # points on the circle around an eigenvalue, for a robust choice
_INTERVAL = 33  # and on the interval around an imaginary one
_ACTIVE = 8  # eigenvalues that a search starts with
_EXCHANGES = 8


@dataclass(frozen=True)
class MomentumChoice:
    """A step size and a momentum, and how fast a game with known eigenvalues converges with them.

    ``lr`` and ``beta`` are what ``nx.ComplexSGD(params, lr=choice.lr, momentum=choice.beta)`` takes. ``rate`` is the
    factor per step by which the distance to the solution shrinks in the long run; ``method`` and ``alternating`` are
    those of :func:`convergence_rate`.
    """

    lr: float
    beta: complex
    rate: float
    method: Method = "momentum"
    alternating: bool = False

    @property
    def gradients_per_step(self) -> int:
        """Evaluations of each player's gradient in one step."""
        return 2 if self.method == "extragradient" else 1

    @property
    def rate_per_gradient(self) -> float:
        """The factor for each gradient evaluation, by which methods of different cost compare."""
        return math.sqrt(self.rate) if self.gradients_per_step == 2 else self.rate

    def steps_to(self, tolerance: float) -> int:
        """The steps in which ``rate`` shrinks the distance by a factor of ``tolerance``, between 0 and 1.

        The count is for the long run: roots that meet, as at most optima, cost a few more steps at the start.

        >>> MomentumChoice(lr=0.5, beta=0.0, rate=0.1).steps_to(1e-6)
        6
        """
        if not 0 < tolerance < 1:
            raise ValueError(f"steps_to: tolerance must be between 0 and 1; got {tolerance}.")
        if not self.rate < 1:
            raise ValueError(f"steps_to: rate must be below 1 for the distance to shrink; got {self.rate}.")
        if self.rate == 0:
            return 1
        return math.ceil(math.log(tolerance) / math.log(self.rate) * (1 - 1e-12))

    def gradients_to(self, tolerance: float) -> int:
        """:meth:`steps_to` in gradient evaluations."""
        return self.gradients_per_step * self.steps_to(tolerance)


def optimal_momentum(eigenvalues: Eigenvalues, *, alternating: bool = False, robust: float = 0.0) -> MomentumChoice:
    r"""The step size and the complex momentum with the smallest :func:`convergence_rate` on a game.

    .. math::
        \min_{\text{lr},\, \beta} \; \max_{s} \; \rho(\text{lr}, \beta; s)

    over lr > 0, :math:`|\beta| \le 1 - 10^{-4}` and :math:`0 \le \arg \beta \le \pi` (the negative angle gives the same
    parameters). A search over all three at once, without derivatives and the same in every run: seconds. It finds the
    rate to about 1e-4 of its distance from 1; that it is the smallest is not proven. Where a real momentum does as well
    it is preferred, since it saves a buffer. Eigenvalues c times as large give an lr c times as small.

    An optimum is where roots meet, so it can be a needle: for min max xy with alternating updates the best rate is
    0.341, but 0.44 to 0.56 if beta is 0.001 off or the eigenvalue 0.1 %. Ask for as much ``robust`` as the eigenvalues
    are uncertain.

    This is the linear theory: it holds at a solution, and anywhere for a game with quadratic losses. Elsewhere, and for
    a network in training, eigenvalues may be negative or nearly zero, and no lr and beta come out or none that means
    anything; begin with the default of :class:`nestopt_ext.ComplexSGD` there. The slowest eigenvalues decide the rate,
    so the leading ones alone promise too much.

    Args:
        eigenvalues: of the game's Jacobian J, shape (n,). Those that agree up to conjugation count once.
        alternating: whether the two players of a bilinear zero-sum game take turns; all eigenvalues are then imaginary.
        robust: the relative error of the eigenvalues, from 0 to below 1: the largest rate is taken over all s' with
            |s' - s| <= robust |s| (imaginary s' if ``alternating``), at points of the circle, where the largest rate
            over a disc is. The returned ``rate`` is this largest one.

    Raises:
        TypeError: an argument is not of its kind.
        ValueError: not finite or out of range; an eigenvalue is 0 (nothing moves along it, the rate is 1 for every
            method); a negative real one (then p(1) = lr s (1 - Re beta) < 0 puts a root above 1 for every lr and beta);
            no converging lr and beta was found, as with eigenvalues well inside the left half plane.

    A well-conditioned minimization is a special case, with heavy ball's optimum, Polyak's
    ((sqrt(k) - 1) / (sqrt(k) + 1))^2 for beta and its root for the rate:

    >>> choice = optimal_momentum([1.0, 4.0])
    >>> round(choice.beta.real, 3), round(choice.rate, 3), round(choice.lr, 3)
    (0.111, 0.333, 0.444)
    """
    caller = "optimal_momentum"
    check_real(caller, "robust", robust, minimum=0.0)
    if robust >= 1:
        raise ValueError(f"{caller}: robust must be below 1, where eigenvalues may be 0; got {robust:g}.")
    given = as_eigenvalues(caller, eigenvalues)
    if alternating:
        check_rotations(caller, given)
    values = _distinct(caller, given)
    if not alternating and bool(((values.real < 0) & (values.imag == 0)).any()):
        worst = values[(values.real < 0) & (values.imag == 0)][0].real.item()
        raise ValueError(
            f"{caller}: eigenvalues must not be real and negative, the mark of a game that no lr and beta stabilize;"
            f" got {worst:.4g}. Take the Jacobian at a solution: away from one it says nothing of convergence."
        )
    choices = [_best(method, values, robust) for method in _Family.momentum(alternating)]
    found = [choice for choice in choices if choice is not None]
    if not found:
        worst = values[(values.real / values.abs()).argmin()].item()
        raise ValueError(
            f"{caller}: eigenvalues must allow some lr and beta to converge; got none that does, for real parts down to"
            f" that of {worst:.4g}{f' and robust={robust:g}' if robust else ''}."
            " An eigenvalue on the left is a direction in which the game is unstable: stabilize it, or lower robust."
        )
    best = min(found, key=lambda choice: choice.rate)
    slack = 1e-4 * (1 - best.rate)
    return next(choice for choice in found if choice.rate <= best.rate + slack)


@dataclass(frozen=True)
class MethodComparison(Mapping[str, MomentumChoice | None]):
    """The best setting of each method, by its name; None where no converging one was found. Prints as a table."""

    choices: dict[str, MomentumChoice | None]

    def __getitem__(self, name: str) -> MomentumChoice | None:
        return self.choices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.choices)

    def __len__(self) -> int:
        return len(self.choices)

    def __str__(self) -> str:
        head = ("method", "lr", "|beta|", "arg/pi", "rate per step", "per gradient", "gradients to 1e-6")
        rows = [head, *(_row(name, choice) for name, choice in self.choices.items())]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)


def compare_methods(eigenvalues: Eigenvalues) -> MethodComparison:
    """The best rate that each first-order method reaches on a game, each at its own best setting.

    Gradient descent, real momentum (heavy ball and negative), Nesterov's, complex momentum and optimistic gradients
    take one gradient a step, extragradient two: compare them by ``rate_per_gradient``. Where all eigenvalues are
    imaginary, as for two players of a bilinear zero-sum game, the methods with alternating updates are there too.

    Args, errors, search: as :func:`optimal_momentum`; a method that was not found to converge has None.

    >>> methods = compare_methods([1j, -1j])        # min max xy
    >>> [name for name, choice in methods.items() if choice is None]
    ['gradient descent', 'real momentum', 'Nesterov momentum']
    >>> round(methods["optimistic"].rate, 3), round(methods["extragradient"].rate, 3)     # 1/sqrt 2, sqrt(3)/2
    (0.707, 0.866)
    """
    given = as_eigenvalues("compare_methods", eigenvalues)
    values = _distinct("compare_methods", given)
    families = _SIMULTANEOUS if bool(off_axis(given).any()) else _SIMULTANEOUS + _ALTERNATING
    return MethodComparison({family.name: _best(family, values) for family in families})


# ---- the search -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Family:
    """A method with its settings free: which of them there are, and where they lie in the unit cube of the search."""

    name: str
    method: Method
    beta: str  # "none", "real" or "complex"
    alternating: bool = False

    @staticmethod
    def momentum(alternating: bool) -> "list[_Family]":
        """Real and complex momentum, the real one first."""
        families = _ALTERNATING if alternating else _SIMULTANEOUS
        return [family for family in families if family.method == "momentum" and family.beta != "none"]

    def settings(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """The lr, times the largest eigenvalue, and beta at points (m, d) of the unit cube, shape (m, 1) each."""
        lr = _MAX_STEP * 10 ** (_STEP_DECADES * (points[:, :1] - 1))
        if self.beta == "none":
            return lr, torch.zeros_like(lr)
        if self.beta == "real":
            signed = 2 * points[:, 1:2] - 1
            return lr, signed.sign() * _modulus(signed.abs())
        return lr, torch.polar(_modulus(points[:, 1:2]), math.pi * points[:, 2:].square())

    def rates(self, values: Tensor, lr: Tensor, beta: Tensor) -> Tensor:
        """The largest root of each eigenvalue: values (n,), lr and beta (m, 1) to (m, n)."""
        if self.alternating:
            return alternating_roots(self.method, lr * values.imag.abs(), beta).abs().amax(-1)
        return simultaneous_roots(self.method, lr * values, beta).abs().amax(-1)


_SIMULTANEOUS = (
    _Family("gradient descent", "momentum", "none"),
    _Family("real momentum", "momentum", "real"),
    _Family("Nesterov momentum", "nesterov", "real"),
    _Family("complex momentum", "momentum", "complex"),
    _Family("optimistic", "optimistic", "none"),
    _Family("extragradient", "extragradient", "none"),
)
_ALTERNATING = (
    _Family("alternating real momentum", "momentum", "real", alternating=True),
    _Family("alternating complex momentum", "momentum", "complex", alternating=True),
    _Family("alternating optimistic", "optimistic", "none", alternating=True),
)


def _modulus(unit: Tensor) -> Tensor:
    """A modulus of beta that is 0 at 0, and nears 1 by as many digits as ``unit`` says."""
    return 1 - 10 ** (-_DAMPING_DECADES * unit)


def _best(family: _Family, values: Tensor, robust: float = 0.0) -> MomentumChoice | None:
    """The family's best setting, None where the best one found does not converge.

    The search sees only some of the eigenvalues, at first the outermost; what it finds is tried on all of them, and the
    worst ones join, until none of the others is worse: the optimum for all is then that for some.
    """
    scale = values.abs().max()
    everything = _neighbours(values / scale, robust, family.alternating)
    active = _outermost(everything)
    best = None
    for _ in range(_EXCHANGES):
        point, lower = minimize(_worst_rate(family, everything[active]), _GRID[family.beta])
        lr, beta = family.settings(point[None])
        rates = family.rates(everything, lr, beta)[0]
        rate = rates.max().item()
        if best is None or rate < best.rate:
            best = MomentumChoice((lr / scale).item(), complex(beta.item()), rate, family.method, family.alternating)
        if rate <= lower + 1e-5 * abs(1 - lower) or lower >= 1:
            break
        active = torch.unique(torch.cat([active, rates.topk(min(4, rates.numel())).indices]))
    # A root of modulus 1, which stays for every lr, is computed as one only up to rounding.
    return best if best is not None and best.rate < 1 - 1e-13 else None


def _worst_rate(family: _Family, values: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda points: family.rates(values, *family.settings(points)).amax(-1)


def _neighbours(values: Tensor, robust: float, alternating: bool) -> Tensor:
    """The eigenvalues with those around them that are to converge as well."""
    if robust == 0:
        return values
    if alternating:
        factors = 1 + robust * torch.linspace(-1, 1, _INTERVAL, dtype=torch.float64)
    else:
        angles = 2 * math.pi * torch.arange(_CIRCLE, dtype=torch.float64) / _CIRCLE
        factors = 1 + robust * torch.polar(torch.ones_like(angles), angles)
    return (values[:, None] * factors).flatten()


def _outermost(values: Tensor) -> Tensor:
    """The indices of up to ``_ACTIVE`` eigenvalues that lie furthest out, by logarithm of the modulus and by angle."""
    if values.numel() <= _ACTIVE:
        return torch.arange(values.numel())
    plane = torch.stack([values.abs().log(), values.angle()], dim=-1)
    plane = (plane - plane.mean(0)) / plane.std(0).clamp_min(1e-12)
    angles = 2 * math.pi * torch.arange(_ACTIVE, dtype=torch.float64) / _ACTIVE
    indices: Tensor = torch.unique((plane @ torch.stack([angles.cos(), angles.sin()])).argmax(0))
    return indices


def _distinct(caller: str, values: Tensor) -> Tensor:
    """One of each pair of conjugate eigenvalues, complex128, each once; ValueError if one is 0 up to rounding."""
    if values.dim() != 1:
        raise ValueError(f"{caller}: eigenvalues must have shape (n,); got {tuple(values.shape)}.")
    smallest = values.abs().min().item()
    if smallest <= values.numel() * torch.finfo(values.dtype).eps * values.abs().max().item():
        raise ValueError(
            f"{caller}: eigenvalues must not be 0, where no method moves and every rate is 1; got {smallest:.4g}."
            " Leave out the directions in which the game is flat: eigenvalues[eigenvalues.abs() > tolerance]."
        )
    values = values.to(torch.complex128)
    upper = torch.view_as_real(torch.complex(values.real, values.imag.abs()))
    folded: Tensor = torch.view_as_complex(torch.unique(upper, dim=0))
    return folded


def _row(name: str, choice: MomentumChoice | None) -> tuple[str, ...]:
    if choice is None:
        return (name, "", "", "", "no converging setting found", "", "")
    modulus, angle = cmath.polar(choice.beta)
    rates = (f"{choice.rate:.5f}", f"{choice.rate_per_gradient:.5f}")
    return (
        name,
        f"{choice.lr:.4g}",
        f"{modulus:.4g}",
        f"{angle / math.pi:.4g}",
        *rates,
        f"{choice.gradients_to(1e-6)}",
    )
