"""Programs compiled for an NVIDIA H100 and a TPU v5e, on a machine without them:
jaxbn beside Flax, and the goals that must hold.

    python -m benchmarks programs
    python -m benchmarks programs --chips h100 --workloads batch ResNet-50 \\
        --out programs.json

The compilers are an extra of 1 GB. CUDA's plugin requires libraries that
compiling does not need, hence --no-deps:

    pip install -e '.[dev,benchmarks]'
    V=$(python -c 'import jax; print(jax.__version__)')
    pip install --no-deps jax-cuda12-pjrt==$V jax-cuda12-plugin==$V

The figures are read from the program that one device runs, and are the same
every time: bytes read and written (passes are these over the bytes of x),
kernels, collectives, what a device receives by them, temporary memory, and on
the TPU the cycles that its compiler estimates. Nothing is timed. On the GPU
bytes are those of the operands and results of kernels, so what a kernel reads
twice counts once. On the TPU they are the compiler's own count, which includes
on-chip memory and padding.

If a goal is missed (benchmarks/chips/programs.py has them), the row says so and
the exit status is 1.
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

from benchmarks.chips.compilers import CHIPS, environment
from benchmarks.chips.programs import DTYPES, LAYERS, STEPS, Goal, Program, goals, programs

# The unit of each figure, and how it is printed.
UNITS = {
    "passes": (1, ".2f"),
    "bytes": (1e9, ".2f"),
    "cycles": (1e6, ".3f"),
    "kernels": (1, ".0f"),
    "collectives": (1, ".0f"),
    "received": (1e3, ".1f"),
    "temporary": (1e6, ".0f"),
}
NAMES = {"bytes": "GB", "cycles": "Mcycles", "received": "kB received", "temporary": "temporary MB"}
Figures = dict[str, dict[str, float]]  # Of each implementation.


def compiled(chip: str, todo: list[Program]) -> dict[Program, Figures]:
    """The figures, from a child process: each compiler needs an environment that JAX reads when it is imported."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "programs.json"
        file.write_text(json.dumps([p._asdict() for p in todo]))
        command = [sys.executable, "-m", "benchmarks.chips.compile", chip, str(file)]
        subprocess.run(command, env=environment(chip), check=True)
        return {Program(**row): figures for row in json.loads(file.read_text()) for figures in [row.pop("figures")]}


def most(goal: Goal, figures: Figures) -> float:
    return goal.most * (figures[goal.over][goal.figure] if goal.over else 1) + goal.more


def text(figure: str, value: float | None) -> str:
    unit, form = UNITS[figure]
    return "-" if value is None else f"{value / unit:{form}}"


def verdicts(program: Program, figures: Figures) -> list[tuple[bool, str]]:
    """Whether each goal is met, and the goal as text."""
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
    implementations = list(dict.fromkeys(name for figures in results.values() for name in figures))
    title = f"{chip}: {', '.join(implementations)}"
    table = Table("program", *(NAMES.get(f, f) for f in shown), "least passes", "goal", title=title)
    for program, figures in results.items():
        cells = [" ".join(text(f, own.get(f)) for own in figures.values()) for f in shown]
        wanted = "\n".join(
            f"{'met:' if met else '[bold]not met:[/bold]'} {goal}" for met, goal in verdicts(program, figures)
        )
        table.add_row(str(program), *cells, str(program.least_passes or ""), wanted)
    return table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    workloads = list(dict.fromkeys([*LAYERS, *(name for names in STEPS.values() for name in names)]))
    choice = {"nargs": "+", "help": "from: %(choices)s (default: all)"}
    parser.add_argument("--chips", choices=CHIPS, default=CHIPS, metavar="CHIP", **choice)
    parser.add_argument("--workloads", choices=workloads, default=workloads, metavar="NAME", **choice)
    parser.add_argument("--dtypes", choices=DTYPES, default=DTYPES, metavar="DTYPE", **choice)
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")


def run(arguments: argparse.Namespace) -> str | None:
    """Compiles and prints it all; returns the goals that are missed, if any."""
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
