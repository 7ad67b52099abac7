"""One quantity measured for jaxbn and for Flax: `Comparison`, and functions that measure some."""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax

from benchmarks.timing import interleave, spread

# The names in benchmarks/implementations.py of the programs that are compared.
FUNCTIONS = {"jaxbn": "jaxbn", "flax": "flax.linen"}
LINEN = {"jaxbn": "jaxbn.linen", "flax": "flax.linen"}
UNITS = {"ms": 1e-3, "us": 1e-6, "MB": 1e6, "x": 1}
STAGES = ("trace", "lower", "compile")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """`values` and `spreads` (10th and 90th percentile) of "jaxbn" and "flax", in seconds, bytes, or units of x."""

    part: str
    case: str
    measure: str
    unit: str
    values: dict[str, float]
    spreads: dict[str, list[float]] | None = None

    @property
    def ratio(self) -> float:
        return self.values["jaxbn"] / self.values["flax"]

    def text(self, name: str) -> str:
        text = self._scaled(self.values[name])
        if self.spreads:
            low, high = map(self._scaled, self.spreads[name])
            text += f" ({low} to {high})"
        return f"{text} {self.unit}"

    def _scaled(self, value: float) -> str:
        value /= UNITS[self.unit]
        return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def timed(
    part: str,
    case: str,
    calls: dict[str, dict[str, Callable]],
    rounds: int,
    unit: str = "ms",
    repeats: int = 1,
    warm_up: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Comparison]:
    """Times `calls[implementation][measure]`, each of which does its work `repeats` times."""
    seconds = interleave(calls, rounds, warm_up, clock)
    comparisons = []
    for measure in calls["jaxbn"]:
        each = {name: [s / repeats for s in seconds[name][measure]] for name in calls}
        values = {name: statistics.median(s) for name, s in each.items()}
        comparisons.append(Comparison(part, case, measure, unit, values, {name: spread(s) for name, s in each.items()}))
    return comparisons


def in_turn(names: Iterable[str], repeats: int) -> list[str]:
    """Every name `repeats` times, in alternating order."""
    names = list(names)
    return [name for k in range(repeats) for name in names[:: -1 if k % 2 else 1]]


def staged(
    part: str, case: str, functions: dict[str, tuple[Callable, tuple]], repeats: int
) -> tuple[list[Comparison], dict[str, Any]]:
    """Times of tracing, lowering and compiling, and each implementation's compiled program."""
    seconds = {name: {stage: [] for stage in STAGES} for name in functions}
    compiled = {}
    for function, arguments in functions.values():
        # Not timed: what Python does only the first time.
        jax.jit(function).trace(*arguments).lower()
    for name in in_turn(functions, repeats):
        function, arguments = functions[name]
        jax.clear_caches()
        gc.collect()
        start = time.perf_counter()
        traced = jax.jit(function).trace(*arguments)
        traced_at = time.perf_counter()
        lowered = traced.lower()
        lowered_at = time.perf_counter()
        compiled[name] = lowered.compile()
        times = (traced_at - start, lowered_at - traced_at, time.perf_counter() - lowered_at)
        for stage, elapsed in zip(STAGES, times, strict=True):
            seconds[name][stage].append(elapsed)
    comparisons = [
        Comparison(part, case, key, "ms", {name: statistics.median(s[key]) for name, s in seconds.items()})
        for key in STAGES
    ]
    return comparisons, compiled


def kept_bytes(function: Callable, first: Any, *others: Any, has_aux: bool = False, count_first: bool = True) -> int:
    """Bytes of the residuals that reverse mode of `function` keeps, outside of `jax.jit`.

    Leaves of `first` among them are left out unless `count_first`.
    """
    total = 0

    def measure(first: Any, *others: Any) -> None:
        nonlocal total
        pull = jax.vjp(function, first, *others, has_aux=has_aux)[1]
        kept = {id(v): v.size * v.dtype.itemsize for v in jax.tree.leaves(pull)}
        left_out = set() if count_first else {id(v) for v in jax.tree.leaves(first)}
        total = sum(size for key, size in kept.items() if key not in left_out)

    jax.eval_shape(measure, first, *others)
    return total
