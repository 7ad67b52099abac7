"""The programs that `python -m benchmarks programs` and `collectives` compile, and the goals that each must meet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

ONE, SHARDED, MAPPED = "one device", "sharded jit", "shard_map"
FORWARD, BOTH, EVAL, STEP = "forward", "forward+backward", "eval", "step"
LAYERS = ("batch", "batch+relu", "layer", "rms", "group", "instance")
STEPS = {
    "h100": ("ResNet-50", "ResNet-50-less-memory", "transformer", "transformer-RMS"),
    "v5e": ("bottleneck", "transformer", "transformer-RMS"),
}
DTYPES = ("float32", "bfloat16")
# A norm of as many channels as ResNet-50's last, on few values: what devices send counts most.
DEEP = "batch-2048"
MANY = (DEEP, "bottleneck", "ResNet-50")


class Program(NamedTuple):
    chip: str
    workload: str  # One of LAYERS, STEPS or MANY.
    kind: str
    dtype: str
    mode: str = ONE
    devices: int = 1
    slices: int = 1

    def __str__(self) -> str:
        on = "" if self.mode == ONE else f" on {self.devices}"
        return ", ".join(self[1:5]) + on + (f" in {self.slices} slices" if self.slices > 1 else "")

    @property
    def least_passes(self) -> int | None:
        """The fewest reads and writes of an array like x; None for whole steps.

        Forward, the statistics read x, and y reads x again and is written. Backward, the sums add a read of dy to
        the kernel that makes y, and dx reads dy and x and is written. A row of layer and RMS norm fits on the chip,
        so x and dy are read once.
        """
        rows = self.workload in ("layer", "rms")
        if self.kind == EVAL:
            return 2 if rows or self.workload.startswith("batch") else 3
        return {FORWARD: 2 if rows else 3, BOTH: 4 if rows else 7}.get(self.kind)


class Goal(NamedTuple):
    """jaxbn's `figure` may be at most `most`, times that of the implementation `over` if there is one, plus `more`."""

    figure: str
    most: float
    over: str | None = None
    more: float = 0


def programs(chip: str) -> Iterator[Program]:
    for workload in LAYERS:
        for dtype in DTYPES:
            yield from (Program(chip, workload, kind, dtype) for kind in (FORWARD, BOTH, EVAL))
            if chip == "v5e" and workload.startswith("batch"):
                modes = (SHARDED, MAPPED)
                yield from (Program(chip, workload, kind, dtype, mode, 4) for mode in modes for kind in (BOTH, EVAL))
    for workload in STEPS[chip]:
        yield Program(chip, workload, STEP, "bfloat16")
    if chip == "v5e":
        yield Program(chip, "bottleneck", STEP, "bfloat16", SHARDED, 4)


def on_many_devices(chip: str) -> Iterator[Program]:
    numbers = [(8, 1)] if chip == "h100" else [(4, 1), (16, 1), (64, 1), (256, 1), (32, 2), (256, 4)]
    for mode in (MAPPED, SHARDED):
        for dtype in DTYPES:
            yield from (Program(chip, DEEP, BOTH, dtype, mode, *number) for number in numbers)
        for workload in MANY[1:]:
            most = 8 if chip == "h100" else 256
            yield from (
                Program(chip, workload, STEP, "bfloat16", mode, number) for number in sorted({most, min(most, 4)})
            )


def goals(program: Program) -> list[Goal]:
    chip, workload, kind, dtype, mode = program[:5]
    if workload == DEEP:
        most = {MAPPED: {"float32": 1, "bfloat16": 1.03}, SHARDED: {"float32": 0.95, "bfloat16": 1.01}}[mode][dtype]
        cycles = [Goal("cycles", most, "Flax")] if chip == "v5e" else []
        return [*cycles, Goal("collectives", 3 if dtype == "float32" else 2)]
    # There are no cycles on GPUs.
    if mode != ONE and (workload == "ResNet-50" or (workload == "bottleneck" and chip == "h100")):
        return []
    if workload == "bottleneck" and mode == MAPPED:
        return [Goal("cycles", 1.03, "Flax"), Goal("collectives", 9)]
    if workload == "ResNet-50-less-memory":
        return [Goal("bytes", 1.1, "Flax"), Goal("temporary", 0.75, "Flax")]
    if workload == "ResNet-50":
        return [Goal("bytes", 0.96, "Flax"), Goal("temporary", 1.04, "Flax")]
    if workload == "bottleneck":
        return [Goal("cycles", 0.97 if mode == ONE else 1, "Flax"), Goal("collectives", 1, "Flax")]
    if workload.startswith("transformer"):
        return [Goal("bytes" if chip == "h100" else "cycles", 1.03, "Flax")]
    if chip == "h100":
        most = {
            "layer": {FORWARD: 2.02, BOTH: 7.1, EVAL: 2.02},
            "rms": {FORWARD: 2.02, BOTH: 6.05, EVAL: 2.02},
        }.get(workload, {FORWARD: 3.05, BOTH: 7.05, EVAL: program.least_passes + 0.05})
        return [Goal("passes", most[kind])]
    most = 0.75 if (workload, kind, dtype, mode) == ("batch", BOTH, "float32", ONE) else 1.03
    # Batch norm and ReLU in bfloat16 is slower than Flax's when compiled alone, and not in networks: no goal.
    found = [] if (workload, kind, dtype) == ("batch+relu", BOTH, "bfloat16") else [Goal("cycles", most, "Flax")]
    if mode == SHARDED:
        # In float32 the pivot may take one more all-reduce.
        found.append(Goal("collectives", 1, "Flax", more=dtype == "float32" and kind == BOTH))
    return found if mode != MAPPED else [Goal("collectives", 1, "Flax")]
