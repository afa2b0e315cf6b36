"""Prints a results file as Markdown tables, for bench/README.md: python -m bench.table bench/results/FILE.json."""

import json
import re
import sys
from collections import defaultdict
from typing import Any

from .registry import TRAINING_PASS
from .results import pass_seconds


def main(path: str) -> None:
    """One line per case and thread count, in passes where a case counts in those; then the goals."""
    with open(path, encoding="utf-8") as file:
        results: list[dict[str, Any]] = json.load(file)["results"]
    results = sorted((r for r in results if r["rows"]), key=lambda r: (_in_order(r["case"]), r["threads"]))
    _ratios([r for r in results if pass_seconds(r) is None])
    _passes([r for r in results if pass_seconds(r) is not None])
    _goals(results)


def _ratios(results: list[dict[str, Any]]) -> None:
    if not results:
        return
    print("| case | threads | ours | GB/s | ours / each of the others (inner 80 % of rounds) |")
    print("| --- | --- | --- | --- | --- |")
    for result in results:
        ours, *others = result["rows"]
        quotients = "; ".join(f"{row['name']}{_mark(row)} {_ratio(row['ours_over_this'])}" for row in others)
        milliseconds = ours["seconds"]["median"] * 1e3
        print(f"| {result['case']} | {result['threads']} | {milliseconds:.3g} ms{_mark(ours)}", end=" ")
        bandwidth = f"{ours['gb_per_second']:.1f}" if ours["bytes_moved"] else ""
        print(f"| {bandwidth} | {quotients} |")
    print()


def _passes(results: list[dict[str, Any]]) -> None:
    """A table for each family of cases, with a column for each contestant: the passes that it takes."""
    families: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        families[result["case"].rpartition("/")[0]].append(result)
    for family, members in families.items():
        names = list(dict.fromkeys(row["name"] for result in members for row in result["rows"]))
        names.remove(TRAINING_PASS)
        print(f"| {family} | threads | {TRAINING_PASS}, ms | {' | '.join(names)} |")
        print(f"| --- | --- | --- | {' | '.join('---' for _ in names)} |")
        for result in members:
            unit = pass_seconds(result) or 1.0
            counts = {row["name"]: f"{row['seconds']['median'] / unit:.3g}{_mark(row)}" for row in result["rows"]}
            case = result["case"].rpartition("/")[2]
            cells = " | ".join(counts.get(name, "") for name in names)
            print(f"| {case} | {result['threads']} | {unit * 1e3:.3g} | {cells} |")
        print()


def _goals(results: list[dict[str, Any]]) -> None:
    print("| goal | case | threads | at most | measured | |")
    print("| --- | --- | --- | --- | --- | --- |")
    for result in results:
        for verdict in result["verdicts"]:
            word = {True: "met", False: "**missed**", None: f"not judged: {verdict['note']}"}[verdict["met"]]
            measured = "" if verdict["measured"] is None else f"{verdict['measured']:.3f}"
            print(f"| {verdict['text']}; {verdict['against']} | {result['case']} | {result['threads']}", end=" ")
            print(f"| {verdict['at_most']:.3f} | {measured} | {word} |")


def _in_order(case: str) -> list[str | int]:
    """A key that puts K5 before K20: text and numbers take turns."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", case)]


def _ratio(spread: dict[str, float]) -> str:
    return f"**{spread['median']:.2f}** ({spread['p10']:.2f}-{spread['p90']:.2f})"


def _mark(row: dict[str, Any]) -> str:
    return "!" if row["threads_idle"] else ""


if __name__ == "__main__":
    main(sys.argv[1])
