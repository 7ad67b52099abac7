"""Forward and backward of batch norm as its batch and its channels double."""

from __future__ import annotations

from benchmarks.comparison import LINEN, Comparison, timed
from benchmarks.implementations import BOTH, IMPLEMENTATIONS, Case

IMAGE = (28, 28)
BATCHES = [1, 2, 4, 8, 16, 32, 64]
CHANNELS = [16, 32, 64, 128, 256, 512, 1024]


def measure(rounds: int) -> list[Comparison]:
    shapes = {"batch": [(n, *IMAGE, 128) for n in BATCHES], "channels": [(8, *IMAGE, c) for c in CHANNELS]}
    sizes = {"batch": BATCHES, "channels": CHANNELS}
    rows = []
    for what in shapes:
        for size, shape in zip(sizes[what], shapes[what], strict=True):
            case = Case("batch", shape, "float32")
            calls = {name: {str(size): IMPLEMENTATIONS[program](case)[BOTH]} for name, program in LINEN.items()}
            rows += timed("growth", what, calls, rounds)
    return rows
