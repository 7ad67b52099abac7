"""How large the programs are that JAX makes of jaxbn's layers, and what it
costs until the first step has run: jaxbn beside Flax, and the goals that must
hold.

    python -m benchmarks size
    python -m benchmarks size --parts operations --out size.json

operations  StableHLO of one Linen layer on [8, 16, 16, 64], with gradients and
            in evaluation, lowered for CPU, CUDA and TPU: operations, branches
            (`case` and `if`), and calls of jax.checkpoint. Every mention of
            stablehlo.NAME in the text is an operation; those of a function
            count once, however often it is called. 4 seconds
lines       of StableHLO of a training step of a ResNet-50: loss and gradients
            on CPU, the step of `programs` on an H100. 15 seconds
first-step  CPU seconds to trace, lower and compile these steps and, for a TPU
            v5e, that of one bottleneck block; to trace `init` and evaluation
diagnose    CPU seconds of diagnose_linen and diagnose_nnx on a network of eight
            convolutions and norms, and those with other batches of the same
            shape, over the CPU seconds of tracing, lowering and compiling the
            network's forward pass in training
calls       CPU seconds of batch norm outside of jit on a tiny array

CPU seconds are those of all threads of the process, without children such as
ptxas. In `first-step` and `diagnose` each is measured in a process of its own
that has traced and compiled nothing but `init`; the processes take turns in
random order, and medians of three are compared. `calls` takes turns within one
process. The steps for chips need their compilers (see python -m benchmarks
programs --help); those that are missing are named, and left out.

If a goal is missed, the row says so and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import flax.linen as nn
import jax
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import jaxbn.linen
from benchmarks.chips import compilers
from benchmarks.comparison import STAGES, timed
from benchmarks.first_step import Seconds, chip_step, gradients
from benchmarks.implementations import NORMS
from benchmarks.program_size import BOTH, BRANCHES, EVAL, OPERATIONS, PLATFORMS, checkpoints, sizes, trace_layer
from benchmarks.steps.dispatch import CALLS, calls_outside_jit

REPEATS = 3
ROUNDS = 41
LINES = 1.05
# Of tracing, lowering and compiling together.
FIRST_STEP = {"cpu": 1.25, "H100": 1.05, "v5e": 1.05}
TRACING = {"init": 1.2, "evaluation": 1.2}
DIAGNOSES = {"first": 3, "again": 0.3}
CALLS_OUTSIDE_JIT = {"functions, train": 0.25, "functions, eval": 0.25, "linen, train": 1.15, "linen, eval": 1.25}
IMPLEMENTATIONS = ("jaxbn", "Flax")


class Row(NamedTuple):
    """A figure and, if there is one, that of Flax or of the forward pass; `most` limits the ratio, or the figure."""

    case: str
    figure: str
    value: float
    over: float | None = None
    most: float | None = None

    @property
    def ratio(self) -> float:
        return self.value if self.over is None else self.value / self.over

    @property
    def met(self) -> bool:
        return self.most is None or self.ratio <= self.most


def operations() -> Iterator[Row]:
    for kind in (BOTH, EVAL):
        for norm in NORMS:
            ours, flax = (trace_layer(module, norm, kind) for module in (jaxbn.linen, nn))
            found, other = sizes(ours), sizes(flax)
            case = f"{norm}, {kind}"
            for p in PLATFORMS:
                most = OPERATIONS[kind][norm]
                yield Row(case, f"operations, {p}", found[p].operations, other[p].operations, most)
            yield Row(case, "branches, at most", max(s.branches for s in found.values()), most=BRANCHES[kind])
            if (norm, kind) == ("batch", EVAL):
                yield Row(case, "checkpoints", checkpoints(ours), most=0)


def lines() -> Iterator[Row]:
    for case, platform in (("cpu", "cpu"), ("H100", "cuda")):
        counts = []
        for name in IMPLEMENTATIONS:
            function, arguments = (
                gradients(name) if case == "cpu" else chip_step(case, name, jax.local_devices(backend="cpu")[0])
            )
            lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,))
            counts.append(len(lowered.as_text().splitlines()))
        yield Row(f"ResNet-50 step, {case}", "lines", *counts, LINES)


def medians(workloads: list[str], subjects: tuple[str, ...]) -> dict[tuple[str, str], Seconds]:
    """CPU seconds of each stage of each workload for each of the subjects that `first_step` knows."""
    turns = [(workload, subject) for workload in workloads for subject in subjects]
    found: dict[tuple[str, str], list[Seconds]] = {turn: [] for turn in turns}
    chance = random.Random(0)
    order = [turn for _ in range(REPEATS) for turn in chance.sample(turns, len(turns))]
    # disable=None shows the progress bar on terminals only, so that it does not fill log files.
    for turn in tqdm(order, disable=None):
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        if turn[0] in ("H100", "v5e"):
            environment = compilers.environment(turn[0].lower())
        command = [sys.executable, "-m", "benchmarks.first_step", *turn]
        ran = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        found[turn].append(json.loads(ran.stdout))
    return {t: {stage: statistics.median(s[stage] for s in all_) for stage in all_[0]} for t, all_ in found.items()}


def steps_with_a_compiler() -> Iterator[str]:
    for workload in FIRST_STEP:
        try:
            if workload != "cpu":
                compilers.environment(workload.lower())
        except SystemExit as missing:
            print(f"first-step, {workload}: not measured. {missing}")
        else:
            yield workload


def first_step() -> Iterator[Row]:
    steps = list(steps_with_a_compiler())
    found = medians([*steps, *TRACING], IMPLEMENTATIONS)
    for workload in steps:
        both = [found[workload, name] for name in IMPLEMENTATIONS]
        case = f"{'bottleneck' if workload == 'v5e' else 'ResNet-50'} step, {workload}"
        for stage in STAGES:
            yield Row(case, f"{stage}, s", *(s[stage] for s in both))
        yield Row(case, "all three, s", *(sum(s.values()) for s in both), FIRST_STEP[workload])
    for workload, most in TRACING.items():
        yield Row(f"ResNet-50, {workload}", "trace, s", *(found[workload, n]["trace"] for n in IMPLEMENTATIONS), most)


def diagnose() -> Iterator[Row]:
    functions = ["diagnose_linen", "diagnose_nnx"]
    found = medians(functions, ("diagnose", "forward"))
    for function in functions:
        for call, most in DIAGNOSES.items():
            yield Row(
                function, f"{call}, s", found[function, "diagnose"][call], found[function, "forward"]["first"], most
            )


def calls() -> Iterator[Row]:
    todo = {name: {k: own[k] for k in CALLS_OUTSIDE_JIT} for name, own in calls_outside_jit().items()}
    for c in timed("calls", "outside jit", todo, ROUNDS, "us", CALLS, clock=time.process_time):
        values = (1e6 * c.values[name] for name in ("jaxbn", "flax"))
        yield Row("outside jit", f"{c.measure}, us", *values, CALLS_OUTSIDE_JIT[c.measure])


PARTS = {"operations": operations, "lines": lines, "first-step": first_step, "diagnose": diagnose, "calls": calls}


def report(part: str, rows: list[Row]) -> Table:
    beside = "forward pass" if part == "diagnose" else "Flax"
    table = Table("case", "figure", "jaxbn", beside, "ratio", "goal", title=part)
    for k, row in enumerate(rows):
        repeated = k > 0 and rows[k - 1].case == row.case
        values = ["" if v is None else f"{v:.2f}" if isinstance(v, float) else str(v) for v in (row.value, row.over)]
        goal = "" if row.most is None else f"{'met:' if row.met else '[bold]not met:[/bold]'} <= {row.most}"
        if k and not repeated:
            table.add_section()
        ratio = "" if row.over is None else f"{row.ratio:.2f}"
        table.add_row("" if repeated else row.case, row.figure, *values, ratio, goal)
    return table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    choice = {"nargs": "+", "help": "from: %(choices)s (default: all)"}
    parser.add_argument("--parts", choices=list(PARTS), default=list(PARTS), metavar="PART", **choice)
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")


def run(arguments: argparse.Namespace) -> str | None:
    """Measures and prints it all; returns the goals that are missed, if any."""
    # CPU seconds are of programs that run on the CPU, whatever else the machine has.
    jax.config.update("jax_platforms", "cpu")
    console, found, wrong = Console(width=100), [], []
    for part in dict.fromkeys(arguments.parts):
        rows = list(PARTS[part]())
        console.print(report(part, rows))
        wrong += [
            f"{part}, {row.case}, {row.figure}: {row.ratio:.2f}, not <= {row.most}" for row in rows if not row.met
        ]
        found += [{"part": part} | row._asdict() | {"met": row.met} for row in rows]
        if arguments.out:
            arguments.out.write_text(json.dumps(found, indent=1))
    return "\n".join(wrong) or None
