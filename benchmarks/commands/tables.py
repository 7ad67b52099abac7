"""Markdown tables of what `python -m benchmarks time --out` saved.

    python -m benchmarks tables out/run1 out/run2 out/run3

Each argument is a folder of one run. A cell is the first implementation's time
over that of the column's: for each run the geometric mean over shapes, and in
parentheses the smallest and the largest ratio of a shape, which is the median
over runs.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics

from benchmarks.timing import geometric_mean

TORCH = ("torch-channels-last", "torch-contiguous")
BEST_TORCH = "torch, better layout"


def ratios(result: dict, mode: str) -> dict[str, float]:
    """The first implementation's time over that of each other; for PyTorch the faster of its two layouts counts."""
    seconds = {name: modes[mode] for name, modes in result["median_seconds"].items()}
    layouts = [seconds.pop(name) for name in TORCH if name in seconds]
    if layouts:
        seconds[BEST_TORCH] = min(layouts)
    own, *_ = seconds.values()
    return {name: own / s for name, s in list(seconds.items())[1:]}


def cell(shapes: list[list[float]]) -> str:
    """`shapes[i][k]` is the ratio of shape i in run k."""
    means = [geometric_mean(list(run)) for run in zip(*shapes, strict=True)]
    medians = [statistics.median(runs) for runs in shapes]
    return f"{', '.join(f'{m:.2f}' for m in means)} ({min(medians):.2f} to {max(medians):.2f})"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", type=pathlib.Path, help="that `time --out` has written")


def run(arguments: argparse.Namespace) -> None:
    runs = [json.loads((f / "results.json").read_text()) for f in arguments.folders]
    first = runs[0]["results"]
    cases = [(r["norm"], tuple(r["shape"]), r["dtype"]) for r in first]
    by_case = [{(r["norm"], tuple(r["shape"]), r["dtype"]): r for r in run["results"]} for run in runs]
    columns = list(ratios(first[0], "forward"))
    print(f"| norm, dtype | mode | {' | '.join(columns)} |\n|{'---|' * (2 + len(columns))}")
    for norm, dtype in dict.fromkeys((norm, dtype) for norm, _, dtype in cases):
        shapes = [case for case in cases if (case[0], case[2]) == (norm, dtype)]
        for mode in ("forward", "forward+backward", "eval"):
            found = [[ratios(run[case], mode) for run in by_case] for case in shapes]
            cells = [cell([[run[name] for run in shape] for shape in found]) for name in columns]
            print(f"| {norm}, {dtype} | {mode} | {' | '.join(cells)} |")
