"""Calls of batch norm outside of jit on a tiny array, and its time to trace, lower and compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

import jaxbn.nnx
from benchmarks.comparison import FUNCTIONS, LINEN, Comparison, staged, timed
from benchmarks.implementations import BOTH, PROGRAMS, Case, arrays, forward_and_backward

PAIRS = {"functions": FUNCTIONS, "linen": LINEN}
TINY_SHAPE = (4, 8)
SHAPE = (8, 28, 28, 128)
# Calls per measurement, as one is too short to time.
CALLS = 20


def repeatedly(call: Callable, *arguments: Any) -> Callable[[], None]:
    def run() -> None:
        for _ in range(CALLS):
            jax.block_until_ready(call(*arguments))

    return run


def nnx_calls(module: Any, x: jax.Array) -> dict[str, Callable[[], None]]:
    trained, fixed = (module.BatchNorm(x.shape[-1], rngs=nnx.Rngs(0)) for _ in range(2))
    fixed.eval()
    return {"nnx, train": repeatedly(trained, x), "nnx, eval": repeatedly(fixed, x)}


def calls_outside_jit() -> dict[str, dict[str, Callable[[], None]]]:
    """Batch norm on a tiny array, `CALLS` times."""
    case = Case("batch", TINY_SHAPE, "float32")
    x, dy = arrays(case)
    calls = {"jaxbn": nnx_calls(jaxbn.nnx, x), "flax": nnx_calls(nnx, x)}
    for pair, programs in PAIRS.items():
        for name, program in programs.items():
            train, evaluate, params = PROGRAMS[program](case)
            calls[name] |= {
                f"{pair}, train": repeatedly(train, x, params),
                f"{pair}, train and gradients": repeatedly(forward_and_backward(train), x, dy, params),
                f"{pair}, eval": repeatedly(evaluate, x, params),
            }
    return calls


def measure(rounds: int, repeats: int) -> list[Comparison]:
    rows = timed("dispatch", "outside jit", calls_outside_jit(), rounds, "us", CALLS)
    case = Case("batch", SHAPE, "float32")
    x, dy = arrays(case)
    for pair, programs in PAIRS.items():
        functions = {}
        for name, program in programs.items():
            train, _, params = PROGRAMS[program](case)
            functions[name] = (forward_and_backward(train), (x, dy, params))
        rows += staged("dispatch", f"{pair}, {BOTH} in jit", functions, repeats)[0]
    return rows
