"""What a reader of the bilinear experiment is told."""

import math

from ._tables import count, momentum, outcome, short
from .bilinear import BilinearGame, BilinearResult

_HEADER = ["momentum", "lr", "gradients", "predicted", "with the optimizers"]


def tables(result: BilinearResult) -> list[tuple[list[str], list[list[str]]]]:
    """For each game a header and a row for each method at its best."""
    return [([game.name, *_HEADER], _rows(game)) for game in result.games]


def findings(result: BilinearResult) -> list[str]:
    """What the figures say, for complex momentum and against it."""
    config = result.config
    lines = [
        f"Gradient evaluations until the distance is {short(config.tolerance)} of the first; extragradient takes two a"
        f" step. Every method with the best of {config.lrs} learning rates and, where it has one, of its momenta.",
        "Predicted: by the spectral radius alone. With the optimizers: the same setting played by ComplexSGD, ExtraSGD"
        " and OptimisticSGD.",
    ]
    for game in result.games:
        costs = {entry.method: entry.gradients for entry in game.entries}
        ours = costs["complex momentum"]
        lines += [
            f"{game.name}: simultaneous complex momentum takes {count(ours)} gradients against {count(costs[rival])} of"
            f" {rival}{_verdict(ours, costs[rival])}."
            for rival in ("optimistic", "extragradient")
        ]
        turns, negative = costs["complex momentum, alternating"], costs["negative momentum, alternating"]
        lines.append(
            f"{game.name}: with alternating updates it takes {count(turns)} against {count(negative)} of negative"
            " momentum."
        )
    return lines


def _verdict(ours: float, theirs: float) -> str:
    if not math.isfinite(ours) or not math.isfinite(theirs):
        return ""
    return f", {ours / theirs:.1f} times as many" if ours >= theirs else f", {theirs / ours:.1f} times fewer"


def _rows(game: BilinearGame) -> list[list[str]]:
    return [
        [
            entry.method,
            momentum(entry.beta),
            f"{entry.lr:.3g}" if entry.lr == entry.lr else "-",
            outcome(entry),
            count(entry.predicted),
            count(entry.replayed),
        ]
        for entry in game.entries
    ]
