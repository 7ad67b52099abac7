"""Reads and writes of memory by the programs compiled for CPU, in units of the
bytes of x: jaxbn, Flax's Linen layers, and the fewest possible. Nothing is
timed, so the counts are the same every time.

Counted are the operands and results of the program's top-level operations.
What a fused loop reads twice counts once, as if the second read always hit the
cache.
`python -m benchmarks programs` does the same for GPUs and TPUs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import jax
from rich.console import Console
from rich.table import Table

from benchmarks.chips.hlo import traffic
from benchmarks.implementations import MODES, NORMS, PASSES, PROGRAMS, Case, arrays, forward_and_backward

DTYPES = ("float32", "bfloat16")
SHAPE = (8, 56, 56, 256)
IMPLEMENTATIONS = ("jaxbn", "flax.linen")


def passes(function: Callable, *arguments) -> float:
    x = arguments[0]
    return traffic(jax.jit(function).lower(*arguments).compile().as_text()) / x.nbytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, metavar="DTYPE", help="%(choices)s")


def run(arguments: argparse.Namespace) -> None:
    table = Table("norm", "dtype", "mode", *IMPLEMENTATIONS, "least", title=f"reads and writes of x {SHAPE}")
    for dtype in arguments.dtypes:
        for norm in NORMS:
            case = Case(norm, SHAPE, dtype)
            x, dy = arrays(case)
            for mode in MODES:
                counts = []
                for name in IMPLEMENTATIONS:
                    train, evaluate, variables = PROGRAMS[name](case)
                    functions = {
                        "forward": (train, (x, variables)),
                        "forward+backward": (forward_and_backward(train), (x, dy, variables)),
                        "eval": (evaluate, (x, variables)),
                    }
                    function, given = functions[mode]
                    counts.append(passes(function, *given))
                # A row fits into the cache, so its sums need no further read from memory.
                least = PASSES[mode] if norm not in ("layer", "rms") else 2 + 3 * (mode == "forward+backward")
                if mode == "eval" and norm in ("group", "instance"):
                    least = PASSES["forward"]
                table.add_row(norm, dtype, mode, *(f"{c:.1f}" for c in counts), f"{least}")
        table.add_section()
    Console(width=120).print(table)
