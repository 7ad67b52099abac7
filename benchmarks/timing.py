"""Timing of implementations that take turns, and statistics of the times."""

from __future__ import annotations

import math
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax


def interleave(
    calls: dict[str, dict[str, Callable[[], Any]]],
    rounds: int,
    warm_up: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each call of each implementation. Every round times each of them once, in random order."""
    seconds = {name: {mode: [] for mode in modes} for name, modes in calls.items()}
    turns = [(name, mode, call) for name, modes in calls.items() for mode, call in modes.items()]
    chance = random.Random(0)
    for round_ in range(rounds + warm_up):
        chance.shuffle(turns)
        for name, mode, call in turns:
            # Not timed: threads of the call before may still spin, and its data fill the caches.
            call()
            start = clock()
            call()
            if round_ >= warm_up:
                seconds[name][mode].append(clock() - start)
    return seconds


def spread(seconds: list[float]) -> list[float]:
    """The 10th and the 90th percentile."""
    return statistics.quantiles(seconds, n=10, method="inclusive")[::8]


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def machine() -> dict[str, Any]:
    device = jax.devices()[0]
    return {"device": device.device_kind, "jax": jax.__version__, "command": sys.argv[1:]}


def versions() -> str:
    device = jax.devices()[0]
    return f"{device.device_kind} ({device.platform}), JAX {jax.__version__}, Python {platform.python_version()}"
