"""Prints a results file as Markdown tables, for bench/README.md: python -m bench.table bench/results/FILE.json."""

import json
import sys
from typing import Any


def main(path: str) -> None:
    """One line per case and thread count; then the goals."""
    with open(path, encoding="utf-8") as file:
        results: list[dict[str, Any]] = json.load(file)["results"]
    results = sorted((r for r in results if r["rows"]), key=lambda r: (r["case"], r["threads"]))
    print("| case | threads | ours | GB/s | ours / each of the others (inner 80 % of rounds) |")
    print("| --- | --- | --- | --- | --- |")
    for result in results:
        ours, *others = result["rows"]
        quotients = "; ".join(f"{row['name']}{_mark(row)} {_ratio(row['ours_over_this'])}" for row in others)
        milliseconds = ours["seconds"]["median"] * 1e3
        print(f"| {result['case']} | {result['threads']} | {milliseconds:.3g} ms{_mark(ours)}", end=" ")
        bandwidth = f"{ours['gb_per_second']:.1f}" if ours["bytes_moved"] else ""
        print(f"| {bandwidth} | {quotients} |")
    print("\n| goal | case | threads | at most | measured | |")
    print("| --- | --- | --- | --- | --- | --- |")
    for result in results:
        for verdict in result["verdicts"]:
            word = {True: "met", False: "**missed**", None: f"not judged: {verdict['note']}"}[verdict["met"]]
            measured = "" if verdict["measured"] is None else f"{verdict['measured']:.3f}"
            print(f"| {verdict['text']}; {verdict['against']} | {result['case']} | {result['threads']}", end=" ")
            print(f"| {verdict['at_most']:.3f} | {measured} | {word} |")


def _ratio(spread: dict[str, float]) -> str:
    return f"**{spread['median']:.2f}** ({spread['p10']:.2f}-{spread['p90']:.2f})"


def _mark(row: dict[str, Any]) -> str:
    return "!" if row["threads_idle"] else ""


if __name__ == "__main__":
    main(sys.argv[1])
