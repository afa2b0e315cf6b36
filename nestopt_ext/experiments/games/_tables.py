"""Numbers as people write them, in tables and pictures."""

import cmath
import math

from ._contest import Entry


def count(value: float) -> str:
    """A number of evaluations.

    >>> count(1234.4), count(math.inf), count(math.nan)
    ('1,234', '-', '-')
    """
    return f"{value:,.0f}" if math.isfinite(value) else "-"


def momentum(beta: complex) -> str:
    """A momentum in polar form, or as a real number.

    >>> momentum(-0.5), momentum(0.5j), momentum(0)
    ('-0.5', '0.5 exp(0.5 iπ)', '-')
    """
    if not beta:
        return "-"
    angle = cmath.phase(beta) / math.pi
    if abs(angle) < 1e-9 or abs(angle) > 1 - 1e-9:
        return f"{beta.real:.3g}"
    return f"{abs(beta):.3g} exp({angle:.3g} iπ)"


def outcome(entry: Entry) -> str:
    """The gradient evaluations of an entry, or why there are none."""
    if math.isfinite(entry.gradients):
        return count(entry.gradients)
    return "diverges" if entry.diverged else "too slow"


def short(value: float) -> str:
    """A number as people write it.

    >>> short(1e-06), short(0.001)
    ('1e-6', '0.001')
    """
    return f"{value:g}".replace("e-0", "e-").replace("e+0", "e")
