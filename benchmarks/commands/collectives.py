"""Collectives in the compiled program of one batch norm layer on eight devices,
jaxbn's beside Flax's, and what the layers give where devices differ. The eight
devices are simulated on the CPU.

Then programs compiled for up to 256 TPU v5e, in one slice and in several that a
slower network joins, and for a host of eight H100: one norm of 2,048 channels
on [8, 7, 7, 2048] on each device, forward and backward, and training steps of a
stem and a bottleneck, or of a whole ResNet-50 (some minutes each).
`python -m benchmarks programs --help` says what that needs.

    python -m benchmarks collectives --chips            # the CPU's alone
    python -m benchmarks collectives --workloads batch-2048 bottleneck ResNet-50

Time on the wires is not in the cycles. If a goal is missed, or what a device
receives grows with their number, the exit status is 1.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import jaxbn.linen
from benchmarks.chips import hlo
from benchmarks.chips.compilers import CHIPS
from benchmarks.chips.programs import MANY, Program, on_many_devices
from benchmarks.commands.programs import Figures, compiled, report, verdicts

AXIS = "data"
SHAPE = (16, 4, 4, 8)
LAYERS = {"jaxbn": jaxbn.linen.BatchNorm, "Flax": nn.BatchNorm}


def count(function, *arguments):
    try:
        text = jax.jit(function).lower(*arguments).compile().as_text()
    except (NotImplementedError, ValueError) as error:
        # The table says so: Flax's layer cannot take groups of devices under shard_map.
        return type(error).__name__
    return ", ".join(f"{n} {kind}" for kind, n in sorted(hlo.collectives(text).items())) or "none"


def programs(norm, **options):
    """Forward, forward and backward, and evaluation, as functions of x and variables."""
    train, evaluate = norm(use_running_average=False, **options), norm(use_running_average=True, **options)

    def forward(x, variables):
        y, updates = train.apply(variables, x, mutable=["batch_stats"])
        return y, updates["batch_stats"]

    def both(x, variables):
        def apply(x, params):
            return forward(x, {**variables, "params": params})

        y, pull, stats = jax.vjp(apply, x, variables["params"], has_aux=True)
        dx, dparams = pull(y)
        return y, dx, dparams, stats

    return forward, both, lambda x, variables: evaluate.apply(variables, x)


def by_shard_map(norm, **options):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), (AXIS,))
    batch, same = jax.P(AXIS), jax.P()
    out_specs = ((batch, same), (batch, batch, same, same), batch)
    if "axis_index_groups" in options:
        out_specs = ((batch, batch), (batch, batch, same, batch), batch)
    functions = programs(norm, axis_name=AXIS, **options)
    return [
        jax.shard_map(f, mesh=mesh, in_specs=(batch, same), out_specs=out)
        for f, out in zip(functions, out_specs, strict=True)
    ]


def masked_mean(norm):
    """The running means that two devices store: of [1] and [2, 3, 4], which is 2.5, and of [] and [2, 3, 4], 3."""
    layer = norm(use_running_average=False, axis_name=AXIS, momentum=0.0)
    x = jnp.array([[[1.0], [0.0], [0.0]], [[2.0], [3.0], [4.0]]])
    mask = jnp.array([[True, False, False], [True, True, True]])[..., None]
    variables = layer.init(jax.random.key(0), x[0])

    def stats(x, mask):
        return layer.apply(variables, x, mask=mask, mutable=["batch_stats"])[1]["batch_stats"]

    found = jax.vmap(stats, axis_name=AXIS, out_axes=None)(x, mask)
    empty = jax.vmap(stats, axis_name=AXIS, out_axes=None)(x, mask.at[0].set(False))
    return f"{found['mean'][0]:g}", f"{empty['mean'][0]:g}"


def error_far_from_zero(norm):
    """Largest output error over max|y| under sharded jit; mean/std is 1e4, and each device has another mean."""
    rng = np.random.default_rng(0)
    x = (1e4 + rng.standard_normal((8, 1, 8)) + rng.standard_normal((8, 512, 8))).astype(np.float32).reshape(-1, 8)
    exact = x.astype(np.float64)
    y = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
    layer = norm(use_running_average=False)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), (AXIS,))
    sharded = jax.device_put(x, jax.NamedSharding(mesh, jax.P(AXIS)))
    variables = layer.init(jax.random.key(0), x[:2])
    actual, _ = jax.jit(lambda x: layer.apply(variables, x, mutable=["batch_stats"]))(sharded)
    return f"{np.abs(np.asarray(actual, np.float64) - y).max() / np.abs(y).max():.1e}"


def growing(results: dict[Program, Figures]) -> list[str]:
    """Programs in which a device receives another number of bytes on another number of devices of one slice."""
    received = collections.defaultdict(dict)
    for program, figures in results.items():
        if program.slices == 1:
            received[program._replace(devices=1)][program.devices] = figures["jaxbn"]["received"]
    return [
        f"{alone.chip}, {', '.join(alone[1:5])}: expected as many bytes on any number of devices, got {own}"
        for alone, own in received.items()
        if len(set(own.values())) > 1
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    choice = {"help": "from: %(choices)s (default: %(default)s)"}
    parser.add_argument("--chips", choices=CHIPS, default=CHIPS, metavar="CHIP", nargs="*", **choice)
    parser.add_argument("--workloads", choices=MANY, default=MANY[:2], metavar="NAME", nargs="+", **choice)
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")


def run(arguments: argparse.Namespace) -> str | None:
    on_cpu()
    console, rows, wrong = Console(width=180), [], []
    for chip in arguments.chips:
        results = compiled(chip, [p for p in on_many_devices(chip) if p.workload in arguments.workloads])
        console.print(report(chip, results))
        missed = [(p, goal) for p, figures in results.items() for met, goal in verdicts(p, figures) if not met]
        wrong += growing(results) + [f"{chip}, {program}: {goal} is not met" for program, goal in missed]
        rows += [program._asdict() | {"figures": figures} for program, figures in results.items()]
        if arguments.out:
            arguments.out.write_text(json.dumps(rows, indent=1))
    return "\n".join(wrong) or None


def on_cpu() -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    x = jnp.asarray(np.random.default_rng(0).normal(size=SHAPE), jnp.float32)
    sharded = jax.device_put(x, jax.NamedSharding(jax.sharding.Mesh(np.array(jax.devices()), (AXIS,)), jax.P(AXIS)))
    groups = {"axis_index_groups": [[0, 1, 2, 3], [4, 5, 6, 7]]}
    modes = {
        "shard_map": (by_shard_map, {}, x),
        "shard_map, groups": (by_shard_map, groups, x),
        "sharded jit": (programs, {}, sharded),
    }
    table = Table("mode", "layer", "forward", "forward and backward", "evaluation", title="collectives")
    for mode, (make, options, given) in modes.items():
        for name, norm in LAYERS.items():
            variables = norm(use_running_average=True).init(jax.random.key(0), x[:2])
            table.add_row(mode, name, *(count(f, given, variables) for f in make(norm, **options)))
    console = Console(width=120)
    console.print(table)
    table = Table(
        "layer",
        "unequal masks (mean is 2.5)",
        "one shard empty (mean is 3)",
        "error at mean/std 1e4, sharded jit",
        title="results",
    )
    for name, norm in LAYERS.items():
        table.add_row(name, *masked_mean(norm), error_far_from_zero(norm))
    console.print(table)
