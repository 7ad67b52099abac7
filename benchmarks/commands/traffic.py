"""How often the compiled programs read or write memory, in units of the bytes of x: no clock, the same every time.

Run: python -m benchmarks.traffic        (on CPU; prints jaxbn, Flax's Linen layers, and the least)

Counted are the operands and results of the program's top level. What a fused loop reads twice counts once: that is
the cache's business. For GPUs and TPUs, without one: python -m benchmarks.programs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import jax
from rich.console import Console
from rich.table import Table

from benchmarks.hlo import traffic
from benchmarks.implementations import MODES, NORMS, PASSES, PROGRAMS, Case, arrays, forward_and_backward

SHAPE = (8, 56, 56, 256)
CONTENDERS = ("jaxbn", "flax.linen")


def passes(function: Callable, *arguments) -> float:
    x = arguments[0]
    return traffic(jax.jit(function).lower(*arguments).compile().as_text()) / x.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    table = Table("norm", "dtype", "mode", *CONTENDERS, "least", title=f"reads and writes of x {SHAPE}")
    for dtype in parser.parse_args().dtypes:
        for norm in NORMS:
            case = Case(norm, SHAPE, dtype)
            x, dy = arrays(case)
            for mode in MODES:
                counts = []
                for name in CONTENDERS:
                    train, evaluate, variables = PROGRAMS[name](case)
                    functions = {
                        "forward": (train, (x, variables)),
                        "forward+backward": (forward_and_backward(train), (x, dy, variables)),
                        "eval": (evaluate, (x, variables)),
                    }
                    function, given = functions[mode]
                    counts.append(passes(function, *given))
                # A row fits into the cache: read once it can be summed there.
                least = PASSES[mode] if norm not in ("layer", "rms") else 2 + 3 * (mode == "forward+backward")
                if mode == "eval" and norm in ("group", "instance"):
                    least = PASSES["forward"]
                table.add_row(norm, dtype, mode, *(f"{c:.1f}" for c in counts), f"{least}")
        table.add_section()
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
