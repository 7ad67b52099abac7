"""What jaxbn costs beside Flax, in one norm and in whole training steps.

    python -m benchmarks steps
    python -m benchmarks steps --parts residuals dispatch --out out/
    python -m benchmarks steps --parts models --models ResNet-18 --size 96

residuals   bytes that reverse mode of one norm keeps, over the bytes of x
models      training steps (loss, gradients, SGD, update of batch_stats), with
            and without donation of the state: time, memory, and time to trace,
            lower and compile
dispatch    calls outside of jit on a tiny array, and a single norm's time to
            trace, lower and compile
growth      forward and backward of a norm as its batch and its channels double
devices     the same as 1 to 8 CPU devices share one batch; the devices are
            simulated, in a child process

Each part prints a table of jaxbn over Flax. Implementations take turns within
one run, so that other load on the machine slows all of them alike. Compare
ratios, not times. --out saves steps.json and steps.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import jaxbn.linen
import jaxbn.nnx
from benchmarks.comparison import Comparison, kept_bytes, staged, timed
from benchmarks.implementations import IMPLEMENTATIONS, NORMS, PROGRAMS, Case, arrays, forward_and_backward
from benchmarks.timing import geometric_mean, machine, versions
from benchmarks.training import MODELS, measure_model

# The names in benchmarks/implementations.py of the programs that are compared.
FUNCTIONS = {"jaxbn": "jaxbn", "flax": "flax.linen"}
LINEN = {"jaxbn": "jaxbn.linen", "flax": "flax.linen"}
PAIRS = {"functions": FUNCTIONS, "linen": LINEN}
BOTH = "forward+backward"

RESIDUAL_SHAPE = (8, 28, 28, 128)
TINY_SHAPE = (4, 8)
# Calls per measurement, as one is too short to time.
CALLS = 20
IMAGE = (28, 28)
BATCHES = [1, 2, 4, 8, 16, 32, 64]
CHANNELS = [16, 32, 64, 128, 256, 512, 1024]
DEVICES = [1, 2, 4, 8]
SHARED_SHAPE = (32, 28, 28, 128)
AXIS = "data"


def measure_residuals() -> list[Comparison]:
    rows = []
    for norm in NORMS:
        for dtype in ("float32", "bfloat16"):
            case = Case(norm, RESIDUAL_SHAPE, dtype)
            x, _ = arrays(case)
            values = {}
            for name, program in FUNCTIONS.items():
                train, _, params = PROGRAMS[program](case)
                values[name] = kept_bytes(train, x, params, has_aux=True) / x.nbytes
            rows.append(Comparison("residuals", norm, dtype, "x", values))
    return rows


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


def measure_dispatch(rounds: int, repeats: int) -> list[Comparison]:
    rows = timed("dispatch", "outside jit", calls_outside_jit(), rounds, "us", CALLS)
    case = Case("batch", RESIDUAL_SHAPE, "float32")
    x, dy = arrays(case)
    for pair, programs in PAIRS.items():
        functions = {}
        for name, program in programs.items():
            train, _, params = PROGRAMS[program](case)
            functions[name] = (forward_and_backward(train), (x, dy, params))
        rows += staged("dispatch", f"{pair}, {BOTH} in jit", functions, repeats)[0]
    return rows


def measure_growth(rounds: int) -> list[Comparison]:
    shapes = {"batch": [(n, *IMAGE, 128) for n in BATCHES], "channels": [(8, *IMAGE, c) for c in CHANNELS]}
    sizes = {"batch": BATCHES, "channels": CHANNELS}
    rows = []
    for what in shapes:
        for size, shape in zip(sizes[what], shapes[what], strict=True):
            case = Case("batch", shape, "float32")
            calls = {name: {str(size): IMPLEMENTATIONS[program](case)[BOTH]} for name, program in LINEN.items()}
            rows += timed("growth", what, calls, rounds)
    return rows


def shared_call(layer: Any, number: int, sharded_by: str) -> Callable[[], Any]:
    """Forward and backward of `layer` on one global batch that `number` devices share."""
    x, dy = arrays(Case("batch", SHARED_SHAPE, "float32"))
    variables = layer(use_running_average=True).init(jax.random.key(0), x)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:number]), (AXIS,))
    split, same = jax.P(AXIS), jax.P()
    module = layer(use_running_average=False, axis_name=AXIS if sharded_by == "shard_map" else None)

    def train(x, params):
        return module.apply({**variables, "params": params}, x, mutable=["batch_stats"])

    function = forward_and_backward(train)
    if sharded_by == "shard_map":
        out_specs = (split, same, (split, same))
        function = jax.shard_map(function, mesh=mesh, in_specs=(split, split, same), out_specs=out_specs)
    specs = (split, split, same)
    arguments = [
        jax.device_put(v, jax.NamedSharding(mesh, spec))
        for v, spec in zip((x, dy, variables["params"]), specs, strict=True)
    ]
    compiled = jax.jit(function).lower(*arguments).compile()
    return lambda: jax.block_until_ready(compiled(*arguments))


def measure_devices(rounds: int) -> list[Comparison]:
    rows = []
    layers = {"jaxbn": jaxbn.linen.BatchNorm, "flax": nn.BatchNorm}
    for sharded_by in ("sharded jit", "shard_map"):
        for number in DEVICES:
            calls = {name: {str(number): shared_call(layer, number, sharded_by)} for name, layer in layers.items()}
            rows += timed("devices", sharded_by, calls, rounds)
    return rows


def measure_devices_apart(rounds: int) -> list[Comparison]:
    """`measure_devices` in a child process, as the number of devices cannot change once JAX has started."""
    if jax.config.jax_num_cpu_devices == DEVICES[-1]:
        return measure_devices(rounds)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks", "steps", "--parts", "devices", "--rounds", str(rounds)]
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(DEVICES[-1]), "JAX_PLATFORMS": "cpu"}
        subprocess.run([*command, "--out", folder], env=environment, check=True, stdout=subprocess.DEVNULL)
        return read(pathlib.Path(folder) / "steps.json")


def read(path: pathlib.Path) -> list[Comparison]:
    return [Comparison(**row) for row in json.loads(path.read_text())["results"]]


def exponent(rows: list[Comparison], name: str) -> float:
    """p of the least-squares fit `time = constant * size**p`."""
    sizes = [math.log(float(r.measure)) for r in rows]
    return statistics.linear_regression(sizes, [math.log(r.values[name]) for r in rows]).slope


def report(rows: list[Comparison], console: Console) -> None:
    for part in dict.fromkeys(r.part for r in rows):
        own = [r for r in rows if r.part == part]
        table = Table("case", "measure", "jaxbn / flax", "jaxbn", "flax", title=part)
        for case in dict.fromkeys(r.case for r in own):
            same_case = [r for r in own if r.case == case]
            for k, r in enumerate(same_case):
                table.add_row("" if k else case, r.measure, f"{r.ratio:.2f}", r.text("jaxbn"), r.text("flax"))
            if part in SIZED:
                powers = [f"size ** {exponent(same_case, name):.2f}" for name in ("jaxbn", "flax")]
                table.add_row("", "geometric mean", f"{geometric_mean([r.ratio for r in same_case]):.2f}", *powers)
            table.add_section()
        if part not in SIZED:
            for measure in dict.fromkeys(r.measure for r in own):
                ratios = [r.ratio for r in own if r.measure == measure]
                if len(ratios) > 1:
                    table.add_row("geometric mean", measure, f"{geometric_mean(ratios):.2f}", "", "")
        console.print(table)


def draw(rows: list[Comparison], path: pathlib.Path) -> None:
    """Draws jaxbn over Flax, a panel for each part: bars, or lines over sizes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parts = list(dict.fromkeys(r.part for r in rows))
    heights = [4 if part in SIZED else 1 + 0.22 * sum(r.part == part for r in rows) for part in parts]
    figure, panels = plt.subplots(
        len(parts), 1, figsize=(10, sum(heights)), height_ratios=heights, layout="constrained", squeeze=False
    )
    for part, panel in zip(parts, panels[:, 0], strict=True):
        own = [r for r in rows if r.part == part]
        if part in SIZED:
            for case in dict.fromkeys(r.case for r in own):
                same_case = [r for r in own if r.case == case]
                panel.plot([float(r.measure) for r in same_case], [r.ratio for r in same_case], marker="o", label=case)
            panel.set_xscale("log", base=2)
            panel.set(title=part, xlabel="size", ylabel="time, jaxbn / flax", ylim=(0, None))
            panel.axhline(1, color="black", linewidth=1)
            panel.legend()
        else:
            panel.barh([f"{r.case}: {r.measure}" for r in own], [r.ratio for r in own])
            panel.axvline(1, color="black", linewidth=1)
            panel.tick_params(axis="y", labelsize=7)
            panel.set(title=part, xlabel="jaxbn / flax")
            panel.invert_yaxis()
    figure.savefig(path, dpi=120)


SIZED = ("growth", "devices")
PARTS = ("residuals", "models", "dispatch", *SIZED)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    choice = {"nargs": "+", "help": "from: %(choices)s (default: all)"}
    parser.add_argument("--parts", choices=PARTS, default=PARTS, metavar="PART", **choice)
    parser.add_argument("--models", choices=list(MODELS), default=list(MODELS), metavar="MODEL", **choice)
    parser.add_argument(
        "--batch", type=int, default=16, help="batch of the models (%(default)s), 128 times as large for the MLP"
    )
    parser.add_argument("--size", type=int, default=64, help="height and width of the ResNets' images (%(default)s)")
    parser.add_argument("--rounds", type=int, default=11, help="how many times each call is timed (%(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=3, help="how many times each program is traced and compiled (%(default)s)"
    )
    parser.add_argument("--out", type=pathlib.Path, help="folder for steps.json and steps.png")


def run(arguments: argparse.Namespace) -> None:
    rounds, repeats = arguments.rounds, arguments.repeats
    measures = {
        "residuals": [measure_residuals],
        "models": [
            functools.partial(measure_model, name, arguments.batch, arguments.size, rounds, repeats)
            for name in arguments.models
        ],
        "dispatch": [lambda: measure_dispatch(rounds, repeats)],
        "growth": [lambda: measure_growth(rounds)],
        "devices": [lambda: measure_devices_apart(rounds)],
    }
    console = Console(width=130)
    rows = []
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
    for part in dict.fromkeys(arguments.parts):
        # disable=None shows the progress bar on terminals only, so that it does not fill log files.
        for measure in tqdm(measures[part], desc=part, disable=None):
            rows += measure()
            if arguments.out:
                results = {"machine": machine(), "results": [dataclasses.asdict(r) for r in rows]}
                (arguments.out / "steps.json").write_text(json.dumps(results, indent=1))
        report([r for r in rows if r.part == part], console)
    console.print(versions())
    if arguments.out:
        draw(rows, arguments.out / "steps.png")
