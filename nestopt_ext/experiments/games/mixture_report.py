"""What a reader of the mixture experiment is told: the closing table, and what the heat map says about the claims."""

from collections.abc import Callable, Iterator

from .mixture_config import Cell, angle_label
from .mixture_results import TUNING, CellResult, MixtureResult, merit

#: The angles between which the published best one lies, in units of pi.
PUBLISHED = (1 / 32, 1 / 4)
#: From here on a real momentum is one that people use.
REAL_FROM = 0.5


def findings(result: MixtureResult) -> list[str]:
    """What the heat map says about the published claims, true or not."""
    config = result.config
    lines = [
        f"Ring of {config.modes} Gaussians; simultaneous {config.optimizer}, {config.loss} loss, {config.steps} steps."
        f" Mean (standard deviation) over test seeds {config.test.start} to {config.test.stop - 1}; every momentum with"
        f" the best of {len(config.learning_rates)} effective learning rates on"
        f" {config.tuning_seeds} other seed{'s' * (config.tuning_seeds > 1)}. Modes covered are a mean over the second"
        " half of the looks at each training."
    ]
    best = result.best(lambda cell: True)
    turned = result.best(lambda cell: not cell.is_real)
    chosen = result.best(lambda cell: not cell.is_real, on=TUNING)
    if best is not None:
        low, high = PUBLISHED
        inside = not best.cell.is_real and low < best.cell.angle < high
        lines.append(
            f"Best momentum: {_says(best)}. Its angle {'lies' if inside else 'does NOT lie'} strictly between"
            f" {angle_label(low)} and {angle_label(high)}."
        )
    if turned is not None and chosen is not None:
        lines.append(f"Best complex momentum: {_says(turned)}.")
        lines += _against_real(turned, result)
        lines.append(f"Chosen by the tuning seeds alone, the best complex momentum is {_says(chosen)}.")
        if chosen is not turned:
            lines += _against_real(chosen, result)
    lines += _at_equal_lrs(result)
    rates = config.learning_rates
    edge = sum(len(rates) > 1 and r.effective_lr in (min(rates), max(rates)) for r in result.cells)
    lines.append(f"{edge} of {len(result.cells)} momenta chose the lowest or the highest learning rate.")
    return lines


def equal_lr(result: MixtureResult, lr: float) -> dict[Cell, tuple[float, float]]:
    """`merit` of every cell on the tuning seeds with the one effective learning rate ``lr``."""
    return {r.cell: merit([run for run in r.tuning if run.effective_lr == lr]) for r in result.cells}


def table_rows(result: MixtureResult, count: int = 8) -> tuple[list[str], list[list[str]]]:
    """The closing table as text: the ``count`` best momenta, then the best of each real kind that is not among them."""
    ranked = sorted(result.cells, key=lambda r: r.merit, reverse=True)
    kinds: list[Callable[[Cell], bool]] = [
        lambda cell: cell.modulus == 0,
        lambda cell: cell.momentum.real > 0 and cell.is_real,
        lambda cell: cell.momentum.real < 0 and cell.is_real,
    ]
    shown = ranked[:count] + [r for kind in kinds if (r := result.best(kind)) is not None and r not in ranked[:count]]
    header = ["momentum", "effective lr", "lr", "modes", "high-quality points", "JS, bits", "diverged"]
    return header, [
        [
            str(r.cell),
            f"{r.effective_lr:g}",
            f"{r.test[0].lr:.2g}",
            f"{r.modes:.2f} ({r.spread:.2f})",
            f"{100 * r.quality:.0f} %",
            f"{r.js:.3f}",
            f"{r.diverged} of {len(r.test)}",
        ]
        for r in shown
    ]


def _against_real(ours: CellResult, result: MixtureResult) -> Iterator[str]:
    """How a complex momentum stands to the best real ones, which the test seeds themselves name."""
    kinds: list[tuple[str, Callable[[Cell], bool]]] = [
        (f"real momentum >= {REAL_FROM:g}", lambda cell: cell.is_real and cell.momentum.real >= REAL_FROM),
        ("real momentum of any kind", lambda cell: cell.is_real),
    ]
    for name, holds in kinds:
        rival = result.best(holds)
        if rival is not None:
            wins = sum(own.modes > other.modes for own, other in zip(ours.test, rival.test, strict=True))
            verdict = "more" if ours.modes > rival.modes else "NOT more"
            yield (
                f"It covers {verdict} modes than the best {name}: {_says(rival)};"
                f" more in {wins} of {len(rival.test)} seeds."
            )


def _at_equal_lrs(result: MixtureResult) -> Iterator[str]:
    """Best complex and best real momentum where all move by the same effective learning rate."""
    for lr in result.config.learning_rates:
        merits = equal_lr(result, lr)
        real = [cell for cell in merits if cell.is_real]
        turned = [cell for cell in merits if not cell.is_real]
        if real and turned:
            best = [max(cells, key=lambda cell: merits[cell]) for cells in (turned, real)]
            both = ", ".join(f"{cell}: {merits[cell][0]:.2f} modes" for cell in best)
            yield f"At effective lr {lr:g} for all, on the tuning seeds, the best complex and the best real: {both}."


def _says(result: CellResult) -> str:
    return (
        f"{result.cell} with {result.modes:.2f} ({result.spread:.2f}) modes, {100 * result.quality:.0f} % high-quality"
    )
