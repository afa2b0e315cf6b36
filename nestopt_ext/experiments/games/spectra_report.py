"""What a reader of the spectra is told."""

from ._contest import steps_at
from ._tables import count, momentum, short
from .spectra import TOLERANCE, SpectraResult


def tables(result: SpectraResult) -> list[tuple[list[str], list[list[str]]]]:
    """A header and a row for each game and momentum."""
    header = ["game", "momentum", "lr", "largest modulus", f"steps to {short(TOLERANCE)}"]
    games = [*result.games, *([result.gan] if result.gan is not None else [])]
    rows = []
    for game in games:
        for step in game.steps:
            steps = count(steps_at(step.rate, TOLERANCE))
            rows.append([game.name, momentum(step.beta), f"{step.lr:.3g}", f"{step.rate:.5f}", steps])
    return [(header, rows)]


def findings(result: SpectraResult) -> list[str]:
    """How much of the disc of momenta converges, and where it is fastest."""
    lines = []
    for phases in result.maps:
        kind = "alternating" if phases.alternating else "simultaneous"
        share = float(phases.small_steps.double().mean())
        lines.append(
            f"min max xy, {kind}: every small enough step converges on {100 * share:.0f} % of the map, the fastest"
            f" momentum takes {count(float(phases.steps.min()))} steps."
        )
    if result.gan is not None:
        values = result.gan.eigenvalues
        turning = float((values.imag.abs() > 1e-3 * values.abs().max()).double().mean())
        lines.append(
            f"{result.gan.name}: of the {len(values)} leading eigenvalues {100 * turning:.0f} % are not real, and"
            f" {int((values.real < 0).sum())} have a negative real part, where no momentum with small steps converges."
        )
    return lines
