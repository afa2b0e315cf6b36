"""What a run shows: the closing table, the tuned values, and sentences."""

import math

from .config import SEARCHES
from .results import MethodResult
from .run import SelfTuneResult

LABELS = {
    "delta-stn": "Delta-STN",
    "centred": "centred STN, not linearized",
    "stn": "STN",
    "hypernet": "linear hypernetwork, local",
    "ift": "implicit differentiation",
    "fixed": "start values, not tuned",
    "random": "random search",
    "tpe": "TPE",
    "gp": "Gaussian process",
    "grid": "grid search",
}

Table = tuple[list[str], list[list[str]]]


def tables(result: SelfTuneResult) -> list[Table]:
    """What each method reached, and the hyperparameters at its lowest validation loss."""
    return [_scores(result), _values(result)]


def findings(result: SelfTuneResult) -> list[str]:
    """What a reader must know to read the tables, and what they say."""
    config = result.config
    budget = f"each method {_budget(config.budget)}" if config.budget else f"a training of {config.epochs} epochs"
    searched = not config.budget and any(method.method in SEARCHES for method in result.methods)
    searches = f", {config.trials} of them for a search" if searched else ""
    lines = [
        f"{config.data}, {config.model} of width {config.width}, {len(result.problem.space)} hyperparameters; seed"
        f" {config.seed}; {budget}{searches}.",
        "Losses are those at the lowest validation loss, which flatters; only the test part was not looked at.",
        "Time is that of training steps alone; epochs are passes over the training part.",
    ]
    for method in result.methods:
        if method.skipped:
            lines.append(f"{LABELS[method.method]}: skipped, {method.skipped}.")
        elif method.fixed:
            lines.append(f"{LABELS[method.method]}: cannot move {', '.join(method.fixed)}, which stay at their start.")
        elif method.method not in (*SEARCHES, "fixed") and method.epochs <= config.warmup:
            lines.append(
                f"{LABELS[method.method]}: moved nothing, since it ended within --warmup {config.warmup}. Lower that,"
                " or raise --epochs or --budget."
            )
    sound = [method for method in result.methods if not method.skipped]
    if len(sound) > 1:
        ranked = sorted(sound, key=lambda method: float(method.best["valid_loss"]))
        order = " < ".join(LABELS[method.method] for method in ranked)
        lines.append(f"Lowest validation loss: {order}.")
    return lines


def _scores(result: SelfTuneResult) -> Table:
    header = ["method", "trainings", "epochs", "time", "valid loss / acc", "test loss / acc", "last valid loss"]
    if result.config.data == "ptb":
        header[4:6] = ["valid perplexity", "test perplexity"]
    return header, [_score_row(method, len(header), ptb=result.config.data == "ptb") for method in result.methods]


def _score_row(method: MethodResult, length: int, *, ptb: bool) -> list[str]:
    if method.skipped:
        return [LABELS[method.method], "skipped", *["-"] * (length - 2)]
    last = "-" if method.method in SEARCHES else f"{method.final['valid_loss']:.4f}"
    spent = [str(method.trainings), f"{method.epochs:.1f}", f"{method.seconds:.1f} s"]
    return [LABELS[method.method], *spent, *(_cell(method.best, part, ptb=ptb) for part in ("valid", "test")), last]


def _cell(point: dict[str, float], part: str, *, ptb: bool) -> str:
    if ptb:
        return f"{math.exp(point[f'{part}_loss']):.2f}"
    return f"{point[f'{part}_loss']:.4f} / {100 * point[f'{part}_accuracy']:.2f} %"


def _values(result: SelfTuneResult) -> Table:
    sound = [method for method in result.methods if not method.skipped]
    header = ["hyperparameter", "start", *(method.method for method in sound)]
    rows = []
    for d in result.problem.space:
        found = [method.best["values"][d.name] for method in sound]
        rows.append([d.name, *(f"{value:.3g}" for value in (d.start, *found))])
    return header, rows


def _budget(text: str) -> str:
    if text[-1] in "sm":
        return f"{text[:-1]} {'seconds' if text[-1] == 's' else 'minutes'}"
    return f"{text} epochs"
