"""What a reader of the Dirac GAN is told."""

import math

from ._tables import momentum
from .dirac import DiracResult


def tables(result: DiracResult) -> list[tuple[list[str], list[list[str]]]]:
    """A header and a row for each method."""
    header = ["method", "momentum", "lr", "gradients", "last distance", "rate", "measured rate", "spirals"]
    rows = []
    for path in result.paths:
        measured = "-" if math.isnan(path.measured_rate) else f"{path.measured_rate:.4f}"
        rows.append(
            [
                path.walk.method,
                momentum(path.walk.beta),
                f"{path.walk.lr:g}",
                f"{path.gradients:,}",
                f"{float(path.distances[-1]):.2g}",
                f"{path.rate:.4f}",
                measured,
                "in" if path.inwards else "out",
            ]
        )
    return [(header, rows)]


def findings(result: DiracResult) -> list[str]:
    """What the figures say, for complex momentum and against it."""
    first, second = result.jacobian.tolist()
    per_gradient = {path.walk.method: path.rate ** ((len(path.points) - 1) / path.gradients) for path in result.paths}
    quickest = min(per_gradient, key=per_gradient.__getitem__)
    return [
        f"Eigenvalues of the game at its solution: {first:.3g} and {second:.3g}, a rotation with nothing that pulls"
        " inwards.",
        "rate: the factor per step by which the distance changes near the solution; extragradient takes two gradients a"
        " step.",
        f"Fastest per gradient of these settings: {quickest}, {per_gradient[quickest]:.3f}; simultaneous complex"
        f" momentum {per_gradient['complex momentum']:.3f}.",
    ]
