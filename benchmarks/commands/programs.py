"""Programs compiled for a GPU and a TPU on a machine that has neither: jaxbn beside Flax, and the goals that must hold.

    python -m benchmarks.programs                                            # all: about half an hour on two cores
    python -m benchmarks.programs --chips h100 --workloads batch ResNet-50 --out programs.json

The compilers are an extra, 1 GB: pip install -e '.[dev,benchmarks]' and, as CUDA's plugin asks for libraries that
compiling does not need,

    V=$(python -c 'import jax; print(jax.__version__)'); pip install --no-deps jax-cuda12-pjrt==$V jax-cuda12-plugin==$V

Read from the compiled program of one device, exact and the same every time: bytes read and written (passes are
these over the bytes of x), kernels, collectives, temporary memory, and on the TPU the cycles that its compiler
expects. None of it is a time. On the GPU bytes are those of the operands and results of kernels, so what a kernel
reads twice counts once; on the TPU they are the compiler's own count, with memory on the chip and padding.

A row that is worse than its goal (benchmarks/_program_list.py) is printed, and ends the script in an error.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

from rich.console import Console
from rich.table import Table

from benchmarks.chip_programs import DTYPES, LAYERS, STEPS, Goal, Program, goals, programs
from benchmarks.chips import CHIPS, environment

# The unit of each figure, and how it is printed.
UNITS = {
    "passes": (1, ".2f"),
    "bytes": (1e9, ".2f"),
    "cycles": (1e6, ".2f"),
    "kernels": (1, ".0f"),
    "collectives": (1, ".0f"),
    "temporary": (1e6, ".0f"),
}
NAMES = {"bytes": "GB", "cycles": "Mcycles", "temporary": "temporary MB"}
Figures = dict[str, dict[str, float]]  # Of each contender.


def compiled(chip: str, todo: list[Program]) -> dict[Program, Figures]:
    """The figures, from a process of its own: what each compiler needs is settled before JAX is imported."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "programs.json"
        file.write_text(json.dumps([p._asdict() for p in todo]))
        command = [sys.executable, "-m", "benchmarks.compile_for_chip", chip, str(file)]
        subprocess.run(command, env=environment(chip), check=True)
        return {Program(**row): figures for row in json.loads(file.read_text()) for figures in [row.pop("figures")]}


def most(goal: Goal, figures: Figures) -> float:
    return goal.most * (figures[goal.over][goal.figure] if goal.over else 1) + goal.more


def text(figure: str, value: float | None) -> str:
    unit, form = UNITS[figure]
    return "-" if value is None else f"{value / unit:{form}}"


def verdicts(program: Program, figures: Figures) -> list[tuple[bool, str]]:
    """Whether each goal is met, and what it is."""
    found = []
    for goal in goals(program):
        value, limit = figures["jaxbn"][goal.figure], most(goal, figures)
        ratio = (
            f" {value / figures[goal.over][goal.figure]:.2f}" if goal.over and figures[goal.over][goal.figure] else ""
        )
        more = f" + {goal.more:g}" if goal.more else ""
        asked = f"{goal.most:g}{' x ' + goal.over if goal.over else ''}{more}"
        found.append((value <= limit, f"{NAMES.get(goal.figure, goal.figure)}{ratio} <= {asked}"))
    return found


def report(chip: str, results: dict[Program, Figures]) -> Table:
    shown = [f for f in UNITS if f != "cycles" or chip == "v5e"]
    contenders = list(dict.fromkeys(name for figures in results.values() for name in figures))
    title = f"{chip}: {', '.join(contenders)}"
    table = Table("program", *(NAMES.get(f, f) for f in shown), "least passes", "goal", title=title)
    for program, figures in results.items():
        cells = [" ".join(text(f, own.get(f)) for own in figures.values()) for f in shown]
        wanted = "\n".join(
            f"{'met:' if met else '[bold]not met:[/bold]'} {goal}" for met, goal in verdicts(program, figures)
        )
        table.add_row(str(program), *cells, str(program.least_passes or ""), wanted)
    return table


def main() -> str | None:
    """Compiles and prints it all; returns what is worse than its goal, if anything."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.programs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    workloads = list(dict.fromkeys([*LAYERS, *(name for names in STEPS.values() for name in names)]))
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--workloads", nargs="+", choices=workloads, default=workloads)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    arguments = parser.parse_args()
    console, rows, wrong = Console(width=180), [], []
    for chip in arguments.chips:
        todo = [p for p in programs(chip) if p.workload in arguments.workloads and p.dtype in arguments.dtypes]
        results = compiled(chip, todo)
        console.print(report(chip, results))
        for program, figures in results.items():
            found = verdicts(program, figures)
            wrong += [f"{chip}, {program}: {goal} is not met" for met, goal in found if not met]
            rows.append(program._asdict() | {"figures": figures, "goals": [{"met": m, "goal": g} for m, g in found]})
        if arguments.out:
            arguments.out.write_text(json.dumps(rows, indent=1))
    return "\n".join(wrong) or None


if __name__ == "__main__":
    sys.exit(main())
