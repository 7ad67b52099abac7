"""Tables and a picture of jaxbn over Flax."""

from __future__ import annotations

import math
import pathlib
import statistics

from rich.console import Console
from rich.table import Table

from benchmarks.comparison import Comparison
from benchmarks.timing import geometric_mean

# Their measures are sizes.
SIZED = ("growth", "devices")


def exponent(rows: list[Comparison], name: str) -> float:
    """p of the least-squares fit `time = constant * size**p`."""
    sizes = [math.log(float(r.measure)) for r in rows]
    return statistics.linear_regression(sizes, [math.log(r.values[name]) for r in rows]).slope


def report(rows: list[Comparison], console: Console) -> None:
    for part in dict.fromkeys(r.part for r in rows):
        own = [r for r in rows if r.part == part]
        table = Table("case", "measure", "jaxbn / flax", "jaxbn", "flax", title=part)
        for case in dict.fromkeys(r.case for r in own):
            same_case = [r for r in own if r.case == case]
            for k, r in enumerate(same_case):
                table.add_row("" if k else case, r.measure, f"{r.ratio:.2f}", r.text("jaxbn"), r.text("flax"))
            if part in SIZED:
                powers = [f"size ** {exponent(same_case, name):.2f}" for name in ("jaxbn", "flax")]
                table.add_row("", "geometric mean", f"{geometric_mean([r.ratio for r in same_case]):.2f}", *powers)
            table.add_section()
        if part not in SIZED:
            for measure in dict.fromkeys(r.measure for r in own):
                ratios = [r.ratio for r in own if r.measure == measure]
                if len(ratios) > 1:
                    table.add_row("geometric mean", measure, f"{geometric_mean(ratios):.2f}", "", "")
        console.print(table)


def draw(rows: list[Comparison], path: pathlib.Path) -> None:
    """Draws jaxbn over Flax, a panel for each part: bars, or lines over sizes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parts = list(dict.fromkeys(r.part for r in rows))
    heights = [4 if part in SIZED else 1 + 0.22 * sum(r.part == part for r in rows) for part in parts]
    figure, panels = plt.subplots(
        len(parts), 1, figsize=(10, sum(heights)), height_ratios=heights, layout="constrained", squeeze=False
    )
    for part, panel in zip(parts, panels[:, 0], strict=True):
        own = [r for r in rows if r.part == part]
        if part in SIZED:
            for case in dict.fromkeys(r.case for r in own):
                same_case = [r for r in own if r.case == case]
                panel.plot([float(r.measure) for r in same_case], [r.ratio for r in same_case], marker="o", label=case)
            panel.set_xscale("log", base=2)
            panel.set(title=part, xlabel="size", ylabel="time, jaxbn / flax", ylim=(0, None))
            panel.axhline(1, color="black", linewidth=1)
            panel.legend()
        else:
            panel.barh([f"{r.case}: {r.measure}" for r in own], [r.ratio for r in own])
            panel.axvline(1, color="black", linewidth=1)
            panel.tick_params(axis="y", labelsize=7)
            panel.set(title=part, xlabel="jaxbn / flax")
            panel.invert_yaxis()
    figure.savefig(path, dpi=120)
