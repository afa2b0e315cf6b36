r"""Complex momentum on games, by linear analysis: eigenvalues, rates and stability of what ComplexSGD does.

Near a solution w* the gradients of a game are J (w - w*), and one step of :class:`~nestopt_ext.ComplexSGD` on every
player is a linear map of the buffers and the parameters. In the long run the distance to the solution shrinks by the
spectral radius of that map per step; where it is below 1, the game converges from nearby (Bertsekas, Nonlinear
Programming, Prop. 4.4.1; Lorraine, Acuna, Vicol, Duvenaud, "Complex Momentum for Optimization in Games", AISTATS 2022).
"""

from collections.abc import Callable, Sequence
from numbers import Complex, Real
from typing import TypeAlias

import torch
from torch import Tensor

from .. import _lists
from ._methods import METHODS, Method, alternating_roots, simultaneous_roots
from .jacobian import GameJacobian

#: Eigenvalues of a game's Jacobian: a real or complex tensor of shape (..., n), or numbers.
Eigenvalues: TypeAlias = Tensor | Sequence[complex]
#: A step size or a momentum: a number, or a tensor for many at once.
Setting: TypeAlias = Tensor | complex


def momentum_spectrum(eigenvalues: Eigenvalues, lr: Setting, beta: Setting, *, alternating: bool = False) -> Tensor:
    r"""All eigenvalues of the map that momentum makes of a game, from the eigenvalues s of the game's Jacobian.

    Simultaneous updates: the three roots, for each s, of

    .. math::
        (x - 1)(x^2 - 2 A x + |\beta|^2) + \text{lr}\; s\; x\, (x - A) = 0, \qquad A = \operatorname{Re} \beta.

    Alternating updates, defined for two players of a bilinear zero-sum game, where :math:`s = \pm i \sigma`: the six
    roots, for each pair, of

    .. math::
        (x - 1)^2 (x^2 - 2 A x + |\beta|^2)^2 + \text{lr}^2 \sigma^2 x^3 (x - A)^2 = 0.

    Pass one eigenvalue of each pair to get each root once. Other games that take turns have no such polynomial: see
    :func:`momentum_matrix`.

    Args:
        eigenvalues: of J, shape (..., n).
        lr: step size, finite and >= 0; a tensor broadcasts against ``eigenvalues``.
        beta: momentum, real or complex, of modulus below 1; a tensor broadcasts against ``eigenvalues``.
        alternating: whether the players take turns, the second seeing the first one's new parameters.

    Returns:
        The roots in no particular order, complex128 on the CPU, shape (..., n, 3), alternating (..., n, 6). For a real
        ``beta`` they include ``beta`` itself (alternating: twice), the eigenvalue of the imaginary buffer, which then
        never moves the parameters; it never has the largest modulus. Roots that are well apart are right to about
        1e-15, roots that meet m at a time to the m-th root of that, as rounding of lr alone would move them.

    Raises:
        TypeError: an argument is not of its kind.
        ValueError: not finite, empty, out of range, or eigenvalues off the imaginary axis with ``alternating``.

    Source: the characteristic polynomials of the map of Lorraine et al. 2022, that is of :func:`momentum_matrix`.

    With a real momentum of 1/2 and lr s = 1/2 the cubic is (x - 1/2)(x^2 - x + 1/2):

    >>> roots = momentum_spectrum([2.0], lr=0.25, beta=0.5).flatten()
    >>> sorted((round(x.real, 6), round(x.imag, 6)) for x in roots.tolist())
    [(0.5, -0.5), (0.5, 0.0), (0.5, 0.5)]
    """
    caller = "momentum_spectrum"
    values = as_eigenvalues(caller, eigenvalues)
    steps, momenta = _as_lr(caller, lr), _as_beta(caller, beta).to(torch.complex128)
    return _roots(caller, values, steps, momenta, "momentum", alternating)


def convergence_rate(
    eigenvalues: Eigenvalues,
    lr: Setting,
    beta: Setting = 0.0,
    *,
    method: Method = "momentum",
    alternating: bool = False,
) -> Tensor:
    r"""The factor by which one step shrinks the distance to a solution, in the long run: a spectral radius.

    Args:
        eigenvalues: of the game's Jacobian J, shape (..., n); the last dimension is the game's, and is reduced.
        lr: step size, finite and >= 0; a tensor broadcasts against ``eigenvalues``, so give it a last dimension of 1.
        beta: momentum, of modulus below 1; 0 for the methods without one. A tensor as for ``lr``.
        method: "momentum" (ComplexSGD; gradient descent for ``beta`` 0), "nesterov" (ComplexSGD with ``nesterov``),
            "optimistic" (w - lr (2 g - g_previous)) or "extragradient" (w - lr g(w - lr g(w)), two gradients a step).
        alternating: whether the two players of a bilinear zero-sum game take turns; not with extragradient.

    Returns:
        The rate, a float64 tensor of the broadcast shape without its last dimension. Below 1 the game converges, at 1
        some direction neither grows nor shrinks (always so with an eigenvalue 0), above 1 it diverges.

    Raises:
        TypeError, ValueError: as :func:`momentum_spectrum`; a ``beta`` given to a method without one.

    Gradient descent on min max xy turns outwards, extragradient inwards, sqrt(1 - lr^2 + lr^4):

    >>> convergence_rate([1j, -1j], lr=0.75)
    tensor(1.2500, dtype=torch.float64)
    >>> convergence_rate([1j, -1j], lr=0.75, method="extragradient")
    tensor(0.8683, dtype=torch.float64)
    """
    caller = "convergence_rate"
    if method not in METHODS:
        raise ValueError(f"{caller}: method must be one of {', '.join(METHODS)}; got {method!r}.")
    if method == "extragradient" and alternating:
        raise ValueError(
            f"{caller}: alternating must be False for extragradient, whose players extrapolate together; got True."
        )
    values = as_eigenvalues(caller, eigenvalues)
    steps, momenta = _as_lr(caller, lr), _as_beta(caller, beta)
    if method in ("optimistic", "extragradient") and bool((momenta != 0).any()):
        raise ValueError(f"{caller}: beta must be 0 for {method}, which has no momentum; got {beta}.")
    radii = _roots(caller, values, steps, momenta, method, alternating).abs().amax(-1)
    if alternating:  # double roots at 1 for turns this small, which rounding would part; the effect is of second order
        radii = torch.where(values.imag.abs() * steps <= torch.finfo(torch.float64).eps, 1.0, radii)
    return radii.amax(-1)


def converges(eigenvalues: Eigenvalues, lr: Setting, beta: Setting, *, alternating: bool = False) -> Tensor:
    r"""Whether momentum converges on a game with these eigenvalues: :func:`convergence_rate` is below 1.

    Args, errors: as :func:`convergence_rate`. Returns a bool tensor, of no dimension for one game and one setting.

    On min max xy no real momentum converges with simultaneous updates, a complex one does:

    >>> import cmath
    >>> bool(converges([1j, -1j], lr=0.05, beta=0.9))
    False
    >>> bool(converges([1j, -1j], lr=0.05, beta=cmath.rect(0.9, cmath.pi / 8)))
    True
    """
    return convergence_rate(eigenvalues, lr, beta, alternating=alternating) < 1


def small_step_converges(beta: Setting, *, alternating: bool = False) -> Tensor:
    r"""Whether momentum converges on purely rotating games (imaginary eigenvalues) for every small enough lr.

    With H the filter of the gradients, H(1) = Re[1/(1 - beta)] > 0, the roots near 1 move inwards exactly if

    .. math::
        \operatorname{Re}\frac{1 + \beta}{(1 - \beta)^2} < 0 \quad\text{(simultaneous: } 2 H'(1) > H(1)\text{)},
        \qquad
        \operatorname{Re}\frac{\beta}{(1 - \beta)^2} < 0 \quad\text{(alternating: } H'(1) > 0\text{)}.

    So no real momentum does it with simultaneous updates, every negative one does with alternating ones, and an
    imaginary ``beta`` = ib does it simultaneously for b > 1/sqrt(3). Derived by expanding :func:`momentum_spectrum` to
    second order in lr; it extends Gidel et al., "Negative Momentum for Improved Game Dynamics", AISTATS 2019.

    Args:
        beta: momentum of modulus below 1, a number or a tensor.
        alternating: whether the players take turns.

    Returns:
        A bool tensor of the shape of ``beta``.

    Raises:
        TypeError, ValueError: ``beta`` is not a number or not of modulus below 1.

    >>> small_step_converges(torch.tensor([0.5j, 0.6j, -0.5]))
    tensor([False,  True, False])
    >>> small_step_converges(torch.tensor([0.5j, 0.5, -0.5]), alternating=True)
    tensor([ True, False,  True])
    """
    momenta = _as_beta("small_step_converges", beta).to(torch.complex128)
    numerator = momenta if alternating else 1 + momenta
    return (numerator / (1 - momenta).square()).real < 0


def momentum_matrix(
    jacobian: Tensor | GameJacobian,
    lr: float | Sequence[float],
    beta: complex | Sequence[complex],
    *,
    players: Sequence[int] | None = None,
    alternating: bool = False,
) -> Tensor:
    r"""The matrix that takes ComplexSGD's state on a game with constant Jacobian J from one step to the next.

    The state is :math:`[\operatorname{Re} b, \operatorname{Im} b, w - w^*]`, the two momentum buffers and the
    parameters of all players. With A = Re beta, C = Im beta and simultaneous updates the matrix is

    .. math::
        \begin{pmatrix} A & -C & J \\ C & A & 0 \\ -\text{lr}\, A & \text{lr}\, C & I - \text{lr}\, J \end{pmatrix}.

    With ``alternating`` it is the product of one such matrix for each player, each leaving the others' state as it is.

    Args:
        jacobian: J, a real tensor of shape (..., P, P), or a :class:`GameJacobian`.
        lr: step size, or one for each player.
        beta: momentum, or one for each player, of modulus below 1.
        players: the number of parameters of each player, in the order of the rows of J; a :class:`GameJacobian` knows
            them, a tensor needs them where players take turns or differ in ``lr`` or ``beta``.
        alternating: whether the players take turns, in their order.

    Returns:
        A float64 matrix on the CPU, shape (..., 3P, 3P), exact but for the rounding of one product per player. It is
        three times as wide as the game: for large games use :func:`momentum_spectrum`.

    Raises:
        TypeError, ValueError: an argument is not of its kind or shape, not finite or out of range; ``players`` missing.

    Source: Lorraine et al. 2022; their buffer is the negative of ours, which is that of the optimizer.

    >>> momentum_matrix(torch.tensor([[2.0]]), lr=0.25, beta=0.5j)
    tensor([[ 0.0000, -0.5000,  2.0000],
            [ 0.5000,  0.0000,  0.0000],
            [ 0.0000,  0.1250,  0.5000]], dtype=torch.float64)
    """
    caller = "momentum_matrix"
    if isinstance(jacobian, GameJacobian):
        players = jacobian.sizes if players is None else players
        jacobian = jacobian.dense()
    matrix = _as_square(caller, jacobian)
    size = matrix.shape[-1]
    sizes = _player_sizes(caller, players, size, (lr, beta), alternating)
    step = _per_parameter(caller, "lr", lr, sizes, _as_lr)
    momentum = _per_parameter(caller, "beta", beta, sizes, _as_beta).to(torch.complex128)
    identity = torch.eye(size, dtype=torch.float64)
    decay, turn = (torch.diag(part).expand_as(matrix) for part in (momentum.real, momentum.imag))
    zero = torch.zeros_like(matrix)
    real = torch.cat([decay, -turn, matrix], dim=-1)
    imaginary = torch.cat([turn, decay, zero], dim=-1)
    parameters = torch.cat([zero, zero, identity.expand_as(matrix)], dim=-1) - step[:, None] * real
    together = torch.stack([real, imaginary, parameters], dim=-3)  # (..., block, row, column)
    if not alternating:
        return together.flatten(-3, -2)
    total = torch.eye(3 * size, dtype=torch.float64).expand(*matrix.shape[:-2], -1, -1).clone()
    blocks = total.view(*matrix.shape[:-2], 3, size, 3 * size)
    start = 0
    for count in sizes:
        rows = slice(start, start + count)
        turned = together[..., rows, :].flatten(-3, -2) @ total
        blocks[..., rows, :] = turned.view(*matrix.shape[:-2], 3, count, 3 * size)
        start += count
    return total


# ---- arguments ------------------------------------------------------------------------------------------------------


def as_eigenvalues(caller: str, eigenvalues: Eigenvalues) -> Tensor:
    """The eigenvalues as a complex tensor (..., n) on the CPU, complex64 only if they came in single precision."""
    values = _as_tensor(caller, "eigenvalues", eigenvalues, sequence=True)
    if values.dim() == 0 or values.numel() == 0:
        raise ValueError(
            f"{caller}: eigenvalues must have at least one element in its last dimension;"
            f" got shape {_lists.shape_name(values.shape)}."
        )
    single = values.dtype in (torch.float32, torch.complex64, torch.bfloat16, torch.float16)
    return values.to(torch.complex64 if single else torch.complex128)


def off_axis(values: Tensor) -> Tensor:
    """Which eigenvalues are off the imaginary axis, by more than the root of rounding."""
    mask: Tensor = values.real.abs() > torch.finfo(values.dtype).eps ** 0.5 * values.abs().max()
    return mask


def check_rotations(caller: str, values: Tensor) -> None:
    """All eigenvalues are +- i sigma, up to rounding."""
    off = off_axis(values)
    if bool(off.any()):
        raise ValueError(
            f"{caller}: eigenvalues must be imaginary for alternating updates (two players, bilinear, zero-sum);"
            f" got {values[off][0].item():.4g}. Other games that take turns need more than their eigenvalues:"
            " take torch.linalg.eigvals(momentum_matrix(jacobian, lr, beta, players=sizes, alternating=True))."
        )


def _roots(caller: str, values: Tensor, lr: Tensor, beta: Tensor, method: Method, alternating: bool) -> Tensor:
    if alternating:
        check_rotations(caller, values)
        turn = _broadcast(caller, values.imag.abs().double(), lr, beta)
        return alternating_roots(method, turn, beta)
    step = _broadcast(caller, values.to(torch.complex128), lr, beta)
    return simultaneous_roots(method, step, beta)


def _broadcast(caller: str, values: Tensor, lr: Tensor, beta: Tensor) -> Tensor:
    try:
        torch.broadcast_tensors(values, lr, beta)  # type: ignore[no-untyped-call]
    except RuntimeError:
        shapes = " and ".join(_lists.shape_name(t.shape) for t in (values, lr, beta))
        raise ValueError(
            f"{caller}: eigenvalues, lr and beta must broadcast; got the shapes {shapes}."
            " Give lr and beta a last dimension of 1 to meet every eigenvalue."
        ) from None
    return values * lr


def _as_lr(caller: str, lr: object, name: str = "lr") -> Tensor:
    values = _as_tensor(caller, name, lr)
    if values.is_complex():
        raise TypeError(f"{caller}: {name} must be real; got {lr}. Turn beta instead.")
    if bool((values < 0).any()):
        raise ValueError(f"{caller}: {name} must be >= 0; got {values.min().item():.4g}.")
    return values.double()


def _as_beta(caller: str, beta: object, name: str = "beta") -> Tensor:
    """Complex128, or float64 where every momentum is real."""
    values = _as_tensor(caller, name, beta)
    values = values.to(torch.complex128) if values.is_complex() else values.double()
    if bool((values.abs() >= 1).any()):
        worst = values.flatten()[values.abs().argmax()].item()
        raise ValueError(f"{caller}: {name} must have modulus below 1; got {worst:.4g} of modulus {abs(worst):.4g}.")
    return values.real if values.is_complex() and not bool(values.imag.any()) else values


def _as_tensor(caller: str, name: str, value: object, *, sequence: bool = False) -> Tensor:
    """Finite numbers as a detached tensor on the CPU; Python numbers in double precision."""
    if isinstance(value, Tensor):
        tensor = value.detach().cpu()
        if tensor.dtype == torch.bool:
            raise TypeError(f"{caller}: {name} must hold numbers; got bool.")
    else:
        items = list(value) if sequence and isinstance(value, Sequence) and not isinstance(value, str) else [value]
        wrong = next((x for x in items if not isinstance(x, Complex) or isinstance(x, bool)), None)
        if wrong is not None or (sequence and not isinstance(value, Sequence)):
            wanted = "a tensor or a sequence of numbers" if sequence else "a number or a tensor"
            remedy = " Pass its .eigenvalues." if hasattr(value, "eigenvalues") else ""
            raise TypeError(f"{caller}: {name} must be {wanted}; got {value!r:.80}.{remedy}")
        real = all(isinstance(x, Real) for x in items)
        tensor = torch.tensor(items, dtype=torch.float64 if real else torch.complex128)
        tensor = tensor if sequence else tensor[0]
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{caller}: {name} must be finite; got {tensor[~tensor.isfinite()][0].item()}.")
    return tensor


def _as_square(caller: str, jacobian: object) -> Tensor:
    if not isinstance(jacobian, Tensor):
        raise TypeError(f"{caller}: jacobian must be a Tensor or a GameJacobian; got {_lists.value_name(jacobian)}.")
    matrix = _as_tensor(caller, "jacobian", jacobian)
    if matrix.is_complex():
        raise TypeError(f"{caller}: jacobian must be real; got {_lists.dtype_name(matrix.dtype)}.")
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2] or matrix.shape[-1] == 0:
        raise ValueError(f"{caller}: jacobian must be square; got shape {_lists.shape_name(matrix.shape)}.")
    return matrix.double()


def _player_sizes(
    caller: str, players: Sequence[int] | None, size: int, settings: tuple[object, ...], alternating: bool
) -> list[int]:
    if players is None:
        if alternating or any(isinstance(setting, Sequence) for setting in settings):
            raise ValueError(
                f"{caller}: players must be given where players take turns or differ in lr or beta; got None."
                " Pass the number of parameters of each player."
            )
        return [size]
    sizes = list(players)
    for i, count in enumerate(sizes):
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise TypeError(f"{caller}: players[{i}] must be the number of its parameters; got {count!r}.")
    if sum(sizes) != size:
        raise ValueError(f"{caller}: players must add up to the {size} rows of jacobian; got {sizes}.")
    return sizes


def _per_parameter(
    caller: str, name: str, setting: object, sizes: list[int], check: Callable[[str, object, str], Tensor]
) -> Tensor:
    """The setting of each parameter's player, a vector."""
    if not isinstance(setting, Sequence):
        value = check(caller, setting, name)
        if value.dim() > 0:
            raise ValueError(
                f"{caller}: {name} must be a number, or a list of one for each player;"
                f" got a tensor of shape {_lists.shape_name(value.shape)}."
            )
        return value.expand(sum(sizes))
    if len(setting) != len(sizes):
        raise ValueError(f"{caller}: {name} must have one value for each of {len(sizes)} players; got {len(setting)}.")
    values = [check(caller, value, f"{name}[{i}]") for i, value in enumerate(setting)]
    return torch.cat([value.expand(count) for value, count in zip(values, sizes, strict=True)])
