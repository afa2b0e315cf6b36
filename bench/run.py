"""Runs the benchmarks: checks a case against its reference, then times all who take part in it, in turns.

Exit status: 0 when every case was right (a missed goal is printed and changes nothing), 1 when an op under test
disagreed with its reference and was therefore not timed, 2 for a wrong command line.
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: the folder to import from is the one above
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces each start and stop otherwise

import torch

from bench import cases as cases  # registers them
from bench import footprint, machine, registry, report, results
from bench.registry import OURS, Case, Contestant, Field, Setting
from bench.results import Result
from bench.timing import measure

SHARED = 1_000_000  # elements that any contestant spreads over all threads
ATTEMPTS = 3  # at a timing during which nobody else has the processor
CHECKED_STEPS = 2  # the second step is the first to see what is in the buffers


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    chosen = registry.select(options.case, quick=options.quick)
    if not chosen:
        names = ", ".join(case.name for case in registry.select("*", quick=options.quick))
        parser.error(f"--case must match a case; got {options.case!r}. Cases: {names}")
    if options.list:
        width = max(len(case.name) for case in chosen)
        for case in chosen:
            print(f"{case.name.ljust(width)}  {case.summary}")
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda must find a CUDA device; torch sees none. Use --device cpu.")
    device = torch.device("cuda", torch.cuda.current_device()) if options.device == "cuda" else torch.device("cpu")
    setting = Setting(device, options.quick)
    threads = options.threads or _default_threads(options.device)

    document: dict[str, Any] = {
        "format": 1,
        "machine": machine.facts(setting.device),
        "settings": {"quick": setting.quick, "threads": threads, "seconds_per_case": _budget(setting)},
        "results": _kept(options, chosen, threads) if options.update else [],
    }
    print(report.header(document["machine"], document["settings"]))
    red = False
    before = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # convolutions in float32 are compared with float64
    try:
        for case, num_threads in _progress([(case, n) for case in chosen for n in threads]):
            torch.set_num_threads(num_threads)
            result = run_case(case, setting, num_threads)
            report.show(result)
            found = {"date": machine.now(), "commit": document["machine"]["commit"]}
            document["results"].append(dataclasses.asdict(result) | found)
            red |= result.wrong is not None
            if options.json:  # after each case: an interrupted run keeps what it has
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    finally:
        torch.set_num_threads(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
    print(f"\n{report.legend()}")
    return 1 if red else 0


def run_case(case: Case, setting: Setting, threads: int) -> Result:
    """Checks and times one case with the threads that are set; a case whose op is wrong comes back without figures."""
    result = Result(case.name, case.summary, threads)
    field = case.build(setting)
    result.num_tensors, result.num_elements = field.num_tensors, field.num_elements
    result.left_out |= field.left_out
    contestants = []
    for contestant in field.contestants:
        fault = _fault(contestant)
        if fault is None:
            contestants.append(contestant)
        elif contestant.role == OURS:
            result.wrong = f"{contestant.name} {fault}"
            return result
        else:
            result.left_out[contestant.name] = fault
    _time(case, field, contestants, setting, result)
    return result


def _fault(contestant: Contestant) -> str | None:
    """What is wrong with a contestant, judged by its first steps; None if nothing is."""
    try:
        for _ in range(CHECKED_STEPS):
            contestant.step()
        error = registry.wrong_by(contestant, CHECKED_STEPS)
    except Exception as failure:  # whatever a rival raises (no compiler, no kernel), the others are still worth timing
        text = " ".join(str(failure).split())
        return f"raised {type(failure).__name__}: {text[:200]}"
    if error > contestant.tolerance:
        return f"disagrees with its reference by {error:.3g} eps (at most {contestant.tolerance:g})"
    return None


def _time(case: Case, field: Field, contestants: Sequence[Contestant], setting: Setting, result: Result) -> None:
    for contestant in contestants:
        contestant.expected = None  # the float64 reference makes room
    cuda = setting.device.type == "cuda"
    steps = {c.name: c.step for c in contestants}
    extra = footprint.extra_bytes(steps, setting.device)
    launches = {c.name: footprint.launches(c.step) if cuda else None for c in contestants}
    load = machine.load()
    shares = field.num_elements >= SHARED
    while True:
        samples = measure(
            steps,
            setting.device,
            budget=_budget(setting),
            min_block=1e-4 if setting.quick else 4e-3,
            min_rounds=3 if setting.quick else 11,
            patience=10 * _budget(setting),
            slow=1e-3 if setting.quick else 0.2,
        )
        summarize = functools.partial(results.row, ours=samples[contestants[0].name], threads=result.threads)
        result.rows = [
            summarize(c, samples[c.name], extra_bytes=extra[c.name], launches=launches[c.name]) for c in contestants
        ]
        result.attempts += 1
        disturbed = shares and any(row.threads_idle for row in result.rows)
        if setting.quick or not disturbed or result.attempts == ATTEMPTS:
            break
    result.load_average = (load, machine.load())
    rows = {row.name: row for row in result.rows}
    result.verdicts = results.judge(case.goals, rows, field.param_bytes, full_size=not setting.quick, shares=shares)


def _budget(setting: Setting) -> float:
    """Seconds of timing for one case at one thread count."""
    return 0.1 if setting.quick else 6.0


def _kept(options: argparse.Namespace, chosen: Sequence[Case], threads: Sequence[int]) -> list[dict[str, Any]]:
    """The results in the file that this run does not measure again; each says when and at which commit it was found."""
    if options.json is None or not options.json.exists():
        return []
    again = {(case.name, count) for case in chosen for count in threads}
    old: list[dict[str, Any]] = json.loads(options.json.read_text(encoding="utf-8"))["results"]
    return [result for result in old if (result["case"], result["threads"]) not in again]


def _default_threads(device: str) -> list[int]:
    return [1, 2] if device == "cpu" and (os.cpu_count() or 1) > 1 else [1]


def _progress(work: list[tuple[Case, int]]) -> Iterable[tuple[Case, int]]:
    try:
        from tqdm import tqdm
    except ImportError:
        return work
    bar: Iterable[tuple[Case, int]] = tqdm(work, unit="case", file=sys.stderr, disable=None)
    return bar


def _threads(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"must be positive numbers with commas between, such as 1,2; got {text!r}")
    return counts


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("bench/run.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--case", default="*", metavar="GLOB", help="which cases, by name (default: all)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: a test of the benchmarks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--update", action="store_true", help="keep the figures in FILE that are not measured again")
    parser.add_argument("--threads", type=_threads, metavar="N,M", help="CPU threads, one after another (default: 1,2)")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    return parser


if __name__ == "__main__":
    sys.exit(main())
