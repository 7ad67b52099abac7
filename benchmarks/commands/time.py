"""Time of the norms beside Flax's, PyTorch's and the limit that memory sets.

    python -m benchmarks time       # batch norm, ResNet-50's shapes, float32
    python -m benchmarks time --norms layer group --shapes all \\
        --dtypes float32 bfloat16 --out out/

All implementations take turns within one run, so that other load on the
machine slows all of them alike. Compare ratios, not times.

The limit is the least number of reads and writes of an array like x, over the
bandwidth of a copy or of a sum, whichever is faster, measured in the same run.

PyTorch is compared where it is installed.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.implementations import IMPLEMENTATIONS, MODES, NORMS, PASSES, Case, limit
from benchmarks.timing import geometric_mean, interleave, machine, spread, versions

SHAPES = {
    "resnet50": [
        (8, 112, 112, 64),
        (8, 56, 56, 64),
        (8, 56, 56, 256),
        (16, 28, 28, 128),
        (8, 28, 28, 512),
        (32, 14, 14, 256),
        (8, 14, 14, 1024),
        (32, 7, 7, 512),
        (16, 7, 7, 2048),
    ],
    "mobilenet": [(8, 112, 112, 32), (8, 56, 56, 144), (16, 28, 28, 192), (16, 14, 14, 576), (32, 7, 7, 960)],
    "video": [(2, 8, 56, 56, 64), (2, 4, 28, 28, 128), (4, 4, 14, 14, 256)],
    "mlp": [(8192, 128), (4096, 1024), (512, 4096)],
    "odd": [(16, 31, 33, 67), (8, 57, 55, 3), (64, 13, 17, 37)],
}
DEFAULT_IMPLEMENTATIONS = ["jaxbn", "flax.linen", "torch-channels-last", "torch-contiguous"]


def measure(case: Case, implementations: list[str], rounds: int) -> dict:
    calls = {name: IMPLEMENTATIONS[name](case) for name in implementations}
    seconds = interleave(calls | {"limit": limit(case)}, rounds)
    medians = {name: {mode: statistics.median(s) for mode, s in modes.items()} for name, modes in seconds.items()}
    ends = {name: {mode: spread(s) for mode, s in modes.items()} for name, modes in seconds.items()}
    copy, total = medians.pop("limit").values()
    one_pass = min(copy / 2, total)
    medians["limit"] = {mode: PASSES[mode] * one_pass for mode in MODES}
    return {
        "norm": case.norm,
        "shape": case.shape,
        "dtype": case.dtype,
        "megabytes": case.megabytes,
        "gigabytes_per_second": case.megabytes / 1e3 / one_pass,
        "median_seconds": medians,
        "seconds_from_10_to_90_percent": ends,
    }


def report(results: list[dict], console: Console) -> None:
    """For each norm and mode a table of the first implementation's time over the time of each other."""
    for norm in dict.fromkeys(r["norm"] for r in results):
        rows = [r for r in results if r["norm"] == norm]
        first, *others = rows[0]["median_seconds"]
        for mode in MODES:
            table = Table(
                "x", "MB", "GB/s", f"{first}, ms", *others, title=f"{norm} norm, {mode}: time of {first} over that of"
            )
            ratios = []
            for r in rows:
                own = r["median_seconds"][first][mode]
                ratios.append([own / r["median_seconds"][name][mode] for name in others])
                low, high = r["seconds_from_10_to_90_percent"][first][mode]
                table.add_row(
                    str(Case(norm, tuple(r["shape"]), r["dtype"])),
                    f"{r['megabytes']:.1f}",
                    f"{r['gigabytes_per_second']:.0f}",
                    f"{1e3 * own:.2f} ({1e3 * low:.2f} to {1e3 * high:.2f})",
                    *(f"{ratio:.2f}" for ratio in ratios[-1]),
                )
            table.add_section()
            means = [geometric_mean(list(column)) for column in zip(*ratios, strict=True)]
            table.add_row("geometric mean", "", "", "", *(f"{m:.2f}" for m in means))
            console.print(table)


def draw(results: list[dict], path: pathlib.Path) -> None:
    """Draws bars of time over the limit, a panel for each mode."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(len(MODES), 1, figsize=(max(8, 0.9 * len(results)), 9), layout="constrained")
    for panel, mode in zip(panels, MODES, strict=True):
        names = [name for name in results[0]["median_seconds"] if name != "limit"]
        for k, name in enumerate(names):
            heights = [r["median_seconds"][name][mode] / r["median_seconds"]["limit"][mode] for r in results]
            panel.bar([i + 0.8 * k / len(names) for i in range(len(results))], heights, 0.8 / len(names), label=name)
        panel.axhline(1, color="black", linewidth=1)
        panel.set(title=mode, ylabel="time over the limit")
        labels = [str(Case(r["norm"], tuple(r["shape"]), r["dtype"])) for r in results]
        panel.set_xticks(range(len(results)), labels, rotation=20, ha="right", fontsize=7)
    panels[0].legend()
    figure.savefig(path, dpi=120)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    implementations = [name for name in DEFAULT_IMPLEMENTATIONS if name in IMPLEMENTATIONS]
    choice = {"nargs": "+", "help": "from: %(choices)s"}
    parser.add_argument("--norms", choices=NORMS, default=["batch"], metavar="NORM", **choice)
    parser.add_argument("--shapes", choices=[*SHAPES, "all"], default=["resnet50"], metavar="SHAPES", **choice)
    parser.add_argument(
        "--dtypes", choices=["float32", "bfloat16", "float16"], default=["float32"], metavar="DTYPE", **choice
    )
    parser.add_argument(
        "--implementations",
        nargs="+",
        choices=list(IMPLEMENTATIONS),
        default=implementations,
        metavar="NAME",
        help="the first is compared with the others, from: %(choices)s",
    )
    parser.add_argument("--rounds", type=int, default=21, help="how many times each call is timed (%(default)s)")
    parser.add_argument("--out", type=pathlib.Path, help="folder for results.json and results.png")


def run(arguments: argparse.Namespace) -> None:
    console = Console(width=160)
    chosen = SHAPES if "all" in arguments.shapes else arguments.shapes
    cases = [
        Case(norm, shape, dtype)
        for norm in arguments.norms
        for dtype in arguments.dtypes
        for group in chosen
        for shape in SHAPES[group]
        # Instance norm of [N, C] would have one value per statistic, which is an error.
        if not (norm == "instance" and len(shape) == 2)
    ]
    # disable=None shows the progress bar on terminals only, so that it does not fill log files.
    progress = tqdm(cases, unit="case", disable=None)
    results = [measure(case, arguments.implementations, arguments.rounds) for case in progress]
    report(results, console)
    console.print(versions())
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "results.json").write_text(json.dumps({"machine": machine(), "results": results}, indent=1))
        draw(results, arguments.out / "results.png")
